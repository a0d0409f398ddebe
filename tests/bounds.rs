//! Is what a guest or an image can make the daemon use bounded (P7), and does a disk that hangs
//! hold up only who needs it (P10)?
//!
//! The bound: 64 MiB, 2 MiB for each queue, and the part of the bitmap that the add-cow file really
//! holds. It is looked at where it is worst: while the backing file answers nothing, with all
//! queues full of the most wasteful requests, so that all of them hold what they ever hold.
//!
//! Not here: descriptors of guests and messages (`vhost_user.rs`, `hostile.rs`), files and threads
//! left behind (`lifecycle.rs`).

mod common;
mod stall;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::disk::{Daemon, TOOL, run_to_end};
use common::guest::{Guest, Setup};
use common::mem::BOUNDARY;
use common::request::{Framing, IN, OK, OUT, Request, header};
use common::ring::{Desc, INDIRECT, NEXT, WRITE};
use common::score::score;
use common::{KIB, MIB, TIMEOUT, to_u32, to_u64};
use stall::{Stall, byte_at};
use tempfile::TempDir;

/// Descriptors of the largest request that is carried out.
const MAX_DESCRIPTORS: usize = 1024;

/// Requests on each queue: more than it carries out at the same time, which is 128.
const REQUESTS: usize = 192;

/// Queues of the guest that wants too much: as many as there may be.
const QUEUES: usize = 64;

/// The most open files of a daemon with that many queues in use, as the manual has it.
const OPEN_FILES: usize = 30 + 12 * QUEUES;

/// A disk of `size` bytes in clusters of `cluster` over the file at `base`.
fn disk(base: &Path, size: u64, cluster: u64) -> TempDir {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let mut command = Command::new(TOOL);
    command.current_dir(folder.path()).args(["create", "-F", "raw", "-b"]).arg(base);
    command.args(["--cluster-size", &cluster.to_string(), "disk.add-cow", &size.to_string()]);
    let output = run_to_end(command);
    assert!(output.status.success(), "{output:?}");
    folder
}

/// A daemon on that disk.
fn serve(folder: &TempDir) -> Daemon {
    let queues = QUEUES.to_string();
    let options = ["--blk-file", "disk.add-cow", "--socket-path", "sock", "--num-queues", &queues];
    Daemon::spawn(folder.path(), &options, None)
}

/// Waits until `value` has not changed for a while, and returns the greatest that was seen.
fn settled(value: impl Fn() -> u64) -> u64 {
    let end = Instant::now() + TIMEOUT;
    let (mut greatest, mut since) = (0, Instant::now());
    while since.elapsed() < Duration::from_millis(300) {
        assert!(Instant::now() < end, "still growing after {TIMEOUT:?}: {greatest}");
        let now = value();
        if now > greatest {
            (greatest, since) = (now, Instant::now());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    greatest
}

/// An indirect table with the most segments (one descriptor more refers to it), all of them the
/// same memory at an odd address: `len` bytes of data in all.
fn wasteful_table(header: u64, status: u64, len: usize, is_read: bool) -> Vec<u8> {
    let segments = MAX_DESCRIPTORS - 3;
    let flags = NEXT | if is_read { WRITE } else { 0 };
    let data = |at: usize| {
        let piece = len / segments + usize::from(at < len % segments);
        Desc { addr: BOUNDARY + 1, len: to_u32(piece), flags, next: 0 }
    };
    let first = Desc { addr: header, len: 16, flags: NEXT, next: 0 };
    let last = Desc { addr: status, len: 1, flags: WRITE, next: 0 };
    let all = std::iter::once(first).chain((0..segments).map(data)).chain([last]);
    let link = |(at, desc): (usize, Desc)| Desc { next: u16::try_from(at + 1).unwrap(), ..desc };
    all.enumerate().map(link).flat_map(Desc::bytes).collect()
}

/// Fills every queue with such requests, one for each cluster, in its last quarter. Their tables
/// lie over each other: which header a request has is of no importance here.
fn fill_queues(guest: &mut Guest, worst: &Worst) {
    let Worst { kind, cluster, len, .. } = *worst;
    for queue in 0..guest.rings.len() {
        for at in 0..REQUESTS {
            let place = to_u64(queue * REQUESTS + at) * cluster + cluster / 4 * 3;
            let memory = guest.mem.alloc(32, 16);
            guest.mem.write(memory, &header(kind, place / 512));
            let table = wasteful_table(memory, memory + 16, len, kind == IN);
            let address = guest.mem.buffer(table.len());
            guest.mem.write(address, &table);
            let slot = u16::try_from(at).expect("fits in the ring");
            let len = to_u32(table.len());
            let ring = &mut guest.rings[queue];
            ring.put(slot, Desc { addr: address, len, flags: INDIRECT, next: 0 });
            ring.publish_unknown(slot);
        }
        guest.rings[queue].kick_always();
        // The device has taken its requests before their tables' memory is used again.
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Requests that use much.
struct Worst {
    /// Size of the disk's clusters in bytes.
    cluster: u64,
    /// Type of the requests.
    kind: u32,
    /// Bytes of data of each.
    len: usize,
    /// Which reads of the backing file are not answered.
    waits: fn(u64) -> bool,
}

/// The most memory that a daemon has while its backing file hangs and a guest asks for the worst.
fn most_memory(worst: &Worst) -> Option<u64> {
    let size = to_u64(QUEUES * REQUESTS) * worst.cluster + 16 * MIB;
    let stall = Stall::mount(size)?;
    let folder = disk(&stall.path(), size, worst.cluster);
    let mut daemon = serve(&folder);
    let mut guest = daemon.guest(Setup::queues(QUEUES, 256));
    let _closed = stall.close(worst.waits);
    fill_queues(&mut guest, worst);
    let most = settled(|| daemon.own_memory());
    assert!(stall.waiting() > 0, "nothing waits for the backing file");
    let files = daemon.open_files();
    assert!(files <= OPEN_FILES, "{files} open files with {QUEUES} queues");
    stall.open();
    drop(guest);
    // All that was taken is carried out first.
    let status = daemon.terminate(Duration::from_secs(300));
    assert_eq!(status.code(), Some(0), "exit code after SIGTERM");
    Some(most)
}

#[test]
fn the_worst_requests_on_full_rings_take_no_more_memory_than_is_allowed() {
    let limit = 64 * MIB + to_u64(QUEUES) * 2 * MIB;
    // First writes to a part of each cluster, the rest of which is to be filled: what lies before
    // is read, and held while what lies behind hangs.
    let behind_64k = |offset| offset % (64 * KIB) >= 48 * KIB;
    let behind_2m = |offset| offset % (2 * MIB) >= 3 * MIB / 2;
    let mut greatest = 0;
    for worst in [
        // Reads in the most pieces, at odd addresses.
        Worst { cluster: 64 * KIB, kind: IN, len: 16 << 10, waits: |_| true },
        Worst { cluster: 64 * KIB, kind: OUT, len: 4096, waits: behind_64k },
        Worst { cluster: 2 * MIB, kind: OUT, len: 4096, waits: behind_2m },
    ] {
        let Some(most) = most_memory(&worst) else { return };
        let Worst { cluster, kind, .. } = worst;
        assert!(most <= limit, "{most} bytes with clusters of {cluster}, request type {kind}");
        greatest = greatest.max(most);
    }
    score("bounds", &[("queues", to_u64(QUEUES)), ("memory_max", greatest), ("limit", limit)]);
}

#[test]
fn a_backing_file_that_hangs_holds_up_only_who_reads_it() {
    let size = 64 * MIB;
    let Some(stall) = Stall::mount(size) else { return };
    let folder = disk(&stall.path(), size, 64 * KIB);
    let mut daemon = serve(&folder);
    let mut guest = daemon.guest(Setup::queues(2, 1024));
    let whole = vec![0x5a; 64 << 10];
    guest.write(0, &whole);
    let _closed = stall.close(|_| true);
    // More than one queue carries out at a time: parts of clusters, so that they hold locks too.
    for at in 0..200 {
        let request = Request::write(64 * 1024 + at * 64, &[1; 4096]);
        guest.submit(0, &request, &Framing::joined());
    }
    guest.kick(0);
    settled(|| to_u64(stall.waiting()));
    assert!(stall.waiting() > 0, "nothing waits for the backing file");
    for round in 0..200_u64 {
        let write = Request::write(128 * (1 + round), &whole);
        for request in [Request::read(8, 4096), write, Request::flush()] {
            let reply = guest.request(1, &request, &Framing::usual(&request));
            assert_eq!(reply.status(), OK, "round {round} beside a hanging backing file");
        }
    }
    assert_eq!(guest.rings[0].pop(), None, "answered without the backing file");
    stall.open();
    for _ in 0..200 {
        assert_eq!(guest.finish(0).1.status(), OK);
    }
    let bytes = guest.read(64 * 1024 + 8, 4096);
    let expected: Vec<u8> = (0..4096).map(|at| byte_at((64 * 1024 + 8) * 512 + at)).collect();
    assert!(bytes == expected, "the rest of a cluster that was filled after the stall");
    daemon.stop();
}

/// A disk without a backing file in `folder`: a sparse raw image of `raw_len` bytes, and an add-cow
/// file of `side_len` bytes that holds a header and else nothing.
fn image(folder: &Path, cluster_bits: u32, raw_len: u64, side_len: u64) {
    let mut header = vec![0; 4096];
    header[..4].copy_from_slice(b"ACOW");
    for (at, value) in [(12, 76), (16, 8), (20, cluster_bits), (40, 4096)] {
        header[at..at + 4].copy_from_slice(&u32::to_le_bytes(value));
    }
    header[60..63].copy_from_slice(b"raw");
    header[76..84].copy_from_slice(b"disk.raw");
    let side = File::create(folder.join("disk.add-cow")).expect("the add-cow file");
    side.write_all_at(&header, 0).expect("its header");
    side.set_len(side_len).expect("its length");
    let raw = File::create(folder.join("disk.raw")).expect("the raw image");
    raw.set_len(raw_len).expect("its length");
}

/// Serves such a disk. Its first and its last sector are there, in little memory; or it is refused
/// with one line. Returns whether it was served.
fn is_served(cluster_bits: u32, raw_len: u64, side_len: u64) -> bool {
    // On tmpfs, where files may be as long as they like.
    let folder = tempfile::tempdir_in("/dev/shm").expect("a folder");
    image(folder.path(), cluster_bits, raw_len, side_len);
    let mut daemon = serve(&folder);
    match daemon.try_connect() {
        Ok(stream) => {
            let mut guest = Guest::start(stream, Setup::default());
            let last = guest.config().capacity() - 8;
            for sector in [0, last] {
                assert_eq!(guest.read(sector, 4096), [0; 4096]);
                guest.write(sector, &[7; 4096]);
            }
            assert_eq!(guest.status(&Request::flush()), OK);
            let memory = settled(|| daemon.own_memory());
            assert!(memory <= 64 * MIB, "{memory} bytes for a disk of {raw_len} bytes");
            drop(guest);
            daemon.stop();
            true
        }
        Err(said) => {
            assert!(said.contains("exit status: 1") && said.lines().count() == 1, "{said}");
            false
        }
    }
}

#[test]
fn images_that_claim_to_be_huge_are_served_in_little_memory_or_refused() {
    let (tib, longest) = (1024 * 1024 * MIB, (1 << 63) - 4096);
    // 16 TiB in clusters of 4 KiB: a bitmap of 512 MiB, all of it a hole.
    assert!(is_served(12, 16 * tib, 4096 + 512 * MIB));
    // The same without its bitmap.
    assert!(!is_served(12, 16 * tib, 4096 + 512 * MIB - 1));
    // The longest raw image there can be: a bitmap of 256 TiB.
    assert!(!is_served(12, longest, 4096));
    assert!(!is_served(12, longest, 4096 + (1 << 48)));
    // With the largest clusters its bitmap has 512 GiB, which a host may reserve or not.
    is_served(21, longest, (2 << 20) + (1 << 39));
    // The smallest clusters, for which 16 GiB have to be reserved.
    is_served(9, 64 * tib, 4096 + (16 << 30));
}

#[test]
fn a_backing_file_that_claims_to_be_huge_costs_what_its_files_hold() {
    let folder = tempfile::tempdir_in("/dev/shm").expect("a folder");
    // 128 TiB in clusters of 4 KiB: a bitmap of 4 GiB, all of it a hole. To look at each of its
    // pages takes 8 MiB of page tables.
    image(folder.path(), 12, 128 * 1024 * 1024 * MIB, 4096 + 4096 * MIB);
    let mut command = Command::new(TOOL);
    command.current_dir(folder.path());
    command.args(["create", "-F", "add-cow", "-b", "disk.add-cow", "top.add-cow", "1G"]);
    let output = run_to_end(command);
    assert!(output.status.success(), "{output:?}");
    let args = ["--blk-file", "top.add-cow", "--socket-path", "sock"];
    let mut daemon = Daemon::spawn(folder.path(), &args, None);
    let mut guest = daemon.guest(Setup::default());
    for sector in [0, guest.config().capacity() - 8] {
        assert_eq!(guest.read(sector, 4096), [0; 4096]);
    }
    let (memory, tables) = (daemon.own_memory(), daemon.status("VmPTE:"));
    assert!(memory <= 64 * MIB, "{memory} bytes of memory");
    assert!(tables <= 2 * MIB, "{tables} bytes of page tables");
    drop(guest);
    daemon.stop();
}

/// Who uses a disk is searched for among all processes, and those may have any files open.
#[test]
fn a_hung_file_of_somebody_else_does_not_hold_up_a_refusal() {
    let Some(stall) = Stall::mount(MIB) else { return };
    let folder = tempfile::tempdir().expect("a folder");
    File::create(folder.path().join("base.img")).and_then(|f| f.set_len(MIB)).expect("a base");
    let disk = disk(&folder.path().join("base.img"), MIB, 4 * KIB);
    let daemon = serve(&disk);
    // Our own; we come before the daemon, whose process is younger.
    let _open = File::open(stall.path()).expect("the hung file");
    let closed = stall.close_for_questions();
    let mut command = Command::new(TOOL);
    command.args(["info", "disk.add-cow"]).current_dir(disk.path()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("run the tool");
    let start = Instant::now();
    let mut ended = false;
    while !ended && start.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(10));
        ended = child.try_wait().expect("wait").is_some();
    }
    drop(closed);
    let output = child.wait_with_output().expect("its end");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains(&format!("(addcowd, PID {})", daemon.pid())), "{said}");
    assert!(ended, "it has waited for a file that is not its business");
}
