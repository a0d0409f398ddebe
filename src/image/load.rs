//! Loading: from the bytes of a side file to an allocation map. Runs on any storage.

use std::io;

use crate::format::{BitmapGeometry, FIXED_HEADER_LEN, FormatError, Header};
use crate::image::allocation::AllocationMap;
use crate::storage::{IoBuffer, Storage, transfer};

/// How much of the bitmap is read at once, in bytes: a multiple of a bitmap page.
const CHUNK_LEN: u64 = 1 << 20;

/// Why a side file could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It could not be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Its header is not valid, or no bitmap fits it.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// It ends before its bitmap does.
    #[error("truncated: {found} bytes, {needed} needed")]
    Truncated {
        /// Its length in bytes.
        found: u64,
        /// The least length in bytes.
        needed: u64,
    },
    /// There is no memory for its bitmap.
    #[error("not enough memory for a bitmap of {0} bytes")]
    NoMemory(u64),
}

/// Reads and checks the header.
///
/// # Errors
/// `Io`, or `Format` with what is wrong.
pub async fn header<S: Storage>(side: &S) -> Result<Header, LoadError> {
    let fixed = read(side, FIXED_HEADER_LEN as u64).await?;
    let area = read(side, Header::area_len(&fixed)?).await?;
    Ok(Header::decode(&area)?)
}

/// Reads the bitmap of a disk of this geometry.
///
/// # Errors
/// `Truncated` if the file does not hold every cluster's bit; `Io`; `NoMemory`.
pub async fn bitmap<S: Storage>(
    side: &S,
    geometry: &BitmapGeometry,
) -> Result<AllocationMap, LoadError> {
    let needed = geometry.offset() + geometry.used_len();
    let found = side.file_len()?;
    if found < needed {
        return Err(LoadError::Truncated { found, needed });
    }
    let no_memory = || LoadError::NoMemory(geometry.used_len());
    let mut map = AllocationMap::empty(geometry).ok_or_else(no_memory)?;
    // Holes are zeros, and a new bitmap is nothing else: they are not read.
    let mut position = geometry.offset();
    while let Some(data) = side.next_data(position)?
        && data.start() < needed
    {
        // Words are loaded whole: start at a multiple of 8 in the bitmap.
        let start = data.start().max(position);
        let start = start - (start - geometry.offset()) % 8;
        let end = data.end().min(needed).min(start + CHUNK_LEN);
        let len = usize::try_from(end - start).map_err(io::Error::other)?;
        let buffer = IoBuffer::zeroed(len);
        let got = transfer::read_up_to(side, start, buffer.clone()).await?;
        if got < len {
            return Err(LoadError::Truncated { found: start + got as u64, needed });
        }
        map.load(start - geometry.offset(), &buffer.to_vec());
        position = end;
    }
    Ok(map)
}

/// Reads up to `len` bytes from the start of the file.
async fn read<S: Storage>(side: &S, len: u64) -> Result<Vec<u8>, LoadError> {
    let buffer = IoBuffer::zeroed(usize::try_from(len).map_err(io::Error::other)?);
    let got = transfer::read_up_to(side, 0, buffer.clone()).await?;
    Ok(buffer.slice(0, got).to_vec())
}
