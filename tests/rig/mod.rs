//! A disk on a simulated host, an oracle of what it may show, and a scheduler: what the tests of
//! the copy-on-write core share.
//!
//! Every sector that is ever written gets a tag of its own, repeated through its 512 bytes; so have
//! the sectors of the backing file and the garbage in the raw image. So a read tells for every
//! sector which write it shows, and the oracle says whether it may. The rules are those of a
//! register per sector: see [`Oracle`].
//!
//! Not here: what is done to the disk, and when the power goes.

#![allow(dead_code, reason = "each test file uses its own part of the rig")]

pub mod cuts;
pub mod jobs;
pub mod live;
pub mod points;
pub mod requests;
pub mod stack;
pub mod verbs;

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use addcow::executor::block_on;
use addcow::format::{BitmapGeometry, FileName, FileReference, FileRole, Header};
use addcow::image::allocation::AllocationMap;
use addcow::image::chain::Chain;
use addcow::image::create::NewSide;
use addcow::image::{Image, ImageError, ImageState, load};
use addcow::storage::sim::{SimDisk, SimStorage};
use addcow::storage::{IoBuffer, Storage};
use addcow::units::ClusterSize;
use fastrand::Rng;

/// Bytes in a sector.
pub const SECTOR: u64 = 512;
/// Number of the raw image on the simulated disk.
pub const RAW: usize = 0;
/// Number of the side file.
pub const SIDE: usize = 1;
/// Number of the backing file, if there is one.
pub const BACKING: usize = 2;

/// Tag of the backing file's sector 0.
pub const TAG_BACKING: u64 = 0xb << 60;
/// Tag of what the raw image holds in sector 0 if that is unallocated: never to be seen.
pub const TAG_GARBAGE: u64 = 0xd << 60;
/// Tag of what the raw image holds in sector 0 if that is allocated from the start.
pub const TAG_INITIAL: u64 = 0xa << 60;

/// The base of all seeds of a test: `ADDCOW_SEED`, or else `default`.
pub fn base_seed(default: u64) -> u64 {
    let text = std::env::var("ADDCOW_SEED").ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// `count` with optimisation, a tenth of it without; times `ADDCOW_SOAK`, if that is given.
pub fn scaled(count: u64) -> u64 {
    let text = std::env::var("ADDCOW_SOAK").ok();
    let factor = text.and_then(|text| text.parse().ok()).unwrap_or(1);
    count.div_ceil(if cfg!(debug_assertions) { 10 } else { 1 }) * factor
}

/// Says how to replay a random test when it fails, whatever it is that fails.
#[derive(Debug)]
pub struct Replay(
    /// The seed.
    pub u64,
);

impl Drop for Replay {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("replay with ADDCOW_SEED={}", self.0);
        }
    }
}

/// The bytes of a sector with this tag.
pub fn sector_bytes(tag: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    bytes.as_chunks_mut::<8>().0.fill(tag.to_le_bytes());
    bytes
}

/// What a disk is made of.
#[derive(Debug, Clone)]
pub struct Setup {
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// Size of the disk in sectors.
    pub sectors: u64,
    /// Length of the backing file in bytes; `None` without one.
    pub backing_len: Option<u64>,
    /// Clusters that are allocated from the start.
    pub allocated: Vec<u64>,
    /// ALL_ALLOCATED in the header.
    pub all_allocated: bool,
}

impl Setup {
    /// A disk of whole clusters in front of a backing file of the same size.
    pub fn plain(cluster_bits: u32, clusters: u64) -> Self {
        let len = clusters << cluster_bits;
        Self {
            cluster_bits,
            sectors: len / SECTOR,
            backing_len: Some(len),
            allocated: Vec::new(),
            all_allocated: false,
        }
    }

    /// A small disk with something special, chosen by `rng`: a partial last cluster, a backing file
    /// that is shorter (to the byte), longer or missing, allocated clusters.
    pub fn random(rng: &mut Rng) -> Self {
        let cluster_bits = rng.u32(9..=13);
        let cluster = 1 << cluster_bits;
        let sectors = rng.u64(1..=6 * cluster / SECTOR);
        let backing_len = match rng.u32(0..4) {
            0 => None,
            // Of a last sector with less than a word nobody could tell that it is not zeros.
            1 => Some(rng.u64(0..sectors) * SECTOR + rng.u64(8..=SECTOR)),
            2 => Some(sectors * SECTOR + rng.u64(8..2 * cluster)),
            _ => Some(sectors * SECTOR),
        };
        let clusters = (sectors * SECTOR).div_ceil(cluster);
        let allocated = (0..clusters).filter(|_| rng.u32(0..3) == 0).collect();
        Self { cluster_bits, sectors, backing_len, allocated, all_allocated: false }
    }

    /// The cluster size.
    pub fn cluster_size(&self) -> ClusterSize {
        ClusterSize::from_bits(self.cluster_bits).expect("in range")
    }

    /// Where the bitmap lies.
    pub fn geometry(&self) -> BitmapGeometry {
        BitmapGeometry::new(self.cluster_size(), self.sectors * SECTOR).expect("not too large")
    }

    /// The tag that the disk shows in `sector` before anything was done to it.
    pub fn initial_tag(&self, sector: u64) -> u64 {
        let cluster = (sector * SECTOR) >> self.cluster_bits;
        if self.all_allocated || self.allocated.contains(&cluster) {
            TAG_INITIAL | sector
        } else if sector * SECTOR < self.backing_len.unwrap_or(0) {
            TAG_BACKING | sector
        } else {
            0
        }
    }

    /// The bytes of a sector with this tag: the last of the backing file may be cut short.
    pub fn bytes(&self, tag: u64, sector: u64) -> [u8; 512] {
        let mut bytes = sector_bytes(tag);
        if tag & (0xf << 60) == TAG_BACKING {
            let left = self.backing_len.unwrap_or(0).saturating_sub(sector * SECTOR).min(SECTOR);
            bytes[usize::try_from(left).expect("small")..].fill(0);
        }
        bytes
    }

    /// The tag of a sector that was read; `None` if it is a mix.
    pub fn tag(&self, bytes: &[u8], sector: u64) -> Option<u64> {
        let (words, _) = bytes.as_chunks::<8>();
        let tag = u64::from_le_bytes(words[0]);
        if words.iter().all(|word| *word == words[0]) {
            return Some(tag);
        }
        let cut_short = self.bytes(TAG_BACKING | sector, sector);
        (cut_short == bytes).then_some(TAG_BACKING | sector)
    }

    /// The content of the raw image before anything was done: garbage where nothing is allocated.
    fn raw(&self) -> Vec<u8> {
        let tag = |sector| match self.initial_tag(sector) {
            tag if tag & (0xf << 60) == TAG_INITIAL => tag,
            _ => TAG_GARBAGE | sector,
        };
        (0..self.sectors).flat_map(|sector| sector_bytes(tag(sector))).collect()
    }

    /// The content of the side file before anything was done, encoded by what `create` uses.
    fn side(&self) -> Vec<u8> {
        let reference = |role, name| FileReference {
            name: FileName::new(role, name).expect("a plain name"),
            format: "raw".to_owned(),
        };
        let header = Header {
            cluster_size: self.cluster_size().max(ClusterSize::from_bits(12).expect("in range")),
            backing: self.backing_len.map(|_| reference(FileRole::Backing, "base.img")),
            image: reference(FileRole::Image, "disk.raw"),
            all_allocated: self.all_allocated,
            compat_features: 0,
        };
        let geometry = self.geometry();
        let file = SimDisk::new(0).create(&[]);
        block_on(NewSide::new(&header, geometry).expect("valid").write(&file)).expect("no faults");
        let mut bytes = file.content();
        // Smaller clusters are read but not created: the header's word is the only difference.
        bytes[20..24].copy_from_slice(&self.cluster_bits.to_le_bytes());
        for cluster in &self.allocated {
            let (byte, mask) = geometry.position(*cluster);
            bytes[usize::try_from(byte).expect("small")] |= mask;
        }
        bytes
    }
}

/// A disk's files on a simulated host.
#[derive(Debug)]
pub struct Rig {
    /// What it was made of.
    pub setup: Setup,
    /// The host.
    pub disk: SimDisk,
}

impl Rig {
    /// Makes the files; `seed` decides about delays and power cuts.
    pub fn new(setup: &Setup, seed: u64) -> Self {
        let disk = SimDisk::new(seed);
        let _raw = disk.create(&setup.raw());
        let _side = disk.create(&setup.side());
        if let Some(len) = setup.backing_len {
            let sectors = len.div_ceil(SECTOR);
            let bytes: Vec<u8> = (0..sectors).flat_map(|s| sector_bytes(TAG_BACKING | s)).collect();
            let _backing = disk.create(&bytes[..usize::try_from(len).expect("small")]);
        }
        Self { setup: setup.clone(), disk }
    }

    /// The same files in the same state on a host of their own.
    pub fn fork(&self) -> Self {
        Self { setup: self.setup.clone(), disk: self.disk.fork() }
    }

    /// The backing file.
    pub fn backing(&self) -> Option<SimStorage> {
        self.setup.backing_len.map(|_| self.disk.file(BACKING))
    }

    /// The backing file as a chain.
    fn backing_chain(&self) -> Option<Chain<SimStorage>> {
        let file = self.backing()?;
        let len = file.file_len().expect("the length of a simulated file");
        Some(Chain::raw(file, len))
    }

    /// Opens the disk from the bytes of its side file, as a daemon does.
    pub fn open(&self) -> Arc<ImageState> {
        self.try_open(true).expect("an image opens without repair (P1)")
    }

    /// Opens the disk, or says why not.
    pub fn try_open(&self, writable: bool) -> Result<Arc<ImageState>, load::LoadError> {
        let (raw, side) = (self.disk.file(RAW), self.disk.file(SIDE));
        let header = block_on(load::header(&side))?;
        let geometry = BitmapGeometry::new(header.cluster_size, raw.file_len()?)?;
        let map = if header.all_allocated {
            AllocationMap::all()
        } else {
            block_on(load::bitmap(&side, &geometry))?
        };
        let backing_len = self.backing().map_or(Ok(0), |file| file.file_len())?;
        Ok(Arc::new(ImageState::add_cow(geometry, map, backing_len, writable)))
    }

    /// A handle on an open disk, as each queue has one.
    pub fn handle(&self, state: &Arc<ImageState>) -> Image<SimStorage> {
        let (raw, side) = (self.disk.file(RAW), self.disk.file(SIDE));
        Image::new(Arc::clone(state), raw, Some(side), self.backing_chain())
    }

    /// The tags of the whole disk, as `image` shows them with nothing else going on.
    pub fn tags(&self, image: &Image<SimStorage>) -> Vec<u64> {
        let len = usize::try_from(self.setup.sectors * SECTOR).expect("small");
        let buffer = IoBuffer::from_bytes(&vec![0x55; len]);
        block_on(image.read(0, buffer.clone())).expect("the whole disk can be read");
        self.tags_of(0, &buffer.to_vec())
    }

    /// The tags of what was read from `first` on.
    pub fn tags_of(&self, first: u64, bytes: &[u8]) -> Vec<u64> {
        let sectors = (first..).zip(bytes.chunks(512));
        let tag = |(sector, bytes)| match self.setup.tag(bytes, sector) {
            Some(tag) => tag,
            None => panic!("sector {sector} is torn: {:02x?}", &bytes[..64]),
        };
        sectors.map(tag).collect()
    }

    /// Whether the side file, as a read sees it, has the bit of `cluster`.
    pub fn has_bit(&self, cluster: u64) -> bool {
        let (byte, mask) = self.setup.geometry().position(cluster);
        self.disk.file(SIDE).content()[usize::try_from(byte).expect("small")] & mask != 0
    }
}

/// Something a guest asks for; ranges in sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Read so many sectors from here.
    Read(u64, u64),
    /// Write them.
    Write(u64, u64),
    /// Zero them, perhaps giving the space back.
    Zero(u64, u64, bool),
    /// Discard them.
    Discard(u64, u64),
    /// Flush.
    Flush,
}

impl Op {
    /// A random request to a disk of `sectors` sectors.
    pub fn random(rng: &mut Rng, sectors: u64) -> Self {
        let start = rng.u64(0..sectors);
        let most = (sectors - start).min(if rng.u32(0..8) == 0 { sectors } else { 12 });
        let len = rng.u64(1..=most);
        match rng.u32(0..16) {
            0..=3 => Self::Read(start, len),
            4..=9 => Self::Write(start, len),
            10 => Self::Zero(start, len, false),
            11 => Self::Zero(start, len, true),
            12 | 13 => Self::Discard(start, len),
            _ => Self::Flush,
        }
    }
}

/// A value that a sector may have.
#[derive(Debug, Clone, Copy)]
struct Version {
    /// The tag.
    tag: u64,
    /// When it was asked for.
    issued: u64,
    /// When that request ended; `u64::MAX` while it runs.
    ended: u64,
    /// Whether the request succeeded and must have had its effect: not so for a discard.
    settles: bool,
}

/// What every sector may show. Time is a counter of calls.
///
/// A value is out once another write *began* after it had ended, succeeded, and ended before the
/// moment that counts: the beginning of the read, or, after a power cut, the beginning of the last
/// flush that succeeded. A failed write may show for as long, or not at all; so may the zeros of a
/// discard.
#[derive(Debug)]
pub struct Oracle {
    /// Now.
    clock: u64,
    /// The next tag.
    next_tag: u64,
    /// The beginning of the last flush that succeeded.
    flushed: u64,
    /// By sector.
    sectors: Vec<Vec<Version>>,
}

impl Oracle {
    /// The oracle of a disk that shows `tags`, durably.
    pub fn new(tags: impl IntoIterator<Item = u64>, next_tag: u64) -> Self {
        let initial = |tag| vec![Version { tag, issued: 0, ended: 0, settles: true }];
        let sectors = tags.into_iter().map(initial).collect();
        Self { clock: 1, next_tag, flushed: 1, sectors }
    }

    /// The oracle of a new disk.
    pub fn of(setup: &Setup) -> Self {
        Self::new((0..setup.sectors).map(|sector| setup.initial_tag(sector)), 1)
    }

    /// The next unused tag.
    pub fn next_tag(&self) -> u64 {
        self.next_tag
    }

    /// One step of time.
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Notes that `op` is asked for. Returns when, and the tags that a write writes.
    pub fn begin(&mut self, op: Op) -> (u64, Vec<u64>) {
        let now = self.tick();
        let mut tags = Vec::new();
        let (start, len, is_write) = match op {
            Op::Write(start, len) => (start, len, true),
            Op::Zero(start, len, _) | Op::Discard(start, len) => (start, len, false),
            Op::Read(..) | Op::Flush => return (now, tags),
        };
        for sector in start..start + len {
            let tag = if is_write { self.next_tag } else { 0 };
            self.next_tag += u64::from(is_write);
            tags.push(tag);
            let version = Version { tag, issued: now, ended: u64::MAX, settles: false };
            self.sectors[usize::try_from(sector).expect("small")].push(version);
        }
        (now, tags)
    }

    /// Notes that the `op` that began at `began` has ended.
    pub fn end(&mut self, op: Op, began: u64, succeeded: bool) {
        let now = self.tick();
        match op {
            Op::Flush if succeeded => self.flushed = self.flushed.max(began),
            Op::Write(start, len) | Op::Zero(start, len, _) | Op::Discard(start, len) => {
                for sector in start..start + len {
                    let versions = &mut self.sectors[usize::try_from(sector).expect("small")];
                    for version in versions.iter_mut().filter(|v| v.issued == began) {
                        version.ended = now;
                        version.settles = succeeded && !matches!(op, Op::Discard(..));
                    }
                }
            }
            Op::Read(..) | Op::Flush => {}
        }
    }

    /// Whether `sector` may show `tag` at a moment that counts everything ended before `moment`.
    fn allows(&self, sector: u64, tag: u64, moment: u64) -> bool {
        let versions = &self.sectors[usize::try_from(sector).expect("small")];
        let settled = versions.iter().filter(|v| v.settles && v.ended < moment);
        let newest = settled.map(|v| v.issued).max().unwrap_or(0);
        versions.iter().any(|v| v.tag == tag && v.ended >= newest)
    }

    /// Fails unless a read that began at `began` may show `tags` from sector `first` on.
    pub fn check_read(&self, first: u64, tags: &[u64], began: u64, what: &dyn std::fmt::Debug) {
        for (sector, tag) in (first..).zip(tags) {
            let history = &self.sectors[usize::try_from(sector).expect("small")];
            assert!(
                self.allows(sector, *tag, began),
                "sector {sector} shows {tag:#x} in a read begun at {began}; {what:?}\n{history:#?}"
            );
        }
    }

    /// Fails unless the disk may show `tags` now, with nothing going on.
    pub fn check_now(&self, tags: &[u64], what: &dyn std::fmt::Debug) {
        self.check_read(0, tags, u64::MAX, what);
    }

    /// Fails unless the disk may show `tags` after a power cut now.
    pub fn check_after_cut(&self, tags: &[u64], what: &dyn std::fmt::Debug) {
        self.check_after_cut_since(tags, self.flushed, what);
    }

    /// The same after a power cut at a time when of all flushes that had succeeded the last one to
    /// begin did so at `flushed`.
    pub fn check_after_cut_since(&self, tags: &[u64], flushed: u64, what: &dyn std::fmt::Debug) {
        for (sector, tag) in (0..).zip(tags) {
            let history = &self.sectors[usize::try_from(sector).expect("small")];
            assert!(
                self.allows(sector, *tag, flushed),
                "sector {sector} shows {tag:#x} after a power cut; last flush began at {flushed}; \
                 {what:?}\n{history:#?}"
            );
        }
    }

    /// Notes what a read has shown with nothing going on: from now on it is that and nothing else,
    /// also where a discard had left a choice.
    pub fn settle(&mut self, tags: &[u64]) {
        let now = self.tick();
        for (versions, &tag) in self.sectors.iter_mut().zip(tags) {
            *versions = vec![Version { tag, issued: 0, ended: now, settles: true }];
        }
    }
}

/// Performs `op` on `image` under the eyes of the oracle.
pub async fn perform(
    rig: &Rig,
    image: &Image<SimStorage>,
    oracle: &RefCell<Oracle>,
    op: Op,
) -> Result<(), ImageError> {
    perform_on(image, oracle, op, &|first, bytes| rig.tags_of(first, bytes)).await
}

/// The same on any image: `tags_of` tells the tags of what was read from a sector on.
pub async fn perform_on(
    image: &Image<SimStorage>,
    oracle: &RefCell<Oracle>,
    op: Op,
    tags_of: &dyn Fn(u64, &[u8]) -> Vec<u64>,
) -> Result<(), ImageError> {
    let (began, tags) = oracle.borrow_mut().begin(op);
    let bytes = |sectors: u64| usize::try_from(sectors * SECTOR).expect("small");
    let result = match op {
        Op::Read(start, len) => {
            let buffer = IoBuffer::from_bytes(&vec![0x55; bytes(len)]);
            let result = image.read(start * SECTOR, buffer.clone()).await;
            if result.is_ok() {
                let tags = tags_of(start, &buffer.to_vec());
                oracle.borrow().check_read(start, &tags, began, &op);
            }
            result
        }
        Op::Write(start, _) => {
            let data: Vec<u8> = tags.iter().flat_map(|tag| sector_bytes(*tag)).collect();
            image.write(start * SECTOR, IoBuffer::from_bytes(&data)).await
        }
        Op::Zero(start, len, unmap) => {
            image.write_zeroes(start * SECTOR, len * SECTOR, unmap).await
        }
        Op::Discard(start, len) => image.discard(start * SECTOR, len * SECTOR).await,
        Op::Flush => image.flush().await,
    };
    oracle.borrow_mut().end(op, began, result.is_ok());
    result
}

/// Whether a task was woken.
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// How a run of tasks ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All of them are done.
    Done,
    /// The power went; the rest was dropped.
    Stopped,
}

/// A task.
pub type Task<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

/// Runs `tasks` on `disk` to their end, or until the power goes. The next one is chosen by `rng`
/// among those that were woken; it is a failure if nobody was.
pub fn run_tasks(disk: &SimDisk, rng: &mut Rng, tasks: Vec<Task<'_>>) -> Outcome {
    let new = |task| (task, Arc::new(Flag(AtomicBool::new(true))));
    let mut tasks: Vec<(Task<'_>, Arc<Flag>)> = tasks.into_iter().map(new).collect();
    while !tasks.is_empty() {
        let woken: Vec<usize> =
            (0..tasks.len()).filter(|&i| tasks[i].1.0.load(Ordering::SeqCst)).collect();
        assert!(!woken.is_empty(), "{} tasks wait and nobody wakes them (P10)", tasks.len());
        let index = woken[rng.usize(0..woken.len())];
        let (task, flag) = &mut tasks[index];
        flag.0.store(false, Ordering::SeqCst);
        let waker = Waker::from(Arc::clone(flag));
        if task.as_mut().poll(&mut Context::from_waker(&waker)) == Poll::Ready(()) {
            drop(tasks.swap_remove(index));
        }
        if disk.is_stopped() {
            return Outcome::Stopped;
        }
    }
    Outcome::Done
}

/// Runs `queues`, each a list of requests done one after the other on a handle of its own, as
/// concurrent tasks. `on_error` hears of failed requests.
pub fn run_queues(
    rig: &Rig,
    state: &Arc<ImageState>,
    oracle: &Rc<RefCell<Oracle>>,
    rng: &mut Rng,
    queues: &[Vec<Op>],
    on_error: &dyn Fn(Op, ImageError),
) -> Outcome {
    let task = |ops: &Vec<Op>| -> Task<'_> {
        let (image, oracle, ops) = (rig.handle(state), Rc::clone(oracle), ops.clone());
        Box::pin(async move {
            for op in ops {
                if let Err(error) = perform(rig, &image, &oracle, op).await {
                    on_error(op, error);
                }
            }
        })
    };
    run_tasks(&rig.disk, rng, queues.iter().map(task).collect())
}
