//! Adopting: an add-cow disk out of a qcow2 file whose guest clusters are in an external data file.
//!
//! In such a file every cluster is at its own offset, as in a raw image. So the data file becomes
//! the raw image as it is, and the tables become the bitmap:
//!
//! ```text
//!   qcow2 cluster   bit   data file
//!   allocated       1     untouched
//!   zero            1     made to read zeros where it does not
//!   unallocated     0     untouched
//! ```
//!
//! Without a backing file an unallocated cluster is a zero one; then every cluster ends up
//! allocated, and the header says so.
//!
//! Promises: the qcow2 file is never written, and shows the same disk whatever happens: all that
//! changes in the data file is what no table refers to. The add-cow file appears whole and durable,
//! or not at all, and only once the data file is durable (I1).
//!
//! Not here: reading the tables (`qcow2::walk`), and qcow2 files that hold their guest clusters
//! themselves: those have to be copied.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::executor::block_on;
use crate::format::header::MIN_WRITTEN_CLUSTER_BITS;
use crate::format::qcow2::Header as Qcow2Header;
use crate::format::{BitmapGeometry, FileReference, FileRole as NameRole, Header};
use crate::image::chain::{ChainOptions, OpenChain, qcow2};
use crate::image::open::{
    RAW_FORMAT, check_distinct, folder_of, io_error, lock_for, open_existing, open_unlocked,
};
use crate::image::{FileRole, OpenError};
use crate::jobs::JobError;
use crate::jobs::names::{absolute_name, move_name, name_beside, new_file_error};
use crate::jobs::progress::{Interrupted, Progress};
use crate::jobs::qcow2::takeover::{Changed, Takeover, TakeoverError};
use crate::jobs::qcow2::walk::{WalkError, states};
use crate::storage::file::FileStorage;
use crate::storage::host_file::{Access, CacheMode, HostFile};
use crate::storage::lock::Locking;
use crate::storage::name_policy::Named;
use crate::storage::new_file::{NewFile, check_target};
use crate::units::{ClusterSize, SECTOR_SIZE};

/// What is to be adopted, and how.
#[derive(Debug, Clone)]
pub struct AdoptOptions {
    /// The qcow2 file.
    pub qcow2: PathBuf,
    /// The add-cow file to make.
    pub new: PathBuf,
    /// The data file, whatever the qcow2 file says.
    pub data_file: Option<PathBuf>,
    /// Whether an existing file `new` may be replaced.
    pub force: bool,
}

/// The disk that was made.
#[derive(Debug)]
pub struct Adopted {
    /// The add-cow file's header.
    pub header: Header,
    /// The bitmap's shape: also the virtual size.
    pub geometry: BitmapGeometry,
    /// How many clusters are allocated.
    pub allocated: u64,
    /// What was changed in the data file.
    pub changed: Changed,
}

/// Makes an add-cow disk of a qcow2 file.
///
/// # Errors
/// See [`JobError`]. There is then no new file, and the qcow2 file shows what it did.
pub fn from_qcow2(options: &AdoptOptions, progress: &impl Progress) -> Result<Adopted, JobError> {
    let source = Source::open(options)?;
    let storage = FileStorage::new(Arc::clone(&source.qcow2));
    let states = block_on(states(&storage, &source.header, &Standing(progress)))
        .map_err(|error| walk_error(options, error))?;
    let fail = |error| takeover_error(options, &source.data, error);
    let (size, cluster_size) = (source.header.virtual_size(), source.header.cluster_size);
    let takeover = Takeover::plan(&source.new_header, states, cluster_size, size).map_err(fail)?;
    let new = NewFile::create(&options.new);
    let new = new.map_err(|error| new_file_error(FileRole::Side, &options.new, error))?;
    let side = FileStorage::new(Arc::clone(new.file()));
    let data = FileStorage::new(Arc::clone(&source.data));
    let backing = source.backing.as_ref().map(|chain| chain.handle(FileStorage::new));
    let done = takeover.carry_out(&data, &side, backing.as_ref(), progress);
    let changed = block_on(done).map_err(fail)?;
    let published = new.publish(options.force);
    published.map_err(|error| new_file_error(FileRole::Side, &options.new, error))?;
    let (geometry, allocated) = (*takeover.geometry(), takeover.allocated());
    Ok(Adopted { header: source.new_header, geometry, allocated, changed })
}

/// A watcher for a part of the work that is not counted: it can be interrupted only.
struct Standing<'a, P>(&'a P);

impl<P: Progress> Progress for Standing<'_, P> {
    fn update(&self, _done: u64, _total: u64) -> Result<(), Interrupted> {
        self.0.update(0, 1)
    }
}

/// The disk as it is, and what its add-cow file will say. All files are locked.
struct Source {
    /// The qcow2 file.
    qcow2: Arc<HostFile>,
    /// Its header.
    header: Qcow2Header,
    /// The data file, open for writing.
    data: Arc<HostFile>,
    /// The header of the add-cow file.
    new_header: Header,
    /// What the disk shows where it has nothing.
    backing: Option<OpenChain>,
    /// The file that will be replaced, if any; kept for its lock.
    _replaced: Option<HostFile>,
}

impl Source {
    /// Opens the files, and refuses what can be seen to be unsuitable without reading the tables.
    fn open(options: &AdoptOptions) -> Result<Self, JobError> {
        let (path, new) = (&options.qcow2, &options.new);
        check_target(new, options.force)
            .map_err(|error| new_file_error(FileRole::Side, new, error))?;
        let (role, access) = (FileRole::Disk, Access::ReadOnly);
        let qcow2 = open_unlocked(role, path, Named::Operator, access, CacheMode::Buffered)?;
        lock_for(role, &qcow2, access, Locking::On)?;
        let header = qcow2::header(&qcow2).map_err(io_error("read", FileRole::Disk, path))?;
        let header = header.map_err(|source| OpenError::Qcow2 { path: path.clone(), source })?;
        check_kind(options, &header)?;
        let data = open_data(options, &header)?;
        check_distinct(FileRole::Data, &data, FileRole::Disk, &qcow2)?;
        lock_for(FileRole::Data, &data, Access::ReadWrite, Locking::On)?;
        check_length(options, &header, &data)?;
        let new_header = new_header(options, &header, &data)?;
        let own = [(FileRole::Disk, &*qcow2), (FileRole::Data, &*data)];
        // By the new names, which must lead to the same file.
        let (folder, options) = (folder_of(new), ChainOptions::BUFFERED);
        let named = Named::InFolder(folder);
        let backing = OpenChain::below(&new_header, folder, named, options, &own)?;
        let layers = backing.iter().flat_map(OpenChain::layers).flat_map(|layer| layer.files());
        let others = own.into_iter().chain(layers.map(|file| (FileRole::Backing, &**file)));
        let replaced = check_new(new, others)?;
        Ok(Self { qcow2, header, data, new_header, backing, _replaced: replaced })
    }
}

/// Refuses to replace a file that is in use, or is one of `others`. Returns it locked.
fn check_new<'a>(
    new: &Path,
    mut others: impl Iterator<Item = (FileRole, &'a HostFile)>,
) -> Result<Option<HostFile>, JobError> {
    let Some(old) = open_existing(FileRole::Side, new)? else { return Ok(None) };
    others.try_for_each(|(role, file)| check_distinct(FileRole::Side, &old, role, file))?;
    lock_for(FileRole::Side, &old, Access::ReadWrite, Locking::On)?;
    Ok(Some(old))
}

/// Refuses qcow2 files that are sound, but not what can be adopted.
fn check_kind(options: &AdoptOptions, header: &Qcow2Header) -> Result<(), JobError> {
    let path = &options.qcow2;
    if let Some(backing) = header.backing.as_ref().filter(|backing| backing.format.is_none()) {
        let backing = backing.name.resolve(folder_of(path));
        return Err(OpenError::BackingFormatMissing { path: path.clone(), backing }.into());
    }
    if !header.has_external_data() {
        let reason = "its guest clusters are in the file itself, not in an external data file \
                      (addcow convert copies them)";
        return Err(refused(options, reason));
    }
    if header.snapshots > 0 {
        return Err(refused(options, &format!("it has internal snapshots ({})", header.snapshots)));
    }
    if header.virtual_size() == 0 {
        return Err(refused(options, "the disk has no sector"));
    }
    Ok(())
}

/// Opens the data file for writing; it is not locked yet.
///
/// Its name is taken as relative to the folder of the qcow2 file, as backing files' names are. QEMU
/// looks for it in its working directory; where that finds another file, nobody knows which of the
/// two the disk is, and the person must say.
fn open_data(options: &AdoptOptions, header: &Qcow2Header) -> Result<Arc<HostFile>, JobError> {
    let open = |path: &Path, named, access| {
        open_unlocked(FileRole::Data, path, named, access, CacheMode::Buffered)
    };
    if let Some(path) = &options.data_file {
        return Ok(open(path, Named::Operator, Access::ReadWrite)?);
    }
    let advice = "--data-file FILE says which file it is";
    let Some(name) = header.external_data().ok().flatten() else {
        return Err(refused(options, &format!("it does not name its data file ({advice})")));
    };
    let folder = folder_of(&options.qcow2);
    let (path, here): (_, &Path) = (name.resolve(folder), name.as_ref());
    let other = open(here, Named::InFolder(Path::new("")), Access::ReadOnly).ok();
    let (found, other) = match (open(&path, Named::InFolder(folder), Access::ReadWrite), other) {
        (Err(OpenError::Io { source, .. }), Some(_))
            if source.kind() == io::ErrorKind::NotFound =>
        {
            let (path, here) = (path.display(), here.display());
            let reason = format!("'{path}' is not there, but '{here}' is ({advice})");
            return Err(refused(options, &reason));
        }
        (found, other) => (found?, other),
    };
    if other.is_some_and(|other| other.identity() != found.identity()) {
        let (path, here) = (path.display(), here.display());
        let reason = format!("its data file could be '{path}' or '{here}' ({advice})");
        return Err(refused(options, &reason));
    }
    Ok(found)
}

/// Refuses a data file whose length cannot become that of the disk.
///
/// A shorter one reads zeros past its end, and can grow. QEMU fills the last cluster up when it
/// writes to it, so there can be a part of a cluster too much, which nobody ever sees.
fn check_length(
    options: &AdoptOptions,
    header: &Qcow2Header,
    data: &HostFile,
) -> Result<(), JobError> {
    let error = |action| io_error(action, FileRole::Data, data.path());
    let len = data.len().map_err(error("get the length of"))?;
    let size = header.virtual_size();
    let kind = data.file().metadata().map_err(error("look at"))?.file_type();
    let most = size.next_multiple_of(header.cluster_size.bytes());
    if len - len % SECTOR_SIZE == size || (len <= most && !kind.is_block_device()) {
        return Ok(());
    }
    let reason = format!(
        "the disk has {size} bytes, data file '{}' has {len}, and an add-cow disk is as large as \
         its raw image",
        data.path().display()
    );
    Err(refused(options, &reason))
}

/// The header of the add-cow file.
fn new_header(
    options: &AdoptOptions,
    header: &Qcow2Header,
    data: &HostFile,
) -> Result<Header, JobError> {
    let new = &options.new;
    let image = match name_beside(new, NameRole::Image, data.path())? {
        Some(name) => name,
        None => absolute_name(new, NameRole::Image, data.path())?,
    };
    let folder = folder_of(&options.qcow2);
    let raw = || RAW_FORMAT.to_owned();
    let backing = match &header.backing {
        Some(backing) => Some(FileReference {
            name: move_name(new, folder, NameRole::Backing, &backing.name)?,
            // Without one it was refused.
            format: backing.format.clone().unwrap_or_default(),
        }),
        None => None,
    };
    let least = ClusterSize::from_bits(MIN_WRITTEN_CLUSTER_BITS).unwrap_or(header.cluster_size);
    Ok(Header {
        cluster_size: header.cluster_size.max(least),
        all_allocated: backing.is_none(),
        backing,
        image: FileReference { name: image, format: raw() },
        compat_features: 0,
    })
}

/// The error for a qcow2 file that cannot be adopted.
fn refused(options: &AdoptOptions, reason: &str) -> JobError {
    JobError::Refused(format!("cannot adopt '{}': {reason}", options.qcow2.display()))
}

/// Says which file a [`WalkError`] is about.
fn walk_error(options: &AdoptOptions, error: WalkError) -> JobError {
    let path = &options.qcow2;
    match error {
        WalkError::Io(error) => io_error("read", FileRole::Disk, path)(error).into(),
        WalkError::Format(source) => OpenError::Qcow2 { path: path.clone(), source }.into(),
        WalkError::Interrupted(interrupted) => interrupted.into(),
        other => refused(options, &other.to_string()),
    }
}

/// Says which file a [`TakeoverError`] is about.
fn takeover_error(options: &AdoptOptions, data: &HostFile, error: TakeoverError) -> JobError {
    let new = &options.new;
    match error {
        TakeoverError::Data(action, error) => {
            io_error(action, FileRole::Data, data.path())(error).into()
        }
        TakeoverError::New(error) => io_error("write", FileRole::Side, new)(error).into(),
        TakeoverError::Backing(error) => error.into(),
        TakeoverError::Header(source) => OpenError::Header { path: new.clone(), source }.into(),
        TakeoverError::Interrupted(interrupted) => interrupted.into(),
        TakeoverError::NoMemory => refused(options, &error.to_string()),
    }
}
