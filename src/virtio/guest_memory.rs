//! Guest memory: from guest addresses to memory segments, and the words of the rings.
//!
//! A [`GuestMap`] keeps the guest's memory mapped for as long as it lives, and everything handed
//! out keeps the map. There is never a Rust reference to guest memory: the guest writes it whenever
//! it likes. Ring words are accessed as atomics, everything else is copied.
//!
//! The front end can also take pages away, by cutting the files behind them. To the kernel that is
//! an error of the I/O; for our own accesses [`GuardedMemory`] puts zeros in their place, and
//! whoever acts on what it has read asks [`GuestMap::has_lost_pages`] before.
//!
//! Not here: what the bytes mean (`ring`, `chain`).
#![expect(
    unsafe_code,
    reason = "turns guest addresses into pointers; each lies in a region that the map keeps mapped"
)]

use std::any::Any;
use std::cell::Cell;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use rustix::fs::fstatfs;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use crate::storage::buffer::{Purpose, Segment, prefetch};
use crate::storage::fault_guard::{self, FaultGuard};

/// File system type of huge pages (statfs(2), `HUGETLBFS_MAGIC`).
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// A guest address (or a range from it) that no memory region holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("guest address {address:#x} ({len} bytes) is not mapped")]
pub struct Unmapped {
    /// First guest physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u64,
}

/// One region of guest memory.
#[derive(Debug, Clone, Copy)]
struct Region {
    /// Guest physical address of its first byte.
    start: u64,
    /// Length in bytes.
    len: u64,
    /// Where it is mapped in this process.
    host: NonNull<u8>,
}

/// A guest's memory, of which pages may go missing without ending the process.
#[derive(Debug)]
pub struct GuardedMemory {
    /// One for each region of a file. Before the memory: they are dropped while it is still mapped.
    guards: Vec<FaultGuard>,
    /// Keeps the regions mapped.
    memory: Arc<GuestMemoryMmap<()>>,
}

impl GuardedMemory {
    /// Guards all of `memory`.
    ///
    /// # Errors
    /// If there are more regions than [`FaultGuard`] can take, or the host does not tell about a
    /// region's file.
    pub fn new(memory: Arc<GuestMemoryMmap<()>>) -> io::Result<Arc<Self>> {
        let guards = memory.iter().filter_map(guard).collect::<io::Result<_>>()?;
        Ok(Arc::new(Self { guards, memory }))
    }
}

/// Guards one region. Without a file there is nobody who could cut it, and nothing to guard.
fn guard(region: &GuestRegionMmap<()>) -> Option<io::Result<FaultGuard>> {
    let file = region.file_offset()?.file();
    Some(pages(region, file).and_then(|(range, page_size)| FaultGuard::of_memory(range, page_size)))
}

/// The addresses of the pages of a region of `file`, and their size in bytes.
fn pages(region: &GuestRegionMmap<()>, file: &File) -> io::Result<(Range<usize>, usize)> {
    let place = fstatfs(file)?;
    let page_size = match place.f_type {
        // A "block" is a page there (statfs(2)).
        HUGETLBFS_MAGIC => usize::try_from(place.f_bsize).map_err(io::Error::other)?,
        _ => rustix::param::page_size(),
    };
    let start = region.as_ptr().addr();
    let end = usize::try_from(region.len()).ok().and_then(|len| start.checked_add(len));
    let end = end.and_then(|end| end.checked_next_multiple_of(page_size));
    Ok((start..end.ok_or(io::ErrorKind::InvalidInput)?, page_size))
}

/// A guest's memory as one thread sees it.
#[derive(Debug)]
pub struct GuestMap {
    /// Regions by ascending guest address; they do not overlap.
    regions: Vec<Region>,
    /// Pages that were missing anywhere when it was last seen that none of ours is.
    missing: Cell<usize>,
    /// Keeps the regions mapped and guarded.
    memory: Arc<GuardedMemory>,
}

impl GuestMap {
    /// The map of `memory`.
    #[must_use]
    pub fn new(memory: Arc<GuardedMemory>) -> Rc<Self> {
        let mut regions: Vec<Region> = memory
            .memory
            .iter()
            .filter_map(|region| {
                let host = NonNull::new(region.as_ptr())?;
                Some(Region { start: region.start_addr().raw_value(), len: region.len(), host })
            })
            .collect();
        regions.sort_by_key(|region| region.start);
        Rc::new(Self { regions, missing: Cell::new(0), memory })
    }

    /// Whether a page was missing when somebody touched it here: zeros are in its place since.
    /// Costs one load while nothing is missing anywhere.
    #[must_use]
    pub fn has_lost_pages(&self) -> bool {
        let missing = fault_guard::missing_pages();
        if missing == self.missing.get() {
            return false;
        }
        let lost = self.memory.guards.iter().any(FaultGuard::has_faulted);
        if !lost {
            self.missing.set(missing);
        }
        lost
    }

    /// The contiguous memory from `address` on, at most `len` bytes of it.
    fn piece(&self, address: u64, len: u64) -> Option<Segment> {
        let after = self.regions.partition_point(|region| region.start <= address);
        let region = self.regions.get(after.checked_sub(1)?)?;
        let offset = address.checked_sub(region.start)?;
        let left = region.len.checked_sub(offset).filter(|left| *left > 0)?;
        let offset = usize::try_from(offset).ok()?;
        let len = usize::try_from(len.min(left)).ok()?;
        // SAFETY: `offset` is less than the region's length, so the result lies inside the mapping.
        let host = unsafe { region.host.add(offset) };
        // SAFETY: `len` bytes from there lie inside the region, which `memory` keeps mapped
        // readable and writable (the front end's regions are mapped PROT_READ|PROT_WRITE); whoever
        // takes the segment takes this map as its owner (see `segments` and `RingArea`).
        Some(unsafe { Segment::new(host, len) })
    }

    /// The memory of `len` bytes from guest address `address`, in several pieces where it runs over
    /// the border of regions. This map must be the owner given to the refill that takes them.
    ///
    /// The last item is an error if any byte is not guest memory.
    pub fn segments(
        &self,
        address: u64,
        len: u64,
    ) -> impl Iterator<Item = Result<Segment, Unmapped>> {
        let (mut at, mut left) = (Some(address), len);
        std::iter::from_fn(move || {
            if left == 0 {
                return None;
            }
            let Some(segment) = at.and_then(|at| self.piece(at, left)) else {
                left = 0;
                return Some(Err(Unmapped { address, len }));
            };
            let taken = segment.len() as u64;
            left = left.saturating_sub(taken);
            at = at.and_then(|at| at.checked_add(taken));
            Some(Ok(segment))
        })
    }

    /// All of guest memory, region by region. This map must be their owner.
    #[must_use]
    pub fn regions(&self) -> Vec<Segment> {
        self.regions.iter().filter_map(|region| self.piece(region.start, region.len)).collect()
    }

    /// This map as the owner of segments.
    #[must_use]
    pub fn owner(self: &Rc<Self>) -> Rc<dyn Any> {
        Rc::clone(self) as Rc<dyn Any>
    }

    /// Copies `N` bytes from guest address `address`, each fetched once.
    ///
    /// # Errors
    /// `Unmapped` if any byte is not guest memory.
    pub fn read<const N: usize>(&self, address: u64) -> Result<[u8; N], Unmapped> {
        let unmapped = Unmapped { address, len: N as u64 };
        if let Some(bytes) = self.piece(address, N as u64).and_then(Segment::first) {
            return Ok(bytes);
        }
        let mut bytes = [0; N];
        let mut rest = bytes.as_mut_slice();
        for segment in self.segments(address, N as u64) {
            let segment = segment?;
            let (now, later) = rest.split_at_mut_checked(segment.len()).ok_or(unmapped)?;
            segment.read_once(now);
            rest = later;
        }
        Ok(bytes)
    }

    /// The ring memory of `len` bytes at guest address `address`, which must be a multiple of
    /// `alignment`, a power of two, and must lie in one region.
    ///
    /// # Errors
    /// `Unmapped` if it does not.
    pub fn ring_area(
        self: &Rc<Self>,
        address: u64,
        len: usize,
        alignment: u64,
    ) -> Result<RingArea, Unmapped> {
        let segment = self
            .piece(address, len as u64)
            .filter(|segment| segment.len() == len && address.is_multiple_of(alignment))
            .filter(|segment| segment.address() as u64 & alignment.wrapping_sub(1) == 0)
            .ok_or(Unmapped { address, len: len as u64 })?;
        Ok(RingArea { start: segment.pointer(), len, _map: Rc::clone(self) })
    }
}

/// A piece of guest memory that holds a part of a virtqueue.
///
/// Accesses outside it, which only a bug of ours could ask for, read zero and write nothing.
#[derive(Debug)]
pub struct RingArea {
    /// First byte; aligned for the words that are accessed here.
    start: NonNull<u8>,
    /// Length in bytes.
    len: usize,
    /// Keeps it mapped.
    _map: Rc<GuestMap>,
}

impl RingArea {
    /// The address of a word of `size` bytes at `offset`, if it lies inside and is aligned.
    fn word(&self, offset: usize, size: usize) -> Option<NonNull<u8>> {
        let inside = offset.checked_add(size)? <= self.len && offset.is_multiple_of(size);
        // SAFETY: `offset + size` is at most the area's length, which is mapped.
        inside.then(|| unsafe { self.start.add(offset) })
    }

    /// Reads the little-endian 16-bit word at `offset` (a multiple of 2).
    #[must_use]
    pub fn load_u16(&self, offset: usize, order: Ordering) -> u16 {
        let Some(word) = self.word(offset, 2) else { return 0 };
        // SAFETY: the word is mapped for as long as `self` lives, and aligned: the area's start is
        // and `offset` is a multiple of 2. Everybody who shares it uses machine words.
        let word = unsafe { AtomicU16::from_ptr(word.as_ptr().cast()) };
        u16::from_le(word.load(order))
    }

    /// Writes the little-endian 16-bit word at `offset` (a multiple of 2).
    pub fn store_u16(&self, offset: usize, value: u16, order: Ordering) {
        let Some(word) = self.word(offset, 2) else { return };
        // SAFETY: as in `load_u16`.
        let word = unsafe { AtomicU16::from_ptr(word.as_ptr().cast()) };
        word.store(value.to_le(), order);
    }

    /// Writes the little-endian 32-bit word at `offset` (a multiple of 4), without ordering.
    pub fn store_u32(&self, offset: usize, value: u32) {
        let Some(word) = self.word(offset, 4) else { return };
        // SAFETY: as in `load_u16`, with 4 for 2.
        let word = unsafe { AtomicU32::from_ptr(word.as_ptr().cast()) };
        word.store(value.to_le(), Ordering::Relaxed);
    }

    /// Fetches entry `index` of a table of 16-byte entries into this processor's cache, for a
    /// reader that comes soon. Does nothing for an entry that is not there.
    pub fn prefetch_entry(&self, index: u16) {
        let offset = usize::from(index).saturating_mul(16);
        if let Some(address) = self.word(offset, 16) {
            prefetch(address, Purpose::Read);
        }
    }

    /// Copies the 16 bytes of entry `index` of a table of 16-byte entries, each byte once.
    #[must_use]
    pub fn entry(&self, index: u16) -> Option<[u8; 16]> {
        let offset = usize::from(index).checked_mul(16)?;
        let entry = (offset.checked_add(16)? <= self.len).then_some(offset)?;
        // SAFETY: `entry + 16` is at most the area's length, which is mapped.
        let entry = unsafe { self.start.add(entry) };
        // SAFETY: 16 mapped bytes; a volatile read is made once and never split into re-reads, so
        // the guest cannot show us two versions.
        Some(unsafe { entry.cast::<[u8; 16]>().read_volatile() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::buffer::{IoMemory, SegmentSink};
    use vm_memory::{Bytes, GuestAddress};

    /// Two regions that touch at 0x2000, and one further up.
    fn map() -> (Arc<GuestMemoryMmap<()>>, Rc<GuestMap>) {
        let ranges = [(0x1000, 0x1000), (0x2000, 0x1000), (0x8000, 0x1000)];
        let ranges = ranges.map(|(start, len)| (GuestAddress(start), len));
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        (Arc::clone(&memory), GuestMap::new(GuardedMemory::new(memory).unwrap()))
    }

    /// Pushes all pieces.
    fn push(
        sink: &mut SegmentSink<'_>,
        mut pieces: impl Iterator<Item = Result<Segment, Unmapped>>,
    ) -> Result<(), Unmapped> {
        pieces.try_for_each(|piece| piece.map(|piece| sink.push(piece)))
    }

    #[test]
    fn a_range_over_the_border_of_two_regions_becomes_two_segments() {
        let (memory, map) = map();
        memory.write_slice(b"abcdef", GuestAddress(0x1ffd)).unwrap();
        let mut list = IoMemory::default();
        list.refill(map.owner(), |sink| push(sink, map.segments(0x1ffd, 6))).unwrap();
        let buffer = crate::storage::IoBuffer::new(Rc::new(list));
        assert_eq!(buffer.segments().count(), 2);
        assert_eq!(buffer.to_vec(), b"abcdef");
        assert_eq!(&map.read::<6>(0x1ffd).unwrap(), b"abcdef");
    }

    #[test]
    fn addresses_outside_memory_are_refused() {
        let (_, map) = map();
        let mut list = IoMemory::default();
        for (address, len) in [(0, 1), (0x2fff, 2), (0x3000, 1), (0x9000, 1), (u64::MAX, 2)] {
            let result = list.refill(map.owner(), |sink| push(sink, map.segments(address, len)));
            assert_eq!(result, Err(Unmapped { address, len }));
        }
        assert!(map.read::<16>(0x2ff8).is_err());
    }

    #[test]
    fn ring_areas_must_be_aligned_and_in_one_region() {
        let (_, map) = map();
        assert!(map.ring_area(0x1000, 0x1000, 16).is_ok());
        assert!(map.ring_area(0x1001, 16, 16).is_err());
        assert!(map.ring_area(0x1800, 0x1000, 16).is_err());
        let area = map.ring_area(0x8000, 64, 4).unwrap();
        area.store_u16(2, 0x1234, Ordering::Release);
        assert_eq!(area.load_u16(2, Ordering::Acquire), 0x1234);
        area.store_u16(64, 1, Ordering::Relaxed);
        assert_eq!(area.load_u16(64, Ordering::Relaxed), 0);
        assert_eq!(area.entry(4), None);
    }
}
