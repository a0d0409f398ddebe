//! The hot path allocates nothing: a request on whole clusters goes from the descriptor ring to
//! io_uring and back without a call of the allocator, once everything has reached its size.
//!
//! Counts the allocations of one thread while it serves requests as a queue's worker does.
//! Not here: requests that copy something up, fragmented reads, flushes.
#![expect(unsafe_code, reason = "a global allocator that counts")]

mod queue;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use addcow::executor::TaskPool;
use addcow::format::BitmapGeometry;
use addcow::image::allocation::AllocationMap;
use addcow::image::chain::Chain;
use addcow::image::{Image, ImageState};
use addcow::storage::Storage;
use addcow::storage::host_file::{Access, CacheMode, HostFile};
use addcow::storage::uring::Ring;
use addcow::units::ClusterSize;
use addcow::virtio::request::Used;

use queue::{BLOCK, Queue, READ, SLOTS, WRITE};

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

/// Size of the disk in bytes.
const DISK: u64 = 64 << 20;

/// Serves requests of `kind` on blocks 0, 1, 2, ... of `image` and returns how many allocations the
/// last three quarters of them made.
fn allocations(ring: &Ring, image: Image<impl Storage>, kind: u32) -> u64 {
    let mut queue = Queue::new();
    // What is done more than without it allocates nothing either.
    queue.track();
    let device = queue::device(image);
    let mut pool = TaskPool::new(usize::from(SLOTS), Box::new(|| {}));
    let mut free: Vec<u16> = (0..SLOTS).collect();
    let blocks = DISK / BLOCK;
    let (mut issued, mut done, mut before) = (0_u64, 0_u64, 0);
    while done < blocks {
        if issued == blocks / 4 && before == 0 {
            before = COUNT.get();
        }
        while issued < blocks
            && let Some(slot) = free.pop()
        {
            queue.offer(slot, kind, issued);
            let head = queue.virtqueue.pop().unwrap().unwrap();
            let chain = queue.walk(head);
            issued += 1;
            if let Some(used) = pool.start(device.serve(chain)) {
                finish(&mut queue, &mut free, used);
                // A driver uses a slot again when it has seen the answer.
                queue.virtqueue.publish();
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
            finish(&mut queue, &mut free, used);
            done += 1;
        });
        queue.virtqueue.publish();
    }
    COUNT.get() - before
}

/// Ends a request that was answered: its slot is free again.
fn finish(queue: &mut Queue, free: &mut Vec<u16>, used: Used) {
    let slot = queue::slot_of(used.head);
    assert_eq!(queue.status(slot), 0, "a request failed");
    free.push(slot);
    queue.virtqueue.push_used(used.head, used.len);
}

/// The fewest allocations of three runs. A busy host sometimes cuts a transfer short, and what is
/// left of that is carried out by a part that does allocate.
fn fewest(run: impl FnMut() -> u64) -> u64 {
    std::iter::repeat_with(run).take(3).min().unwrap()
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
    for kind in [WRITE, READ] {
        let run = || {
            let state = Arc::new(ImageState::raw(DISK, true));
            allocations(&ring, Image::new(state, storage.clone(), None, None), kind)
        };
        assert_eq!(fewest(run), 0, "request type {kind}");
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
    for kind in [WRITE, READ] {
        let run = || {
            let state = Arc::new(ImageState::raw(DISK, true));
            allocations(&ring, Image::new(state, storage.clone(), None, None), kind)
        };
        assert_eq!(fewest(run), 0, "request type {kind}");
    }
}

#[test]
fn first_writes_of_whole_clusters_allocate_nothing() {
    let ring = Ring::new().unwrap();
    let geometry = BitmapGeometry::new(ClusterSize::from_bits(12).unwrap(), DISK).unwrap();
    let run = || {
        let map = AllocationMap::empty(&geometry).unwrap();
        let state = Arc::new(ImageState::add_cow(geometry, map, DISK, true));
        let backing = Chain::raw(raw_file(&ring), DISK);
        let image = Image::new(Arc::clone(&state), raw_file(&ring), None, Some(backing));
        let count = allocations(&ring, image, WRITE);
        assert_eq!(state.allocation().count(), Some(DISK / BLOCK), "every cluster was written");
        count
    };
    assert_eq!(fewest(run), 0);
}

#[test]
fn reads_from_a_raw_backing_file_allocate_nothing() {
    let ring = Ring::new().unwrap();
    let geometry = BitmapGeometry::new(ClusterSize::from_bits(12).unwrap(), DISK).unwrap();
    let run = || {
        let map = AllocationMap::empty(&geometry).unwrap();
        let state = Arc::new(ImageState::add_cow(geometry, map, DISK, true));
        let backing = Chain::raw(raw_file(&ring), DISK);
        let image = Image::new(state, raw_file(&ring), None, Some(backing));
        allocations(&ring, image, READ)
    };
    assert_eq!(fewest(run), 0);
}

#[test]
fn the_counter_counts() {
    let before = COUNT.get();
    drop(std::hint::black_box(Box::new(1_u64)));
    assert_eq!(COUNT.get(), before + 1);
}
