//! Making the data file of a qcow2 file the raw image of an add-cow disk.
//!
//! Order of I/O: the data file gets the disk's length; what reads as zeros in the qcow2 file is
//! made to read zeros in the data file; the data file is synced; the add-cow file is written and
//! synced. Until the add-cow file has its name nothing refers to what was changed: the qcow2 file
//! takes no byte of its zero clusters, or from behind the disk's end, out of the data file.
//!
//! An add-cow file's clusters have at least 4 KiB. Where those of the qcow2 file are smaller, one
//! of them can be allocated in part; the rest of it, never a whole cluster, is copied from the
//! backing file. Nothing else is ever copied.
//!
//! Not here: opening the files, and naming the new one.

use std::io;
use std::ops::Range;

use crate::format::{BitmapGeometry, FormatError, Header};
use crate::image::ImageError;
use crate::image::allocation::AllocationMap;
use crate::image::chain::Chain;
use crate::image::create::NewSide;
use crate::jobs::progress::{Interrupted, Progress};
use crate::jobs::qcow2::walk::ClusterStates;
use crate::storage::{IoBuffer, Storage, ZeroMode, transfer};
use crate::units::{ByteRange, ClusterSize, SECTOR_SIZE};

/// How much of the data file is looked at and zeroed at once, in bytes.
const CHUNK_LEN: u64 = 1 << 20;

/// Why a data file could not be taken over. The qcow2 file shows the same disk as before.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    /// The data file could not be read or changed; first, what was tried.
    #[error("cannot {0} the data file")]
    Data(&'static str, #[source] io::Error),
    /// The add-cow file could not be written.
    #[error("cannot write the add-cow file")]
    New(#[source] io::Error),
    /// The add-cow file's header cannot be made.
    #[error(transparent)]
    Header(#[from] FormatError),
    /// There is no memory for the bitmap.
    #[error("there is not enough memory for its bitmap")]
    NoMemory,
    /// The backing file could not be read.
    #[error(transparent)]
    Backing(#[from] ImageError),
    /// It was told to stop.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
}

/// What was changed in a data file, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Changed {
    /// Zeroed: they held something that no table referred to.
    pub zeroed: u64,
    /// Copied from the backing file: the rest of clusters that were allocated in part.
    pub copied: u64,
}

/// A data file that is to become a raw image, and the add-cow file for it.
#[derive(Debug)]
pub struct Takeover {
    /// The add-cow file.
    content: NewSide,
    /// Its bitmap's shape: also the size of the disk.
    geometry: BitmapGeometry,
    /// How many of its clusters are allocated.
    allocated: u64,
    /// The qcow2 file's cluster size.
    cluster_size: ClusterSize,
    /// Which of its clusters must read zeros: those that stand in the map as the flag says.
    zeros: (AllocationMap, bool),
    /// Its clusters that do not show the backing file, if they are smaller than the new ones.
    small: Option<AllocationMap>,
}

impl Takeover {
    /// Plans it for a disk of `size` bytes whose qcow2 clusters, of that size, are in these states.
    ///
    /// # Errors
    /// `Header`, `NoMemory`.
    pub fn plan(
        header: &Header,
        states: ClusterStates,
        cluster_size: ClusterSize,
        size: u64,
    ) -> Result<Self, TakeoverError> {
        let geometry = BitmapGeometry::new(header.cluster_size, size)?;
        if header.all_allocated {
            return Ok(Self {
                content: NewSide::new(header, geometry)?,
                geometry,
                allocated: geometry.clusters(),
                cluster_size,
                zeros: (states.data, false),
                small: None,
            });
        }
        let ClusterStates { data: bits, zero } = states;
        let clusters = cluster_size.count(size);
        for run in runs(&zero, true, clusters) {
            bits.mark(run);
        }
        let (bits, small) = if header.cluster_size == cluster_size {
            (bits, None)
        } else {
            let wide = AllocationMap::empty(&geometry).ok_or(TakeoverError::NoMemory)?;
            for run in runs(&bits, true, clusters) {
                wide.mark(header.cluster_size.touched(bytes_of(cluster_size, &run, size)));
            }
            (wide, Some(bits))
        };
        let allocated = bits.count().unwrap_or(geometry.clusters());
        let content = NewSide::with_bits(header, geometry, bits)?;
        Ok(Self { content, geometry, allocated, cluster_size, zeros: (zero, true), small })
    }

    /// The shape of the new bitmap: also the size of the disk.
    #[must_use]
    pub fn geometry(&self) -> &BitmapGeometry {
        &self.geometry
    }

    /// How many clusters of the new disk are allocated.
    #[must_use]
    pub fn allocated(&self) -> u64 {
        self.allocated
    }

    /// Does it: `side` is the empty file that becomes the add-cow file, `backing` what the disk
    /// shows where it has nothing. Both files are durable then.
    ///
    /// # Errors
    /// See [`TakeoverError`].
    pub async fn carry_out<S: Storage>(
        &self,
        data: &S,
        side: &S,
        backing: Option<&Chain<S>>,
        progress: &impl Progress,
    ) -> Result<Changed, TakeoverError> {
        let size = self.geometry.virtual_size();
        let len = data.file_len().map_err(data_error("get the length of"))?;
        // A last part of a sector is on neither disk.
        if !(size..size + SECTOR_SIZE).contains(&len) {
            data.set_len(size).map_err(data_error("set the length of"))?;
        }
        let mut changed = Changed { zeroed: 0, copied: 0 };
        let (map, flag) = &self.zeros;
        for run in runs(map, *flag, self.cluster_size.count(size)) {
            let range = bytes_of(self.cluster_size, &run, size);
            changed.zeroed += clear(data, range, size, progress).await?;
        }
        if let Some(backing) = backing {
            changed.copied = self.fill(data, backing, progress).await?;
        }
        data.sync().await.map_err(data_error("sync"))?;
        self.content.write(side).await.map_err(TakeoverError::New)?;
        progress.update(size, size)?;
        Ok(changed)
    }

    /// Copies what is missing of new clusters that are allocated in part. Returns how many bytes.
    async fn fill<S: Storage>(
        &self,
        data: &S,
        backing: &Chain<S>,
        progress: &impl Progress,
    ) -> Result<u64, TakeoverError> {
        let Some(small) = &self.small else { return Ok(0) };
        let (size, wide) = (self.geometry.virtual_size(), self.geometry.cluster_size());
        let mut copied = 0;
        for run in runs(small, false, self.cluster_size.count(size)) {
            progress.update(bytes_of(self.cluster_size, &run, size).start(), size)?;
            let hole = bytes_of(self.cluster_size, &run, size);
            // New clusters that lie in the hole as a whole are not allocated.
            let whole = wide.covered(hole, size);
            let parts = if whole.is_empty() {
                [hole, ByteRange::between(hole.end(), hole.end())]
            } else {
                let whole = bytes_of(wide, &whole, size);
                [
                    ByteRange::between(hole.start(), whole.start()),
                    ByteRange::between(whole.end(), hole.end()),
                ]
            };
            for part in parts.into_iter().filter(|part| !part.is_empty()) {
                let buffer = buffer_for(part).map_err(data_error("fill"))?;
                backing.read(part.start(), buffer.clone()).await?;
                let written = transfer::write_all(data, part.start(), buffer).await;
                written.map_err(data_error("write"))?;
                copied += part.len();
            }
        }
        Ok(copied)
    }
}

/// Makes `range` of the data file read zeros where it does not. Returns how many bytes that were.
async fn clear<S: Storage>(
    data: &S,
    range: ByteRange,
    size: u64,
    progress: &impl Progress,
) -> Result<u64, TakeoverError> {
    let (mut rest, mut zeroed) = (range, 0);
    while !rest.is_empty() {
        progress.update(rest.start(), size)?;
        let found = data.next_data(rest.start()).map_err(data_error("look for data in"))?;
        let piece = match found.map(|found| found.intersect(rest)) {
            Some(piece) if !piece.is_empty() => piece,
            _ => break,
        };
        let end = piece.end().min(piece.start() + CHUNK_LEN);
        let piece = ByteRange::between(piece.start(), end);
        if !reads_zeros(data, piece).await.map_err(data_error("read"))? {
            let done = transfer::write_zeroes(data, piece, ZeroMode::PunchHole).await;
            done.map_err(data_error("zero a part of"))?;
            zeroed += piece.len();
        }
        rest = ByteRange::between(end, rest.end());
    }
    Ok(zeroed)
}

/// Makes a [`TakeoverError::Data`].
fn data_error(action: &'static str) -> impl FnOnce(io::Error) -> TakeoverError {
    move |error| TakeoverError::Data(action, error)
}

/// A buffer for a small range.
fn buffer_for(range: ByteRange) -> io::Result<IoBuffer> {
    Ok(IoBuffer::zeroed(usize::try_from(range.len()).map_err(io::Error::other)?))
}

/// The bytes of a run of clusters of that size, on a disk of `size` bytes.
fn bytes_of(cluster_size: ClusterSize, run: &Range<u64>, size: u64) -> ByteRange {
    let end = cluster_size.start_of(run.end).min(size);
    ByteRange::between(cluster_size.start_of(run.start), end)
}

/// Whether a piece of a file, at most [`CHUNK_LEN`] bytes, reads zeros.
async fn reads_zeros<S: Storage>(file: &S, piece: ByteRange) -> io::Result<bool> {
    let buffer = buffer_for(piece)?;
    transfer::read_or_zero(file, piece.start(), buffer.clone()).await?;
    Ok(buffer.is_zero())
}

/// The runs of clusters below `clusters` that stand in the map as `flag` says.
fn runs(map: &AllocationMap, flag: bool, clusters: u64) -> impl Iterator<Item = Range<u64>> + '_ {
    let mut next = 0;
    std::iter::from_fn(move || {
        while next < clusters {
            let start = next;
            let (is_marked, end) = map.run(start..clusters);
            next = end;
            if is_marked == flag {
                return Some(start..end);
            }
        }
        None
    })
}
