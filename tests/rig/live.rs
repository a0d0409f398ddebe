//! Power cuts while a disk is streamed into and guests use it.
//!
//! The disk is one of [`super::stack`], whose sectors are random bytes; a sector's tag is what it
//! is full of, or else a number that stands for its bytes.
//!
//! Not here: jobs that have the disk for themselves ([`super::jobs`], [`super::verbs`]).

use std::cell::RefCell;

use addcow::executor::block_on;
use addcow::jobs::copy::Pace;
use addcow::jobs::parts::DiskParts;
use addcow::jobs::stream::stream;
use addcow::jobs::{JobError, Unwatched};
use fastrand::Rng;

use super::cuts::{Count, Depth, chooser, each_way};
use super::stack::{Shape, Stack};
use super::{Op, Oracle, Outcome, Replay, Task, perform_on, run_tasks};

/// The tags of the sectors that `bytes` begins with.
fn tags_of(bytes: &[u8]) -> Vec<u64> {
    let tag = |sector: &[u8]| {
        let words: Vec<u64> =
            sector.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
        if words.iter().all(|word| *word == words[0]) {
            return words[0];
        }
        let mixed = |state: u64, word: &u64| (state ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        // Higher than all tags that are ever written.
        words.iter().fold(1, mixed) | 1 << 63
    };
    bytes.chunks(512).map(tag).collect()
}

/// Two guests with random requests, and a stream into the disk, until the power goes or all of them
/// are done.
fn run(stack: &Stack, oracle: &RefCell<Oracle>, cut: u64, rng: &mut Rng) -> Outcome {
    let state = block_on(stack.open(0)).state().clone();
    let (side, raw) = (stack.side(0), stack.raw(0));
    let parts = block_on(DiskParts::load(&side, &raw)).expect("it has just been opened");
    let pace = Pace { step_len: 512 << rng.u32(0..4), flush_len: 512 << rng.u32(1..6) };
    let mut tasks: Vec<Task<'_>> = Vec::new();
    for _ in 0..2 {
        let image = block_on(stack.handle(0, &state));
        let ops: Vec<Op> =
            (0..6).map(|_| Op::random(rng, stack.shape.overlays[0].sectors)).collect();
        tasks.push(Box::pin(async move {
            for op in ops {
                let tags_of = |_: u64, bytes: &[u8]| tags_of(bytes);
                let result = perform_on(&image, oracle, op, &tags_of).await;
                result.unwrap_or_else(|error| panic!("{op:?} failed without a fault: {error}"));
            }
        }));
    }
    let image = block_on(stack.handle(0, &state));
    tasks.push(Box::pin(async move {
        let result: Result<(), JobError> = stream(&image, &parts, pace, &Unwatched).await;
        result.unwrap_or_else(|error| panic!("the stream failed without a fault: {error}"));
    }));
    stack.disk.set_max_delay(3);
    stack.disk.stop_at(stack.disk.operations() + cut);
    run_tasks(&stack.disk, rng, tasks)
}

/// A random disk, streamed into while two guests use it; the power goes at a random operation; then
/// the reopened disk goes on in the same way. Three lives for each seed.
pub fn streamed_lives(seeds: std::ops::Range<u64>, depth: Depth, count: &mut Count) {
    for seed in seeds {
        let _replay = Replay(seed);
        let mut rng = Rng::with_seed(seed);
        let overlays = rng.usize(1..=3);
        let shape = Shape::random_of(&mut rng, overlays, 9..=12, 4);
        let mut stack = Stack::new(&shape, seed);
        let mut oracle = Oracle::new(tags_of(stack.content()), 1);
        for life in 0..3 {
            let cut = rng.u64(0..120);
            let what = (&shape, "life", life, "cut before operation", cut);
            count.workloads += 1;
            count.cuts += 1;
            let shared = RefCell::new(oracle);
            run(&stack, &shared, cut, &mut rng);
            let before = shared.into_inner();
            let mut shown = |stack: &Stack| {
                (count.states, count.opened) = (count.states + 1, count.opened + 1);
                stack.disk.set_max_delay(0);
                let tags = tags_of(&stack.bytes(0));
                assert!(stack.disk.unsynced().is_empty(), "reading has changed the disk");
                before.check_after_cut(&tags, &what);
                tags
            };
            each_way(&stack.disk.unsynced(), depth, &mut rng, |way| {
                let after = stack.fork();
                after.disk.power_cut_choosing(chooser(way));
                shown(&after);
            });
            stack = stack.fork();
            stack.disk.power_cut();
            oracle = Oracle::new(shown(&stack), before.next_tag());
        }
    }
}
