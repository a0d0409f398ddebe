//! Names of files inside new files: what a name that one file holds becomes in another.
//!
//! A relative name is relative to the folder of the file that holds it. Folders are told apart by
//! (device, inode), so that symbolic links in a path do no harm; nothing else is looked up.
//!
//! Not here: which files a disk has.

use std::fs::metadata;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::format::{FileName, FileRole, FormatError};
use crate::image::open::{folder_of, io_error};
use crate::image::{FileRole as ImageRole, OpenError};
use crate::jobs::JobError;

/// The name to be stored in the new file `new` for the file that an older one in the folder `old`
/// calls `name`: the same if that means the same, else the absolute path.
pub(super) fn move_name(
    new: &Path,
    old: &Path,
    role: FileRole,
    name: &FileName,
) -> Result<FileName, JobError> {
    let path: &Path = name.as_ref();
    if path.is_absolute() || is_same_folder(folder_of(new), old)? {
        return Ok(name.clone());
    }
    absolute_name(new, role, &name.resolve(old))
}

/// The absolute path of the file `path` as a name to be stored in `new`.
///
/// Nothing is looked up: `..` and symbolic links stay as they are.
pub(super) fn absolute_name(new: &Path, role: FileRole, path: &Path) -> Result<FileName, JobError> {
    let absolute = std::path::absolute(path).map_err(io_error("find", ImageRole::Raw, path))?;
    FileName::new(role, absolute).map_err(name_error(new))
}

/// The name of the file `path` to be stored in `new`, without a folder; `None` unless both lie in
/// one.
pub(super) fn name_beside(
    new: &Path,
    role: FileRole,
    path: &Path,
) -> Result<Option<FileName>, JobError> {
    let Some(name) = path.file_name() else { return Ok(None) };
    if !is_same_folder(folder_of(new), folder_of(path))? {
        return Ok(None);
    }
    // Else it would be taken for a protocol (docs/format.md, "Names").
    let prefix: &[u8] = if name.as_bytes().contains(&b':') { b"./" } else { b"" };
    let bytes = [prefix, name.as_bytes()].concat();
    FileName::from_bytes(role, &bytes).map(Some).map_err(name_error(new))
}

/// The error for a name that cannot be stored in `new`.
fn name_error(new: &Path) -> impl FnOnce(FormatError) -> JobError {
    move |source| OpenError::Header { path: new.to_owned(), source }.into()
}

/// Whether two paths lead to the same folder.
pub(super) fn is_same_folder(one: &Path, other: &Path) -> Result<bool, JobError> {
    let identity = |path: &Path| {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let found = metadata(path).map_err(io_error("look into", ImageRole::Disk, path))?;
        Ok::<_, JobError>((found.dev(), found.ino()))
    };
    Ok(identity(one)? == identity(other)?)
}

/// Makes an error of what the host said to a new file's name.
pub(super) fn new_file_error(role: ImageRole, path: &Path, error: io::Error) -> JobError {
    let path = path.to_owned();
    match error.kind() {
        io::ErrorKind::AlreadyExists => OpenError::Exists { role, path },
        _ => OpenError::Io { action: "make", role, path, source: error },
    }
    .into()
}
