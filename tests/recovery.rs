//! `kill -9` under load: no completed write is lost, every request in flight completes exactly
//! once.
//!
//! The front end here keeps the inflight region, as QEMU does, and gives it to the next daemon. The
//! moment of a kill is random; `ADDCOW_SEED` replays the requests, not the moment. A request that
//! comes back twice, or not at all, fails in `common::ring`.
//!
//! Also: which recovery states are refused. Not here: the records themselves (`virtio::inflight`).

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::{Duration, Instant};

use common::disk::{Daemon, Disk, Shape, TOOL, run_to_end};
use common::guest::{Guest, Setup};
use common::model::{Model, Workload};
use common::request::{Framing, OK, Request};
use common::ring::Ring;
use common::rng::Rng;
use common::score::score;
use common::{KIB, MIB, SECTOR, TIMEOUT, assert_bytes, pattern};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

/// How many times the daemons of a test are killed.
const KILLS: u64 = 60;

/// What is said of a region that is older than the disk.
const CHANGED: &str = "the disk was changed without it";

/// A guest on `disk` that survives its daemons.
fn recoverable(disk: &Disk, options: &[&str], setup: Setup) -> (Daemon, Guest) {
    let mut daemon = disk.serve(options);
    let guest = Guest::start_recoverable(daemon.connect(), setup);
    (daemon, guest)
}

/// The seed of a test's requests.
fn seed(default: u64) -> u64 {
    let seed = std::env::var("ADDCOW_SEED").ok().and_then(|text| text.parse().ok());
    let seed = seed.unwrap_or(default);
    println!("ADDCOW_SEED={seed}");
    seed
}

/// Kills and replaces the daemon in the middle of batches of requests; all data stays right.
fn survives_kills(shape: Shape, options: &[&str], default_seed: u64) {
    let disk = Disk::create(shape);
    let (mut daemon, mut guest) = recoverable(&disk, options, Setup::queues(2, 128));
    let mut model = Model::new(disk.initial());
    let seed = seed(default_seed);
    let mut workload = Workload::new(seed);
    workload.batch = 40;
    let mut rng = Rng::new(seed ^ 0x6b11);
    let (mut requests, mut clusters) = (0, 0);
    for kill in 0..KILLS {
        workload.run(&mut guest, &mut model, 2);
        let pause = Duration::from_micros(rng.pick(0..1500) >> rng.pick(0..6));
        workload.run_batch(&mut guest, &mut model, |guest| {
            std::thread::sleep(pause);
            daemon.kill();
            let stream;
            (daemon, stream) = disk.serve_after_kill(options);
            guest.reconnect(stream).expect("the recovery state is accepted");
        });
        let said = daemon.messages();
        requests += number_before(&said, " requests were in flight");
        clusters += number_before(&said, " clusters were new");
        if kill % 10 == 9 {
            Workload::verify(&mut guest, &mut model);
        }
    }
    Workload::verify(&mut guest, &mut model);
    drop(guest);
    daemon.stop();
    // Not only in somebody's memory.
    model.check(0, &disk.flat_view(), "the files");
    let check = Command::new(TOOL).arg("check").arg(disk.path("disk.add-cow")).output();
    assert!(check.expect("run the tool").status.success());
    score("kills", &[("kills", KILLS), ("requests", requests), ("clusters", clusters)]);
    // Or nothing of this was put to the test.
    assert!(requests + clusters > 0, "the daemons were never killed at work");
}

/// The sum of the numbers in front of these words.
fn number_before(said: &str, words: &str) -> u64 {
    let numbers = said.split(words).map(|text| text.rsplit(' ').next().unwrap_or_default());
    numbers.filter_map(|number| number.parse::<u64>().ok()).sum()
}

#[test]
fn kills_with_4k_clusters_on_a_disk() {
    survives_kills(Shape::new(6 * MIB + 3 * 512, 4 * KIB), &["--num-queues", "2"], 2001);
}

#[test]
fn kills_with_64k_clusters_and_a_short_base_on_tmpfs() {
    let shape = Shape::new(6 * MIB + 512, 64 * KIB).base(3 * MIB + 512).in_memory();
    survives_kills(shape, &["--num-queues", "2"], 2002);
}

#[test]
fn kills_with_large_clusters_through_the_page_cache() {
    let shape = Shape::new(12 * MIB, 2 * MIB).base(9 * MIB);
    survives_kills(shape, &["--num-queues", "2", "--cache", "buffered"], 2003);
}

#[test]
fn kills_in_write_through_mode() {
    let shape = Shape::new(4 * MIB, 16 * KIB).in_memory();
    survives_kills(shape, &["--num-queues", "2", "--cache", "writethrough"], 2004);
}

/// Writes one sector with a pattern of `seed`, without a flush.
fn write(guest: &mut Guest, seed: u64, sector: u64) {
    let request = Request::write(sector, &pattern(seed, sector, SECTOR));
    assert_eq!(guest.status(&request), OK);
}

#[test]
fn completed_writes_survive_several_deaths_in_a_row_without_a_flush() {
    let disk = Disk::create(Shape::new(4 * MIB, 64 * KIB).in_memory());
    let (mut daemon, mut guest) = recoverable(&disk, &[], Setup::default());
    for death in 0..10 {
        write(&mut guest, 7, 128 * death + 5);
        daemon.kill();
        let stream;
        (daemon, stream) = disk.serve_after_kill(&[]);
        guest.reconnect(stream).expect("accepted");
        for earlier in 0..=death {
            let sector = 128 * earlier + 5;
            assert_bytes(&guest.read(sector, SECTOR), &pattern(7, sector, SECTOR), "a write");
        }
    }
}

#[test]
fn completed_writes_survive_although_the_front_end_has_asked_for_another_region() {
    // As QEMU does when its guest is reset.
    let disk = Disk::create(Shape::new(4 * MIB, 64 * KIB).in_memory());
    let (mut daemon, mut guest) = recoverable(&disk, &[], Setup::default());
    write(&mut guest, 7, 5);
    guest.keep_inflight();
    write(&mut guest, 7, 200);
    daemon.kill();
    let (_daemon, stream) = disk.serve_after_kill(&[]);
    guest.reconnect(stream).expect("accepted");
    for sector in [5, 200] {
        assert_bytes(&guest.read(sector, SECTOR), &pattern(7, sector, SECTOR), "a write");
    }
}

#[test]
fn requests_of_a_daemon_that_stands_still_are_done_once_by_the_next() {
    let disk = Disk::create(Shape::new(4 * MIB, 4 * KIB));
    let (mut daemon, mut guest) = recoverable(&disk, &[], Setup::queues(1, 256));
    // Stopped, it takes nothing: the next daemon finds all of it, behind the used index.
    daemon.signal(rustix::process::Signal::STOP);
    for at in 0..80 {
        let sector = 8 * at;
        let request = Request::write(sector, &pattern(3, sector, SECTOR));
        guest.submit(0, &request, &Framing::joined());
    }
    guest.rings[0].kick_always();
    daemon.kill();
    let stream;
    (daemon, stream) = disk.serve_after_kill(&[]);
    guest.reconnect(stream).expect("accepted");
    for _ in 0..80 {
        assert_eq!(guest.finish(0).1.status(), OK);
    }
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(guest.rings[0].pop(), None, "one too many");
    for at in 0..80 {
        assert_bytes(&guest.read(8 * at, SECTOR), &pattern(3, 8 * at, SECTOR), "a write");
    }
    drop(daemon);
}

#[test]
fn an_ended_daemon_leaves_nothing_to_recover() {
    let disk = Disk::small();
    let (daemon, mut guest) = recoverable(&disk, &[], Setup::default());
    write(&mut guest, 1, 5);
    daemon.stop();
    let mut daemon = disk.serve(&[]);
    guest.reconnect(daemon.connect()).expect("accepted");
    assert_bytes(&guest.read(5, SECTOR), &pattern(1, 5, SECTOR), "a write");
    let said = daemon.messages();
    assert!(!said.contains("taken over") && !said.contains("once more"), "{said}");
}

#[test]
fn a_front_end_that_reconnects_to_the_same_daemon_gives_its_region_back() {
    let disk = Disk::small();
    let (mut daemon, mut guest) = recoverable(&disk, &[], Setup::default());
    for round in 0..5 {
        write(&mut guest, round, 5 + round);
        let stream = daemon.connect();
        // The old connection ends when its socket is replaced.
        guest.reconnect(stream).expect("accepted");
        assert_bytes(&guest.read(5 + round, SECTOR), &pattern(round, 5 + round, SECTOR), "a write");
    }
}

#[test]
fn rings_that_begin_where_the_available_ring_ends_lose_no_request() {
    // As cloud-hypervisor does, whatever the device had taken of it.
    let disk = Disk::small();
    for kill in [true, false] {
        let (mut daemon, mut guest) = recoverable(&disk, &[], Setup::default());
        write(&mut guest, 1, 5);
        if kill {
            daemon.kill();
        } else {
            daemon.stop();
        }
        for sector in 0..5 {
            guest.submit(0, &Request::read(sector, SECTOR), &Framing::joined());
        }
        let (_daemon, stream) = disk.serve_after_kill(&[]);
        guest.reconnect_at(stream, Ring::next_avail).expect("accepted");
        for _ in 0..5 {
            assert_eq!(guest.finish(0).1.status(), OK);
        }
    }
}

#[test]
fn completed_writes_survive_although_the_front_end_has_forgotten_the_region() {
    // As QEMU does when its guest resets the device, until the next driver starts it.
    let disk = Disk::create(Shape::new(4 * MIB, 64 * KIB).in_memory());
    let (mut daemon, mut guest) = recoverable(&disk, &[], Setup::default());
    write(&mut guest, 7, 5);
    guest.stop_ring(0);
    daemon.kill();
    let (_daemon, stream) = disk.serve_after_kill(&[]);
    let mut next = Guest::start_recoverable(stream, Setup::default());
    assert_bytes(&next.read(5, SECTOR), &pattern(7, 5, SECTOR), "a write");
}

#[test]
fn a_ring_can_stop_at_any_moment_of_what_another_ring_writes() {
    // Each stop writes bits of new clusters out, as the other queue makes more of them.
    let disk = Disk::create(Shape::new(64 * MIB, 4 * KIB).in_memory());
    let (daemon, mut guest) = recoverable(&disk, &[], Setup::queues(2, 512));
    let sector = |number: u64| number * 8;
    for round in 0..64 {
        for number in 0..100 {
            let sector = sector(round * 100 + number);
            let request = Request::write(sector, &pattern(3, sector, SECTOR));
            guest.submit(1, &request, &Framing::usual(&request));
        }
        guest.kick(1);
        for _ in 0..4 {
            guest.stop_ring(0);
            guest.start_ring(0);
        }
        for _ in 0..100 {
            assert_eq!(guest.finish(1).1.status(), OK);
        }
    }
    for number in (0..6400).step_by(97) {
        let sector = sector(number);
        assert_bytes(&guest.read(sector, SECTOR), &pattern(3, sector, SECTOR), "a write");
    }
    drop(guest);
    daemon.stop();
}

#[test]
fn a_write_cache_that_was_turned_off_stays_off_when_the_front_end_comes_back() {
    let disk = Disk::small();
    let (mut daemon, mut guest) = recoverable(&disk, &[], Setup::default());
    let flags = VhostUserConfigFlags::WRITABLE;
    guest.must("SET_CONFIG", |front| front.set_config(32, flags, &[0]));
    let mut want = disk.initial();
    for (sector, kill) in [(5, false), (130, true), (4000, true)] {
        let stream;
        if kill {
            daemon.kill();
            (daemon, stream) = disk.serve_after_kill(&[]);
        } else {
            stream = daemon.connect();
        }
        guest.reconnect(stream).expect("accepted");
        assert_eq!(guest.config().writeback(), 0, "the driver was not asked again");
        write(&mut guest, 1, sector);
        let at = usize::try_from(sector).expect("small") * SECTOR;
        want[at..at + SECTOR].copy_from_slice(&pattern(1, sector, SECTOR));
        assert_bytes(&disk.flat_view(), &want, "the files after a write completed");
    }
    drop(guest);
    assert_eq!(daemon.guest(Setup::default()).config().writeback(), 1, "for another guest");
}

/// Kills the daemon of a guest with an unflushed write, lets `change` happen, and fails unless the
/// next daemon refuses what the guest has kept, saying `reason`.
fn is_refused(reason: &str, change: impl FnOnce(&Disk, &mut Guest)) {
    // 63 clusters: the last bit of their word belongs to none.
    let disk = Disk::create(Shape::new(63 * 64 * KIB, 64 * KIB));
    let (mut daemon, mut guest) = recoverable(&disk, &[], Setup::default());
    write(&mut guest, 1, 5);
    daemon.kill();
    change(&disk, &mut guest);
    let (mut daemon, stream) = disk.serve_after_kill(&[]);
    guest.reconnect(stream).expect_err("a recovery state that is not to be used");
    let said = daemon.messages();
    assert!(said.contains(reason), "{said}");
    // Its bits were not believed.
    let mut other = daemon.guest(Setup::default());
    assert_bytes(&other.read(5, SECTOR), &disk.initial()[5 * SECTOR..][..SECTOR], "the base");
}

/// Runs the tool in the disk's folder.
fn tool(disk: &Disk, line: &str) {
    let command = || {
        let mut command = Command::new(TOOL);
        command.args(line.split(' ')).current_dir(disk.path("."));
        command
    };
    let mut tries = 0;
    // What the killed daemon had open may still be in use.
    let output = loop {
        let output = run_to_end(command());
        tries += 1;
        if tries == 20 || !String::from_utf8_lossy(&output.stderr).contains("in use") {
            break output;
        }
    };
    assert!(output.status.success(), "{line}: {output:?}");
}

#[test]
fn a_region_is_refused_once_a_verb_has_changed_the_disk() {
    is_refused(CHANGED, |disk, _| tool(disk, "reset disk.add-cow"));
    is_refused(CHANGED, |disk, _| tool(disk, "rebase -u -b base.img -F raw disk.add-cow"));
    is_refused(CHANGED, |disk, _| tool(disk, "commit disk.add-cow"));
    let verbs = ["resize disk.add-cow +64k", "resize --shrink disk.add-cow -64k"];
    is_refused(CHANGED, |disk, _| verbs.iter().for_each(|line| tool(disk, line)));
}

#[test]
fn a_region_is_refused_once_another_guest_has_used_the_disk() {
    is_refused(CHANGED, |disk, _| {
        let (daemon, stream) = disk.serve_after_kill(&[]);
        drop(Guest::start(stream, Setup::default()));
        daemon.stop();
    });
    is_refused(CHANGED, |disk, _| {
        let (daemon, stream) = disk.serve_after_kill(&[]);
        drop(Guest::start_recoverable(stream, Setup::default()));
        daemon.stop();
    });
}

#[test]
fn a_region_is_refused_once_the_same_daemon_has_served_another_guest() {
    for start in [Guest::start, Guest::start_recoverable] {
        let disk = Disk::small();
        let (mut daemon, mut guest) = recoverable(&disk, &[], Setup::default());
        write(&mut guest, 1, 5);
        guest.hang_up();
        let mut other = start(daemon.connect(), Setup::default());
        write(&mut other, 2, 130);
        other.hang_up();
        guest.reconnect(daemon.connect()).expect_err("the disk is not what it was");
        let said = daemon.messages();
        assert!(said.contains(CHANGED), "{said}");
    }
}

#[test]
fn a_region_of_a_disk_without_new_clusters_is_refused_once_it_was_used() {
    let disk = Disk::create(Shape::new(4 * MIB, 64 * KIB).no_base());
    let (mut daemon, mut guest) = recoverable(&disk, &[], Setup::default());
    write(&mut guest, 1, 5);
    daemon.kill();
    let (mut daemon, stream) = disk.serve_after_kill(&[]);
    guest.reconnect(stream).expect("nobody has used the disk");
    daemon.kill();
    let (mut daemon, stream) = disk.serve_after_kill(&[]);
    let mut other = Guest::start(stream, Setup::default());
    write(&mut other, 2, 5);
    daemon.kill();
    let (mut daemon, stream) = disk.serve_after_kill(&[]);
    guest.reconnect(stream).expect_err("requests of another time");
    let said = daemon.messages();
    assert!(said.contains(CHANGED), "{said}");
}

#[test]
fn a_region_for_other_files_is_refused() {
    is_refused("it is for other files", |disk, _| {
        for name in ["disk.raw", "disk.add-cow"] {
            std::fs::copy(disk.path(name), disk.path("copy")).expect("a copy");
            std::fs::rename(disk.path("copy"), disk.path(name)).expect("in its place");
        }
    });
}

/// Changes a word of the region.
fn poke(guest: &mut Guest, word: u64, value: u64) {
    let (_, file) = guest.inflight();
    file.write_all_at(&value.to_le_bytes(), 8 * word).expect("write to the region");
}

#[test]
fn a_damaged_region_is_refused() {
    is_refused("it is not one of this version", |_, guest| poke(guest, 0, 1));
    is_refused("checksum", |_, guest| poke(guest, 7, 1));
    is_refused("a bit past the last cluster", |_, guest| {
        // The bits are the last word of the region.
        let (region, _) = guest.inflight();
        let last = region.mmap_size / 8 - 1;
        poke(guest, last, u64::MAX);
    });
}

#[test]
fn a_region_that_is_no_region_is_refused() {
    is_refused("its length", |_, guest| {
        let (_, file) = guest.inflight();
        *file = sealed(4096);
    });
    is_refused("it is not sealed", |_, guest| {
        let flags = rustix::fs::MemfdFlags::ALLOW_SEALING;
        let (region, file) = guest.inflight();
        *file = File::from(rustix::fs::memfd_create("test", flags).expect("a memory file"));
        file.set_len(region.mmap_size).expect("its size");
    });
    is_refused("it cannot be sealed", |disk, guest| {
        let (_, file) = guest.inflight();
        *file = File::open(disk.path("base.img")).expect("a file");
    });
    is_refused("it is not one of this version", |_, guest| {
        let (region, file) = guest.inflight();
        *file = sealed(region.mmap_size);
    });
    is_refused("malformed", |_, guest| guest.inflight().0.mmap_offset = 4096);
    is_refused("queues of", |_, guest| guest.inflight().0.num_queues = 200);
    is_refused("its length", |_, guest| guest.inflight().0.num_queues = 2);
    is_refused("queues of", |_, guest| guest.inflight().0.queue_size = 100);
    is_refused("its length", |_, guest| guest.inflight().0.queue_size = 64);
}

/// Starts a guest with two queues of 128 entries that keeps a region for `queues` of `size`, and
/// fails unless the daemon ends the connection over queue `odd`, before it does anything with its
/// requests. What the others have completed survives the daemon nonetheless.
fn a_ring_without_a_place_is_refused(queues: usize, size: u16, odd: usize) {
    let disk = Disk::create(Shape::new(4 * MIB, 64 * KIB).in_memory());
    let mut daemon = disk.serve(&[]);
    let mut guest = Guest::negotiate(daemon.connect(), Setup::queues(2, 128));
    (guest.setup.queues, guest.setup.size) = (queues, size);
    guest.keep_inflight();
    guest.share_memory();
    let lost = Request::write(200, &pattern(7, 200, SECTOR));
    guest.submit(odd, &lost, &Framing::usual(&lost));
    for queue in 0..odd {
        guest.start_ring(queue);
        write(&mut guest, 7, 5);
    }
    guest.configure_ring(odd);
    // Its answer may come before the end, or not.
    let _ = guest.message("SET_VRING_ENABLE", |front| front.set_vring_enable(odd, true));
    guest.rings[odd].kick_always();
    let end = Instant::now() + TIMEOUT;
    while guest.message("GET_FEATURES", |front| front.get_features()).is_ok() {
        assert!(Instant::now() < end, "served by a queue that nothing is kept of");
    }
    assert_eq!(guest.rings[odd].pop(), None, "a request that would be lost");
    let (said, why) = (daemon.messages(), format!("is for {queues} queues of at most {size} entr"));
    assert!(said.contains(&why), "{said}");
    daemon.kill();
    guest.rings.truncate(odd);
    let (mut daemon, stream) = disk.serve_after_kill(&[]);
    guest.reconnect(stream).expect("accepted");
    drop(guest);
    let mut other = daemon.guest(Setup::default());
    let base = disk.initial();
    assert_bytes(&other.read(200, SECTOR), &base[200 * SECTOR..][..SECTOR], "the base");
    if odd > 0 {
        assert_bytes(&other.read(5, SECTOR), &pattern(7, 5, SECTOR), "a write");
    }
}

#[test]
fn a_ring_that_the_region_has_no_place_for_does_not_run() {
    a_ring_without_a_place_is_refused(1, 128, 1);
    a_ring_without_a_place_is_refused(2, 64, 0);
}

/// Memory of `len` zero bytes, sealed as the device's is.
fn sealed(len: u64) -> File {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
    let file = memfd_create("test", MemfdFlags::ALLOW_SEALING).expect("a memory file");
    let file = File::from(file);
    file.set_len(len).expect("its size");
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).expect("seals");
    file
}

#[test]
fn whatever_the_records_say_the_device_serves_on() {
    let disk = Disk::small();
    let (mut daemon, mut guest) = recoverable(&disk, &[], Setup::default());
    let mut rng = Rng::new(seed(2005));
    for _ in 0..20 {
        write(&mut guest, 1, 5);
        daemon.kill();
        for word in 512..512 + 129 {
            poke(&mut guest, word, rng.next() >> rng.pick(0..64));
        }
        let stream;
        (daemon, stream) = disk.serve_after_kill(&[]);
        // Chains that nobody made available are carried out: whatever lies in their descriptors.
        if guest.reconnect(stream).is_ok() {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(daemon.is_alive());
        // A new guest finds a daemon in order.
        drop(guest);
        guest = Guest::start_recoverable(daemon.connect(), Setup::default());
        assert_bytes(&guest.read(5, SECTOR), &pattern(1, 5, SECTOR), "a write");
    }
}
