//! Where names that come out of a file may lead (P6).
//!
//! Who starts a program chooses the files that the command line names; those are opened as they
//! are ([`HostFile::open`]). A name inside a file (the raw image of an add-cow file, backing and
//! data files) is somebody else's word. It is followed as a plain path, and so:
//!
//! * never through a link of /proc that stands for an open file, a root or a working directory;
//! * only to regular files, and to block devices if that was asked for; anything else is not even
//!   opened, since opening some devices does something (a watchdog starts);
//! * if a folder was named, only to what lies beneath it. The kernel checks that on the way
//!   (openat2(2), `RESOLVE_BENEATH`), so that no link and no race leads out.
//!
//! The policy belongs to the process, like a sandbox: it is set once, before anything is opened,
//! and no way through the code can leave it out. Until it is set the strictest one without a folder
//! holds.
//!
//! Relies on openat2 (Linux 5.6). Without it links of /proc are followed as by open(2), and a
//! folder cannot be kept to: everything is refused then.
//!
//! Not here: which bytes a name may have (`format`).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, open, openat2};
use rustix::io::Errno;

use super::host_file::{Access, CacheMode, HostFile, flags_of, wrong_type};

/// The policy of this process.
static OF_PROCESS: OnceLock<NamePolicy> = OnceLock::new();

/// How often a path is looked up again while the host renames folders on it: openat2 cannot tell
/// then whether `..` leads out.
const MAX_TRIES: u32 = 100;

/// Who has named a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Named<'a> {
    /// Whoever runs the program: it is what was asked for.
    Operator,
    /// A file that lies in this folder. The policy holds.
    InFolder(&'a Path),
}

impl<'a> Named<'a> {
    /// A file that lies in `folder`; without one, whoever runs the program.
    #[must_use]
    pub fn of(folder: Option<&'a Path>) -> Self {
        folder.map_or(Self::Operator, Self::InFolder)
    }

    /// The folder of the file that holds the name, if one does.
    #[must_use]
    pub fn folder(self) -> Option<PathBuf> {
        match self {
            Self::Operator => None,
            Self::InFolder(folder) => Some(folder.to_owned()),
        }
    }
}

/// Why a name that a file holds is not followed.
#[derive(Debug, thiserror::Error)]
pub enum NameError {
    /// It leads to a device, and that was not asked for.
    #[error(
        "it is a block device, and a file names it, not you (--allow-devices lets files name \
         devices)"
    )]
    Device,
    /// It leads through links that are not followed.
    #[error("it leads through a link of /proc to something open, or through too many links")]
    Links,
    /// It leads out of the folder.
    #[error("it leads out of the folder '{}' (--image-folder)", folder.display())]
    Outside {
        /// The folder, as it was named.
        folder: PathBuf,
    },
    /// The kernel cannot keep it to a folder.
    #[error(
        "this kernel cannot keep names to the folder '{}' (--image-folder needs Linux 5.6)",
        folder.display()
    )]
    NoConfinement {
        /// The folder, as it was named.
        folder: PathBuf,
    },
    /// The host refused.
    #[error(transparent)]
    Host(#[from] io::Error),
}

/// The folder that names are kept to.
#[derive(Debug)]
struct Folder {
    /// As it was named.
    named: PathBuf,
    /// From the root, as it was named.
    absolute: PathBuf,
    /// From the root, without links.
    real: PathBuf,
    /// The folder, open.
    file: OwnedFd,
}

/// Where names that come out of a file may lead.
#[derive(Debug, Default)]
pub struct NamePolicy {
    /// Whether they may be block devices.
    allow_devices: bool,
    /// What they must lie beneath.
    folder: Option<Folder>,
}

impl NamePolicy {
    /// A policy; with a `folder` every name must lead to something beneath it.
    ///
    /// # Errors
    /// What the host said about the folder.
    pub fn new(allow_devices: bool, folder: Option<&Path>) -> io::Result<Self> {
        Ok(Self { allow_devices, folder: folder.map(Folder::open).transpose()? })
    }

    /// Makes it the policy of this process.
    ///
    /// # Errors
    /// If there is one already, or a name was followed before.
    pub fn install(self) -> io::Result<()> {
        OF_PROCESS.set(self).map_err(|_| io::Error::other("the name policy is set already"))
    }

    /// The policy of this process.
    pub fn of_process() -> &'static Self {
        OF_PROCESS.get_or_init(Self::default)
    }

    /// Opens what `path` means, which a file in `folder` has named: relative names have been joined
    /// to `folder`.
    ///
    /// # Errors
    /// See [`NameError`]. What is neither a regular file nor a block device was not opened.
    pub fn open(
        &self,
        path: &Path,
        folder: &Path,
        access: Access,
        cache: CacheMode,
    ) -> Result<HostFile, NameError> {
        let place = match &self.folder {
            None => None,
            Some(allowed) => Some((allowed, allowed.relative(path, folder)?)),
        };
        let open = |flags| match &place {
            None => self.open_anywhere(path, flags),
            Some((allowed, relative)) => allowed.open_beneath(relative, flags),
        };
        let seen = fstat(open(OFlags::PATH | OFlags::CLOEXEC)?).map_err(io::Error::from)?;
        self.check_type(&seen)?;
        let file = File::from(open(flags_of(access))?);
        if !is_same(&seen, &fstat(&file).map_err(io::Error::from)?) {
            return Err(io::Error::other("it was replaced while it was opened").into());
        }
        Ok(HostFile::from_file(file, path, cache)?)
    }

    /// Refuses what is not a file of an allowed type.
    fn check_type(&self, seen: &Stat) -> Result<(), NameError> {
        match FileType::from_raw_mode(seen.st_mode) {
            FileType::RegularFile => Ok(()),
            FileType::BlockDevice if self.allow_devices => Ok(()),
            FileType::BlockDevice => Err(NameError::Device),
            other => Err(io::Error::new(io::ErrorKind::InvalidInput, wrong_type(other)).into()),
        }
    }

    /// Opens a path, wherever it leads but through magic links.
    fn open_anywhere(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, NameError> {
        match look_up(CWD, path, flags, ResolveFlags::NO_MAGICLINKS) {
            Ok(file) => Ok(file),
            // Nothing else tells magic links from others; no folder was promised to anybody.
            Err(Errno::NOSYS) => Ok(open(path, flags, Mode::empty()).map_err(io::Error::from)?),
            Err(Errno::LOOP) => Err(NameError::Links),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }
}

impl Folder {
    /// Opens the folder `named`.
    fn open(named: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            named: named.to_owned(),
            absolute: std::path::absolute(named)?,
            real: named.canonicalize()?,
            file: open(named, flags, Mode::empty())?,
        })
    }

    /// `path` as seen from here, see [`NamePolicy::open`]. Only `folder` is looked up, which
    /// somebody has come through already; nothing of the name.
    fn relative(&self, path: &Path, folder: &Path) -> Result<PathBuf, NameError> {
        let beneath = |path: &Path| {
            let rest = path.strip_prefix(&self.real).or_else(|_| path.strip_prefix(&self.absolute));
            rest.map(Path::to_owned).map_err(|_| self.outside())
        };
        let relative = match path.strip_prefix(folder).ok().filter(|name| name.is_relative()) {
            Some(name) => {
                let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
                beneath(&folder.canonicalize()?)?.join(name)
            }
            None => beneath(path)?,
        };
        // The folder itself: openat2 wants a name.
        Ok(if relative.as_os_str().is_empty() { Path::new(".").to_owned() } else { relative })
    }

    /// Opens a path that leads from here to something beneath.
    fn open_beneath(&self, relative: &Path, flags: OFlags) -> Result<OwnedFd, NameError> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        look_up(self.file.as_fd(), relative, flags, resolve).map_err(|error| match error {
            Errno::XDEV => self.outside(),
            Errno::LOOP => NameError::Links,
            Errno::NOSYS => NameError::NoConfinement { folder: self.named.clone() },
            other => io::Error::from(other).into(),
        })
    }

    /// The error for a name that leads out.
    fn outside(&self) -> NameError {
        NameError::Outside { folder: self.named.clone() }
    }
}

/// openat2(2), again while it cannot tell.
fn look_up(
    from: BorrowedFd<'_>,
    path: &Path,
    flags: OFlags,
    resolve: ResolveFlags,
) -> Result<OwnedFd, Errno> {
    let mut tries = 1;
    loop {
        match openat2(from, path, flags, Mode::empty(), resolve) {
            Err(Errno::AGAIN | Errno::INTR) if tries < MAX_TRIES => tries += 1,
            result => return result,
        }
    }
}

/// Whether both are of one inode.
fn is_same(one: &Stat, other: &Stat) -> bool {
    (one.st_dev, one.st_ino, one.st_rdev) == (other.st_dev, other.st_ino, other.st_rdev)
}
