//! Do we read and write add-cow headers exactly as `docs/format.md` says?
//!
//! The example of that document is parsed out of it. Each way to break a header has one line with
//! the error it must give; a seeded loop then breaks headers at random.
//!
//! Not here: files on disk, what the bits do to a guest's reads and writes, and the bitmap's shape
//! (tests in `src/format/bitmap.rs`).
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use addcow::format::{
    BitmapGeometry, FIXED_HEADER_LEN, FileName, FileReference, FileRole, FormatError, Header,
    MAX_HEADER_LEN, is_add_cow,
};
use addcow::units::ClusterSize;

const SPEC: &str = include_str!("../docs/format.md");
const V20: &str = include_str!("files/v20-header.hex");
const V18: &str = include_str!("files/v18-header.hex");
const V9: &str = include_str!("files/v9-header.hex");

/// The bytes of a listing: an offset, which must be the right one, then up to 16 bytes in hex.
fn parse_hex<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for line in lines.filter(|line| !line.starts_with('#')) {
        let mut words = line.split_whitespace();
        let offset = usize::from_str_radix(words.next().unwrap(), 16).unwrap();
        assert_eq!(offset, bytes.len(), "offset of the line {line:?}");
        bytes.extend(words.map(|word| u8::from_str_radix(word, 16).unwrap()));
    }
    bytes
}

/// The listing in the section "Worked example" of docs/format.md.
fn spec_example() -> Vec<u8> {
    let (_, section) = SPEC.split_once("\n## Worked example\n").unwrap();
    let (_, fenced) = section.split_once("\n```\n").unwrap();
    let (listing, _) = fenced.split_once("\n```\n").unwrap();
    parse_hex(listing.lines())
}

fn reference(role: FileRole, name: &str, format: &str) -> FileReference {
    FileReference { name: FileName::new(role, name).unwrap(), format: format.to_owned() }
}

fn cluster(bits: u32) -> ClusterSize {
    ClusterSize::from_bits(bits).unwrap()
}

/// The header of the example, as a value.
fn example() -> Header {
    Header {
        cluster_size: cluster(16),
        backing: Some(reference(FileRole::Backing, "ubuntu.img", "raw")),
        image: reference(FileRole::Image, "test.raw", "raw"),
        all_allocated: false,
        compat_features: 0,
    }
}

// Offsets of the fields, from docs/format.md, "Header".
const BACKING_OFFSET: usize = 4;
const BACKING_SIZE: usize = 8;
const IMAGE_OFFSET: usize = 12;
const IMAGE_SIZE: usize = 16;
const CLUSTER_BITS: usize = 20;
const FEATURES: usize = 24;
const COMPAT_FEATURES: usize = 32;
const HEADER_SIZE: usize = 40;
const BACKING_FMT: usize = 44;
const IMAGE_FMT: usize = 60;

/// The whole header area of the example, with `changes` written over it.
fn broken(changes: &[(usize, &[u8])]) -> Vec<u8> {
    let mut area = example().encode().unwrap();
    area.resize(65536, 0);
    for &(offset, bytes) in changes {
        area[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
    area
}

fn le32(value: u32) -> [u8; 4] {
    value.to_le_bytes()
}

#[test]
fn example_of_the_specification_is_what_encode_writes_and_decode_reads() {
    let bytes = spec_example();
    assert_eq!(bytes.len(), 94);
    assert_eq!(bytes, parse_hex(V20.lines()));
    assert_eq!(example().encode().unwrap(), bytes);
    assert_eq!(Header::decode(&bytes).unwrap(), example());
    assert_eq!(Header::decode(&broken(&[])).unwrap(), example());
    assert_eq!(Header::area_len(&bytes[..FIXED_HEADER_LEN]), Ok(65536));
    assert!(is_add_cow(&bytes[..4]));
    let geometry = BitmapGeometry::new(cluster(16), 8 << 30).unwrap();
    assert_eq!(geometry.file_len(), 131_072);
    assert_eq!(geometry.position(9), (65537, 0x02));
}

#[test]
fn v18_header_with_small_clusters_and_full_format_field_is_read_but_not_written() {
    let bytes = parse_hex(V18.lines());
    let header = Header::decode(&bytes).unwrap();
    assert_eq!(header.cluster_size.bytes(), 512);
    assert_eq!(header.header_size(), 4096);
    assert_eq!(header.image, reference(FileRole::Image, "a.raw", "sixteen-letters!"));
    assert_eq!((header.backing.clone(), header.all_allocated), (None, true));
    assert_eq!(header.encode(), Err(FormatError::ClusterTooSmall { bytes: 512, min: 4096 }));
    let larger = Header { cluster_size: cluster(12), ..header };
    let format = "sixteen-letters!".to_owned();
    assert_eq!(
        larger.encode(),
        Err(FormatError::FormatTooLong { role: FileRole::Image, format, len: 16, max: 15 })
    );
}

#[test]
fn old_versions_are_recognised_and_refused() {
    let v9 = parse_hex(V9.lines());
    assert!(is_add_cow(&v9));
    assert_eq!(Header::decode(&v9), Err(FormatError::OldMagic));
    assert_eq!(Header::area_len(&v9), Err(FormatError::OldMagic));
    assert_eq!(Header::decode(&v9[..8]), Err(FormatError::OldMagic));
    assert!(FormatError::OldMagic.to_string().contains("2012"));
    // A version word after the short magic: cluster_bits comes to lie where the features are.
    let mut v14 = broken(&[]);
    v14.splice(4..4, le32(1));
    assert_eq!(Header::decode(&v14), Err(FormatError::UnknownFeatures { bits: 16 }));
}

/// Decodes the example with `changes` and compares the error's message, which tells the variant
/// and its values.
#[track_caller]
fn refused(changes: &[(usize, &[u8])], message: &str) {
    let error = Header::decode(&broken(changes)).unwrap_err();
    assert_eq!(error.to_string(), message);
    assert!(message.is_ascii() && !message.contains('\n') && !message.ends_with('.'));
}

#[test]
fn broken_fixed_fields_are_refused_each_with_its_error() {
    refused(
        &[(0, b"ACOX")],
        "not an add-cow file: it starts with [41, 43, 4f, 58], not with \"ACOW\"",
    );
    // The feature bits are reported first: they may change what the rest means.
    refused(
        &[(FEATURES, &[5]), (FEATURES + 7, &[0x80]), (CLUSTER_BITS, &[99])],
        "unknown incompatible feature bits 0x8000000000000005; this program knows none",
    );
    refused(&[(CLUSTER_BITS, &[8])], "cluster_bits is 8, outside 9 to 21");
    refused(&[(CLUSTER_BITS, &[22])], "cluster_bits is 22, outside 9 to 21");
    refused(&[(CLUSTER_BITS, &[0xff; 4])], "cluster_bits is 4294967295, outside 9 to 21");
    refused(
        &[(HEADER_SIZE, &le32(4096))],
        "header_size is 4096, but clusters of 65536 bytes need 65536",
    );
    refused(
        &[(CLUSTER_BITS, &[9]), (HEADER_SIZE, &le32(512))],
        "header_size is 512, but clusters of 512 bytes need 4096",
    );
    refused(
        &[(IMAGE_FMT, &[0; 16])],
        "header does not name the format of the image file; formats are never probed",
    );
    refused(
        &[(BACKING_FMT, &[0; 16])],
        "header does not name the format of backing file \"ubuntu.img\"; formats are never \
         probed, so the format must be stored in the header",
    );
    refused(
        &[(IMAGE_FMT + 2, b"wwwwwwwwwwww\0x")],
        "image file format \"rawwwwwwwwwwww\\x00x\" is not printable ASCII followed by zero bytes",
    );
    refused(
        &[(BACKING_FMT, b"\x1b[2J,\xff,7,8,9,10,")],
        "backing file format \"\\x1b[2J,\\xff,7,8,9,10,\" is not printable ASCII followed by \
         zero bytes",
    );
}

#[test]
fn broken_name_positions_are_refused_each_with_its_error() {
    refused(
        &[(BACKING_OFFSET, &le32(0))],
        "backing name offset 0 and size 10 contradict each other: both or neither must be 0",
    );
    refused(
        &[(BACKING_SIZE, &le32(0))],
        "backing name offset 76 and size 0 contradict each other: both or neither must be 0",
    );
    refused(&[(IMAGE_OFFSET, &[0; 8])], "header names no image file (name offset 0, size 0)");
    refused(&[(IMAGE_SIZE, &le32(0))], "header names no image file (name offset 86, size 0)");
    refused(
        &[(IMAGE_OFFSET, &le32(75))],
        "image file name at offset 75 overlaps the fixed header of 76 bytes",
    );
    refused(
        &[(BACKING_OFFSET, &le32(44))],
        "backing file name at offset 44 overlaps the fixed header of 76 bytes",
    );
    refused(
        &[(IMAGE_OFFSET, &le32(65535)), (IMAGE_SIZE, &le32(1))],
        "image file name starts at offset 65535, past the last legal one, 65534",
    );
    refused(
        &[(BACKING_OFFSET, &[0xff; 8])],
        "backing file name starts at offset 4294967295, past the last legal one, 65534",
    );
    refused(
        &[(IMAGE_OFFSET, &le32(65534)), (IMAGE_SIZE, &le32(3))],
        "image file name of 3 bytes at offset 65534 ends past the header of 65536 bytes",
    );
    // 86 + size wraps to 85 in 32 bits.
    refused(
        &[(IMAGE_SIZE, &[0xff; 4])],
        "image file name of 4294967295 bytes at offset 86 ends past the header of 65536 bytes",
    );
    refused(
        &[(BACKING_SIZE, &le32(11))],
        "backing file name at 0x4c..0x57 and image file name at 0x56..0x5e overlap",
    );
    refused(
        &[(BACKING_SIZE, &le32(1024))],
        "backing file name is 1024 bytes long; the limit is 1023",
    );
    refused(&[(IMAGE_SIZE, &le32(4096))], "image file name is 4096 bytes long; the limit is 4095");
}

#[test]
fn names_that_are_no_plain_paths_are_refused_each_with_its_error() {
    const PROTOCOL: &str = "has a protocol prefix (a ':' before any '/'); only file names are \
                            followed (write ./ before the name of such a file)";
    refused(&[(76 + 3, b"\0")], "backing file name \"ubu\\0tu.img\" has a NUL byte at position 3");
    refused(
        &[(76, b"json:{\"a\":")],
        &format!("backing file name \"json:{{\\\"a\\\":\" {PROTOCOL}"),
    );
    refused(&[(86, b"nbd://h/")], &format!("image file name \"nbd://h/\" {PROTOCOL}"));
    refused(
        &[(BACKING_OFFSET, &le32(200)), (BACKING_SIZE, &le32(8)), (200, b"test.raw")],
        "image file and backing file are the same file, \"test.raw\"",
    );
    let colon_later = broken(&[(86, b"./a:b/cd")]);
    assert_eq!(Header::decode(&colon_later).unwrap().image.name.as_bytes(), b"./a:b/cd");
}

#[test]
fn files_that_end_early_are_refused_where_they_end() {
    let bytes = example().encode().unwrap();
    for len in 0..FIXED_HEADER_LEN {
        let short = Err(FormatError::TooShort { len, needed: 76 });
        assert_eq!(Header::decode(&bytes[..len]), short);
        assert_eq!(Header::area_len(&bytes[..len]).map(|_| ()), short.map(|_| ()));
    }
    for len in FIXED_HEADER_LEN..bytes.len() {
        let role = FileRole::Image;
        let error = FormatError::NameTruncated { role, end: 94, len };
        assert_eq!(Header::decode(&bytes[..len]), Err(error));
    }
    assert_eq!(
        FormatError::TooShort { len: 3, needed: 76 }.to_string(),
        "file of 3 bytes is shorter than the add-cow header of 76 bytes"
    );
    let message = FormatError::NameTruncated { role: FileRole::Image, end: 94, len: 90 };
    assert_eq!(message.to_string(), "image file name ends at offset 94, but the file ends at 90");
}

#[test]
fn readers_accept_what_only_writers_must_not_do() {
    // Names in the other order with a gap, one ending exactly at the end of the area; a backing
    // format without a backing file; bytes that belong to no name; unknown compatible bits.
    let area = broken(&[
        (IMAGE_OFFSET, &le32(65534)),
        (IMAGE_SIZE, &le32(2)),
        (65534, b"ab"),
        (3000, b"an extension"),
        (COMPAT_FEATURES + 7, &[0x40]),
    ]);
    let header = Header::decode(&area).unwrap();
    assert_eq!(header.image.name.as_bytes(), b"ab");
    assert_eq!(header.compat_features, 0x4000_0000_0000_0000);
    assert!(!header.all_allocated);
    assert_eq!(Header::decode(&header.encode().unwrap()).unwrap(), header);
    let none = broken(&[(BACKING_OFFSET, &[0; 8]), (BACKING_FMT, b"\xff\xff")]);
    assert_eq!(Header::decode(&none).unwrap().backing, None);
}

#[test]
fn all_allocated_header_drops_a_damaged_backing_reference_and_keeps_a_sound_one() {
    let all = (COMPAT_FEATURES, &[1_u8][..]);
    let sound = Header::decode(&broken(&[all])).unwrap();
    assert_eq!(sound.backing, example().backing);
    assert!(sound.all_allocated);
    let damages: [(usize, &[u8]); 5] = [
        (BACKING_FMT, &[0; 16]),
        (BACKING_OFFSET, &[0; 4]),
        (BACKING_OFFSET, &[0xff; 8]),
        (BACKING_SIZE, &[11]),
        (76, b"nbd:host:1"),
    ];
    for damage in damages {
        assert!(Header::decode(&broken(&[damage])).is_err(), "{damage:02x?}");
        let header = Header::decode(&broken(&[all, damage])).unwrap();
        assert_eq!((header.backing, header.all_allocated), (None, true), "{damage:02x?}");
    }
    // The image reference is needed, so it stays checked.
    assert_eq!(
        Header::decode(&broken(&[all, (IMAGE_FMT, &[0; 16])])),
        Err(FormatError::ImageFormatMissing)
    );
}

#[test]
fn all_allocated_decides_bit_0_of_the_word_that_is_written() {
    let header = Header { all_allocated: true, backing: None, ..example() };
    let bytes = header.encode().unwrap();
    assert_eq!(bytes[COMPAT_FEATURES..HEADER_SIZE], 1_u64.to_le_bytes());
    assert_eq!(bytes[BACKING_OFFSET..IMAGE_OFFSET], [0; 8]);
    assert_eq!(bytes[IMAGE_OFFSET..IMAGE_SIZE], le32(76));
    assert_eq!(bytes[BACKING_FMT..IMAGE_FMT], [0; 16]);
    let cleared = Header { all_allocated: false, compat_features: 7, ..example() };
    assert_eq!(Header::decode(&cleared.encode().unwrap()).unwrap().compat_features, 6);
}

#[test]
fn headers_that_must_not_be_written_are_refused_each_with_its_error() {
    let with = |change: fn(&mut Header)| {
        let mut header = example();
        change(&mut header);
        header.encode().unwrap_err().to_string()
    };
    assert_eq!(
        with(|h| h.cluster_size = ClusterSize::from_bits(11).unwrap()),
        "cluster size 2048 is below 4096, the smallest that is written"
    );
    assert_eq!(
        with(|h| h.image.format = String::new()),
        "header does not name the format of the image file; formats are never probed"
    );
    assert_eq!(
        with(|h| h.backing.as_mut().unwrap().format.clear()),
        "header does not name the format of backing file \"ubuntu.img\"; formats are never \
         probed, so the format must be stored in the header"
    );
    assert_eq!(
        with(|h| h.image.format = "a blank".to_owned()),
        "image file format \"a blank\" is not printable ASCII followed by zero bytes"
    );
    assert_eq!(
        with(|h| h.image.format = "sixteen-letters!".to_owned()),
        "image file format \"sixteen-letters!\" is 16 bytes long; at most 15 can be written"
    );
    assert_eq!(
        with(|h| h.image.name = FileName::new(FileRole::Image, "ubuntu.img").unwrap()),
        "image file and backing file are the same file, \"ubuntu.img\""
    );
    // A name that was checked for the other role.
    assert_eq!(
        with(|h| {
            let name = FileName::new(FileRole::Image, "n".repeat(1024)).unwrap();
            h.backing = Some(FileReference { name, format: "raw".to_owned() });
        }),
        "backing file name is 1024 bytes long; the limit is 1023"
    );
}

#[test]
fn names_must_leave_one_byte_of_the_header_area_free() {
    let with = |len| Header {
        cluster_size: cluster(12),
        backing: None,
        image: reference(FileRole::Image, &"n".repeat(len), "raw"),
        ..example()
    };
    let largest = with(4096 - 76 - 1);
    assert_eq!(Header::decode(&largest.encode().unwrap()).unwrap(), largest);
    assert_eq!(
        with(4096 - 76).encode(),
        Err(FormatError::NamesDoNotFit { names: 4020, header_size: 4096 })
    );
    assert_eq!(
        with(4096 - 76).encode().unwrap_err().to_string(),
        "names of 4020 bytes do not fit the header of 4096 bytes"
    );
}

#[test]
fn names_are_checked_when_they_are_made() {
    let new = |name: &[u8]| FileName::from_bytes(FileRole::Image, name);
    assert_eq!(new(b"").unwrap_err().to_string(), "image file name is empty");
    let max = FileRole::Image.max_name_len();
    assert!(new(&vec![b'n'; max]).is_ok());
    let role = FileRole::Image;
    assert_eq!(
        new(&vec![b'n'; max + 1]),
        Err(FormatError::NameTooLong { role, len: 4096, max: 4095 })
    );
    assert!(matches!(new(b":a"), Err(FormatError::NameIsProtocol { .. })));
    assert!(matches!(new(b"C:\\a"), Err(FormatError::NameIsProtocol { .. })));
    assert_eq!(format!("{:?}", new(b"a\x1b\xffb").unwrap()), r#""a\u{1b}\xFFb""#);
}

#[test]
fn relative_names_start_at_the_folder_of_the_add_cow_file() {
    let folder = std::path::Path::new("/disks/vm1");
    let resolve = |name| FileName::new(FileRole::Image, name).unwrap().resolve(folder);
    assert_eq!(resolve("test.raw"), std::path::Path::new("/disks/vm1/test.raw"));
    assert_eq!(resolve("../base.img"), std::path::Path::new("/disks/vm1/../base.img"));
    assert_eq!(resolve("/srv/base.img"), std::path::Path::new("/srv/base.img"));
}

#[test]
fn every_cluster_size_makes_the_round_trip() {
    for bits in 12..=21 {
        let header = Header { cluster_size: cluster(bits), ..example() };
        let bytes = header.encode().unwrap();
        assert_eq!(Header::decode(&bytes).unwrap(), header);
        assert_eq!(Header::area_len(&bytes), Ok(1 << bits));
    }
    assert_eq!(MAX_HEADER_LEN, 1 << 21);
    for bits in 9..12 {
        let area = broken(&[(CLUSTER_BITS, &[bits]), (HEADER_SIZE, &le32(4096))]);
        assert_eq!(Header::decode(&area).unwrap().cluster_size, cluster(bits.into()));
    }
}

/// A small generator of pseudorandom numbers (splitmix64), so that a seed replays a run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(limit).unwrap()).unwrap()
    }
}

/// Breaks `area` in one to three places.
fn mutate(area: &mut Vec<u8>, random: &mut Random) {
    const FIELDS: [usize; 8] = [
        BACKING_OFFSET,
        BACKING_SIZE,
        IMAGE_OFFSET,
        IMAGE_SIZE,
        CLUSTER_BITS,
        FEATURES,
        COMPAT_FEATURES,
        HEADER_SIZE,
    ];
    const VALUES: [u32; 16] =
        [0, 1, 9, 12, 21, 75, 76, 80, 94, 512, 1023, 4000, 4094, 4095, 4096, u32::MAX];
    for _ in 0..=random.below(3) {
        match random.below(8) {
            0 => area.truncate(random.below(area.len() + 1)),
            1..=3 => {
                let (field, value) = (FIELDS[random.below(8)], VALUES[random.below(16)]);
                if let Some(bytes) = area.get_mut(field..field + 4) {
                    bytes.copy_from_slice(&le32(value));
                }
            }
            _ => {
                let at = random.below(110);
                if let Some(byte) = area.get_mut(at) {
                    *byte = u8::try_from(random.next() & 0xff).unwrap();
                }
            }
        }
    }
}

#[test]
fn hundred_thousand_mutated_headers_decode_to_themselves_or_to_an_error() {
    let seed = std::env::var("ADDCOW_SEED").map_or(0xadd_c0f, |seed| seed.parse().unwrap());
    println!("replay: ADDCOW_SEED={seed} cargo test --test format hundred_thousand");
    let mut random = Random(seed);
    let all = Header { all_allocated: true, compat_features: 1, ..example() };
    let bases = [example(), Header { backing: None, ..example() }, all].map(|header| {
        let mut area = Header { cluster_size: cluster(12), ..header }.encode().unwrap();
        area.resize(4096, 0);
        area
    });
    let (mut accepted, mut refused, mut unwritable) = (0, 0, 0);
    for _ in 0..100_000 {
        let mut area = bases[random.below(3)].clone();
        mutate(&mut area, &mut random);
        let Ok(header) = Header::decode(&area) else {
            refused += 1;
            continue;
        };
        accepted += 1;
        assert_eq!(Header::area_len(&area), Ok(header.header_size()));
        assert!(header.header_size() <= MAX_HEADER_LEN);
        match header.encode() {
            Ok(bytes) => assert_eq!(Header::decode(&bytes).as_ref(), Ok(&header)),
            // The three points in which a reader accepts more than a writer.
            Err(
                FormatError::ClusterTooSmall { .. }
                | FormatError::FormatTooLong { .. }
                | FormatError::NamesDoNotFit { .. },
            ) => unwritable += 1,
            Err(other) => panic!("{area:02x?} was read, but cannot be written: {other}"),
        }
    }
    println!("{accepted} accepted ({unwritable} of them not writable), {refused} refused");
    assert!(accepted > 10_000 && refused > 10_000 && unwritable > 100);
}
