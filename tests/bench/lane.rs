//! Two ways to send requests: a virtqueue of a vhost-user back end, and io_uring on a file.
//!
//! Both are a [`Lane`]: requests are queued, submitted in one go, and completions polled without
//! sleeping. The loop above (`drive`) is the same code for both, so that the only difference
//! between the limit and a server is what happens between submission and completion.
//!
//! Not here: what is sent and when (`drive`), and where the server comes from (`server`).
#![expect(unsafe_code, reason = "requests name memory by its address")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};
use virtio_driver::{
    QueueNotifier, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue,
    VirtioBlkReqBuf, VirtioBlkTransport, VirtioFeatureFlags,
};

use super::memory::Memory;

/// Ring size of the virtqueues: three descriptors for each of 128 requests, and a power of two.
pub const QUEUE_SIZE: u16 = 512;

/// Entries of the io_uring of the limit.
const RING_ENTRIES: u32 = 256;

/// How long a back end may take to listen.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// One request. Offsets are bytes of the disk; the length is the lane's block size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Reads one block.
    Read(u64),
    /// Writes one block.
    Write(u64),
    /// Makes everything that was written durable.
    Flush,
}

/// Sends requests and collects completions. Slot `i` owns block `i` of the lane's memory.
pub trait Lane: Send {
    /// Called once, on the thread that will use the lane.
    fn begin(&mut self) -> io::Result<()> {
        Ok(())
    }
    /// Queues a request that uses `slot`, which must be free.
    fn push(&mut self, op: Op, slot: usize) -> io::Result<()>;
    /// Tells the other side about what was queued, if it has to be told.
    fn submit(&mut self) -> io::Result<()>;
    /// Adds the slot and the result (0 or a negative errno) of everything that has completed.
    fn reap(&mut self, done: &mut Vec<(usize, i32)>) -> io::Result<()>;
}

/// A virtqueue.
pub struct VirtioLane<'m> {
    /// The queue; the context of a request is its slot.
    queue: VirtioBlkQueue<'m, usize>,
    /// The kick.
    notifier: Box<dyn QueueNotifier>,
    /// The buffers.
    memory: &'m Memory,
    /// Bytes per request.
    block: usize,
}

impl Lane for VirtioLane<'_> {
    fn push(&mut self, op: Op, slot: usize) -> io::Result<()> {
        let buffer = self.memory.pointer(slot * self.block, self.block);
        match op {
            // SAFETY: the buffer is part of a mapping that outlives the queue, and its slot has
            // no other request.
            Op::Read(offset) => unsafe { self.queue.read_raw(offset, buffer, self.block, slot) },
            // SAFETY: as above.
            Op::Write(offset) => unsafe { self.queue.write_raw(offset, buffer, self.block, slot) },
            Op::Flush => self.queue.flush(slot),
        }
    }

    fn submit(&mut self) -> io::Result<()> {
        if self.queue.avail_notif_needed() { self.notifier.notify() } else { Ok(()) }
    }

    fn reap(&mut self, done: &mut Vec<(usize, i32)>) -> io::Result<()> {
        done.extend(self.queue.completions().map(|c| (c.context, c.ret)));
        Ok(())
    }
}

/// A connection to a vhost-user back end. The lanes go first when it ends.
pub struct Connection<'m> {
    /// The queues.
    pub lanes: Vec<VirtioLane<'m>>,
    /// The connection, which owns the memory of the rings.
    _transport: Box<VirtioBlkTransport>,
}

impl<'m> Connection<'m> {
    /// Connects to the back end at `socket` with one queue for each of `memories`, and waits
    /// until it listens. No queue wants to be notified of completions.
    pub fn open(socket: &Path, memories: &'m [Memory], block: usize) -> io::Result<Self> {
        let features = VirtioFeatureFlags::VERSION_1.bits()
            | VirtioFeatureFlags::RING_EVENT_IDX.bits()
            | VirtioBlkFeatureFlags::FLUSH.bits()
            | VirtioBlkFeatureFlags::MQ.bits();
        let mut transport: Box<VirtioBlkTransport> = connect(socket, features)?;
        let mut queues = VirtioBlkQueue::setup_queues(&mut *transport, memories.len(), QUEUE_SIZE)?;
        for memory in memories {
            let fd = memory.file().as_raw_fd();
            transport.map_mem_region(memory.address(), memory.len(), fd, 0)?;
        }
        for queue in &mut queues {
            queue.set_used_notif_enabled(false);
        }
        let lanes = queues.into_iter().zip(memories).enumerate();
        let lanes = lanes.map(|(at, (queue, memory))| VirtioLane {
            queue,
            notifier: transport.get_submission_notifier(at),
            memory,
            block,
        });
        Ok(Self { lanes: lanes.collect(), _transport: transport })
    }
}

/// Connects as soon as somebody listens.
fn connect(
    socket: &Path,
    features: u64,
) -> io::Result<Box<VhostUser<VirtioBlkConfig, VirtioBlkReqBuf>>> {
    let name = socket.to_str().ok_or_else(|| io::Error::other("the socket's path is odd"))?;
    let deadline = Instant::now() + CONNECT_TIMEOUT;
    loop {
        match VhostUser::new(name, features) {
            Ok(transport) => return Ok(Box::new(transport)),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) && Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_micros(200));
            }
            Err(error) => {
                return Err(io::Error::new(error.kind(), format!("{name}: {error}")));
            }
        }
    }
}

/// io_uring on a file.
pub struct UringLane<'m> {
    /// The ring, with the file registered as number 0.
    ring: IoUring,
    /// The buffers.
    memory: &'m Memory,
    /// Bytes per request.
    block: usize,
    /// What each slot's request returns when all is well.
    expected: Vec<i32>,
}

impl<'m> UringLane<'m> {
    /// A ring on `file`.
    pub fn new(file: &File, memory: &'m Memory, block: usize) -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .setup_defer_taskrun()
            .setup_r_disabled()
            .build(RING_ENTRIES)?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        Ok(Self { ring, memory, block, expected: vec![0; memory.len() / block] })
    }
}

impl Lane for UringLane<'_> {
    fn begin(&mut self) -> io::Result<()> {
        // The thread that enables the ring is the one that may submit.
        self.ring.submitter().register_enable_rings()
    }

    fn push(&mut self, op: Op, slot: usize) -> io::Result<()> {
        let buffer = self.memory.pointer(slot * self.block, self.block);
        let len = u32::try_from(self.block).map_err(io::Error::other)?;
        let file = types::Fixed(0);
        let transferred = i32::try_from(self.block).map_err(io::Error::other)?;
        let (entry, expected): (squeue::Entry, i32) = match op {
            Op::Read(offset) => {
                (opcode::Read::new(file, buffer, len).offset(offset).build(), transferred)
            }
            Op::Write(offset) => {
                (opcode::Write::new(file, buffer, len).offset(offset).build(), transferred)
            }
            Op::Flush => (opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(), 0),
        };
        self.expected[slot] = expected;
        let entry = entry.user_data(u64::try_from(slot).map_err(io::Error::other)?);
        // SAFETY: the buffer is part of a mapping that outlives the ring, and its slot has no
        // other request.
        unsafe { self.ring.submission().push(&entry) }.map_err(io::Error::other)
    }

    fn submit(&mut self) -> io::Result<()> {
        self.ring.submit().map(|_| ())
    }

    fn reap(&mut self, done: &mut Vec<(usize, i32)>) -> io::Result<()> {
        // Completions of deferred work appear when the thread asks the kernel for them.
        if self.ring.completion().is_empty() && self.ring.submission().taskrun() {
            self.ring.submit()?;
        }
        for entry in self.ring.completion() {
            let slot = usize::try_from(entry.user_data()).map_err(io::Error::other)?;
            let result = match entry.result() {
                result if result == self.expected[slot] => 0,
                result if result < 0 => result,
                _ => -libc::EIO,
            };
            done.push((slot, result));
        }
        Ok(())
    }
}
