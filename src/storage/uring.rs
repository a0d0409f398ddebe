//! io_uring storage: what the daemon's queues run on.
//!
//! A [`Ring`] belongs to one thread. Operations are futures: submitting one fills a slot of the
//! in-flight table with everything the kernel may touch (buffer, segment list, file), and the slot
//! is emptied only when the completion has been taken. A future that is dropped early leaves its
//! slot to the kernel; dropping the ring waits for all of them. That is the invariant behind every
//! `unsafe` in this file.
//!
//! Besides operations the ring watches file descriptors (a kick, a wake-up) without reading them:
//! a multishot poll reports every *write* to an eventfd, so the counter may stay as it is.
//!
//! Not here: when to submit and when to sleep (`vhost_user::queue`).
#![expect(unsafe_code, reason = "pushing submission queue entries that name memory and files")]

use std::any::Any;
use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::budget::MemoryBudget;
use super::buffer::Segment;
use super::file::fallocate_flags;
use super::host_file::HostFile;
use super::restricted_ring::{self, MAX_FILES, Purpose};
use super::{Alignment, IoBuffer, Storage, ZeroMode};
use crate::units::ByteRange;

/// Entries of the submission queue: the most operations that one system call submits. A fuller
/// queue is submitted early; the completion queue is twice as large, and the kernel keeps what
/// does not fit (IORING_FEAT_NODROP), so this bounds a batch and nothing else.
const RING_ENTRIES: u32 = 256;

/// Bytes of bounce buffers that the requests of one ring share: 256 of a page, or seven of the
/// largest (`transfer::BOUNCE_LEN` and what it is widened by).
const BOUNCE_BUDGET: u32 = 1 << 20;

/// Slots that keep the memory of their segment list for the next operation, and entries of such a
/// list: as many requests as a queue carries out at once, with as many segments as drivers use.
/// What is beyond is allocated for each operation, so the lists keep at most 256 * 130 * 16 = 520
/// KiB.
const KEPT_LISTS: usize = 256;

/// See [`KEPT_LISTS`].
const KEPT_SEGMENTS: usize = 130;

/// The most bytes of one piece of registered memory: the kernel's limit.
const MAX_REGISTERED: usize = 1 << 30;

/// Marks the user data of a watched descriptor; the low bits are its token.
const WATCH_BIT: u64 = 1 << 63;

/// The most bytes of one transfer: the kernel's limit MAX_RW_COUNT, 2 GiB less a page, rounded
/// down to whole MiB. What is left over is a short transfer, and the caller goes on.
const MAX_TRANSFER: usize = (2 << 30) - (1 << 20);

/// What the kernel may touch until the operation has completed.
#[derive(Default)]
struct InFlight {
    /// Keeps the memory of the transfer alive.
    buffer: Option<IoBuffer>,
    /// Keeps the file open.
    file: Option<Arc<HostFile>>,
    /// The segment list of a vectored transfer. A short one is kept across uses, so that it is
    /// allocated once.
    iovecs: Vec<libc::iovec>,
    /// What has happened so far.
    state: OpState,
}

/// The life of a slot of the in-flight table.
#[derive(Default)]
enum OpState {
    /// Nobody uses the slot.
    #[default]
    Free,
    /// The kernel has the operation; `waker` is told when it completes. `None`: nobody waits.
    Submitted(Option<Waker>),
    /// The future is gone, the kernel still works; nobody will ask for the result.
    Abandoned,
    /// Completed with this result; the future has not seen it yet.
    Done(i32),
}

/// A watched descriptor.
struct Watch {
    /// The descriptor, kept open while the kernel polls it.
    fd: Arc<OwnedFd>,
    /// What [`Ring::reap`] reports when it becomes ready.
    token: u32,
}

/// The ring and its tables.
struct Inner {
    /// The kernel interface.
    uring: IoUring,
    /// Slots of operations, addressed by user data.
    slots: Vec<InFlight>,
    /// Indices of the free slots.
    free: Vec<usize>,
    /// Operations that the kernel has, abandoned ones included.
    in_flight: usize,
    /// Watched descriptors.
    watches: Vec<Watch>,
    /// Why one of them is not watched, as an error number: nobody may sleep any more.
    blind: Option<i32>,
    /// Memory that was registered, as address ranges; their number in the kernel's table is their
    /// index here. The owner keeps it mapped.
    memory: Vec<std::ops::Range<usize>>,
    /// Keeps registered memory mapped.
    memory_owner: Option<Rc<dyn Any>>,
    /// Files that were registered; their number in the kernel's table is their index here.
    files: Vec<Arc<HostFile>>,
}

/// An io_uring instance of one thread.
pub struct Ring {
    /// Everything; never borrowed across a call of anything foreign.
    inner: RefCell<Inner>,
    /// Memory for requests that do not fit a file's alignment.
    bounces: MemoryBudget,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("in_flight", &self.in_flight()).finish_non_exhaustive()
    }
}

impl Ring {
    /// Creates a ring for the calling thread.
    ///
    /// # Errors
    /// What io_uring_setup(2) said.
    pub fn new() -> io::Result<Rc<Self>> {
        let uring = restricted_ring::build(RING_ENTRIES, Purpose::Disk)?;
        let inner = Inner {
            uring,
            slots: Vec::new(),
            free: Vec::new(),
            in_flight: 0,
            watches: Vec::new(),
            blind: None,
            memory: Vec::new(),
            memory_owner: None,
            files: Vec::new(),
        };
        let bounces = MemoryBudget::new(BOUNCE_BUDGET);
        Ok(Rc::new(Self { inner: RefCell::new(inner), bounces }))
    }

    /// Storage on `file` whose I/O goes through this ring.
    #[must_use]
    pub fn storage(self: &Rc<Self>, file: Arc<HostFile>) -> UringStorage {
        let target = self.inner.borrow_mut().register(&file);
        UringStorage { ring: Rc::clone(self), file, target }
    }

    /// Registers memory, so that transfers of contiguous pieces of it spare the kernel the look-up
    /// of its pages. It is pinned for the ring's life and counts against RLIMIT_MEMLOCK. `owner`
    /// keeps it mapped. To be called once, at the start.
    ///
    /// # Errors
    /// What io_uring_register(2) said. Everything works without.
    pub fn register_memory(&self, segments: &[Segment], owner: Rc<dyn Any>) -> io::Result<()> {
        let pieces: Vec<Segment> = segments.iter().flat_map(|s| s.chunks(MAX_REGISTERED)).collect();
        let iovecs: Vec<libc::iovec> = pieces.iter().map(|segment| segment.iovec()).collect();
        let mut inner = self.inner.borrow_mut();
        // SAFETY: the segments are mapped for as long as `owner` lives, which is kept below until
        // the ring is gone; and the kernel holds on to the pages by itself once they are pinned.
        unsafe { inner.uring.submitter().register_buffers(&iovecs) }?;
        inner.memory = pieces.iter().map(|s| s.address()..s.address() + s.len()).collect();
        inner.memory_owner = Some(owner);
        Ok(())
    }

    /// Reports `token` from [`Ring::reap`] whenever somebody writes to the eventfd `fd`, and once
    /// at the start if it is readable already. `fd` is never read.
    ///
    /// # Errors
    /// What io_uring_enter(2) said.
    pub fn watch(&self, fd: Arc<OwnedFd>, token: u32) -> io::Result<()> {
        let mut inner = self.inner.borrow_mut();
        inner.watches.push(Watch { fd, token });
        let index = inner.watches.len() - 1;
        inner.arm_watch(index)
    }

    /// Operations that the kernel has not completed.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.inner.borrow().in_flight
    }

    /// Hands over what is queued, without waiting. No system call if there is nothing to do.
    ///
    /// # Errors
    /// What io_uring_enter(2) said; nothing is lost, and it may be called again.
    pub fn submit(&self) -> io::Result<()> {
        let mut inner = self.inner.borrow_mut();
        let queue = inner.uring.submission();
        if queue.is_empty() && !queue.taskrun() && !queue.cq_overflow() {
            return Ok(());
        }
        drop(queue);
        retry_interrupted(|| inner.uring.submit())
    }

    /// Whether [`Ring::submit`] and [`Ring::reap`] would find something to do.
    #[must_use]
    pub fn has_work(&self) -> bool {
        let mut inner = self.inner.borrow_mut();
        let queue = inner.uring.submission();
        if !queue.is_empty() || queue.taskrun() || queue.cq_overflow() {
            return true;
        }
        drop(queue);
        !inner.uring.completion().is_empty()
    }

    /// Hands over what is queued and sleeps until something has completed or a watched descriptor
    /// was written to.
    ///
    /// # Errors
    /// As [`Ring::submit`]; or that a descriptor cannot be watched, so that this might never end
    /// (EINVAL: multishot polls came with Linux 5.13).
    pub fn submit_and_wait(&self) -> io::Result<()> {
        let inner = self.inner.borrow();
        if let Some(code) = inner.blind {
            return Err(io::Error::from_raw_os_error(code));
        }
        retry_interrupted(|| inner.uring.submit_and_wait(1))
    }

    /// Takes all completions: wakes the futures of operations, calls `ready` with the token of
    /// every watched descriptor that was written to. Returns how many there were.
    pub fn reap(&self, mut ready: impl FnMut(u32)) -> usize {
        let mut taken = 0;
        while let Some(event) = self.next_event() {
            taken += 1;
            match event {
                Event::Watch(token) => ready(token),
                Event::Operation(Some(waker)) => waker.wake(),
                Event::Operation(None) => {}
            }
        }
        taken
    }

    /// Takes one completion and settles its slot.
    fn next_event(&self) -> Option<Event> {
        let mut inner = self.inner.borrow_mut();
        let completion = inner.uring.completion().next()?;
        if completion.user_data() & WATCH_BIT != 0 {
            return Some(inner.watch_fired(&completion));
        }
        let index = usize::try_from(completion.user_data()).ok()?;
        inner.in_flight -= 1;
        let slot = inner.slots.get_mut(index)?;
        slot.buffer = None;
        slot.file = None;
        let waker = match std::mem::replace(&mut slot.state, OpState::Done(completion.result())) {
            OpState::Submitted(waker) => waker,
            OpState::Abandoned => {
                inner.release(index);
                None
            }
            OpState::Free | OpState::Done(_) => unreachable!("completed twice"),
        };
        Some(Event::Operation(waker))
    }

    /// Queues the operation that `build` makes of the slot's segment list and, if that is one piece
    /// of registered memory, the number of that.
    ///
    /// `build` must name only memory of `buffer`, of the list and of `file`.
    fn start(
        self: &Rc<Self>,
        file: &Arc<HostFile>,
        buffer: Option<IoBuffer>,
        build: impl FnOnce(&[libc::iovec], Option<u16>) -> squeue::Entry,
    ) -> io::Result<Operation> {
        let mut inner = self.inner.borrow_mut();
        let index = inner.acquire();
        let Inner { slots, memory, .. } = &mut *inner;
        let slot = &mut slots[index];
        slot.iovecs.clear();
        if let Some(buffer) = &buffer {
            buffer.iovecs(&mut slot.iovecs);
        }
        slot.buffer = buffer;
        slot.file = Some(Arc::clone(file));
        slot.state = OpState::Submitted(None);
        let registered = match slot.iovecs[..] {
            [one] => registered_index(memory, one),
            _ => None,
        };
        let entry = build(&slot.iovecs, registered);
        let pushed = inner.push(&entry.user_data(index as u64));
        if let Err(error) = pushed {
            inner.release(index);
            return Err(error);
        }
        inner.in_flight += 1;
        Ok(Operation { ring: Rc::clone(self), index: Some(index) })
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel may still write into buffers that our slots keep alive.
        self.inner.borrow_mut().blind = None;
        while self.in_flight() > 0 {
            if let Err(error) = self.submit_and_wait() {
                log::error!("io_uring: cannot wait for operations in flight: {error}");
                break;
            }
            self.reap(|_| {});
        }
    }
}

/// One completion, settled.
enum Event {
    /// A watched descriptor with this token became ready.
    Watch(u32),
    /// An operation completed; its future waits with this waker.
    Operation(Option<Waker>),
}

impl Inner {
    /// Registers a file, if there is room for it. The table keeps it open.
    fn register(&mut self, file: &Arc<HostFile>) -> Target {
        let raw = file.file().as_raw_fd();
        let index = u32::try_from(self.files.len()).unwrap_or(MAX_FILES);
        if index < MAX_FILES
            && self.uring.submitter().register_files_update(index, &[raw]).is_ok_and(|n| n == 1)
        {
            self.files.push(Arc::clone(file));
            return Target::Registered(types::Fixed(index));
        }
        Target::Plain(types::Fd(raw))
    }

    /// A free slot, a new one if need be.
    fn acquire(&mut self) -> usize {
        self.free.pop().unwrap_or_else(|| {
            self.slots.push(InFlight::default());
            self.slots.len() - 1
        })
    }

    /// Gives a slot back.
    fn release(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        slot.buffer = None;
        slot.file = None;
        slot.state = OpState::Free;
        if index >= KEPT_LISTS || slot.iovecs.capacity() > KEPT_SEGMENTS {
            slot.iovecs = Vec::new();
        }
        self.free.push(index);
    }

    /// Queues an entry, submitting first if the queue is full.
    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        if self.uring.submission().is_full() {
            retry_interrupted(|| self.uring.submit())?;
        }
        // SAFETY: the entry names memory and files that its slot (or its watch) keeps alive until
        // the completion is taken, and the ring is dropped only after that.
        let pushed = unsafe { self.uring.submission().push(entry) };
        pushed.map_err(|_| io::Error::from(io::ErrorKind::WouldBlock))
    }

    /// Starts (or restarts) the multishot poll of a watched descriptor.
    fn arm_watch(&mut self, index: usize) -> io::Result<()> {
        let fd = types::Fd(self.watches[index].fd.as_raw_fd());
        let events = u32::from(libc::POLLIN.unsigned_abs());
        let entry = opcode::PollAdd::new(fd, events).multi(true).build();
        self.push(&entry.user_data(WATCH_BIT | index as u64))
    }

    /// Handles the completion of a poll: reports the token, arms it again if the kernel let go.
    fn watch_fired(&mut self, completion: &cqueue::Entry) -> Event {
        let index = usize::try_from(completion.user_data() & !WATCH_BIT).unwrap_or(usize::MAX);
        let token = self.watches[index].token;
        if completion.result() < 0 {
            let code = -completion.result();
            let error = io::Error::from_raw_os_error(code);
            log::error!("io_uring: cannot watch a file descriptor: {error}");
            self.blind = Some(code);
        } else if !cqueue::more(completion.flags())
            && let Err(error) = self.arm_watch(index)
        {
            log::error!("io_uring: cannot watch a file descriptor again: {error}");
        }
        Event::Watch(token)
    }
}

/// The number of the registered piece of memory that holds all of `iovec`.
fn registered_index(memory: &[std::ops::Range<usize>], iovec: libc::iovec) -> Option<u16> {
    let start = iovec.iov_base.addr();
    let end = start.checked_add(iovec.iov_len)?;
    let index = memory.iter().position(|piece| piece.start <= start && end <= piece.end)?;
    u16::try_from(index).ok()
}

/// Calls `call` until it is not interrupted. A busy completion queue (EBUSY, EAGAIN) is not an
/// error either: the caller reaps and comes back.
fn retry_interrupted(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<()> {
    loop {
        match call() {
            Ok(_) => return Ok(()),
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EBUSY | libc::EAGAIN) => return Ok(()),
                _ => return Err(error),
            },
        }
    }
}

/// An operation in flight.
struct Operation {
    /// The ring that has it.
    ring: Rc<Ring>,
    /// Its slot; `None` once the result was handed out.
    index: Option<usize>,
}

impl Future for Operation {
    type Output = io::Result<u32>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let index = self.index.expect("polled after completion");
        let result = {
            let mut inner = self.ring.inner.borrow_mut();
            match &mut inner.slots[index].state {
                OpState::Done(result) => *result,
                OpState::Submitted(waker) => {
                    match waker {
                        Some(waker) => waker.clone_from(context.waker()),
                        None => *waker = Some(context.waker().clone()),
                    }
                    return Poll::Pending;
                }
                OpState::Free | OpState::Abandoned => unreachable!("not ours"),
            }
        };
        self.ring.inner.borrow_mut().release(index);
        self.index = None;
        Poll::Ready(u32::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result)))
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        let Some(index) = self.index else { return };
        let mut inner = self.ring.inner.borrow_mut();
        match inner.slots[index].state {
            OpState::Done(_) => inner.release(index),
            _ => inner.slots[index].state = OpState::Abandoned,
        }
    }
}

/// How the kernel knows a file.
#[derive(Debug, Clone, Copy)]
enum Target {
    /// By its number in the ring's table.
    Registered(types::Fixed),
    /// By its descriptor.
    Plain(types::Fd),
}

/// Builds an operation on either kind of [`Target`]: `opcode` is a path to its constructor, which
/// takes the file first.
macro_rules! on_target {
    ($target:expr, $opcode:path $(, $argument:expr)* $(; .$method:ident($value:expr))*) => {
        match $target {
            Target::Registered(file) => $opcode(file $(, $argument)*)$(.$method($value))*.build(),
            Target::Plain(file) => $opcode(file $(, $argument)*)$(.$method($value))*.build(),
        }
    };
}

/// A host file whose I/O goes through a [`Ring`].
#[derive(Debug, Clone)]
pub struct UringStorage {
    /// The ring of this thread.
    ring: Rc<Ring>,
    /// The file.
    file: Arc<HostFile>,
    /// How the ring's operations name it.
    target: Target,
}

impl UringStorage {
    /// The part of `buffer` that one operation can move.
    fn clip(buffer: IoBuffer) -> IoBuffer {
        let len = buffer.len().min(MAX_TRANSFER);
        if len < buffer.len() { buffer.slice(0, len) } else { buffer }
    }
}

impl Storage for UringStorage {
    async fn read(&self, offset: u64, buffer: IoBuffer) -> io::Result<usize> {
        if let Some(mapping) = self.file.mapping()
            && mapping.read(offset, &buffer)
        {
            return Ok(buffer.len());
        }
        let target = self.target;
        let operation =
            self.ring.start(&self.file, Some(Self::clip(buffer)), |iovecs, memory| {
                if let [one] = iovecs {
                    let (base, len) = (one.iov_base.cast(), kernel_len(one.iov_len));
                    match memory {
                        Some(index) => on_target!(
                            target, opcode::ReadFixed::new, base, len, index; .offset(offset)
                        ),
                        None => on_target!(target, opcode::Read::new, base, len; .offset(offset)),
                    }
                } else {
                    let (list, len) = (iovecs.as_ptr(), kernel_len(iovecs.len()));
                    on_target!(target, opcode::Readv::new, list, len; .offset(offset))
                }
            })?;
        Ok(operation.await? as usize)
    }

    async fn write(&self, offset: u64, buffer: IoBuffer) -> io::Result<usize> {
        if let Some(mapping) = self.file.mapping()
            && mapping.write(offset, &buffer)
        {
            return Ok(buffer.len());
        }
        let target = self.target;
        let operation =
            self.ring.start(&self.file, Some(Self::clip(buffer)), |iovecs, memory| {
                if let [one] = iovecs {
                    let (base, len) = (one.iov_base.cast_const().cast(), kernel_len(one.iov_len));
                    match memory {
                        Some(index) => on_target!(
                            target, opcode::WriteFixed::new, base, len, index; .offset(offset)
                        ),
                        None => on_target!(target, opcode::Write::new, base, len; .offset(offset)),
                    }
                } else {
                    let (list, len) = (iovecs.as_ptr(), kernel_len(iovecs.len()));
                    on_target!(target, opcode::Writev::new, list, len; .offset(offset))
                }
            })?;
        Ok(operation.await? as usize)
    }

    async fn zero(&self, range: ByteRange, mode: ZeroMode) -> io::Result<()> {
        let target = self.target;
        let flags = i32::try_from(fallocate_flags(mode).bits()).map_err(io::Error::other)?;
        let operation = self.ring.start(&self.file, None, |_, _| {
            let len = range.len();
            on_target!(target, opcode::Fallocate::new, len; .offset(range.start()); .mode(flags))
        })?;
        let result = operation.await;
        if let Some(mapping) = self.file.mapping() {
            mapping.forget(range);
        }
        result.map(|_| ())
    }

    async fn sync(&self) -> io::Result<()> {
        if self.file.is_in_memory() {
            // Nothing is behind such a file: fdatasync(2) does nothing there, and io_uring would
            // hand even that to a worker thread.
            return Ok(());
        }
        let target = self.target;
        let operation = self.ring.start(
            &self.file,
            None,
            |_, _| on_target!(target, opcode::Fsync::new; .flags(types::FsyncFlags::DATASYNC)),
        )?;
        operation.await.map(|_| ())
    }

    fn file_len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.file().set_len(len)
    }

    fn alignment(&self) -> Alignment {
        self.file.alignment()
    }

    fn bounce_budget(&self) -> Option<&MemoryBudget> {
        Some(&self.ring.bounces)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<ByteRange>> {
        self.file.next_data(offset)
    }
}

/// A length or count as the kernel takes it. It fits: `clip` keeps transfers below 2 GiB and the
/// segment list has at most 1024 entries.
fn kernel_len(len: usize) -> u32 {
    u32::try_from(len).expect("clipped to the kernel's limit")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Mode, OFlags, open};

    #[test]
    fn nobody_sleeps_on_a_descriptor_that_cannot_be_watched() {
        let ring = Ring::new().unwrap();
        // As every descriptor is on a kernel without multishot polls.
        let place = open("/", OFlags::PATH, Mode::empty()).unwrap();
        ring.watch(Arc::new(place), 1).unwrap();
        ring.submit_and_wait().unwrap();
        ring.reap(|_| {});
        ring.submit_and_wait().unwrap_err();
    }
}
