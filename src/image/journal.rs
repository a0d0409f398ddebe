//! The journal: which clusters were allocated since it was begun, in memory that outlives us (I7).
//!
//! A new bit may not reach the add-cow file before the raw image is synced (I1), and a write that
//! completed must not be lost with the process (P3). So each bit goes to the journal first, then to
//! the allocation map, and only then is the guest answered; a later process takes the bits out of
//! the journal. Bits are never cleared: one that is in the add-cow file by now does no harm.
//!
//! Relies on the memory to go with the host: after a power cut the bits would claim data that the
//! raw image has lost. Not here: whose journal it is (`vhost_user::recovery`).

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::allocation::{AllocationMap, WORD_BITS, masks};
use crate::storage::shared_memory::SharedMemory;

/// One bit for each cluster of a disk.
#[derive(Debug)]
pub struct BitJournal {
    /// Where the bits are.
    memory: Arc<SharedMemory>,
    /// The first word with bits; all words from there on hold some.
    first: usize,
    /// Number of clusters.
    clusters: u64,
}

/// Why a journal cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// It has a bit that belongs to no cluster.
    #[error("it has a bit past the last cluster")]
    StrayBit,
    /// It could not be read.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl BitJournal {
    /// How many words the bits of so many clusters take; `None` if they cannot be counted.
    #[must_use]
    pub fn words(clusters: u64) -> Option<usize> {
        usize::try_from(clusters.div_ceil(WORD_BITS)).ok()
    }

    /// The journal of a disk of `clusters` clusters in the words of `memory` from `first` on.
    #[must_use]
    pub fn new(memory: Arc<SharedMemory>, first: usize, clusters: u64) -> Self {
        Self { memory, first, clusters }
    }

    /// Notes that the clusters `range` are in the raw image.
    pub fn mark(&self, range: Range<u64>) {
        for (word, mask) in masks(range) {
            // What lies outside would be a bug of ours; the bit is then in the map alone.
            if let Some(word) = self.memory.word(self.first.saturating_add(word)) {
                word.fetch_or(mask, Ordering::SeqCst);
            }
        }
    }

    /// Marks in `map` what is marked here. Returns how many clusters are new to it. Nobody else
    /// uses the disk meanwhile.
    ///
    /// # Errors
    /// `StrayBit` and `Io`, with nothing marked.
    pub fn replay(&self, map: &AllocationMap) -> Result<u64, JournalError> {
        // Everything is looked at before anything is believed.
        let mut found = Vec::new();
        let mut at = self.first;
        while let Some(touched) = self.memory.next_touched(at)? {
            for index in touched.start.max(at)..touched.end {
                let bits = self.memory.word(index).map_or(0, |word| word.load(Ordering::SeqCst));
                let first = ((index - self.first) as u64).saturating_mul(WORD_BITS);
                let known = self.clusters.saturating_sub(first).min(WORD_BITS);
                if known < WORD_BITS && bits >> known != 0 {
                    return Err(JournalError::StrayBit);
                }
                if bits != 0 {
                    found.push((first, bits));
                }
            }
            at = touched.end;
        }
        let mut new = 0;
        for (first, bits) in found {
            let mut missing = bits & !map.word(first / WORD_BITS);
            new += u64::from(missing.count_ones());
            while missing != 0 {
                let start = missing.trailing_zeros();
                let len = (missing >> start).trailing_ones();
                let start = first + u64::from(start);
                map.mark(start..start + u64::from(len));
                missing &= !map.word(first / WORD_BITS);
            }
        }
        Ok(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::BitmapGeometry;
    use crate::units::ClusterSize;

    /// A journal behind three words of something else, and an empty map, of `clusters` clusters.
    fn journal(clusters: u64) -> (BitJournal, AllocationMap) {
        let words = 3 + BitJournal::words(clusters).unwrap();
        let memory = Arc::new(SharedMemory::create("test", words).unwrap());
        for word in 0..3 {
            memory.word(word).unwrap().store(u64::MAX, Ordering::Relaxed);
        }
        let size = ClusterSize::from_bits(12).unwrap();
        let geometry = BitmapGeometry::new(size, clusters * 4096).unwrap();
        (BitJournal::new(memory, 3, clusters), AllocationMap::empty(&geometry).unwrap())
    }

    #[test]
    fn what_was_marked_is_replayed_and_nothing_else() {
        let (journal, map) = journal(100_000);
        for range in [0..1, 5..6, 63..65, 700..900, 99_990..100_000] {
            journal.mark(range);
        }
        map.mark(800..810);
        assert_eq!(journal.replay(&map).unwrap(), 1 + 1 + 2 + 190 + 10);
        let mut at = 0;
        let mut runs = Vec::new();
        while at < 100_000 {
            let (is_allocated, end) = map.run(at..100_000);
            if is_allocated {
                runs.push(at..end);
            }
            at = end;
        }
        assert_eq!(runs, [0..1, 5..6, 63..65, 700..900, 99_990..100_000]);
        // All of it is new to the file.
        assert_eq!(map.freeze().pages().len(), 2);
        assert_eq!(journal.replay(&map).unwrap(), 0);
    }

    #[test]
    fn a_stray_bit_is_refused_and_nothing_marked() {
        let (journal, map) = journal(70);
        journal.mark(3..4);
        let last = journal.memory.word(4).unwrap();
        last.store(1 << 5, Ordering::Relaxed);
        assert_eq!(journal.replay(&map).unwrap(), 2);
        last.store(1 << 6, Ordering::Relaxed);
        journal.mark(9..10);
        assert!(matches!(journal.replay(&map), Err(JournalError::StrayBit)));
        assert!(!map.is_allocated(9..10));
    }
}
