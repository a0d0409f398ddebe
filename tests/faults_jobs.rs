//! Jobs on a host that fails at every operation: a job that says it is done is done, one that
//! fails says why, and the disk shows what it may, then and after power cuts.
//!
//! In every scenario every operation of the host goes wrong in every way, once and for good. Then
//! the job is run again on a host that works and must come to its end. For small disks the second
//! run fails too, at every operation, and the third one must come to its end.
//!
//! Not here: requests of guests (`faults.rs`), power cuts without faults (`crash_jobs.rs`,
//! `crash_verbs.rs`).

#[path = "common/score.rs"]
mod score;

mod rig;

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use addcow::executor::block_on;
use addcow::format::{BitmapGeometry, FileName, FileReference, FileRole, Header, HeaderChange};
use addcow::image::allocation::AllocationMap;
use addcow::image::chain::{Chain, ChainLayer};
use addcow::image::create::NewSide;
use addcow::image::{Image, ImageError, ImageState, check};
use addcow::jobs::commit::{Base, commit, grow};
use addcow::jobs::convert::{to_overlay, to_raw};
use addcow::jobs::copy::Pace;
use addcow::jobs::parts::DiskParts;
use addcow::jobs::rebase::{Chains, rebase};
use addcow::jobs::reset::reset;
use addcow::jobs::resize::resize;
use addcow::jobs::stream::stream;
use addcow::jobs::{JobError, Unwatched};
use addcow::storage::sim::{Fault, SimDisk, SimStorage};
use addcow::storage::{IoBuffer, Storage};
use addcow::units::ClusterSize;
use fastrand::Rng;
use rig::points::{FAULTS, Point, Points, Ran, arm, check_open_files, open_files};
use rig::stack::{Overlay, Shape, Stack};
use rig::{Outcome, SECTOR, run_tasks};
use score::score;

/// Steps of a few sectors, several under way, and a flush every few of them.
const PACE: Pace = Pace { step_len: 1024, flush_len: 2048 };

/// Name of the file that a disk is rebased onto.
const NEW_NAME: &str = "new.img";

/// A job with its arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Job {
    /// Everything below gets into the disk.
    Stream,
    /// The disk gets into what is below it, and is emptied.
    Commit,
    /// The disk is emptied.
    Reset,
    /// To so many sectors.
    Resize(u64),
    /// Onto the new file, or onto nothing.
    Rebase(bool),
    /// Into a raw image, with holes or without.
    ConvertRaw(bool),
    /// Into a disk over the new file.
    ConvertOverlay,
}

/// A disk, what it stands on, and what is done to it.
#[derive(Debug, Clone)]
struct Scenario {
    /// The disk and its chain.
    shape: Shape,
    /// The job.
    job: Job,
}

/// The files of a scenario.
struct World {
    /// The disk and its chain.
    stack: Stack,
    /// Number of the first file that is not theirs: the one that the disk may be rebased onto.
    /// Behind it the files of a new disk, its raw image first.
    extra: usize,
}

/// `bytes` cut or filled with zeros to `len`.
fn padded(bytes: &[u8], len: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(len, 0);
    bytes
}

/// A reference to a raw file.
fn reference(role: FileRole, name: &str) -> FileReference {
    FileReference { name: FileName::new(role, name).expect("plain"), format: "raw".to_owned() }
}

/// The cluster size of so many bits.
fn size(bits: u32) -> ClusterSize {
    ClusterSize::from_bits(bits).expect("in range")
}

impl World {
    /// Makes the files.
    fn new(scenario: &Scenario) -> Self {
        let stack = Stack::new(&scenario.shape, 7);
        let extra = 2 * scenario.shape.overlays.len() + usize::from(stack.base().is_some());
        // The same as the disk in some places, so that not all of it need be copied.
        let mut new = stack.content().to_vec();
        let mut rng = Rng::with_seed(9);
        for sector in new.chunks_mut(512) {
            match rng.u32(0..3) {
                0 => sector.fill_with(|| rng.u8(..)),
                1 => sector.fill(0),
                _ => {}
            }
        }
        let _new = stack.disk.create(&new);
        let _raw = stack.disk.create(&vec![0; new.len()]);
        let geometry = Self::new_geometry(new.len());
        let header = Header {
            cluster_size: geometry.cluster_size(),
            backing: Some(reference(FileRole::Backing, NEW_NAME)),
            image: reference(FileRole::Image, "target.raw"),
            all_allocated: false,
            compat_features: 0,
        };
        let side = stack.disk.create(&[]);
        block_on(NewSide::new(&header, geometry).expect("valid").write(&side)).expect("no faults");
        block_on(side.sync()).expect("no faults");
        stack.disk.count_looks();
        Self { stack, extra }
    }

    /// Where the bits of the new disk lie.
    fn new_geometry(len: usize) -> BitmapGeometry {
        BitmapGeometry::new(size(12), len as u64).expect("not too large")
    }

    /// The same in the same state on a host of its own.
    fn fork(&self) -> Self {
        Self { stack: self.stack.fork(), extra: self.extra }
    }

    /// The host.
    fn disk(&self) -> &SimDisk {
        &self.stack.disk
    }

    /// The file that the disk may be rebased onto, as a chain.
    fn new_chain(&self) -> Chain<SimStorage> {
        let file = self.disk().file(self.extra);
        let len = file.file_len().expect("no faults");
        Chain::raw(file, len)
    }

    /// What the disk stands on by its header.
    async fn below(&self) -> Option<Chain<SimStorage>> {
        let header = self.stack.header(0).await;
        match header.backing.as_ref().map(|backing| backing.name.as_bytes()) {
            None => None,
            Some(name) if name == NEW_NAME.as_bytes() => Some(self.new_chain()),
            Some(_) => self.stack.below(0).await,
        }
    }

    /// The disk; `len` is that of the longest chain that it is to stand on.
    async fn open(&self, len: u64) -> Image<SimStorage> {
        let (geometry, allocation) = self.stack.map(0).await;
        let below = self.below().await.filter(|_| !allocation.is_all());
        let len = below.as_ref().map_or(0, Chain::virtual_size).max(len);
        let state = Arc::new(ImageState::add_cow(geometry, allocation, len, true));
        Image::new(state, self.stack.raw(0), Some(self.stack.side(0)), below)
    }

    /// What the disk shows.
    fn bytes(&self) -> Vec<u8> {
        let image = block_on(self.open(0));
        let len = usize::try_from(image.state().virtual_size()).expect("small");
        let buffer = IoBuffer::from_bytes(&vec![0x55; len]);
        block_on(image.read(0, buffer.clone())).expect("no faults");
        buffer.to_vec()
    }

    /// The disk and its chain.
    async fn chain(&self) -> Chain<SimStorage> {
        let mut layers = Vec::new();
        for overlay in 0..self.stack.shape.overlays.len() {
            layers.push(self.stack.layer(overlay).await);
        }
        if let Some(base) = self.stack.base() {
            let len = base.file_len().expect("no faults");
            layers.push(ChainLayer::raw(base, len));
        }
        Chain::new(layers)
    }

    /// The new disk of a conversion.
    fn target(&self) -> Image<SimStorage> {
        let geometry = Self::new_geometry(self.stack.content().len());
        let map = AllocationMap::empty(&geometry).expect("small");
        let chain = self.new_chain();
        let state = ImageState::add_cow(geometry, map, chain.virtual_size(), true);
        let (raw, side) = (self.disk().file(self.extra + 1), self.disk().file(self.extra + 2));
        Image::new(Arc::new(state), raw, Some(side), Some(chain))
    }
}

impl Job {
    /// Carries it out with `point` going wrong once everything is open. Says by `start` how many
    /// operations there were before.
    async fn run(
        self,
        world: &World,
        point: Option<Point>,
        start: &Cell<u64>,
    ) -> Result<(), JobError> {
        let stack = &world.stack;
        let (side, raw) = (stack.side(0), stack.raw(0));
        let parts = DiskParts::load(&side, &raw).await.expect("opens without repair (P1)");
        let begin = || start.set(arm(world.disk(), point));
        match self {
            Self::Stream => {
                let image = world.open(0).await;
                begin();
                stream(&image, &parts, PACE, &Unwatched).await
            }
            Self::Commit => {
                let disk = Chain::new([stack.layer(0).await]);
                if stack.shape.overlays.len() > 1 {
                    let base = stack.open(1).await;
                    begin();
                    commit(&disk, &Base::AddCow(&base), PACE, &Unwatched).await?;
                } else {
                    let base = stack.base().expect("made with one");
                    begin();
                    grow(&base, disk.virtual_size()).await?;
                    commit(&disk, &Base::Raw(&base), PACE, &Unwatched).await?;
                }
                reset(&parts).await
            }
            Self::Reset => {
                begin();
                reset(&parts).await
            }
            Self::Resize(sectors) => {
                let new = BitmapGeometry::new(parts.header.cluster_size, sectors * SECTOR);
                let below = world.below().await;
                begin();
                resize(&parts, below.as_ref(), new.expect("not too large")).await
            }
            Self::Rebase(onto_new) => run_rebase(world, &parts, onto_new, &begin).await,
            Self::ConvertRaw(with_holes) => {
                let (source, target) = (world.chain().await, world.disk().file(world.extra + 1));
                begin();
                let block = with_holes.then_some(512);
                to_raw(&source, &target, block, PACE, &Unwatched).await
            }
            Self::ConvertOverlay => {
                let (source, target) = (world.chain().await, world.target());
                begin();
                to_overlay(&source, &world.new_chain(), &target, PACE, &Unwatched).await
            }
        }
    }

    /// What the disk shows once it is done, if it showed `old`.
    fn expected(self, world: &World, old: &[u8]) -> Vec<u8> {
        match self {
            Self::Resize(sectors) => padded(old, usize::try_from(sectors * SECTOR).expect("small")),
            Self::Reset => padded(&world.stack.contents[1], old.len()),
            _ => old.to_vec(),
        }
    }

    /// Whether the disk may show `bytes` on the way from `old` to `new`.
    fn allows(self, bytes: &[u8], old: &[u8], new: &[u8]) -> bool {
        if self != Self::Reset {
            return bytes == old || bytes == new;
        }
        // Each cluster by itself.
        let sectors = bytes.chunks(512).zip(old.chunks(512)).zip(new.chunks(512));
        bytes.len() == old.len()
            && sectors.into_iter().all(|((is, old), new)| is == old || is == new)
    }

    /// Checks what is in the files once it is done, durably.
    fn check_done(self, world: &World, new: &[u8], what: &str) {
        let world = world.fork();
        world.disk().power_cut_choosing(|versions| versions);
        world.disk().set_max_delay(0);
        assert!(world.bytes() == new, "{what}: the disk shows something else once it is done");
        check_metadata(&world, what);
        let stack = &world.stack;
        let count = || block_on(stack.map(0)).1.count();
        let header = block_on(stack.header(0));
        let raw = |number: usize| world.disk().file(number).content();
        match self {
            Self::Stream => {
                assert!(header.all_allocated && raw(0) == new, "{what}: not in the raw image");
            }
            Self::Commit => {
                let base = match stack.shape.overlays.len() {
                    1 => stack.base().expect("made with one").content(),
                    _ => stack.bytes(1),
                };
                assert_eq!(count(), Some(0), "{what}: the disk is not empty");
                assert!(base.starts_with(new), "{what}: the base is not the disk");
            }
            Self::Reset => assert_eq!(count(), Some(0), "{what}: the disk is not empty"),
            Self::Resize(_) => assert_eq!(raw(0).len(), new.len(), "{what}: raw image"),
            Self::Rebase(onto_new) => {
                let name = onto_new.then(|| reference(FileRole::Backing, NEW_NAME));
                assert_eq!(header.backing, name, "{what}: backing file");
            }
            Self::ConvertRaw(_) => {
                assert!(raw(world.extra + 1) == new, "{what}: the new image is another disk");
            }
            Self::ConvertOverlay => {
                let image = world.target();
                let (geometry, side) =
                    (World::new_geometry(new.len()), world.disk().file(world.extra + 2));
                let map = addcow::image::load::bitmap(&side, &geometry);
                let map = block_on(map).expect("no faults");
                for cluster in (0..geometry.clusters()).filter(|&c| map.is_allocated(c..c + 1)) {
                    image.state().allocation().mark(cluster..cluster + 1);
                }
                let shown = IoBuffer::zeroed(new.len());
                block_on(image.read(0, shown.clone())).expect("no faults");
                assert!(shown.to_vec() == new, "{what}: the new disk is another disk");
            }
        }
    }
}

/// Rebases the disk; calls `begin` when everything is open.
async fn run_rebase(
    world: &World,
    parts: &DiskParts<'_, SimStorage>,
    onto_new: bool,
    begin: &dyn Fn(),
) -> Result<(), JobError> {
    let file = onto_new.then(|| reference(FileRole::Backing, NEW_NAME));
    let change = parts.plan_header(|area| HeaderChange::to_backing(area, file.as_ref())).await?;
    let new = onto_new.then(|| world.new_chain());
    let image = world.open(new.as_ref().map_or(0, Chain::virtual_size)).await;
    let old = world.below().await;
    let is_at_new = old.is_some() && {
        let header = &parts.header;
        header.backing.as_ref().is_some_and(|b| b.name.as_bytes() == NEW_NAME.as_bytes())
    };
    let is_same_file = |_: (usize, usize), _: (usize, usize)| is_at_new && onto_new;
    let chains = Chains { old: old.as_ref(), new: new.as_ref(), is_same_file: &is_same_file };
    begin();
    rebase(parts, &image, &chains, change, &Unwatched).await
}

/// Checks that nothing is wrong with the disk's metadata: what `addcow check` looks at.
fn check_metadata(world: &World, what: &str) {
    let stack = &world.stack;
    let (geometry, _) = block_on(stack.map(0));
    let bits = block_on(check::count(&stack.side(0), &geometry)).expect("no faults");
    assert_eq!(bits.stray, 0, "{what}: stray bits");
    if block_on(stack.header(0)).all_allocated {
        assert_eq!(bits.allocated, geometry.clusters(), "{what}: bits without ALL_ALLOCATED");
    }
    let len = stack.side(0).file_len().expect("no faults");
    assert_eq!(len, geometry.file_len(), "{what}: length of the add-cow file");
}

/// Fails unless `error` is one that `fault` explains.
fn check_error(fault: Fault, error: &JobError, what: &str) {
    let JobError::Image(error) = error else { panic!("{what}: {error}") };
    match (error, fault) {
        // Only after a sync has failed, whose own error counts.
        (ImageError::Io { source, .. }, Fault::Error(code)) => {
            assert_eq!(source.raw_os_error(), Some(code), "{what}: {source}");
        }
        (ImageError::Io { source, .. }, Fault::Short(0)) => assert!(
            matches!(
                source.kind(),
                std::io::ErrorKind::WriteZero | std::io::ErrorKind::UnexpectedEof
            ),
            "{what}: {source}"
        ),
        (error, _) => panic!("{what}: {error}"),
    }
}

/// Runs `job` on `world`. Returns what it did and how it ended.
fn run_job(world: &World, job: Job, point: Option<Point>) -> (Ran, Result<(), JobError>) {
    let (start, result) = (Cell::new(0), RefCell::new(None));
    let before = world.disk().faulted().len();
    let task = Box::pin(async {
        let ended = job.run(world, point, &start).await;
        *result.borrow_mut() = Some(ended);
    });
    let outcome = run_tasks(world.disk(), &mut Rng::with_seed(1), vec![task]);
    assert_eq!(outcome, Outcome::Done);
    let mut ran = Ran::since(world.disk(), start.get());
    ran.faulted.drain(..before);
    world.disk().clear_fault();
    (ran, result.into_inner().expect("done"))
}

/// Runs the scenario with `point` going wrong, checks what comes of it, and runs it again; with
/// `then`, that run goes wrong too, and is followed by another one. Returns what the first run did.
fn run(scenario: &Scenario, template: &World, point: Option<Point>, then: Option<Point>) -> Ran {
    let job = scenario.job;
    let what = format!("{point:?}, then {then:?}, {scenario:?}");
    let world = template.fork();
    let old = world.bytes();
    let new = job.expected(&world, &old);
    let (ran, result) = run_job(&world, job, point);
    let check = |ran: &Ran, result: &Result<(), JobError>, point: Option<Point>, what: &str| {
        match (result, point) {
            (Ok(()), Some(point)) => {
                assert!(!ran.sync_failed(point.fault), "{what}: done without a sync");
            }
            (Ok(()), None) => {}
            (Err(error), Some(point)) => check_error(point.fault, error, what),
            (Err(error), None) => panic!("{what}: {error}"),
        }
        if result.is_ok() {
            job.check_done(&world, &new, what);
        }
        assert!(job.allows(&world.bytes(), &old, &new), "{what}: illegal bytes");
        check_cuts(job, &world, &old, &new, what);
    };
    check(&ran, &result, point, &what);
    // Then the host's cache may show what is on no medium, and no program can tell
    // (docs/crash-consistency.md, "A failed sync"): it is restarted.
    let restart = |ran: &Ran, point: Option<Point>| {
        if point.is_some_and(|point| ran.sync_failed(point.fault)) {
            world.disk().power_cut();
        }
    };
    restart(&ran, point);
    if then.is_some() {
        let (ran, result) = run_job(&world, job, then);
        check(&ran, &result, then, &format!("{what}: the second run"));
        PAIRS.with_borrow_mut(|pairs| *pairs += u64::from(!ran.faulted.is_empty()));
        restart(&ran, then);
    }
    let (ran_again, again) = run_job(&world, job, None);
    check(&ran_again, &again, None, &format!("{what}: the last run"));
    ran
}

/// Checks what a power cut would leave.
fn check_cuts(job: Job, world: &World, old: &[u8], new: &[u8], what: &str) {
    for way in 0..4 {
        let after = world.fork();
        after.disk().set_max_delay(0);
        match way {
            0 => after.disk().power_cut_choosing(|versions| versions),
            1 => after.disk().power_cut_choosing(|versions| versions - 1),
            _ => after.disk().power_cut(),
        }
        assert!(job.allows(&after.bytes(), old, new), "{what}: illegal bytes after a power cut");
    }
}

/// The scenarios, the smallest first.
fn scenarios() -> Vec<Scenario> {
    use Job::{Commit, ConvertOverlay, ConvertRaw, Rebase, Reset, Resize, Stream};
    let disk = |allocated: &[u64]| Overlay::plain(10, 3, allocated);
    let shape = |overlays: Vec<Overlay>, base_len| Shape { overlays, base_len };
    let small = shape(vec![Overlay::plain(9, 2, &[1])], Some(1024));
    let plain = shape(vec![disk(&[1])], Some(3072));
    let short = shape(vec![Overlay { sectors: 5, ..disk(&[0]) }], Some(1300));
    let bare = shape(vec![disk(&[2])], None);
    let full = shape(vec![Overlay { all_allocated: true, ..disk(&[0, 1, 2]) }], Some(3072));
    let tall = shape(vec![disk(&[0]), Overlay::plain(9, 6, &[1, 2])], Some(2500));
    let long = shape(vec![Overlay { sectors: 5, ..disk(&[1]) }], Some(9000));
    let wide = shape(vec![Overlay::plain(12, 2, &[0])], Some(8192));
    let scenario = |shape: &Shape, job| Scenario { shape: shape.clone(), job };
    vec![
        scenario(&small, Stream),
        scenario(&small, Commit),
        scenario(&small, Reset),
        scenario(&small, Resize(3)),
        scenario(&small, Rebase(true)),
        scenario(&plain, Stream),
        scenario(&bare, Stream),
        scenario(&tall, Stream),
        scenario(&short, Stream),
        scenario(&short, Commit),
        scenario(&long, Commit),
        scenario(&tall, Commit),
        scenario(&full, Commit),
        scenario(&full, Reset),
        scenario(&tall, Reset),
        scenario(&plain, Resize(2)),
        scenario(&short, Resize(20)),
        scenario(&long, Resize(9)),
        scenario(&full, Resize(7)),
        scenario(&plain, Rebase(false)),
        scenario(&tall, Rebase(true)),
        scenario(&bare, Rebase(true)),
        scenario(&plain, ConvertRaw(true)),
        scenario(&tall, ConvertRaw(false)),
        scenario(&wide, ConvertOverlay),
        scenario(&tall, ConvertOverlay),
    ]
}

#[test]
fn every_operation_of_a_job_goes_wrong_in_every_way() {
    let files = open_files();
    let mut points = Points::default();
    for scenario in scenarios() {
        let template = World::new(&scenario);
        points.each(&FAULTS, |point| run(&scenario, &template, point, None));
    }
    check_open_files(files);
    score("faults_jobs", &points.figures());
    assert_eq!(points.covered, points.points, "{points:?}");
    assert!(points.points >= 4_000, "{points:?}");
}

#[test]
fn the_second_run_of_a_job_goes_wrong_too_at_every_pair_of_operations() {
    let mut points = Points::default();
    for scenario in scenarios().into_iter().take(5) {
        let template = World::new(&scenario);
        for fault in [Fault::Error(libc::EIO), Fault::Short(0)] {
            for index in 0..20 {
                let then = Some(Point { index, fault, lasting: false });
                points.each(&FAULTS[..1], |point| run(&scenario, &template, point, then));
            }
        }
    }
    points.pairs = PAIRS.take();
    score("faults_jobs_twice", &points.figures());
    assert_eq!(points.covered, points.points, "{points:?}");
    assert!(points.pairs >= 1_000, "{points:?}");
}

thread_local! {
    /// How many second runs met their fault.
    static PAIRS: RefCell<u64> = const { RefCell::new(0) };
}
