//! Why a qcow2 file was refused, one variant for each condition.
//!
//! Two kinds: what breaks the format's own rules, and what the format allows but we do not read.
//! The messages do not name the file: who opened it does.
//!
//! Not here: errors of reading the file.

use crate::format::FormatError;

/// What is wrong with a qcow2 header or table, or why it cannot be read here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Qcow2Error {
    /// The first bytes are not those of a qcow2 file.
    #[error("not a qcow2 file: it starts with {found:02x?}, not with \"QFI\\xfb\"")]
    BadMagic {
        /// The first four bytes of the file, or fewer if it ends there.
        found: Vec<u8>,
    },
    /// The file ends inside the header or an extension.
    #[error("truncated: its header needs {needed} bytes, there are {len}")]
    Truncated {
        /// Bytes there are.
        len: usize,
        /// Bytes needed.
        needed: u64,
    },
    /// A version that is neither 2 nor 3.
    #[error("qcow version {version} is not supported; 2 and 3 are")]
    Version {
        /// The field.
        version: u32,
    },
    /// An incompatible feature bit that this program does not know.
    #[error("unknown incompatible feature bits {bits:#x}{}", listed(names))]
    UnknownFeatures {
        /// The unknown bits.
        bits: u64,
        /// What the file's own table calls them, escaped.
        names: Vec<String>,
    },
    /// The cluster size is outside what QEMU opens.
    #[error("cluster_bits is {bits}, outside {min} to {max}")]
    ClusterBits {
        /// The field.
        bits: u32,
        /// Smallest value.
        min: u32,
        /// Largest value.
        max: u32,
    },
    /// The header's own length is impossible.
    #[error("header_length is {length}, not a multiple of 8 from 104 to the cluster size")]
    HeaderLength {
        /// The field, in bytes.
        length: u32,
    },
    /// An extension runs past the place where extensions end.
    #[error("header extension {kind:#010x} of {len} bytes runs past its area, which ends at {end}")]
    ExtensionPastEnd {
        /// Its type.
        kind: u32,
        /// Its length in bytes.
        len: u32,
        /// Where the area for extensions ends.
        end: u64,
    },
    /// An extension that must be there at most once is there twice.
    #[error("header extension {kind:#010x} occurs twice")]
    ExtensionTwice {
        /// Its type.
        kind: u32,
    },
    /// The backing file's name lies outside the first cluster or on the header.
    #[error("backing file name at offset {offset} of {size} bytes lies outside the first cluster")]
    BackingNamePlace {
        /// Where it starts.
        offset: u64,
        /// Its length in bytes.
        size: u32,
    },
    /// A name that is no plain path, or has an impossible length.
    #[error(transparent)]
    Name(#[from] FormatError),
    /// The name of the backing file's format is no name of a format.
    #[error(
        "backing format \"{}\" is not 1 to 15 characters of printable ASCII",
        found.escape_ascii()
    )]
    BackingFormat {
        /// What the extension holds.
        found: Vec<u8>,
    },
    /// The disk is larger than any file can be.
    #[error("virtual size {size} is larger than the largest possible file")]
    VirtualSize {
        /// The field, in bytes.
        size: u64,
    },
    /// The L1 table is larger than QEMU allows.
    #[error("L1 table of {entries} entries is larger than {max} bytes")]
    L1TooLarge {
        /// The field, or what the virtual size needs.
        entries: u64,
        /// The limit in bytes: 32 MiB.
        max: u64,
    },
    /// The L1 table does not reach the end of the disk.
    #[error("L1 table has {entries} entries, the virtual size needs {needed}")]
    L1TooSmall {
        /// The field.
        entries: u32,
        /// What the virtual size needs.
        needed: u64,
    },
    /// A table does not lie where a table can.
    #[error("{table} at offset {offset:#x} is not on a cluster boundary behind the header")]
    TablePlace {
        /// Which table.
        table: &'static str,
        /// Where it is said to be.
        offset: u64,
    },
    /// The refcount table is larger than QEMU allows.
    #[error("refcount table of {clusters} clusters is larger than {max} bytes")]
    RefcountTableTooLarge {
        /// The field.
        clusters: u32,
        /// The limit in bytes: 8 MiB.
        max: u64,
    },
    /// Refcounts of more than 64 bits.
    #[error("refcount_order is {order}; the largest is 6")]
    RefcountOrder {
        /// The field: log2 of the width in bits.
        order: u32,
    },
    /// A table entry has reserved bits.
    #[error("{table} entry {entry:#018x} has reserved bits set")]
    ReservedBits {
        /// Which table.
        table: &'static str,
        /// The entry.
        entry: u64,
    },
    /// A table entry points into the middle of a cluster.
    #[error("{table} entry {entry:#018x} does not point to a cluster boundary")]
    Unaligned {
        /// Which table.
        table: &'static str,
        /// The entry.
        entry: u64,
    },
    /// A zero cluster in version 2, which has none.
    #[error("L2 entry {entry:#018x} is a zero cluster, which version 2 does not have")]
    ZeroInVersion2 {
        /// The entry.
        entry: u64,
    },
    /// The image is encrypted.
    #[error("it is encrypted ({}), which is not supported", crypt_name(*method))]
    Encrypted {
        /// The field: 1 AES, 2 LUKS.
        method: u32,
    },
    /// Compressed with something else than zlib.
    #[error("compression {} is not supported; only zlib is", compression_name(*kind))]
    Compression {
        /// The field: 1 zstd.
        kind: u8,
    },
    /// Entries of 128 bits.
    #[error("extended L2 entries (subclusters) are not supported")]
    ExtendedL2,
    /// Its refcounts may be wrong.
    #[error("it was not closed cleanly (`qemu-img check -r all` repairs it)")]
    Dirty,
    /// QEMU found it damaged.
    #[error("it is marked as corrupt (`qemu-img check -r all` may repair it)")]
    Corrupt,
    /// The raw bit without a data file.
    #[error("it claims that its data file is a raw image, but has no data file")]
    RawWithoutDataFile,
    /// The data file has no name.
    #[error("it has an external data file, but does not name it")]
    DataFileUnnamed,
    /// Header, extensions and backing name do not fit the first cluster.
    #[error("header and names of {needed} bytes do not fit the first cluster of {cluster} bytes")]
    HeaderDoesNotFit {
        /// What they take.
        needed: usize,
        /// The cluster size in bytes.
        cluster: u64,
    },
}

/// The unknown features' names as the end of a sentence.
fn listed(names: &[String]) -> String {
    if names.is_empty() { String::new() } else { format!(" ({})", names.join(", ")) }
}

/// What the encryption methods are called.
fn crypt_name(method: u32) -> String {
    match method {
        1 => "AES".to_owned(),
        2 => "LUKS".to_owned(),
        other => format!("method {other}"),
    }
}

/// What the compression types are called, as part of a sentence.
fn compression_name(kind: u8) -> String {
    match kind {
        // The bit that says "not zlib" is set all the same.
        0 => "of an unknown type".to_owned(),
        1 => "with zstd".to_owned(),
        other => format!("of type {other}"),
    }
}
