//! May a front end take away the memory that it gave (P6)? It ends its own connection by that, and
//! nothing else: the daemon lives, what it acknowledged is there, and the next front end is served.
//!
//! Not here: memory that was never there (`vhost_user.rs`), pages of the disk's own files that
//! vanish (`mapping.rs`).

mod common;
#[path = "powercut/recorder.rs"]
mod recorder;

use std::ffi::CString;
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use common::disk::{Daemon, Disk, Shape};
use common::guest::{Guest, Setup};
use common::mem::{BOUNDARY, REGION};
use common::request::Request;
use common::ring::Buffer;
use common::{MIB, SECTOR, TIMEOUT, assert_bytes, pattern, to_u32, to_usize};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

/// What the daemon says about it.
const GONE: &str = "the front end took guest memory away";

/// One disk whose data the kernel moves, and one whose data the daemon copies itself.
fn disks() -> [Disk; 2] {
    [Disk::small(), Disk::create(Shape::new(4 * MIB, 64 << 10).in_memory())]
}

/// Waits until the daemon has hung up on `guest`.
fn hung_up(guest: &mut Guest) {
    let end = Instant::now() + TIMEOUT;
    while guest.message("GET_QUEUE_NUM", |front| front.get_queue_num()).is_ok() {
        assert!(Instant::now() < end, "still connected after {TIMEOUT:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The daemon said why, and goes on: a new front end finds on the disk what `expected` holds.
fn serves_the_next(daemon: &mut Daemon, expected: &[u8]) {
    let mut guest = daemon.guest(Setup::default());
    assert_bytes(&guest.read_all(), expected, "the disk for the next front end");
    assert!(daemon.messages().contains(GONE), "it did not say why: {}", daemon.messages());
}

/// A front end whose memory is the file at `path` is refused, for this reason.
fn is_refused(path: &Path, reason: &str) {
    let file = File::options().read(true).write(true).open(path).expect("open the memory file");
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    let mut guest = daemon.guest(Setup::default());
    let region = guest.mem.extra_on(&file);
    let answer = guest.message("ADD_MEM_REG", |front| front.add_mem_region(&region));
    assert!(answer.is_err(), "its pages come when somebody wants them to");
    drop(guest);
    let said = daemon.messages();
    assert!(said.contains(&format!("memory region: {reason}")), "{said}");
    assert_bytes(&daemon.guest(Setup::default()).read_all(), &disk.initial(), "the next guest");
    daemon.stop();
}

#[test]
fn memory_on_a_file_system_that_a_process_serves_is_refused() {
    let content = vec![0; to_usize(REGION)];
    let Some(server) = recorder::mount(vec![("memory".to_owned(), content)]) else { return };
    server.let_map();
    is_refused(&server.path("memory"), "its file is on FUSE");
}

#[test]
fn memory_on_an_overlay_of_file_systems_is_refused() {
    let folder = tempfile::tempdir_in("/dev/shm").expect("a folder");
    let path = |name: &str| folder.path().join(name);
    for name in ["lower", "upper", "work", "merged"] {
        std::fs::create_dir(path(name)).expect("a folder");
    }
    let (lower, upper, work) = (path("lower"), path("upper"), path("work"));
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        upper.display(),
        work.display()
    );
    let options = CString::new(options).expect("no zero byte");
    let merged = path("merged");
    let flags = MountFlags::empty();
    if let Err(error) = mount("overlay", &merged, "overlay", flags, options.as_c_str()) {
        eprintln!("SKIPPED: cannot mount an overlay: {error}");
        return;
    }
    let file = File::create(merged.join("memory")).expect("a file");
    file.set_len(REGION).expect("its length");
    drop(file);
    let result = std::panic::catch_unwind(|| {
        is_refused(&merged.join("memory"), "its file is on overlayfs");
    });
    unmount(&merged, UnmountFlags::DETACH).expect("unmount");
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

/// Puts a request on ring 0 whose data lies at `data`; its other parts lie where the rings do.
fn submit(guest: &mut Guest, request: &Request, data: u64, len: usize, is_read: bool) {
    let header = guest.mem.alloc(16, 16);
    guest.mem.write(header, &request.readable[..16]);
    let status = guest.mem.alloc_filled(1, 0xff);
    guest.rings[0].add(&[
        Buffer { addr: header, len: 16, writable: false },
        Buffer { addr: data, len: to_u32(len), writable: is_read },
        Buffer { addr: status, len: 1, writable: true },
    ]);
}

#[test]
fn data_pages_that_vanish_end_the_connection_only() {
    for disk in disks() {
        let mut daemon = disk.serve(&[]);
        for is_read in [true, false] {
            let mut guest = daemon.guest(Setup::default());
            // Both ways of moving data have seen the place once.
            for _ in 0..2 {
                guest.read(0, 8 * SECTOR);
            }
            guest.mem.cut(1);
            let bytes = pattern(1, 0, 8 * SECTOR);
            let request =
                if is_read { Request::read(0, 8 * SECTOR) } else { Request::write(0, &bytes) };
            submit(&mut guest, &request, BOUNDARY + 4096, 8 * SECTOR, is_read);
            guest.rings[0].kick_always();
            if is_read {
                hung_up(&mut guest);
                assert_eq!(guest.rings[0].pop(), None, "a request without its memory was answered");
                drop(guest);
                serves_the_next(&mut daemon, &disk.initial());
            } else {
                // The kernel finds it out by itself, and then it is an I/O error like others.
                let answer = guest.rings[0].wait_within(Duration::from_millis(500));
                drop(guest);
                let mut next = daemon.guest(Setup::default());
                if answer.is_some() {
                    assert_bytes(&next.read_all(), &disk.initial(), "after a failed write");
                } else {
                    let rest = &next.read_all()[8 * SECTOR..];
                    assert_bytes(rest, &disk.initial()[8 * SECTOR..], "beside the write");
                }
            }
        }
        daemon.stop();
    }
}

#[test]
fn ring_pages_that_vanish_end_the_connection_only() {
    for disk in disks() {
        let mut daemon = disk.serve(&[]);
        for asleep in [false, true] {
            let mut guest = daemon.guest(Setup::queues(2, 128));
            guest.write(8, &pattern(7, 8, 8 * SECTOR));
            if asleep {
                std::thread::sleep(Duration::from_millis(20));
            }
            guest.mem.cut(0);
            guest.rings[0].kick_always();
            hung_up(&mut guest);
            drop(guest);
            let mut expected = disk.initial();
            expected[8 * SECTOR..16 * SECTOR].copy_from_slice(&pattern(7, 8, 8 * SECTOR));
            serves_the_next(&mut daemon, &expected);
        }
        daemon.stop();
    }
}

#[test]
fn ring_pages_that_vanish_before_the_ring_is_told_of_end_nothing() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    let mut guest = Guest::negotiate(daemon.connect(), Setup::default());
    let table = guest.mem.table();
    guest.must("SET_MEM_TABLE", |front| front.set_mem_table(&table).map(drop));
    let config = guest.ring_config(0);
    guest.mem.cut(0);
    // The framework looks at the used index, on the thread that handles messages.
    let _ = guest.message("SET_VRING_ADDR", |front| front.set_vring_addr(0, &config));
    drop(guest);
    assert_bytes(&daemon.guest(Setup::default()).read_all(), &disk.initial(), "the next guest");
    daemon.stop();
}

#[test]
fn memory_that_vanished_does_not_become_memory_of_the_daemon() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    let mut guest = daemon.guest(Setup::default());
    guest.read(0, 8 * SECTOR);
    let before = daemon.own_memory();
    guest.mem.cut(1);
    // A request that fails, so that all that the device may write is to be filled with zeros.
    let len = 16 * MIB;
    let request = Request::read(u64::MAX / 1024, 512);
    for _ in 0..8 {
        submit(&mut guest, &request, BOUNDARY, to_usize(len), true);
    }
    guest.rings[0].kick_always();
    hung_up(&mut guest);
    drop(guest);
    let grown = daemon.own_memory().saturating_sub(before);
    assert!(grown < 4 * MIB, "{grown} bytes more than before");
    serves_the_next(&mut daemon, &disk.initial());
    daemon.stop();
}

#[test]
fn memory_that_vanishes_while_the_guest_writes_takes_nothing_acknowledged_with_it() {
    let disk = Disk::create(Shape::new(16 * MIB, 4 << 10).in_memory());
    let mut daemon = disk.serve(&[]);
    let mut expected = disk.initial();
    for round in 0..30_u64 {
        let mut guest = daemon.guest(Setup::default());
        for at in 0..8 {
            let sector = (round * 8 + at) * 16;
            let bytes = pattern(round, sector, 8 * SECTOR);
            guest.write(sector, &bytes);
            let start = usize::try_from(sector).unwrap() * SECTOR;
            expected[start..start + bytes.len()].copy_from_slice(&bytes);
        }
        guest.mem.cut(usize::from(round % 3 == 0));
        if round % 3 == 0 {
            submit(&mut guest, &Request::read(0, 4096), BOUNDARY, 4096, true);
        }
        guest.rings[0].kick_always();
        hung_up(&mut guest);
    }
    serves_the_next(&mut daemon, &expected);
    let counts = daemon.footprint();
    assert_eq!(counts, daemon.footprint(), "something was left behind");
    daemon.stop();
}

#[test]
fn huge_pages_that_the_host_does_not_have_end_the_connection_only() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    let mut guest = daemon.guest(Setup::default());
    let huge = memfd_create("huge", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB)
        .and_then(|file| rustix::fs::ftruncate(&file, 32 * MIB).map(|()| File::from(file)));
    let Ok(file) = huge else { panic!("this host has no huge pages at all: {huge:?}") };
    let region = guest.mem.extra_on(&file);
    guest.must("ADD_MEM_REG", |front| front.add_mem_region(&region).map(drop));
    // Nobody reserved pages for it, so the first touch fails (no pool, or an empty one).
    submit(&mut guest, &Request::read(1, 100 * SECTOR + 1), region.guest_phys_addr, 51201, true);
    guest.rings[0].kick_always();
    hung_up(&mut guest);
    drop(guest);
    serves_the_next(&mut daemon, &disk.initial());
    daemon.stop();
}
