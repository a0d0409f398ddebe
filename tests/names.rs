//! Where do names inside a disk's files lead (P6)? Only to regular files that a plain path reaches,
//! to devices if asked for, and with `--image-folder` to nothing outside.
//!
//! The programs themselves are run on disks whose headers somebody hostile wrote. Whoever is
//! refused gets one line that names file and rule, and nothing has changed. What the command line
//! names is what was asked for, and is opened wherever it lies.
//!
//! Not here: which bytes a name may have (tests/format.rs, tests/tool/hostile.cmd), and how long a
//! chain may be (tests/backing_chain.rs).

#[path = "common/shell.rs"]
mod shell;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Write, stderr};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use addcow::format::{FileName, FileReference, FileRole, Header};
use addcow::units::ClusterSize;
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use shell::{command, have};
use tempfile::TempDir;

/// Size of every disk here, in bytes.
const SIZE: u64 = 1 << 20;

/// What is said about a name that leads out of the folder.
const OUTSIDE: &str = "leads out of the folder";

/// What is said about a link of /proc.
const LINKS: &str = "link of /proc";

/// What is said about a device.
const DEVICE: &str = "--allow-devices";

/// The option that keeps names to the folder of most disks here.
const FOLDER: [&str; 2] = ["--image-folder", "images"];

/// A folder with two folders in it, `images` and `outside`, each with a raw image of its own.
struct Lab {
    /// The folder.
    folder: TempDir,
}

impl Lab {
    /// Makes it.
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["images", "outside"] {
            fs::create_dir(folder.path().join(name)).expect("a folder");
            for file in ["disk.raw", "base.raw"] {
                let file = File::create(folder.path().join(name).join(file)).expect("a file");
                file.set_len(SIZE).expect("a length");
            }
        }
        Self { folder }
    }

    /// A path in it.
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The same as text.
    fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("plain text").to_owned()
    }

    /// Writes the add-cow file `name` over these files, as anybody could.
    fn disk(&self, name: &str, image: &str, backing: Option<(&str, &str)>) {
        let reference = |role, name: &str, format: &str| FileReference {
            name: FileName::new(role, name).expect("a name"),
            format: format.to_owned(),
        };
        let header = Header {
            cluster_size: ClusterSize::from_bits(12).expect("4 KiB"),
            backing: backing.map(|(name, format)| reference(FileRole::Backing, name, format)),
            image: reference(FileRole::Image, image, "raw"),
            all_allocated: false,
            compat_features: 0,
        };
        let path = self.path(name);
        fs::write(&path, header.encode().expect("a header")).expect("a file");
        File::options().write(true).open(path).expect("it").set_len(8192).expect("a length");
    }

    /// Runs a program here. Its standard input is a regular file.
    fn run(&self, program: &str, args: &[&str]) -> Output {
        let input = File::open(self.path("outside/disk.raw")).expect("a file");
        let mut command = command("timeout", self.folder.path());
        command.arg("60").arg(program).args(args).stdin(Stdio::from(input));
        command.output().expect("it runs")
    }

    /// Every file's path, type, length and time.
    fn state(&self) -> BTreeMap<PathBuf, String> {
        let mut state = BTreeMap::new();
        let mut folders = vec![self.folder.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).expect("a folder") {
                let entry = entry.expect("an entry");
                let seen = entry.metadata().expect("metadata");
                if seen.is_dir() {
                    folders.push(entry.path());
                } else {
                    let facts = (seen.file_type(), seen.len(), seen.modified().expect("a time"));
                    state.insert(entry.path(), format!("{facts:?}"));
                }
            }
        }
        state
    }

    /// Runs a program that must be refused with all of `words` in one line, and change nothing.
    fn refused(&self, program: &str, args: &[&str], words: &[&str]) {
        let before = self.state();
        let output = self.run(program, args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{program} {args:?} said {said}");
        assert_eq!(said.lines().count(), 1, "{program} {args:?} said {said}");
        for word in words {
            assert!(said.contains(word), "{program} {args:?} said nothing of {word}: {said}");
        }
        assert_eq!(self.state(), before, "{program} {args:?} has changed something");
    }

    /// Runs a program that must succeed.
    fn succeeds(&self, program: &str, args: &[&str]) -> String {
        let output = self.run(program, args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{program} {args:?}: {said}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Opens `disk` with both programs; it must be refused by both with these words.
    fn both_refuse(&self, disk: &str, options: &[&str], words: &[&str]) {
        self.refused("addcow", &[&["map", disk][..], options].concat(), words);
        let daemon = ["--blk-file", disk, "--socket-path", "socket"];
        self.refused("addcowd", &[&daemon[..], options].concat(), words);
    }

    /// Opens `disk` with the tool, which must succeed.
    fn opens(&self, disk: &str, options: &[&str]) {
        self.succeeds("addcow", &[&["map", disk][..], options].concat());
    }
}

/// Says on the terminal that a part of a test is left out.
fn skipped(what: &str) {
    // Not eprintln, which the harness captures.
    stderr().write_all(format!("SKIPPED {what}\n").as_bytes()).expect("standard error");
}

#[test]
fn without_a_folder_a_name_may_lead_anywhere() {
    let lab = Lab::new();
    symlink("../outside/disk.raw", lab.path("images/link.raw")).expect("a link");
    let absolute = lab.text("outside/disk.raw");
    for name in ["disk.raw", "link.raw", "../outside/disk.raw", absolute.as_str()] {
        lab.disk("images/a.add-cow", name, Some(("base.raw", "raw")));
        lab.opens("images/a.add-cow", &[]);
    }
}

#[test]
fn with_a_folder_no_name_leads_out_of_it() {
    let lab = Lab::new();
    let inside = lab.text("images/disk.raw");
    symlink("../outside", lab.path("images/way-out")).expect("a link");
    symlink("../outside/disk.raw", lab.path("images/link.raw")).expect("a link");
    symlink("link.raw", lab.path("images/twice.raw")).expect("a link");
    symlink(&inside, lab.path("images/absolute-link.raw")).expect("a link");
    let outside = lab.text("outside/disk.raw");
    let around = format!("{inside}/../../outside/disk.raw").replace("disk.raw/..", "way-out/..");
    let rows = [
        "../outside/disk.raw",
        "./.././outside/disk.raw",
        "way-out/disk.raw",
        "way-out/../outside/disk.raw",
        "link.raw",
        "twice.raw",
        "absolute-link.raw",
        "..",
        outside.as_str(),
        around.as_str(),
        "/dev/null",
        "/",
    ];
    for name in rows {
        lab.disk("images/a.add-cow", name, Some(("base.raw", "raw")));
        let words = ["raw image", name, OUTSIDE, "'images'"];
        lab.both_refuse("images/a.add-cow", &FOLDER, &words);
        lab.disk("images/b.add-cow", "disk.raw", Some((name, "raw")));
        let words = ["backing file", name, OUTSIDE, "'images'"];
        lab.both_refuse("images/b.add-cow", &FOLDER, &words);
        lab.disk("images/c.add-cow", "disk.raw", Some((name, "qcow2")));
        lab.both_refuse("images/c.add-cow", &FOLDER, &words);
    }
    // One that is not there is not there, and one that is a folder is that.
    lab.disk("images/a.add-cow", "none.raw", None);
    lab.both_refuse("images/a.add-cow", &FOLDER, &["No such file"]);
    for name in [".", lab.text("images").as_str()] {
        lab.disk("images/a.add-cow", name, None);
        lab.both_refuse("images/a.add-cow", &FOLDER, &["is a directory"]);
    }
}

#[test]
fn with_a_folder_names_lead_to_what_is_in_it() {
    let lab = Lab::new();
    fs::create_dir(lab.path("images/sub")).expect("a folder");
    symlink("disk.raw", lab.path("images/link.raw")).expect("a link");
    symlink("../disk.raw", lab.path("images/sub/link.raw")).expect("a link");
    symlink("images", lab.path("other-name")).expect("a link");
    let inside = lab.text("images/disk.raw");
    let by_link = lab.text("other-name/disk.raw");
    for name in ["disk.raw", "link.raw", "sub/link.raw", "sub/../disk.raw", inside.as_str()] {
        lab.disk("images/a.add-cow", name, Some(("base.raw", "raw")));
        for folder in ["images", "./images/", "other-name", "outside/../images"] {
            for disk in ["images/a.add-cow", "other-name/a.add-cow", "images/../images/a.add-cow"] {
                lab.opens(disk, &["--image-folder", folder]);
            }
        }
    }
    // Also where the working directory is that folder, and its name is empty.
    lab.disk("images/a.add-cow", &inside, Some(("base.raw", "raw")));
    let line = "cd images && addcow map a.add-cow --image-folder . && \
                addcow map a.add-cow --image-folder ../images";
    lab.succeeds("sh", &["-euc", line]);
    // By the name of the folder that the option has.
    lab.disk("images/a.add-cow", &by_link, None);
    lab.opens("images/a.add-cow", &["--image-folder", "other-name"]);
    lab.both_refuse("images/a.add-cow", &FOLDER, &[OUTSIDE]);
    // The disk itself may lie anywhere: it was asked for.
    lab.disk("outside/a.add-cow", &inside, Some((&lab.text("images/base.raw"), "raw")));
    lab.opens("outside/a.add-cow", &FOLDER);
    lab.disk("outside/a.add-cow", "disk.raw", None);
    lab.both_refuse("outside/a.add-cow", &FOLDER, &["outside/disk.raw", OUTSIDE]);
}

#[test]
fn every_layer_of_a_chain_is_kept_to_the_folder() {
    let lab = Lab::new();
    lab.disk("images/deep.add-cow", "disk.raw", Some(("../outside/base.raw", "raw")));
    lab.disk("images/below.add-cow", "../outside/disk.raw", None);
    for (below, words) in [
        ("deep.add-cow", ["backing file", "outside/base.raw", OUTSIDE]),
        ("below.add-cow", ["raw image", "outside/disk.raw", OUTSIDE]),
    ] {
        File::create(lab.path("images/top.raw")).expect("a file").set_len(SIZE).expect("a length");
        lab.disk("images/top.add-cow", "top.raw", Some((below, "add-cow")));
        lab.opens("images/top.add-cow", &[]);
        lab.both_refuse("images/top.add-cow", &FOLDER, &words);
    }
    if !have("qemu-img", "every_layer_of_a_chain_is_kept_to_the_folder") {
        return;
    }
    let make = |args: &[&str]| lab.succeeds("qemu-img", &[&["create", "-q", "-f"], args].concat());
    let over = ["-b", "../outside/base.raw", "-F", "raw"];
    make(&[&["qcow2"], &over[..], &["images/deep.qcow2"]].concat());
    make(&[&["qed"], &over[..], &["images/deep.qed"]].concat());
    // QEMU looks a data file up in its working directory.
    let data = "data_file=outside/data.raw,data_file_raw=on";
    make(&["qcow2", "-o", data, "images/data.qcow2", "1M"]);
    fs::create_dir(lab.path("images/outside")).expect("a folder");
    symlink("../../outside/data.raw", lab.path("images/outside/data.raw")).expect("a link");
    for (below, format, words) in [
        ("deep.qcow2", "qcow2", ["backing file", "outside/base.raw", OUTSIDE]),
        ("deep.qed", "qed", ["backing file", "outside/base.raw", OUTSIDE]),
        ("data.qcow2", "qcow2", ["data file", "outside/data.raw", OUTSIDE]),
    ] {
        lab.disk("images/top.add-cow", "disk.raw", Some((below, format)));
        lab.opens("images/top.add-cow", &[]);
        lab.both_refuse("images/top.add-cow", &FOLDER, &words);
        let below = format!("images/{below}");
        lab.refused("addcow", &[&["map", "-f", format, &below], &FOLDER[..]].concat(), &words);
    }
    let adopt = [&["adopt", "images/data.qcow2", "images/new.add-cow"], &FOLDER[..]].concat();
    lab.refused("addcow", &adopt, &["data file", "outside/data.raw", OUTSIDE]);
}

#[test]
fn links_of_proc_are_never_followed() {
    let lab = Lab::new();
    symlink("/proc/self/fd/0", lab.path("images/input.raw")).expect("a link");
    let in_work = "/proc/self/cwd/images/disk.raw";
    let from_root = format!("/proc/self/root{}", lab.text("images/disk.raw"));
    for name in ["/proc/self/fd/0", "/dev/stdin", in_work, from_root.as_str(), "input.raw"] {
        lab.disk("images/a.add-cow", name, None);
        lab.both_refuse("images/a.add-cow", &[], &["raw image", name, LINKS]);
        lab.both_refuse("images/a.add-cow", &["--allow-devices"], &["raw image", name, LINKS]);
        lab.disk("images/b.add-cow", "disk.raw", Some((name, "raw")));
        lab.both_refuse("images/b.add-cow", &[], &["backing file", name, LINKS]);
        lab.both_refuse("images/b.add-cow", &["--image-folder", "/"], &["backing file", name]);
    }
    // Asked for by a person, they are what they are.
    lab.succeeds("addcow", &["map", "-f", "raw", "/proc/self/fd/0"]);
}

#[test]
fn what_is_no_file_is_not_even_opened() {
    let lab = Lab::new();
    let mode = Mode::RUSR | Mode::WUSR;
    mknodat(CWD, lab.path("images/fifo"), FileType::Fifo, mode, 0).expect("a FIFO");
    let _socket = UnixListener::bind(lab.path("images/socket")).expect("a socket");
    fs::create_dir(lab.path("images/folder")).expect("a folder");
    let mut rows = vec![
        ("fifo", "is a FIFO"),
        ("socket", "is a socket"),
        ("folder", "is a directory"),
        ("/dev/null", "is a character device"),
    ];
    // A device of no driver: opening it says so, in other words.
    let device = makedev(239, 77);
    let node = lab.path("images/watchdog");
    match mknodat(CWD, node, FileType::CharacterDevice, mode, device) {
        Ok(()) => rows.push(("watchdog", "is a character device")),
        Err(error) => skipped(&format!("what_is_no_file_is_not_even_opened: mknod: {error}")),
    }
    for (name, words) in rows {
        for options in [&[][..], &["--allow-devices"]] {
            lab.disk("images/a.add-cow", name, None);
            lab.both_refuse("images/a.add-cow", options, &["raw image", name, words]);
            lab.disk("images/b.add-cow", "disk.raw", Some((name, "raw")));
            lab.both_refuse("images/b.add-cow", options, &["backing file", name, words]);
        }
    }
}

/// A loop device, until it goes out of scope.
struct Loop {
    /// Its node.
    node: String,
}

impl Loop {
    /// On `file`, where we may make one.
    fn on(file: &Path) -> Option<Self> {
        let made = command("losetup", Path::new("/")).args(["--find", "--show"]).arg(file).output();
        let made = made.ok().filter(|output| output.status.success())?;
        let node = String::from_utf8(made.stdout).expect("a name").trim().to_owned();
        Some(Self { node })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = command("losetup", Path::new("/")).args(["--detach", &self.node]).status();
        drop(detached);
    }
}

#[test]
fn devices_are_refused_unless_asked_for() {
    let lab = Lab::new();
    let Some(device) = Loop::on(&lab.path("outside/disk.raw")) else {
        return skipped("devices_are_refused_unless_asked_for: no loop device");
    };
    let name = device.node.as_str();
    symlink(name, lab.path("images/link.raw")).expect("a link");
    for name in [name, "link.raw"] {
        lab.disk("images/a.add-cow", name, Some(("base.raw", "raw")));
        lab.both_refuse("images/a.add-cow", &[], &["raw image", name, "block device", DEVICE]);
        lab.opens("images/a.add-cow", &["--allow-devices"]);
        lab.disk("images/b.add-cow", "disk.raw", Some((name, "raw")));
        lab.both_refuse("images/b.add-cow", &[], &["backing file", name, "block device", DEVICE]);
        lab.opens("images/b.add-cow", &["--allow-devices"]);
        // One does not include the other.
        let options = [&FOLDER[..], &["--allow-devices"]].concat();
        lab.both_refuse("images/b.add-cow", &options, &["backing file", name, OUTSIDE]);
    }
    // A person asked for these.
    lab.opens(name, &["-f", "raw"]);
    let create = |args: &[&str]| lab.succeeds("addcow", &[&["create", "-q"], args].concat());
    create(&["-b", name, "-F", "raw", "images/over.add-cow"]);
    let rebase = |args: &[&str]| {
        let end = ["-F", "raw", "images/over.add-cow"];
        lab.succeeds("addcow", &[&["rebase", "-q"], args, &end].concat());
    };
    rebase(&["--allow-devices", "-b", "base.raw"]);
    rebase(&["-b", name]);
    create(&["-i", name, "images/on.add-cow"]);
    lab.both_refuse("images/on.add-cow", &[], &["raw image", name, DEVICE]);
    lab.opens("images/on.add-cow", &["--allow-devices"]);
}

#[test]
fn every_verb_follows_the_rules() {
    let lab = Lab::new();
    lab.disk("images/a.add-cow", "../outside/disk.raw", Some(("base.raw", "raw")));
    lab.disk("images/b.add-cow", "disk.raw", Some(("../outside/base.raw", "raw")));
    let verbs: [&[&str]; 16] = [
        &["map", "DISK"],
        &["check", "DISK"],
        &["check", "-r", "all", "DISK"],
        &["compare", "DISK", "-F", "raw", "images/base.raw"],
        &["convert", "-O", "raw", "DISK", "images/out.raw"],
        &["measure", "DISK"],
        &["commit", "DISK"],
        &["commit", "-d", "DISK"],
        &["stream", "DISK"],
        &["rebase", "-b", "base.raw", "-F", "raw", "DISK"],
        &["reset", "DISK"],
        &["resize", "DISK", "+1M"],
        &["export", "DISK", "images/out.qcow2"],
        &["snapshot", "DISK", "images/new.add-cow"],
        &["create", "-b", "DISK-NAME", "-F", "add-cow", "images/new.add-cow"],
        &["detach", "DISK"],
    ];
    for disk in ["images/a.add-cow", "images/b.add-cow"] {
        for verb in verbs {
            // These do not look at the backing file, or only once all is well.
            let is_raw = disk == "images/a.add-cow";
            if !is_raw && ["measure", "snapshot", "detach"].contains(&verb[0]) {
                continue;
            }
            let name = disk.trim_start_matches("images/");
            let args = verb.iter().map(|word| match *word {
                "DISK" => disk,
                "DISK-NAME" => name,
                word => word,
            });
            let args: Vec<&str> = args.chain(FOLDER).collect();
            // `compare` has an exit code of its own for errors.
            if verb[0] == "compare" {
                let said = lab.run("addcow", &args);
                assert_eq!(said.status.code(), Some(2), "{args:?}");
                assert!(String::from_utf8_lossy(&said.stderr).contains(OUTSIDE), "{said:?}");
                continue;
            }
            lab.refused("addcow", &args, &[OUTSIDE]);
        }
    }
    // `info` shows what it can, and says what it cannot.
    lab.refused("addcow", &[&["info", "images/a.add-cow"], &FOLDER[..]].concat(), &[OUTSIDE]);
    let shown = lab.succeeds("addcow", &[&["info", "images/b.add-cow"], &FOLDER[..]].concat());
    assert!(shown.contains(OUTSIDE), "{shown}");
    let chain = [&["info", "--backing-chain", "images/b.add-cow"], &FOLDER[..]].concat();
    lab.refused("addcow", &chain, &[OUTSIDE]);
}

#[test]
fn files_that_a_person_names_may_lie_anywhere() {
    let lab = Lab::new();
    let run = |args: &[&str]| lab.succeeds("addcow", &[args, &FOLDER[..]].concat());
    let base = "../outside/base.raw";
    run(&["create", "-q", "-b", base, "-F", "raw", "images/a.add-cow"]);
    run(&["create", "-q", "-i", "../outside/disk.raw", "images/b.add-cow"]);
    lab.disk("images/c.add-cow", "disk.raw", Some(("base.raw", "raw")));
    run(&["rebase", "-q", "-b", base, "-F", "raw", "images/c.add-cow"]);
    // From now on a file names it.
    let again = ["rebase", "-q", "-b", "base.raw", "-F", "raw", "images/c.add-cow"];
    lab.refused("addcow", &[&again[..], &FOLDER].concat(), &["backing file", base, OUTSIDE]);
    run(&[&again[..1], &["-u"], &again[1..]].concat());
}

#[test]
fn the_folder_must_be_one() {
    let lab = Lab::new();
    lab.disk("images/a.add-cow", "disk.raw", None);
    for (folder, words) in [("none", "No such file"), ("images/disk.raw", "Not a directory")] {
        let said = format!("cannot use --image-folder '{folder}': {words}");
        let words = [said.as_str()];
        lab.both_refuse("images/a.add-cow", &["--image-folder", folder], &words);
    }
}

/// A file that another one names is never opened as if a person had named it.
#[test]
fn the_files_of_a_chain_are_not_opened_without_the_rules() {
    let test = "the_files_of_a_chain_are_not_opened_without_the_rules";
    let lab = Lab::new();
    lab.disk("images/middle.add-cow", "base.raw", None);
    lab.disk("images/top.add-cow", "disk.raw", Some(("middle.add-cow", "add-cow")));
    if !have("strace", test) {
        return;
    }
    let trace = ["-f", "-qq", "-o", "trace", "-e", "trace=open,openat,openat2", "addcow"];
    for verb in [&["info", "--backing-chain"][..], &["info"], &["map"], &["check"]] {
        let args = [&trace, verb, &["images/top.add-cow"], &FOLDER].concat();
        let output = lab.run("strace", &args);
        if String::from_utf8_lossy(&output.stderr).contains("ptrace") {
            return skipped(&format!("{test}: no ptrace"));
        }
        assert!(output.status.success(), "{output:?}");
        let seen = fs::read_to_string(lab.path("trace")).expect("a trace");
        let opened = |name: &str| -> Vec<bool> {
            let lines = seen.lines().filter(|line| line.contains(name));
            lines.map(|line| line.contains("openat2(")).collect()
        };
        assert!(opened("top.add-cow").contains(&false), "{seen}");
        let middle = opened("middle.add-cow");
        assert!(!middle.is_empty() && !middle.contains(&false), "{verb:?}: {seen}");
    }
}

/// A kernel before Linux 5.6 has no openat2.
#[test]
fn an_old_kernel_refuses_a_folder_and_serves_without_one() {
    let lab = Lab::new();
    lab.disk("images/a.add-cow", "disk.raw", Some(("base.raw", "raw")));
    if !have("strace", "an_old_kernel_refuses_a_folder_and_serves_without_one") {
        return;
    }
    let inject = ["-f", "-qq", "-o", "/dev/null", "-e", "inject=openat2:error=ENOSYS"];
    let map = ["addcow", "map", "images/a.add-cow"];
    let output = lab.run("strace", &[&inject[..], &map].concat());
    if String::from_utf8_lossy(&output.stderr).contains("ptrace") {
        return skipped("an_old_kernel_refuses_a_folder_and_serves_without_one: no ptrace");
    }
    assert!(output.status.success(), "{output:?}");
    let words = ["raw image", "this kernel cannot keep names", "Linux 5.6"];
    lab.refused("strace", &[&inject[..], &map, &FOLDER].concat(), &words);
    // What is no file is refused without it, too.
    let device = ["addcow", "map", "images/b.add-cow"];
    lab.disk("images/b.add-cow", "/dev/null", None);
    lab.refused("strace", &[&inject[..], &device].concat(), &["is a character device"]);
}
