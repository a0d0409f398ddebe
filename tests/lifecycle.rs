//! The life of the daemon: rings start and stop, front ends come and go, operators end it.
//!
//! By the vhost-user text (ring states, RESET_DEVICE, back-end program conventions): stopping
//! drains, a disconnect at any moment is survived, SIGTERM loses nothing that was completed.
//!
//! Not here: the single messages (`vhost_user.rs`).

mod common;

use std::collections::HashSet;
use std::io::Write as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::disk::{Daemon, Disk, Shape};
use common::guest::{Guest, Setup};
use common::model::{Model, Workload};
use common::request::{Framing, OK, Request};
use common::rng::Rng;
use common::{KIB, MIB, SECTOR, TIMEOUT, assert_bytes, pattern, to_u64};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

/// A small disk and a guest on it.
fn small(setup: Setup) -> (Disk, Daemon, Guest) {
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    let guest = daemon.guest(setup);
    (disk, daemon, guest)
}

/// Submits `count` writes of one sector each, one per 8 KiB; the sectors by their order.
fn submit_writes(guest: &mut Guest, seed: u64, count: u64) {
    for at in 0..count {
        let sector = 16 * at;
        let request = Request::write(sector, &pattern(seed, sector, SECTOR));
        guest.submit(0, &request, &Framing::joined());
    }
}

/// Takes what is on the used ring of queue 0 now; how many requests that was.
fn take_used(guest: &mut Guest) -> u16 {
    let mut count = 0;
    while let Some(used) = guest.rings[0].pop() {
        assert_eq!(guest.collect(0, used).status(), OK);
        count += 1;
    }
    count
}

#[test]
fn get_vring_base_drains_and_the_ring_goes_on_from_there() {
    let (_disk, _daemon, mut guest) = small(Setup { size: 256, ..Setup::default() });
    let (mut submitted, mut done) = (0u16, 0u16);
    for round in 0..20 {
        submit_writes(&mut guest, round, 60);
        submitted += 60;
        guest.kick(0);
        let base = guest.stop_ring(0);
        done += take_used(&mut guest);
        assert_eq!(done, base, "requests answered when the ring stands at {base}");
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(take_used(&mut guest), 0, "an answer from a stopped ring");
        // The same ring with the same indices goes on: nothing is lost, nothing done twice.
        restart_at(&mut guest, base);
        while done < submitted {
            assert_eq!(guest.finish(0).1.status(), OK);
            done += 1;
        }
        assert_eq!(guest.rings[0].pop(), None);
    }
    for at in 0..60 {
        assert_bytes(&guest.read(16 * at, SECTOR), &pattern(19, 16 * at, SECTOR), "last round");
    }
}

/// Starts the stopped ring 0 again from available index `base` and kicks it.
fn restart_at(guest: &mut Guest, base: u16) {
    let config = guest.ring_config(0);
    let size = guest.rings[0].size;
    guest.must("SET_VRING_NUM", |front| front.set_vring_num(0, size));
    guest.must("SET_VRING_BASE", |front| front.set_vring_base(0, base));
    guest.must("SET_VRING_ADDR", |front| front.set_vring_addr(0, &config));
    let call = guest.rings[0].call.try_clone().expect("another descriptor");
    let kick = guest.rings[0].kick.try_clone().expect("another descriptor");
    guest.must("SET_VRING_CALL", |front| front.set_vring_call(0, &call));
    guest.must("SET_VRING_KICK", |front| front.set_vring_kick(0, &kick));
    guest.enable(0, true);
    guest.rings[0].kick_always();
}

#[test]
fn stopped_ring_can_begin_anew_in_other_memory() {
    let (disk, _daemon, mut guest) = small(Setup::default());
    for start in [0, 5, 0xfffe, 0x8000] {
        guest.read(1, 4096);
        guest.stop_ring(0);
        guest.rings[0].restart(start);
        guest.start_ring(0);
    }
    assert_bytes(&guest.read_all(), &disk.initial(), "the disk");
}

#[test]
fn disabled_ring_does_nothing_until_it_is_enabled() {
    let (_disk, _daemon, mut guest) = small(Setup::default());
    for round in 0..5 {
        guest.enable(0, false);
        submit_writes(&mut guest, round, 10);
        guest.rings[0].kick_always();
        let early = guest.rings[0].wait_within(Duration::from_millis(60));
        assert_eq!(early, None, "an answer from a disabled ring");
        guest.enable(0, true);
        for _ in 0..10 {
            assert_eq!(guest.finish(0).1.status(), OK);
        }
    }
}

#[test]
fn ring_that_is_kicked_before_it_is_enabled_starts_with_what_is_there() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    let mut guest = Guest::negotiate(daemon.connect(), Setup::default());
    let table = guest.mem.table();
    guest.must("SET_MEM_TABLE", |front| front.set_mem_table(&table).map(drop));
    submit_writes(&mut guest, 1, 5);
    guest.rings[0].kick_always();
    let config = guest.ring_config(0);
    guest.must("SET_VRING_NUM", |front| front.set_vring_num(0, 128));
    guest.must("SET_VRING_ADDR", |front| front.set_vring_addr(0, &config));
    restart_at(&mut guest, 0);
    for _ in 0..5 {
        assert_eq!(guest.finish(0).1.status(), OK);
    }
}

#[test]
fn call_and_kick_descriptors_can_be_replaced_while_the_ring_runs() {
    let (_disk, _daemon, mut guest) = small(Setup::default());
    for _ in 0..20 {
        let ring = &guest.rings[0];
        let call = ring.call.try_clone().expect("another descriptor");
        let kick = ring.kick.try_clone().expect("another descriptor");
        guest.must("SET_VRING_CALL", |front| front.set_vring_call(0, &call));
        guest.must("SET_VRING_KICK", |front| front.set_vring_kick(0, &kick));
        assert_eq!(guest.status(&Request::flush()), OK);
    }
}

#[test]
fn reset_device_stops_all_rings_and_leaves_a_fresh_device() {
    let (disk, daemon, mut guest) = small(Setup::default());
    let mut want = disk.initial();
    // The queue's thread opens its io_uring when it gets to run: after an answer it has.
    guest.read(0, SECTOR);
    let files = daemon.open_files();
    for round in 0..5 {
        submit_writes(&mut guest, round, 40);
        guest.kick(0);
        guest.must("RESET_DEVICE", |front| front.reset_device());
        take_used(&mut guest);
        // After the reset nothing may touch the memory of the old ring.
        let (used, data) = (guest.rings[0].used, guest.mem.read(guest.rings[0].used, 64));
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(guest.mem.read(used, 64), data, "the used ring after a reset");
        guest.rings[0].restart(0);
        let features = guest.features;
        guest.must("SET_FEATURES", |front| front.set_features(features));
        guest.start_ring(0);
        submit_writes(&mut guest, round, 40);
        guest.kick(0);
        for _ in 0..40 {
            assert_eq!(guest.finish(0).1.status(), OK);
        }
    }
    for at in 0..40 {
        let start = 16 * at * SECTOR;
        want[start..start + SECTOR].copy_from_slice(&pattern(4, to_u64(16 * at), SECTOR));
    }
    assert_bytes(&guest.read_all(), &want, "the disk after five resets");
    assert_eq!(daemon.open_files(), files, "open files after five resets");
}

#[test]
fn fifty_reconnects_leave_no_descriptor_and_no_thread_behind() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&["--num-queues", "2"]);
    let want = disk.initial();
    let mut counts = HashSet::new();
    for round in 0..52 {
        let setup = if round % 2 == 0 { Setup::queues(2, 64) } else { Setup::default() };
        let mut guest = daemon.guest(setup);
        assert_bytes(&guest.read(8, 4096), &want[4096..8192], "a read by the next guest");
        drop(guest);
        // A thread that has ended is listed for a moment longer; one that was left behind stays.
        if round == 2 {
            std::thread::sleep(Duration::from_millis(100));
        }
        let mut footprint = daemon.footprint();
        let end = Instant::now() + Duration::from_secs(1);
        while round > 2 && !counts.contains(&footprint) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
            footprint = daemon.footprint();
        }
        if round > 1 {
            counts.insert(footprint);
        }
    }
    assert_eq!(counts.len(), 1, "open files and threads over 50 reconnects: {counts:?}");
}

#[test]
fn front_end_that_goes_away_with_requests_in_flight_is_survived() {
    let disk = Disk::create(Shape::new(8 * MIB, 64 * KIB));
    let mut daemon = disk.serve(&["--num-queues", "2"]);
    let mut rng = Rng::new(3);
    let mut may_hold: Vec<HashSet<Vec<u8>>> =
        disk.initial().chunks(SECTOR).map(|old| HashSet::from([old.to_vec()])).collect();
    for round in 0..25 {
        let mut guest = daemon.guest(Setup::queues(2, 256));
        for at in 0..80u64 {
            let sector = 200 * at + rng.pick(0..100);
            let data = pattern(round, sector, 3 * SECTOR);
            let indirect = Framing::joined().indirect();
            guest.submit(usize::from(at % 2 == 0), &Request::write(sector, &data), &indirect);
            for (index, piece) in data.chunks(SECTOR).enumerate() {
                let place = usize::try_from(sector).expect("small") + index;
                may_hold[place].insert(piece.to_vec());
            }
            if at == 10 || at == 79 {
                guest.rings[0].kick_always();
                guest.rings[1].kick_always();
            }
        }
        std::thread::sleep(Duration::from_micros(rng.pick(0..2000)));
    }
    let mut guest = daemon.guest(Setup::default());
    let bytes = guest.read_all();
    for (at, piece) in bytes.chunks(SECTOR).enumerate() {
        assert!(may_hold[at].contains(piece), "sector {at} holds what nobody wrote");
    }
    assert_bytes(&guest.read_all(), &bytes, "nothing is written after the front end left");
}

#[test]
fn second_connection_waits_and_does_not_disturb_the_first() {
    let (disk, mut daemon, mut guest) = small(Setup::default());
    let idle = daemon.connect();
    for _ in 0..5 {
        assert_bytes(&guest.read(0, 4096), &disk.initial()[..4096], "the first guest");
    }
    drop(idle);
    let waiting = daemon.connect();
    guest.read(0, 4096);
    drop(guest);
    let mut guest = Guest::start(waiting, Setup::default());
    assert_bytes(&guest.read(0, 4096), &disk.initial()[..4096], "the guest that waited");
}

#[test]
fn sigterm_ends_quickly_and_loses_no_completed_write() {
    for connected in [true, false] {
        let disk = Disk::create(Shape::new(4 * MIB + 512, 4 * KIB).base(3 * MIB));
        let mut daemon = disk.serve(&["--num-queues", "2"]);
        let mut guest = daemon.guest(Setup::queues(2, 128));
        let mut model = Model::new(disk.initial());
        Workload::new(41).run(&mut guest, &mut model, 30);
        Workload::verify(&mut guest, &mut model);
        let guest = connected.then_some(guest);
        let status = daemon.terminate(Duration::from_secs(2));
        assert_eq!(status.code(), Some(0), "exit code: {}", daemon.messages());
        assert!(!daemon.socket.exists(), "the socket file is removed");
        drop(guest);
        assert_bytes(&disk.flat_view(), &model.bytes, "the files after SIGTERM");
    }
}

#[test]
fn sigterm_with_requests_in_flight_ends_quickly_and_cleanly() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    let mut guest = daemon.guest(Setup { size: 256, ..Setup::default() });
    submit_writes(&mut guest, 5, 120);
    guest.kick(0);
    let status = daemon.terminate(Duration::from_secs(2));
    assert_eq!(status.code(), Some(0), "exit code: {}", daemon.messages());
    // What was answered is there; the rest is old or new, sector by sector.
    let answered: Vec<_> = std::iter::from_fn(|| guest.rings[0].pop()).collect();
    let (view, initial) = (disk.flat_view(), disk.initial());
    let new = (0..120usize).filter(|at| {
        let (sector, range) = (16 * at, 16 * at * SECTOR..16 * at * SECTOR + SECTOR);
        let is_new = view[range.clone()] == pattern(5, to_u64(sector), SECTOR);
        assert!(is_new || view[range.clone()] == initial[range], "sector {sector}");
        is_new
    });
    let new = new.count();
    assert!(new >= answered.len(), "{} answered, {new} in the files", answered.len());
}

#[test]
fn sigterm_ends_quickly_in_the_middle_of_a_message_and_while_nobody_takes_answers() {
    let disk = Disk::small();
    let mut half = disk.serve(&[]);
    let mut stream = half.connect();
    stream.write_all(&[1, 0, 0, 0]).expect("a third of a header");
    // Nothing tells that it was read; long enough on any machine, and harmless where it is not.
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(half.terminate(Duration::from_secs(2)).code(), Some(0), "half a message");
    let mut deaf = disk.serve(&[]);
    let mut stream = deaf.connect();
    stream.set_write_timeout(Some(Duration::from_millis(300))).expect("a time limit");
    // GET_FEATURES without end: at last nobody can send anything any more.
    let question = [1_u32, 1, 0].map(u32::to_le_bytes);
    while stream.write_all(question.as_flattened()).is_ok() {}
    assert_eq!(deaf.terminate(Duration::from_secs(2)).code(), Some(0), "answers not taken");
}

#[test]
fn kill_after_flush_loses_nothing_and_the_socket_file_that_stays_is_replaced() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    let mut guest = daemon.guest(Setup::default());
    let mut want = disk.initial();
    guest.write(77, &pattern(9, 77, 10 * SECTOR));
    want[77 * SECTOR..87 * SECTOR].copy_from_slice(&pattern(9, 77, 10 * SECTOR));
    assert_eq!(guest.status(&Request::flush()), OK);
    drop(daemon);
    drop(guest);
    assert!(disk.path("sock").exists(), "a killed daemon leaves its socket file");
    assert_bytes(&disk.flat_view(), &want, "the files after FLUSH and kill");
    let mut daemon = disk.serve(&[]);
    assert_bytes(&daemon.guest(Setup::default()).read_all(), &want, "the disk, served again");
}

#[test]
fn listening_socket_can_be_passed_as_a_descriptor() {
    let disk = Disk::small();
    let path = disk.path("passed");
    let listener = UnixListener::bind(&path).expect("a listening socket");
    let mut daemon = disk.serve_fd(listener.into());
    for _ in 0..3 {
        let stream = UnixStream::connect(&path).expect("connect");
        let mut guest = Guest::start(stream, Setup::default());
        assert_bytes(&guest.read(0, 4096), &disk.initial()[..4096], "a guest");
    }
    assert_eq!(daemon.terminate(Duration::from_secs(2)).code(), Some(0));
    assert!(path.exists(), "a socket file that the daemon did not make stays");
}

#[test]
fn connected_socket_can_be_passed_as_a_descriptor() {
    let disk = Disk::small();
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    let mut daemon = disk.serve_fd(theirs.into());
    let mut guest = Guest::start(ours, Setup::default());
    guest.write(3, &pattern(1, 3, SECTOR));
    drop(guest);
    // Nobody can ever come back, so the daemon saves everything and ends.
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.messages());
    let view = disk.flat_view();
    assert_bytes(&view[3 * SECTOR..4 * SECTOR], &pattern(1, 3, SECTOR), "the file");
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    let mut daemon = disk.serve_fd(theirs.into());
    let guest = Guest::start(ours, Setup::default());
    assert_eq!(daemon.terminate(Duration::from_secs(2)).code(), Some(0));
    drop(guest);
}

/// Checks that `output` is a refusal: exit code 1 and one line of explanation.
fn assert_refused(output: &Output, what: &str) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{what}: exit code, {text}");
    assert_eq!(text.lines().count(), 1, "{what}: one line, not {text:?}");
    assert!(text.starts_with("addcowd: "), "{what}: {text:?}");
    assert!(output.stdout.is_empty(), "{what}: nothing on standard output");
}

#[test]
fn capabilities_are_printed_and_everything_else_is_ignored() {
    let disk = Disk::create(Shape::new(MIB, 64 * KIB));
    for args in [
        &["--print-capabilities"][..],
        &["--print-capabilities", "--blk-file", "/nonexistent", "--socket-path", "s"],
        &["--blk-file", "/nonexistent", "--print-capabilities", "--fd", "77"],
    ] {
        let output = disk.run(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {output:?}");
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(json["type"], "block");
        let features = json["features"].as_array().expect("a list of features");
        for feature in ["read-only", "blk-file"] {
            assert!(features.iter().any(|item| item == feature), "{feature} in {json}");
        }
        assert!(!disk.path("s").exists(), "no socket is made");
    }
}

#[test]
fn socket_path_of_a_live_daemon_is_refused_and_that_daemon_goes_on() {
    let (disk, daemon, mut guest) = small(Setup::default());
    let other = Disk::create(Shape::new(MIB, 64 * KIB));
    let path = daemon.socket.to_str().expect("a plain path");
    let output = other.run(&["--blk-file", "disk.add-cow", "--socket-path", path]);
    assert_refused(&output, "a socket path in use");
    let line =
        format!("addcowd: cannot listen on '{path}': the socket is in use by another process\n");
    assert_eq!(String::from_utf8_lossy(&output.stderr), line);
    assert_bytes(&guest.read(0, 4096), &disk.initial()[..4096], "the guest of the first daemon");
    assert!(daemon.socket.exists());
}

#[test]
fn file_that_is_no_socket_is_not_replaced() {
    let disk = Disk::small();
    std::fs::write(disk.path("precious"), b"do not touch").expect("a file");
    let output = disk.run(&["--blk-file", "disk.add-cow", "--socket-path", "precious"]);
    assert_refused(&output, "a file as socket path");
    let content = std::fs::read(disk.path("precious")).expect("the file");
    assert_eq!(content, b"do not touch");
}

#[test]
fn what_the_host_says_about_a_socket_ends_a_line_that_names_it() {
    let disk = Disk::small();
    let no_file = "No such file or directory";
    for (option, value, line) in [
        ("--socket-path", "missing/sock", format!("cannot listen on 'missing/sock': {no_file}")),
        ("--fd", "99", "cannot use file descriptor 99: Bad file descriptor".to_owned()),
        ("--fd", "0", "cannot use file descriptor 0: Socket operation on non-socket".to_owned()),
        ("--image-folder", "none", format!("cannot use --image-folder 'none': {no_file}")),
    ] {
        let socket: &[&str] = if option.starts_with("--i") { &["--fd", "0"] } else { &[] };
        let args = [&["--blk-file", "disk.add-cow", option, value], socket].concat();
        let output = disk.run(&args);
        assert_refused(&output, value);
        assert_eq!(String::from_utf8_lossy(&output.stderr), format!("addcowd: {line}\n"));
    }
}

#[test]
fn files_that_are_no_disk_are_refused_in_one_line() {
    let disk = Disk::small();
    std::fs::write(disk.path("empty"), b"").expect("a file");
    std::fs::write(disk.path("noise"), pattern(1, 0, 100_000)).expect("a file");
    for name in ["empty", "noise", "missing", ".", "/dev/null"] {
        let output = disk.run(&["--blk-file", name, "--socket-path", "sock"]);
        assert_refused(&output, name);
        assert!(!disk.path("sock").exists(), "no socket file is left");
    }
    std::fs::remove_file(disk.path("base.img")).expect("remove the base");
    let output = disk.run(&["--blk-file", "disk.add-cow", "--socket-path", "sock"]);
    assert_refused(&output, "a disk without its base file");
}

#[test]
fn command_line_that_makes_no_sense_is_refused() {
    let disk = Disk::create(Shape::new(MIB, 64 * KIB));
    let blk = ["--blk-file", "disk.add-cow"];
    for more in [
        &[][..],
        &["--socket-path", "sock", "--fd", "0"],
        &["--socket-path", "sock", "--num-queues", "0"],
        &["--socket-path", "sock", "--num-queues", "65"],
        &["--socket-path", "sock", "--queue-size", "1"],
        &["--socket-path", "sock", "--serial", "123456789012345678901"],
        &["--socket-path", "sock", "--cache", "never"],
        &["--socket-path", "sock", "--unknown"],
        &["--fd", "99"],
        &["--fd", "-1"],
    ] {
        let args: Vec<&str> = blk.iter().chain(more).copied().collect();
        let output = disk.run(&args);
        let code = output.status.code().unwrap_or(0);
        assert!((1..=2).contains(&code), "{more:?}: {output:?}");
        assert!(!output.stderr.is_empty(), "{more:?}: a message");
        assert!(!disk.path("sock").exists(), "{more:?}: no socket file is left");
    }
    let output = disk.run(&["--socket-path", "sock"]);
    assert_ne!(output.status.code(), Some(0), "no disk");
}

#[test]
fn idle_daemon_uses_no_processor_time() {
    let (_disk, daemon, mut guest) = small(Setup::default());
    guest.read(0, 4096);
    std::thread::sleep(Duration::from_millis(300));
    let before = daemon.cpu_ticks();
    let start = Instant::now();
    std::thread::sleep(Duration::from_millis(1000));
    let used = daemon.cpu_ticks() - before;
    assert!(start.elapsed() < TIMEOUT, "the machine is too busy to tell");
    assert!(used <= 5, "{used} hundredths of a second of processor time while idle");
    assert_eq!(guest.status(&Request::flush()), OK, "it wakes up again");
}

#[test]
fn a_driver_that_never_stops_asking_does_not_keep_the_daemon_from_ending() {
    // Chains that are refused at once. What the device fills of the used ring tells the driver how
    // far it is, before the device publishes it: so there is always more.
    const AHEAD: u64 = 30_000;
    let (_disk, mut daemon, mut guest) = small(Setup { size: 32768, ..Setup::default() });
    let mut ring = guest.rings.remove(0);
    let (memory, done) = (Arc::clone(&guest.mem), Arc::new(AtomicBool::new(false)));
    let is_over = Arc::clone(&done);
    let driver = std::thread::spawn(move || {
        let head = |at: u64| u16::try_from(0x8000 + at % 0x7fff).expect("16 bits");
        let entry = |at: u64| u16::try_from(at % 0x1_0000).expect("16 bits");
        for at in 0.. {
            while at >= AHEAD && !is_over.load(Ordering::Relaxed) {
                let id = memory.load_u32(ring.used_entry(entry(at - AHEAD)));
                if id == u32::from(head(at - AHEAD)) {
                    break;
                }
            }
            if is_over.load(Ordering::Relaxed) {
                return;
            }
            ring.publish_unknown(head(at));
            if at % 1000 == 0 {
                ring.kick_always();
            }
        }
    });
    std::thread::sleep(Duration::from_millis(200));
    let status = daemon.terminate(TIMEOUT);
    done.store(true, Ordering::Relaxed);
    driver.join().expect("the driver");
    assert_eq!(status.code(), Some(0), "exit code after SIGTERM");
}
