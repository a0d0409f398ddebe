//! Does the qcow2 header decoder read what QEMU writes, refuse what it must, and never panic?
//!
//! The bytes in `tests/files/qcow2-*.hex` were written by qemu-img. Files, tables and data are the
//! matter of `tests/adopt.rs`.

use addcow::format::qcow2::header::{
    COMPRESSION, CORRUPT, DIRTY, EXTENDED_L2, EXTERNAL_DATA, PREFIX_LEN, RAW_EXTERNAL_DATA,
};
use addcow::format::qcow2::{Backing, Extension, FeatureName, Header, Qcow2Error};
use addcow::format::{FileName, FileRole, FormatError};
use addcow::units::ClusterSize;

mod common;

use common::rng::Rng;

const DATA_FILE: &str = include_str!("files/qcow2-data-file.hex");
const V2: &str = include_str!("files/qcow2-v2.hex");
const ZSTD: &str = include_str!("files/qcow2-zstd.hex");
const LUKS: &str = include_str!("files/qcow2-luks.hex");

/// The first cluster of a file: the bytes of a listing, and zeros.
fn first_cluster(listing: &str, len: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for line in listing.lines().filter(|line| !line.starts_with('#')) {
        let mut words = line.split_whitespace();
        assert_eq!(usize::from_str_radix(words.next().unwrap(), 16).unwrap(), bytes.len());
        bytes.extend(words.map(|word| u8::from_str_radix(word, 16).unwrap()));
    }
    bytes.resize(len, 0);
    bytes
}

/// Writes a big-endian field.
fn put(bytes: &mut [u8], offset: usize, value: u64, len: usize) {
    for (index, byte) in bytes[offset..offset + len].iter_mut().rev().enumerate() {
        *byte = u8::try_from(value >> (8 * index) & 0xff).unwrap();
    }
}

/// What becomes of the file with an external data file when one field has another value.
fn with_field(offset: usize, value: u64, len: usize) -> Result<Header, Qcow2Error> {
    let mut bytes = first_cluster(DATA_FILE, 4096);
    put(&mut bytes, offset, value, len);
    let header = Header::decode(&bytes)?;
    header.check_readable()?;
    Ok(header)
}

fn name(role: FileRole, name: &str) -> FileName {
    FileName::new(role, name).unwrap()
}

#[test]
fn reads_what_qemu_img_writes() {
    let bytes = first_cluster(DATA_FILE, 4096);
    assert_eq!(Header::area_len(&bytes[..PREFIX_LEN]), Ok(4096));
    let header = Header::decode(&bytes).unwrap();
    assert_eq!(header.check_readable(), Ok(()));
    assert_eq!((header.version, header.cluster_size.bytes()), (3, 4096));
    assert_eq!((header.size, header.l1_entries, header.l1_offset), (3 << 20, 2, 0x3000));
    assert_eq!((header.refcount_table_offset, header.refcount_table_clusters), (0x1000, 1));
    assert_eq!((header.incompatible, header.refcount_order), (EXTERNAL_DATA, 4));
    assert_eq!(header.external_data(), Ok(Some(&name(FileRole::Data, "d.raw"))));
    let backing =
        Backing { name: name(FileRole::Backing, "base.img"), format: Some("raw".to_owned()) };
    assert_eq!(header.backing, Some(backing.clone()));
    // What we write of it is what QEMU wrote.
    let encoded = header.encode().unwrap();
    assert_eq!(encoded, bytes[..encoded.len()]);
    assert!(bytes[encoded.len()..].iter().all(|&byte| byte == 0));

    let old = Header::decode(&first_cluster(V2, 65536)).unwrap();
    assert_eq!(old.check_readable(), Ok(()));
    assert_eq!((old.version, old.size, old.refcount_order), (2, 1 << 20, 4));
    assert_eq!((old.external_data(), &old.backing), (Ok(None), &Some(backing)));
}

#[test]
fn refuses_what_cannot_be_read() {
    let zstd = Header::decode(&first_cluster(ZSTD, 65536)).unwrap();
    assert_eq!(zstd.check_readable(), Err(Qcow2Error::Compression { kind: 1 }));
    assert_eq!(zstd.feature_names.len(), 8);
    let luks = Header::decode(&first_cluster(LUKS, 65536)).unwrap();
    assert_eq!(luks.check_readable(), Err(Qcow2Error::Encrypted { method: 2 }));
    assert_eq!(
        luks.check_readable().unwrap_err().to_string(),
        "it is encrypted (LUKS), which is not supported"
    );
    let refused = |bit| with_field(72, EXTERNAL_DATA | bit, 8).unwrap_err();
    assert_eq!(refused(DIRTY), Qcow2Error::Dirty);
    assert_eq!(refused(CORRUPT), Qcow2Error::Corrupt);
    assert_eq!(refused(EXTENDED_L2), Qcow2Error::ExtendedL2);
    assert_eq!(refused(COMPRESSION), Qcow2Error::Compression { kind: 0 });
    assert_eq!(refused(1 << 5), Qcow2Error::UnknownFeatures { bits: 1 << 5, names: vec![] });
    assert_eq!(with_field(104, 1, 1), Err(Qcow2Error::Compression { kind: 1 }));
    let mut raw = first_cluster(DATA_FILE, 4096);
    put(&mut raw, 72, 0, 8);
    put(&mut raw, 88, RAW_EXTERNAL_DATA, 8);
    let error = Header::decode(&raw).unwrap().check_readable().unwrap_err();
    assert_eq!(error, Qcow2Error::RawWithoutDataFile);
}

#[test]
fn an_unknown_feature_is_called_by_the_name_that_the_file_gives_it() {
    let mut bytes = first_cluster(ZSTD, 65536);
    put(&mut bytes, 72, 1 << 7 | 1 << 63, 8);
    // The record of bit 4 now names bit 7, and holds what no terminal should see.
    let record = 0x78 + 4 * 48;
    bytes[record + 1] = 7;
    bytes[record + 2..record + 6].copy_from_slice(b"a\x1b[b");
    let error = Header::decode(&bytes).unwrap_err().to_string();
    assert_eq!(
        error,
        "unknown incompatible feature bits 0x8000000000000080 (a\\x1b[bnded L2 entries)"
    );
}

#[test]
fn refuses_fields_out_of_range() {
    let cases = [
        (0, 0x5146_49fa, 4, "not a qcow2 file: it starts with [51, 46, 49, fa], not with"),
        (4, 1, 4, "qcow version 1 is not supported; 2 and 3 are"),
        (4, 4, 4, "qcow version 4 is not supported; 2 and 3 are"),
        (8, 8, 8, "backing file name at offset 8 of 8 bytes lies outside the first cluster"),
        (8, 4089, 8, "backing file name at offset 4089 of 8 bytes lies outside"),
        (8, u64::MAX, 8, "backing file name at offset 18446744073709551615 of 8 bytes lies"),
        (16, 0, 4, "backing file name is empty"),
        (16, 1024, 4, "backing file name is 1024 bytes long; the limit is 1023"),
        (16, 9, 4, "backing file name \"base.img\\0\" has a NUL byte at position 8"),
        (20, 8, 4, "cluster_bits is 8, outside 9 to 21"),
        (20, 22, 4, "cluster_bits is 22, outside 9 to 21"),
        (24, 1 << 63, 8, "virtual size 9223372036854775808 is larger than the largest possible"),
        (24, 5 << 20, 8, "L1 table has 2 entries, the virtual size needs 3"),
        (24, i64::MAX.unsigned_abs(), 8, "L1 table has 2 entries, the virtual size needs 4398"),
        (32, 1, 4, "it is encrypted (AES), which is not supported"),
        (32, 9, 4, "it is encrypted (method 9), which is not supported"),
        (36, 0x40_0001, 4, "L1 table of 4194305 entries is larger than 33554432 bytes"),
        (40, 0, 8, "L1 table at offset 0x0 is not on a cluster boundary behind the header"),
        (40, 0x3200, 8, "L1 table at offset 0x3200 is not on a cluster boundary"),
        (40, 1 << 63, 8, "L1 table at offset 0x8000000000000000 is not on a cluster boundary"),
        (48, 0x1001, 8, "refcount table at offset 0x1001 is not on a cluster boundary"),
        (56, 2049, 4, "refcount table of 2049 clusters is larger than 8388608 bytes"),
        (96, 7, 4, "refcount_order is 7; the largest is 6"),
        (100, 96, 4, "header_length is 96, not a multiple of 8 from 104 to the cluster size"),
        (100, 108, 4, "header_length is 108, not a multiple of 8"),
        (100, 4104, 4, "header_length is 4104, not a multiple of 8"),
        (116, 0x1000, 4, "header extension 0xe2792aca of 4096 bytes runs past its area, which"),
        (128, 0xe279_2aca, 4, "header extension 0xe2792aca occurs twice"),
        (136, 0x6e62_643a, 4, "data file name \"nbd:w\" has a protocol prefix"),
        (120, 0x7261_7f00, 4, "backing format \"ra\\x7f\" is not 1 to 15 characters"),
    ];
    for (offset, value, len, expected) in cases {
        let error = with_field(offset, value, len).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{offset}: {error}");
    }
    assert_eq!(
        with_field(128, 0x1234, 4).unwrap().external_data(),
        Err(Qcow2Error::DataFileUnnamed)
    );
    let mut json = first_cluster(DATA_FILE, 4096);
    json[0x98..0xa0].copy_from_slice(b"json:{} ");
    let protocol =
        FormatError::NameIsProtocol { role: FileRole::Backing, name: "json:{} ".to_owned() };
    assert_eq!(Header::decode(&json), Err(Qcow2Error::Name(protocol)));
}

#[test]
fn a_file_that_ends_anywhere_is_refused_or_has_all_of_its_header() {
    let bytes = first_cluster(DATA_FILE, 4096);
    let whole = Header::decode(&bytes).unwrap();
    for len in 0..bytes.len() {
        match Header::decode(&bytes[..len]) {
            Ok(header) => {
                assert!(len >= 0xa0, "{len}");
                assert_eq!(header, whole);
            }
            Err(Qcow2Error::Truncated { needed, .. }) => assert!(needed > len as u64),
            Err(Qcow2Error::BadMagic { .. }) => assert!(len < 4),
            Err(other) => panic!("{len}: {other}"),
        }
    }
}

#[test]
fn what_is_encoded_decodes_to_the_same() {
    let mut header = Header::decode(&first_cluster(DATA_FILE, 4096)).unwrap();
    header.feature_names =
        vec![FeatureName { word: 0, bit: 2, name: "external data file".to_owned() }];
    header.extensions = vec![Extension { kind: 0x1234_5678, data: b"unknown".to_vec() }];
    header.backing.as_mut().unwrap().name = name(FileRole::Backing, &"n".repeat(1023));
    let mut bytes = header.encode().unwrap();
    bytes.resize(4096, 0);
    assert_eq!(Header::decode(&bytes).as_ref(), Ok(&header));
    header.cluster_size = ClusterSize::from_bytes(512).unwrap();
    assert_eq!(header.encode(), Err(Qcow2Error::HeaderDoesNotFit { needed: 1247, cluster: 512 }));
}

#[test]
fn no_bytes_cause_a_panic() {
    let mut rng = Rng::new(0x9c0);
    for listing in [DATA_FILE, V2, ZSTD, LUKS] {
        let clean = first_cluster(listing, 4096);
        for _ in 0..20_000 {
            let mut bytes = clean.clone();
            for _ in 0..=rng.index(4) {
                let at = rng.index(640);
                let flipped = bytes[at] ^ 1 << rng.index(8);
                bytes[at] = [0, 1, 0x7f, 0xff, flipped][rng.index(5)];
            }
            if let Ok(header) = Header::decode(&bytes) {
                let _ = header.check_readable();
                let _ = header.encode();
            }
        }
    }
}
