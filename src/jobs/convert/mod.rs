//! Converting: a new disk that shows what a chain shows.
//!
//! Promises: the new disk appears whole and durable under its name, or not at all. Of an add-cow
//! disk the raw image gets its name first: without the add-cow file that is nobody's. Files that
//! are there already are replaced only on request, and never those that the chain is made of. Where
//! both files of an add-cow disk are replaced, the old add-cow file goes first: no cut may leave it
//! over a raw image that it knows nothing of.
//!
//! Not here: moving the bytes (`copy`).

mod copy;

use std::fs::remove_file;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use copy::{to_overlay, to_raw};

use crate::executor::block_on;
use crate::format::{BitmapGeometry, Header};
use crate::image::allocation::AllocationMap;
use crate::image::chain::open::resolve;
use crate::image::chain::{ChainOptions, DiskFormat, OpenChain};
use crate::image::create::{CreateOptions, NewSide, default_cluster_size, new_geometry};
use crate::image::open::{check_raw, folder_of, io_error, lock_for, open_existing};
use crate::image::{FileRole, Image, ImageState, OpenError};
use crate::jobs::JobError;
use crate::jobs::copy::Pace;
use crate::jobs::names::{is_same_folder, new_file_error};
use crate::jobs::progress::Progress;
use crate::storage::Storage;
use crate::storage::file::FileStorage;
use crate::storage::host_file::{Access, HostFile, sync_folder};
use crate::storage::lock::Locking;
use crate::storage::new_file::{NewFile, check_target};
use crate::units::SECTOR_SIZE;

/// What is to be converted into what.
#[derive(Debug, Clone)]
pub struct ConvertOptions {
    /// The disk.
    pub source: PathBuf,
    /// Its format.
    pub format: DiskFormat,
    /// Whether its files are locked.
    pub locking: Locking,
    /// The new disk.
    pub target: Target,
    /// How many bytes of zeros become a hole, a multiple of 512; `None`: none do, the new disk
    /// takes all its space.
    pub block: Option<u64>,
}

/// A new disk.
#[derive(Debug, Clone)]
pub enum Target {
    /// A raw image.
    Raw {
        /// Its name.
        path: PathBuf,
        /// Whether an existing file may be replaced.
        force: bool,
    },
    /// An add-cow disk. Its size is that of the old one; `force` is for the raw image too.
    AddCow(CreateOptions),
}

/// Makes a new disk that shows the same as another one.
///
/// # Errors
/// See [`JobError`]. There is then no new file.
pub fn convert(options: &ConvertOptions, progress: &impl Progress) -> Result<(), JobError> {
    let chain_options = ChainOptions { locking: options.locking, ..ChainOptions::BUFFERED };
    let source = OpenChain::open(&options.source, options.format, chain_options)?;
    // A raw image may end inside a sector; a disk does not.
    let size = source.virtual_size().checked_next_multiple_of(SECTOR_SIZE).unwrap_or(u64::MAX);
    match &options.target {
        Target::Raw { path, force } => {
            let new = NewRaw::create(FileRole::Disk, path, *force, size, &[&source])?;
            let source = source.handle(FileStorage::new);
            let pace = Pace::default();
            block_on(to_raw(&source, &new.storage, options.block, pace, progress))?;
            new.publish()
        }
        Target::AddCow(target) => NewDisk::plan(target, &source, size)?.make(options, progress),
    }
}

/// A raw image that does not have its name yet.
struct NewRaw {
    /// What it is, for messages.
    role: FileRole,
    /// The file under its temporary name.
    file: NewFile,
    /// The same for reading and writing.
    storage: FileStorage,
    /// The name that it will have.
    path: PathBuf,
    /// Whether an existing file may be replaced.
    force: bool,
    /// The file that will be replaced, if there is one; kept for its lock.
    replaced: Option<HostFile>,
}

impl NewRaw {
    /// Makes an image of `size` bytes, all of them holes, that can get the name `path`: which is
    /// no file of `chains`.
    fn create(
        role: FileRole,
        path: &Path,
        force: bool,
        size: u64,
        chains: &[&OpenChain],
    ) -> Result<Self, JobError> {
        let replaced = check_new(role, path, force, chains)?;
        let file = NewFile::create(path).map_err(io_error("make", role, path))?;
        let storage = FileStorage::new(Arc::clone(file.file()));
        storage.set_len(size).map_err(io_error("set the length of", role, path))?;
        Ok(Self { role, file, storage, path: path.to_owned(), force, replaced })
    }

    /// Gives it its name.
    fn publish(self) -> Result<(), JobError> {
        let Self { role, file, path, force, .. } = self;
        file.publish(force).map_err(|error| new_file_error(role, &path, error))
    }
}

/// Refuses a new file that is there already and may not be replaced, is in use, or is one of
/// `chains`. Returns the one that will be replaced, locked.
fn check_new(
    role: FileRole,
    path: &Path,
    force: bool,
    chains: &[&OpenChain],
) -> Result<Option<HostFile>, JobError> {
    check_target(path, force).map_err(|error| new_file_error(role, path, error))?;
    let Some(old) = open_existing(role, path)? else { return Ok(None) };
    let layers = chains.iter().flat_map(|chain| chain.layers());
    if layers.flat_map(|layer| layer.files()).any(|file| file.identity() == old.identity()) {
        let name = path.display();
        return Err(JobError::Refused(format!("'{name}' cannot be replaced: it is read")));
    }
    lock_for(role, &old, Access::ReadWrite, Locking::On)?;
    Ok(Some(old))
}

/// An add-cow disk that does not have its names yet.
struct NewDisk<'a> {
    /// What was asked for.
    options: &'a CreateOptions,
    /// What it is to show.
    source: &'a OpenChain,
    /// What it shows without a cluster of its own.
    backing: Option<OpenChain>,
    /// Its header.
    header: Header,
    /// The shape of its bitmap.
    geometry: BitmapGeometry,
    /// Its raw image.
    raw: NewRaw,
    /// The add-cow file that will be replaced, if there is one; kept for its lock.
    replaced: Option<HostFile>,
}

impl<'a> NewDisk<'a> {
    /// Looks at everything, and makes the raw image, under its temporary name.
    fn plan(
        options: &'a CreateOptions,
        source: &'a OpenChain,
        size: u64,
    ) -> Result<Self, JobError> {
        let path = &options.path;
        if size == 0 {
            let problem = "a disk has at least one sector of 512 bytes";
            return Err(OpenError::InvalidSize { size, problem }.into());
        }
        let folder = folder_of(path);
        let image_path = check_raw(FileRole::Raw, &options.image, folder)?;
        let backing = match &options.backing {
            Some(reference) => {
                let (path, format) = resolve(reference, folder)?;
                Some(OpenChain::open_backing(&path, format, ChainOptions::BUFFERED)?)
            }
            None => None,
        };
        if path.file_name() == image_path.file_name()
            && is_same_folder(folder, folder_of(&image_path))?
        {
            let name = path.display();
            return Err(JobError::Refused(format!(
                "'{name}' cannot be the add-cow file and its image file"
            )));
        }
        let chains: Vec<&OpenChain> = [source].into_iter().chain(&backing).collect();
        let replaced = check_new(FileRole::Side, path, options.force, &chains)?;
        let header = Header {
            cluster_size: options.cluster_size.unwrap_or_else(|| default_cluster_size(size)),
            backing: options.backing.clone(),
            image: options.image.clone(),
            all_allocated: options.backing.is_none(),
            compat_features: 0,
        };
        let geometry = new_geometry(path, header.cluster_size, size)?;
        let raw = NewRaw::create(FileRole::Raw, &image_path, options.force, size, &chains)?;
        Ok(Self { options, source, backing, header, geometry, raw, replaced })
    }

    /// Makes the add-cow file, copies, and gives both files their names.
    fn make(self, options: &ConvertOptions, progress: &impl Progress) -> Result<(), JobError> {
        let path = &self.options.path;
        let error = |action| io_error(action, FileRole::Side, path);
        let content = NewSide::new(&self.header, self.geometry)
            .map_err(|source| OpenError::Header { path: path.clone(), source })?;
        let side = NewFile::create(path).map_err(error("make"))?;
        let side_storage = FileStorage::new(Arc::clone(side.file()));
        let raw = self.raw.storage.clone();
        let source = self.source.handle(FileStorage::new);
        let pace = Pace::default();
        match &self.backing {
            None => {
                block_on(to_raw(&source, &raw, options.block, pace, progress))?;
                block_on(content.write(&side_storage)).map_err(error("write"))?;
            }
            Some(backing) => {
                block_on(content.write(&side_storage)).map_err(error("write"))?;
                let image = self.image(backing, raw, side_storage)?;
                let backing = backing.handle(FileStorage::new);
                block_on(to_overlay(&source, &backing, &image, pace, progress))?;
            }
        }
        self.publish(side)
    }

    /// Gives both files their names.
    fn publish(self, side: NewFile) -> Result<(), JobError> {
        let (path, force) = (&self.options.path, self.options.force);
        let error = |action| io_error(action, FileRole::Side, path);
        let image_path = self.raw.path.clone();
        let is_new = self.raw.replaced.is_none();
        if self.replaced.is_some() && !is_new {
            remove_file(path).map_err(error("remove the old"))?;
            sync_folder(folder_of(path)).map_err(error("sync the folder of"))?;
        }
        self.raw.publish()?;
        side.publish(force).map_err(|error| {
            if is_new {
                // It replaced nothing, and nobody knows of it.
                drop(remove_file(&image_path));
            }
            new_file_error(FileRole::Side, path, error)
        })
    }

    /// The new disk over its backing chain, without a cluster of its own so far.
    fn image(
        &self,
        backing: &OpenChain,
        raw: FileStorage,
        side: FileStorage,
    ) -> Result<Image<FileStorage>, JobError> {
        let no_memory = || {
            let reason = std::io::ErrorKind::OutOfMemory.into();
            io_error("allocate the bitmap of", FileRole::Side, &self.options.path)(reason)
        };
        let allocation = AllocationMap::empty(&self.geometry).ok_or_else(no_memory)?;
        let backing_len = backing.virtual_size();
        let state = ImageState::add_cow(self.geometry, allocation, backing_len, true);
        let chain = backing.handle(FileStorage::new);
        Ok(Image::new(Arc::new(state), raw, Some(side), Some(chain)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    use crate::format::{FileName, FileReference, FileRole as NameRole};

    #[test]
    fn an_old_add_cow_file_is_gone_before_its_raw_image_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("source"), [1; 4096]).unwrap();
        for name in ["disk.add-cow", "disk.raw"] {
            fs::write(at(name), b"old").unwrap();
        }
        let target = CreateOptions {
            path: at("disk.add-cow"),
            size: None,
            cluster_size: None,
            backing: None,
            image: FileReference {
                name: FileName::new(NameRole::Image, "disk.raw").unwrap(),
                format: "raw".to_owned(),
            },
            reuse_image: false,
            force: true,
        };
        let options = ChainOptions::BUFFERED;
        let source = OpenChain::open(&at("source"), DiskFormat::Raw, options).unwrap();
        let disk = NewDisk::plan(&target, &source, 4096).unwrap();
        let side = NewFile::create(&target.path).unwrap();
        // So that the raw image cannot get its name.
        fs::remove_file(at("disk.raw")).unwrap();
        fs::create_dir(at("disk.raw")).unwrap();
        disk.publish(side).unwrap_err();
        assert!(!at("disk.add-cow").exists());
    }
}
