//! Are QED files read as QEMU reads them, and the rest refused?
//!
//! Images made by qemu-img and qemu-io are byte-compared with what `qemu-img convert` makes of
//! them. Damaged ones are held against a small reader of this file's own, cluster by cluster: what
//! it can read must be read like that, what it cannot must be an error, and nothing may panic.

#[path = "common/qemu.rs"]
mod qemu;

use std::fs;
use std::path::Path;
use std::process::Command;

use addcow::executor::block_on;
use addcow::format::qed::{Cluster, HEADER_LEN, Header, QedError, decode_table, is_qed};
use addcow::image::chain::{Chain, ChainOptions, DiskFormat, OpenChain, PieceContent};
use addcow::storage::IoBuffer;
use addcow::storage::file::FileStorage;
use addcow::storage::host_file::CacheMode;
use addcow::units::ByteRange;
use fastrand::Rng;
use qemu::Qemu;

/// The first bytes of a file of qemu-img's.
const QED: &str = include_str!("files/qed.hex");

/// The bytes of a listing.
fn listed(listing: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for line in listing.lines().filter(|line| !line.starts_with('#')) {
        let mut words = line.split_whitespace();
        assert_eq!(usize::from_str_radix(words.next().unwrap(), 16).unwrap(), bytes.len());
        bytes.extend(words.map(|word| u8::from_str_radix(word, 16).unwrap()));
    }
    bytes
}

/// The listed header with one little-endian field changed.
fn with_field(offset: usize, value: u64, len: usize) -> Result<Header, QedError> {
    let mut bytes = listed(QED);
    bytes[offset..offset + len].copy_from_slice(&value.to_le_bytes()[..len]);
    Header::decode(&bytes)
}

#[test]
fn a_header_of_qemu_img_is_read() {
    let bytes = listed(QED);
    assert!(is_qed(&bytes));
    let header = Header::decode(&bytes[..HEADER_LEN]).unwrap();
    assert_eq!((header.cluster_size(), header.table_len()), (4096, 8192));
    assert_eq!((header.image_size(), header.l2_reach()), (3 << 20, 4 << 20));
    assert_eq!(header.backing_name(), Some(ByteRange::between(0x40, 0x48)));
    assert!(header.backing_is_raw());
    assert_eq!(Header::decode_name(&bytes[0x40..0x48]).unwrap().as_bytes(), b"base.img");
    assert_eq!(header.l1_place(0x3000), Ok(ByteRange::between(0x1000, 0x1008)));
    assert_eq!(header.l1_place(0x2fff), Err(QedError::TablePlace { table: "L1", offset: 0x1000 }));
}

#[test]
fn entries_lead_behind_the_header_to_whole_clusters_of_the_file() {
    let header = Header::decode(&listed(QED)).unwrap();
    let len = 0x6fff; // Less than seven clusters: six.
    assert_eq!(header.cluster(0, len), Ok(Cluster::Unallocated));
    assert_eq!(header.cluster(1, len), Ok(Cluster::Zero));
    assert_eq!(header.cluster(0x5000, len), Ok(Cluster::Data { offset: 0x5000 }));
    for offset in [2, 0xfff, 0x5001, 0x5200, 0x6000, 1 << 40, u64::MAX, u64::MAX - 0xfff] {
        assert_eq!(header.cluster(offset, len), Err(QedError::ClusterPlace { offset }));
        assert!(header.l2_place(offset, len).is_err(), "{offset:#x}");
    }
    assert_eq!(header.l2_place(0, len), Ok(None));
    assert_eq!(header.l2_place(0x4000, len), Ok(Some(0x4000)));
    // Two clusters do not fit; on the L1 table; on its second cluster.
    for offset in [0x5000, 0x1000, 0x2000] {
        assert_eq!(header.l2_place(offset, len), Err(QedError::TablePlace { table: "L2", offset }));
    }
}

#[test]
fn headers_out_of_range_are_refused() {
    let cases = [
        (0, 0x44_4552, 3, "not a QED file: it starts with [52, 45, 44, 00], not with \"QED\\0\""),
        (4, 2048, 4, "cluster size 2048 is not a power of two from 4096 to 67108864"),
        (4, 0x1800, 4, "cluster size 6144 is not a power of two"),
        (4, 1 << 27, 4, "cluster size 134217728 is not a power of two"),
        (8, 0, 4, "table size 0 is not a power of two from 1 to 16 clusters"),
        (8, 3, 4, "table size 3 is not"),
        (8, 32, 4, "table size 32 is not"),
        (12, 0, 4, "header size is 0 clusters"),
        (12, 1 << 19, 4, "header size is 524288 clusters"),
        (16, 7, 8, "it was not closed cleanly (`qemu-img check -r all` repairs it)"),
        (16, 1 << 3 | 3, 8, "unknown feature bits 0x8"),
        (16, 1 << 63, 8, "unknown feature bits 0x8000000000000000"),
        (48, 513, 8, "image size 513 is no multiple of 512"),
        (48, (4 << 30) + 512, 8, "image size 4294967808 is no multiple of 512, or more than"),
        (56, 63, 4, "backing file name at offset 63 of 8 bytes lies outside the header"),
        (56, 4089, 4, "backing file name at offset 4089 of 8 bytes lies outside the header"),
        (56, u64::from(u32::MAX), 4, "backing file name at offset 4294967295 of 8 bytes"),
        (60, 0, 4, "backing file name is empty"),
        (60, 1024, 4, "backing file name is 1024 bytes long; the limit is 1023"),
    ];
    for (offset, value, len, expected) in cases {
        let error = with_field(offset, value, len).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{offset}: {error}");
    }
    // What may be: unknown bits that are not needed, the largest sizes, no backing file.
    for (offset, value, len) in [(24, u64::MAX, 8), (32, u64::MAX, 8), (48, 4 << 30, 8)] {
        with_field(offset, value, len).unwrap();
    }
    assert_eq!(with_field(16, 0, 8).unwrap().backing_name(), None);
    for len in 0..HEADER_LEN {
        let error = Header::decode(&listed(QED)[..len]).unwrap_err();
        assert!(matches!(error, QedError::Truncated { .. } | QedError::BadMagic { .. }));
    }
    let name = Header::decode_name(b"json:{}").unwrap_err().to_string();
    assert!(name.contains("has a protocol prefix"), "{name}");
}

/// All bytes of a disk as QEMU sees it.
fn expected(qemu: &Qemu, folder: &Path, disk: &str) -> Vec<u8> {
    qemu.ok(folder, &format!("qemu-img convert -f qed -O raw {disk} expected.raw"));
    fs::read(folder.join("expected.raw")).unwrap()
}

/// Opens a QED file and what is below it.
fn open(folder: &Path, disk: &str, cache: CacheMode) -> OpenChain {
    let options = ChainOptions { cache, ..ChainOptions::BUFFERED };
    OpenChain::open(&folder.join(disk), DiskFormat::Qed, options).unwrap()
}

/// Reads a part of a chain.
fn read(chain: &Chain<FileStorage>, start: u64, len: usize) -> Vec<u8> {
    let buffer = IoBuffer::from_bytes(&vec![0xee; len]);
    block_on(chain.read(start, buffer.clone())).unwrap();
    buffer.to_vec()
}

/// A QED disk shows what QEMU says: in pieces while nothing is known yet, as a whole, by its map.
fn agrees(qemu: &Qemu, folder: &Path, disk: &str, rng: &mut Rng, what: &str) {
    let mut expected = expected(qemu, folder, disk);
    let size = expected.len();
    expected.resize(size + 200_000, 0);
    for cache in [CacheMode::Buffered, CacheMode::Direct] {
        let chain = open(folder, disk, cache);
        assert_eq!(chain.virtual_size(), size as u64, "{what}");
        let handle = chain.handle(FileStorage::new);
        for _ in 0..40 {
            let start = rng.usize(0..size + 1000);
            let longest = if rng.bool() { 5000 } else { 150_000 };
            let len = rng.usize(1..longest);
            let same = read(&handle, start as u64, len) == expected[start..start + len];
            assert!(same, "{what}: {len} bytes at {start:#x}");
        }
        assert!(read(&handle, 0, size + 1000) == expected[..size + 1000], "{what}: all of it");
        let mut rest = ByteRange::between(0, size as u64);
        while !rest.is_empty() {
            let piece = block_on(handle.piece(rest)).unwrap();
            assert!(piece.range.start() == rest.start() && !piece.range.is_empty(), "{what}");
            let [start, end] = [piece.range.start(), piece.range.end()].map(index);
            let zeros = expected[start..end].iter().all(|&byte| byte == 0);
            assert!(zeros || piece.content != PieceContent::Zero, "{what}: {piece:?}");
            rest = ByteRange::between(piece.range.end(), rest.end());
        }
    }
}

/// Random writes, zeros and discards, in the words of qemu-io.
fn scribble(rng: &mut Rng, size: u64) -> Vec<String> {
    let command = |_| {
        let start = rng.u64(0..size / 512) * 512;
        let len = (rng.u64(1..400) * 512).min(size - start);
        match rng.u32(0..6) {
            0 => format!("write -z {start} {len}"),
            1 => {
                // Whole clusters only become zero clusters.
                let start = start / 65536 * 65536;
                format!("write -z {start} {}", 65536.min(size - start))
            }
            _ => format!("write -P {} {start} {len}", rng.u8(1..=255)),
        }
    };
    (0..25).map(command).collect()
}

#[test]
fn every_kind_of_qed_that_qemu_img_makes_reads_as_qemu_reads_it() {
    let mut rng = Rng::with_seed(0x9ed);
    for qemu in Qemu::all("every_kind_of_qed") {
        for (options, size) in [
            ("cluster_size=64k", 6 << 20),
            // Two L2 tables and a bit; 1024 entries each. QEMU makes tables of one cluster too, but
            // does not open them.
            ("cluster_size=4k,table_size=2", (8 << 20) + 5 * 512),
            ("cluster_size=4k,table_size=16", 3 << 20),
            ("cluster_size=8k,table_size=2", 5 << 20),
            ("cluster_size=1M,table_size=2", (7 << 20) + 512),
        ] {
            for backing in ["", "short", "long"] {
                let folder = tempfile::tempdir().unwrap();
                let folder = folder.path();
                let what = format!("{qemu:?} {options} {backing}");
                let mut line = format!("qemu-img create -q -f qed -o {options} disk.qed {size}");
                if !backing.is_empty() {
                    let len = if backing == "short" { size / 2 + 77 } else { size + 100_000 };
                    let bytes: Vec<u8> = (0..len).map(|at| (at / 512 % 251) as u8 | 1).collect();
                    fs::write(folder.join("base.img"), bytes).unwrap();
                    line += " -b base.img -F raw";
                }
                qemu.ok(folder, &line);
                agrees(&qemu, folder, "disk.qed", &mut rng, &what);
                qemu.io(folder, "-f qed", "disk.qed", &scribble(&mut rng, size));
                agrees(&qemu, folder, "disk.qed", &mut rng, &what);
            }
        }
    }
}

#[test]
fn a_large_sparse_disk_is_read_where_it_has_something() {
    for qemu in Qemu::all("a_large_sparse_disk") {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        qemu.ok(folder, "qemu-img create -q -f qed disk.qed 60T");
        let far = (55_u64 << 40) + 3 * 65536;
        let writes = [format!("write -P 5 {far} 65536"), "write -P 6 1G 512".to_owned()];
        qemu.io(folder, "-f qed", "disk.qed", &writes);
        let handle = open(folder, "disk.qed", CacheMode::Buffered).handle(FileStorage::new);
        assert_eq!(read(&handle, far - 10, 20), [[0; 10], [5; 10]].concat());
        assert_eq!(read(&handle, far + 65530, 10), [5, 5, 5, 5, 5, 5, 0, 0, 0, 0]);
        let mut pieces = Vec::new();
        let mut rest = ByteRange::between(0, 60 << 40);
        while !rest.is_empty() {
            let piece = block_on(handle.mapping(rest)).unwrap();
            pieces.push((piece.content != PieceContent::Zero).then_some(piece.range.start()));
            rest = ByteRange::between(piece.range.end(), rest.end());
        }
        let data: Vec<u64> = pieces.iter().copied().flatten().collect();
        assert_eq!(data, [1 << 30, far]);
        // A piece for what no table maps, and for each part of the two tables that was read.
        assert!(pieces.len() < 100, "{} pieces", pieces.len());
    }
}

/// Runs our tool; its status, and what it said on either stream.
fn addcow(folder: &Path, line: &str) -> (Option<i32>, String) {
    let mut tool = Command::new(env!("CARGO_BIN_EXE_addcow"));
    let output = tool.args(line.split_whitespace()).current_dir(folder).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.code(), text + &String::from_utf8_lossy(&output.stderr))
}

#[test]
fn chains_with_qed_in_them_show_it() {
    let mut rng = Rng::with_seed(0xc4a1);
    for qemu in Qemu::all("chains_with_qed_in_them") {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        fs::write(folder.join("base.img"), [0x11; 700_000]).unwrap();
        qemu.ok(folder, "qemu-img create -q -f qed -b base.img -F raw low.qed 1M");
        qemu.io(folder, "-f qed", "low.qed", &scribble(&mut rng, 1 << 20));
        qemu.ok(folder, "qemu-img create -q -f qcow2 -b low.qed -F qed top.qcow2 2M");
        let line = "create -q -b low.qed -F qed over.add-cow 2M";
        assert_eq!(addcow(folder, line), (Some(0), String::new()));
        let mut expected = expected(&qemu, folder, "low.qed");
        expected.resize(2 << 20, 0);
        for (disk, format) in
            [("top.qcow2", DiskFormat::Qcow2), ("over.add-cow", DiskFormat::AddCow)]
        {
            let chain = OpenChain::open(&folder.join(disk), format, ChainOptions::BUFFERED);
            let handle = chain.unwrap().handle(FileStorage::new);
            assert!(read(&handle, 0, 2 << 20) == expected, "{disk}");
        }
        let (code, text) = addcow(folder, "info --backing-chain over.add-cow");
        assert_eq!(code, Some(0), "{text}");
        assert!(text.contains("file format: qed\nvirtual size: 1 MiB"), "{text}");
        assert!(text.contains("backing file: base.img\nbacking file format: raw"), "{text}");
        let ours = addcow(folder, "map -f qed --output=json low.qed").1;
        let theirs = qemu.ok(folder, "qemu-img map -f qed --output=json low.qed");
        // The same bytes, with data, zeros and holes at the same depths.
        assert_eq!(map(&ours), map(&theirs));
    }
}

/// A map as (start, depth, zero, data), neighbours of one kind merged.
fn map(text: &str) -> Vec<(u64, u64, bool, bool)> {
    let entries: Vec<serde_json::Value> = serde_json::from_str(text).unwrap();
    let mut merged: Vec<(u64, u64, bool, bool)> = Vec::new();
    for entry in entries {
        let number = |key: &str| entry[key].as_u64().unwrap();
        let flag = |key: &str| entry[key].as_bool().unwrap();
        let next = (number("start"), number("depth"), flag("zero"), flag("data"));
        if merged.last().is_none_or(|last| (last.1, last.2, last.3) != (next.1, next.2, next.3)) {
            merged.push(next);
        }
    }
    merged
}

#[test]
fn what_cannot_be_read_is_refused_with_one_line() {
    for qemu in Qemu::all("what_cannot_be_read_is_refused") {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        fs::write(folder.join("base.img"), [1; 4096]).unwrap();
        let refused = |name: &str, words: &str| {
            for line in
                [format!("map -f qed {name}"), format!("create -b {name} -F qed never.add-cow 1M")]
            {
                let (code, text) = addcow(folder, &line);
                assert!(code == Some(1) && text.contains(words), "{line}: {text}");
                assert_eq!(text.lines().count(), 1, "{line}: {text}");
            }
            assert!(!folder.join("never.add-cow").exists() && !folder.join("never.raw").exists());
        };
        // A format that the file cannot name; and the same file once it is raw.
        qemu.ok(folder, "qemu-img create -q -f qcow2 mid.qcow2 1M");
        qemu.ok(folder, "qemu-img create -q -f qed -b mid.qcow2 -F qcow2 top.qed");
        refused("top.qed", "does not name the format of its backing file 'mid.qcow2'");
        assert_eq!(addcow(folder, "info -f qed top.qed").0, Some(0));
        qemu.ok(folder, "qemu-img rebase -u -f qed -b base.img -F raw top.qed");
        assert_eq!(addcow(folder, "map -f qed top.qed").0, Some(0));
        // A backing file that is the disk itself.
        fs::hard_link(folder.join("top.qed"), folder.join("same.img")).unwrap();
        qemu.ok(folder, "qemu-img rebase -u -f qed -b same.img -F raw top.qed");
        refused("top.qed", "'same.img' ");
        // A writer that died: without a backing file QEMU says so in the header.
        qemu.ok(folder, "qemu-img create -q -f qed dead.qed 1M");
        let mut io = qemu.command("qemu-io", folder);
        io.args(["-f", "qed", "-c", "write 0 64k", "-c", "abort", "dead.qed"]);
        assert!(!io.output().unwrap().status.success());
        assert_eq!(fs::read(folder.join("dead.qed")).unwrap()[16], 2, "NEED_CHECK");
        refused("dead.qed", "it was not closed cleanly (`qemu-img check -r all` repairs it)");
        qemu.ok(folder, "qemu-img check -q -f qed -r all dead.qed");
        assert_eq!(addcow(folder, "map -f qed dead.qed").0, Some(0));
        refused("base.img", "not a QED file");
        refused("missing.qed", "No such file");
    }
}

/// What a reader can make of one cluster: `None` if the tables make no sense there.
fn cluster_of(file: &[u8], header: &Header, base: &[u8], number: u64) -> Option<Vec<u8>> {
    let number_at = |at: u64| {
        let at = usize::try_from(at).ok()?;
        decode_table(file.get(at..at.checked_add(8)?)?).next()
    };
    let size = header.cluster_size();
    let start = number * size;
    let len = usize::try_from(size.min(header.image_size() - start)).unwrap();
    let bytes = |source: &[u8], at: u64| -> Vec<u8> {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        let byte = |index: usize| source.get(at.saturating_add(index)).copied().unwrap_or(0);
        (0..len).map(byte).collect()
    };
    let l1 = u64::from_le_bytes(file[40..48].try_into().unwrap());
    let table = number_at(l1 + start / header.l2_reach() * 8)?;
    let entry = match table {
        0 => 0,
        table => number_at(table.checked_add(start % header.l2_reach() / size * 8)?)?,
    };
    match entry {
        0 => Some(bytes(base, start)),
        1 => Some(vec![0; len]),
        offset => {
            let whole = file.len() as u64 / size * size;
            let header_len = u64::from(u32::from_le_bytes(file[12..16].try_into().unwrap())) * size;
            let inside = offset % size == 0
                && offset >= header_len
                && offset.checked_add(size).is_some_and(|end| end <= whole);
            inside.then(|| bytes(file, offset))
        }
    }
}

/// An offset as an index.
fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

/// Damages a file in one to four places, all in its header or in entries of its tables.
fn damage(sound: &[u8], entries: &[usize], rng: &mut Rng) -> Vec<u8> {
    let mut bytes = sound.to_vec();
    for _ in 0..rng.usize(1..5) {
        let in_header = rng.bool();
        let at = if in_header { rng.usize(0..8) * 8 } else { entries[rng.usize(..entries.len())] };
        let old = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let new = match rng.u32(0..5) {
            0 => old ^ 1 << rng.u32(0..64),
            1 => old ^ 1 << rng.u32(9..20),
            2 => rng.u64(0..bytes.len() as u64 / 4096 + 2) * 4096,
            3 => rng.u64(0..3),
            _ => rng.u64(..),
        };
        bytes[at..at + 8].copy_from_slice(&new.to_le_bytes());
    }
    if rng.u32(0..10) == 0 {
        bytes.truncate(rng.usize(0..bytes.len()));
    }
    bytes
}

/// Reads clusters of a damaged file that could be opened, and returns how many were errors.
fn read_damaged(chain: &OpenChain, bytes: &[u8], backing: &[u8], rng: &mut Rng, seed: u64) -> u32 {
    let header = Header::decode(bytes).unwrap();
    let backing = if header.backing_name().is_some() { backing } else { &[] };
    let handle = chain.handle(FileStorage::new);
    // A disk may have been damaged into one without a byte.
    let clusters = header.image_size().div_ceil(header.cluster_size());
    let Some(last) = clusters.checked_sub(1) else { return 0 };
    let mut failed = 0;
    for _ in 0..if header.cluster_size() > 1 << 20 { 2 } else { 300 } {
        let number = rng.u64(0..=last);
        let start = number * header.cluster_size();
        let len = header.cluster_size().min(header.image_size() - start);
        let buffer = IoBuffer::zeroed(index(len));
        let found = block_on(handle.read(start, buffer.clone()));
        match (&found, cluster_of(bytes, &header, backing, number)) {
            (Ok(()), Some(expected)) => {
                assert!(buffer.to_vec() == expected, "ADDCOW_SEED={seed}: cluster {number}");
            }
            (Err(_), None) => failed += 1,
            _ => panic!("ADDCOW_SEED={seed}: cluster {number}: {found:?}"),
        }
    }
    failed
}

#[test]
fn damaged_files_are_refused_or_read_as_they_are() {
    let Some(qemu) = Qemu::all("damaged_files").into_iter().next() else { return };
    let base = std::env::var("ADDCOW_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let backing: Vec<u8> = (0..900_000_u32).map(|at| (at / 512 % 251) as u8 | 1).collect();
    fs::write(folder.join("base.img"), &backing).unwrap();
    let (size, options) = ((8 << 20) + 1024, "cluster_size=4k,table_size=2");
    let create = format!("qemu-img create -q -f qed -o {options} -b base.img -F raw");
    qemu.ok(folder, &format!("{create} sound.qed {size}"));
    qemu.io(folder, "-f qed", "sound.qed", &scribble(&mut Rng::with_seed(base), size));
    let sound = fs::read(folder.join("sound.qed")).unwrap();
    // What could be entries: small numbers, but not in the header's cluster.
    let entries: Vec<usize> = (512..sound.len() / 8)
        .map(|index| index * 8)
        .filter(|&at| sound[at..at + 4] != [0; 4] && sound[at + 4..at + 8] == [0; 4])
        .collect();
    let (mut opened, mut refused, mut failed) = (0, 0, 0);
    for seed in base..base + if cfg!(debug_assertions) { 400 } else { 3000 } {
        let mut rng = Rng::with_seed(seed);
        let bytes = damage(&sound, &entries, &mut rng);
        let path = folder.join("damaged.qed");
        fs::write(&path, &bytes).unwrap();
        match OpenChain::open(&path, DiskFormat::Qed, ChainOptions::BUFFERED) {
            Ok(chain) => {
                opened += 1;
                failed += read_damaged(&chain, &bytes, &backing, &mut rng, seed);
            }
            Err(_) => refused += 1,
        }
    }
    println!("{opened} opened, {refused} refused, {failed} clusters in error");
    assert!(opened > 50 && refused > 50 && failed > 50, "{opened} {refused} {failed}");
}
