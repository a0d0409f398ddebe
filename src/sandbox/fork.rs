//! A child process that runs a function of ours, and holds nothing that it was not given.
//!
//! Not here: what the child does (`broker`).
#![expect(unsafe_code, reason = "fork(2), and what only the C library can be asked for")]

use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

use rustix::process::Pid;
use rustix::stdio::{dup2_stdin, dup2_stdout};

/// The most descriptors that are closed one by one where the kernel has no close_range(2).
const MAX_DESCRIPTORS: i32 = 1 << 16;

/// Runs `work` in a child process, which ends with it. Its descriptors are closed, save for
/// `first`, which is number 0 there, and `second`, which is number 1.
///
/// To be called while the process has one thread: of others the child would have the locks, but not
/// the threads that open them.
///
/// # Errors
/// That the host has no process for us.
pub fn in_child(first: OwnedFd, second: Option<OwnedFd>, work: impl FnOnce()) -> io::Result<Pid> {
    // SAFETY: the process has one thread (the caller promises it), so the child may do whatever the
    // parent could.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    if let Some(child) = Pid::from_raw(pid) {
        return Ok(child);
    }
    // A panic must not run on into the parent's code.
    let _ = catch_unwind(AssertUnwindSafe(|| {
        if hold_only(first, second).is_ok() {
            work();
        }
    }));
    // SAFETY: ends the child without the parent's exit handlers.
    unsafe { libc::_exit(0) }
}

/// Makes `first` and `second` the descriptors 0 and 1, and closes all others.
fn hold_only(first: OwnedFd, second: Option<OwnedFd>) -> io::Result<()> {
    // Numbers that are 0 or 1 by chance are moved out of the way first.
    let moved = |fd: OwnedFd| rustix::io::fcntl_dupfd_cloexec(&fd, 2);
    let (first, second) = (moved(first)?, second.map(moved).transpose()?);
    dup2_stdin(&first)?;
    let from = match &second {
        Some(second) => dup2_stdout(second).map(|()| 2)?,
        None => 1,
    };
    drop((first, second));
    // SAFETY: nobody in this process uses a descriptor from `from` on any more: it runs `work`,
    // which has none of its own, and nothing else.
    let result = unsafe { libc::syscall(libc::SYS_close_range, from, libc::c_uint::MAX, 0) };
    if result != 0 {
        for fd in from..MAX_DESCRIPTORS {
            // SAFETY: as above.
            unsafe { libc::close(fd) };
        }
    }
    Ok(())
}

/// Lets the C library manage all memory in one piece. With a piece for each thread it opens a file
/// of /proc when it gives memory back, and some versions another one to count processors. The data
/// path does not ask for memory, so that nobody waits for anybody.
pub fn keep_to_one_arena() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: sets a number in the allocator; no other thread runs yet.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    }
}
