//! The whole engine under very many schedules: two or three threads with an image of their own
//! each, on files in memory, in orders that shuttle picks at random and by priorities (PCT).
//!
//! It is the product's own code, built on shuttle's types (`src/sync.rs`):
//! `cargo test --release --features shuttle --example shuttle`. For each schedule:
//!
//! * every sector was a register (`common/registers.rs`), up to what is there at the end;
//! * no bit reached the add-cow file before its cluster was durable (I1);
//! * a flush left durable all that had ended before it, and nothing that was overwritten then.
//!
//! A failing schedule is printed by shuttle; `ADDCOW_SCHEDULE=... cargo test ... NAME` runs it
//! again. `ADDCOW_SCHEDULES=N` runs N of each kind instead of the usual number.
//!
//! Not here: weak memory orders (`loom.rs`), faults, io_uring.

#[path = "host.rs"]
mod host;
#[path = "../common/registers.rs"]
mod registers;
#[path = "../common/score.rs"]
mod score;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use addcow::executor::block_on;
use addcow::format::BitmapGeometry;
use addcow::image::allocation::AllocationMap;
use addcow::image::chain::Chain;
use addcow::image::populate::Below;
use addcow::image::{Image, ImageState};
use addcow::storage::IoBuffer;
use addcow::units::ClusterSize;
use shuttle::rand::Rng;
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};

use host::{HostFile, HostStorage, SECTOR};
use registers::{Action, Event};

/// Sectors in a cluster.
const PER_CLUSTER: u64 = 2;
/// Clusters of the disk.
const CLUSTERS: u64 = 4;
/// Sectors of the disk: its last cluster is cut.
const SECTORS: u64 = CLUSTERS * PER_CLUSTER - 1;
/// Sectors of the backing file: it ends inside a cluster, and the last one lies behind it.
const BACKED: u64 = 5;

/// Tag of the backing file's sector 0.
const BACKING: u64 = 0xb << 60;
/// Tag of what the raw image holds in sector 0 before: never to be seen.
const GARBAGE: u64 = 0xd << 60;

/// The sectors of this range.
type Sectors = Range<u64>;

/// What a thread does.
#[derive(Debug, Clone)]
enum Op {
    /// Reads.
    Read(Sectors),
    /// Writes a tag of its own into each sector.
    Write(Sectors),
    /// Zeroes, with or without giving space back.
    Zero(Sectors, bool),
    /// Discards.
    Discard(Sectors),
    /// Streams these clusters up.
    Populate(Range<u64>),
    /// Flushes.
    Flush,
}

/// The bytes of a sector with this tag.
fn bytes_of(tag: u64) -> Vec<u8> {
    tag.to_le_bytes().repeat(SECTOR / 8)
}

/// The tag of a sector.
///
/// # Panics
/// If the sector is torn.
fn tag_of(bytes: &[u8]) -> u64 {
    let (words, _) = bytes.as_chunks::<8>();
    assert!(words.iter().all(|word| *word == words[0]), "a torn sector");
    u64::from_le_bytes(words[0])
}

/// The bytes of sector `sector` in `file`.
fn sector_of(file: &[u8], sector: u64) -> &[u8] {
    let start = usize::try_from(sector).expect("small") * SECTOR;
    &file[start..start + SECTOR]
}

/// The tag that the disk shows in a sector before anything was done.
fn initial(sector: u64) -> u64 {
    if sector < BACKED { BACKING | sector } else { 0 }
}

/// Where the bitmap lies.
fn geometry() -> BitmapGeometry {
    let size = ClusterSize::from_bytes(PER_CLUSTER * SECTOR as u64).expect("in range");
    BitmapGeometry::new(size, SECTORS * SECTOR as u64).expect("not too large")
}

/// Whether a side file says that a cluster is allocated.
fn has_bit(side: &[u8], cluster: u64) -> bool {
    let (byte, mask) = geometry().position(cluster);
    side[usize::try_from(byte).expect("small")] & mask != 0
}

/// One effect on one sector.
#[derive(Debug, Clone, Copy)]
struct Entry {
    /// The sector.
    sector: u64,
    /// What was done, from when to when; `u64::MAX` until it has ended.
    event: Event,
}

/// A disk, its host, and what was done to it.
struct World {
    /// The raw image.
    raw: Arc<HostFile>,
    /// The add-cow file.
    side: Arc<HostFile>,
    /// The backing file.
    backing: Arc<HostFile>,
    /// What all threads share.
    state: Arc<ImageState>,
    /// Counts starts and ends.
    clock: AtomicU64,
    /// What was done to which sector.
    history: Mutex<Vec<Entry>>,
}

/// Lets another thread go on.
fn step() {
    shuttle::thread::yield_now();
}

impl World {
    /// A disk with nothing allocated.
    fn new() -> Arc<Self> {
        let file = |tags: &mut dyn Iterator<Item = u64>| {
            HostFile::new(tags.flat_map(bytes_of).collect(), step)
        };
        let raw = file(&mut (0..SECTORS).map(|sector| GARBAGE | sector));
        let backing = file(&mut (0..BACKED).map(|sector| BACKING | sector));
        let len = usize::try_from(geometry().file_len()).expect("small");
        let side = HostFile::new(vec![0; len], step);
        let watched = Arc::clone(&raw);
        side.observe(move |side| check_bits(&side.cached(), &watched.durable()));
        let map = AllocationMap::empty(&geometry()).expect("enough memory");
        let state = ImageState::add_cow(geometry(), map, BACKED * SECTOR as u64, true);
        let (clock, history) = (AtomicU64::new(1), Mutex::default());
        Arc::new(Self { raw, side, backing, state: Arc::new(state), clock, history })
    }

    /// A thread's image.
    fn image(&self) -> Image<HostStorage> {
        let storage = |file: &Arc<HostFile>| HostStorage(Arc::clone(file));
        let chain = Chain::raw(storage(&self.backing), BACKED * SECTOR as u64);
        let side = Some(storage(&self.side));
        Image::new(Arc::clone(&self.state), storage(&self.raw), side, Some(chain))
    }

    /// The next time.
    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed)
    }

    /// Notes that something is being done to `sectors`. Returns where.
    fn begin(&self, sectors: &Sectors, action: impl Fn(u64) -> Action) -> Range<usize> {
        let start = self.tick();
        let mut history = self.history.lock().expect("no panic while held");
        let first = history.len();
        history.extend(sectors.clone().map(|sector| {
            let event = Event { action: action(sector), start, end: u64::MAX };
            Entry { sector, event }
        }));
        first..history.len()
    }

    /// Notes that it is done.
    fn end(&self, entries: Range<usize>) {
        let end = self.tick();
        let mut history = self.history.lock().expect("no panic while held");
        history[entries].iter_mut().for_each(|entry| entry.event.end = end);
    }

    /// Does one thing.
    fn run(&self, image: &Image<HostStorage>, op: &Op) {
        let place = |sectors: &Sectors| {
            let sector = SECTOR as u64;
            (sectors.start * sector, (sectors.end - sectors.start) * sector)
        };
        match op {
            Op::Read(sectors) => self.read(image, sectors),
            Op::Write(sectors) => {
                let tag = self.tick() << 8;
                let bytes = sectors.clone().flat_map(|sector| bytes_of(tag | sector));
                let buffer = IoBuffer::from_bytes(&bytes.collect::<Vec<_>>());
                let entries = self.begin(sectors, |sector| Action::Write(tag | sector));
                block_on(image.write(place(sectors).0, buffer)).expect("no faults");
                self.end(entries);
            }
            Op::Zero(sectors, may_unmap) => {
                let entries = self.begin(sectors, |_| Action::Write(0));
                let (start, len) = place(sectors);
                block_on(image.write_zeroes(start, len, *may_unmap)).expect("no faults");
                self.end(entries);
            }
            Op::Discard(sectors) => {
                let entries = self.begin(sectors, |_| Action::Perhaps(0));
                let (start, len) = place(sectors);
                block_on(image.discard(start, len)).expect("no faults");
                self.end(entries);
            }
            Op::Populate(clusters) => {
                let buffer = IoBuffer::zeroed(SECTOR);
                let done = block_on(image.populate(clusters.clone(), Below::Unknown, &buffer));
                done.expect("no faults");
                let allocated = self.state.allocation().is_allocated(clusters.clone());
                assert!(allocated, "{op:?} has left out a cluster");
            }
            Op::Flush => {
                let start = self.tick();
                block_on(image.flush()).expect("no faults");
                self.check_durable(start);
            }
        }
    }

    /// Reads, and notes what was read.
    fn read(&self, image: &Image<HostStorage>, sectors: &Sectors) {
        let count = usize::try_from(sectors.end - sectors.start).expect("small");
        let buffer = IoBuffer::zeroed(count * SECTOR);
        let start = self.tick();
        let done = block_on(image.read(sectors.start * SECTOR as u64, buffer.clone()));
        done.expect("no faults");
        let end = self.tick();
        let bytes = buffer.to_vec();
        let mut history = self.history.lock().expect("no panic while held");
        for (sector, bytes) in sectors.clone().zip(bytes.chunks(SECTOR)) {
            let tag = tag_of(bytes);
            assert_ne!(tag & GARBAGE, GARBAGE, "sector {sector} shows what was not allocated");
            history.push(Entry { sector, event: Event { action: Action::Read(tag), start, end } });
        }
    }

    /// Checks what a power cut would leave after a flush that began at `start`.
    fn check_durable(&self, start: u64) {
        let (side, raw) = (self.side.durable(), self.raw.durable());
        let history = self.history.lock().expect("no panic while held");
        for sector in 0..SECTORS {
            let tag = if has_bit(&side, sector / PER_CLUSTER) {
                tag_of(sector_of(&raw, sector))
            } else {
                initial(sector)
            };
            let events = || history.iter().filter(|e| e.sector == sector).map(|e| e.event);
            // Writes that had ended before the flush, and what they had overwritten for good.
            let is_old = |end: u64| {
                events().any(|event| {
                    matches!(event.action, Action::Write(_))
                        && event.start > end
                        && event.end < start
                })
            };
            let made = events().filter_map(|event| match event.action {
                Action::Write(value) | Action::Perhaps(value) => Some((value, event.end)),
                Action::Read(_) => None,
            });
            let is_legal =
                made.chain([(initial(sector), 0)]).any(|(value, end)| value == tag && !is_old(end));
            assert!(is_legal, "a power cut after a flush leaves {tag:x} in sector {sector}");
        }
    }

    /// Checks the histories of all sectors.
    fn check_history(&self) {
        let history = self.history.lock().expect("no panic while held");
        for sector in 0..SECTORS {
            let of_sector = history.iter().filter(|entry| entry.sector == sector);
            let events: Vec<Event> = of_sector.map(|entry| entry.event).collect();
            if let Err(at) = registers::check(initial(sector), &events) {
                panic!("sector {sector} is no register at {:?} of {events:#?}", events[at]);
            }
        }
    }
}

/// Checks that a side file claims no cluster that is not durable in the raw image.
fn check_bits(side: &[u8], raw: &[u8]) {
    for sector in 0..SECTORS {
        if has_bit(side, sector / PER_CLUSTER) {
            let tag = tag_of(sector_of(raw, sector));
            assert_ne!(tag & GARBAGE, GARBAGE, "a bit without its data in sector {sector}");
        }
    }
}

/// One schedule: threads with these lists of things to do, and a look at the disk afterwards.
fn run_threads(lists: Vec<Vec<Op>>) {
    let world = World::new();
    let threads: Vec<_> = lists
        .into_iter()
        .map(|ops| {
            let world = Arc::clone(&world);
            shuttle::thread::spawn(move || {
                let image = world.image();
                ops.iter().for_each(|op| world.run(&image, op));
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
    let image = world.image();
    world.run(&image, &Op::Flush);
    world.run(&image, &Op::Read(0..SECTORS));
    world.check_history();
}

/// Runs `scenario` under both kinds of schedules, `count` of each.
fn explore(name: &str, count: usize, scenario: impl Fn() + Send + Sync + 'static) {
    let scenario = Arc::new(scenario);
    if let Ok(schedule) = std::env::var("ADDCOW_SCHEDULE") {
        return shuttle::replay(move || scenario(), &schedule);
    }
    let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    let seed = number("ADDCOW_SEED").unwrap_or(0x5eed);
    let count = number("ADDCOW_SCHEDULES").map_or(count, |n| usize::try_from(n).expect("small"));
    let mut config = shuttle::Config::new();
    config.stack_size = 0x4_0000;
    let run = |scheduler: Box<dyn Scheduler + Send>| {
        let scenario = Arc::clone(&scenario);
        shuttle::Runner::new(scheduler, config.clone()).run(move || scenario())
    };
    let random = run(Box::new(RandomScheduler::new_from_seed(seed, count)));
    let pct = run(Box::new(PctScheduler::new_from_seed(seed, 3, count)));
    let figures = [("schedules", random + pct), ("random", random), ("pct", pct)];
    let figures = figures.map(|(key, value)| (key, value as u64));
    score::score("shuttle", &[&figures[..], &[(name, figures[0].1)]].concat());
}

#[test]
fn writers_of_one_cluster() {
    explore("writers", 20_000, || {
        run_threads(vec![
            vec![Op::Write(0..1), Op::Read(0..2)],
            vec![Op::Write(1..2), Op::Read(0..2)],
            vec![Op::Write(1..4), Op::Read(0..1)],
        ]);
    });
}

#[test]
fn a_writer_beside_flushes() {
    explore("flushes", 20_000, || {
        run_threads(vec![
            vec![Op::Write(0..2), Op::Flush, Op::Write(0..1), Op::Flush],
            vec![Op::Write(2..3), Op::Flush],
            vec![Op::Write(6..7), Op::Flush],
        ]);
    });
}

#[test]
fn writers_beside_a_stream() {
    explore("stream", 20_000, || {
        run_threads(vec![
            vec![Op::Populate(0..CLUSTERS), Op::Flush],
            vec![Op::Write(1..2), Op::Read(0..2), Op::Write(5..7)],
            vec![Op::Zero(2..5, true), Op::Read(2..7)],
        ]);
    });
}

#[test]
fn discards_and_zeroes_beside_writers() {
    explore("discards", 20_000, || {
        run_threads(vec![
            vec![Op::Discard(0..4), Op::Read(0..4), Op::Flush],
            vec![Op::Write(1..3), Op::Read(1..3), Op::Discard(0..2)],
            vec![Op::Zero(0..3, false), Op::Read(0..4)],
        ]);
    });
}

/// Some sectors.
fn some_sectors(rng: &mut impl Rng) -> Sectors {
    let first = rng.gen_range(0..SECTORS);
    first..rng.gen_range(first + 1..=SECTORS.min(first + 4))
}

/// Something to do.
fn some_op(rng: &mut impl Rng) -> Op {
    match rng.gen_range(0..12) {
        0..4 => Op::Write(some_sectors(rng)),
        4..7 => Op::Read(some_sectors(rng)),
        7 => Op::Zero(some_sectors(rng), rng.gen_range(0..2) == 0),
        8 => Op::Discard(some_sectors(rng)),
        9 => {
            let first = rng.gen_range(0..CLUSTERS);
            Op::Populate(first..CLUSTERS.min(first + 2))
        }
        _ => Op::Flush,
    }
}

#[test]
fn anything_beside_anything() {
    explore("anything", 30_000, || {
        let mut rng = shuttle::rand::thread_rng();
        let count = rng.gen_range(2..=3);
        let list = |rng: &mut shuttle::rand::rngs::ThreadRng| {
            (0..rng.gen_range(2..=3)).map(|_| some_op(rng)).collect::<Vec<_>>()
        };
        run_threads((0..count).map(|_| list(&mut rng)).collect());
    });
}
