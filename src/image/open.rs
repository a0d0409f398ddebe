//! Opening a disk by name: which files belong to it, whether they may, and how they are cached.
//!
//! File names inside a header are somebody else's words (P6): they are plain paths (checked by
//! `format`), relative to the folder of the add-cow file, followed only where the policy for such
//! names lets them lead (`storage/name_policy.rs`), and the format of a file is what the header
//! says, never what its content looks like. Files are told apart by (device, inode), so
//! that a hard or symbolic link does not pass for another file.
//!
//! Every file is locked before anything is read from it (P8), unless that was turned off: what was
//! read stays true, and who uses a disk otherwise is noticed before a byte is changed.
//!
//! Not here: the I/O engine that the disk is served with.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::chain::{Layer, OpenChain};
use super::inspect::{DiskAccess, DiskFiles};
use super::load::{self, LoadError};
use super::{FileRole, Image, ImageState, OpenError};
use crate::executor::block_on;
use crate::format::{FileReference, FormatError, Header};
use crate::storage::Storage;
use crate::storage::file::FileStorage;
use crate::storage::host_file::{Access, CacheMode, HostFile};
use crate::storage::lock::{LockError, Locking, Usage};
use crate::storage::mapping::Mapping;
use crate::storage::name_policy::{NameError, NamePolicy, Named};
use crate::units::SECTOR_SIZE;

/// The only format of raw images.
pub const RAW_FORMAT: &str = "raw";

/// How a disk is opened.
#[derive(Debug, Clone, Copy)]
pub struct OpenOptions {
    /// For writing too?
    pub writable: bool,
    /// Cache of the raw image.
    pub cache: CacheMode,
    /// Cache of the backing file.
    pub backing_cache: CacheMode,
    /// Whether the files are locked.
    pub locking: Locking,
}

impl OpenOptions {
    /// For the tool: reading only, through the page cache.
    pub const READ_ONLY: Self = Self {
        writable: false,
        cache: CacheMode::Buffered,
        backing_cache: CacheMode::Buffered,
        locking: Locking::On,
    };

    /// How the disk's own files are opened.
    fn access(&self) -> Access {
        if self.writable { Access::ReadWrite } else { Access::ReadOnly }
    }
}

/// An open disk: its files and what its threads share. [`OpenImage::handle`] makes it usable.
#[derive(Debug)]
pub struct OpenImage {
    /// What all threads share.
    pub state: Arc<ImageState>,
    /// The raw image.
    pub raw: Arc<HostFile>,
    /// The add-cow file; `None` for a plain raw image.
    pub side: Option<Arc<HostFile>>,
    /// The backing chain, if there is one and it is needed.
    pub backing: Option<OpenChain>,
    /// The add-cow file's header; `None` for a plain raw image.
    pub header: Option<Header>,
}

impl OpenImage {
    /// A handle for one thread, whose storages `engine` makes.
    pub fn handle<S: Storage>(&self, engine: impl Fn(Arc<HostFile>) -> S) -> Image<S> {
        let make = |file: &Arc<HostFile>| engine(Arc::clone(file));
        Image::new(
            Arc::clone(&self.state),
            make(&self.raw),
            self.side.as_ref().map(make),
            self.backing.as_ref().map(|chain| chain.handle(&engine)),
        )
    }

    /// Maps the files with the guest's data, where that is possible, so that what is in memory
    /// already is moved without a system call.
    pub fn map_files(&self) {
        self.data_files().for_each(|file| file.map());
    }

    /// Does `work` on the one thread that an open disk may have, which reads the tables of its
    /// chain, and waits for it.
    ///
    /// # Errors
    /// What `work` says, or that it has panicked.
    pub fn on_tables_thread(
        &self,
        work: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        self.backing.as_ref().map_or(Ok(()), |chain| block_on(chain.on_tables_thread(work)))
    }

    /// Gives the page tables of mapped files back: nobody uses the disk for now.
    pub fn release_mappings(&self) {
        self.data_files().filter_map(|file| file.mapping()).for_each(Mapping::release);
    }

    /// The files with the guest's data.
    fn data_files(&self) -> impl Iterator<Item = &Arc<HostFile>> {
        let layers = self.backing.iter().flat_map(OpenChain::layers);
        std::iter::once(&self.raw).chain(layers.flat_map(Layer::files))
    }
}

/// Opens an add-cow disk.
///
/// # Errors
/// An [`OpenError`] that names the file. Nothing has been changed.
pub fn add_cow(path: &Path, options: OpenOptions) -> Result<OpenImage, OpenError> {
    add_cow_named(path, Named::Operator, options)
}

/// The same for a disk that `named` has named.
///
/// # Errors
/// As [`add_cow`].
pub(crate) fn add_cow_named(
    path: &Path,
    named: Named<'_>,
    options: OpenOptions,
) -> Result<OpenImage, OpenError> {
    let OpenOptions { cache, locking, .. } = options;
    let access = DiskAccess { side: options.access(), raw: options.access(), cache, locking };
    let disk = DiskFiles::open_checked(path, named, access, |_, _| Ok(()))?;
    let backing = disk.open_backing(options.backing_cache)?;
    let backing_len = backing.as_ref().map_or(0, OpenChain::virtual_size);
    let allocation = disk.allocation()?;
    let state = ImageState::add_cow(disk.geometry, allocation, backing_len, options.writable);
    Ok(OpenImage {
        state: Arc::new(state),
        raw: disk.raw,
        side: Some(disk.side),
        backing,
        header: Some(disk.header),
    })
}

/// Opens a plain raw image.
///
/// # Errors
/// As [`add_cow`].
pub fn raw(path: &Path, options: OpenOptions) -> Result<OpenImage, OpenError> {
    let raw = open_unlocked(FileRole::Raw, path, Named::Operator, options.access(), options.cache)?;
    lock_for(FileRole::Raw, &raw, options.access(), options.locking)?;
    let state = Arc::new(ImageState::raw(sectors_of(&raw)?, options.writable));
    Ok(OpenImage { state, raw, side: None, backing: None, header: None })
}

/// Reads only the header of an add-cow file.
///
/// # Errors
/// As [`add_cow`].
pub fn header(path: &Path) -> Result<Header, OpenError> {
    let (role, access) = (FileRole::Side, Access::ReadOnly);
    let side = open_unlocked(role, path, Named::Operator, access, CacheMode::Buffered)?;
    lock_for(role, &side, access, Locking::On)?;
    block_on(load::header(&FileStorage::new(side))).map_err(|e| load_error(path, e))
}

/// The folder that names inside the file `path` are relative to.
#[must_use]
pub fn folder_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new(""))
}

/// Opens one file of a disk, which the caller locks once it knows that it has not done so through
/// another open file: the two would refuse each other.
pub(crate) fn open_unlocked(
    role: FileRole,
    path: &Path,
    named: Named<'_>,
    access: Access,
    cache: CacheMode,
) -> Result<Arc<HostFile>, OpenError> {
    let file = match named {
        Named::Operator => HostFile::open(path, access, cache).map_err(NameError::Host),
        Named::InFolder(folder) => NamePolicy::of_process().open(path, folder, access, cache),
    };
    file.map(Arc::new).map_err(|error| match error {
        NameError::Host(source) => io_error("open", role, path)(source),
        source => OpenError::Name { role, path: path.to_owned(), source },
    })
}

/// Opens a file for reading that a new one may replace or take over; `None` if there is none.
///
/// One that is there but cannot be opened is an error: nobody could tell whether it is in use.
///
/// # Errors
/// `Io`, unless there is no such file.
pub(crate) fn open_existing(role: FileRole, path: &Path) -> Result<Option<HostFile>, OpenError> {
    match HostFile::open(path, Access::ReadOnly, CacheMode::Buffered) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_error("open", role, path)(error)),
    }
}

/// Locks one file of a disk for that access, unless locking is off.
pub(crate) fn lock_for(
    role: FileRole,
    file: &HostFile,
    access: Access,
    locking: Locking,
) -> Result<(), OpenError> {
    match (locking, access) {
        (Locking::Off, _) => Ok(()),
        (Locking::On, Access::ReadOnly) => lock_file(role, file, Usage::Read),
        (Locking::On, Access::ReadWrite) => lock_file(role, file, Usage::Write),
    }
}

/// Locks one file of a disk for as long as it is open.
pub(crate) fn lock_file(role: FileRole, file: &HostFile, usage: Usage) -> Result<(), OpenError> {
    file.lock(usage).map_err(|error| match error {
        LockError::InUse { holder } => {
            OpenError::InUse { role, path: file.path().to_owned(), holder }
        }
        LockError::Host(source) => io_error("lock", role, file.path())(source),
    })
}

/// The path of a file that must be raw.
pub(crate) fn check_raw(
    role: FileRole,
    reference: &FileReference,
    folder: &Path,
) -> Result<PathBuf, OpenError> {
    let path = reference.name.resolve(folder);
    if reference.format == RAW_FORMAT {
        Ok(path)
    } else {
        let (format, supported) = (reference.format.clone(), RAW_FORMAT);
        Err(OpenError::UnsupportedFormat { role, path, format, supported })
    }
}

/// Refuses two roles played by one file.
pub(crate) fn check_distinct(
    first: FileRole,
    first_file: &HostFile,
    second: FileRole,
    second_file: &HostFile,
) -> Result<(), OpenError> {
    if first_file.identity() != second_file.identity() {
        return Ok(());
    }
    Err(OpenError::SameFile {
        first,
        first_path: first_file.path().to_owned(),
        second,
        second_path: second_file.path().to_owned(),
    })
}

/// Length of a file in bytes.
pub(super) fn file_len(role: FileRole, file: &HostFile) -> Result<u64, OpenError> {
    file.len().map_err(io_error("get the length of", role, file.path()))
}

/// Length of the raw image in bytes, as far as it goes in whole sectors.
pub(super) fn sectors_of(raw: &HostFile) -> Result<u64, OpenError> {
    let len = file_len(FileRole::Raw, raw)?;
    if len < SECTOR_SIZE {
        return Err(OpenError::EmptyImage { path: raw.path().to_owned() });
    }
    Ok(len - len % SECTOR_SIZE)
}

/// Makes an [`OpenError::Io`] of what the host said.
pub(crate) fn io_error(
    action: &'static str,
    role: FileRole,
    path: &Path,
) -> impl FnOnce(io::Error) -> OpenError {
    move |source| OpenError::Io { action, role, path: path.to_owned(), source }
}

/// Says which file a [`LoadError`] is about.
pub(super) fn load_error(path: &Path, error: LoadError) -> OpenError {
    let path = path.to_owned();
    match error {
        LoadError::Io(source) => {
            OpenError::Io { action: "read", role: FileRole::Side, path, source }
        }
        LoadError::Format(source) => OpenError::Format { path, source },
        LoadError::Truncated { found, needed } => OpenError::Truncated { path, found, needed },
        LoadError::NoMemory(_) => OpenError::Io {
            action: "allocate the bitmap of",
            role: FileRole::Side,
            path,
            source: io::ErrorKind::OutOfMemory.into(),
        },
    }
}

/// Whether the error is that the file is not an add-cow file at all.
#[must_use]
pub fn is_wrong_format(error: &OpenError) -> bool {
    matches!(
        error,
        OpenError::Format {
            source: FormatError::BadMagic { .. } | FormatError::TooShort { .. },
            ..
        }
    )
}
