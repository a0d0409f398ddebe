//! Power cuts in the middle of the verbs that change a disk's metadata: is the disk the old one or
//! the new one, and does the verb, run again, finish?
//!
//! What is tried and checked is in `rig/verbs.rs`.
//!
//! Replay: `ADDCOW_SEED=N cargo test --release --test crash_verbs NAME`. Not here: requests of
//! guests (`crash.rs`), and the verbs on real files (`tool.rs`). `snapshot` and `create` write new
//! files, which have no name before they are durable; `detach` writes nothing.

mod rig;
#[path = "common/score.rs"]
mod score;

use addcow::executor::block_on;
use addcow::storage::sim::Operation;
use rig::cuts::{Count, seeds};
use rig::verbs::{self, MIDDLE, NEW, Shape, Verb, World, small_shapes};
use score::score;

#[test]
fn every_verb_on_every_small_disk_survives_every_cut() {
    let mut count = Count::default();
    verbs::small_verbs(&mut count);
    assert!(count.states > 2_000, "{count:?}");
    score("crash_verbs", &count.figures());
}

#[test]
fn verbs_on_random_disks_survive_every_cut() {
    let mut count = Count::default();
    verbs::random_verbs(seeds(0x5e7, 1500), &mut count);
    score("crash_verbs_random", &count.figures());
}

#[test]
fn a_disk_that_shrank_grows_into_zeros() {
    for shape in small_shapes() {
        let world = World::new(&shape, 3);
        let old = world.bytes();
        for sectors in 1..shape.sectors {
            let world = world.fork();
            block_on(Verb::Resize(sectors).run(&world)).expect("no faults");
            block_on(Verb::Resize(64).run(&world)).expect("no faults");
            let kept = usize::try_from(sectors * 512).expect("small");
            let bytes = world.bytes();
            assert_eq!(bytes.len(), 64 * 512);
            assert!(bytes[..kept] == old[..kept], "{shape:?}: what was kept");
            assert!(bytes[kept..].iter().all(|&byte| byte == 0), "{shape:?}: old bytes");
        }
    }
}

#[test]
fn rebase_copies_only_what_differs() {
    let shape = Shape {
        sectors: 8,
        backing: Some(MIDDLE),
        in_middle: vec![2],
        new_len: 4096,
        ..Shape::plain()
    };
    let world = World::new(&shape, 5);
    let before = world.disk.log().len();
    block_on(Verb::Rebase(Some(NEW)).run(&world)).expect("no faults");
    let image = block_on(world.open(None));
    assert_eq!(image.state().allocation().count(), Some(1), "clusters in the disk");
    assert!(image.state().allocation().is_allocated(2..3));
    // Nor was anything read where both chains end in the same bytes of the same file: neither
    // before the cluster that differs, nor, but for the rest of one window, behind it.
    let log = world.disk.log();
    let reads = log[before..].iter().filter(|(file, _)| *file == NEW);
    for (_, operation) in reads {
        assert!(
            matches!(operation, Operation::Read(range) if range.start() >= 2048),
            "{operation:?}"
        );
    }
}
