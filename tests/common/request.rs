//! Block requests as bytes, and the many ways to spread them over descriptors.
//!
//! A request is a readable and a writable byte string (VIRTIO 1.3, 5.2.6): header and payload to
//! the device, data and the status byte from it. A [`Framing`] says how both are cut into
//! descriptors; 2.7.4.2 makes every cut legal.
//!
//! Not here: rings (see `ring`), sending and waiting (see `guest`).

use super::SECTOR;
use super::rng::Rng;

/// Read sectors.
pub const IN: u32 = 0;
/// Write sectors.
pub const OUT: u32 = 1;
/// Make completed writes durable.
pub const FLUSH: u32 = 4;
/// Read the serial number.
pub const GET_ID: u32 = 8;
/// Drop the content of sectors.
pub const DISCARD: u32 = 11;
/// Fill sectors with zeros.
pub const WRITE_ZEROES: u32 = 13;

/// Status: done.
pub const OK: u8 = 0;
/// Status: failed.
pub const IOERR: u8 = 1;
/// Status: not supported.
pub const UNSUPP: u8 = 2;

/// Flag of a write-zeroes segment: the device may deallocate.
pub const UNMAP: u32 = 1;

/// What the writable bytes hold before the device writes to them.
pub const UNTOUCHED: u8 = 0xa5;

/// Bytes of a request header.
pub const HEADER: usize = 16;

/// The header of a request.
pub fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&sector.to_le_bytes());
    bytes
}

/// One request, framing aside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Everything the device may read.
    pub readable: Vec<u8>,
    /// How many bytes the device may write, the status byte included.
    pub writable: usize,
}

impl Request {
    /// A request of any type with `payload` after the header and `writable` bytes.
    pub fn new(kind: u32, sector: u64, payload: &[u8], writable: usize) -> Self {
        let mut readable = header(kind, sector);
        readable.extend_from_slice(payload);
        Self { readable, writable }
    }

    /// Reads `len` bytes from `sector` on.
    pub fn read(sector: u64, len: usize) -> Self {
        Self::new(IN, sector, &[], len + 1)
    }

    /// Writes `data` from `sector` on.
    pub fn write(sector: u64, data: &[u8]) -> Self {
        Self::new(OUT, sector, data, 1)
    }

    /// Makes completed writes durable.
    pub fn flush() -> Self {
        Self::new(FLUSH, 0, &[], 1)
    }

    /// Asks for the serial number in `len` bytes.
    pub fn get_id(len: usize) -> Self {
        Self::new(GET_ID, 0, &[], len + 1)
    }

    /// Discards `segments`, each (first sector, sectors, flags).
    pub fn discard(segments: &[(u64, u32, u32)]) -> Self {
        Self::new(DISCARD, 0, &payload(segments), 1)
    }

    /// Zeroes `segments`, each (first sector, sectors, flags).
    pub fn write_zeroes(segments: &[(u64, u32, u32)]) -> Self {
        Self::new(WRITE_ZEROES, 0, &payload(segments), 1)
    }

    /// Whether it writes sectors: then what follows the header is data.
    pub fn is_write(&self) -> bool {
        self.readable.starts_with(&OUT.to_le_bytes())
    }

    /// How many whole sectors of data the device may write.
    pub fn sectors_in(&self) -> usize {
        self.writable.saturating_sub(1) / SECTOR
    }
}

/// Segments of DISCARD and WRITE_ZEROES as bytes (VIRTIO 1.3, 5.2.6).
pub fn payload(segments: &[(u64, u32, u32)]) -> Vec<u8> {
    let encode = |&(sector, count, flags): &(u64, u32, u32)| {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend_from_slice(&count.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes
    };
    segments.iter().flat_map(encode).collect()
}

/// How a request is cut into descriptors.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Framing {
    /// Lengths of the first readable descriptors; one more takes the rest, if there is a rest.
    pub readable: Vec<usize>,
    /// The same for the writable ones.
    pub writable: Vec<usize>,
    /// Whether the descriptors lie in an indirect table.
    pub indirect: bool,
}

impl Framing {
    /// One readable and one writable descriptor.
    pub fn joined() -> Self {
        Self::default()
    }

    /// What Linux does: header, data and status apart.
    pub fn usual(request: &Request) -> Self {
        let writable = if request.writable > 1 { vec![request.writable - 1] } else { vec![] };
        Self { readable: vec![HEADER], writable, indirect: false }
    }

    /// Readable and writable descriptors of the given lengths, the last ones with the rest.
    pub fn cut(readable: &[usize], writable: &[usize]) -> Self {
        Self { readable: readable.to_vec(), writable: writable.to_vec(), indirect: false }
    }

    /// The same with an indirect table.
    pub fn indirect(mut self) -> Self {
        self.indirect = true;
        self
    }

    /// Random cuts anywhere, empty descriptors among them, at most `most` per direction.
    pub fn random(rng: &mut Rng, request: &Request, most: u64) -> Self {
        let mut cuts = |len: usize| {
            let count = rng.pick(0..most);
            let draw = |_| match rng.pick(0..4) {
                0 => 0,
                1 => rng.index(20),
                2 => rng.index(len + 1),
                _ => rng.index(4) * SECTOR,
            };
            (0..count).map(draw).collect()
        };
        let (readable, writable) = (cuts(request.readable.len()), cuts(request.writable));
        Self { readable, writable, indirect: rng.one_in(2) }
    }
}

/// The lengths of descriptors for `total` bytes: `cuts` as far as they go, then the rest.
pub fn lengths(total: usize, cuts: &[usize]) -> Vec<usize> {
    let mut left = total;
    let mut all = Vec::new();
    for &cut in cuts {
        let len = cut.min(left);
        if len == cut {
            all.push(len);
            left -= len;
        }
    }
    if left > 0 {
        all.push(left);
    }
    all
}

/// What came back for a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Length on the used ring.
    pub used_len: u32,
    /// All writable bytes in chain order.
    pub writable: Vec<u8>,
}

impl Reply {
    /// The status: the last writable byte.
    pub fn status(&self) -> u8 {
        *self.writable.last().expect("a request with a status byte")
    }

    /// The writable bytes before the status.
    pub fn data(&self) -> &[u8] {
        &self.writable[..self.writable.len() - 1]
    }
}
