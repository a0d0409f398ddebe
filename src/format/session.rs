//! The session number in the header area of an add-cow file (docs/format.md, "Session number").
//!
//! It names a state of the bits in the file, so that bits which somebody kept in memory for this
//! file can be told from those for an earlier state of it. Readers of the original format see bytes
//! that belong to no name, and ignore them.
//!
//! Not here: when it is renewed, and who relies on it (`image::session`).

use zerocopy::byteorder::little_endian::U32;

use super::error::FormatError;
use super::header::{FixedHeader, MIN_HEADER_LEN};

/// Where it lies: the last bytes of the shortest header area, in one block of 512 bytes.
pub const SESSION_OFFSET: u64 = MIN_HEADER_LEN - SESSION_LEN as u64;

/// Bytes that it takes.
pub const SESSION_LEN: usize = 16;

/// What it begins with.
const MAGIC: [u8; 8] = *b"session1";

/// The bytes of session `number`.
#[must_use]
pub fn encode_session(number: u64) -> [u8; SESSION_LEN] {
    let mut bytes = [0; SESSION_LEN];
    let (magic, value) = bytes.split_at_mut(MAGIC.len());
    magic.copy_from_slice(&MAGIC);
    value.copy_from_slice(&number.to_le_bytes());
    bytes
}

/// The session number in the header area `area`: `Some(None)` if there is none so far, and `None`
/// if there is no place for one because a name lies there.
///
/// # Errors
/// If the fixed header cannot be read.
pub fn decode_session(area: &[u8]) -> Result<Option<Option<u64>>, FormatError> {
    let fixed = FixedHeader::parse(area)?;
    let end = |offset: U32, size: U32| u64::from(offset).saturating_add(size.into());
    let names = end(fixed.backing_offset, fixed.backing_size)
        .max(end(fixed.image_offset, fixed.image_size));
    if names > SESSION_OFFSET {
        return Ok(None);
    }
    let start = usize::try_from(SESSION_OFFSET).unwrap_or(usize::MAX);
    let bytes = area.get(start..).and_then(|bytes| bytes.first_chunk::<SESSION_LEN>());
    let number = bytes
        .and_then(|bytes| bytes.strip_prefix(&MAGIC))
        .and_then(|number| number.first_chunk().map(|number| u64::from_le_bytes(*number)));
    Ok(Some(number))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{FileName, FileReference, FileRole, Header};
    use crate::units::ClusterSize;

    /// A header area whose image name has `len` bytes.
    fn area(len: usize) -> Vec<u8> {
        let header = Header {
            cluster_size: ClusterSize::from_bits(12).unwrap(),
            backing: None,
            image: FileReference {
                name: FileName::new(FileRole::Image, "n".repeat(len)).unwrap(),
                format: "raw".to_owned(),
            },
            all_allocated: true,
            compat_features: 0,
        };
        let mut area = header.encode().unwrap();
        area.resize(4096, 0);
        area
    }

    #[test]
    fn a_number_that_was_written_is_read() {
        let mut bytes = area(8);
        assert_eq!(decode_session(&bytes), Ok(Some(None)));
        for number in [0, 1, u64::MAX] {
            bytes[4080..].copy_from_slice(&encode_session(number));
            assert_eq!(decode_session(&bytes), Ok(Some(Some(number))));
            Header::decode(&bytes).unwrap();
        }
        bytes[4080] = b'x';
        assert_eq!(decode_session(&bytes), Ok(Some(None)));
        assert_eq!(decode_session(&bytes[..4090]), Ok(Some(None)));
    }

    #[test]
    fn a_name_is_not_overwritten() {
        let mut bytes = area(1000);
        // As a foreign program may have put it.
        bytes[12..16].copy_from_slice(&3080_u32.to_le_bytes());
        assert_eq!(decode_session(&bytes), Ok(Some(None)));
        bytes[12..16].copy_from_slice(&3081_u32.to_le_bytes());
        assert_eq!(decode_session(&bytes), Ok(None));
    }
}
