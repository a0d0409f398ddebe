//! A queue's worker: takes chains, serves them, publishes, sleeps when there is nothing to do.
//!
//! One thread per queue, with a ring of its own for its I/O; queues share the image's state and
//! nothing of this. The loop keeps the framework's thread until a pause is asked for, drains what
//! it has taken, and leaves no request behind.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::bell::Bell;
use super::polling::Polling;
use super::recovery::RecoveryError;
use super::vring::{RunPermit, ring_eventfd};
use crate::executor::TaskPool;
use crate::image::journal::BitJournal;
use crate::image::open::OpenImage;
use crate::log_limit::LogLimit;
use crate::storage::buffer::IoMemory;
use crate::storage::uring::Ring;
use crate::virtio::chain::{self, Chain, MAX_PIECES};
use crate::virtio::device::{BlockDevice, DeviceState};
use crate::virtio::guest_memory::GuestMap;
use crate::virtio::inflight::InflightQueue;
use crate::virtio::request::Used;
use crate::virtio::ring::{RingError, SplitRing};

/// The most requests of one queue that are carried out at the same time; the others wait in the
/// ring.
const MAX_REQUESTS: usize = 128;

/// The most chains that are taken together: see [`Worker::take`].
const BATCH: usize = 16;

/// The most segments of a list that counts as short: what a driver uses that keeps to `seg_max`.
const SHORT_LIST: usize = 128;

/// The most longer lists of one queue: while so many requests have one, no chain is taken, since
/// any might need one more.
const LONG_LISTS: usize = BATCH;

/// What the segment lists of a queue take at most: 144 short ones of 2 KiB and 16 long ones of 16
/// KiB are 544 KiB. Each has a copy for the kernel while its I/O runs (`storage::uring`).
const _: () =
    assert!(((MAX_REQUESTS + BATCH) * SHORT_LIST + LONG_LISTS * MAX_PIECES) * 16 <= 544 << 10);

/// Token of the kick.
const KICK: u32 = 0;
/// Token of the wake-up.
const WAKE: u32 = 1;

/// Why a queue cannot run.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The driver's ring cannot be used.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// io_uring failed.
    #[error("io_uring: {0}")]
    Io(#[from] io::Error),
    /// Its requests and their bits would not outlive us, as those of the other queues do.
    #[error(transparent)]
    Recovery(#[from] RecoveryError),
    /// A descriptor of the front end's is not what it is to be.
    #[error("{0} is not an eventfd")]
    NotEventfd(&'static str),
    /// The front end has cut a file of its memory: what was read of it cannot be relied on.
    #[error("the front end took guest memory away")]
    MemoryGone,
}

impl QueueError {
    /// Whether the connection is to end: it is the front end's mistake, not its guest's, and it is
    /// to hear of it.
    #[must_use]
    pub fn ends_connection(&self) -> bool {
        matches!(self, Self::Recovery(_) | Self::NotEventfd(_) | Self::MemoryGone)
    }
}

/// What all queues of a connection share.
#[derive(Debug)]
pub struct QueueContext {
    /// The disk.
    pub image: Arc<OpenImage>,
    /// The device.
    pub device: Arc<DeviceState>,
    /// The longest that a queue polls before it sleeps.
    pub poll_limit: Duration,
    /// Whether guest memory is registered with each queue's io_uring.
    pub register_memory: bool,
    /// Bounds what a guest can write to the log: malformed chains, rings that are beyond use,
    /// configuration.
    pub log_limit: LogLimit,
}

/// What of a queue outlives the process.
#[derive(Debug)]
pub struct Heritage {
    /// Its requests in flight.
    pub inflight: InflightQueue,
    /// The bits that its requests set.
    pub journal: Option<Arc<BitJournal>>,
}

/// Runs a queue until a pause is asked for. The ring's position is stored in any case.
///
/// # Errors
/// If the queue cannot run (any further): it is at rest then, with nothing in flight.
pub fn run(
    context: &QueueContext,
    permit: &RunPermit,
    map: &Rc<GuestMap>,
    indirect: bool,
    heritage: Option<Heritage>,
) -> Result<(), QueueError> {
    let mut virtqueue = SplitRing::new(map, permit.setup)?;
    let mut journal = None;
    if let Some(heritage) = heritage {
        journal = heritage.journal;
        let count = virtqueue.track(heritage.inflight);
        if count > 0 {
            log::info!("{count} requests were in flight when the last process ended: once more");
        }
    }
    let ring = Ring::new()?;
    if context.register_memory
        && let Err(error) = ring.register_memory(&map.regions(), map.owner())
    {
        log::warn!("guest memory is not registered: {error} (see RLIMIT_MEMLOCK)");
    }
    let bell = make_bell(permit)?;
    ring.watch(Arc::clone(&permit.kick), KICK)?;
    ring.watch(Arc::clone(permit.control().wake_fd()), WAKE)?;
    let image = context.image.handle(|file| ring.storage(file)).with_journal(journal);
    let device = BlockDevice::new(Arc::clone(&context.device), image);
    let wake: Arc<OwnedFd> = Arc::clone(permit.control().wake_fd());
    let pool = TaskPool::new(MAX_REQUESTS, Box::new(move || ring_eventfd(&wake)));
    let source = ChainSource::new(map, indirect);
    let polling = Polling::new(context.poll_limit);
    let mut worker = Worker {
        context,
        permit,
        ring: &ring,
        bell,
        virtqueue: &mut virtqueue,
        source,
        batch: Vec::with_capacity(BATCH),
        polling,
    };
    let result = worker.run(pool, |chain| device.serve(chain));
    permit.store_indices(&virtqueue);
    context.image.release_mappings();
    result
}

/// What calls the driver.
fn make_bell(permit: &RunPermit) -> Result<Bell, QueueError> {
    let mut bell = Bell::new()?;
    // Only to see that it is an eventfd: anything else might wait for the front end when it is
    // polled.
    attach(&mut bell, Some(&permit.kick), "the kick")?;
    attach(&mut bell, permit.call.as_deref(), "the call")?;
    Ok(bell)
}

/// Attaches `bell` to a descriptor of the front end's.
fn attach(bell: &mut Bell, fd: Option<&OwnedFd>, name: &'static str) -> Result<(), QueueError> {
    bell.attach(fd.map(AsFd::as_fd)).map_err(|error| match error.raw_os_error() {
        Some(libc::EINVAL) => QueueError::NotEventfd(name),
        _ => QueueError::Io(error),
    })
}

/// Where chains come from: guest memory, and the segment lists that they are walked into.
struct ChainSource {
    /// Guest memory.
    map: Rc<GuestMap>,
    /// The map as the owner of segments.
    owner: Rc<dyn std::any::Any>,
    /// Whether indirect descriptors were negotiated.
    indirect: bool,
    /// Segment lists, reused; at most one for each request and each chain of a batch.
    memories: Vec<Rc<IoMemory>>,
    /// Which of them was used last.
    last: usize,
    /// How many of them are long, spent ones among them.
    long: usize,
}

/// Whether a list has room for more than [`SHORT_LIST`] segments.
fn is_long(memory: &IoMemory) -> bool {
    memory.capacity() > SHORT_LIST
}

impl ChainSource {
    /// A source on `map`.
    fn new(map: &Rc<GuestMap>, indirect: bool) -> Self {
        let (map, owner) = (Rc::clone(map), map.owner());
        Self { map, owner, indirect, memories: Vec::new(), last: 0, long: 0 }
    }

    /// How many chains may be walked before the lists take more memory than they may, the long ones
    /// that no request has any more being given back.
    fn room(&mut self) -> usize {
        if self.long > 0 {
            self.long = 0;
            for memory in self.memories.iter_mut().filter(|memory| is_long(memory)) {
                match Rc::get_mut(memory) {
                    Some(spent) => *spent = IoMemory::default(),
                    None => self.long += 1,
                }
            }
        }
        LONG_LISTS.saturating_sub(self.long)
    }

    /// Walks the chain at `head`.
    fn walk(&mut self, virtqueue: &SplitRing, head: u16) -> Result<Chain, chain::ChainError> {
        let table = (virtqueue.descriptors(), virtqueue.size());
        let memory = self.spent_memory();
        let memory = &mut self.memories[memory];
        let was_long = is_long(memory);
        let result = chain::walk(&self.map, &self.owner, table, self.indirect, head, memory);
        self.long += usize::from(is_long(memory) && !was_long);
        result
    }

    /// The number of a segment list that no request has any more, a new one if need be.
    fn spent_memory(&mut self) -> usize {
        let count = self.memories.len();
        let mut after = (1..=count).map(|step| (self.last + step) % count);
        let spent = after.find(|index| Rc::strong_count(&self.memories[*index]) == 1);
        self.last = spent.unwrap_or_else(|| {
            self.memories.push(Rc::default());
            count
        });
        self.last
    }
}

/// The heads of a batch.
#[derive(Default)]
struct Heads {
    /// The heads; those from `len` on mean nothing.
    heads: [u16; BATCH],
    /// How many there are.
    len: usize,
}

impl Heads {
    /// Adds a head; there is room for [`BATCH`].
    fn push(&mut self, head: u16) {
        if let Some(place) = self.heads.get_mut(self.len) {
            *place = head;
            self.len += 1;
        }
    }
}

impl std::ops::Deref for Heads {
    type Target = [u16];

    fn deref(&self) -> &[u16] {
        &self.heads[..self.len]
    }
}

/// A running queue.
struct Worker<'a> {
    /// What queues share.
    context: &'a QueueContext,
    /// The right to run this one.
    permit: &'a RunPermit,
    /// This thread's I/O.
    ring: &'a Ring,
    /// What calls the driver.
    bell: Bell,
    /// The driver's ring.
    virtqueue: &'a mut SplitRing,
    /// Where chains come from.
    source: ChainSource,
    /// The chains of a batch. Empty outside [`Worker::take`].
    batch: Vec<Chain>,
    /// How long to stay awake.
    polling: Polling,
}

impl Worker<'_> {
    /// The loop. `serve` makes the task of a chain.
    fn run<F: Future<Output = Used>>(
        &mut self,
        mut pool: TaskPool<F>,
        serve: impl Fn(Chain) -> F,
    ) -> Result<(), QueueError> {
        let mut failure = None;
        self.virtqueue.disable_kicks();
        loop {
            let mut progress = self.ring.reap(|_token| {});
            progress += pool.poll_ready(|used| self.virtqueue.push_used(used.head, used.len));
            let stopping = failure.is_some() || self.permit.control().pause_wanted();
            // What another process had taken is in flight: it is drained, too.
            if !stopping || (failure.is_none() && self.virtqueue.has_replay()) {
                match self.take(&mut pool, &serve) {
                    Ok(taken) => progress += taken,
                    Err(error) => failure = Some(error.into()),
                }
            }
            if self.source.map.has_lost_pages() {
                // Before anything is published that was done with zeros for the guest's data.
                failure = Some(QueueError::MemoryGone);
            } else if let Err(error) = self.publish() {
                failure = Some(error);
            }
            if stopping
                && pool.running() == 0
                && (failure.is_some() || !self.virtqueue.has_replay())
            {
                return failure.map_or(Ok(()), Err);
            }
            if progress > 0 {
                self.ring.submit()?;
            } else if stopping || failure.is_none() {
                // Not after a failure of this turn, which the next one sees.
                self.sleep(&pool, stopping)?;
            }
        }
    }

    /// Shows the driver what is done, and calls it if it wants to hear of that.
    fn publish(&mut self) -> Result<(), QueueError> {
        let mut is_due = self.virtqueue.publish();
        if let Some(call) = self.permit.control().wanted_call() {
            attach(&mut self.bell, call.as_deref(), "the call")?;
            is_due = true;
        }
        if is_due {
            self.bell.ring()?;
        }
        Ok(())
    }

    /// Takes as many chains as there are and as there is room for. Returns how many.
    ///
    /// Requests that are done at once take no room, and a driver can make more of them as fast as
    /// we take them. So this ends all the same after [`MAX_REQUESTS`], for the others to go on and
    /// for what is done to be published, and after the present batch if a pause is wanted or the
    /// memory has gone.
    fn take<F: Future<Output = Used>>(
        &mut self,
        pool: &mut TaskPool<F>,
        serve: &impl Fn(Chain) -> F,
    ) -> Result<usize, RingError> {
        let mut taken = 0;
        while taken < MAX_REQUESTS {
            let room = self.room(pool);
            let (heads, failure) = self.pop_batch(room.min(BATCH));
            taken += heads.len();
            self.serve_batch(&heads, pool, serve);
            if let Some(failure) = failure {
                return Err(failure);
            }
            let is_over = self.permit.control().pause_wanted() || self.source.map.has_lost_pages();
            if heads.is_empty() || is_over {
                break;
            }
        }
        Ok(taken)
    }

    /// How many more chains can be taken now.
    fn room<F: Future>(&mut self, pool: &TaskPool<F>) -> usize {
        pool.room().min(self.source.room())
    }

    /// Pops at most `room` heads, and what went wrong if anything did.
    fn pop_batch(&mut self, room: usize) -> (Heads, Option<RingError>) {
        let mut heads = Heads::default();
        while heads.len() < room {
            match self.virtqueue.pop() {
                Ok(Some(head)) => {
                    self.virtqueue.descriptors().prefetch_entry(head);
                    heads.push(head);
                }
                Ok(None) => break,
                Err(error) => return (heads, Some(error)),
            }
        }
        (heads, None)
    }

    /// Walks the chains of a batch, then starts them.
    ///
    /// In steps over the whole batch, because each step reads memory that the driver has just
    /// written on another processor: descriptors, then headers. Fetched one step ahead, these trips
    /// overlap.
    fn serve_batch<F: Future<Output = Used>>(
        &mut self,
        heads: &[u16],
        pool: &mut TaskPool<F>,
        serve: &impl Fn(Chain) -> F,
    ) {
        for &head in heads {
            match self.source.walk(self.virtqueue, head) {
                Ok(chain) => {
                    chain.prefetch();
                    self.batch.push(chain);
                }
                Err(error) => {
                    self.context.log_limit.debug(|| log::debug!("chain {head}: {error}"));
                    let used = Used::untouched(head);
                    self.virtqueue.push_used(used.head, used.len);
                }
            }
        }
        for chain in self.batch.drain(..) {
            if let Some(used) = pool.start(serve(chain)) {
                self.virtqueue.push_used(used.head, used.len);
            }
        }
    }

    /// Sleeps until an I/O completes, the driver kicks, or somebody wakes us.
    fn sleep<F: Future<Output = Used>>(
        &mut self,
        pool: &TaskPool<F>,
        stopping: bool,
    ) -> Result<(), QueueError> {
        // With every place taken new chains cannot be served: no kick is wanted for them.
        let wants_chains = !stopping && self.room(pool) > 0;
        // While the host works on something it will wake us soon enough, and polling would only
        // take the processor away from it: poll for the driver alone.
        let idle = wants_chains && self.ring.in_flight() == 0;
        let start = Instant::now();
        if idle && self.poll(pool) {
            return Ok(());
        }
        let more = wants_chains && self.virtqueue.enable_kicks();
        if !more && pool.may_sleep() {
            // A pause that was asked for before `may_sleep` has rung the wake-up, which is watched.
            self.ring.submit_and_wait()?;
            pool.awake();
            if idle {
                self.polling.slept(start.elapsed());
            }
        }
        self.virtqueue.disable_kicks();
        Ok(())
    }

    /// Polls for a while. Returns whether there is something to do.
    fn poll<F: Future<Output = Used>>(&self, pool: &TaskPool<F>) -> bool {
        let control = self.permit.control();
        self.polling.spin(|| {
            self.virtqueue.has_available()
                || self.ring.has_work()
                || pool.has_ready()
                || control.pause_wanted()
        })
    }
}
