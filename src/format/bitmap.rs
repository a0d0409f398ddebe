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
        Ok(Self {
            cluster_size,
            virtual_size: virtual_size & !(SECTOR_SIZE - 1),
        })
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
        ByteRange::between(
            self.offset().saturating_add(start),
            self.offset().saturating_add(end),
        )
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
        (
            self.offset().saturating_add(cluster / 8),
            1 << (cluster % 8),
        )
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
        let bits = self
            .clusters()
            .saturating_sub(word.saturating_mul(64))
            .min(64);
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
