//! Sparse files: zeros become holes, everything else is written.
//!
//! What jobs copy goes through here, so that a disk that is mostly empty stays that on its file
//! system. A hole is given back only where the file has data; where it has none already, nothing
//! happens. On files without holes (block devices) zeros are written.
//!
//! Not here: where the bytes come from, and when they are synced.

use std::io;

use super::{IoBuffer, Storage, ZeroMode, transfer};
use crate::units::ByteRange;

/// The usual block, in bytes: a page, and the block of common file systems. Smaller holes would
/// cost an operation and give no space back.
pub const BLOCK: u64 = 4096;

/// A run of blocks of a buffer that are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Which bytes of the buffer; never empty.
    pub start: usize,
    /// How many they are.
    pub len: usize,
    /// Whether all of them are zeros.
    pub is_zero: bool,
}

/// The runs of `data`, in order. Blocks lie at multiples of `block` bytes (at least 1) when the
/// buffer's first byte is counted as `offset`; the first and the last may be cut.
pub fn runs(offset: u64, data: &IoBuffer, block: u64) -> impl Iterator<Item = Run> {
    let block_at = move |start: usize| {
        let left = block - (offset + start as u64) % block;
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(data.len() - start);
        Run { start, len, is_zero: data.slice(start, len).is_zero() }
    };
    let mut known = (!data.is_empty()).then(|| block_at(0));
    std::iter::from_fn(move || {
        let mut run = known.take()?;
        while run.start + run.len < data.len() {
            let next = block_at(run.start + run.len);
            if next.is_zero != run.is_zero {
                known = Some(next);
                break;
            }
            run.len += next.len;
        }
        Some(run)
    })
}

/// Makes `range` read zeros by giving back the space of what is no hole yet.
///
/// # Errors
/// What the storage said. Any part of the range may then hold old bytes.
pub async fn clear<S: Storage>(storage: &S, range: ByteRange) -> io::Result<()> {
    let mut rest = range;
    while !rest.is_empty() {
        let data = storage.next_data(rest.start())?.map(|data| data.intersect(rest));
        let Some(data) = data.filter(|data| !data.is_empty()) else { break };
        transfer::write_zeroes(storage, data, ZeroMode::PunchHole).await?;
        rest = ByteRange::between(data.end(), rest.end());
    }
    Ok(())
}

/// Writes `data` at `offset`: blocks of zeros become holes, as [`runs`] tells them.
///
/// # Errors
/// What the storage said. Any part of the range may hold old or new bytes.
pub async fn write<S: Storage>(
    storage: &S,
    offset: u64,
    data: &IoBuffer,
    block: u64,
) -> io::Result<()> {
    for Run { start, len, is_zero } in runs(offset, data, block) {
        let at = offset + start as u64;
        if is_zero {
            clear(storage, ByteRange::between(at, at + len as u64)).await?;
        } else {
            transfer::write_all(storage, at, data.slice(start, len)).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::executor::block_on;
    use crate::storage::file::FileStorage;
    use crate::storage::host_file::{CacheMode, HostFile};

    /// The runs of a buffer with these bytes, as (start, length, zero).
    fn found(offset: u64, bytes: &[u8], block: u64) -> Vec<(usize, usize, bool)> {
        let data = IoBuffer::from_bytes(bytes);
        runs(offset, &data, block).map(|run| (run.start, run.len, run.is_zero)).collect()
    }

    #[test]
    fn runs_keep_to_the_blocks_of_the_file() {
        let mut bytes = [0; 40];
        assert_eq!(found(0, &bytes, 8), [(0, 40, true)]);
        bytes[17] = 1;
        assert_eq!(found(0, &bytes, 8), [(0, 16, true), (16, 8, false), (24, 16, true)]);
        // Three bytes further on, byte 17 lies in the block of bytes 13 to 20.
        assert_eq!(found(3, &bytes, 8), [(0, 13, true), (13, 8, false), (21, 19, true)]);
        assert_eq!(found(3, &bytes, 64), [(0, 40, false)]);
        assert_eq!(found(5, &[], 8), []);
        bytes[0] = 1;
        bytes[39] = 1;
        let expected = [(0, 8, false), (8, 8, true), (16, 8, false), (24, 8, true), (32, 8, false)];
        assert_eq!(found(0, &bytes, 8), expected);
    }

    #[test]
    fn zeros_replace_what_the_file_had_and_give_its_space_back() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [7; 10 * 4096]).unwrap();
        let host = file.reopen().unwrap();
        let host = HostFile::from_file(host, file.path(), CacheMode::Buffered).unwrap();
        let storage = FileStorage::new(Arc::new(host));
        let mut bytes = vec![0; 6 * 4096];
        bytes[4096 + 100] = 9;
        block_on(write(&storage, 2 * 4096, &IoBuffer::from_bytes(&bytes), BLOCK)).unwrap();
        let mut expected = vec![7; 10 * 4096];
        expected[2 * 4096..8 * 4096].copy_from_slice(&bytes);
        assert_eq!(std::fs::read(file.path()).unwrap(), expected);
        // Where the file system knows holes, the zeros are some.
        if storage.next_data(2 * 4096).unwrap().unwrap().start() > 2 * 4096 {
            let data = storage.next_data(2 * 4096).unwrap().unwrap();
            assert_eq!(data, ByteRange::between(3 * 4096, 4 * 4096));
        }
    }
}
