//! The two hot loops, for counting their instructions: `scripts/bench-loops`.
//!
//! A virtqueue's requests, from the available ring to the used ring, and the allocation map. Each
//! loop runs in one thread, without root and without a daemon. What is to be counted runs inside
//! [`measured`], and callgrind counts there alone, so making requests and checking answers costs
//! nothing. Everything is seeded, and memory is the same in each run: so are the counts.
//!
//! Promises: every answer is checked, and a wrong one ends the program with a panic. That works
//! without callgrind too, and is all that a run without it says.
//!
//! Not here: I/O. The storage completes at once and moves no data, since copying 4 KiB would drown
//! the rest; io_uring, kicks, sleeping and polling are `compare`'s. Nor time.

#[path = "../queue/mod.rs"]
mod queue;

use std::cell::Cell;
use std::io;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;

use addcow::executor::TaskPool;
use addcow::format::BitmapGeometry;
use addcow::image::allocation::AllocationMap;
use addcow::image::chain::Chain as BackingChain;
use addcow::image::extent::{Extent, ExtentKind};
use addcow::image::journal::BitJournal;
use addcow::image::{Image, ImageState};
use addcow::storage::shared_memory::SharedMemory;
use addcow::storage::{Alignment, IoBuffer, Storage, ZeroMode};
use addcow::units::{ByteRange, ClusterSize};
use addcow::virtio::chain::Chain;
use addcow::virtio::request::Used;
use fastrand::Rng;

use queue::{BLOCK, Queue, READ, SLOTS, WRITE};

/// Size of the disk in bytes: 262144 clusters, 8 pages of the bitmap.
const DISK: u64 = 1 << 30;
/// Requests of one loop.
const REQUESTS: usize = 16384;
/// The most chains that are taken together, as in `vhost_user::queue`.
const BATCH: usize = 16;
/// Look-ups of one loop.
const LOOK_UPS: usize = 4096;
/// Clusters that are marked between two freezes.
const MARKS: usize = 1024;
/// Seed of every random choice.
const SEED: u64 = 3;

/// A loop.
struct Loop {
    /// How the command line knows it.
    name: &'static str,
    /// What is counted.
    unit: &'static str,
    /// Runs it, and returns how many of the units were measured.
    run: fn() -> u64,
}

/// Every loop, in the order of the table.
const LOOPS: [Loop; 11] = [
    Loop {
        name: "read",
        unit: "request: 4 KiB read of an allocated cluster",
        run: || requests(READ, true, false),
    },
    Loop {
        name: "backing-read",
        unit: "request: 4 KiB read of an unallocated cluster, raw backing file",
        run: || requests(READ, false, false),
    },
    Loop {
        name: "write",
        unit: "request: 4 KiB write of an allocated cluster",
        run: || requests(WRITE, true, false),
    },
    Loop {
        name: "first-write",
        unit: "request: first write of a whole 4 KiB cluster",
        run: || requests(WRITE, false, false),
    },
    Loop {
        name: "read-kept",
        unit: "as read, requests in flight being kept for the next process",
        run: || requests(READ, true, true),
    },
    Loop {
        name: "first-write-kept",
        unit: "as first-write, requests and new bits being kept for the next process",
        run: || requests(WRITE, false, true),
    },
    Loop {
        name: "resolve-4k",
        unit: "look-up of 4 KiB, random bitmap",
        run: || resolve(BLOCK, 0.5),
    },
    Loop {
        name: "resolve-1m",
        unit: "look-up of 1 MiB, random bitmap (about 128 extents)",
        run: || resolve(1 << 20, 0.5),
    },
    Loop {
        name: "resolve-1m-full",
        unit: "look-up of 1 MiB, all allocated (1 extent)",
        run: || resolve(1 << 20, 1.0),
    },
    Loop {
        name: "mark",
        unit: "cluster marked allocated, in random order",
        run: || mark_and_freeze(Part::Mark),
    },
    Loop {
        name: "freeze",
        unit: "bitmap page of 4 KiB frozen for a flush",
        run: || mark_and_freeze(Part::Freeze),
    },
];

/// Runs what is to be counted. The name is what callgrind counts by, so nothing else may have it,
/// and there is one copy of it, never a part of its caller.
#[inline(never)]
fn measured(body: &mut dyn FnMut()) {
    body();
    // Without this the call above would be a jump, and this function would have ended before it.
    std::hint::black_box(());
}

/// A storage on which every transfer is complete at once, and moves nothing.
#[derive(Debug, Clone, Default)]
struct Instant {
    /// What was asked for.
    seen: Rc<Seen>,
}

/// The transfers that an [`Instant`] has seen.
#[derive(Debug, Default)]
struct Seen {
    /// How many there were.
    count: Cell<u64>,
    /// Sum of their offsets in bytes.
    offsets: Cell<u64>,
}

impl Instant {
    /// Takes note of a transfer, and claims that all of it has been done.
    fn transfer(&self, offset: u64, buffer: &IoBuffer) -> usize {
        self.seen.count.set(self.seen.count.get() + 1);
        self.seen.offsets.set(self.seen.offsets.get() + offset);
        buffer.len()
    }
}

impl Storage for Instant {
    async fn read(&self, offset: u64, buffer: IoBuffer) -> io::Result<usize> {
        Ok(self.transfer(offset, &buffer))
    }

    async fn write(&self, offset: u64, buffer: IoBuffer) -> io::Result<usize> {
        Ok(self.transfer(offset, &buffer))
    }

    async fn zero(&self, _range: ByteRange, _mode: ZeroMode) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    async fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn file_len(&self) -> io::Result<u64> {
        Ok(DISK)
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn alignment(&self) -> Alignment {
        // That of direct I/O, so that checking it is counted.
        Alignment { memory: 512, offset: 512 }
    }

    fn next_data(&self, _offset: u64) -> io::Result<Option<ByteRange>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// An empty map of the disk in clusters of 4 KiB, and its shape.
fn empty_map() -> (BitmapGeometry, AllocationMap) {
    let geometry = BitmapGeometry::new(ClusterSize::from_bits(12).unwrap(), DISK).unwrap();
    (geometry, AllocationMap::empty(&geometry).unwrap())
}

/// The clusters of the disk in random order.
fn shuffled_clusters() -> Vec<u64> {
    let mut clusters: Vec<u64> = (0..DISK / BLOCK).collect();
    Rng::with_seed(SEED).shuffle(&mut clusters);
    clusters
}

/// Serves requests of type `kind` on random clusters, all of them allocated or none; `kept` for the
/// next process or not.
fn requests(kind: u32, allocated: bool, kept: bool) -> u64 {
    let (geometry, map) = empty_map();
    if allocated {
        map.mark(0..geometry.clusters());
    }
    let state = Arc::new(ImageState::add_cow(geometry, map, DISK, true));
    let (raw, side, backing) = <(Instant, Instant, Instant)>::default();
    let chain = BackingChain::raw(backing.clone(), DISK);
    let journal = kept.then(|| {
        let words = BitJournal::words(geometry.clusters()).unwrap();
        let memory = SharedMemory::create("journal", words).unwrap();
        Arc::new(BitJournal::new(Arc::new(memory), 0, geometry.clusters()))
    });
    let image = Image::new(Arc::clone(&state), raw.clone(), Some(side.clone()), Some(chain));
    let image = image.with_journal(journal);
    let device = queue::device(image);
    let serve = |chain| device.serve(chain);
    let mut queue = Queue::new();
    if kept {
        queue.track();
    }
    let mut pool = TaskPool::new(128, Box::new(|| {}));
    let mut batch = Vec::with_capacity(BATCH);
    let blocks = &shuffled_clusters()[..REQUESTS];
    let mut counted = 0;
    for (turn, blocks) in blocks.chunks(usize::from(SLOTS)).enumerate() {
        for (slot, block) in (0..).zip(blocks) {
            queue.offer(slot, kind, *block);
        }
        let mut body = || take(&mut queue, &mut pool, &mut batch, &serve);
        if turn == 0 {
            // In its first turn everything grows to its size.
            body();
        } else {
            measured(&mut body);
            counted += blocks.len() as u64;
        }
        check_answers(&queue, turn, kind);
    }
    let (used, unused) = match (kind, allocated) {
        (READ, false) => (backing, raw),
        _ => (raw, backing),
    };
    assert_eq!(used.seen.count.get(), REQUESTS as u64);
    assert_eq!(used.seen.offsets.get(), blocks.iter().map(|block| block * BLOCK).sum::<u64>());
    assert_eq!(unused.seen.count.get() + side.seen.count.get(), 0, "only one file is used");
    let allocation = state.allocation();
    if !allocated {
        let new = if kind == WRITE { REQUESTS as u64 } else { 0 };
        assert_eq!(allocation.count(), Some(new));
        let mut blocks = blocks.iter();
        assert!(blocks.all(|block| allocation.is_allocated(*block..block + 1) == (kind == WRITE)));
    }
    counted
}

/// Takes all chains that are there, serves them and publishes: a turn of `vhost_user::queue`.
fn take<F: Future<Output = Used>>(
    queue: &mut Queue,
    pool: &mut TaskPool<F>,
    batch: &mut Vec<Chain>,
    serve: &impl Fn(Chain) -> F,
) {
    pool.poll_ready(|used| panic!("request {} was not served at once", used.head));
    loop {
        let (mut heads, mut len) = ([0; BATCH], 0);
        while len < BATCH
            && let Some(head) = queue.virtqueue.pop().unwrap()
        {
            queue.virtqueue.descriptors().prefetch_entry(head);
            heads[len] = head;
            len += 1;
        }
        if len == 0 {
            break;
        }
        for head in &heads[..len] {
            let chain = queue.walk(*head);
            chain.prefetch();
            batch.push(chain);
        }
        for chain in batch.drain(..) {
            if let Some(used) = pool.start(serve(chain)) {
                queue.virtqueue.push_used(used.head, used.len);
            }
        }
    }
    queue.virtqueue.publish();
}

/// Checks that every slot was answered with success in the turn `turn`, in order.
fn check_answers(queue: &Queue, turn: usize, kind: u32) {
    let first = u16::try_from(turn * usize::from(SLOTS)).unwrap();
    assert_eq!(queue.used_index(), first + SLOTS);
    let len = if kind == READ { BLOCK + 1 } else { 1 };
    for slot in 0..SLOTS {
        assert_eq!(queue.status(slot), 0, "a request failed");
        let (head, used) = queue.used_entry(first + slot);
        assert_eq!((head, u64::from(used)), (u32::from(slot) * 3, len));
    }
}

/// Adds an extent to a digest in which each of its fields and the order count.
fn digest(sum: u64, extent: Extent) -> u64 {
    let kind = u64::from(extent.kind == ExtentKind::Data);
    (sum.rotate_left(7) ^ extent.range.start()).wrapping_add(extent.range.end() << 1 | kind)
}

/// Resolves ranges of `len` bytes at random places, over a bitmap in which each cluster is
/// allocated with the probability `share`.
fn resolve(len: u64, share: f64) -> u64 {
    let mut rng = Rng::with_seed(SEED);
    let (geometry, map) = empty_map();
    let model: Vec<bool> = (0..geometry.clusters()).map(|_| rng.f64() < share).collect();
    for (cluster, _) in (0..).zip(&model).filter(|(_, allocated)| **allocated) {
        map.mark(cluster..cluster + 1);
    }
    let state = ImageState::add_cow(geometry, map, DISK, true);
    let place = |_| {
        let start = rng.u64(0..=(DISK - len) / BLOCK) * BLOCK;
        ByteRange::new(start, len).unwrap()
    };
    let ranges: Vec<ByteRange> = (0..LOOK_UPS).map(place).collect();
    let mut found = 0;
    measured(&mut || {
        found = ranges.iter().flat_map(|range| state.extents(*range)).fold(0, digest);
    });
    let expected = ranges.iter().flat_map(|range| expected_extents(&model, *range));
    assert_eq!(found, expected.fold(0, digest));
    ranges.len() as u64
}

/// The extents of `range`, found the slow way.
fn expected_extents(model: &[bool], range: ByteRange) -> Vec<Extent> {
    let cluster = |at: u64| usize::try_from(at / BLOCK).unwrap();
    let mut extents = Vec::new();
    let mut start = range.start();
    for run in model[cluster(range.start())..cluster(range.end())].chunk_by(|a, b| a == b) {
        let end = start + run.len() as u64 * BLOCK;
        let kind = if run[0] { ExtentKind::Data } else { ExtentKind::Backing };
        extents.push(Extent { kind, range: ByteRange::between(start, end) });
        start = end;
    }
    extents
}

/// What of a round of marks and a freeze is counted.
#[derive(Clone, Copy, PartialEq)]
enum Part {
    /// Marking.
    Mark,
    /// Freezing.
    Freeze,
}

/// Marks every cluster of the disk in random order, and after each [`MARKS`] of them freezes what
/// is new, as a flush does. Returns how many marks or frozen pages were measured.
fn mark_and_freeze(part: Part) -> u64 {
    let (geometry, map) = empty_map();
    let mut model = vec![0_u8; usize::try_from(geometry.used_len()).unwrap()];
    let page_len = usize::try_from(BitmapGeometry::PAGE_LEN).unwrap();
    let count = |body: &mut dyn FnMut(), counts| if counts { measured(body) } else { body() };
    let (mut marked, mut frozen_pages) = (0, 0);
    for clusters in shuffled_clusters().chunks(MARKS) {
        let mut mark = || clusters.iter().for_each(|cluster| map.mark(*cluster..cluster + 1));
        count(&mut mark, part == Part::Mark);
        marked += clusters.len() as u64;
        for cluster in clusters {
            model[usize::try_from(cluster / 8).unwrap()] |= 1 << (cluster % 8);
        }
        let mut frozen = None;
        count(&mut || frozen = Some(map.freeze()), part == Part::Freeze);
        let frozen = frozen.unwrap();
        frozen_pages += frozen.pages().len() as u64;
        for (page, bytes) in frozen.pages() {
            let start = usize::try_from(*page).unwrap() * page_len;
            assert!(bytes[..] == model[start..start + page_len], "bitmap page {page}");
        }
        assert_eq!(frozen.pages().len(), model.len() / page_len, "each page has new bits");
        frozen.persisted();
    }
    assert!(map.freeze().pages().is_empty(), "all was persisted");
    if part == Part::Mark { marked } else { frozen_pages }
}

/// Runs the loops that the arguments name, all of them without any, and prints a line for each:
/// name, how many units were measured, the unit; separated by tabs.
fn main() -> ExitCode {
    // Cargo hands `--bench` to whatever it runs as a benchmark.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    if let Some(unknown) = wanted.iter().find(|name| LOOPS.iter().all(|l| l.name != **name)) {
        eprintln!("loops: {unknown}: there is no such loop");
        return ExitCode::FAILURE;
    }
    for Loop { name, unit, run } in LOOPS {
        if wanted.is_empty() || wanted.iter().any(|word| word == name) {
            println!("{name}\t{}\t{unit}", run());
        }
    }
    ExitCode::SUCCESS
}
