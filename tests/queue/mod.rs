//! One virtqueue in memory of this process: what drives the device's code in one thread, without a
//! front end, a socket or a daemon. Shared by `allocations.rs` and the benchmark `loops`.
//!
//! Promises: once every slot was used, no call allocates. A status byte that reads 0 was written
//! by the device: [`Queue::offer`] makes it something else first.
//!
//! Not here: chains of any other shape than header, one block, status byte (`tests/common`).

#![allow(dead_code, reason = "each program uses its own part of it")]

use std::any::Any;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use addcow::image::Image;
use addcow::storage::Storage;
use addcow::storage::buffer::IoMemory;
use addcow::storage::shared_memory::SharedMemory;
use addcow::virtio::chain::{self, Chain};
use addcow::virtio::config::DeviceConfig;
use addcow::virtio::device::{BlockDevice, DeviceState};
use addcow::virtio::guest_memory::{GuardedMemory, GuestMap};
use addcow::virtio::inflight::InflightQueue;
use addcow::virtio::ring::{RingSetup, SplitRing};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Bytes of a request's data.
pub const BLOCK: u64 = 4096;
/// Slots for requests, each with a chain of three descriptors of its own.
pub const SLOTS: u16 = 32;
/// Request type of a read (VIRTIO 1.3, 5.2.6).
pub const READ: u32 = 0;
/// Request type of a write.
pub const WRITE: u32 = 1;

/// Entries of the ring.
const RING: u16 = 128;

/// Guest address of the descriptor table.
const DESCRIPTORS: u64 = 0x1000;
/// Guest address of the available ring.
const AVAILABLE: u64 = 0x2000;
/// Guest address of the used ring.
const USED: u64 = 0x3000;
/// Guest address of the request headers, 16 bytes for each slot.
const HEADERS: u64 = 0x4000;
/// Guest address of the status bytes, one for each slot.
const STATUS: u64 = 0x5000;
/// Guest address of the data, a block for each slot.
const DATA: u64 = 0x10_0000;

/// `VIRTQ_DESC_F_NEXT` (2.7.5).
const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`.
const DEVICE_WRITES: u16 = 2;

/// The slot of the chain that begins at descriptor `head`.
pub fn slot_of(head: u16) -> u16 {
    head / 3
}

/// A device with one queue, write-back, on `image`.
pub fn device<S: Storage>(image: Image<S>) -> BlockDevice<S> {
    let config = DeviceConfig { num_queues: 1, queue_size: RING, serial: Vec::new() };
    let state = Arc::new(DeviceState::new(config, Arc::clone(image.state()), true));
    state.set_features(u64::MAX);
    BlockDevice::new(state, image)
}

/// A virtqueue, both its sides.
pub struct Queue {
    /// Guest memory as the driver sees it.
    memory: Arc<GuestMemoryMmap<()>>,
    /// Guest memory as the device sees it.
    map: Rc<GuestMap>,
    /// The map as the owner of segments.
    owner: Rc<dyn Any>,
    /// A segment list for each slot.
    lists: Vec<Rc<IoMemory>>,
    /// The driver's index of the available ring.
    next_avail: u16,
    /// The device's side of the ring.
    pub virtqueue: SplitRing,
}

impl Queue {
    /// An empty queue.
    pub fn new() -> Self {
        let ranges = [(GuestAddress(0), 4 << 20)];
        let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap());
        let map = GuestMap::new(GuardedMemory::new(Arc::clone(&memory)).expect("guards"));
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
        let virtqueue = SplitRing::new(&map, setup).unwrap();
        let lists = (0..SLOTS).map(|_| Rc::default()).collect();
        Self { memory, map, owner, lists, next_avail: 0, virtqueue }
    }

    /// Device: notes its requests in flight in memory that another process could take over.
    pub fn track(&mut self) {
        let words = InflightQueue::words(RING);
        let memory = SharedMemory::create("inflight", words).expect("a memory file");
        let taken = self.virtqueue.track(InflightQueue::new(Arc::new(memory), 0, RING));
        assert_eq!(taken, 0, "nothing was in flight");
    }

    /// Driver: makes the chain of `slot`, a request of type `kind` for block `block` of the disk,
    /// and puts it on the available ring.
    pub fn offer(&mut self, slot: u16, kind: u32, block: u64) {
        let (head, number) = (slot * 3, u64::from(slot));
        let (header, status) = (HEADERS + number * 16, STATUS + number);
        self.memory.write_obj(kind.to_le(), GuestAddress(header)).unwrap();
        self.memory.write_obj((block * BLOCK / 512).to_le(), GuestAddress(header + 8)).unwrap();
        self.memory.write_obj(0xff_u8, GuestAddress(status)).unwrap();
        let direction = if kind == READ { DEVICE_WRITES } else { 0 };
        self.descriptor(head, (header, 16, NEXT));
        self.descriptor(head + 1, (DATA + number * BLOCK, 4096, direction | NEXT));
        self.descriptor(head + 2, (status, 1, DEVICE_WRITES));
        let entry = AVAILABLE + 4 + u64::from(self.next_avail % RING) * 2;
        self.memory.write_obj(head.to_le(), GuestAddress(entry)).unwrap();
        self.next_avail = self.next_avail.wrapping_add(1);
        let index = GuestAddress(AVAILABLE + 2);
        self.memory.store(self.next_avail.to_le(), index, Ordering::Release).unwrap();
    }

    /// Driver: puts the 16 bytes of a descriptor, whose next one is its neighbour.
    fn descriptor(&self, index: u16, (address, len, flags): (u64, u32, u16)) {
        let at = GuestAddress(DESCRIPTORS + u64::from(index) * 16);
        self.memory.write_obj(address.to_le(), at).unwrap();
        self.memory.write_obj(len.to_le(), GuestAddress(at.0 + 8)).unwrap();
        self.memory.write_obj(flags.to_le(), GuestAddress(at.0 + 12)).unwrap();
        self.memory.write_obj((index + 1).to_le(), GuestAddress(at.0 + 14)).unwrap();
    }

    /// Driver: the status byte of `slot`.
    pub fn status(&self, slot: u16) -> u8 {
        self.memory.read_obj(GuestAddress(STATUS + u64::from(slot))).unwrap()
    }

    /// Driver: the index of the used ring, as the device published it.
    pub fn used_index(&self) -> u16 {
        u16::from_le(self.memory.load(GuestAddress(USED + 2), Ordering::Acquire).unwrap())
    }

    /// Driver: head and length of the used ring's entry for index `at`.
    pub fn used_entry(&self, at: u16) -> (u32, u32) {
        let entry = USED + 4 + u64::from(at % RING) * 8;
        let word = |at| u32::from_le(self.memory.read_obj(GuestAddress(at)).unwrap());
        (word(entry), word(entry + 4))
    }

    /// Device: walks the chain at `head`.
    pub fn walk(&mut self, head: u16) -> Chain {
        let table = (self.virtqueue.descriptors(), self.virtqueue.size());
        let list = &mut self.lists[usize::from(slot_of(head))];
        chain::walk(&self.map, &self.owner, table, true, head, list).unwrap()
    }
}
