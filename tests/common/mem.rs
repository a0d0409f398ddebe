//! Guest memory: memory files mapped here and sent to the back end.
//!
//! Two regions lie side by side in guest-physical addresses but far apart in user addresses, and
//! the first one starts in the middle of its file, so a back end that mixes up any of the three
//! address spaces fails at once. A third region can be added later.
//!
//! Relies on `vm-memory` for every access, so nothing here is `unsafe`.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, memfd_create};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::{MIB, to_u64, to_usize};

/// Size of each region in bytes.
pub const REGION: u64 = 32 * MIB;
/// Guest-physical address where the first region ends and the second one begins.
pub const BOUNDARY: u64 = REGION;
/// First guest-physical address that no region holds.
pub const END: u64 = 2 * REGION;
/// Guest-physical address of the region that a test may add: a hole lies before it.
pub const EXTRA: u64 = 4 * REGION;

/// Guest-physical addresses below this are for rings and for what a test places by hand; the
/// rest is taken for request buffers, round and round.
const BUFFERS: u64 = REGION / 2;

/// One mapped piece of guest memory.
#[derive(Debug)]
struct Region {
    /// The memory file behind it.
    file: File,
    /// First guest-physical address.
    gpa: u64,
    /// First user address, as told to the back end; not where it is mapped here.
    user: u64,
    /// Where in the file it starts, in bytes.
    offset: u64,
}

impl Region {
    /// A new region of [`REGION`] bytes.
    fn new(gpa: u64, user: u64, offset: u64) -> Self {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memory file"));
        file.set_len(offset + REGION).expect("size of the memory file");
        Self { file, gpa, user, offset }
    }

    /// What the back end is told about it.
    fn info(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: self.gpa,
            memory_size: REGION,
            userspace_addr: self.user,
            mmap_offset: self.offset,
            mmap_handle: self.file.as_raw_fd(),
        }
    }
}

/// The memory of one guest.
#[derive(Debug)]
pub struct Memory {
    /// The mapping of all regions, the extra one included.
    map: GuestMemoryMmap,
    /// The regions in guest-physical order: two ordinary ones and the extra one.
    regions: [Region; 3],
    /// Next free address of the part for rings.
    next_fixed: AtomicU64,
    /// Next free address of the part for request buffers.
    next_buffer: AtomicU64,
}

impl Memory {
    /// Fresh zeroed memory.
    pub fn new() -> Self {
        let regions = [
            Region::new(0, 0x5500_0000_0000, 0x1_0000),
            Region::new(BOUNDARY, 0x5600_4000_0000, 0),
            Region::new(EXTRA, 0x5400_0000_0000, 0x2000),
        ];
        let ranges = regions.each_ref().map(|region| {
            let file = region.file.try_clone().expect("another descriptor");
            let place = Some(FileOffset::new(file, region.offset));
            (GuestAddress(region.gpa), to_usize(REGION), place)
        });
        let map = GuestMemoryMmap::from_ranges_with_files(ranges).expect("map guest memory");
        let next_fixed = AtomicU64::new(0x1000);
        Self { map, regions, next_fixed, next_buffer: AtomicU64::new(BUFFERS) }
    }

    /// The two ordinary regions for SET_MEM_TABLE.
    pub fn table(&self) -> Vec<VhostUserMemoryRegionInfo> {
        self.regions[..2].iter().map(Region::info).collect()
    }

    /// The region at [`EXTRA`] for ADD_MEM_REG.
    pub fn extra(&self) -> VhostUserMemoryRegionInfo {
        self.regions[2].info()
    }

    /// A region like [`Memory::extra`], of 32 MiB of another file.
    pub fn extra_on(&self, file: &File) -> VhostUserMemoryRegionInfo {
        let mmap_handle = file.as_raw_fd();
        VhostUserMemoryRegionInfo { mmap_handle, mmap_offset: 0, ..self.extra() }
    }

    /// Takes the pages of a region away. Touching them here would end the test.
    pub fn cut(&self, region: usize) {
        self.regions[region].file.set_len(0).expect("cut the memory file");
    }

    /// The region that holds a guest-physical address.
    fn home(&self, gpa: u64) -> &Region {
        let holds = |region: &&Region| (region.gpa..region.gpa + REGION).contains(&gpa);
        self.regions.iter().find(holds).expect("an address in guest memory")
    }

    /// The user address of a guest-physical one, as the messages about rings want it.
    pub fn user(&self, gpa: u64) -> u64 {
        let region = self.home(gpa);
        region.user + (gpa - region.gpa)
    }

    /// Where a guest-physical address lies: inode number of a memory file, and offset in it.
    pub fn place(&self, gpa: u64) -> (u64, u64) {
        let region = self.home(gpa);
        let inode = region.file.metadata().expect("the memory file").ino();
        (inode, region.offset + (gpa - region.gpa))
    }

    /// `len` bytes that stay taken, aligned to `align` (a power of two).
    pub fn alloc(&self, len: usize, align: u64) -> u64 {
        let at = self.next_fixed.load(Ordering::Relaxed).next_multiple_of(align);
        let end = at + to_u64(len);
        assert!(end <= BUFFERS, "no room left for rings");
        self.next_fixed.store(end, Ordering::Relaxed);
        at
    }

    /// `len` bytes that stay taken, filled with `byte`.
    pub fn alloc_filled(&self, len: usize, byte: u8) -> u64 {
        let at = self.alloc(len, 16);
        self.write(at, &vec![byte; len]);
        at
    }

    /// `len` bytes for a request: reused after about 48 MiB, so a caller keeps less in flight.
    pub fn buffer(&self, len: usize) -> u64 {
        assert!(to_u64(len) <= END - BUFFERS, "larger than the space for buffers");
        let at = self.next_buffer.load(Ordering::Relaxed);
        let at = if at + to_u64(len) > END { BUFFERS } else { at };
        self.next_buffer.store(at + to_u64(len), Ordering::Relaxed);
        at
    }

    /// The bytes at `gpa`.
    pub fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.map.read_slice(&mut bytes, GuestAddress(gpa)).expect("read guest memory");
        bytes
    }

    /// Puts `bytes` at `gpa`.
    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        self.map.write_slice(bytes, GuestAddress(gpa)).expect("write guest memory");
    }

    /// The 16-bit word at `gpa`, with acquire ordering.
    pub fn load_u16(&self, gpa: u64) -> u16 {
        u16::from_le(self.map.load(GuestAddress(gpa), Ordering::Acquire).expect("load"))
    }

    /// Stores a 16-bit word at `gpa`, with release ordering.
    pub fn store_u16(&self, gpa: u64, value: u16) {
        let place = GuestAddress(gpa);
        self.map.store(value.to_le(), place, Ordering::Release).expect("store");
    }

    /// The 32-bit word at `gpa`.
    pub fn load_u32(&self, gpa: u64) -> u32 {
        u32::from_le(self.map.load(GuestAddress(gpa), Ordering::Acquire).expect("load"))
    }
}
