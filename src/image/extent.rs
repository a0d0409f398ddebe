//! Resolving: where the bytes of a range are.
//!
//! Metadata only; payload moves in `read`, `write` and `zero`.

use super::ImageState;
use crate::seeded::{self, Bug};
use crate::units::ByteRange;

/// Where a piece of the disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// In the raw image, at the same offset.
    Data,
    /// In the backing file, at the same offset.
    Backing,
    /// Nowhere: it reads zeros (I2: whatever the raw image holds there means nothing).
    Zero,
}

/// A piece of the disk whose bytes are all in one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where its bytes are.
    pub kind: ExtentKind,
    /// Which bytes of the disk.
    pub range: ByteRange,
}

impl ImageState {
    /// The extents of `range`, in order, none of them empty. Neighbours may be of the same kind.
    pub fn extents(&self, range: ByteRange) -> impl Iterator<Item = Extent> + '_ {
        let mut start = range.start();
        std::iter::from_fn(move || {
            if start >= range.end() {
                return None;
            }
            let extent = self.extent_at(ByteRange::between(start, range.end()));
            start = extent.range.end();
            Some(extent)
        })
    }

    /// The first extent of `range`, which is not empty.
    fn extent_at(&self, range: ByteRange) -> Extent {
        let (allocated, run_end) = self.allocation.run(self.cluster_size.touched(range));
        let end = self.cluster_size.start_of(run_end).min(range.end());
        let run = ByteRange::between(range.start(), end);
        if allocated {
            return Extent { kind: ExtentKind::Data, range: run };
        }
        let backed = run.intersect(ByteRange::between(0, self.backing_len));
        if backed.is_empty() && seeded::bug(Bug::UnbackedIsReadFromRaw) {
            Extent { kind: ExtentKind::Data, range: run }
        } else if backed.is_empty() {
            Extent { kind: ExtentKind::Zero, range: run }
        } else {
            Extent { kind: ExtentKind::Backing, range: backed }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::BitmapGeometry;
    use crate::image::allocation::AllocationMap;
    use crate::units::ClusterSize;

    #[test]
    fn a_backing_file_that_ends_inside_a_cluster_splits_it() {
        let size = ClusterSize::from_bits(12).unwrap();
        let geometry = BitmapGeometry::new(size, 5 * 4096 + 512).unwrap();
        let map = AllocationMap::empty(&geometry).unwrap();
        map.mark(1..2);
        map.mark(5..6);
        let state = ImageState::add_cow(geometry, map, 3 * 4096 + 100, true);
        let found: Vec<_> = state.extents(ByteRange::between(1000, 5 * 4096 + 512)).collect();
        let extent = |kind, start, end| Extent { kind, range: ByteRange::between(start, end) };
        assert_eq!(
            found,
            [
                extent(ExtentKind::Backing, 1000, 4096),
                extent(ExtentKind::Data, 4096, 8192),
                extent(ExtentKind::Backing, 8192, 12388),
                extent(ExtentKind::Zero, 12388, 20480),
                extent(ExtentKind::Data, 20480, 20992),
            ]
        );
    }
}
