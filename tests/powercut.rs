//! Power cuts of the real programs: what `addcowd` and `addcow` do to their files, in the order in
//! which they do it, and what is left of it when the power goes in between.
//!
//! The programs run unmodified on files of a recording file system (`powercut/recorder.rs`). The
//! record is then replayed on the simulated disk, which knows what is durable when: the power goes
//! before every change, and of what no sync had covered any subset gets through, sector by sector.
//! The disk must open without repair (P1), and what a guest's flush had covered when it was
//! answered must be there (P2). A part of the disks is given to the image tool, too.
//!
//! Replay: `ADDCOW_SEED=N cargo test --release --test powercut NAME`; what two queues do at the
//! same time comes in another order each time, so this may need a few runs. Needs `/dev/fuse` and
//! the right to mount; where they are missing the tests say so, and pass.
//!
//! Not here: every subset of every small sequence (`crash.rs`), deaths of the daemon alone.

mod common;
#[path = "powercut/recorder.rs"]
mod recorder;
mod rig;

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;

use addcow::executor::block_on;
use addcow::image::check;
use addcow::jobs::parts::DiskParts;
use addcow::storage::{IoBuffer, Storage, ZeroMode};
use addcow::units::ByteRange;
use common::disk::{Daemon, TOOL, run_to_end};
use common::guest::{self, Guest};
use common::request::{Framing, OK, Request, UNMAP};
use common::score::score;
use fastrand::Rng;
use recorder::{Change, Event, Recorder, mount};
use rig::{Op, Oracle, Rig, SECTOR, Setup, base_seed, scaled, sector_bytes};

/// Names of the files, by number on the simulated disk.
const NAMES: [&str; 3] = ["disk.raw", "disk.add-cow", "base.img"];

/// The most requests in flight.
const DEPTH: usize = 6;

/// Ways of losing unsynced sectors that are tried at each cut: none stays, all stay, some.
const WAYS: u32 = 5;

/// How many of the disks after a cut are given to the image tool, one in so many.
const TOOL_EVERY: u64 = 150;

/// The files of `rig` on a recording file system; `None`, with a line about it, where the host
/// cannot do that.
fn record(rig: &Rig) -> Option<Recorder> {
    let count = if rig.setup.backing_len.is_some() { 3 } else { 2 };
    let files = NAMES.iter().take(count).enumerate();
    let files = files.map(|(n, name)| ((*name).to_owned(), rig.disk.file(n).content())).collect();
    mount(files)
}

/// What a guest does with a disk.
#[derive(Debug)]
struct Scenario {
    /// The disk.
    setup: Setup,
    /// How many queues are in use.
    queues: usize,
    /// Whether every write is durable when it completes.
    write_through: bool,
}

/// From some point in the record on a flush had been answered.
#[derive(Debug, Clone, Copy)]
struct Mark {
    /// How many changes there were when the answer was there.
    changes: usize,
    /// Since when what had ended by then is durable, on the oracle's clock.
    moment: u64,
}

/// What was recorded of a guest's work.
struct Record {
    /// Everything that was done to the files.
    events: Vec<Event>,
    /// The flushes that were answered.
    marks: Vec<Mark>,
    /// What every sector may show.
    oracle: Oracle,
}

/// A guest at work.
struct Driver<'a> {
    /// The guest.
    guest: Guest,
    /// Where the disk's files are.
    recorder: &'a Recorder,
    /// What the disk is made of.
    rig: &'a Rig,
    /// What every sector may show.
    oracle: Oracle,
    /// Requests in flight by queue and head: what, and when it began.
    flying: HashMap<(usize, u16), (Op, u64)>,
    /// The flushes that were answered.
    marks: Vec<Mark>,
    /// Whether every write is durable when it completes.
    write_through: bool,
}

impl Driver<'_> {
    /// Puts a request on a queue.
    fn submit(&mut self, queue: usize, op: Op) {
        let (began, tags) = self.oracle.begin(op);
        let len = |sectors: u64| usize::try_from(sectors * SECTOR).expect("small");
        let count = |sectors: u64| u32::try_from(sectors).expect("small");
        let request = match op {
            Op::Read(start, sectors) => Request::read(start, len(sectors)),
            Op::Write(start, _) => {
                let data: Vec<u8> = tags.iter().flat_map(|tag| sector_bytes(*tag)).collect();
                Request::write(start, &data)
            }
            Op::Zero(start, sectors, unmap) => {
                let flags = if unmap { UNMAP } else { 0 };
                Request::write_zeroes(&[(start, count(sectors), flags)])
            }
            Op::Discard(start, sectors) => Request::discard(&[(start, count(sectors), 0)]),
            Op::Flush => Request::flush(),
        };
        let head = self.guest.submit(queue, &request, &Framing::usual(&request));
        self.guest.kick(queue);
        self.flying.insert((queue, head), (op, began));
    }

    /// Waits for a request of a queue that has one in flight.
    fn finish(&mut self, queue: usize) {
        let (head, reply) = self.guest.finish(queue);
        let (op, began) = self.flying.remove(&(queue, head)).expect("in flight");
        assert_eq!(reply.status(), OK, "{op:?}");
        if let Op::Read(first, _) = op {
            let tags = self.rig.tags_of(first, reply.data());
            self.oracle.check_read(first, &tags, began, &op);
        }
        self.oracle.end(op, began, true);
        let changes = self.recorder.changes();
        if op == Op::Flush {
            self.marks.push(Mark { changes, moment: began });
        } else if self.write_through && !matches!(op, Op::Read(..)) {
            // The request itself is durable, and with it all that had ended.
            let (moment, _) = self.oracle.begin(Op::Flush);
            self.marks.push(Mark { changes, moment });
        }
    }

    /// Waits for any request.
    fn finish_one(&mut self, rng: &mut Rng) {
        let mut queues: Vec<usize> = self.flying.keys().map(|(queue, _)| *queue).collect();
        queues.sort_unstable();
        self.finish(queues[rng.usize(0..queues.len())]);
    }

    /// Does `count` random requests, and perhaps flushes at the end.
    fn run(&mut self, rng: &mut Rng, queues: usize, count: u64) {
        for _ in 0..count {
            while self.flying.len() >= DEPTH || (!self.flying.is_empty() && rng.u32(0..3) == 0) {
                self.finish_one(rng);
            }
            let op = Op::random(rng, self.rig.setup.sectors);
            self.submit(rng.usize(0..queues), op);
        }
        while !self.flying.is_empty() {
            self.finish_one(rng);
        }
    }
}

/// Lets a guest do `count` random requests through the daemon, and records what that does.
fn work(scenario: &Scenario, rig: &Rig, recorder: &Recorder, seed: u64, count: u64) -> Record {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let disk = recorder.path(NAMES[1]);
    let mut options = vec!["--blk-file", disk.to_str().expect("text"), "--socket-path", "sock"];
    if scenario.write_through {
        options.extend(["--cache", "writethrough"]);
    }
    let mut daemon = Daemon::spawn(dir.path(), &options, None);
    let guest = daemon.guest(guest::Setup::queues(scenario.queues, 64));
    let oracle = Oracle::of(&rig.setup);
    let (flying, marks) = (HashMap::new(), Vec::new());
    let write_through = scenario.write_through;
    let mut driver = Driver { guest, recorder, rig, oracle, flying, marks, write_through };
    driver.run(&mut Rng::with_seed(seed), scenario.queues, count);
    let Driver { guest, marks, oracle, .. } = driver;
    drop(guest);
    // What it does at its end is a part of the record.
    daemon.stop();
    let events = recorder.events();
    // Half a sector would look torn after a cut. The daemon writes whole ones; the kernel once cut
    // long writes where a page of the guest's memory ended (Cargo.toml, fuser).
    let is_whole = |(file, change): &Event| match change {
        Change::Write(offset, bytes) if *file == rig::RAW => {
            offset.is_multiple_of(SECTOR) && (bytes.len() as u64).is_multiple_of(SECTOR)
        }
        _ => true,
    };
    let cut = events.iter().find(|event| !is_whole(event));
    assert!(cut.is_none(), "a write of parts of sectors: {cut:?}");
    Record { events, marks, oracle }
}

/// Makes a recorded change on the simulated disk.
fn apply(rig: &Rig, (file, change): &Event) {
    let file = rig.disk.file(*file);
    let done = match change {
        Change::Write(offset, bytes) => {
            block_on(file.write(*offset, IoBuffer::from_bytes(bytes))).map(drop)
        }
        Change::Zero(offset, len) => {
            let range = ByteRange::between(*offset, offset + len);
            block_on(file.zero(range, ZeroMode::PunchHole))
        }
        Change::SetLen(len) => file.set_len(*len),
        Change::Sync => block_on(file.sync()),
    };
    done.expect("no faults");
}

/// What the cuts of a record came to.
#[derive(Debug, Default)]
struct Count {
    /// Power cuts: points in the record.
    cuts: u64,
    /// Disks that were opened and read.
    states: u64,
    /// Those that the image tool has looked at, too.
    with_tool: u64,
    /// Cuts after which some flush had to be honoured.
    after_flush: u64,
}

impl Count {
    /// Replays `events` on `rig`; calls `check` with every disk that a cut may leave, and the
    /// number of changes before it.
    fn cut_everywhere(
        &mut self,
        rig: &Rig,
        events: &[Event],
        rng: &mut Rng,
        check: impl Fn(&Rig, usize),
    ) {
        rig.disk.set_max_delay(0);
        for number in 0..=events.len() {
            self.cuts += 1;
            for way in 0..WAYS {
                let after = rig.fork();
                after.disk.power_cut_choosing(|versions| match way {
                    0 => versions,
                    1 => versions - 1,
                    _ => rng.usize(0..=versions),
                });
                check(&after, number);
                self.states += 1;
                if self.states.is_multiple_of(TOOL_EVERY) {
                    self.with_tool += 1;
                    check_with_tool(&after);
                }
            }
            if let Some(event) = events.get(number) {
                apply(rig, event);
            }
        }
    }
}

/// Checks that nothing is wrong with the add-cow file.
fn check_metadata(rig: &Rig, what: &str) {
    let (side, raw) = (rig.disk.file(rig::SIDE), rig.disk.file(rig::RAW));
    let parts = block_on(DiskParts::load(&side, &raw)).unwrap_or_else(|e| panic!("{what}: {e}"));
    let bits = block_on(check::count(&side, &parts.geometry)).expect("no faults");
    assert_eq!(bits.stray, 0, "{what}: stray bits");
}

/// Checks that the image tool finds nothing wrong and reads what the core reads.
fn check_with_tool(rig: &Rig) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let count = if rig.setup.backing_len.is_some() { 3 } else { 2 };
    for (number, name) in NAMES.iter().enumerate().take(count) {
        std::fs::write(dir.path().join(name), rig.disk.file(number).content()).expect("a file");
    }
    tool(dir.path(), &["check", NAMES[1]]);
    tool(dir.path(), &["convert", "-O", "raw", NAMES[1], "flat.img"]);
    let flat = std::fs::read(dir.path().join("flat.img")).expect("the new image");
    let state = rig.open();
    let buffer = IoBuffer::zeroed(usize::try_from(state.virtual_size()).expect("small"));
    block_on(rig.handle(&state).read(0, buffer.clone())).expect("no faults");
    assert!(flat == buffer.to_vec(), "the tool shows another disk than the core");
}

/// Runs the image tool in `dir`; it must succeed.
fn tool(dir: &Path, arguments: &[&str]) {
    let mut command = Command::new(TOOL);
    command.current_dir(dir).args(arguments);
    let output = run_to_end(command);
    assert!(output.status.success(), "addcow {arguments:?}: {output:?}");
}

/// The disks that guests work on.
fn scenarios() -> Vec<Scenario> {
    let plain = Setup::plain(12, 32);
    let odd = Setup {
        sectors: 301,
        backing_len: Some(100 * SECTOR + 200),
        allocated: vec![1, 4],
        ..Setup::plain(14, 16)
    };
    let bare = Setup { backing_len: None, ..Setup::plain(13, 16) };
    let small = Setup { allocated: (0..60).map(|c| 3 * c).collect(), ..Setup::plain(9, 200) };
    let scenario = |setup, queues, write_through| Scenario { setup, queues, write_through };
    vec![
        scenario(plain.clone(), 1, false),
        scenario(plain.clone(), 2, false),
        scenario(odd.clone(), 2, false),
        scenario(bare, 2, false),
        scenario(small, 2, false),
        scenario(plain, 2, true),
        scenario(odd, 1, true),
    ]
}

#[test]
fn what_a_flush_has_covered_survives_a_power_cut_of_the_daemon() {
    let seed = base_seed(0x90e7);
    let mut count = Count::default();
    for (number, scenario) in (0..).zip(scenarios()) {
        let seed = seed + number;
        let what = format!("ADDCOW_SEED={seed}: {scenario:?}");
        let rig = Rig::new(&scenario.setup, seed);
        let Some(recorder) = record(&rig) else { return };
        let record = work(&scenario, &rig, &recorder, seed, scaled(250));
        assert!(!record.marks.is_empty(), "{what}: nothing was flushed");
        let flushed_at = |changes: usize| {
            let before = record.marks.iter().filter(|mark| mark.changes <= changes);
            before.map(|mark| mark.moment).max()
        };
        let mut rng = Rng::with_seed(seed);
        count.cut_everywhere(&rig, &record.events, &mut rng, |rig, changes| {
            let what = format!("{what}: cut after {changes} changes");
            let tags = rig.tags(&rig.handle(&rig.open()));
            let flushed = flushed_at(changes).unwrap_or(1);
            record.oracle.check_after_cut_since(&tags, flushed, &what);
            check_metadata(rig, &what);
        });
        count.after_flush +=
            (0..=record.events.len()).filter(|n| flushed_at(*n).is_some()).count() as u64;
        // Nothing is lost on the way from the daemon to the record.
        let contents: Vec<_> = recorder.contents();
        let replayed = (0..contents.len()).map(|n| rig.disk.file(n).content());
        assert!(contents.iter().cloned().eq(replayed), "{what}: the record is not what happened");
    }
    let figures = [
        ("cuts", count.cuts),
        ("after_flush", count.after_flush),
        ("states", count.states),
        ("with_tool", count.with_tool),
        ("lost", 0),
    ];
    score("powercut_daemon", &figures);
    assert!(count.cuts >= scaled(1000) && count.after_flush >= scaled(500), "{count:?}");
}

/// A verb of the image tool that leaves what a disk shows as it is.
const VERBS: [&[&str]; 5] = [
    &["stream", NAMES[1]],
    &["commit", NAMES[1]],
    &["commit", "--keep", NAMES[1]],
    &["rebase", "-b", "", NAMES[1]],
    &["resize", NAMES[1], "+40K"],
];

#[test]
fn a_disk_shows_the_same_whenever_the_power_goes_in_a_verb() {
    let mut count = Count::default();
    let shapes = scenarios().into_iter().map(|scenario| scenario.setup);
    for (number, setup) in (0..).zip(shapes.filter(|setup| setup.backing_len.is_some()).take(4)) {
        let setup = Setup { allocated: vec![0, 1, 4, 9], ..setup };
        for verb in VERBS {
            let what = format!("{verb:?} on {setup:?}");
            let rig = Rig::new(&setup, number);
            let Some(recorder) = record(&rig) else { return };
            tool(recorder.dir(), verb);
            let events = recorder.events();
            assert!(events.iter().any(|(_, change)| *change == Change::Sync), "{what}: no sync");
            let oracle = Oracle::of(&setup);
            let mut rng = Rng::with_seed(number);
            count.cut_everywhere(&rig, &events, &mut rng, |rig, changes| {
                let what = format!("{what}: cut after {changes} changes");
                let state = rig.open();
                let image = rig.handle(&state);
                oracle.check_now(&rig.tags(&image), &what);
                let old = setup.sectors * SECTOR;
                let new = state.virtual_size() - old;
                let rest = IoBuffer::from_bytes(&vec![7; usize::try_from(new).expect("small")]);
                block_on(image.read(old, rest.clone())).expect("no faults");
                assert!(rest.is_zero(), "{what}: what is new is not zeros");
            });
        }
    }
    let figures = [("cuts", count.cuts), ("states", count.states), ("with_tool", count.with_tool)];
    score("powercut_tool", &figures);
    assert!(count.cuts >= 100, "{count:?}");
}
