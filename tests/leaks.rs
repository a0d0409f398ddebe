//! Does anything stay behind? Two thousand front ends come and go, in every way they can, five
//! hundred images cannot be opened, and connections fail at every step of being set up:
//! descriptors, threads and mappings are as they were.
//!
//! Counts those of whole processes, this one among them, so nothing else runs in this file
//! meanwhile. Not here: memory in bytes (`bounds.rs`).

mod common;

use std::fs::{File, read_dir, read_to_string};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use addcow::image::open::{self, OpenOptions};
use addcow::storage::host_file::CacheMode;
use addcow::storage::lock::Locking;
use common::disk::{Daemon, Disk};
use common::guest::{Guest, Setup};
use common::rng::Rng;
use common::score::score;
use common::{SECTOR, TIMEOUT};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

/// Front ends that come and go.
const CONNECTS: u64 = 2000;

/// Images that cannot be opened.
const OPENS: u64 = 500;

/// After so many of them everything that is made once has been made.
const WARM_UP: u64 = 100;

/// Held by the test that runs.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// What a process has.
#[derive(Debug, PartialEq, Eq)]
struct Holdings {
    /// Open descriptors.
    files: usize,
    /// Threads.
    threads: usize,
    /// Mappings that are not plain memory, by what is mapped: the allocator's own come and go.
    mappings: Vec<String>,
}

impl Holdings {
    /// Those of process `pid`.
    fn of(pid: u32) -> Self {
        let proc = Path::new("/proc").join(pid.to_string());
        let count = |name: &str| read_dir(proc.join(name)).expect("its /proc").count();
        let maps = read_to_string(proc.join("maps")).expect("its mappings");
        let names = maps.lines().filter_map(|line| line.split_whitespace().nth(5));
        Self {
            files: count("fd"),
            threads: count("task"),
            mappings: names.map(str::to_owned).collect(),
        }
    }
}

/// One front end, with the manners of number `way`.
fn visit(daemon: &mut Daemon, way: u64, rng: &mut Rng) {
    match way % 5 {
        0 => {
            let mut guest = daemon.guest(Setup::queues(2, 64));
            guest.read(8, 8 * SECTOR);
            guest.write(rng.pick(0..1000), &[1; SECTOR]);
        }
        1 => drop(Guest::negotiate(daemon.connect(), Setup::default())),
        2 => {
            let mut guest = Guest::negotiate(daemon.connect(), Setup::default());
            guest.keep_inflight();
        }
        3 => {
            let garbage: Vec<u8> =
                (0..200).map(|_| u8::try_from(rng.pick(0..256)).unwrap()).collect();
            // It may hang up in the middle of it.
            let _ = daemon.connect().write_all(&garbage);
        }
        _ => drop(daemon.connect()),
    }
}

/// What the daemon has while a front end is connected that does nothing. Its first message is
/// answered only when nothing is left of the connection before.
fn with_a_quiet_guest(daemon: &mut Daemon) -> Holdings {
    let guest = Guest::negotiate(daemon.connect(), Setup::queues(0, 64));
    let holdings = Holdings::of(daemon.id());
    drop(guest);
    holdings
}

#[test]
fn two_thousand_connects_leave_nothing_behind() {
    let _alone = ONE_AT_A_TIME.lock();
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    let mut rng = Rng::new(5);
    for way in 0..WARM_UP {
        visit(&mut daemon, way, &mut rng);
    }
    std::thread::sleep(Duration::from_millis(200));
    let before = with_a_quiet_guest(&mut daemon);
    for way in 0..CONNECTS {
        visit(&mut daemon, way, &mut rng);
    }
    // A thread that has ended is listed for a moment longer; one that was left behind stays.
    let end = Instant::now() + Duration::from_secs(2);
    while with_a_quiet_guest(&mut daemon) != before && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(with_a_quiet_guest(&mut daemon), before, "after {CONNECTS} connections");
    score("leaks", &[("connects", CONNECTS)]);
    daemon.stop();
}

/// Lets a daemon have descriptors below `limit` only, as many as we may have without one; those
/// that it has stay.
fn limit_files(daemon: &Daemon, limit: Option<u64>) {
    let pid = i32::try_from(daemon.id()).ok().and_then(Pid::from_raw);
    let ours = getrlimit(Resource::Nofile);
    let limit = Rlimit { current: limit.or(ours.current), ..ours };
    prlimit(pid, Resource::Nofile, limit).expect("set a limit");
}

/// The lowest limit with which a daemon may have what it has, but nothing more.
fn lowest_limit(daemon: &Daemon) -> u64 {
    let entries = read_dir(format!("/proc/{}/fd", daemon.id())).expect("its descriptors");
    let number = |name: &std::ffi::OsStr| name.to_str()?.parse::<u64>().ok();
    let taken: Vec<u64> =
        entries.filter_map(|entry| number(&entry.expect("a descriptor").file_name())).collect();
    (0..).find(|fd| !taken.contains(fd)).expect("a number")
}

/// Asks for the device's features, and whether an answer came. None: neither that nor the end.
fn answer(mut stream: &UnixStream, limit: Duration) -> Option<bool> {
    let get_features = [1, 1, 0].map(u32::to_le_bytes);
    // It may have hung up already.
    let _ = stream.write_all(get_features.as_flattened());
    stream.set_read_timeout(Some(limit)).expect("a time limit");
    match stream.read(&mut [0; 20]) {
        Ok(len) => Some(len > 0),
        Err(error) if error.kind() == ErrorKind::WouldBlock => None,
        Err(_) => Some(false),
    }
}

/// Waits until a daemon has what it had before.
fn wait_until_it_has(daemon: &Daemon, before: &Holdings, when: &str) {
    let end = Instant::now() + TIMEOUT;
    while Holdings::of(daemon.id()) != *before && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(Holdings::of(daemon.id()), *before, "{when}");
}

/// What a daemon has while nobody is connected, after somebody was.
fn idle(daemon: &mut Daemon) -> Holdings {
    drop(Guest::negotiate(daemon.connect(), Setup::queues(0, 64)));
    let mut idle = Holdings::of(daemon.id());
    let mut since = Instant::now();
    while since.elapsed() < Duration::from_millis(300) {
        std::thread::sleep(Duration::from_millis(5));
        let now = Holdings::of(daemon.id());
        if now != idle {
            (idle, since) = (now, Instant::now());
        }
    }
    idle
}

#[test]
fn connections_that_cannot_be_set_up_leave_nothing_behind() {
    let _alone = ONE_AT_A_TIME.lock();
    let disk = Disk::small();
    let mut daemon = disk.serve(&["--num-queues", "4"]);
    let before = idle(&mut daemon);
    let lowest = lowest_limit(&daemon);
    // With each descriptor more the next step fails, until none does.
    let mut failures = 0;
    loop {
        limit_files(&daemon, Some(lowest + 1 + failures));
        let served = answer(&daemon.connect(), TIMEOUT).expect("an answer or the end");
        wait_until_it_has(&daemon, &before, &format!("with {} to spare", failures + 1));
        if served {
            break;
        }
        failures += 1;
    }
    // Five for each queue, at least.
    assert!(failures >= 20, "only {failures} connections failed");
    limit_files(&daemon, None);
    let mut guest = daemon.guest(Setup::queues(2, 64));
    guest.write(8, &[1; SECTOR]);
    drop(guest);
    wait_until_it_has(&daemon, &before, "after a guest");
    score("leaks", &[("failed_connects", failures)]);
    daemon.stop();
}

#[test]
fn a_connection_that_cannot_be_accepted_waits_and_a_stop_does_not_wait_for_it() {
    let _alone = ONE_AT_A_TIME.lock();
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    let before = idle(&mut daemon);
    let lowest = lowest_limit(&daemon);
    limit_files(&daemon, Some(lowest));
    let stream = daemon.connect();
    let short = Duration::from_millis(500);
    assert_eq!(answer(&stream, short), None, "without a descriptor for it");
    let ticks = daemon.cpu_ticks();
    assert_eq!(answer(&stream, short), None, "without a descriptor for it");
    // Of the 50 that there were.
    assert!(daemon.cpu_ticks() - ticks < 25, "it does not rest meanwhile");
    limit_files(&daemon, None);
    assert_eq!(answer(&stream, TIMEOUT), Some(true), "once there is one");
    drop(stream);
    wait_until_it_has(&daemon, &before, "after a connection that had to wait");
    drop(daemon.guest(Setup::default()));
    wait_until_it_has(&daemon, &before, "after a guest");
    limit_files(&daemon, Some(lowest));
    let _waiting = daemon.connect();
    let end = Instant::now() + TIMEOUT;
    // One line for each connection that has to wait, however long.
    while daemon.messages().matches("cannot accept a connection").count() < 2 {
        assert!(Instant::now() < end, "{}", daemon.messages());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(daemon.messages().matches("cannot accept a connection").count(), 2);
    daemon.stop();
}

/// Damages the files of `disk` in a way that keeps it from being opened, and makes it good again.
fn fail_to_open(disk: &Disk, way: u64, rng: &mut Rng) {
    let side = disk.path("disk.add-cow");
    let file = File::options().read(true).write(true).open(&side).expect("the add-cow file");
    let mut header = vec![0; 4096];
    file.read_exact_at(&mut header, 0).expect("its header");
    let aside = disk.path("aside");
    let moved = |name: &str| std::fs::rename(disk.path(name), &aside).expect("move a file");
    match way % 5 {
        0 => file.write_all_at(&[0xff], rng.pick(0..4)).expect("its magic"),
        1 => file.write_all_at(&[0xff; 4], 24).expect("its features"),
        2 => file.write_all_at(&[0xff; 4], 20).expect("its cluster size"),
        3 => moved("disk.raw"),
        _ => moved("base.img"),
    }
    let options = OpenOptions {
        writable: rng.pick(0..2) == 0,
        cache: [CacheMode::Direct, CacheMode::Buffered][rng.index(2)],
        backing_cache: CacheMode::Buffered,
        locking: Locking::On,
    };
    let opened = open::add_cow(&side, options);
    assert!(opened.is_err(), "opened although it was damaged in way {}", way % 5);
    match way % 5 {
        0..3 => file.write_all_at(&header, 0).expect("its header"),
        3 => std::fs::rename(&aside, disk.path("disk.raw")).expect("move it back"),
        _ => std::fs::rename(&aside, disk.path("base.img")).expect("move it back"),
    }
}

#[test]
fn five_hundred_failed_opens_leave_nothing_behind() {
    let _alone = ONE_AT_A_TIME.lock();
    let disk = Disk::small();
    let mut rng = Rng::new(6);
    for way in 0..WARM_UP {
        fail_to_open(&disk, way, &mut rng);
    }
    let before = Holdings::of(std::process::id());
    for way in 0..OPENS {
        fail_to_open(&disk, way, &mut rng);
    }
    assert_eq!(Holdings::of(std::process::id()), before, "after {OPENS} failed opens");
    score("leaks", &[("failed_opens", OPENS)]);
}
