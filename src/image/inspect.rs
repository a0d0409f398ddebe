//! The files of an add-cow disk that are its own: opened, checked, and what they say.
//!
//! Works where the backing file is missing or cannot be used: only its name is needed. The raw
//! image is needed, because the size of the disk is its length.
//!
//! Not here: whether all is as it should be (`check`), and how facts are shown.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::allocation::AllocationMap;
use super::chain::{ChainOptions, OpenChain};
use super::open::{
    check_distinct, check_raw, file_len, folder_of, io_error, load_error, lock_for, open_unlocked,
    sectors_of,
};
use super::{FileRole, OpenError, load};
use crate::executor::block_on;
use crate::format::{BitmapGeometry, Header};
use crate::storage::file::FileStorage;
use crate::storage::host_file::{Access, CacheMode, HostFile};
use crate::storage::lock::Locking;
use crate::storage::name_policy::Named;

/// How the two files of a disk are opened. The add-cow file always goes through the page cache.
#[derive(Debug, Clone, Copy)]
pub struct DiskAccess {
    /// The add-cow file.
    pub side: Access,
    /// The raw image.
    pub raw: Access,
    /// Cache of the raw image.
    pub cache: CacheMode,
    /// Whether both are locked, each for its access.
    pub locking: Locking,
}

impl DiskAccess {
    /// For the tool: reading only, through the page cache.
    pub const READ: Self = Self {
        side: Access::ReadOnly,
        raw: Access::ReadOnly,
        cache: CacheMode::Buffered,
        locking: Locking::On,
    };

    /// For the tool: reading and writing, through the page cache.
    pub const WRITE: Self = Self { side: Access::ReadWrite, raw: Access::ReadWrite, ..Self::READ };
}

/// An add-cow disk as its own two files describe it.
#[derive(Debug)]
pub struct DiskFiles {
    /// The add-cow file.
    pub side: Arc<HostFile>,
    /// Its header.
    pub header: Header,
    /// The shape of its bitmap, which includes the virtual size.
    pub geometry: BitmapGeometry,
    /// The raw image.
    pub raw: Arc<HostFile>,
    /// Where the backing file would be, if the header names one. Not looked up.
    pub backing_path: Option<PathBuf>,
    /// Whether the files are locked.
    locking: Locking,
}

impl DiskFiles {
    /// Opens the add-cow file `path` and the raw image that it names.
    ///
    /// # Errors
    /// An [`OpenError`] that names the file. Nothing has been changed.
    pub fn open(path: &Path, access: DiskAccess) -> Result<Self, OpenError> {
        Self::open_checked(path, Named::Operator, access, |_, _| Ok(()))
    }

    /// The same for an add-cow file that `named` has named; `check` may refuse each of the files
    /// after it was opened, before it is locked: a file that this process has locked already would
    /// refuse itself with another message.
    ///
    /// # Errors
    /// As [`DiskFiles::open`], or what `check` returned.
    pub(crate) fn open_checked(
        path: &Path,
        named: Named<'_>,
        access: DiskAccess,
        mut check: impl FnMut(FileRole, &HostFile) -> Result<(), OpenError>,
    ) -> Result<Self, OpenError> {
        let side = open_unlocked(FileRole::Side, path, named, access.side, CacheMode::Buffered)?;
        check(FileRole::Side, &side)?;
        // Before anything is read from it.
        lock_for(FileRole::Side, &side, access.side, access.locking)?;
        if access.side == Access::ReadWrite {
            // Its bits are believed from now on (I1), also those that a sync has failed on before.
            side.settle().map_err(io_error("sync", FileRole::Side, path))?;
        }
        let storage = FileStorage::new(Arc::clone(&side));
        let header = block_on(load::header(&storage)).map_err(|e| load_error(path, e))?;
        let folder = folder_of(path);
        let raw_path = check_raw(FileRole::Raw, &header.image, folder)?;
        let named = Named::InFolder(folder);
        let raw = open_unlocked(FileRole::Raw, &raw_path, named, access.raw, access.cache)?;
        check(FileRole::Raw, &raw)?;
        check_distinct(FileRole::Raw, &raw, FileRole::Side, &side)?;
        lock_for(FileRole::Raw, &raw, access.raw, access.locking)?;
        let geometry = BitmapGeometry::new(header.cluster_size, sectors_of(&raw)?)
            .map_err(|source| OpenError::Format { path: path.to_owned(), source })?;
        let backing_path = header.backing.as_ref().map(|file| file.name.resolve(folder));
        let locking = access.locking;
        Ok(Self { side, header, geometry, raw, backing_path, locking })
    }

    /// Opens the backing chain, if the disk has one and needs it. None of its files may be one of
    /// the disk's own.
    ///
    /// # Errors
    /// As [`DiskFiles::open`].
    pub fn open_backing(&self, cache: CacheMode) -> Result<Option<OpenChain>, OpenError> {
        self.open_below(&self.header, cache)
    }

    /// The same, also where every cluster is in the raw image: the disk is about to lose them.
    ///
    /// # Errors
    /// As [`DiskFiles::open`].
    pub fn open_backing_of_emptied(&self) -> Result<Option<OpenChain>, OpenError> {
        let emptied = Header { all_allocated: false, ..self.header.clone() };
        self.open_below(&emptied, CacheMode::Buffered)
    }

    /// Opens what a disk with this header stands on.
    fn open_below(
        &self,
        header: &Header,
        cache: CacheMode,
    ) -> Result<Option<OpenChain>, OpenError> {
        let own: [(FileRole, &HostFile); 2] =
            [(FileRole::Side, &self.side), (FileRole::Raw, &self.raw)];
        let options = ChainOptions { cache, locking: self.locking };
        let folder = folder_of(self.side.path());
        OpenChain::below(header, folder, Named::InFolder(folder), options, &own)
    }

    /// Which clusters are in the raw image. Reads the bitmap, unless the header says that all are.
    ///
    /// # Errors
    /// As [`DiskFiles::open`].
    pub fn allocation(&self) -> Result<AllocationMap, OpenError> {
        if self.header.all_allocated {
            return Ok(AllocationMap::all());
        }
        let storage = FileStorage::new(Arc::clone(&self.side));
        block_on(load::bitmap(&storage, &self.geometry))
            .map_err(|e| load_error(self.side.path(), e))
    }

    /// Refuses an add-cow file that ends before its bitmap does, unless the bitmap is not needed.
    ///
    /// # Errors
    /// `Truncated`; `Io` if the host does not tell.
    pub fn check_complete(&self) -> Result<(), OpenError> {
        let needed = self.geometry.offset() + self.geometry.used_len();
        let found = file_len(FileRole::Side, &self.side)?;
        if found < needed && !self.header.all_allocated {
            let path = self.side.path().to_owned();
            return Err(OpenError::Truncated { path, found, needed });
        }
        Ok(())
    }

    /// How many clusters are in the raw image. Reads the bitmap.
    ///
    /// # Errors
    /// As [`DiskFiles::open`].
    pub fn allocated_clusters(&self) -> Result<u64, OpenError> {
        Ok(self.allocation()?.loaded().unwrap_or(self.geometry.clusters()))
    }
}
