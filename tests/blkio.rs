//! A front end that nobody here wrote: the `blkio` crate drives the daemon.
//!
//! It has its own encoder of messages and its own rings, so a mistake that the in-tree front end
//! shares with the daemon would show here.
//!
//! Not here: anything malformed; `blkio` cannot send it.

mod common;

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use common::disk::{Daemon, Disk, Shape};
use common::rng::Rng;
use common::{KIB, MIB, SECTOR, TIMEOUT, assert_bytes, pattern, to_u64, to_usize};

/// Bytes of memory shared with the daemon.
const MEMORY: usize = 8 << 20;

/// A started `blkio` device with its memory.
struct Device {
    /// The device; before the queues are gone it has to stay.
    _device: Blkio,
    /// Its queues, sleeping ones first.
    queues: Vec<Blkioq>,
    /// The shared memory.
    region: MemoryRegion,
    /// The same memory as a file, so that this test reads it without a pointer.
    file: File,
    /// Size of the disk in bytes.
    capacity: u64,
}

impl Device {
    /// Connects to `daemon` with `sleeping` and `polling` queues.
    fn start(daemon: &mut Daemon, sleeping: i32, polling: i32) -> Self {
        // The daemon listens when this connection is accepted.
        drop(daemon.connect());
        let mut device = Blkio::new("virtio-blk-vhost-user").expect("the driver");
        let path = daemon.socket.to_str().expect("a plain path");
        device.set_str("path", path).expect("path");
        device.connect().expect("connect");
        device.set_i32("num-queues", sleeping).expect("queues");
        device.set_i32("num-poll-queues", polling).expect("polling queues");
        let capacity = device.get_u64("capacity").expect("capacity");
        let started = device.start().expect("start");
        let region = device.alloc_mem_region(MEMORY).expect("memory");
        device.map_mem_region(&region).expect("map the memory");
        let path = format!("/proc/self/fd/{}", region.fd);
        let file = File::options().read(true).write(true).open(path).expect("the memory file");
        let queues = started.queues.into_iter().chain(started.poll_queues).collect();
        Self { _device: device, queues, region, file, capacity }
    }

    /// Where byte `offset` of the shared memory is mapped.
    fn address(&self, offset: usize) -> *mut u8 {
        (self.region.addr + offset) as *mut u8
    }

    /// Fills the shared memory at `offset`.
    fn put(&self, offset: usize, bytes: &[u8]) {
        self.file.write_all_at(bytes, to_u64(offset)).expect("write shared memory");
    }

    /// The shared memory at `offset`.
    fn get(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, to_u64(offset)).expect("read shared memory");
        bytes
    }

    /// Waits for `count` requests of `queue`: the results by the requests' numbers.
    fn finish(&mut self, queue: usize, count: usize) -> Vec<(usize, i32)> {
        let mut done: Vec<_> = (0..count).map(|_| MaybeUninit::<Completion>::uninit()).collect();
        let mut left: Duration = TIMEOUT;
        let filled = self.queues[queue].do_io(&mut done, count, Some(&mut left), None);
        assert_eq!(filled.expect("completions in time"), count);
        done.into_iter().map(result).collect()
    }

    /// Reads `len` bytes of the disk from `start` on.
    fn read(&mut self, queue: usize, start: u64, len: usize) -> Vec<u8> {
        let buffer = self.address(0);
        self.queues[queue].read(start, buffer, len, 9, ReqFlags::empty());
        assert_eq!(self.finish(queue, 1), [(9, 0)], "read of {len} bytes at {start}");
        self.get(0, len)
    }

    /// Writes `bytes` at byte `start` of the disk.
    fn write(&mut self, queue: usize, start: u64, bytes: &[u8], flags: ReqFlags) {
        self.put(0, bytes);
        let buffer = self.address(0);
        self.queues[queue].write(start, buffer, bytes.len(), 8, flags);
        assert_eq!(self.finish(queue, 1), [(8, 0)], "write at {start}");
    }

    /// The whole disk.
    fn read_all(&mut self) -> Vec<u8> {
        let step = 1 << 20;
        let piece = |start: u64| (start, to_usize((self.capacity - start).min(step)));
        let pieces: Vec<_> = (0..self.capacity).step_by(to_usize(step)).map(piece).collect();
        pieces.into_iter().flat_map(|(start, len)| self.read(0, start, len)).collect()
    }
}

/// The number and the result of a finished request.
#[expect(unsafe_code, reason = "blkio returns completions in uninitialised memory")]
fn result(done: MaybeUninit<Completion>) -> (usize, i32) {
    // SAFETY: `do_io` has filled the first n elements when it returns n, and `finish` checks that
    // n is the length of the array before any element comes here.
    let done = unsafe { done.assume_init() };
    (done.user_data, done.ret)
}

/// A small disk of 64 KiB clusters with a `blkio` device on it.
fn small(sleeping: i32, polling: i32) -> (Disk, Daemon, Device) {
    let disk = Disk::create(Shape::new(4 * MIB + 512, 64 * KIB).base(3 * MIB + 512));
    let mut daemon = disk.serve(&["--num-queues", "4"]);
    let device = Device::start(&mut daemon, sleeping, polling);
    (disk, daemon, device)
}

#[test]
fn blkio_reads_the_base_and_what_it_wrote() {
    let (disk, _daemon, mut device) = small(1, 0);
    assert_eq!(device.capacity, disk.shape.size);
    let mut want = disk.initial();
    assert_bytes(&device.read_all(), &want, "the disk before any write");
    for (sector, count) in [(1, 1), (100, 60), (6000, 500), (8192, 1)] {
        let data = pattern(1, sector, count * SECTOR);
        device.write(0, sector * 512, &data, ReqFlags::FUA);
        want[to_usize(sector) * SECTOR..][..data.len()].copy_from_slice(&data);
    }
    assert_bytes(&device.read_all(), &want, "the disk after writes");
    drop(device);
}

#[test]
fn blkio_zeroes_discards_and_flushes() {
    let (disk, daemon, mut device) = small(1, 0);
    let mut want = disk.initial();
    let queue = &mut device.queues[0];
    queue.write_zeroes(512, 130 * 512, 1, ReqFlags::empty());
    queue.write_zeroes(MIB, 128 * KIB, 2, ReqFlags::NO_UNMAP);
    queue.write_zeroes(2 * MIB - 512, 1024, 3, ReqFlags::FUA);
    queue.flush(4, ReqFlags::empty());
    let mut results = device.finish(0, 4);
    results.sort_unstable();
    assert_eq!(results, [(1, 0), (2, 0), (3, 0), (4, 0)]);
    for (start, len) in [(512, 130 * 512), (MIB, 128 * KIB), (2 * MIB - 512, 1024)] {
        want[to_usize(start)..to_usize(start + len)].fill(0);
    }
    assert_bytes(&device.read_all(), &want, "the disk after write-zeroes");
    device.queues[0].discard(0, 4 * MIB, 5, ReqFlags::empty());
    assert_eq!(device.finish(0, 1), [(5, 0)], "discard");
    let seen = device.read_all();
    for (at, piece) in seen.chunks(SECTOR).enumerate() {
        let old = &want[at * SECTOR..][..SECTOR];
        assert!(piece == old || piece == [0; SECTOR], "sector {at} after a discard");
    }
    drop(device);
    daemon.stop();
    assert_bytes(&disk.flat_view(), &seen, "the files afterwards");
}

#[test]
fn blkio_works_on_sleeping_and_polling_queues_at_once() {
    let (disk, _daemon, mut device) = small(2, 2);
    let mut want = disk.initial();
    let mut rng = Rng::new(8);
    for round in 0..30 {
        let mut counts = [0; 4];
        for slot in 0..32usize {
            // Each slot has its own 128 sectors of the disk and 64 KiB of memory.
            let queue = rng.index(4);
            let sector = to_u64(slot) * 128 * 2 + rng.pick(0..64);
            let data = pattern(round, sector, to_usize(rng.pick(1..64)) * SECTOR);
            device.put(slot << 16, &data);
            let buffer = device.address(slot << 16);
            let flags = ReqFlags::empty();
            device.queues[queue].write(sector * 512, buffer, data.len(), slot, flags);
            let at = to_usize(sector) * SECTOR;
            want[at..at + data.len()].copy_from_slice(&data);
            counts[queue] += 1;
        }
        for (queue, count) in counts.into_iter().enumerate() {
            for (slot, result) in device.finish(queue, count) {
                assert_eq!(result, 0, "write in slot {slot} on queue {queue}");
            }
        }
    }
    assert_bytes(&device.read_all(), &want, "the disk after four busy queues");
}

#[test]
fn blkio_connects_again_and_finds_its_data() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    let mut want = disk.initial();
    for round in 0..5 {
        let mut device = Device::start(&mut daemon, 1, 0);
        let data = pattern(round, 0, 4096);
        device.write(0, round * 70_144, &data, ReqFlags::empty());
        want[to_usize(round * 70_144)..][..4096].copy_from_slice(&data);
        assert_bytes(&device.read_all(), &want, "the disk in another connection");
    }
}
