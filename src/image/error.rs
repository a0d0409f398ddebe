//! What can go wrong with an open image, and with opening one.

use std::io;
use std::path::PathBuf;

use crate::format::FormatError;
use crate::format::qcow2::Qcow2Error;
use crate::format::qed::QedError;
use crate::storage::lock_holder::LockHolder;
use crate::storage::name_policy::NameError;
use crate::units::ByteRange;

/// Which of an image's files an error is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileRole {
    /// The raw image: the guest's own bytes.
    Raw,
    /// The side file: header and allocation bitmap.
    Side,
    /// A file of the backing chain.
    Backing,
    /// The external data file of a qcow2 file.
    Data,
    /// A disk that is only read, whatever its format.
    Disk,
}

impl std::fmt::Display for FileRole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw image",
            Self::Side => "add-cow file",
            Self::Backing => "backing file",
            Self::Data => "data file",
            Self::Disk => "disk",
        })
    }
}

/// Why a request on an open image failed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The range does not lie on the disk. Nothing was done.
    #[error("range {range:?} lies outside the disk of {size} bytes")]
    OutOfRange {
        /// The bytes asked for; empty at the offset when its end does not fit in 64 bits.
        range: ByteRange,
        /// The virtual size in bytes.
        size: u64,
    },
    /// The image is open for reading only. Nothing was done.
    #[error("image is open read-only")]
    ReadOnly,
    /// An earlier sync failed: nothing can be promised any more until the image is opened again
    /// (I6). Nothing was done.
    #[error("an earlier sync of the image failed; it must be reopened")]
    Failed,
    /// The host failed. A write may have been done in part, but no cluster has become visible that
    /// was not whole.
    #[error("cannot {action} {role}{}", place(*range))]
    Io {
        /// What we were doing.
        action: &'static str,
        /// To which file.
        role: FileRole,
        /// Where, in bytes of that file; empty when it is about all of it.
        range: ByteRange,
        /// What the host said.
        source: io::Error,
    },
}

/// Who uses a file, as part of a sentence.
fn who(holder: Option<&LockHolder>) -> String {
    holder.map_or_else(String::new, |holder| format!(" ({holder})"))
}

/// Where an error happened, as part of a sentence.
fn place(range: ByteRange) -> String {
    if range.is_empty() { String::new() } else { format!(" at {range:?}") }
}

impl ImageError {
    /// Makes an [`ImageError::Io`] of what the host said.
    pub(crate) fn io(
        action: &'static str,
        role: FileRole,
        range: ByteRange,
    ) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, role, range, source }
    }
}

/// Why an image could not be opened or created. Every message names the file.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The host refused.
    #[error("cannot {action} {role} '{}'", path.display())]
    Io {
        /// What we were doing.
        action: &'static str,
        /// Which file, in which role.
        role: FileRole,
        /// Its name as it was looked up.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A name that a file holds is not followed.
    #[error("cannot use {role} '{}'", path.display())]
    Name {
        /// In which role the file would have been.
        role: FileRole,
        /// The name.
        path: PathBuf,
        /// The rule against it.
        source: NameError,
    },
    /// The add-cow file is not a valid one.
    #[error("'{}' is not a usable add-cow file", path.display())]
    Format {
        /// The add-cow file.
        path: PathBuf,
        /// What is wrong with it.
        source: FormatError,
    },
    /// The add-cow file ends before its bitmap does.
    #[error(
        "'{}' is truncated: {found} bytes, {needed} needed for its header and bitmap",
        path.display()
    )]
    Truncated {
        /// The add-cow file.
        path: PathBuf,
        /// Its length in bytes.
        found: u64,
        /// The least length in bytes.
        needed: u64,
    },
    /// A file is in use elsewhere, in a way that does not go together with ours.
    #[error("{role} '{}' is in use by another process{}", path.display(), who(holder.as_ref()))]
    InUse {
        /// Which file.
        role: FileRole,
        /// Its name.
        path: PathBuf,
        /// By whom, where that can be found out.
        holder: Option<LockHolder>,
    },
    /// A file is in a format that we cannot use in this role.
    #[error(
        "{role} '{}' has unsupported format '{format}' (supported: {supported})",
        path.display()
    )]
    UnsupportedFormat {
        /// Which file.
        role: FileRole,
        /// Its name.
        path: PathBuf,
        /// The format that was named.
        format: String,
        /// Those that we can use.
        supported: &'static str,
    },
    /// A qcow2 file is damaged, or of a kind that we do not read.
    #[error("cannot use qcow2 file '{}'", path.display())]
    Qcow2 {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: Qcow2Error,
    },
    /// A QED file is damaged, or of a kind that we do not read.
    #[error("cannot use QED file '{}'", path.display())]
    Qed {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: QedError,
    },
    /// A file names its backing file, and not in which format that is.
    #[error(
        "'{}' does not name the format of its backing file '{}', and formats are never probed \
         (`qemu-img rebase -u -b FILE -F FMT` stores it)",
        path.display(),
        backing.display()
    )]
    BackingFormatMissing {
        /// The file.
        path: PathBuf,
        /// Its backing file.
        backing: PathBuf,
    },
    /// A chain comes back to a file that it has been through.
    #[error("{role} '{}' comes twice in its backing chain", path.display())]
    Cycle {
        /// As what.
        role: FileRole,
        /// Its name, the second time.
        path: PathBuf,
    },
    /// A chain is longer than any that makes sense.
    #[error("backing file '{}' is below {max} others: the chain is too long", path.display())]
    ChainTooLong {
        /// The first backing file too many.
        path: PathBuf,
        /// The most layers.
        max: usize,
    },
    /// Two files that must differ are one, perhaps under two names.
    #[error(
        "{first} '{}' and {second} '{}' are the same file",
        first_path.display(),
        second_path.display()
    )]
    SameFile {
        /// One role.
        first: FileRole,
        /// Its name.
        first_path: PathBuf,
        /// The other role.
        second: FileRole,
        /// Its name.
        second_path: PathBuf,
    },
    /// The raw image holds no sector.
    #[error("raw image '{}' is empty: the disk would have no sector", path.display())]
    EmptyImage {
        /// The raw image.
        path: PathBuf,
    },
    /// The size asked for is not one a disk can have.
    #[error("invalid size {size}: {problem}")]
    InvalidSize {
        /// In bytes.
        size: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// No add-cow header can say this.
    #[error("cannot make a header for '{}'", path.display())]
    Header {
        /// The add-cow file that was to be made.
        path: PathBuf,
        /// The rule that would be broken.
        source: FormatError,
    },
    /// The raw image holds more than the disk that was asked for.
    #[error(
        "raw image '{}' has {len} bytes: a disk of {size} bytes would cut off its end",
        path.display()
    )]
    ImageTooLong {
        /// The raw image.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
        /// The size that was asked for, in bytes.
        size: u64,
    },
    /// The disk has more clusters than one bitmap should hold.
    #[error(
        "disk of {size} bytes has too many clusters of {cluster} bytes: \
         its bitmap would have {len} bytes; the limit is {max}"
    )]
    BitmapTooLarge {
        /// The size that was asked for, in bytes.
        size: u64,
        /// The cluster size, in bytes.
        cluster: u64,
        /// Length of the bitmap, in bytes.
        len: u64,
        /// The limit, in bytes.
        max: u64,
    },
    /// There is nothing to take the size of a new disk from.
    #[error(
        "no size is given for '{}', nor an image or a backing file to take it from",
        path.display()
    )]
    SizeUnknown {
        /// The add-cow file that was to be made.
        path: PathBuf,
    },
    /// A file is there already.
    #[error("{role} '{}' exists already", path.display())]
    Exists {
        /// In which role.
        role: FileRole,
        /// Its name.
        path: PathBuf,
    },
    /// An option was given that cannot be.
    #[error("{0}")]
    InvalidOption(String),
}
