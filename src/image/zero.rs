//! Zeroing and discarding. Neither ever clears a bit (I3): the backing file's old data would come
//! back.

use super::extent::ExtentKind;
use super::write::MAX_LOCKED;
use super::{FileRole, Image, ImageError};
use crate::seeded::{self, Bug};
use crate::storage::{IoBuffer, Storage, ZeroMode, transfer};
use crate::units::ByteRange;

impl<S: Storage> Image<S> {
    /// Makes `len` bytes from byte `offset` of the disk read zeros. With `may_unmap` the space may
    /// be given back.
    ///
    /// # Errors
    /// As [`Image::write`]; part of the range may be zeros already.
    ///
    /// # Cancel safety
    /// None, see [`Image`].
    pub async fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        may_unmap: bool,
    ) -> Result<(), ImageError> {
        self.state.check_writable()?;
        let range = self.state.check_range(offset, len)?;
        let mode = if may_unmap { ZeroMode::PunchHole } else { ZeroMode::ZeroRange };
        let whole =
            self.state.bytes_of(&self.state.cluster_size.covered(range, self.state.virtual_size));
        if whole.is_empty() {
            // Inside one cluster, or across the border of two.
            let border = whole.start().clamp(range.start(), range.end());
            self.zero_part(ByteRange::between(range.start(), border), mode).await?;
            return self.zero_part(ByteRange::between(border, range.end()), mode).await;
        }
        self.zero_part(ByteRange::between(range.start(), whole.start()), mode).await?;
        self.zero_clusters(whole, mode).await?;
        self.zero_part(ByteRange::between(whole.end(), range.end()), mode).await
    }

    /// Zeroes a part of one cluster.
    async fn zero_part(&self, range: ByteRange, mode: ZeroMode) -> Result<(), ImageError> {
        let Some(extent) = self.state.extents(range).next() else { return Ok(()) };
        match extent.kind {
            ExtentKind::Data => self.zero_raw(range, mode).await,
            ExtentKind::Zero => Ok(()),
            ExtentKind::Backing => {
                // Less than a cluster: 2 MiB, hence 512 segments.
                let zeros = IoBuffer::zeros(usize::try_from(range.len()).unwrap_or(usize::MAX));
                self.write(range.start(), zeros).await
            }
        }
    }

    /// Zeroes whole clusters (the last one as far as the disk goes).
    async fn zero_clusters(&self, range: ByteRange, mode: ZeroMode) -> Result<(), ImageError> {
        let clusters = self.state.cluster_size.touched(range);
        let mut first = clusters.start;
        while first < clusters.end {
            let limit = clusters.end.min(first + MAX_LOCKED);
            let (allocated, end) = self.state.allocation.run(first..limit);
            let run = first..end;
            first = end;
            let bytes = self.state.bytes_of(&run);
            if allocated {
                self.zero_raw(bytes, mode).await?;
            } else if bytes.start() < self.state.backing_len {
                let _guard = self.state.locks.lock(run.clone()).await;
                let bytes =
                    if seeded::bug(Bug::ZeroTrustsHoles) { ByteRange::EMPTY } else { bytes };
                self.zero_raw(bytes, mode).await?;
                self.mark_written(run);
            }
            // Else nothing backs these clusters: they read zeros as they are, and stay so.
        }
        Ok(())
    }

    /// Makes a range of the raw image read zeros.
    async fn zero_raw(&self, range: ByteRange, mode: ZeroMode) -> Result<(), ImageError> {
        transfer::write_zeroes(&self.raw, range, mode).await.map_err(ImageError::io(
            "zero",
            FileRole::Raw,
            range,
        ))
    }

    /// Tells that nobody needs `len` bytes from byte `offset` any more. The range is rounded inward
    /// to clusters; allocated ones give their space back and read zeros from then on; the others
    /// keep their content.
    ///
    /// # Errors
    /// As [`Image::write`]; part of the range may be discarded already.
    ///
    /// # Cancel safety
    /// None, see [`Image`].
    pub async fn discard(&self, offset: u64, len: u64) -> Result<(), ImageError> {
        self.state.check_writable()?;
        let range = self.state.check_range(offset, len)?;
        let clusters = self.state.cluster_size.covered(range, self.state.virtual_size);
        #[cfg(feature = "seeded-bugs")]
        seeded::when(Bug::DiscardClearsBits, || self.state.allocation.clear(clusters.clone()));
        for extent in self.state.extents(self.state.bytes_of(&clusters)) {
            if extent.kind == ExtentKind::Data {
                transfer::discard(&self.raw, extent.range).await.map_err(ImageError::io(
                    "discard",
                    FileRole::Raw,
                    extent.range,
                ))?;
            }
        }
        Ok(())
    }
}
