//! What `qcow2` and `qed` share: a disk read through the chain code, against an independent reader.
//!
//! Not here: what a format means.

use addcow::executor::block_on;
use addcow::image::OpenError;
use addcow::image::chain::{ChainOptions, DiskFormat, OpenChain};
use addcow::storage::IoBuffer;
use addcow::storage::file::FileStorage;

use super::files::windows;
use super::{Scratch, to_u64, to_usize};

/// What an independent reader says about a disk.
pub trait Reader {
    /// Whether a read of what it finds no sense in has to fail.
    const IS_STRICT: bool;

    /// Its size in bytes.
    fn size(&self) -> u64;

    /// The bytes of a range of whole sectors; `None` where its tables make no sense.
    fn read(&self, offset: u64, len: usize) -> Option<Vec<u8>>;

    /// Whether a read of a range that makes sense may fail all the same: because a whole table is
    /// judged when a part of it is needed.
    fn is_flawed(&self, offset: u64, len: usize) -> bool;
}

/// Opens the file `disk` of the folder.
///
/// # Errors
/// What the code under test says.
pub fn open(scratch: &Scratch, format: DiskFormat) -> Result<OpenChain, OpenError> {
    OpenChain::open(&scratch.path("disk"), format, ChainOptions::BUFFERED)
}

/// Compares what the open disk shows with what `reader` says.
pub fn compare<R: Reader>(chain: &OpenChain, reader: &R, seed: u64) {
    assert_eq!(chain.virtual_size(), reader.size(), "size of the disk");
    let handle = chain.handle(FileStorage::new);
    for (offset, len) in windows(reader.size(), seed) {
        let buffer = IoBuffer::from_bytes(&vec![0xa5; len]);
        let read = block_on(handle.read(offset, buffer.clone()));
        let wanted = reader.read(offset, len);
        match (read, wanted) {
            (Ok(()), Some(wanted)) => {
                let got = buffer.to_vec();
                let at = (0..len).find(|at| got[*at] != wanted[*at]);
                let place = at.map(|at| offset + to_u64(at));
                assert!(at.is_none(), "{len} bytes at {offset:#x}: byte {place:#x?} differs");
            }
            (Ok(()), None) => {
                assert!(!R::IS_STRICT, "{len} bytes at {offset:#x} were read out of bad tables");
            }
            (Err(error), Some(_)) => {
                let flawed = reader.is_flawed(offset, len);
                assert!(flawed, "{len} bytes at {offset:#x} cannot be read: {error:?}");
            }
            (Err(_), None) => {}
        }
    }
}

/// The ranges of one cluster each that make up a range.
pub fn clusters(offset: u64, len: usize, cluster: u64) -> impl Iterator<Item = (u64, usize)> {
    let end = offset + to_u64(len);
    let mut at = offset;
    std::iter::from_fn(move || {
        let next = (at - at % cluster).saturating_add(cluster).min(end);
        let piece = (at < end).then(|| (at, to_usize(next - at)));
        at = next;
        piece
    })
}
