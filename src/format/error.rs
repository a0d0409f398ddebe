//! What can be wrong with an add-cow header, or with a request to write one.
//!
//! One variant for each condition, with the offending value and its limit, so that the message
//! alone tells what to look at. Text from a file is printed escaped: it must not reach a terminal
//! as it is.
//!
//! Not here: errors of reading the file, and of opening the files that it names (`image`).

use crate::format::reference::{FileName, FileRole};
use crate::units::ByteRange;

/// Why a header was refused, by [`decode`](crate::format::Header::decode) or before it was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Fewer bytes than the fixed part of the header.
    #[error("file of {len} bytes is shorter than the add-cow header of {needed} bytes")]
    TooShort {
        /// Bytes there are.
        len: usize,
        /// Bytes of the fixed header.
        needed: usize,
    },

    /// The first bytes are not those of an add-cow file.
    #[error("not an add-cow file: it starts with {found:02x?}, not with \"ACOW\"")]
    BadMagic {
        /// The first four bytes of the file, or fewer if it ends there.
        found: Vec<u8>,
    },

    /// The magic of the versions before the header was redesigned.
    #[error(
        "add-cow format of 2012 or older (magic \"ADD_COW\\xff\") is not supported; \
         only the format of 2013 (magic \"ACOW\") is"
    )]
    OldMagic,

    /// A bit in the feature word that a reader has to know.
    #[error("unknown incompatible feature bits {bits:#x}; this program knows none")]
    UnknownFeatures {
        /// The unknown bits.
        bits: u64,
    },

    /// The cluster size is none that any version of the format allowed.
    #[error("cluster_bits is {bits}, outside {min} to {max}")]
    ClusterBits {
        /// The field.
        bits: u32,
        /// Smallest value that can be read.
        min: u32,
        /// Largest value.
        max: u32,
    },

    /// The header size does not follow from the cluster size.
    #[error("header_size is {found}, but clusters of {cluster} bytes need {expected}")]
    HeaderSize {
        /// The field, in bytes.
        found: u32,
        /// What it has to be, in bytes.
        expected: u64,
        /// The cluster size, in bytes.
        cluster: u64,
    },

    /// Only one of backing_offset and backing_size is zero.
    #[error(
        "backing name offset {offset} and size {size} contradict each other: \
         both or neither must be 0"
    )]
    BackingInconsistent {
        /// The field backing_offset.
        offset: u32,
        /// The field backing_size, in bytes.
        size: u32,
    },

    /// The header names no image file.
    #[error("header names no image file (name offset {offset}, size {size})")]
    ImageNameMissing {
        /// The field image_offset.
        offset: u32,
        /// The field image_size, in bytes.
        size: u32,
    },

    /// A name starts inside the fixed header.
    #[error("{role} name at offset {offset} overlaps the fixed header of {min} bytes")]
    NameInFixedHeader {
        /// Whose name.
        role: FileRole,
        /// Where it starts.
        offset: u32,
        /// The first offset that is free for names.
        min: usize,
    },

    /// A name starts at or past the end of the header area.
    #[error("{role} name starts at offset {offset}, past the last legal one, {max}")]
    NameOffset {
        /// Whose name.
        role: FileRole,
        /// Where it starts.
        offset: u32,
        /// The last legal offset: header_size - 2.
        max: u64,
    },

    /// A name runs past the end of the header area.
    #[error(
        "{role} name of {size} bytes at offset {offset} ends past the header of {header_size} bytes"
    )]
    NamePastHeader {
        /// Whose name.
        role: FileRole,
        /// Where it starts.
        offset: u32,
        /// Its length in bytes.
        size: u32,
        /// Length of the header area in bytes.
        header_size: u64,
    },

    /// The file ends before the name does.
    #[error("{role} name ends at offset {end}, but the file ends at {len}")]
    NameTruncated {
        /// Whose name.
        role: FileRole,
        /// The first byte after the name.
        end: u64,
        /// Bytes there are.
        len: usize,
    },

    /// The two names share bytes.
    #[error("backing file name at {backing:?} and image file name at {image:?} overlap")]
    NamesOverlap {
        /// Where the backing file's name lies.
        backing: ByteRange,
        /// Where the image file's name lies.
        image: ByteRange,
    },

    /// A name of no bytes.
    #[error("{role} name is empty")]
    NameEmpty {
        /// Whose name.
        role: FileRole,
    },

    /// A name that is longer than a path may be.
    #[error("{role} name is {len} bytes long; the limit is {max}")]
    NameTooLong {
        /// Whose name.
        role: FileRole,
        /// Its length in bytes.
        len: usize,
        /// The limit in bytes.
        max: usize,
    },

    /// A name with a zero byte, at which the operating system would cut it off.
    #[error("{role} name {name:?} has a NUL byte at position {position}")]
    NameHasNul {
        /// Whose name.
        role: FileRole,
        /// The name, shown lossily.
        name: String,
        /// Where in the name the first zero byte is.
        position: usize,
    },

    /// A name that other programs take for a protocol, as in `json:` or `nbd:`.
    #[error(
        "{role} name {name:?} has a protocol prefix (a ':' before any '/'); \
         only file names are followed (write ./ before the name of such a file)"
    )]
    NameIsProtocol {
        /// Whose name.
        role: FileRole,
        /// The name, shown lossily.
        name: String,
    },

    /// The image file and the backing file have the same name.
    #[error("image file and backing file are the same file, {name:?}")]
    SameFile {
        /// The name.
        name: FileName,
    },

    /// A format field that is not printable ASCII followed by zeros only.
    #[error(
        "{role} format \"{}\" is not printable ASCII followed by zero bytes",
        found.escape_ascii()
    )]
    FormatText {
        /// Whose format.
        role: FileRole,
        /// The field.
        found: Vec<u8>,
    },

    /// The header does not say what format the image file has.
    #[error("header does not name the format of the image file; formats are never probed")]
    ImageFormatMissing,

    /// The header does not say what format the backing file has.
    #[error(
        "header does not name the format of backing file {name:?}; formats are never probed, \
         so the format must be stored in the header"
    )]
    BackingFormatMissing {
        /// The backing file's name.
        name: FileName,
    },

    /// A format name that does not leave room for the closing zero byte.
    #[error("{role} format {format:?} is {len} bytes long; at most {max} can be written")]
    FormatTooLong {
        /// Whose format.
        role: FileRole,
        /// The format's name.
        format: String,
        /// Its length in bytes.
        len: usize,
        /// The limit in bytes.
        max: usize,
    },

    /// A cluster size that can be read but must not be written.
    #[error("cluster size {bytes} is below {min}, the smallest that is written")]
    ClusterTooSmall {
        /// The size asked for, in bytes.
        bytes: u64,
        /// The smallest size that is written, in bytes.
        min: u64,
    },

    /// The names do not fit into the header area.
    #[error("names of {names} bytes do not fit the header of {header_size} bytes")]
    NamesDoNotFit {
        /// Bytes of both names.
        names: usize,
        /// Length of the header area in bytes.
        header_size: u64,
    },

    /// The header area has no room for another name beside those in use.
    #[error(
        "the header of {header_size} bytes has no gap for another backing file name of {len} bytes"
    )]
    NoGap {
        /// Bytes of the new name.
        len: usize,
        /// Length of the header area in bytes.
        header_size: u64,
    },

    /// A disk whose size is no file offset.
    #[error("disk of {size} bytes is larger than the largest possible file, {max} bytes")]
    DiskTooLarge {
        /// The size in bytes.
        size: u64,
        /// The limit in bytes.
        max: u64,
    },
}
