//! The order of writes and syncs: I1, I4 and I6, read from the log of a simulated disk.
//!
//! Sharper and cheaper than cutting the power everywhere (`crash.rs`): a bitmap page that is
//! written too early is seen at once, whether or not a power cut would have kept it.
//!
//! Relies on the simulated disk to log operations in the order in which they took effect. Not here:
//! what a reopened disk shows.

mod rig;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use addcow::executor::{TaskPool, block_on};
use addcow::image::ImageError;
use addcow::storage::IoBuffer;
use addcow::storage::sim::{Fault, Operation, OperationKind, SimDisk};
use fastrand::Rng;
use rig::{
    Op, Oracle, Outcome, RAW, Rig, SECTOR, SIDE, Setup, TAG_GARBAGE, Task, base_seed, run_queues,
    run_tasks, scaled, sector_bytes,
};

/// Watches every bitmap write of a disk for I1: what a new bit claims is durable in the raw image.
///
/// Two rules at the moment when the page lands: a sync of the raw image that was called after the
/// cluster's data had landed has completed; and the durable bytes of the raw image are nobody's
/// garbage.
#[derive(Debug, Default)]
struct BitWatch {
    /// For each sector of the raw image when data first landed in it.
    landed: BTreeMap<u64, u64>,
    /// When the latest sync that has completed was called.
    covered: u64,
    /// When syncs that still run were called, oldest first.
    running: Vec<u64>,
    /// Events seen.
    clock: u64,
    /// Bits that were written.
    bits: usize,
}

impl BitWatch {
    /// Starts watching.
    fn on(rig: &Rig) -> Rc<RefCell<Self>> {
        let watch = Rc::new(RefCell::new(Self::default()));
        let seen = Rc::clone(&watch);
        let (setup, raw, side) = (rig.setup.clone(), rig.disk.file(RAW), rig.disk.file(SIDE));
        rig.disk.observe(Box::new(move |file, operation, bytes| {
            let watch = &mut *seen.borrow_mut();
            watch.clock += 1;
            match (file, operation) {
                (RAW, Operation::Write(range) | Operation::Zero(range)) => {
                    for sector in range.start() / SECTOR..range.end() / SECTOR {
                        watch.landed.entry(sector).or_insert(watch.clock);
                    }
                }
                (RAW, Operation::SyncStart) => watch.running.push(watch.clock),
                (RAW, Operation::SyncEnd) => watch.covered = watch.running.remove(0),
                (SIDE, Operation::Write(range)) => {
                    let before = side.content();
                    watch.check_page(&setup, &before, range.start(), bytes, |sector| {
                        raw.durable_sector(sector)
                    });
                }
                (_, operation) => assert_ne!(file, rig::BACKING, "{operation:?} of the backing"),
            }
        }));
        watch
    }

    /// Checks the bits that `bytes` at `offset` of the side file add to `before`.
    fn check_page(
        &mut self,
        setup: &Setup,
        before: &[u8],
        offset: u64,
        bytes: &[u8],
        durable: impl Fn(u64) -> [u8; 512],
    ) {
        let geometry = setup.geometry();
        assert!(offset >= geometry.offset(), "the header is never written again");
        for cluster in 0..geometry.clusters() {
            let (byte, mask) = geometry.position(cluster);
            let Some(index) = byte.checked_sub(offset).map(|i| usize::try_from(i).unwrap()) else {
                continue;
            };
            let Some(value) = bytes.get(index) else { continue };
            let old = before[usize::try_from(byte).unwrap()] & mask != 0;
            let new = value & mask != 0;
            assert!(new || !old, "bit {cluster} is cleared (I3)");
            if new && !old {
                self.bits += 1;
                self.check_bit(setup, cluster, &durable);
            }
        }
    }

    /// Checks a new bit.
    fn check_bit(&self, setup: &Setup, cluster: u64, durable: &impl Fn(u64) -> [u8; 512]) {
        let per_cluster = (1 << setup.cluster_bits) / SECTOR;
        let first = cluster * per_cluster;
        for sector in first..(first + per_cluster).min(setup.sectors) {
            let landed = self.landed.get(&sector);
            assert!(
                landed.is_some_and(|landed| *landed < self.covered),
                "bit {cluster} is written: sector {sector} landed at {landed:?}, the last complete \
                 sync was called at {} (I1)",
                self.covered
            );
            let tag = setup.tag(&durable(sector), sector).expect("whole sectors");
            assert_ne!(tag, TAG_GARBAGE | sector, "bit {cluster} claims garbage (I1)");
        }
    }
}

/// What the log says from entry `from` on, without reads.
fn log_from(disk: &SimDisk, from: usize) -> Vec<(usize, Operation)> {
    let log = disk.log().into_iter().skip(from);
    log.filter(|(_, operation)| !matches!(operation, Operation::Read(_))).collect()
}

/// Writes one sector with this tag.
async fn write(
    image: &addcow::image::Image<addcow::storage::sim::SimStorage>,
    sector: u64,
    tag: u64,
) -> Result<(), ImageError> {
    image.write(sector * SECTOR, IoBuffer::from_bytes(&sector_bytes(tag))).await
}

#[test]
fn a_first_write_is_flushed_in_the_order_of_i4() {
    let rig = Rig::new(&Setup::plain(12, 4), 1);
    let image = rig.handle(&rig.open());
    block_on(write(&image, 9, 1)).unwrap();
    let cluster = addcow::units::ByteRange::between(4096, 8192);
    assert_eq!(log_from(&rig.disk, 0), [(RAW, Operation::Write(cluster))], "one write, no sync");
    let from = rig.disk.log().len();
    block_on(image.flush()).unwrap();
    let page = rig.setup.geometry().page_range(0);
    let wanted = [
        (RAW, Operation::SyncStart),
        (RAW, Operation::SyncEnd),
        (SIDE, Operation::Write(page)),
        (SIDE, Operation::SyncStart),
        (SIDE, Operation::SyncEnd),
    ];
    assert_eq!(log_from(&rig.disk, from), wanted);
    assert!(rig.has_bit(1) && !rig.has_bit(0));
}

#[test]
fn a_flush_without_new_bits_is_one_sync_of_the_raw_image() {
    let rig = Rig::new(&Setup { allocated: vec![2], ..Setup::plain(12, 4) }, 2);
    let image = rig.handle(&rig.open());
    let sync = [(RAW, Operation::SyncStart), (RAW, Operation::SyncEnd)];
    block_on(image.flush()).unwrap();
    assert_eq!(log_from(&rig.disk, 0), sync, "nothing was written");
    block_on(write(&image, 17, 1)).unwrap();
    block_on(image.discard(2 * 4096, 4096)).unwrap();
    block_on(image.write_zeroes(2 * 4096, 512, true)).unwrap();
    let from = rig.disk.log().len();
    block_on(image.flush()).unwrap();
    assert_eq!(log_from(&rig.disk, from), sync, "the cluster was allocated before");
    block_on(write(&image, 0, 2)).unwrap();
    block_on(image.flush()).unwrap();
    let from = rig.disk.log().len();
    block_on(image.flush()).unwrap();
    assert_eq!(log_from(&rig.disk, from), sync, "its bit was written by the flush before");
}

#[test]
fn only_dirty_pages_are_written() {
    // 512-byte clusters: one bitmap page of 4 KiB is 32768 clusters, 16 MiB.
    let rig = Rig::new(&Setup { backing_len: None, ..Setup::plain(9, 3 * 32768) }, 3);
    let image = rig.handle(&rig.open());
    block_on(write(&image, 2 * 32768 + 5, 1)).unwrap();
    let from = rig.disk.log().len();
    block_on(image.flush()).unwrap();
    let page = rig.setup.geometry().page_range(2);
    assert!(log_from(&rig.disk, from).contains(&(SIDE, Operation::Write(page))));
    assert_eq!(log_from(&rig.disk, from).len(), 5, "and no other");
}

#[test]
fn flushes_that_come_together_share_a_pass() {
    for seed in 0..scaled(200) {
        let rig = Rig::new(&Setup::plain(12, 4), seed);
        let state = rig.open();
        let image = rig.handle(&state);
        block_on(write(&image, 1, 1)).unwrap();
        let from = rig.disk.log().len();
        // The pool polls each at once, so that all of them have come before the first is done.
        let mut pool: TaskPool<Task<'_>> = TaskPool::new(10, Box::new(|| {}));
        for _ in 0..10 {
            let image = rig.handle(&state);
            let _done = pool.start(Box::pin(async move { image.flush().await.unwrap() }));
        }
        while pool.running() > 0 {
            assert!(pool.poll_ready(|()| {}) > 0, "{} flushes wait for ever", pool.running());
        }
        let log = log_from(&rig.disk, from);
        let count = |what| log.iter().filter(|entry| **entry == what).count();
        // The first leads; those that came while its pass ran share the second.
        let syncs = count((RAW, Operation::SyncEnd));
        assert!((1..=2).contains(&syncs), "seed {seed}: {syncs} syncs for 10 flushes");
        assert_eq!(count((SIDE, Operation::SyncEnd)), 1, "seed {seed}");
    }
}

#[test]
fn bits_set_during_the_sync_belong_to_the_next_flush() {
    let mut late = 0;
    for seed in 0..scaled(500) {
        let rig = Rig::new(&Setup::plain(12, 4), seed);
        let state = rig.open();
        let watch = BitWatch::on(&rig);
        let image = rig.handle(&state);
        block_on(write(&image, 0, 1)).unwrap();
        let other = rig.handle(&state);
        let tasks: Vec<Task<'_>> = vec![
            Box::pin(async { image.flush().await.unwrap() }),
            Box::pin(async { write(&other, 8, 2).await.unwrap() }),
        ];
        assert_eq!(run_tasks(&rig.disk, &mut Rng::with_seed(seed), tasks), Outcome::Done);
        assert!(rig.has_bit(0), "seed {seed}: it was written before the flush");
        late += u32::from(!rig.has_bit(1));
        block_on(image.flush()).unwrap();
        assert!(rig.has_bit(1), "seed {seed}: the next flush has it");
        assert_eq!(watch.borrow().bits, 2);
    }
    assert!(late > 0, "no schedule had the write land during the flush");
}

#[test]
fn no_bit_is_written_before_its_data_is_durable() {
    let base = base_seed(0x0b17);
    let mut bits = 0;
    for seed in base..base + scaled(3000) {
        let mut rng = Rng::with_seed(seed);
        let setup = Setup::random(&mut rng);
        let rig = Rig::new(&setup, seed);
        let state = rig.open();
        let watch = BitWatch::on(&rig);
        let oracle = Rc::new(RefCell::new(Oracle::of(&setup)));
        let mut queue = || (0..12).map(|_| Op::random(&mut rng, setup.sectors)).collect();
        let queues: Vec<Vec<Op>> = (0..4).map(|_| queue()).collect();
        let no_error = |op, error| panic!("ADDCOW_SEED={seed}: {op:?}: {error}");
        println!("ADDCOW_SEED={seed}");
        run_queues(&rig, &state, &oracle, &mut rng, &queues, &no_error);
        bits += watch.borrow().bits;
    }
    assert!(bits > 0);
}

#[test]
fn a_failed_sync_is_final() {
    for file in [RAW, SIDE] {
        let rig = Rig::new(&Setup::plain(12, 4), 4);
        let state = rig.open();
        let (image, other) = (rig.handle(&state), rig.handle(&state));
        block_on(write(&image, 0, 1)).unwrap();
        rig.disk.aim_fault(file, OperationKind::Sync, Fault::Error(libc::EIO));
        let error = block_on(image.flush()).unwrap_err();
        assert!(matches!(error, ImageError::Io { action: "sync", .. }), "{error:?}");
        rig.disk.clear_fault();
        let from = rig.disk.log().len();
        for image in [&image, &other] {
            let failed = |result| assert!(matches!(result, Err(ImageError::Failed)), "{result:?}");
            failed(block_on(image.flush()));
            failed(block_on(write(image, 8, 2)));
            failed(block_on(image.write_zeroes(0, 512, true)));
            failed(block_on(image.discard(0, 4096)));
        }
        assert_eq!(log_from(&rig.disk, from), [], "nothing is tried again");
        assert_eq!(rig.tags(&image)[0], 1, "reads go on");
        assert_eq!(rig.has_bit(0), file == SIDE, "no bit after a failed sync of the raw image");
    }
}

/// A flush that waits for a running pass leads the next one. If the sync of the running pass fails,
/// the kernel may call the pages clean that it could not write, so a second sync succeeds without
/// them; the waiting flush must not try it and answer OK (P4, I6).
#[test]
fn a_flush_that_waited_while_the_sync_failed_fails_too() {
    for file in [RAW, SIDE] {
        for seed in 0..50 {
            let rig = Rig::new(&Setup::plain(12, 4), seed);
            let state = rig.open();
            let image = rig.handle(&state);
            block_on(write(&image, 0, 1)).unwrap();
            rig.disk.aim_fault(file, OperationKind::Sync, Fault::Error(libc::EIO));
            let has_failed = RefCell::new(false);
            let flush = || -> Task<'_> {
                let image = rig.handle(&state);
                Box::pin(async {
                    let image = image;
                    assert!(image.flush().await.is_err(), "flush succeeded after a failed sync");
                    // The host's next sync would succeed.
                    rig.disk.clear_fault();
                    *has_failed.borrow_mut() = true;
                })
            };
            let tasks = vec![flush(), flush(), flush()];
            run_tasks(&rig.disk, &mut Rng::with_seed(seed), tasks);
            assert!(*has_failed.borrow());
            assert_eq!(rig.has_bit(0), file == SIDE, "seed {seed}");
        }
    }
}

#[test]
fn a_bitmap_page_that_could_not_be_written_is_written_by_the_next_flush() {
    let rig = Rig::new(&Setup::plain(12, 4), 5);
    let image = rig.handle(&rig.open());
    block_on(write(&image, 0, 1)).unwrap();
    rig.disk.aim_fault(SIDE, OperationKind::Write, Fault::Error(libc::ENOSPC));
    let error = block_on(image.flush()).unwrap_err();
    assert!(matches!(error, ImageError::Io { role: addcow::image::FileRole::Side, .. }));
    assert!(!rig.has_bit(0));
    rig.disk.clear_fault();
    block_on(image.flush()).unwrap();
    assert!(rig.has_bit(0));
}
