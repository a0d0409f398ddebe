//! Streaming: everything that a disk shows of its backing chain gets into its raw image.
//!
//! At the end every cluster is allocated and durable, the add-cow file says so (ALL_ALLOCATED), and
//! the raw image alone is the disk. Zeros and holes of the chain become holes of the raw image.
//!
//! Promises: a cut between any two I/Os leaves a disk that shows what it showed before, since a bit
//! is durable only after its cluster (I1), and ALL_ALLOCATED only after every bit. What was flushed
//! on the way, which happens every so many bytes and after an error too, need not be copied
//! again: a stream that was cut is finished by running it again. Guests may use the disk meanwhile.
//!
//! Not here: removing the add-cow file (`jobs::detach`).

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::executor::block_on;
use crate::format::{BitmapGeometry, HeaderChange};
use crate::image::open::{OpenOptions, add_cow};
use crate::image::populate::Below;
use crate::image::{Image, OpenError, session};
use crate::jobs::copy::{Pace, Pieces};
use crate::jobs::parts::DiskParts;
use crate::jobs::progress::Progress;
use crate::jobs::{JobError, copy};
use crate::seeded::{self, Bug};
use crate::storage::Storage;
use crate::storage::file::FileStorage;
use crate::units::ByteRange;

/// The most bytes that one step makes zeros: an end to it must be near.
const MAX_ZEROS: u64 = 1 << 30;

/// Streams into the add-cow disk `path`, see [`stream`].
///
/// # Errors
/// `Open` if the disk cannot be used, with nothing changed; else as [`stream`].
pub fn stream_disk(path: &Path, progress: &impl Progress) -> Result<(), JobError> {
    let disk = add_cow(path, OpenOptions { writable: true, ..OpenOptions::READ_ONLY })?;
    let (Some(side), Some(header)) = (&disk.side, &disk.header) else { return Ok(()) };
    session::renew_in(side)?;
    let geometry = BitmapGeometry::new(header.cluster_size, disk.state.virtual_size())
        .map_err(|source| OpenError::Format { path: path.to_owned(), source })?;
    let side = FileStorage::new(Arc::clone(side));
    let raw = FileStorage::new(Arc::clone(&disk.raw));
    let parts = DiskParts { side: &side, raw: &raw, header: header.clone(), geometry };
    let image = disk.handle(FileStorage::new);
    block_on(stream(&image, &parts, Pace::default(), progress))
}

/// Streams into `image`, whose files `parts` are.
///
/// # Errors
/// `Image` if the host failed, `Interrupted`. The disk shows what it showed, and another call goes
/// on from there, unless a sync failed: then only once the disk was opened again.
///
/// # Cancel safety
/// None, see [`Image`].
pub async fn stream<S: Storage>(
    image: &Image<S>,
    parts: &DiskParts<'_, S>,
    pace: Pace,
    progress: &impl Progress,
) -> Result<(), JobError> {
    let copied = copy_all(image, pace, progress).await;
    // After an error too: what was copied so far is worth keeping.
    let is_late = seeded::bug(Bug::FlagBeforeBits);
    let flushed = if is_late { Ok(()) } else { image.flush().await };
    copied?;
    flushed?;
    // Only now, when every bit is durable (docs/format.md, "Feature words").
    let change = parts.plan_header(|area| HeaderChange::to_all_allocated(area, true)).await?;
    parts.change_header(change).await
}

/// Copies every cluster that is not allocated.
async fn copy_all<S: Storage>(
    image: &Image<S>,
    pace: Pace,
    progress: &impl Progress,
) -> Result<(), JobError> {
    let state = image.state();
    let size = state.cluster_size();
    let clusters = size.count(state.virtual_size());
    let allocated = state.allocation().count().unwrap_or(clusters);
    let total = (clusters - allocated.min(clusters)).saturating_mul(size.bytes());
    let (mut next, mut done, mut unflushed) = (0, 0_u64, 0);
    progress.update(0, total)?;
    let mut pieces = Pieces::new(image.backing());
    copy::run::<_, _, JobError>(
        pace,
        async || {
            while next < clusters {
                let (is_allocated, end) = state.allocation().run(next..clusters);
                if !is_allocated {
                    let step = step(image, &mut pieces, next..end, pace).await?;
                    next = step.0.end;
                    return Ok(Some(step));
                }
                next = end;
            }
            Ok(None)
        },
        async |(step, below): (Range<u64>, Below), buffer| {
            let read = image.populate(step.clone(), below, &buffer).await?;
            Ok(((step.end - step.start).saturating_mul(size.bytes()), read))
        },
        async |(len, read): (u64, u64)| {
            done = total.min(done.saturating_add(len));
            progress.update(done, total)?;
            unflushed += read;
            if unflushed >= pace.flush_len {
                unflushed = 0;
                image.flush().await?;
            }
            Ok(())
        },
    )
    .await
}

/// The first step of `clusters`, none of which is allocated: those that the chain below knows to be
/// zeros, or else as many as are worth a read.
async fn step<S: Storage>(
    image: &Image<S>,
    pieces: &mut Pieces<'_, S>,
    clusters: Range<u64>,
    pace: Pace,
) -> Result<(Range<u64>, Below), JobError> {
    let state = image.state();
    let size = state.cluster_size();
    let disk = ByteRange::between(size.start_of(clusters.start), state.virtual_size());
    let piece = pieces.first(disk).await?;
    let limit = |len: u64| clusters.end.min(clusters.start + len.div_ceil(size.bytes()));
    let zeros = size.covered(piece.range, state.virtual_size());
    if piece.is_zero && !zeros.is_empty() {
        return Ok((clusters.start..zeros.end.min(limit(MAX_ZEROS)), Below::Zeros));
    }
    // Zeros that do not fill a cluster are read with what follows.
    let len = if piece.is_zero { pace.step_len } else { piece.range.len().min(pace.step_len) };
    Ok((clusters.start..limit(len), Below::Unknown))
}
