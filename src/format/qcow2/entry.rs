//! Entries of the L1, L2 and refcount tables: 64 bits each, big-endian.
//!
//! Reserved bits must be 0: an entry that has one is refused, since nobody knows what it means.
//!
//! Not here: 128-bit entries (extended L2), which are refused with the header.

use zerocopy::byteorder::big_endian::U64;
use zerocopy::{FromBytes, IntoBytes};

use super::error::Qcow2Error;
use crate::units::ClusterSize;

/// Bytes of one entry of any table.
pub const ENTRY_LEN: usize = 8;

/// Bit 63: the cluster's refcount is exactly 1. With an external data file: it is allocated.
const COPIED: u64 = 1 << 63;

/// Bit 62 of an L2 entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;

/// Bit 0 of an L2 entry: the cluster reads as zeros.
const ZERO: u64 = 1;

/// Bits 9 to 55: an offset in the file.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// An entry of the L1 table: where an L2 table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableEntry {
    /// Offset of the L2 table in bytes; `None` if there is none.
    pub offset: Option<u64>,
    /// Whether the table's refcount is exactly 1.
    pub copied: bool,
}

impl TableEntry {
    /// Decodes an L1 entry.
    ///
    /// # Errors
    /// `ReservedBits`, `Unaligned`.
    pub fn decode(entry: u64, cluster_size: ClusterSize) -> Result<Self, Qcow2Error> {
        let table = "L1";
        if entry & !(COPIED | OFFSET) != 0 {
            return Err(Qcow2Error::ReservedBits { table, entry });
        }
        let offset = entry & OFFSET;
        if !offset.is_multiple_of(cluster_size.bytes()) {
            return Err(Qcow2Error::Unaligned { table, entry });
        }
        Ok(Self { offset: (offset != 0).then_some(offset), copied: entry & COPIED != 0 })
    }

    /// The entry as it is stored.
    #[must_use]
    pub fn encode(self) -> u64 {
        self.offset.unwrap_or(0) & OFFSET | if self.copied { COPIED } else { 0 }
    }
}

/// What an L2 entry says about its cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum L2Content {
    /// Nothing: ask the backing file.
    Unallocated,
    /// Its bytes are at this offset of the file, or of the external data file.
    Data {
        /// Offset in bytes, a multiple of the cluster size.
        offset: u64,
    },
    /// It reads as zeros, whatever is at the offset that may be reserved for it.
    Zero {
        /// The offset that is reserved for the cluster, if any, in bytes.
        reserved: Option<u64>,
    },
    /// It is compressed.
    Compressed,
}

/// An L2 entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct L2Entry {
    /// What it says.
    pub content: L2Content,
    /// Bit 63: refcount exactly 1; with an external data file set for what is allocated there.
    pub copied: bool,
}

impl L2Entry {
    /// The entry of a cluster of which there is nothing.
    pub const UNALLOCATED: Self = Self { content: L2Content::Unallocated, copied: false };

    /// Decodes an entry of a file of that version, cluster size and kind.
    ///
    /// With an external data file offset 0 is a place like any other if bit 63 says that the
    /// cluster is allocated; without, it means that there is none.
    ///
    /// # Errors
    /// `ReservedBits`, `Unaligned`, `ZeroInVersion2`. Compressed entries are not looked into.
    pub fn decode(
        entry: u64,
        version: u32,
        cluster_size: ClusterSize,
        external_data: bool,
    ) -> Result<Self, Qcow2Error> {
        let table = "L2";
        let copied = entry & COPIED != 0;
        if entry & COMPRESSED != 0 {
            return Ok(Self { content: L2Content::Compressed, copied });
        }
        if entry & !(COPIED | OFFSET | ZERO) != 0 {
            return Err(Qcow2Error::ReservedBits { table, entry });
        }
        let offset = entry & OFFSET;
        if !offset.is_multiple_of(cluster_size.bytes()) {
            return Err(Qcow2Error::Unaligned { table, entry });
        }
        let placed = offset != 0 || external_data && copied;
        let content = if entry & ZERO != 0 {
            if version < 3 {
                return Err(Qcow2Error::ZeroInVersion2 { entry });
            }
            L2Content::Zero { reserved: placed.then_some(offset) }
        } else if placed {
            L2Content::Data { offset }
        } else {
            L2Content::Unallocated
        };
        Ok(Self { content, copied })
    }

    /// The entry of a cluster of an external data file, where each cluster is at its own offset.
    #[must_use]
    pub fn external(offset: u64) -> Self {
        Self { content: L2Content::Data { offset }, copied: true }
    }

    /// The entry as it is stored; `None` for a compressed one, of which too little is known here.
    #[must_use]
    pub fn encode(self) -> Option<u64> {
        let copied = if self.copied { COPIED } else { 0 };
        match self.content {
            L2Content::Unallocated => Some(copied),
            L2Content::Data { offset } => Some(copied | offset & OFFSET),
            L2Content::Zero { reserved } => Some(copied | reserved.unwrap_or(0) & OFFSET | ZERO),
            L2Content::Compressed => None,
        }
    }
}

/// The entries of a table, or of a part of one. A part of an entry at the end is left out.
pub fn decode_table(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(ENTRY_LEN).filter_map(|chunk| U64::read_from_bytes(chunk).ok()).map(U64::get)
}

/// Appends an entry to the bytes of a table.
pub fn push_entry(bytes: &mut Vec<u8>, entry: u64) {
    bytes.extend_from_slice(U64::new(entry).as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cluster size in bytes.
    fn size(bytes: u64) -> ClusterSize {
        ClusterSize::from_bytes(bytes).unwrap()
    }

    #[test]
    fn entries_of_an_external_data_file() {
        let decode = |entry| L2Entry::decode(entry, 3, size(65536), true).map(|e| e.content);
        assert_eq!(decode(0), Ok(L2Content::Unallocated));
        assert_eq!(decode(1), Ok(L2Content::Zero { reserved: None }));
        assert_eq!(decode(1 << 63), Ok(L2Content::Data { offset: 0 }));
        assert_eq!(decode(1 << 63 | 1), Ok(L2Content::Zero { reserved: Some(0) }));
        assert_eq!(decode(1 << 63 | 0x3_0000), Ok(L2Content::Data { offset: 0x3_0000 }));
        assert_eq!(decode(1 << 62), Ok(L2Content::Compressed));
        assert_eq!(
            decode(1 << 63 | 0x3_0200),
            Err(Qcow2Error::Unaligned { table: "L2", entry: 1 << 63 | 0x3_0200 })
        );
        for bit in (1..9).chain(56..62) {
            let entry = 1 << bit;
            assert_eq!(decode(entry), Err(Qcow2Error::ReservedBits { table: "L2", entry }));
        }
    }

    #[test]
    fn entries_without_one() {
        let decode =
            |entry, version| L2Entry::decode(entry, version, size(512), false).map(|e| e.content);
        assert_eq!(decode(1 << 63, 3), Ok(L2Content::Unallocated));
        assert_eq!(decode(0x200, 2), Ok(L2Content::Data { offset: 0x200 }));
        assert_eq!(decode(1, 3), Ok(L2Content::Zero { reserved: None }));
        assert_eq!(decode(0x201, 2), Err(Qcow2Error::ZeroInVersion2 { entry: 0x201 }));
    }

    #[test]
    fn l1_entries() {
        let decode = |entry| TableEntry::decode(entry, size(65536));
        assert_eq!(decode(0), Ok(TableEntry { offset: None, copied: false }));
        let entry = TableEntry { offset: Some(0x4_0000), copied: true };
        assert_eq!(decode(0x8000_0000_0004_0000), Ok(entry));
        assert_eq!(entry.encode(), 0x8000_0000_0004_0000);
        assert!(matches!(decode(1), Err(Qcow2Error::ReservedBits { .. })));
        assert!(matches!(decode(0x200), Err(Qcow2Error::Unaligned { .. })));
    }

    #[test]
    fn what_is_encoded_decodes_to_the_same() {
        let contents = [
            L2Content::Unallocated,
            L2Content::Data { offset: 0 },
            L2Content::Data { offset: 0x00ff_ffff_ffff_0000 },
            L2Content::Zero { reserved: Some(0x1_0000) },
        ];
        for content in contents {
            let copied = content != L2Content::Unallocated;
            let entry = L2Entry { content, copied };
            let bits = entry.encode().unwrap();
            assert_eq!(L2Entry::decode(bits, 3, size(65536), true), Ok(entry));
        }
        assert_eq!(L2Entry::external(0).encode(), Some(1 << 63));
        assert_eq!(L2Entry { content: L2Content::Compressed, copied: false }.encode(), None);
        let mut bytes = Vec::new();
        push_entry(&mut bytes, 0x0102_0304_0506_0708);
        assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8]);
        bytes.push(9);
        assert_eq!(decode_table(&bytes).collect::<Vec<_>>(), [0x0102_0304_0506_0708]);
    }
}
