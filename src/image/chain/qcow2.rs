//! The qcow2 layer: where a qcow2 file has its bytes.
//!
//! Our own parser (`format::qcow2`) reads the header first and refuses what cannot be read; then
//! imago looks clusters up and inflates compressed ones. It gets files that we have opened, and
//! never opens one itself: neither a backing file (its place in the chain is ours to find) nor a
//! data file. Clusters that are stored as they are, it never touches: they go from the file to the
//! request through the queue's own engine, as everything else does.
//!
//! imago blocks, so it is asked only on a `Helper`, one for all qcow2 layers of a chain. Its
//! answers are kept, a region of the disk at a time (`REGIONS_BOUND`), and so are inflated
//! clusters (`CLUSTERS_BOUND`), since imago inflates a whole cluster whatever part of it is
//! wanted. Besides, imago itself holds each layer's L1 table and up to 128 of its L2 tables, which
//! have a cluster each.
//!
//! Relies on nobody writing to the file while it is a backing file: tables are not read again.
//!
//! Not here: internal snapshots (the present state of the disk does not depend on them), writing.

use std::io;
use std::sync::Arc;

use imago::file::File;
use imago::format::drivers::FormatDriverInstance;
use imago::qcow2::Qcow2;
use imago::{ShallowMapping, StorageOpenOptions};

use super::cache::Cache;
use super::{LayerPiece, PieceContent};
use crate::executor::block_on;
use crate::format::qcow2::header::PREFIX_LEN;
use crate::format::qcow2::{Header, Qcow2Error};
use crate::helper::{Helper, guarded};
use crate::storage::file::FileStorage;
use crate::storage::host_file::HostFile;
use crate::storage::{IoBuffer, transfer};
use crate::units::{ByteRange, ClusterSize};

/// The most clusters of a region: 32 MiB of disk with clusters of 64 KiB.
const REGION_CLUSTERS: u64 = 512;

/// The most runs that are kept for a chain: 8 MiB of memory, at [`RUN_LEN`] bytes each. A disk that
/// was written from front to back has a few runs per region, one written at random up to one per
/// cluster.
const REGIONS_BOUND: u64 = (8 << 20) / RUN_LEN;

/// Bytes of a run in memory.
const RUN_LEN: u64 = size_of::<Run>() as u64;

/// What a region costs besides its runs, counted in runs.
const REGION_OVERHEAD: u64 = 4;

/// The most bytes of inflated clusters that are kept for a chain: 256 clusters of 64 KiB, or 8 of
/// 2 MiB.
const CLUSTERS_BOUND: u64 = 16 << 20;

/// What the qcow2 layers of a chain have in common.
#[derive(Debug)]
pub struct Shared {
    /// The thread that may ask imago.
    helper: Helper,
    /// The regions looked up lately, by layer and number.
    regions: Cache<(usize, u64), Region>,
    /// The compressed clusters read lately, inflated, by layer and number.
    clusters: Cache<(usize, u64), Arc<Vec<u8>>>,
}

impl Shared {
    /// Starts the thread. Nothing is known yet.
    ///
    /// # Errors
    /// That the host has no thread for us.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            helper: Helper::start("tables")?,
            regions: Cache::new(REGIONS_BOUND),
            clusters: Cache::new(CLUSTERS_BOUND),
        })
    }
}

/// Where the bytes of one qcow2 file are. Shared by all threads.
#[derive(Debug)]
pub struct Table {
    /// imago's view of the file.
    image: Qcow2<File>,
    /// What this layer shares with the others of its chain.
    shared: Arc<Shared>,
    /// Its number in the chain.
    layer: usize,
    /// Virtual size in bytes.
    size: u64,
    /// Size of a cluster.
    cluster_size: ClusterSize,
    /// Whether data is in an external file, where each cluster is at its own offset.
    external: bool,
    /// Bytes in a region: a power of two, and within the reach of one L2 table.
    region_len: u64,
}

impl Table {
    /// Does `work` on the thread that this layer shares with the others of its chain.
    ///
    /// # Errors
    /// That it has panicked.
    pub async fn on_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        self.shared.helper.run(work).await
    }
}

/// Where the bytes of one part of the disk are.
#[derive(Debug)]
struct Region {
    /// The runs, in order, from the first byte of the region on without a gap; never empty.
    runs: Box<[Run]>,
    /// Where the last one ends.
    end: u64,
}

/// A range of the disk whose bytes are in one place.
#[derive(Debug, Clone, Copy)]
struct Run {
    /// Its first byte. It ends where the next one starts.
    start: u64,
    /// Where its bytes are.
    place: Place,
}

/// Where bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Not here: ask the next layer.
    Below,
    /// They are zeros.
    Zero,
    /// In compressed clusters.
    Compressed,
    /// In the file with the data, from this offset on.
    Data(u64),
}

impl Region {
    /// What there is to say about the first bytes of `range`, which starts in this region.
    fn first(&self, range: ByteRange, file: usize) -> LayerPiece {
        let next = self.runs.partition_point(|run| run.start <= range.start());
        let run = self.runs[next.saturating_sub(1)];
        let end = self.runs.get(next).map_or(self.end, |next| next.start);
        let content = match run.place {
            Place::Below => None,
            Place::Zero => Some(PieceContent::Zero),
            Place::Compressed => Some(PieceContent::Compressed),
            Place::Data(offset) => {
                Some(PieceContent::Data { file, offset: offset + (range.start() - run.start) })
            }
        };
        LayerPiece { range: ByteRange::between(range.start(), end.min(range.end())), content }
    }
}

/// Reads the header of a qcow2 file, and refuses one that cannot be read as a layer.
///
/// # Errors
/// What the host said.
pub fn header(file: &Arc<HostFile>) -> io::Result<Result<Header, Qcow2Error>> {
    let storage = FileStorage::new(Arc::clone(file));
    let read = |len: usize| {
        let buffer = IoBuffer::zeroed(len);
        let got = block_on(transfer::read_up_to(&storage, 0, buffer.clone()))?;
        Ok::<_, io::Error>(buffer.slice(0, got).to_vec())
    };
    let area_len = match Header::area_len(&read(PREFIX_LEN)?) {
        // One cluster: 2 MiB at most.
        Ok(len) => usize::try_from(len).map_err(io::Error::other)?,
        Err(error) => return Ok(Err(error)),
    };
    let header = Header::decode(&read(area_len)?);
    Ok(header.and_then(|header| header.check_readable().map(|()| header)))
}

impl Table {
    /// The table of the file `metadata` with that header, which has passed its checks, as layer
    /// `layer` of its chain. `data` is the external data file, if it has one. Both are open through
    /// the page cache.
    ///
    /// # Errors
    /// What the host or imago said.
    pub fn open(
        metadata: &HostFile,
        data: Option<&HostFile>,
        header: &Header,
        layer: usize,
        shared: Arc<Shared>,
    ) -> io::Result<Self> {
        // Neither asks for direct I/O: imago then takes the file as it is, without trying out what
        // it can do.
        let storage = |file: &HostFile| {
            File::from_open_file(file.file().try_clone()?, StorageOpenOptions::new())
        };
        let (metadata, data) = (storage(metadata)?, data.map(storage).transpose()?);
        let external = data.is_some();
        let image = guarded(|| {
            let mut image = Qcow2::open_image(metadata, false)?;
            image.set_data_file(data);
            image.set_backing(None);
            Ok::<_, io::Error>(image)
        })??;
        let cluster_size = header.cluster_size;
        Ok(Self {
            image,
            shared,
            layer,
            size: header.virtual_size(),
            cluster_size,
            external,
            region_len: header.l2_reach().min(REGION_CLUSTERS * cluster_size.bytes()),
        })
    }

    /// The number of the file with the data, among those of the layer.
    fn data_file(&self) -> usize {
        usize::from(self.external)
    }

    /// What there is to say about the first bytes of `range`, which is not empty and lies on the
    /// disk.
    ///
    /// # Errors
    /// The tables cannot be read, or make no sense.
    pub async fn first(self: &Arc<Self>, range: ByteRange) -> io::Result<LayerPiece> {
        if let Some(piece) = self.known(range) {
            return Ok(piece);
        }
        let table = Arc::clone(self);
        self.shared.helper.run(move || table.look_up(range)).await?
    }

    /// What is kept about the first bytes of `range`.
    fn known(&self, range: ByteRange) -> Option<LayerPiece> {
        let number = range.start() / self.region_len;
        self.shared
            .regions
            .get((self.layer, number), |region| region.first(range, self.data_file()))
    }

    /// The same as [`Table::first`], on the helper.
    fn look_up(&self, range: ByteRange) -> io::Result<LayerPiece> {
        // Another request may have asked for this region just before.
        if let Some(piece) = self.known(range) {
            return Ok(piece);
        }
        let number = range.start() / self.region_len;
        let start = number * self.region_len;
        let end = start.saturating_add(self.region_len).min(self.size);
        let Ok(region) = self.runs(ByteRange::between(start, end)) else {
            // A fault somewhere in the region must fail only those who ask for that cluster. It is
            // not kept: it may have been the host's, and pass.
            let cluster = self.cluster_size.index(range.start());
            let end = range.end().min(self.cluster_size.start_of(cluster + 1));
            let (place, len) = self.mapping(range.start(), end - range.start())?;
            let runs = Box::new([Run { start: range.start(), place }]);
            let region = Region { runs, end: range.start() + len };
            return Ok(region.first(range, self.data_file()));
        };
        let piece = region.first(range, self.data_file());
        let weight = region.runs.len() as u64 + REGION_OVERHEAD;
        self.shared.regions.insert((self.layer, number), region, weight);
        Ok(piece)
    }

    /// The runs of a range, which is not empty and in one region.
    fn runs(&self, range: ByteRange) -> io::Result<Region> {
        let mut runs: Vec<Run> = Vec::new();
        let mut start = range.start();
        while start < range.end() {
            let (place, len) = self.mapping(start, range.end() - start)?;
            let goes_on = runs.last().is_some_and(|last| match (last.place, place) {
                (Place::Data(before), Place::Data(now)) => before + (start - last.start) == now,
                (before, now) => before == now,
            });
            if !goes_on {
                runs.push(Run { start, place });
            }
            start += len;
        }
        Ok(Region { runs: runs.into_boxed_slice(), end: range.end() })
    }

    /// Where the bytes from `start` on are, and how many of the next `len` are there too: at least
    /// one.
    fn mapping(&self, start: u64, len: u64) -> io::Result<(Place, u64)> {
        let (mapping, found) = self.image.get_mapping(start, len)?;
        let place = match mapping {
            ShallowMapping::Raw { offset, .. } => Place::Data(offset),
            ShallowMapping::Zero { explicit: true, .. } => Place::Zero,
            ShallowMapping::Zero { explicit: false, .. } => Place::Below,
            ShallowMapping::Special { .. } => Place::Compressed,
            // It was given no backing file, and the range is on the disk.
            _ => return Err(nonsense("a mapping of no kind")),
        };
        // The format's rules for external data files: each cluster is at its own offset there, and
        // none is compressed.
        let misplaced = match place {
            Place::Data(offset) => self.external && offset != start,
            Place::Compressed => self.external,
            Place::Below | Place::Zero => false,
        };
        if misplaced {
            return Err(nonsense("a cluster is not at its own offset of the external data file"));
        }
        match found.min(len) {
            0 => Err(nonsense("a mapping of no length")),
            found => Ok((place, found)),
        }
    }

    /// Reads `range`, which lies in compressed clusters, into `data`.
    ///
    /// # Errors
    /// The file cannot be read, or does not inflate.
    pub async fn read_compressed(
        self: &Arc<Self>,
        range: ByteRange,
        data: &IoBuffer,
    ) -> io::Result<()> {
        let size = self.cluster_size;
        let mut done = 0;
        for cluster in size.touched(range) {
            let bytes = self.inflated(cluster).await?;
            let start = size.start_of(cluster);
            let part = range.intersect(ByteRange::between(start, start + size.bytes()));
            let skip = usize::try_from(part.start() - start).map_err(io::Error::other)?;
            let len = usize::try_from(part.len()).map_err(io::Error::other)?;
            data.copy_from(done, &bytes[skip..skip + len]);
            done += len;
        }
        Ok(())
    }

    /// The bytes of a compressed cluster.
    async fn inflated(self: &Arc<Self>, cluster: u64) -> io::Result<Arc<Vec<u8>>> {
        if let Some(bytes) = self.shared.clusters.get((self.layer, cluster), Arc::clone) {
            return Ok(bytes);
        }
        let table = Arc::clone(self);
        self.shared.helper.run(move || table.inflate(cluster)).await?
    }

    /// The same as [`Table::inflated`], on the helper.
    fn inflate(&self, cluster: u64) -> io::Result<Arc<Vec<u8>>> {
        if let Some(bytes) = self.shared.clusters.get((self.layer, cluster), Arc::clone) {
            return Ok(bytes);
        }
        let len = usize::try_from(self.cluster_size.bytes()).map_err(io::Error::other)?;
        let mut bytes = vec![0; len];
        self.image.readv_special((&mut bytes).into(), self.cluster_size.start_of(cluster))?;
        let bytes = Arc::new(bytes);
        self.shared.clusters.insert(
            (self.layer, cluster),
            Arc::clone(&bytes),
            self.cluster_size.bytes(),
        );
        Ok(bytes)
    }
}

/// The error for a table that says what cannot be.
fn nonsense(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_answers_up_to_where_its_next_run_starts() {
        let run = |start, place| Run { start, place };
        let runs = [
            run(1024, Place::Below),
            run(2048, Place::Data(1 << 20)),
            run(4096, Place::Compressed),
        ];
        let region = Region { runs: Box::new(runs), end: 5000 };
        let first = |start, end| {
            let LayerPiece { range, content } = region.first(ByteRange::between(start, end), 1);
            assert_eq!(range.start(), start);
            (range.end(), content)
        };
        let data = |offset| Some(PieceContent::Data { file: 1, offset });
        assert_eq!(first(1024, 9000), (2048, None));
        assert_eq!(first(2047, 9000), (2048, None));
        assert_eq!(first(2048, 9000), (4096, data(1 << 20)));
        assert_eq!(first(2050, 2060), (2060, data((1 << 20) + 2)));
        assert_eq!(first(4096, 9000), (5000, Some(PieceContent::Compressed)));
    }
}
