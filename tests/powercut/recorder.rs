//! A file system in memory that notes in one order everything that is done to its files: what a
//! real program is put on to see what a power cut would leave of it.
//!
//! It is a FUSE file system, served by one thread of the test, with direct I/O on every file: the
//! kernel keeps nothing back, so what a program writes is here before the program hears of it, and
//! a sync comes after the writes that it covers. Any operation can be told to fail.
//!
//! The files are there from the start; none is made, renamed or removed. Not here: what is durable
//! when (the simulated disk of the tests knows), more than one folder, times, owners.

#![allow(dead_code, reason = "each test file uses its own part of it")]

use std::ffi::OsStr;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::consts::FOPEN_DIRECT_IO;
use fuser::{
    BackgroundSession, FileAttr, FileType, Filesystem, MountOption, ReplyAttr, ReplyData,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, TimeOrNow, spawn_mount2,
};
use rustix::mount::{UnmountFlags, unmount};
use tempfile::TempDir;

/// The device through which the kernel talks to the file system.
const DEVICE: &str = "/dev/fuse";

/// The kernel asks again each time: nothing is kept.
const NO_TIME: Duration = Duration::ZERO;

/// The inode of the folder (FUSE's own rule).
const FOLDER: u64 = 1;

/// The inode of file number 0.
const FIRST_FILE: u64 = 2;

/// `FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE` (fallocate(2)).
const PUNCH_HOLE: i32 = 3;

/// `FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE`.
const ZERO_RANGE: i32 = 0x11;

/// Something that was done to a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// These bytes were written at this offset.
    Write(u64, Vec<u8>),
    /// So many bytes from this offset on were made zeros.
    Zero(u64, u64),
    /// The file was cut or grown to this length.
    SetLen(u64),
    /// Everything before was made durable.
    Sync,
}

/// A change, and the number of the file it was made to.
pub type Event = (usize, Change);

/// Which operation goes wrong.
#[derive(Debug, Clone, Copy)]
pub struct Failure {
    /// Its number, counted from 0 when this is set.
    pub index: u64,
    /// The error's number.
    pub code: i32,
    /// Whether every later one goes wrong too.
    pub lasting: bool,
}

/// What the file system and the test share.
#[derive(Debug, Default)]
struct State {
    /// Names and contents of the files by number.
    files: Vec<(String, Vec<u8>)>,
    /// Whether files that are opened can be mapped, by the kernel's keeping their pages.
    cached: bool,
    /// What was done.
    events: Vec<Event>,
    /// Operations on files' contents since a failure was set: opening, reading, changing, syncing.
    operations: u64,
    /// What goes wrong.
    failure: Option<Failure>,
    /// How many operations went wrong.
    failed: u64,
    /// How many of them were syncs.
    failed_syncs: u64,
}

impl State {
    /// Counts an operation in; the error it ends with, if it is to go wrong.
    fn begin(&mut self) -> Result<(), i32> {
        let index = self.operations;
        self.operations += 1;
        let hit = |f: &Failure| f.index == index || f.lasting && index > f.index;
        match self.failure.filter(hit) {
            Some(failure) => {
                self.failed += 1;
                Err(failure.code)
            }
            None => Ok(()),
        }
    }

    /// The content of the file with this inode.
    fn content(&mut self, inode: u64) -> Result<(usize, &mut Vec<u8>), i32> {
        let number = inode.checked_sub(FIRST_FILE).and_then(|number| usize::try_from(number).ok());
        let number = number.ok_or(libc::EISDIR)?;
        let (_, bytes) = self.files.get_mut(number).ok_or(libc::ENOENT)?;
        Ok((number, bytes))
    }

    /// What stat(2) says of an inode.
    fn attributes(&mut self, inode: u64) -> Result<FileAttr, i32> {
        let is_folder = inode == FOLDER;
        let size = if is_folder { 0 } else { self.content(inode)?.1.len() as u64 };
        Ok(FileAttr {
            ino: inode,
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_folder { FileType::Directory } else { FileType::RegularFile },
            perm: if is_folder { 0o700 } else { 0o600 },
            nlink: 1,
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            rdev: 0,
            blksize: 512,
            flags: 0,
        })
    }

    /// Makes a change and notes it.
    fn change(&mut self, inode: u64, change: Change) -> Result<(), i32> {
        let begun = self.begin();
        self.failed_syncs += u64::from(begun.is_err() && change == Change::Sync);
        begun?;
        let (number, bytes) = self.content(inode)?;
        match &change {
            Change::Write(offset, data) => {
                let start = to_usize(*offset)?;
                let end = start + data.len();
                bytes.resize(bytes.len().max(end), 0);
                bytes[start..end].copy_from_slice(data);
            }
            Change::Zero(offset, len) => {
                // Neither way changes the length.
                let start = to_usize(*offset)?.min(bytes.len());
                let end = to_usize(offset + len)?.min(bytes.len());
                bytes[start..end].fill(0);
            }
            Change::SetLen(len) => bytes.resize(to_usize(*len)?, 0),
            Change::Sync => {}
        }
        self.events.push((number, change));
        Ok(())
    }
}

/// An offset as an index.
fn to_usize(offset: impl TryInto<usize>) -> Result<usize, i32> {
    offset.try_into().map_err(|_| libc::EFBIG)
}

/// The side of the file system that the kernel talks to.
struct Server(Arc<Mutex<State>>);

impl Server {
    /// The shared state.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no panic while held")
    }

    /// Makes a change; the answer has no content.
    fn change(&self, inode: u64, change: Change, reply: ReplyEmpty) {
        match self.state().change(inode, change) {
            Ok(()) => reply.ok(),
            Err(code) => reply.error(code),
        }
    }

    /// Answers with attributes.
    fn attributes(&self, inode: u64, reply: ReplyAttr) {
        match self.state().attributes(inode) {
            Ok(attributes) => reply.attr(&NO_TIME, &attributes),
            Err(code) => reply.error(code),
        }
    }
}

impl Filesystem for Server {
    fn lookup(&mut self, _: &Request<'_>, parent: u64, name: &OsStr, reply: ReplyEntry) {
        let mut state = self.state();
        let number = state.files.iter().position(|(known, _)| name == known.as_str());
        let inode = number.filter(|_| parent == FOLDER).map(|number| FIRST_FILE + number as u64);
        match inode.ok_or(libc::ENOENT).and_then(|inode| state.attributes(inode)) {
            Ok(attributes) => reply.entry(&NO_TIME, &attributes, 0),
            Err(code) => reply.error(code),
        }
    }

    fn getattr(&mut self, _: &Request<'_>, inode: u64, _: Option<u64>, reply: ReplyAttr) {
        self.attributes(inode, reply);
    }

    fn setattr(
        &mut self,
        _: &Request<'_>,
        inode: u64,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<u64>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<u32>,
        reply: ReplyAttr,
    ) {
        let changed = size.map_or(Ok(()), |len| self.state().change(inode, Change::SetLen(len)));
        match changed {
            Ok(()) => self.attributes(inode, reply),
            Err(code) => reply.error(code),
        }
    }

    fn open(&mut self, _: &Request<'_>, _inode: u64, _flags: i32, reply: ReplyOpen) {
        let mut state = self.state();
        let flags = if state.cached { 0 } else { FOPEN_DIRECT_IO };
        match state.begin() {
            Ok(()) => reply.opened(0, flags),
            Err(code) => reply.error(code),
        }
    }

    fn read(
        &mut self,
        _: &Request<'_>,
        inode: u64,
        _fh: u64,
        offset: i64,
        size: u32,
        _flags: i32,
        _lock_owner: Option<u64>,
        reply: ReplyData,
    ) {
        let mut state = self.state();
        let begun = state.begin();
        let content = begun.and_then(|()| state.content(inode)).and_then(|(_, bytes)| {
            let start = to_usize(offset)?.min(bytes.len());
            let end = (start + to_usize(size)?).min(bytes.len());
            Ok(&bytes[start..end])
        });
        match content {
            Ok(bytes) => reply.data(bytes),
            Err(code) => reply.error(code),
        }
    }

    fn write(
        &mut self,
        _: &Request<'_>,
        inode: u64,
        _fh: u64,
        offset: i64,
        data: &[u8],
        _write_flags: u32,
        _flags: i32,
        _lock_owner: Option<u64>,
        reply: ReplyWrite,
    ) {
        let change = Change::Write(offset.cast_unsigned(), data.to_vec());
        let changed = self.state().change(inode, change);
        match (changed, u32::try_from(data.len())) {
            (Ok(()), Ok(len)) => reply.written(len),
            (Ok(()), Err(_)) => reply.error(libc::EFBIG),
            (Err(code), _) => reply.error(code),
        }
    }

    fn fsync(&mut self, _: &Request<'_>, inode: u64, _fh: u64, _data: bool, reply: ReplyEmpty) {
        self.change(inode, Change::Sync, reply);
    }

    fn flush(&mut self, _: &Request<'_>, _: u64, _: u64, _: u64, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fallocate(
        &mut self,
        _: &Request<'_>,
        inode: u64,
        _fh: u64,
        offset: i64,
        length: i64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        if mode != PUNCH_HOLE && mode != ZERO_RANGE {
            return reply.error(libc::EOPNOTSUPP);
        }
        let change = Change::Zero(offset.cast_unsigned(), length.cast_unsigned());
        self.change(inode, change, reply);
    }
}

/// Mounts a file system with these files; `None`, with a line about it, where the host cannot do
/// that.
pub fn mount(files: Vec<(String, Vec<u8>)>) -> Option<Recorder> {
    match Recorder::mount(files) {
        Ok(recorder) => Some(recorder),
        Err(error) => {
            // Past the harness, which has a hold on `eprintln!` only: this is to be seen.
            let text = format!("SKIPPED: cannot mount a file system ({DEVICE}): {error}");
            writeln!(io::stderr(), "{text}").expect("a standard error");
            None
        }
    }
}

/// A mounted file system; unmounted when it goes.
#[derive(Debug)]
pub struct Recorder {
    /// Serves it; goes before the folder.
    _session: BackgroundSession,
    /// Shared with the server.
    state: Arc<Mutex<State>>,
    /// Where it is mounted.
    dir: TempDir,
}

impl Drop for Recorder {
    fn drop(&mut self) {
        // The session does it too, but not while a file is open: the io_uring of a daemon that has
        // ended keeps its files for some milliseconds.
        unmount(self.dir(), UnmountFlags::DETACH).ok();
    }
}

impl Recorder {
    /// Mounts a file system with these files.
    ///
    /// # Errors
    /// What the host said: without the device, or the right to mount, there is none.
    fn mount(files: Vec<(String, Vec<u8>)>) -> io::Result<Self> {
        let dir = tempfile::tempdir()?;
        let state = Arc::new(Mutex::new(State { files, ..State::default() }));
        let options = [MountOption::FSName("addcow-test".to_owned())];
        let session = spawn_mount2(Server(Arc::clone(&state)), dir.path(), &options)?;
        Ok(Self { _session: session, state, dir })
    }

    /// The path of a file.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The shared state.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    /// Lets files that are opened from here on be mapped. What is done to them is not noted in
    /// order any more.
    pub fn let_map(&self) {
        self.state().cached = true;
    }

    /// How many changes there were.
    pub fn changes(&self) -> usize {
        self.state().events.len()
    }

    /// Everything that was done, in order.
    pub fn events(&self) -> Vec<Event> {
        self.state().events.clone()
    }

    /// The contents of the files by number.
    pub fn contents(&self) -> Vec<Vec<u8>> {
        self.state().files.iter().map(|(_, bytes)| bytes.clone()).collect()
    }

    /// Gives the files these contents, and forgets what was done.
    pub fn reset(&self, contents: &[Vec<u8>]) {
        let mut state = self.state();
        for ((_, bytes), content) in state.files.iter_mut().zip(contents) {
            bytes.clone_from(content);
        }
        state.events.clear();
    }

    /// Counts operations from 0 again, and lets one of them go wrong; `None`: none.
    pub fn fail(&self, failure: Option<Failure>) {
        let mut state = self.state();
        (state.operations, state.failure) = (0, failure);
        (state.failed, state.failed_syncs) = (0, 0);
    }

    /// How many operations there were since [`Recorder::fail`], and how many went wrong.
    pub fn operations(&self) -> (u64, u64) {
        let state = self.state();
        (state.operations, state.failed)
    }

    /// How many syncs went wrong since [`Recorder::fail`].
    pub fn failed_syncs(&self) -> u64 {
        self.state().failed_syncs
    }
}
