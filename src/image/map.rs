//! Mapping: where the bytes of a disk are, down to the holes in its files.
//!
//! What the layers of a chain say about clusters, and the file systems about holes, merged into one
//! list of pieces. Metadata only: no payload is read. Memory does not grow with the number of
//! pieces.
//!
//! Not here: how the list is shown.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::chain::{ChainPiece, OpenChain, PieceContent};
use super::open::io_error;
use super::{FileRole, ImageError, OpenError};
use crate::executor::block_on;
use crate::storage::file::FileStorage;
use crate::storage::host_file::HostFile;
use crate::units::ByteRange;

/// A piece of a disk whose bytes are all in one place and of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Which bytes, and where a layer has them.
    pub place: ChainPiece,
    /// Whether that file has a hole there, so that they read as zeros.
    pub hole: bool,
}

impl Piece {
    /// Whether `next` goes on where this one ends, in the same place and of the same kind.
    fn continues_in(&self, next: &Self) -> bool {
        let content = match (self.place.content, next.place.content) {
            (
                PieceContent::Data { file, offset },
                PieceContent::Data { file: other, offset: at },
            ) => file == other && offset.checked_add(self.place.range.len()) == Some(at),
            (mine, other) => mine == other,
        };
        let kind = |piece: &Self| (piece.place.depth, piece.place.present, piece.hole);
        content && kind(self) == kind(next)
    }
}

/// Why a disk could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// A layer cannot tell where its bytes are.
    #[error("cannot map '{path}'")]
    Layer {
        /// The disk.
        path: String,
        /// Why.
        source: ImageError,
    },
    /// A file cannot tell its holes.
    #[error(transparent)]
    Holes(#[from] OpenError),
}

/// Calls `visit` for the pieces of `range`, which is cut at the end of the disk, in order.
/// Neighbours always differ.
///
/// # Errors
/// A [`MapError`], or what `visit` returned.
pub fn visit<E: From<MapError>>(
    chain: &OpenChain,
    range: ByteRange,
    mut visit: impl FnMut(Piece) -> Result<(), E>,
) -> Result<(), E> {
    let handle = chain.handle(FileStorage::new);
    let mut rest = range.intersect(ByteRange::between(0, chain.virtual_size()));
    let mut finders: Vec<Vec<HoleFinder>> =
        chain.layers().iter().map(|layer| layer.files().map(HoleFinder::new).collect()).collect();
    let mut waiting: Option<Piece> = None;
    while !rest.is_empty() {
        let mut place = block_on(handle.mapping(rest)).map_err(|source| {
            let path = chain.layers().first().map(|layer| layer.path().display().to_string());
            MapError::Layer { path: path.unwrap_or_default(), source }
        })?;
        let mut hole = false;
        if let PieceContent::Data { file, offset } = place.content
            && let Some(finder) = finders[place.depth].get_mut(file)
        {
            let (len, found) =
                finder.first_of(offset, place.range.len()).map_err(MapError::from)?;
            let start = place.range.start();
            place.range = ByteRange::between(start, start + len);
            hole = found;
        }
        rest = ByteRange::between(place.range.end(), rest.end());
        let piece = Piece { place, hole };
        match &mut waiting {
            Some(last) if last.continues_in(&piece) => {
                let start = last.place.range.start();
                last.place.range = ByteRange::between(start, place.range.end());
            }
            _ => {
                if let Some(done) = waiting.replace(piece) {
                    visit(done)?;
                }
            }
        }
    }
    waiting.map_or(Ok(()), visit)
}

/// How many bytes of a disk are stored in a layer below it, holes not counted: what streaming has
/// to copy.
///
/// # Errors
/// As [`visit`].
pub fn bytes_below(chain: &OpenChain) -> Result<u64, MapError> {
    let mut bytes = 0;
    visit(chain, ByteRange::between(0, chain.virtual_size()), |Piece { place, hole }| {
        if place.depth > 0 && !hole && place.content != PieceContent::Zero {
            // The pieces do not overlap: no more than the size of the disk.
            bytes += place.range.len();
        }
        Ok(())
    })
    .map(|()| bytes)
}

/// Tells holes from data in one file. Remembers the last answer, since clusters are small and holes
/// are often large.
struct HoleFinder<'a> {
    /// The file.
    file: &'a Arc<HostFile>,
    /// A range of the file, and whether it is a hole; empty at first.
    known: (ByteRange, bool),
}

impl<'a> HoleFinder<'a> {
    /// Knows nothing yet.
    fn new(file: &'a Arc<HostFile>) -> Self {
        Self { file, known: (ByteRange::between(0, 0), true) }
    }

    /// How many of the `len` bytes at `offset` of the file are all hole or all data, and whether
    /// they are a hole. `len` must not be 0.
    fn first_of(&mut self, offset: u64, len: u64) -> Result<(u64, bool), OpenError> {
        let (known, _) = self.known;
        if !(known.start()..known.end()).contains(&offset) {
            self.known = self.look(offset).map_err(|error| {
                let path: &Path = self.file.path();
                io_error("find the holes of", FileRole::Disk, path)(error)
            })?;
        }
        let (known, hole) = self.known;
        Ok((len.min(known.end() - offset), hole))
    }

    /// Asks the file system about the bytes from `offset` on.
    fn look(&self, offset: u64) -> io::Result<(ByteRange, bool)> {
        Ok(match self.file.next_data(offset)? {
            // Past the end of the file is as good as a hole.
            None => (ByteRange::between(offset, u64::MAX), true),
            Some(data) if data.start() > offset => (ByteRange::between(offset, data.start()), true),
            // A file that changes meanwhile may give an empty range. One byte of progress.
            Some(data) => {
                let end = data.end().max(offset.saturating_add(1));
                (ByteRange::between(offset, end), false)
            }
        })
    }
}
