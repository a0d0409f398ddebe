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
use crate::format::qcow2::header::PREFIX_LEN;
use crate::format::{BitmapGeometry, FileReference, FileRole, Header};
use crate::image::chain::open::resolve;
use crate::image::chain::{ChainOptions, OpenChain};
use crate::image::open::{RAW_FORMAT, folder_of};
use crate::jobs::progress::{Interrupted, Progress};
use crate::jobs::qcow2::takeover::{Changed, Takeover, TakeoverError};
use crate::jobs::qcow2::walk::{WalkError, states};
use crate::jobs::qcow2::{ForeignError, absolute_name, io_error, move_name, name_beside};
use crate::storage::file::FileStorage;
use crate::storage::host_file::{Access, CacheMode, HostFile};
use crate::storage::new_file::{NewFile, check_target};
use crate::storage::{IoBuffer, Storage, transfer};
use crate::units::{ClusterSize, SECTOR_SIZE};

/// What the files are called in messages.
const QCOW2: &str = "qcow2 file";
/// See [`QCOW2`].
const DATA: &str = "data file";
/// See [`QCOW2`].
const BACKING: &str = "backing file";
/// See [`QCOW2`].
const NEW: &str = "add-cow file";

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
/// See [`ForeignError`].
pub fn from_qcow2(
    options: &AdoptOptions,
    progress: &impl Progress,
) -> Result<Adopted, ForeignError> {
    let source = Source::open(options)?;
    check_target(&options.new, options.force).map_err(io_error("create", NEW, &options.new))?;
    let storage = FileStorage::new(Arc::clone(&source.qcow2));
    let states = block_on(states(&storage, &source.header, &Standing(progress)))
        .map_err(|error| walk_error(&options.qcow2, error))?;
    let header = source.new_header(options)?;
    let size = source.header.virtual_size();
    let fail = |error| takeover_error(options, &source.data, error);
    let takeover =
        Takeover::plan(&header, states, source.header.cluster_size, size).map_err(fail)?;
    let new = NewFile::create(&options.new).map_err(io_error("create", NEW, &options.new))?;
    let side = FileStorage::new(Arc::clone(new.file()));
    let data = FileStorage::new(Arc::clone(&source.data));
    let backing = source.backing.as_ref().map(|chain| chain.handle(FileStorage::new));
    let done = takeover.carry_out(&data, &side, backing.as_ref(), progress);
    let changed = block_on(done).map_err(fail)?;
    new.publish(options.force).map_err(io_error("name", NEW, &options.new))?;
    let (geometry, allocated) = (*takeover.geometry(), takeover.allocated());
    Ok(Adopted { header, geometry, allocated, changed })
}

/// A watcher for a part of the work that is not counted: it can be interrupted only.
struct Standing<'a, P>(&'a P);

impl<P: Progress> Progress for Standing<'_, P> {
    fn update(&self, _done: u64, _total: u64) -> Result<(), Interrupted> {
        self.0.update(0, 1)
    }
}

/// The files of the disk as it is.
struct Source {
    /// The qcow2 file.
    qcow2: Arc<HostFile>,
    /// Its header.
    header: Qcow2Header,
    /// The data file, open for writing.
    data: Arc<HostFile>,
    /// What the disk shows where it has nothing.
    backing: Option<OpenChain>,
}

impl Source {
    /// Opens the files, and refuses what can be seen to be unsuitable without reading the tables.
    fn open(options: &AdoptOptions) -> Result<Self, ForeignError> {
        let path = &options.qcow2;
        let qcow2 = open(QCOW2, path, Access::ReadOnly)?;
        let bad_header = |source| ForeignError::Qcow2 { path: path.clone(), source };
        let storage = FileStorage::new(Arc::clone(&qcow2));
        let area = block_on(first_cluster(&storage)).map_err(io_error("read", QCOW2, path))?;
        let header = Qcow2Header::decode(&area).map_err(bad_header)?;
        header.check_readable().map_err(bad_header)?;
        check_kind(options, &header)?;
        let data = open_data(options, &header)?;
        let backing = open_backing(options, &header)?;
        // One that cannot be opened is none of the others, which were.
        let new = HostFile::open(&options.new, Access::ReadOnly, CacheMode::Buffered).ok();
        let mut files = vec![(QCOW2, &*qcow2), (DATA, &*data)];
        let layers = backing.iter().flat_map(OpenChain::layers);
        files.extend(layers.flat_map(|layer| layer.files()).map(|file| (BACKING, &**file)));
        files.extend(new.as_ref().map(|file| (NEW, file)));
        check_distinct(options, &files)?;
        let source = Self { qcow2, header, data, backing };
        source.check_length(options)?;
        Ok(source)
    }

    /// Refuses a data file whose length cannot become that of the disk.
    ///
    /// A shorter one reads zeros past its end, and can grow. QEMU fills the last cluster up when it
    /// writes to it, so there can be a part of a cluster too much, which nobody ever sees.
    fn check_length(&self, options: &AdoptOptions) -> Result<(), ForeignError> {
        let path = self.data.path();
        let error = |action| io_error(action, DATA, path);
        let len = self.data.len().map_err(error("get the length of"))?;
        let size = self.header.virtual_size();
        let kind = self.data.file().metadata().map_err(error("look at"))?.file_type();
        if len - len % SECTOR_SIZE == size {
            return Ok(());
        }
        let most = size.next_multiple_of(self.header.cluster_size.bytes());
        if kind.is_block_device() || len > most {
            let reason = format!(
                "the disk has {size} bytes, but data file '{}' has {len}, and an add-cow disk is \
                 as large as its raw image",
                path.display()
            );
            return Err(refused(options, reason));
        }
        Ok(())
    }

    /// The header of the add-cow file.
    fn new_header(&self, options: &AdoptOptions) -> Result<Header, ForeignError> {
        let new = &options.new;
        let folder = folder_of(&options.qcow2);
        let image = match name_beside(new, FileRole::Image, self.data.path())? {
            Some(name) => name,
            None => absolute_name(new, FileRole::Image, self.data.path())?,
        };
        let raw = || RAW_FORMAT.to_owned();
        let backing = match backing_of(&self.header) {
            Some(FileReference { name, format }) => {
                let name = move_name(new, folder, FileRole::Backing, &name)?;
                Some(FileReference { name, format })
            }
            None => None,
        };
        Ok(Header {
            cluster_size: new_cluster_size(self.header.cluster_size),
            all_allocated: backing.is_none(),
            backing,
            image: FileReference { name: image, format: raw() },
            compat_features: 0,
        })
    }
}

/// The cluster size of the add-cow file: that of the qcow2 file, but at least the smallest that is
/// written.
fn new_cluster_size(cluster_size: ClusterSize) -> ClusterSize {
    let least = ClusterSize::from_bits(MIN_WRITTEN_CLUSTER_BITS);
    least.map_or(cluster_size, |least| cluster_size.max(least))
}

/// Refuses qcow2 files that are sound, but not what can be adopted.
fn check_kind(options: &AdoptOptions, header: &Qcow2Header) -> Result<(), ForeignError> {
    let reason = if !header.has_external_data() {
        "it holds its guest clusters itself, not in an external data file \
         (addcow convert copies them)"
            .to_owned()
    } else if header.snapshots > 0 {
        format!("it has {} internal snapshots", header.snapshots)
    } else if header.virtual_size() == 0 {
        "the disk has no sector".to_owned()
    } else if let Some(backing) = header.backing.as_ref().filter(|b| b.format.is_none()) {
        let name: &Path = backing.name.as_ref();
        format!(
            "it does not name the format of backing file '{}', and formats are never probed \
             (qemu-img rebase -u -F stores it)",
            name.display()
        )
    } else {
        return Ok(());
    };
    Err(refused(options, reason))
}

/// Opens the data file for writing.
///
/// Its name is taken as relative to the folder of the qcow2 file, as backing files' names are. QEMU
/// looks for it in its working directory; where that finds another file, nobody knows which of the
/// two the disk is, and the person must say.
fn open_data(options: &AdoptOptions, header: &Qcow2Header) -> Result<Arc<HostFile>, ForeignError> {
    if let Some(path) = &options.data_file {
        return open(DATA, path, Access::ReadWrite);
    }
    let advice = "--data-file FILE says which file it is";
    let name =
        header.external_data().ok().flatten().ok_or_else(|| {
            refused(options, format!("it does not name its data file ({advice})"))
        })?;
    let path = name.resolve(folder_of(&options.qcow2));
    let here: &Path = name.as_ref();
    let found = HostFile::open(&path, Access::ReadWrite, CacheMode::Buffered);
    let elsewhere = HostFile::open(here, Access::ReadOnly, CacheMode::Buffered);
    match (found, elsewhere) {
        (Ok(found), Ok(other)) if found.identity() != other.identity() => {
            let (path, here) = (path.display(), here.display());
            let reason = format!("its data file could be '{path}' or '{here}' ({advice})");
            Err(refused(options, reason))
        }
        (Ok(found), _) => Ok(Arc::new(found)),
        (Err(error), Ok(_)) if error.kind() == io::ErrorKind::NotFound => {
            let (path, here) = (path.display(), here.display());
            let reason =
                format!("its data file '{path}' does not exist, but '{here}' does ({advice})");
            Err(refused(options, reason))
        }
        (Err(error), _) => Err(io_error("open", DATA, &path)(error)),
    }
}

/// The backing file and its format; `None` without one. A file without a format has been refused.
fn backing_of(header: &Qcow2Header) -> Option<FileReference> {
    let backing = header.backing.as_ref()?;
    Some(FileReference { name: backing.name.clone(), format: backing.format.clone()? })
}

/// Opens what the disk shows where it has nothing.
fn open_backing(
    options: &AdoptOptions,
    header: &Qcow2Header,
) -> Result<Option<OpenChain>, ForeignError> {
    let Some(reference) = backing_of(header) else { return Ok(None) };
    let (path, format) = resolve(&reference, folder_of(&options.qcow2))?;
    Ok(Some(OpenChain::open_backing(&path, format, ChainOptions::BUFFERED)?))
}

/// Opens a file.
fn open(what: &'static str, path: &Path, access: Access) -> Result<Arc<HostFile>, ForeignError> {
    let file = HostFile::open(path, access, CacheMode::Buffered);
    file.map(Arc::new).map_err(io_error("open", what, path))
}

/// Refuses files that play two roles.
fn check_distinct(options: &AdoptOptions, files: &[(&str, &HostFile)]) -> Result<(), ForeignError> {
    for (index, (one, file)) in files.iter().enumerate() {
        for (other, same) in &files[..index] {
            if file.identity() == same.identity() {
                let (path, same) = (file.path().display(), same.path().display());
                let reason = format!("{one} '{path}' and {other} '{same}' are the same file");
                return Err(refused(options, reason));
            }
        }
    }
    Ok(())
}

/// Makes a [`ForeignError::Refused`] about the qcow2 file.
fn refused(options: &AdoptOptions, reason: String) -> ForeignError {
    ForeignError::Refused { verb: "adopt", path: options.qcow2.clone(), reason }
}

/// Says which file a [`WalkError`] is about.
fn walk_error(path: &Path, error: WalkError) -> ForeignError {
    match error {
        WalkError::Io(error) => io_error("read", QCOW2, path)(error),
        WalkError::Format(source) => ForeignError::Qcow2 { path: path.to_owned(), source },
        WalkError::Interrupted(interrupted) => interrupted.into(),
        other => ForeignError::Refused {
            verb: "adopt",
            path: path.to_owned(),
            reason: other.to_string(),
        },
    }
}

/// The first cluster of a qcow2 file, or as much of it as there is; of another file a few bytes.
async fn first_cluster<S: Storage>(file: &S) -> io::Result<Vec<u8>> {
    let prefix = IoBuffer::zeroed(PREFIX_LEN);
    let got = transfer::read_up_to(file, 0, prefix.clone()).await?;
    let prefix = prefix.slice(0, got).to_vec();
    // What is wrong with the prefix is said when it is decoded.
    let Ok(len) = Qcow2Header::area_len(&prefix) else { return Ok(prefix) };
    let area = IoBuffer::zeroed(usize::try_from(len).map_err(io::Error::other)?);
    let got = transfer::read_up_to(file, 0, area.clone()).await?;
    Ok(area.slice(0, got).to_vec())
}

/// Says which file a [`TakeoverError`] is about.
fn takeover_error(options: &AdoptOptions, data: &HostFile, error: TakeoverError) -> ForeignError {
    match error {
        TakeoverError::Data(action, error) => io_error(action, DATA, data.path())(error),
        TakeoverError::New(error) => io_error("write", NEW, &options.new)(error),
        TakeoverError::Interrupted(interrupted) => interrupted.into(),
        TakeoverError::Backing(error) => error.into(),
        TakeoverError::Header(source) => ForeignError::Name { path: options.new.clone(), source },
        other => refused(options, other.to_string()),
    }
}
