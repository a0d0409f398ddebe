//! The progress of a job in a terminal, and Ctrl-C.
//!
//! With `-p` a job's progress is one line that is written over and over, in the form of qemu-img:
//! `    (12.34/100%)`, a carriage return behind it. SIGINT and SIGTERM end a watched job at its
//! next [`Progress::update`], with or without `-p`, so that it can remove what it made under a
//! temporary name. A second signal ends the process at once: a job that hangs must not keep it.
//! When the job has cleaned up, the process ends by the signal that it got ([`end_by_signal`]): a
//! shell then knows that it was interrupted, and ends its script too.
//!
//! Not here: what a job does when it is interrupted (`jobs`).

use std::cell::Cell;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::{flag, low_level};

use crate::jobs::progress::{Interrupted, Percent, Progress};

/// The signal that has interrupted a watched job; 0 if none has.
static SIGNAL: AtomicUsize = AtomicUsize::new(0);

/// Ends the process by the signal that has interrupted a watched job. Returns if none has.
pub fn end_by_signal() {
    for signal in [SIGINT, SIGTERM] {
        if usize::try_from(signal).ok() == Some(SIGNAL.load(Ordering::SeqCst)) {
            // If that fails the exit code tells of a failure, which is true as well.
            drop(low_level::emulate_default_handler(signal));
        }
    }
}

/// Watches a job for a person at a terminal.
#[derive(Debug)]
pub struct ProgressLine {
    /// Whether the line is written (`-p`).
    is_shown: bool,
    /// What it said last; `None` before the first time.
    last: Cell<Option<Percent>>,
    /// Set by the first SIGINT or SIGTERM.
    interrupted: Arc<AtomicBool>,
}

impl ProgressLine {
    /// Watches from now on; writes the line if `is_shown`. From now on SIGINT and SIGTERM no longer
    /// end the process the first time.
    ///
    /// # Errors
    /// What the host said to the signal handlers.
    pub fn new(is_shown: bool) -> io::Result<Self> {
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first handler sees the flag as the last one left it last time, and
            // who sees the flag sees the signal.
            flag::register_conditional_default(signal, Arc::clone(&interrupted))?;
            flag::register_usize(signal, &SIGNAL, usize::try_from(signal).unwrap_or_default())?;
            flag::register(signal, Arc::clone(&interrupted))?;
        }
        Ok(Self { is_shown, last: Cell::new(None), interrupted })
    }

    /// Writes to standard output at once. Nobody is told if that fails: who has closed it does not
    /// want to know, and the job matters more.
    fn write(text: &str) {
        let mut out = io::stdout().lock();
        drop(out.write_all(text.as_bytes()).and_then(|()| out.flush()));
    }
}

impl Progress for ProgressLine {
    fn update(&self, done: u64, total: u64) -> Result<(), Interrupted> {
        if self.interrupted.load(Ordering::Relaxed) {
            return Err(Interrupted);
        }
        let percent = Percent::of(done, total);
        if self.is_shown && percent.is_news_after(self.last.get()) {
            self.last.set(Some(percent));
            Self::write(&format!("    ({percent}/100%)\r"));
        }
        Ok(())
    }
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        // What is printed next, an error too, starts on a line of its own.
        if self.last.get().is_some() {
            Self::write("\n");
        }
    }
}
