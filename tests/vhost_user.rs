//! The vhost-user protocol: features, config space, messages, and front ends that misbehave.
//!
//! By the vhost-user text and VIRTIO 1.3, 5.2.3 to 5.2.5. A message that cannot be obeyed is
//! refused or ends the connection; the daemon lives on and serves the next one.
//!
//! Not here: starting, stopping and reconnecting (`lifecycle.rs`).

mod common;

use std::collections::HashSet;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::disk::{Daemon, Disk, Shape};
use common::guest::{
    CONFIG_LEN, Config, F_CONFIG_WCE, F_DISCARD, F_FLUSH, F_PROTOCOL, F_RO, F_WRITE_ZEROES, Guest,
    KNOWN, Setup, known_protocol,
};
use common::mem::{EXTRA, REGION};
use common::request::{Framing, OK, Request, header};
use common::ring::Buffer;
use common::rng::Rng;
use common::{KIB, MIB, SECTOR, TIMEOUT, assert_bytes, pattern, to_u64};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Feature bit that may be offered besides the known ones: the largest segment.
const F_SIZE_MAX: u64 = 1 << 1;

/// A small disk and a guest on it.
fn small(options: &[&str], setup: Setup) -> (Disk, Daemon, Guest) {
    let disk = Disk::small();
    let mut daemon = disk.serve(options);
    let guest = daemon.guest(setup);
    (disk, daemon, guest)
}

/// Checks that the daemon runs and serves a new guest.
fn assert_serves(disk: &Disk, daemon: &mut Daemon) {
    let mut guest = daemon.guest(Setup::default());
    let want = disk.initial();
    assert_bytes(&guest.read(1, SECTOR), &want[SECTOR..2 * SECTOR], "a read by the next guest");
}

#[test]
fn exactly_the_supported_features_are_offered() {
    let (_disk, _daemon, guest) = small(&["--num-queues", "2"], Setup::queues(2, 128));
    let want = KNOWN & !F_RO | F_PROTOCOL;
    assert_eq!(guest.offered & !F_SIZE_MAX, want, "offered {:#x}", guest.offered);
    let (_disk, _daemon, guest) = small(&["--read-only"], Setup::default());
    assert_eq!(guest.offered & (F_RO | F_DISCARD | F_WRITE_ZEROES), F_RO, "read-only");
}

#[test]
fn exactly_the_supported_protocol_features_are_offered() {
    let (_disk, _daemon, guest) = small(&[], Setup::default());
    // Neither INFLIGHT_SHMFD, LOG_SHMFD nor STATUS.
    assert_eq!(guest.protocol, known_protocol());
}

#[test]
fn config_space_describes_the_disk() {
    for (cluster, size) in [(4 * KIB, 4 * MIB), (64 * KIB, 5 * MIB + 512), (2 * MIB, 7 * MIB)] {
        let disk = Disk::create(Shape::new(size, cluster).base(MIB));
        let mut daemon = disk.serve(&["--num-queues", "3"]);
        let config = daemon.guest(Setup::default()).config();
        assert_eq!(config.capacity(), size / 512, "capacity");
        assert_eq!(config.blk_size(), 512, "block size");
        assert!(config.seg_max() >= 1, "segments");
        assert_eq!(config.num_queues(), 3, "queues");
        assert_eq!(config.writeback(), 1, "cache mode");
        let physical = 512u64 << config.physical_block_exp();
        assert_eq!(cluster % physical, 0, "physical blocks of {physical} in {cluster}");
        assert_eq!(config.alignment_offset(), 0, "blocks are aligned from the start");
        let (least, best) = (config.min_io_size(), config.opt_io_size());
        assert_eq!(u64::from(least) * 512 % physical, 0, "smallest request {least}");
        assert!(best == 0 || best >= u32::from(least), "best request {best}, smallest {least}");
        assert_eq!(u64::from(config.discard_sector_alignment()), cluster / 512, "discard");
        assert!(config.max_discard_sectors() >= 128 && config.max_discard_seg() > 1, "discard");
        let most = (config.max_write_zeroes_sectors(), config.max_write_zeroes_seg());
        assert!(most.0 >= 128 && most.1 > 1, "write-zeroes {most:?}");
        assert!(config.write_zeroes_may_unmap() <= 1, "may unmap");
    }
}

#[test]
fn config_space_can_be_read_at_any_offset_and_ends_in_zeros() {
    let (_disk, _daemon, mut guest) = small(&[], Setup::default());
    let whole = guest.config_at(0, 256);
    assert_eq!(guest.config(), Config(whole[..60].to_vec()));
    assert_eq!(whole[61..64], [0; 3], "unused bytes");
    for (offset, len) in [(0, 1), (1, 7), (7, 9), (20, 4), (32, 1), (55, 30), (59, 1), (60, 100)]
        .into_iter()
        .chain([(255, 1), (100, 156), (0, 8), (0, 60)])
    {
        let want = &whole[offset..offset + len];
        let got = guest.config_at(u32::try_from(offset).expect("small"), len);
        assert_eq!(got, want, "{len} bytes at {offset}");
    }
    assert!(whole[96..].iter().all(|&byte| byte == 0), "nothing beyond the defined fields");
}

#[test]
fn write_cache_can_be_switched_through_the_config_space() {
    let (_disk, _daemon, mut guest) = small(&[], Setup::default());
    assert_ne!(guest.offered & F_CONFIG_WCE, 0);
    for mode in [0, 1, 1, 0] {
        let flags = VhostUserConfigFlags::WRITABLE;
        guest.must("SET_CONFIG", |front| front.set_config(32, flags, &[mode]));
        assert_eq!(guest.config().writeback(), mode, "GET_CONFIG after SET_CONFIG");
        guest.write(3, &pattern(1, 3, SECTOR));
    }
}

#[test]
fn fields_that_are_not_the_write_cache_cannot_be_changed() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    let before = daemon.guest(Setup::default()).config();
    for (offset, len) in [(0, 8), (20, 4), (33, 1), (34, 2), (56, 1), (31, 3), (60, 8), (0, 60)] {
        let mut guest = daemon.guest(Setup::default());
        let flags = VhostUserConfigFlags::WRITABLE;
        let bytes = vec![0xff; len];
        // Refusing and ignoring are both right; the value decides.
        let _ = guest.message("SET_CONFIG", |front| front.set_config(offset, flags, &bytes));
        drop(guest);
        let mut after = daemon.guest(Setup::default()).config();
        after.0[32] = before.0[32];
        assert_eq!(after, before, "config space after a write of {len} bytes at {offset}");
    }
}

/// Writes parts of clusters without a FLUSH and checks that the files hold them already.
fn writes_are_in_the_files_at_once(disk: &Disk, guest: &mut Guest) {
    let mut want = disk.initial();
    for sector in [5, 130, 4000, 8191] {
        let data = pattern(2, sector, SECTOR);
        guest.write(sector, &data);
        let at = usize::try_from(sector).expect("small") * SECTOR;
        want[at..at + SECTOR].copy_from_slice(&data);
        assert_bytes(&disk.flat_view(), &want, "the files after a write completed");
    }
    assert_eq!(guest.status(&Request::write_zeroes(&[(256, 128, 1), (700, 3, 0)])), OK);
    want[256 * SECTOR..384 * SECTOR].fill(0);
    want[700 * SECTOR..703 * SECTOR].fill(0);
    assert_bytes(&disk.flat_view(), &want, "the files after a write-zeroes completed");
}

#[test]
fn write_through_write_is_in_the_files_when_it_completes() {
    let (disk, _daemon, mut guest) = small(&[], Setup::default());
    let flags = VhostUserConfigFlags::WRITABLE;
    guest.must("SET_CONFIG", |front| front.set_config(32, flags, &[0]));
    writes_are_in_the_files_at_once(&disk, &mut guest);
}

#[test]
fn write_of_a_driver_without_flush_is_in_the_files_when_it_completes() {
    // VIRTIO 1.3, 5.2.5.2 and 5.2.6.2: without FLUSH a completed write is stable.
    for without in [F_FLUSH | F_CONFIG_WCE, F_FLUSH] {
        let (disk, _daemon, mut guest) = small(&[], Setup::without(without));
        if guest.features & F_CONFIG_WCE != 0 {
            assert_eq!(guest.config().writeback(), 0, "a cache that nobody flushes");
        }
        writes_are_in_the_files_at_once(&disk, &mut guest);
    }
}

#[test]
fn daemon_with_a_write_through_cache_has_writes_in_the_files_when_they_complete() {
    let (disk, _daemon, mut guest) = small(&["--cache", "writethrough"], Setup::default());
    assert_eq!(guest.config().writeback(), 0, "cache mode");
    writes_are_in_the_files_at_once(&disk, &mut guest);
}

#[test]
fn flush_puts_completed_writes_into_the_files() {
    for cache in ["direct", "buffered"] {
        let (disk, _daemon, mut guest) = small(&["--cache", cache], Setup::default());
        let mut want = disk.initial();
        for sector in [9, 200, 5000] {
            let data = pattern(4, sector, 3 * SECTOR);
            guest.write(sector, &data);
            let at = usize::try_from(sector).expect("small") * SECTOR;
            want[at..at + data.len()].copy_from_slice(&data);
        }
        assert_eq!(guest.status(&Request::flush()), OK);
        assert_bytes(&disk.flat_view(), &want, "the files after FLUSH");
    }
}

#[test]
fn number_of_queues_is_what_was_asked_for() {
    for queues in ["1", "4", "64"] {
        let (_disk, _daemon, mut guest) = small(&["--num-queues", queues], Setup::default());
        let count = guest.must("GET_QUEUE_NUM", |front| front.get_queue_num());
        assert_eq!(count.to_string(), queues);
        assert_eq!(guest.config().num_queues().to_string(), queues);
    }
}

#[test]
fn all_queues_work_at_once_and_each_has_a_thread() {
    let (_disk, daemon_of_one, _guest) = small(&["--num-queues", "1"], Setup::default());
    let options = ["--num-queues", "8"];
    let (disk, daemon, mut guest) = small(&options, Setup::queues(8, 64));
    assert!(daemon.threads() >= daemon_of_one.threads() + 7, "threads of eight queues");
    let initial = disk.initial();
    for round in 0..8 {
        for queue in 0..8 {
            let sector = to_u64(queue * 800 + round);
            guest.submit(queue, &Request::read(sector, SECTOR), &Framing::joined());
        }
        for queue in 0..8 {
            guest.kick(queue);
        }
        for queue in 0..8 {
            let (_, reply) = guest.finish(queue);
            let at = (queue * 800 + round) * SECTOR;
            assert_bytes(reply.data(), &initial[at..at + SECTOR], "a read on one of 8 queues");
        }
    }
}

#[test]
fn ring_size_that_is_no_power_of_two_is_refused() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    for size in [0, 3, 100, 0x7fff, 0x8001, 0xffff] {
        let mut guest = daemon.guest(Setup::default());
        guest.stop_ring(0);
        let config = guest.ring_config(0);
        let kick = guest.rings[0].kick.try_clone().expect("another descriptor");
        // Refused at the latest when the ring would start.
        let answer = guest
            .message("SET_VRING_NUM", |front| front.set_vring_num(0, size))
            .and_then(|()| guest.message("SET_VRING_ADDR", |f| f.set_vring_addr(0, &config)))
            .and_then(|()| guest.message("SET_VRING_KICK", |f| f.set_vring_kick(0, &kick)))
            .and_then(|()| guest.message("SET_VRING_ENABLE", |f| f.set_vring_enable(0, true)));
        assert!(answer.is_err(), "a ring of {size} entries was accepted");
        drop(guest);
        assert_serves(&disk, &mut daemon);
    }
}

#[test]
fn queue_that_does_not_exist_is_refused() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&["--num-queues", "2"]);
    for queue in [2, 3, 63] {
        let mut guest = daemon.guest(Setup::queues(2, 64));
        let answer = guest.message("SET_VRING_NUM", |front| front.set_vring_num(queue, 64));
        assert!(answer.is_err(), "SET_VRING_NUM of queue {queue}");
        drop(guest);
        let mut guest = daemon.guest(Setup::queues(2, 64));
        let kick = guest.rings[0].kick.try_clone().expect("another descriptor");
        let answer = guest.message("SET_VRING_KICK", |front| front.set_vring_kick(queue, &kick));
        assert!(answer.is_err(), "SET_VRING_KICK of queue {queue}");
        drop(guest);
        let mut guest = daemon.guest(Setup::queues(2, 64));
        let answer = guest.message("GET_VRING_BASE", |front| front.get_vring_base(queue));
        assert!(answer.is_err(), "GET_VRING_BASE of queue {queue}");
        drop(guest);
        assert_serves(&disk, &mut daemon);
    }
}

#[test]
fn ring_outside_memory_does_no_harm() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    for part in 0..3 {
        for address in [0, 0x1000, u64::MAX - 15, 0x5500_0000_0000 + REGION - 16] {
            let mut guest = daemon.guest(Setup::default());
            guest.stop_ring(0);
            let mut config = guest.ring_config(0);
            match part {
                0 => config.desc_table_addr = address,
                1 => config.avail_ring_addr = address,
                _ => config.used_ring_addr = address,
            }
            // Refused at once, or found out when the ring is used: nothing is answered.
            let _ = guest.message("SET_VRING_ADDR", |front| front.set_vring_addr(0, &config));
            let kick = guest.rings[0].kick.try_clone().expect("another descriptor");
            let _ = guest.message("SET_VRING_KICK", |front| front.set_vring_kick(0, &kick));
            let _ = guest.message("SET_VRING_ENABLE", |front| front.set_vring_enable(0, true));
            guest.submit(0, &Request::flush(), &Framing::joined());
            guest.rings[0].kick_always();
            drop(guest);
            assert_serves(&disk, &mut daemon);
        }
    }
}

#[test]
fn memory_that_its_file_does_not_have_is_refused() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    let huge = |info: VhostUserMemoryRegionInfo| {
        let longer = VhostUserMemoryRegionInfo { memory_size: 2 * REGION, ..info };
        let shifted = VhostUserMemoryRegionInfo { mmap_offset: info.mmap_offset + 0x1000, ..info };
        let far = VhostUserMemoryRegionInfo { mmap_offset: u64::MAX - 0xfff, ..info };
        let wrapping = VhostUserMemoryRegionInfo { guest_phys_addr: u64::MAX - 0xfff, ..info };
        let tty = VhostUserMemoryRegionInfo { mmap_handle: 0, ..info };
        [longer, shifted, far, wrapping, tty]
    };
    for at in 0..5 {
        let mut guest = Guest::negotiate(daemon.connect(), Setup::default());
        let region = huge(guest.mem.table()[0])[at];
        let answer = guest.message("SET_MEM_TABLE", |front| front.set_mem_table(&[region]));
        assert!(answer.is_err(), "bad region {at} in SET_MEM_TABLE");
        drop(guest);
        let mut guest = daemon.guest(Setup::default());
        let region = huge(guest.mem.extra())[at];
        let answer = guest.message("ADD_MEM_REG", |front| front.add_mem_region(&region));
        assert!(answer.is_err(), "bad region {at} in ADD_MEM_REG");
        drop(guest);
        assert_serves(&disk, &mut daemon);
    }
}

#[test]
fn memory_can_be_added_and_removed_while_a_ring_runs() {
    let (disk, daemon, mut guest) = small(&[], Setup::default());
    assert!(guest.must("GET_MAX_MEM_SLOTS", |front| front.get_max_mem_slots()) >= 8);
    let (initial, extra) = (disk.initial(), guest.mem.extra());
    let mut files = HashSet::new();
    let head = Buffer { addr: guest.mem.alloc_filled(16, 0), len: 16, writable: false };
    let data = Buffer { addr: EXTRA + 4096, len: 513, writable: true };
    for round in 0..10 {
        guest.mem.write(head.addr, &header(0, round));
        guest.mem.write(data.addr, &[7; 513]);
        guest.rings[0].add(&[head, data]);
        guest.kick(0);
        assert_eq!(guest.rings[0].wait().len, 0, "memory that is not there yet");
        assert_eq!(guest.mem.read(data.addr, 513), [7; 513], "memory that is not there yet");
        guest.must("ADD_MEM_REG", |front| front.add_mem_region(&extra).map(drop));
        guest.rings[0].add(&[head, data]);
        guest.kick(0);
        assert_eq!(guest.rings[0].wait().len, 513, "used length in added memory");
        let at = usize::try_from(round).expect("small") * SECTOR;
        let want = &initial[at..at + SECTOR];
        assert_bytes(&guest.mem.read(data.addr, SECTOR), want, "added memory");
        guest.read(100, 4096);
        guest.must("REM_MEM_REG", |front| front.remove_mem_region(&extra));
        guest.read(100, 4096);
        files.insert(daemon.open_files());
    }
    assert_eq!(files.len(), 1, "open files after each round: {files:?}");
}

/// A queue that runs for the first time just then must not go on with the memory before. Its
/// requests would come back undone, with the status byte as it was: found by a driver whose status
/// bytes still said OK.
#[test]
fn memory_that_is_added_as_rings_start_is_there_for_all_of_them() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&["--num-queues", "4"]);
    for round in 0..100 {
        let mut guest = daemon.guest(Setup::queues(4, 128));
        let extra = guest.mem.extra();
        guest.must("ADD_MEM_REG", |front| front.add_mem_region(&extra).map(drop));
        let head = Buffer { addr: guest.mem.alloc_filled(16, 0), len: 16, writable: false };
        let data = Buffer { addr: EXTRA + 4096, len: 513, writable: true };
        for queue in 0..4 {
            guest.rings[queue].add(&[head, data]);
            guest.kick(queue);
            let used = guest.rings[queue].wait();
            assert_eq!(used.len, 513, "round {round}, queue {queue}: not in the added memory");
        }
    }
}

#[test]
fn memory_regions_that_overlap_are_refused() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    let mut guest = Guest::negotiate(daemon.connect(), Setup::default());
    let mut table = guest.mem.table();
    table[1].guest_phys_addr -= 0x1000;
    let answer = guest.message("SET_MEM_TABLE", |front| front.set_mem_table(&table));
    assert!(answer.is_err(), "overlap in SET_MEM_TABLE");
    drop(guest);
    let mut guest = daemon.guest(Setup::default());
    let region = VhostUserMemoryRegionInfo { guest_phys_addr: 0x1000, ..guest.mem.extra() };
    let answer = guest.message("ADD_MEM_REG", |front| front.add_mem_region(&region));
    assert!(answer.is_err(), "overlap in ADD_MEM_REG");
    drop(guest);
    assert_serves(&disk, &mut daemon);
}

/// Files that are no eventfd: some are always ready, some never, some cannot be used so.
fn odd_files(disk: &Disk) -> Vec<File> {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let (lonely, _) = std::io::pipe().expect("a pipe");
    vec![
        File::open("/dev/null").expect("a device"),
        File::options().write(true).open("/dev/full").expect("a device"),
        File::open(disk.path("base.img")).expect("a file"),
        File::open(disk.path(".")).expect("a folder"),
        File::from(OwnedFd::from(reader)),
        File::from(OwnedFd::from(writer)),
        File::from(OwnedFd::from(lonely)),
    ]
}

/// Message code of SET_VRING_KICK.
const SET_VRING_KICK: u32 = 12;
/// Message code of SET_VRING_CALL.
const SET_VRING_CALL: u32 = 13;

/// Waits until the daemon has ended the connection.
fn wait_until_ended(guest: &mut Guest, what: &str) {
    let limit = Instant::now() + Duration::from_secs(20);
    while guest.message("GET_FEATURES", |front| front.get_features()).is_ok() {
        assert!(Instant::now() < limit, "the connection goes on: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn kick_or_call_that_is_no_eventfd_ends_the_connection() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&["--num-queues", "2"]);
    for (code, name) in [(SET_VRING_KICK, "kick"), (SET_VRING_CALL, "call")] {
        for (at, file) in odd_files(&disk).into_iter().enumerate() {
            let mut guest = daemon.guest(Setup::queues(2, 64));
            // The message itself is in order; its answer may come too late.
            guest.set_ring_file(code, 0, &file);
            wait_until_ended(&mut guest, &format!("file {at} as {name}"));
            drop(guest);
            assert_serves(&disk, &mut daemon);
        }
        let messages = daemon.messages();
        let said = format!("queue 0 stopped: the {name} is not an eventfd");
        assert!(messages.matches(&said).count() >= odd_files(&disk).len(), "{messages}");
    }
    daemon.stop();
}

#[test]
fn call_that_blocks_does_not_keep_the_daemon_from_ending() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    let mut guest = daemon.guest(Setup::default());
    // The counter of an eventfd that is not O_NONBLOCK is full: the next write waits for ever.
    let full = EventFd::new(0).expect("an eventfd");
    full.write(u64::MAX - 1).expect("fill it");
    assert!(guest.set_ring_file(SET_VRING_CALL, 0, &full), "an eventfd is taken");
    guest.submit(0, &Request::flush(), &Framing::joined());
    guest.rings[0].kick_always();
    std::thread::sleep(Duration::from_millis(50));
    guest.stop_ring(0);
    daemon.stop();
}

#[test]
fn back_end_channel_is_accepted() {
    let (_disk, daemon, mut guest) = small(&[], Setup::default());
    // The queue has opened what it needs.
    assert_eq!(guest.status(&Request::flush()), OK);
    let files = daemon.open_files();
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    guest.must("SET_BACKEND_REQ_FD", |front| front.set_backend_request_fd(&theirs));
    drop(theirs);
    assert!(daemon.open_files() <= files + 1, "one descriptor is kept at most");
    assert_eq!(guest.status(&Request::flush()), OK);
    drop(ours);
    assert_eq!(guest.status(&Request::flush()), OK, "after the channel is gone");
}

#[test]
fn front_end_without_reply_ack_and_other_protocol_features_is_served() {
    let protocol = VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ;
    let setup = Setup { protocol, ..Setup::default() };
    let (disk, _daemon, mut guest) = small(&[], setup);
    assert_bytes(&guest.read_all(), &disk.initial(), "the disk");
}

/// A message header: request code, flags, payload length.
fn raw_header(code: u32, flags: u32, len: u32) -> Vec<u8> {
    [code, flags, len].into_iter().flat_map(u32::to_le_bytes).collect()
}

/// Sends `bytes` on a fresh connection; the daemon has to end that connection, and only that.
fn assert_hangs_up(disk: &Disk, daemon: &mut Daemon, bytes: &[u8], what: &str) {
    let mut stream = daemon.connect();
    stream.set_read_timeout(Some(TIMEOUT)).expect("a time limit");
    // The daemon may hang up while we still write.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    if let Err(error) = stream.read_to_end(&mut answer) {
        let kind = error.kind();
        assert_eq!(kind, std::io::ErrorKind::ConnectionReset, "{what}: still connected");
    }
    drop(stream);
    assert_serves(disk, daemon);
}

#[test]
fn garbage_on_the_socket_ends_the_connection_and_not_the_daemon() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    assert_serves(&disk, &mut daemon);
    let before = daemon.footprint();
    let mut rng = Rng::new(5);
    for len in [12, 13, 64, 4096, 100_000] {
        let bytes: Vec<u8> = (0..len).map(|_| rng.next().to_le_bytes()[0] | 0x80).collect();
        assert_hangs_up(&disk, &mut daemon, &bytes, "noise");
    }
    for (code, flags, len) in [
        (0, 1, 0),
        (1, 0, 0),
        (1, 2, 0),
        (1, 3, 0),
        (1, 5, 0),
        (200, 1, 0),
        (u32::MAX, 1, 0),
        (2, 1, 0x1001),
        (2, 1, u32::MAX),
        (2, 1, 3),
        (5, 1, 0),
        (8, 1, 4),
        (24, 1, 12),
    ] {
        let mut bytes = raw_header(code, flags, len);
        bytes.extend_from_slice(&[0xff; 300]);
        assert_hangs_up(&disk, &mut daemon, &bytes, &format!("{code} {flags:#x} {len:#x}"));
    }
    assert_eq!(daemon.footprint(), before, "open files and threads after garbage");
}

#[test]
fn connection_that_breaks_off_inside_a_message_does_no_harm() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    let mut message = raw_header(2, 1, 8);
    message.extend_from_slice(&F_PROTOCOL.to_le_bytes());
    for len in 0..message.len() {
        let mut stream = daemon.connect();
        stream.write_all(&message[..len]).expect("part of a message");
        drop(stream);
    }
    assert_serves(&disk, &mut daemon);
}

#[test]
fn descriptors_that_belong_to_no_message_are_closed() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    assert_serves(&disk, &mut daemon);
    let before = daemon.footprint();
    let file = std::fs::File::open("/dev/null").expect("a file");
    for count in [1, 8, 32] {
        let stream = daemon.connect();
        let fds = vec![file.as_raw_fd(); count];
        for code in [1, 3, 5, 13] {
            let message = raw_header(code, 1, 0);
            let _ = stream.send_with_fds(&[&message[..]], &fds);
        }
        drop(stream);
        assert_serves(&disk, &mut daemon);
    }
    assert_eq!(daemon.footprint(), before, "open files and threads after stray descriptors");
}

#[test]
fn config_message_of_a_wrong_size_does_no_harm() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    for (offset, size, payload) in [(0, 300, 60), (250, 10, 10), (u32::MAX, 1, 1), (0, 0, 0)] {
        let mut stream = daemon.connect();
        let mut bytes = raw_header(1, 1, 0);
        bytes.extend(raw_header(24, 1, 12 + payload));
        bytes.extend([offset, size, 0].into_iter().flat_map(u32::to_le_bytes));
        bytes.resize(bytes.len() + usize::try_from(payload).expect("small"), 0);
        let _ = stream.write_all(&bytes);
        drop(stream);
        assert_serves(&disk, &mut daemon);
    }
    assert_eq!(CONFIG_LEN, 60);
}
