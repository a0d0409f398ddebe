//! What is on the disks: blocks that cannot be compressed and say which block they are.
//!
//! The first word of every 4 KiB block is a hash of its number. Its last word is the number and
//! the *generation*: 0 in the base, else the run that wrote it. The words between are random and a
//! function of the number in generation 0.
//!
//! So a read shows whether it got the right block, and whether a write arrived.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::memory::Memory;

/// Bytes of a block.
pub const BLOCK: usize = 4096;

/// Offset of the last word of a block.
const LAST: usize = BLOCK - 8;

/// How many bytes are written to a file at once.
const CHUNK: usize = 1 << 20;

/// A hash of `value` (the finaliser of SplitMix64).
pub fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Random numbers; equal seeds give equal numbers.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// Starts with `seed`.
    pub fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        let wide = u128::from(self.next()) * u128::from(end);
        u64::try_from(wide >> 64).unwrap_or(0)
    }
}

/// The last word of block `number` in `generation`.
fn last_word(number: u64, generation: u64) -> u64 {
    number << 32 | generation
}

/// Word `at` of block `number` of the base.
fn base_word(number: u64, at: u64) -> u64 {
    mix(number << 9 | at)
}

/// Fills `bytes`, whole blocks from block `first` on, with the base's content.
fn fill(bytes: &mut [u8], first: u64) {
    for (number, block) in (first..).zip(bytes.chunks_mut(BLOCK)) {
        for (at, word) in (0..).zip(block.chunks_mut(8)) {
            word.copy_from_slice(&base_word(number, at).to_le_bytes());
        }
        block[LAST..].copy_from_slice(&last_word(number, 0).to_le_bytes());
    }
}

/// Writes `size` bytes of the base's content to `file`.
pub fn write_base(file: &File, size: u64) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    for start in (0..size).step_by(CHUNK) {
        fill(&mut chunk, start / BLOCK as u64);
        file.write_all_at(&chunk, start)?;
    }
    Ok(())
}

/// Fills `memory` with random bytes.
pub fn randomise(memory: &Memory, seed: u64) {
    let mut rng = Rng::new(seed);
    for offset in (0..memory.len()).step_by(8) {
        memory.set_word(offset, rng.next());
    }
}

/// Makes the `len` bytes at `at` of `memory` the blocks of the disk's bytes from `offset` on.
pub fn stamp(memory: &Memory, at: usize, len: usize, offset: u64, generation: u64) {
    for (number, at) in (offset / BLOCK as u64..).zip((at..at + len).step_by(BLOCK)) {
        memory.set_word(at, base_word(number, 0));
        memory.set_word(at + LAST, last_word(number, generation));
    }
}

/// What a check found wrong.
fn wrong(number: u64, what: &str, got: u64) -> io::Error {
    io::Error::other(format!("read wrong data: block {number}: {what}: {got:#x}"))
}

/// Checks that the `len` bytes at `at` of `memory` are the disk's bytes from `offset` on; a block
/// of the base is compared as a whole when `whole`. With `generation`, it must be that one.
pub fn check(
    memory: &Memory,
    at: usize,
    len: usize,
    offset: u64,
    whole: bool,
    generation: Option<u64>,
) -> io::Result<()> {
    for (number, at) in (offset / BLOCK as u64..).zip((at..at + len).step_by(BLOCK)) {
        let (first, last) = (memory.word(at), memory.word(at + LAST));
        if first != base_word(number, 0) || last >> 32 != number {
            return Err(wrong(number, "not that block", last));
        }
        if generation.is_some_and(|wanted| last_word(number, wanted) != last) {
            return Err(wrong(number, "an older generation", last));
        }
        if whole && last == last_word(number, 0) {
            for (index, at) in (0..).zip((at..at + LAST).step_by(8)) {
                if memory.word(at) != base_word(number, index) {
                    return Err(wrong(number, "not the base's data", index));
                }
            }
        }
    }
    Ok(())
}
