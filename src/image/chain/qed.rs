//! The QED layer: where a QED file has its bytes.
//!
//! Tables are read through the queue's own engine, as data is. The L1 table is held in memory, as
//! far as it maps the disk; of the L2 tables a piece is read at a time (`PIECE_ENTRIES`), and
//! pieces read lately are kept, for all QED layers of a chain together (`PIECES_BOUND`).
//!
//! Relies on nobody writing to the file while it is a backing file: tables are not read again. A
//! file that was not closed cleanly is refused with its header.
//!
//! Not here: what the entries mean (`format::qed`), writing, repairing.

use std::io;
use std::sync::Arc;

use super::cache::Cache;
use super::{LayerPiece, PieceContent};
use crate::executor::block_on;
use crate::format::FileName;
use crate::format::qed::{Cluster, ENTRY_LEN, HEADER_LEN, Header, QedError, decode_table};
use crate::storage::file::FileStorage;
use crate::storage::host_file::HostFile;
use crate::storage::{IoBuffer, Storage, transfer};
use crate::units::ByteRange;

/// Entries of an L2 table that are read at once: 16 KiB, which map 128 MiB of disk with clusters of
/// 64 KiB. A table may have 2^27 entries; one of the smallest has 512.
const PIECE_ENTRIES: u64 = 2048;

/// The most entries of L2 tables that are kept for a chain: 8 MiB, which map 64 GiB of disk with
/// clusters of 64 KiB.
const PIECES_BOUND: u64 = (8 << 20) / ENTRY_LEN;

/// How much of the L1 table is read at once, in bytes.
const L1_CHUNK_LEN: u64 = 1 << 20;

/// A part of an L2 table.
type Piece = Box<[u64]>;

/// What the QED layers of a chain have in common.
#[derive(Debug)]
pub struct Shared {
    /// The pieces of L2 tables read lately, by layer and number.
    pieces: Cache<(usize, u64), Piece>,
}

impl Shared {
    /// Nothing is known yet.
    #[must_use]
    pub fn new() -> Self {
        Self { pieces: Cache::new(PIECES_BOUND) }
    }
}

impl Default for Shared {
    fn default() -> Self {
        Self::new()
    }
}

/// Where the bytes of one QED file are. Shared by all threads.
#[derive(Debug)]
pub struct Table {
    /// The file's header.
    header: Header,
    /// The file's length in bytes when it was opened.
    file_len: u64,
    /// Where each L2 table is, in bytes; 0: there is none. Checked.
    l1: Box<[u64]>,
    /// What this layer shares with the others of its chain.
    shared: Arc<Shared>,
    /// Its number in the chain.
    layer: usize,
}

/// What a QED file says about itself, and what stands below it.
#[derive(Debug)]
pub struct Opened {
    /// Its header.
    pub header: Header,
    /// The name of its backing file, if there is one.
    pub backing: Option<FileName>,
}

/// Reads the header of a QED file, and refuses what cannot be read.
///
/// # Errors
/// The outer one if the host failed, the inner one if the file is not sound, or not supported.
pub fn header(file: &Arc<HostFile>) -> io::Result<Result<Opened, QedError>> {
    let storage = FileStorage::new(Arc::clone(file));
    block_on(read_header(&storage))
}

/// The same for any storage.
async fn read_header<S: Storage>(file: &S) -> io::Result<Result<Opened, QedError>> {
    let bytes = read_up_to(file, ByteRange::between(0, HEADER_LEN as u64)).await?;
    let header = match Header::decode(&bytes) {
        Ok(header) => header,
        Err(error) => return Ok(Err(error)),
    };
    let Some(place) = header.backing_name() else {
        return Ok(Ok(Opened { header, backing: None }));
    };
    // At most 1023 bytes.
    let bytes = read_up_to(file, place).await?;
    if (bytes.len() as u64) < place.len() {
        let end = place.start() + bytes.len() as u64;
        let len = usize::try_from(end).map_err(io::Error::other)?;
        return Ok(Err(QedError::Truncated { len, needed: place.end() }));
    }
    Ok(Header::decode_name(&bytes).map(|name| Opened { header, backing: Some(name) }))
}

/// Reads a small range of a file, or as much of it as there is.
async fn read_up_to<S: Storage>(file: &S, range: ByteRange) -> io::Result<Vec<u8>> {
    let buffer = IoBuffer::zeroed(usize::try_from(range.len()).map_err(io::Error::other)?);
    let got = transfer::read_up_to(file, range.start(), buffer.clone()).await?;
    Ok(buffer.slice(0, got).to_vec())
}

/// Reads the entries of a part of a table.
async fn read_entries<S: Storage>(file: &S, place: ByteRange) -> io::Result<Vec<u64>> {
    let buffer = IoBuffer::zeroed(usize::try_from(place.len()).map_err(io::Error::other)?);
    transfer::read_exact(file, place.start(), buffer.clone()).await?;
    Ok(decode_table(&buffer.to_vec()).collect())
}

impl Table {
    /// The tables of `file` with that header, as layer `layer` of its chain.
    ///
    /// # Errors
    /// The outer one if the host failed, the inner one if a table lies where none can.
    pub async fn open<S: Storage>(
        file: &S,
        header: Header,
        layer: usize,
        shared: Arc<Shared>,
    ) -> io::Result<Result<Self, QedError>> {
        let file_len = file.file_len()?;
        let mut rest = match header.l1_place(file_len) {
            Ok(place) => place,
            Err(error) => return Ok(Err(error)),
        };
        let mut l1 = Vec::new();
        while !rest.is_empty() {
            let end = rest.end().min(rest.start() + L1_CHUNK_LEN);
            for entry in read_entries(file, ByteRange::between(rest.start(), end)).await? {
                match header.l2_place(entry, file_len) {
                    Ok(place) => l1.push(place.unwrap_or(0)),
                    Err(error) => return Ok(Err(error)),
                }
            }
            rest = ByteRange::between(end, rest.end());
        }
        let l1 = l1.into_boxed_slice();
        if let Err(error) = check_distinct(&l1, header.table_len()) {
            return Ok(Err(error));
        }
        Ok(Ok(Self { header, file_len, l1, shared, layer }))
    }

    /// What there is to say about the first bytes of `range`, which is not empty and lies on the
    /// disk. `file` is the QED file.
    ///
    /// # Errors
    /// What the host said; `InvalidData` if an entry cannot be.
    pub async fn first<S: Storage>(&self, file: &S, range: ByteRange) -> io::Result<LayerPiece> {
        let reach = self.header.l2_reach();
        let index = range.start() / reach;
        let table = self.l2_table(index);
        if table == 0 {
            // As far as there is none: a sparse disk is one piece.
            let mut next = index + 1;
            while next * reach < range.end() && self.l2_table(next) == 0 {
                next += 1;
            }
            return Ok(piece(range, next * reach, None));
        }
        let number = range.start() / self.header.cluster_size() / self.piece_entries();
        let key = (self.layer, number);
        let known = self.shared.pieces.get(key, |entries| self.look_up(entries, range));
        if let Some(result) = known {
            return result;
        }
        let len = self.piece_entries();
        let start = table + number * len % self.header.table_entries() * ENTRY_LEN;
        let place = ByteRange::between(start, start + len * ENTRY_LEN);
        let entries = read_entries(file, place).await?.into_boxed_slice();
        let result = self.look_up(&entries, range);
        self.shared.pieces.insert(key, entries, len);
        result
    }

    /// Where L2 table `index` is; 0 if there is none, or it is past the end of the disk.
    fn l2_table(&self, index: u64) -> u64 {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        self.l1.get(index).copied().unwrap_or(0)
    }

    /// Entries of a piece: a power of two, as those of a table are, so that no piece has entries of
    /// two tables.
    fn piece_entries(&self) -> u64 {
        PIECE_ENTRIES.min(self.header.table_entries())
    }

    /// What the piece of an L2 table that maps the first byte of `range` says about it.
    fn look_up(&self, entries: &[u64], range: ByteRange) -> io::Result<LayerPiece> {
        let cluster_size = self.header.cluster_size();
        let cluster = range.start() / cluster_size;
        let first = usize::try_from(cluster % self.piece_entries()).unwrap_or(usize::MAX);
        let mut run = entries.iter().skip(first).map(|&entry| {
            let cluster = self.header.cluster(entry, self.file_len);
            cluster.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
        });
        let content = run.next().ok_or(io::ErrorKind::InvalidData)??;
        let mut count = 1;
        let mut end = (cluster + 1) * cluster_size;
        while end < range.end() {
            // What is wrong with a later entry is said when that is asked for.
            let Some(Ok(next)) = run.next() else { break };
            let expected = match content {
                Cluster::Data { offset } => Cluster::Data { offset: offset + count * cluster_size },
                other => other,
            };
            if next != expected {
                break;
            }
            count += 1;
            end += cluster_size;
        }
        let within = range.start() % cluster_size;
        let content = match content {
            Cluster::Unallocated => None,
            Cluster::Zero => Some(PieceContent::Zero),
            Cluster::Data { offset } => {
                Some(PieceContent::Data { file: 0, offset: offset + within })
            }
        };
        Ok(piece(range, end, content))
    }
}

/// An answer for `range` up to `end`.
fn piece(range: ByteRange, end: u64, content: Option<PieceContent>) -> LayerPiece {
    LayerPiece { range: ByteRange::between(range.start(), end.min(range.end())), content }
}

/// Refuses L2 tables of `len` bytes that share bytes: then one of them is data of the other.
fn check_distinct(l1: &[u64], len: u64) -> Result<(), QedError> {
    let mut places: Vec<u64> = l1.iter().copied().filter(|&offset| offset != 0).collect();
    places.sort_unstable();
    for pair in places.windows(2) {
        if pair[1] - pair[0] < len {
            return Err(QedError::TablePlace { table: "L2", offset: pair[1] });
        }
    }
    Ok(())
}
