//! A split virtqueue, device side: take heads from the available ring, publish used entries.
//!
//! Follows VIRTIO 1.3, 2.7. One used-index store per batch, notifications suppressed both ways
//! through the event index (or the flags without it). The ring's addresses are resolved once, when
//! the ring starts.
//!
//! Not here: descriptors (`chain`), eventfds (`vhost_user`).

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::atomic::{Ordering, fence};

use super::guest_memory::{GuestMap, RingArea, Unmapped};
use super::inflight::InflightQueue;

/// Bytes in front of the entries of both rings: flags and index, 16 bits each.
const RING_HEADER: usize = 4;
/// Bytes of one used entry: id and length, 32 bits each.
const USED_ENTRY: usize = 8;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (2.7.6): the driver wants no call.
const AVAIL_NO_INTERRUPT: u16 = 1;
/// `VIRTQ_USED_F_NO_NOTIFY` (2.7.8): we want no kick.
const USED_NO_NOTIFY: u16 = 1;

/// Where a virtqueue lies and how it is used.
#[derive(Debug, Clone, Copy)]
pub struct RingSetup {
    /// Number of entries: a power of two, 1 to 32768.
    pub size: u16,
    /// Guest physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest physical address of the available ring (driver area).
    pub available: u64,
    /// Guest physical address of the used ring (device area).
    pub used: u64,
    /// Whether VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// The next available entry to take.
    pub next_avail: u16,
    /// The next used entry to fill.
    pub next_used: u16,
}

/// Why a virtqueue cannot be used (any further).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The size is not a power of two from 1 to 32768.
    #[error("queue size {0} is not a power of two from 1 to 32768")]
    Size(u16),
    /// A part of it does not lie in guest memory, or not aligned.
    #[error("{part} cannot be used: {source}")]
    Address {
        /// Which part.
        part: &'static str,
        /// Where it should be.
        source: Unmapped,
    },
    /// The driver claims more available entries than the ring has.
    #[error("available index {index} is more than {size} ahead of {next}")]
    AvailIndex {
        /// What the driver wrote.
        index: u16,
        /// What we expected next.
        next: u16,
        /// Entries in the ring.
        size: u16,
    },
}

/// A running split virtqueue.
#[derive(Debug)]
pub struct SplitRing {
    /// Number of entries.
    size: u16,
    /// Descriptor table.
    descriptors: RingArea,
    /// Available ring.
    available: RingArea,
    /// Used ring.
    used: RingArea,
    /// Whether the event index is used.
    event_idx: bool,
    /// The next available entry to take.
    next_avail: u16,
    /// The driver's available index when it was last read. That line of memory is the driver's,
    /// and each look at it may cost a trip to another processor.
    seen_avail: u16,
    /// The next used entry to fill.
    next_used: u16,
    /// The used index as last published.
    published: u16,
    /// Offset of `used_event` in the available ring.
    used_event: usize,
    /// Offset of `avail_event` in the used ring.
    avail_event: usize,
    /// Where requests in flight are noted; `None` if nobody would take them over.
    inflight: Option<InflightQueue>,
    /// Heads that a process before this one had taken and not completed; taken first.
    replay: VecDeque<u16>,
}

/// Bytes of a ring of `size` entries of `entry` bytes, with its header and the event word.
fn ring_len(size: u16, entry: usize) -> usize {
    usize::from(size).saturating_mul(entry).saturating_add(RING_HEADER + 2)
}

impl SplitRing {
    /// Starts a ring.
    ///
    /// # Errors
    /// `Size` or `Address`.
    pub fn new(map: &Rc<GuestMap>, setup: RingSetup) -> Result<Self, RingError> {
        if !setup.size.is_power_of_two() || setup.size > 32768 {
            return Err(RingError::Size(setup.size));
        }
        let area = |part, address, len, alignment| {
            map.ring_area(address, len, alignment)
                .map_err(|source| RingError::Address { part, source })
        };
        let table_len = usize::from(setup.size).saturating_mul(16);
        let avail_len = ring_len(setup.size, 2);
        let used_len = ring_len(setup.size, USED_ENTRY);
        // 2.7: alignment 16, 2 and 4 of the three parts.
        Ok(Self {
            size: setup.size,
            descriptors: area("descriptor table", setup.descriptors, table_len, 16)?,
            available: area("available ring", setup.available, avail_len, 2)?,
            used: area("used ring", setup.used, used_len, 4)?,
            event_idx: setup.event_idx,
            next_avail: setup.next_avail,
            seen_avail: setup.next_avail,
            next_used: setup.next_used,
            published: setup.next_used,
            used_event: avail_len.saturating_sub(2),
            avail_event: used_len.saturating_sub(2),
            inflight: None,
            replay: VecDeque::new(),
        })
    }

    /// Notes requests in flight in `inflight` from now on, and takes those once more that it holds.
    /// Returns how many.
    ///
    /// The front end does not know what a process that died had taken, nor what it had done: it may
    /// start the ring where the used ring ends (QEMU) or where the available ring does
    /// (cloud-hypervisor). So the used ring alone says where it stands: what was in flight lies
    /// behind that in the available ring, then what was never taken.
    pub fn track(&mut self, mut inflight: InflightQueue) -> usize {
        let used_index = self.used.load_u16(2, Ordering::Acquire);
        let heads = inflight.recover(used_index);
        let count = heads.len();
        // There are at most as many as the ring has entries.
        let ahead = u16::try_from(count).unwrap_or_default();
        (self.next_used, self.published) = (used_index, used_index);
        self.next_avail = used_index.wrapping_add(ahead);
        self.seen_avail = self.next_avail;
        self.replay = heads.into();
        self.inflight = Some(inflight);
        count
    }

    /// Whether there are requests to be taken once more.
    #[must_use]
    pub fn has_replay(&self) -> bool {
        !self.replay.is_empty()
    }

    /// Number of entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The descriptor table.
    #[must_use]
    pub fn descriptors(&self) -> &RingArea {
        &self.descriptors
    }

    /// The next available and used entries, for whoever goes on with this ring later.
    #[must_use]
    pub fn indices(&self) -> (u16, u16) {
        (self.next_avail, self.next_used)
    }

    /// Position of entry `index` of a ring whose entries have `entry` bytes.
    fn position(&self, index: u16, entry: usize) -> usize {
        let slot = index & self.size.wrapping_sub(1);
        usize::from(slot).saturating_mul(entry).saturating_add(RING_HEADER)
    }

    /// Takes the head of the next available chain. It may be any number.
    ///
    /// # Errors
    /// `AvailIndex`: the ring is beyond use until it is set up again.
    pub fn pop(&mut self) -> Result<Option<u16>, RingError> {
        if let Some(head) = self.replay.pop_front() {
            return Ok(Some(head));
        }
        if self.seen_avail == self.next_avail {
            // Acquire: the entry and its descriptors were written before the index (2.7.13).
            let index = self.available.load_u16(2, Ordering::Acquire);
            let ahead = index.wrapping_sub(self.next_avail);
            if ahead > self.size {
                let (next, size) = (self.next_avail, self.size);
                return Err(RingError::AvailIndex { index, next, size });
            }
            if ahead == 0 {
                return Ok(None);
            }
            self.seen_avail = index;
        }
        let head = self.available.load_u16(self.position(self.next_avail, 2), Ordering::Relaxed);
        self.next_avail = self.next_avail.wrapping_add(1);
        if let Some(inflight) = &mut self.inflight {
            inflight.take(head);
        }
        Ok(Some(head))
    }

    /// Whether the driver has made a chain available that was not taken.
    #[must_use]
    pub fn has_available(&self) -> bool {
        self.has_replay() || self.available.load_u16(2, Ordering::Relaxed) != self.next_avail
    }

    /// Fills the next used entry: chain `head`, of whose device-writable part `len` bytes were
    /// written. The driver sees it after [`SplitRing::publish`].
    pub fn push_used(&mut self, head: u16, len: u32) {
        let position = self.position(self.next_used, USED_ENTRY);
        self.used.store_u32(position, u32::from(head));
        self.used.store_u32(position.saturating_add(4), len);
        self.next_used = self.next_used.wrapping_add(1);
        if let Some(inflight) = &mut self.inflight {
            inflight.complete(head);
        }
    }

    /// Shows the driver what [`SplitRing::push_used`] filled. Returns whether it wants a call.
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return false;
        }
        // Release: entries before index (2.7.8.2).
        self.used.store_u16(2, new, Ordering::Release);
        self.published = new;
        if let Some(inflight) = &mut self.inflight {
            inflight.published(new);
        }
        // The index must be visible before we look whether the driver wants to hear of it
        // (2.7.7.2), or both of us might conclude that the other one knows.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.available.load_u16(self.used_event, Ordering::Relaxed);
            // 2.7.7.2: a call is due if the index moved past `used_event`.
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.available.load_u16(0, Ordering::Relaxed) & AVAIL_NO_INTERRUPT == 0
        }
    }

    /// Asks the driver to kick for the next chain. Returns whether one is there already, so that
    /// the caller must not sleep.
    #[must_use]
    pub fn enable_kicks(&mut self) -> bool {
        if self.event_idx {
            self.used.store_u16(self.avail_event, self.next_avail, Ordering::Relaxed);
        } else {
            self.used.store_u16(0, 0, Ordering::Relaxed);
        }
        // The request to kick must be visible before we look for the last time (2.7.10).
        fence(Ordering::SeqCst);
        self.has_replay() || self.available.load_u16(2, Ordering::Acquire) != self.next_avail
    }

    /// Tells the driver that kicks are not needed for now. With the event index there is nothing
    /// to do: `avail_event` stays behind, and the driver kicks only when it passes it.
    pub fn disable_kicks(&mut self) {
        if !self.event_idx {
            self.used.store_u16(0, USED_NO_NOTIFY, Ordering::Relaxed);
        }
    }
}
