//! Do backing chains show what QEMU shows, and are the rest refused?
//!
//! Real images made by qemu-img, read as a chain and byte-compared with what `qemu-img convert`
//! makes of them; and the daemon serving an overlay over such a chain. Damaged files are in
//! `backing_damage.rs`, chains of overlays alone in `tool/chain.cmd`.

mod common;
#[path = "common/qemu.rs"]
mod qemu;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use addcow::executor::block_on;
use addcow::image::chain::{Chain, ChainOptions, DiskFormat, OpenChain, PieceContent};
use addcow::image::open::{OpenOptions, add_cow};
use addcow::storage::IoBuffer;
use addcow::storage::file::FileStorage;
use addcow::storage::host_file::CacheMode;
use addcow::units::ByteRange;
use common::disk::{Daemon, TOOL};
use common::guest::Setup;
use common::model::{Model, Workload};
use common::request::{Framing, OK, Request};
use common::rng::Rng;
use common::{KIB, MIB, SECTOR, assert_bytes, pattern, to_u64, to_usize};
use qemu::Qemu;
use tempfile::TempDir;

/// A folder of images, and QEMU's tools to make them with.
struct Lab {
    /// The tools.
    qemu: Qemu,
    /// The folder.
    dir: TempDir,
    /// Where choices come from.
    rng: Rng,
}

impl Lab {
    /// An empty folder; `None` (and a line that is seen) without QEMU's tools.
    fn new(test: &str, seed: u64) -> Option<Self> {
        let qemu = Qemu::all(test).into_iter().next()?;
        let dir = tempfile::tempdir().expect("a temporary folder");
        Some(Self { qemu, dir, rng: Rng::new(seed) })
    }

    /// The path of a file in the folder.
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a QEMU tool, which must succeed.
    fn qemu(&self, line: &str) {
        self.qemu.ok(self.dir.path(), line);
    }

    /// Runs our tool; its exit code and what it said, on whichever stream.
    fn addcow(&self, line: &str) -> (i32, String) {
        let words = line.split_whitespace();
        let output = Command::new(TOOL).args(words).current_dir(self.dir.path()).output();
        let output = output.expect("run the tool");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code().expect("an exit code"), text + &errors)
    }

    /// Makes a raw image with data that no two places share, some of it hard to compress, and
    /// holes.
    fn raw(&mut self, name: &str, len: u64) {
        let file = File::create(self.path(name)).expect("a raw image");
        file.set_len(len).expect("its length");
        for _ in 0..12 {
            let start = self.rng.pick(0..len);
            let count = self.rng.pick(1..len / 8).min(len - start);
            let bytes = pattern(self.rng.next(), start / 512, to_usize(count));
            file.write_all_at(&bytes, start).expect("its content");
        }
    }

    /// Writes at random places of a disk of `size` bytes, some of it zeros.
    fn scribble(&mut self, name: &str, size: u64) {
        let mut commands = Vec::new();
        for _ in 0..25 {
            let start = self.rng.pick(0..size / 512) * 512;
            let len = (self.rng.pick(1..300) * 512).min(size - start);
            let what = match self.rng.pick(0..8) {
                0 => "-z".to_owned(),
                1 => "-z -u".to_owned(),
                _ => format!("-P {}", self.rng.pick(1..256)),
            };
            commands.push(format!("write {what} {start} {len}"));
        }
        self.qemu.io(self.dir.path(), "-f qcow2", name, &commands);
    }

    /// All bytes of a disk as QEMU sees it.
    fn expected(&self, name: &str, format: &str) -> Vec<u8> {
        self.qemu(&format!("qemu-img convert -f {format} -O raw {name} expected.raw"));
        fs::read(self.path("expected.raw")).expect("what qemu-img has made")
    }

    /// The disk reads as QEMU reads it.
    fn agrees(&mut self, name: &str) {
        let expected = self.expected(name, "qcow2");
        for cache in [CacheMode::Buffered, CacheMode::Direct] {
            let options = ChainOptions { cache, ..ChainOptions::BUFFERED };
            let chain = OpenChain::open(&self.path(name), DiskFormat::Qcow2, options).unwrap();
            assert_eq!(chain.virtual_size(), to_u64(expected.len()), "{name}: its size");
            reads_as(&chain, &expected, &mut self.rng, name);
        }
    }
}

/// Reads `offset..offset + len` of a chain.
fn read(chain: &Chain<FileStorage>, offset: u64, len: usize) -> Vec<u8> {
    let buffer = IoBuffer::from_bytes(&vec![0xee; len]);
    block_on(chain.read(offset, buffer.clone())).unwrap();
    buffer.to_vec()
}

/// A chain shows `expected`, and zeros behind: in pieces at random places while nothing is known
/// yet, as a whole, and by what it says about its pieces.
fn reads_as(chain: &OpenChain, expected: &[u8], rng: &mut Rng, what: &str) {
    let handle = chain.handle(FileStorage::new);
    let size = to_u64(expected.len());
    let mut longer = expected.to_vec();
    longer.resize(expected.len() + 400_000, 0);
    for _ in 0..40 {
        let start = rng.pick(0..size + 1000);
        let longest = if rng.one_in(4) { 300_000 } else { 5000 };
        let len = to_usize(rng.pick(1..longest));
        let got = read(&handle, start, len);
        let at = format!("{what}: {len} bytes at {start:#x}");
        assert_bytes(&got, &longer[to_usize(start)..][..len], &at);
    }
    let whole = read(&handle, 0, expected.len() + 1000);
    assert_bytes(&whole, &longer[..expected.len() + 1000], what);
    let mut rest = ByteRange::between(0, size + 5000);
    while !rest.is_empty() {
        let piece = block_on(handle.piece(rest)).unwrap();
        assert_eq!(piece.range.start(), rest.start(), "{what}");
        assert!(!piece.range.is_empty() && piece.range.end() <= rest.end(), "{what}: {piece:?}");
        if piece.content == PieceContent::Zero {
            let range = to_usize(piece.range.start())..to_usize(piece.range.end());
            let zeros = vec![0; range.len()];
            assert_bytes(&longer[range], &zeros, &format!("{what}: {piece:?}"));
        }
        rest = ByteRange::between(piece.range.end(), rest.end());
    }
}

#[test]
fn every_kind_of_qcow2_that_qemu_img_makes_reads_as_qemu_reads_it() {
    let Some(mut lab) = Lab::new("every_kind_of_qcow2", 2001) else { return };
    let kinds = [
        ("version 3", "compat=1.1", 6 * MIB),
        ("version 2", "compat=0.10", 6 * MIB),
        ("clusters of 512 bytes", "cluster_size=512", 2 * MIB),
        ("clusters of 4 KiB", "cluster_size=4k", 6 * MIB),
        ("clusters of 2 MiB", "cluster_size=2M", 11 * MIB),
        ("an odd size", "cluster_size=64k", 5 * MIB + 1536),
        ("lazy refcounts", "lazy_refcounts=on", 4 * MIB),
        ("narrow refcounts", "refcount_bits=1", 4 * MIB),
        ("wide refcounts", "refcount_bits=64", 4 * MIB),
        ("a data file", "data_file=data.raw", 6 * MIB),
        ("a data file, small clusters", "data_file=data.raw,cluster_size=4k", 3 * MIB),
        ("preallocated", "preallocation=metadata", 6 * MIB),
        ("raw data file", "data_file=data.raw,data_file_raw=on", 6 * MIB),
    ];
    for (what, options, size) in kinds {
        for backing in [false, true] {
            if backing && (options.contains("preallocation") || options.contains("file_raw")) {
                continue;
            }
            println!("{what}, with backing: {backing}");
            // The data file is named by its absolute path: QEMU takes others from where it runs.
            let data = lab.path("data.raw").display().to_string();
            let options = options.replace("=data.raw", &format!("={data}"));
            for file in ["data.raw", "disk.qcow2"] {
                drop(fs::remove_file(lab.path(file)));
            }
            // Shorter than the disk, and not a multiple of anything.
            lab.raw("base.raw", size / 3 * 2 + 77);
            let base = if backing { "-b base.raw -F raw" } else { "" };
            lab.qemu(&format!("qemu-img create -q -f qcow2 -o {options} {base} disk.qcow2 {size}"));
            lab.scribble("disk.qcow2", size);
            lab.agrees("disk.qcow2");
        }
    }
}

#[test]
fn compressed_clusters_read_as_qemu_reads_them() {
    let Some(mut lab) = Lab::new("compressed_clusters", 2002) else { return };
    for (cluster, size) in [("512", MIB), ("4k", 2 * MIB), ("64k", 7 * MIB + 512), ("2M", 9 * MIB)]
    {
        for compat in ["0.10", "1.1"] {
            println!("clusters of {cluster}, compat {compat}");
            lab.raw("base.raw", size);
            let options = format!("-c -O qcow2 -o cluster_size={cluster},compat={compat}");
            lab.qemu(&format!("qemu-img convert -f raw {options} base.raw disk.qcow2"));
            lab.agrees("disk.qcow2");
            // Some clusters rewritten: compressed and plain ones side by side.
            lab.scribble("disk.qcow2", size / 512 * 512);
            lab.agrees("disk.qcow2");
        }
    }
}

#[test]
fn internal_snapshots_do_not_show() {
    let Some(mut lab) = Lab::new("internal_snapshots", 2003) else { return };
    lab.qemu("qemu-img create -q -f qcow2 disk.qcow2 4M");
    for name in ["first", "second"] {
        lab.scribble("disk.qcow2", 4 * MIB);
        lab.qemu(&format!("qemu-img snapshot -c {name} disk.qcow2"));
    }
    lab.scribble("disk.qcow2", 4 * MIB);
    lab.agrees("disk.qcow2");
}

/// Makes base.raw, middle.qcow2 (shorter than the top) over it, and a compressed top.qcow2.
fn three_levels(lab: &mut Lab) {
    lab.raw("base.raw", 5 * MIB + 300);
    lab.qemu("qemu-img create -q -f qcow2 -b base.raw -F raw middle.qcow2 3M");
    lab.scribble("middle.qcow2", 3 * MIB);
    lab.qemu("qemu-img create -q -f qcow2 -b middle.qcow2 -F qcow2 plain.qcow2 6M");
    lab.scribble("plain.qcow2", 6 * MIB);
    lab.qemu("qemu-img convert -c -O qcow2 -B middle.qcow2 -F qcow2 plain.qcow2 top.qcow2");
}

#[test]
fn qcow2_over_qcow2_over_raw_reads_and_maps_as_with_qemu() {
    let Some(mut lab) = Lab::new("qcow2_over_qcow2_over_raw", 2004) else { return };
    three_levels(&mut lab);
    for name in ["plain.qcow2", "top.qcow2"] {
        lab.agrees(name);
        let map = |text: String| serde_json::from_str::<serde_json::Value>(&text).unwrap();
        let line = format!("map -f qcow2 --output=json {name}");
        let ours = map(lab.addcow(&line).1);
        let theirs = map(lab.qemu.ok(lab.dir.path(), &line.replacen("map", "qemu-img map", 1)));
        let (ours, theirs) = (ours.as_array().unwrap(), theirs.as_array().unwrap());
        for (ours, theirs) in ours.iter().zip(theirs) {
            // Not all versions of qemu-img have `compressed`.
            for key in theirs.as_object().unwrap().keys() {
                assert_eq!(ours[key], theirs[key], "{name}: {ours} {theirs}");
            }
        }
        assert_eq!(ours.len(), theirs.len(), "{name}");
        assert!(ours.len() > 20, "{name}: {} pieces", ours.len());
    }
}

#[test]
fn info_of_a_chain_has_the_keys_and_values_of_qemu_img() {
    let Some(mut lab) = Lab::new("info_of_a_chain", 2005) else { return };
    three_levels(&mut lab);
    lab.qemu("qemu-img create -q -f qcow2 -o compat=0.10 -b top.qcow2 -F qcow2 v2.qcow2");
    lab.qemu("qemu-img create -q -f qcow2 -o data_file=d.raw,data_file_raw=on data.qcow2 1M");
    for name in ["v2.qcow2", "data.qcow2"] {
        let line = format!("info -f qcow2 --backing-chain --output=json {name}");
        let ours: serde_json::Value = serde_json::from_str(&lab.addcow(&line).1).unwrap();
        let theirs = lab.qemu.ok(lab.dir.path(), &line.replacen("info", "qemu-img info", 1));
        let theirs: serde_json::Value = serde_json::from_str(&theirs).unwrap();
        let (ours, theirs) = (ours.as_array().unwrap(), theirs.as_array().unwrap());
        assert_eq!(ours.len(), theirs.len());
        for (ours, theirs) in ours.iter().zip(theirs) {
            for (key, value) in theirs.as_object().unwrap() {
                let of_ours = &ours[key];
                match key.as_str() {
                    "children" => {}
                    // QEMU rounds the length of a raw file up; ours is what shows above it.
                    "virtual-size" if ours["format"] == "raw" => {}
                    _ => assert_eq!(of_ours, value, "{name}: {key}"),
                }
            }
        }
    }
}

#[test]
fn overlays_over_qcow2_show_it_and_what_was_written() {
    let Some(mut lab) = Lab::new("overlays_over_qcow2", 2006) else { return };
    three_levels(&mut lab);
    let mut expected = lab.expected("top.qcow2", "qcow2");
    expected.resize(to_usize(7 * MIB), 0);
    let mut below = ("top.qcow2".to_owned(), "qcow2");
    for (disk, cluster) in [("first.add-cow", 4 * KIB), ("second.add-cow", 64 * KIB)] {
        let (backing, format) = &below;
        let line = format!("create -q -b {backing} -F {format} --cluster-size {cluster} {disk} 7M");
        assert_eq!(lab.addcow(&line), (0, String::new()));
        let image =
            add_cow(&lab.path(disk), OpenOptions { writable: true, ..OpenOptions::READ_ONLY });
        let image = image.unwrap();
        let handle = image.handle(FileStorage::new);
        for _ in 0..60 {
            let sector = lab.rng.pick(0..7 * MIB / 512 - 40);
            let data = pattern(lab.rng.next(), sector, to_usize(lab.rng.pick(1..40)) * SECTOR);
            block_on(handle.write(sector * 512, IoBuffer::from_bytes(&data))).unwrap();
            expected[to_usize(sector) * SECTOR..][..data.len()].copy_from_slice(&data);
        }
        let all = IoBuffer::zeroed(expected.len());
        block_on(handle.read(0, all.clone())).unwrap();
        assert_bytes(&all.to_vec(), &expected, disk);
        block_on(handle.flush()).unwrap();
        drop((handle, image));
        let format = DiskFormat::AddCow;
        let chain = OpenChain::open(&lab.path(disk), format, ChainOptions::BUFFERED).unwrap();
        reads_as(&chain, &expected, &mut lab.rng, disk);
        below = (disk.to_owned(), "add-cow");
    }
}

#[test]
fn many_threads_read_one_cold_chain() {
    let Some(mut lab) = Lab::new("many_threads", 2007) else { return };
    three_levels(&mut lab);
    let expected = lab.expected("top.qcow2", "qcow2");
    let path = lab.path("top.qcow2");
    let chain = OpenChain::open(&path, DiskFormat::Qcow2, ChainOptions::BUFFERED).unwrap();
    let chain = Arc::new(chain);
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let (chain, expected) = (Arc::clone(&chain), &expected);
            scope.spawn(move || reads_as(&chain, expected, &mut Rng::new(seed), "a thread"));
        }
    });
}

/// A daemon on a new overlay over the compressed top.qcow2, and what a guest must see.
fn serve_overlay(lab: &mut Lab, options: &[&str]) -> (Daemon, Vec<u8>) {
    three_levels(lab);
    let expected = lab.expected("top.qcow2", "qcow2");
    let line = "create -q -b top.qcow2 -F qcow2 --cluster-size 16k disk.add-cow";
    assert_eq!(lab.addcow(line), (0, String::new()));
    let mut args = vec!["--blk-file", "disk.add-cow", "--socket-path", "sock"];
    args.extend_from_slice(options);
    (Daemon::spawn(lab.dir.path(), &args, None), expected)
}

#[test]
fn two_queues_of_the_daemon_read_a_compressed_chain_while_nothing_is_looked_up_yet() {
    let Some(mut lab) = Lab::new("two_queues_cold", 2008) else { return };
    let (mut daemon, expected) = serve_overlay(&mut lab, &["--num-queues", "2"]);
    let mut guest = daemon.guest(Setup::queues(2, 256));
    // All at once, before any table was read: neighbours on different queues.
    let sectors = to_u64(expected.len() / SECTOR);
    let requests: Vec<u64> = (0..sectors - 96).step_by(to_usize(sectors / 60)).collect();
    let mut flying = Vec::new();
    for (index, &sector) in requests.iter().enumerate() {
        let request = Request::read(sector, 96 * SECTOR);
        let head = guest.submit(index % 2, &request, &Framing::joined());
        flying.push((index % 2, head, sector));
    }
    guest.kick(0);
    guest.kick(1);
    for _ in 0..flying.len() {
        let queue = flying[0].0;
        let (head, reply) = guest.finish(queue);
        let at = flying.iter().position(|&(q, h, _)| (q, h) == (queue, head)).expect("one of ours");
        let (_, _, sector) = flying.remove(at);
        assert_eq!(reply.status(), OK);
        let want = &expected[to_usize(sector) * SECTOR..][..96 * SECTOR];
        assert_bytes(reply.data(), want, &format!("sector {sector}"));
    }
    assert_bytes(&guest.read_all(), &expected, "the whole disk");
    drop(guest);
    daemon.stop();
}

#[test]
fn work_on_an_overlay_over_a_compressed_chain_agrees_with_the_model() {
    for cache in ["buffered", "direct"] {
        let Some(mut lab) = Lab::new("work_on_an_overlay", 2009) else { return };
        let options = ["--num-queues", "2", "--backing-cache", cache];
        let (mut daemon, expected) = serve_overlay(&mut lab, &options);
        let mut guest = daemon.guest(Setup::queues(2, 128));
        let mut model = Model::new(expected);
        Workload::new(2009).run(&mut guest, &mut model, 30);
        Workload::verify(&mut guest, &mut model);
        drop(guest);
        daemon.stop();
    }
}

#[test]
fn requests_over_the_most_fragmented_chain_there_is_are_answered() {
    let Some(mut lab) = Lab::new("most_fragmented", 2013) else { return };
    // Every sector elsewhere in the file, and every other cluster of the overlay its own.
    lab.qemu("qemu-img create -q -f qcow2 -o cluster_size=512 top.qcow2 1M");
    let sectors = MIB / 512;
    let order = (0..sectors).map(|n| n * 1_000_003 % sectors);
    let commands: Vec<String> =
        order.map(|n| format!("write -P {} {} 512", n % 255 + 1, n * 512)).collect();
    for part in commands.chunks(512) {
        lab.qemu.io(lab.dir.path(), "-f qcow2", "top.qcow2", part);
    }
    let mut expected = lab.expected("top.qcow2", "qcow2");
    let line = "create -q -b top.qcow2 -F qcow2 disk.add-cow";
    assert_eq!(lab.addcow(line), (0, String::new()));
    let args = ["--blk-file", "disk.add-cow", "--socket-path", "sock", "--num-queues", "2"];
    let mut daemon = Daemon::spawn(lab.dir.path(), &args, None);
    let mut guest = daemon.guest(Setup::queues(2, 256));
    for cluster in (0..MIB / 4096).step_by(2) {
        let data = pattern(cluster, cluster * 8, 4096);
        guest.write(cluster * 8, &data);
        expected[to_usize(cluster) * 4096..][..4096].copy_from_slice(&data);
    }
    let len = MIB / 4;
    for round in 0..60 {
        let sector = lab.rng.pick(0..(MIB - len) / 512);
        guest.submit(round % 2, &Request::read(sector, to_usize(len)), &Framing::joined());
    }
    (0..2).for_each(|queue| guest.rings[queue].kick_always());
    for round in 0..60 {
        assert_eq!(guest.finish(round % 2).1.status(), OK);
    }
    assert_bytes(&guest.read_all(), &expected, "the whole disk");
    drop(guest);
    daemon.stop();
}

/// Overwrites bytes of a file.
fn poke(lab: &Lab, name: &str, offset: u64, bytes: &[u8]) {
    let file = File::options().write(true).open(lab.path(name)).expect("a file");
    file.write_all_at(bytes, offset).expect("poke");
}

/// `info --backing-chain` and `map` refuse the disk with a line that has `words`, and so does
/// `create` when it is to be a backing file.
fn refused(lab: &Lab, name: &str, words: &str) {
    for line in [
        format!("info --backing-chain -f qcow2 {name}"),
        format!("map -f qcow2 {name}"),
        format!("create -b {name} -F qcow2 never.add-cow 1M"),
    ] {
        let (code, text) = lab.addcow(&line);
        assert_eq!(code, 1, "{line}: {text}");
        assert!(text.starts_with("addcow: ") && text.contains(words), "{line}: {text}");
        assert_eq!(text.lines().count(), 1, "{line}: {text}");
    }
    assert!(!lab.path("never.add-cow").exists() && !lab.path("never.raw").exists());
}

#[test]
fn qcow2_files_that_cannot_be_read_are_refused_clearly() {
    let Some(lab) = Lab::new("qcow2_files_refused", 2010) else { return };
    let make =
        |options: &str| lab.qemu(&format!("qemu-img create -q -f qcow2 {options} x.qcow2 1M"));
    make("--object secret,id=s,data=x -o encrypt.format=luks,encrypt.key-secret=s");
    refused(&lab, "x.qcow2", "LUKS");
    make("-o compression_type=zstd");
    refused(&lab, "x.qcow2", "zstd");
    make("-o extended_l2=on");
    refused(&lab, "x.qcow2", "subclusters");
    // Incompatible feature bits: big-endian, from byte 72 on.
    make("-o lazy_refcounts=on");
    poke(&lab, "x.qcow2", 79, &[1]);
    refused(&lab, "x.qcow2", "qemu-img check -r all");
    poke(&lab, "x.qcow2", 79, &[2]);
    refused(&lab, "x.qcow2", "corrupt");
    poke(&lab, "x.qcow2", 79, &[0x80]);
    refused(&lab, "x.qcow2", "unknown incompatible feature");
    poke(&lab, "x.qcow2", 79, &[4]);
    refused(&lab, "x.qcow2", "data file");
    make("");
    poke(&lab, "x.qcow2", 7, &[4]);
    refused(&lab, "x.qcow2", "version 4");
    poke(&lab, "x.qcow2", 0, b"R");
    refused(&lab, "x.qcow2", "not a qcow2 file");
    fs::write(lab.path("x.qcow2"), b"QFI").expect("a short file");
    refused(&lab, "x.qcow2", "x.qcow2");
    refused(&lab, "missing.qcow2", "No such file");
    make("-o data_file=data.raw");
    fs::remove_file(lab.path("data.raw")).expect("the data file");
    refused(&lab, "x.qcow2", "data.raw");
}

#[test]
fn backing_names_of_qcow2_files_are_followed_only_where_they_are_plain_files() {
    let Some(lab) = Lab::new("backing_names", 2011) else { return };
    let over = |name: &str, backing: &str| {
        let line = format!("qemu-img create -q -u -f qcow2 -b {backing} -F raw {name} 1M");
        lab.qemu(&line);
    };
    for (backing, words) in [
        ("nbd://localhost:1/x", "protocol"),
        ("json:{\"driver\":\"null-co\"}", "protocol"),
        ("nosuch.raw", "No such file"),
        (".", "directory"),
        ("fifo", "FIFO"),
        ("/dev/null", "device"),
    ] {
        if backing == "fifo" {
            let made = Command::new("mkfifo").arg(lab.path("fifo")).status();
            assert!(made.expect("mkfifo").success());
        }
        over("x.qcow2", backing);
        refused(&lab, "x.qcow2", words);
    }
    // A format that is not ours, and none at all: the extension becomes one that nobody knows.
    File::create(lab.path("base.raw")).expect("a base").set_len(MIB).expect("its length");
    over("x.qcow2", "base.raw");
    let bytes = fs::read(lab.path("x.qcow2")).expect("the file");
    let at = bytes.windows(4).position(|four| four == [0xe2, 0x79, 0x2a, 0xca]).expect("extension");
    poke(&lab, "x.qcow2", to_u64(at) + 8, b"vdi");
    refused(&lab, "x.qcow2", "unsupported format 'vdi'");
    poke(&lab, "x.qcow2", to_u64(at), b"????");
    refused(&lab, "x.qcow2", "does not name the format of its backing file");
}

#[test]
fn cycles_and_bottomless_chains_of_qcow2_files_are_refused() {
    let Some(lab) = Lab::new("cycles", 2012) else { return };
    let over = |name: &str, backing: &str| {
        let line = format!("qemu-img create -q -u -f qcow2 -b {backing} -F qcow2 {name} 1M");
        lab.qemu(&line);
    };
    over("self.qcow2", "./self.qcow2");
    refused(&lab, "self.qcow2", "./self.qcow2");
    over("a.qcow2", "b.qcow2");
    over("b.qcow2", "link.qcow2");
    std::os::unix::fs::symlink("b.qcow2", lab.path("link.qcow2")).expect("a link");
    refused(&lab, "a.qcow2", "comes twice");
    // 64 layers and no more.
    lab.qemu("qemu-img create -q -f qcow2 1.qcow2 1M");
    for depth in 2..=65 {
        over(&format!("{depth}.qcow2"), &format!("{}.qcow2", depth - 1));
    }
    let (code, text) = lab.addcow("map -f qcow2 64.qcow2");
    assert_eq!(code, 0, "{text}");
    refused(&lab, "65.qcow2", "too long");
    let line = "create -q -b 63.qcow2 -F qcow2 deep.add-cow";
    assert_eq!(lab.addcow(line), (0, String::new()));
    let (code, text) = lab.addcow("map deep.add-cow");
    assert_eq!(code, 0, "{text}");
}

#[test]
fn work_on_an_overlay_over_qed_agrees_with_the_model() {
    for cache in ["buffered", "direct"] {
        let Some(mut lab) = Lab::new("work_on_an_overlay_over_qed", 2012) else { return };
        lab.raw("base.raw", 3 * MIB + 300);
        lab.qemu("qemu-img create -q -f qed -o cluster_size=4k -b base.raw -F raw low.qed 5M");
        let commands: Vec<String> = (1..20_u64)
            .map(|n| format!("write -P {n} {} {}", n * 262_144 - 512 * n, 512 * n))
            .chain(["write -z 1M 64k".to_owned(), "write -z 4000k 100k".to_owned()])
            .collect();
        lab.qemu.io(lab.dir.path(), "-f qed", "low.qed", &commands);
        let expected = lab.expected("low.qed", "qed");
        let line = "create -q -b low.qed -F qed --cluster-size 16k disk.add-cow";
        assert_eq!(lab.addcow(line), (0, String::new()));
        let args = ["--blk-file", "disk.add-cow", "--socket-path", "sock", "--num-queues", "2"];
        let args = [&args[..], &["--backing-cache", cache]].concat();
        let mut daemon = Daemon::spawn(lab.dir.path(), &args, None);
        let mut guest = daemon.guest(Setup::queues(2, 128));
        assert_bytes(&guest.read_all(), &expected, "before anything is written");
        let mut model = Model::new(expected);
        Workload::new(2012).run(&mut guest, &mut model, 30);
        Workload::verify(&mut guest, &mut model);
        drop(guest);
        daemon.stop();
    }
}
