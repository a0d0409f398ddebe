//! Sessions: the number in an add-cow file that names a state of its bits.
//!
//! A front end may hold bits for the file that are newer than the file (`journal`). They are good
//! for as long as the session in the file is the one that they were made in. So whoever is about to
//! change a disk without having taken them renews the session first: a daemon that starts without
//! them, and every verb of the tool that writes to a disk.
//!
//! Not here: the bytes (`format::session`).

use std::io;
use std::sync::Arc;

use super::{FileRole, ImageError};
use crate::executor::block_on;
use crate::format::{MIN_HEADER_LEN, SESSION_OFFSET, decode_session, encode_session};
use crate::storage::file::FileStorage;
use crate::storage::host_file::HostFile;
use crate::storage::{IoBuffer, Storage, transfer};
use crate::units::ByteRange;

/// The session of a file, which lasts until it is renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Session {
    /// The header area has no place for one.
    Impossible,
    /// There was none so far.
    Never,
    /// This one.
    Number(u64),
}

/// The session of the add-cow file `side`.
///
/// # Errors
/// `Io`, with what the host said.
pub async fn read<S: Storage>(side: &S) -> Result<Session, ImageError> {
    let range = ByteRange::between(0, MIN_HEADER_LEN);
    let error = || ImageError::io("read", FileRole::Side, range);
    let area = IoBuffer::zeroed(usize::try_from(range.len()).unwrap_or(usize::MAX));
    transfer::read_or_zero(side, 0, area.clone()).await.map_err(error())?;
    let found = decode_session(&area.to_vec()).map_err(|bad| error()(io::Error::other(bad)))?;
    Ok(match found {
        None => Session::Impossible,
        Some(None) => Session::Never,
        Some(Some(number)) => Session::Number(number),
    })
}

/// Begins a new session: bits that were kept in memory for this file are worth nothing from now on.
/// Durable when this returns.
///
/// # Errors
/// `Io`, with what the host said; the session may be the old one or a new one then.
pub async fn renew<S: Storage>(side: &S) -> Result<Session, ImageError> {
    let old = read(side).await?;
    let mut number = new_number()?;
    match old {
        Session::Impossible => return Ok(old),
        Session::Number(old) if old == number => number = number.wrapping_add(1),
        _ => {}
    }
    let bytes = encode_session(number);
    let range = ByteRange::between(SESSION_OFFSET, SESSION_OFFSET + bytes.len() as u64);
    let written = transfer::write_all(side, range.start(), IoBuffer::from_bytes(&bytes)).await;
    written.map_err(ImageError::io("write", FileRole::Side, range))?;
    side.sync().await.map_err(ImageError::io("sync", FileRole::Side, ByteRange::EMPTY))?;
    Ok(Session::Number(number))
}

/// Renews the session of an add-cow file that the calling program is about to write to.
///
/// # Errors
/// As [`renew`].
pub fn renew_in(side: &Arc<HostFile>) -> Result<(), ImageError> {
    block_on(renew(&FileStorage::new(Arc::clone(side)))).map(drop)
}

/// A number that nobody has had before.
fn new_number() -> Result<u64, ImageError> {
    let mut bytes = [0; 8];
    let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    let error = ImageError::io("make a session number for", FileRole::Side, ByteRange::EMPTY);
    match filled {
        Ok(len) if len == bytes.len() => Ok(u64::from_le_bytes(bytes)),
        Ok(_) => Err(error(io::ErrorKind::UnexpectedEof.into())),
        Err(code) => Err(error(code.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::sim::SimDisk;

    /// The header area of a disk without a backing file.
    fn area() -> Vec<u8> {
        use crate::format::{FileName, FileReference, FileRole, Header};
        let header = Header {
            cluster_size: crate::units::ClusterSize::from_bits(12).unwrap(),
            backing: None,
            image: FileReference {
                name: FileName::new(FileRole::Image, "disk.raw").unwrap(),
                format: "raw".to_owned(),
            },
            all_allocated: false,
            compat_features: 0,
        };
        let mut area = header.encode().unwrap();
        area.resize(4096 + 512, 0);
        area
    }

    #[test]
    fn a_renewed_session_is_another_one_and_durable() {
        let disk = SimDisk::new(1);
        let side = disk.create(&area());
        assert_eq!(block_on(read(&side)).unwrap(), Session::Never);
        let first = block_on(renew(&side)).unwrap();
        disk.power_cut();
        assert_eq!(block_on(read(&side)).unwrap(), first);
        let second = block_on(renew(&side)).unwrap();
        assert_ne!(first, second);
        // Nothing else has changed.
        let mut bytes = side.content();
        bytes[4080..4096].fill(0);
        assert_eq!(bytes, area());
    }
}
