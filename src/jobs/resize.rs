//! Resizing a disk.
//!
//! The size of a disk is the length of its raw image, so changing that length is the one step that
//! everything turns on. What a larger disk needs is durable before it, and means nothing to the
//! smaller one; what a smaller disk does not need is removed after it.
//!
//! Promises (P5): what is new reads zeros, also where the backing file is longer than the old disk,
//! also in the last cluster of the old disk, which was partial; and what a smaller disk has lost
//! does not come back when it grows again. A cut between any two I/Os leaves the old disk or the
//! new one; resizing again to the same size completes it.
//!
//! Not here: plain raw images, which a job is not needed for.

use crate::format::BitmapGeometry;
use crate::image::chain::Chain;
use crate::image::{FileRole, ImageError, check};
use crate::jobs::JobError;
use crate::jobs::parts::{DiskParts, NOWHERE};
use crate::seeded::{self, Bug};
use crate::storage::{IoBuffer, Storage, transfer};
use crate::units::ByteRange;

/// Gives the disk the shape `new`, which differs from its own in the size only. `backing` is what
/// the disk shows where it has nothing itself; with ALL_ALLOCATED it is not needed, and to make a
/// disk smaller neither. The disk's own bitmap must be whole
/// ([`DiskFiles::check_complete`](crate::image::inspect::DiskFiles::check_complete)).
///
/// # Errors
/// `Image` if the host failed. The disk has its old size then, or its new one, and shows no byte
/// that it did not hold.
///
/// # Cancel safety
/// A future that is dropped is like a cut, see above.
pub async fn resize<S: Storage>(
    parts: &DiskParts<'_, S>,
    backing: Option<&Chain<S>>,
    new: BitmapGeometry,
) -> Result<(), JobError> {
    let old = parts.geometry;
    if new.virtual_size() <= old.virtual_size() {
        return shrink(parts, new).await;
    }
    let prepared = prepare(parts, backing, new).await;
    let grown = prepared.and_then(|()| parts.set_raw_len(new.virtual_size()));
    if grown.is_err() {
        // Bits behind the end of the disk that it keeps. They do no harm, but somebody would have
        // to clear them; the error that counts is the one above.
        drop(parts.set_side_len(old.file_len()));
        drop(clear_behind(parts, &old).await);
    }
    grown?;
    parts.sync_raw().await
}

/// Makes durable what the larger disk `new` needs.
async fn prepare<S: Storage>(
    parts: &DiskParts<'_, S>,
    backing: Option<&Chain<S>>,
    new: BitmapGeometry,
) -> Result<(), JobError> {
    let old = parts.geometry;
    let raw_len = parts.raw.file_len().map_err(raw_error("get the length of"))?;
    if raw_len > old.virtual_size() {
        // A last part of a sector, which was not on the disk and would come to be.
        parts.set_raw_len(old.virtual_size())?;
        parts.sync_raw().await?;
    }
    clear_behind(parts, &old).await?;
    if seeded::bug(Bug::GrowsBeforeBits) {
        parts.set_raw_len(new.virtual_size())?;
    }
    parts.set_side_len(new.file_len())?;
    let backing_len = backing.map_or(0, Chain::virtual_size).min(new.virtual_size());
    if parts.header.all_allocated {
        parts.set_bits(old.clusters()..new.clusters()).await?;
    } else if let Some(backing) = backing
        && backing_len > old.virtual_size()
    {
        // The backing file would show through.
        complete_last_cluster(parts, backing).await?;
        parts.set_bits(old.clusters()..old.cluster_size().count(backing_len)).await?;
    }
    if seeded::bug(Bug::GrowBitsNotSynced) { Ok(()) } else { parts.sync_side().await }
}

/// Brings the old disk's last cluster into the raw image, if it is partial and not there yet. What
/// the cluster gains when the raw image grows is zeros then.
async fn complete_last_cluster<S: Storage>(
    parts: &DiskParts<'_, S>,
    backing: &Chain<S>,
) -> Result<(), JobError> {
    let old = parts.geometry;
    let (size, end) = (old.cluster_size(), old.virtual_size());
    let cluster = size.index(end);
    let range = ByteRange::between(size.start_of(cluster), end);
    if range.is_empty() || parts.is_allocated(cluster).await? {
        return Ok(());
    }
    // Less than a cluster: 2 MiB.
    let data = IoBuffer::zeroed(usize::try_from(range.len()).unwrap_or(usize::MAX));
    backing.read(range.start(), data.clone()).await?;
    let written = transfer::write_all(parts.raw, range.start(), data).await;
    written.map_err(ImageError::io("write", FileRole::Raw, range))?;
    // The bit must not be durable before its cluster (I1).
    if !seeded::bug(Bug::LastClusterNotSynced) {
        parts.sync_raw().await?;
    }
    parts.set_bits(cluster..cluster + 1).await
}

/// Makes the disk smaller, or removes what is left over behind the end of one of the same size.
async fn shrink<S: Storage>(parts: &DiskParts<'_, S>, new: BitmapGeometry) -> Result<(), JobError> {
    if seeded::bug(Bug::ShrinkClearsFirst) {
        clear_behind(parts, &new).await?;
    }
    if new.virtual_size() < parts.geometry.virtual_size() {
        parts.set_raw_len(new.virtual_size())?;
        parts.sync_raw().await?;
    }
    clear_behind(parts, &new).await?;
    parts.set_side_len(new.file_len())?;
    parts.sync_side().await
}

/// Clears every bit behind the last cluster of `geometry`, durably.
async fn clear_behind<S: Storage>(
    parts: &DiskParts<'_, S>,
    geometry: &BitmapGeometry,
) -> Result<(), JobError> {
    let cleared = check::clear_stray(parts.side, geometry).await;
    Ok(cleared.map_err(side_error("clear stray bits of"))?)
}

/// An error about the whole raw image.
fn raw_error(action: &'static str) -> impl FnOnce(std::io::Error) -> ImageError {
    ImageError::io(action, FileRole::Raw, NOWHERE)
}

/// An error about the whole add-cow file.
fn side_error(action: &'static str) -> impl FnOnce(std::io::Error) -> ImageError {
    ImageError::io(action, FileRole::Side, NOWHERE)
}
