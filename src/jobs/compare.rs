//! Comparing: whether two chains show the same.
//!
//! A chain that is shorter than the other one is taken to be followed by zeros. Zeros that both
//! know without reading are skipped.
//!
//! Not here: what becomes of the finding, and different sizes as such.

use std::cell::Cell;

use crate::image::ImageError;
use crate::image::chain::Chain;
use crate::jobs::copy;
use crate::jobs::copy::{Pace, Pieces};
use crate::jobs::progress::{Interrupted, Progress};
use crate::storage::{IoBuffer, Storage};
use crate::units::{ByteRange, SECTOR_SIZE};

/// In what two chains differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Difference {
    /// In their bytes.
    Content {
        /// The first sector that differs, in bytes.
        offset: u64,
    },
    /// In whether a range is stored, or known to be zeros; their bytes are equal up to there.
    Status {
        /// Where it starts, in bytes.
        offset: u64,
    },
}

impl Difference {
    /// Where it is, in bytes; and whether it is one of content, which comes later at one place.
    fn place(self) -> (u64, bool) {
        match self {
            Self::Content { offset } => (offset, true),
            Self::Status { offset } => (offset, false),
        }
    }
}

/// Why two chains could not be compared. The first or the second is meant by 0 or 1.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// It cannot be found out where the bytes of one are.
    #[error("cannot find out where the bytes of a disk are")]
    Map(usize, #[source] ImageError),
    /// One cannot be read.
    #[error("cannot read a disk")]
    Read(usize, #[source] ImageError),
    /// It was told to stop.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
}

/// The first difference between two chains; with `strict` also in what is stored.
///
/// # Errors
/// See [`CompareError`].
pub async fn compare<S: Storage>(
    chains: [&Chain<S>; 2],
    strict: bool,
    pace: Pace,
    progress: &impl Progress,
) -> Result<Option<Difference>, CompareError> {
    let total = chains[0].virtual_size().max(chains[1].virtual_size());
    let (done, found) = (Cell::new(0_u64), Cell::new(None::<Difference>));
    let find = |new: Difference| match found.get() {
        Some(old) if old.place() <= new.place() => {}
        _ => found.set(Some(new)),
    };
    let mut pieces = chains.map(|chain| Pieces::new(Some(chain)));
    let mut next = 0;
    progress.update(0, total)?;
    copy::run::<_, _, CompareError>(
        pace,
        async || {
            while next < total && found.get().is_none() {
                let rest = ByteRange::between(next, total);
                let first = pieces[0].first(rest).await.map_err(map_error(0))?;
                let second = pieces[1].first(first.range).await.map_err(map_error(1))?;
                if strict && first.is_zero != second.is_zero {
                    find(Difference::Status { offset: next });
                    return Ok(None);
                }
                if first.is_zero && second.is_zero {
                    next = second.range.end();
                    done.set(done.get() + second.range.len());
                    // Pieces may be small, and this may be all there is to do.
                    progress.update(done.get(), total)?;
                    continue;
                }
                // Half of a buffer for each of the two.
                let half = ByteRange::between(next, next.saturating_add(pace.step_len / 2));
                let range = second.range.intersect(half);
                next = range.end();
                return Ok(Some(range));
            }
            Ok(None)
        },
        async |range: ByteRange, buffer: IoBuffer| {
            let len = usize::try_from(range.len()).unwrap_or(usize::MAX);
            let data = [buffer.slice(0, len), buffer.slice(len, len)];
            for (index, chain) in chains.into_iter().enumerate() {
                let read = chain.read(range.start(), data[index].clone()).await;
                read.map_err(|error| CompareError::Read(index, error))?;
            }
            if let Some(at) = data[0].first_difference(&data[1], 1) {
                let offset = range.start() + at as u64;
                find(Difference::Content { offset: offset - offset % SECTOR_SIZE });
            }
            Ok(range.len())
        },
        async |len: u64| {
            done.set(done.get() + len);
            Ok(progress.update(done.get(), total)?)
        },
    )
    .await?;
    if found.get().is_none() {
        progress.update(total, total)?;
    }
    Ok(found.get())
}

/// Says which disk could not be mapped.
fn map_error(index: usize) -> impl FnOnce(ImageError) -> CompareError {
    move |error| CompareError::Map(index, error)
}
