//! What adopting and exporting qcow2 files have in common: tables, names, and how they fail.
//!
//! Not here: the format (`format::qcow2`), and the two jobs (`adopt`, `export`).

pub mod tables;
pub mod takeover;
pub mod walk;

use std::fs::metadata;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::format::qcow2::Qcow2Error;
use crate::format::{FileName, FileRole, FormatError};
use crate::image::open::folder_of;
use crate::image::{ImageError, OpenError};
use crate::jobs::progress::Interrupted;

/// Why a disk did not change its format. There is then no new file, and no disk shows anything else
/// than before.
#[derive(Debug, thiserror::Error)]
pub enum ForeignError {
    /// An add-cow disk could not be opened, or made.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A backing file could not be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// It was told to stop.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
    /// The host refused.
    #[error("cannot {action} {what} '{}'", path.display())]
    Io {
        /// What we were doing.
        action: &'static str,
        /// What the file is to us.
        what: &'static str,
        /// Its name as it was looked up.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A qcow2 file, read or to be made, breaks a rule or has what is not supported.
    #[error("cannot use qcow2 file '{}'", path.display())]
    Qcow2 {
        /// The file.
        path: PathBuf,
        /// Which rule.
        source: Qcow2Error,
    },
    /// A name cannot be stored in the new file.
    #[error("cannot name a file in '{}'", path.display())]
    Name {
        /// The new file.
        path: PathBuf,
        /// Which rule is broken.
        source: FormatError,
    },
    /// The file is sound, but not what the job can take.
    #[error("cannot {verb} '{}': {reason}", path.display())]
    Refused {
        /// What it will not do.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
}

/// Makes a [`ForeignError::Io`] of what the host said.
pub(super) fn io_error(
    action: &'static str,
    what: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> ForeignError {
    move |source| ForeignError::Io { action, what, path: path.to_owned(), source }
}

/// The name to be stored in the new file `new` for the file that an older one in the folder `old`
/// calls `name`: the same if that means the same, else the absolute path.
pub(super) fn move_name(
    new: &Path,
    old: &Path,
    role: FileRole,
    name: &FileName,
) -> Result<FileName, ForeignError> {
    let path: &Path = name.as_ref();
    if path.is_absolute() || is_same_folder(folder_of(new), old)? {
        return Ok(name.clone());
    }
    absolute_name(new, role, &name.resolve(old))
}

/// The absolute path of the file `path` as a name to be stored in `new`.
///
/// Nothing is looked up: `..` and symbolic links stay as they are.
pub(super) fn absolute_name(
    new: &Path,
    role: FileRole,
    path: &Path,
) -> Result<FileName, ForeignError> {
    let absolute =
        std::path::absolute(path).map_err(io_error("find the folder of", "file", path))?;
    FileName::new(role, absolute).map_err(name_error(new))
}

/// The name of the file `path` to be stored in `new`, without a folder; `None` unless both lie in
/// one.
pub(super) fn name_beside(
    new: &Path,
    role: FileRole,
    path: &Path,
) -> Result<Option<FileName>, ForeignError> {
    let Some(name) = path.file_name() else { return Ok(None) };
    if !is_same_folder(folder_of(new), folder_of(path))? {
        return Ok(None);
    }
    // Else it would be taken for a protocol (docs/format.md, "Names").
    let prefix: &[u8] = if name.as_bytes().contains(&b':') { b"./" } else { b"" };
    let bytes = [prefix, name.as_bytes()].concat();
    FileName::from_bytes(role, &bytes).map(Some).map_err(name_error(new))
}

/// Makes a [`ForeignError::Name`].
fn name_error(new: &Path) -> impl FnOnce(FormatError) -> ForeignError {
    move |source| ForeignError::Name { path: new.to_owned(), source }
}

/// Whether two paths lead to the same folder.
fn is_same_folder(one: &Path, other: &Path) -> Result<bool, ForeignError> {
    let identity = |path: &Path| {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let found = metadata(path).map_err(io_error("look at", "folder", path))?;
        Ok::<_, ForeignError>((found.dev(), found.ino()))
    };
    Ok(identity(one)? == identity(other)?)
}
