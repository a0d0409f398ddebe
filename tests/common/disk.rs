//! Disks in a temporary folder and the daemon that serves them.
//!
//! A [`Disk`] is made with the image tool over a base file whose every sector is different; the
//! raw image exists before, full of bytes that no guest may ever see. [`Disk::flat_view`] reads
//! the files by the published format, without the code under test. A [`Daemon`] is killed when
//! it goes out of scope, and its messages are shown when the test fails.
//!
//! Not here: talking to the daemon (see `guest`).

use std::ffi::OsString;
use std::fs::{DirEntry, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::guest::{Guest, Setup};
use super::{SECTOR, TIMEOUT, pattern, to_u64, to_usize};

/// The daemon under test.
pub const DAEMON: &str = env!("CARGO_BIN_EXE_addcowd");
/// The image tool under test.
pub const TOOL: &str = env!("CARGO_BIN_EXE_addcow");

/// What the raw image holds where nothing is allocated.
const GARBAGE: u8 = 0xdb;

/// Seed of the base file's content.
const BASE_SEED: u64 = 0xba5e;

/// What a disk is made of.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Virtual size in bytes.
    pub size: u64,
    /// Length of the base file in bytes; none without a base.
    pub base: Option<u64>,
    /// How much of the base file is filled from its start, in bytes; the rest is a hole.
    pub base_filled: u64,
    /// Cluster size in bytes.
    pub cluster: u64,
    /// Whether the raw image is full of garbage before the disk is made.
    pub garbage: bool,
    /// Whether the files lie on tmpfs, where the daemon moves data without system calls.
    pub in_memory: bool,
}

impl Shape {
    /// A disk of `size` bytes over a filled base of the same size.
    pub fn new(size: u64, cluster: u64) -> Self {
        Self { size, base: Some(size), base_filled: size, cluster, garbage: true, in_memory: false }
    }

    /// With a base of `len` bytes instead.
    pub fn base(self, len: u64) -> Self {
        Self { base: Some(len), base_filled: len, ..self }
    }

    /// Without a base.
    pub fn no_base(self) -> Self {
        Self { base: None, base_filled: 0, garbage: false, ..self }
    }

    /// On tmpfs.
    pub fn in_memory(self) -> Self {
        Self { in_memory: true, ..self }
    }

    /// With a base that is a hole after `filled` bytes, and a raw image that is one hole.
    pub fn sparse(self, filled: u64) -> Self {
        Self { base_filled: filled, garbage: false, ..self }
    }
}

/// An add-cow disk and the folder that holds its files.
#[derive(Debug)]
pub struct Disk {
    /// The folder; removed at the end.
    dir: TempDir,
    /// What it was made of.
    pub shape: Shape,
}

impl Disk {
    /// Makes a disk with the image tool.
    pub fn create(shape: Shape) -> Self {
        let folder = if shape.in_memory { "/dev/shm".into() } else { std::env::temp_dir() };
        let dir = tempfile::tempdir_in(folder).expect("a temporary folder");
        let disk = Self { dir, shape };
        let raw = File::create(disk.path("disk.raw")).expect("the raw image");
        if disk.shape.garbage {
            raw.write_all_at(&vec![GARBAGE; to_usize(disk.shape.size)], 0).expect("garbage");
        }
        raw.set_len(disk.shape.size).expect("size of the raw image");
        let mut command = Command::new(TOOL);
        command.current_dir(disk.dir.path()).arg("create");
        if let Some(len) = disk.shape.base {
            let base = File::create(disk.path("base.img")).expect("the base file");
            let bytes = pattern(BASE_SEED, 0, to_usize(disk.shape.base_filled));
            base.write_all_at(&bytes, 0).expect("content of the base file");
            base.set_len(len).expect("size of the base file");
            command.args(["-b", "base.img", "-F", "raw"]);
        }
        command.args(["-i", "disk.raw"]);
        command.args(["--cluster-size", &disk.shape.cluster.to_string(), "disk.add-cow"]);
        command.arg(disk.shape.size.to_string());
        let output = command.output().expect("run the image tool");
        assert!(output.status.success(), "create failed: {output:?}");
        disk
    }

    /// A small disk of 64 KiB clusters over a base of the same size, enough for most tests.
    pub fn small() -> Self {
        Self::create(Shape::new(4 << 20, 64 << 10))
    }

    /// The path of file `name` in the disk's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// How many sectors the disk has.
    pub fn sectors(&self) -> u64 {
        self.shape.size / to_u64(SECTOR)
    }

    /// What a guest sees before it has written anything, for small disks.
    pub fn initial(&self) -> Vec<u8> {
        let size = to_usize(self.shape.size);
        let mut bytes = pattern(BASE_SEED, 0, to_usize(self.shape.base_filled));
        bytes.resize(size, 0);
        bytes
    }

    /// What the base file holds at `offset`.
    pub fn base_bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let base = File::open(self.path("base.img")).expect("the base file");
        base.read_exact_at(&mut bytes, offset).expect("read the base file");
        bytes
    }

    /// The whole base file.
    pub fn base_file(&self) -> Vec<u8> {
        std::fs::read(self.path("base.img")).expect("read the base file")
    }

    /// The disk as its files say, read by the format's own rules: a set bit means that the raw
    /// image holds the cluster, a clear one that the base does, with zeros beyond its end.
    pub fn flat_view(&self) -> Vec<u8> {
        let side = std::fs::read(self.path("disk.add-cow")).expect("the add-cow file");
        assert_eq!(&side[..4], b"ACOW", "magic");
        let word = |at: usize| u32::from_le_bytes(side[at..at + 4].try_into().expect("4 bytes"));
        let cluster = 1usize << word(20);
        let bitmap = &side[usize::try_from(word(40)).expect("header size")..];
        let all_allocated = word(32) & 1 != 0;
        let raw = std::fs::read(self.path("disk.raw")).expect("the raw image");
        let mut view = if self.shape.base.is_some() { self.base_file() } else { Vec::new() };
        view.resize(raw.len(), 0);
        for (index, piece) in raw.chunks(cluster).enumerate() {
            if all_allocated || bitmap[index / 8] >> (index % 8) & 1 == 1 {
                view[index * cluster..][..piece.len()].copy_from_slice(piece);
            }
        }
        view
    }

    /// The disk's folder.
    pub fn folder(&self) -> &Path {
        self.dir.path()
    }

    /// Starts a daemon on this disk with `options` besides the disk and the socket.
    pub fn serve(&self, options: &[&str]) -> Daemon {
        let mut args = vec!["--blk-file", "disk.add-cow", "--socket-path", "sock"];
        args.extend_from_slice(options);
        Daemon::spawn(self.dir.path(), &args, None)
    }

    /// Starts a daemon in place of one that was killed, as a supervisor does: again, while what the
    /// old one had open is still in use. That may take as long as its last I/O.
    pub fn serve_after_kill(&self, options: &[&str]) -> (Daemon, UnixStream) {
        let end = Instant::now() + TIMEOUT;
        loop {
            let mut daemon = self.serve(options);
            match daemon.try_connect() {
                Ok(stream) => return (daemon, stream),
                Err(said) if said.contains("in use") && Instant::now() < end => {}
                Err(said) => panic!("the daemon does not come back: {said}"),
            }
        }
    }

    /// Starts a daemon on the raw image alone.
    pub fn serve_raw(&self, options: &[&str]) -> Daemon {
        let mut args = vec!["--format", "raw", "--blk-file", "disk.raw", "--socket-path", "sock"];
        args.extend_from_slice(options);
        Daemon::spawn(self.dir.path(), &args, None)
    }

    /// Starts a daemon that gets its socket as descriptor 0.
    pub fn serve_fd(&self, socket: OwnedFd) -> Daemon {
        let args = ["--blk-file", "disk.add-cow", "--fd", "0"];
        Daemon::spawn(self.dir.path(), &args, Some(socket))
    }

    /// Runs the daemon with `args` to its end, which has to come within the time limit.
    pub fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(DAEMON);
        command.args(args).current_dir(self.dir.path());
        run_to_end(command)
    }
}

/// Runs `command` to its end.
///
/// # Panics
/// If it still runs after the time limit; it is killed then.
pub fn run_to_end(mut command: Command) -> Output {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("run a program");
    if wait_for_exit(&mut child, TIMEOUT).is_none() {
        let _ = child.kill();
        let output = child.wait_with_output();
        panic!("{command:?} does not end: {output:?}");
    }
    child.wait_with_output().expect("its output")
}

/// Waits for `child` to end; none when it still runs after `limit`.
fn wait_for_exit(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let end = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().expect("wait for a process") {
            return Some(status);
        }
        if Instant::now() >= end {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    /// The process.
    child: Child,
    /// Its socket, if it has a path.
    pub socket: PathBuf,
    /// What it prints on standard error.
    stderr: File,
}

impl Daemon {
    /// Starts the daemon in `dir` with `args` and perhaps a socket as standard input.
    pub fn spawn(dir: &Path, args: &[&str], socket: Option<OwnedFd>) -> Self {
        // Sanitizers make system calls of their own: scripts/sanitize turns the sandbox off.
        let more = std::env::var("ADDCOW_DAEMON_OPTIONS").unwrap_or_default();
        let mut command = Command::new(DAEMON);
        command.args(args).args(more.split_whitespace());
        Self::spawn_by(command, dir, socket)
    }

    /// The same by a command that becomes the daemon.
    pub fn spawn_by(mut command: Command, dir: &Path, socket: Option<OwnedFd>) -> Self {
        let stderr = tempfile::tempfile().expect("a temporary file");
        let child = command
            .current_dir(dir)
            .stdin(socket.map_or_else(Stdio::null, Stdio::from))
            .stdout(Stdio::null())
            .stderr(stderr.try_clone().expect("another descriptor"))
            .spawn()
            .expect("start the daemon");
        Self { child, socket: dir.join("sock"), stderr }
    }

    /// A connection to its socket, as soon as it listens.
    pub fn connect(&mut self) -> UnixStream {
        self.try_connect().unwrap_or_else(|said| panic!("the daemon has ended: {said}"))
    }

    /// The same, or what it said if it has ended.
    pub fn try_connect(&mut self) -> Result<UnixStream, String> {
        let end = Instant::now() + TIMEOUT;
        loop {
            let error = match UnixStream::connect(&self.socket) {
                Ok(stream) => return Ok(stream),
                Err(error) => error,
            };
            if let Some(status) = self.child.try_wait().expect("wait for the daemon") {
                return Err(format!("{status}: {}", self.messages()));
            }
            assert!(Instant::now() < end, "cannot connect within {TIMEOUT:?}: {error}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// A guest with everything negotiated and its rings running.
    pub fn guest(&mut self, setup: Setup) -> Guest {
        Guest::start(self.connect(), setup)
    }

    /// What it has printed on standard error so far.
    pub fn messages(&mut self) -> String {
        let mut text = String::new();
        let _ = self.stderr.seek(SeekFrom::Start(0));
        let _ = self.stderr.read_to_string(&mut text);
        text
    }

    /// Whether the process still runs.
    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().expect("wait for the daemon").is_none()
    }

    /// Its process number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How many files it has open.
    pub fn open_files(&self) -> usize {
        let dir = format!("/proc/{}/fd", self.child.id());
        std::fs::read_dir(dir).expect("its open files").count()
    }

    /// How many files and threads it has when a front end is connected that has no rings. Its
    /// first message is answered only when nothing is left of the connection before.
    pub fn footprint(&mut self) -> (usize, usize) {
        let guest = Guest::negotiate(self.connect(), Setup::queues(0, 64));
        let counts = (self.open_files(), self.threads());
        drop(guest);
        counts
    }

    /// How many threads it has.
    pub fn threads(&self) -> usize {
        self.thread_ids().len()
    }

    /// The IDs of its threads.
    pub fn thread_ids(&self) -> Vec<i32> {
        let dir = format!("/proc/{}/task", self.child.id());
        let name = |entry: std::io::Result<DirEntry>| entry.expect("a thread").file_name();
        let number = |name: OsString| name.to_str().and_then(|name| name.parse().ok());
        let entries = std::fs::read_dir(dir).expect("its threads");
        entries.map(|entry| number(name(entry)).expect("a number")).collect()
    }

    /// The address at which it has mapped the byte at an offset of the file of an inode number:
    /// the only one.
    pub fn address_of(&self, (inode, offset): (u64, u64)) -> u64 {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.child.id()));
        // proc_pid_maps(5): addresses, permissions, offset, device, inode, name.
        let address = |line: &str| {
            let fields: Vec<_> = line.split_whitespace().collect();
            let hex = |text: &str| u64::from_str_radix(text, 16).expect("a hexadecimal number");
            let (start, end) = fields[0].split_once('-').expect("a range of addresses");
            let (start, end, from) = (hex(start), hex(end), hex(fields[2]));
            if fields[4].parse() != Ok(inode) {
                return None;
            }
            let address = start + offset.checked_sub(from)?;
            (address < end).then_some(address)
        };
        let found: Vec<u64> = maps.expect("its mappings").lines().filter_map(address).collect();
        assert_eq!(found.len(), 1, "places of offset {offset:#x}: {found:x?}");
        found[0]
    }

    /// How much processor time it has used so far, in ticks of usually 10 ms.
    pub fn cpu_ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()));
        let stat = stat.expect("its statistics");
        // The name in parentheses may hold anything; utime and stime are fields 14 and 15.
        let rest = stat.rsplit(')').next().expect("fields after the name");
        let fields = rest.split_whitespace().skip(11).take(2);
        fields.map(|field| field.parse::<u64>().expect("a number")).sum()
    }

    /// Memory of its own, in bytes: not what it shares with guests or files.
    pub fn own_memory(&self) -> u64 {
        self.status("RssAnon:")
    }

    /// A size in bytes out of its status (proc_pid_status(5)).
    pub fn status(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let status = status.expect("its status");
        let line = status.lines().find(|line| line.starts_with(name)).expect(name);
        let kib = line.split_whitespace().nth(1).expect("a number");
        kib.parse::<u64>().expect("a number") * 1024
    }

    /// Its process ID.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("send a signal");
    }

    /// Asks it to end with SIGTERM and waits at most `limit`.
    pub fn terminate(&mut self, limit: Duration) -> ExitStatus {
        self.signal(Signal::TERM);
        wait_for_exit(&mut self.child, limit)
            .unwrap_or_else(|| panic!("still there {limit:?} after SIGTERM"))
    }

    /// Kills it, as the kernel does that is out of memory.
    pub fn kill(&mut self) {
        self.child.kill().expect("send SIGKILL");
        self.child.wait().expect("wait for the daemon");
    }

    /// Ends it as an operator would; the files are complete afterwards.
    pub fn stop(mut self) {
        let status = self.terminate(Duration::from_secs(2));
        assert_eq!(status.code(), Some(0), "exit code after SIGTERM");
    }

    /// Waits until it ends by itself.
    pub fn wait(&mut self) -> ExitStatus {
        wait_for_exit(&mut self.child, TIMEOUT).expect("the daemon ends by itself")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            println!("the daemon said:\n{}", self.messages());
        }
    }
}
