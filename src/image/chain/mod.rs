//! Chains: read-only layers, of which each shows through where those above it have nothing.
//!
//! ```text
//!   layer 0  the disk that was named     add-cow: raw image + bitmap
//!   layer 1  its backing file            qcow2: tables, data in one or two files
//!   layer 2  that one's backing file     raw: every byte, at its own offset
//! ```
//!
//! An [`OpenChain`] is what all threads share: files, headers, bitmaps, mapping tables. A [`Chain`]
//! is one thread's handle on it, with that thread's storages. Each layer answers one question,
//! where the first bytes of a range are (`ChainLayer::first`). The walk down the layers, clipping
//! at the end of shorter ones, and reading are here, once for all formats.
//!
//! Promises: a range past the end of a layer reads zeros, whatever lies below that layer; what a
//! table in a file says is checked before it is followed (I8).
//!
//! Not here: opening and following names (`open`), how a format finds its bytes (a file for each),
//! writing, and the layers of a disk that is written (`image`).

mod cache;
pub mod open;
pub mod qcow2;
pub mod qed;

use std::cell::Cell;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::{StreamExt, stream};

use super::allocation::AllocationMap;
use super::{FileRole, ImageError};
use crate::format::{BitmapGeometry, Header, qcow2 as qcow2_format};
use crate::storage::host_file::HostFile;
use crate::storage::{IoBuffer, Storage, transfer};
use crate::units::{ByteRange, ClusterSize};
pub use open::ChainOptions;

/// The most layers of a chain, the disk itself included: far more than anybody stacks, and a bound
/// on the files and the memory that a disk can take (P7).
pub const MAX_LAYERS: usize = 64;

/// How many pieces of one request are read at the same time.
const PARALLEL_PIECES: usize = 16;

/// The format of a layer. Always told, by a person or by the layer above; never probed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskFormat {
    /// The disk's bytes and nothing else.
    Raw,
    /// An add-cow file, which names the other files.
    AddCow,
    /// A qcow2 file of version 2 or 3.
    Qcow2,
    /// A QED file.
    Qed,
}

impl DiskFormat {
    /// Every format, in the order in which they are shown.
    pub const ALL: [Self; 4] = [Self::Raw, Self::AddCow, Self::Qcow2, Self::Qed];

    /// The names of all formats, for messages.
    pub const NAMES: &'static str = "raw, add-cow, qcow2, qed";

    /// Its name, as headers and command lines have it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::AddCow => "add-cow",
            Self::Qcow2 => "qcow2",
            Self::Qed => "qed",
        }
    }

    /// The format of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }
}

impl fmt::Display for DiskFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An open chain: what all threads share. [`OpenChain::handle`] makes it usable.
#[derive(Debug)]
pub struct OpenChain {
    /// The layers from the top down; never empty.
    layers: Vec<Layer>,
}

impl OpenChain {
    /// Length of layer 0 in bytes; any number, since a raw file may end anywhere.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.layers.first().map_or(0, |layer| layer.virtual_size)
    }

    /// The layers from the top down; never empty.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// What is below layer 0, if there is anything.
    #[must_use]
    pub fn without_top(mut self) -> Option<Self> {
        let layers = self.layers.split_off(self.layers.len().min(1));
        (!layers.is_empty()).then_some(Self { layers })
    }

    /// Does `work` on the thread that reads the chain's tables, if it has one, and waits for it.
    ///
    /// # Errors
    /// What `work` says, or that it has panicked.
    pub async fn on_tables_thread(
        &self,
        work: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        let tables = self.layers.iter().find_map(|layer| match &layer.map {
            LayerMap::Qcow2(table) => Some(table),
            LayerMap::Raw | LayerMap::AddCow(_) | LayerMap::Qed(_) => None,
        });
        let Some(table) = tables else { return Ok(()) };
        table.on_thread(work).await?
    }

    /// A handle for one thread, whose storages `engine` makes.
    pub fn handle<S: Storage>(&self, engine: impl Fn(Arc<HostFile>) -> S) -> Chain<S> {
        Chain::new(self.layers.iter().map(|layer| ChainLayer {
            role: layer.role,
            virtual_size: layer.virtual_size,
            files: layer.files.iter().map(|file| engine(Arc::clone(file))).collect(),
            map: layer.map.clone(),
        }))
    }
}

/// One layer of an [`OpenChain`].
#[derive(Debug)]
pub struct Layer {
    /// Its name as it was looked up.
    path: PathBuf,
    /// What it is to the disk, for messages.
    role: FileRole,
    /// Its format.
    format: DiskFormat,
    /// Its length in bytes, as the layer above or a guest sees it.
    virtual_size: u64,
    /// The files that hold data; never empty.
    files: Vec<Arc<HostFile>>,
    /// The add-cow file.
    side: Option<Arc<HostFile>>,
    /// What its header says.
    details: LayerDetails,
    /// Where its bytes are.
    map: LayerMap,
}

/// What the header of a layer says, by format.
#[derive(Debug)]
pub enum LayerDetails {
    /// A raw image has none.
    Raw,
    /// What the add-cow file says.
    AddCow {
        /// Its header.
        header: Header,
        /// The shape of its bitmap.
        geometry: BitmapGeometry,
        /// How many clusters are in the raw image.
        allocated: u64,
    },
    /// The header of the qcow2 file.
    Qcow2(Box<qcow2_format::Header>),
    /// The header of the QED file, and the name of its backing file.
    Qed(qed::Opened),
}

impl Layer {
    /// Its name as it was looked up.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its format.
    #[must_use]
    pub fn format(&self) -> DiskFormat {
        self.format
    }

    /// Its length in bytes, as the layer above or a guest sees it; any number.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    /// All its files: first those with data, in the order in which [`PieceContent::Data`] counts
    /// them, then the add-cow file.
    pub fn files(&self) -> impl Iterator<Item = &Arc<HostFile>> {
        self.files.iter().chain(&self.side)
    }

    /// The file that was named: with the header, if the format has one.
    #[must_use]
    pub fn own_file(&self) -> &Arc<HostFile> {
        self.side.as_ref().unwrap_or(&self.files[0])
    }

    /// The file with the data that this layer has; if a qcow2 file has no other, that one.
    #[must_use]
    pub fn data_file(&self) -> &Arc<HostFile> {
        self.files.last().unwrap_or(&self.files[0])
    }

    /// What its header says.
    #[must_use]
    pub fn details(&self) -> &LayerDetails {
        &self.details
    }
}

/// Where a layer's bytes are. Shared by all threads.
#[derive(Debug, Clone)]
pub enum LayerMap {
    /// File 0 has all of them, at their own offsets.
    Raw,
    /// File 0, the raw image, has the allocated clusters, at their own offsets.
    AddCow(Arc<ClusterMap>),
    /// Where the tables of a qcow2 file say, in file 0 or in file 1, the external data file.
    Qcow2(Arc<qcow2::Table>),
    /// Where the tables of a QED file say, in file 0.
    Qed(Arc<qed::Table>),
}

/// Which clusters of an add-cow disk are in its raw image.
#[derive(Debug)]
pub struct ClusterMap {
    /// Size of a cluster.
    pub cluster_size: ClusterSize,
    /// The bits.
    pub allocation: AllocationMap,
}

/// What a layer says about the first bytes of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerPiece {
    /// How far the answer goes: starts where the range does, and is not empty.
    pub range: ByteRange,
    /// What is there; `None` when the layer has nothing and the next one is to be asked.
    pub content: Option<PieceContent>,
}

/// A piece of a chain whose bytes are all in one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChainPiece {
    /// Which bytes; never empty.
    pub range: ByteRange,
    /// Which layer says so, 0 for the top.
    pub depth: usize,
    /// Whether a layer has these bytes; if none has, they are zeros.
    pub present: bool,
    /// What is there.
    pub content: PieceContent,
}

/// Where the bytes of a piece are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PieceContent {
    /// In a file, as they are.
    Data {
        /// Which file of the layer, see [`Layer::files`].
        file: usize,
        /// Where in that file the piece starts, in bytes.
        offset: u64,
    },
    /// In a file, compressed.
    Compressed,
    /// Nowhere: they are known to be zeros.
    Zero,
}

/// One layer of a [`Chain`].
#[derive(Debug)]
pub struct ChainLayer<S> {
    /// What it is to the disk, for messages.
    role: FileRole,
    /// Its length in bytes.
    virtual_size: u64,
    /// This thread's storages of the files with data.
    files: Vec<S>,
    /// Where its bytes are.
    map: LayerMap,
}

impl<S> ChainLayer<S> {
    /// A raw image of `len` bytes.
    #[must_use]
    pub fn raw(storage: S, len: u64) -> Self {
        let (role, map) = (FileRole::Backing, LayerMap::Raw);
        Self { role, virtual_size: len, files: vec![storage], map }
    }

    /// An add-cow disk of `len` bytes whose raw image is `raw`.
    #[must_use]
    pub fn add_cow(raw: S, len: u64, map: Arc<ClusterMap>) -> Self {
        let (role, map) = (FileRole::Backing, LayerMap::AddCow(map));
        Self { role, virtual_size: len, files: vec![raw], map }
    }
}

/// One thread's handle on a chain.
///
/// Futures are not cancel safe: they must be driven to their end, as those of an
/// [`Image`](super::Image).
#[derive(Debug)]
pub struct Chain<S> {
    /// The layers from the top down; never empty.
    layers: Vec<ChainLayer<S>>,
}

impl<S: Storage> Chain<S> {
    /// A chain of these layers, from the top down.
    ///
    /// # Panics
    /// Without a layer.
    #[must_use]
    pub fn new(layers: impl IntoIterator<Item = ChainLayer<S>>) -> Self {
        let layers: Vec<_> = layers.into_iter().collect();
        assert!(!layers.is_empty(), "a chain has at least one layer");
        Self { layers }
    }

    /// The chain of one raw image of `len` bytes.
    #[must_use]
    pub fn raw(storage: S, len: u64) -> Self {
        Self::new([ChainLayer::raw(storage, len)])
    }

    /// Length of layer 0 in bytes; any number.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.layers[0].virtual_size
    }

    /// The storage that has every byte up to [`Chain::virtual_size`], at its own offset: the usual
    /// chain of one raw image, which needs no look-up.
    pub(super) fn as_raw(&self) -> Option<&S> {
        match self.layers.as_slice() {
            [ChainLayer { map: LayerMap::Raw, files, .. }] => files.first(),
            _ => None,
        }
    }

    /// Reads `data.len()` bytes from byte `offset`. Past the end of the chain there are zeros.
    ///
    /// # Errors
    /// `Io` if the host failed or a table makes no sense; the buffer's content is then unspecified.
    /// `OutOfRange` if the range does not fit in 64 bits.
    pub async fn read(&self, offset: u64, data: IoBuffer) -> Result<(), ImageError> {
        let Some(range) = ByteRange::new(offset, data.len() as u64) else {
            let (range, size) = (ByteRange::between(offset, offset), self.virtual_size());
            return Err(ImageError::OutOfRange { range, size });
        };
        if range.is_empty() {
            return Ok(());
        }
        let first = self.mapping(range).await?;
        if first.range == range {
            return self.read_piece(first, data).await;
        }
        // As in `Image::read`: every piece is driven to its end, whatever becomes of one of them.
        let failure = Cell::new(None);
        let part = |piece: ByteRange| {
            let start = usize::try_from(piece.start() - offset).unwrap_or(usize::MAX);
            data.slice(start, usize::try_from(piece.len()).unwrap_or(usize::MAX))
        };
        Box::pin(self.pieces(first, range.end()).for_each_concurrent(
            PARALLEL_PIECES,
            async |piece| {
                let result = match piece {
                    Ok(piece) => self.read_piece(piece, part(piece.range)).await,
                    Err(error) => Err(error),
                };
                if let Err(error) = result {
                    failure.set(Some(error));
                }
            },
        ))
        .await;
        failure.into_inner().map_or(Ok(()), Err)
    }

    /// The pieces from `first` on, up to `end`; an error is the last item.
    fn pieces(
        &self,
        first: ChainPiece,
        end: u64,
    ) -> impl stream::Stream<Item = Result<ChainPiece, ImageError>> {
        let next = move |start: Option<u64>| async move {
            let rest = ByteRange::between(start?, end);
            if rest.is_empty() {
                return None;
            }
            let piece = self.mapping(rest).await;
            let next = piece.as_ref().ok().map(|piece| piece.range.end());
            Some((piece, next))
        };
        let rest = stream::unfold(Some(first.range.end()), next);
        stream::iter([Ok(first)]).chain(rest)
    }

    /// Reads one piece of what [`Chain::mapping`] found.
    async fn read_piece(&self, piece: ChainPiece, data: IoBuffer) -> Result<(), ImageError> {
        let layer = &self.layers[piece.depth];
        match piece.content {
            PieceContent::Zero => {
                data.fill_zero();
                Ok(())
            }
            PieceContent::Data { file, offset } => {
                let at = ByteRange::between(offset, offset.saturating_add(piece.range.len()));
                let storage = layer.file(file, at)?;
                let result = if layer.may_end_early() {
                    transfer::read_or_zero(storage, offset, data).await
                } else {
                    // The layer ends where the file did when it was opened: one that has become
                    // shorter is an error, not zeros.
                    transfer::read_exact(storage, offset, data).await
                };
                result.map_err(ImageError::io("read", layer.role, at))
            }
            PieceContent::Compressed => layer.read_compressed(piece.range, data).await,
        }
    }

    /// The first piece of `range`, which must not be empty, as the formats tell it: holes in files
    /// are data. No payload is read.
    ///
    /// # Errors
    /// `Io` if a table cannot be read or makes no sense.
    pub async fn mapping(&self, range: ByteRange) -> Result<ChainPiece, ImageError> {
        let mut rest = range;
        let mut depth = 0;
        for (index, layer) in self.layers.iter().enumerate() {
            if rest.start() >= layer.virtual_size {
                break;
            }
            depth = index;
            let on_layer = rest.intersect(ByteRange::between(0, layer.virtual_size));
            let LayerPiece { range, content } = layer.first(on_layer).await?;
            if let Some(content) = content {
                return Ok(ChainPiece { range, depth, present: true, content });
            }
            rest = range;
        }
        Ok(ChainPiece { range: rest, depth, present: false, content: PieceContent::Zero })
    }

    /// The first piece of `range`, which must not be empty. Holes that the file system knows count
    /// as [`PieceContent::Zero`]. No payload is read.
    ///
    /// # Errors
    /// As [`Chain::mapping`].
    pub async fn piece(&self, range: ByteRange) -> Result<ChainPiece, ImageError> {
        let mut piece = self.mapping(range).await?;
        let PieceContent::Data { file, offset } = piece.content else { return Ok(piece) };
        let layer = &self.layers[piece.depth];
        let in_file = ByteRange::between(offset, offset.saturating_add(piece.range.len()));
        let data = layer
            .file(file, in_file)?
            .next_data(offset)
            .map_err(ImageError::io("find the holes of", layer.role, in_file))?
            .map(|data| data.intersect(in_file));
        let len = match data {
            Some(data) if data.start() == offset && !data.is_empty() => data.len(),
            Some(data) if data.start() > offset && data.start() < in_file.end() => {
                piece.content = PieceContent::Zero;
                data.start() - offset
            }
            // No data up to the end of the piece.
            _ => {
                piece.content = PieceContent::Zero;
                in_file.len()
            }
        };
        let start = piece.range.start();
        piece.range = ByteRange::between(start, start.saturating_add(len));
        Ok(piece)
    }
}

impl<S: Storage> ChainLayer<S> {
    /// The storage with that number, which a table has named.
    fn file(&self, index: usize, range: ByteRange) -> Result<&S, ImageError> {
        let file = self.files.get(index);
        file.ok_or_else(|| self.look_up_error(range)(io::ErrorKind::InvalidData.into()))
    }

    /// Makes an error of what a look-up in the layer's tables said.
    fn look_up_error(&self, range: ByteRange) -> impl FnOnce(io::Error) -> ImageError {
        ImageError::io("find clusters of", self.role, range)
    }

    /// What there is to say about the first bytes of `range`, which is not empty and lies on the
    /// layer.
    async fn first(&self, range: ByteRange) -> Result<LayerPiece, ImageError> {
        let here = PieceContent::Data { file: 0, offset: range.start() };
        match &self.map {
            LayerMap::Raw => Ok(LayerPiece { range, content: Some(here) }),
            LayerMap::AddCow(map) => {
                let (allocated, end) = map.allocation.run(map.cluster_size.touched(range));
                let end = map.cluster_size.start_of(end).min(range.end());
                let range = ByteRange::between(range.start(), end);
                Ok(LayerPiece { range, content: allocated.then_some(here) })
            }
            LayerMap::Qcow2(table) => table.first(range).await.map_err(self.look_up_error(range)),
            LayerMap::Qed(table) => {
                let file = self.file(0, range)?;
                table.first(file, range).await.map_err(self.look_up_error(range))
            }
        }
    }

    /// Reads `range` of the layer, which is compressed.
    async fn read_compressed(&self, range: ByteRange, data: IoBuffer) -> Result<(), ImageError> {
        let result = match &self.map {
            LayerMap::Qcow2(table) => table.read_compressed(range, &data).await,
            // No other format says that anything is.
            LayerMap::Raw | LayerMap::AddCow(_) | LayerMap::Qed(_) => {
                Err(io::ErrorKind::InvalidData.into())
            }
        };
        result.map_err(ImageError::io("read compressed clusters of", self.role, range))
    }

    /// Whether a file of the layer may end before its data does, which then reads zeros: QEMU
    /// leaves files that end inside their last cluster.
    fn may_end_early(&self) -> bool {
        match self.map {
            LayerMap::Raw | LayerMap::AddCow(_) | LayerMap::Qed(_) => false,
            LayerMap::Qcow2(_) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::block_on;
    use crate::storage::sim::{SimDisk, SimStorage};

    /// An add-cow layer of `len` bytes in clusters of 512 bytes, of which `clusters` hold `byte`.
    fn overlay(disk: &SimDisk, len: u64, byte: u8, clusters: &[u64]) -> ChainLayer<SimStorage> {
        let cluster_size = ClusterSize::from_bits(9).unwrap();
        let geometry = BitmapGeometry::new(cluster_size, len).unwrap();
        let allocation = AllocationMap::empty(&geometry).unwrap();
        clusters.iter().for_each(|&cluster| allocation.mark(cluster..cluster + 1));
        let raw = disk.create(&vec![byte; usize::try_from(len).unwrap()]);
        let map = Arc::new(ClusterMap { cluster_size, allocation });
        ChainLayer::add_cow(raw, len, map)
    }

    /// Three layers: the middle one is the shortest, and hides what the base has behind its end.
    fn three_layers() -> Chain<SimStorage> {
        let disk = SimDisk::new(1);
        let base = disk.create(&[b'0'; 4000]);
        Chain::new([
            overlay(&disk, 3072, b'2', &[1]),
            overlay(&disk, 2048, b'1', &[1, 3]),
            ChainLayer::raw(base, 4000),
        ])
    }

    #[test]
    fn a_layer_that_ends_early_hides_what_lies_below_its_end() {
        let chain = three_layers();
        let data = IoBuffer::from_bytes(&[0xee; 4096]);
        block_on(chain.read(0, data.clone())).unwrap();
        let sectors = [b'0', b'2', b'0', b'1', 0, 0, 0, 0];
        let expected: Vec<u8> = sectors.iter().flat_map(|&byte| [byte; 512]).collect();
        assert_eq!(data.to_vec(), expected);
    }

    #[test]
    fn pieces_tell_who_has_the_bytes() {
        let chain = three_layers();
        let mut found = Vec::new();
        let mut rest = ByteRange::between(0, 4096);
        while !rest.is_empty() {
            let piece = block_on(chain.mapping(rest)).unwrap();
            found.push((piece.range.end(), piece.depth, piece.present));
            rest = ByteRange::between(piece.range.end(), 4096);
        }
        let expected = [
            (512, 2, true),
            (1024, 0, true),
            (1536, 2, true),
            (2048, 1, true),
            (3072, 0, false),
            (4096, 0, false),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_raw_image_that_became_shorter_is_an_error_and_not_zeros() {
        let disk = SimDisk::new(1);
        let storage = disk.create(&[7; 1024]);
        let chain = Chain::raw(storage.clone(), 1024);
        storage.set_len(600).unwrap();
        let data = IoBuffer::zeroed(1024);
        assert!(matches!(block_on(chain.read(0, data)), Err(ImageError::Io { .. })));
    }
}
