//! Mapping: where the bytes of a disk are, down to the holes in its files.
//!
//! What [`ImageState::extents`](super::ImageState::extents) says about clusters, and the file
//! systems about holes, merged into one list of pieces. Metadata only: no payload is read. Memory
//! does not grow with the number of pieces.
//!
//! Not here: how the list is shown.

use std::io;
use std::sync::Arc;

use super::extent::{Extent, ExtentKind};
use super::open::{OpenImage, io_error};
use super::{FileRole, OpenError};
use crate::storage::host_file::HostFile;
use crate::units::ByteRange;

/// A piece of a disk whose bytes are all in one place and of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Which bytes of the disk; never empty.
    pub range: ByteRange,
    /// Where they are.
    pub kind: ExtentKind,
    /// Whether that file has a hole there, so that they read as zeros. Always with
    /// [`ExtentKind::Zero`].
    pub hole: bool,
}

/// Calls `visit` for the pieces of `range`, which is cut at the end of the disk, in order.
/// Neighbours always differ.
///
/// # Errors
/// An [`OpenError`] if a file cannot tell its holes, or what `visit` returned.
pub fn visit<E: From<OpenError>>(
    image: &OpenImage,
    range: ByteRange,
    mut visit: impl FnMut(Piece) -> Result<(), E>,
) -> Result<(), E> {
    let range = range.intersect(ByteRange::between(0, image.state.virtual_size()));
    let mut raw = HoleFinder::new(Some(&image.raw));
    let mut backing = HoleFinder::new(image.backing.as_ref());
    let mut waiting: Option<Piece> = None;
    for Extent { kind, range: extent } in image.state.extents(range) {
        let mut start = extent.start();
        while start < extent.end() {
            let rest = ByteRange::between(start, extent.end());
            let (role, finder) = match kind {
                ExtentKind::Data => (FileRole::Raw, Some(&mut raw)),
                ExtentKind::Backing => (FileRole::Backing, Some(&mut backing)),
                ExtentKind::Zero => (FileRole::Raw, None),
            };
            let (range, hole) = match finder {
                Some(finder) => finder
                    .first_of(rest)
                    .map_err(|error| io_error("find the holes of", role, &finder.path())(error))?,
                None => (rest, true),
            };
            start = range.end();
            let piece = Piece { range, kind, hole };
            match &mut waiting {
                Some(last) if (last.kind, last.hole) == (kind, hole) => {
                    last.range = ByteRange::between(last.range.start(), range.end());
                }
                _ => {
                    if let Some(done) = waiting.replace(piece) {
                        visit(done)?;
                    }
                }
            }
        }
    }
    waiting.map_or(Ok(()), visit)
}

/// Tells holes from data in one file. Remembers the last answer, since clusters are small and holes
/// are often large.
struct HoleFinder<'a> {
    /// The file; `None` for one that has no bytes.
    file: Option<&'a Arc<HostFile>>,
    /// A range of the file, and whether it is a hole; empty at first.
    known: (ByteRange, bool),
}

impl<'a> HoleFinder<'a> {
    /// Knows nothing yet.
    fn new(file: Option<&'a Arc<HostFile>>) -> Self {
        Self { file, known: (ByteRange::between(0, 0), true) }
    }

    /// The first part of `range` that is all hole or all data, and whether it is a hole. `range`
    /// must not be empty.
    fn first_of(&mut self, range: ByteRange) -> io::Result<(ByteRange, bool)> {
        let (known, _) = self.known;
        if !(known.start()..known.end()).contains(&range.start()) {
            let next = self.file.map_or(Ok(None), |file| file.next_data(range.start()))?;
            self.known = match next {
                // Past the end of the file is as good as a hole.
                None => (ByteRange::between(range.start(), u64::MAX), true),
                Some(data) if data.start() > range.start() => {
                    (ByteRange::between(range.start(), data.start()), true)
                }
                // A file that changes meanwhile may give an empty range. One byte of progress.
                Some(data) => {
                    let end = data.end().max(range.start().saturating_add(1));
                    (ByteRange::between(range.start(), end), false)
                }
            };
        }
        let (known, hole) = self.known;
        Ok((range.intersect(known), hole))
    }

    /// The name of the file, for messages.
    fn path(&self) -> std::path::PathBuf {
        self.file.map(|file| file.path().to_owned()).unwrap_or_default()
    }
}
