//! Storage: the only code that touches the bytes of host files.
//!
//! The copy-on-write core (`image`) is written once against the trait [`Storage`] and runs on three
//! engines: [`uring`] (the daemon), [`mod@file`] (the tool, blocking) and [`sim`] (tests: a disk
//! with a volatile cache, faults and power cuts). What every caller wants on top of a bare engine,
//! whole transfers, alignment, zeroing, is in [`transfer`], once for all of them.
//!
//! Not here: which file holds what, and in which order files are synced. That is the business of
//! `image`, and the order is its promise.

pub mod budget;
pub mod buffer;
pub mod fault_guard;
pub mod file;
pub mod host_file;
pub mod lock;
pub mod lock_holder;
pub mod mapping;
pub mod name_policy;
pub mod new_file;
pub mod restricted_ring;
pub mod shared_memory;
pub mod sim;
pub mod sparse;
pub mod transfer;
pub mod uring;

use std::io;

use crate::units::ByteRange;
use budget::MemoryBudget;
pub use buffer::IoBuffer;

/// How memory, file offset and length must be aligned for a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Alignment {
    /// Every memory segment's address and length must be a multiple of this many bytes (>= 1).
    pub memory: usize,
    /// File offset and total length must be a multiple of this many bytes (>= 1).
    pub offset: u64,
}

impl Alignment {
    /// No rule at all: what the page cache offers.
    pub const NONE: Self = Self { memory: 1, offset: 1 };
}

/// How a range is made to read zeros without writing it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroMode {
    /// Keep the blocks, mark them as zeros (`FALLOC_FL_ZERO_RANGE`).
    ZeroRange,
    /// Give the blocks back (`FALLOC_FL_PUNCH_HOLE`).
    PunchHole,
}

/// One open file on one I/O engine, used by one thread.
///
/// Implementations must:
/// * never panic for any offset or length: both may come from a guest;
/// * report what happened and no more: a transfer may be short, and the caller goes on from there;
/// * keep the buffer's memory alive (through the buffer's owner) until the host is done with it,
///   even when the future is dropped before;
/// * let `sync` cover every write that completed before `sync` was *called*. It need not cover
///   later ones.
///
/// In exchange they may rely on buffers and offsets being aligned as [`Storage::alignment`] asks,
/// and on `offset + length` fitting in an `i64`.
#[expect(async_fn_in_trait, reason = "futures of a queue stay on the queue's own thread")]
pub trait Storage {
    /// Reads into `buffer` from byte `offset`. Returns the bytes read, 0 at the end of the file.
    ///
    /// # Errors
    /// What the host said. The buffer's content is then unspecified.
    async fn read(&self, offset: u64, buffer: IoBuffer) -> io::Result<usize>;

    /// Writes `buffer` at byte `offset`. Returns the bytes written.
    ///
    /// # Errors
    /// What the host said. Any part of the range may hold old or new bytes.
    async fn write(&self, offset: u64, buffer: IoBuffer) -> io::Result<usize>;

    /// Makes `range` read zeros, in the way of `mode`, without changing the file's length.
    ///
    /// # Errors
    /// `Unsupported` where the file cannot do it; else what the host said.
    async fn zero(&self, range: ByteRange, mode: ZeroMode) -> io::Result<()>;

    /// Makes every write that completed before this call durable (`fdatasync`).
    ///
    /// # Errors
    /// What the host said. The caller must take it as final (I6).
    async fn sync(&self) -> io::Result<()>;

    /// The file's present length in bytes.
    ///
    /// # Errors
    /// What the host said.
    fn file_len(&self) -> io::Result<u64>;

    /// Cuts or grows the file to `len` bytes; new bytes read zeros.
    ///
    /// # Errors
    /// What the host said.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// The alignment that transfers must keep.
    fn alignment(&self) -> Alignment;

    /// The memory for bounce buffers, if it is bounded. A lease is held while transfers of this
    /// storage run, and for nothing else.
    fn bounce_budget(&self) -> Option<&MemoryBudget> {
        None
    }

    /// The first range at or after `offset` that may hold other bytes than zeros, or `None` if
    /// there is no such byte up to the end of the file. Engines that cannot tell name everything.
    ///
    /// # Errors
    /// What the host said.
    fn next_data(&self, offset: u64) -> io::Result<Option<ByteRange>>;
}
