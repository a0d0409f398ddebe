//! The real programs on a host that fails: every operation on a file of the disk goes wrong, once
//! and for good, under an unmodified `addcow` and `addcowd`.
//!
//! The files lie on a file system of the test's own (`powercut/recorder.rs`). The tool must say in
//! one line what went wrong, or have done what it was told; the daemon must answer every request,
//! truly, and go on (P9), with a failed sync being final (P4) and no file left open. The disk shows
//! what it may. Needs `/dev/fuse` and the right to mount; where they are missing the tests say so,
//! and pass.
//!
//! Not here: all ways of failing (`faults.rs`, `faults_jobs.rs`), power cuts (`powercut.rs`).

mod common;
#[path = "powercut/recorder.rs"]
mod recorder;
mod rig;

use std::cell::RefCell;
use std::process::Command;
use std::time::Duration;

use addcow::storage::sim::SimDisk;
use common::disk::{Daemon, TOOL, run_to_end};
use common::guest;
use common::request::{IOERR, OK, Request};
use common::score::score;
use recorder::{Failure, Recorder, mount};
use rig::{Op, Oracle, Rig, SECTOR, Setup, sector_bytes};

/// Names of the files, by number on the simulated disk.
const NAMES: [&str; 3] = ["disk.raw", "disk.add-cow", "base.img"];

/// How many operations are there, and how many were met by their fault.
#[derive(Debug, Default)]
struct Count {
    /// Operations that were to go wrong.
    points: u64,
    /// Those that did.
    covered: u64,
}

/// A disk of a few clusters, some of them allocated.
fn setup() -> Setup {
    Setup { allocated: vec![1, 4], backing_len: Some(20_000), ..Setup::plain(12, 6) }
}

/// The failures of operation `index` that are tried.
fn failures(index: u64) -> [Failure; 4] {
    let ways = [(libc::EIO, false), (libc::EIO, true), (libc::ENOSPC, false), (libc::ENOSPC, true)];
    ways.map(|(code, lasting)| Failure { index, code, lasting })
}

/// The disk whose files have these contents.
fn rig_of(setup: &Setup, contents: &[Vec<u8>]) -> Rig {
    let disk = SimDisk::new(1);
    for content in contents {
        let _file = disk.create(content);
    }
    Rig { setup: setup.clone(), disk }
}

/// Makes the files, and calls `run` with a failure at every operation in turn. It returns how many
/// operations there were, and how many failed. `None` where the host cannot mount a file system.
fn each_failure(
    count: &mut Count,
    run: impl Fn(&Recorder, Option<Failure>) -> (u64, u64),
) -> Option<()> {
    let rig = Rig::new(&setup(), 1);
    let contents: Vec<_> = (0..3).map(|number| rig.disk.file(number).content()).collect();
    let names = NAMES.iter().map(|name| (*name).to_owned());
    let recorder = mount(names.zip(contents.clone()).collect())?;
    let (operations, _) = run(&recorder, None);
    for failure in (0..operations).flat_map(failures) {
        recorder.reset(&contents);
        let (_, failed) = run(&recorder, Some(failure));
        count.points += 1;
        count.covered += u64::from(failed > 0);
    }
    Some(())
}

/// Verbs of the image tool. None changes what the first sectors of the disk show.
const VERBS: [&[&str]; 7] = [
    &["info", NAMES[1]],
    &["check", NAMES[1]],
    &["map", NAMES[1]],
    &["stream", NAMES[1]],
    &["commit", NAMES[1]],
    &["rebase", "-b", "", NAMES[1]],
    &["resize", NAMES[1], "+40K"],
];

#[test]
fn a_verb_says_what_went_wrong_or_has_done_its_work() {
    let mut count = Count::default();
    for verb in VERBS {
        let expected = Oracle::of(&setup());
        let run = |recorder: &Recorder, failure| {
            recorder.fail(failure);
            let mut command = Command::new(TOOL);
            command.current_dir(recorder.dir()).args(verb);
            let output = run_to_end(command);
            let counts = recorder.operations();
            let what = format!("{verb:?} with {failure:?}: {output:?}");
            let text = String::from_utf8_lossy(&output.stderr);
            if !output.status.success() {
                assert!(failure.is_some(), "{what}");
                // `check` has codes of its own for what it finds.
                let is_said = text.starts_with("addcow: ") && text.lines().count() == 1;
                assert!(is_said && output.status.code() == Some(1), "{what}");
            }
            let rig = rig_of(&setup(), &recorder.contents());
            expected.check_now(&rig.tags(&rig.handle(&rig.open())), &what);
            counts
        };
        if each_failure(&mut count, run).is_none() {
            return;
        }
    }
    score("faults_tool", &[("points", count.points), ("covered", count.covered)]);
    assert_eq!(count.covered, count.points);
    assert!(count.points >= 300, "{count:?}");
}

/// Does `op` as the only request; whether it succeeded.
fn request(guest: &mut guest::Guest, rig: &Rig, oracle: &RefCell<Oracle>, op: Op) -> bool {
    let (began, tags) = oracle.borrow_mut().begin(op);
    let count = |sectors: u64| u32::try_from(sectors).expect("small");
    let ok = match op {
        Op::Read(start, sectors) => {
            let len = usize::try_from(sectors * SECTOR).expect("small");
            let request = Request::read(start, len);
            let framing = common::request::Framing::usual(&request);
            let reply = guest.request(0, &request, &framing);
            if reply.status() == OK {
                let tags = rig.tags_of(start, reply.data());
                oracle.borrow().check_read(start, &tags, began, &op);
            }
            reply.status()
        }
        Op::Write(start, _) => {
            let data: Vec<u8> = tags.iter().flat_map(|tag| sector_bytes(*tag)).collect();
            guest.status(&Request::write(start, &data))
        }
        Op::Zero(start, sectors, unmap) => {
            guest.status(&Request::write_zeroes(&[(start, count(sectors), u32::from(unmap))]))
        }
        Op::Discard(start, sectors) => {
            guest.status(&Request::discard(&[(start, count(sectors), 0)]))
        }
        Op::Flush => guest.status(&Request::flush()),
    };
    assert!(ok == OK || ok == IOERR, "{op:?}: status {ok}");
    oracle.borrow_mut().end(op, began, ok == OK);
    ok == OK
}

/// What the guest does while the host fails.
const WORK: [Op; 8] = [
    Op::Write(1, 2),
    Op::Read(0, 48),
    Op::Flush,
    Op::Write(16, 9),
    Op::Zero(8, 4, true),
    Op::Discard(32, 8),
    Op::Flush,
    Op::Read(0, 48),
];

#[test]
fn the_daemon_answers_truly_and_goes_on() {
    let mut count = Count::default();
    let run = |recorder: &Recorder, failure: Option<Failure>| {
        let what = format!("{failure:?}");
        recorder.fail(None);
        let dir = tempfile::tempdir().expect("a temporary folder");
        let disk = recorder.path(NAMES[1]);
        let options = ["--blk-file", disk.to_str().expect("text"), "--socket-path", "sock"];
        let mut daemon = Daemon::spawn(dir.path(), &options, None);
        let mut guest = daemon.guest(guest::Setup::queues(1, 64));
        let rig = rig_of(&setup(), &recorder.contents());
        let oracle = RefCell::new(Oracle::of(&setup()));
        assert!(request(&mut guest, &rig, &oracle, Op::Read(0, 1)), "{what}");
        let files = daemon.open_files();
        recorder.fail(failure);
        for op in WORK {
            let ok = request(&mut guest, &rig, &oracle, op);
            assert!(ok || failure.is_some(), "{what}: {op:?}");
        }
        let (operations, failed) = recorder.operations();
        let sync_failed = recorder.failed_syncs() > 0;
        recorder.fail(None);
        for op in [Op::Flush, Op::Write(3, 1), Op::Flush] {
            let ok = request(&mut guest, &rig, &oracle, op);
            assert_eq!(ok, !sync_failed, "{what}: {op:?}: a failed sync is final, nothing else is");
        }
        assert!(request(&mut guest, &rig, &oracle, Op::Read(0, 48)), "{what}: reads go on");
        assert_eq!(daemon.open_files(), files, "{what}: open files");
        drop(guest);
        daemon.terminate(Duration::from_secs(2));
        let rig = rig_of(&setup(), &recorder.contents());
        let tags = rig.tags(&rig.handle(&rig.open()));
        oracle.borrow().check_after_cut(&tags, &what);
        (operations, failed)
    };
    if each_failure(&mut count, run).is_some() {
        score("faults_daemon", &[("points", count.points), ("covered", count.covered)]);
        assert_eq!(count.covered, count.points);
        assert!(count.points >= 60, "{count:?}");
    }
}
