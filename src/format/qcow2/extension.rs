//! Header extensions: records of type, length and bytes between the header and the backing name.
//!
//! Not here: what an extension's bytes mean, but for the table of feature names (`header`).

use zerocopy::byteorder::big_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::error::Qcow2Error;

/// Type of the record that ends the list.
pub(super) const END: u32 = 0;
/// Type: name of the backing file's format.
pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Type: names of feature bits.
pub(super) const FEATURE_NAMES: u32 = 0x6803_f857;
/// Type: name of the external data file.
pub(super) const DATA_FILE: u32 = 0x4441_5441;

/// Bytes of one record of the table of feature names.
const FEATURE_NAME_LEN: usize = 48;

/// Type and length in front of an extension's bytes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Prefix {
    /// What it is.
    kind: U32,
    /// Bytes that follow, without the padding to a multiple of 8.
    len: U32,
}

/// One extension.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extension {
    /// Its type.
    pub kind: u32,
    /// Its bytes, without padding.
    pub data: Vec<u8>,
}

/// What a feature bit is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FeatureName {
    /// Which word: 0 incompatible, 1 compatible, 2 autoclear.
    pub word: u8,
    /// Which bit: 0 to 63.
    pub bit: u8,
    /// The name, escaped so that it can be printed.
    pub name: String,
}

/// The extensions from byte `start` of `area` to their end mark, or to byte `end` of the file.
///
/// # Errors
/// `ExtensionPastEnd`, or `Truncated` where `area` ends before `end`.
pub(super) fn decode(area: &[u8], start: u64, end: u64) -> Result<Vec<Extension>, Qcow2Error> {
    let mut found = Vec::new();
    let mut position = start;
    // Fewer bytes than a prefix: the room ends without a mark, as after a full first cluster.
    while end.saturating_sub(position) >= size_of::<Prefix>() as u64 {
        let prefix = Prefix::read_from_bytes(part(area, position, size_of::<Prefix>() as u64)?)
            .map_err(|_| truncated(area, position))?;
        let (kind, len) = (prefix.kind.get(), prefix.len.get());
        if kind == END {
            break;
        }
        let data = position.saturating_add(size_of::<Prefix>() as u64);
        if u64::from(len) > end.saturating_sub(data) {
            return Err(Qcow2Error::ExtensionPastEnd { kind, len, end });
        }
        found.push(Extension { kind, data: part(area, data, len.into())?.to_vec() });
        position = data.saturating_add(u64::from(len).next_multiple_of(8));
    }
    Ok(found)
}

/// The bytes of extensions and of the mark behind them.
pub(super) fn encode(extensions: &[Extension]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for extension in extensions {
        // Lengths are bounded by the first cluster, which the caller checks.
        let len = u32::try_from(extension.data.len()).unwrap_or(u32::MAX);
        let prefix = Prefix { kind: U32::new(extension.kind), len: U32::new(len) };
        bytes.extend_from_slice(prefix.as_bytes());
        bytes.extend_from_slice(&extension.data);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes.extend_from_slice(Prefix { kind: U32::new(END), len: U32::new(0) }.as_bytes());
    bytes
}

/// The records of a table of feature names. A part of a record at the end is left out.
pub(super) fn decode_feature_names(data: &[u8]) -> Vec<FeatureName> {
    let records = data.chunks_exact(FEATURE_NAME_LEN);
    let named = records.filter_map(|record| {
        let (&[word, bit], name) = record.split_first_chunk::<2>()?;
        let len = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
        let name = name.get(..len)?.escape_ascii().to_string();
        Some(FeatureName { word, bit, name })
    });
    named.collect()
}

/// The bytes of a table of feature names; names are cut at 46 bytes.
pub(super) fn encode_feature_names(names: &[FeatureName]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for feature in names {
        let end = bytes.len().saturating_add(FEATURE_NAME_LEN);
        bytes.extend([feature.word, feature.bit]);
        bytes.extend(feature.name.bytes().take(FEATURE_NAME_LEN.saturating_sub(2)));
        bytes.resize(end, 0);
    }
    bytes
}

/// `len` bytes of `area` from `start`.
pub(super) fn part(area: &[u8], start: u64, len: u64) -> Result<&[u8], Qcow2Error> {
    let end = start.saturating_add(len);
    let missing = || truncated(area, end);
    let start = usize::try_from(start).map_err(|_| missing())?;
    let end = usize::try_from(end).map_err(|_| missing())?;
    area.get(start..end).ok_or_else(missing)
}

/// The error for an area that ends before byte `needed`.
fn truncated(area: &[u8], needed: u64) -> Qcow2Error {
    Qcow2Error::Truncated { len: area.len(), needed }
}
