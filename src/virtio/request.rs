//! Requests: what a chain asks for, and how it is answered.
//!
//! Any framing is legal (VIRTIO 1.3, 2.7.4.3): the header is the first 16 device-readable bytes,
//! the status is the last device-writable byte, whatever descriptors they lie in. A request that
//! was taken is answered through its [`Completion`], which is used up by answering.
//!
//! Not here: doing what is asked (`device`).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::chain::Chain;
use super::config::{MAX_DISCARD_SECTORS, MAX_SEGMENTS, MAX_WRITE_ZEROES_SECTORS, has_feature};
use crate::image::ImageError;
use crate::storage::IoBuffer;
use crate::units::{ByteRange, SECTOR_SIZE};

/// Bytes of the request header: type, reserved, sector (5.2.6).
const HEADER_LEN: usize = 16;

/// Bytes of a segment of DISCARD and WRITE_ZEROES.
const SEGMENT_LEN: usize = 16;

/// Segment flag: the space may be given back.
const SEGMENT_UNMAP: u32 = 1;

/// A request header as the guest writes it.
#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct WireHeader {
    /// `VIRTIO_BLK_T_*`.
    kind: U32,
    /// Ignored (5.2.6: reserved; legacy priority).
    _reserved: U32,
    /// First 512-byte sector.
    sector: U64,
}

/// A segment as the guest writes it.
#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct WireSegment {
    /// First 512-byte sector.
    sector: U64,
    /// Number of sectors.
    num_sectors: U32,
    /// `SEGMENT_UNMAP`; all other bits are reserved.
    flags: U32,
}

/// A range to be discarded or zeroed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ZeroSegment {
    /// Bytes of the disk; not yet checked against its size.
    pub range: ByteRange,
    /// Whether the space may be given back.
    pub unmap: bool,
}

/// What a guest asks for. Ranges are not yet checked against the disk.
#[derive(Debug)]
pub enum Request {
    /// Fill `data` from byte `offset` of the disk.
    Read {
        /// Byte offset.
        offset: u64,
        /// Device-writable memory.
        data: IoBuffer,
    },
    /// Write `data` at byte `offset` of the disk.
    Write {
        /// Byte offset.
        offset: u64,
        /// Device-readable memory.
        data: IoBuffer,
    },
    /// Make completed writes durable.
    Flush,
    /// Fill `data` with the serial.
    GetId {
        /// Device-writable memory.
        data: IoBuffer,
    },
    /// Nobody needs these ranges.
    Discard(Vec<ZeroSegment>),
    /// Make these ranges read zeros.
    WriteZeroes(Vec<ZeroSegment>),
}

/// Whose mistake an error is: guests' are their own business, the host's are an operator's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The guest asked for something that cannot be.
    Guest,
    /// The host could not do it.
    Host,
}

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The device-readable part holds no whole header.
    #[error("header of {0} bytes instead of 16")]
    Header(usize),
    /// A type that we do not know, or whose feature was not negotiated.
    #[error("unsupported request type {0}")]
    Kind(u32),
    /// Data that is not whole sectors.
    #[error("{0} bytes of data are no whole sectors")]
    DataLen(usize),
    /// A byte position past 2^64.
    #[error("sector {0} is out of range")]
    Sector(u64),
    /// A list of segments that is empty, cut short, or too long.
    #[error("{0} bytes of segments are not 1 to 32 of 16 bytes")]
    Segments(usize),
    /// A segment with more sectors than the configuration allows.
    #[error("segment of {found} sectors, at most {most} are allowed")]
    SegmentLen {
        /// What the guest asked for.
        found: u32,
        /// What we told it.
        most: u32,
    },
    /// Segment flags that are reserved, or not allowed for this type.
    #[error("unsupported segment flags {0:#x}")]
    SegmentFlags(u32),
    /// The image refused.
    #[error(transparent)]
    Image(#[from] ImageError),
}

impl RequestError {
    /// The status byte that the guest gets (5.2.6).
    #[must_use]
    pub fn status(&self) -> u8 {
        let status = match self {
            // 5.2.6.2: unknown types and unknown flags are UNSUPP.
            Self::Kind(_) | Self::SegmentFlags(_) => VIRTIO_BLK_S_UNSUPP,
            // 5.2.6.2: a write to a read-only device is IOERR; so is everything else that is not
            // "this device does not do that".
            Self::Header(_)
            | Self::DataLen(_)
            | Self::Sector(_)
            | Self::Segments(_)
            | Self::SegmentLen { .. }
            | Self::Image(_) => VIRTIO_BLK_S_IOERR,
        };
        u8::try_from(status).unwrap_or(u8::MAX)
    }

    /// Whose mistake it is.
    #[must_use]
    pub fn fault(&self) -> Fault {
        match self {
            Self::Header(_)
            | Self::Kind(_)
            | Self::DataLen(_)
            | Self::Sector(_)
            | Self::Segments(_)
            | Self::SegmentLen { .. }
            | Self::SegmentFlags(_)
            | Self::Image(ImageError::OutOfRange { .. } | ImageError::ReadOnly) => Fault::Guest,
            Self::Image(ImageError::Io { .. } | ImageError::Failed) => Fault::Host,
        }
    }
}

/// An entry of the used ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// Head of the chain.
    pub head: u16,
    /// Bytes written to its device-writable part, from its beginning.
    pub len: u32,
}

impl Used {
    /// The entry of a chain into which nothing was written.
    #[must_use]
    pub fn untouched(head: u16) -> Self {
        Self { head, len: 0 }
    }
}

/// The answer to a request that was taken: to be given exactly once.
#[must_use]
#[derive(Debug)]
pub struct Completion {
    /// Head of the chain.
    head: u16,
    /// The device-writable part up to the status byte.
    data: IoBuffer,
    /// The status byte.
    status: IoBuffer,
}

impl Completion {
    /// Answers. Of the writable part's data `filled` bytes were written by the request; the rest is
    /// zeroed, so that the used length, which counts from the beginning, tells no lie about what
    /// lies in front of the status byte.
    pub fn finish(self, result: Result<usize, &RequestError>) -> Used {
        let (filled, status) = match result {
            Ok(filled) => (filled.min(self.data.len()), u8::try_from(VIRTIO_BLK_S_OK).unwrap_or(0)),
            Err(error) => (0, error.status()),
        };
        self.data.tail(filled).fill_zero();
        self.status.copy_from(0, &[status]);
        let len = self.data.len().saturating_add(1);
        Used { head: self.head, len: u32::try_from(len).unwrap_or(u32::MAX) }
    }
}

impl Request {
    /// Takes a chain apart: what it asks for, and how to answer. `None` if there is no byte for the
    /// status, so that the chain can only be given back.
    #[must_use]
    pub fn parse(chain: Chain, features: u64) -> Option<(Result<Self, RequestError>, Completion)> {
        let data_len = chain.writable.len().checked_sub(1)?;
        let data = chain.writable.slice(0, data_len);
        let status = chain.writable.slice(data_len, 1);
        let completion = Completion { head: chain.head, data: data.clone(), status };
        Some((Self::parse_parts(&chain.readable, data, features), completion))
    }

    /// Reads the header, once, and what belongs to it.
    fn parse_parts(
        readable: &IoBuffer,
        writable: IoBuffer,
        features: u64,
    ) -> Result<Self, RequestError> {
        if readable.len() < HEADER_LEN {
            return Err(RequestError::Header(readable.len()));
        }
        let header: WireHeader = zerocopy::transmute!(readable.first::<HEADER_LEN>());
        let payload = readable.tail(HEADER_LEN);
        let sector = header.sector.get();
        let offset = sector.checked_mul(SECTOR_SIZE);
        match header.kind.get() {
            VIRTIO_BLK_T_IN => {
                let offset = offset.ok_or(RequestError::Sector(sector))?;
                Ok(Self::Read { offset, data: whole_sectors(writable)? })
            }
            VIRTIO_BLK_T_OUT => {
                let offset = offset.ok_or(RequestError::Sector(sector))?;
                Ok(Self::Write { offset, data: whole_sectors(payload)? })
            }
            VIRTIO_BLK_T_FLUSH => Ok(Self::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Self::GetId { data: writable }),
            VIRTIO_BLK_T_DISCARD if has_feature(features, VIRTIO_BLK_F_DISCARD) => {
                Ok(Self::Discard(segments(&payload, MAX_DISCARD_SECTORS, 0)?))
            }
            VIRTIO_BLK_T_WRITE_ZEROES if has_feature(features, VIRTIO_BLK_F_WRITE_ZEROES) => {
                Ok(Self::WriteZeroes(segments(&payload, MAX_WRITE_ZEROES_SECTORS, SEGMENT_UNMAP)?))
            }
            other => Err(RequestError::Kind(other)),
        }
    }
}

/// The data, if it is whole sectors.
fn whole_sectors(data: IoBuffer) -> Result<IoBuffer, RequestError> {
    let is_whole = (data.len() as u64).is_multiple_of(SECTOR_SIZE);
    if is_whole { Ok(data) } else { Err(RequestError::DataLen(data.len())) }
}

/// The segments of a DISCARD or WRITE_ZEROES request, each read once. All of them are checked
/// before any is carried out.
fn segments(
    payload: &IoBuffer,
    max_sectors: u32,
    allowed_flags: u32,
) -> Result<Vec<ZeroSegment>, RequestError> {
    let len = payload.len();
    let max_len = usize::try_from(MAX_SEGMENTS).unwrap_or(0).saturating_mul(SEGMENT_LEN);
    if len == 0 || len > max_len || !len.is_multiple_of(SEGMENT_LEN) {
        return Err(RequestError::Segments(len));
    }
    let bytes = payload.to_vec();
    let (chunks, _) = bytes.as_chunks::<SEGMENT_LEN>();
    chunks.iter().map(|chunk| segment(*chunk, max_sectors, allowed_flags)).collect()
}

/// One segment.
fn segment(
    bytes: [u8; SEGMENT_LEN],
    max_sectors: u32,
    allowed_flags: u32,
) -> Result<ZeroSegment, RequestError> {
    let wire: WireSegment = zerocopy::transmute!(bytes);
    let flags = wire.flags.get();
    if flags & !allowed_flags != 0 {
        return Err(RequestError::SegmentFlags(flags));
    }
    let (sector, count) = (wire.sector.get(), wire.num_sectors.get());
    if count > max_sectors {
        return Err(RequestError::SegmentLen { found: count, most: max_sectors });
    }
    let range = ByteRange::from_sectors(sector, count.into());
    let range = range.ok_or(RequestError::Sector(sector))?;
    Ok(ZeroSegment { range, unmap: flags & SEGMENT_UNMAP != 0 })
}
