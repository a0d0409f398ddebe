//! Where the tables of a new qcow2 file lie, and its exact refcounts.
//!
//! For files whose guest clusters are in an external data file: the qcow2 file holds nothing but
//! metadata, each cluster of it used once. So every refcount is 1 up to the end of the file. One
//! after the other lie header, refcount table, refcount blocks, L1 table, L2 tables.
//!
//! Not here: which L2 tables there are, and what is in them.

use super::entry::{ENTRY_LEN, TableEntry};
use super::error::Qcow2Error;
use super::header::{MAX_REFCOUNT_TABLE_LEN, check_l1_entries, l2_reach};
use crate::units::ClusterSize;

/// Bytes of a refcount of the default width, 16 bits.
const REFCOUNT_LEN: u64 = 2;

/// log2 of the default refcount width in bits.
pub const REFCOUNT_ORDER: u32 = 4;

/// The places of the tables of a new file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Size of a cluster.
    cluster_size: ClusterSize,
    /// Entries of the L1 table.
    l1_entries: u64,
    /// Clusters of the refcount table.
    refcount_table: u64,
    /// Refcount blocks, a cluster each.
    refcount_blocks: u64,
    /// Clusters of the L1 table.
    l1_clusters: u64,
    /// L2 tables, a cluster each.
    l2_tables: u64,
}

impl Layout {
    /// The layout for a disk of `size` bytes with that many L2 tables.
    ///
    /// # Errors
    /// `L1TooLarge`, `RefcountTableTooLarge`: the disk is too large for clusters of that size.
    pub fn new(cluster_size: ClusterSize, size: u64, l2_tables: u64) -> Result<Self, Qcow2Error> {
        let l1_entries = size.div_ceil(l2_reach(cluster_size));
        let l1_clusters = cluster_size.count(check_l1_entries(l1_entries)?);
        let mut layout = Self {
            cluster_size,
            l1_entries,
            refcount_table: 1,
            refcount_blocks: 1,
            l1_clusters,
            l2_tables: l2_tables.min(l1_entries),
        };
        // Blocks count themselves and their table, so that more of them may need more of them. Each
        // round only adds, and soon nothing is missing: a block covers at least 256 clusters.
        loop {
            let blocks = layout.clusters().div_ceil(layout.refcounts_per_block());
            let table = cluster_size.count(blocks.saturating_mul(ENTRY_LEN as u64));
            if blocks <= layout.refcount_blocks && table <= layout.refcount_table {
                break;
            }
            layout.refcount_blocks = blocks;
            layout.refcount_table = table;
        }
        if cluster_size.start_of(layout.refcount_table) > MAX_REFCOUNT_TABLE_LEN {
            return Err(Qcow2Error::RefcountTableTooLarge {
                clusters: u32::try_from(layout.refcount_table).unwrap_or(u32::MAX),
                max: MAX_REFCOUNT_TABLE_LEN,
            });
        }
        Ok(layout)
    }

    /// Size of a cluster.
    #[must_use]
    pub fn cluster_size(&self) -> ClusterSize {
        self.cluster_size
    }

    /// Entries of the L1 table.
    #[must_use]
    pub fn l1_entries(&self) -> u64 {
        self.l1_entries
    }

    /// Clusters of the refcount table.
    #[must_use]
    pub fn refcount_table_clusters(&self) -> u64 {
        self.refcount_table
    }

    /// Where the refcount table starts: right behind the header.
    #[must_use]
    pub fn refcount_table_offset(&self) -> u64 {
        self.cluster_size.bytes()
    }

    /// Where the L1 table starts.
    #[must_use]
    pub fn l1_offset(&self) -> u64 {
        self.cluster_size.start_of(self.first_l1())
    }

    /// Where L2 table `index` is, counted among those that there are.
    #[must_use]
    pub fn l2_offset(&self, index: u64) -> u64 {
        let first = self.first_l1().saturating_add(self.l1_clusters);
        self.cluster_size.start_of(first.saturating_add(index))
    }

    /// Length of the file in bytes.
    #[must_use]
    pub fn file_len(&self) -> u64 {
        self.cluster_size.start_of(self.clusters())
    }

    /// The entries of the refcount table that are not 0: where each block is.
    pub fn refcount_table(&self) -> impl Iterator<Item = u64> + '_ {
        (0..self.refcount_blocks).map(|index| {
            let offset = Some(self.refcount_block_offset(index));
            TableEntry { offset, copied: false }.encode()
        })
    }

    /// Where refcount block `index` is.
    #[must_use]
    pub fn refcount_block_offset(&self, index: u64) -> u64 {
        self.cluster_size.start_of(self.first_block().saturating_add(index))
    }

    /// How many refcounts of block `index` are 1; those behind them are 0.
    #[must_use]
    pub fn refcounts_in_block(&self, index: u64) -> u64 {
        let before = index.saturating_mul(self.refcounts_per_block());
        self.clusters().saturating_sub(before).min(self.refcounts_per_block())
    }

    /// Refcount blocks.
    #[must_use]
    pub fn refcount_blocks(&self) -> u64 {
        self.refcount_blocks
    }

    /// Clusters of the file.
    fn clusters(&self) -> u64 {
        self.first_l1().saturating_add(self.l1_clusters).saturating_add(self.l2_tables)
    }

    /// The first refcount block's cluster.
    fn first_block(&self) -> u64 {
        self.refcount_table.saturating_add(1)
    }

    /// The L1 table's first cluster.
    fn first_l1(&self) -> u64 {
        self.first_block().saturating_add(self.refcount_blocks)
    }

    /// Refcounts in a block.
    fn refcounts_per_block(&self) -> u64 {
        self.cluster_size.bytes().div_ceil(REFCOUNT_LEN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A layout.
    fn layout(bits: u32, size: u64, l2_tables: u64) -> Result<Layout, Qcow2Error> {
        Layout::new(ClusterSize::from_bits(bits).unwrap(), size, l2_tables)
    }

    #[test]
    fn a_small_disk_has_one_of_each() {
        let layout = layout(16, 1 << 30, 2).unwrap();
        assert_eq!(layout.refcount_table_offset(), 0x1_0000);
        assert_eq!(layout.refcount_table().collect::<Vec<_>>(), [0x2_0000]);
        assert_eq!((layout.l1_offset(), layout.l1_entries()), (0x3_0000, 2));
        assert_eq!((layout.l2_offset(0), layout.l2_offset(1)), (0x4_0000, 0x5_0000));
        assert_eq!((layout.refcounts_in_block(0), layout.file_len()), (6, 0x6_0000));
    }

    #[test]
    fn refcounts_cover_every_cluster_and_no_block_is_superfluous() {
        for bits in 9..=21 {
            for l2_tables in [0, 1, 200, 255, 256, 1 << 16, 4_194_304] {
                let Ok(layout) = layout(bits, l2_reach_of(bits) * l2_tables.max(1), l2_tables)
                else {
                    panic!("{bits} {l2_tables}")
                };
                let counted: u64 =
                    (0..layout.refcount_blocks()).map(|b| layout.refcounts_in_block(b)).sum();
                assert_eq!(counted * layout.cluster_size().bytes(), layout.file_len());
                assert!(layout.refcounts_in_block(layout.refcount_blocks() - 1) > 0);
                assert_eq!(layout.refcounts_in_block(layout.refcount_blocks()), 0);
                assert_eq!(layout.l2_offset(l2_tables), layout.file_len());
                let room = layout.refcount_table_clusters() * layout.cluster_size().bytes() / 8;
                assert!(layout.refcount_blocks() <= room);
            }
        }
    }

    /// How much one L2 table maps.
    fn l2_reach_of(bits: u32) -> u64 {
        l2_reach(ClusterSize::from_bits(bits).unwrap())
    }

    #[test]
    fn disks_that_need_too_large_a_table_are_refused() {
        assert!(layout(12, 8 << 40, 0).is_ok());
        let refused = layout(12, (8 << 40) + 512, 0);
        assert!(matches!(refused, Err(Qcow2Error::L1TooLarge { entries: 4_194_305, .. })));
    }
}
