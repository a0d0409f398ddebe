//! Opening a chain: following backing names down, layer by layer.
//!
//! Names and formats inside a header are somebody else's words (P6). A name is a plain path,
//! relative to the folder of the file that holds it; a format is what the header says, and is never
//! found out from a file's content. No file comes twice in a chain, however it is named, so that a
//! chain has an end; and it has at most [`MAX_LAYERS`] layers.
//!
//! Not here: what is done with the layers (`mod`).

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::qcow2::{self, Shared, Table};
use super::qed;
use super::{ClusterMap, DiskFormat, Layer, LayerDetails, LayerMap, MAX_LAYERS, OpenChain};
use crate::executor::block_on;
use crate::format::qcow2::{Backing, Header as Qcow2Header};
use crate::format::{FileName, FileReference, Header};
use crate::image::inspect::{DiskAccess, DiskFiles};
use crate::image::open::{RAW_FORMAT, file_len, folder_of, io_error, lock_for, open_unlocked};
use crate::image::{FileRole, OpenError};
use crate::storage::Alignment;
use crate::storage::file::FileStorage;
use crate::storage::host_file::{Access, CacheMode, FileIdentity, HostFile};
use crate::storage::lock::Locking;
use crate::storage::name_policy::Named;

/// How the files of a chain are opened; always for reading only.
#[derive(Debug, Clone, Copy)]
pub struct ChainOptions {
    /// Cache of the files with data.
    pub cache: CacheMode,
    /// Whether the files are locked, against those who would write to them.
    pub locking: Locking,
}

impl ChainOptions {
    /// Through the page cache: for the tool.
    pub const BUFFERED: Self = Self { cache: CacheMode::Buffered, locking: Locking::On };
}

impl OpenChain {
    /// Opens the disk `path`, and all that it stands on.
    ///
    /// # Errors
    /// An [`OpenError`] that names the file.
    pub fn open(path: &Path, format: DiskFormat, options: ChainOptions) -> Result<Self, OpenError> {
        Opener::new(options, Vec::new(), 0).open(Next::asked(FileRole::Disk, path, format))
    }

    /// Opens the disk `path`, but not what it stands on: nothing shows through, and the backing
    /// file need not be there.
    ///
    /// # Errors
    /// As [`OpenChain::open`].
    pub fn open_top(
        path: &Path,
        format: DiskFormat,
        options: ChainOptions,
    ) -> Result<Self, OpenError> {
        let mut opener = Opener::new(options, Vec::new(), 0);
        opener.layer(Next::asked(FileRole::Disk, path, format))?;
        Ok(Self { layers: opener.layers })
    }

    /// The same for what is to be the backing file of a disk: there is room for one more layer.
    ///
    /// # Errors
    /// As [`OpenChain::open`].
    pub fn open_backing(
        path: &Path,
        format: DiskFormat,
        options: ChainOptions,
    ) -> Result<Self, OpenError> {
        Opener::new(options, Vec::new(), 1).open(Next::asked(FileRole::Backing, path, format))
    }

    /// Opens what stands below an add-cow disk whose own files are `files`; `None` if it has no
    /// backing file or does not need it. The name of the backing file is relative to `folder`, and
    /// comes from whom `named` says.
    ///
    /// # Errors
    /// As [`OpenChain::open`].
    pub fn below(
        header: &Header,
        folder: &Path,
        named: Named<'_>,
        options: ChainOptions,
        files: &[(FileRole, &HostFile)],
    ) -> Result<Option<Self>, OpenError> {
        let Some(reference) = needed_backing(header) else { return Ok(None) };
        let (path, format) = resolve(reference, folder)?;
        let next =
            Next { named_in: named.folder(), ..Next::asked(FileRole::Backing, &path, format) };
        let taken = files.iter().map(|(role, file)| Taken::new(*role, file)).collect();
        Opener::new(options, taken, 1).open(next).map(Some)
    }
}

/// The backing file of an add-cow disk, if it has one and needs it.
fn needed_backing(header: &Header) -> Option<&FileReference> {
    header.backing.as_ref().filter(|_| !header.all_allocated)
}

/// Where a reference to a backing file leads, and its format.
///
/// # Errors
/// `UnsupportedFormat`.
pub fn resolve(
    reference: &FileReference,
    folder: &Path,
) -> Result<(PathBuf, DiskFormat), OpenError> {
    let path = reference.name.resolve(folder);
    match DiskFormat::from_name(&reference.format) {
        Some(format) => Ok((path, format)),
        None => Err(OpenError::UnsupportedFormat {
            role: FileRole::Backing,
            path,
            format: reference.format.clone(),
            supported: DiskFormat::NAMES,
        }),
    }
}

/// A file that the disk uses already.
#[derive(Debug)]
struct Taken {
    /// As what.
    role: FileRole,
    /// Its name.
    path: PathBuf,
    /// Who it is.
    identity: FileIdentity,
}

impl Taken {
    /// Remembers `file`.
    fn new(role: FileRole, file: &HostFile) -> Self {
        Self { role, path: file.path().to_owned(), identity: file.identity() }
    }
}

/// A file of a chain that is to be opened.
#[derive(Debug)]
struct Next {
    /// As what.
    role: FileRole,
    /// Its name, as it is looked up.
    path: PathBuf,
    /// In which format it is.
    format: DiskFormat,
    /// The folder of the file that names it; `None` if a person did.
    named_in: Option<PathBuf>,
}

impl Next {
    /// A file that a person has named.
    fn asked(role: FileRole, path: &Path, format: DiskFormat) -> Self {
        Self { role, path: path.to_owned(), format, named_in: None }
    }

    /// Who has named it.
    fn named(&self) -> Named<'_> {
        Named::of(self.named_in.as_deref())
    }
}

/// A chain being opened.
#[derive(Debug)]
struct Opener {
    /// How.
    options: ChainOptions,
    /// The files used so far, those of the layers above the chain too.
    taken: Vec<Taken>,
    /// How many layers there are above the chain.
    above: usize,
    /// The layers so far.
    layers: Vec<Layer>,
    /// What the qcow2 layers share, once there is one.
    qcow2: Option<Arc<Shared>>,
    /// What the QED layers share.
    qed: Arc<qed::Shared>,
}

impl Opener {
    /// Nothing is open yet; `taken` are the files of the layers above.
    fn new(options: ChainOptions, taken: Vec<Taken>, above: usize) -> Self {
        Self { options, taken, above, layers: Vec::new(), qcow2: None, qed: Arc::default() }
    }

    /// Opens `path` and everything below it.
    fn open(mut self, first: Next) -> Result<OpenChain, OpenError> {
        let mut next = Some(first);
        while let Some(file) = next {
            if self.above + self.layers.len() == MAX_LAYERS {
                return Err(OpenError::ChainTooLong { path: file.path, max: MAX_LAYERS });
            }
            next = self.layer(file)?.resolve()?;
        }
        Ok(OpenChain { layers: self.layers })
    }

    /// Adds one layer. Returns what its header says is below.
    fn layer(&mut self, file: Next) -> Result<Below, OpenError> {
        match file.format {
            DiskFormat::Raw => self.raw(file),
            DiskFormat::AddCow => self.add_cow(file),
            DiskFormat::Qcow2 => self.qcow2(file),
            DiskFormat::Qed => self.qed(file),
        }
    }

    /// Opens one file, notes that it is used, and locks it.
    fn open_file(
        &mut self,
        role: FileRole,
        path: &Path,
        named: Named<'_>,
    ) -> Result<Arc<HostFile>, OpenError> {
        let file = open_unlocked(role, path, named, Access::ReadOnly, self.options.cache)?;
        // Before it is locked: a file that comes twice would be in the way of itself.
        self.take(role, &file)?;
        lock_for(role, &file, Access::ReadOnly, self.options.locking)?;
        Ok(file)
    }

    /// Adds a raw image. Nothing is below it.
    fn raw(&mut self, next: Next) -> Result<Below, OpenError> {
        let file = self.open_file(next.role, &next.path, next.named())?;
        let Next { role, path, .. } = next;
        let below = Below { path: path.clone(), backing: None };
        self.layers.push(Layer {
            role,
            format: DiskFormat::Raw,
            virtual_size: file_len(role, &file)?,
            files: vec![file],
            side: None,
            details: LayerDetails::Raw,
            map: LayerMap::Raw,
            path,
        });
        Ok(below)
    }

    /// Adds an add-cow disk.
    fn add_cow(&mut self, next: Next) -> Result<Below, OpenError> {
        let ChainOptions { cache, locking } = self.options;
        let role = next.role;
        let access = DiskAccess { cache, locking, ..DiskAccess::READ };
        let disk = DiskFiles::open_checked(&next.path, next.named(), access, |file_role, file| {
            let is_backing = file_role == FileRole::Side && role != FileRole::Disk;
            self.take(if is_backing { role } else { file_role }, file)
        })?;
        let path = next.path;
        let backing = needed_backing(&disk.header).cloned();
        let backing = backing.map(|FileReference { name, format }| (name, Some(format)));
        let below = Below { path: path.clone(), backing };
        let allocation = disk.allocation()?;
        let details = LayerDetails::AddCow {
            header: disk.header.clone(),
            geometry: disk.geometry,
            allocated: allocation.loaded().unwrap_or(disk.geometry.clusters()),
        };
        let map = ClusterMap { cluster_size: disk.header.cluster_size, allocation };
        self.layers.push(Layer {
            path,
            role,
            format: DiskFormat::AddCow,
            virtual_size: disk.geometry.virtual_size(),
            files: vec![disk.raw],
            side: Some(disk.side),
            details,
            map: LayerMap::AddCow(Arc::new(map)),
        });
        Ok(below)
    }

    /// Adds a qcow2 file.
    fn qcow2(&mut self, next: Next) -> Result<Below, OpenError> {
        let file = self.open_file(next.role, &next.path, next.named())?;
        let Next { role, path, named_in, .. } = next;
        let refused = |source| OpenError::Qcow2 { path: path.clone(), source };
        let header = qcow2::header(&file).map_err(io_error("read", role, &path))?;
        let header = header.map_err(refused)?;
        let folder = folder_of(&path);
        let mut files = vec![(file, Named::of(named_in.as_deref()))];
        if let Some(name) = header.external_data().map_err(refused)? {
            let named = Named::InFolder(folder);
            files.push((self.open_file(FileRole::Data, &name.resolve(folder), named)?, named));
        }
        let backing = header.backing.clone().map(|Backing { name, format }| (name, format));
        let below = Below { path: path.clone(), backing };
        let table = self.qcow2_table(role, &files, &header)?;
        self.layers.push(Layer {
            role,
            format: DiskFormat::Qcow2,
            virtual_size: header.virtual_size(),
            files: files.into_iter().map(|(file, _)| file).collect(),
            side: None,
            details: LayerDetails::Qcow2(Box::new(header)),
            map: LayerMap::Qcow2(Arc::new(table)),
            path,
        });
        Ok(below)
    }

    /// Adds a QED file. Only of a raw backing file it says what it is.
    fn qed(&mut self, next: Next) -> Result<Below, OpenError> {
        let file = self.open_file(next.role, &next.path, next.named())?;
        let Next { role, path, .. } = next;
        let refused = |source| OpenError::Qed { path: path.clone(), source };
        let opened = qed::header(&file).map_err(io_error("read", role, &path))?;
        let opened = opened.map_err(refused)?;
        let format = opened.header.backing_is_raw().then(|| RAW_FORMAT.to_owned());
        let backing = opened.backing.clone().map(|name| (name, format));
        let below = Below { path: path.clone(), backing };
        let storage = FileStorage::new(Arc::clone(&file));
        let (number, shared) = (self.layers.len(), Arc::clone(&self.qed));
        let table = qed::Table::open(&storage, opened.header.clone(), number, shared);
        let table = block_on(table).map_err(io_error("read", role, &path))?.map_err(refused)?;
        self.layers.push(Layer {
            role,
            format: DiskFormat::Qed,
            virtual_size: opened.header.image_size(),
            files: vec![file],
            side: None,
            details: LayerDetails::Qed(opened),
            map: LayerMap::Qed(Arc::new(table)),
            path,
        });
        Ok(below)
    }

    /// Makes the table of a qcow2 file, and the thread that looks things up in it.
    fn qcow2_table(
        &mut self,
        role: FileRole,
        files: &[(Arc<HostFile>, Named<'_>)],
        header: &Qcow2Header,
    ) -> Result<Table, OpenError> {
        let mut buffered = Vec::new();
        for (file, named) in files {
            // Tables and compressed clusters lie at any offset, and are read in small pieces.
            buffered.push(match file.alignment() {
                Alignment::NONE => Arc::clone(file),
                _ => open_again(role, file, *named)?,
            });
        }
        let error = io_error("read", role, files[0].0.path());
        let shared = match &self.qcow2 {
            Some(shared) => Arc::clone(shared),
            None => match Shared::new() {
                Ok(shared) => Arc::clone(self.qcow2.insert(Arc::new(shared))),
                Err(problem) => return Err(error(problem)),
            },
        };
        let (metadata, data) = (&buffered[0], buffered.get(1).map(|file| &**file));
        Table::open(metadata, data, header, self.layers.len(), shared).map_err(error)
    }

    /// Notes that `file` is used; refuses one that is used already.
    fn take(&mut self, role: FileRole, file: &HostFile) -> Result<(), OpenError> {
        let new = Taken::new(role, file);
        match self.taken.iter().find(|old| old.identity == new.identity) {
            Some(old) if old.role == role => Err(OpenError::Cycle { role, path: new.path }),
            Some(old) => Err(OpenError::SameFile {
                first: role,
                first_path: new.path,
                second: old.role,
                second_path: old.path.clone(),
            }),
            None => {
                self.taken.push(new);
                Ok(())
            }
        }
    }
}

/// Opens a file once more, through the page cache. Its name may lead elsewhere by now.
fn open_again(
    role: FileRole,
    first: &HostFile,
    named: Named<'_>,
) -> Result<Arc<HostFile>, OpenError> {
    let path = first.path();
    let again = open_unlocked(role, path, named, Access::ReadOnly, CacheMode::Buffered)?;
    if first.identity() == again.identity() {
        Ok(again)
    } else {
        let problem = io::Error::other("it was replaced while it was opened");
        Err(io_error("open", role, path)(problem))
    }
}

/// What a header says is below its layer.
#[derive(Debug)]
struct Below {
    /// The file that says so.
    path: PathBuf,
    /// Name and format of the backing file, if there is one and it is needed.
    backing: Option<(FileName, Option<String>)>,
}

impl Below {
    /// The backing file.
    fn resolve(self) -> Result<Option<Next>, OpenError> {
        let Some((name, format)) = self.backing else { return Ok(None) };
        let folder = folder_of(&self.path);
        let Some(format) = format else {
            let backing = name.resolve(folder);
            return Err(OpenError::BackingFormatMissing { path: self.path, backing });
        };
        let (path, format) = resolve(&FileReference { name, format }, folder)?;
        let named_in = Some(folder.to_owned());
        Ok(Some(Next { named_in, ..Next::asked(FileRole::Backing, &path, format) }))
    }
}
