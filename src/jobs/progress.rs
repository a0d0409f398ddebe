//! How far a job is, and whether it may go on.
//!
//! A job calls [`Progress::update`] between its pieces of work, at points where it can end and
//! leave a valid disk behind. Whoever started the job decides what becomes of that: a line in a
//! terminal, a number for a client, nothing; and whether the job has been interrupted.
//!
//! Not here: printing and signals (`cli::progress`).

use std::fmt;

/// A job was told to stop before it was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Watches a job.
pub trait Progress {
    /// The job has done `done` of `total` units of work; which units is the job's own choice, bytes
    /// if there is none. `done <= total`; a `total` of 0 means that there is nothing to do. Calls
    /// are cheap: a job need not save them up.
    ///
    /// # Errors
    /// `Interrupted` if the job is to end now. It cleans up and passes that on.
    fn update(&self, done: u64, total: u64) -> Result<(), Interrupted>;
}

/// Watches nothing and never interrupts.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unwatched;

impl Progress for Unwatched {
    fn update(&self, _done: u64, _total: u64) -> Result<(), Interrupted> {
        Ok(())
    }
}

/// A part of a whole in hundredths of a percent, 0 to 10000; shown as `12.34`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Percent(u16);

impl Percent {
    /// All of it.
    pub const ALL: Self = Self(10_000);

    /// `done` of `total`, rounded down, so that only the whole is 100; all of it if `total` is 0.
    #[must_use]
    pub fn of(done: u64, total: u64) -> Self {
        if done >= total {
            return Self::ALL;
        }
        let hundredths = u128::from(done) * 10_000 / u128::from(total);
        Self(u16::try_from(hundredths).unwrap_or(Self::ALL.0))
    }

    /// Whether it is worth showing after `last` was: at least a whole percent of a difference, or
    /// the beginning or the end. That is how often qemu-img shows it.
    #[must_use]
    pub fn is_news_after(self, last: Option<Self>) -> bool {
        match last {
            None => true,
            Some(last) => {
                self.0.abs_diff(last.0) >= 100
                    || (self != last && [0, Self::ALL.0].contains(&self.0))
            }
        }
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:02}", self.0 / 100, self.0 % 100)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percents_are_rounded_down_and_only_the_whole_is_100() {
        let rows = [
            (0, 1, "0.00"),
            (1, 3, "33.33"),
            (1, 10_001, "0.00"),
            (u64::MAX - 1, u64::MAX, "99.99"),
            (u64::MAX, u64::MAX, "100.00"),
            (0, 0, "100.00"),
        ];
        for (done, total, text) in rows {
            assert_eq!(Percent::of(done, total).to_string(), text, "{done} of {total}");
        }
    }

    #[test]
    fn a_percent_is_shown_when_it_differs_by_one_or_is_the_first_or_the_last() {
        let at = |hundredths: u64| Percent::of(hundredths, 10_000);
        assert!(at(0).is_news_after(None));
        assert!(!at(99).is_news_after(Some(at(0))));
        assert!(at(100).is_news_after(Some(at(0))));
        assert!(!at(9_999).is_news_after(Some(at(9_950))));
        assert!(at(10_000).is_news_after(Some(at(9_999))));
        assert!(!at(10_000).is_news_after(Some(at(10_000))), "the same is not shown twice");
    }
}
