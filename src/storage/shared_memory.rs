//! Memory that outlives this process: an anonymous file that another process keeps open, too.
//!
//! It consists of 64-bit words of the machine's own byte order, each read and written whole. The
//! other process may change any of them at any time, so what is read here is never trusted; it
//! cannot make the memory shorter, which would kill us (SIGBUS): only sealed files are taken.
//!
//! Not here: what the words mean.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use rustix::fs::{
    MemfdFlags, SealFlags, SeekFrom, fcntl_add_seals, fcntl_get_seals, fstat, fstatfs,
    memfd_create, seek,
};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use super::host_file::TMPFS_MAGIC;

/// Bytes in a word.
const WORD: usize = 8;

/// Memory shared with another process.
#[derive(Debug)]
pub struct SharedMemory {
    /// The file, mapped.
    region: MmapRegion<()>,
    /// The file.
    file: Arc<File>,
}

impl SharedMemory {
    /// `words` new words, all zero.
    ///
    /// # Errors
    /// What the host said.
    pub fn create(name: &str, words: usize) -> io::Result<Self> {
        let file = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let file = File::from(file);
        let len = words.checked_mul(WORD).ok_or(io::ErrorKind::OutOfMemory)?;
        file.set_len(u64::try_from(len).map_err(io::Error::other)?)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Self::map(file, len)
    }

    /// The words of a file that comes from somebody else.
    ///
    /// # Errors
    /// `InvalidData` if it is not a file that [`SharedMemory::create`] could have made; else what
    /// the host said.
    pub fn open(file: File) -> io::Result<Self> {
        let foreign = |what| io::Error::new(io::ErrorKind::InvalidData, what);
        // A file on a disk has no seals, and the pages of other file systems in memory may run out.
        let seals = fcntl_get_seals(&file).map_err(|_| foreign("it cannot be sealed"))?;
        if !seals.contains(SealFlags::SHRINK) || seals.contains(SealFlags::WRITE) {
            return Err(foreign("it is not sealed as ours is"));
        }
        if fstatfs(&file)?.f_type != TMPFS_MAGIC {
            return Err(foreign("it is no ordinary memory"));
        }
        let len = usize::try_from(fstat(&file)?.st_size).map_err(io::Error::other)?;
        if len == 0 || !len.is_multiple_of(WORD) {
            return Err(foreign("it does not consist of words"));
        }
        Self::map(file, len)
    }

    /// Maps all of the file.
    fn map(file: File, len: usize) -> io::Result<Self> {
        let file = Arc::new(file);
        let place = FileOffset::from_arc(Arc::clone(&file), 0);
        let region = MmapRegion::from_file(place, len).map_err(io::Error::other)?;
        Ok(Self { region, file })
    }

    /// The file, to be handed to the other process.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Number of words.
    #[must_use]
    pub fn words(&self) -> usize {
        self.region.size() / WORD
    }

    /// The word number `index`, if there are that many.
    #[must_use]
    pub fn word(&self, index: usize) -> Option<&AtomicU64> {
        self.region.get_atomic_ref(index.checked_mul(WORD)?).ok()
    }

    /// The first run of words at or after `start` that are not known to be zero, because nobody
    /// ever touched their page; `None` if there is none.
    ///
    /// # Errors
    /// What the host said.
    pub fn next_touched(&self, start: usize) -> io::Result<Option<Range<usize>>> {
        let offset = |words: usize| u64::try_from(words.saturating_mul(WORD)).unwrap_or(u64::MAX);
        let first = match seek(&self.file, SeekFrom::Data(offset(start))) {
            Err(rustix::io::Errno::NXIO) => return Ok(None),
            other => other?,
        };
        let end = seek(&self.file, SeekFrom::Hole(first))?;
        let index = |offset: u64| usize::try_from(offset / WORD as u64).unwrap_or(usize::MAX);
        Ok(Some(index(first)..index(end)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn what_one_process_writes_another_reads() {
        let ours = SharedMemory::create("test", 2000).unwrap();
        ours.word(1999).unwrap().store(7, Ordering::Relaxed);
        assert!(ours.word(2000).is_none() && ours.word(usize::MAX).is_none());
        let theirs = SharedMemory::open(ours.file().try_clone().unwrap()).unwrap();
        drop(ours);
        assert_eq!(theirs.word(1999).unwrap().load(Ordering::Relaxed), 7);
        assert_eq!(theirs.words(), 2000);
        assert_eq!(theirs.next_touched(0).unwrap(), Some(1536..2000));
        assert_eq!(theirs.next_touched(2000).unwrap(), None);
    }

    #[test]
    fn a_file_that_may_become_shorter_is_refused() {
        let unsealed = memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        let unsealed = File::from(unsealed);
        unsealed.set_len(4096).unwrap();
        SharedMemory::open(unsealed).unwrap_err();
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        SharedMemory::open(file).unwrap_err();
        SharedMemory::open(File::open("/dev/null").unwrap()).unwrap_err();
    }

    #[test]
    fn the_file_cannot_be_made_shorter() {
        let ours = SharedMemory::create("test", 512).unwrap();
        ours.file().set_len(8).unwrap_err();
    }
}
