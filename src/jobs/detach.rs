//! Detaching: the add-cow file goes, and the raw image alone is the disk.
//!
//! Promises: the add-cow file is removed only if nothing is wrong with it, every cluster is in the
//! raw image, and that is durable. A cut leaves both files or the raw image alone; they show
//! the same.
//!
//! Not here: getting the clusters into the raw image (`jobs::stream`).

use std::fs::{remove_file, symlink_metadata};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::executor::block_on;
use crate::image::inspect::{DiskAccess, DiskFiles};
use crate::image::open::folder_of;
use crate::image::{FileRole, OpenError, check};
use crate::jobs::JobError;
use crate::storage::Storage;
use crate::storage::file::FileStorage;
use crate::storage::host_file::sync_folder;

/// Removes the add-cow file `path`. Returns the name of the raw image.
///
/// # Errors
/// `Open` and `Refused`, with nothing changed, unless it was the folder that could not be synced:
/// then the file is gone, but may come back after a loss of power.
pub fn detach(path: &Path) -> Result<PathBuf, JobError> {
    let error = |action| {
        let path = path.to_owned();
        move |source| OpenError::Io { action, role: FileRole::Side, path, source }
    };
    let disk = DiskFiles::open(path, DiskAccess::WRITE)?;
    // Removing the link would leave the file, which somebody else may use then.
    if symlink_metadata(path).map_err(error("look at"))?.is_symlink() {
        return Err(refused(path, "is a symbolic link: name the file that it leads to"));
    }
    let report = check::files(&disk, false)?;
    if let Some(finding) = report.findings.iter().find(|f| f.corruptions() + f.leaks() > 0) {
        return Err(refused(path, &format!("is not clean (see addcow check): {finding}")));
    }
    let total = disk.geometry.clusters();
    if report.allocated < total {
        let missing = total - report.allocated;
        let problem = format!("{missing} of {total} clusters are not in the raw image yet");
        return Err(refused(path, &format!("cannot be detached: {problem} (see addcow stream)")));
    }
    let raw = FileStorage::new(Arc::clone(&disk.raw));
    block_on(raw.sync()).map_err(|source| {
        let path = disk.raw.path().to_owned();
        OpenError::Io { action: "sync", role: FileRole::Raw, path, source }
    })?;
    remove_file(path).map_err(error("remove"))?;
    sync_folder(folder_of(path)).map_err(error("sync the folder of"))?;
    Ok(disk.raw.path().to_owned())
}

/// The error for a disk that cannot be detached.
fn refused(path: &Path, problem: &str) -> JobError {
    JobError::Refused(format!("'{}' {problem}", path.display()))
}
