//! Blocking storage: plain system calls, for the tool and for what the daemon does at start-up.
//!
//! Every future here is ready at its first poll.

use std::io;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, fallocate, fdatasync};

use super::host_file::HostFile;
use super::{Alignment, IoBuffer, Storage, ZeroMode};
use crate::units::ByteRange;

/// A host file, read and written by blocking system calls.
#[derive(Debug, Clone)]
pub struct FileStorage {
    /// The open file.
    file: Arc<HostFile>,
}

impl FileStorage {
    /// Storage on `file`.
    #[must_use]
    pub fn new(file: Arc<HostFile>) -> Self {
        Self { file }
    }
}

/// The flags of fallocate(2) for `mode`; neither changes the file's length.
pub(super) fn fallocate_flags(mode: ZeroMode) -> FallocateFlags {
    FallocateFlags::KEEP_SIZE
        | match mode {
            ZeroMode::ZeroRange => FallocateFlags::ZERO_RANGE,
            ZeroMode::PunchHole => FallocateFlags::PUNCH_HOLE,
        }
}

impl Storage for FileStorage {
    async fn read(&self, offset: u64, buffer: IoBuffer) -> io::Result<usize> {
        buffer.read_from(self.file.file(), offset)
    }

    async fn write(&self, offset: u64, buffer: IoBuffer) -> io::Result<usize> {
        buffer.write_to(self.file.file(), offset)
    }

    async fn zero(&self, range: ByteRange, mode: ZeroMode) -> io::Result<()> {
        Ok(fallocate(self.file.file(), fallocate_flags(mode), range.start(), range.len())?)
    }

    async fn sync(&self) -> io::Result<()> {
        Ok(fdatasync(self.file.file())?)
    }

    fn file_len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.file().set_len(len)
    }

    fn alignment(&self) -> Alignment {
        self.file.alignment()
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<ByteRange>> {
        self.file.next_data(offset)
    }
}
