//! Opening host files: which kinds are allowed, how they are cached, who they are.
//!
//! A [`HostFile`] is a regular file or a block device, opened without ever blocking on a FIFO or a
//! terminal, with direct I/O where it was asked for and the file allows it. Its identity is
//! (device, inode), so that two names of one file are seen to be one.
//!
//! Not here: what the file means (`image::open`).

use std::fs::{File, remove_file};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::fs::{Advice, AtFlags, FileType, Mode, OFlags, SeekFrom, StatxFlags};
use rustix::fs::{
    fadvise, fchmod, fcntl_getfl, fcntl_setfl, fdatasync, fstat, fstatfs, fsync, open, seek, statx,
};

use super::Alignment;
use super::lock::{self, LockError, Usage};
use super::mapping::Mapping;
use crate::units::{ByteRange, SECTOR_SIZE};

/// File system type of tmpfs (statfs(2), `TMPFS_MAGIC`).
pub(super) const TMPFS_MAGIC: i64 = 0x0102_1994;

/// The permission bits of owner, group and others.
pub(super) const PERMISSIONS: Mode = Mode::RWXU.union(Mode::RWXG).union(Mode::RWXO);

/// How a file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading only.
    ReadOnly,
    /// Reading and writing.
    ReadWrite,
}

/// Which cache a file's data goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheMode {
    /// Past the host's page cache (`O_DIRECT`) where the file can; buffered where it cannot.
    Direct,
    /// Through the host's page cache.
    Buffered,
}

/// What makes two open files the same file, whatever their names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileIdentity {
    /// Device that holds the inode; for a block device the device itself.
    pub device: u64,
    /// Inode number; 0 for a block device, which several nodes may name.
    pub inode: u64,
}

/// An open regular file or block device.
#[derive(Debug)]
pub struct HostFile {
    /// The file.
    file: File,
    /// The name under which it was opened, for messages.
    path: PathBuf,
    /// Who it is.
    identity: FileIdentity,
    /// What transfers must keep to.
    alignment: Alignment,
    /// Whether it lies on tmpfs.
    in_memory: bool,
    /// For what it is locked, if it is.
    locked: OnceLock<Usage>,
    /// Its mapping, once [`HostFile::map`] was called and could make one.
    mapping: OnceLock<Mapping>,
}

impl HostFile {
    /// Opens `path`, wherever it leads: a name that the command line has, not one out of a file
    /// (`name_policy`).
    ///
    /// # Errors
    /// `InvalidInput` if it is neither a regular file nor a block device; else what the host said.
    pub fn open(path: &Path, access: Access, cache: CacheMode) -> io::Result<Self> {
        Self::from_file(File::from(open(path, flags_of(access), Mode::empty())?), path, cache)
    }

    /// Makes a new, empty regular file at `path`, readable and writable for whom the umask lets.
    ///
    /// # Errors
    /// `AlreadyExists` if anything has that name, a dangling symbolic link too; else what the host
    /// said.
    pub fn create_new(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o666);
        Self::from_file(File::from(open(path, flags, mode)?), path, CacheMode::Buffered)
    }

    /// The same, with the permission bits of `mode` and no others, whatever the umask is.
    ///
    /// # Errors
    /// As [`HostFile::create_new`].
    pub(super) fn create_new_with(path: &Path, mode: Mode) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        // The umask only takes bits away: at no time may anybody open it who may not later.
        let file = File::from(open(path, flags, mode)?);
        if Mode::from_raw_mode(fstat(&file)?.st_mode) & PERMISSIONS != mode {
            // Only then: not every file system can change them.
            fchmod(&file, mode).inspect_err(|_| drop(remove_file(path)))?;
        }
        Self::from_file(file, path, CacheMode::Buffered)
    }

    /// Takes an open file that was opened as `path`. Its open flags are changed to suit `cache`.
    ///
    /// # Errors
    /// As [`HostFile::open`].
    pub fn from_file(file: File, path: &Path, cache: CacheMode) -> io::Result<Self> {
        let stat = fstat(&file)?;
        let identity = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => FileIdentity { device: stat.st_dev, inode: stat.st_ino },
            FileType::BlockDevice => FileIdentity { device: stat.st_rdev, inode: 0 },
            other => return Err(io::Error::new(io::ErrorKind::InvalidInput, wrong_type(other))),
        };
        let in_memory = fstatfs(&file)?.f_type == TMPFS_MAGIC;
        let alignment = set_flags(&file, cache, in_memory)?;
        let (locked, mapping) = (OnceLock::new(), OnceLock::new());
        let path = path.to_owned();
        Ok(Self { file, path, identity, alignment, in_memory, locked, mapping })
    }

    /// Announces to other programs that the file is used in that way, for as long as this lives.
    /// At most once.
    ///
    /// # Errors
    /// See [`LockError`]; nothing is announced then.
    pub fn lock(&self, usage: Usage) -> Result<(), LockError> {
        lock::lock(&self.file, usage)?;
        assert!(self.locked.set(usage).is_ok(), "a file is locked once");
        Ok(())
    }

    /// The open file.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The name under which it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Who the file is.
    #[must_use]
    pub fn identity(&self) -> FileIdentity {
        self.identity
    }

    /// The alignment that transfers must keep.
    #[must_use]
    pub fn alignment(&self) -> Alignment {
        self.alignment
    }

    /// Whether the file lies in memory (tmpfs): its operations do not wait for a device.
    #[must_use]
    pub fn is_in_memory(&self) -> bool {
        self.in_memory
    }

    /// Makes what was written to it durable, and forgets what of it is in memory.
    ///
    /// After a sync that failed the kernel takes what it could not write for written. Who opens the
    /// file later would read it, find nothing to sync, and promise what no medium has.
    ///
    /// # Errors
    /// What the host said: nobody knows what is durable.
    pub fn settle(&self) -> io::Result<()> {
        fdatasync(&self.file)?;
        Ok(fadvise(&self.file, 0, None, Advice::DontNeed)?)
    }

    /// Whether it is a block device, whose length is not for us to change.
    #[must_use]
    pub fn is_device(&self) -> bool {
        self.identity.inode == 0
    }

    /// Maps the file, so that what is in memory already can be moved without a system call. Does
    /// nothing where that is not possible or would pass a cache that was not asked for.
    pub fn map(&self) {
        // Past the page cache is past a mapping, too.
        let cached = self.alignment == Alignment::NONE;
        if !cached || self.is_device() || self.mapping.get().is_some() {
            return;
        }
        let mapped = fcntl_getfl(&self.file).map_err(io::Error::from).and_then(|flags| {
            // Dirty pages of a disk would have to be written back: that is a job for the host's
            // I/O, which knows when a disk is slow.
            let writable = self.in_memory && flags.contains(OFlags::RDWR);
            Mapping::new(&self.file, self.len()?, self.in_memory, writable)
        });
        match mapped {
            // Lost against another thread that did the same: dropped.
            Ok(mapping) => drop(self.mapping.set(mapping)),
            Err(error) => log::debug!("'{}' is not mapped: {error}", self.path.display()),
        }
    }

    /// The mapping, if there is one.
    #[must_use]
    pub fn mapping(&self) -> Option<&Mapping> {
        self.mapping.get()
    }

    /// Length in bytes, also of a block device.
    ///
    /// # Errors
    /// What the host said.
    pub fn len(&self) -> io::Result<u64> {
        Ok(seek(&self.file, SeekFrom::End(0))?)
    }

    /// Whether the file has no byte.
    ///
    /// # Errors
    /// What the host said.
    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Bytes that the file takes on its file system.
    ///
    /// # Errors
    /// What the host said.
    pub fn allocated_len(&self) -> io::Result<u64> {
        // stat(2): st_blocks counts 512-byte units whatever the file system's block size.
        let blocks = u64::try_from(fstat(&self.file)?.st_blocks).unwrap_or(0);
        Ok(blocks.saturating_mul(512))
    }

    /// The first data range at or after `offset` (lseek(2), `SEEK_DATA`).
    ///
    /// # Errors
    /// What the host said.
    pub fn next_data(&self, offset: u64) -> io::Result<Option<ByteRange>> {
        let start = match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(None),
            // Block devices do not know holes: all of it is data.
            Err(rustix::io::Errno::INVAL) => {
                let len = self.len()?;
                return Ok((offset < len).then(|| ByteRange::between(offset, len)));
            }
            Err(error) => return Err(error.into()),
        };
        Ok(Some(ByteRange::between(start, seek(&self.file, SeekFrom::Hole(start))?)))
    }
}

impl Drop for HostFile {
    fn drop(&mut self) {
        // Closing it would do, but not at once: an io_uring that has used the file may keep it for
        // some milliseconds after its own end.
        if let Some(usage) = self.locked.get() {
            lock::release(&self.file, *usage);
        }
    }
}

/// Makes durable which files the folder `path` holds and under which names; an empty path is the
/// working directory.
///
/// # Errors
/// What the host said.
pub fn sync_folder(path: &Path) -> io::Result<()> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let folder = open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    match fsync(&folder) {
        // fsync(2): a file system without anything to sync for a folder may say so.
        Err(rustix::io::Errno::INVAL) => Ok(()),
        result => Ok(result?),
    }
}

/// The flags to open a file with, whose type is not known yet.
pub(super) fn flags_of(access: Access) -> OFlags {
    let mode = match access {
        Access::ReadOnly => OFlags::RDONLY,
        Access::ReadWrite => OFlags::RDWR,
    };
    // O_NONBLOCK: opening a FIFO must not wait for its other end. O_NOCTTY: nor may a terminal
    // become ours.
    mode | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY
}

/// Sets O_DIRECT and O_NONBLOCK as suits the file; returns the alignment that follows.
fn set_flags(file: &File, cache: CacheMode, in_memory: bool) -> io::Result<Alignment> {
    let mut flags = fcntl_getfl(file)? - OFlags::DIRECT - OFlags::NONBLOCK;
    if in_memory {
        // tmpfs is memory: there is no cache to pass, and no file on it ever blocks for long. But
        // io_uring would hand its requests to a worker thread: all of them without O_NONBLOCK,
        // because tmpfs lacks FMODE_NOWAIT, and every write without O_DIRECT, because it lacks
        // FOP_BUFFER_WASYNC. O_DIRECT asks for no alignment there; kernels before 6.6 refuse it.
        flags |= OFlags::NONBLOCK;
        if fcntl_setfl(file, flags | OFlags::DIRECT).is_err() {
            fcntl_setfl(file, flags)?;
        }
        return Ok(Alignment::NONE);
    }
    let mut alignment = Alignment::NONE;
    if cache == CacheMode::Direct
        && let Some(direct) = direct_alignment(file)?
        && fcntl_setfl(file, flags | OFlags::DIRECT).is_ok()
    {
        flags |= OFlags::DIRECT;
        alignment = direct;
    }
    fcntl_setfl(file, flags)?;
    Ok(alignment)
}

/// What direct I/O on `file` asks for, or `None` where it is not possible, not described, or would
/// need blocks larger than a sector: a guest may write single sectors, and joining them into larger
/// blocks is the page cache's job.
fn direct_alignment(file: &File) -> io::Result<Option<Alignment>> {
    let stat = match statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
        Ok(stat) => stat,
        Err(rustix::io::Errno::NOSYS) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let offset = u64::from(stat.stx_dio_offset_align);
    let memory = usize::try_from(stat.stx_dio_mem_align).unwrap_or(usize::MAX);
    let described = stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 && offset > 0 && memory > 0;
    let usable = described && offset <= SECTOR_SIZE && memory <= super::buffer::PAGE_SIZE;
    // Buffers of ours are page aligned and sector lengths are multiples of 512, so both hold.
    Ok(usable.then_some(Alignment { memory, offset }))
}

/// The message for a file of the wrong type.
pub(super) fn wrong_type(found: FileType) -> &'static str {
    match found {
        FileType::Directory => "is a directory, not a regular file or block device",
        FileType::Fifo => "is a FIFO, not a regular file or block device",
        FileType::Socket => "is a socket, not a regular file or block device",
        FileType::CharacterDevice => "is a character device, not a regular file or block device",
        _ => "is not a regular file or block device",
    }
}
