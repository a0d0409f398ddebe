//! Memory that a back end may write at any moment, and the clock of another process.
//!
//! A [`Memory`] is a memfd mapped shared, with all pages present. Bytes are read and written
//! through raw pointers with bounds checked here, never through references, because a server works
//! on the same pages.
//!
//! Not here: who gets to see the memory (`lane`), and what lies in it (`content`).
#![expect(unsafe_code, reason = "mapping memory, raw access to it, and clocks of processes")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, memfd_create};

/// A shared mapping.
#[derive(Debug)]
pub struct Memory {
    /// First byte.
    start: NonNull<u8>,
    /// Length in bytes.
    len: usize,
    /// The memfd behind it.
    file: File,
}

// SAFETY: the mapping belongs to this value alone, and all access goes through raw pointers. Two
// threads use different parts of one memory, each its own requests' buffers.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// `len` bytes of zeros.
    pub fn new(len: usize) -> io::Result<Self> {
        let file = File::from(memfd_create("bench", MemfdFlags::CLOEXEC)?);
        file.set_len(u64::try_from(len).map_err(io::Error::other)?)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        // SAFETY: a new mapping at an address that the kernel chooses touches nothing of ours.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), len, protection, flags, file.as_raw_fd(), 0)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        Ok(Self { start, len, file })
    }

    /// Address of the first byte.
    pub fn address(&self) -> usize {
        self.start.as_ptr() as usize
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The memfd.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Pointer to the `len` bytes from `offset` on.
    pub fn pointer(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "outside the memory");
        // SAFETY: inside the mapping, as just checked.
        unsafe { self.start.as_ptr().add(offset) }
    }

    /// The 64-bit word at `offset`.
    pub fn word(&self, offset: usize) -> u64 {
        let pointer = self.pointer(offset, size_of::<u64>()).cast::<u64>();
        // SAFETY: inside the mapping; unaligned access is allowed by this call.
        unsafe { pointer.read_unaligned() }
    }

    /// Stores a 64-bit word at `offset`.
    pub fn set_word(&self, offset: usize, value: u64) {
        let pointer = self.pointer(offset, size_of::<u64>()).cast::<u64>();
        // SAFETY: inside the mapping; unaligned access is allowed by this call.
        unsafe { pointer.write_unaligned(value) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody has a reference into it.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// Processor time that process `pid` has used, in nanoseconds, ended threads included.
pub fn process_time(pid: u32) -> io::Result<u64> {
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    let mut clock = 0;
    // SAFETY: writes one clock number.
    let error = unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let seconds = u64::try_from(time.tv_sec).map_err(io::Error::other)?;
    let nanoseconds = u64::try_from(time.tv_nsec).map_err(io::Error::other)?;
    Ok(seconds * 1_000_000_000 + nanoseconds)
}
