//! Power cuts in the middle of the verbs that change a disk's metadata: resize, reset, rebase.
//!
//! The power goes before every single operation of the simulated host, changes of a file's length
//! included, and of what no sync had covered any subset gets through, sector by sector. The disk
//! must open without repair and show the old bytes or the new ones (P1), never any others (P5: not
//! the raw image's garbage, not a longer backing file); and the verb, run again, comes to its end.
//!
//! Not here: requests of guests ([`super::requests`]).

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use addcow::executor::block_on;
use addcow::format::{BitmapGeometry, FileName, FileReference, FileRole, Header, HeaderChange};
use addcow::image::allocation::AllocationMap;
use addcow::image::chain::{Chain, ChainLayer, ClusterMap};
use addcow::image::{Image, ImageState, check, load};
use addcow::jobs::parts::DiskParts;
use addcow::jobs::rebase::{Chains, rebase};
use addcow::jobs::{JobError, Unwatched, reset, resize};
use addcow::storage::sim::{SimDisk, SimStorage};
use addcow::storage::{IoBuffer, Storage};
use addcow::units::ClusterSize;
use fastrand::Rng;

use super::cuts::{Count, Depth, chooser, each_way};
use super::{Outcome, Replay, run_tasks};

/// Numbers of the files: the disk's own, then what it stands on or may come to stand on.
const RAW: usize = 0;
const SIDE: usize = 1;
const OLD: usize = 2;
pub const NEW: usize = 3;
pub const MIDDLE: usize = 4;

/// Names of the backing files in the header.
const NAMES: [(usize, &str); 3] =
    [(OLD, "old.img"), (NEW, "a/longer/name/new.img"), (MIDDLE, "middle.add-cow")];

/// What a disk is made of.
#[derive(Debug, Clone)]
pub struct Shape {
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// Size in sectors.
    pub sectors: u64,
    /// Bytes in the raw image behind the last whole sector.
    pub extra: u64,
    /// What it stands on: `OLD`, `NEW`, `MIDDLE`, or nothing.
    pub backing: Option<usize>,
    /// Length of the backing file `OLD` in bytes.
    pub old_len: usize,
    /// Length of the backing file `NEW` in bytes. `MIDDLE` is an overlay on it, as long as the
    /// disk.
    pub new_len: usize,
    /// Clusters that are allocated.
    pub allocated: Vec<u64>,
    /// Clusters that are allocated in `MIDDLE`.
    pub in_middle: Vec<u64>,
    /// ALL_ALLOCATED in the header.
    pub all_allocated: bool,
    /// Whether bits are set behind the last cluster.
    pub stray: bool,
    /// Length of the image file's name; with a long one the backing file's lies in another sector
    /// than the fixed header.
    pub name_len: usize,
}

impl Shape {
    /// A disk of four sectors in two clusters, with a backing file of the same size.
    pub fn plain() -> Self {
        Self {
            cluster_bits: 10,
            sectors: 4,
            extra: 0,
            backing: Some(OLD),
            old_len: 2048,
            new_len: 2048,
            allocated: vec![],
            in_middle: vec![],
            all_allocated: false,
            stray: false,
            name_len: 8,
        }
    }

    /// Any disk of few clusters.
    fn random(rng: &mut Rng) -> Self {
        let cluster_bits = rng.u32(9..=12);
        let cluster = 1_u64 << cluster_bits;
        let sectors = rng.u64(1..=4 * cluster / 512);
        let len = usize::try_from(sectors * 512).expect("small");
        let mut backing_len = || match rng.u32(0..4) {
            0 => rng.usize(0..=len),
            1 => len + rng.usize(0..6000),
            _ => len,
        };
        let (old_len, new_len) = (backing_len(), backing_len());
        let clusters = (sectors * 512).div_ceil(cluster);
        let mut some = || (0..clusters).filter(|_| rng.u32(0..3) == 0).collect();
        let (allocated, in_middle) = (some(), some());
        Self {
            cluster_bits,
            sectors,
            extra: if rng.u32(0..4) == 0 { rng.u64(1..512) } else { 0 },
            backing: [None, Some(OLD), Some(NEW), Some(MIDDLE)][rng.usize(0..4)],
            old_len,
            new_len,
            allocated,
            in_middle,
            all_allocated: rng.u32(0..8) == 0,
            stray: rng.u32(0..4) == 0,
            name_len: if rng.bool() { 8 } else { rng.usize(400..600) },
        }
    }

    /// The cluster size.
    fn cluster_size(&self) -> ClusterSize {
        ClusterSize::from_bits(self.cluster_bits).expect("in range")
    }

    /// The shape of the bitmap.
    fn geometry(&self) -> BitmapGeometry {
        BitmapGeometry::new(self.cluster_size(), self.sectors * 512).expect("not too large")
    }

    /// The side file.
    fn side(&self) -> Vec<u8> {
        let header = Header {
            cluster_size: self.cluster_size().max(ClusterSize::from_bits(12).expect("in range")),
            backing: self.backing.and_then(reference),
            image: FileReference {
                name: FileName::new(FileRole::Image, "i".repeat(self.name_len)).expect("plain"),
                format: "raw".to_owned(),
            },
            all_allocated: self.all_allocated,
            compat_features: 0,
        };
        let mut bytes = header.encode().expect("valid");
        // Smaller clusters are read but not written: the header's word is the only difference.
        bytes[20..24].copy_from_slice(&self.cluster_bits.to_le_bytes());
        let geometry = self.geometry();
        bytes.resize(usize::try_from(geometry.file_len()).expect("small"), 0);
        let all = (0..geometry.clusters()).filter(|_| self.all_allocated);
        let stray = (geometry.clusters()..geometry.clusters() + 70).filter(|_| self.stray);
        for cluster in self.allocated.iter().copied().chain(all).chain(stray) {
            let (byte, mask) = geometry.position(cluster);
            bytes[usize::try_from(byte).expect("small")] |= mask;
        }
        bytes
    }
}

/// The header's reference to one of the backing files.
fn reference(file: usize) -> Option<FileReference> {
    let (_, name) = NAMES.iter().find(|(number, _)| *number == file)?;
    let format = if file == MIDDLE { "add-cow" } else { "raw" }.to_owned();
    Some(FileReference { name: FileName::new(FileRole::Backing, name).expect("plain"), format })
}

/// Bytes of which every sector is different, and some are zeros.
fn data(rng: &mut Rng, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    for sector in bytes.chunks_mut(512) {
        if rng.u32(0..4) > 0 {
            sector.fill_with(|| rng.u8(1..));
        }
    }
    bytes
}

/// A disk and its backing files on a simulated host.
#[derive(Debug)]
pub struct World {
    /// What it was made of.
    shape: Shape,
    /// The host.
    pub disk: SimDisk,
}

impl World {
    /// Makes the files; `seed` decides about their content.
    pub fn new(shape: &Shape, seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let disk = SimDisk::new(seed);
        disk.set_max_delay(0);
        let len = usize::try_from(shape.sectors * 512 + shape.extra).expect("small");
        // Garbage and data alike: no zeros that would look right by chance.
        let garbage = |rng: &mut Rng| (0..len).map(|_| rng.u8(1..)).collect::<Vec<u8>>();
        let _raw = disk.create(&garbage(&mut rng));
        let _side = disk.create(&shape.side());
        let old = data(&mut rng, shape.old_len);
        let _old = disk.create(&old);
        // The same here and there, so that some clusters need no copy.
        let mut new = data(&mut rng, shape.new_len);
        for (to, from) in new.chunks_mut(512).zip(old.chunks(512)) {
            if rng.bool() && to.len() == from.len() {
                to.copy_from_slice(from);
            }
        }
        let _new = disk.create(&new);
        let _middle = disk.create(&garbage(&mut rng));
        Self { shape: shape.clone(), disk }
    }

    /// The same in the same state on a host of its own.
    pub fn fork(&self) -> Self {
        Self { shape: self.shape.clone(), disk: self.disk.fork() }
    }

    /// A chain from this backing file down.
    fn chain(&self, file: usize) -> Chain<SimStorage> {
        let raw = |number: usize| {
            let file = self.disk.file(number);
            let len = file.file_len().expect("no faults");
            ChainLayer::raw(file, len)
        };
        if file != MIDDLE {
            return Chain::new([raw(file)]);
        }
        let allocation = AllocationMap::empty(&self.shape.geometry()).expect("small");
        self.shape.in_middle.iter().for_each(|&cluster| allocation.mark(cluster..cluster + 1));
        let map = ClusterMap { cluster_size: self.shape.cluster_size(), allocation };
        let len = self.shape.sectors * 512;
        Chain::new([ChainLayer::add_cow(self.disk.file(MIDDLE), len, Arc::new(map)), raw(NEW)])
    }

    /// The backing file that the header names now.
    fn backing(&self, header: &Header) -> Option<usize> {
        let name = &header.backing.as_ref()?.name;
        let (file, _) = NAMES.iter().find(|(_, text)| text.as_bytes() == name.as_bytes())?;
        Some(*file)
    }

    /// Opens the disk from what its files say; `new` is what it will stand on.
    pub async fn open(&self, new: Option<usize>) -> Image<SimStorage> {
        let (raw, side) = (self.disk.file(RAW), self.disk.file(SIDE));
        let header = load::header(&side).await.expect("a header");
        let len = raw.file_len().expect("no faults");
        let geometry = BitmapGeometry::new(header.cluster_size, len).expect("not too large");
        let map = if header.all_allocated {
            AllocationMap::all()
        } else {
            load::bitmap(&side, &geometry).await.expect("an image opens without repair (P1)")
        };
        let needed = self.backing(&header).filter(|_| !header.all_allocated);
        let chain = needed.map(|file| self.chain(file));
        let len = |chain: &Chain<SimStorage>| chain.virtual_size();
        let new_len = new.map_or(0, |file| self.chain(file).virtual_size());
        let backing_len = chain.as_ref().map_or(0, len).max(new_len);
        let state = Arc::new(ImageState::add_cow(geometry, map, backing_len, true));
        Image::new(state, raw, Some(side), chain)
    }

    /// What the disk shows.
    pub fn bytes(&self) -> Vec<u8> {
        let image = block_on(self.open(None));
        let len = usize::try_from(image.state().virtual_size()).expect("small");
        let buffer = IoBuffer::from_bytes(&vec![0x55; len]);
        block_on(image.read(0, buffer.clone())).expect("no faults");
        buffer.to_vec()
    }

    /// What its backing file shows, as far as the disk goes.
    fn base_bytes(&self) -> Vec<u8> {
        let buffer = IoBuffer::zeroed(self.bytes().len());
        if let Some(file) = self.shape.backing {
            block_on(self.chain(file).read(0, buffer.clone())).expect("no faults");
        }
        buffer.to_vec()
    }
}

/// A verb with its arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// To so many sectors.
    Resize(u64),
    /// Back to the backing file.
    Reset,
    /// To another backing file, or none.
    Rebase(Option<usize>),
}

impl Verb {
    /// Any of them.
    fn random(rng: &mut Rng, shape: &Shape) -> Self {
        match rng.u32(0..6) {
            0..=2 => Self::Resize(rng.u64(1..=shape.sectors * 2 + 2)),
            3 => Self::Reset,
            _ => Self::Rebase([None, Some(OLD), Some(NEW), Some(MIDDLE)][rng.usize(0..4)]),
        }
    }

    /// Carries it out.
    pub async fn run(self, world: &World) -> Result<(), JobError> {
        let (raw, side) = (world.disk.file(RAW), world.disk.file(SIDE));
        let parts = DiskParts::load(&side, &raw).await.expect("it opens");
        let backing = world.backing(&parts.header).filter(|_| !parts.header.all_allocated);
        match self {
            Self::Resize(sectors) => {
                let new = BitmapGeometry::new(parts.header.cluster_size, sectors * 512);
                let chain = backing.map(|file| world.chain(file));
                resize::resize(&parts, chain.as_ref(), new.expect("not too large")).await
            }
            Self::Reset => reset::reset(&parts).await,
            Self::Rebase(new) => {
                let file = new.and_then(reference);
                let plan = |area: &[u8]| HeaderChange::to_backing(area, file.as_ref());
                let change = parts.plan_header(plan).await?;
                if parts.header.all_allocated {
                    return parts.change_header(change).await;
                }
                let image = world.open(new).await;
                let (old_chain, new_chain) =
                    (backing.map(|f| world.chain(f)), new.map(|f| world.chain(f)));
                let file = |chain: Option<usize>, (layer, _): (usize, usize)| match chain {
                    Some(MIDDLE) if layer == 1 => Some(NEW),
                    chain => chain,
                };
                let is_same_file = |a, b| file(backing, a) == file(new, b);
                let chains = Chains {
                    old: old_chain.as_ref(),
                    new: new_chain.as_ref(),
                    is_same_file: &is_same_file,
                };
                rebase(&parts, &image, &chains, change, &Unwatched).await
            }
        }
    }

    /// What a disk that shows `old` shows afterwards.
    fn expected(self, old: &[u8], base: &[u8]) -> Vec<u8> {
        match self {
            Self::Resize(sectors) => {
                let mut bytes = old.to_vec();
                bytes.resize(usize::try_from(sectors * 512).expect("small"), 0);
                bytes
            }
            Self::Reset => base.to_vec(),
            Self::Rebase(_) => old.to_vec(),
        }
    }

    /// Whether a disk may show `bytes` when the verb was cut, which was to make `new` of `old`.
    fn allows(self, bytes: &[u8], old: &[u8], new: &[u8]) -> bool {
        let sectors = |bytes: &[u8]| bytes.chunks(512).map(<[u8]>::to_vec).collect::<Vec<_>>();
        match self {
            // Each cluster by itself.
            Self::Reset => {
                let (bytes, old, new) = (sectors(bytes), sectors(old), sectors(new));
                bytes.len() == old.len()
                    && (0..bytes.len()).all(|s| bytes[s] == old[s] || bytes[s] == new[s])
            }
            Self::Resize(_) | Self::Rebase(_) => bytes == old || bytes == new,
        }
    }

    /// Checks what is in the files once the verb is done.
    fn check_files(self, world: &World, what: &str) {
        let (raw, side) = (world.disk.file(RAW), world.disk.file(SIDE));
        let parts = block_on(DiskParts::load(&side, &raw)).expect("it opens");
        let bits = block_on(check::count(&side, &parts.geometry)).expect("no faults");
        match self {
            Self::Resize(sectors) => {
                // A part of a sector may stay where the size did not change: it is not on the disk.
                assert_eq!(raw.file_len().expect("no faults") / 512, sectors, "{what}: raw image");
                assert_eq!(
                    side.file_len().expect("no faults"),
                    parts.geometry.file_len(),
                    "{what}"
                );
                assert_eq!(bits.stray, 0, "{what}: stray bits");
                if parts.header.all_allocated {
                    assert_eq!(bits.allocated, parts.geometry.clusters(), "{what}: ones");
                }
            }
            Self::Reset => {
                assert_eq!((bits.allocated, bits.stray), (0, 0), "{what}: bits");
                assert!(!parts.header.all_allocated, "{what}: ALL_ALLOCATED");
                assert!(raw.content().iter().all(|&byte| byte == 0), "{what}: space in use");
            }
            Self::Rebase(new) => {
                assert_eq!(parts.header.backing, new.and_then(reference), "{what}: backing file");
            }
        }
    }
}

/// Runs `verb` on `world`, perhaps until the power goes.
fn run_verb(world: &World, verb: Verb) -> Option<Result<(), JobError>> {
    let result = RefCell::new(None);
    let task = Box::pin(async {
        let ended = verb.run(world).await;
        *result.borrow_mut() = Some(ended);
    });
    let outcome = run_tasks(&world.disk, &mut Rng::with_seed(0), vec![task]);
    // Without power a change of a length fails, for want of a way to wait.
    result.into_inner().filter(|_| outcome == Outcome::Done)
}

/// Cuts `verb` before each of its operations, checks every disk that can come of it, and finishes
/// some of them. Returns the world with the verb done.
fn cut_everywhere(
    world: &World,
    verb: Verb,
    rng: &mut Rng,
    what: &str,
    count: &mut Count,
) -> World {
    let old = world.bytes();
    let new = verb.expected(&old, &world.base_bytes());
    count.workloads += 1;
    for cut in 0.. {
        let what = format!("{what}: {verb:?} cut before operation {cut}");
        let world = world.fork();
        world.disk.stop_at(world.disk.operations() + cut);
        let result = run_verb(&world, verb);
        count.cuts += 1;
        let mut again = rng.fork();
        each_way(&world.disk.unsynced(), Depth::FEW, rng, |way| {
            let after = world.fork();
            after.disk.power_cut_choosing(chooser(way));
            let bytes = after.bytes();
            (count.states, count.opened) = (count.states + 1, count.opened + 1);
            assert!(verb.allows(&bytes, &old, &new), "{what}: illegal bytes with {way:?}");
            if result.is_some() || again.u32(0..4) == 0 {
                verb.run_again(&after, &new, &what);
            }
        });
        if let Some(result) = result {
            result.unwrap_or_else(|error| panic!("{what}: {error}"));
            return world;
        }
    }
    unreachable!("the verb ends")
}

impl Verb {
    /// Runs the verb to its end on a disk on which it was cut, or done; checks what comes of it.
    fn run_again(self, world: &World, new: &[u8], what: &str) {
        block_on(self.run(world)).unwrap_or_else(|error| panic!("{what}: again: {error}"));
        world.disk.power_cut();
        assert!(world.bytes() == new, "{what}: other bytes once it was run again");
        self.check_files(world, what);
    }
}

/// Disks that have something special each.
pub fn small_shapes() -> Vec<Shape> {
    let plain = Shape::plain();
    vec![
        plain.clone(),
        Shape { allocated: vec![1], ..plain.clone() },
        // A partial last cluster, in the raw image and not; a longer backing file.
        Shape { sectors: 3, old_len: 5000, ..plain.clone() },
        Shape { sectors: 3, old_len: 5000, allocated: vec![1], ..plain.clone() },
        Shape { sectors: 3, old_len: 5000, extra: 100, stray: true, ..plain.clone() },
        Shape { sectors: 3, old_len: 700, ..plain.clone() },
        Shape { backing: None, allocated: vec![0], stray: true, ..plain.clone() },
        Shape { all_allocated: true, extra: 511, ..plain.clone() },
        Shape { all_allocated: true, backing: None, sectors: 3, ..plain.clone() },
        Shape { backing: Some(MIDDLE), in_middle: vec![1], new_len: 3000, ..plain.clone() },
        Shape { name_len: 430, ..plain },
    ]
}

/// Every verb with every argument that makes a difference on a small disk.
fn all_verbs() -> Vec<Verb> {
    let sizes = [1, 2, 3, 4, 5, 6, 7, 9, 20];
    let files = [None, Some(OLD), Some(NEW), Some(MIDDLE)];
    let sizes = sizes.map(Verb::Resize).into_iter();
    sizes.chain([Verb::Reset]).chain(files.map(Verb::Rebase)).collect()
}

/// Every verb with every argument that makes a difference on every small disk.
pub fn small_verbs(count: &mut Count) {
    let mut rng = Rng::with_seed(1);
    for (number, shape) in small_shapes().into_iter().enumerate() {
        for verb in all_verbs() {
            let world = World::new(&shape, 7);
            let what = format!("shape {number} {shape:?}");
            cut_everywhere(&world, verb, &mut rng, &what, count);
        }
    }
}

/// One verb after the other on random disks, each cut everywhere: what one leaves behind must not
/// come back with the next.
pub fn random_verbs(seeds: Range<u64>, count: &mut Count) {
    for seed in seeds {
        let _replay = Replay(seed);
        let mut rng = Rng::with_seed(seed);
        let shape = Shape::random(&mut rng);
        let mut world = World::new(&shape, seed);
        for step in 0..3 {
            let verb = Verb::random(&mut rng, &shape);
            let what = format!("ADDCOW_SEED={seed}: step {step} on {shape:?}");
            world = cut_everywhere(&world, verb, &mut rng, &what, count).fork();
            if let Verb::Rebase(new) = verb {
                world.shape.backing = new;
            }
        }
    }
}
