//! Writing the tables of a qcow2 file whose guest clusters are in an external data file.
//!
//! The file is written once, from its start to its end, in large pieces. Memory: the L1 table, at
//! most 32 MiB, one L2 table and one piece.
//!
//! Not here: the header's bytes, what is in the file's place, and its name.

use std::io;
use std::ops::Range;

use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::U16;

use crate::format::qcow2::entry::{ENTRY_LEN, push_entry};
use crate::format::qcow2::{L2Entry, Layout, Qcow2Error, TableEntry};
use crate::image::allocation::AllocationMap;
use crate::jobs::progress::{Interrupted, Progress};
use crate::storage::{IoBuffer, Storage, transfer};
use crate::units::ClusterSize;

/// log2 of the smallest cluster size when every cluster is allocated: qemu-img's default, 64 KiB.
const MIN_FREE_BITS: u32 = 16;

/// How much is collected before it is written, in bytes.
const CHUNK_LEN: usize = 1 << 20;

/// Why tables could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The host refused.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It was told to stop.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
}

/// The tables of a disk, planned.
#[derive(Debug)]
pub struct Tables<'a> {
    /// Which clusters of the disk are in its raw image.
    allocation: &'a AllocationMap,
    /// How many clusters the disk has, of the size that the qcow2 file will have.
    clusters: u64,
    /// Where the tables go.
    layout: Layout,
    /// The L1 table.
    l1: Vec<u64>,
}

impl<'a> Tables<'a> {
    /// Plans the tables of a disk of `size` bytes with clusters of `cluster_size`.
    ///
    /// When every cluster is allocated for good their size means nothing, and the tables have
    /// larger ones where that makes them smaller.
    ///
    /// # Errors
    /// If the disk has more clusters than the tables have room for.
    pub fn plan(
        allocation: &'a AllocationMap,
        cluster_size: ClusterSize,
        size: u64,
    ) -> Result<Self, Qcow2Error> {
        let cluster_size =
            if allocation.is_all() { free_cluster_size(cluster_size, size) } else { cluster_size };
        // Where tables begin depends on how many there are, which is found out first.
        let mut tables = Self {
            allocation,
            clusters: cluster_size.count(size),
            layout: Layout::new(cluster_size, size, 0)?,
            l1: Vec::new(),
        };
        let indices = 0..tables.layout.l1_entries();
        let used: Vec<bool> = indices.map(|index| tables.is_used(index)).collect();
        let count = used.iter().filter(|&&used| used).count() as u64;
        tables.layout = Layout::new(cluster_size, size, count)?;
        let mut next = 0;
        for used in used {
            let offset = used.then(|| tables.layout.l2_offset(next));
            next += u64::from(used);
            tables.l1.push(TableEntry { offset, copied: used }.encode());
        }
        Ok(tables)
    }

    /// Where the tables go.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Whether every cluster is allocated for good.
    #[must_use]
    pub fn is_all_allocated(&self) -> bool {
        self.allocation.is_all()
    }

    /// Writes the file, which is empty, from the bytes of its header on, and syncs it.
    ///
    /// # Errors
    /// See [`WriteError`]. The file then holds any part of it.
    pub async fn write<S: Storage>(
        &self,
        file: &S,
        header: &[u8],
        progress: &impl Progress,
    ) -> Result<(), WriteError> {
        let layout = &self.layout;
        let mut out = Sequential { file, written: 0, pending: Vec::new() };
        out.pending.extend_from_slice(header);
        out.pad(layout.refcount_table_offset()).await?;
        for entry in layout.refcount_table() {
            push_entry(&mut out.pending, entry);
        }
        for block in 0..layout.refcount_blocks() {
            out.pad(layout.refcount_block_offset(block)).await?;
            for _ in 0..layout.refcounts_in_block(block) {
                out.pending.extend_from_slice(U16::new(1).as_bytes());
            }
        }
        out.pad(layout.l1_offset()).await?;
        for &entry in &self.l1 {
            push_entry(&mut out.pending, entry);
        }
        out.pad(layout.l2_offset(0)).await?;
        for index in 0..layout.l1_entries() {
            progress.update(index, layout.l1_entries())?;
            if self.is_used(index) {
                self.push_l2(index, &mut out.pending);
                out.write_chunks().await?;
            }
        }
        out.finish().await?;
        Ok(progress.update(layout.l1_entries(), layout.l1_entries())?)
    }

    /// The clusters that L2 table `index` maps.
    fn reach(&self, index: u64) -> Range<u64> {
        let entries = self.entries_per_table();
        let start = index.saturating_mul(entries).min(self.clusters);
        start..start.saturating_add(entries).min(self.clusters)
    }

    /// Whether there is an L2 table `index`: one of its clusters is allocated.
    fn is_used(&self, index: u64) -> bool {
        let reach = self.reach(index);
        let (allocated, end) = self.allocation.run(reach.clone());
        allocated || end < reach.end
    }

    /// Appends L2 table `index`.
    fn push_l2(&self, index: u64, bytes: &mut Vec<u8>) {
        let cluster_size = self.layout.cluster_size();
        let reach = self.reach(index);
        let mut next = reach.start;
        while next < reach.end {
            let (allocated, end) = self.allocation.run(next..reach.end);
            for cluster in next..end {
                let entry = L2Entry::external(cluster_size.start_of(cluster));
                let entry = if allocated { entry } else { L2Entry::UNALLOCATED };
                push_entry(bytes, entry.encode().unwrap_or_default());
            }
            next = end;
        }
        // The last table may reach past the end of the disk.
        let missing = self.entries_per_table() - (reach.end - reach.start);
        for _ in 0..missing {
            push_entry(bytes, 0);
        }
    }

    /// Entries of an L2 table.
    fn entries_per_table(&self) -> u64 {
        self.layout.cluster_size().bytes() / ENTRY_LEN as u64
    }
}

/// The cluster size for a disk whose every cluster is allocated: at least 64 KiB, and so large that
/// the L1 table has room for the disk.
fn free_cluster_size(least: ClusterSize, size: u64) -> ClusterSize {
    let sizes = least.bits().max(MIN_FREE_BITS)..=ClusterSize::MAX_BITS;
    let mut sizes = sizes.filter_map(ClusterSize::from_bits);
    sizes.find(|&cluster| Layout::new(cluster, size, 0).is_ok()).unwrap_or(least)
}

/// A file that is written from its start to its end.
struct Sequential<'a, S> {
    /// The file.
    file: &'a S,
    /// How many of its bytes are written.
    written: u64,
    /// What comes next and is not written yet.
    pending: Vec<u8>,
}

impl<S: Storage> Sequential<'_, S> {
    /// Goes on with zeros up to byte `offset` of the file.
    async fn pad(&mut self, offset: u64) -> io::Result<()> {
        let len = offset.saturating_sub(self.written);
        self.pending.resize(usize::try_from(len).map_err(io::Error::other)?, 0);
        self.write_chunks().await
    }

    /// Writes what is pending, as far as it fills whole chunks.
    async fn write_chunks(&mut self) -> io::Result<()> {
        let len = self.pending.len() - self.pending.len() % CHUNK_LEN;
        self.write(len).await
    }

    /// Writes what is pending, and makes the file durable.
    async fn finish(mut self) -> io::Result<()> {
        self.write(self.pending.len()).await?;
        self.file.sync().await
    }

    /// Writes the first `len` pending bytes.
    async fn write(&mut self, len: usize) -> io::Result<()> {
        if len > 0 {
            let bytes = IoBuffer::from_bytes(&self.pending[..len]);
            transfer::write_all(self.file, self.written, bytes).await?;
            self.pending.drain(..len);
            self.written += len as u64;
        }
        Ok(())
    }
}
