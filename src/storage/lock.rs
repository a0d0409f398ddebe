//! Image locks: what a program does with a file, and what it cannot bear others to do meanwhile.
//!
//! The locks are those of QEMU's programs, so that qemu-img, qemu-io and guests' disks in QEMU keep
//! out of our way as we do of theirs: each permission has a number n; a holder has byte 100 + n
//! locked if it uses the permission, and byte 200 + n if nobody else may. All are *read* locks,
//! which any number of programs can have; a program takes its own, then looks whether another one
//! has a byte that contradicts. Of two that come at once one is refused, or both are.
//!
//! They are locks of the open file (`F_OFD_SETLK`, fcntl(2)): they belong to the inode, whatever
//! the file's name; two opens in one process are strangers to each other; and they go with the last
//! descriptor, so nothing has to be cleaned up after a process that was killed. But that may take a
//! moment: an io_uring keeps files for some 50 ms after the death of its process. So a refusal is
//! only final after [`PATIENCE`]. The bytes of the file at these offsets are not touched.
//!
//! Not here: which file is opened for which use (`image`).

use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::lock_holder::{self, LockHolder};

/// Permission number: reads, and needs what it reads to make sense.
const CONSISTENT_READ: i64 = 0;
/// Permission number: writes.
const WRITE: i64 = 1;
/// Permission number: changes the file's length.
const RESIZE: i64 = 3;

/// Offset of the bytes of permissions in use.
const USED: i64 = 100;
/// Offset of the bytes of permissions that others must not use.
const DENIED: i64 = 200;

/// How long a file that is in use is tried again: ten times what the kernel takes to close the
/// files of a daemon that was killed, and short enough for a person who is refused.
pub const PATIENCE: Duration = Duration::from_millis(500);

/// What a program does with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Usage {
    /// It reads, and bears others who read.
    Read,
    /// It writes, alone.
    Write,
}

impl Usage {
    /// The permissions that are used.
    fn used(self) -> &'static [i64] {
        match self {
            Self::Read => &[CONSISTENT_READ],
            Self::Write => &[CONSISTENT_READ, WRITE, RESIZE],
        }
    }

    /// The permissions that nobody else may use.
    fn denied(self) -> &'static [i64] {
        match self {
            Self::Read => &[WRITE],
            Self::Write => &[WRITE, RESIZE],
        }
    }

    /// The bytes that the holder locks.
    fn own_bytes(self) -> impl Iterator<Item = i64> {
        let used = self.used().iter().map(|n| USED + n);
        used.chain(self.denied().iter().map(|n| DENIED + n))
    }

    /// The bytes that nobody else may have locked.
    fn contradicting_bytes(self) -> impl Iterator<Item = i64> {
        let denied = self.used().iter().map(|n| DENIED + n);
        denied.chain(self.denied().iter().map(|n| USED + n))
    }
}

/// Whether files that are opened are locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Locking {
    /// They are, and one that is in use otherwise is refused.
    On,
    /// They are not: for a look at a disk that somebody may be writing to.
    Off,
}

/// Why a file was not locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another program uses it in a way that does not go together with ours.
    #[error("in use by another process")]
    InUse {
        /// Which one, where that can be found out.
        holder: Option<LockHolder>,
    },
    /// The host cannot lock it.
    #[error(transparent)]
    Host(#[from] io::Error),
}

/// Locks `file` for `usage`, until it is released or closed. It must not be locked already.
///
/// # Errors
/// See [`LockError`]. The file is then not locked.
pub(super) fn lock(file: &File, usage: Usage) -> Result<(), LockError> {
    let start = Instant::now();
    loop {
        let result = take_and_compare(file, usage);
        if result.is_ok() {
            return Ok(());
        }
        // Also before another try: whoever comes meanwhile must not be refused by one who waits.
        release(file, usage);
        if !matches!(result, Err(LockError::InUse { .. })) {
            return result;
        }
        if start.elapsed() >= PATIENCE {
            let bytes: Vec<i64> = usage.contradicting_bytes().collect();
            return Err(LockError::InUse { holder: lock_holder::find(file, &bytes) });
        }
        // Of two that keep refusing each other one is to get through.
        std::thread::sleep(Duration::from_millis(fastrand::u64(5..15)));
    }
}

/// Releases what [`lock`] has taken for `usage`. Nobody waits for that to succeed: the last close
/// does it at the latest.
pub(super) fn release(file: &File, usage: Usage) {
    for byte in usage.own_bytes() {
        set(file, libc::F_UNLCK, byte).ok();
    }
}

/// Takes the bytes of `usage`, then looks for those of others.
fn take_and_compare(file: &File, usage: Usage) -> Result<(), LockError> {
    for byte in usage.own_bytes() {
        // fcntl(2): a read lock can also be taken on a file that is open for reading only.
        match set(file, libc::F_RDLCK, byte) {
            Ok(()) => {}
            // Somebody has a write lock, which no program of this protocol takes.
            Err(Errno::EAGAIN | Errno::EACCES) => return Err(LockError::InUse { holder: None }),
            Err(error) => return Err(io::Error::from(error).into()),
        }
    }
    for byte in usage.contradicting_bytes() {
        if is_locked_by_others(file, byte).map_err(io::Error::from)? {
            return Err(LockError::InUse { holder: None });
        }
    }
    Ok(())
}

/// The description of a lock on one byte.
fn description(kind: libc::c_int, byte: i64) -> libc::flock {
    libc::flock {
        // The constants are 0 to 2.
        l_type: libc::c_short::try_from(kind).unwrap_or_default(),
        l_whence: 0, // SEEK_SET
        l_start: byte,
        l_len: 1,
        // fcntl(2): must be 0 for locks of the open file.
        l_pid: 0,
    }
}

/// Takes a lock on one byte, or with `F_UNLCK` releases it. Does not wait.
fn set(file: &File, kind: libc::c_int, byte: i64) -> Result<(), Errno> {
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&description(kind, byte))) {
            Err(Errno::EINTR) => {}
            result => return result.map(drop),
        }
    }
}

/// Whether an open file other than `file` has any lock on this byte.
fn is_locked_by_others(file: &File, byte: i64) -> Result<bool, Errno> {
    // Whether a write lock could be taken: any lock of somebody else is in its way.
    let mut found = description(libc::F_WRLCK, byte);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut found))?;
    Ok(libc::c_int::from(found.l_type) != libc::F_UNLCK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::host_file::{Access, CacheMode, HostFile};
    use std::path::Path;

    fn open(path: &Path, access: Access) -> HostFile {
        HostFile::open(path, access, CacheMode::Buffered).unwrap()
    }

    /// Whether `second` is refused while another open file is locked for `first`.
    fn is_refused(first: Usage, second: Usage) -> bool {
        let file = tempfile::NamedTempFile::new().unwrap();
        let holder = open(file.path(), Access::ReadOnly);
        holder.lock(first).unwrap();
        let other = open(file.path(), Access::ReadWrite);
        let refused = match other.lock(second) {
            Ok(()) => false,
            Err(LockError::InUse { .. }) => true,
            Err(LockError::Host(error)) => panic!("{error}"),
        };
        drop(holder);
        if refused {
            // Nothing of the refused lock has stayed behind, and nothing of the closed file's.
            let third = open(file.path(), Access::ReadOnly);
            third.lock(Usage::Write).unwrap();
        }
        refused
    }

    #[test]
    fn readers_bear_readers_and_nobody_bears_a_writer() {
        assert!(!is_refused(Usage::Read, Usage::Read));
        assert!(is_refused(Usage::Read, Usage::Write));
        assert!(is_refused(Usage::Write, Usage::Read));
        assert!(is_refused(Usage::Write, Usage::Write));
    }

    #[test]
    fn a_hard_link_is_the_same_file() {
        let folder = tempfile::tempdir().unwrap();
        let (name, link) = (folder.path().join("a"), folder.path().join("b"));
        std::fs::write(&name, b"bytes").unwrap();
        std::fs::hard_link(&name, &link).unwrap();
        let holder = open(&name, Access::ReadWrite);
        holder.lock(Usage::Write).unwrap();
        let other = open(&link, Access::ReadOnly);
        assert!(matches!(other.lock(Usage::Read), Err(LockError::InUse { .. })));
    }

    #[test]
    fn the_bytes_are_those_of_qemu() {
        let bytes = |usage: Usage| usage.own_bytes().collect::<Vec<_>>();
        assert_eq!(bytes(Usage::Write), [100, 101, 103, 201, 203]);
        assert_eq!(bytes(Usage::Read), [100, 201]);
    }
}
