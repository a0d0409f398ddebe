//! Units: the few integer types that keep offsets, lengths and indices apart.
//!
//! Everything that converts between sectors, bytes and clusters lives here, checked once, so that
//! no other module shifts or multiplies a number that came from a guest or a file.
//!
//! Not here: limits that belong to a format or a protocol (see `format` and `virtio`).

use std::fmt;

/// Bytes in one sector: the unit of the virtio block protocol whatever the disk's block size
/// (VIRTIO 1.3, 5.2.4: "expressed in 512-byte sectors").
pub const SECTOR_SIZE: u64 = 512;

/// A half-open range of bytes `start..end` on a disk or in a file.
///
/// `start <= end` always holds, so `len` cannot overflow.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ByteRange {
    /// First byte of the range.
    start: u64,
    /// First byte after the range.
    end: u64,
}

impl ByteRange {
    /// The range of no byte, at 0.
    pub const EMPTY: Self = Self { start: 0, end: 0 };

    /// The range of `len` bytes from `start`, or `None` if its end does not fit in 64 bits.
    #[must_use]
    pub fn new(start: u64, len: u64) -> Option<Self> {
        let end = start.checked_add(len)?;
        Some(Self { start, end })
    }

    /// The range `start..end`; empty when `end` lies before `start`.
    #[must_use]
    pub fn between(start: u64, end: u64) -> Self {
        Self { start, end: end.max(start) }
    }

    /// The range of `count` 512-byte sectors from `sector`, or `None` if a byte position in it
    /// does not fit in 64 bits.
    #[must_use]
    pub fn from_sectors(sector: u64, count: u64) -> Option<Self> {
        let start = sector.checked_mul(SECTOR_SIZE)?;
        Self::new(start, count.checked_mul(SECTOR_SIZE)?)
    }

    /// First byte.
    #[must_use]
    pub fn start(self) -> u64 {
        self.start
    }

    /// First byte after the range.
    #[must_use]
    pub fn end(self) -> u64 {
        self.end
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(self) -> u64 {
        self.end - self.start
    }

    /// Whether the range holds no byte.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// The part that both ranges have; empty (at the later start) when they do not meet.
    #[must_use]
    pub fn intersect(self, other: Self) -> Self {
        Self::between(self.start.max(other.start), self.end.min(other.end))
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

/// The size of a cluster: a power of two from 512 bytes to 2 MiB.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClusterSize {
    /// log2 of the size in bytes: 9 to 21.
    bits: u32,
}

impl ClusterSize {
    /// Smallest `bits` that any version of the format allowed (512 bytes; v18 only).
    pub const MIN_BITS: u32 = 9;
    /// Largest `bits` (2 MiB).
    pub const MAX_BITS: u32 = 21;

    /// The size `1 << bits` bytes, or `None` outside 9..=21.
    #[must_use]
    pub fn from_bits(bits: u32) -> Option<Self> {
        (Self::MIN_BITS..=Self::MAX_BITS).contains(&bits).then_some(Self { bits })
    }

    /// The size of `bytes` bytes, or `None` unless it is a power of two in range.
    #[must_use]
    pub fn from_bytes(bytes: u64) -> Option<Self> {
        bytes.is_power_of_two().then(|| Self::from_bits(bytes.trailing_zeros())).flatten()
    }

    /// log2 of the size.
    #[must_use]
    pub fn bits(self) -> u32 {
        self.bits
    }

    /// The size in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        1 << self.bits
    }

    /// How many clusters `len` bytes take, the last one perhaps in part.
    #[must_use]
    pub fn count(self, len: u64) -> u64 {
        len.div_ceil(self.bytes())
    }

    /// The cluster that holds byte `offset`.
    #[must_use]
    pub fn index(self, offset: u64) -> u64 {
        offset >> self.bits
    }

    /// The first byte of cluster `index`; saturates, since no disk reaches there.
    #[must_use]
    pub fn start_of(self, index: u64) -> u64 {
        index.saturating_mul(self.bytes())
    }

    /// The clusters that `range` touches, as first and one past the last index; of a range of no
    /// byte the cluster that it lies in, unless it lies between two.
    #[must_use]
    pub fn touched(self, range: ByteRange) -> std::ops::Range<u64> {
        self.index(range.start())..self.count(range.end())
    }

    /// The clusters that `range` covers whole on a disk of `disk_len` bytes, whose last cluster
    /// may be partial and then counts as covered when its existing bytes are.
    #[must_use]
    pub fn covered(self, range: ByteRange, disk_len: u64) -> std::ops::Range<u64> {
        let first = self.count(range.start());
        let end =
            if range.end() >= disk_len { self.count(disk_len) } else { self.index(range.end()) };
        first..end.max(first)
    }
}

impl fmt::Debug for ClusterSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_that_wrap_in_bytes_are_refused() {
        assert_eq!(ByteRange::from_sectors(0x0080_0000_0000_0001, 1), None);
        assert_eq!(ByteRange::from_sectors(u64::MAX / 512, 2), None);
        assert_eq!(ByteRange::from_sectors(2, 3), ByteRange::new(1024, 1536));
    }

    #[test]
    fn cluster_sizes_outside_the_format_are_refused() {
        assert_eq!(ClusterSize::from_bits(8), None);
        assert_eq!(ClusterSize::from_bits(22), None);
        assert_eq!(ClusterSize::from_bytes(5000), None);
        assert_eq!(ClusterSize::from_bytes(4096), ClusterSize::from_bits(12));
    }

    #[test]
    fn covered_counts_the_partial_last_cluster_of_the_disk() {
        let size = ClusterSize::from_bits(12).unwrap();
        let disk = 3 * 4096 + 512;
        assert_eq!(size.covered(ByteRange::between(0, disk), disk), 0..4);
        assert_eq!(size.covered(ByteRange::between(1, disk - 1), disk), 1..3);
        assert_eq!(size.covered(ByteRange::between(1, 4095), disk), 1..1);
        assert_eq!(size.touched(ByteRange::between(4095, 4097)), 0..2);
        assert_eq!(size.touched(ByteRange::between(4096, 4096)), 1..1);
    }

    #[test]
    fn ranges_intersect() {
        let a = ByteRange::between(0, 10);
        assert_eq!(a.intersect(ByteRange::between(4, 20)), ByteRange::between(4, 10));
        assert!(a.intersect(ByteRange::between(12, 20)).is_empty());
    }
}
