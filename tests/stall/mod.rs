//! A file whose reads can be made to wait: what a disk that hangs does to those who use it.
//!
//! It is a FUSE file system of one file that is only read. While the gate is closed reads are taken
//! and not answered, all others are; when it opens, those that wait are answered. Questions for its
//! attributes can be made to wait, too. Not here: errors and power cuts (`powercut/recorder.rs`).

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use fuser::consts::FOPEN_DIRECT_IO;
use fuser::{
    BackgroundSession, FileAttr, FileType, Filesystem, MountOption, ReplyAttr, ReplyData,
    ReplyEntry, ReplyOpen, Request, spawn_mount2,
};
use rustix::mount::{UnmountFlags, unmount};
use tempfile::TempDir;

/// Name of the file.
pub const NAME: &str = "base.img";

/// The kernel asks again each time.
const NO_TIME: Duration = Duration::ZERO;

/// The inode of the folder (FUSE's own rule).
const FOLDER: u64 = 1;

/// The inode of the file.
const FILE: u64 = 2;

/// What the file system and the test share.
struct State {
    /// Length of the file in bytes.
    len: u64,
    /// Which reads wait, by their offset; none when the gate is open.
    waits: Option<fn(u64) -> bool>,
    /// The reads that wait: offset, length, and where the answer goes.
    waiting: VecDeque<(u64, u64, ReplyData)>,
    /// Whether questions for attributes wait.
    attributes_wait: bool,
    /// Those that do: inode, and where the answer goes.
    asked: Vec<(u64, ReplyAttr)>,
}

impl State {
    /// Answers a read. The byte at each offset is a function of it.
    fn answer(&self, offset: u64, len: u64, reply: ReplyData) {
        let end = self.len.min(offset.saturating_add(len));
        let bytes: Vec<u8> = (offset.min(end)..end).map(byte_at).collect();
        reply.data(&bytes);
    }
}

/// What the file holds at `offset`.
pub fn byte_at(offset: u64) -> u8 {
    u8::try_from((offset / 512).wrapping_mul(37) % 251).expect("less than 251") + 1
}

/// The server's side.
struct Server(Arc<Mutex<State>>);

impl Server {
    /// The attributes of an inode.
    fn attributes(&self, inode: u64) -> FileAttr {
        let is_folder = inode == FOLDER;
        let size = if is_folder { 0 } else { self.0.lock().expect("state").len };
        FileAttr {
            ino: inode,
            size,
            blocks: size / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_folder { FileType::Directory } else { FileType::RegularFile },
            perm: if is_folder { 0o755 } else { 0o444 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Server {
    fn lookup(&mut self, _: &Request<'_>, parent: u64, name: &OsStr, reply: ReplyEntry) {
        if parent == FOLDER && name == NAME {
            reply.entry(&NO_TIME, &self.attributes(FILE), 0);
        } else {
            reply.error(libc::ENOENT);
        }
    }

    fn getattr(&mut self, _: &Request<'_>, inode: u64, _: Option<u64>, reply: ReplyAttr) {
        let mut state = self.0.lock().expect("state");
        if state.attributes_wait {
            return state.asked.push((inode, reply));
        }
        drop(state);
        reply.attr(&NO_TIME, &self.attributes(inode));
    }

    fn open(&mut self, _: &Request<'_>, _inode: u64, _flags: i32, reply: ReplyOpen) {
        reply.opened(0, FOPEN_DIRECT_IO);
    }

    fn read(
        &mut self,
        _: &Request<'_>,
        _inode: u64,
        _fh: u64,
        offset: i64,
        size: u32,
        _flags: i32,
        _lock_owner: Option<u64>,
        reply: ReplyData,
    ) {
        let offset = u64::try_from(offset).expect("the kernel's own check");
        let mut state = self.0.lock().expect("state");
        if state.waits.is_some_and(|waits| waits(offset)) {
            state.waiting.push_back((offset, u64::from(size), reply));
        } else {
            state.answer(offset, u64::from(size), reply);
        }
    }
}

/// The mounted file; unmounted when it goes.
pub struct Stall {
    /// What both sides share.
    state: Arc<Mutex<State>>,
    /// Where it is mounted.
    dir: TempDir,
    /// The server's thread.
    _session: BackgroundSession,
}

impl Stall {
    /// Mounts a file of `len` bytes, with the gate open. `None`, said loudly, without the right to
    /// mount.
    pub fn mount(len: u64) -> Option<Self> {
        let (waiting, asked) = (VecDeque::new(), Vec::new());
        let state = State { len, waits: None, waiting, attributes_wait: false, asked };
        let state = Arc::new(Mutex::new(state));
        let dir = tempfile::tempdir().expect("a folder");
        let options = [MountOption::FSName("stall".into()), MountOption::RO];
        match spawn_mount2(Server(Arc::clone(&state)), dir.path(), &options) {
            Ok(session) => Some(Self { state, dir, _session: session }),
            Err(error) => {
                println!("SKIPPED: cannot mount a file system: {error}");
                assert!(std::env::var_os("CI").is_none(), "CI can mount");
                None
            }
        }
    }

    /// The path of the file.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join(NAME)
    }

    /// Closes the gate: reads at the offsets of which `waits` says so wait from now on, at most
    /// until what is returned goes. A process that waits for the file cannot even be killed, so
    /// that has to go before anybody waits for the process.
    pub fn close(&self, waits: fn(u64) -> bool) -> Closed<'_> {
        self.state.lock().expect("state").waits = Some(waits);
        Closed(self)
    }

    /// The same for questions about the file: a server that answers nothing at all.
    pub fn close_for_questions(&self) -> Closed<'_> {
        self.state.lock().expect("state").attributes_wait = true;
        Closed(self)
    }

    /// How many reads wait.
    pub fn waiting(&self) -> usize {
        self.state.lock().expect("state").waiting.len()
    }

    /// Opens the gate and answers those that wait.
    pub fn open(&self) {
        let mut state = self.state.lock().expect("state");
        state.waits = None;
        while let Some((offset, len, reply)) = state.waiting.pop_front() {
            state.answer(offset, len, reply);
        }
        state.attributes_wait = false;
        let asked = std::mem::take(&mut state.asked);
        drop(state);
        let server = Server(Arc::clone(&self.state));
        for (inode, reply) in asked {
            reply.attr(&NO_TIME, &server.attributes(inode));
        }
    }
}

/// The gate is closed, unless it was opened since.
pub struct Closed<'a>(&'a Stall);

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.0.open();
    }
}

impl Drop for Stall {
    fn drop(&mut self) {
        unmount(self.dir.path(), UnmountFlags::DETACH).ok();
    }
}
