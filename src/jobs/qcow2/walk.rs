//! Reading all tables of a qcow2 file whose guest clusters are in an external data file.
//!
//! What is read must agree with itself in every point: each table where a table can be and used
//! once, each cluster at its own offset of the data file, each metadata cluster with a refcount of
//! exactly 1. A file that anything is wrong with is refused, not repaired: its tables are all that
//! says what the disk holds.
//!
//! Memory: the L1 table, and two bits for each cluster of the disk, both bounded by the header's
//! check and by `MAX_BITMAP`. Not here: the data file, and what is made of the states.

use std::io;

use crate::format::qcow2::entry::{ENTRY_LEN, decode_table};
use crate::format::qcow2::header::l2_reach;
use crate::format::qcow2::{Header, L2Content, L2Entry, Qcow2Error, TableEntry};
use crate::format::{BitmapGeometry, FormatError};
use crate::image::allocation::AllocationMap;
use crate::jobs::progress::{Interrupted, Progress};
use crate::storage::{IoBuffer, Storage, transfer};
use crate::units::{ByteRange, ClusterSize};

/// The most bytes of one bit for each cluster: as many as the bitmap of a new disk may have.
const MAX_BITMAP: u64 = 1 << 30;

/// How much of the L1 table is read at once, in bytes.
const CHUNK_LEN: u64 = 1 << 20;

/// What to do about an image whose tables are damaged.
const REPAIR: &str = "`qemu-img check -r all` may repair it";

/// Why the tables could not be read, or cannot be trusted.
#[derive(Debug, thiserror::Error)]
pub enum WalkError {
    /// The host failed, or the file ends before a table does.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// An entry, or the header, breaks a rule of the format.
    #[error(transparent)]
    Format(#[from] Qcow2Error),
    /// The disk cannot have a bitmap.
    #[error(transparent)]
    Bitmap(#[from] FormatError),
    /// It was told to stop.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
    /// There is no memory for the states.
    #[error("{clusters} clusters of {cluster_size:?} are too many")]
    TooManyClusters {
        /// How many.
        clusters: u64,
        /// Of which size.
        cluster_size: ClusterSize,
    },
    /// A table lies where none can.
    #[error("L2 table at {offset:#x} lies outside the file or on another table; {REPAIR}")]
    TablePlace {
        /// Where it is said to be.
        offset: u64,
    },
    /// A cluster of metadata has a refcount other than 1.
    #[error("metadata at {offset:#x} has refcount {count}, not 1; {REPAIR}")]
    Refcount {
        /// Where the cluster is.
        offset: u64,
        /// Its refcount.
        count: u64,
    },
    /// A cluster is compressed, which it cannot be in a data file.
    #[error("the cluster at {guest:#x} is compressed; {REPAIR}")]
    Compressed {
        /// Which part of the disk.
        guest: u64,
    },
    /// A cluster is not at its own offset of the data file.
    #[error("the cluster at {guest:#x} is at {host:#x} of the data file, not at its own offset")]
    Elsewhere {
        /// Which part of the disk.
        guest: u64,
        /// Where it is said to be.
        host: u64,
    },
    /// An entry lacks the mark that every allocated cluster and table has.
    #[error("the entry for {guest:#x} is not marked as in use; {REPAIR}")]
    NotCopied {
        /// Which part of the disk.
        guest: u64,
    },
}

/// What the tables say about each cluster of the disk. No cluster is in both maps.
#[derive(Debug)]
pub struct ClusterStates {
    /// The clusters whose bytes are in the data file.
    pub data: AllocationMap,
    /// The clusters that read as zeros, whatever the data file holds. What is in neither map shows
    /// the backing file.
    pub zero: AllocationMap,
}

/// Reads the tables. The header has passed [`Header::check_readable`], and has no snapshots.
///
/// # Errors
/// The first thing that is wrong with them.
pub async fn states<S: Storage>(
    file: &S,
    header: &Header,
    progress: &impl Progress,
) -> Result<ClusterStates, WalkError> {
    let walk = Walk::start(file, header).await?;
    let l1 = walk.read_l1().await?;
    walk.check_metadata(&l1).await?;
    let geometry = BitmapGeometry::new(header.cluster_size, header.virtual_size())?;
    let (clusters, cluster_size) = (geometry.clusters(), header.cluster_size);
    let too_many = || WalkError::TooManyClusters { clusters, cluster_size };
    if geometry.used_len() > MAX_BITMAP {
        return Err(too_many());
    }
    let empty = || AllocationMap::empty(&geometry).ok_or_else(too_many);
    let states = ClusterStates { data: empty()?, zero: empty()? };
    let total = l1.len() as u64;
    for (index, entry) in (0..).zip(&l1) {
        progress.update(index, total)?;
        if let Some(offset) = entry.offset {
            walk.read_l2(index, offset, &states).await?;
        }
    }
    progress.update(total, total)?;
    Ok(states)
}

/// A walk through the tables.
struct Walk<'a, S> {
    /// The qcow2 file.
    file: &'a S,
    /// Its length in bytes.
    len: u64,
    /// Its header.
    header: &'a Header,
}

impl<'a, S: Storage> Walk<'a, S> {
    /// Before anything is read.
    async fn start(file: &'a S, header: &'a Header) -> Result<Self, WalkError> {
        Ok(Self { file, len: file.file_len()?, header })
    }

    /// The L1 table, as far as it maps the disk.
    async fn read_l1(&self) -> Result<Vec<TableEntry>, WalkError> {
        let reach = l2_reach(self.header.cluster_size);
        let entries = self.header.virtual_size().div_ceil(reach);
        let mut table = Vec::new();
        let mut rest = ByteRange::new(self.header.l1_offset, entries * ENTRY_LEN as u64)
            .ok_or_else(past_the_end)?;
        while !rest.is_empty() {
            let end = rest.end().min(rest.start() + CHUNK_LEN);
            let bytes = self.read(ByteRange::between(rest.start(), end)).await?;
            for entry in decode_table(&bytes) {
                let guest = table.len() as u64 * reach;
                let entry = TableEntry::decode(entry, self.header.cluster_size)?;
                if entry.offset.is_some() != entry.copied {
                    return Err(WalkError::NotCopied { guest });
                }
                table.push(entry);
            }
            rest = ByteRange::between(end, rest.end());
        }
        Ok(table)
    }

    /// Checks where the tables lie: in the file, none on another, each with a refcount of 1.
    async fn check_metadata(&self, l1: &[TableEntry]) -> Result<(), WalkError> {
        let header = self.header;
        let cluster = header.cluster_size.bytes();
        let l1_len = u64::from(header.l1_entries) * ENTRY_LEN as u64;
        let refcounts_len = u64::from(header.refcount_table_clusters) * cluster;
        // The header's check has bounded these lengths, and all offsets are cluster aligned.
        let mut used = vec![
            (0, cluster),
            (header.l1_offset, l1_len.next_multiple_of(cluster)),
            (header.refcount_table_offset, refcounts_len),
        ];
        let l2 = l1.iter().filter_map(|entry| entry.offset);
        used.extend(l2.map(|offset| (offset, cluster)));
        used.sort_unstable();
        let mut refcounts = Refcounts::new(self).await?;
        let mut free_from = 0;
        for (offset, len) in used {
            let end = offset.saturating_add(len);
            if offset < free_from || end.saturating_sub(cluster) >= self.len && len > 0 {
                return Err(WalkError::TablePlace { offset });
            }
            free_from = end;
            for cluster in header.cluster_size.touched(ByteRange::between(offset, end)) {
                let count = refcounts.of(cluster).await?;
                if count != 1 {
                    let offset = header.cluster_size.start_of(cluster);
                    return Err(WalkError::Refcount { offset, count });
                }
            }
        }
        Ok(())
    }

    /// Reads L2 table `index` and marks what it says.
    async fn read_l2(
        &self,
        index: u64,
        offset: u64,
        states: &ClusterStates,
    ) -> Result<(), WalkError> {
        let cluster_size = self.header.cluster_size;
        let bytes = self.read(ByteRange::between(offset, offset + cluster_size.bytes())).await?;
        let first = index * (cluster_size.bytes() / ENTRY_LEN as u64);
        let clusters = cluster_size.count(self.header.virtual_size());
        // What is next to each other and of one kind is marked at once.
        let (mut run, mut kind) = (first..first, None);
        for (cluster, entry) in (first..clusters).zip(decode_table(&bytes)) {
            let content = self.judge(cluster_size.start_of(cluster), entry)?;
            let map = match content {
                L2Content::Data { .. } => Some(&states.data),
                L2Content::Zero { .. } => Some(&states.zero),
                L2Content::Unallocated | L2Content::Compressed => None,
            };
            if kind.map(std::ptr::from_ref) != map.map(std::ptr::from_ref) {
                kind.inspect(|map: &&AllocationMap| map.mark(run.clone()));
                (run.start, kind) = (cluster, map);
            }
            run.end = cluster + 1;
        }
        kind.inspect(|map| map.mark(run));
        Ok(())
    }

    /// What an L2 entry says about the cluster at `guest`, if it is one that can be trusted.
    fn judge(&self, guest: u64, entry: u64) -> Result<L2Content, WalkError> {
        let entry = L2Entry::decode(entry, self.header.version, self.header.cluster_size, true)?;
        let host = match entry.content {
            L2Content::Compressed => return Err(WalkError::Compressed { guest }),
            L2Content::Unallocated | L2Content::Zero { reserved: None } => None,
            L2Content::Data { offset } => Some(offset),
            L2Content::Zero { reserved: Some(offset) } => Some(offset),
        };
        match host {
            Some(host) if host != guest => Err(WalkError::Elsewhere { guest, host }),
            _ if entry.copied != host.is_some() => Err(WalkError::NotCopied { guest }),
            _ => Ok(entry.content),
        }
    }

    /// Reads a range of the file.
    async fn read(&self, range: ByteRange) -> io::Result<Vec<u8>> {
        let len = usize::try_from(range.len()).map_err(io::Error::other)?;
        let buffer = IoBuffer::zeroed(len);
        transfer::read_exact(self.file, range.start(), buffer.clone()).await?;
        Ok(buffer.to_vec())
    }
}

/// The refcounts of a qcow2 file, of which one block is kept.
struct Refcounts<'a, S> {
    /// The file.
    walk: &'a Walk<'a, S>,
    /// The refcount table: where each block is.
    table: Vec<u64>,
    /// The number of the block that was read last, and its bytes.
    block: Option<(usize, Vec<u8>)>,
}

impl<'a, S: Storage> Refcounts<'a, S> {
    /// Reads the table.
    async fn new(walk: &'a Walk<'a, S>) -> Result<Self, WalkError> {
        let header = walk.header;
        let len = header.cluster_size.start_of(header.refcount_table_clusters.into());
        let place = ByteRange::new(header.refcount_table_offset, len).ok_or_else(past_the_end)?;
        let table = decode_table(&walk.read(place).await?).collect();
        Ok(Self { walk, table, block: None })
    }

    /// The refcount of a cluster; 0 if there is none.
    async fn of(&mut self, cluster: u64) -> Result<u64, WalkError> {
        let header = self.walk.header;
        // At most 2^6 bits each, at least 2^9 bytes of them.
        let bits = 1_u64 << header.refcount_order;
        let per_block = header.cluster_size.bytes() * 8 / bits;
        let Ok(number) = usize::try_from(cluster / per_block) else { return Ok(0) };
        let Some(&entry) = self.table.get(number) else { return Ok(0) };
        let offset = TableEntry::decode(entry, header.cluster_size)?.offset;
        let Some(offset) = offset else { return Ok(0) };
        if self.block.as_ref().is_none_or(|(known, _)| *known != number) {
            let place = ByteRange::between(offset, offset + header.cluster_size.bytes());
            self.block = Some((number, self.walk.read(place).await?));
        }
        let bytes = self.block.as_ref().map_or(&[][..], |(_, bytes)| bytes);
        Ok(refcount(bytes, cluster % per_block, bits))
    }
}

/// The error for a table that would lie past the end of any file.
fn past_the_end() -> io::Error {
    io::ErrorKind::UnexpectedEof.into()
}

/// Refcount number `index` of a block, of `bits` bits: whole bytes are big-endian, parts of a byte
/// count from its least significant bit.
fn refcount(block: &[u8], index: u64, bits: u64) -> u64 {
    let at = |bit: u64| usize::try_from(bit / 8).unwrap_or(usize::MAX);
    if bits < 8 {
        let byte = block.get(at(index * bits)).copied().unwrap_or(0);
        return u64::from(byte) >> (index * bits % 8) & ((1 << bits) - 1);
    }
    let bytes = block.get(at(index * bits)..at((index + 1) * bits)).unwrap_or(&[]);
    bytes.iter().fold(0, |count, &byte| count << 8 | u64::from(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_of_any_width() {
        let block = [0b1110_0100, 0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde];
        assert_eq!(refcount(&block, 2, 1), 1);
        assert_eq!(refcount(&block, 3, 1), 0);
        assert_eq!((0..4).map(|i| refcount(&block, i, 2)).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!(refcount(&block, 1, 4), 0xe);
        assert_eq!(refcount(&block, 1, 8), 0x12);
        assert_eq!(refcount(&block, 1, 16), 0x3456);
        assert_eq!(refcount(&block, 0, 64), 0xe412_3456_789a_bcde);
        assert_eq!(refcount(&block, 1, 64), 0);
    }
}
