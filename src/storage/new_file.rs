//! New files that appear whole and durable under their name, or not at all.
//!
//! A [`NewFile`] is written under the name `.NAME.xxxxxx` beside the one that it will have; it gets
//! that name in one step, once its content is synced. Dropped before, it goes away. A process that
//! is killed leaves the temporary file behind, and whatever had the name before as it was. Where
//! that must not be found any more before the new one is there, it is [`SetAside`].
//!
//! Not here: what is written, and whether the file that is replaced is one that may be.

use std::ffi::{OsStr, OsString};
use std::fs::{metadata, remove_file, rename, symlink_metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::Mode;
use tempfile::{NamedTempFile, TempPath};

use super::host_file::{HostFile, PERMISSIONS, sync_folder};

/// The most bytes of the name in that of the temporary file: a file name has at most 255 bytes, and
/// two dots and six random characters are put around these.
const MAX_PREFIX_LEN: usize = 200;

/// A file that does not have its name yet.
#[derive(Debug)]
pub struct NewFile {
    /// The file under its temporary name; removed on drop.
    temporary: NamedTempFile<Arc<HostFile>>,
    /// The name that it will have.
    path: PathBuf,
}

impl NewFile {
    /// Makes an empty file in the folder of `path`: with the permission bits of the file which has
    /// that name, since whom they keep out must not read what replaces it; else with those of a new
    /// file there.
    ///
    /// # Errors
    /// What the host said.
    pub fn create(path: &Path) -> io::Result<Self> {
        let mut prefix = OsString::from(".");
        // Cut, so that the longest legal file name leaves room for the random part.
        prefix.push(OsStr::from_bytes(path.file_name().map_or(b"", |name| {
            let bytes = name.as_bytes();
            bytes.get(..MAX_PREFIX_LEN).unwrap_or(bytes)
        })));
        prefix.push(".");
        // The host's own words: the error of `tempfile` would show the random name, which means
        // nothing to anybody.
        let mut refusal = None;
        let mode = permissions_of(path)?;
        let temporary = tempfile::Builder::new().prefix(&prefix).make_in(folder_of(path), |path| {
            let made = match mode {
                Some(mode) => HostFile::create_new_with(path, mode),
                None => HostFile::create_new(path),
            };
            made.map(Arc::new).inspect_err(|error| {
                refusal = error.raw_os_error().map(io::Error::from_raw_os_error);
            })
        });
        let temporary = temporary.map_err(|error| refusal.unwrap_or(error))?;
        Ok(Self { temporary, path: path.to_owned() })
    }

    /// The file, open for reading and writing.
    #[must_use]
    pub fn file(&self) -> &Arc<HostFile> {
        self.temporary.as_file()
    }

    /// Gives the file its name, and makes that durable. What it holds must be synced already. Any
    /// file of that name goes away if `replace`.
    ///
    /// # Errors
    /// `AlreadyExists` if there is one and it may not be replaced; else what the host said. There
    /// is then no new file, unless an old one was replaced and only the folder was not synced.
    pub fn publish(self, replace: bool) -> io::Result<()> {
        let Self { temporary, path } = self;
        let named =
            if replace { temporary.persist(&path) } else { temporary.persist_noclobber(&path) };
        named.map_err(|refused| refused.error)?;
        sync_folder(folder_of(&path)).inspect_err(|_| {
            if !replace {
                // It replaced nothing, so it can go.
                drop(remove_file(&path));
            }
        })
    }
}

/// A file that has lost its name for now, because what belongs to it is about to change: under that
/// name it would be taken for what it is not any more. Dropped, it gets its name back. A process
/// that is killed leaves it under a temporary name.
#[derive(Debug)]
pub struct SetAside {
    /// Its temporary name; `None` once it is settled what becomes of the file.
    temporary: Option<TempPath>,
    /// The name that it had.
    path: PathBuf,
}

impl SetAside {
    /// Takes the name away from the file `path`, durably.
    ///
    /// # Errors
    /// What the host said. The file has its name then.
    pub fn new(path: &Path) -> io::Result<Self> {
        // A name that is ours: the rename replaces an empty file, and never another one.
        let temporary = NewFile::create(path)?.temporary.into_temp_path();
        rename(path, &temporary)?;
        let aside = Self { temporary: Some(temporary), path: path.to_owned() };
        sync_folder(folder_of(path))?;
        Ok(aside)
    }

    /// Removes the file: there is another one by now.
    pub fn discard(mut self) {
        // Where that fails a temporary file stays behind, which harms nobody.
        drop(self.temporary.take());
    }
}

impl Drop for SetAside {
    fn drop(&mut self) {
        let Some(temporary) = self.temporary.take() else { return };
        // Not over a file that somebody else has made meanwhile; then both stay.
        if let Err(refused) = temporary.persist_noclobber(&self.path) {
            drop(refused.path.keep());
        }
    }
}

/// Whether a new file may get the name `path`: its folder is there, and there is no file, or it may
/// be replaced and is a regular one, never a device, a folder or a link.
///
/// # Errors
/// `AlreadyExists` if it may not be replaced, `InvalidInput` if it is of another kind; else what
/// the host said.
pub fn check_target(path: &Path, replace: bool) -> io::Result<()> {
    if !metadata(folder_of(path))?.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    let old = match symlink_metadata(path) {
        Ok(old) => old,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !replace {
        return Err(io::Error::from_raw_os_error(libc::EEXIST));
    }
    if !old.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "is not a regular file"));
    }
    Ok(())
}

/// The permission bits of the regular file `path`, if there is one.
fn permissions_of(path: &Path) -> io::Result<Option<Mode>> {
    match symlink_metadata(path) {
        Ok(old) if old.is_file() => Ok(Some(Mode::from_raw_mode(old.mode()) & PERMISSIONS)),
        Ok(_) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The folder of `path`, never empty.
fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// The names in a folder.
    fn names(folder: &Path) -> Vec<OsString> {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    }

    #[test]
    fn a_file_has_its_name_when_it_is_published_and_leaves_nothing_when_it_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("n".repeat(255));
        let new = NewFile::create(&path).unwrap();
        assert_eq!(names(folder.path()).len(), 1);
        assert!(!path.exists());
        drop(new);
        assert!(names(folder.path()).is_empty());
        NewFile::create(&path).unwrap().publish(false).unwrap();
        assert_eq!(names(folder.path()), [path.file_name().unwrap()]);
    }

    #[test]
    fn a_file_that_was_set_aside_gets_its_name_back_unless_it_is_taken_or_not_wanted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        fs::write(&path, b"old").unwrap();
        let aside = SetAside::new(&path).unwrap();
        assert!(!path.exists());
        assert_eq!(names(folder.path()).len(), 1);
        drop(aside);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()).len(), 1);
        SetAside::new(&path).unwrap().discard();
        assert!(names(folder.path()).is_empty());
        assert_eq!(SetAside::new(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(names(folder.path()).is_empty());
        fs::write(&path, b"old").unwrap();
        let aside = SetAside::new(&path).unwrap();
        fs::write(&path, b"somebody else's").unwrap();
        drop(aside);
        assert_eq!(fs::read(&path).unwrap(), b"somebody else's");
        assert_eq!(names(folder.path()).len(), 2, "nothing is lost");
    }

    #[test]
    fn a_file_that_is_there_is_replaced_only_on_request() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        fs::write(&path, b"old").unwrap();
        assert_eq!(check_target(&path, false).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        let error = NewFile::create(&path).unwrap().publish(false).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        check_target(&path, true).unwrap();
        NewFile::create(&path).unwrap().publish(true).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"");
        let error = check_target(folder.path(), true).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("nowhere", &link).unwrap();
        assert!(check_target(&link, true).is_err());
        check_target(&folder.path().join("new"), false).unwrap();
        let missing = check_target(&folder.path().join("missing/new"), false).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }
}
