//! Calls of the kernel made by a child process that does nothing else, and what became of it.
#![expect(unsafe_code, reason = "fork(2), and system calls by number")]

use std::os::fd::AsRawFd;

use addcow::sandbox::filter::Filters;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Resource, Rlimit, setrlimit};

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// By itself, with this exit code.
    Exit(i32),
    /// By this signal.
    Signal(i32),
}

/// Runs `work` in a child process and tells how it ended: with the exit code that `work` returns,
/// unless something stopped it.
pub fn in_child(work: impl FnOnce() -> i32) -> End {
    // SAFETY: the child calls `work` and ends. It has one thread, and the allocator's locks are in
    // order (fork(3) of the C library takes care of them).
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
    if pid == 0 {
        // Being stopped is expected: no core files.
        let none = Rlimit { current: Some(0), maximum: Some(0) };
        let code = setrlimit(Resource::Core, none).map_or(255, |()| work());
        // SAFETY: ends the child at once, without the test harness's exit handlers.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: `status` lives during the call.
    let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert_eq!(waited, pid, "{}", std::io::Error::last_os_error());
    if libc::WIFSIGNALED(status) {
        End::Signal(libc::WTERMSIG(status))
    } else {
        End::Exit(libc::WEXITSTATUS(status))
    }
}

/// What became of a call under filters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Made {
    /// The process ended with SIGSYS, and did not come to the next instruction.
    Stopped,
    /// It returned, with this errno or 0.
    Returned(i32),
    /// Something else.
    Ended(End),
}

/// Makes a call under filters, in a child. Every profile may write or end the process: that it has
/// come so far shows that the call was not stopped, whatever ends it afterwards.
pub fn confined(filters: &Filters, number: i64, arguments: [u64; 6]) -> Made {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).expect("a pipe");
    let end = in_child(|| {
        filters.install().expect("the filters");
        let errno = call(number, arguments);
        let bytes = errno.to_le_bytes();
        let fd = u64::try_from(writer.as_raw_fd()).unwrap_or_default();
        call(libc::SYS_write, [fd, bytes.as_ptr().addr() as u64, 4, 0, 0, 0]);
        errno
    });
    let mut bytes = [0; 4];
    match (rustix::io::read(&reader, &mut bytes), end) {
        (Ok(4), _) => Made::Returned(i32::from_le_bytes(bytes)),
        (_, End::Signal(libc::SIGSYS)) => Made::Stopped,
        (_, End::Exit(errno)) => Made::Returned(errno),
        _ => Made::Ended(end),
    }
}

/// Makes a system call; the errno, or 0. To be called in a child: whatever it does is its own.
pub fn call(number: i64, arguments: [u64; 6]) -> i32 {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: the process ends right after; no memory is named by the arguments but by calls that
    // are expected to be refused before they look at any.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    match result {
        -1 => std::io::Error::last_os_error().raw_os_error().unwrap_or(255),
        _ => 0,
    }
}
