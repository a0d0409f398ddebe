//! Writing: lock clusters, fill what the request does not cover, write the data, mark.

use std::ops::Range;

use super::cluster_lock::ClusterLocks;
use super::{FileRole, Image, ImageError};
use crate::seeded::{self, Bug};
use crate::storage::{IoBuffer, Storage, transfer};
use crate::units::ByteRange;

/// The most clusters that one step locks: half the table, so that two large requests on different
/// parts of the disk need not wait for each other.
pub(super) const MAX_LOCKED: u64 = ClusterLocks::CLUSTERS / 2;

impl<S: Storage> Image<S> {
    /// Writes `data` at byte `offset` of the disk.
    ///
    /// Clusters that are still unallocated are made whole: what the request does not cover comes
    /// from the backing file and goes to the raw image in the same write. Their bits are set in
    /// memory only after the raw image has taken the data, and reach the side file at the next
    /// flush (I1).
    ///
    /// # Errors
    /// `OutOfRange`, `ReadOnly`, `Failed` before a byte is written. `Io`: allocated clusters may
    /// hold any mix of old and new data; none has become visible that was not allocated before.
    ///
    /// # Cancel safety
    /// None, see [`Image`].
    pub async fn write(&self, offset: u64, data: IoBuffer) -> Result<(), ImageError> {
        self.state.check_writable()?;
        let range = self.state.check_range(offset, data.len() as u64)?;
        let clusters = self.state.cluster_size.touched(range);
        if self.state.allocation.is_allocated(clusters.clone()) {
            return self.write_raw(range, data).await;
        }
        if clusters.end - clusters.start <= MAX_LOCKED && self.state.bytes_of(&clusters) == range {
            // Whole clusters, the common first write: nothing is copied, nothing allocated.
            let _guard = self.state.locks.lock(clusters.clone()).await;
            seeded::when(Bug::BitBeforeData, || self.mark_written(clusters.clone()));
            self.write_raw(range, data).await?;
            self.mark_written(clusters);
            return Ok(());
        }
        Box::pin(self.write_pieces(range, &data)).await
    }

    /// Writes a range that is too long to be locked at once, or has parts of unallocated clusters.
    async fn write_pieces(&self, range: ByteRange, data: &IoBuffer) -> Result<(), ImageError> {
        let mut rest = range;
        while !rest.is_empty() {
            let first = self.state.cluster_size.index(rest.start());
            let end = self.state.cluster_size.start_of(first + MAX_LOCKED).min(rest.end());
            let piece = ByteRange::between(rest.start(), end);
            let start = usize::try_from(piece.start() - range.start()).unwrap_or(usize::MAX);
            let len = usize::try_from(piece.len()).unwrap_or(usize::MAX);
            self.write_allocating(piece, data.slice(start, len)).await?;
            rest = ByteRange::between(end, rest.end());
        }
        Ok(())
    }

    /// Writes a piece of at most [`MAX_LOCKED`] clusters, some of which may be unallocated.
    async fn write_allocating(&self, range: ByteRange, data: IoBuffer) -> Result<(), ImageError> {
        let clusters = self.state.cluster_size.touched(range);
        let _guard = self.state.locks.lock(clusters.clone()).await;
        let covered = self.state.bytes_of(&clusters);
        let head = ByteRange::between(covered.start(), range.start());
        let tail = ByteRange::between(range.end(), covered.end());
        let head = if seeded::bug(Bug::HeadNotCopied) { ByteRange::EMPTY } else { head };
        let tail = if seeded::bug(Bug::TailNotCopied) { ByteRange::EMPTY } else { tail };
        let head = self.to_fill(clusters.start, head);
        let tail = self.to_fill(clusters.end - 1, tail);
        // With the clusters locked, and at once for both: nobody waits for a lock or for more of
        // this memory while holding some of it.
        let len = head.len() + tail.len();
        let _lease = match usize::try_from(len).unwrap_or(usize::MAX) {
            0 => None,
            len => Some(self.state.fills.lease(len).await),
        };
        let head = self.fill(head).await?;
        let tail = self.fill(tail).await?;
        let start = range.start() - head.as_ref().map_or(0, |head| head.len() as u64);
        let parts: Vec<IoBuffer> = head.into_iter().chain([data]).chain(tail).collect();
        let whole = IoBuffer::concat(&parts);
        let written = ByteRange::between(start, start + whole.len() as u64);
        seeded::when(Bug::BitBeforeData, || self.mark_written(clusters.clone()));
        self.write_raw(written, whole).await?;
        self.mark_written(clusters);
        Ok(())
    }

    /// Marks clusters whose data the raw image has.
    pub(super) fn mark_written(&self, clusters: Range<u64>) {
        // The journal first: who sees the bit may complete a write that relies on it, and that must
        // not be lost with the process (I7).
        if let Some(journal) = &self.journal {
            journal.mark(clusters.clone());
        }
        self.state.allocation.mark(clusters);
    }

    /// What has to be filled of `range`, a part of `cluster` that a write leaves out: nothing if
    /// the cluster is in the raw image. It is locked, so that stays true.
    fn to_fill(&self, cluster: u64, range: ByteRange) -> ByteRange {
        let is_there = self.state.allocation.is_allocated(cluster..cluster + 1);
        if is_there { ByteRange::EMPTY } else { range }
    }

    /// What the disk shows at `range`, less than a cluster; `None` if it is empty.
    async fn fill(&self, range: ByteRange) -> Result<Option<IoBuffer>, ImageError> {
        if range.is_empty() {
            return Ok(None);
        }
        // At most one cluster: 2 MiB.
        let fill = IoBuffer::zeroed(usize::try_from(range.len()).unwrap_or(usize::MAX));
        self.read(range.start(), fill.clone()).await?;
        Ok(Some(fill))
    }

    /// Writes to the raw image.
    pub(super) async fn write_raw(
        &self,
        range: ByteRange,
        data: IoBuffer,
    ) -> Result<(), ImageError> {
        transfer::write_all(&self.raw, range.start(), data).await.map_err(ImageError::io(
            "write",
            FileRole::Raw,
            range,
        ))
    }
}
