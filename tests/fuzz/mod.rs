//! The fuzz targets: one function from any bytes to an [`Outcome`] for each kind of hostile input.
//!
//! `tests/replay.rs` runs them over the committed corpus with the stable compiler; `fuzz/` runs
//! them under libFuzzer (`scripts/fuzz`). A target panics when something is wrong, and counts what
//! it really executed, so that a run shows whether anything got past the first check.
//!
//! Promises: the same bytes do the same thing in the code under test; nothing outside one scratch
//! folder is written; bytes that run out read as zeros, so that every prefix is an input, too.
//!
//! Not here: libFuzzer, coverage, the corpus.

#![allow(dead_code, reason = "each program uses its own part of the targets")]

use std::path::{Path, PathBuf};

pub mod content;
pub mod disk;
pub mod files;
pub mod header;
pub mod inflate;
pub mod layer;
pub mod messages;
pub mod oracle;
pub mod qcow2;
pub mod qed;
pub mod requests;
pub mod wire;

/// What one input did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Requests that were carried out, or for a file whether its disk was read and compared.
    pub executed: u64,
}

/// One target.
pub type Target = fn(&[u8]) -> Outcome;

/// All targets by name, which is also that of their folder in the corpus.
pub const TARGETS: [(&str, Target); 5] = [
    ("requests", requests::run),
    ("messages", messages::run),
    ("header", header::run),
    ("qcow2", qcow2::run),
    ("qed", qed::run),
];

/// Takes an input apart, from its start.
#[derive(Debug, Clone)]
pub struct Input<'a> {
    /// What is left.
    bytes: &'a [u8],
}

impl<'a> Input<'a> {
    /// All of `bytes` is left.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// Whether nothing is left: zeros from here on.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// What is left, all of it.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.bytes)
    }

    /// At most `len` bytes.
    pub fn take(&mut self, len: usize) -> &'a [u8] {
        let (taken, left) = self.bytes.split_at(len.min(self.bytes.len()));
        self.bytes = left;
        taken
    }

    /// `N` bytes.
    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let taken = self.take(N);
        array[..taken.len()].copy_from_slice(taken);
        array
    }

    /// A byte.
    pub fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// 16 bits.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// 32 bits.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// 64 bits.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A number below `count`, from two bytes.
    pub fn below(&mut self, count: usize) -> usize {
        usize::from(self.u16()) % count.max(1)
    }

    /// Whether a byte is odd.
    pub fn flag(&mut self) -> bool {
        self.u8() & 1 == 1
    }

    /// A number of 64 bits from one byte and sometimes more: the edges of all widths come easily.
    pub fn edge(&mut self) -> u64 {
        let near = |base: u64, byte: u8| base.wrapping_add(u64::from(byte & 7)).wrapping_sub(4);
        match self.u8() {
            small @ 0..=127 => u64::from(small),
            byte @ 128..=135 => near(1 << 16, byte),
            byte @ 136..=143 => near(1 << 31, byte),
            byte @ 144..=151 => near(1 << 32, byte),
            byte @ 152..=159 => near(1 << 55, byte),
            byte @ 160..=167 => near(1 << 63, byte),
            byte @ 168..=175 => near(0, byte),
            176..=199 => u64::from(self.u16()),
            200..=219 => u64::from(self.u32()),
            _ => self.u64(),
        }
    }
}

/// `value` as an index or a length.
pub fn to_usize(value: u64) -> usize {
    usize::try_from(value).expect("fits the address space")
}

/// `value` as a 64-bit offset or length.
pub fn to_u64(value: usize) -> u64 {
    u64::try_from(value).expect("fits 64 bits")
}

/// `value` as a 32-bit length.
pub fn to_u32(value: usize) -> u32 {
    u32::try_from(value).expect("fits 32 bits")
}

/// `len` bytes that tell where they come from: in each group of eight the place and the file.
pub fn pattern(file: u8, first: u64, len: usize) -> Vec<u8> {
    let start = first & !7;
    let mut bytes = vec![0; len.next_multiple_of(8) + 8];
    for (at, word) in (start / 8..).zip(bytes.as_chunks_mut().0) {
        *word = (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) << 8 | u64::from(file) | 1).to_le_bytes();
    }
    bytes.drain(..to_usize(first % 8));
    bytes.truncate(len);
    bytes
}

/// A folder in memory that this process has for itself, in the folder `ADDCOW_FUZZ_DIR` if that is
/// set; it is left behind if the process dies.
#[derive(Debug)]
pub struct Scratch {
    /// The folder.
    dir: tempfile::TempDir,
}

impl Scratch {
    /// A new folder.
    pub fn new() -> Self {
        let parent = std::env::var_os("ADDCOW_FUZZ_DIR").unwrap_or_else(|| "/dev/shm".into());
        let dir = tempfile::Builder::new().prefix("addcow-fuzz-").tempdir_in(parent);
        Self { dir: dir.expect("a folder in memory") }
    }

    /// The path of the file `name` in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        self.dir.path()
    }
}
