//! Deliberate bugs (`src/seeded.rs`): do the suites of power cuts find each of them, and after how
//! many states?
//!
//! Each bug is hunted by a part of what those suites run every day, with the seeds that they have,
//! until something is illegal. A bug that gets through the whole part fails the test.
//!
//! `cargo test --release --features seeded-bugs --test seeded -- --nocapture`. Not here: that
//! without a bug nothing is found, which is what those suites are for.

mod rig;
#[path = "common/score.rs"]
mod score;

use std::panic::{self, AssertUnwindSafe};
use std::sync::Mutex;

use addcow::seeded::{Bug, choose};
use rig::cuts::{Count, Depth, seeds};
use rig::{jobs, live, requests, scaled, verbs};
use score::score;

/// A part of the suites.
type Part = fn(&mut Count);

/// The part that is to find `bug`.
fn part_for(bug: Bug) -> Part {
    match bug {
        Bug::HeadNotCopied
        | Bug::TailNotCopied
        | Bug::ZeroTrustsHoles
        | Bug::DiscardClearsBits
        | Bug::ShortBackingNotZeroed
        | Bug::UnbackedIsReadFromRaw
        | Bug::BitsBeforeRawSync
        | Bug::RawNotSynced
        | Bug::SideNotSynced
        | Bug::CleanFlushDoesNothing => |count| {
            requests::short_sequences(0..4, 3, Depth::WHOLE, count);
        },
        Bug::BitBeforeData
        | Bug::LocksIgnored
        | Bug::DirtySetSwappedLate
        | Bug::JoinsRunningPass
        | Bug::BitsOfLateWrites => |count| requests::two_queues(2, Depth::WHOLE, count),
        Bug::UnwrittenBitsForgotten | Bug::FailedSyncRetried => |count| {
            requests::failing_sequences(3, Depth::FEW, count);
        },
        Bug::PopulateMarksFirst | Bug::PopulateTrustsHoles | Bug::PopulateOverwrites => |count| {
            live::streamed_lives(seeds(0x57ea, 1500), Depth::FEW, count);
        },
        Bug::FlagBeforeBits => |count| jobs::small_streams(0..scaled(60), count),
        Bug::BaseNotSynced => |count| jobs::small_commits(0..scaled(60), count),
        Bug::ResetBitsNotSynced
        | Bug::GrowsBeforeBits
        | Bug::GrowBitsNotSynced
        | Bug::LastClusterNotSynced
        | Bug::ShrinkClearsFirst
        | Bug::RebaseHeaderFirst
        | Bug::NameNotSynced
        | Bug::OldNameRemovedEarly => verbs::small_verbs,
    }
}

/// How a hunt ended.
struct Hunt {
    /// For what.
    bug: Bug,
    /// What was counted until then.
    count: Count,
    /// What was found.
    found: Option<String>,
}

/// Hunts for `bug`.
fn hunt(bug: Bug) -> Hunt {
    let mut count = Count::default();
    choose(Some(bug));
    let ended = panic::catch_unwind(AssertUnwindSafe(|| part_for(bug)(&mut count)));
    choose(None);
    let found = ended.err().map(|cause| match cause.downcast::<String>() {
        Ok(text) => text.lines().next().unwrap_or_default().to_owned(),
        Err(cause) => cause.downcast::<&str>().map_or_else(|_| String::new(), |t| t.to_string()),
    });
    Hunt { bug, count, found }
}

#[test]
fn every_bug_is_found() {
    let (waiting, hunts) = (Mutex::new(Bug::ALL.to_vec()), Mutex::new(Vec::new()));
    // Each of them ends in a panic, which is no news.
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(bug) = { waiting.lock().unwrap().pop() } {
                    let hunt = hunt(bug);
                    hunts.lock().unwrap().push(hunt);
                }
            });
        }
    });
    panic::set_hook(hook);
    let hunts = hunts.into_inner().unwrap();
    for Hunt { bug, count, found } in &hunts {
        let text = found.as_deref().unwrap_or("NOT FOUND");
        println!("{bug:?}: after {} states: {:.90}", count.states, text);
    }
    let missed: Vec<Bug> = hunts.iter().filter(|h| h.found.is_none()).map(|h| h.bug).collect();
    assert!(missed.is_empty(), "not found: {missed:?}");
    let most = hunts.iter().map(|hunt| hunt.count.states).max().unwrap_or(0);
    let bugs = hunts.len() as u64;
    score("seeded", &[("bugs", bugs), ("found", bugs), ("most_states", most)]);
}
