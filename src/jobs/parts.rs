//! The parts of a disk that jobs on metadata work on, and the steps that several of them share:
//! setting bits, changing the header.
//!
//! Not here: what is changed when, which is each job's own promise.

use std::ops::Range;

use crate::format::{BitmapGeometry, FormatError, Header, HeaderChange};
use crate::image::load::{self, LoadError};
use crate::image::{FileRole, ImageError};
use crate::jobs::JobError;
use crate::seeded::{self, Bug};
use crate::storage::{IoBuffer, Storage, transfer};
use crate::units::ByteRange;

/// How many bytes of the bitmap are written at once.
const CHUNK_LEN: u64 = 1 << 20;

/// The two files of an add-cow disk, and what they say. Nobody else uses them.
#[derive(Debug)]
pub struct DiskParts<'a, S> {
    /// The add-cow file.
    pub side: &'a S,
    /// The raw image.
    pub raw: &'a S,
    /// The add-cow file's header.
    pub header: Header,
    /// The shape of the bitmap, which includes the virtual size.
    pub geometry: BitmapGeometry,
}

impl<'a, S: Storage> DiskParts<'a, S> {
    /// Reads what the files say.
    ///
    /// # Errors
    /// `Io`, or `Format` with what is wrong.
    pub async fn load(side: &'a S, raw: &'a S) -> Result<Self, LoadError> {
        let header = load::header(side).await?;
        let geometry = BitmapGeometry::new(header.cluster_size, raw.file_len()?)?;
        Ok(Self { side, raw, header, geometry })
    }

    /// Syncs the raw image.
    ///
    /// # Errors
    /// `Image`, with what the host said.
    pub async fn sync_raw(&self) -> Result<(), JobError> {
        Ok(self.raw.sync().await.map_err(ImageError::io("sync", FileRole::Raw, NOWHERE))?)
    }

    /// Syncs the add-cow file.
    ///
    /// # Errors
    /// `Image`, with what the host said.
    pub async fn sync_side(&self) -> Result<(), JobError> {
        Ok(self.side.sync().await.map_err(ImageError::io("sync", FileRole::Side, NOWHERE))?)
    }

    /// Cuts or grows the raw image.
    ///
    /// # Errors
    /// `Image`, with what the host said.
    pub fn set_raw_len(&self, len: u64) -> Result<(), JobError> {
        let result = self.raw.set_len(len);
        Ok(result.map_err(ImageError::io("set the length of", FileRole::Raw, NOWHERE))?)
    }

    /// Cuts or grows the add-cow file.
    ///
    /// # Errors
    /// `Image`, with what the host said.
    pub fn set_side_len(&self, len: u64) -> Result<(), JobError> {
        let result = self.side.set_len(len);
        Ok(result.map_err(ImageError::io("set the length of", FileRole::Side, NOWHERE))?)
    }

    /// Whether the bit of `cluster` is set in the file, or the header says that all are.
    ///
    /// # Errors
    /// `Image`, with what the host said.
    pub async fn is_allocated(&self, cluster: u64) -> Result<bool, JobError> {
        let (offset, mask) = self.geometry.position(cluster);
        let byte = read(self.side, ByteRange::between(offset, offset + 1)).await?;
        Ok(self.header.all_allocated || byte.first().is_some_and(|byte| byte & mask != 0))
    }

    /// Sets the bits of `clusters` in the file, which gets longer if it must; does not sync. All
    /// other bits keep their values.
    ///
    /// # Errors
    /// `Image`, with what the host said. Any of the bits may be set then.
    pub async fn set_bits(&self, clusters: Range<u64>) -> Result<(), JobError> {
        let (mut byte, end) = (clusters.start / 8, clusters.end.div_ceil(8));
        while byte < end && !clusters.is_empty() {
            let chunk_end = end.min(byte + CHUNK_LEN);
            let start = self.geometry.offset();
            let range = ByteRange::between(start + byte, start + chunk_end);
            let mut bytes = read(self.side, range).await?;
            for (index, value) in (byte..).zip(&mut bytes) {
                // Which of the byte's eight clusters are meant.
                let first = clusters.start.saturating_sub(index * 8).min(8);
                let end = clusters.end.saturating_sub(index * 8).min(8);
                *value |= (first..end).fold(0, |mask, bit| mask | 1 << bit);
            }
            write(self.side, range.start(), &bytes).await?;
            byte = chunk_end;
        }
        Ok(())
    }

    /// The change of the header that `plan` makes of the header area. Changes nothing.
    ///
    /// # Errors
    /// `Header` if the header cannot say that; `Image` if the host failed.
    pub async fn plan_header(
        &self,
        plan: impl FnOnce(&[u8]) -> Result<HeaderChange, FormatError>,
    ) -> Result<HeaderChange, JobError> {
        let area = read(self.side, ByteRange::between(0, self.header.header_size())).await?;
        plan(&area).map_err(JobError::Header)
    }

    /// Carries out a change of the header. A cut anywhere leaves the old header or the new one; it
    /// is durable when this returns.
    ///
    /// # Errors
    /// `Image`, with what the host said.
    pub async fn change_header(&self, change: HeaderChange) -> Result<(), JobError> {
        let Some(fixed) = change.fixed else { return Ok(()) };
        if let Some((offset, name)) = change.name {
            write(self.side, offset, &name).await?;
            if !seeded::bug(Bug::NameNotSynced) {
                self.sync_side().await?;
            }
        }
        write(self.side, 0, &fixed).await?;
        if !seeded::bug(Bug::OldNameRemovedEarly) {
            self.sync_side().await?;
        }
        if let Some(unused) = change.unused {
            let len = usize::try_from(unused.len()).unwrap_or_default();
            write(self.side, unused.start(), &vec![0; len]).await?;
            self.sync_side().await?;
        }
        Ok(())
    }
}

/// A range of bytes for errors that are about a whole file.
pub(super) const NOWHERE: ByteRange = ByteRange::EMPTY;

/// Reads `range` of the add-cow file; what lies past its end is zeros.
async fn read<S: Storage>(side: &S, range: ByteRange) -> Result<Vec<u8>, JobError> {
    let error = || ImageError::io("read", FileRole::Side, range);
    // A chunk of the bitmap or a header area: 2 MiB at most.
    let buffer = IoBuffer::zeroed(usize::try_from(range.len()).unwrap_or(usize::MAX));
    let inside = range.intersect(ByteRange::between(0, side.file_len().map_err(error())?));
    // Up to its end the file must be there: zeros instead of what could not be had would be written
    // back.
    let len = usize::try_from(inside.len()).unwrap_or(usize::MAX);
    transfer::read_exact(side, range.start(), buffer.slice(0, len)).await.map_err(error())?;
    Ok(buffer.to_vec())
}

/// Writes to the add-cow file.
async fn write<S: Storage>(side: &S, offset: u64, bytes: &[u8]) -> Result<(), JobError> {
    let range = ByteRange::between(offset, offset + bytes.len() as u64);
    let written = transfer::write_all(side, offset, IoBuffer::from_bytes(bytes)).await;
    Ok(written.map_err(ImageError::io("write", FileRole::Side, range))?)
}
