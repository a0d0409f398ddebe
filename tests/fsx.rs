//! One thing after the other, at random and for long, against a flat model: requests through the
//! real daemon, connections, restarts, and the verbs of the image tool between them.
//!
//! Every answer is exact: status, used length, data, also of requests that must fail. The verbs
//! (resize, stream, commit, snapshot, rebase) must leave what the disk shows, but for the end that
//! resize cuts off or adds. `ADDCOW_SEED=N` runs one sequence of each kind of disk; what was done
//! last is printed when it fails.
//!
//! Not here: several requests at once (`workload.rs`, `linear.rs`), faults and crashes.

mod common;

use std::collections::VecDeque;
use std::fmt::Debug;
use std::process::Command;

use common::disk::{DAEMON, Daemon, Disk, Shape, TOOL, run_to_end};
use common::guest::{Guest, Setup};
use common::model::{Model, Workload};
use common::request::{Framing, IOERR, OK, Request, UNMAP, UNSUPP};
use common::score::score;
use common::{KIB, MIB, SECTOR, pattern, to_u64, to_usize};

/// Lives of the daemon in a sequence.
const LIVES: u64 = 5;
/// Connections in a life.
const CONNECTIONS: u64 = 3;
/// Requests on a connection.
const REQUESTS: u64 = if cfg!(debug_assertions) { 40 } else { 400 };
/// How many of the last steps are shown when a sequence fails.
const SHOWN: usize = 24;

/// What the disk stands on.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Backing {
    /// A raw file, which other disks may have too.
    Raw(String),
    /// An add-cow disk of its own.
    AddCow,
    /// Nothing.
    Nothing,
}

/// What was done last.
#[derive(Debug, Default)]
struct Trace(VecDeque<String>);

impl Trace {
    /// Notes a step.
    fn note(&mut self, step: impl Debug) {
        if self.0.len() == SHOWN {
            self.0.pop_front();
        }
        self.0.push_back(format!("{step:?}"));
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("the last steps were:\n{}", Vec::from(self.0.split_off(0)).join("\n"));
        }
    }
}

/// What a sequence has done so far.
#[derive(Debug, Default)]
struct Counts {
    /// Requests, with those that had to fail.
    requests: u64,
    /// Requests that had to fail.
    refused: u64,
    /// Verbs of the tool.
    verbs: u64,
}

/// A sequence.
struct Sequence {
    /// The folder of the files.
    disk: Disk,
    /// The add-cow file that is served now.
    name: String,
    /// What it stands on.
    backing: Backing,
    /// What it has to show.
    model: Model,
    /// Where the requests come from.
    workload: Workload,
    /// What was done last.
    trace: Trace,
    /// How much was done.
    counts: Counts,
}

impl Sequence {
    /// A sequence on a disk of `shape`.
    fn new(shape: Shape, seed: u64) -> Self {
        let disk = Disk::create(shape);
        let base = disk.shape.base.map(|_| "base.img".to_owned());
        let mut workload = Workload::new(seed);
        // Single requests are to be short and many.
        workload.longest = 160;
        Self {
            name: "disk.add-cow".to_owned(),
            backing: base.map_or(Backing::Nothing, Backing::Raw),
            model: Model::new(disk.initial()),
            workload,
            trace: Trace::default(),
            counts: Counts::default(),
            disk,
        }
    }

    /// All of it.
    fn run(&mut self) {
        for _ in 0..LIVES {
            self.serve();
            for _ in 0..self.workload.rng.pick(1..4) {
                self.verb();
            }
        }
        self.serve();
    }

    /// A life of the daemon.
    fn serve(&mut self) {
        let options: &[&str] = match self.workload.rng.pick(0..4) {
            0 => &["--cache", "buffered"],
            1 => &["--cache", "writethrough"],
            2 => &["--no-mapping", "--backing-cache", "direct"],
            _ => &[],
        };
        self.trace.note(("daemon", DAEMON, &self.name, options));
        let disk = ["--blk-file", &self.name, "--socket-path", "sock", "--num-queues", "2"];
        let dir = self.disk.path(".");
        let mut daemon = Daemon::spawn(&dir, &[&disk, options].concat(), None);
        for _ in 0..CONNECTIONS {
            let queues = 1 + self.workload.rng.index(2);
            self.trace.note(("connection", queues));
            let mut guest = daemon.guest(Setup::queues(queues, 128));
            Workload::verify(&mut guest, &mut self.model);
            for _ in 0..REQUESTS {
                if self.workload.rng.one_in(20) {
                    self.bad_request(&mut guest);
                } else {
                    self.request(&mut guest);
                }
            }
        }
        let mut guest = daemon.guest(Setup::default());
        Workload::verify(&mut guest, &mut self.model);
        drop(guest);
        daemon.stop();
    }

    /// One request that has to succeed.
    fn request(&mut self, guest: &mut Guest) {
        let sectors = self.model.sectors();
        let near = self.workload.rng.pick(0..sectors);
        let op = self.workload.op(sectors, near, &mut Vec::new());
        self.trace.note(&op);
        let request = op.request();
        let framing = Framing::random(&mut self.workload.rng, &request, 4);
        let queue = self.workload.rng.index(guest.rings.len());
        let reply = guest.request(queue, &request, &framing);
        assert_eq!(reply.status(), OK, "status of {op:?}");
        op.apply(&mut self.model, &reply);
        self.counts.requests += 1;
    }

    /// One request that has to fail, and to change nothing.
    fn bad_request(&mut self, guest: &mut Guest) {
        let sectors = self.model.sectors();
        let rng = &mut self.workload.rng;
        let (count, over) = (rng.pick(1..64), rng.pick(1..64));
        let data = pattern(rng.next(), 0, to_usize(count) * SECTOR);
        let segment = |flags| (sectors - over.min(sectors), u32::try_from(over + 1), flags);
        let segments = |flags| {
            let (sector, count, flags) = segment(flags);
            [(sector, count.expect("small"), flags)]
        };
        // Over the end by at least a sector, far behind it, or at the largest sector there is.
        let place = match rng.pick(0..3) {
            0 => sectors - (count - 1).min(sectors),
            1 => sectors + rng.pick(0..1 << 40),
            _ => u64::MAX - rng.pick(0..2),
        };
        let (request, status) = match rng.pick(0..8) {
            0..2 => (Request::write(place, &data), IOERR),
            2 => (Request::read(place, data.len()), IOERR),
            3 => (Request::write(0, &data[1..]), IOERR),
            4 => (Request::write_zeroes(&segments(0)), IOERR),
            5 => (Request::discard(&segments(0)), IOERR),
            6 => (Request::discard(&[(0, 1, UNMAP)]), UNSUPP),
            _ => (Request::new(0x7000, 0, &[], 1), UNSUPP),
        };
        self.trace.note(("bad", &request.readable[..16], request.readable.len(), place));
        let framing = Framing::usual(&request);
        let reply = guest.request(0, &request, &framing);
        assert_eq!(reply.status(), status, "status of a bad request");
        self.counts.requests += 1;
        self.counts.refused += 1;
    }

    /// Runs the tool with `args` and the disk's name, which has to succeed.
    fn tool(&mut self, args: &[&str]) {
        self.trace.note(args);
        let mut command = Command::new(TOOL);
        command.args(args).current_dir(self.disk.path("."));
        let output = run_to_end(command);
        assert!(output.status.success(), "{args:?}: {output:?}");
        self.counts.verbs += 1;
    }

    /// A name that no file has yet.
    fn new_name(&self, stem: &str, ending: &str) -> String {
        format!("{stem}-{}.{ending}", self.counts.verbs)
    }

    /// Something done to the disk while nobody serves it.
    fn verb(&mut self) {
        let name = self.name.clone();
        match self.workload.rng.pick(0..9) {
            0..2 => self.resize(&name),
            2 => self.tool(&["stream", &name]),
            3..5 => self.commit(&name),
            5..7 => self.snapshot(&name),
            _ => self.rebase(&name),
        }
        let name = self.name.clone();
        self.tool(&["check", &name]);
    }

    /// Makes the disk longer or shorter.
    fn resize(&mut self, name: &str) {
        let sectors = self.workload.rng.pick(200..3 * MIB / to_u64(SECTOR));
        let len = sectors * to_u64(SECTOR);
        self.tool(&["resize", "-q", "--shrink", name, &len.to_string()]);
        self.model.resize(to_usize(len));
    }

    /// Writes the disk down into what it stands on: a copy of a raw file, or its own snapshot.
    fn commit(&mut self, name: &str) {
        if let Backing::Raw(base) = &self.backing {
            let copy = self.new_name("copy", "img");
            std::fs::copy(self.disk.path(base), self.disk.path(&copy)).expect("copy the base");
            self.tool(&["rebase", "-u", "-b", &copy, "-F", "raw", name]);
            self.backing = Backing::Raw(copy);
        }
        if self.backing != Backing::Nothing {
            let keep = self.workload.rng.one_in(3);
            self.tool(&["commit", if keep { "--keep" } else { "--progress" }, name]);
        }
    }

    /// Goes on with a new disk on top.
    fn snapshot(&mut self, name: &str) {
        let new = self.new_name("snapshot", "add-cow");
        self.tool(&["snapshot", "-q", name, &new]);
        self.name = new;
        self.backing = Backing::AddCow;
    }

    /// Gives the disk another backing file of any length and content, or none.
    fn rebase(&mut self, name: &str) {
        if self.workload.rng.one_in(4) {
            self.tool(&["rebase", "-b", "", name]);
            self.backing = Backing::Nothing;
            return;
        }
        let base = self.new_name("base", "img");
        let len = self.workload.rng.pick(1..3 * MIB);
        let bytes = pattern(self.workload.rng.next(), 0, to_usize(len));
        std::fs::write(self.disk.path(&base), bytes).expect("write a base");
        self.tool(&["rebase", "-b", &base, "-F", "raw", name]);
        self.backing = Backing::Raw(base);
    }
}

/// Runs five sequences, or that of `ADDCOW_SEED`, on disks of `shape`.
fn agrees(name: &str, shape: &Shape, first_seed: u64) {
    let count = if std::env::var_os("ADDCOW_SEED").is_some() { 1 } else { 5 };
    let mut all = Counts::default();
    for seed in first_seed..first_seed + count {
        let mut sequence = Sequence::new(shape.clone(), seed);
        sequence.run();
        let Counts { requests, refused, verbs } = sequence.counts;
        assert!(requests > 0 && verbs > 0, "{:?}", sequence.counts);
        all.requests += requests;
        all.refused += refused;
        all.verbs += verbs;
    }
    let figures = [("seeds", count), ("ops", all.requests), ("refused", all.refused)];
    score("fsx", &[&figures[..], &[("verbs", all.verbs), (name, all.requests)]].concat());
}

#[test]
fn a_disk_of_4k_clusters_over_a_short_base() {
    let shape = Shape::new(2 * MIB + 512, 4 * KIB).base(MIB + 100);
    agrees("clusters_4k", &shape, 100);
}

#[test]
fn a_disk_of_64k_clusters_over_a_long_base() {
    agrees("clusters_64k", &Shape::new(2 * MIB, 64 * KIB).base(3 * MIB), 200);
}

#[test]
fn a_disk_in_memory() {
    let shape = Shape::new(MIB + 3 * 512, 8 * KIB).in_memory();
    agrees("in_memory", &shape, 300);
}

#[test]
fn a_disk_without_a_base() {
    agrees("no_base", &Shape::new(2 * MIB, 2 * MIB).no_base(), 400);
}
