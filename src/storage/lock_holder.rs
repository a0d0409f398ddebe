//! Who has a file locked, for the message that it is in use.
//!
//! The kernel does not tell whose an open file's lock is (fcntl(2): `l_pid` is -1), but it lists
//! the locks of each open file of a process (`/proc/PID/fdinfo`, proc(5)). So the processes that we
//! may look into are searched for one that has this file open and the byte in question locked.
//!
//! A help for people, and no more: nothing depends on the answer. None is given for processes of
//! other users (unless we are root) or of other PID namespaces, for a lock that went away
//! meanwhile, without /proc, and where the search takes longer than `MAX_SEARCH`.
//!
//! Files are locked when a disk is opened, so the daemon comes here before it confines itself:
//! there is no rule for what is done here (`cli/daemon.rs`).
//!
//! Not here: taking locks (`lock`).

use std::fmt;
use std::fs::{File, read_dir, read_to_string};
use std::ops::RangeInclusive;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, Statx, StatxFlags, statx};

/// The longest search: a refusal takes half a second as it is.
const MAX_SEARCH: Duration = Duration::from_secs(1);

/// A process that has a file locked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LockHolder {
    /// Its name, as ps(1) shows it: at most 15 bytes, which the process itself chose.
    pub name: String,
    /// Its process ID, as we see it.
    pub pid: u32,
}

impl fmt::Display for LockHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, PID {}", self.name, self.pid)
    }
}

/// Another process that has one of `bytes` of `file` locked, if one can be found.
pub(super) fn find(file: &File, bytes: &[i64]) -> Option<LockHolder> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let wanted = statx(file, c"", flags, StatxFlags::INO).ok()?;
    let end = Instant::now() + MAX_SEARCH;
    for entry in read_dir("/proc").ok()? {
        let Ok(entry) = entry else { continue };
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        if pid != std::process::id() && holds(&entry.path(), &wanted, bytes, end) {
            // Gone by now, perhaps.
            let name = read_to_string(entry.path().join("comm")).ok()?.trim_end().to_owned();
            return Some(LockHolder { name, pid });
        }
        if Instant::now() >= end {
            return None;
        }
    }
    None
}

/// Whether the process of this folder of /proc has the file open and one of its bytes locked.
fn holds(process: &Path, wanted: &Statx, bytes: &[i64], end: Instant) -> bool {
    let Ok(files) = read_dir(process.join("fd")) else { return false };
    for open in files.flatten().take_while(|_| Instant::now() < end) {
        // A look at where the link leads, not an opening. It may lead to any file of any process,
        // also on a server (FUSE, NFS) that answers nothing any more, which a stat(2) would wait
        // for: so only what the kernel knows by itself is asked for, and who a file is it does.
        let found = statx(CWD, open.path(), AtFlags::STATX_DONT_SYNC, StatxFlags::INO);
        let is_it = found.is_ok_and(|found| is_same(&found, wanted));
        if is_it
            && let Ok(facts) = read_to_string(process.join("fdinfo").join(open.file_name()))
            && facts.lines().filter_map(locked_range).any(|r| bytes.iter().any(|b| r.contains(b)))
        {
            return true;
        }
    }
    false
}

/// Whether both are of one inode: locks belong to inodes, also those of device nodes.
fn is_same(one: &Statx, other: &Statx) -> bool {
    let identity = |file: &Statx| (file.stx_dev_major, file.stx_dev_minor, file.stx_ino);
    identity(one) == identity(other)
}

/// The bytes that a line of fdinfo says are locked, if it is about a lock:
/// `lock:  1: OFDLCK ADVISORY  READ -1 fe:00:10101711 100 100`.
fn locked_range(line: &str) -> Option<RangeInclusive<i64>> {
    let words: Vec<&str> = line.strip_prefix("lock:")?.split_whitespace().collect();
    let [.., start, end] = words[..] else { return None };
    let end = if end == "EOF" { i64::MAX } else { end.parse().ok()? };
    Some(start.parse().ok()?..=end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_about_locks_are_understood_and_others_are_not() {
        let rows = [
            ("lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:10101711 100 101", Some(100..=101)),
            ("lock:\t2: POSIX  ADVISORY  WRITE 1234 00:2a:5 0 EOF", Some(0..=i64::MAX)),
            ("lock:\t3: LEASE  ACTIVE    READ 12 fe:00:1 x y", None),
            ("lock:", None),
            ("lock:\t", None),
            ("flags:\t0100000", None),
            ("", None),
        ];
        for (line, range) in rows {
            assert_eq!(locked_range(line), range, "{line:?}");
        }
    }
}
