//! QED metadata: bytes on one side, checked values on the other. Reading only.
//!
//! QED has one table of tables and nothing else: no refcounts, no compression, no snapshots. The
//! format is that of QEMU 0.14 and later, little-endian. Offsets in tables are judged here too,
//! given the file's length: tables and clusters lie behind the header, on cluster boundaries, and
//! wholly in the file. A part of a cluster at the file's end does not count.
//!
//! Not here: reading files, walking tables (`image`), repairing.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::format::error::FormatError;
use crate::format::reference::{FileName, FileRole, check_len};
use crate::units::{ByteRange, SECTOR_SIZE};

/// The first bytes of every QED file.
pub const MAGIC: [u8; 4] = *b"QED\0";

/// Bytes of the header, without the backing file's name.
pub const HEADER_LEN: usize = size_of::<FixedHeader>();

/// Bytes of a table entry.
pub const ENTRY_LEN: u64 = 8;

/// Feature bit: there is a backing file.
const BACKING_FILE: u64 = 1;
/// Feature bit: the tables may be inconsistent.
const NEED_CHECK: u64 = 1 << 1;
/// Feature bit: the backing file is raw, whatever it looks like.
const BACKING_IS_RAW: u64 = 1 << 2;

/// The feature bits that have a meaning here.
const KNOWN: u64 = BACKING_FILE | NEED_CHECK | BACKING_IS_RAW;

/// Cluster sizes: 2^12 to 2^26 bytes.
const CLUSTER_SIZES: std::ops::RangeInclusive<u32> = 1 << 12..=1 << 26;

/// Clusters of a table: a power of two up to this.
const MAX_TABLE_CLUSTERS: u32 = 16;

/// Largest disk: a file offset must hold its size.
const MAX_IMAGE_SIZE: u64 = i64::MAX.unsigned_abs();

/// Why a QED file was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QedError {
    /// The first bytes are not those of a QED file.
    #[error("not a QED file: it starts with {found:02x?}, not with \"QED\\0\"")]
    BadMagic {
        /// The first four bytes of the file, or fewer if it ends there.
        found: Vec<u8>,
    },
    /// The file ends inside the header or the backing file's name.
    #[error("truncated: its header needs {needed} bytes, there are {len}")]
    Truncated {
        /// Bytes there are.
        len: usize,
        /// Bytes needed.
        needed: u64,
    },
    /// A feature bit that this program does not know.
    #[error("unknown feature bits {bits:#x}")]
    UnknownFeatures {
        /// The unknown bits.
        bits: u64,
    },
    /// It was not closed cleanly.
    #[error("it was not closed cleanly (`qemu-img check -r all` repairs it)")]
    NeedCheck,
    /// The cluster size is impossible.
    #[error("cluster size {size} is not a power of two from 4096 to 67108864")]
    ClusterSize {
        /// The field, in bytes.
        size: u32,
    },
    /// The table size is impossible.
    #[error("table size {clusters} is not a power of two from 1 to 16 clusters")]
    TableSize {
        /// The field, in clusters.
        clusters: u32,
    },
    /// The header's own size is impossible.
    #[error("header size is {clusters} clusters; it must be 1 or more, and below 2 GiB")]
    HeaderSize {
        /// The field, in clusters.
        clusters: u32,
    },
    /// The disk's size is impossible.
    #[error("image size {size} is no multiple of 512, or more than the tables can map, {max}")]
    ImageSize {
        /// The field, in bytes.
        size: u64,
        /// The largest size, in bytes.
        max: u64,
    },
    /// The backing file's name does not lie in the header.
    #[error("backing file name at offset {offset} of {size} bytes lies outside the header")]
    BackingNamePlace {
        /// Where it starts.
        offset: u32,
        /// Its length in bytes.
        size: u32,
    },
    /// The backing file's name is no plain path, or has an impossible length.
    #[error(transparent)]
    Name(#[from] FormatError),
    /// A table does not lie where a table can.
    #[error("{table} table at offset {offset:#x} is not wholly in the file, on a cluster boundary")]
    TablePlace {
        /// Which table.
        table: &'static str,
        /// Where it is said to be.
        offset: u64,
    },
    /// A data cluster does not lie where one can.
    #[error("cluster at offset {offset:#x} is not wholly in the file, on a cluster boundary")]
    ClusterPlace {
        /// Where it is said to be.
        offset: u64,
    },
}

/// The header as it lies in the file; all integers are little-endian.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct FixedHeader {
    /// [`MAGIC`].
    magic: [u8; 4],
    /// Size of a cluster in bytes.
    cluster_size: U32,
    /// Clusters of a table.
    table_size: U32,
    /// Clusters of the header.
    header_size: U32,
    /// Bits that a reader must know.
    features: U64,
    /// Bits that a reader may ignore.
    compat_features: U64,
    /// Bits that a writer that does not know them must clear.
    autoclear_features: U64,
    /// Where the L1 table is, in bytes.
    l1_table_offset: U64,
    /// Size of the disk in bytes.
    image_size: U64,
    /// Where the backing file's name starts, in bytes.
    backing_filename_offset: U32,
    /// Bytes of the backing file's name.
    backing_filename_size: U32,
}

const _: () = assert!(HEADER_LEN == 64);

/// A header that has passed all checks that need no other part of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Size of a cluster in bytes: a power of two from 4 KiB to 64 MiB.
    cluster_size: u64,
    /// Bytes of an L1 or L2 table: 1 to 16 clusters.
    table_len: u64,
    /// Bytes of the header: nothing else lies before.
    header_len: u64,
    /// Size of the disk in bytes, a multiple of 512.
    image_size: u64,
    /// Where the L1 table is, in bytes.
    l1_offset: u64,
    /// Where in the file the backing file's name lies, if there is one.
    backing_name: Option<ByteRange>,
    /// Whether the backing file is known to be raw.
    backing_is_raw: bool,
}

impl Header {
    /// Decodes the first [`HEADER_LEN`] bytes of a file.
    ///
    /// # Errors
    /// Names the first rule that the header breaks.
    pub fn decode(bytes: &[u8]) -> Result<Self, QedError> {
        if !bytes.starts_with(&MAGIC) {
            let found = bytes.iter().take(MAGIC.len()).copied().collect();
            return Err(QedError::BadMagic { found });
        }
        let short = QedError::Truncated { len: bytes.len(), needed: HEADER_LEN as u64 };
        let (fixed, _) = FixedHeader::ref_from_prefix(bytes).map_err(|_| short)?;
        // Before any other field: an unknown feature may give them another meaning.
        let features = fixed.features.get();
        if features & !KNOWN != 0 {
            return Err(QedError::UnknownFeatures { bits: features & !KNOWN });
        }
        if features & NEED_CHECK != 0 {
            return Err(QedError::NeedCheck);
        }
        let cluster_size = fixed.cluster_size()?;
        let mut header = Self {
            cluster_size,
            table_len: fixed.table_len(cluster_size)?,
            header_len: fixed.header_len(cluster_size)?,
            image_size: fixed.image_size.get(),
            l1_offset: fixed.l1_table_offset.get(),
            backing_name: None,
            backing_is_raw: features & BACKING_IS_RAW != 0,
        };
        let (size, max) = (header.image_size, header.max_image_size());
        if !size.is_multiple_of(SECTOR_SIZE) || size > max {
            return Err(QedError::ImageSize { size, max });
        }
        if features & BACKING_FILE != 0 {
            header.backing_name = Some(fixed.backing_name(header.header_len)?);
        }
        Ok(header)
    }

    /// Where in the file the backing file's name lies, if there is one: at most 1023 bytes.
    #[must_use]
    pub fn backing_name(&self) -> Option<ByteRange> {
        self.backing_name
    }

    /// The backing file's name, from the bytes at [`Header::backing_name`].
    ///
    /// # Errors
    /// If it is no plain path.
    pub fn decode_name(bytes: &[u8]) -> Result<FileName, QedError> {
        Ok(FileName::from_bytes(FileRole::Backing, bytes)?)
    }

    /// Whether the header says that the backing file is raw. If not, nothing says what it is.
    #[must_use]
    pub fn backing_is_raw(&self) -> bool {
        self.backing_is_raw
    }

    /// Size of the disk in bytes, a multiple of 512.
    #[must_use]
    pub fn image_size(&self) -> u64 {
        self.image_size
    }

    /// Size of a cluster in bytes.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        self.cluster_size
    }

    /// Bytes of an L2 table.
    #[must_use]
    pub fn table_len(&self) -> u64 {
        self.table_len
    }

    /// Entries of a table.
    #[must_use]
    pub fn table_entries(&self) -> u64 {
        self.table_len.div_ceil(ENTRY_LEN)
    }

    /// Bytes of the disk that one L2 table maps: 2 MiB to 8 PiB.
    #[must_use]
    pub fn l2_reach(&self) -> u64 {
        self.cluster_size.saturating_mul(self.table_entries())
    }

    /// Where the part of the L1 table is that maps the disk, in a file of `file_len` bytes.
    ///
    /// # Errors
    /// `TablePlace`.
    pub fn l1_place(&self, file_len: u64) -> Result<ByteRange, QedError> {
        let offset = self.l1_offset;
        if !self.is_in_file(offset, self.table_len, file_len) {
            return Err(QedError::TablePlace { table: "L1", offset });
        }
        let entries = self.image_size.div_ceil(self.l2_reach());
        Ok(ByteRange::between(offset, offset.saturating_add(entries.saturating_mul(ENTRY_LEN))))
    }

    /// What an L1 entry says, in a file of `file_len` bytes: where an L2 table is, if there is one.
    ///
    /// # Errors
    /// `TablePlace`.
    pub fn l2_place(&self, entry: u64, file_len: u64) -> Result<Option<u64>, QedError> {
        match entry {
            0 => Ok(None),
            // Two tables in one place would make data of metadata.
            offset
                if offset.abs_diff(self.l1_offset) >= self.table_len
                    && self.is_in_file(offset, self.table_len, file_len) =>
            {
                Ok(Some(offset))
            }
            offset => Err(QedError::TablePlace { table: "L2", offset }),
        }
    }

    /// What an L2 entry says, in a file of `file_len` bytes.
    ///
    /// # Errors
    /// `ClusterPlace`.
    pub fn cluster(&self, entry: u64, file_len: u64) -> Result<Cluster, QedError> {
        match entry {
            0 => Ok(Cluster::Unallocated),
            1 => Ok(Cluster::Zero),
            offset if self.is_in_file(offset, self.cluster_size, file_len) => {
                Ok(Cluster::Data { offset })
            }
            offset => Err(QedError::ClusterPlace { offset }),
        }
    }

    /// The largest disk that the tables can map, in bytes.
    fn max_image_size(&self) -> u64 {
        let most = self.l2_reach().saturating_mul(self.table_entries());
        most.min(MAX_IMAGE_SIZE) & !SECTOR_SIZE.saturating_sub(1)
    }

    /// Whether `len` bytes at `offset` start on a cluster behind the header and lie in the whole
    /// clusters of a file of `file_len` bytes.
    fn is_in_file(&self, offset: u64, len: u64, file_len: u64) -> bool {
        let cluster = self.cluster_size;
        let clusters_end = file_len & !cluster.saturating_sub(1);
        offset.is_multiple_of(cluster)
            && offset >= self.header_len
            && offset.checked_add(len).is_some_and(|end| end <= clusters_end)
    }
}

/// What an L2 entry says about its cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cluster {
    /// Nothing: ask the backing file.
    Unallocated,
    /// It reads as zeros.
    Zero,
    /// Its bytes are in the file.
    Data {
        /// Where, in bytes.
        offset: u64,
    },
}

impl FixedHeader {
    /// The cluster size in bytes.
    fn cluster_size(&self) -> Result<u64, QedError> {
        let size = self.cluster_size.get();
        Some(u64::from(size))
            .filter(|_| size.is_power_of_two() && CLUSTER_SIZES.contains(&size))
            .ok_or(QedError::ClusterSize { size })
    }

    /// Bytes of a table.
    fn table_len(&self, cluster_size: u64) -> Result<u64, QedError> {
        let clusters = self.table_size.get();
        Some(cluster_size.saturating_mul(clusters.into()))
            .filter(|_| clusters.is_power_of_two() && clusters <= MAX_TABLE_CLUSTERS)
            .ok_or(QedError::TableSize { clusters })
    }

    /// Bytes of the header.
    fn header_len(&self, cluster_size: u64) -> Result<u64, QedError> {
        let clusters = self.header_size.get();
        let len = cluster_size.saturating_mul(clusters.into());
        if clusters == 0 || len >= i32::MAX.unsigned_abs().into() {
            return Err(QedError::HeaderSize { clusters });
        }
        Ok(len)
    }

    /// Where the backing file's name lies.
    fn backing_name(&self, header_len: u64) -> Result<ByteRange, QedError> {
        let (offset, size) = (self.backing_filename_offset.get(), self.backing_filename_size.get());
        check_len(FileRole::Backing, size as usize)?;
        match ByteRange::new(offset.into(), size.into()) {
            Some(place) if offset as usize >= HEADER_LEN && place.end() <= header_len => Ok(place),
            _ => Err(QedError::BackingNamePlace { offset, size }),
        }
    }
}

/// Whether a file claims to be QED, by the magic alone.
#[must_use]
pub fn is_qed(first_bytes: &[u8]) -> bool {
    first_bytes.starts_with(&MAGIC)
}

/// The entries of a table, or of a part of one. A part of an entry at the end is left out.
pub fn decode_table(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(TABLE_ENTRY_BYTES).filter_map(|c| U64::read_from_bytes(c).ok()).map(U64::get)
}

/// [`ENTRY_LEN`] as the length of a slice.
const TABLE_ENTRY_BYTES: usize = size_of::<U64>();
