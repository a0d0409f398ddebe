//! Cluster locks: two requests never allocate the same cluster at once (I5).
//!
//! A lock is a bit in a table of fixed size; clusters that are [`ClusterLocks::CLUSTERS`] apart
//! share one, which costs a needless wait and nothing else. Taking and releasing free locks is a
//! compare-and-swap per 64 clusters. Whoever finds a lock taken waits without blocking the thread;
//! a request takes its locks in ascending order of the table, so no two wait for each other.
//!
//! Reads and writes of allocated clusters take no lock at all.

use std::ops::Range;
use std::task::{Poll, Waker};

use crate::seeded::{self, Bug};
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use crate::sync::table_size;

/// Words in the table.
const WORDS: usize = table_size(1024, 4);

/// The table of locks of one image.
#[derive(Debug)]
pub struct ClusterLocks {
    /// One bit per lock; 1 = taken.
    taken: Box<[AtomicU64]>,
    /// Number of entries in `waiting`, readable without its lock.
    waiting_count: AtomicUsize,
    /// Who waits for a lock in which word. An entry may be stale: waking twice does no harm.
    waiting: Mutex<Vec<(usize, Waker)>>,
}

impl Default for ClusterLocks {
    fn default() -> Self {
        let taken = (0..WORDS).map(|_| AtomicU64::new(0)).collect();
        Self { taken, waiting_count: AtomicUsize::new(0), waiting: Mutex::default() }
    }
}

/// The words and masks of the locks of `clusters`, ascending by word.
fn places(clusters: &Range<u64>) -> impl Iterator<Item = (usize, u64)> + use<> {
    let start = clusters.start % ClusterLocks::CLUSTERS;
    let len = clusters.end.saturating_sub(clusters.start).min(ClusterLocks::CLUSTERS);
    let end = start + len;
    // A range that runs over the end of the table goes on at its beginning; that part comes first.
    let wrapped = 0..end.saturating_sub(ClusterLocks::CLUSTERS);
    let straight = start..end.min(ClusterLocks::CLUSTERS);
    let first = straight.start / 64;
    let words = (0..wrapped.end.div_ceil(64).min(first)).chain(first..straight.end.div_ceil(64));
    words.filter_map(move |word| {
        let mask = mask_in(word, &wrapped) | mask_in(word, &straight);
        (mask != 0).then(|| (usize::try_from(word).unwrap_or(usize::MAX), mask))
    })
}

/// The bits of `range` that lie in `word`.
fn mask_in(word: u64, range: &Range<u64>) -> u64 {
    let start = range.start.clamp(word * 64, word * 64 + 64) - word * 64;
    let end = range.end.clamp(word * 64, word * 64 + 64) - word * 64;
    if start >= end { 0 } else { (u64::MAX >> (64 - (end - start))) << start }
}

impl ClusterLocks {
    /// Locks in the table; also the most clusters that one request may lock.
    pub const CLUSTERS: u64 = WORDS as u64 * 64;

    /// Locks the clusters of `range`, at most [`ClusterLocks::CLUSTERS`] of them.
    ///
    /// # Cancel safety
    /// Dropping the future releases what it had taken.
    pub async fn lock(&self, range: Range<u64>) -> ClusterGuard<'_> {
        debug_assert!(range.end - range.start <= Self::CLUSTERS, "callers go in pieces");
        let mut guard = ClusterGuard { locks: self, clusters: range.clone(), held: 0 };
        if seeded::bug(Bug::LocksIgnored) {
            return guard;
        }
        for (word, mask) in places(&range) {
            self.take(word, mask).await;
            guard.held += 1;
        }
        guard
    }

    /// Waits for the locks `mask` of `word` and takes them all at once.
    async fn take(&self, word: usize, mask: u64) {
        std::future::poll_fn(|context| {
            if self.try_take(word, mask) {
                return Poll::Ready(());
            }
            let mut waiting = self.waiting.lock().expect("no panic while held");
            waiting.push((word, context.waker().clone()));
            self.waiting_count.store(waiting.len(), Ordering::SeqCst);
            drop(waiting);
            // Again: a release between the try and the entry has not seen the entry.
            if self.try_take(word, mask) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// Takes the locks `mask` of `word` if all of them are free.
    fn try_take(&self, word: usize, mask: u64) -> bool {
        // SeqCst here and in `release`: of "enter, then try" and "release, then look for entries"
        // at least one sees the other.
        self.taken[word]
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |taken| {
                (taken & mask == 0).then_some(taken | mask)
            })
            .is_ok()
    }

    /// Releases the locks `mask` of `word` and wakes who waits there.
    fn release(&self, word: usize, mask: u64) {
        let before = self.taken[word].fetch_and(!mask, Ordering::SeqCst);
        assert_eq!(before & mask, mask, "released a cluster lock that was not taken");
        if self.waiting_count.load(Ordering::SeqCst) == 0 {
            return;
        }
        let mut woken = Vec::new();
        let mut waiting = self.waiting.lock().expect("no panic while held");
        waiting.retain(|(at, waker)| {
            if *at == word {
                woken.push(waker.clone());
            }
            *at != word
        });
        self.waiting_count.store(waiting.len(), Ordering::SeqCst);
        drop(waiting);
        woken.into_iter().for_each(Waker::wake);
    }
}

/// Locked clusters; released when dropped.
#[derive(Debug)]
pub struct ClusterGuard<'a> {
    /// The table.
    locks: &'a ClusterLocks,
    /// The clusters.
    clusters: Range<u64>,
    /// How many of the words in `places(clusters)` are taken.
    held: usize,
}

impl Drop for ClusterGuard<'_> {
    fn drop(&mut self) {
        for (word, mask) in places(&self.clusters).take(self.held) {
            self.locks.release(word, mask);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::sync::Arc;
    use std::task::{Context, Wake};

    /// Counts wake-ups.
    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn places_cover_each_cluster_once_in_ascending_words() {
        let last = ClusterLocks::CLUSTERS;
        for (range, expected) in [
            (3..5, vec![(0, 0b11000)]),
            (63..65, vec![(0, 1 << 63), (1, 1)]),
            (last - 1..last + 2, vec![(0, 0b11), (WORDS - 1, 1 << 63)]),
            (7..7, vec![]),
        ] {
            assert_eq!(places(&range).collect::<Vec<_>>(), expected, "{range:?}");
        }
        let all: u32 = places(&(100..100 + last)).map(|(_, mask)| mask.count_ones()).sum();
        assert_eq!(u64::from(all), last);
        assert!(places(&(100..100 + last)).map(|(word, _)| word).is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn a_second_request_waits_until_the_first_lets_go() {
        let locks = ClusterLocks::default();
        let count = Arc::new(Count::default());
        let waker = Waker::from(Arc::clone(&count));
        let mut context = Context::from_waker(&waker);
        let Poll::Ready(first) = pin!(locks.lock(10..20)).poll(&mut context) else { panic!() };
        let mut second = pin!(locks.lock(19..30));
        assert!(second.as_mut().poll(&mut context).is_pending());
        let Poll::Ready(other) = pin!(locks.lock(30..40)).poll(&mut context) else { panic!() };
        drop(first);
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
        assert!(second.poll(&mut context).is_ready());
        drop(other);
    }

    #[test]
    fn a_request_that_gives_up_releases_what_it_had() {
        let locks = ClusterLocks::default();
        let mut context = Context::from_waker(Waker::noop());
        let Poll::Ready(first) = pin!(locks.lock(100..101)).poll(&mut context) else { panic!() };
        {
            let mut second = pin!(locks.lock(0..101));
            assert!(second.as_mut().poll(&mut context).is_pending());
            assert!(pin!(locks.lock(0..1)).poll(&mut context).is_pending());
        }
        assert!(pin!(locks.lock(0..1)).poll(&mut context).is_ready());
        drop(first);
    }
}
