//! What is left of a job that was stopped in the middle, by a disk that is full or by Ctrl-C?
//!
//! Of a new disk nothing; an old one shows what it showed, and the verb, run again, comes to its
//! end. A full disk is a small tmpfs, which takes root to mount. The moment of an interruption is
//! not left to chance: the tool writes its progress to a pipe that is full after a few lines, and
//! waits there.
//!
//! Not here: power cuts (`crash_jobs.rs`).

use std::fs::{self, File};
use std::io::{PipeReader, Read, Write, stderr};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// The image tool under test.
const TOOL: &str = env!("CARGO_BIN_EXE_addcow");

/// Bytes of the disks here.
const SIZE: usize = 8 << 20;

/// How long anything may take.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A folder with `base.img`, and `disk.add-cow` over it; both have data that the other has not.
struct Lab {
    /// The folder.
    dir: TempDir,
    /// Where the files are that a test lets run out of space: in the folder or below it.
    small: PathBuf,
}

/// Bytes that are not zeros.
fn data(salt: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| salt ^ u8::try_from(at / 512 % 64).expect("small")).collect()
}

impl Lab {
    /// An empty folder.
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let small = dir.path().join("small");
        fs::create_dir(&small).expect("a folder");
        Self { dir, small }
    }

    /// Runs the tool in the folder.
    fn run(&self, line: &str) -> Output {
        let mut command = Command::new(TOOL);
        command.args(line.split_whitespace()).current_dir(self.dir.path());
        command.output().expect("run the tool")
    }

    /// The same; it must succeed.
    fn ok(&self, line: &str) -> String {
        let output = self.run(line);
        assert!(output.status.success(), "{line}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The same; it must fail with one line that ends in these words.
    fn fails(&self, line: &str, words: &str) {
        let output = self.run(line);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{line}: {output:?}");
        assert_eq!(errors.lines().count(), 1, "{line}: {errors}");
        assert!(errors.trim_end().ends_with(words), "{line}: {errors}");
    }

    /// Makes a base file at `base`, and a disk at `disk` over it that holds every other 64 KiB.
    fn make(&self, base: &str, disk: &str) {
        let base_path = self.dir.path().join(base);
        fs::write(&base_path, data(0x40, SIZE)).expect("the base file");
        self.make_overlay(&base_path, disk);
    }

    /// Makes a disk at `disk` over a base file that holds every other 64 KiB.
    fn make_overlay(&self, base: &Path, disk: &str) {
        let base = base.display();
        self.ok(&format!("create -q -b {base} -F raw --cluster-size 64k {disk}.add-cow 8M"));
        let raw = File::options().write(true).open(self.dir.path().join(format!("{disk}.raw")));
        let raw = raw.expect("the raw image");
        for cluster in (0..SIZE as u64 >> 16).step_by(2) {
            raw.write_all_at(&data(0x80, 1 << 16), cluster << 16).expect("a cluster");
        }
        let side =
            File::options().write(true).open(self.dir.path().join(format!("{disk}.add-cow")));
        side.expect("the add-cow file").write_all_at(&[0x55; SIZE >> 19], 1 << 16).expect("bits");
        self.ok(&format!("convert {disk}.add-cow flat.img"));
    }

    /// Fails unless the disk shows what it showed when it was made.
    fn is_unchanged(&self, disk: &str) {
        let said = self.ok(&format!("compare -F raw {disk}.add-cow flat.img"));
        assert_eq!(said, "Images are identical.\n");
        let said = self.ok(&format!("check {disk}.add-cow"));
        assert!(said.starts_with("No errors"), "{said}");
    }

    /// How many clusters a disk holds.
    fn allocated(&self, disk: &str) -> u64 {
        let said = self.ok(&format!("check --output=json {disk}.add-cow"));
        let said: serde_json::Value = serde_json::from_str(&said).expect("JSON");
        said["allocated-clusters"].as_u64().expect("a number")
    }

    /// The names in the folder of small files.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.small).expect("a folder");
        let name = |entry: fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
        let mut names: Vec<String> = entries.map(|entry| name(entry.expect("an entry"))).collect();
        names.sort();
        names
    }

    /// Mounts a tmpfs of `size` over the folder of small files; `None`, and a line that is seen,
    /// where that is not allowed.
    fn mount(&self, test: &str, size: &str) -> Option<Mounted> {
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(&self.small);
        match command.output() {
            Ok(output) if output.status.success() => Some(Mounted(self.small.clone())),
            _ => {
                // Not eprintln, which the harness captures.
                let line = format!("SKIPPED {test}: no right to mount\n");
                stderr().write_all(line.as_bytes()).expect("standard error");
                None
            }
        }
    }

    /// Starts the tool with `-p`, and sends it SIGINT in the middle of its work.
    fn interrupt(&self, line: &str) -> (ExitStatus, String) {
        let (mut reader, mut writer) = std::io::pipe().expect("a pipe");
        // As much as a pipe takes, less two lines of progress.
        let filled = (64 << 10) - 40;
        writer.write_all(&vec![b' '; filled]).expect("a pipe of the usual size");
        let mut command = Command::new(TOOL);
        command.args(line.split_whitespace()).current_dir(self.dir.path());
        let mut child =
            command.stdout(writer).stderr(Stdio::piped()).spawn().expect("run the tool");
        drop(command);
        wait_until_full(&mut child, &reader, filled);
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("send SIGINT");
        let mut progress = String::new();
        reader.read_to_string(&mut progress).expect("its progress");
        let output = child.wait_with_output().expect("its end");
        (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// The same; it must end by that signal.
    fn interrupted(&self, line: &str) {
        let (status, errors) = self.interrupt(line);
        assert_eq!(status.signal(), Some(2), "{line}: {status} {errors}");
        assert_eq!(errors, "addcow: interrupted\n", "{line}");
    }
}

/// Waits until the tool has written two lines of progress, and has come to the third, for which
/// there is no room.
fn wait_until_full(child: &mut Child, reader: &PipeReader, filled: usize) {
    let start = Instant::now();
    let is_full = || {
        let readable = rustix::io::ioctl_fionread(reader).expect("how much is in the pipe");
        readable >= filled as u64 + 32
    };
    while !is_full() {
        assert!(child.try_wait().expect("wait").is_none(), "it has ended too early");
        assert!(start.elapsed() < TIMEOUT, "no progress");
        std::thread::sleep(Duration::from_millis(1));
    }
    // It may be a moment before it really waits.
    std::thread::sleep(Duration::from_millis(20));
}

/// A mounted folder.
struct Mounted(PathBuf);

impl Mounted {
    /// Gives it another size.
    fn resize(&self, size: &str) {
        self.remount(&format!("size={size}"));
    }

    /// Changes an option.
    fn remount(&self, option: &str) {
        let mut command = Command::new("mount");
        let output = command.args(["-o", &format!("remount,{option}")]).arg(&self.0).output();
        assert!(output.expect("mount").status.success());
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(&self.0).output());
    }
}

/// The words of a full disk.
const FULL: &str = "No space left on device";

#[test]
fn a_stream_without_space_is_finished_when_there_is_some() {
    let lab = Lab::new();
    let Some(mounted) = lab.mount("a_stream_without_space", "6M") else { return };
    lab.make("base.img", "disk");
    // On the small disk is the raw image, with every other cluster.
    let raw = lab.dir.path().join("disk.raw");
    let moved = lab.small.join("disk.raw");
    assert!(Command::new("cp").arg("--sparse=always").args([&raw, &moved]).status().is_ok());
    fs::remove_file(&raw).expect("it was copied");
    std::os::unix::fs::symlink(&moved, &raw).expect("a link");
    lab.is_unchanged("disk");
    let before = lab.allocated("disk");
    lab.fails("stream disk.add-cow", FULL);
    lab.is_unchanged("disk");
    assert!(lab.allocated("disk") > before, "what was copied is kept");
    mounted.resize("16M");
    lab.ok("stream disk.add-cow");
    lab.is_unchanged("disk");
    assert_eq!(lab.allocated("disk"), SIZE as u64 >> 16);
}

#[test]
fn a_commit_without_space_is_finished_when_there_is_some() {
    let lab = Lab::new();
    let Some(mounted) = lab.mount("a_commit_without_space", "2M") else { return };
    let base = lab.small.join("base.img");
    File::create(&base).and_then(|file| file.set_len(1 << 20)).expect("the base file");
    lab.make_overlay(&base, "disk");
    let before = lab.allocated("disk");
    lab.fails("commit disk.add-cow", FULL);
    lab.is_unchanged("disk");
    assert_eq!(lab.allocated("disk"), before, "nothing was taken out of the disk");
    mounted.resize("16M");
    lab.ok("commit disk.add-cow");
    lab.is_unchanged("disk");
    assert_eq!(lab.allocated("disk"), 0);
}

#[test]
fn a_conversion_without_space_leaves_nothing() {
    let lab = Lab::new();
    let Some(mounted) = lab.mount("a_conversion_without_space", "2M") else { return };
    lab.make("base.img", "disk");
    let lines = [
        "convert disk.add-cow small/new.img",
        "convert -S 0 disk.add-cow small/new.img",
        "convert -O add-cow disk.add-cow small/new.add-cow",
        "convert -O add-cow -B ../base.img -F raw disk.add-cow small/new.add-cow",
    ];
    for line in lines {
        lab.fails(line, FULL);
        assert_eq!(lab.names(), [""; 0], "{line}");
    }
    // What was there stays.
    fs::write(lab.small.join("new.img"), b"old").expect("a small file");
    lab.fails("convert --force disk.add-cow small/new.img", FULL);
    assert_eq!(lab.names(), ["new.img"]);
    assert_eq!(fs::read(lab.small.join("new.img")).expect("the file"), b"old");
    mounted.resize("32M");
    lab.ok("convert --force disk.add-cow small/new.img");
    for line in &lines[2..] {
        lab.ok(line);
        assert_eq!(lab.ok("compare disk.add-cow small/new.add-cow"), "Images are identical.\n");
        fs::remove_file(lab.small.join("new.add-cow")).expect("it is there");
        fs::remove_file(lab.small.join("new.raw")).expect("it is there");
    }
}

#[test]
fn a_read_only_file_system_is_named_and_read() {
    let lab = Lab::new();
    let Some(mounted) = lab.mount("a_read_only_file_system", "32M") else { return };
    lab.make("small/base.img", "small/disk");
    let data_file = format!("data_file={},data_file_raw=on", lab.small.join("data.img").display());
    let mut qemu_img = Command::new("qemu-img");
    qemu_img.args(["create", "-q", "-f", "qcow2", "-o", &data_file]);
    let qemu_img = qemu_img.arg(lab.small.join("old.qcow2")).arg("1M").status();
    mounted.remount("ro");
    let before = lab.names();
    for line in [
        "create small/new.add-cow 1M",
        "create --force -b base.img -F raw small/disk.add-cow",
        "check -r all small/disk.add-cow",
        "resize small/disk.add-cow +1M",
        "resize --shrink small/disk.add-cow 1M",
        "rebase -b none.img -F raw small/disk.add-cow",
        "rebase -u -b base.img -F raw small/disk.add-cow",
        "snapshot small/disk.add-cow small/new.add-cow",
        "reset small/disk.add-cow",
        "detach small/disk.add-cow",
        "stream small/disk.add-cow",
        "commit small/disk.add-cow",
        "convert small/disk.add-cow small/new.img",
        "convert -O add-cow small/disk.add-cow small/new.add-cow",
        "export small/disk.add-cow small/new.qcow2",
    ] {
        lab.fails(line, "Read-only file system");
    }
    if qemu_img.is_ok_and(|status| status.success()) {
        lab.fails("adopt --data-file small/data.img small/old.qcow2", "Read-only file system");
    }
    assert_eq!(lab.names(), before);
    for line in ["info", "check", "map", "measure"] {
        lab.ok(&format!("{line} small/disk.add-cow"));
    }
    lab.is_unchanged("small/disk");
}

#[test]
fn an_interrupted_stream_is_finished_by_the_next() {
    let lab = Lab::new();
    lab.make("base.img", "disk");
    let before = lab.allocated("disk");
    lab.interrupted("stream -p disk.add-cow");
    lab.is_unchanged("disk");
    let between = lab.allocated("disk");
    assert!(before < between && between < SIZE as u64 >> 16, "{before}, then {between}");
    lab.ok("stream disk.add-cow");
    lab.is_unchanged("disk");
    assert_eq!(lab.allocated("disk"), SIZE as u64 >> 16);
}

#[test]
fn an_interrupted_commit_is_finished_by_the_next() {
    let lab = Lab::new();
    lab.make("base.img", "disk");
    let before = lab.allocated("disk");
    lab.interrupted("commit -p disk.add-cow");
    lab.is_unchanged("disk");
    assert_eq!(lab.allocated("disk"), before);
    lab.ok("commit disk.add-cow");
    lab.is_unchanged("disk");
    assert_eq!(lab.allocated("disk"), 0);
}

#[test]
fn an_interrupted_conversion_leaves_nothing() {
    let lab = Lab::new();
    lab.make("base.img", "disk");
    for line in [
        "convert -p disk.add-cow small/new.img",
        "convert -p -O add-cow disk.add-cow small/new.add-cow",
        "convert -p -O add-cow -B ../base.img -F raw disk.add-cow small/new.add-cow",
    ] {
        lab.interrupted(line);
        assert_eq!(lab.names(), [""; 0], "{line}");
    }
    lab.interrupted("compare -p -F raw disk.add-cow flat.img");
    lab.is_unchanged("disk");
}

/// Of a qcow2 file with small clusters a look-up tells 32 KiB, so to skip what is not there takes
/// long.
#[test]
fn a_job_that_only_skips_shows_its_progress_and_may_be_interrupted() {
    let lab = Lab::new();
    let mut qemu_img = Command::new("qemu-img");
    qemu_img.args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "empty.qcow2", "1G"]);
    if !qemu_img.current_dir(lab.dir.path()).status().is_ok_and(|status| status.success()) {
        let line = b"SKIPPED a_job_that_only_skips: no qemu-img\n";
        stderr().write_all(line).expect("standard error");
        return;
    }
    File::create(lab.dir.path().join("empty.img")).expect("an empty file");
    for line in [
        "convert -p -f qcow2 empty.qcow2 small/new.img",
        "convert -p -f qcow2 -O add-cow -B ../empty.img -F raw empty.qcow2 small/new.add-cow",
        "compare -p -f qcow2 -F raw empty.qcow2 empty.img",
    ] {
        lab.interrupted(line);
        assert_eq!(lab.names(), [""; 0], "{line}");
    }
}
