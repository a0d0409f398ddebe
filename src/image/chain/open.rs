//! Opening a chain: following backing names down, layer by layer.
//!
//! Names and formats inside a header are somebody else's words (P6). A name is a plain path,
//! relative to the folder of the file that holds it; a format is what the header says, and is never
//! found out from a file's content. No file comes twice in a chain, however it is named, so that a
//! chain has an end; and it has at most [`MAX_LAYERS`] layers.
//!
//! Not here: what is done with the layers (`mod`).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{ClusterMap, DiskFormat, Layer, LayerDetails, LayerMap, MAX_LAYERS, OpenChain};
use crate::format::{FileReference, Header};
use crate::image::inspect::{DiskAccess, DiskFiles};
use crate::image::open::{file_len, folder_of, lock_for, open_unlocked};
use crate::image::{FileRole, OpenError};
use crate::storage::host_file::{Access, CacheMode, FileIdentity, HostFile};
use crate::storage::lock::Locking;

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
        let opener = Opener { options, taken: Vec::new(), above: 0, layers: Vec::new() };
        opener.open(FileRole::Disk, path.to_owned(), format)
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
        let opener = Opener { options, taken: Vec::new(), above: 1, layers: Vec::new() };
        opener.open(FileRole::Backing, path.to_owned(), format)
    }

    /// Opens what stands below an add-cow disk whose own files are `files`; `None` if it has no
    /// backing file or does not need it.
    ///
    /// # Errors
    /// As [`OpenChain::open`].
    pub fn below(
        header: &Header,
        folder: &Path,
        options: ChainOptions,
        files: &[(FileRole, &HostFile)],
    ) -> Result<Option<Self>, OpenError> {
        let Some((path, format)) = backing_of(header, folder)? else { return Ok(None) };
        let taken = files.iter().map(|(role, file)| Taken::new(*role, file)).collect();
        let opener = Opener { options, taken, above: 1, layers: Vec::new() };
        opener.open(FileRole::Backing, path, format).map(Some)
    }
}

/// Where the backing file of an add-cow disk is, and its format, if it has one and needs it.
fn backing_of(header: &Header, folder: &Path) -> Result<Option<(PathBuf, DiskFormat)>, OpenError> {
    match &header.backing {
        Some(reference) if !header.all_allocated => resolve(reference, folder).map(Some),
        _ => Ok(None),
    }
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
}

impl Opener {
    /// Opens `path` and everything below it.
    fn open(
        mut self,
        role: FileRole,
        path: PathBuf,
        format: DiskFormat,
    ) -> Result<OpenChain, OpenError> {
        let mut next = Some((role, path, format));
        while let Some((role, path, format)) = next {
            if self.above + self.layers.len() == MAX_LAYERS {
                return Err(OpenError::ChainTooLong { path, max: MAX_LAYERS });
            }
            let below = match format {
                DiskFormat::Raw => self.raw(role, path)?,
                DiskFormat::AddCow => self.add_cow(role, path)?,
            };
            next = below.map(|(path, format)| (FileRole::Backing, path, format));
        }
        Ok(OpenChain { layers: self.layers })
    }

    /// Adds a raw image. Nothing is below it.
    fn raw(&mut self, role: FileRole, path: PathBuf) -> Result<Below, OpenError> {
        let file = open_unlocked(role, &path, Access::ReadOnly, self.options.cache)?;
        self.take(role, &file)?;
        lock_for(role, &file, Access::ReadOnly, self.options.locking)?;
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
        Ok(None)
    }

    /// Adds an add-cow disk.
    fn add_cow(&mut self, role: FileRole, path: PathBuf) -> Result<Below, OpenError> {
        let ChainOptions { cache, locking } = self.options;
        let access = DiskAccess { cache, locking, ..DiskAccess::READ };
        let disk = DiskFiles::open_checked(&path, access, |file_role, file| {
            let is_backing = file_role == FileRole::Side && role != FileRole::Disk;
            self.take(if is_backing { role } else { file_role }, file)
        })?;
        let below = backing_of(&disk.header, folder_of(&path))?;
        let allocation = disk.allocation()?;
        let details = LayerDetails::AddCow {
            header: disk.header.clone(),
            geometry: disk.geometry,
            allocated: allocation.count().unwrap_or(disk.geometry.clusters()),
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

/// What is below a layer: name and format.
type Below = Option<(PathBuf, DiskFormat)>;
