//! Do disks survive the way to a qcow2 file over the same raw image, and back?
//!
//! QEMU's tools are the other side: they check what `export` writes, change it, and make what
//! `adopt` reads. Every comparison is of all bytes of the disk. Power cuts and damaged tables are
//! in `tests/adopt_crash.rs`, error messages in `tests/tool/adopt.cmd` and `export.cmd`.

#[path = "common/qemu.rs"]
mod qemu;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use addcow::executor::block_on;
use addcow::image::chain::{ChainOptions, DiskFormat, OpenChain};
use addcow::image::open::{OpenOptions, add_cow};
use addcow::jobs::Unwatched;
use addcow::jobs::adopt::{AdoptOptions, Adopted, from_qcow2};
use addcow::jobs::export::{ExportOptions, Exported, to_qcow2};
use addcow::storage::IoBuffer;
use addcow::storage::file::FileStorage;
use addcow::storage::host_file::CacheMode;
use fastrand::Rng;
use qemu::Qemu;
use tempfile::TempDir;

/// The seed of random tests: `ADDCOW_SEED`, or else `default`. Printed for a replay.
fn seed(default: u64) -> u64 {
    let text = std::env::var("ADDCOW_SEED").ok();
    let seed = text.and_then(|text| text.parse().ok()).unwrap_or(default);
    println!("replay with ADDCOW_SEED={seed}");
    seed
}

/// Runs our tool, which must succeed; returns what it printed.
fn addcow(folder: &Path, line: &str) -> String {
    let mut tool = Command::new(env!("CARGO_BIN_EXE_addcow"));
    let output = tool.args(line.split_whitespace()).current_dir(folder).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{line}: {}\n{out}{err}", output.status);
    out
}

/// Exports a disk with the absolute name of its raw image.
fn export(folder: &Path, disk: &str, out: &str) -> Exported {
    let (disk, out) = (folder.join(disk), folder.join(out));
    to_qcow2(&ExportOptions { disk, out, relative: false, force: true }, &Unwatched).unwrap()
}

/// Adopts a qcow2 file.
fn adopt(folder: &Path, qcow2: &str, new: &str) -> Adopted {
    let (qcow2, new) = (folder.join(qcow2), folder.join(new));
    let options = AdoptOptions { qcow2, new, data_file: None, force: true };
    from_qcow2(&options, &Unwatched).unwrap()
}

/// All bytes of an add-cow disk.
fn bytes_of(folder: &Path, disk: &str) -> Vec<u8> {
    let path = folder.join(disk);
    let chain = OpenChain::open(&path, DiskFormat::AddCow, ChainOptions::BUFFERED).unwrap();
    let buffer = IoBuffer::zeroed(usize::try_from(chain.virtual_size()).unwrap());
    block_on(chain.handle(FileStorage::new).read(0, buffer.clone())).unwrap();
    buffer.to_vec()
}

/// All bytes of a qcow2 disk, as QEMU reads it.
fn qemu_bytes(qemu: &Qemu, folder: &Path, disk: &str) -> Vec<u8> {
    qemu.ok(folder, &format!("qemu-img convert -f qcow2 -O raw {disk} converted.raw"));
    fs::read(folder.join("converted.raw")).unwrap()
}

/// Fails unless QEMU finds nothing wrong with a qcow2 file.
fn check(qemu: &Qemu, folder: &Path, disk: &str) {
    let said = qemu.ok(folder, &format!("qemu-img check -f qcow2 {disk}"));
    assert!(said.contains("No errors were found on the image."), "{said}");
}

/// Fails unless two disks have the same bytes; names the first that differs.
fn same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    if let Some(at) = found.iter().zip(expected).position(|(a, b)| a != b) {
        panic!("{what}: byte {at:#x} is {:#x}, not {:#x}", found[at], expected[at]);
    }
}

/// A file with a different byte in each sector, so that a misplaced one is seen.
fn patterned(path: &Path, len: u64, salt: u8) {
    let sector = |n: u64| (n.wrapping_mul(37) % 251) as u8 ^ salt;
    let bytes: Vec<u8> = (0..len).map(|at| sector(at / 512) | 1).collect();
    fs::write(path, bytes).unwrap();
}

/// What a disk stands on.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Backing {
    /// Nothing: every cluster is allocated.
    None,
    /// A raw file that ends before the disk does, anywhere.
    Short,
    /// A raw file that is longer than the disk.
    Long,
}

const BACKINGS: [Backing; 3] = [Backing::None, Backing::Short, Backing::Long];

/// A change of a disk: where, how much, and what.
#[derive(Debug, Clone, Copy)]
enum Change {
    Write(u64, u64, u8),
    Zero(u64, u64, bool),
    Discard(u64, u64),
}

impl Change {
    /// Some change of a disk of `size` bytes, with sectors or without.
    fn random(rng: &mut Rng, size: u64, cluster: u64) -> Self {
        let sectors = size / 512;
        let start = rng.u64(0..sectors);
        let most = (3 * cluster / 512).min(sectors - start);
        let (start, len) = (start * 512, rng.u64(1..=most) * 512);
        match rng.u32(0..5) {
            0 => Self::Zero(start, len, rng.bool()),
            1 => Self::Discard(start, len),
            _ => Self::Write(start, len, rng.u8(1..=255)),
        }
    }

    /// The same in the words of qemu-io.
    fn command(self) -> String {
        match self {
            Self::Write(start, len, byte) => format!("write -P {byte} {start} {len}"),
            Self::Zero(start, len, false) => format!("write -z {start} {len}"),
            Self::Zero(start, len, true) => format!("write -z -u {start} {len}"),
            Self::Discard(start, len) => format!("discard {start} {len}"),
        }
    }
}

/// Changes an add-cow disk in the way the daemon does.
fn change(folder: &Path, disk: &str, changes: &[Change]) {
    let options = OpenOptions { writable: true, ..OpenOptions::READ_ONLY };
    assert_eq!(options.cache, CacheMode::Buffered);
    let open = add_cow(&folder.join(disk), options).unwrap();
    let image = open.handle(FileStorage::new);
    for &change in changes {
        let result = match change {
            Change::Write(start, len, byte) => {
                let data = vec![byte; usize::try_from(len).unwrap()];
                block_on(image.write(start, IoBuffer::from_bytes(&data)))
            }
            Change::Zero(start, len, unmap) => block_on(image.write_zeroes(start, len, unmap)),
            Change::Discard(start, len) => block_on(image.discard(start, len)),
        };
        result.unwrap();
    }
    block_on(image.flush()).unwrap();
}

/// Makes `disk.add-cow` in a new folder.
fn create(cluster: u64, backing: Backing, size: u64) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut line = format!("create -q --cluster-size {cluster} disk.add-cow {size}");
    let len = match backing {
        Backing::None => None,
        Backing::Short => Some(size * 2 / 3 + 100),
        Backing::Long => Some(size + cluster + 512),
    };
    if let Some(len) = len {
        patterned(&folder.path().join("base.img"), len, 0x40);
        line += " -b base.img -F raw";
    }
    addcow(folder.path(), &line);
    folder
}

/// Out, changed by QEMU, back, changed by us, and out again.
fn round_trip(qemu: &Qemu, rng: &mut Rng, cluster: u64, backing: Backing) {
    let size = cluster * rng.u64(3..9) + [0, 512, cluster / 2][rng.usize(0..3)];
    let folder = create(cluster, backing, size);
    let folder = folder.path();
    let changes = |rng: &mut Rng| -> Vec<Change> {
        (0..8).map(|_| Change::random(rng, size, cluster)).collect()
    };
    let what = format!("{qemu:?} {cluster} {backing:?} {size}");
    change(folder, "disk.add-cow", &changes(rng));
    let before = bytes_of(folder, "disk.add-cow");
    for _ in 0..2 {
        let exported = export(folder, "disk.add-cow", "disk.qcow2");
        let raw = backing == Backing::None;
        assert_eq!(exported.header.has_raw_data(), raw);
        assert_eq!(fs::metadata(folder.join("disk.qcow2")).unwrap().len(), exported.file_len);
        check(qemu, folder, "disk.qcow2");
        let now = bytes_of(folder, "disk.add-cow");
        same(&qemu_bytes(qemu, folder, "disk.qcow2"), &now, &format!("{what}: exported"));

        let commands: Vec<String> = changes(rng).into_iter().map(Change::command).collect();
        qemu.io(folder, "-f qcow2 -d unmap", "disk.qcow2", &commands);
        check(qemu, folder, "disk.qcow2");
        let written = qemu_bytes(qemu, folder, "disk.qcow2");
        adopt(folder, "disk.qcow2", "disk.add-cow");
        same(&bytes_of(folder, "disk.add-cow"), &written, &format!("{what}: {commands:?}"));
        assert!(addcow(folder, "check disk.add-cow").contains("No errors"));
        // The qcow2 file still shows the same.
        check(qemu, folder, "disk.qcow2");
        same(&qemu_bytes(qemu, folder, "disk.qcow2"), &written, &format!("{what}: after"));
        let raw = fs::metadata(folder.join("disk.raw")).unwrap().len();
        assert_eq!(raw, size, "{what}: length of the raw image");
        change(folder, "disk.add-cow", &changes(rng));
    }
    let after = bytes_of(folder, "disk.add-cow");
    assert_ne!(before, after, "nothing was changed");
}

#[test]
fn round_trips_keep_every_byte() {
    let mut rng = Rng::with_seed(seed(0xad0));
    for qemu in Qemu::all("round_trips_keep_every_byte") {
        for cluster in [4096, 65536, 2 << 20] {
            for backing in BACKINGS {
                round_trip(&qemu, &mut rng, cluster, backing);
            }
        }
    }
}

#[test]
fn a_round_trip_of_an_untouched_disk_allocates_nothing() {
    let folder = create(4096, Backing::Long, 3 << 20);
    let before = bytes_of(folder.path(), "disk.add-cow");
    export(folder.path(), "disk.add-cow", "disk.qcow2");
    let adopted = adopt(folder.path(), "disk.qcow2", "new.add-cow");
    assert_eq!((adopted.allocated, adopted.changed.zeroed, adopted.changed.copied), (0, 0, 0));
    same(&bytes_of(folder.path(), "new.add-cow"), &before, "untouched");
}

/// A qcow2 disk that QEMU makes: options of create, name of the backing file if any.
fn qemu_disk(qemu: &Qemu, rng: &mut Rng, cluster: u64, options: &str, backing: Backing) {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let what = format!("{qemu:?} {cluster} {options} {backing:?}");
    let size = cluster.max(4096) * 5 + 512 * rng.u64(0..8);
    let mut line = format!("qemu-img create -q -f qcow2 -o cluster_size={cluster},{options}");
    if backing != Backing::None {
        let len = if backing == Backing::Short { size / 2 + 77 } else { size + cluster };
        patterned(&folder.join("base.img"), len, 0x80);
        line += " -b base.img -F raw";
    }
    qemu.ok(folder, &format!("{line} -o data_file=data.raw disk.qcow2 {size}"));
    // What nobody may ever see: the data file's own bytes where nothing is allocated.
    if !options.contains("raw") {
        let garbage = vec![0xee; usize::try_from(size).unwrap()];
        fs::write(folder.join("data.raw"), garbage).unwrap();
    }
    let changes = (0..12).map(|_| Change::random(rng, size, cluster.max(4096)).command());
    let commands: Vec<String> = changes.collect();
    qemu.io(folder, "-f qcow2 -d unmap", "disk.qcow2", &commands);
    let expected = qemu_bytes(qemu, folder, "disk.qcow2");
    let before = fs::read(folder.join("disk.qcow2")).unwrap();
    let adopted = adopt(folder, "disk.qcow2", "disk.add-cow");
    assert_eq!(adopted.header.all_allocated, backing == Backing::None, "{what}");
    same(&bytes_of(folder, "disk.add-cow"), &expected, &format!("{what} {commands:?}"));
    if cluster >= 4096 {
        assert_eq!(adopted.changed.copied, 0, "{what}: copied");
        assert_eq!(adopted.header.cluster_size.bytes(), cluster);
    }
    assert!(fs::read(folder.join("disk.qcow2")).unwrap() == before, "the qcow2 file was written");
    same(&qemu_bytes(qemu, folder, "disk.qcow2"), &expected, &format!("{what}: after"));
    // And back: the same again, now with what adopting has made of it.
    export(folder, "disk.add-cow", "back.qcow2");
    check(qemu, folder, "back.qcow2");
    same(&qemu_bytes(qemu, folder, "back.qcow2"), &expected, &format!("{what}: back"));
}

#[test]
fn disks_of_qemu_are_adopted_whatever_their_shape() {
    let mut rng = Rng::with_seed(seed(0x9e3));
    for qemu in Qemu::all("disks_of_qemu_are_adopted_whatever_their_shape") {
        for bits in [9, 10, 11, 12, 13, 16, 20, 21] {
            for backing in BACKINGS {
                qemu_disk(&qemu, &mut rng, 1 << bits, "compat=1.1", backing);
            }
        }
        for options in ["refcount_bits=1", "refcount_bits=64", "lazy_refcounts=on"] {
            qemu_disk(&qemu, &mut rng, 65536, options, Backing::Short);
        }
        for options in ["data_file_raw=on", "preallocation=metadata", "preallocation=full"] {
            qemu_disk(&qemu, &mut rng, 65536, options, Backing::None);
            qemu_disk(&qemu, &mut rng, 4096, options, Backing::None);
        }
    }
}

/// A disk whose L1 table has more than one entry, and of which most has no L2 table.
#[test]
fn large_sparse_disks_have_few_tables() {
    for qemu in Qemu::all("large_sparse_disks_have_few_tables") {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        fs::write(folder.join("base.img"), [7; 1000]).unwrap();
        addcow(folder, "create -q --cluster-size 64k -b base.img -F raw disk.add-cow 6T");
        let far = (4 << 40) + 12 * 65536;
        change(folder, "disk.add-cow", &[Change::Write(far, 512, 9), Change::Write(0, 512, 8)]);
        let exported = export(folder, "disk.add-cow", "disk.qcow2");
        // 6 TiB / 512 MiB entries of 8 bytes: 96 KiB, two L2 tables, and little else.
        assert_eq!(exported.file_len, (2 + 2 + 3) * 65536);
        check(&qemu, folder, "disk.qcow2");
        let reads = [format!("read -P 9 {far} 512"), "read -P 8 0 512".to_owned()];
        let verify = ["read -P 7 512 488".to_owned(), "read -P 0 1000 90000".to_owned()];
        qemu.io(folder, "-f qcow2", "disk.qcow2", &[reads.as_slice(), &verify].concat());
        qemu.io(
            folder,
            "-f qcow2",
            "disk.qcow2",
            &[format!("write -P 3 {} 128k", far + (1 << 40))],
        );
        let adopted = adopt(folder, "disk.qcow2", "new.add-cow");
        assert_eq!(adopted.allocated, 4);
    }
}

/// Clusters of 512 bytes, which v18 of the format allowed and nobody writes.
#[test]
fn disks_of_the_old_version_are_exported_with_their_small_clusters() {
    for qemu in Qemu::all("disks_of_the_old_version_are_exported_with_their_small_clusters") {
        let folder = create(4096, Backing::Short, 64 * 512 * 5 + 512);
        let folder = folder.path();
        let side = fs::File::options().write(true).open(folder.join("disk.add-cow")).unwrap();
        side.write_all_at(&9_u32.to_le_bytes(), 20).unwrap();
        change(folder, "disk.add-cow", &[Change::Write(1024, 512, 5), Change::Zero(0, 512, true)]);
        change(folder, "disk.add-cow", &[Change::Write(64 * 512 * 5, 512, 6)]);
        let before = bytes_of(folder, "disk.add-cow");
        let exported = export(folder, "disk.add-cow", "disk.qcow2");
        assert_eq!(exported.header.cluster_size.bytes(), 512);
        check(&qemu, folder, "disk.qcow2");
        same(&qemu_bytes(&qemu, folder, "disk.qcow2"), &before, "exported");
        // Two clusters of 4 KiB are allocated in part: six sectors are missing, past the base none.
        let adopted = adopt(folder, "disk.qcow2", "new.add-cow");
        assert_eq!((adopted.allocated, adopted.changed.copied), (2, 6 * 512));
        same(&bytes_of(folder, "new.add-cow"), &before, "adopted");
    }
}

/// The qcow2 file, the new file and the raw image may lie in three folders.
#[test]
fn names_lead_to_the_same_files_from_another_folder() {
    for qemu in Qemu::all("names_lead_to_the_same_files_from_another_folder") {
        let folder = create(65536, Backing::Short, 1 << 20);
        let folder = folder.path();
        fs::create_dir(folder.join("other")).unwrap();
        change(folder, "disk.add-cow", &[Change::Write(70000 / 512 * 512, 1024, 3)]);
        let before = bytes_of(folder, "disk.add-cow");
        addcow(folder, "export -q disk.add-cow other/disk.qcow2");
        check(&qemu, folder, "other/disk.qcow2");
        same(&qemu_bytes(&qemu, folder, "other/disk.qcow2"), &before, "exported");
        same(&qemu_bytes(&qemu, &folder.join("other"), "disk.qcow2"), &before, "from there");
        addcow(folder, "adopt -q other/disk.qcow2 new.add-cow");
        let header = addcow::image::open::header(&folder.join("new.add-cow")).unwrap();
        assert_eq!(header.image.name.as_bytes(), b"disk.raw");
        same(&bytes_of(folder, "new.add-cow"), &before, "adopted");
        // Without a folder QEMU finds the data file where it is started only; we beside the disk.
        addcow(folder, "export -q --relative disk.add-cow disk.qcow2");
        same(&qemu_bytes(&qemu, folder, "disk.qcow2"), &before, "relative");
        assert!(!qemu.run(&folder.join("other"), "qemu-img check ../disk.qcow2").status.success());
        addcow(&folder.join("other"), "adopt -q ../disk.qcow2 again.add-cow");
        same(&bytes_of(folder, "other/again.add-cow"), &before, "adopted from elsewhere");
    }
}

/// QEMU can change the size of such a disk; what is added reads zeros even over a longer base.
#[test]
fn disks_that_qemu_has_resized_are_adopted() {
    for qemu in Qemu::all("disks_that_qemu_has_resized_are_adopted") {
        for line in
            ["qemu-img resize -q disk.qcow2 3M", "qemu-img resize -q --shrink disk.qcow2 300k"]
        {
            let folder = create(65536, Backing::Long, 1 << 20);
            let folder = folder.path();
            change(folder, "disk.add-cow", &[Change::Write(1 << 19, 1 << 18, 3)]);
            export(folder, "disk.add-cow", "disk.qcow2");
            qemu.ok(folder, line);
            let expected = qemu_bytes(&qemu, folder, "disk.qcow2");
            adopt(folder, "disk.qcow2", "new.add-cow");
            same(&bytes_of(folder, "new.add-cow"), &expected, line);
        }
    }
}

/// Somebody who uses the qcow2 file, or the disk, keeps us out; and leaves no trace.
#[test]
fn a_disk_in_use_is_left_alone() {
    for qemu in Qemu::all("a_disk_in_use_is_left_alone") {
        let folder = create(65536, Backing::Short, 1 << 20);
        let folder = folder.path();
        export(folder, "disk.add-cow", "disk.qcow2");
        let mut user = qemu.command("qemu-io", folder);
        let user = user.arg("disk.qcow2").stdin(std::process::Stdio::piped());
        let mut user = user.stdout(std::process::Stdio::piped()).spawn().unwrap();
        // Its prompt comes once the disk is open.
        std::io::Read::read_exact(user.stdout.as_mut().unwrap(), &mut [0; 9]).unwrap();
        for line in ["adopt disk.qcow2 new.add-cow", "export --force disk.add-cow disk.qcow2"] {
            let mut tool = Command::new(env!("CARGO_BIN_EXE_addcow"));
            let output = tool.args(line.split_whitespace()).current_dir(folder).output().unwrap();
            let error = String::from_utf8(output.stderr).unwrap();
            assert!(!output.status.success() && error.contains("is in use by"), "{line}: {error}");
        }
        assert!(!folder.join("new.add-cow").exists());
        drop(user.stdin.take());
        assert!(user.wait().unwrap().success());
        adopt(folder, "disk.qcow2", "new.add-cow");
    }
}
