//! The four patterns by which the add-cow format was tested when it was proposed.
//!
//! Backing reads (017), the same after the disk was closed and opened again (020, without the
//! commit), copy-on-write within and across clusters (037) and concurrent writes to one cluster
//! (038), at the start of the disk and beyond 4 GiB, on disks of 6 GiB with 64 KiB clusters.
//!
//! Not here: commit, which is a later verb of the image tool.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;

use common::disk::{Disk, Shape};
use common::guest::{Guest, Setup};
use common::request::{Framing, OK, Request};
use common::{GIB, KIB, MIB, SECTOR, assert_bytes, to_usize};

/// Where on the disk each pattern is tried, in bytes.
const OFFSETS: [u64; 2] = [0, 4 * GIB];
/// Cluster size in bytes.
const CLUSTER: u64 = 64 * KIB;
/// Virtual size in bytes.
const SIZE: u64 = 6 * GIB;

/// A disk of 6 GiB over a sparse base of `base` bytes into which `fill` writes.
fn disk_over(base: u64, fill: impl Fn(&File)) -> Disk {
    let disk = Disk::create(Shape::new(SIZE, CLUSTER).base(base).sparse(0));
    let path = disk.path("base.img");
    let file = File::options().write(true).open(path).expect("the base file");
    fill(&file);
    disk
}

/// Writes `len` bytes of `byte` at `offset` through the guest.
fn write(guest: &mut Guest, byte: u8, offset: u64, len: u64) {
    guest.write(offset / 512, &vec![byte; to_usize(len)]);
}

/// Checks that `len` bytes at `offset` are all `byte`.
fn check(guest: &mut Guest, byte: u8, offset: u64, len: u64) {
    let got = guest.read(offset / 512, to_usize(len));
    assert_bytes(&got, &vec![byte; to_usize(len)], &format!("{len} bytes at {offset:#x}"));
}

/// A base with every other sector of the first cluster and the whole second cluster filled.
fn alternating_base() -> Disk {
    disk_over(SIZE, |base| {
        for offset in OFFSETS {
            for sector in (0..128).step_by(2) {
                let place = offset + sector * 512;
                base.write_all_at(&[0x40; SECTOR], place).expect("fill the base");
            }
            let cluster = vec![0x41; to_usize(CLUSTER)];
            base.write_all_at(&cluster, offset + CLUSTER).expect("fill the base");
        }
    })
}

/// Writes the other sectors of the first cluster and the whole third cluster.
fn fill_overlay(guest: &mut Guest) {
    for offset in OFFSETS {
        for sector in (1..128).step_by(2) {
            write(guest, 0x50, offset + sector * 512, 512);
        }
        write(guest, 0x51, offset + 2 * CLUSTER, CLUSTER);
    }
}

/// Checks a mix of the base's and the guest's sectors, whole clusters of each, and holes.
fn check_overlay(guest: &mut Guest) {
    for offset in OFFSETS {
        for sector in 0..128 {
            let byte = if sector % 2 == 0 { 0x40 } else { 0x50 };
            check(guest, byte, offset + sector * 512, 512);
        }
        check(guest, 0x41, offset + CLUSTER, CLUSTER);
        check(guest, 0x51, offset + 2 * CLUSTER, CLUSTER);
        check(guest, 0, offset + 3 * CLUSTER, CLUSTER);
        check(guest, 0, offset + 6 * CLUSTER + 512, 3 * CLUSTER);
    }
    // Over all three kinds in one request.
    let got = guest.read(CLUSTER / 512 - 1, to_usize(2 * CLUSTER) + 2 * SECTOR);
    let mut want = vec![0x50; SECTOR];
    want.extend(vec![0x41; to_usize(CLUSTER)]);
    want.extend(vec![0x51; to_usize(CLUSTER)]);
    want.extend(vec![0; SECTOR]);
    assert_bytes(&got, &want, "one read over base, overlay and hole");
}

#[test]
fn pattern_017_backing_reads_mix_with_reads_of_the_overlay() {
    let disk = alternating_base();
    let mut daemon = disk.serve(&[]);
    let mut guest = daemon.guest(Setup::default());
    assert_eq!(guest.config().capacity(), SIZE / 512);
    fill_overlay(&mut guest);
    check_overlay(&mut guest);
    check(&mut guest, 0, SIZE - CLUSTER, CLUSTER);
}

#[test]
fn pattern_020_the_mix_is_the_same_after_reopening_and_the_base_is_unchanged() {
    let disk = alternating_base();
    let base_before: Vec<_> =
        OFFSETS.iter().map(|&at| disk.base_bytes(at, to_usize(4 * CLUSTER))).collect();
    let mut daemon = disk.serve(&[]);
    let mut guest = daemon.guest(Setup::default());
    fill_overlay(&mut guest);
    drop(guest);
    daemon.stop();
    let mut daemon = disk.serve(&["--read-only"]);
    let mut guest = daemon.guest(Setup::default());
    check_overlay(&mut guest);
    drop(guest);
    daemon.stop();
    let mut daemon = disk.serve(&[]);
    check_overlay(&mut daemon.guest(Setup::default()));
    for (at, before) in OFFSETS.into_iter().zip(base_before) {
        assert_bytes(&disk.base_bytes(at, before.len()), &before, "the base file");
    }
}

/// A base of 128 MiB with its first four mebibytes filled.
fn small_base() -> Disk {
    disk_over(128 * MIB, |base| {
        base.write_all_at(&vec![0x60; to_usize(4 * MIB)], 0).expect("fill the base");
    })
}

/// What the base of [`small_base`] shows at `offset`: nothing lies beyond its end.
fn base_byte(offset: u64) -> u8 {
    if offset < 4 * MIB { 0x60 } else { 0 }
}

#[test]
fn pattern_037_copy_on_write_keeps_what_is_around_a_write() {
    let disk = small_base();
    let mut daemon = disk.serve(&[]);
    let mut guest = daemon.guest(Setup::default());
    // Start, end and middle of one cluster; then over two clusters; then over several.
    let within = [(0, 2 * KIB), (CLUSTER - 4 * KIB, 4 * KIB), (20 * KIB, 12 * KIB)];
    let two = [(CLUSTER - 512, 1024), (32 * KIB, CLUSTER), (512, 2 * CLUSTER - 1024)];
    let several = [(CLUSTER / 2, 3 * CLUSTER), (512, 4 * CLUSTER), (3 * CLUSTER - 512, 1024)];
    for offset in OFFSETS {
        let mut area = offset;
        for (start, len) in within.into_iter().chain(two).chain(several) {
            let background = base_byte(offset);
            write(&mut guest, 0x70, area + start, len);
            let end = (start + len).next_multiple_of(CLUSTER);
            if start > 0 {
                check(&mut guest, background, area, start);
            }
            check(&mut guest, 0x70, area + start, len);
            if end > start + len {
                check(&mut guest, background, area + start + len, end - start - len);
            }
            area += 6 * CLUSTER - 2 * CLUSTER * u64::from(len < 2 * CLUSTER);
        }
        assert!(area - offset <= 4 * MIB, "the areas lie where the base is filled");
    }
}

#[test]
fn pattern_038_concurrent_writes_to_one_cluster_all_arrive() {
    let disk = small_base();
    let mut daemon = disk.serve(&["--num-queues", "2"]);
    let mut guest = daemon.guest(Setup::queues(2, 256));
    // Pieces of 8 KiB in an order that makes neighbours and strangers meet; some span clusters.
    let order = [3u64, 0, 7, 5, 8, 2, 11, 13, 15, 10, 16, 19, 22, 20, 23];
    for offset in OFFSETS {
        for (at, &piece) in order.iter().enumerate() {
            let byte = u8::try_from(0x80 + piece).expect("small");
            let sector = (offset + piece * 8 * KIB + 4 * KIB) / 512;
            let request = Request::write(sector, &vec![byte; to_usize(8 * KIB)]);
            guest.submit(at % 2, &request, &Framing::usual(&request));
        }
        guest.kick(0);
        guest.kick(1);
        for at in 0..order.len() {
            assert_eq!(guest.finish(at % 2).1.status(), OK);
        }
        check(&mut guest, base_byte(offset), offset, 4 * KIB);
        for piece in 0..26 {
            let hit = order.contains(&piece);
            let written = u8::try_from(0x80 + piece).expect("small");
            let byte = if hit { written } else { base_byte(offset) };
            check(&mut guest, byte, offset + piece * 8 * KIB + 4 * KIB, 8 * KIB);
        }
    }
}
