//! Keeping the log readable: a bound on how many lines a guest may cause per second.
//!
//! A guest can cause errors as fast as it can send requests, and a full disk fails every one of
//! them. The first lines of a second are written; how many were left out is said when the next one
//! is written.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Lines per second that are written.
const LINES_PER_SECOND: u32 = 10;

/// What has been written in the present second.
#[derive(Debug)]
struct Window {
    /// When it began.
    since: Instant,
    /// Lines written.
    lines: u32,
    /// Lines left out.
    left_out: u64,
}

/// A limit on lines of the log, shared by threads.
#[derive(Debug, Default)]
pub struct LogLimit {
    /// The present second; `None` before the first line.
    window: Mutex<Option<Window>>,
}

impl LogLimit {
    /// Calls `write` unless too much was written lately. For errors that an operator must see.
    pub fn error(&self, write: impl FnOnce()) {
        if log::log_enabled!(log::Level::Error) && self.admit(Instant::now()) {
            write();
        }
    }

    /// The same for warnings.
    pub fn warn(&self, write: impl FnOnce()) {
        if log::log_enabled!(log::Level::Warn) && self.admit(Instant::now()) {
            write();
        }
    }

    /// The same for what only somebody who looks for it wants to see; free when nobody does.
    pub fn debug(&self, write: impl FnOnce()) {
        if log::log_enabled!(log::Level::Debug) && self.admit(Instant::now()) {
            write();
        }
    }

    /// Whether another line may be written at `now`.
    fn admit(&self, now: Instant) -> bool {
        let mut guard = self.window.lock().expect("no panic while held");
        let window = guard.get_or_insert(Window { since: now, lines: 0, left_out: 0 });
        if now.duration_since(window.since) >= Duration::from_secs(1) {
            if window.left_out > 0 {
                log::warn!("{} messages like the last ones were left out", window.left_out);
            }
            *window = Window { since: now, lines: 0, left_out: 0 };
        }
        if window.lines < LINES_PER_SECOND {
            window.lines += 1;
            true
        } else {
            window.left_out += 1;
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_admits_ten_lines() {
        let limit = LogLimit::default();
        let start = Instant::now();
        assert_eq!((0..100).filter(|_| limit.admit(start)).count(), 10);
        assert!(limit.admit(start + Duration::from_secs(1)));
    }
}
