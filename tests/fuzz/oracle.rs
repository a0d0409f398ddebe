//! A second reading of VIRTIO 1.3, for `requests`: which chains are sound (2.7), and what a block
//! request asks for (5.2.6).
//!
//! Works on a copy of guest memory. Two numbers are limits of ours, announced or documented: how
//! many descriptors a chain may have, and how many sectors a segment.
//!
//! Not here: anything from the library.

use super::{to_u64, to_usize};

/// Guest memory: start and length of each region. The first two touch; a hole follows.
pub const REGIONS: [(u64, usize); 3] = [(0, 0x4000), (0x4000, 0x4000), (0x2_0000, 0x4000)];
/// The most descriptors of a chain; a limit of ours, not of the text.
const MAX_DESCRIPTORS: u32 = 1024;
/// Descriptor flag (2.7.5): the chain goes on.
pub const NEXT: u16 = 1;
/// The device writes here.
pub const WRITE: u16 = 2;
/// A table of descriptors.
pub const INDIRECT: u16 = 4;

/// A chain as the text reads it: the buffers of both parts.
#[derive(Debug, Clone, Default)]
pub struct Walked {
    /// Device-readable buffers.
    pub readable: Vec<(u64, u32)>,
    /// Device-writable buffers.
    pub writable: Vec<(u64, u32)>,
}

impl Walked {
    /// Bytes of a part.
    pub fn len(part: &[(u64, u32)]) -> u64 {
        part.iter().map(|(_, len)| u64::from(*len)).sum()
    }
}

/// A copy of guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memory {
    /// The regions' bytes.
    pub regions: [Vec<u8>; 3],
}

impl Memory {
    /// Region and offset of an address.
    pub fn place(address: u64) -> Option<(usize, usize)> {
        REGIONS.iter().enumerate().find_map(|(index, (start, len))| {
            let offset = address.checked_sub(*start).filter(|offset| *offset < to_u64(*len))?;
            Some((index, to_usize(offset)))
        })
    }

    /// Whether all of a buffer is memory; an empty one always is.
    pub fn holds(address: u64, len: u32) -> bool {
        let (mut at, mut left) = (address, usize::try_from(len).expect("64 bits"));
        while left > 0 {
            let Some((region, offset)) = Self::place(at) else { return false };
            let now = (REGIONS[region].1 - offset).min(left);
            left -= now;
            at += to_u64(now);
        }
        true
    }

    /// The bytes at an address, if there are that many.
    pub fn get(&self, address: u64, len: usize) -> Option<Vec<u8>> {
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let (region, offset) = Self::place(address.checked_add(to_u64(bytes.len()))?)?;
            let end = (offset + len - bytes.len()).min(REGIONS[region].1);
            bytes.extend_from_slice(&self.regions[region][offset..end]);
        }
        Some(bytes)
    }

    /// The little-endian number of `len` bytes at an address of a ring.
    pub fn number(&self, address: u64, len: usize) -> u64 {
        let bytes = self.get(address, len).expect("rings are in memory");
        bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    /// The descriptor at an address, if it is in memory: address, length, flags, next.
    pub fn descriptor(&self, address: u64) -> Option<(u64, u32, u16, u16)> {
        let bytes = self.get(address, 16)?;
        let address = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
        let len = u32::from_le_bytes(bytes[8..12].try_into().expect("4 bytes"));
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Some((address, len, word(12), word(14)))
    }

    /// Walks a chain as the text says; `None` if it breaks a rule.
    pub fn walk(&self, table: u64, size: u16, indirect: bool, head: u16) -> Option<Walked> {
        let mut walked = Walked::default();
        let (mut table, mut size, mut index) = (table, u32::from(size), head);
        let (mut count, mut inside) = (0, false);
        loop {
            count += 1;
            if u32::from(index) >= size || count > MAX_DESCRIPTORS {
                return None;
            }
            let entry = table.checked_add(u64::from(index) * 16)?;
            let (address, len, flags, next) = self.descriptor(entry)?;
            if flags & INDIRECT != 0 {
                if inside || !indirect || flags & NEXT != 0 || len == 0 || !len.is_multiple_of(16) {
                    return None;
                }
                (table, size, index, inside) = (address, len / 16, 0, true);
                continue;
            }
            if !Self::holds(address, len) || flags & WRITE == 0 && !walked.writable.is_empty() {
                return None;
            }
            let part = if flags & WRITE == 0 { &mut walked.readable } else { &mut walked.writable };
            part.push((address, len));
            if Walked::len(&walked.readable) + Walked::len(&walked.writable) > 1 << 32 {
                return None;
            }
            if flags & NEXT == 0 {
                return Some(walked);
            }
            index = next;
        }
    }

    /// The bytes of a part of a chain, at most so many.
    pub fn gather_up_to(&self, part: &[(u64, u32)], most: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (address, len) in part {
            let len = usize::try_from(*len).expect("64 bits").min(most - bytes.len());
            bytes.extend(self.get(*address, len).expect("was walked"));
        }
        bytes
    }

    /// Of a writable part all bytes but the last, and the last; `None` if it is empty.
    pub fn ends_of(&self, part: &[(u64, u32)]) -> Option<(Vec<u8>, u8)> {
        let mut bytes = self.gather_up_to(part, usize::MAX >> 1);
        let status = bytes.pop()?;
        Some((bytes, status))
    }

    /// Takes the bytes of a buffer from `other`.
    pub fn copy_from(&mut self, other: &Self, address: u64, len: u32) {
        let bytes = other.get(address, usize::try_from(len).expect("64 bits"));
        // The last byte may be the last of all addresses.
        for (index, byte) in bytes.expect("was walked").into_iter().enumerate() {
            let (region, offset) = Self::place(address + to_u64(index)).expect("was walked");
            self.regions[region][offset] = byte;
        }
    }
}

/// What a request is to do, as the text reads it.
#[derive(Debug, Clone)]
pub enum Wanted {
    /// Nothing can be answered.
    Silent,
    /// One of these statuses, and nothing done.
    Refused(Vec<u8>),
    /// These sectors.
    Read(u64, usize),
    /// These bytes at this sector.
    Write(u64, Vec<u8>),
    /// Nothing that shows.
    Flush,
    /// The serial.
    Serial,
    /// These ranges of sectors, `true`: discarded only.
    Zero(Vec<(u64, u64)>, bool),
}

/// What there is to know to judge a request.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Sectors of the disk.
    pub sectors: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether DISCARD and WRITE_ZEROES were negotiated.
    pub zeroes: bool,
}

impl Rules {
    /// Reads a request.
    pub fn judge(self, readable: &[u8], writable: u64) -> Wanted {
        let Some(data_len) = writable.checked_sub(1) else { return Wanted::Silent };
        let Some((head, body)) = readable.split_at_checked(16) else {
            return Wanted::Refused(vec![1]);
        };
        let kind = u32::from_le_bytes(head[..4].try_into().expect("4 bytes"));
        let sector = u64::from_le_bytes(head[8..].try_into().expect("8 bytes"));
        let fits = |len: u64| {
            let end = sector.checked_add(len / 512);
            len.is_multiple_of(512) && end.is_some_and(|end| end <= self.sectors)
        };
        match kind {
            0 if fits(data_len) => Wanted::Read(sector, to_usize(data_len)),
            1 if fits(to_u64(body.len())) && !self.read_only => Wanted::Write(sector, body.into()),
            0 | 1 => Wanted::Refused(vec![1]),
            4 => Wanted::Flush,
            8 => Wanted::Serial,
            11 | 13 if self.zeroes => self.judge_segments(kind == 11, body),
            _ => Wanted::Refused(vec![2]),
        }
    }

    /// Reads the segments of a DISCARD or a WRITE_ZEROES.
    pub fn judge_segments(self, discard: bool, body: &[u8]) -> Wanted {
        if body.is_empty() || !body.len().is_multiple_of(16) || body.len() > 32 * 16 {
            return Wanted::Refused(vec![1]);
        }
        let (mut refusals, mut ranges) = (Vec::new(), Vec::new());
        for segment in body.chunks(16) {
            let first = u64::from_le_bytes(segment[..8].try_into().expect("8 bytes"));
            let count = u32::from_le_bytes(segment[8..12].try_into().expect("4 bytes"));
            let flags = u32::from_le_bytes(segment[12..].try_into().expect("4 bytes"));
            if flags & !1 != 0 || discard && flags != 0 {
                refusals.push(2);
            }
            let end = first.checked_add(count.into());
            let most = if discard { 1 << 21 } else { 1 << 18 };
            if count > most || end.is_none_or(|end| end > self.sectors) {
                refusals.push(1);
            }
            ranges.push((first, u64::from(count)));
        }
        if self.read_only {
            refusals.push(1);
        }
        if refusals.is_empty() { Wanted::Zero(ranges, discard) } else { Wanted::Refused(refusals) }
    }
}
