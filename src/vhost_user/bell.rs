//! What calls the driver: rings an eventfd of the front end's, and never waits for anybody.
//!
//! The front end chose that descriptor, shares its flags, and may fill its counter at any time: a
//! write(2) then waits until the front end reads, however often one has looked before. The kernel's
//! own way of telling that a ring of io_uring has completed something does not wait: a counter that
//! is full stays full. So a call is an operation that does nothing, on a ring that has nothing else
//! to do and tells the front end's eventfd. That is one system call, and the quicker one, too
//! (`docs/decisions/0013-calls.md`).
//!
//! Not here: when to call (`queue`), and which descriptor (`vring`).
#![expect(unsafe_code, reason = "pushes a submission queue entry; it names no memory")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{IoUring, opcode};

use crate::storage::restricted_ring::{self, Purpose};

/// The bell of one queue's thread.
pub struct Bell {
    /// A ring that knows one operation, which does nothing.
    uring: IoUring,
    /// Whether it tells anybody.
    attached: bool,
}

impl std::fmt::Debug for Bell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bell").field("attached", &self.attached).finish_non_exhaustive()
    }
}

impl Bell {
    /// A bell for the calling thread that nobody hears.
    ///
    /// # Errors
    /// What io_uring said.
    pub fn new() -> io::Result<Self> {
        let mut bell = Self { uring: restricted_ring::build(1, Purpose::Bell)?, attached: false };
        // The ring keeps the memory of its first request for all that follow: a call never finds
        // the host without.
        bell.complete_nothing()?;
        Ok(bell)
    }

    /// Rings for `call` from now on, and for nobody else; for nobody if it is `None` or if this
    /// fails.
    ///
    /// # Errors
    /// EINVAL if `call` is no eventfd.
    pub fn attach(&mut self, call: Option<BorrowedFd<'_>>) -> io::Result<()> {
        if std::mem::take(&mut self.attached) {
            self.uring.submitter().unregister_eventfd()?;
        }
        if let Some(call) = call {
            self.uring.submitter().register_eventfd(call.as_raw_fd())?;
            self.attached = true;
        }
        Ok(())
    }

    /// Adds one to the counter of the eventfd, unless that is full.
    ///
    /// # Errors
    /// What io_uring said.
    pub fn ring(&mut self) -> io::Result<()> {
        if self.attached { self.complete_nothing() } else { Ok(()) }
    }

    /// Lets the ring complete an operation that does nothing.
    fn complete_nothing(&mut self) -> io::Result<()> {
        // SAFETY: the operation names no memory and no file.
        let pushed = unsafe { self.uring.submission().push(&opcode::Nop::new().build()) };
        pushed.map_err(|_| io::Error::from(io::ErrorKind::WouldBlock))?;
        while let Err(error) = self.uring.submit() {
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        self.uring.completion().for_each(drop);
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::host_endian_bytes, reason = "eventfd(2) has a number of the machine")]
mod tests {
    use super::super::vring::new_eventfd;
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::io::{read, write};
    use std::os::fd::AsFd;

    /// The counter of an eventfd, which is 0 afterwards; 0 if it was and does not block.
    fn count(fd: impl AsFd) -> u64 {
        let mut bytes = [0; 8];
        read(fd, &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
    }

    #[test]
    fn each_ring_counts_once_and_only_where_it_is_attached() {
        let (first, second) = (new_eventfd().unwrap(), new_eventfd().unwrap());
        let mut bell = Bell::new().unwrap();
        bell.ring().unwrap();
        bell.attach(Some(first.as_fd())).unwrap();
        for _ in 0..1000 {
            bell.ring().unwrap();
        }
        bell.attach(Some(second.as_fd())).unwrap();
        bell.ring().unwrap();
        bell.attach(None).unwrap();
        bell.ring().unwrap();
        assert_eq!((count(&first), count(&second)), (1000, 1));
    }

    #[test]
    fn full_counter_that_blocks_is_left_as_it_is() {
        let full = eventfd(0, EventfdFlags::empty()).unwrap();
        write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let mut bell = Bell::new().unwrap();
        bell.attach(Some(full.as_fd())).unwrap();
        for _ in 0..10 {
            bell.ring().unwrap();
        }
        assert!(count(&full) >= u64::MAX - 1);
        bell.ring().unwrap();
        assert_eq!(count(&full), 1, "it rings again once there is room");
    }

    #[test]
    fn only_an_eventfd_is_one() {
        let (reader, writer) = std::io::pipe().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        let event = new_eventfd().unwrap();
        let mut bell = Bell::new().unwrap();
        for other in [reader.as_fd(), writer.as_fd(), null.as_fd()] {
            let refused = bell.attach(Some(other)).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EINVAL));
        }
        bell.ring().unwrap();
        bell.attach(Some(event.as_fd())).unwrap();
        bell.ring().unwrap();
        assert_eq!(count(&event), 1);
    }
}
