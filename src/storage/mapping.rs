//! Mapped files: moving data that is in memory already, without a system call.
//!
//! A file on tmpfs is memory; a backing file that many guests share is mostly in the page cache.
//! For such data a copy from a mapping costs a fraction of the cheapest I/O. What makes it safe:
//!
//! * **Only what is there.** A block is copied from the mapping only after the host has said that
//!   every page of it is in memory, so that touching it neither waits for a device nor makes the
//!   host allocate pages for a hole. The answer is kept: on tmpfs until we make a hole ourselves,
//!   for the page cache a second. If the host has evicted a page in that time, the queue waits for
//!   one page to be read: a stall, bounded and rare, never wrong data.
//! * **Pages that vanish** (a file that was cut) are caught by [`FaultGuard`]: the mapping is not
//!   used again, and the request goes the ordinary way, which finds the honest error.
//! * Everything that this module cannot do now is answered "no", and goes to io_uring.
//!
//! Not here: which files are mapped (`HostFile::map`, and the daemon's command line).
#![expect(unsafe_code, reason = "maps files, and copies through pointers into the mapping")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::time::{ClockId, clock_gettime};
use zerocopy::FromZeros;

use super::IoBuffer;
use super::buffer::Segment;
use super::fault_guard::FaultGuard;
use crate::units::ByteRange;

/// The piece of a file whose presence is asked for and remembered at once, in bytes. Larger ones
/// are less often in memory as a whole, smaller ones need more system calls to find out.
const BLOCK: usize = 256 << 10;

/// The longest file that is mapped: the table of its blocks takes 1 MiB.
const MAX_LEN: u64 = 256 << 30;

/// How many accesses to a block that was not all there are passed on before it is looked at again.
const LOOK_AGAIN: u8 = 64;

/// Block states from here on say "all there", as of the second in the lower bits.
const PRESENT: u8 = 128;

/// How long it is known that a block is in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// On tmpfs: until a hole is made.
    InMemory,
    /// In the page cache: for the present second.
    PageCache,
}

/// A mapped file.
#[derive(Debug)]
pub struct Mapping {
    /// First byte; page aligned.
    start: NonNull<u8>,
    /// Length of the part that may be used, in bytes: the file's when it was mapped.
    len: usize,
    /// Length of the whole mapping in bytes, one page more than the file.
    mapped_len: usize,
    /// Tells whether a page has vanished. `None` only while the mapping is dropped.
    guard: Option<FaultGuard>,
    /// How long it is known what is in memory.
    kind: Kind,
    /// Whether the mapping may be written.
    writable: bool,
    /// Per block: [`PRESENT`] and a time, or the number of accesses until it is looked at again.
    blocks: Box<[AtomicU8]>,
}

// SAFETY: the memory is shared with the whole host anyway; accesses are copies of bytes that draw
// no conclusions, and everything else is atomic.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `file` of `len` bytes. `in_memory`: it lies on tmpfs.
    ///
    /// # Errors
    /// `Unsupported` if the file is empty or too long, or if the host does not tell us which of its
    /// pages are in memory; else what the host said. The file can be used without.
    pub fn new(file: &File, len: u64, in_memory: bool, writable: bool) -> io::Result<Self> {
        if len == 0 || len > MAX_LEN {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let len = usize::try_from(len).map_err(io::Error::other)?;
        let page = rustix::param::page_size();
        // A page more than there is: see `tells_the_truth`.
        let mapped_len = len.next_multiple_of(page) + page;
        let write = if writable { libc::PROT_WRITE } else { 0 };
        let (access, flags) = (libc::PROT_READ | write, libc::MAP_SHARED | libc::MAP_NORESERVE);
        let (address, fd) = (std::ptr::null_mut(), file.as_raw_fd());
        // SAFETY: a new mapping at an address of the kernel's choice.
        let pointer = unsafe { libc::mmap(address, mapped_len, access, flags, fd, 0) };
        if pointer == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(pointer.cast::<u8>()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        let kind = if in_memory { Kind::InMemory } else { Kind::PageCache };
        // Takes memory only as far as it is used.
        let blocks = FromZeros::new_box_zeroed_with_elems(len.div_ceil(BLOCK))
            .map_err(|_| io::ErrorKind::OutOfMemory)?;
        let mut mapping = Self { start, len, mapped_len, guard: None, kind, writable, blocks };
        let range = start.as_ptr().addr()..start.as_ptr().addr() + mapped_len;
        mapping.guard = Some(FaultGuard::new(range, page)?);
        if !mapping.tells_the_truth() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(mapping)
    }

    /// Fills `buffer` from byte `offset` of the file. Returns whether it did; if not, its content
    /// is unspecified.
    pub fn read(&self, offset: u64, buffer: &IoBuffer) -> bool {
        let Some(source) = self.present(offset, buffer.len()) else { return false };
        buffer.copy_from_segment(source);
        self.is_intact()
    }

    /// Writes `buffer` at byte `offset` of the file. Returns whether it did; if not, any part of
    /// the range may have been written.
    pub fn write(&self, offset: u64, buffer: &IoBuffer) -> bool {
        if !self.writable {
            return false;
        }
        let Some(target) = self.present(offset, buffer.len()) else { return false };
        buffer.copy_to_segment(target);
        self.is_intact()
    }

    /// A hole was made in the file: what lies in `range` is no longer there.
    pub fn forget(&self, range: ByteRange) {
        let index = |at: u64| usize::try_from(at).unwrap_or(usize::MAX) / BLOCK;
        let end = index(range.end().saturating_sub(1)).saturating_add(1).min(self.blocks.len());
        for block in self.blocks.get(index(range.start())..end).unwrap_or_default() {
            block.store(0, Ordering::Relaxed);
        }
    }

    /// Gives the page tables back. What is used again is found again, a little slower.
    pub fn release(&self) {
        // Blocks that were never looked at have no memory yet, and reading gives them none.
        for block in self.blocks.iter().filter(|block| block.load(Ordering::Relaxed) != 0) {
            block.store(0, Ordering::Relaxed);
        }
        // SAFETY: the range is this mapping; it is shared with the file, so no byte is lost.
        unsafe {
            libc::madvise(self.start.as_ptr().cast(), self.mapped_len, libc::MADV_DONTNEED);
        }
    }

    /// Whether every byte that was copied so far was the file's.
    fn is_intact(&self) -> bool {
        self.guard.as_ref().is_some_and(|guard| !guard.has_faulted())
    }

    /// The memory of the range, if all of it may be touched.
    fn present(&self, offset: u64, len: usize) -> Option<Segment> {
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(len).filter(|end| *end <= self.len)?;
        if len == 0 || !self.is_intact() {
            return None;
        }
        let now = self.now();
        for index in start / BLOCK..=(end - 1) / BLOCK {
            let state = self.blocks[index].load(Ordering::Relaxed);
            if state != now && !self.look(index, state, now) {
                return None;
            }
        }
        // SAFETY: `start` is less than the mapping's length.
        let address = unsafe { self.start.add(start) };
        // SAFETY: `len` bytes from there lie in the mapping, which lives as long as `self`; the
        // segment does not leave this module's copies.
        Some(unsafe { Segment::new(address, len) })
    }

    /// Looks whether a block is all there, unless that was done shortly before.
    #[cold]
    fn look(&self, index: usize, state: u8, now: u8) -> bool {
        let block = &self.blocks[index];
        if (1..PRESENT).contains(&state) {
            block.store(state - 1, Ordering::Relaxed);
            return false;
        }
        let start = index * BLOCK;
        let len = BLOCK.min(self.len - start);
        let present = self.in_core(start, len);
        if present && state < PRESENT {
            self.populate(start, len);
        }
        block.store(if present { now } else { LOOK_AGAIN }, Ordering::Relaxed);
        present
    }

    /// The state of a block that was seen to be all there now.
    fn now(&self) -> u8 {
        match self.kind {
            // It stays, until we make a hole.
            Kind::InMemory => PRESENT,
            Kind::PageCache => {
                let seconds = clock_gettime(ClockId::MonotonicCoarse).tv_sec;
                u8::try_from(seconds & 127).unwrap_or(0) | PRESENT
            }
        }
    }

    /// Whether `len` bytes from `start`, a multiple of the page size, are in the page cache.
    fn in_core(&self, start: usize, len: usize) -> bool {
        // SEEK_HOLE would do for tmpfs, but it searches all of the file for the next hole.
        let mut pages = [0_u8; BLOCK / 4096];
        let count = len.div_ceil(rustix::param::page_size());
        // SAFETY: `start` lies inside the mapping.
        let address = unsafe { self.start.add(start) };
        // SAFETY: the range is mapped, and `pages` has a byte for each page of a block (pages are
        // never smaller than 4 KiB).
        let result = unsafe { libc::mincore(address.as_ptr().cast(), len, pages.as_mut_ptr()) };
        result == 0 && pages.iter().take(count).all(|page| page & 1 == 1)
    }

    /// Enters `len` bytes from `start`, which are in memory, into the page tables: one system call
    /// instead of a fault for each page. Where the kernel does not know how (before 5.14), the
    /// faults do it.
    fn populate(&self, start: usize, len: usize) {
        // For reading also where it is for writing: that takes one fault for many pages, and on
        // tmpfs they may be written all the same.
        let advice = libc::MADV_POPULATE_READ;
        // SAFETY: `start` lies inside the mapping.
        let address = unsafe { self.start.add(start) };
        // SAFETY: the range is mapped, and populating changes no byte of it.
        unsafe { libc::madvise(address.as_ptr().cast(), len, advice) };
    }

    /// Whether mincore(2) tells the truth about this file. To who neither owns it nor may write it,
    /// the kernel says that everything is in memory: also the page behind its end, which never is.
    fn tells_the_truth(&self) -> bool {
        let page = rustix::param::page_size();
        !self.in_core(self.mapped_len - page, page)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // First: later something else may lie at these addresses.
        self.guard = None;
        // SAFETY: the range is exactly what `new` mapped, and nobody has a pointer into it: copies
        // end before they return.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.mapped_len) };
    }
}
