//! Fault points: every operation of a scenario goes wrong in every way, once and for good.
//!
//! A point is an operation of a scenario, a way for it to go wrong, and whether all later ones do
//! so too. It is covered when the run met the fault at that operation, which is of the kind that it
//! was found to be before; so a scenario that does something else each time is found out.
//!
//! Not here: what a scenario is, and what must hold afterwards.

use std::time::{Duration, Instant};

use addcow::storage::sim::{Fault, OperationKind, SimDisk};

/// The ways in which an operation goes wrong.
pub const FAULTS: [Fault; 9] = [
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
    Fault::ShortByOne,
];

/// How many of [`FAULTS`], from the start, are also for several queues.
pub const FOR_QUEUES: usize = 7;

/// What is to go wrong.
#[derive(Debug, Clone, Copy)]
pub struct Point {
    /// The operation, counted from 0 at [`arm`].
    pub index: u64,
    /// How.
    pub fault: Fault,
    /// Whether every later operation goes wrong too.
    pub lasting: bool,
}

/// Lets `point` come true on a disk from now on; returns the operations so far.
pub fn arm(disk: &SimDisk, point: Option<Point>) -> u64 {
    let start = disk.operations();
    if let Some(Point { index, fault, lasting }) = point {
        disk.set_fault(start + index, fault, lasting);
    }
    start
}

/// What came of a run.
#[derive(Debug)]
pub struct Ran {
    /// How many operations there were.
    pub operations: u64,
    /// What the fault has met.
    pub faulted: Vec<(usize, OperationKind)>,
}

impl Ran {
    /// The run on `disk` that began when there were `start` operations.
    pub fn since(disk: &SimDisk, start: u64) -> Self {
        Self { operations: disk.operations() - start, faulted: disk.faulted() }
    }

    /// Whether a sync failed with `fault`.
    pub fn sync_failed(&self, fault: Fault) -> bool {
        matches!(fault, Fault::Error(_))
            && self.faulted.iter().any(|(_, kind)| *kind == OperationKind::Sync)
    }
}

/// Whether `fault` makes a difference to operations of this kind.
fn affects(fault: Fault, kind: OperationKind) -> bool {
    let is_transfer = matches!(kind, OperationKind::Read | OperationKind::Write);
    is_transfer || matches!(fault, Fault::Error(_))
}

/// How many points there were.
#[derive(Debug, Default)]
pub struct Points {
    /// Runs without a fault.
    pub scenarios: u64,
    /// Points.
    pub points: u64,
    /// Points at which the fault was met.
    pub covered: u64,
    /// Runs with a second fault after the first.
    pub pairs: u64,
}

impl Points {
    /// Makes every operation of `run` go wrong in all ways of `faults`.
    pub fn each(&mut self, faults: &[Fault], run: impl Fn(Option<Point>) -> Ran) {
        let Ran { operations, faulted } = run(None);
        assert!(operations > 0 && faulted.is_empty(), "{operations} operations, {faulted:?}");
        self.scenarios += 1;
        let probe = |index| Point { index, fault: FAULTS[0], lasting: false };
        let kinds: Vec<_> =
            (0..operations).map(|n| run(Some(probe(n))).faulted.first().copied()).collect();
        let ways = faults.iter().flat_map(|fault| [(*fault, false), (*fault, true)]);
        for (fault, lasting) in ways {
            for (index, found) in (0..).zip(&kinds) {
                // An operation that was not met is a point, which is not covered.
                if found.is_some_and(|(_, kind)| !affects(fault, kind)) {
                    continue;
                }
                self.points += 1;
                let ran = run(Some(Point { index, fault, lasting }));
                let is_met = found.is_some() && ran.faulted.first() == found.as_ref();
                self.covered += u64::from(is_met);
            }
        }
    }

    /// The figures, for the scorecard.
    pub fn figures(&self) -> [(&'static str, u64); 4] {
        [
            ("scenarios", self.scenarios),
            ("points", self.points),
            ("covered", self.covered),
            ("pairs", self.pairs),
        ]
    }
}

/// How many files this process has open.
pub fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("the open files").count()
}

/// Fails unless this process has again as many files open as `before`. Other tests of it may have
/// one open for a moment.
pub fn check_open_files(before: usize) {
    let start = Instant::now();
    while open_files() != before {
        let left = open_files();
        assert!(start.elapsed() < Duration::from_secs(5), "{before} open files before, now {left}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
