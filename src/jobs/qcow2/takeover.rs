//! Making the data file of a qcow2 file the raw image of an add-cow disk.
//!
//! Order of I/O: the data file gets the disk's length; what reads as zeros in the qcow2 file is
//! made to read zeros in the data file; the data file is synced; the add-cow file is written and
//! synced. Until the add-cow file has its name nothing refers to what was changed: the qcow2 file
//! takes no byte of its zero clusters, or from behind the disk's end, out of the data file.
//!
//! Not here: opening the files, and naming the new one.

use std::io;

use crate::format::{BitmapGeometry, FormatError, Header};
use crate::image::allocation::AllocationMap;
use crate::image::create::NewSide;
use crate::jobs::progress::{Interrupted, Progress};
use crate::jobs::qcow2::walk::ClusterStates;
use crate::storage::{IoBuffer, Storage, ZeroMode, transfer};
use crate::units::{ByteRange, ClusterSize};

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
    /// A cluster of the add-cow file would be allocated in part.
    #[error(
        "its clusters have {from} bytes, those of an add-cow file at least {to}, and at {at:#x} \
         some of one are allocated and some are not (addcow convert copies the disk)"
    )]
    Partial {
        /// The qcow2 file's cluster size in bytes.
        from: u64,
        /// The add-cow file's cluster size in bytes.
        to: u64,
        /// Where, in bytes of the disk.
        at: u64,
    },
    /// It was told to stop.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
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
}

impl Takeover {
    /// Plans it for a disk of `size` bytes whose qcow2 clusters, of that size, are in these states.
    ///
    /// # Errors
    /// `Header`, `NoMemory`, `Partial`.
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
            });
        }
        let ClusterStates { data: bits, zero } = states;
        let clusters = cluster_size.count(size);
        for run in runs(&zero, true, clusters) {
            bits.mark(run);
        }
        let bits = if header.cluster_size == cluster_size {
            bits
        } else {
            widen(&bits, cluster_size, &geometry)?
        };
        let allocated = bits.count().unwrap_or(geometry.clusters());
        let content = NewSide::with_bits(header, geometry, bits)?;
        Ok(Self { content, geometry, allocated, cluster_size, zeros: (zero, true) })
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

    /// Does it: `side` is the empty file that becomes the add-cow file. Returns how many bytes of
    /// the data file were zeroed. Both files are durable then.
    ///
    /// # Errors
    /// See [`TakeoverError`].
    pub async fn carry_out<S: Storage>(
        &self,
        data: &S,
        side: &S,
        progress: &impl Progress,
    ) -> Result<u64, TakeoverError> {
        let size = self.geometry.virtual_size();
        let fail = |action| move |error| TakeoverError::Data(action, error);
        let len = data.file_len().map_err(fail("get the length of"))?;
        // A last part of a sector is on neither disk.
        if !(size..size + crate::units::SECTOR_SIZE).contains(&len) {
            data.set_len(size).map_err(fail("set the length of"))?;
        }
        let (map, flag) = &self.zeros;
        let mut zeroed = 0;
        for run in runs(map, *flag, self.cluster_size.count(size)) {
            let end = self.cluster_size.start_of(run.end).min(size);
            let mut rest = ByteRange::between(self.cluster_size.start_of(run.start), end);
            while !rest.is_empty() {
                progress.update(rest.start(), size)?;
                let found = data.next_data(rest.start()).map_err(fail("look for data in"))?;
                let piece = match found.map(|found| found.intersect(rest)) {
                    Some(piece) if !piece.is_empty() => piece,
                    _ => break,
                };
                let end = piece.end().min(piece.start() + CHUNK_LEN);
                let piece = ByteRange::between(piece.start(), end);
                if !reads_zeros(data, piece).await.map_err(fail("read"))? {
                    let done = transfer::write_zeroes(data, piece, ZeroMode::PunchHole).await;
                    done.map_err(fail("zero a part of"))?;
                    zeroed += piece.len();
                }
                rest = ByteRange::between(end, rest.end());
            }
        }
        data.sync().await.map_err(fail("sync"))?;
        self.content.write(side).await.map_err(TakeoverError::New)?;
        progress.update(size, size)?;
        Ok(zeroed)
    }
}

/// Whether a piece of a file, at most [`CHUNK_LEN`] bytes, reads zeros.
async fn reads_zeros<S: Storage>(file: &S, piece: ByteRange) -> io::Result<bool> {
    let buffer = IoBuffer::zeroed(usize::try_from(piece.len()).map_err(io::Error::other)?);
    transfer::read_or_zero(file, piece.start(), buffer.clone()).await?;
    Ok(buffer.to_vec().iter().all(|&byte| byte == 0))
}

/// The runs of clusters below `clusters` that stand in the map as `flag` says.
fn runs(
    map: &AllocationMap,
    flag: bool,
    clusters: u64,
) -> impl Iterator<Item = std::ops::Range<u64>> + '_ {
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

/// The same bits for clusters that are larger than `from`.
fn widen(
    bits: &AllocationMap,
    from: ClusterSize,
    geometry: &BitmapGeometry,
) -> Result<AllocationMap, TakeoverError> {
    let wide = AllocationMap::empty(geometry).ok_or(TakeoverError::NoMemory)?;
    let (to, size) = (geometry.cluster_size(), geometry.virtual_size());
    for run in runs(bits, true, from.count(size)) {
        let start = from.start_of(run.start);
        let end = from.start_of(run.end).min(size);
        for at in [start, end] {
            if at != size && !at.is_multiple_of(to.bytes()) {
                let at = to.start_of(to.index(at));
                return Err(TakeoverError::Partial { from: from.bytes(), to: to.bytes(), at });
            }
        }
        wide.mark(to.touched(ByteRange::between(start, end)));
    }
    Ok(wide)
}
