//! A host that fails at every operation: nothing panics, nothing hangs, and every answer is true.
//!
//! In every scenario every operation of the host goes wrong in every way, once and for good. A
//! request that succeeds must have had its effect; one that fails must say why; what a read shows,
//! then and after reopening, with and without a power cut, is legal (P9, P1). After a sync that
//! failed no flush succeeds until the disk is reopened, and reads go on (P4). Nothing is wrong with
//! the metadata, no file is left open.
//!
//! Not here: jobs (`faults_jobs.rs`), faults of the real host.

#[path = "common/score.rs"]
mod score;

mod rig;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use addcow::executor::block_on;
use addcow::image::{FileRole, ImageError, ImageState, check, load};
use addcow::storage::Storage;
use addcow::storage::sim::{Fault, OperationKind};
use fastrand::Rng;
use rig::points::{FAULTS, FOR_QUEUES, Point, Points, Ran, arm, check_open_files, open_files};
use rig::{BACKING, Op, Oracle, Outcome, RAW, Rig, SECTOR, SIDE, Setup, perform, run_queues};
use score::score;

/// A disk, and what its queues do.
type Scenario = (Setup, Vec<Vec<Op>>);

/// Scenarios of one queue.
fn scenarios() -> Vec<Scenario> {
    use Op::{Discard, Flush, Read, Write, Zero};
    let plain = Setup::plain(10, 4);
    let short = Setup { backing_len: Some(1700), sectors: 7, ..plain.clone() };
    let longer = Setup { backing_len: Some(9000), sectors: 7, ..plain.clone() };
    let bare = Setup { backing_len: None, ..plain.clone() };
    let half = Setup { allocated: vec![0, 2], ..plain.clone() };
    let wide = Setup { allocated: (0..20).map(|c| 2 * c).collect(), ..Setup::plain(9, 40) };
    let full = Setup { all_allocated: true, ..plain.clone() };
    let one = Setup::plain(9, 1);
    let scenario = |setup: &Setup, ops: &[Op]| (setup.clone(), vec![ops.to_vec()]);
    vec![
        scenario(&one, &[Write(0, 1), Flush]),
        scenario(&one, &[Read(0, 1), Zero(0, 1, false), Flush]),
        scenario(&one, &[Discard(0, 1), Write(0, 1), Discard(0, 1), Flush]),
        scenario(&plain, &[Write(0, 2), Flush, Read(0, 8)]),
        scenario(&plain, &[Write(0, 8), Flush, Read(0, 8)]),
        scenario(&plain, &[Write(1, 1), Flush, Write(0, 1), Flush, Read(0, 8)]),
        scenario(&plain, &[Write(1, 5), Read(0, 8), Flush]),
        scenario(&plain, &[Write(1, 1), Write(3, 1), Flush, Flush, Write(2, 1), Flush]),
        scenario(&plain, &[Zero(0, 8, false), Flush, Write(3, 2), Flush, Read(0, 8)]),
        scenario(&plain, &[Zero(3, 2, true), Flush, Read(0, 8)]),
        scenario(&plain, &[Discard(0, 8), Flush, Read(0, 8)]),
        scenario(&short, &[Write(3, 1), Read(0, 7), Flush, Write(6, 1), Flush]),
        scenario(&short, &[Read(2, 5), Zero(1, 4, true), Flush, Read(0, 7)]),
        scenario(&short, &[Zero(6, 1, false), Zero(4, 3, true), Flush, Read(0, 7)]),
        scenario(&longer, &[Write(6, 1), Flush, Zero(0, 7, true), Flush, Read(0, 7)]),
        scenario(&bare, &[Write(1, 1), Zero(0, 8, false), Flush, Read(0, 8)]),
        scenario(&bare, &[Write(3, 2), Flush, Discard(2, 4), Read(0, 8), Flush]),
        scenario(&half, &[Discard(0, 8), Read(0, 8), Flush, Write(0, 8), Flush]),
        scenario(&half, &[Zero(0, 8, true), Flush, Read(0, 8)]),
        scenario(&half, &[Read(0, 8), Write(0, 2), Write(1, 3), Flush, Read(0, 8)]),
        scenario(&wide, &[Read(0, 40), Write(0, 40), Flush, Read(0, 40)]),
        scenario(&wide, &[Zero(3, 34, true), Flush, Read(0, 40)]),
        scenario(&full, &[Write(1, 3), Zero(4, 2, true), Discard(6, 2), Flush, Read(0, 8)]),
    ]
}

/// Scenarios of several queues.
fn queues() -> Vec<Scenario> {
    use Op::{Flush, Read, Write, Zero};
    let plain = Setup::plain(10, 4);
    vec![
        (plain.clone(), vec![vec![Write(0, 1), Flush], vec![Write(1, 1), Flush, Read(0, 2)]]),
        (plain.clone(), vec![vec![Write(0, 8), Flush], vec![Flush, Write(1, 1), Flush]]),
        (plain, vec![vec![Zero(1, 4, true), Flush], vec![Write(2, 3), Flush], vec![Read(0, 8)]]),
    ]
}

/// Fails unless `error` is one that `fault` explains.
fn check_error(fault: Fault, op: Op, error: &ImageError, what: &str) {
    match error {
        // Only after a sync has failed, and never to a reader.
        ImageError::Failed => assert!(
            !matches!(op, Op::Read(..)) && matches!(fault, Fault::Error(_)),
            "{what}: {op:?}: {error}"
        ),
        ImageError::Io { source, .. } => match fault {
            Fault::Error(code) => {
                assert_eq!(source.raw_os_error(), Some(code), "{what}: {op:?}: {source}");
            }
            // Nothing is taken: a write says so, a read that it met the end of the file.
            Fault::Short(0) => assert!(
                matches!(
                    source.kind(),
                    std::io::ErrorKind::WriteZero | std::io::ErrorKind::UnexpectedEof
                ) || matches!(op, Op::Flush),
                "{what}: {op:?}: {source}"
            ),
            Fault::Short(_) | Fault::ShortByOne => {
                panic!("{what}: a short transfer is no error: {op:?}: {error}")
            }
        },
        other => panic!("{what}: {op:?}: {other}"),
    }
}

/// Runs a scenario with `point` going wrong, and checks everything about it.
fn run(scenario: &Scenario, seed: u64, point: Option<Point>) -> Ran {
    let (setup, queues) = scenario;
    let what = format!("{point:?}, ADDCOW_SEED={seed}, {scenario:?}");
    let rig = Rig::new(setup, seed);
    rig.disk.set_max_delay(if queues.len() > 1 { 2 } else { 0 });
    let state = rig.open();
    let oracle = Rc::new(RefCell::new(Oracle::of(setup)));
    let start = arm(&rig.disk, point);
    let errors = RefCell::new(0);
    let on_error = |op, error: ImageError| {
        *errors.borrow_mut() += 1;
        let fault = point.unwrap_or_else(|| panic!("{what}: {op:?}: {error}")).fault;
        check_error(fault, op, &error, &what);
    };
    let mut rng = Rng::with_seed(seed);
    let outcome = run_queues(&rig, &state, &oracle, &mut rng, queues, &on_error);
    assert_eq!(outcome, Outcome::Done, "{what}");
    let ran = Ran::since(&rig.disk, start);
    rig.disk.clear_fault();
    let sync_failed = point.is_some_and(|point| ran.sync_failed(point.fault));
    check_aftermath(&rig, &state, &oracle.borrow(), &what);
    if !sync_failed {
        check_reopened(&rig, &oracle.borrow(), &what);
    }
    check_fail_stop(&rig, &state, &oracle, sync_failed);
    ran
}

/// Checks what the disk shows with the fault gone: as it is, reopened, and after power cuts.
fn check_aftermath(rig: &Rig, state: &Arc<ImageState>, oracle: &Oracle, what: &str) {
    oracle.check_now(&rig.tags(&rig.handle(state)), &what);
    for choice in 0..4 {
        let rig = rig.fork();
        match choice {
            0 => rig.disk.power_cut_choosing(|versions| versions),
            1 => rig.disk.power_cut_choosing(|versions| versions - 1),
            _ => rig.disk.power_cut(),
        }
        check_metadata(&rig, what);
        let state = rig.open();
        let image = rig.handle(&state);
        let tags = rig.tags(&image);
        oracle.check_after_cut(&tags, &what);
        // It works again, and what is written now stays.
        let mut after = Oracle::new(tags, oracle.next_tag());
        let fresh = RefCell::new(after);
        let end = rig.setup.sectors;
        for op in [Op::Write(end / 2, 1), Op::Zero(end - 1, 1, true), Op::Flush] {
            block_on(perform(&rig, &image, &fresh, op)).expect("the host is well again");
        }
        rig.disk.power_cut();
        after = fresh.into_inner();
        after.check_after_cut(&rig.tags(&rig.handle(&rig.open())), &what);
    }
}

/// Checks that a disk that is opened again without a power cut keeps what is flushed from then on
/// (P2). Not after a failed sync: what the host's cache shows then may be on no medium, and no
/// program can tell (docs/crash-consistency.md, "A failed sync").
fn check_reopened(rig: &Rig, oracle: &Oracle, what: &str) {
    let rig = rig.fork();
    let image = rig.handle(&rig.open());
    let tags = rig.tags(&image);
    oracle.check_after_cut(&tags, &what);
    let fresh = RefCell::new(Oracle::new(tags, oracle.next_tag()));
    // One sector of each cluster.
    let step = (1 << rig.setup.cluster_bits) / SECTOR;
    for sector in (0..rig.setup.sectors).step_by(usize::try_from(step).expect("small")) {
        let op = Op::Write(sector, 1);
        block_on(perform(&rig, &image, &fresh, op)).expect("the host is well again");
    }
    block_on(perform(&rig, &image, &fresh, Op::Flush)).expect("the host is well again");
    rig.disk.power_cut_choosing(|versions| versions);
    let tags = rig.tags(&rig.handle(&rig.open()));
    let first = oracle.next_tag();
    for (tag, written) in tags.iter().step_by(usize::try_from(step).expect("small")).zip(first..) {
        assert_eq!(*tag, written, "{what}: flushed after reopening, and lost");
    }
}

/// Checks that nothing is wrong with the metadata: what `addcow check` looks at.
fn check_metadata(rig: &Rig, what: &str) {
    let side = rig.disk.file(SIDE);
    let geometry = rig.setup.geometry();
    let header = block_on(load::header(&side)).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(header.all_allocated, rig.setup.all_allocated, "{what}");
    assert_eq!(side.file_len().expect("no faults"), geometry.file_len(), "{what}");
    let bits = block_on(check::count(&side, &geometry)).expect("no faults");
    assert_eq!(bits.stray, 0, "{what}: stray bits");
}

/// Checks that a failed sync was final for the open image and nothing else was (P4).
fn check_fail_stop(
    rig: &Rig,
    state: &Arc<ImageState>,
    oracle: &RefCell<Oracle>,
    sync_failed: bool,
) {
    let image = rig.handle(state);
    for op in [Op::Flush, Op::Write(0, 1), Op::Flush, Op::Read(0, 1)] {
        let result = block_on(perform(rig, &image, oracle, op));
        if sync_failed && !matches!(op, Op::Read(..)) {
            assert!(matches!(result, Err(ImageError::Failed)), "{op:?}: {result:?}");
        } else {
            result.unwrap_or_else(|error| panic!("{op:?}: the host is well again: {error}"));
        }
    }
    rig.disk.power_cut();
    let tags = rig.tags(&rig.handle(&rig.open()));
    oracle.borrow().check_after_cut(&tags, &"when everything was flushed, or nothing can be");
}

#[test]
fn every_operation_of_a_queue_goes_wrong_in_every_way() {
    let files = open_files();
    let mut points = Points::default();
    for scenario in scenarios() {
        points.each(&FAULTS, |point| run(&scenario, 1, point));
    }
    check_open_files(files);
    score("faults_queue", &points.figures());
    assert_eq!(points.covered, points.points, "{points:?}");
    assert!(points.points >= 2_500, "{points:?}");
}

#[test]
fn every_operation_of_several_queues_goes_wrong_in_every_way() {
    let files = open_files();
    let mut points = Points::default();
    for scenario in queues() {
        // They meet in many ways.
        for seed in 1..9 {
            points.each(&FAULTS[..FOR_QUEUES], |point| run(&scenario, seed, point));
        }
    }
    check_open_files(files);
    score("faults_queues", &points.figures());
    assert_eq!(points.covered, points.points, "{points:?}");
    assert!(points.points >= 2_500, "{points:?}");
}

#[test]
fn every_operation_of_opening_goes_wrong_in_every_way() {
    let plain = Setup { allocated: vec![1], ..Setup::plain(12, 4) };
    let wide = Setup { allocated: vec![0, 599], ..Setup::plain(9, 600) };
    let full = Setup { all_allocated: true, ..plain.clone() };
    let mut points = Points::default();
    for setup in [plain, wide, full] {
        let rig = Rig::new(&setup, 1);
        rig.disk.set_max_delay(0);
        let expected = rig.open().allocation().count();
        let content = rig.disk.file(SIDE).content();
        let run = |point: Option<Point>| {
            let rig = rig.fork();
            rig.disk.count_looks();
            let start = arm(&rig.disk, point);
            check_opened(rig.try_open(true), expected, point);
            let ran = Ran::since(&rig.disk, start);
            rig.disk.clear_fault();
            assert!(rig.disk.file(SIDE).content() == content, "opening has changed the file");
            assert_eq!(rig.open().allocation().count(), expected, "{point:?}: opened again");
            ran
        };
        points.each(&FAULTS, run);
    }
    score("faults_open", &points.figures());
    assert_eq!(points.covered, points.points, "{points:?}");
    assert!(points.points >= 120, "{points:?}");
}

/// Checks that an image that was opened is whole, and that one that was not says why.
fn check_opened(
    opened: Result<Arc<ImageState>, load::LoadError>,
    expected: Option<u64>,
    point: Option<Point>,
) {
    let fault = point.map(|point| point.fault);
    match (opened, fault) {
        // No error is taken for bits.
        (Ok(state), _) => assert_eq!(state.allocation().count(), expected, "{point:?}"),
        (Err(load::LoadError::Io(source)), Some(Fault::Error(code))) => {
            assert_eq!(source.raw_os_error(), Some(code), "{point:?}: {source}");
        }
        // A file that ends too early.
        (Err(_), Some(Fault::Short(0))) => {}
        (Err(error), _) => panic!("{point:?}: {error}"),
    }
}

/// A fault, and when the disk is opened afterwards another one: whatever the pair, in the end the
/// disk opens and shows what it may.
#[test]
fn opening_may_fail_after_a_fault_at_every_pair_of_operations() {
    let mut points = Points::default();
    for scenario in scenarios().into_iter().take(5) {
        let (setup, queues) = &scenario;
        points.each(&[Fault::Error(libc::EIO), Fault::Short(0)], |point| {
            let rig = Rig::new(setup, 1);
            rig.disk.set_max_delay(0);
            let state = rig.open();
            let oracle = Rc::new(RefCell::new(Oracle::of(setup)));
            let start = arm(&rig.disk, point);
            let mut rng = Rng::with_seed(1);
            run_queues(&rig, &state, &oracle, &mut rng, queues, &|_, _| {});
            let ran = Ran::since(&rig.disk, start);
            rig.disk.clear_fault();
            rig.disk.power_cut();
            for index in 0.. {
                for fault in [Fault::Error(libc::EIO), Fault::Short(0)] {
                    let rig = rig.fork();
                    rig.disk.count_looks();
                    arm(&rig.disk, Some(Point { index, fault, lasting: false }));
                    let opened = rig.try_open(true);
                    let was_met = !rig.disk.faulted().is_empty();
                    rig.disk.clear_fault();
                    if let Ok(state) = opened {
                        let tags = rig.tags(&rig.handle(&state));
                        oracle.borrow().check_after_cut(&tags, &point);
                    }
                    let tags = rig.tags(&rig.handle(&rig.open()));
                    oracle.borrow().check_after_cut(&tags, &point);
                    PAIRS.with_borrow_mut(|pairs| *pairs += u64::from(was_met));
                }
                if index > 12 {
                    break;
                }
            }
            ran
        });
    }
    points.pairs = PAIRS.take();
    score("faults_reopen", &points.figures());
    assert_eq!(points.covered, points.points, "{points:?}");
    assert!(points.pairs >= 500, "{points:?}");
}

thread_local! {
    /// How many pairs of faults there were.
    static PAIRS: RefCell<u64> = const { RefCell::new(0) };
}

#[test]
fn an_error_says_which_file_it_is_about() {
    let setup = Setup { allocated: vec![0], ..Setup::plain(12, 4) };
    let cases = [
        (RAW, OperationKind::Read, Op::Read(0, 1), FileRole::Raw),
        (BACKING, OperationKind::Read, Op::Read(8, 1), FileRole::Backing),
        (BACKING, OperationKind::Read, Op::Write(9, 1), FileRole::Backing),
        (RAW, OperationKind::Write, Op::Write(9, 1), FileRole::Raw),
        (RAW, OperationKind::Write, Op::Write(0, 1), FileRole::Raw),
        (RAW, OperationKind::Zero, Op::Zero(8, 8, true), FileRole::Raw),
        (RAW, OperationKind::Zero, Op::Discard(0, 8), FileRole::Raw),
    ];
    for (file, kind, op, wanted) in cases {
        let rig = Rig::new(&setup, 1);
        let state = rig.open();
        let image = rig.handle(&state);
        let oracle = RefCell::new(Oracle::of(&setup));
        rig.disk.aim_fault(file, kind, Fault::Error(libc::EIO));
        match block_on(perform(&rig, &image, &oracle, op)) {
            Err(ImageError::Io { role, source, .. }) => {
                assert_eq!((role, source.raw_os_error()), (wanted, Some(libc::EIO)), "{op:?}");
            }
            other => panic!("{op:?}: {other:?}"),
        }
        assert_eq!(state.allocation().count(), Some(1), "{op:?}: nothing became visible");
        rig.disk.clear_fault();
        block_on(perform(&rig, &image, &oracle, op)).expect("once more");
    }
}
