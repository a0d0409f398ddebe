//! Power cuts: the disk opens without repair, and every sector shows a legal value (P1, P2).
//!
//! The power goes before every single operation of the simulated host, and of what no sync had
//! covered any subset gets through, sector by sector. Small sequences are tried whole: all requests
//! out of an alphabet over two clusters, every cut, every subset where there are few enough. Larger
//! workloads of concurrent queues are seeded.
//!
//! Replay: `ADDCOW_SEED=N cargo test --release --test crash NAME`. Not here: faults of the host
//! (`faults.rs`), the order of operations as such (`ordering.rs`).

mod rig;

use std::cell::RefCell;
use std::rc::Rc;

use addcow::executor::block_on;
use addcow::image::ImageError;
use fastrand::Rng;
use rig::{Op, Oracle, Outcome, Rig, Setup, base_seed, run_queues, scaled};

/// The most subsets that are all tried.
const MAX_SUBSETS: usize = 256;

/// What a test counted.
#[derive(Debug, Default)]
struct Count {
    /// Power cuts, by operation index.
    cuts: u64,
    /// States of the disk that were opened and read.
    states: u64,
}

/// A request that must not fail.
fn no_error(op: Op, error: ImageError) {
    panic!("{op:?} failed without a fault: {error}");
}

/// Cuts the power of a copy of `rig`, keeping what `choose` says; opens the disk, checks it, and
/// checks that what it showed is durable itself: a second cut changes nothing.
fn check_cut(rig: &Rig, oracle: &Oracle, choose: impl FnMut(usize) -> usize, what: &str) {
    let rig = rig.fork();
    rig.disk.power_cut_choosing(choose);
    rig.disk.set_max_delay(0);
    let tags = rig.tags(&rig.handle(&rig.open()));
    oracle.check_after_cut(&tags, &what);
    rig.disk.power_cut();
    assert_eq!(rig.tags(&rig.handle(&rig.open())), tags, "{what}: reading has changed the disk");
}

/// Checks what every subset of the unsynced sectors would leave, or a choice of them if they are
/// too many: none, all, each alone, each missing, some at random.
fn check_subsets(rig: &Rig, oracle: &Oracle, rng: &mut Rng, count: &mut Count, what: &str) {
    let versions = rig.disk.unsynced();
    count.cuts += 1;
    let subsets =
        versions.iter().try_fold(1_usize, |product, n| product.checked_mul(n + 1)).unwrap_or(0);
    let mut check = |choice: &[usize]| {
        let mut next = choice.iter();
        check_cut(rig, oracle, |_| *next.next().expect("one for each"), what);
        count.states += 1;
    };
    if (1..=MAX_SUBSETS).contains(&subsets) {
        for mut number in 0..subsets {
            let choice: Vec<usize> = versions
                .iter()
                .map(|n| {
                    let digit = number % (n + 1);
                    number /= n + 1;
                    digit
                })
                .collect();
            check(&choice);
        }
        return;
    }
    let none = versions.clone();
    let all: Vec<usize> = versions.iter().map(|n| n - 1).collect();
    check(&none);
    check(&all);
    for index in 0..versions.len().min(24) {
        let (mut alone, mut missing) = (none.clone(), all.clone());
        (alone[index], missing[index]) = (all[index], none[index]);
        check(&alone);
        check(&missing);
    }
    for _ in 0..8 {
        check(&versions.iter().map(|n| rng.usize(0..=*n)).collect::<Vec<_>>());
    }
}

/// Runs `queues` on a new disk with the power going before operation `cut`. Returns whether it ever
/// came to that.
fn run_to_cut(setup: &Setup, seed: u64, queues: &[Vec<Op>], cut: u64, count: &mut Count) -> bool {
    let rig = Rig::new(setup, seed);
    rig.disk.set_max_delay(if queues.len() > 1 { 3 } else { 0 });
    let state = rig.open();
    let oracle = Rc::new(RefCell::new(Oracle::of(setup)));
    rig.disk.stop_at(rig.disk.operations() + cut);
    let mut rng = Rng::with_seed(seed);
    let outcome = run_queues(&rig, &state, &oracle, &mut rng, queues, &no_error);
    let what = format!("ADDCOW_SEED={seed}: {setup:?}, cut before operation {cut} of {queues:?}");
    check_subsets(&rig, &oracle.borrow(), &mut rng, count, &what);
    outcome == Outcome::Stopped
}

/// Cuts `queues` at every operation, and after the last.
fn cut_everywhere(setup: &Setup, seed: u64, queues: &[Vec<Op>], count: &mut Count) {
    let mut cut = 0;
    while run_to_cut(setup, seed, queues, cut, count) {
        cut += 1;
    }
}

/// Requests over two clusters of two sectors each.
const ALPHABET: [Op; 11] = [
    Op::Write(0, 2),
    Op::Write(0, 1),
    Op::Write(1, 1),
    Op::Write(1, 2),
    Op::Write(0, 4),
    Op::Write(3, 1),
    Op::Zero(0, 2, true),
    Op::Zero(1, 2, false),
    Op::Discard(0, 2),
    Op::Discard(0, 4),
    Op::Flush,
];

/// Disks of two clusters, or a little less: backed, half backed, not backed, half allocated.
fn small_setups() -> [Setup; 4] {
    let plain = Setup::plain(10, 2);
    [
        plain.clone(),
        Setup { backing_len: Some(700), sectors: 3, ..plain.clone() },
        Setup { backing_len: None, ..plain.clone() },
        Setup { allocated: vec![1], ..plain },
    ]
}

/// The requests of `ops` that fit a disk of `sectors` sectors, cut at its end.
fn clip(ops: &[Op], sectors: u64) -> Vec<Op> {
    let cut = |start: u64, len: u64| (start < sectors).then(|| len.min(sectors - start));
    let clip = |op: &Op| match *op {
        Op::Write(start, len) => Some(Op::Write(start, cut(start, len)?)),
        Op::Zero(start, len, unmap) => Some(Op::Zero(start, cut(start, len)?, unmap)),
        Op::Discard(start, len) => Some(Op::Discard(start, cut(start, len)?)),
        Op::Read(start, len) => Some(Op::Read(start, cut(start, len)?)),
        Op::Flush => Some(Op::Flush),
    };
    ops.iter().filter_map(clip).collect()
}

/// All sequences of `len` requests out of the alphabet.
fn sequences(len: u32) -> impl Iterator<Item = Vec<Op>> {
    (0..ALPHABET.len().pow(len)).map(move |mut number| {
        let mut next = || {
            let op = ALPHABET[number % ALPHABET.len()];
            number /= ALPHABET.len();
            op
        };
        (0..len).map(|_| next()).collect()
    })
}

#[test]
fn every_short_sequence_survives_every_cut() {
    let mut count = Count::default();
    let longest = if cfg!(debug_assertions) { 2 } else { 3 };
    for setup in small_setups() {
        for ops in (1..=longest).flat_map(sequences) {
            cut_everywhere(&setup, 0, &[clip(&ops, setup.sectors)], &mut count);
        }
    }
    println!("{count:?}");
    assert!(count.states > if cfg!(debug_assertions) { 5_000 } else { 250_000 }, "{count:?}");
}

/// Two queues with two requests each, all pairs of the alphabet against a fixed rival.
#[test]
fn two_queues_on_two_clusters_survive_every_cut() {
    let mut count = Count::default();
    let rivals = [[Op::Write(1, 1), Op::Flush], [Op::Flush, Op::Write(0, 1)]];
    for setup in small_setups() {
        for (seed, ops) in (0..).zip(sequences(2)) {
            for rival in &rivals {
                let queues = [clip(&ops, setup.sectors), clip(rival, setup.sectors)];
                if seed % 3 == 0 || !cfg!(debug_assertions) {
                    cut_everywhere(&setup, seed, &queues, &mut count);
                }
            }
        }
    }
    println!("{count:?}");
    assert!(count.states > 10_000, "{count:?}");
}

/// Three queues of random requests on a random disk; the power goes at a random operation; then
/// the reopened disk goes on in the same way. Four lives each.
#[test]
fn random_workloads_survive_cut_after_cut() {
    let base = base_seed(0xc0a5);
    let mut count = Count::default();
    for seed in base..base + scaled(4000) {
        let mut rng = Rng::with_seed(seed);
        let setup = Setup::random(&mut rng);
        let mut rig = Rig::new(&setup, seed);
        let mut oracle = Oracle::of(&setup);
        for life in 0..4 {
            let mut queue = || (0..10).map(|_| Op::random(&mut rng, setup.sectors)).collect();
            let queues: Vec<Vec<Op>> = (0..3).map(|_| queue()).collect();
            let cut = rng.u64(0..80);
            let what = format!("ADDCOW_SEED={seed}: life {life}: cut before operation {cut}");
            let state = rig.open();
            let shared = Rc::new(RefCell::new(oracle));
            rig.disk.stop_at(rig.disk.operations() + cut);
            run_queues(&rig, &state, &shared, &mut rng, &queues, &no_error);
            let before = shared.borrow();
            check_subsets(&rig, &before, &mut rng, &mut count, &what);
            rig = rig.fork();
            rig.disk.power_cut();
            let tags = rig.tags(&rig.handle(&rig.open()));
            before.check_after_cut(&tags, &what);
            oracle = Oracle::new(tags, before.next_tag());
        }
    }
    println!("{count:?}");
}

/// A small workload with a cut at every operation, in place of one at random.
#[test]
fn random_workloads_survive_a_cut_at_every_operation() {
    let base = base_seed(0xe7e4);
    let mut count = Count::default();
    for seed in base..base + scaled(150) {
        let mut rng = Rng::with_seed(seed);
        let setup = Setup::random(&mut rng);
        let mut queue = || (0..5).map(|_| Op::random(&mut rng, setup.sectors)).collect();
        let queues: Vec<Vec<Op>> = (0..3).map(|_| queue()).collect();
        cut_everywhere(&setup, seed, &queues, &mut count);
    }
    println!("{count:?}");
}

/// The promise P2 in its plainest form.
#[test]
fn what_was_flushed_is_there_and_what_was_not_may_be_gone() {
    let setup = Setup::plain(12, 2);
    let rig = Rig::new(&setup, 1);
    let oracle = RefCell::new(Oracle::of(&setup));
    let image = rig.handle(&rig.open());
    for op in [Op::Write(3, 1), Op::Flush, Op::Write(12, 1)] {
        block_on(rig::perform(&rig, &image, &oracle, op)).unwrap();
    }
    rig.disk.power_cut_choosing(|versions| versions);
    let tags = rig.tags(&rig.handle(&rig.open()));
    assert_eq!((tags[2], tags[3]), (setup.initial_tag(2), 1));
    assert_eq!(tags[12], setup.initial_tag(12), "never flushed, and nothing of it got through");
}
