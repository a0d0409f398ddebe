//! Rings that can do what this program asks of them, and nothing else.
//!
//! io_uring passes by filters of system calls. So a ring is made disabled, told once what it may be
//! asked for, and then enabled: what is not on the list is answered with EACCES, whoever asks.
//!
//! Not here: what is asked for, and how (`uring` and `vhost_user::bell`, which have each operation
//! of the lists).
#![cfg_attr(
    test,
    expect(unsafe_code, reason = "tests push entries that must be refused; they name no memory")
)]

use std::io;
use std::sync::Once;

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue};

/// Files that a ring can register; a disk has three. Further ones work too, a little slower.
pub const MAX_FILES: u32 = 16;

/// What a ring is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A queue's I/O.
    Disk,
    /// Calling the driver.
    Bell,
}

impl Purpose {
    /// What it can be asked for once it is enabled: what its user does, and nothing that opens,
    /// connects, or moves descriptors.
    fn operations(self) -> &'static [u8] {
        match self {
            Self::Disk => &[
                opcode::Read::CODE,
                opcode::Readv::CODE,
                opcode::ReadFixed::CODE,
                opcode::Write::CODE,
                opcode::Writev::CODE,
                opcode::WriteFixed::CODE,
                opcode::Fallocate::CODE,
                opcode::Fsync::CODE,
                opcode::PollAdd::CODE,
            ],
            Self::Bell => &[opcode::Nop::CODE],
        }
    }

    /// `IORING_REGISTER_*` operations that it may be asked for: memory, and files of the disk; an
    /// eventfd, and none.
    fn registrations(self) -> [u8; 2] {
        match self {
            Self::Disk => [0, 6],
            Self::Bell => [4, 5],
        }
    }

    /// Flags of an operation that are allowed.
    fn flags(self) -> squeue::Flags {
        match self {
            Self::Disk => squeue::Flags::FIXED_FILE,
            Self::Bell => squeue::Flags::empty(),
        }
    }
}

/// A ring of the kernel with `entries` places for submissions: the best that it has, and no more
/// than it must be able to do.
///
/// # Errors
/// What the host said.
pub fn build(entries: u32, purpose: Purpose) -> io::Result<IoUring> {
    // Completions are worked off when this thread asks for them, not by interrupting it; kernels
    // before 6.1 do not know how (EINVAL) and get a plain ring, before 5.10 an unrestricted one.
    let mut builder = IoUring::builder();
    builder.setup_single_issuer().setup_coop_taskrun().setup_taskrun_flag().setup_defer_taskrun();
    let is_old = |error: &io::Error| error.raw_os_error() == Some(libc::EINVAL);
    let uring = match builder.setup_r_disabled().build(entries) {
        Err(error) if is_old(&error) => {
            match IoUring::builder().setup_r_disabled().build(entries) {
                Err(error) if is_old(&error) => {
                    warn_unrestricted();
                    return IoUring::new(entries);
                }
                other => other?,
            }
        }
        other => other?,
    };
    let submitter = uring.submitter();
    // Registered files spare the kernel a look-up per operation. Optional.
    if purpose == Purpose::Disk
        && let Err(error) = submitter.register_files_sparse(MAX_FILES)
    {
        log::debug!("io_uring: no registered files: {error}");
    }
    let operations = purpose.operations().iter().copied().map(Restriction::sqe_op);
    let registrations = purpose.registrations().map(Restriction::register_op);
    let flags = Restriction::sqe_flags_allowed(purpose.flags().bits());
    let mut restrictions: Vec<Restriction> =
        operations.chain(registrations).chain([flags]).collect();
    match submitter.register_restrictions(&mut restrictions) {
        Err(error) if is_old(&error) => warn_unrestricted(),
        result => result?,
    }
    submitter.register_enable_rings()?;
    Ok(uring)
}

/// Says that rings cannot be restricted: once, not for each ring.
fn warn_unrestricted() {
    /// Whether it was said.
    static SAID: Once = Once::new();
    SAID.call_once(|| log::warn!("sandbox: this kernel cannot restrict what io_uring may do"));
}

#[cfg(test)]
mod tests {
    use super::*;
    use io_uring::types;

    /// What the kernel answers to an operation.
    fn answer(uring: &mut IoUring, entry: squeue::Entry) -> i32 {
        // SAFETY: the entries of these tests name no memory but a constant name.
        unsafe { uring.submission().push(&entry) }.unwrap();
        uring.submit_and_wait(1).unwrap();
        uring.completion().next().unwrap().result()
    }

    #[test]
    fn a_ring_refuses_what_the_daemon_never_asks_for() {
        let mut uring = build(8, Purpose::Disk).unwrap();
        let here = types::Fd(libc::AT_FDCWD);
        let refused = [
            opcode::OpenAt::new(here, c"/".as_ptr()).build(),
            opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
            opcode::UnlinkAt::new(here, c"nothing".as_ptr()).build(),
            opcode::Close::new(types::Fd(-1)).build(),
            opcode::Nop::new().build(),
            // What it does ask for, but linked to the next, or drained.
            opcode::Fsync::new(types::Fd(-1)).build().flags(squeue::Flags::IO_LINK),
            opcode::Fsync::new(types::Fd(-1)).build().flags(squeue::Flags::IO_DRAIN),
        ];
        for entry in refused {
            assert_eq!(answer(&mut uring, entry), -libc::EACCES);
        }
        let allowed = opcode::Fsync::new(types::Fd(-1)).build();
        assert_eq!(answer(&mut uring, allowed), -libc::EBADF);
        let eventfd = uring.submitter().register_eventfd(0).unwrap_err();
        assert_eq!(eventfd.raw_os_error(), Some(libc::EACCES));
    }

    #[test]
    fn a_bell_does_nothing_but_ring() {
        let mut uring = build(1, Purpose::Bell).unwrap();
        let here = types::Fd(-1);
        let refused = [
            opcode::Write::new(here, std::ptr::null(), 0).build(),
            opcode::Fsync::new(here).build(),
            opcode::PollAdd::new(here, 1).build(),
            opcode::Nop::new().build().flags(squeue::Flags::ASYNC),
        ];
        for entry in refused {
            assert_eq!(answer(&mut uring, entry), -libc::EACCES);
        }
        assert_eq!(answer(&mut uring, opcode::Nop::new().build()), 0);
        let files = uring.submitter().register_files_update(0, &[0]).unwrap_err();
        assert_eq!(files.raw_os_error(), Some(libc::EACCES));
    }
}
