//! References to other files: the names and formats that a header stores.
//!
//! A [`FileName`] has passed the policy for names that come out of a file which somebody else may
//! have written: it is a plain path, never a protocol or an option string, and fits the limits of
//! the format. Following it is still a decision of its own (`image`).
//!
//! Not here: opening, resolving symbolic links, finding out that two names mean one file.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::format::error::FormatError;

/// Longest format name that is written, in bytes: its field of 16 bytes ends in a zero byte.
pub const MAX_FORMAT_LEN: usize = 15;

/// Which file a name or a format belongs to: two of an add-cow file, two of a qcow2 file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileRole {
    /// The read-only file behind the image.
    Backing,
    /// The file with the guest's own bytes.
    Image,
    /// The file with the guest's own bytes of a qcow2 file that holds only the tables.
    Data,
}

impl FileRole {
    /// Longest name in bytes. The values are those of the format's first implementation: a
    /// buffer of 1024 bytes, and `PATH_MAX` (4096), each less the closing zero byte.
    #[must_use]
    pub const fn max_name_len(self) -> usize {
        match self {
            Self::Backing => 1023,
            Self::Image | Self::Data => 4095,
        }
    }
}

impl fmt::Display for FileRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Backing => "backing file",
            Self::Image => "image file",
            Self::Data => "data file",
        })
    }
}

/// A file's name as stored: 1 to 4095 bytes, no NUL, no protocol prefix; not resolved.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct FileName {
    /// The bytes as stored, in no particular encoding.
    bytes: Vec<u8>,
}

impl FileName {
    /// Checks `name` against the rules for `role`.
    ///
    /// # Errors
    /// `NameEmpty`, `NameTooLong`, `NameHasNul` or `NameIsProtocol`.
    pub fn new(role: FileRole, name: impl AsRef<OsStr>) -> Result<Self, FormatError> {
        Self::from_bytes(role, name.as_ref().as_bytes())
    }

    /// The same for bytes that are no `OsStr` yet.
    ///
    /// # Errors
    /// See [`FileName::new`].
    pub fn from_bytes(role: FileRole, bytes: &[u8]) -> Result<Self, FormatError> {
        let shown = || String::from_utf8_lossy(bytes).into_owned();
        check_len(role, bytes.len())?;
        if let Some(position) = bytes.iter().position(|&byte| byte == 0) {
            return Err(FormatError::NameHasNul { role, name: shown(), position });
        }
        // A ':' before any '/' is how other programs tell a protocol ("nbd:", "json:") from a
        // path. We follow none, and refuse the name so that no two programs read it differently.
        if bytes.iter().find(|&&byte| byte == b':' || byte == b'/') == Some(&b':') {
            return Err(FormatError::NameIsProtocol { role, name: shown() });
        }
        Ok(Self { bytes: bytes.to_vec() })
    }

    /// The bytes as stored.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The path that the name means in an add-cow file that lies in `folder`.
    ///
    /// An absolute name stands for itself. Pure path arithmetic: nothing is looked up.
    #[must_use]
    pub fn resolve(&self, folder: &Path) -> PathBuf {
        folder.join(self)
    }
}

/// Refuses a name of `len` bytes that is empty or too long for `role`.
pub(super) fn check_len(role: FileRole, len: usize) -> Result<(), FormatError> {
    let max = role.max_name_len();
    if len == 0 {
        return Err(FormatError::NameEmpty { role });
    }
    if len > max {
        return Err(FormatError::NameTooLong { role, len, max });
    }
    Ok(())
}

impl AsRef<OsStr> for FileName {
    fn as_ref(&self) -> &OsStr {
        OsStr::from_bytes(&self.bytes)
    }
}

impl AsRef<Path> for FileName {
    fn as_ref(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.bytes))
    }
}

/// Quoted and escaped, so that a name from a file can be printed.
impl fmt::Debug for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(OsStr::from_bytes(&self.bytes), f)
    }
}

/// A file that the header refers to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileReference {
    /// Its name as stored, relative to the folder of the add-cow file unless absolute.
    pub name: FileName,
    /// The name of its format, such as `raw`: 1 to 16 characters of printable ASCII without
    /// blanks when read, at most 15 when written. Not checked against any list.
    pub format: String,
}

/// Decodes a format field: printable ASCII, then zeros to its end. An empty one gives "".
pub(super) fn decode_format(role: FileRole, field: &[u8]) -> Result<String, FormatError> {
    let len = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    let (text, padding) = field.split_at_checked(len).unwrap_or((field, &[]));
    if !text.iter().all(u8::is_ascii_graphic) || padding.iter().any(|&byte| byte != 0) {
        return Err(FormatError::FormatText { role, found: field.to_vec() });
    }
    Ok(text.iter().copied().map(char::from).collect())
}

/// Encodes the name of a format, which must not be empty, into its field.
pub(super) fn encode_format(
    role: FileRole,
    reference: &FileReference,
) -> Result<[u8; 16], FormatError> {
    let text = reference.format.as_bytes();
    if text.is_empty() {
        return Err(match role {
            FileRole::Backing => FormatError::BackingFormatMissing { name: reference.name.clone() },
            // A data file has no format field: it is raw.
            FileRole::Image | FileRole::Data => FormatError::ImageFormatMissing,
        });
    }
    if !text.iter().all(u8::is_ascii_graphic) {
        return Err(FormatError::FormatText { role, found: text.to_vec() });
    }
    if text.len() > MAX_FORMAT_LEN {
        return Err(FormatError::FormatTooLong {
            role,
            format: reference.format.clone(),
            len: text.len(),
            max: MAX_FORMAT_LEN,
        });
    }
    let mut field = [0; 16];
    for (to, &from) in field.iter_mut().zip(text) {
        *to = from;
    }
    Ok(field)
}
