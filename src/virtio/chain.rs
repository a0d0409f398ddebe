//! Descriptor chains: walking them, strictly.
//!
//! Follows VIRTIO 1.3, 2.7.4 and 2.7.5. A chain that breaks a rule is refused whole: half of a
//! chain would look like a shorter good one, and the status byte would land in the guest's data.
//! Each descriptor is read once, and a walk is bounded whatever the guest writes.
//!
//! Not here: what the bytes of a chain mean (`request`).

use std::any::Any;
use std::rc::Rc;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::guest_memory::{GuestMap, RingArea, Unmapped};
use crate::storage::IoBuffer;
use crate::storage::buffer::{IoMemory, SegmentSink};

/// The most descriptors of one chain, indirect ones included. We advertise seg_max = 126 by default
/// (128 with header and status); 1024 is what other back ends accept.
pub const MAX_DESCRIPTORS: u32 = 1024;

/// The most pieces of memory of one chain: a descriptor has more than one where it runs over the
/// border of memory regions. Bounds the segment list of a request to 16 KiB.
pub const MAX_PIECES: usize = 1024;

/// The most bytes of one chain: 2.7.5 "no descriptor chain has more than 2^32 bytes".
const MAX_CHAIN_LEN: u64 = 1 << 32;

/// `VIRTQ_DESC_F_NEXT`: the chain goes on.
const FLAG_NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`: device-writable.
const FLAG_WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`: names a table of descriptors.
const FLAG_INDIRECT: u16 = 4;

/// What is wrong with a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A descriptor number lies outside its table.
    #[error("descriptor {index} lies outside a table of {size}")]
    Index {
        /// The number.
        index: u16,
        /// Entries in the table.
        size: u32,
    },
    /// More descriptors than allowed; also how a loop ends.
    #[error("more than {0} descriptors")]
    TooMany(u32),
    /// Buffers that lie in too many memory regions.
    #[error("more than {0} pieces of guest memory")]
    Pieces(usize),
    /// More than 2^32 bytes.
    #[error("more than 2^32 bytes")]
    TooLong,
    /// A device-readable descriptor after a device-writable one (2.7.4.2).
    #[error("device-readable descriptor after a device-writable one")]
    Order,
    /// An indirect descriptor without VIRTIO_F_INDIRECT_DESC, in an indirect table, or with NEXT
    /// (2.7.5.3.1).
    #[error("indirect descriptor where none may be")]
    Indirect,
    /// An indirect table whose length is 0 or not a multiple of 16.
    #[error("indirect table of {0} bytes")]
    TableLen(u32),
    /// A buffer or a table outside guest memory.
    #[error(transparent)]
    Unmapped(#[from] Unmapped),
}

/// A chain whose memory was resolved.
#[derive(Debug)]
pub struct Chain {
    /// Number of its first descriptor: how the driver knows it.
    pub head: u16,
    /// The device-readable part.
    pub readable: IoBuffer,
    /// The device-writable part.
    pub writable: IoBuffer,
}

impl Chain {
    /// Fetches what a request's parser reads first and its answer writes last, the header and the
    /// status byte: the driver has just written the one and looked at the other on its processor.
    pub fn prefetch(&self) {
        self.readable.prefetch_start();
        self.writable.prefetch_end();
    }
}

/// `struct virtq_desc` (2.7.5) as the guest writes it.
#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct WireDescriptor {
    /// Guest physical address.
    address: U64,
    /// Length in bytes.
    len: U32,
    /// `FLAG_*`.
    flags: U16,
    /// The next descriptor.
    next: U16,
}

/// One descriptor, decoded.
#[derive(Debug, Clone, Copy)]
struct Descriptor {
    /// Guest physical address.
    address: u64,
    /// Length in bytes.
    len: u32,
    /// `FLAG_*`; other bits are ignored.
    flags: u16,
    /// The next descriptor, if FLAG_NEXT is set.
    next: u16,
}

impl Descriptor {
    /// Decodes the 16 bytes of `struct virtq_desc` (2.7.5).
    fn decode(bytes: [u8; 16]) -> Self {
        let wire: WireDescriptor = zerocopy::transmute!(bytes);
        Self {
            address: wire.address.get(),
            len: wire.len.get(),
            flags: wire.flags.get(),
            next: wire.next.get(),
        }
    }

    /// Whether the flag is set.
    fn has(self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// Where descriptors come from.
enum Table<'a> {
    /// The ring's own table.
    Ring(&'a RingArea, u16),
    /// An indirect table: guest address and number of entries.
    Indirect(u64, u32),
}

/// What a walk has seen so far.
struct Walk<'a> {
    /// Guest memory.
    map: &'a GuestMap,
    /// Descriptors seen.
    count: u32,
    /// Bytes of the readable part.
    readable: u64,
    /// Bytes of the writable part.
    writable: u64,
    /// Whether a device-writable descriptor was seen.
    in_writable: bool,
}

/// Walks the chain that starts at descriptor `head` of the ring's `table` of `size` entries, into
/// `memory` (a spent one is reused). `owner` is `map.owner()`.
///
/// # Errors
/// The first rule that the chain breaks.
pub fn walk(
    map: &GuestMap,
    owner: &Rc<dyn Any>,
    (table, size): (&RingArea, u16),
    indirect: bool,
    head: u16,
    memory: &mut Rc<IoMemory>,
) -> Result<Chain, ChainError> {
    if Rc::get_mut(memory).is_none() {
        *memory = Rc::default();
    }
    let mut walk = Walk { map, count: 0, readable: 0, writable: 0, in_writable: false };
    if let Some(memory) = Rc::get_mut(memory) {
        memory.refill(Rc::clone(owner), |sink| walk.chain(table, size, indirect, head, sink))?;
    }
    let whole = IoBuffer::new(Rc::clone(memory));
    // Both fit: their sum is the length of `whole`.
    let readable = usize::try_from(walk.readable).unwrap_or_default();
    let writable = whole.tail(readable);
    Ok(Chain { head, readable: whole.slice(0, readable), writable })
}

impl Walk<'_> {
    /// Walks the ring's table, and at its end perhaps an indirect one.
    fn chain(
        &mut self,
        table: &RingArea,
        size: u16,
        indirect: bool,
        head: u16,
        sink: &mut SegmentSink<'_>,
    ) -> Result<(), ChainError> {
        // 2.7.5.3.2: normal descriptors may come first, then one that names a table.
        let Some(last) = self.table(&Table::Ring(table, size), head, sink)? else { return Ok(()) };
        if !indirect || last.has(FLAG_NEXT) {
            return Err(ChainError::Indirect);
        }
        if last.len == 0 || !last.len.is_multiple_of(16) {
            return Err(ChainError::TableLen(last.len));
        }
        match self.table(&Table::Indirect(last.address, last.len / 16), 0, sink)? {
            Some(_) => Err(ChainError::Indirect),
            None => Ok(()),
        }
    }

    /// Walks one table from entry `first`. Returns the indirect descriptor that it came to, if any.
    fn table(
        &mut self,
        table: &Table<'_>,
        first: u16,
        sink: &mut SegmentSink<'_>,
    ) -> Result<Option<Descriptor>, ChainError> {
        let size = match table {
            Table::Ring(_, size) => u32::from(*size),
            Table::Indirect(_, size) => *size,
        };
        let mut index = first;
        loop {
            if u32::from(index) >= size {
                return Err(ChainError::Index { index, size });
            }
            self.count = self.count.saturating_add(1);
            if self.count > MAX_DESCRIPTORS {
                return Err(ChainError::TooMany(MAX_DESCRIPTORS));
            }
            let descriptor = self.descriptor(table, index, size)?;
            if descriptor.has(FLAG_INDIRECT) {
                return Ok(Some(descriptor));
            }
            self.buffer(descriptor, sink)?;
            if !descriptor.has(FLAG_NEXT) {
                return Ok(None);
            }
            index = descriptor.next;
        }
    }

    /// Reads a descriptor, once.
    fn descriptor(
        &self,
        table: &Table<'_>,
        index: u16,
        size: u32,
    ) -> Result<Descriptor, ChainError> {
        let bytes = match table {
            Table::Ring(area, _) => area.entry(index).ok_or(ChainError::Index { index, size })?,
            Table::Indirect(address, _) => {
                let offset = u64::from(index).saturating_mul(16);
                let entry = address.checked_add(offset);
                self.map.read(entry.ok_or(Unmapped { address: *address, len: offset })?)?
            }
        };
        Ok(Descriptor::decode(bytes))
    }

    /// Adds the memory of a descriptor.
    fn buffer(
        &mut self,
        descriptor: Descriptor,
        sink: &mut SegmentSink<'_>,
    ) -> Result<(), ChainError> {
        let len = u64::from(descriptor.len);
        if descriptor.has(FLAG_WRITE) {
            self.in_writable = true;
            self.writable = self.writable.saturating_add(len);
        } else if self.in_writable {
            return Err(ChainError::Order);
        } else {
            self.readable = self.readable.saturating_add(len);
        }
        if self.readable.saturating_add(self.writable) > MAX_CHAIN_LEN {
            return Err(ChainError::TooLong);
        }
        for segment in self.map.segments(descriptor.address, len) {
            let segment = segment?;
            if sink.count() == MAX_PIECES {
                return Err(ChainError::Pieces(MAX_PIECES));
            }
            sink.push(segment);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::virtio::guest_memory::GuardedMemory;

    /// Size of a region in bytes.
    const REGION: u32 = 4096;

    /// Walks a chain of `count` descriptors, each of which covers all of 100 small regions; how
    /// many pieces it has.
    fn pieces(count: u16) -> Result<usize, ChainError> {
        let region = |at: u32| (GuestAddress(u64::from(at * REGION)), REGION as usize);
        let ranges: Vec<_> = (0..100).map(region).collect();
        let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap());
        for index in 0..count {
            let last = index + 1 == count;
            let flags = FLAG_WRITE | if last { 0 } else { FLAG_NEXT };
            let mut bytes = [0; 16];
            bytes[8..12].copy_from_slice(&(100 * REGION).to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&(index + 1).to_le_bytes());
            memory.write_slice(&bytes, GuestAddress(u64::from(index) * 16)).unwrap();
        }
        let map = GuestMap::new(GuardedMemory::new(memory).unwrap());
        let table = map.ring_area(0, 16 * 16, 16).unwrap();
        let chain = walk(&map, &map.owner(), (&table, 16), false, 0, &mut Rc::default())?;
        Ok(chain.writable.segments().count())
    }

    #[test]
    fn a_chain_has_a_bounded_number_of_pieces_however_many_regions_there_are() {
        assert_eq!(pieces(10), Ok(1000));
        assert_eq!(pieces(11), Err(ChainError::Pieces(MAX_PIECES)));
    }
}
