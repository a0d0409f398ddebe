//! The allocation map: which clusters live in the raw image.
//!
//! One bit per cluster in atomic words, so that readers and writers of allocated clusters take no
//! lock. Bits go from 0 to 1 only (I3). Bits that are newer than the side file are remembered by
//! bitmap page; a flush takes them with [`AllocationMap::freeze`], which is the point that divides
//! its bits from those of the next flush (I4).
//!
//! Not here: who may set a bit when (`cluster_lock`, `write`), and writing pages (`flush`).

use std::ops::Range;

use crate::format::{BitmapGeometry, decode_words, encode_words};
use crate::seeded::{self, Bug};
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use crate::sync::{change_word, table_size, thread, zero_words};

/// Bits in a word.
pub(super) const WORD_BITS: u64 = 64;

/// Words in a bitmap page.
const PAGE_WORDS: u64 = BitmapGeometry::PAGE_LEN / 8;

/// Which clusters are allocated.
#[derive(Debug)]
pub struct AllocationMap {
    /// The bits; `None` when every cluster is allocated for good (ALL_ALLOCATED, or no side file).
    bits: Option<Bits>,
}

/// The bits of an image that has unallocated clusters.
#[derive(Debug)]
struct Bits {
    /// Where the bits lie in the side file.
    geometry: BitmapGeometry,
    /// Bit `c % 64` of word `c / 64`; bits past the last cluster are 0.
    allocated: Box<[AtomicU64]>,
    /// How many of them came from the side file.
    loaded: u64,
    /// One bit per bitmap page that has bits which the side file lacks.
    dirty_pages: Box<[AtomicU64]>,
    /// How many threads are between marking a page dirty and setting its bits, by page number
    /// modulo the length.
    marking: [MarkingCount; MARKING_COUNTS],
}

/// Counts of threads that mark.
const MARKING_COUNTS: usize = table_size(16, 1);

/// A count of threads, on a cache line of its own so that queues do not share one.
#[derive(Debug, Default)]
#[repr(align(64))]
struct MarkingCount(AtomicU32);

/// While this lives, a freeze waits.
struct Marking<'a>(&'a MarkingCount);

impl Drop for Marking<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The place of bit `index`: word and mask.
fn place(index: u64) -> (usize, u64) {
    // A map this large was allocated, so its word indices fit.
    (usize::try_from(index / WORD_BITS).unwrap_or(usize::MAX), 1 << (index % WORD_BITS))
}

/// The bits of `range` that lie in each word, as (word, mask).
pub(super) fn masks(range: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let mut start = range.start;
    std::iter::from_fn(move || {
        if start >= range.end {
            return None;
        }
        let end = (start / WORD_BITS + 1).saturating_mul(WORD_BITS).min(range.end);
        let mask = (u64::MAX >> (WORD_BITS - (end - start))) << (start % WORD_BITS);
        let word = place(start).0;
        start = end;
        Some((word, mask))
    })
}

impl AllocationMap {
    /// The map of a disk whose every cluster is in the raw image.
    #[must_use]
    pub fn all() -> Self {
        Self { bits: None }
    }

    /// The map of a disk with no cluster allocated, or `None` if there is no memory for it.
    #[must_use]
    pub fn empty(geometry: &BitmapGeometry) -> Option<Self> {
        let bits = Bits {
            geometry: *geometry,
            allocated: zero_words(geometry.words())?,
            loaded: 0,
            dirty_pages: zero_words(geometry.pages().div_ceil(WORD_BITS))?,
            marking: Default::default(),
        };
        Some(Self { bits: Some(bits) })
    }

    /// Whether every cluster is allocated for good, so that there is no bitmap.
    #[must_use]
    pub fn is_all(&self) -> bool {
        self.bits.is_none()
    }

    /// Sets bits as the side file has them: `bytes` from byte `start` of its bitmap, a multiple of
    /// 8. Bits past the last cluster are ignored.
    pub fn load(&mut self, start: u64, bytes: &[u8]) {
        let Some(Bits { geometry, allocated, loaded, .. }) = &mut self.bits else { return };
        let first = usize::try_from(start / 8).unwrap_or(usize::MAX);
        let words = allocated.iter_mut().skip(first).zip(decode_words(bytes));
        for (index, (word, value)) in (start / 8..).zip(words) {
            let value = value & geometry.word_mask(index);
            change_word(word, |word| {
                // A word that two ranges of the file share comes twice.
                *loaded += u64::from((value & !*word).count_ones());
                *word |= value;
            });
        }
    }

    /// Whether every cluster of `range` is allocated.
    #[must_use]
    pub fn is_allocated(&self, range: Range<u64>) -> bool {
        let Some(bits) = &self.bits else { return true };
        // Acquire pairs with `mark`: who sees the bit sees the data that was written before it.
        masks(range).all(|(word, mask)| bits.allocated[word].load(Ordering::Acquire) & mask == mask)
    }

    /// How the cluster `range.start` stands, and where in `range` the next one begins that stands
    /// otherwise (`range.end` if none does). `range` must not be empty.
    #[must_use]
    pub fn run(&self, range: Range<u64>) -> (bool, u64) {
        let Some(bits) = &self.bits else { return (true, range.end) };
        let mut first_state = None;
        for (word, mask) in masks(range.clone()) {
            let value = bits.allocated[word].load(Ordering::Acquire);
            // Out of the same look at the word: the first bit may be set meanwhile, and a run must
            // not come out empty.
            let first_bit = value >> (range.start % WORD_BITS) & 1 == 1;
            let allocated = *first_state.get_or_insert(first_bit);
            let different = if allocated { !value & mask } else { value & mask };
            if different != 0 {
                let first = word as u64 * WORD_BITS + u64::from(different.trailing_zeros());
                return (allocated, first);
            }
        }
        (first_state.unwrap_or(false), range.end)
    }

    /// Marks the clusters of `range` allocated. Their data must be in the raw image.
    pub fn mark(&self, range: Range<u64>) {
        let Some(bits) = &self.bits else { return };
        for (word, mask) in masks(range) {
            if bits.allocated[word].load(Ordering::Acquire) & mask == mask {
                continue;
            }
            let page = word as u64 / PAGE_WORDS;
            let _marking = bits.begin_marking(page);
            // First dirty, then visible: who sees the bit, writes to the cluster and flushes must
            // find the page in its own freeze, or know it in an earlier one.
            bits.mark_dirty(page);
            bits.allocated[word].fetch_or(mask, Ordering::Release);
        }
    }

    /// Clears bits, which nobody does on purpose.
    #[cfg(feature = "seeded-bugs")]
    pub(super) fn clear(&self, range: Range<u64>) {
        let Some(bits) = &self.bits else { return };
        for (word, mask) in masks(range) {
            bits.mark_dirty(word as u64 / PAGE_WORDS);
            bits.allocated[word].fetch_and(!mask, Ordering::SeqCst);
        }
    }

    /// The bits of clusters `64 * index` to `64 * index + 63`, least significant first; all ones
    /// when every cluster is allocated for good, those past the end of the disk too.
    #[must_use]
    pub fn word(&self, index: u64) -> u64 {
        let Some(bits) = &self.bits else { return u64::MAX };
        let word = usize::try_from(index).ok().and_then(|index| bits.allocated.get(index));
        word.map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// How many bits came from the side file, or `None` when all clusters are allocated for good.
    /// Looks at no word: a bitmap may be a hole of any length.
    #[must_use]
    pub fn loaded(&self) -> Option<u64> {
        self.bits.as_ref().map(|bits| bits.loaded)
    }

    /// How many clusters are allocated, or `None` when all are for good. Looks at every word.
    #[must_use]
    pub fn count(&self) -> Option<u64> {
        let bits = self.bits.as_ref()?;
        Some(bits.allocated.iter().map(|w| u64::from(w.load(Ordering::Relaxed).count_ones())).sum())
    }

    /// Takes the bits that the side file lacks. What is marked from now on belongs to the next
    /// call. Unless [`FrozenBits::persisted`] is called, they count as lacking again.
    #[must_use]
    pub fn freeze(&self) -> FrozenBits<'_> {
        let mut pages = Vec::new();
        let words = self.bits.iter().flat_map(|bits| bits.dirty_pages.iter());
        for (index, word) in (0_u64..).zip(words) {
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut dirty = word.swap(0, Ordering::SeqCst);
            while dirty != 0 {
                pages.push(index * WORD_BITS + u64::from(dirty.trailing_zeros()));
                dirty &= dirty - 1;
            }
        }
        if let Some(bits) = &self.bits {
            bits.wait_for_markers();
        }
        FrozenBits::new(self.bits.as_ref(), pages)
    }
}

impl Bits {
    /// Announces that a page will be marked dirty and then get bits.
    fn begin_marking(&self, page: u64) -> Marking<'_> {
        let index = usize::try_from(page).unwrap_or_default() % self.marking.len();
        self.marking[index].0.fetch_add(1, Ordering::SeqCst);
        Marking(&self.marking[index])
    }

    /// Waits until every thread that had marked a page dirty has set its bits, so that a copy of
    /// the page has them. That takes a few instructions, unless the thread lost its processor.
    fn wait_for_markers(&self) {
        for count in &self.marking {
            while count.0.load(Ordering::SeqCst) != 0 {
                thread::yield_now();
            }
        }
    }

    /// Remembers that a page has bits which the side file lacks.
    fn mark_dirty(&self, page: u64) {
        let (word, mask) = place(page);
        self.dirty_pages[word].fetch_or(mask, Ordering::SeqCst);
    }

    /// A page as it is now, in the side file's byte order.
    fn page(&self, page: u64) -> Vec<u8> {
        let range = self.geometry.page_words(page);
        let first = usize::try_from(range.start).unwrap_or(usize::MAX);
        let count = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        let len = usize::try_from(self.geometry.page_range(page).len()).unwrap_or(usize::MAX);
        let mut bytes = vec![0; len];
        let words = self.allocated.iter().skip(first).take(count);
        encode_words(words.map(|word| word.load(Ordering::Acquire)), &mut bytes);
        bytes
    }
}

/// Bitmap pages as they were at one moment, to be written to the side file.
#[derive(Debug)]
pub struct FrozenBits<'a> {
    /// The map, to mark the pages dirty again if they do not reach the side file.
    bits: Option<&'a Bits>,
    /// Page number and content, ascending. The last page may be shorter than the others.
    pages: Vec<(u64, Vec<u8>)>,
}

impl<'a> FrozenBits<'a> {
    /// Copies the pages with these numbers.
    fn new(bits: Option<&'a Bits>, pages: Vec<u64>) -> Self {
        let copy = |page| (page, bits.map(|bits| bits.page(page)).unwrap_or_default());
        Self { bits, pages: pages.into_iter().map(copy).collect() }
    }

    /// The pages, ascending.
    #[must_use]
    pub fn pages(&self) -> &[(u64, Vec<u8>)] {
        &self.pages
    }

    /// The side file has these bits, durably.
    pub fn persisted(mut self) {
        if seeded::bug(Bug::DirtySetSwappedLate)
            && let Some(bits) = self.bits
        {
            bits.dirty_pages.iter().for_each(|word| word.store(0, Ordering::SeqCst));
        }
        self.pages.clear();
    }
}

impl Drop for FrozenBits<'_> {
    fn drop(&mut self) {
        if seeded::bug(Bug::UnwrittenBitsForgotten) {
            return;
        }
        for (page, _) in &self.pages {
            self.bits.iter().for_each(|bits| bits.mark_dirty(*page));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::ClusterSize;

    /// A map of `clusters` clusters of 4 KiB.
    fn map(clusters: u64) -> AllocationMap {
        let size = ClusterSize::from_bits(12).unwrap();
        let geometry = BitmapGeometry::new(size, clusters * 4096).unwrap();
        AllocationMap::empty(&geometry).unwrap()
    }

    #[test]
    fn runs_end_where_the_bits_change() {
        let map = map(1000);
        map.mark(70..200);
        assert_eq!(map.run(0..1000), (false, 70));
        assert_eq!(map.run(70..1000), (true, 200));
        assert_eq!(map.run(100..150), (true, 150));
        assert_eq!(map.run(200..1000), (false, 1000));
        assert!(map.is_allocated(70..200) && !map.is_allocated(69..71));
        assert_eq!(map.count(), Some(130));
    }

    #[test]
    fn bits_marked_after_the_freeze_belong_to_the_next() {
        let map = map(100_000);
        map.mark(5..6);
        map.mark(99_999..100_000);
        let frozen = map.freeze();
        map.mark(6..7);
        assert_eq!(frozen.pages().iter().map(|(page, _)| *page).collect::<Vec<_>>(), [0, 3]);
        assert_eq!(frozen.pages()[0].1[0], 1 << 5);
        frozen.persisted();
        let next = map.freeze();
        assert_eq!(next.pages().len(), 1);
        assert_eq!(next.pages()[0].1[0], 3 << 5);
    }

    #[test]
    fn bits_that_were_not_persisted_stay_dirty() {
        let map = map(10);
        map.mark(1..2);
        drop(map.freeze());
        assert_eq!(map.freeze().pages().len(), 1);
    }

    #[test]
    fn marking_an_allocated_cluster_dirties_nothing() {
        let map = map(10);
        map.mark(1..2);
        map.freeze().persisted();
        map.mark(1..2);
        assert!(map.freeze().pages().is_empty());
    }

    #[test]
    fn loading_ignores_bits_past_the_end() {
        let mut map = map(10);
        map.load(0, &[0xff, 0xff]);
        assert_eq!((map.count(), map.loaded()), (Some(10), Some(10)));
    }

    #[test]
    fn each_loaded_bit_is_counted_once() {
        let mut map = map(200);
        map.load(8, &[3; 8]);
        map.load(8, &[3; 16]);
        map.load(24, &[0xff]);
        assert_eq!((map.count(), map.loaded()), (Some(40), Some(40)));
        map.mark(0..2);
        assert_eq!((map.count(), map.loaded()), (Some(42), Some(40)));
        assert_eq!(AllocationMap::all().loaded(), None);
    }
}
