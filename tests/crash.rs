//! Power cuts: the disk opens without repair, and every sector shows a legal value (P1, P2).
//!
//! The power goes before every single operation of the simulated host, and of what no sync had
//! covered any subset gets through, sector by sector. What is tried is in `rig/requests.rs` and
//! `rig/live.rs`, how it is judged in `rig/mod.rs`.
//!
//! Replay: `ADDCOW_SEED=N cargo test --release --test crash NAME`; `ADDCOW_SOAK=FACTOR` for so many
//! times as many seeds. Not here: faults of the host (`faults.rs`), the order of operations as such
//! (`ordering.rs`), jobs on a disk that nobody uses (`crash_jobs.rs`, `crash_verbs.rs`).

mod rig;
#[path = "common/score.rs"]
mod score;

use std::cell::RefCell;

use addcow::executor::block_on;
use rig::cuts::{Count, Depth, seeds};
use rig::{Op, Oracle, Rig, Setup, live, requests};
use score::score;

/// How long the sequences are that are tried whole.
const LONGEST: u32 = if cfg!(debug_assertions) { 2 } else { 4 };

#[test]
fn every_short_sequence_survives_every_cut() {
    let mut count = Count::default();
    requests::short_sequences(0..2, LONGEST, Depth::WHOLE, &mut count);
    count.expect_states(1_500_000, 3_000);
    score("crash_sequences", &count.figures());
}

/// Two tests, for two processors.
#[test]
fn every_short_sequence_on_half_a_backing_file_survives_every_cut() {
    let mut count = Count::default();
    requests::short_sequences(2..4, LONGEST, Depth::WHOLE, &mut count);
    count.expect_states(500_000, 1_000);
    score("crash_sequences_half_backed", &count.figures());
}

#[test]
fn two_queues_on_two_clusters_survive_every_cut() {
    let mut count = Count::default();
    requests::two_queues(LONGEST / 2, Depth::WHOLE, &mut count);
    count.expect_states(250_000, 5_000);
    score("crash_queues", &count.figures());
}

#[test]
fn what_was_flushed_survives_a_failure_before_the_cut() {
    let mut count = Count::default();
    requests::failing_sequences(LONGEST - 1, Depth::FEW, &mut count);
    count.expect_states(200_000, 100);
    score("crash_failures", &count.figures());
}

#[test]
fn random_workloads_survive_cut_after_cut() {
    let mut count = Count::default();
    requests::random_lives(seeds(0xc0a5, 400), Depth::WHOLE, &mut count);
    score("crash_lives", &count.figures());
}

#[test]
fn random_workloads_survive_a_cut_at_every_operation() {
    let mut count = Count::default();
    requests::random_cut_everywhere(seeds(0xe7e4, 150), Depth::FEW, &mut count);
    score("crash_random", &count.figures());
}

#[test]
fn guests_beside_a_stream_survive_cut_after_cut() {
    let mut count = Count::default();
    live::streamed_lives(seeds(0x57ea, 1500), Depth::FEW, &mut count);
    score("crash_beside_stream", &count.figures());
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
