//! A split virtqueue seen from the driver's side, legal or not.
//!
//! Follows VIRTIO 1.3, 2.7: descriptor table, available ring, used ring, indirect tables and
//! notification suppression with flags or with event indices. It kicks only when the device asks
//! for it and sleeps until the device calls, so a lost notification of either direction fails the
//! test. Nothing is checked on the way in: a chain may be as broken as a test wants it.
//!
//! Not here: what the bytes in a chain mean (see `request`).

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::mem::Memory;
use super::{TIMEOUT, to_u32};

/// Descriptor flag: the chain goes on at `next`.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device may write here.
pub const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;
/// Bytes in a descriptor.
pub const DESC_SIZE: usize = 16;

/// One descriptor as it lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Desc {
    /// Guest-physical address of the buffer.
    pub addr: u64,
    /// Length of the buffer in bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`] and [`INDIRECT`], or nonsense.
    pub flags: u16,
    /// Index of the next descriptor when [`NEXT`] is set.
    pub next: u16,
}

impl Desc {
    /// The sixteen bytes of the descriptor.
    pub fn bytes(self) -> [u8; DESC_SIZE] {
        let mut bytes = [0; DESC_SIZE];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }

    /// The descriptor that these sixteen bytes are.
    pub fn parse(bytes: &[u8]) -> Self {
        Self {
            addr: u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")),
            len: u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes")),
            flags: u16::from_le_bytes(bytes[12..14].try_into().expect("two bytes")),
            next: u16::from_le_bytes(bytes[14..16].try_into().expect("two bytes")),
        }
    }
}

/// A buffer of a well-formed chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address.
    pub addr: u64,
    /// Length in bytes; may be 0.
    pub len: u32,
    /// Whether the device may write it.
    pub writable: bool,
}

/// An entry that the device put on the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Head of the chain.
    pub head: u16,
    /// Bytes that the device says it wrote.
    pub len: u32,
}

/// The descriptors of `buffers` in `slots`, each pointing at the next slot.
pub fn chain(buffers: &[Buffer], slots: &[u16]) -> Vec<Desc> {
    let link = |(at, buffer): (usize, &Buffer)| {
        let next = slots.get(at + 1).filter(|_| at + 1 < buffers.len());
        let flags = if buffer.writable { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
        Desc { addr: buffer.addr, len: buffer.len, flags, next: next.copied().unwrap_or(0) }
    };
    buffers.iter().enumerate().map(link).collect()
}

/// One virtqueue.
#[derive(Debug)]
pub struct Ring {
    /// The memory it lies in.
    mem: Arc<Memory>,
    /// Entries in the ring.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub desc: u64,
    /// Guest-physical address of the available ring.
    pub avail: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
    /// Where the device is told about new chains.
    pub kick: EventFd,
    /// Where the device tells about finished ones.
    pub call: EventFd,
    /// Waits for `call`.
    epoll: Epoll,
    /// Whether notifications are governed by event indices.
    event_idx: bool,
    /// Index of the next chain on the available ring.
    next_avail: u16,
    /// `next_avail` at the last decision about a kick.
    kicked: u16,
    /// Index of the next entry to take from the used ring.
    next_used: u16,
    /// Free descriptors, in the order in which they are taken.
    free: VecDeque<u16>,
    /// Descriptors of the chains that the device has.
    pub outstanding: HashMap<u16, Vec<u16>>,
}

impl Ring {
    /// A ring of `size` entries whose indices begin at `start`, not yet known to the device.
    pub fn new(mem: &Arc<Memory>, size: u16, start: u16, event_idx: bool) -> Self {
        let entries = usize::from(size);
        let desc = mem.alloc_filled(entries * DESC_SIZE, 0);
        let avail = mem.alloc_filled(6 + 2 * entries, 0);
        let used = mem.alloc_filled(6 + 8 * entries, 0);
        let call = EventFd::new(EFD_NONBLOCK).expect("a call descriptor");
        let epoll = Epoll::new().expect("an epoll descriptor");
        let event = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, call.as_raw_fd(), event).expect("watch the call");
        // Every third descriptor first, so that the descriptors of a chain are not neighbours.
        let free = (0..3).flat_map(|first| (first..size).step_by(3)).collect();
        let ring = Self {
            mem: Arc::clone(mem),
            size,
            desc,
            avail,
            used,
            kick: EventFd::new(EFD_NONBLOCK).expect("a kick descriptor"),
            call,
            epoll,
            event_idx,
            next_avail: start,
            kicked: start,
            next_used: start,
            free,
            outstanding: HashMap::new(),
        };
        // As a ring looks that has run until now: both sides wait for the next entry.
        mem.store_u16(avail + 2, start);
        mem.store_u16(avail + 4 + 2 * u64::from(size), start);
        mem.store_u16(used + 2, start);
        mem.store_u16(used + 4 + 8 * u64::from(size), start);
        ring
    }

    /// Forgets everything and begins again at index `start`, as a reset driver does.
    pub fn restart(&mut self, start: u16) {
        let fresh = Self::new(&self.mem, self.size, start, self.event_idx);
        *self = fresh;
    }

    /// How many descriptors are free.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// The index of the next chain on the available ring.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// How far the device has come with the used ring.
    pub fn device_index(&self) -> u16 {
        self.mem.load_u16(self.used + 2)
    }

    /// Writes descriptor `index` of the table; for chains made by hand.
    pub fn put(&self, index: u16, desc: Desc) {
        self.mem.write(self.desc + 16 * u64::from(index), &desc.bytes());
    }

    /// Puts `head` on the available ring without a kick.
    pub fn publish(&mut self, head: u16) {
        self.outstanding.entry(head).or_default();
        self.publish_unknown(head);
    }

    /// As [`Ring::publish`], but nothing is expected to come back for it.
    pub fn publish_unknown(&mut self, head: u16) {
        let slot = u64::from(self.next_avail % self.size);
        self.mem.write(self.avail + 4 + 2 * slot, &head.to_le_bytes());
        self.next_avail = self.next_avail.wrapping_add(1);
        self.mem.store_u16(self.avail + 2, self.next_avail);
    }

    /// Puts a chain of `buffers` on the ring without a kick and returns its head.
    pub fn add(&mut self, buffers: &[Buffer]) -> u16 {
        assert!(buffers.len() <= self.free.len(), "no free descriptors for {}", buffers.len());
        let slots: Vec<u16> = self.free.drain(..buffers.len()).collect();
        for (slot, desc) in slots.iter().zip(chain(buffers, &slots)) {
            self.put(*slot, desc);
        }
        let head = slots[0];
        self.outstanding.insert(head, slots);
        self.publish(head);
        head
    }

    /// As [`Ring::add`] with the descriptors in an indirect table.
    pub fn add_indirect(&mut self, buffers: &[Buffer]) -> u16 {
        let slots: Vec<u16> = (0..).take(buffers.len()).collect();
        let table: Vec<u8> = chain(buffers, &slots).into_iter().flat_map(Desc::bytes).collect();
        self.add_table(&table, 0)
    }

    /// A chain that is one indirect descriptor for `table`, with `flags` besides [`INDIRECT`].
    pub fn add_table(&mut self, table: &[u8], flags: u16) -> u16 {
        let addr = self.mem.buffer(table.len().next_multiple_of(DESC_SIZE));
        self.mem.write(addr, table);
        let head = self.free.pop_front().expect("a free descriptor");
        let len = to_u32(table.len());
        self.put(head, Desc { addr, len, flags: INDIRECT | flags, next: 0 });
        self.outstanding.insert(head, vec![head]);
        self.publish(head);
        head
    }

    /// Kicks if the device wants to be kicked (VIRTIO 1.3, 2.7.13.4.1).
    pub fn kick(&mut self) {
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self.mem.load_u16(self.used + 4 + 8 * u64::from(self.size));
            let passed = self.next_avail.wrapping_sub(event).wrapping_sub(1);
            passed < self.next_avail.wrapping_sub(self.kicked)
        } else {
            self.mem.load_u16(self.used) & 1 == 0
        };
        self.kicked = self.next_avail;
        if wanted {
            self.kick_always();
        }
    }

    /// Kicks whether the device wants it or not.
    pub fn kick_always(&self) {
        self.kick.write(1).expect("kick");
    }

    /// Takes an entry from the used ring, if there is one.
    ///
    /// # Panics
    /// If the device returns a chain that it does not have.
    pub fn pop(&mut self) -> Option<Used> {
        if self.mem.load_u16(self.used + 2) == self.next_used {
            return None;
        }
        let entry = self.used + 4 + 8 * u64::from(self.next_used % self.size);
        let (id, len) = (self.mem.load_u32(entry), self.mem.load_u32(entry + 4));
        self.next_used = self.next_used.wrapping_add(1);
        let head = u16::try_from(id).expect("the id on the used ring is a descriptor index");
        let slots = self.outstanding.remove(&head);
        self.free.extend(slots.unwrap_or_else(|| panic!("chain {head} came back uncalled for")));
        Some(Used { head, len })
    }

    /// Waits for the next entry of the used ring, asleep until the device calls.
    pub fn wait(&mut self) -> Used {
        self.wait_within(TIMEOUT).unwrap_or_else(|| {
            panic!(
                "nothing on the used ring within {TIMEOUT:?}: {} chains out, available index {}, \
                 used index {}",
                self.outstanding.len(),
                self.next_avail,
                self.next_used
            )
        })
    }

    /// The next entry of the used ring if it comes within `limit`.
    ///
    /// # Panics
    /// If an entry is there at the end although the device has not called.
    pub fn wait_within(&mut self, limit: Duration) -> Option<Used> {
        let end = Instant::now() + limit;
        loop {
            if let Some(used) = self.pop() {
                return Some(used);
            }
            // VIRTIO 1.3, 2.7.10: with event indices the driver names the entry it waits for.
            self.mem.store_u16(self.avail + 4 + 2 * u64::from(self.size), self.next_used);
            fence(Ordering::SeqCst);
            if let Some(used) = self.pop() {
                return Some(used);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || !self.wait_for_call(left) {
                assert!(self.pop().is_none(), "a used entry came without a call");
                return None;
            }
        }
    }

    /// Waits until the device calls; false when it does not within `limit`.
    pub fn wait_for_call(&self, limit: Duration) -> bool {
        let mut events = [EpollEvent::default()];
        let millis = i32::try_from(limit.as_millis()).expect("a short wait").max(1);
        let ready = loop {
            match self.epoll.wait(millis, &mut events) {
                // A test that was stopped and continued goes on waiting.
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                other => break other.expect("wait for a call"),
            }
        };
        if ready > 0 {
            let _ = self.call.read();
        }
        ready > 0
    }

    /// Asks the device not to call (VIRTIO 1.3, 2.7.7: only without event indices).
    pub fn mute(&self, mute: bool) {
        self.mem.store_u16(self.avail, u16::from(mute));
    }

    /// Guest-physical address of the used ring's entry for index `at`.
    pub fn used_entry(&self, at: u16) -> u64 {
        self.used + 4 + 8 * u64::from(at % self.size)
    }

    /// The available ring as bytes, to see that the device did not touch it.
    pub fn driver_area(&self) -> Vec<u8> {
        let entries = usize::from(self.size);
        let mut bytes = self.mem.read(self.desc, entries * DESC_SIZE);
        bytes.extend(self.mem.read(self.avail, 6 + 2 * entries));
        bytes
    }
}
