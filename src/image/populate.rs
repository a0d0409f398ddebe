//! Populating: unallocated clusters get into the raw image as they read now.
//!
//! What streaming a backing chain into a disk is made of. Works beside guests: the clusters are
//! locked, those that a guest has written first are left alone (I5), and bits are marked only after
//! the raw image has taken the data (I1).
//!
//! Not here: which clusters, how many at the same time, and flushing (`jobs::stream`).

use std::ops::Range;

use super::chain::Chain;
use super::write::MAX_LOCKED;
use super::{FileRole, Image, ImageError};
use crate::seeded::{self, Bug};
use crate::storage::{IoBuffer, Storage, sparse};
use crate::units::ByteRange;

/// What is known of the chain below some clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Below {
    /// It reads zeros, as its metadata tells: no payload need be read.
    Zeros,
    /// Nothing: it is read.
    Unknown,
}

impl<S: Storage> Image<S> {
    /// The chain below the disk; `None` if there is none, or none that is needed.
    #[must_use]
    pub fn backing(&self) -> Option<&Chain<S>> {
        self.backing.as_ref()
    }

    /// Makes those of `clusters` that are not allocated whole in the raw image, as they read now,
    /// and marks them. Zeros become holes there. `below` says what they read as. `buffer` is what
    /// the data goes through; its content does not matter before or after. Returns how many bytes
    /// had to be read.
    ///
    /// # Errors
    /// `ReadOnly` and `Failed` before anything is done. `Io`: some of the clusters may have been
    /// marked, and those are whole.
    ///
    /// # Panics
    /// With an empty buffer.
    ///
    /// # Cancel safety
    /// None, see [`Image`].
    pub async fn populate(
        &self,
        clusters: Range<u64>,
        below: Below,
        buffer: &IoBuffer,
    ) -> Result<u64, ImageError> {
        assert!(!buffer.is_empty(), "nothing goes through an empty buffer");
        self.state.check_writable()?;
        let mut rest = clusters;
        let mut read = 0;
        while !rest.is_empty() {
            let end = rest.end.min(rest.start.saturating_add(MAX_LOCKED));
            read += self.populate_locked(rest.start..end, below, buffer).await?;
            rest.start = end;
        }
        Ok(read)
    }

    /// The same for at most [`MAX_LOCKED`] clusters.
    async fn populate_locked(
        &self,
        clusters: Range<u64>,
        below: Below,
        buffer: &IoBuffer,
    ) -> Result<u64, ImageError> {
        let _guard = self.state.locks.lock(clusters.clone()).await;
        let mut first = clusters.start;
        let mut read = 0;
        while first < clusters.end {
            let (allocated, end) = self.state.allocation.run(first..clusters.end);
            if !allocated || seeded::bug(Bug::PopulateOverwrites) {
                seeded::when(Bug::PopulateMarksFirst, || self.mark_written(first..end));
                let range = self.state.bytes_of(&(first..end));
                match (below, &self.backing) {
                    (Below::Unknown, Some(chain)) => {
                        self.copy_up(chain, range, buffer).await?;
                        read += range.len();
                    }
                    (Below::Zeros, _) | (Below::Unknown, None) => {
                        let trusts = seeded::bug(Bug::PopulateTrustsHoles);
                        let range = if trusts { ByteRange::EMPTY } else { range };
                        let cleared = sparse::clear(&self.raw, range).await;
                        cleared.map_err(ImageError::io("zero", FileRole::Raw, range))?;
                    }
                }
                self.mark_written(first..end);
            }
            first = end;
        }
        Ok(read)
    }

    /// Makes the raw image hold what the chain below shows at `range`. The clusters are locked and
    /// not allocated, so whatever it holds there means nothing (I2).
    async fn copy_up(
        &self,
        chain: &Chain<S>,
        range: ByteRange,
        buffer: &IoBuffer,
    ) -> Result<(), ImageError> {
        let mut rest = range;
        while !rest.is_empty() {
            let len = usize::try_from(rest.len()).unwrap_or(usize::MAX).min(buffer.len());
            let data = buffer.slice(0, len);
            let done = ByteRange::between(rest.start(), rest.start() + len as u64);
            chain.read(done.start(), data.clone()).await?;
            let written = sparse::write(&self.raw, done.start(), &data, sparse::BLOCK).await;
            written.map_err(ImageError::io("write", FileRole::Raw, done))?;
            rest = ByteRange::between(done.end(), rest.end());
        }
        Ok(())
    }
}
