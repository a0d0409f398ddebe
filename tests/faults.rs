//! A host that fails at every operation: nothing panics, nothing hangs, and every answer is true.
//!
//! A dozen scenarios, and in each of them every operation of the host goes wrong in every way,
//! once and for good. A request that succeeds must have had its effect; one that fails must say
//! why; what a read shows, then and after reopening, with and without a power cut, is legal (P9,
//! P1).
//!
//! Not here: two different faults in one run, faults of the real host.

mod rig;

use std::cell::RefCell;
use std::rc::Rc;

use addcow::executor::block_on;
use addcow::image::{FileRole, ImageError, load};
use addcow::storage::sim::{Fault, OperationKind};
use fastrand::Rng;
use rig::{BACKING, Op, Oracle, Outcome, RAW, Rig, SIDE, Setup, perform, run_queues};

/// The ways in which an operation goes wrong.
const FAULTS: [Fault; 9] = [
    Fault::Error(libc::EIO),
    Fault::Error(libc::ENOSPC),
    Fault::Error(libc::EINTR),
    Fault::Error(libc::EAGAIN),
    Fault::Error(libc::EOPNOTSUPP),
    Fault::Short(512),
    Fault::Short(0),
    // From here on for one queue only: a write that stops inside a sector lets others see half of
    // it, whatever the core does.
    Fault::Short(1),
    Fault::Short(511),
];

/// The first of [`FAULTS`] that is for one queue only.
const SINGLE_QUEUE_FAULTS: usize = 7;

/// A disk, and what its queues do.
type Scenario = (Setup, Vec<Vec<Op>>);

/// The scenarios.
fn scenarios() -> Vec<Scenario> {
    use Op::{Discard, Flush, Read, Write, Zero};
    let plain = Setup::plain(10, 4);
    let short = Setup { backing_len: Some(1700), sectors: 7, ..plain.clone() };
    let bare = Setup { backing_len: None, ..plain.clone() };
    let half = Setup { allocated: vec![0, 2], ..plain.clone() };
    let wide = Setup { allocated: (0..20).map(|c| 2 * c).collect(), ..Setup::plain(9, 40) };
    vec![
        (plain.clone(), vec![vec![Write(0, 2), Flush, Read(0, 8)]]),
        (plain.clone(), vec![vec![Write(1, 1), Flush, Write(0, 1), Flush, Read(0, 8)]]),
        (plain.clone(), vec![vec![Write(1, 5), Read(0, 8), Flush]]),
        (short.clone(), vec![vec![Write(3, 1), Read(0, 7), Flush, Write(6, 1), Flush]]),
        (short, vec![vec![Read(2, 5), Zero(1, 4, true), Flush, Read(0, 7)]]),
        (bare, vec![vec![Write(1, 1), Zero(0, 8, false), Flush, Read(0, 8)]]),
        (half.clone(), vec![vec![Discard(0, 8), Read(0, 8), Flush, Write(0, 8), Flush]]),
        (half.clone(), vec![vec![Zero(0, 8, true), Flush, Read(0, 8)]]),
        (half, vec![vec![Read(0, 8), Write(0, 2), Write(1, 3), Flush, Read(0, 8)]]),
        (wide, vec![vec![Read(0, 40), Write(0, 40), Flush, Read(0, 40)]]),
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
            Fault::Short(_) => panic!("{what}: a short transfer is no error: {op:?}: {error}"),
        },
        other => panic!("{what}: {op:?}: {other}"),
    }
}

/// Runs a scenario with operation number `index` going wrong. Returns how many there were.
fn run(scenario: &Scenario, seed: u64, index: Option<u64>, fault: Fault, lasting: bool) -> u64 {
    let (setup, queues) = scenario;
    let what = format!("{fault:?} at operation {index:?}, lasting {lasting}, {scenario:?}");
    let rig = Rig::new(setup, seed);
    rig.disk.set_max_delay(if queues.len() > 1 { 2 } else { 0 });
    let state = rig.open();
    let start = rig.disk.operations();
    let oracle = Rc::new(RefCell::new(Oracle::of(setup)));
    if let Some(index) = index {
        rig.disk.set_fault(start + index, fault, lasting);
    }
    let errors = RefCell::new(0);
    let on_error = |op, error: ImageError| {
        *errors.borrow_mut() += 1;
        check_error(fault, op, &error, &what);
    };
    let mut rng = Rng::with_seed(seed);
    let outcome = run_queues(&rig, &state, &oracle, &mut rng, queues, &on_error);
    assert_eq!(outcome, Outcome::Done, "{what}");
    let operations = rig.disk.operations() - start;
    let passing = [Fault::Error(libc::EINTR), Fault::Error(libc::EAGAIN)].contains(&fault);
    if index.is_none() {
        assert_eq!(*errors.borrow(), 0, "{what}");
    } else if passing && !lasting && *errors.borrow() > 0 {
        // Only a sync must not be made again.
        let flush = block_on(rig.handle(&state).flush());
        assert!(matches!(flush, Err(ImageError::Failed)), "{what}: {flush:?}");
    }
    rig.disk.clear_fault();
    check_aftermath(&rig, &state, &oracle.borrow(), &what);
    operations
}

/// Checks what the disk shows with the fault gone: as it is, reopened, and after power cuts.
fn check_aftermath(
    rig: &Rig,
    state: &std::sync::Arc<addcow::image::ImageState>,
    oracle: &Oracle,
    what: &str,
) {
    let tags = rig.tags(&rig.handle(state));
    oracle.check_now(&tags, &what);
    for choice in 0..6 {
        let rig = rig.fork();
        match choice {
            0 => rig.disk.power_cut_choosing(|versions| versions),
            1 => rig.disk.power_cut_choosing(|versions| versions - 1),
            _ => rig.disk.power_cut(),
        }
        let state = rig.open();
        let image = rig.handle(&state);
        let tags = rig.tags(&image);
        oracle.check_after_cut(&tags, &what);
        // It works again, and what is written now stays.
        let mut after = Oracle::new(tags, oracle.next_tag());
        let fresh = RefCell::new(after);
        for op in [Op::Write(1, 3), Op::Zero(5, 1, true), Op::Flush] {
            block_on(perform(&rig, &image, &fresh, op)).expect("the host is well again");
        }
        rig.disk.power_cut();
        after = fresh.into_inner();
        after.check_after_cut(&rig.tags(&rig.handle(&rig.open())), &what);
    }
}

/// One test per scenario would hide that the numbers belong together: points covered is the metric.
fn every_point(faults: &[Fault]) {
    let mut points = 0;
    for scenario in scenarios() {
        // One queue does the same whatever the seed; several meet in many ways.
        let seeds = if scenario.1.len() > 1 { 1..9 } else { 1..2 };
        if scenario.1.len() > 1 && FAULTS[SINGLE_QUEUE_FAULTS..].contains(&faults[0]) {
            continue;
        }
        for seed in seeds {
            let operations = run(&scenario, seed, None, faults[0], false);
            assert!(operations > 2);
            let cases = faults.iter().flat_map(|fault| [(*fault, false), (*fault, true)]);
            for (fault, lasting) in cases {
                for index in 0..operations {
                    run(&scenario, seed, Some(index), fault, lasting);
                    points += 1;
                }
            }
        }
    }
    println!("{points} points");
    assert!(points >= 140 * faults.len(), "{points} points");
}

#[test]
fn errors_at_every_operation() {
    every_point(&FAULTS[..2]);
}

#[test]
fn interruptions_at_every_operation() {
    every_point(&FAULTS[2..4]);
}

#[test]
fn operations_that_are_not_supported() {
    every_point(&FAULTS[4..5]);
}

#[test]
fn short_transfers_at_every_operation() {
    every_point(&FAULTS[5..6]);
    every_point(&FAULTS[SINGLE_QUEUE_FAULTS..]);
}

/// A host that reads nothing where there is something has cut the file, or lies: no zeros instead
/// of data (P9).
#[test]
fn transfers_of_nothing_at_every_operation() {
    every_point(&FAULTS[6..7]);
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

#[test]
fn an_error_while_the_bitmap_is_read_is_not_taken_for_bits() {
    let setup = Setup { allocated: vec![1], ..Setup::plain(12, 4) };
    let rig = Rig::new(&setup, 1);
    let before = rig.disk.operations();
    rig.open();
    let reads = rig.disk.operations() - before;
    assert!(reads >= 3, "fixed header, header area, bitmap");
    for index in 0..reads {
        for fault in [Fault::Error(libc::EIO), Fault::Short(0)] {
            rig.disk.set_fault(rig.disk.operations() + index, fault, false);
            let error = rig.try_open(true).expect_err("no image without its metadata");
            if let Fault::Error(code) = fault {
                let code_seen = match &error {
                    load::LoadError::Io(source) => source.raw_os_error(),
                    other => panic!("{other}"),
                };
                assert_eq!(code_seen, Some(code));
            }
        }
        // A short read is no error: the rest is read.
        rig.disk.set_fault(rig.disk.operations() + index, Fault::Short(1), false);
        assert_eq!(rig.try_open(true).unwrap().allocation().count(), Some(1));
    }
    rig.disk.clear_fault();
    assert!(!rig.has_bit(0) && rig.has_bit(1));
    assert_eq!(rig.disk.file(SIDE).content().len(), 8192);
}
