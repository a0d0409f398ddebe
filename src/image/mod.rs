//! The copy-on-write core: a disk made of a raw image, an add-cow file and a backing file.
//!
//! ```text
//!   read                       write                        flush
//!    | resolve (extent)         | lock clusters (I5)         | freeze the new bits
//!    |  Data    -> raw image    | fill what is not covered   | sync the raw image
//!    |  Backing -> its chain     | write data to raw image    | write the bits
//!    |  Zero    -> zeros        | mark the clusters          | sync the add-cow file
//! ```
//!
//! Knows nothing of virtio, sockets or command lines. Runs on any [`Storage`]: an [`ImageState`] is
//! shared by all threads, an [`Image`] is one thread's handle on it with that thread's storages.
//!
//! # Invariants
//!
//! * **I1** A bit that is 1 on stable storage means that the raw image durably holds the whole
//!   cluster.
//! * **I2** The raw image's bytes of an unallocated cluster mean nothing and are never shown.
//! * **I3** While an image is open for a guest, bits go from 0 to 1 only. So any subset of a torn
//!   write of bitmap pages is valid.
//! * **I4** FLUSH: freeze the set of new bits; sync the raw image; write those bits; sync the
//!   add-cow file; answer. Bits that appear meanwhile belong to the next flush. Concurrent flushes
//!   share one pass. No new bits: one sync and no metadata write.
//! * **I5** Two requests never allocate the same cluster at once. Guest data always wins over
//!   copied data.
//! * **I6** A failed sync is final for this open image.
//! * **I7** New bits outlive the process without reaching the add-cow file early: see [`journal`].
//! * **I8** No byte from a guest, a front end or an image file can cause a panic, a hang, or
//!   unbounded memory.
//!
//! # States of an open image
//!
//! ```text
//!   Open --sync fails--> Failed: reads go on, everything else is refused until it is reopened
//! ```

pub mod allocation;
pub mod chain;
pub mod check;
pub mod cluster_lock;
pub mod create;
pub mod error;
pub mod extent;
pub mod flush;
pub mod inspect;
pub mod journal;
pub mod load;
pub mod map;
pub mod open;
pub mod populate;
mod read;
pub mod session;
mod write;
mod zero;

use std::sync::Arc;

use crate::format::BitmapGeometry;
use crate::storage::Storage;
use crate::storage::budget::MemoryBudget;
use crate::units::{ByteRange, ClusterSize, SECTOR_SIZE};
use allocation::AllocationMap;
use chain::Chain;
use cluster_lock::ClusterLocks;
pub use error::{FileRole, ImageError, OpenError};
use flush::FlushBarrier;
use journal::BitJournal;

/// What all threads share of an open image.
#[derive(Debug)]
pub struct ImageState {
    /// The guest-visible size in bytes, a multiple of 512.
    virtual_size: u64,
    /// Size of a cluster.
    cluster_size: ClusterSize,
    /// Where the bitmap lies in the side file; `None` without a side file.
    geometry: Option<BitmapGeometry>,
    /// Length of the backing chain in bytes; 0 without one. It may be any number.
    backing_len: u64,
    /// Whether the image may be changed.
    writable: bool,
    /// Which clusters are in the raw image.
    allocation: AllocationMap,
    /// Who allocates which clusters now.
    locks: ClusterLocks,
    /// Flushes, one at a time.
    barrier: FlushBarrier,
    /// Memory for what writes leave out of new clusters.
    fills: MemoryBudget,
}

/// Bytes of clusters that requests of all queues fill in at the same time: 4 of the largest
/// requests (two clusters of 2 MiB), 128 with clusters of 64 KiB.
const FILL_BUDGET: u32 = 16 << 20;

impl ImageState {
    /// The state of an add-cow disk.
    #[must_use]
    pub fn add_cow(
        geometry: BitmapGeometry,
        allocation: AllocationMap,
        backing_len: u64,
        writable: bool,
    ) -> Self {
        Self {
            virtual_size: geometry.virtual_size(),
            cluster_size: geometry.cluster_size(),
            geometry: Some(geometry),
            backing_len,
            writable,
            allocation,
            locks: ClusterLocks::default(),
            barrier: FlushBarrier::default(),
            fills: MemoryBudget::new(FILL_BUDGET),
        }
    }

    /// The state of a plain raw image of `len` bytes: every cluster allocated, no side file.
    #[must_use]
    pub fn raw(len: u64, writable: bool) -> Self {
        Self {
            virtual_size: len - len % SECTOR_SIZE,
            // Only the granularity of discards: the block size of common file systems.
            cluster_size: ClusterSize::from_bits(12).expect("4 KiB is in range"),
            geometry: None,
            backing_len: 0,
            writable,
            allocation: AllocationMap::all(),
            locks: ClusterLocks::default(),
            barrier: FlushBarrier::default(),
            fills: MemoryBudget::new(FILL_BUDGET),
        }
    }

    /// The guest-visible size in bytes, a multiple of 512.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    /// Size of a cluster; for a plain raw image the granularity of discards.
    #[must_use]
    pub fn cluster_size(&self) -> ClusterSize {
        self.cluster_size
    }

    /// How many clusters have a bit; 0 if all are allocated for good.
    #[must_use]
    pub fn clusters(&self) -> u64 {
        self.geometry.filter(|_| !self.allocation.is_all()).map_or(0, |all| all.clusters())
    }

    /// Whether the image may be changed.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Which clusters are in the raw image.
    #[must_use]
    pub fn allocation(&self) -> &AllocationMap {
        &self.allocation
    }

    /// The bytes of the clusters `range`, cut at the end of the disk.
    fn bytes_of(&self, clusters: &std::ops::Range<u64>) -> ByteRange {
        let end = self.cluster_size.start_of(clusters.end).min(self.virtual_size);
        ByteRange::between(self.cluster_size.start_of(clusters.start), end)
    }

    /// The range of `len` bytes at `offset`, if it lies on the disk.
    fn check_range(&self, offset: u64, len: u64) -> Result<ByteRange, ImageError> {
        let out = |range| ImageError::OutOfRange { range, size: self.virtual_size };
        match ByteRange::new(offset, len) {
            Some(range) if range.end() <= self.virtual_size => Ok(range),
            Some(range) => Err(out(range)),
            None => Err(out(ByteRange::between(offset, offset))),
        }
    }

    /// Whether the image takes changes: writable, and no sync has failed.
    fn check_writable(&self) -> Result<(), ImageError> {
        if !self.writable {
            return Err(ImageError::ReadOnly);
        }
        self.barrier.check()
    }
}

/// One thread's handle on an open image.
///
/// The five verbs, [`Image::read`], [`Image::write`], [`Image::write_zeroes`], [`Image::discard`]
/// and [`Image::flush`], take `&self` and may run concurrently, also against handles of other
/// threads. None of them is cancel safe: a future must be driven to its end, or the cluster locks
/// would go while the host still writes. Whoever drives them drains before it stops.
#[derive(Debug)]
pub struct Image<S> {
    /// What all threads share.
    state: Arc<ImageState>,
    /// The raw image.
    raw: S,
    /// The side file; `None` for a plain raw image.
    side: Option<S>,
    /// The backing chain, if there is one and it is needed.
    backing: Option<Chain<S>>,
    /// Where new bits are noted for the process after this one; `None` if there is none to be.
    journal: Option<Arc<BitJournal>>,
}

impl<S: Storage> Image<S> {
    /// A handle on `state` with this thread's storages.
    #[must_use]
    pub fn new(state: Arc<ImageState>, raw: S, side: Option<S>, backing: Option<Chain<S>>) -> Self {
        Self { state, raw, side, backing, journal: None }
    }

    /// The same handle; what it allocates is noted in `journal`.
    #[must_use]
    pub fn with_journal(self, journal: Option<Arc<BitJournal>>) -> Self {
        Self { journal, ..self }
    }

    /// What all threads share.
    #[must_use]
    pub fn state(&self) -> &Arc<ImageState> {
        &self.state
    }
}
