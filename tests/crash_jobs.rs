//! Power cuts in the middle of jobs that move data: is the disk what it was, and does the job, run
//! again, finish?
//!
//! What is tried and checked is in `rig/jobs.rs`.
//!
//! Replay: `ADDCOW_SEED=N cargo test --release --test crash_jobs NAME`. Not here: what jobs do on
//! real files (`jobs.rs`), and guests beside them (`crash.rs`).

mod rig;
#[path = "common/score.rs"]
mod score;

use rig::cuts::{Count, seeds};
use rig::{jobs, scaled};
use score::score;

#[test]
fn a_stream_survives_every_cut() {
    let mut count = Count::default();
    jobs::small_streams(0..scaled(60), &mut count);
    count.expect_states(10_000, 1_000);
    score("crash_stream", &count.figures());
}

#[test]
fn a_stream_into_a_random_disk_survives_every_cut() {
    let mut count = Count::default();
    jobs::random_streams(seeds(0x57e4, 150), &mut count);
    score("crash_stream_random", &count.figures());
}

#[test]
fn a_commit_survives_every_cut() {
    let mut count = Count::default();
    jobs::small_commits(0..scaled(60), &mut count);
    count.expect_states(10_000, 1_000);
    score("crash_commit", &count.figures());
}

#[test]
fn a_commit_of_a_random_disk_survives_every_cut() {
    let mut count = Count::default();
    jobs::random_commits(seeds(0xc033, 150), &mut count);
    score("crash_commit_random", &count.figures());
}
