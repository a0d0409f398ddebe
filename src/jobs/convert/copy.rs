//! Copying for `convert`: into a raw image, or into a disk over a backing file.
//!
//! Promises: when this returns the new disk is durable. Before that it is of no use, so it must not
//! have its name yet.
//!
//! Not here: making and naming the new files.

use std::cell::Cell;

use crate::image::chain::Chain;
use crate::image::{FileRole, Image, ImageError};
use crate::jobs::copy::{Pace, Pieces};
use crate::jobs::progress::Progress;
use crate::jobs::{JobError, copy};
use crate::storage::{IoBuffer, Storage, sparse, transfer};
use crate::units::ByteRange;

/// The part of `buffer` that `range` fits into.
fn part(buffer: &IoBuffer, start: usize, range: ByteRange) -> IoBuffer {
    buffer.slice(start, usize::try_from(range.len()).unwrap_or(usize::MAX))
}

/// Copies `source` into `target`, a new file without any data that has the length wanted: at least
/// that of the source. Zeros of `block` bytes become holes, which lie at multiples of `block`;
/// `None`: everything is written, zeros too.
///
/// # Errors
/// `Image` if the host failed, `Interrupted`.
///
/// # Cancel safety
/// None, see [`Image`].
pub async fn to_raw<S: Storage>(
    source: &Chain<S>,
    target: &S,
    block: Option<u64>,
    pace: Pace,
    progress: &impl Progress,
) -> Result<(), JobError> {
    let total = match target.file_len() {
        Ok(len) => len,
        Err(error) => return Err(write_error("get the length of", 0..0)(error).into()),
    };
    let (done, mut next) = (Cell::new(0_u64), 0);
    let mut pieces = Pieces::new(Some(source));
    progress.update(0, total)?;
    copy::run::<_, _, JobError>(
        pace,
        async || {
            while next < total {
                let piece = pieces.first(ByteRange::between(next, total)).await?;
                if piece.is_zero && block.is_some() {
                    next = piece.range.end();
                    done.set(done.get() + piece.range.len());
                    // Pieces may be small, and this may be all there is to do.
                    progress.update(done.get(), total)?;
                    continue;
                }
                let range = pace.step_of(piece.range);
                next = range.end();
                return Ok(Some((range, piece.is_zero)));
            }
            Ok(None)
        },
        async |(range, is_zero): (ByteRange, bool), buffer| {
            let data = part(&buffer, 0, range);
            if is_zero {
                data.fill_zero();
            } else {
                source.read(range.start(), data.clone()).await?;
            }
            write_new(target, range.start(), &data, block).await?;
            Ok(range.len())
        },
        async |len: u64| {
            done.set(done.get() + len);
            Ok(progress.update(done.get(), total)?)
        },
    )
    .await?;
    target.sync().await.map_err(write_error("sync", 0..0))?;
    Ok(progress.update(total, total)?)
}

/// Writes `data` to a file that reads zeros there.
async fn write_new<S: Storage>(
    target: &S,
    offset: u64,
    data: &IoBuffer,
    block: Option<u64>,
) -> Result<(), ImageError> {
    let write = async |start: usize, len: usize| {
        let at = offset + start as u64;
        let result = transfer::write_all(target, at, data.slice(start, len)).await;
        result.map_err(write_error("write", at..at + len as u64))
    };
    let Some(block) = block else { return write(0, data.len()).await };
    for run in sparse::runs(offset, data, block) {
        if !run.is_zero {
            write(run.start, run.len).await?;
        }
    }
    Ok(())
}

/// Makes an error of what the host said about the new file.
fn write_error(
    action: &'static str,
    range: std::ops::Range<u64>,
) -> impl FnOnce(std::io::Error) -> ImageError {
    ImageError::io(action, FileRole::Raw, ByteRange::between(range.start, range.end))
}

/// Makes `target`, a new disk that is at least as long as `source`, show the same; `backing` is
/// what it shows so far. Only clusters that differ get into it.
///
/// # Errors
/// As [`to_raw`].
///
/// # Cancel safety
/// None, see [`Image`].
pub async fn to_overlay<S: Storage>(
    source: &Chain<S>,
    backing: &Chain<S>,
    target: &Image<S>,
    pace: Pace,
    progress: &impl Progress,
) -> Result<(), JobError> {
    let total = target.state().virtual_size();
    let cluster = target.state().cluster_size().bytes();
    let (done, mut next) = (Cell::new(0_u64), 0);
    let (mut ours, mut theirs) = (Pieces::new(Some(source)), Pieces::new(Some(backing)));
    progress.update(0, total)?;
    copy::run::<_, _, JobError>(
        pace,
        async || {
            while next < total {
                let rest = ByteRange::between(next, total);
                let (ours, theirs) = (ours.first(rest).await?, theirs.first(rest).await?);
                let both = ours.range.intersect(theirs.range);
                // Whole clusters of zeros on both sides are equal without a look.
                let end = both.end() - both.end() % cluster;
                if ours.is_zero && theirs.is_zero && end > next {
                    done.set(done.get() + (end - next));
                    next = end;
                    progress.update(done.get(), total)?;
                    continue;
                }
                // Half of a buffer for each side.
                let len = (pace.step_len / 2).max(cluster);
                let range = rest.intersect(ByteRange::between(next, next.saturating_add(len)));
                next = range.end();
                return Ok(Some(range));
            }
            Ok(None)
        },
        async |range: ByteRange, buffer| {
            let half = buffer.len() / 2;
            let mut at = range.start();
            while at < range.end() {
                let end = at.saturating_add(half as u64).min(range.end());
                let range = ByteRange::between(at, end);
                let (ours, theirs) = (part(&buffer, 0, range), part(&buffer, half, range));
                source.read(at, ours.clone()).await?;
                backing.read(at, theirs.clone()).await?;
                write_differences(target, at, &ours, &theirs).await?;
                at = end;
            }
            Ok(range.len())
        },
        async |len: u64| {
            done.set(done.get() + len);
            Ok(progress.update(done.get(), total)?)
        },
    )
    .await?;
    target.flush().await?;
    Ok(progress.update(total, total)?)
}

/// Writes those clusters of `ours` to `target` in which it differs from `theirs`, which is what the
/// target shows so far from `offset` on. Of clusters that are longer than the buffers it looks at
/// what there is of them: the disk makes the rest whole.
async fn write_differences<S: Storage>(
    target: &Image<S>,
    offset: u64,
    ours: &IoBuffer,
    theirs: &IoBuffer,
) -> Result<(), ImageError> {
    let cluster = target.state().cluster_size().bytes();
    let mut start = 0;
    while start < ours.len() {
        let left = cluster - (offset + start as u64) % cluster;
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(ours.len() - start);
        let data = ours.slice(start, len);
        let at = offset + start as u64;
        if data.first_difference(&theirs.slice(start, len), 1).is_some() {
            if data.is_zero() {
                target.write_zeroes(at, len as u64, true).await?;
            } else {
                target.write(at, data).await?;
            }
        }
        start += len;
    }
    Ok(())
}
