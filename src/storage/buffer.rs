//! Buffers: memory that the kernel may read or write until an I/O has completed.
//!
//! An [`IoBuffer`] is a window onto a list of memory segments, guest memory or our own, together
//! with whatever keeps that memory mapped. Whoever performs the I/O holds a clone until the kernel
//! is done, so a request that goes away early cannot take its memory with it. Windows are cheap:
//! slicing copies no segment list.
//!
//! Guest memory changes under our feet, so nothing here ever makes a `&[u8]` of it: bytes are
//! copied in and out through raw pointers.
//!
//! Not here: how guest addresses become segments (`virtio::guest_memory`).
#![expect(
    unsafe_code,
    reason = "hands memory to the kernel and copies from memory that others may write; every \
              pointer comes from a segment whose owner keeps it mapped"
)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::rc::Rc;

use super::fault_guard::is_lost_memory;

/// The alignment of buffers of our own: enough for direct I/O on every common device.
pub const PAGE_SIZE: usize = 4096;

/// The most segments handed to the kernel in one call (`IOV_MAX`, see readv(2)).
pub const MAX_SEGMENTS: usize = 1024;

/// Bytes that one load of a processor takes, and the size of a header, a descriptor and a segment.
const FETCH: usize = 16;

/// Bytes that are filled at once, without looking whether it is guest memory that has gone.
const FILL: usize = 256 << 10;

/// A piece of contiguous memory.
#[derive(Clone, Copy)]
pub struct Segment {
    /// First byte.
    address: NonNull<u8>,
    /// Length in bytes; the whole segment lies in one mapping.
    len: usize,
}

impl Segment {
    /// A segment of `len` bytes at `address`.
    ///
    /// # Safety
    /// The bytes must be mapped readable and writable for as long as the owner lives that is given
    /// to [`IoMemory::refill`] together with this segment.
    #[must_use]
    pub unsafe fn new(address: NonNull<u8>, len: usize) -> Self {
        Self { address, len }
    }

    /// Address of the first byte, as a number.
    #[must_use]
    pub fn address(self) -> usize {
        self.address.as_ptr().addr()
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(self) -> usize {
        self.len
    }

    /// Whether the segment holds no byte.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The first byte. Valid for as long as the segment's owner lives.
    #[must_use]
    pub fn pointer(self) -> NonNull<u8> {
        self.address
    }

    /// Copies the segment into `bytes`, which must not be longer. Each byte is fetched once, by
    /// the processor, too: the usual copying of few bytes takes some of them twice, with loads that
    /// overlap.
    pub fn read_once(self, bytes: &mut [u8]) {
        assert!(bytes.len() <= self.len);
        let (blocks, rest) = bytes.as_chunks_mut::<FETCH>();
        let mut from = self.address.cast();
        for block in blocks {
            // SAFETY: not more bytes than the segment has, which is mapped: whoever holds it holds
            // its owner (see `Segment::new`). Any address is aligned for bytes.
            *block = unsafe { from.read_volatile() };
            // SAFETY: behind what was just read, so in the segment or at its end.
            from = unsafe { from.add(1) };
        }
        let mut from = from.cast();
        for byte in rest {
            // SAFETY: as for the blocks.
            *byte = unsafe { from.read_volatile() };
            // SAFETY: as for the blocks.
            from = unsafe { from.add(1) };
        }
    }

    /// The first `N` bytes, if the segment has as many: the usual case of a short [`read_once`], in
    /// one load.
    ///
    /// [`read_once`]: Self::read_once
    #[must_use]
    pub fn first<const N: usize>(self) -> Option<[u8; N]> {
        // SAFETY: as in `read_once`.
        (N <= self.len).then(|| unsafe { self.address.cast::<[u8; N]>().read_volatile() })
    }

    /// The part `start..start + len` of this segment; the caller has clipped it to the segment.
    fn part(self, start: usize, len: usize) -> Self {
        assert!(start <= self.len && len <= self.len - start);
        // SAFETY: `start <= self.len`, so the result stays inside the segment or one past its end.
        let address = unsafe { self.address.add(start) };
        Self { address, len }
    }

    /// The segment in pieces of at most `len` bytes.
    pub(super) fn chunks(self, len: usize) -> impl Iterator<Item = Self> {
        (0..self.len).step_by(len).map(move |start| self.part(start, len.min(self.len - start)))
    }

    /// The segment as the kernel wants it.
    pub(super) fn iovec(self) -> libc::iovec {
        libc::iovec { iov_base: self.address.as_ptr().cast(), iov_len: self.len }
    }
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}+{:#x}", self.address, self.len)
    }
}

/// What memory is fetched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Reading.
    Read,
    /// Writing.
    Write,
}

/// Fetches the cache line of `address` into this processor's cache. Only a hint: it never fails,
/// whatever the address, and does nothing on processors for which the compiler has no such hint.
pub(crate) fn prefetch(address: NonNull<u8>, purpose: Purpose) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_ET0, _MM_HINT_T0, _mm_prefetch};
        let line = address.as_ptr().cast();
        match purpose {
            // SAFETY: a hint touches nothing and never faults.
            Purpose::Read => unsafe { _mm_prefetch::<_MM_HINT_T0>(line) },
            // SAFETY: as above.
            Purpose::Write => unsafe { _mm_prefetch::<_MM_HINT_ET0>(line) },
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (address, purpose);
}

/// Copies a segment to another one of the same length.
fn copy_segment(source: Segment, target: Segment) {
    assert_eq!(source.len, target.len, "segments of different length");
    // SAFETY: both segments are mapped: whoever holds them holds their owners. `copy` allows
    // overlap: a hostile guest may name the same memory twice.
    unsafe { source.address.copy_to(target.address, target.len) };
}

/// A list of segments and what keeps them mapped. Reusable: see [`IoMemory::refill`].
#[derive(Default)]
pub struct IoMemory {
    /// The segments in the order in which the data goes through them; none of them empty.
    segments: Vec<Segment>,
    /// Sum of the segments' lengths in bytes.
    len: usize,
    /// Keeps the memory of `segments` mapped; `None` only when there are no segments.
    owner: Option<Rc<dyn Any>>,
}

impl IoMemory {
    /// Replaces the content by what `fill` pushes, keeping the allocation. Empty segments are left
    /// out. The segments must belong to memory that `owner` keeps mapped (see [`Segment::new`]).
    ///
    /// # Errors
    /// What `fill` returned; the list is then empty.
    pub fn refill<E>(
        &mut self,
        owner: Rc<dyn Any>,
        fill: impl FnOnce(&mut SegmentSink<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.segments.clear();
        self.len = 0;
        let result = fill(&mut SegmentSink { memory: self });
        if result.is_err() {
            self.segments.clear();
            self.len = 0;
        }
        self.owner = (!self.segments.is_empty()).then_some(owner);
        result
    }

    /// How many segments it has memory for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.segments.capacity()
    }
}

impl fmt::Debug for IoMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.segments).finish()
    }
}

/// Where [`IoMemory::refill`] collects segments.
#[derive(Debug)]
pub struct SegmentSink<'a> {
    /// The list under construction.
    memory: &'a mut IoMemory,
}

impl SegmentSink<'_> {
    /// How many segments there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.memory.segments.len()
    }

    /// Adds a segment, unless it is empty.
    ///
    /// # Panics
    /// If the total length overflowed `usize`; callers bound it far below.
    pub fn push(&mut self, segment: Segment) {
        if !segment.is_empty() {
            self.memory.len = self.memory.len.checked_add(segment.len).expect("bounded by callers");
            self.memory.segments.push(segment);
        }
    }
}

/// Zeroed memory of our own, aligned to [`PAGE_SIZE`].
struct OwnedMemory {
    /// First byte.
    address: NonNull<u8>,
    /// What `alloc_zeroed` was called with.
    layout: Layout,
}

impl OwnedMemory {
    /// Allocates `len` zero bytes, rounded up to whole pages (at least one).
    fn new(len: usize) -> Self {
        let size = len.max(1).next_multiple_of(PAGE_SIZE);
        let layout = Layout::from_size_align(size, PAGE_SIZE).expect("callers bound the length");
        // SAFETY: the layout's size is at least PAGE_SIZE, so it is not zero.
        let pointer = unsafe { alloc_zeroed(layout) };
        let Some(address) = NonNull::new(pointer) else { handle_alloc_error(layout) };
        Self { address, layout }
    }
}

impl Drop for OwnedMemory {
    fn drop(&mut self) {
        // SAFETY: `address` came from `alloc_zeroed` with this very layout and is freed only here.
        unsafe { dealloc(self.address.as_ptr(), self.layout) }
    }
}

/// A window onto an [`IoMemory`]: the unit in which data moves.
#[derive(Clone)]
pub struct IoBuffer {
    /// The segments.
    memory: Rc<IoMemory>,
    /// First byte of the window, counted through the segments.
    start: usize,
    /// Length of the window in bytes; `start + len <= memory.len`.
    len: usize,
}

impl IoBuffer {
    /// The whole of `memory`.
    #[must_use]
    pub fn new(memory: Rc<IoMemory>) -> Self {
        let len = memory.len;
        Self { memory, start: 0, len }
    }

    /// `len` zero bytes of our own, page aligned.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        let owned = OwnedMemory::new(len);
        // SAFETY: the allocation has at least `len` bytes and lives as long as `owned`, which
        // becomes the owner below.
        let segment = unsafe { Segment::new(owned.address, len) };
        let mut memory = IoMemory::default();
        let Ok(()) = memory.refill(Rc::new(owned), |sink| {
            sink.push(segment);
            Ok::<(), std::convert::Infallible>(())
        });
        Self::new(Rc::new(memory))
    }

    /// `len` zero bytes to be written somewhere, page aligned. They take one page however many they
    /// are; so writing *to* them would show in all places at once.
    #[must_use]
    pub fn zeros(len: usize) -> Self {
        let page = Self::zeroed(PAGE_SIZE);
        let parts = (0..len).step_by(PAGE_SIZE).map(|at| page.slice(0, PAGE_SIZE.min(len - at)));
        Self::concat(&parts.collect::<Vec<_>>())
    }

    /// A page-aligned copy of `bytes`.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let buffer = Self::zeroed(bytes.len());
        buffer.copy_from(0, bytes);
        buffer
    }

    /// The given windows, one after the other, as one.
    #[must_use]
    pub fn concat(parts: &[Self]) -> Self {
        let mut owner: Vec<Rc<IoMemory>> =
            parts.iter().map(|part| Rc::clone(&part.memory)).collect();
        owner.dedup_by(|a, b| Rc::ptr_eq(a, b));
        let mut memory = IoMemory::default();
        let Ok(()) = memory.refill(Rc::new(owner), |sink| {
            parts.iter().flat_map(Self::segments).for_each(|segment| sink.push(segment));
            Ok::<(), std::convert::Infallible>(())
        });
        Self::new(Rc::new(memory))
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the window holds no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The window `start..start + len` of this one.
    ///
    /// # Panics
    /// If it does not lie inside this one: the caller computed it from `len()`.
    #[must_use]
    pub fn slice(&self, start: usize, len: usize) -> Self {
        assert!(start <= self.len && len <= self.len - start, "slice outside its buffer");
        Self { memory: Rc::clone(&self.memory), start: self.start + start, len }
    }

    /// Everything from byte `start` on. Panics as [`IoBuffer::slice`].
    #[must_use]
    pub fn tail(&self, start: usize) -> Self {
        assert!(start <= self.len, "slice outside its buffer");
        self.slice(start, self.len - start)
    }

    /// The memory segments of this window, in order.
    pub(crate) fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        let mut skip = self.start;
        let mut left = self.len;
        self.memory.segments.iter().filter_map(move |segment| {
            let start = skip.min(segment.len);
            skip -= start;
            let len = left.min(segment.len - start);
            left -= len;
            (len > 0).then(|| segment.part(start, len))
        })
    }

    /// Fetches the window's first byte, for a reader that comes soon.
    pub(crate) fn prefetch_start(&self) {
        if let Some(segment) = self.segments().next() {
            prefetch(segment.address, Purpose::Read);
        }
    }

    /// Fetches the last byte of the window's memory, for a writer that comes soon. Only where the
    /// window ends where its memory does, as the writable part of a chain.
    pub(crate) fn prefetch_end(&self) {
        if let Some(segment) = self.memory.segments.last()
            && self.start + self.len == self.memory.len
        {
            let last = segment.part(segment.len - 1, 1);
            prefetch(last.address, Purpose::Write);
        }
    }

    /// Whether every segment's address and length is a multiple of `alignment` bytes.
    #[must_use]
    pub fn is_aligned(&self, alignment: usize) -> bool {
        alignment <= 1
            || self
                .segments()
                .all(|s| s.address().is_multiple_of(alignment) && s.len.is_multiple_of(alignment))
    }

    /// Copies `bytes` into the window from its byte `start` on.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn copy_from(&self, start: usize, bytes: &[u8]) {
        let mut rest = bytes;
        for segment in self.slice(start, bytes.len()).segments() {
            let (now, later) = rest.split_at(segment.len);
            // SAFETY: the segment is mapped (its owner lives in `self.memory`) and `now` has its
            // length. Guest memory may be written by others meanwhile: only bytes move, nobody
            // draws conclusions from them here. The regions do not overlap: `now` is ours.
            unsafe { now.as_ptr().copy_to_nonoverlapping(segment.address.as_ptr(), now.len()) };
            rest = later;
        }
    }

    /// Copies the window from its byte `start` on into `bytes`.
    ///
    /// # Panics
    /// If the window has fewer bytes.
    pub fn copy_to(&self, start: usize, bytes: &mut [u8]) {
        let mut rest = bytes;
        for segment in self.slice(start, rest.len()).segments() {
            let (now, later) = rest.split_at_mut(segment.len);
            segment.read_once(now);
            rest = later;
        }
    }

    /// The first `N` bytes of the window, each fetched once.
    ///
    /// # Panics
    /// If the window has fewer bytes.
    #[must_use]
    pub fn first<const N: usize>(&self) -> [u8; N] {
        let at_once = self.segments().next().and_then(Segment::first);
        at_once.unwrap_or_else(|| {
            let mut bytes = [0; N];
            self.copy_to(0, &mut bytes);
            bytes
        })
    }

    /// Copies the whole of `source`, which must have this window's length, into this window.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn copy_from_buffer(&self, source: &Self) {
        assert_eq!(self.len, source.len, "buffers of different length");
        let mut done = 0;
        for segment in source.segments() {
            self.slice(done, segment.len).copy_from_segment(segment);
            done += segment.len;
        }
    }

    /// Copies the whole of `source`, which must have this window's length, into this window, but
    /// for guest memory that is lost.
    ///
    /// # Panics
    /// If the lengths differ.
    pub(super) fn copy_from_segment(&self, source: Segment) {
        assert_eq!(self.len, source.len, "buffers of different length");
        let mut done = 0;
        for target in self.segments().flat_map(|segment| segment.chunks(FILL)) {
            if !is_lost_memory(target.address()) {
                copy_segment(source.part(done, target.len), target);
            }
            done += target.len;
        }
    }

    /// Copies this window into the whole of `target`, which must have its length.
    ///
    /// # Panics
    /// If the lengths differ.
    pub(super) fn copy_to_segment(&self, target: Segment) {
        assert_eq!(self.len, target.len, "buffers of different length");
        let mut done = 0;
        for source in self.segments() {
            copy_segment(source, target.part(done, source.len));
            done += source.len;
        }
    }

    /// The bytes of the window, copied out.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.copy_to(0, &mut bytes);
        bytes
    }

    /// Whether every byte of the window is zero. Ends at the first piece that is not, so it costs
    /// next to nothing on data.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        // As much at once as the compiler keeps in registers.
        const PIECE: usize = 64;
        let mut pieces = self.segments().flat_map(|segment| segment.chunks(PIECE));
        pieces.all(|piece| {
            let mut bytes = [0; PIECE];
            // The usual length as a constant, so that the copy is a few loads.
            if piece.len == PIECE {
                piece.read_once(&mut bytes);
            } else {
                piece.read_once(&mut bytes[..piece.len]);
            }
            bytes == [0; PIECE]
        })
    }

    /// Where the first byte is in which this window and `other`, of the same length, differ,
    /// rounded down to a multiple of `unit` bytes (1 to [`PAGE_SIZE`]); `None` if they are equal.
    ///
    /// # Panics
    /// If the lengths differ.
    #[must_use]
    pub fn first_difference(&self, other: &Self, unit: usize) -> Option<usize> {
        assert_eq!(self.len, other.len, "buffers of different length");
        let step = PAGE_SIZE - PAGE_SIZE % unit;
        let (mut mine, mut theirs) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
        for start in (0..self.len).step_by(step) {
            let len = step.min(self.len - start);
            let (mine, theirs) = (&mut mine[..len], &mut theirs[..len]);
            self.copy_to(start, mine);
            other.copy_to(start, theirs);
            if mine != theirs {
                let equal = mine.iter().zip(theirs.iter()).take_while(|(a, b)| a == b).count();
                return Some(start + equal - equal % unit);
            }
        }
        None
    }

    /// Fills the window with zeros, but for guest memory that is lost.
    pub fn fill_zero(&self) {
        for piece in self.segments().flat_map(|segment| segment.chunks(FILL)) {
            if !is_lost_memory(piece.address()) {
                // SAFETY: the segment is mapped and writable through its owner.
                unsafe { piece.address.write_bytes(0, piece.len) };
            }
        }
    }

    /// Replaces `iovecs` by at most [`MAX_SEGMENTS`] segments of this window, for the kernel. They
    /// are valid for as long as a clone of this buffer lives.
    pub(super) fn iovecs(&self, iovecs: &mut Vec<libc::iovec>) {
        iovecs.clear();
        iovecs.extend(self.segments().take(MAX_SEGMENTS).map(Segment::iovec));
    }

    /// preadv(2) into this window. May be short.
    pub(super) fn read_from(&self, file: &File, offset: u64) -> io::Result<usize> {
        let (iovecs, count, offset) = self.call_arguments(offset)?;
        // SAFETY: the iovecs point into memory that `self` keeps mapped and writable for the call.
        let result = unsafe { libc::preadv(file.as_raw_fd(), iovecs.as_ptr(), count, offset) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// pwritev(2) from this window. May be short.
    pub(super) fn write_to(&self, file: &File, offset: u64) -> io::Result<usize> {
        let (iovecs, count, offset) = self.call_arguments(offset)?;
        // SAFETY: the iovecs point into memory that `self` keeps mapped and readable for the call.
        let result = unsafe { libc::pwritev(file.as_raw_fd(), iovecs.as_ptr(), count, offset) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// The arguments that preadv and pwritev share.
    fn call_arguments(&self, offset: u64) -> io::Result<(Vec<libc::iovec>, i32, i64)> {
        let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut iovecs = Vec::new();
        self.iovecs(&mut iovecs);
        let count = i32::try_from(iovecs.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        Ok((iovecs, count, offset))
    }
}

impl fmt::Debug for IoBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.segments()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_of_joined_buffers_see_the_right_bytes() {
        let joined = IoBuffer::concat(&[
            IoBuffer::from_bytes(b"head"),
            IoBuffer::from_bytes(b""),
            IoBuffer::from_bytes(b"middle"),
            IoBuffer::from_bytes(b"tail"),
        ]);
        assert_eq!(joined.to_vec(), b"headmiddletail");
        assert_eq!(joined.slice(2, 9).to_vec(), b"admiddlet");
        assert_eq!(joined.tail(14).to_vec(), b"");
        joined.slice(3, 2).copy_from(0, b"XY");
        assert_eq!(joined.to_vec(), b"heaXYiddletail");
        joined.slice(9, 2).fill_zero();
        assert_eq!(joined.to_vec(), b"heaXYiddl\0\0ail");
    }

    #[test]
    fn copying_between_differently_split_buffers_keeps_the_order() {
        let source =
            IoBuffer::concat(&[IoBuffer::from_bytes(b"abc"), IoBuffer::from_bytes(b"defg")]);
        let target = IoBuffer::concat(&[IoBuffer::zeroed(5), IoBuffer::zeroed(2)]);
        target.copy_from_buffer(&source);
        assert_eq!(target.to_vec(), b"abcdefg");
    }

    #[test]
    fn alignment_looks_at_every_segment() {
        let buffer = IoBuffer::zeroed(8192);
        assert!(buffer.is_aligned(512));
        assert!(!buffer.slice(256, 1024).is_aligned(512));
        let odd = IoBuffer::concat(&[buffer.slice(0, 512), buffer.slice(512, 100)]);
        assert!(!odd.is_aligned(512));
    }

    #[test]
    fn zeros_are_told_from_data_at_every_place() {
        let zeros = IoBuffer::zeros(2 * PAGE_SIZE + 512);
        assert_eq!((zeros.len(), zeros.segments().count()), (2 * PAGE_SIZE + 512, 3));
        assert!(zeros.is_aligned(512) && zeros.to_vec().iter().all(|byte| *byte == 0));
        assert!(IoBuffer::zeros(0).is_empty());
        let joined = IoBuffer::concat(&[IoBuffer::zeroed(100), IoBuffer::zeroed(64)]);
        assert!(joined.is_zero() && joined.slice(7, 0).is_zero());
        for at in 0..joined.len() {
            joined.copy_from(at, &[1]);
            assert!(!joined.is_zero(), "byte {at}");
            assert!(joined.slice(0, at).is_zero() && joined.tail(at + 1).is_zero());
            joined.copy_from(at, &[0]);
        }
    }

    #[test]
    fn the_first_difference_is_found_in_units() {
        let one = IoBuffer::from_bytes(&[7; 10_000]);
        let other = IoBuffer::concat(&[one.slice(0, 5000), IoBuffer::from_bytes(&[7; 5000])]);
        assert_eq!(one.first_difference(&other, 1), None);
        for at in [9999, 9000, 5121, 5000] {
            other.copy_from(at, &[8]);
            assert_eq!(one.first_difference(&other, 1), Some(at));
            assert_eq!(one.first_difference(&other, 512), Some(at / 512 * 512));
            assert_eq!(one.first_difference(&other, 3000), Some(at / 3000 * 3000));
        }
        assert_eq!(one.slice(0, 0).first_difference(&other.slice(9, 0), 512), None);
    }

    #[test]
    #[should_panic(expected = "slice outside its buffer")]
    fn a_slice_beyond_the_end_is_a_bug_of_ours() {
        let _ = IoBuffer::zeroed(10).slice(8, 3);
    }
}
