//! Is a disk in use left alone (P8)? By a second daemon, by the tool, by QEMU's programs; and do
//! we leave alone what those use?
//!
//! Whoever is refused has changed nothing. Who only reads shares with others who only read, so a
//! base file serves any number of disks. A lock goes with its process, however that ends.
//!
//! Not here: the lock's bytes (`storage/lock.rs`), and golden messages (`tests/tool/locks.cmd`).

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::SystemTime;

use common::disk::{DAEMON, Daemon, Disk, Shape, TOOL, run_to_end};
use common::guest::Setup;

/// The words of every refusal of ours.
const IN_USE: &str = "is in use by another process";

/// The part of QEMU's refusals that all of them have.
const QEMU_IN_USE: &str = "Is another process using the image";

/// Runs `program` with `args` in the disk's folder.
fn run(disk: &Disk, program: &str, args: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.args(args).current_dir(disk.path(""));
    run_to_end(command)
}

/// What it printed, on both ways.
fn text(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&both).into_owned()
}

/// Every file of the disk's folder: content, and when it was changed last.
fn files(disk: &Disk) -> BTreeMap<PathBuf, (Vec<u8>, SystemTime)> {
    let entries = std::fs::read_dir(disk.path("")).expect("the folder");
    let entries = entries.map(|entry| entry.expect("an entry").path());
    let state = |path: PathBuf| {
        let time = std::fs::metadata(&path).expect("metadata").modified().expect("a time");
        (path.clone(), (std::fs::read(path).expect("content"), time))
    };
    entries.filter(|path| path.is_file()).map(state).collect()
}

/// Runs a program that must be refused with `words`, and must change nothing.
fn refused(disk: &Disk, program: &str, args: &[&str], words: &str) {
    let before = files(disk);
    let output = run(disk, program, args);
    let said = text(&output);
    assert!(!output.status.success(), "{program} {args:?} was not refused: {said}");
    assert!(said.contains(words), "{program} {args:?} said {said}");
    assert!(files(disk) == before, "{program} {args:?} has changed something");
}

/// Runs a program that must succeed.
fn succeeds(disk: &Disk, program: &str, args: &[&str]) {
    let output = run(disk, program, args);
    assert!(output.status.success(), "{program} {args:?}: {}", text(&output));
}

/// Waits until a daemon serves.
fn started(mut daemon: Daemon) -> Daemon {
    drop(daemon.connect());
    daemon
}

/// The arguments of a daemon on `disk` that is expected to be refused.
fn daemon_on(disk: &str) -> [&str; 4] {
    ["--blk-file", disk, "--socket-path", "other"]
}

#[test]
fn second_daemon_is_refused_and_leaves_no_socket() {
    let disk = Disk::small();
    let first = started(disk.serve(&[]));
    refused(&disk, DAEMON, &daemon_on("disk.add-cow"), IN_USE);
    refused(&disk, DAEMON, &[&daemon_on("disk.add-cow")[..], &["--read-only"]].concat(), IN_USE);
    let raw = [&daemon_on("disk.raw")[..], &["--format", "raw"]].concat();
    refused(&disk, DAEMON, &raw, IN_USE);
    assert!(!disk.path("other").exists(), "a socket of a daemon that was refused");
    first.stop();
    started(disk.serve(&[])).stop();
}

#[test]
fn daemons_that_only_read_share_a_disk_and_bear_no_writer() {
    let disk = Disk::small();
    let first = started(disk.serve(&["--read-only"]));
    let args = ["--blk-file", "disk.add-cow", "--socket-path", "second", "--read-only"];
    let mut second = Daemon::spawn(&disk.path(""), &args, None);
    second.socket = disk.path("second");
    let second = started(second);
    succeeds(&disk, TOOL, &["info", "disk.add-cow"]);
    succeeds(&disk, TOOL, &["check", "disk.add-cow"]);
    refused(&disk, DAEMON, &daemon_on("disk.add-cow"), IN_USE);
    first.stop();
    refused(&disk, DAEMON, &daemon_on("disk.add-cow"), IN_USE);
    second.stop();
    started(disk.serve(&[])).stop();
}

#[test]
fn tool_leaves_a_served_disk_alone_unless_it_only_looks_and_is_told_to() {
    let disk = Disk::small();
    let daemon = started(disk.serve(&[]));
    for verb in ["info", "map", "check"] {
        refused(&disk, TOOL, &[verb, "disk.add-cow"], "-U looks at it");
        succeeds(&disk, TOOL, &[verb, "-U", "disk.add-cow"]);
    }
    refused(&disk, TOOL, &["info", "-f", "raw", "disk.raw"], IN_USE);
    refused(&disk, TOOL, &["check", "-r", "leaks", "disk.add-cow"], "--api-socket");
    refused(&disk, TOOL, &["check", "-r", "leaks", "-U", "disk.add-cow"], "does not go with -U");
    refused(&disk, TOOL, &["create", "--force", "disk.add-cow", "4M"], IN_USE);
    refused(&disk, TOOL, &["create", "-i", "disk.raw", "new.add-cow"], IN_USE);
    refused(&disk, TOOL, &["create", "--force", "-i", "new.raw", "disk.add-cow", "4M"], IN_USE);
    refused(&disk, TOOL, &["create", "-b", "disk.raw", "-F", "raw", "new.add-cow"], IN_USE);
    drop(daemon);
    succeeds(&disk, TOOL, &["check", "-r", "leaks", "disk.add-cow"]);
}

#[test]
fn other_names_of_a_file_are_that_file() {
    let disk = Disk::small();
    std::fs::create_dir(disk.path("links")).expect("a folder");
    std::fs::hard_link(disk.path("disk.raw"), disk.path("links/hard.raw")).expect("a link");
    let _daemon = started(disk.serve(&[]));
    std::os::unix::fs::symlink("disk.add-cow", disk.path("soft.add-cow")).expect("a link");
    refused(&disk, TOOL, &["info", "soft.add-cow"], IN_USE);
    let args = ["create", "-i", "hard.raw", "links/new.add-cow"];
    refused(&disk, TOOL, &args, IN_USE);
    let raw = [&daemon_on("links/hard.raw")[..], &["--format", "raw"]].concat();
    refused(&disk, DAEMON, &raw, IN_USE);
}

#[test]
fn base_serves_many_disks_and_is_not_written_meanwhile() {
    let disk = Disk::create(Shape::new(1 << 20, 4096));
    let mut daemons = Vec::new();
    for number in 0..20 {
        let (name, socket) = (format!("o{number}.add-cow"), format!("s{number}"));
        succeeds(&disk, TOOL, &["create", "-q", "-b", "base.img", "-F", "raw", &name]);
        let args = ["--blk-file", &name, "--socket-path", &socket, "--num-queues", "1"];
        let mut daemon = Daemon::spawn(&disk.path(""), &args, None);
        daemon.socket = disk.path(&socket);
        daemons.push(started(daemon));
    }
    let writer = [&daemon_on("base.img")[..], &["--format", "raw"]].concat();
    refused(&disk, DAEMON, &writer, IN_USE);
    refused(&disk, TOOL, &["create", "-q", "-i", "base.img", "new.add-cow"], IN_USE);
    succeeds(&disk, TOOL, &["info", "-f", "raw", "base.img"]);
    daemons.into_iter().for_each(Daemon::stop);
    let args = ["--format", "raw", "--blk-file", "base.img", "--socket-path", "sock"];
    let _writer = started(Daemon::spawn(&disk.path(""), &args, None));
    refused(&disk, DAEMON, &daemon_on("o0.add-cow"), "backing file 'base.img' is in use");
    refused(&disk, TOOL, &["map", "o0.add-cow"], "backing file 'base.img' is in use");
}

#[test]
fn every_layer_of_a_chain_is_locked() {
    let disk = Disk::create(Shape::new(1 << 20, 4096));
    succeeds(&disk, TOOL, &["create", "-q", "-b", "disk.add-cow", "-F", "add-cow", "top.add-cow"]);
    let args = ["--blk-file", "top.add-cow", "--socket-path", "sock"];
    let daemon = started(Daemon::spawn(&disk.path(""), &args, None));
    refused(&disk, DAEMON, &daemon_on("disk.add-cow"), IN_USE);
    for raw in ["disk.raw", "base.img"] {
        refused(&disk, DAEMON, &[&daemon_on(raw)[..], &["--format", "raw"]].concat(), IN_USE);
    }
    succeeds(&disk, TOOL, &["check", "disk.add-cow"]);
    daemon.stop();
    let _writer = started(disk.serve(&[]));
    refused(&disk, TOOL, &["map", "top.add-cow"], "'disk.add-cow' is in use");
}

#[test]
fn killed_daemon_does_not_keep_its_disk() {
    let disk = Disk::small();
    for round in 0..10 {
        let mut daemon = disk.serve(&["--num-queues", "2"]);
        let mut guest = daemon.guest(Setup::queues(2, 128));
        guest.write(8 * round, &[1; 4096]);
        // Its `Drop` kills.
        drop(daemon);
        if round % 2 == 0 {
            succeeds(&disk, TOOL, &["check", "-r", "leaks", "disk.add-cow"]);
        }
    }
}

#[test]
fn refused_lock_leaves_nothing_behind() {
    let disk = Disk::small();
    let reader = started(disk.serve(&["--read-only"]));
    // The second one is refused; while it ends, and after that, others still read.
    refused(&disk, DAEMON, &daemon_on("disk.add-cow"), IN_USE);
    succeeds(&disk, TOOL, &["map", "disk.add-cow"]);
    reader.stop();
}

/// A qemu-io that has a raw image open until it goes out of scope.
struct QemuIo {
    /// The process, below one that ends it should it hang; it ends when its standard input does.
    child: Child,
}

impl QemuIo {
    /// Opens `file` in the disk's folder, for reading only if `options` say so, and waits until
    /// that is done.
    fn open(disk: &Disk, options: &[&str], file: &str) -> Self {
        let mut command = Command::new("timeout");
        command
            .args(["60", "qemu-io", "-f", "raw"])
            .args(options)
            .arg(file)
            .current_dir(disk.path(""));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().expect("start qemu-io");
        let input = child.stdin.as_mut().expect("its input");
        writeln!(input, "length").expect("a command");
        let mut answer = String::new();
        let mut output = BufReader::new(child.stdout.as_mut().expect("its output"));
        while !answer.contains("iB") {
            let got = output.read_line(&mut answer).expect("an answer");
            assert!(got > 0, "qemu-io ended: {answer}");
        }
        Self { child }
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// Whether QEMU's tools are there; says so if not.
fn have_qemu(test: &str) -> bool {
    let have = |program| Command::new(program).arg("--version").output().is_ok();
    let both = have("qemu-img") && have("qemu-io");
    if !both {
        // Past the capture of the test harness, so that it is seen.
        writeln!(std::io::stderr(), "SKIPPED {test}: no qemu-img").expect("standard error");
    }
    both
}

#[test]
fn qemu_leaves_a_served_disk_alone() {
    if !have_qemu("qemu_leaves_a_served_disk_alone") {
        return;
    }
    let disk = Disk::small();
    let daemon = started(disk.serve(&[]));
    let write = ["-f", "raw", "-c", "write 0 4k"];
    for file in ["disk.raw", "disk.add-cow"] {
        refused(&disk, "qemu-io", &[&write[..], &[file]].concat(), QEMU_IN_USE);
        refused(&disk, "qemu-img", &["resize", "-f", "raw", file, "+1M"], QEMU_IN_USE);
        // For QEMU a raw file that somebody writes to may be read.
        succeeds(&disk, "qemu-img", &["info", "-f", "raw", file]);
    }
    succeeds(&disk, "qemu-io", &["-r", "-f", "raw", "-c", "read 0 4k", "base.img"]);
    refused(&disk, "qemu-io", &[&write[..], &["base.img"]].concat(), QEMU_IN_USE);
    daemon.stop();
    succeeds(&disk, "qemu-io", &[&write[..], &["disk.raw"]].concat());
}

#[test]
fn disk_that_qemu_uses_is_left_alone() {
    if !have_qemu("disk_that_qemu_uses_is_left_alone") {
        return;
    }
    let disk = Disk::small();
    for file in ["disk.raw", "disk.add-cow", "base.img"] {
        let writer = QemuIo::open(&disk, &[], file);
        refused(&disk, DAEMON, &daemon_on("disk.add-cow"), IN_USE);
        refused(&disk, TOOL, &["map", "disk.add-cow"], IN_USE);
        succeeds(&disk, TOOL, &["map", "-U", "disk.add-cow"]);
        drop(writer);
        // One that only reads forbids nobody to write, so it does not stop us.
        let _reader = QemuIo::open(&disk, &["-r"], file);
        succeeds(&disk, TOOL, &["map", "disk.add-cow"]);
        started(disk.serve(&[])).stop();
    }
}
