//! The workloads, one for each row of the table, and the requests that they consist of.
//!
//! Every workload is a closed loop: a fixed number of requests in flight, the next one queued when
//! one completes.
//!
//! Not here: sending (`drive`), and what the disks are (`disks`).

use std::sync::Arc;

use super::content::Rng;
use super::lane::Op;

/// What the disk looks like when the workload starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Every block has been written through the target.
    Allocated,
    /// An overlay without a block of its own; the same one in all rounds, since it is only read.
    Untouched,
    /// A new overlay, or for raw targets a new file that is one hole.
    Fresh,
}

/// How the backing file is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// As each server does by default.
    Default,
    /// Past the page cache everywhere.
    Direct,
    /// Through the page cache everywhere, with all of the file in it.
    Hot,
}

/// The order of the offsets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Random blocks, some of them again and again.
    Random,
    /// One after the other, from the start again at the end.
    Sequential,
    /// Every block once, random within windows of [`WINDOW`] bytes.
    OnceRandom,
    /// Every block once, in order.
    OnceSequential,
}

/// A run that writes every block once may end early, but only at a multiple of this many bytes: a
/// part of a window would have more first writes per cluster than the whole.
pub const WINDOW: u64 = 128 << 20;

/// A row of the table.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Name of the row.
    pub name: &'static str,
    /// State of the disk at the start.
    pub state: State,
    /// Cache of the backing file.
    pub backing: Backing,
    /// Order of the offsets.
    pub order: Order,
    /// Reads in 100 transfers; the rest are writes.
    pub reads: u64,
    /// Every how many requests one is a flush; 0: never.
    pub flush_every: u64,
    /// Bytes per request.
    pub block: usize,
    /// Requests in flight per queue.
    pub depth: usize,
    /// Queues, each with a thread of its own.
    pub queues: usize,
    /// Whether it makes no difference on tmpfs to another row, and is run on disks only.
    pub disk_only: bool,
}

/// 4 KiB random transfers at depth 32 on an allocated disk: what most rows are variations of.
const BASIC: Workload = Workload {
    name: "",
    state: State::Allocated,
    backing: Backing::Default,
    order: Order::Random,
    reads: 0,
    flush_every: 0,
    block: 4096,
    depth: 32,
    queues: 1,
    disk_only: false,
};

impl Workload {
    /// All of them, in the table's order.
    pub fn all() -> Vec<Self> {
        let read = Self { reads: 100, ..BASIC };
        let mixed = Self { reads: 70, ..BASIC };
        let sequential = Self { order: Order::Sequential, block: 1 << 20, depth: 8, ..BASIC };
        let untouched = Self { state: State::Untouched, ..read.clone() };
        let first = Self { state: State::Fresh, order: Order::OnceRandom, ..BASIC };
        vec![
            Self { name: "randread-qd1", depth: 1, ..read.clone() },
            Self { name: "randread-qd32", ..read.clone() },
            Self { name: "randread-qd128", depth: 128, ..read.clone() },
            Self { name: "randwrite-qd1", depth: 1, ..BASIC },
            Self { name: "randwrite-qd32", ..BASIC },
            Self { name: "randwrite-qd128", depth: 128, ..BASIC },
            Self { name: "randrw-qd32", ..mixed.clone() },
            Self { name: "randrw-qd128", depth: 128, ..mixed },
            Self { name: "randread-qd32-2q", queues: 2, ..read },
            Self { name: "randwrite-qd32-2q", queues: 2, ..BASIC },
            Self { name: "seqread-1m", reads: 100, ..sequential.clone() },
            Self { name: "seqwrite-1m", ..sequential },
            Self { name: "write-flush", flush_every: 16, ..BASIC },
            Self { name: "backing-read", backing: Backing::Direct, ..untouched.clone() },
            Self { name: "backing-read-hot", backing: Backing::Hot, disk_only: true, ..untouched },
            Self { name: "first-touch-4k", ..first.clone() },
            Self { name: "first-touch-64k", block: 64 << 10, ..first.clone() },
            Self {
                name: "first-touch-seq",
                order: Order::OnceSequential,
                block: 1 << 20,
                depth: 8,
                ..first.clone()
            },
            Self { name: "first-touch-flush", flush_every: 16, ..first },
        ]
    }

    /// Writes every block of the disk once, in order: prepares allocated overlays.
    pub fn fill() -> Self {
        Self { order: Order::OnceSequential, block: 1 << 20, depth: 8, ..BASIC }
    }

    /// Whether every block is written once, rather than as many as fit the time.
    pub fn is_finite(&self) -> bool {
        matches!(self.order, Order::OnceRandom | Order::OnceSequential)
    }

    /// Whether each moment of it is like any other: it goes on as long as it may, and asks for
    /// nothing that takes longer now and then.
    pub fn is_steady(&self) -> bool {
        !self.is_finite() && self.flush_every == 0
    }

    /// The requests for a disk of `size` bytes; another `seed`, another order.
    pub fn plan(&self, size: u64, seed: u64) -> Plan {
        let block = u64::try_from(self.block).unwrap_or(u64::MAX);
        let blocks = size / block;
        let mut rng = Rng::new(seed);
        let window = WINDOW / block;
        let list = match self.order {
            Order::OnceRandom => permutation(blocks, window, &mut rng),
            Order::OnceSequential => (0..blocks).collect(),
            Order::Random | Order::Sequential => Vec::new(),
        };
        Plan {
            reads: self.reads,
            flush_every: self.flush_every,
            order: self.order,
            block,
            blocks,
            window,
            list: list.into(),
            position: 0,
            issued: 0,
            rng,
        }
    }
}

/// The numbers below `count`, shuffled within windows of `window` numbers.
fn permutation(count: u64, window: u64, rng: &mut Rng) -> Vec<u64> {
    let mut list: Vec<u64> = (0..count).collect();
    for piece in list.chunks_mut(usize::try_from(window).unwrap_or(usize::MAX)) {
        for end in (1..piece.len()).rev() {
            let below = u64::try_from(end + 1).unwrap_or(u64::MAX);
            let other = usize::try_from(rng.below(below)).unwrap_or(0);
            piece.swap(end, other);
        }
    }
    list
}

/// The requests of one thread.
#[derive(Debug, Clone)]
pub struct Plan {
    /// As in [`Workload`].
    reads: u64,
    /// As in [`Workload`].
    flush_every: u64,
    /// As in [`Workload`].
    order: Order,
    /// Bytes per request.
    block: u64,
    /// Blocks of the disk.
    blocks: u64,
    /// Blocks in a window.
    window: u64,
    /// The blocks in their order, when every one is written once.
    list: Arc<[u64]>,
    /// How many transfers were handed out.
    position: u64,
    /// How many requests were handed out, flushes included.
    issued: u64,
    /// Random numbers.
    rng: Rng,
}

impl Plan {
    /// The next request; `None` at the end: of the list, or of a window when the time is over.
    pub fn next(&mut self, time_is_over: bool) -> Option<Op> {
        if self.is_at_end(time_is_over) {
            return None;
        }
        self.issued += 1;
        if self.flush_every > 0 && self.issued.is_multiple_of(self.flush_every) {
            return Some(Op::Flush);
        }
        let number = match self.order {
            Order::Random => self.rng.below(self.blocks),
            Order::Sequential => self.position % self.blocks,
            Order::OnceRandom | Order::OnceSequential => {
                self.list[usize::try_from(self.position).unwrap_or(usize::MAX)]
            }
        };
        self.position += 1;
        let offset = number * self.block;
        let is_read = match self.reads {
            0 => false,
            100 => true,
            reads => self.rng.below(100) < reads,
        };
        Some(if is_read { Op::Read(offset) } else { Op::Write(offset) })
    }

    /// Whether there is no next request.
    fn is_at_end(&self, time_is_over: bool) -> bool {
        match self.order {
            Order::Random | Order::Sequential => time_is_over,
            Order::OnceRandom | Order::OnceSequential => {
                self.position == self.blocks
                    || time_is_over
                        && self.position > 0
                        && self.position.is_multiple_of(self.window)
            }
        }
    }

    /// Whether every block of the disk was handed out, for plans that hand out each once.
    pub fn is_complete(&self) -> bool {
        self.position == self.blocks
    }
}
