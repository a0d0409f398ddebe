//! Facts about a disk, found out without opening it for use.
//!
//! Works where the backing file is missing or cannot be used: only its name is needed. The raw
//! image is needed, because the size of the disk is its length.
//!
//! Not here: whether the facts are as they should be (`check`), and how they are shown.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::open::{
    check_distinct, check_format, folder_of, load_error, open_backing, open_file, sectors_of,
};
use super::{FileRole, OpenError, load};
use crate::executor::block_on;
use crate::format::{BitmapGeometry, Header};
use crate::storage::file::FileStorage;
use crate::storage::host_file::{Access, CacheMode, HostFile};

/// An add-cow disk as its own two files describe it.
#[derive(Debug)]
pub struct DiskFiles {
    /// The add-cow file.
    pub side: Arc<HostFile>,
    /// Its header.
    pub header: Header,
    /// The shape of its bitmap, which includes the virtual size.
    pub geometry: BitmapGeometry,
    /// The raw image, open for reading.
    pub raw: Arc<HostFile>,
    /// Where the backing file would be, if the header names one. Not looked up.
    pub backing_path: Option<PathBuf>,
}

impl DiskFiles {
    /// Opens the add-cow file `path` with that access, and the raw image for reading.
    ///
    /// # Errors
    /// An [`OpenError`] that names the file. Nothing has been changed.
    pub fn open(path: &Path, access: Access) -> Result<Self, OpenError> {
        let side = open_file(FileRole::Side, path, access, CacheMode::Buffered)?;
        let storage = FileStorage::new(Arc::clone(&side));
        let header = block_on(load::header(&storage)).map_err(|e| load_error(path, e))?;
        let folder = folder_of(path);
        let raw_path = check_format(FileRole::Raw, &header.image, folder)?;
        let raw = open_file(FileRole::Raw, &raw_path, Access::ReadOnly, CacheMode::Buffered)?;
        check_distinct(FileRole::Raw, &raw, FileRole::Side, &side)?;
        let geometry = BitmapGeometry::new(header.cluster_size, sectors_of(&raw)?)
            .map_err(|source| OpenError::Format { path: path.to_owned(), source })?;
        let backing_path = header.backing.as_ref().map(|file| file.name.resolve(folder));
        Ok(Self { side, header, geometry, raw, backing_path })
    }

    /// Opens the backing file, if the disk has one and needs it. It must be neither of the disk's
    /// own files.
    ///
    /// # Errors
    /// As [`DiskFiles::open`].
    pub fn open_backing(&self) -> Result<Option<Arc<HostFile>>, OpenError> {
        let folder = folder_of(self.side.path());
        let backing = open_backing(&self.header, folder, CacheMode::Buffered)?;
        if let Some(backing) = &backing {
            check_distinct(FileRole::Raw, &self.raw, FileRole::Backing, backing)?;
            check_distinct(FileRole::Backing, backing, FileRole::Side, &self.side)?;
        }
        Ok(backing)
    }

    /// How many clusters are in the raw image. Reads the bitmap.
    ///
    /// # Errors
    /// As [`DiskFiles::open`].
    pub fn allocated_clusters(&self) -> Result<u64, OpenError> {
        if self.header.all_allocated {
            return Ok(self.geometry.clusters());
        }
        let storage = FileStorage::new(Arc::clone(&self.side));
        let map = block_on(load::bitmap(&storage, &self.geometry))
            .map_err(|e| load_error(self.side.path(), e))?;
        Ok(map.count().unwrap_or(self.geometry.clusters()))
    }
}
