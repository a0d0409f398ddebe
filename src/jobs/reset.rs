//! Resetting a disk: back to what its backing file shows, or to zeros without one.
//!
//! Promises: only metadata is written, whatever the size of the disk; the bitmap is not even read.
//! A cut between any two I/Os leaves every cluster as it was or as the backing file has it, and
//! resetting again completes it. The raw image keeps its length.
//!
//! Not here: asking whether somebody wants to keep what is lost.

use std::sync::Arc;

use crate::executor::block_on;
use crate::format::HeaderChange;
use crate::image::inspect::DiskFiles;
use crate::image::{FileRole, ImageError, session};
use crate::jobs::JobError;
use crate::jobs::parts::{DiskParts, NOWHERE};
use crate::seeded::{self, Bug};
use crate::storage::file::FileStorage;
use crate::storage::{Storage, ZeroMode, transfer};
use crate::units::ByteRange;

/// Resets the disk of these files, see [`reset`].
///
/// # Errors
/// As [`reset`].
pub fn reset_disk(disk: &DiskFiles) -> Result<(), JobError> {
    let side = FileStorage::new(Arc::clone(&disk.side));
    let raw = FileStorage::new(Arc::clone(&disk.raw));
    let (header, geometry) = (disk.header.clone(), disk.geometry);
    let parts = DiskParts { side: &side, raw: &raw, header, geometry };
    // What is refused changes nothing, not even the session.
    block_on(parts.plan_header(|area| HeaderChange::to_all_allocated(area, false)))?;
    session::renew_in(&disk.side)?;
    block_on(reset(&parts))
}

/// Clears every bit, and gives the raw image's space back.
///
/// # Errors
/// `Header`, with nothing changed, if the header's backing file is not one, which ALL_ALLOCATED has
/// kept from mattering. `Image` if the host failed: each cluster is as it was, or as the backing
/// file has it.
///
/// # Cancel safety
/// A future that is dropped is like a cut, see above.
pub async fn reset<S: Storage>(parts: &DiskParts<'_, S>) -> Result<(), JobError> {
    let flag_off = parts.plan_header(|area| HeaderChange::to_all_allocated(area, false)).await?;
    let file_len = parts.geometry.file_len();
    let side_len = parts.side.file_len();
    let side_len =
        side_len.map_err(ImageError::io("get the length of", FileRole::Side, NOWHERE))?;
    if side_len < file_len {
        parts.set_side_len(file_len)?;
    }
    // With what lies behind the bitmap, where no bit belongs either.
    let bits = ByteRange::between(parts.geometry.offset(), side_len.max(file_len));
    let cleared = transfer::write_zeroes(parts.side, bits, ZeroMode::PunchHole).await;
    cleared.map_err(ImageError::io("clear the bitmap of", FileRole::Side, bits))?;
    if !seeded::bug(Bug::ResetBitsNotSynced) {
        parts.sync_side().await?;
    }
    // Only now: without the flag a bit that is still set would count.
    parts.change_header(flag_off).await?;
    // And only now is the raw image needed by nobody (I1).
    let len = parts.raw.file_len();
    let len = len.map_err(ImageError::io("get the length of", FileRole::Raw, NOWHERE))?;
    let raw = ByteRange::between(0, len);
    let discarded = transfer::discard(parts.raw, raw).await;
    discarded.map_err(ImageError::io("give back the space of", FileRole::Raw, NOWHERE))?;
    parts.sync_raw().await
}
