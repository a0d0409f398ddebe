//! A flat model of a disk and a seeded mixed workload that compares the device with it.
//!
//! The model is exact but for DISCARD, which leaves each sector as it was or zero; whatever it is
//! first read as, it has to stay (VIRTIO 1.3, 5.2.6.2, and no stale bytes). Requests of a batch
//! never share a sector, but often a cluster, and run on all queues at once.
//!
//! Not here: crashes and faults; the disk works.

use std::collections::HashMap;
use std::ops::Range;

use super::guest::Guest;
use super::request::{Framing, OK, Reply, Request, UNMAP};
use super::rng::Rng;
use super::{SECTOR, assert_bytes, pattern, to_u32, to_u64, to_usize};

/// What a disk has to hold.
#[derive(Debug)]
pub struct Model {
    /// The content of the disk.
    pub bytes: Vec<u8>,
    /// Sectors that were discarded and not seen since: the bytes above, or zeros.
    unsure: Vec<bool>,
}

impl Model {
    /// A model of a disk that holds `bytes`.
    pub fn new(bytes: Vec<u8>) -> Self {
        let unsure = vec![false; bytes.len() / SECTOR];
        Self { bytes, unsure }
    }

    /// How many sectors the disk has.
    pub fn sectors(&self) -> u64 {
        to_u64(self.unsure.len())
    }

    /// The guest wrote `data` at `sector`.
    pub fn write(&mut self, sector: u64, data: &[u8]) {
        let start = to_usize(sector) * SECTOR;
        self.bytes[start..start + data.len()].copy_from_slice(data);
        self.settle(sector, data.len() / SECTOR);
    }

    /// The guest zeroed `count` sectors.
    pub fn zero(&mut self, sector: u64, count: u64) {
        self.write(sector, &vec![0; to_usize(count) * SECTOR]);
    }

    /// The guest discarded `count` sectors.
    pub fn discard(&mut self, sector: u64, count: u64) {
        self.unsure[to_usize(sector)..][..to_usize(count)].fill(true);
    }

    /// The disk has `len` bytes now, whole sectors; what is new reads zeros.
    pub fn resize(&mut self, len: usize) {
        self.bytes.resize(len, 0);
        self.unsure.resize(len / SECTOR, false);
    }

    /// The content of `count` sectors is known again.
    fn settle(&mut self, sector: u64, count: usize) {
        self.unsure[to_usize(sector)..][..count].fill(false);
    }

    /// Checks what was read at `sector`, and learns what became of discarded sectors.
    pub fn check(&mut self, sector: u64, got: &[u8], what: &str) {
        for (index, piece) in got.chunks(SECTOR).enumerate() {
            let at = to_usize(sector) + index;
            let want = &mut self.bytes[at * SECTOR..][..SECTOR];
            if std::mem::take(&mut self.unsure[at]) && piece.iter().all(|&byte| byte == 0) {
                want.fill(0);
            }
            if piece != want {
                let zeros = if piece.iter().all(|&byte| byte == 0) { " (zeros)" } else { "" };
                assert_bytes(piece, want, &format!("{what}: sector {at}{zeros}"));
            }
        }
    }
}

/// One operation of the workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read sectors of the range.
    Read(Range<u64>),
    /// Write the range with a pattern of this seed.
    Write(Range<u64>, u64),
    /// Zero the ranges (one segment each), with or without the unmap flag.
    Zero(Vec<Range<u64>>, u32),
    /// Discard the ranges (one segment each).
    Discard(Vec<Range<u64>>),
    /// Flush.
    Flush,
}

impl Op {
    /// The request that does it.
    pub fn request(&self) -> Request {
        let segment =
            |flags| move |r: &Range<u64>| (r.start, to_u32(to_usize(r.end - r.start)), flags);
        match self {
            Self::Read(range) => {
                Request::read(range.start, to_usize(range.end - range.start) * SECTOR)
            }
            Self::Write(range, seed) => Request::write(range.start, &data(range, *seed)),
            Self::Zero(ranges, flags) => {
                let segments: Vec<_> = ranges.iter().map(segment(*flags)).collect();
                Request::write_zeroes(&segments)
            }
            Self::Discard(ranges) => {
                let segments: Vec<_> = ranges.iter().map(segment(0)).collect();
                Request::discard(&segments)
            }
            Self::Flush => Request::flush(),
        }
    }

    /// The sectors that it touches.
    fn ranges(&self) -> Vec<Range<u64>> {
        match self {
            Self::Read(range) | Self::Write(range, _) => vec![range.clone()],
            Self::Zero(ranges, _) | Self::Discard(ranges) => ranges.clone(),
            Self::Flush => Vec::new(),
        }
    }

    /// Applies it to the model, or checks the data that it read against it.
    pub fn apply(&self, model: &mut Model, reply: &Reply) {
        match self {
            Self::Read(range) => model.check(range.start, reply.data(), &format!("{self:?}")),
            Self::Write(range, seed) => model.write(range.start, &data(range, *seed)),
            Self::Zero(ranges, _) => {
                ranges.iter().for_each(|range| model.zero(range.start, range.end - range.start));
            }
            Self::Discard(ranges) => {
                ranges.iter().for_each(|range| model.discard(range.start, range.end - range.start));
            }
            Self::Flush => {}
        }
    }
}

/// The bytes that a write of `range` with `seed` writes.
fn data(range: &Range<u64>, seed: u64) -> Vec<u8> {
    pattern(seed, range.start, to_usize(range.end - range.start) * SECTOR)
}

/// A seeded workload on all queues of a guest.
#[derive(Debug)]
pub struct Workload {
    /// Where its choices come from.
    pub rng: Rng,
    /// Most sectors of a request or a segment.
    pub longest: u64,
    /// Most requests in a batch.
    pub batch: u64,
}

impl Workload {
    /// A workload with the choices of `seed`.
    pub fn new(seed: u64) -> Self {
        Self { rng: Rng::new(seed), longest: 400, batch: 12 }
    }

    /// A range of sectors that no request of the batch touches yet; often a short one, often
    /// close to `near`.
    fn range(&mut self, sectors: u64, near: u64, taken: &mut Vec<Range<u64>>) -> Range<u64> {
        loop {
            let len = match self.rng.pick(0..4) {
                0 => 1,
                1 => self.rng.pick(1..9),
                2 => self.rng.pick(1..self.longest.min(130)),
                _ => self.rng.pick(1..self.longest),
            };
            let len = len.min(sectors);
            let first = match self.rng.pick(0..8) {
                0 => sectors - len,
                1..4 => (near + self.rng.pick(0..160)).min(sectors - len),
                _ => self.rng.pick(0..sectors - len + 1),
            };
            let range = first..first + len;
            if taken.iter().all(|other| other.end <= range.start || range.end <= other.start) {
                taken.push(range.clone());
                return range;
            }
        }
    }

    /// The next operation, clear of the sectors in `taken`.
    pub fn op(&mut self, sectors: u64, near: u64, taken: &mut Vec<Range<u64>>) -> Op {
        let mut ranges = |this: &mut Self| {
            let count = this.rng.pick(1..4);
            (0..count).map(|_| this.range(sectors, near, taken)).collect::<Vec<_>>()
        };
        match self.rng.pick(0..20) {
            0..8 => Op::Write(ranges(self)[0].clone(), self.rng.next()),
            8..14 => Op::Read(ranges(self)[0].clone()),
            14..17 => Op::Zero(ranges(self), if self.rng.one_in(2) { UNMAP } else { 0 }),
            17..19 => Op::Discard(ranges(self)),
            _ => Op::Flush,
        }
    }

    /// Runs `batches` batches on `guest` and keeps `model` in step.
    pub fn run(&mut self, guest: &mut Guest, model: &mut Model, batches: usize) {
        for _ in 0..batches {
            self.run_batch(guest, model, |_| {});
        }
    }

    /// Submits one batch on all queues, does something, then checks every reply.
    pub fn run_batch(
        &mut self,
        guest: &mut Guest,
        model: &mut Model,
        meanwhile: impl FnOnce(&mut Guest),
    ) {
        let sectors = model.sectors();
        let near = self.rng.pick(0..sectors);
        let (mut taken, mut flying) = (Vec::new(), HashMap::new());
        for _ in 0..self.rng.pick(1..self.batch) {
            let op = self.op(sectors, near, &mut taken);
            let request = op.request();
            let framing = Framing::random(&mut self.rng, &request, 6);
            let queue = self.rng.index(guest.rings.len());
            if guest.rings[queue].room() < 16 {
                continue;
            }
            let head = guest.submit(queue, &request, &framing);
            if self.rng.one_in(2) {
                guest.kick(queue);
            }
            flying.insert((queue, head), (op, request.writable, framing));
        }
        (0..guest.rings.len()).for_each(|queue| guest.kick(queue));
        meanwhile(guest);
        for queue in 0..guest.rings.len() {
            for _ in 0..flying.keys().filter(|(q, _)| *q == queue).count() {
                let (head, reply) = guest.finish(queue);
                let (op, writable, framing) = &flying[&(queue, head)];
                assert_eq!(reply.status(), OK, "status of {op:?} with {framing:?}");
                assert_eq!(reply.used_len, to_u32(*writable), "used length of {op:?}");
                op.apply(model, &reply);
            }
        }
    }

    /// Reads the whole disk and checks it.
    pub fn verify(guest: &mut Guest, model: &mut Model) {
        let bytes = guest.read_all();
        assert_eq!(bytes.len(), model.bytes.len(), "size of the disk");
        model.check(0, &bytes, "whole disk");
    }
}
