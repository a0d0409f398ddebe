//! Power cuts while guests ask for things: each state that one can leave behind opens without
//! repair (P1) and shows a legal value in every sector (P2).
//!
//! Small sequences are tried whole: all requests out of an alphabet over two clusters, every cut,
//! every subset of the unsynced sectors where there are few enough. Larger ones are seeded.
//!
//! What a disk shows depends on the bytes of its files alone, so of states with the same bytes only
//! one is opened and read; each is held against the oracle of its own history.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;

use addcow::image::ImageError;
use addcow::storage::sim::Fault;
use fastrand::Rng;

use super::cuts::{Count, Depth, chooser, each_way};
use super::{Op, Oracle, Outcome, RAW, Replay, Rig, SIDE, Setup, run_queues};

/// What disks show, by the bytes of their files. For one setup: the backing file does not change.
#[derive(Debug, Default)]
struct Shown(HashMap<u64, Rc<Vec<u64>>>);

impl Shown {
    /// What `rig` shows, with nothing going on and nothing unsynced.
    fn tags(&mut self, rig: &Rig, count: &mut Count) -> Rc<Vec<u64>> {
        count.states += 1;
        let bytes = fingerprint(rig);
        let found = self.0.entry(bytes).or_insert_with(|| {
            count.opened += 1;
            rig.disk.set_max_delay(0);
            let tags = rig.tags(&rig.handle(&rig.open()));
            let is_as_before = rig.disk.unsynced().is_empty() && fingerprint(rig) == bytes;
            assert!(is_as_before, "reading has changed the disk");
            Rc::new(tags)
        });
        Rc::clone(found)
    }
}

/// A number that stands for the bytes of the raw image and the side file: two disks of which one
/// can become the other have the same one by a chance of 2^-64.
fn fingerprint(rig: &Rig) -> u64 {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for file in [RAW, SIDE] {
        let content = rig.disk.file(file).content();
        for (index, word) in (1_u64..).zip(content.as_chunks::<8>().0) {
            let word = u64::from_le_bytes(*word);
            if word != 0 {
                let place = index.wrapping_mul(0xd6e8_feb8_6659_fd93) | 1;
                let mixed = state ^ word.wrapping_mul(place);
                state = mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
            }
        }
        state = state.rotate_left(17) ^ content.len() as u64;
    }
    state
}

/// Checks what a power cut now can leave, subset by subset, of what no sync has covered.
fn check_cut(
    rig: &Rig,
    oracle: &Oracle,
    depth: Depth,
    rng: &mut Rng,
    (shown, count): (&mut Shown, &mut Count),
    what: &dyn std::fmt::Debug,
) {
    count.cuts += 1;
    each_way(&rig.disk.unsynced(), depth, rng, |way| {
        let after = rig.fork();
        after.disk.power_cut_choosing(chooser(way));
        oracle.check_after_cut(&shown.tags(&after, count), what);
    });
}

/// A request that must not fail.
fn no_error(op: Op, error: ImageError) {
    panic!("{op:?} failed without a fault: {error}");
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

/// Disks of two clusters, or a little less: backed, half allocated, half backed, not backed.
fn small_setups() -> [Setup; 4] {
    let plain = Setup::plain(10, 2);
    [
        plain.clone(),
        Setup { allocated: vec![1], ..plain.clone() },
        Setup { backing_len: Some(700), sectors: 3, ..plain.clone() },
        Setup { backing_len: None, ..plain },
    ]
}

/// `ops` on a disk of `sectors` sectors, cut at its end; `None` if one lies behind it, and the
/// sequence is a shorter one.
fn clip(ops: &[Op], sectors: u64) -> Option<Vec<Op>> {
    let cut = |start: u64, len: u64| (start < sectors).then(|| len.min(sectors - start));
    let clip = |op: &Op| match *op {
        Op::Write(start, len) => Some(Op::Write(start, cut(start, len)?)),
        Op::Zero(start, len, unmap) => Some(Op::Zero(start, cut(start, len)?, unmap)),
        Op::Discard(start, len) => Some(Op::Discard(start, cut(start, len)?)),
        Op::Read(start, len) => Some(Op::Read(start, cut(start, len)?)),
        Op::Flush => Some(Op::Flush),
    };
    ops.iter().map(clip).collect()
}

/// All sequences of `len` requests out of the alphabet that fit a disk of `sectors` sectors.
fn sequences(len: u32, sectors: u64) -> impl Iterator<Item = Vec<Op>> {
    let numbers = 0..ALPHABET.len().pow(len);
    numbers.filter_map(move |mut number| {
        let mut next = || {
            let op = ALPHABET[number % ALPHABET.len()];
            number /= ALPHABET.len();
            op
        };
        clip(&(0..len).map(|_| next()).collect::<Vec<_>>(), sectors)
    })
}

/// A small disk that is made once, and what its copies show.
struct Bench {
    /// The disk.
    rig: Rig,
    /// What its copies show.
    shown: Shown,
    /// Chooses subsets, and who goes on.
    rng: Rng,
}

impl Bench {
    /// The disk of `setup`, on which operations take up to so many polls.
    fn new(setup: &Setup, seed: u64, max_delay: u32) -> Self {
        let rig = Rig::new(setup, seed);
        rig.disk.set_max_delay(max_delay);
        Self { rig, shown: Shown::default(), rng: Rng::with_seed(seed) }
    }

    /// Runs `queues` on a copy of the disk; the power goes before operation `cut` of the request
    /// that `before`, done first, are followed by. Returns whether it ever came to that.
    fn cut_at(
        &mut self,
        before: &[Op],
        queues: &[Vec<Op>],
        cut: u64,
        depth: Depth,
        count: &mut Count,
    ) -> bool {
        let rig = self.rig.fork();
        let state = rig.open();
        let oracle = Rc::new(RefCell::new(Oracle::of(&rig.setup)));
        let mut rng = self.rng.clone();
        run_queues(&rig, &state, &oracle, &mut rng, &[before.to_vec()], &no_error);
        rig.disk.stop_at(rig.disk.operations() + cut);
        let outcome = run_queues(&rig, &state, &oracle, &mut rng, queues, &no_error);
        let what = (&rig.setup, "cut before operation", cut, "of", queues, "after", before);
        let seen = (&mut self.shown, count);
        check_cut(&rig, &oracle.borrow(), depth, &mut rng, seen, &what);
        outcome == Outcome::Stopped
    }
}

/// All sequences of up to `longest` requests, cut at every operation: those of the last request,
/// and after it. Those of the earlier ones are in the shorter sequences. On those of the small
/// disks with these numbers.
pub fn short_sequences(disks: Range<usize>, longest: u32, depth: Depth, count: &mut Count) {
    for setup in &small_setups()[disks] {
        let mut bench = Bench::new(setup, 0, 0);
        for ops in (1..=longest).flat_map(|len| sequences(len, setup.sectors)) {
            let (before, last) = ops.split_at(ops.len() - 1);
            count.workloads += 1;
            // Before its first operation nothing differs from the end of `before`.
            let mut cut = 1;
            while bench.cut_at(before, &[last.to_vec()], cut, depth, count) {
                cut += 1;
            }
        }
    }
}

/// Two queues at the same time, cut at every operation: all sequences of up to `longest` requests
/// beside each of some others.
pub fn two_queues(longest: u32, depth: Depth, count: &mut Count) {
    let pairs = [[Op::Write(1, 1), Op::Flush], [Op::Flush, Op::Write(0, 1)]];
    let pairs = pairs.iter().map(<[Op; 2]>::as_slice);
    let rivals: Vec<&[Op]> = pairs.chain(ALPHABET.chunks(1)).collect();
    for setup in small_setups() {
        let rivals = rivals.iter().filter_map(|rival| clip(rival, setup.sectors));
        let rivals: Vec<Vec<Op>> = rivals.collect();
        let all = (1..=longest).flat_map(|len| sequences(len, setup.sectors));
        for (seed, ops) in (0..).zip(all) {
            let mut bench = Bench::new(&setup, seed, 3);
            for rival in &rivals {
                count.workloads += 1;
                let queues = [ops.clone(), rival.clone()];
                let mut cut = 0;
                while bench.cut_at(&[], &queues, cut, depth, count) {
                    cut += 1;
                }
            }
        }
    }
}

/// All sequences of `len` requests with each operation failing in turn, and the power going after
/// the last request. Nothing that was flushed may be lost, so after a sync that failed no flush
/// can be answered (P4).
pub fn failing_sequences(len: u32, depth: Depth, count: &mut Count) {
    for setup in small_setups() {
        let mut bench = Bench::new(&setup, 0, 0);
        for ops in sequences(len, setup.sectors) {
            count.workloads += 1;
            for fault in 0.. {
                let rig = bench.rig.fork();
                let state = rig.open();
                let oracle = Rc::new(RefCell::new(Oracle::of(&setup)));
                let fault_at = rig.disk.operations() + fault;
                rig.disk.set_fault(fault_at, Fault::Error(libc::EIO), false);
                let queues = [ops.clone()];
                run_queues(&rig, &state, &oracle, &mut bench.rng, &queues, &|_, _| {});
                if rig.disk.operations() <= fault_at {
                    break;
                }
                let what = (&setup, &ops, "operation", fault, "fails");
                let seen = (&mut bench.shown, &mut *count);
                check_cut(&rig, &oracle.borrow(), depth, &mut bench.rng, seen, &what);
            }
        }
    }
}

/// Three queues of random requests on a random disk; the power goes at a random operation; then
/// the reopened disk goes on in the same way. Four lives for each seed.
pub fn random_lives(seeds: Range<u64>, depth: Depth, count: &mut Count) {
    for seed in seeds {
        let _replay = Replay(seed);
        let mut rng = Rng::with_seed(seed);
        let setup = Setup::random(&mut rng);
        let mut rig = Rig::new(&setup, seed);
        let mut oracle = Oracle::of(&setup);
        for life in 0..4 {
            let mut shown = Shown::default();
            let mut queue = || (0..10).map(|_| Op::random(&mut rng, setup.sectors)).collect();
            let queues: Vec<Vec<Op>> = (0..3).map(|_| queue()).collect();
            let cut = rng.u64(0..80);
            let what = (&setup, "life", life, "cut before operation", cut);
            count.workloads += 1;
            let state = rig.open();
            let shared = Rc::new(RefCell::new(oracle));
            rig.disk.set_max_delay(3);
            rig.disk.stop_at(rig.disk.operations() + cut);
            run_queues(&rig, &state, &shared, &mut rng, &queues, &no_error);
            let before = shared.borrow();
            let seen = (&mut shown, &mut *count);
            check_cut(&rig, &before, depth, &mut rng, seen, &what);
            rig = rig.fork();
            rig.disk.power_cut();
            let tags = shown.tags(&rig, count);
            before.check_after_cut(&tags, &what);
            oracle = Oracle::new(tags.iter().copied(), before.next_tag());
        }
    }
}

/// Three queues of fewer random requests on a random disk, cut at every operation.
pub fn random_cut_everywhere(seeds: Range<u64>, depth: Depth, count: &mut Count) {
    for seed in seeds {
        let _replay = Replay(seed);
        let mut rng = Rng::with_seed(seed);
        let setup = Setup::random(&mut rng);
        let mut queue = || (0..5).map(|_| Op::random(&mut rng, setup.sectors)).collect();
        let queues: Vec<Vec<Op>> = (0..3).map(|_| queue()).collect();
        let mut bench = Bench::new(&setup, seed, 3);
        count.workloads += 1;
        let mut cut = 0;
        while bench.cut_at(&[], &queues, cut, depth, count) {
            cut += 1;
        }
    }
}
