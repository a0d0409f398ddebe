//! The hot path allocates nothing: a request on whole clusters goes from the descriptor ring to
//! io_uring and back without a call of the allocator, once everything has reached its size.
//!
//! Counts the allocations of one thread while it serves requests as a queue's worker does.
//! Not here: requests that copy something up, fragmented reads, flushes.
#![expect(unsafe_code, reason = "a global allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use addcow::executor::TaskPool;
use addcow::format::BitmapGeometry;
use addcow::image::allocation::AllocationMap;
use addcow::image::chain::Chain;
use addcow::image::{Image, ImageState};
use addcow::storage::buffer::IoMemory;
use addcow::storage::host_file::{Access, CacheMode, HostFile};
use addcow::storage::uring::Ring;
use addcow::units::ClusterSize;
use addcow::virtio::chain;
use addcow::virtio::config::DeviceConfig;
use addcow::virtio::device::{BlockDevice, DeviceState};
use addcow::virtio::guest_memory::GuestMap;
use addcow::virtio::ring::{RingSetup, SplitRing};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

thread_local! {
    /// Allocations of this thread.
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, counting.
struct Counting;

// SAFETY: every call is passed on to the system's allocator with the caller's own arguments.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.with(|count| count.set(count.get() + 1));
        // SAFETY: as the caller promised us.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promised us.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Size of the disk in bytes, and of a request.
const DISK: u64 = 64 << 20;
const BLOCK: u64 = 4096;
/// Requests in flight, one chain of three descriptors each.
const DEPTH: u16 = 32;
/// Entries of the ring.
const RING: u16 = 128;

/// Guest addresses: descriptors, available ring, used ring, headers, status bytes, data.
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const HEADERS: u64 = 0x4000;
const STATUS: u64 = 0x5000;
const DATA: u64 = 0x10_0000;

/// Puts the 16 bytes of a descriptor.
fn descriptor(memory: &GuestMemoryMmap<()>, index: u16, parts: (u64, u32, u16)) {
    let (address, len, flags) = parts;
    let at = GuestAddress(DESCRIPTORS + u64::from(index) * 16);
    memory.write_obj(address.to_le(), at).unwrap();
    memory.write_obj(len.to_le(), GuestAddress(at.0 + 8)).unwrap();
    memory.write_obj(flags.to_le(), GuestAddress(at.0 + 12)).unwrap();
    memory.write_obj((index + 1).to_le(), GuestAddress(at.0 + 14)).unwrap();
}

/// Makes the chain of request `slot`: `kind` 0 reads, 1 writes block `block`.
fn request(memory: &GuestMemoryMmap<()>, slot: u16, kind: u32, block: u64) -> u16 {
    let (head, number) = (slot * 3, u64::from(slot));
    let header = HEADERS + number * 16;
    memory.write_obj(kind.to_le(), GuestAddress(header)).unwrap();
    memory.write_obj((block * BLOCK / 512).to_le(), GuestAddress(header + 8)).unwrap();
    let data_flags = if kind == 0 { 3 } else { 1 };
    descriptor(memory, head, (header, 16, 1));
    descriptor(memory, head + 1, (DATA + number * BLOCK, 4096, data_flags));
    descriptor(memory, head + 2, (STATUS + number, 1, 2));
    head
}

/// Serves requests of `kind` on blocks 0, 1, 2, ... of `image` and returns how many allocations the
/// last three quarters of them made.
fn allocations(ring: &Ring, image: Image<impl addcow::storage::Storage>, kind: u32) -> u64 {
    let ranges = [(GuestAddress(0), 4 << 20)];
    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap());
    let map = GuestMap::new(Arc::clone(&memory));
    let owner = map.owner();
    let setup = RingSetup {
        size: RING,
        descriptors: DESCRIPTORS,
        available: AVAILABLE,
        used: USED,
        event_idx: true,
        next_avail: 0,
        next_used: 0,
    };
    let mut virtqueue = SplitRing::new(&map, setup).unwrap();
    let config = DeviceConfig { num_queues: 1, queue_size: RING, serial: Vec::new() };
    let state = Arc::new(DeviceState::new(config, Arc::clone(image.state()), true));
    state.set_features(u64::MAX);
    let device = BlockDevice::new(state, image);
    let mut pool = TaskPool::new(usize::from(DEPTH), Box::new(|| {}));
    let mut lists: Vec<Rc<IoMemory>> = (0..DEPTH).map(|_| Rc::default()).collect();
    let mut free: Vec<u16> = (0..DEPTH).collect();
    let blocks = DISK / BLOCK;
    let (mut issued, mut done, mut before) = (0_u64, 0_u64, 0);
    while done < blocks {
        if issued == blocks / 4 && before == 0 {
            before = COUNT.get();
        }
        while issued < blocks
            && let Some(slot) = free.pop()
        {
            let head = request(&memory, slot, kind, issued);
            let index = u16::try_from(issued % 65536).unwrap();
            let entry = AVAILABLE + 4 + u64::from(index % RING) * 2;
            memory.write_obj(head.to_le(), GuestAddress(entry)).unwrap();
            let next = index.wrapping_add(1);
            memory.store(next.to_le(), GuestAddress(AVAILABLE + 2), Ordering::Release).unwrap();
            let head = virtqueue.pop().unwrap().unwrap();
            let table = (virtqueue.descriptors(), virtqueue.size());
            let list = &mut lists[usize::from(slot)];
            let chain = chain::walk(&map, &owner, table, true, head, list).unwrap();
            issued += 1;
            if let Some(used) = pool.start(device.serve(chain)) {
                free.push(used.head / 3);
                virtqueue.push_used(used.head, used.len);
                done += 1;
            }
            if issued == blocks / 4 {
                break;
            }
        }
        if ring.in_flight() > 0 {
            ring.submit_and_wait().unwrap();
        }
        ring.reap(|_| {});
        pool.poll_ready(|used| {
            let status = STATUS + u64::from(used.head / 3);
            let status: u8 = memory.read_obj(GuestAddress(status)).unwrap();
            assert_eq!(status, 0, "a request failed");
            free.push(used.head / 3);
            virtqueue.push_used(used.head, used.len);
            done += 1;
        });
        virtqueue.publish();
    }
    COUNT.get() - before
}

/// A raw image of the disk's size on a ring.
fn raw_file(ring: &Rc<Ring>) -> addcow::storage::uring::UringStorage {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(DISK).unwrap();
    let host = HostFile::open(file.path(), Access::ReadWrite, CacheMode::Buffered).unwrap();
    ring.storage(Arc::new(host))
}

#[test]
fn reads_and_writes_of_allocated_clusters_allocate_nothing() {
    let ring = Ring::new().unwrap();
    let storage = raw_file(&ring);
    for kind in [1, 0] {
        let state = Arc::new(ImageState::raw(DISK, true));
        let image = Image::new(state, storage.clone(), None, None);
        assert_eq!(allocations(&ring, image, kind), 0, "request type {kind}");
    }
}

#[test]
fn reads_and_writes_of_mapped_files_allocate_nothing() {
    let ring = Ring::new().unwrap();
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    std::fs::write(file.path(), vec![1; usize::try_from(DISK).unwrap()]).unwrap();
    let host = HostFile::open(file.path(), Access::ReadWrite, CacheMode::Buffered).unwrap();
    host.map();
    assert!(host.mapping().is_some());
    let storage = ring.storage(Arc::new(host));
    for kind in [1, 0] {
        let state = Arc::new(ImageState::raw(DISK, true));
        let image = Image::new(state, storage.clone(), None, None);
        assert_eq!(allocations(&ring, image, kind), 0, "request type {kind}");
    }
}

#[test]
fn first_writes_of_whole_clusters_allocate_nothing() {
    let ring = Ring::new().unwrap();
    let geometry = BitmapGeometry::new(ClusterSize::from_bits(12).unwrap(), DISK).unwrap();
    let map = AllocationMap::empty(&geometry).unwrap();
    let state = Arc::new(ImageState::add_cow(geometry, map, DISK, true));
    let backing = Chain::raw(raw_file(&ring), DISK);
    let image = Image::new(Arc::clone(&state), raw_file(&ring), None, Some(backing));
    assert_eq!(allocations(&ring, image, 1), 0);
    assert_eq!(state.allocation().count(), Some(DISK / BLOCK), "every cluster was written");
}

#[test]
fn reads_from_a_raw_backing_file_allocate_nothing() {
    let ring = Ring::new().unwrap();
    let geometry = BitmapGeometry::new(ClusterSize::from_bits(12).unwrap(), DISK).unwrap();
    let map = AllocationMap::empty(&geometry).unwrap();
    let state = Arc::new(ImageState::add_cow(geometry, map, DISK, true));
    let backing = Chain::raw(raw_file(&ring), DISK);
    let image = Image::new(state, raw_file(&ring), None, Some(backing));
    assert_eq!(allocations(&ring, image, 0), 0);
}

#[test]
fn the_counter_counts() {
    let before = COUNT.get();
    drop(std::hint::black_box(Box::new(1_u64)));
    assert_eq!(COUNT.get(), before + 1);
}
