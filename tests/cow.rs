//! What a guest sees: reads, writes, zeroes and discards against a model of one tag per sector.
//!
//! Requests run one after the other, on concurrent tasks over the simulated disk, and on real
//! threads; several handles on one open image stand for as many queues. Every disk starts with
//! garbage in the raw image wherever nothing is allocated, and none of it may ever show (I2).
//!
//! Replay: `ADDCOW_SEED=N cargo test --release --test cow NAME`. Not here: power cuts (`crash.rs`),
//! the order of syncs (`ordering.rs`), failing hosts (`faults.rs`).

mod rig;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use addcow::executor::block_on;
use addcow::format::BitmapGeometry;
use addcow::image::allocation::AllocationMap;
use addcow::image::chain::Chain;
use addcow::image::{Image, ImageError, ImageState};
use addcow::storage::file::FileStorage;
use addcow::storage::host_file::{CacheMode, HostFile};
use addcow::storage::sim::{Operation, SimDisk};
use addcow::storage::{IoBuffer, Storage};
use addcow::units::ClusterSize;
use fastrand::Rng;
use rig::{
    Op, Oracle, Outcome, RAW, Rig, SECTOR, SIDE, Setup, TAG_BACKING, base_seed, perform,
    run_queues, scaled, sector_bytes,
};

/// A request that must not fail.
fn no_error(op: Op, error: ImageError) {
    panic!("{op:?} failed without a fault: {error}");
}

/// The clusters that `ops` may allocate: those a write or a zeroing touches.
fn touched(setup: &Setup, ops: &[Op]) -> Vec<bool> {
    let mut touched = vec![false; usize::try_from(setup.geometry().clusters()).unwrap()];
    for op in ops {
        if let Op::Write(start, len) | Op::Zero(start, len, _) = *op {
            let first = (start * SECTOR) >> setup.cluster_bits;
            let last = ((start + len) * SECTOR - 1) >> setup.cluster_bits;
            (first..=last).for_each(|c| touched[usize::try_from(c).unwrap()] = true);
        }
    }
    touched
}

#[test]
fn requests_one_after_the_other_match_the_model() {
    let base = base_seed(0x5e9);
    for seed in base..base + scaled(3000) {
        let mut rng = Rng::with_seed(seed);
        let setup = Setup::random(&mut rng);
        let rig = Rig::new(&setup, seed);
        rig.disk.set_max_delay(0);
        let state = rig.open();
        let image = rig.handle(&state);
        let oracle = RefCell::new(Oracle::of(&setup));
        let ops: Vec<Op> = (0..25).map(|_| Op::random(&mut rng, setup.sectors)).collect();
        println!("ADDCOW_SEED={seed}: {setup:?}: {ops:?}");
        for op in &ops {
            block_on(perform(&rig, &image, &oracle, *op)).unwrap();
            let tags = rig.tags(&image);
            oracle.borrow().check_now(&tags, op);
            // From here on a discarded sector is what it was seen to be.
            oracle.borrow_mut().settle(&tags);
        }
        block_on(image.flush()).unwrap();
        let tags = rig.tags(&image);
        oracle.borrow().check_now(&tags, &"flush");
        let again = rig.open();
        assert_eq!(rig.tags(&rig.handle(&again)), tags, "after reopening");
        let touched = touched(&setup, &ops);
        for (cluster, touched) in (0..).zip(touched) {
            let allocated = again.allocation().is_allocated(cluster..cluster + 1);
            assert_eq!(state.allocation().is_allocated(cluster..cluster + 1), allocated);
            assert!(allocated || !setup.allocated.contains(&cluster), "I3: {cluster}");
            assert!(!allocated || touched || setup.allocated.contains(&cluster), "{cluster}");
        }
    }
}

#[test]
fn concurrent_queues_show_only_legal_values() {
    let base = base_seed(0xc0);
    for seed in base..base + scaled(3000) {
        let mut rng = Rng::with_seed(seed);
        let setup = Setup::random(&mut rng);
        let rig = Rig::new(&setup, seed);
        rig.disk.set_max_delay(rng.u32(0..6));
        let state = rig.open();
        let oracle = Rc::new(RefCell::new(Oracle::of(&setup)));
        let mut queue = || (0..10).map(|_| Op::random(&mut rng, setup.sectors)).collect();
        let queues: Vec<Vec<Op>> = (0..5).map(|_| queue()).collect();
        println!("ADDCOW_SEED={seed}: {setup:?}");
        let outcome = run_queues(&rig, &state, &oracle, &mut rng, &queues, &no_error);
        assert_eq!(outcome, Outcome::Done);
        let image = rig.handle(&state);
        let tags = rig.tags(&image);
        oracle.borrow().check_now(&tags, &"all done");
        assert_eq!(rig.tags(&image), tags, "a second read");
        block_on(image.flush()).unwrap();
        assert_eq!(rig.tags(&rig.handle(&rig.open())), tags, "after reopening");
    }
}

/// I5 in its sharpest form: every sector of a cluster written by a queue of its own, at once.
#[test]
fn partial_writes_of_one_cluster_all_arrive() {
    for seed in 0..scaled(2000) {
        let setup = Setup { backing_len: Some(5 * 512 + 17), ..Setup::plain(12, 2) };
        let rig = Rig::new(&setup, seed);
        let state = rig.open();
        let oracle = Rc::new(RefCell::new(Oracle::of(&setup)));
        let queues: Vec<Vec<Op>> = (1..14).map(|s| vec![Op::Write(s, 1 + s % 2)]).collect();
        let mut rng = Rng::with_seed(seed);
        run_queues(&rig, &state, &oracle, &mut rng, &queues, &no_error);
        let tags = rig.tags(&rig.handle(&state));
        oracle.borrow().check_now(&tags, &seed);
        assert_eq!((tags[0], tags[15]), (TAG_BACKING, 0), "what nobody wrote is filled");
    }
}

#[test]
fn a_first_write_of_whole_clusters_reads_nothing_and_writes_once() {
    let rig = Rig::new(&Setup::plain(12, 8), 1);
    let image = rig.handle(&rig.open());
    let from = rig.disk.log().len();
    let oracle = RefCell::new(Oracle::of(&rig.setup));
    block_on(perform(&rig, &image, &oracle, Op::Write(8, 24))).unwrap();
    let range = addcow::units::ByteRange::between(8 * 512, 32 * 512);
    assert_eq!(rig.disk.log()[from..], [(RAW, Operation::Write(range))]);
}

#[test]
fn a_partial_first_write_reaches_the_raw_image_as_one_write() {
    let rig = Rig::new(&Setup { backing_len: Some(3000), ..Setup::plain(12, 2) }, 1);
    let image = rig.handle(&rig.open());
    let from = rig.disk.log().len();
    let oracle = RefCell::new(Oracle::of(&rig.setup));
    block_on(perform(&rig, &image, &oracle, Op::Write(3, 8))).unwrap();
    let log = rig.disk.log();
    let writes: Vec<_> =
        log[from..].iter().filter(|(_, op)| matches!(op, Operation::Write(_))).collect();
    let range = addcow::units::ByteRange::between(0, 8192);
    assert_eq!(writes, [&(RAW, Operation::Write(range))]);
}

#[test]
fn zeroing_a_backed_cluster_allocates_it_and_an_unbacked_one_shows_no_garbage() {
    let rig = Rig::new(&Setup { backing_len: Some(4096 + 100), ..Setup::plain(12, 4) }, 1);
    let state = rig.open();
    let image = rig.handle(&state);
    block_on(image.write_zeroes(0, 4 * 4096, false)).unwrap();
    assert!(rig.tags(&image).iter().all(|tag| *tag == 0));
    assert!(state.allocation().is_allocated(0..2), "else the backing file would show");
    block_on(image.flush()).unwrap();
    assert!(rig.tags(&rig.handle(&rig.open())).iter().all(|tag| *tag == 0));
}

#[test]
fn a_discard_punches_whole_allocated_clusters_and_nothing_else() {
    let rig = Rig::new(&Setup { allocated: vec![1, 2], ..Setup::plain(12, 4) }, 1);
    let state = rig.open();
    let image = rig.handle(&state);
    let before = rig.tags(&image);
    block_on(image.discard(512, 8192)).unwrap();
    let after = rig.tags(&image);
    assert!(
        after[8..16].iter().all(|tag| *tag == 0),
        "covered and allocated: {:x?}",
        &after[8..16]
    );
    assert_eq!((&after[..8], &after[16..]), (&before[..8], &before[16..]));
    assert!(state.allocation().is_allocated(1..3), "a discard never clears a bit");
    block_on(image.flush()).unwrap();
    assert_eq!(rig.tags(&rig.handle(&rig.open())), after, "the backing data does not come back");
}

#[test]
fn a_discard_to_the_end_of_the_disk_covers_a_partial_last_cluster() {
    let setup = Setup { sectors: 11, allocated: vec![1], ..Setup::plain(12, 2) };
    let rig = Rig::new(&setup, 1);
    let image = rig.handle(&rig.open());
    block_on(image.discard(8 * SECTOR, 2 * SECTOR)).unwrap();
    assert_ne!(rig.tags(&image)[8], 0, "one sector of the cluster is left out");
    block_on(image.discard(8 * SECTOR, 3 * SECTOR)).unwrap();
    assert_eq!(rig.tags(&image)[8..], [0; 3]);
}

#[test]
fn with_all_allocated_the_raw_image_is_the_disk() {
    let rig = Rig::new(&Setup { all_allocated: true, ..Setup::plain(12, 4) }, 1);
    let image = rig.handle(&rig.open());
    let oracle = RefCell::new(Oracle::of(&rig.setup));
    for op in [Op::Write(3, 9), Op::Zero(20, 3, true), Op::Flush] {
        block_on(perform(&rig, &image, &oracle, op)).unwrap();
    }
    oracle.borrow().check_now(&rig.tags(&image), &"all allocated");
    let writes_side =
        |(file, op): &(usize, Operation)| *file == SIDE && !matches!(op, Operation::Read(_));
    assert!(!rig.disk.log().iter().any(writes_side), "the side file has nothing to learn");
}

#[test]
fn a_read_only_image_refuses_every_change() {
    let rig = Rig::new(&Setup { allocated: vec![0], ..Setup::plain(12, 2) }, 1);
    let image = rig.handle(&rig.try_open(false).unwrap());
    let before = rig.tags(&image);
    let refused = |result| assert!(matches!(result, Err(ImageError::ReadOnly)), "{result:?}");
    refused(block_on(image.write(0, IoBuffer::zeroed(512))));
    refused(block_on(image.write_zeroes(0, 512, false)));
    refused(block_on(image.discard(0, 4096)));
    block_on(image.flush()).unwrap();
    assert_eq!(rig.tags(&image), before);
    assert!(rig.disk.log().iter().all(|(_, op)| matches!(op, Operation::Read(_))));
}

#[test]
fn ranges_beyond_the_end_are_refused_before_anything_is_done() {
    let setup = Setup { sectors: 13, ..Setup::plain(12, 2) };
    let rig = Rig::new(&setup, 1);
    let image = rig.handle(&rig.open());
    let operations = rig.disk.operations();
    let end = 13 * SECTOR;
    for (offset, len) in [(end, 512), (0, end + 512), (end - 512, 1024), (u64::MAX - 511, 512)] {
        let out =
            |result| assert!(matches!(result, Err(ImageError::OutOfRange { .. })), "{result:?}");
        let buffer = || IoBuffer::zeroed(usize::try_from(len).unwrap());
        out(block_on(image.read(offset, buffer())));
        out(block_on(image.write(offset, buffer())));
        out(block_on(image.write_zeroes(offset, len, true)));
        out(block_on(image.discard(offset, len)));
    }
    for offset in [0, 512, 4096, end] {
        block_on(image.read(offset, IoBuffer::zeroed(0))).unwrap();
        block_on(image.write(offset, IoBuffer::zeroed(0))).unwrap();
        block_on(image.write_zeroes(offset, 0, true)).unwrap();
        block_on(image.discard(offset, 0)).unwrap();
    }
    assert_eq!(rig.disk.operations(), operations);
    assert_eq!(rig.open().allocation().count(), Some(0));
}

/// More clusters than the table of locks has, so that ranges wrap around its end and clusters that
/// have nothing to do with each other share a lock; requests that go in several pieces.
#[test]
fn ranges_larger_than_the_lock_table_work_and_nobody_waits_for_ever() {
    let clusters = 65536 + 3000;
    let setup = Setup { backing_len: None, ..Setup::plain(9, clusters) };
    let rig = Rig::new(&setup, 1);
    let state = rig.open();
    let oracle = Rc::new(RefCell::new(Oracle::of(&setup)));
    let queues = [
        vec![Op::Write(10, 40_000), Op::Zero(100, 50_000, true), Op::Flush],
        vec![Op::Write(65_000, 2_000), Op::Write(500, 300), Op::Write(66_036, 1_000)],
        vec![Op::Write(20, 1), Op::Write(65_536 + 20, 1), Op::Read(0, clusters)],
        vec![Op::Zero(32_000, 34_000, false), Op::Write(0, clusters)],
    ];
    let mut rng = Rng::with_seed(2);
    let outcome = run_queues(&rig, &state, &oracle, &mut rng, &queues, &no_error);
    assert_eq!(outcome, Outcome::Done);
    let image = rig.handle(&state);
    let tags = rig.tags(&image);
    oracle.borrow().check_now(&tags, &"large ranges");
    block_on(image.flush()).unwrap();
    assert_eq!(rig.tags(&rig.handle(&rig.open())), tags);
}

/// Offsets past 1 TiB are past 2^31 sectors, those past 2 TiB past 2^32.
#[test]
fn offsets_beyond_two_tebibytes_stay_exact() {
    let size = (5_u64 << 40) + 3 * SECTOR;
    let disk = SimDisk::new(1);
    let (raw, side, backing) = (disk.create(&[]), disk.create(&[]), disk.create(&[]));
    raw.set_len(size).unwrap();
    backing.set_len(size - 700).unwrap();
    let geometry = BitmapGeometry::new(ClusterSize::from_bits(16).unwrap(), size).unwrap();
    side.set_len(geometry.file_len()).unwrap();
    let map = AllocationMap::empty(&geometry).unwrap();
    let state = Arc::new(ImageState::add_cow(geometry, map, size - 700, true));
    let chain = Chain::raw(backing, size - 700);
    let image = Image::new(Arc::clone(&state), raw.clone(), Some(side.clone()), Some(chain));
    for (tag, offset) in (1..).zip([1 << 40, (1 << 41) - 512, (5 << 40) - 512, size - 512]) {
        block_on(image.write(offset, IoBuffer::from_bytes(&sector_bytes(tag)))).unwrap();
        let seen = IoBuffer::from_bytes(&[0x55; 512]);
        block_on(image.read(offset, seen.clone())).unwrap();
        assert_eq!(seen.to_vec(), sector_bytes(tag), "at {offset:#x}");
        let cluster = offset >> 16;
        assert!(state.allocation().is_allocated(cluster..cluster + 1));
        assert_eq!(raw.content_at(offset, 512), sector_bytes(tag), "same offset in the raw image");
    }
    assert_eq!(state.allocation().count(), Some(4));
    block_on(image.flush()).unwrap();
    for cluster in [1_u64 << 24, (1 << 25) - 1, (5 << 24) - 1, 5 << 24] {
        let byte = geometry.offset() + cluster / 8;
        assert_eq!(side.content_at(byte, 1)[0] >> (cluster % 8) & 1, 1, "bit {cluster}");
    }
}

/// Spinning, but not for ever: the other thread may wait for this processor, or may have failed.
struct Spin {
    /// When it began.
    begun: Instant,
    /// Turns so far.
    turns: u64,
}

impl Spin {
    /// Begins.
    fn new() -> Self {
        Self { begun: Instant::now(), turns: 0 }
    }

    /// One turn.
    fn turn(&mut self) {
        self.turns += 1;
        if self.turns.is_multiple_of(2_000) {
            assert!(self.begun.elapsed() < Duration::from_secs(20), "the other does not come");
            std::thread::yield_now();
        }
        std::hint::spin_loop();
    }
}

/// Two threads that take turns: both call it with the same numbers.
fn meet(turn: &AtomicU64, number: u64) {
    turn.fetch_add(1, Ordering::SeqCst);
    let mut spin = Spin::new();
    while turn.load(Ordering::SeqCst) < 2 * (number + 1) {
        spin.turn();
    }
}

/// How often threads race: enough to hit a window of a few instructions many times.
const RACES: u64 = 50_000;

/// `run` says how the first cluster of a range stands and where the next one *begins*: never the
/// first cluster itself, however fast somebody marks it. An extent without a byte is taken for
/// "zeros, nothing to do" by a partial write of zeroes, which is then lost.
#[test]
fn a_run_is_never_empty_while_its_cluster_is_being_marked() {
    let geometry = BitmapGeometry::new(ClusterSize::from_bits(12).unwrap(), RACES * 4096).unwrap();
    let map = AllocationMap::empty(&geometry).unwrap();
    let turn = AtomicU64::new(0);
    let empty = std::thread::scope(|scope| {
        scope.spawn(|| {
            for cluster in 0..RACES {
                meet(&turn, cluster);
                map.mark(cluster..cluster + 1);
            }
        });
        let mut empty = 0;
        for cluster in 0..RACES {
            meet(&turn, cluster);
            let mut spin = Spin::new();
            while let (false, end) = map.run(cluster..cluster + 1) {
                spin.turn();
                if end == cluster {
                    empty += 1;
                    break;
                }
            }
        }
        empty
    });
    assert_eq!(empty, 0, "runs of no cluster at all, in {RACES} races");
}

/// Who sees a cluster allocated writes to it without more ado, and its flush must then persist the
/// bit, also if the thread that set it has not come further than that. Else a power cut loses a
/// flushed write (P2).
#[test]
fn a_bit_that_can_be_seen_is_frozen_by_the_next_flush() {
    let geometry = BitmapGeometry::new(ClusterSize::from_bits(12).unwrap(), RACES * 4096).unwrap();
    let map = AllocationMap::empty(&geometry).unwrap();
    let turn = AtomicU64::new(0);
    let lost = std::thread::scope(|scope| {
        scope.spawn(|| {
            for cluster in 0..RACES {
                meet(&turn, cluster);
                map.mark(cluster..cluster + 1);
            }
        });
        let mut lost = 0;
        for cluster in 0..RACES {
            meet(&turn, cluster);
            let mut spin = Spin::new();
            while !map.is_allocated(cluster..cluster + 1) {
                spin.turn();
            }
            let frozen = map.freeze();
            let page = cluster / (4096 * 8);
            let has_page = frozen.pages().iter().any(|(number, _)| *number == page);
            lost += u64::from(!has_page);
            frozen.persisted();
        }
        lost
    });
    assert_eq!(lost, 0, "bits that a flush did not see, in {RACES} races");
}

/// Both races as a guest sees them: two queues on two threads work on the same cluster, one sector
/// each, one of them writing zeroes. Over blocking files, so that nothing but the core is between
/// them; one starts a little later than the other, each time by another delay.
#[test]
fn threads_on_one_cluster_lose_nothing() {
    const CLUSTERS: u64 = 30_000;
    const LEN: usize = 30_000 * 1024;
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let open = |name: &str, byte: u8| {
        let path = folder.path().join(name);
        std::fs::write(&path, vec![byte; LEN]).unwrap();
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        Arc::new(HostFile::from_file(file, &path, CacheMode::Buffered).unwrap())
    };
    let (raw, side, backing) = (open("raw", 0xdd), open("side", 0), open("backing", 0xbb));
    let geometry =
        BitmapGeometry::new(ClusterSize::from_bits(10).unwrap(), CLUSTERS * 1024).unwrap();
    let map = AllocationMap::empty(&geometry).unwrap();
    let state = Arc::new(ImageState::add_cow(geometry, map, CLUSTERS * 1024, true));
    let turn = AtomicU64::new(0);
    let queue = |zeroes: bool| {
        let image = Image::new(
            Arc::clone(&state),
            FileStorage::new(Arc::clone(&raw)),
            Some(FileStorage::new(Arc::clone(&side))),
            Some(Chain::raw(FileStorage::new(Arc::clone(&backing)), LEN as u64)),
        );
        let mut rng = Rng::with_seed(9);
        let data = IoBuffer::from_bytes(&[0x11; 512]);
        for cluster in 0..CLUSTERS {
            meet(&turn, cluster);
            if zeroes {
                (0..rng.u32(0..4000)).for_each(|_| std::hint::spin_loop());
                block_on(image.write_zeroes(cluster * 1024 + 512, 512, false)).unwrap();
            } else {
                block_on(image.write(cluster * 1024, data.clone())).unwrap();
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| queue(false));
        queue(true);
    });
    let whole = IoBuffer::zeroed(LEN);
    let file = |file: &Arc<HostFile>| FileStorage::new(Arc::clone(file));
    let chain = Chain::raw(file(&backing), LEN as u64);
    let image = Image::new(state, file(&raw), Some(file(&side)), Some(chain));
    block_on(image.read(0, whole.clone())).unwrap();
    let bytes = whole.to_vec();
    let lost = bytes.chunks(1024).filter(|c| c[512..].iter().any(|byte| *byte != 0)).count();
    assert_eq!(lost, 0, "write_zeroes that were answered OK and have done nothing");
    assert!(bytes.chunks(1024).all(|cluster| cluster[..512] == [0x11; 512]));
}
