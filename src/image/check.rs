//! Checking an add-cow file, and clearing what is superfluous in it.
//!
//! Looks at the metadata only: header, lengths, bits. It cannot know whether a cluster holds what
//! the guest wrote, since the format has no checksums.
//!
//! Promises: without a repair nothing is written. A repair clears bits that belong to no cluster,
//! and nothing else (I3: no cluster changes); while the disk is in use it is refused.
//!
//! Not here: exit codes and words for people.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::inspect::{DiskAccess, DiskFiles};
use super::open::{file_len, io_error};
use super::{FileRole, OpenError};
use crate::executor::block_on;
use crate::format::{BitmapGeometry, FormatError, is_add_cow};
use crate::storage::file::FileStorage;
use crate::storage::host_file::{Access, CacheMode, HostFile};
use crate::storage::lock::Locking;
use crate::storage::{IoBuffer, Storage, ZeroMode, transfer};
use crate::units::ByteRange;

/// How much of the bitmap is read at once, in bytes.
const CHUNK_LEN: u64 = 1 << 20;

/// What was found to be wrong, or worth knowing.
#[derive(Debug, thiserror::Error)]
pub enum Finding {
    /// The header breaks a rule. Nothing else could be checked.
    #[error("header: {0}")]
    Header(FormatError),
    /// The file ends inside the bits of the clusters.
    #[error("file is truncated: {found} bytes, {needed} needed for its header and bitmap")]
    Truncated {
        /// Its length in bytes.
        found: u64,
        /// The least length in bytes.
        needed: u64,
    },
    /// The file ends inside the padding, which is harmless.
    #[error("file has {found} bytes, not {full}: the bitmap's padding is incomplete")]
    ShortPadding {
        /// Its length in bytes.
        found: u64,
        /// The length it should have, in bytes.
        full: u64,
    },
    /// The file goes on behind the bitmap, which is harmless where it holds zeros.
    #[error("file has {found} bytes, {full} are in use: has the image file become shorter?")]
    Longer {
        /// Its length in bytes.
        found: u64,
        /// The length it should have, in bytes.
        full: u64,
    },
    /// Bits that belong to no cluster. They would come to life if the disk grew.
    #[error("{0} bits are set behind the last cluster")]
    StrayBits(u64),
    /// Bits are 0 although ALL_ALLOCATED says that every cluster is allocated.
    #[error(
        "{0} bits are 0 although the header says that all clusters are allocated: \
         a program that does not know that flag sees another disk"
    )]
    ClearBits(u64),
}

impl Finding {
    /// How many things are broken.
    #[must_use]
    pub fn corruptions(&self) -> u64 {
        match self {
            Self::Header(_) | Self::Truncated { .. } => 1,
            Self::ShortPadding { .. }
            | Self::Longer { .. }
            | Self::StrayBits(_)
            | Self::ClearBits(_) => 0,
        }
    }

    /// How many things are superfluous.
    #[must_use]
    pub fn leaks(&self) -> u64 {
        match self {
            Self::StrayBits(bits) => *bits,
            _ => 0,
        }
    }
}

/// What a check found.
#[derive(Debug, Default)]
pub struct CheckReport {
    /// The shape of the bitmap; `None` if the header is damaged.
    pub geometry: Option<BitmapGeometry>,
    /// How many clusters are in the raw image.
    pub allocated: u64,
    /// What is wrong or worth knowing, after repairs.
    pub findings: Vec<Finding>,
    /// How many stray bits were cleared.
    pub leaks_fixed: u64,
}

impl CheckReport {
    /// How many things are broken.
    #[must_use]
    pub fn corruptions(&self) -> u64 {
        self.findings.iter().map(Finding::corruptions).sum()
    }

    /// How many things are superfluous.
    #[must_use]
    pub fn leaks(&self) -> u64 {
        self.findings.iter().map(Finding::leaks).sum()
    }
}

/// Checks the add-cow file `path`; clears stray bits if `repair` says so, which needs locks.
///
/// # Errors
/// An [`OpenError`] if the disk's files cannot be opened or read, or are no add-cow disk of a
/// version that we know. With a repair, a part of the stray bits may be cleared then.
pub fn add_cow(path: &Path, repair: bool, locking: Locking) -> Result<CheckReport, OpenError> {
    let access = if repair { Access::ReadWrite } else { Access::ReadOnly };
    let disk = match DiskFiles::open(path, DiskAccess { side: access, locking, ..DiskAccess::READ })
    {
        Ok(disk) => disk,
        Err(OpenError::Format { source, .. }) if is_damage(path, &source)? => {
            let findings = vec![Finding::Header(source)];
            return Ok(CheckReport { findings, ..CheckReport::default() });
        }
        Err(error) => return Err(error),
    };
    // Only whether it can be used at all.
    disk.open_backing(CacheMode::Buffered)?;
    files(&disk, repair)
}

/// Checks a disk whose own files are open; the add-cow file for writing if it is to be repaired.
///
/// # Errors
/// As [`add_cow`], if the files cannot be read.
pub fn files(disk: &DiskFiles, repair: bool) -> Result<CheckReport, OpenError> {
    let error = |action| io_error(action, FileRole::Side, disk.side.path());
    let storage = FileStorage::new(Arc::clone(&disk.side));
    let bits = block_on(count(&storage, &disk.geometry)).map_err(error("read"))?;
    let mut leaks_fixed = 0;
    let mut stray = bits.stray;
    if repair && stray > 0 {
        block_on(clear_stray(&storage, &disk.geometry)).map_err(error("clear stray bits of"))?;
        leaks_fixed = std::mem::take(&mut stray);
    }
    let findings = judge(disk, file_len(FileRole::Side, &disk.side)?, bits.allocated, stray);
    let clusters = disk.geometry.clusters();
    let allocated = if disk.header.all_allocated { clusters } else { bits.allocated };
    Ok(CheckReport { geometry: Some(disk.geometry), allocated, findings, leaks_fixed })
}

/// Whether a header that was refused is that of an add-cow file which got damaged, and not one of
/// another format or a version that we do not know.
fn is_damage(path: &Path, error: &FormatError) -> Result<bool, OpenError> {
    match error {
        FormatError::BadMagic { .. }
        | FormatError::OldMagic
        | FormatError::UnknownFeatures { .. } => Ok(false),
        FormatError::TooShort { .. } => {
            let error = |action| io_error(action, FileRole::Side, path);
            let file = HostFile::open(path, Access::ReadOnly, CacheMode::Buffered);
            let storage = FileStorage::new(Arc::new(file.map_err(error("open"))?));
            let start = IoBuffer::zeroed(4);
            let got = block_on(transfer::read_up_to(&storage, 0, start.clone()));
            Ok(is_add_cow(&start.slice(0, got.map_err(error("read"))?).to_vec()))
        }
        _ => Ok(true),
    }
}

/// What there is to say about lengths and bits.
fn judge(disk: &DiskFiles, found: u64, allocated: u64, stray: u64) -> Vec<Finding> {
    let geometry = &disk.geometry;
    let (needed, full) = (geometry.offset() + geometry.used_len(), geometry.file_len());
    let mut findings = Vec::new();
    if found < needed && !disk.header.all_allocated {
        findings.push(Finding::Truncated { found, needed });
    } else if found < full {
        findings.push(Finding::ShortPadding { found, full });
    } else if found > full {
        findings.push(Finding::Longer { found, full });
    }
    if stray > 0 {
        findings.push(Finding::StrayBits(stray));
    }
    // docs/format.md, "Feature words": who sets the flag sets all bits first. The format's first
    // implementation did not, so this is worth a note and no error.
    if disk.header.all_allocated && allocated < geometry.clusters() {
        findings.push(Finding::ClearBits(geometry.clusters() - allocated));
    }
    findings
}

/// How many bits of a bitmap are 1.
#[derive(Debug, PartialEq, Eq)]
pub struct BitCount {
    /// Those of clusters.
    pub allocated: u64,
    /// Those behind the last cluster, up to the end of the file.
    pub stray: u64,
}

/// Counts the bits in the add-cow file `side`.
///
/// # Errors
/// What the storage said.
pub async fn count<S: Storage>(side: &S, geometry: &BitmapGeometry) -> io::Result<BitCount> {
    let used_end = geometry.offset() + geometry.used_len();
    let mut allocated = count_ones(side, ByteRange::between(geometry.offset(), used_end)).await?;
    let behind = ByteRange::between(used_end, side.file_len()?);
    let mut stray = count_ones(side, behind).await?;
    if let Some((_, byte, mask)) = last_byte(side, geometry).await? {
        let in_last = u64::from((byte & !mask).count_ones());
        // Saturating: a file that changes meanwhile must not end us.
        allocated = allocated.saturating_sub(in_last);
        stray += in_last;
    }
    Ok(BitCount { allocated, stray })
}

/// Clears every bit behind the last cluster, up to the end of the file, and makes that durable.
///
/// # Errors
/// What the storage said. Any of those bits may then be cleared.
pub async fn clear_stray<S: Storage>(side: &S, geometry: &BitmapGeometry) -> io::Result<()> {
    if let Some((offset, byte, mask)) = last_byte(side, geometry).await?
        && byte & !mask != 0
    {
        transfer::write_all(side, offset, IoBuffer::from_bytes(&[byte & mask])).await?;
    }
    let used_end = geometry.offset() + geometry.used_len();
    let behind = ByteRange::between(used_end, side.file_len()?);
    if !behind.is_empty() {
        transfer::write_zeroes(side, behind, ZeroMode::PunchHole).await?;
    }
    side.sync().await
}

/// The byte with the last cluster's bit, if it has bits of no cluster too: where it is, what it is,
/// and which of its bits belong to clusters.
async fn last_byte<S: Storage>(
    side: &S,
    geometry: &BitmapGeometry,
) -> io::Result<Option<(u64, u8, u8)>> {
    let in_last = geometry.clusters() % 8;
    let offset = geometry.offset() + geometry.clusters() / 8;
    if in_last == 0 || offset >= side.file_len()? {
        return Ok(None);
    }
    let buffer = IoBuffer::zeroed(1);
    // Not zeros for a byte that could not be had: bits would be missed.
    transfer::read_exact(side, offset, buffer.clone()).await?;
    let mut byte = [0];
    buffer.copy_to(0, &mut byte);
    Ok(Some((offset, byte[0], (1 << in_last) - 1)))
}

/// Counts the ones in a range of the file; what lies past its end, or in a hole, has none.
async fn count_ones<S: Storage>(side: &S, range: ByteRange) -> io::Result<u64> {
    let mut ones = 0;
    let mut position = range.start();
    while position < range.end()
        && let Some(data) = side.next_data(position)?
        && data.start() < range.end()
    {
        let start = data.start().max(position);
        let end = data.end().min(range.end()).min(start.saturating_add(CHUNK_LEN));
        let buffer = IoBuffer::zeroed(usize::try_from(end - start).map_err(io::Error::other)?);
        let got = transfer::read_up_to(side, start, buffer.clone()).await?;
        if got == 0 {
            break;
        }
        let bytes = buffer.slice(0, got).to_vec();
        ones += bytes.iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>();
        position = start + got as u64;
    }
    Ok(ones)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::sim::SimDisk;
    use crate::units::ClusterSize;

    /// A file with an empty header area and these bytes behind it, for `clusters` of 4 KiB.
    fn file(
        clusters: u64,
        bitmap: &[u8],
    ) -> (crate::storage::sim::SimStorage, BitmapGeometry, SimDisk) {
        let cluster_size = ClusterSize::from_bits(12).unwrap();
        let geometry = BitmapGeometry::new(cluster_size, clusters * 4096).unwrap();
        let disk = SimDisk::new(1);
        let side = disk.create(&[&[0; 4096][..], bitmap].concat());
        (side, geometry, disk)
    }

    #[test]
    fn bits_behind_the_last_cluster_are_stray_wherever_they_are() {
        let (side, geometry, _) = file(11, &[0xff, 0xf5, 0, 0x80, 0, 1]);
        let bits = block_on(count(&side, &geometry)).unwrap();
        assert_eq!(bits, BitCount { allocated: 10, stray: 6 });
    }

    #[test]
    fn cleared_stray_bits_stay_cleared_after_a_power_cut_and_no_other_bit_changes() {
        let (side, geometry, disk) = file(11, &[0xff, 0xf5, 0, 0x80, 0, 1]);
        block_on(clear_stray(&side, &geometry)).unwrap();
        disk.power_cut();
        assert_eq!(side.content()[4096..], [0xff, 0x05, 0, 0, 0, 0]);
        let bits = block_on(count(&side, &geometry)).unwrap();
        assert_eq!(bits, BitCount { allocated: 10, stray: 0 });
    }

    #[test]
    fn whole_last_bytes_and_truncated_files_have_no_last_byte() {
        let (side, geometry, _) = file(16, &[0xff, 1, 2]);
        let bits = block_on(count(&side, &geometry)).unwrap();
        assert_eq!(bits, BitCount { allocated: 9, stray: 1 });
        let (side, geometry, _) = file(20, &[0xff]);
        let bits = block_on(count(&side, &geometry)).unwrap();
        assert_eq!(bits, BitCount { allocated: 8, stray: 0 });
        block_on(clear_stray(&side, &geometry)).unwrap();
        assert_eq!(side.content()[4096..], [0xff]);
    }
}
