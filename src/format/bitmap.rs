//! Where each cluster's bit lies, and how bits become bytes.
//!
//! Bit `c` of the bitmap says whether cluster `c` of the disk is in the image file. In the file
//! that is bit `c % 8` of byte `c / 8`, least significant first; in memory it is bit `c % 64` of
//! word `c / 64`. Little-endian words make the two the same order.
//!
//! Not here: the bits themselves, which of them are new, and when a page may be written (`image`).

use std::ops::Range;

use crate::format::error::FormatError;
use crate::format::header::header_size_of;
use crate::units::{ByteRange, ClusterSize, SECTOR_SIZE};

/// The largest disk: file offsets are signed.
pub const MAX_VIRTUAL_SIZE: u64 = i64::MAX.cast_unsigned();

/// The shape of a file's bitmap. Everything follows from cluster size and virtual size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapGeometry {
    /// Size of a cluster.
    cluster_size: ClusterSize,
    /// Size of the disk in bytes, a multiple of 512, at most [`MAX_VIRTUAL_SIZE`].
    virtual_size: u64,
}

impl BitmapGeometry {
    /// Bytes in a bitmap page, the unit in which the bitmap is written back. Ours, not the
    /// format's: pages start at multiples of 4096 in the file, as `header_size` is one.
    pub const PAGE_LEN: u64 = 4096;

    /// The shape for a disk of `virtual_size` bytes; a last part of less than a sector is not
    /// part of the disk.
    ///
    /// # Errors
    /// `DiskTooLarge` above [`MAX_VIRTUAL_SIZE`]. Below it no length or offset that this type
    /// returns reaches `i64::MAX`: the bitmap of the largest disk has 2^51 bytes.
    pub fn new(cluster_size: ClusterSize, virtual_size: u64) -> Result<Self, FormatError> {
        if virtual_size > MAX_VIRTUAL_SIZE {
            let (size, max) = (virtual_size, MAX_VIRTUAL_SIZE);
            return Err(FormatError::DiskTooLarge { size, max });
        }
        Ok(Self { cluster_size, virtual_size: virtual_size & !(SECTOR_SIZE - 1) })
    }

    /// Size of a cluster.
    #[must_use]
    pub fn cluster_size(&self) -> ClusterSize {
        self.cluster_size
    }

    /// Size of the disk in bytes, a multiple of 512.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    /// How many clusters the disk has; the last may be partial.
    #[must_use]
    pub fn clusters(&self) -> u64 {
        self.cluster_size.count(self.virtual_size)
    }

    /// Bytes of the bitmap that hold a cluster's bit.
    #[must_use]
    pub fn used_len(&self) -> u64 {
        self.clusters().div_ceil(8)
    }

    /// Bytes of the bitmap in the file: a whole number of clusters, zeros at the end.
    #[must_use]
    pub fn padded_len(&self) -> u64 {
        self.used_len().next_multiple_of(self.cluster_size.bytes())
    }

    /// Where in the file the bitmap starts: the length of the header area.
    #[must_use]
    pub fn offset(&self) -> u64 {
        header_size_of(self.cluster_size)
    }

    /// Length of an add-cow file for this disk.
    #[must_use]
    pub fn file_len(&self) -> u64 {
        self.offset().saturating_add(self.padded_len())
    }

    /// How many bitmap pages there are. With clusters of less than 4 KiB the last may be short.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.padded_len().div_ceil(Self::PAGE_LEN)
    }

    /// Where in the file bitmap page `page` lies; empty if there is no such page.
    #[must_use]
    pub fn page_range(&self, page: u64) -> ByteRange {
        let start = page.saturating_mul(Self::PAGE_LEN).min(self.padded_len());
        let end = start.saturating_add(Self::PAGE_LEN).min(self.padded_len());
        ByteRange::between(self.offset().saturating_add(start), self.offset().saturating_add(end))
    }

    /// The bitmap page with the bit of cluster `cluster`.
    #[must_use]
    pub fn page_of(&self, cluster: u64) -> u64 {
        cluster / (8 * Self::PAGE_LEN)
    }

    /// The byte of the file and the bit in it that belong to cluster `cluster`, which must be
    /// less than [`BitmapGeometry::clusters`]: the byte of another lies in the padding or past
    /// the end of the file.
    #[must_use]
    pub fn position(&self, cluster: u64) -> (u64, u8) {
        (self.offset().saturating_add(cluster / 8), 1 << (cluster % 8))
    }

    /// How many 64-bit words hold a cluster's bit.
    #[must_use]
    pub fn words(&self) -> u64 {
        self.clusters().div_ceil(64)
    }

    /// The words that bitmap page `page` holds, without those of the padding.
    #[must_use]
    pub fn page_words(&self, page: u64) -> Range<u64> {
        let per_page = Self::PAGE_LEN / 8;
        let start = page.saturating_mul(per_page).min(self.words());
        start..start.saturating_add(per_page).min(self.words())
    }

    /// The bits of word `word` that belong to a cluster. All others are written as 0 and ignored
    /// when read.
    #[must_use]
    pub fn word_mask(&self, word: u64) -> u64 {
        let bits = self.clusters().saturating_sub(word.saturating_mul(64)).min(64);
        u64::MAX.unbounded_shr(64_u32.saturating_sub(u32::try_from(bits).unwrap_or(64)))
    }
}

/// The words in `bytes` of a bitmap, which start at a multiple of 8 in it. Bytes that are missing
/// from the last word, because the file ends there, count as zeros.
pub fn decode_words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    let (whole, rest) = bytes.as_chunks::<8>();
    let last = (!rest.is_empty()).then(|| {
        let mut word = [0; 8];
        for (to, &from) in word.iter_mut().zip(rest) {
            *to = from;
        }
        u64::from_le_bytes(word)
    });
    whole.iter().copied().map(u64::from_le_bytes).chain(last)
}

/// Fills `bytes` with `words`, and with zeros once these have come to an end. Words for which
/// there is no room are dropped.
pub fn encode_words(words: impl IntoIterator<Item = u64>, bytes: &mut [u8]) {
    let mut words = words.into_iter();
    for chunk in bytes.chunks_mut(8) {
        let word = words.next().unwrap_or(0).to_le_bytes();
        for (to, from) in chunk.iter_mut().zip(word) {
            *to = from;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The specification, whose table of sizes must agree with ours.
    const SPEC: &str = include_str!("../../docs/format.md");

    fn cluster(bits: u32) -> ClusterSize {
        ClusterSize::from_bits(bits).unwrap()
    }

    #[test]
    fn bitmap_sizes_are_those_of_the_specification() {
        const MIB: u64 = 1 << 20;
        const GIB: u64 = 1 << 30;
        const TIB: u64 = 1 << 40;
        // Virtual size, cluster bits, then used, padded and file length.
        let rows = [
            (MIB, 12, 32, 4096, 8192),
            (6 * GIB, 16, 12288, 65536, 131_072),
            (6 * GIB + 512, 16, 12289, 65536, 131_072),
            (8 * GIB, 16, 16384, 65536, 131_072),
            (TIB, 16, 2_097_152, 2_097_152, 2_162_688),
            (TIB, 12, 33_554_432, 33_554_432, 33_558_528),
            // Not in the table: nothing, one sector, a part of a sector, 512-byte clusters.
            (0, 12, 0, 0, 4096),
            (512, 21, 1, 2_097_152, 4_194_304),
            (511, 12, 0, 0, 4096),
            (4096 * 512 + 512, 9, 513, 1024, 5120),
        ];
        for (size, bits, used, padded, file_len) in rows {
            let geometry = BitmapGeometry::new(cluster(bits), size).unwrap();
            let found = (geometry.used_len(), geometry.padded_len(), geometry.file_len());
            assert_eq!(found, (used, padded, file_len), "{size} bytes, cluster_bits {bits}");
            assert_eq!(geometry.virtual_size(), size / 512 * 512);
            // Rows of the document hold the same numbers.
            let row = format!("| {used} | {padded} | {file_len} |");
            assert!(size < MIB || bits == 9 || SPEC.contains(&row), "{row} in docs/format.md");
        }
    }

    #[test]
    fn pages_cover_the_bitmap_without_gap_or_overlap() {
        for (bits, size) in [(9, 4096 * 512 * 9 + 512), (12, 5 << 30), (16, 8 << 30), (21, 1 << 40)]
        {
            let geometry = BitmapGeometry::new(cluster(bits), size).unwrap();
            let (mut at, mut word) = (geometry.offset(), 0);
            for page in 0..geometry.pages() {
                let range = geometry.page_range(page);
                assert_eq!((range.start(), range.start() % 4096), (at, 0));
                assert!(!range.is_empty() && range.len() <= BitmapGeometry::PAGE_LEN);
                assert_eq!(geometry.page_words(page).start, word);
                assert!((geometry.page_words(page).end - word) * 8 <= range.len());
                (at, word) = (range.end(), geometry.page_words(page).end);
            }
            assert_eq!(at, geometry.file_len());
            assert_eq!(word, geometry.words());
            assert!(geometry.page_range(geometry.pages()).is_empty());
            assert!(geometry.page_range(u64::MAX).is_empty());
            assert!(geometry.page_words(u64::MAX).is_empty());
        }
    }

    #[test]
    fn positions_stay_exact_beyond_32_bits() {
        // 2^46 bytes of 4 KiB clusters: 2^34 bits, past 2^32 clusters and past 2^31 sectors.
        let geometry = BitmapGeometry::new(cluster(12), 1 << 46).unwrap();
        assert_eq!(geometry.clusters(), 1 << 34);
        for c in [0, 7, 8, 32767, 32768, (1 << 32) - 1, 1 << 32, (1 << 33) + 13, (1 << 34) - 1] {
            let (byte, mask) = geometry.position(c);
            assert_eq!(byte, 4096 + c / 8);
            assert_eq!(u64::from(mask.trailing_zeros()), c % 8);
            assert_eq!(mask.count_ones(), 1);
            let page = geometry.page_range(geometry.page_of(c));
            assert!(page.start() <= byte && byte < page.end());
            assert!(geometry.page_words(geometry.page_of(c)).contains(&(c / 64)));
        }
        assert_eq!(geometry.position(1 << 32), (4096 + (1 << 29), 1));
        assert_eq!(geometry.page_of(1 << 32), 1 << 17);
    }

    #[test]
    fn disks_beyond_the_largest_file_are_refused_and_the_largest_is_not() {
        for bits in 9..=21 {
            let largest = BitmapGeometry::new(cluster(bits), MAX_VIRTUAL_SIZE).unwrap();
            assert_eq!(largest.virtual_size(), (1 << 63) - 512);
            assert_eq!(largest.clusters(), (MAX_VIRTUAL_SIZE - 511).div_ceil(1 << bits));
            assert!(largest.file_len() < 1 << 52);
            let (last, _) = largest.position(largest.clusters() - 1);
            assert_eq!(last, largest.offset() + largest.used_len() - 1);
        }
        let error = BitmapGeometry::new(cluster(12), 1 << 63).unwrap_err();
        assert_eq!(
            error.to_string(),
            "disk of 9223372036854775808 bytes is larger than the largest possible file, \
             9223372036854775807 bytes"
        );
    }

    #[test]
    fn words_hold_the_bits_where_position_says() {
        let geometry = BitmapGeometry::new(cluster(12), 150 * 4096).unwrap();
        let mut bytes = vec![0; usize::try_from(geometry.padded_len()).unwrap()];
        for c in [0, 9, 63, 64, 130, 149] {
            let (byte, mask) = geometry.position(c);
            bytes[usize::try_from(byte - geometry.offset()).unwrap()] |= mask;
        }
        let words: Vec<u64> = decode_words(&bytes).collect();
        assert_eq!(words.len(), 512);
        assert_eq!(words[..3], [1 | 1 << 9 | 1 << 63, 1, 1 << 2 | 1 << 21]);
        assert!(words[3..].iter().all(|&word| word == 0));
        let mut again = vec![0xff; bytes.len()];
        encode_words(words[..3].iter().copied(), &mut again);
        assert_eq!(again, bytes);
    }

    #[test]
    fn words_at_the_end_of_a_short_file_are_filled_with_zeros() {
        let words: Vec<u64> = decode_words(&[1, 0, 0, 0, 0, 0, 0, 0x80, 2, 3]).collect();
        assert_eq!(words, [0x8000_0000_0000_0001, 0x0302]);
        assert_eq!(decode_words(&[]).count(), 0);
        let mut bytes = [0xff; 10];
        encode_words([0x0807_0605_0403_0201, 0x0c0b_0a09], &mut bytes);
        assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    }

    #[test]
    fn word_masks_cover_the_clusters_and_nothing_else() {
        let masks = |clusters: u64| {
            let geometry = BitmapGeometry::new(cluster(12), clusters * 4096).unwrap();
            [geometry.word_mask(0), geometry.word_mask(1), geometry.word_mask(u64::MAX)]
        };
        assert_eq!(masks(0), [0, 0, 0]);
        assert_eq!(masks(1), [1, 0, 0]);
        assert_eq!(masks(63), [u64::MAX >> 1, 0, 0]);
        assert_eq!(masks(64), [u64::MAX, 0, 0]);
        assert_eq!(masks(65), [u64::MAX, 1, 0]);
        assert_eq!(masks(200), [u64::MAX, u64::MAX, 0]);
    }
}
