//! Adaptive busy polling: how long a queue spins before it sleeps.
//!
//! A driver that submits its next request a few microseconds after it saw the last one complete is
//! served much faster by a queue that is still awake, and need not kick it. A driver that does not
//! must cost nothing. So the window grows when a sleep turns out to have been shorter than the
//! limit, and shrinks when it was longer, as hypervisors do for halted virtual CPUs.
//!
//! Not here: what is polled for (`queue`).

use std::time::{Duration, Instant};

/// The window after the first sleep that was short enough.
const FIRST_WINDOW: Duration = Duration::from_micros(5);

/// How often the conditions are checked between two looks at the clock.
const CHECKS_PER_LOOK: u32 = 16;

/// The polling of one queue.
#[derive(Debug)]
pub struct Polling {
    /// The longest window; zero: never poll.
    limit: Duration,
    /// How long the queue spins now before it sleeps.
    window: Duration,
}

impl Polling {
    /// Polling for at most `limit` at a time.
    #[must_use]
    pub fn new(limit: Duration) -> Self {
        Self { limit, window: Duration::ZERO }
    }

    /// Spins until `ready` or the window is over. Returns whether it was ready.
    pub fn spin(&self, mut ready: impl FnMut() -> bool) -> bool {
        if self.window.is_zero() {
            return false;
        }
        let start = Instant::now();
        loop {
            for _ in 0..CHECKS_PER_LOOK {
                if ready() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() >= self.window {
                return false;
            }
        }
    }

    /// Learns from an idle time, spinning included, that ended in sleep.
    pub fn slept(&mut self, idle: Duration) {
        self.window = if idle <= self.limit {
            (self.window * 2).clamp(FIRST_WINDOW.min(self.limit), self.limit)
        } else if self.window > FIRST_WINDOW {
            self.window / 2
        } else {
            Duration::ZERO
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_follows_the_driver() {
        let limit = Duration::from_micros(50);
        let mut polling = Polling::new(limit);
        assert!(!polling.spin(|| true), "no window at first");
        for _ in 0..5 {
            polling.slept(Duration::from_micros(20));
        }
        assert_eq!(polling.window, limit);
        assert!(polling.spin(|| true));
        for _ in 0..5 {
            polling.slept(Duration::from_millis(20));
        }
        assert_eq!(polling.window, Duration::ZERO);
    }

    #[test]
    fn a_limit_of_zero_never_polls() {
        let mut polling = Polling::new(Duration::ZERO);
        polling.slept(Duration::ZERO);
        assert!(!polling.spin(|| true));
    }
}
