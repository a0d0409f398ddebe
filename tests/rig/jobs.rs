//! Power cuts in the middle of the jobs that move data, stream and commit: the disk opens without
//! repair and shows what it showed before (P1), and the job, run again, comes to its end.
//!
//! The power goes before every single operation of the simulated host, and of what no sync had
//! covered any subset gets through, sector by sector. Nobody writes to the disk meanwhile, so what
//! it shows is exact: every byte that was there when the job began.
//!
//! Not here: guests that use the disk meanwhile ([`super::live`]).

use std::cell::RefCell;
use std::ops::Range;

use addcow::executor::block_on;
use addcow::image::chain::Chain;
use addcow::jobs::commit::{Base, commit, grow};
use addcow::jobs::copy::Pace;
use addcow::jobs::parts::DiskParts;
use addcow::jobs::reset::reset;
use addcow::jobs::stream::stream;
use addcow::jobs::{JobError, Unwatched};
use fastrand::Rng;

use super::cuts::{Count, Depth, chooser, each_way};
use super::stack::{Overlay, Shape, Stack};
use super::{Outcome, Replay, run_tasks};

/// Steps of a sector or two, several under way; a flush every few of them.
fn pace(rng: &mut Rng) -> Pace {
    Pace { step_len: 512 << rng.u32(0..4), flush_len: 512 << rng.u32(1..6) }
}

/// Streams into the disk.
async fn stream_into(stack: &Stack, pace: Pace) -> Result<(), JobError> {
    let (side, raw) = (stack.side(0), stack.raw(0));
    let parts = DiskParts::load(&side, &raw).await.expect("an image opens without repair (P1)");
    stream(&stack.open(0).await, &parts, pace, &Unwatched).await
}

/// Commits the disk into what is below it, an add-cow disk if there is one, or else the raw file;
/// and empties it.
async fn commit_from(stack: &Stack, pace: Pace) -> Result<(), JobError> {
    let disk = Chain::new([stack.layer(0).await]);
    if stack.shape.overlays.len() > 1 {
        commit(&disk, &Base::AddCow(&stack.open(1).await), pace, &Unwatched).await?;
    } else {
        let base = stack.base().expect("made with one");
        grow(&base, disk.virtual_size()).await?;
        commit(&disk, &Base::Raw(&base), pace, &Unwatched).await?;
    }
    let (side, raw) = (stack.side(0), stack.raw(0));
    let parts = DiskParts::load(&side, &raw).await.expect("an image opens without repair (P1)");
    reset(&parts).await
}

/// Checks that a disk shows what it showed, and again after a second cut: reading changes nothing.
fn check(stack: &Stack, what: &str) {
    assert!(stack.bytes(0) == stack.content(), "{what}: the disk shows something else");
    stack.disk.power_cut();
    assert!(stack.bytes(0) == stack.content(), "{what}: reading has changed the disk");
}

/// Runs `job` with the power going before each of its operations in turn; after every cut and for
/// every subset the disk must be legal, and `job` must come to an end that `finished` accepts.
/// Returns how many cuts there were.
fn cut_everywhere(
    shape: &Shape,
    seed: u64,
    job: impl AsyncFn(&Stack, Pace) -> Result<(), JobError>,
    finished: impl Fn(&Stack, &str),
    count: &mut Count,
) {
    let _replay = Replay(seed);
    count.workloads += 1;
    let mut rng = Rng::with_seed(seed);
    let pace = pace(&mut rng);
    for cut in 0.. {
        let stack = Stack::new(shape, seed);
        let what = format!("ADDCOW_SEED={seed}: {shape:?}, {pace:?}, cut before operation {cut}");
        check(&stack, "before the job");
        stack.disk.stop_at(stack.disk.operations() + cut);
        let result = RefCell::new(None);
        let task = Box::pin(async {
            let ended = job(&stack, pace).await;
            *result.borrow_mut() = Some(ended);
        });
        let outcome = run_tasks(&stack.disk, &mut rng, vec![task]);
        count.cuts += 1;
        let mut again = rng.fork();
        each_way(&stack.disk.unsynced(), Depth::FEW, &mut rng, |way| {
            let after = stack.fork();
            after.disk.power_cut_choosing(chooser(way));
            after.disk.set_max_delay(0);
            check(&after, &what);
            (count.states, count.opened) = (count.states + 1, count.opened + 1);
            // Going on costs more than a look, and how much there is to do again differs little.
            if again.u32(0..8) == 0 {
                let again = block_on(job(&after, pace));
                again.unwrap_or_else(|error| panic!("{what}: again: {error}"));
                finished(&after, &what);
            }
        });
        if outcome == Outcome::Done {
            result.into_inner().expect("done").expect("nothing fails");
            // Of its own: on this one the power still goes at some later operation.
            finished(&stack.fork(), &what);
            return;
        }
    }
}

/// Checks that a disk was streamed: what it shows is in its raw image, and its header says so,
/// durably; the bits say the same.
fn check_streamed(stack: &Stack, what: &str) {
    stack.disk.power_cut();
    assert!(block_on(stack.header(0)).all_allocated, "{what}");
    assert!(stack.bytes(0) == stack.content(), "{what}: the disk shows something else");
    assert!(stack.raw(0).content() == stack.content(), "{what}: the raw image is not the disk");
    let side = stack.side(0).content();
    let clusters = stack.content().len().div_ceil(1 << stack.shape.overlays[0].cluster_bits);
    let offset = usize::try_from(block_on(stack.header(0)).header_size()).expect("small");
    if !stack.shape.overlays[0].all_allocated {
        let is_set = |c: usize| side[offset + c / 8] >> (c % 8) & 1 == 1;
        assert!((0..clusters).all(is_set), "{what}: the flag is there without the bits");
    }
}

/// Checks that a disk was committed: its base shows the same, and behind the disk's end what it
/// showed before.
fn check_committed(stack: &Stack, what: &str) {
    stack.disk.power_cut();
    assert!(stack.bytes(0) == stack.content(), "{what}: the disk shows something else");
    let base = match stack.shape.overlays.len() {
        1 => stack.base().expect("made with one").content(),
        _ => stack.bytes(1),
    };
    let map = block_on(stack.map(0)).1;
    assert_eq!(map.count(), Some(0), "{what}: the disk is not empty");
    let (start, rest) = base.split_at(stack.content().len());
    assert!(start == stack.content(), "{what}: the base is not the disk");
    let old_rest = stack.contents[1].get(start.len()..).unwrap_or_default();
    assert!(rest == old_rest, "{what}: the base has changed behind the disk");
}

/// A shape whose disk can be committed: there is a base, and one that cannot grow is long enough.
fn can_commit(shape: &Shape) -> bool {
    match shape.overlays.get(1) {
        Some(base) => base.sectors >= shape.overlays[0].sectors,
        None => shape.base_len.is_some(),
    }
}

/// Disks of few clusters: backed, partly backed, not backed, on other disks.
fn small_shapes() -> Vec<Shape> {
    let disk = |allocated: &[u64]| Overlay::plain(10, 3, allocated);
    let shape = |overlays: Vec<Overlay>, base_len| Shape { overlays, base_len };
    vec![
        shape(vec![disk(&[])], Some(3072)),
        shape(vec![disk(&[1])], Some(1300)),
        shape(vec![disk(&[0, 1, 2])], Some(5000)),
        shape(vec![disk(&[2])], None),
        shape(vec![Overlay { all_allocated: true, ..disk(&[0, 1, 2]) }], Some(3072)),
        shape(vec![disk(&[0]), Overlay::plain(9, 4, &[1, 2])], Some(2500)),
        shape(vec![Overlay { sectors: 5, ..disk(&[2]) }, Overlay::plain(11, 2, &[1])], None),
    ]
}

/// Streams into every small disk.
pub fn small_streams(seeds: Range<u64>, count: &mut Count) {
    for seed in seeds {
        for shape in small_shapes() {
            cut_everywhere(&shape, seed, stream_into, check_streamed, count);
        }
    }
}

/// Streams into random disks.
pub fn random_streams(seeds: Range<u64>, count: &mut Count) {
    for seed in seeds {
        let mut rng = Rng::with_seed(seed);
        let overlays = rng.usize(1..=3);
        let shape = Shape::random(&mut rng, overlays);
        cut_everywhere(&shape, seed, stream_into, check_streamed, count);
    }
}

/// Commits every small disk.
pub fn small_commits(seeds: Range<u64>, count: &mut Count) {
    for seed in seeds {
        for shape in small_shapes().into_iter().filter(can_commit) {
            cut_everywhere(&shape, seed, commit_from, check_committed, count);
        }
    }
}

/// Commits random disks.
pub fn random_commits(seeds: Range<u64>, count: &mut Count) {
    for seed in seeds {
        let mut rng = Rng::with_seed(seed);
        let overlays = rng.usize(1..=3);
        let mut shape = Shape::random(&mut rng, overlays);
        if overlays > 1 {
            let least = shape.overlays[0].sectors;
            shape.overlays[1].sectors = shape.overlays[1].sectors.max(least);
        }
        if can_commit(&shape) {
            cut_everywhere(&shape, seed, commit_from, check_committed, count);
        }
    }
}
