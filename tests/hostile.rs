//! Random requests in random chains, about half of them broken, against an exact oracle.
//!
//! Each case is a request of any type with legal or illegal numbers, cut into descriptors at
//! random, direct or indirect, and then perhaps broken in one place. The oracle knows from the
//! text alone which statuses are right, what is read and what the disk holds afterwards, so a
//! request that quietly works where it must fail is found as well as a crash.
//! `ADDCOW_SEED=N` runs another sequence.
//!
//! Not here: chains broken in a chosen place, with the reason (`chains.rs`).

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::disk::{Disk, Shape};
use common::guest::{Guest, Setup};
use common::mem::{END, EXTRA};
use common::model::{Model, Workload};
use common::request::{
    DISCARD, FLUSH, Framing, GET_ID, IN, IOERR, OK, OUT, Request, UNMAP, UNSUPP, UNTOUCHED,
    WRITE_ZEROES, header, payload,
};
use common::ring::{Buffer, DESC_SIZE, Desc, INDIRECT, NEXT, WRITE, chain};
use common::rng::Rng;
use common::{KIB, MIB, SECTOR, pattern, to_u32, to_u64, to_usize};

/// The serial number of the disk.
const SERIAL: &str = "hostile";

/// What the device announces about segments.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Sectors of the disk.
    sectors: u64,
    /// Most segments of a DISCARD and of a WRITE_ZEROES.
    segments: [u32; 2],
    /// Most sectors of a segment of a DISCARD and of a WRITE_ZEROES.
    longest: [u32; 2],
}

impl Limits {
    /// Whether `count` sectors from `first` on lie on the disk.
    fn holds(&self, first: u64, count: u64) -> bool {
        first.checked_add(count).is_some_and(|end| end <= self.sectors)
    }
}

/// A sector for a request of `count` sectors: mostly a good one.
fn draw_sector(rng: &mut Rng, limits: &Limits, count: u64) -> u64 {
    match rng.pick(0..12) {
        0 => limits.sectors - count.min(limits.sectors),
        1 => limits.sectors - rng.pick(0..count + 2),
        2 => limits.sectors + rng.pick(0..3),
        3 => [1 << 55, (1 << 55) - 1, u64::MAX, 1 << 63, u64::MAX / 512][rng.index(5)],
        _ => rng.pick(0..limits.sectors - count),
    }
}

/// Segments, mostly good ones.
fn draw_segments(rng: &mut Rng, limits: &Limits) -> Vec<(u64, u32, u32)> {
    let segment = |rng: &mut Rng| {
        let count = rng.pick(1..200);
        let flags = [0, 0, 0, UNMAP, UNMAP, 2, 1 << 31][rng.index(7)];
        (draw_sector(rng, limits, count), to_u32(to_usize(count)), flags)
    };
    (0..rng.pick(1..5)).map(|_| segment(rng)).collect()
}

/// A request of any kind.
fn draw_request(rng: &mut Rng, limits: &Limits) -> Request {
    let count = rng.pick(0..24);
    let sector = draw_sector(rng, limits, count);
    let odd = if rng.one_in(6) { rng.index(511) + 1 } else { 0 };
    let len = to_usize(count) * SECTOR + odd;
    let status = if rng.one_in(5) { 1 + rng.index(600) } else { 1 };
    let segments = |rng: &mut Rng| {
        let mut bytes = payload(&draw_segments(rng, limits));
        let cut = if rng.one_in(8) { rng.index(bytes.len()) } else { bytes.len() };
        bytes.truncate(cut);
        bytes
    };
    let mut request = match rng.pick(0..16) {
        0..4 => Request::read(sector, len),
        4..8 => Request::new(OUT, sector, &pattern(rng.next(), sector, len), status),
        8 => Request::new(FLUSH, 0, &[], status),
        9 => Request::get_id(rng.index(40)),
        10..12 => Request::new(DISCARD, 0, &segments(rng), status),
        12..15 => Request::new(WRITE_ZEROES, 0, &segments(rng), status),
        _ => Request::new([2, 3, 9, 15, 77, u32::MAX][rng.index(6)], sector, &[], status),
    };
    if rng.one_in(30) {
        request.readable.truncate(rng.index(16));
    }
    request
}

/// The little-endian number of `N` bytes at `at`.
fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    (0..len).rev().fold(0, |value, index| value << 8 | u64::from(bytes[at + index]))
}

/// The segments in a payload of whole segments.
fn segments_of(body: &[u8]) -> Vec<(u64, u64, u64)> {
    let decode = |s: &[u8]| (number(s, 0, 8), number(s, 8, 4), number(s, 12, 4));
    body.chunks_exact(16).map(decode).collect()
}

/// Which statuses are right when a request is refused; none when it has to work.
///
/// The text does not order the checks, so with two faults either status is right.
fn refusals(request: &Request, limits: &Limits) -> Vec<u8> {
    if request.readable.len() < 16 {
        return vec![IOERR];
    }
    let kind = number(&request.readable, 0, 4);
    let (sector, body) = (number(&request.readable, 8, 8), &request.readable[16..]);
    let transfer = |len: usize| {
        let good = len.is_multiple_of(SECTOR) && limits.holds(sector, to_u64(len / SECTOR));
        if good { vec![] } else { vec![IOERR] }
    };
    match u32::try_from(kind).expect("32 bits") {
        IN => transfer(request.writable - 1),
        OUT => transfer(body.len()),
        FLUSH | GET_ID => vec![],
        kind @ (DISCARD | WRITE_ZEROES) => segment_refusals(kind, body, limits),
        _ => vec![UNSUPP],
    }
}

/// The same for the two requests made of segments.
fn segment_refusals(kind: u32, body: &[u8], limits: &Limits) -> Vec<u8> {
    let mut right = Vec::new();
    let which = usize::from(kind == WRITE_ZEROES);
    let too_many = to_u64(body.len()) > 16 * u64::from(limits.segments[which]);
    if body.is_empty() || !body.len().is_multiple_of(16) || too_many {
        right.push(IOERR);
    }
    for (first, count, flags) in segments_of(body) {
        if !limits.holds(first, count) || count > u64::from(limits.longest[which]) {
            right.push(IOERR);
        }
        if flags & !1 != 0 || (kind == DISCARD && flags != 0) {
            right.push(UNSUPP);
        }
    }
    right
}

/// What a request that worked did to the model, or what it had to read.
fn apply(request: &Request, data: &[u8], model: &mut Model) {
    let kind = u32::try_from(number(&request.readable, 0, 4)).expect("32 bits");
    let (sector, body) = (number(&request.readable, 8, 8), &request.readable[16..]);
    match kind {
        IN => model.check(sector, data, "read"),
        OUT => model.write(sector, body),
        DISCARD => segments_of(body).iter().for_each(|&(at, count, _)| model.discard(at, count)),
        WRITE_ZEROES => segments_of(body).iter().for_each(|&(at, count, _)| model.zero(at, count)),
        GET_ID => {
            let mut want = SERIAL.as_bytes().to_vec();
            want.resize(20, 0);
            want.resize(data.len(), 0);
            assert_eq!(data, want, "serial");
            return;
        }
        _ => {}
    }
    if kind != IN {
        assert!(data.iter().all(|&byte| byte == 0), "writable bytes before the status");
    }
}

/// Breaks `descs`, whose links are indices into a table of `table` entries (the slot numbers are
/// `slots`), in one place; what was done, or none when this way does not apply.
fn break_chain(
    rng: &mut Rng,
    descs: &mut [Desc],
    slots: &[u16],
    table: u16,
) -> Option<&'static str> {
    let last = descs.len() - 1;
    let any = rng.index(descs.len());
    match rng.pick(0..6) {
        0 => {
            descs[last].flags |= NEXT;
            descs[last].next = slots[any];
            Some("loop")
        }
        1 => {
            descs[any].flags |= NEXT;
            descs[any].next = table + [0, 1, 1000][rng.index(3)];
            Some("next out of range")
        }
        2 if descs[any].len > 0 => {
            let hole = [END, EXTRA, u64::MAX, u64::MAX - 64, END + 4096, END - 1][rng.index(6)];
            descs[any].addr = hole;
            descs[any].len = descs[any].len.max(2);
            Some("buffer outside memory")
        }
        3 if last > 0 && descs[last].flags & WRITE != 0 && descs[0].flags & WRITE == 0 => {
            descs[0].flags |= WRITE;
            descs[last].flags &= !WRITE;
            Some("readable after writable")
        }
        4 => {
            descs[any].flags |= INDIRECT | NEXT;
            descs[any].next = slots[0];
            Some("INDIRECT with NEXT, or nested")
        }
        _ => None,
    }
}

/// Breaks the one descriptor that names an indirect table.
fn break_table(rng: &mut Rng, outer: &mut Desc) -> &'static str {
    match rng.pick(0..4) {
        0 => {
            outer.len = [0, outer.len - 1, outer.len + 8, 15][rng.index(4)];
            "length of the table"
        }
        1 => {
            outer.addr = [END, EXTRA, u64::MAX - 15, END - 8][rng.index(4)];
            "table outside memory"
        }
        _ => {
            outer.flags |= NEXT;
            outer.next = 127;
            "INDIRECT with NEXT"
        }
    }
}

/// Puts `buffers` on ring 0, perhaps broken; the head and how it was broken.
fn publish(
    rng: &mut Rng,
    guest: &mut Guest,
    buffers: &[Buffer],
    indirect: bool,
) -> (u16, Option<&'static str>) {
    let breaks = rng.one_in(2);
    let first = to_u32(rng.index(128));
    // 37 has no divisor in common with 128, so the slots are distinct.
    let slot = |at: u32| u16::try_from((first + 37 * at) % 128).expect("small");
    let slots: Vec<u16> = if indirect {
        (0..).take(buffers.len()).collect()
    } else {
        (0..to_u32(buffers.len())).map(slot).collect()
    };
    let mut descs = chain(buffers, &slots);
    let mut broken = None;
    if !indirect {
        // The link of a last descriptor means nothing.
        descs[buffers.len() - 1].next = 0xeeee;
        if breaks {
            broken = break_chain(rng, &mut descs, &slots, 128);
        }
        for (slot, desc) in slots.iter().zip(&descs) {
            guest.rings[0].put(*slot, *desc);
        }
        guest.rings[0].publish(slots[0]);
        return (slots[0], broken);
    }
    let inside = rng.one_in(2);
    if breaks && inside {
        let entries = u16::try_from(descs.len()).expect("short");
        broken = break_chain(rng, &mut descs, &slots, entries);
    }
    let table: Vec<u8> = descs.iter().flat_map(|desc| desc.bytes()).collect();
    let addr = guest.mem.buffer(table.len() + DESC_SIZE).next_multiple_of(16);
    guest.mem.write(addr, &table);
    let flags = INDIRECT | if rng.one_in(4) { WRITE } else { 0 };
    let mut outer = Desc { addr, len: to_u32(table.len()), flags, next: 0xffff };
    if breaks && !inside {
        broken = Some(break_table(rng, &mut outer));
    }
    let head = slot(0);
    guest.rings[0].put(head, outer);
    guest.rings[0].publish(head);
    (head, broken)
}

/// Draws, sends and checks one case.
fn one_case(rng: &mut Rng, guest: &mut Guest, limits: &Limits, model: &mut Model) {
    let request = draw_request(rng, limits);
    let framing = Framing::random(rng, &request, 7);
    let (buffers, pending) = guest.place(&request, &framing);
    let (head, broken) = publish(rng, guest, &buffers, framing.indirect);
    guest.track(0, head, pending);
    guest.kick(0);
    let (back, reply) = guest.finish(0);
    assert_eq!(back, head, "another chain came back");
    let what = format!("{:?} {framing:?} {broken:?}", &request.readable.get(..16));
    if broken.is_some() {
        assert_eq!(reply.used_len, 0, "used length of a broken chain: {what}");
        assert!(reply.writable.iter().all(|&byte| byte == UNTOUCHED), "written: {what}");
        return;
    }
    assert_eq!(reply.used_len, to_u32(request.writable), "used length: {what}");
    let right = refusals(&request, limits);
    if right.is_empty() {
        assert_eq!(reply.status(), OK, "{what}");
        apply(&request, reply.data(), model);
    } else {
        assert!(right.contains(&reply.status()), "{} is none of {right:?}: {what}", reply.status());
        assert!(reply.data().iter().all(|&byte| byte == 0), "data of a failed request: {what}");
    }
}

/// Runs `cases` random cases on a disk of `shape`.
fn gets_the_right_answers(shape: Shape, seed: u64, cases: usize) {
    let disk = Disk::create(shape);
    let mut daemon = disk.serve(&["--serial", SERIAL]);
    let mut guest = daemon.guest(Setup::default());
    let config = guest.config();
    let limits = Limits {
        sectors: config.capacity(),
        segments: [config.max_discard_seg(), config.max_write_zeroes_seg()],
        longest: [config.max_discard_sectors(), config.max_write_zeroes_sectors()],
    };
    let mut model = Model::new(disk.initial());
    let mut rng = Rng::new(seed);
    for case in 0..cases {
        one_case(&mut rng, &mut guest, &limits, &mut model);
        if case % 500 == 499 {
            Workload::verify(&mut guest, &mut model);
        }
    }
    Workload::verify(&mut guest, &mut model);
    drop(guest);
    daemon.stop();
    common::assert_bytes(&disk.flat_view(), &model.bytes, "the files afterwards");
}

#[test]
fn random_requests_on_small_clusters_get_exactly_the_right_answers() {
    gets_the_right_answers(Shape::new(2 * MIB + 512, 4 * KIB).base(MIB + 512), 7001, 3000);
}

#[test]
fn random_requests_on_large_clusters_get_exactly_the_right_answers() {
    gets_the_right_answers(Shape::new(3 * MIB + 1024, 2 * MIB).base(4 * MIB), 7002, 2000);
}

#[test]
fn descriptors_that_change_while_the_device_reads_them_change_nothing_on_the_disk() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    let mut guest = daemon.guest(Setup::default());
    let place = |byte| guest.mem.alloc_filled(64 * 1024, byte);
    let (head_at, data_at) = (place(0), place(UNTOUCHED));
    guest.mem.write(head_at, &header(IN, 5));
    let header_buffer = Buffer { addr: head_at, len: 16, writable: false };
    let data_buffer = Buffer { addr: data_at, len: 513, writable: true };
    let good = chain(&[header_buffer, data_buffer], &[0, 1]);
    let done = Arc::new(AtomicBool::new(false));
    let (memory, table, flag) = (Arc::clone(&guest.mem), guest.rings[0].desc, Arc::clone(&done));
    let first = good.clone();
    // Another processor of the guest rewrites descriptors and header all the time; the type is
    // never one that changes the disk.
    let writer = std::thread::spawn(move || {
        let mut rng = Rng::new(11);
        while !flag.load(Ordering::Relaxed) {
            let mut descs = first.clone();
            let at = rng.index(2);
            match rng.pick(0..6) {
                0 => descs[at].len = [0, 1, 16, 512, 4096, u32::MAX][rng.index(6)],
                1 => descs[at].addr = [END, u64::MAX, data_at, head_at][rng.index(4)],
                2 => descs[at].flags = u16::try_from(rng.pick(0..8)).expect("small"),
                3 => descs[at].next = [0, 1, 2, 0xffff][rng.index(4)],
                4 => memory.write(head_at, &header([IN, FLUSH, GET_ID, 99][rng.index(4)], 1 << 50)),
                _ => memory.write(head_at, &header(IN, rng.pick(0..8192))),
            }
            memory.write(table + to_u64(at * DESC_SIZE), &descs[at].bytes());
        }
    });
    for _ in 0..3000 {
        guest.rings[0].publish(0);
        guest.kick(0);
        let used = guest.rings[0].wait();
        assert_eq!(used.head, 0);
        // Half of an old length and half of a new one is a length, too; but what is used lies in
        // guest memory.
        assert!(u64::from(used.len) <= END, "used length {}", used.len);
    }
    done.store(true, Ordering::Relaxed);
    writer.join().expect("the other processor");
    for (slot, desc) in [0, 1].into_iter().zip(good) {
        guest.rings[0].put(slot, desc);
    }
    guest.stop_ring(0);
    guest.rings[0].restart(0);
    guest.start_ring(0);
    common::assert_bytes(&guest.read_all(), &disk.initial(), "the disk");
    assert!(daemon.is_alive());
}
