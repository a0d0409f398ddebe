//! Snapshots: a new overlay on a disk, which stays from then on what it is.
//!
//! Promises: the disk is not changed; the new one appears whole or not at all (`image::create`).
//!
//! Not here: keeping others from writing to the disk later on. Who opens it for writing while
//! the new one is in use is refused; who does so before changes what the new one shows.

use std::ffi::OsString;
use std::fs::metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf, absolute};

use crate::format::header::MIN_WRITTEN_CLUSTER_BITS;
use crate::format::{FileName, FileReference, FileRole as NameRole};
use crate::image::chain::DiskFormat;
use crate::image::create::{self, CreateOptions, Created};
use crate::image::inspect::{DiskAccess, DiskFiles};
use crate::image::open::folder_of;
use crate::image::{FileRole, OpenError};
use crate::jobs::JobError;
use crate::units::ClusterSize;

/// The overlay to be made.
#[derive(Debug)]
pub struct Snapshot<'a> {
    /// The add-cow disk that it stands on.
    pub disk: &'a Path,
    /// Where its add-cow file goes.
    pub path: &'a Path,
    /// Its raw image.
    pub image: FileReference,
    /// Whether that may exist already.
    pub reuse_image: bool,
    /// Whether an existing add-cow file may be replaced.
    pub force: bool,
}

/// Makes the overlay, with the size and the cluster size of the disk.
///
/// # Errors
/// `Open`, with nothing changed.
pub fn snapshot(options: Snapshot<'_>) -> Result<Created, JobError> {
    let (size, cluster_size) = {
        let disk = DiskFiles::open(options.disk, DiskAccess::READ)?;
        (disk.geometry.virtual_size(), disk.header.cluster_size)
    };
    let smallest = ClusterSize::from_bits(MIN_WRITTEN_CLUSTER_BITS);
    let name = stored_name(options.disk, options.path)?;
    let name = FileName::new(NameRole::Backing, name)
        .map_err(|source| OpenError::Header { path: options.path.to_owned(), source })?;
    Ok(create::add_cow(&CreateOptions {
        path: options.path.to_owned(),
        size: Some(size),
        // Clusters of less than 4 KiB are read and never written.
        cluster_size: smallest.map(|smallest| cluster_size.max(smallest)),
        backing: Some(FileReference { name, format: DiskFormat::AddCow.name().to_owned() }),
        image: options.image,
        reuse_image: options.reuse_image,
        force: options.force,
    })?)
}

/// How the add-cow file `path` names `disk`, both relative to the working directory: by the bare
/// name if they are in one folder, so that this can be moved, or else in full.
fn stored_name(disk: &Path, path: &Path) -> Result<PathBuf, OpenError> {
    let error = |action, role, file: &Path| {
        let path = file.to_owned();
        move |source| OpenError::Io { action, role, path, source }
    };
    // Folders are compared by who they are, not by their names.
    let folder = |file: &Path, role| {
        let folder = folder_of(file);
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        let found = metadata(folder).map_err(error("find the folder of", role, file))?;
        Ok::<_, OpenError>((found.dev(), found.ino()))
    };
    if folder(disk, FileRole::Backing)? != folder(path, FileRole::Side)? {
        return absolute(disk).map_err(error("find the folder of", FileRole::Backing, disk));
    }
    let name = disk.file_name().unwrap_or_default();
    let mut result = OsString::new();
    // docs/format.md, "Names": a colon in the bare name would make a protocol of it.
    if name.as_encoded_bytes().contains(&b':') {
        result.push("./");
    }
    result.push(name);
    Ok(result.into())
}
