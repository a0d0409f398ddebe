//! Is a disk in use left alone (P8)? By a second daemon, by the tool, by QEMU's programs; and do
//! we leave alone what those use?
//!
//! Whoever is refused has changed nothing. Who only reads shares with others who only read, so a
//! base file serves any number of disks. A lock goes with its process, however that ends.
//!
//! Not here: the lock's bytes (`storage/lock.rs`), and golden messages (`tests/tool/locks.cmd`).

mod common;

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant, SystemTime};

use common::TIMEOUT;
use common::disk::{DAEMON, Daemon, Disk, Shape, TOOL, run_to_end};
use common::guest::Setup;
use common::score::score;

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
    refused(&disk, TOOL, &["check", "-r", "leaks", "disk.add-cow"], "stop it first");
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

/// A program of QEMU that has a raw image open until it goes out of scope.
struct Qemu {
    /// The process.
    child: Child,
}

impl Qemu {
    /// Opens `file` in the disk's folder with qemu-io, for reading only if `options` say so, and
    /// waits until that is done.
    fn io(disk: &Disk, options: &[&str], file: &str) -> Self {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw"]).args(options).arg(file).current_dir(disk.path(""));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut opened = Self { child: command.spawn().expect("start qemu-io") };
        let input = opened.child.stdin.as_mut().expect("its input");
        writeln!(input, "length").expect("a command");
        let mut answer = String::new();
        let mut output = BufReader::new(opened.child.stdout.as_mut().expect("its output"));
        while !answer.contains("iB") {
            let got = output.read_line(&mut answer).expect("an answer");
            assert!(got > 0, "qemu-io ended: {answer}");
        }
        opened
    }

    /// Exports `file` in the disk's folder with qemu-storage-daemon, and waits until that is done.
    fn export(disk: &Disk, writable: bool, file: &str) -> Self {
        let (read_only, writable) = if writable { ("off", "on") } else { ("on", "off") };
        let node = format!("driver=file,node-name=file,filename={file},read-only={read_only}");
        let export = format!(
            "type=vhost-user-blk,id=export,node-name=file,writable={writable},addr.type=unix,\
             addr.path=exported"
        );
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--blockdev", &node, "--export", &export]).current_dir(disk.path(""));
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let mut exported = Self { child: command.spawn().expect("start qemu-storage-daemon") };
        let end = Instant::now() + TIMEOUT;
        while !disk.path("exported").exists() {
            let ended = exported.child.try_wait().expect("its state");
            assert!(ended.is_none() && Instant::now() < end, "no export: {ended:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
        exported
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether QEMU's tools are there; says so if not.
fn have_qemu(test: &str) -> bool {
    let have = |program: &&str| Command::new(program).arg("--version").output().is_ok();
    let all = ["qemu-img", "qemu-io", "qemu-storage-daemon"].iter().all(have);
    if !all {
        assert!(std::env::var_os("ADDCOW_NEED_QEMU").is_none(), "{test}: no tools of QEMU");
        // Past the capture of the test harness, so that it is seen.
        writeln!(std::io::stderr(), "SKIPPED {test}: no tools of QEMU").expect("standard error");
    }
    all
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
        let writer = Qemu::io(&disk, &[], file);
        refused(&disk, DAEMON, &daemon_on("disk.add-cow"), IN_USE);
        refused(&disk, TOOL, &["map", "disk.add-cow"], IN_USE);
        succeeds(&disk, TOOL, &["map", "-U", "disk.add-cow"]);
        drop(writer);
        // One that only reads forbids nobody to write, so it does not stop us.
        let _reader = Qemu::io(&disk, &["-r"], file);
        succeeds(&disk, TOOL, &["map", "disk.add-cow"]);
        started(disk.serve(&[])).stop();
    }
}

/// Who may not look into a process does not learn its name, and is refused all the same.
#[test]
fn holder_is_named_only_to_who_may_look_into_it() {
    let disk = Disk::small();
    let daemon = started(disk.serve(&[]));
    let named = format!("{IN_USE} (addcowd, PID {})", daemon.pid());
    refused(&disk, TOOL, &["info", "disk.add-cow"], &named);
    if !rustix::process::getuid().is_root() {
        let note = b"SKIPPED holder_is_named_only_to_who_may_look_into_it: not root\n";
        return std::io::stderr().write_all(note).expect("standard error");
    }
    for path in ["", "disk.add-cow", "disk.raw", "base.img"] {
        std::fs::set_permissions(disk.path(path), Permissions::from_mode(0o755)).expect("a mode");
    }
    // Where others can reach it, unlike the folder that it was built in, perhaps.
    std::fs::copy(TOOL, disk.path("tool")).expect("a copy");
    let mut command = Command::new(disk.path("tool"));
    command.args(["info", "disk.add-cow"]).current_dir(disk.path("")).uid(65534).gid(65534);
    let said = text(&run_to_end(command));
    assert!(said.contains(IN_USE) && !said.contains("PID"), "{said}");
}

/// How a disk in use is come upon: who uses it, or under which name it is opened a second time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// addcowd has it; the same name.
    Ours,
    /// addcowd has it; another add-cow file over the same raw image.
    OtherSide,
    /// addcowd has it; a hard link of the raw image.
    HardLink,
    /// addcowd has it; a symbolic link to the add-cow file.
    SoftLink,
    /// qemu-io has the raw image.
    QemuIo,
    /// qemu-storage-daemon has the raw image.
    QemuStorageDaemon,
}

/// Who uses the disk.
enum Holder {
    /// addcowd.
    Daemon(Daemon),
    /// A program of QEMU.
    Qemu(Qemu),
}

impl Holder {
    /// Starts it.
    fn start(disk: &Disk, way: Way, writable: bool) -> Self {
        let read_only: &[&str] = if writable { &[] } else { &["-r"] };
        match way {
            Way::QemuIo => Self::Qemu(Qemu::io(disk, read_only, "disk.raw")),
            Way::QemuStorageDaemon => Self::Qemu(Qemu::export(disk, writable, "disk.raw")),
            _ => Self::Daemon(started(disk.serve(read_only))),
        }
    }

    /// What is said about it: its name, cut as the kernel does, and its number.
    fn words(&self) -> String {
        let pid = match self {
            Self::Daemon(daemon) => daemon.pid(),
            Self::Qemu(qemu) => qemu.child.id(),
        };
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).expect("its name");
        format!("{IN_USE} ({}, PID {pid})", name.trim_end())
    }
}

impl Way {
    /// All of them.
    const ALL: [Self; 6] = [
        Self::Ours,
        Self::OtherSide,
        Self::HardLink,
        Self::SoftLink,
        Self::QemuIo,
        Self::QemuStorageDaemon,
    ];

    /// What the second one opens, and its format.
    fn contender(self) -> (&'static str, &'static str) {
        match self {
            Self::OtherSide => ("other.add-cow", "add-cow"),
            Self::HardLink => ("hard.raw", "raw"),
            Self::SoftLink => ("soft.add-cow", "add-cow"),
            Self::Ours | Self::QemuIo | Self::QemuStorageDaemon => ("disk.add-cow", "add-cow"),
        }
    }

    /// Whether addcowd has the disk.
    fn is_ours(self) -> bool {
        !matches!(self, Self::QemuIo | Self::QemuStorageDaemon)
    }
}

/// A disk with all the names that the matrix uses.
fn many_names() -> Disk {
    let disk = Disk::small();
    let other = ["create", "-q", "-i", "disk.raw", "-b", "base.img", "-F", "raw", "other.add-cow"];
    succeeds(&disk, TOOL, &other);
    std::fs::hard_link(disk.path("disk.raw"), disk.path("hard.raw")).expect("a link");
    std::os::unix::fs::symlink("disk.add-cow", disk.path("soft.add-cow")).expect("a link");
    disk
}

/// One case of the matrix. Returns how many programs were refused.
fn matrix_case(way: Way, writable: bool, killed: bool, slowest: &mut Duration) -> u64 {
    let disk = many_names();
    let holder = Holder::start(&disk, way, writable);
    let words = holder.words();
    // Both kinds of holders are killed when they are dropped.
    let holder = (!killed).then_some(holder);
    let (name, format) = way.contender();
    let writer = ["--format", format, "--blk-file", name, "--socket-path", "other"];
    let reader = ["map", "-f", format, name];
    let mut count = 0;
    let mut refuse = |program: &str, args: &[&str], words: &str| {
        let begin = Instant::now();
        refused(&disk, program, args, words);
        *slowest = begin.elapsed().max(*slowest);
        count += 1;
    };
    // Who reads with a tool of QEMU does not mind others who write.
    let bears_writers = killed || (!writable && !way.is_ours());
    let bears_readers = killed || !writable;
    if !bears_readers {
        refuse(TOOL, &reader, &words);
    }
    if !bears_writers {
        refuse(DAEMON, &writer, &words);
        for file in ["disk.raw", "hard.raw"] {
            let write = ["-f", "raw", "-c", "write 0 4k", file];
            // It has the file for itself, or bears others as they bear it.
            if way.is_ours() {
                refuse("qemu-io", &write, QEMU_IN_USE);
            }
        }
        assert!(!disk.path("other").exists(), "a socket of a daemon that was refused");
    }
    if bears_readers {
        succeeds(&disk, TOOL, &reader);
    }
    if bears_writers {
        let mut daemon = Daemon::spawn(&disk.path(""), &writer, None);
        daemon.socket = disk.path("other");
        drop(started(daemon));
    }
    drop(holder);
    count
}

#[test]
fn whoever_comes_second_is_refused_before_a_byte_changes() {
    if !have_qemu("whoever_comes_second_is_refused_before_a_byte_changes") {
        return;
    }
    let (mut cases, mut refusals, mut slowest) = (0, 0, Duration::ZERO);
    for way in Way::ALL {
        for (writable, killed) in [(true, false), (true, true), (false, false), (false, true)] {
            refusals += matrix_case(way, writable, killed, &mut slowest);
            cases += 1;
        }
    }
    assert_eq!((cases, refusals), (24, 32));
    let slowest = u64::try_from(slowest.as_millis()).expect("a short time");
    let figures = [("cases", cases), ("refusals", refusals)];
    score("locks", &[&figures[..], &[("slowest_refusal_ms", slowest)]].concat());
}
