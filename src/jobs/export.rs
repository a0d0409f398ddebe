//! Exporting: a qcow2 file that shows the same disk through the same raw image.
//!
//! The qcow2 file gets the tables only; the raw image becomes its external data file, in which
//! every cluster is at its own offset, as in any raw image. Nothing is copied, and nothing of the
//! disk is changed. What the bitmap says becomes allocated and unallocated clusters, which both
//! formats read alike: from the data file, or from the backing file and as zeros past its end.
//!
//! Promises: the new file appears whole and durable, or not at all, and its refcounts are exact.
//!
//! Relies on I1: what is allocated is durable in the raw image, so only the new file is synced. Not
//! here: keeping anybody from using both files in turn. The manual says why nobody may.

use std::path::PathBuf;
use std::sync::Arc;

use crate::executor::block_on;
use crate::format::FileRole;
use crate::format::qcow2::header::{EXTERNAL_DATA, RAW_EXTERNAL_DATA};
use crate::format::qcow2::layout::REFCOUNT_ORDER;
use crate::format::qcow2::{Backing, Header};
use crate::image::chain::OpenChain;
use crate::image::open::{
    OpenImage, OpenOptions, add_cow, folder_of, io_error, lock_for, open_existing,
};
use crate::image::{FileRole as ImageRole, OpenError};
use crate::jobs::JobError;
use crate::jobs::names::{absolute_name, move_name, name_beside, new_file_error};
use crate::jobs::progress::Progress;
use crate::jobs::qcow2::tables::{Tables, WriteError};
use crate::storage::file::FileStorage;
use crate::storage::host_file::{Access, HostFile};
use crate::storage::lock::Locking;
use crate::storage::new_file::{NewFile, check_target};

/// Formats of backing files that QEMU knows, by the same names.
const QEMU_FORMATS: [&str; 3] = ["raw", "qcow2", "qed"];

/// What the new file is in messages.
const OUT: ImageRole = ImageRole::Disk;

/// What is to be exported, and how.
#[derive(Debug, Clone)]
pub struct ExportOptions {
    /// The disk's add-cow file.
    pub disk: PathBuf,
    /// The qcow2 file to make.
    pub out: PathBuf,
    /// Whether the raw image is named without its folder. QEMU looks for such a name in its working
    /// directory, not in the folder of the qcow2 file.
    pub relative: bool,
    /// Whether an existing file `out` may be replaced.
    pub force: bool,
}

/// The qcow2 file that was made.
#[derive(Debug)]
pub struct Exported {
    /// Its header.
    pub header: Header,
    /// Its length in bytes.
    pub file_len: u64,
}

/// Makes a qcow2 file of a disk.
///
/// # Errors
/// See [`JobError`]. There is then no new file.
pub fn to_qcow2(options: &ExportOptions, progress: &impl Progress) -> Result<Exported, JobError> {
    let out = &options.out;
    let disk = add_cow(&options.disk, OpenOptions::READ_ONLY)?;
    let _replaced = check_out(options, &disk)?;
    let (state, bad_header) =
        (&disk.state, |source| OpenError::Qcow2 { path: out.clone(), source });
    let tables = Tables::plan(state.allocation(), state.cluster_size(), state.virtual_size())
        .map_err(bad_header)?;
    let header = header_of(options, &disk, &tables)?;
    let bytes = header.encode().map_err(bad_header)?;
    let new = NewFile::create(out).map_err(io_error("create", OUT, out))?;
    let storage = FileStorage::new(Arc::clone(new.file()));
    block_on(tables.write(&storage, &bytes, progress)).map_err(|error| match error {
        WriteError::Io(error) => JobError::from(io_error("write", OUT, out)(error)),
        WriteError::Interrupted(interrupted) => interrupted.into(),
    })?;
    new.publish(options.force).map_err(|error| new_file_error(OUT, out, error))?;
    Ok(Exported { header, file_len: tables.layout().file_len() })
}

/// Refuses a new file that is there already, is in use, or is one of the disk's own. Returns the
/// one that will be replaced, locked.
fn check_out(options: &ExportOptions, disk: &OpenImage) -> Result<Option<HostFile>, JobError> {
    let out = &options.out;
    check_target(out, options.force).map_err(|error| new_file_error(OUT, out, error))?;
    let Some(old) = open_existing(OUT, out)? else { return Ok(None) };
    let layers = disk.backing.iter().flat_map(OpenChain::layers);
    let mut own = layers.flat_map(|layer| layer.files()).chain([&disk.raw]).chain(&disk.side);
    if own.any(|file| file.identity() == old.identity()) {
        return Err(refused(options, format!("'{}' is one of its files", out.display())));
    }
    lock_for(OUT, &old, Access::ReadWrite, Locking::On)?;
    Ok(Some(old))
}

/// The header of the new file.
fn header_of(
    options: &ExportOptions,
    disk: &OpenImage,
    tables: &Tables<'_>,
) -> Result<Header, JobError> {
    let layout = tables.layout();
    let raw = disk.raw.path();
    let data_file = if options.relative {
        let name = name_beside(&options.out, FileRole::Data, raw)?;
        let elsewhere = format!("raw image '{}' is not in the new file's folder", raw.display());
        name.ok_or_else(|| refused(options, elsewhere))?
    } else {
        absolute_name(&options.out, FileRole::Data, raw)?
    };
    // The layout has checked both against much lower limits.
    let field = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    Ok(Header {
        version: 3,
        cluster_size: layout.cluster_size(),
        size: disk.state.virtual_size(),
        crypt_method: 0,
        l1_entries: field(layout.l1_entries()),
        l1_offset: layout.l1_offset(),
        refcount_table_offset: layout.refcount_table_offset(),
        refcount_table_clusters: field(layout.refcount_table_clusters()),
        refcount_order: REFCOUNT_ORDER,
        snapshots: 0,
        snapshots_offset: 0,
        incompatible: EXTERNAL_DATA,
        compatible: 0,
        // Then the raw image alone is the disk, and nothing is ever read from a backing file.
        autoclear: if tables.is_all_allocated() { RAW_EXTERNAL_DATA } else { 0 },
        compression: 0,
        backing: backing_of(options, disk)?,
        data_file: Some(data_file),
        feature_names: Vec::new(),
        extensions: Vec::new(),
    })
}

/// The backing file of the new file: that of the disk, if it is ever read.
fn backing_of(options: &ExportOptions, disk: &OpenImage) -> Result<Option<Backing>, JobError> {
    let header = disk.header.as_ref().filter(|header| !header.all_allocated);
    let Some(backing) = header.and_then(|header| header.backing.as_ref()) else {
        return Ok(None);
    };
    if !QEMU_FORMATS.contains(&backing.format.as_str()) {
        let reason = format!("QEMU cannot read its backing file, of format {}", backing.format);
        return Err(refused(options, reason));
    }
    let folder = folder_of(&options.disk);
    let name = move_name(&options.out, folder, FileRole::Backing, &backing.name)?;
    Ok(Some(Backing { name, format: Some(backing.format.clone()) }))
}

/// Makes a [`JobError::Refused`] about the disk.
fn refused(options: &ExportOptions, reason: String) -> JobError {
    JobError::Refused(format!("cannot export '{}': {reason}", options.disk.display()))
}
