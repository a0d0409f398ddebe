//! The qcow2 header: decode, judge, encode.
//!
//! Decoding follows the published specification and refuses what breaks it; what is legal but
//! not supported (encryption, zstd, subclusters, images that need repair) decodes, so that it can
//! be shown, and is refused by [`Header::check_readable`]. An unknown incompatible bit refuses the
//! file at once, since it may give any other field another meaning.
//!
//! Relies on the caller to pass the first cluster. Not here: tables and what they refer to.

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::entry::ENTRY_LEN;
use super::error::Qcow2Error;
use super::extension::{
    BACKING_FORMAT, DATA_FILE, Extension, FEATURE_NAMES, FeatureName, decode, decode_feature_names,
    encode, encode_feature_names, part,
};
use crate::format::reference::{FileName, FileRole, MAX_FORMAT_LEN, check_len};
use crate::units::{ClusterSize, SECTOR_SIZE};

/// The first bytes of every qcow2 file, and of the older qcow, which has version 1.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";

/// As many first bytes of a file as [`Header::area_len`] needs.
pub const PREFIX_LEN: usize = size_of::<FixedHeader>();

/// Incompatible bit: refcounts may be wrong.
pub const DIRTY: u64 = 1;
/// Incompatible bit: QEMU found damage.
pub const CORRUPT: u64 = 1 << 1;
/// Incompatible bit: guest clusters are in an external data file.
pub const EXTERNAL_DATA: u64 = 1 << 2;
/// Incompatible bit: compressed clusters are not deflated but something else.
pub const COMPRESSION: u64 = 1 << 3;
/// Incompatible bit: L2 entries of 128 bits.
pub const EXTENDED_L2: u64 = 1 << 4;
/// Autoclear bit: the external data file alone is a consistent raw image.
pub const RAW_EXTERNAL_DATA: u64 = 1 << 1;

/// The incompatible bits that have a meaning here.
const KNOWN: u64 = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION | EXTENDED_L2;

/// Largest L1 table in bytes: 32 MiB, QEMU's limit.
pub const MAX_L1_LEN: u64 = 32 << 20;

/// Largest refcount table in bytes: 8 MiB, QEMU's limit.
pub const MAX_REFCOUNT_TABLE_LEN: u64 = 8 << 20;

/// Largest virtual size: a file offset must hold it.
const MAX_VIRTUAL_SIZE: u64 = i64::MAX.unsigned_abs();

/// log2 of the refcount width in version 2: 16 bits.
const REFCOUNT_ORDER: u32 = 4;

/// Bytes of a version 3 header that is written.
const WRITTEN_LEN: u32 = 112;

/// The part of the header that both versions have; all integers are big-endian.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct FixedHeader {
    /// [`MAGIC`].
    magic: [u8; 4],
    /// 2 or 3.
    version: U32,
    /// Where the backing file's name starts; 0 if there is none.
    backing_offset: U64,
    /// Bytes of the backing file's name.
    backing_size: U32,
    /// log2 of the cluster size in bytes.
    cluster_bits: U32,
    /// Virtual size in bytes.
    size: U64,
    /// 0 none, 1 AES, 2 LUKS.
    crypt_method: U32,
    /// Entries of the L1 table.
    l1_size: U32,
    /// Where the L1 table starts.
    l1_table_offset: U64,
    /// Where the refcount table starts.
    refcount_table_offset: U64,
    /// Clusters of the refcount table.
    refcount_table_clusters: U32,
    /// Internal snapshots.
    nb_snapshots: U32,
    /// Where the table of snapshots starts.
    snapshots_offset: U64,
}

/// What version 3 adds.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Version3 {
    /// Bits that a reader must know.
    incompatible: U64,
    /// Bits that a reader may ignore.
    compatible: U64,
    /// Bits that a writer that does not know them must clear.
    autoclear: U64,
    /// log2 of the width of a refcount in bits.
    refcount_order: U32,
    /// Bytes of the header.
    header_length: U32,
}

/// Bytes of the header up to what version 2 has, and up to what every version 3 has.
const VERSION2_LEN: u32 = 72;
/// See [`VERSION2_LEN`].
const VERSION3_LEN: u32 = 104;

const _: () = assert!(size_of::<FixedHeader>() == VERSION2_LEN as usize);
const _: () = assert!(size_of::<Version3>() == (VERSION3_LEN - VERSION2_LEN) as usize);

/// The backing file as the header names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// Its name: relative to the folder of the qcow2 file unless absolute.
    pub name: FileName,
    /// Its format; `None` if the file does not say: other programs would probe, we refuse.
    pub format: Option<String>,
}

/// A decoded header, or one that is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Size of a cluster.
    pub cluster_size: ClusterSize,
    /// Virtual size in bytes as stored; see [`Header::virtual_size`].
    pub size: u64,
    /// 0 none, 1 AES, 2 LUKS.
    pub crypt_method: u32,
    /// Entries of the L1 table.
    pub l1_entries: u32,
    /// Where the L1 table starts, in bytes.
    pub l1_offset: u64,
    /// Where the refcount table starts, in bytes.
    pub refcount_table_offset: u64,
    /// Length of the refcount table in clusters.
    pub refcount_table_clusters: u32,
    /// log2 of the width of a refcount in bits.
    pub refcount_order: u32,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// Where the table of snapshots starts, in bytes.
    pub snapshots_offset: u64,
    /// Incompatible feature word: known bits only.
    pub incompatible: u64,
    /// Compatible feature word.
    pub compatible: u64,
    /// Autoclear feature word.
    pub autoclear: u64,
    /// 0 zlib, 1 zstd.
    pub compression: u8,
    /// The backing file, if any.
    pub backing: Option<Backing>,
    /// Name of the external data file, if the header gives one.
    pub data_file: Option<FileName>,
    /// The file's own table of feature names.
    pub feature_names: Vec<FeatureName>,
    /// The other extensions, in their order.
    pub extensions: Vec<Extension>,
}

/// Whether a file claims to be qcow2 (or the older qcow), by the magic alone.
#[must_use]
pub fn is_qcow2(first_bytes: &[u8]) -> bool {
    first_bytes.starts_with(&MAGIC)
}

impl Header {
    /// How many first bytes of the file [`Header::decode`] wants: one cluster. From the first
    /// [`PREFIX_LEN`] bytes of the file.
    ///
    /// # Errors
    /// `BadMagic`, `Truncated`, `Version`, `ClusterBits`.
    pub fn area_len(prefix: &[u8]) -> Result<u64, Qcow2Error> {
        FixedHeader::parse(prefix)?.cluster_size().map(ClusterSize::bytes)
    }

    /// Decodes the header at the start of `area`: the file's first cluster, or as much of that as
    /// the file has.
    ///
    /// # Errors
    /// Names the first rule of the format that the header breaks, or the unknown feature.
    pub fn decode(area: &[u8]) -> Result<Self, Qcow2Error> {
        let fixed = FixedHeader::parse(area)?;
        let (v3, compression) = fixed.version3(area)?;
        let incompatible = v3.incompatible.get();
        let cluster_size = fixed.cluster_size()?;
        let start = v3.header_length.get();
        if u64::from(start) > cluster_size.bytes() {
            return Err(Qcow2Error::HeaderLength { length: start });
        }
        let backing_offset = fixed.backing_offset.get();
        let names_end = match backing_offset {
            0 => cluster_size.bytes(),
            offset => offset.min(cluster_size.bytes()),
        };
        let extensions = decode(area, start.into(), names_end)?;
        let mut header = Self {
            version: fixed.version.get(),
            cluster_size,
            size: fixed.size.get(),
            crypt_method: fixed.crypt_method.get(),
            l1_entries: fixed.l1_size.get(),
            l1_offset: fixed.l1_table_offset.get(),
            refcount_table_offset: fixed.refcount_table_offset.get(),
            refcount_table_clusters: fixed.refcount_table_clusters.get(),
            refcount_order: v3.refcount_order.get(),
            snapshots: fixed.nb_snapshots.get(),
            snapshots_offset: fixed.snapshots_offset.get(),
            incompatible,
            compatible: v3.compatible.get(),
            autoclear: v3.autoclear.get(),
            compression,
            backing: fixed.backing(area, start, cluster_size)?,
            data_file: None,
            feature_names: Vec::new(),
            extensions: Vec::new(),
        };
        header.take_extensions(extensions)?;
        Ok(header)
    }

    /// The size of the disk in bytes: as stored, less what is no whole sector.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.size & !(SECTOR_SIZE - 1)
    }

    /// Whether guest clusters are in an external data file.
    #[must_use]
    pub fn has_external_data(&self) -> bool {
        self.incompatible & EXTERNAL_DATA != 0
    }

    /// The name of the external data file; `None` if clusters are in the qcow2 file itself.
    ///
    /// # Errors
    /// `DataFileUnnamed`.
    pub fn external_data(&self) -> Result<Option<&FileName>, Qcow2Error> {
        match (self.has_external_data(), &self.data_file) {
            (false, _) => Ok(None),
            (true, Some(name)) => Ok(Some(name)),
            (true, None) => Err(Qcow2Error::DataFileUnnamed),
        }
    }

    /// Whether the external data file alone is a consistent raw image.
    #[must_use]
    pub fn has_raw_data(&self) -> bool {
        self.autoclear & RAW_EXTERNAL_DATA != 0
    }

    /// Bytes of the disk that one L2 table maps.
    #[must_use]
    pub fn l2_reach(&self) -> u64 {
        l2_reach(self.cluster_size)
    }

    /// Refuses what the format allows and we cannot read, and tables that cannot be.
    ///
    /// Internal snapshots are no reason: the present state of the disk does not depend on them.
    ///
    /// # Errors
    /// The first reason, those that a person can do something about first.
    pub fn check_readable(&self) -> Result<(), Qcow2Error> {
        if self.crypt_method != 0 {
            return Err(Qcow2Error::Encrypted { method: self.crypt_method });
        }
        if self.incompatible & CORRUPT != 0 {
            return Err(Qcow2Error::Corrupt);
        }
        if self.incompatible & DIRTY != 0 {
            return Err(Qcow2Error::Dirty);
        }
        if self.incompatible & EXTENDED_L2 != 0 {
            return Err(Qcow2Error::ExtendedL2);
        }
        // The bit must be set exactly if the type is not 0: either way it is not plain zlib.
        if self.incompatible & COMPRESSION != 0 || self.compression != 0 {
            return Err(Qcow2Error::Compression { kind: self.compression });
        }
        if self.has_raw_data() && !self.has_external_data() {
            return Err(Qcow2Error::RawWithoutDataFile);
        }
        self.check_tables()
    }

    /// Refuses sizes and places of tables that cannot be.
    fn check_tables(&self) -> Result<(), Qcow2Error> {
        if self.size > MAX_VIRTUAL_SIZE {
            return Err(Qcow2Error::VirtualSize { size: self.size });
        }
        let l1_len = check_l1_entries(self.l1_entries.into())?;
        let needed = self.virtual_size().div_ceil(self.l2_reach());
        if u64::from(self.l1_entries) < needed {
            return Err(Qcow2Error::L1TooSmall { entries: self.l1_entries, needed });
        }
        if l1_len > 0 {
            self.check_place("L1 table", self.l1_offset, l1_len)?;
        }
        let clusters = self.refcount_table_clusters;
        let len = u64::from(clusters).saturating_mul(self.cluster_size.bytes());
        if len > MAX_REFCOUNT_TABLE_LEN {
            let max = MAX_REFCOUNT_TABLE_LEN;
            return Err(Qcow2Error::RefcountTableTooLarge { clusters, max });
        }
        self.check_place("refcount table", self.refcount_table_offset, len)?;
        if self.refcount_order > 6 {
            return Err(Qcow2Error::RefcountOrder { order: self.refcount_order });
        }
        Ok(())
    }

    /// Refuses a table that does not start on a cluster behind the header, or ends past 2^63.
    fn check_place(&self, table: &'static str, offset: u64, len: u64) -> Result<(), Qcow2Error> {
        let in_file = offset.checked_add(len).is_some_and(|end| end <= MAX_VIRTUAL_SIZE);
        let cluster = self.cluster_size.bytes();
        if !in_file || offset < cluster || !offset.is_multiple_of(cluster) {
            return Err(Qcow2Error::TablePlace { table, offset });
        }
        Ok(())
    }

    /// Sorts what was found behind the header into its fields.
    fn take_extensions(&mut self, extensions: Vec<Extension>) -> Result<(), Qcow2Error> {
        let mut format = None;
        for extension in extensions {
            let kind = extension.kind;
            let twice = match kind {
                BACKING_FORMAT => format.replace(extension.data).is_some(),
                DATA_FILE => {
                    let name = FileName::from_bytes(FileRole::Data, &extension.data)?;
                    self.data_file.replace(name).is_some()
                }
                FEATURE_NAMES => {
                    self.feature_names.extend(decode_feature_names(&extension.data));
                    false
                }
                _ => {
                    self.extensions.push(extension);
                    false
                }
            };
            if twice {
                return Err(Qcow2Error::ExtensionTwice { kind });
            }
        }
        // A format without a backing file means nothing.
        if let (Some(found), Some(backing)) = (format, &mut self.backing) {
            let is_name = (1..=MAX_FORMAT_LEN).contains(&found.len())
                && found.iter().all(u8::is_ascii_graphic);
            if !is_name {
                return Err(Qcow2Error::BackingFormat { found });
            }
            backing.format = Some(found.into_iter().map(char::from).collect());
        }
        Ok(())
    }

    /// The bytes of a version 3 header with its extensions and the backing file's name: the start
    /// of the first cluster, whose rest is zeros.
    ///
    /// `version`, `crypt_method` and `compression` are not looked at: 3, none, zlib.
    ///
    /// # Errors
    /// `HeaderDoesNotFit`.
    pub fn encode(&self) -> Result<Vec<u8>, Qcow2Error> {
        let mut extensions = Vec::new();
        let mut push = |kind, data| extensions.push(Extension { kind, data });
        let format = self.backing.as_ref().and_then(|backing| backing.format.as_ref());
        if let Some(format) = format {
            push(BACKING_FORMAT, format.as_bytes().to_vec());
        }
        if let Some(name) = &self.data_file {
            push(DATA_FILE, name.as_bytes().to_vec());
        }
        if !self.feature_names.is_empty() {
            push(FEATURE_NAMES, encode_feature_names(&self.feature_names));
        }
        extensions.extend_from_slice(&self.extensions);
        let extensions = encode(&extensions);
        let names = (WRITTEN_LEN as usize).saturating_add(extensions.len());
        let backing = self.backing.as_ref().map_or(&[][..], |backing| backing.name.as_bytes());
        let needed = names.saturating_add(backing.len());
        let does_not_fit =
            Qcow2Error::HeaderDoesNotFit { needed, cluster: self.cluster_size.bytes() };
        if needed as u64 > self.cluster_size.bytes() {
            return Err(does_not_fit);
        }
        let backing_size = u32::try_from(backing.len()).map_err(|_| does_not_fit)?;
        let fixed = FixedHeader {
            magic: MAGIC,
            version: U32::new(3),
            backing_offset: U64::new(if backing.is_empty() { 0 } else { names as u64 }),
            backing_size: U32::new(backing_size),
            cluster_bits: U32::new(self.cluster_size.bits()),
            size: U64::new(self.size),
            crypt_method: U32::new(0),
            l1_size: U32::new(self.l1_entries),
            l1_table_offset: U64::new(self.l1_offset),
            refcount_table_offset: U64::new(self.refcount_table_offset),
            refcount_table_clusters: U32::new(self.refcount_table_clusters),
            nb_snapshots: U32::new(self.snapshots),
            snapshots_offset: U64::new(self.snapshots_offset),
        };
        let v3 = Version3 {
            incompatible: U64::new(self.incompatible),
            compatible: U64::new(self.compatible),
            autoclear: U64::new(self.autoclear),
            refcount_order: U32::new(self.refcount_order),
            header_length: U32::new(WRITTEN_LEN),
        };
        // Compression type 0 and padding, up to WRITTEN_LEN.
        let rest = [0; (WRITTEN_LEN - VERSION3_LEN) as usize];
        Ok([fixed.as_bytes(), v3.as_bytes(), &rest, &extensions, backing].concat())
    }
}

impl FixedHeader {
    /// The fixed header at the start of `bytes`, with magic and version checked.
    fn parse(bytes: &[u8]) -> Result<&Self, Qcow2Error> {
        if !is_qcow2(bytes) {
            let found = bytes.iter().take(MAGIC.len()).copied().collect();
            return Err(Qcow2Error::BadMagic { found });
        }
        let short = Qcow2Error::Truncated { len: bytes.len(), needed: PREFIX_LEN as u64 };
        let (fixed, _) = Self::ref_from_prefix(bytes).map_err(|_| short)?;
        match fixed.version.get() {
            2 | 3 => Ok(fixed),
            version => Err(Qcow2Error::Version { version }),
        }
    }

    /// The cluster size, if QEMU would open it.
    fn cluster_size(&self) -> Result<ClusterSize, Qcow2Error> {
        let bits = self.cluster_bits.get();
        ClusterSize::from_bits(bits).ok_or(Qcow2Error::ClusterBits {
            bits,
            min: ClusterSize::MIN_BITS,
            max: ClusterSize::MAX_BITS,
        })
    }

    /// The fields of version 3 and the compression type, with their defaults in version 2.
    fn version3(&self, area: &[u8]) -> Result<(Version3, u8), Qcow2Error> {
        if self.version.get() == 2 {
            let none = U64::new(0);
            let v3 = Version3 {
                incompatible: none,
                compatible: none,
                autoclear: none,
                refcount_order: U32::new(REFCOUNT_ORDER),
                header_length: U32::new(VERSION2_LEN),
            };
            return Ok((v3, 0));
        }
        let bytes = part(area, VERSION2_LEN.into(), size_of::<Version3>() as u64)?;
        let short = Qcow2Error::Truncated { len: area.len(), needed: VERSION3_LEN.into() };
        let v3 = Version3::read_from_bytes(bytes).map_err(|_| short)?;
        let unknown = v3.incompatible.get() & !KNOWN;
        if unknown != 0 {
            return Err(unknown_features(area, &v3, unknown));
        }
        let length = v3.header_length.get();
        if length < VERSION3_LEN || !length.is_multiple_of(8) {
            return Err(Qcow2Error::HeaderLength { length });
        }
        let compression = match length {
            VERSION3_LEN => 0,
            _ => part(area, VERSION3_LEN.into(), 1)?.first().copied().unwrap_or(0),
        };
        Ok((v3, compression))
    }

    /// The backing file's name, if there is one.
    fn backing(
        &self,
        area: &[u8],
        header_length: u32,
        cluster_size: ClusterSize,
    ) -> Result<Option<Backing>, Qcow2Error> {
        let (offset, size) = (self.backing_offset.get(), self.backing_size.get());
        if offset == 0 {
            return Ok(None);
        }
        check_len(FileRole::Backing, size as usize)?;
        let fits = offset.checked_add(size.into()).is_some_and(|end| end <= cluster_size.bytes());
        if offset < header_length.into() || !fits {
            return Err(Qcow2Error::BackingNamePlace { offset, size });
        }
        let name = FileName::from_bytes(FileRole::Backing, part(area, offset, size.into())?)?;
        Ok(Some(Backing { name, format: None }))
    }
}

/// The error for unknown bits, with the names that the file's own table has for them.
///
/// The table is there for this very purpose; where it cannot be found the bits must do.
fn unknown_features(area: &[u8], v3: &Version3, bits: u64) -> Qcow2Error {
    let found = decode(area, v3.header_length.get().into(), area.len() as u64);
    let tables = found.unwrap_or_default().into_iter().filter(|e| e.kind == FEATURE_NAMES);
    let names = tables
        .flat_map(|table| decode_feature_names(&table.data))
        .filter(|f| f.word == 0 && f.bit < 64 && bits.wrapping_shr(f.bit.into()) & 1 != 0)
        .map(|feature| feature.name)
        .take(64);
    Qcow2Error::UnknownFeatures { bits, names: names.collect() }
}

/// Bytes of a disk that one L2 table of a file with clusters of that size maps: 32 KiB to 512 GiB.
#[must_use]
pub fn l2_reach(cluster_size: ClusterSize) -> u64 {
    // The cluster size squared, by the 8 bytes of an entry: at most 2^39.
    cluster_size.bytes().saturating_mul(cluster_size.bytes()).div_ceil(ENTRY_LEN as u64)
}

/// The length in bytes of an L1 table of so many entries.
///
/// # Errors
/// `L1TooLarge`.
pub fn check_l1_entries(entries: u64) -> Result<u64, Qcow2Error> {
    match entries.checked_mul(ENTRY_LEN as u64) {
        Some(len) if len <= MAX_L1_LEN => Ok(len),
        _ => Err(Qcow2Error::L1TooLarge { entries, max: MAX_L1_LEN }),
    }
}
