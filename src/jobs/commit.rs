//! Committing: what a disk holds itself gets into its backing file.
//!
//! Promises: the disk shows the same bytes before, during and after, since its own clusters are not
//! touched until the base has them durably, and the base is not changed where the disk has none. A
//! base that is longer than the disk keeps what lies behind the disk's end. After a cut the commit
//! is run again, and copies everything once more.
//!
//! Relies on nobody else using the base: other disks that stand on it would see it change.
//!
//! Not here: making the base longer, and emptying the disk afterwards (`jobs::reset`).

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;

use crate::executor::block_on;
use crate::format::BitmapGeometry;
use crate::image::chain::open::resolve;
use crate::image::chain::{Chain, ChainLayer, ClusterMap, DiskFormat};
use crate::image::inspect::{DiskAccess, DiskFiles};
use crate::image::open::{
    OpenImage, OpenOptions, add_cow_named, check_distinct, folder_of, lock_for, open_unlocked,
};
use crate::image::{FileRole, Image, ImageError, OpenError, session};
use crate::jobs::copy::{Pace, Piece, Pieces};
use crate::jobs::parts::DiskParts;
use crate::jobs::progress::Progress;
use crate::jobs::reset::reset_disk;
use crate::jobs::resize::resize;
use crate::jobs::{JobError, copy};
use crate::seeded::{self, Bug};
use crate::storage::file::FileStorage;
use crate::storage::host_file::{Access, CacheMode};
use crate::storage::lock::Locking;
use crate::storage::name_policy::Named;
use crate::storage::{IoBuffer, Storage, sparse, transfer};
use crate::units::ByteRange;

/// The most bytes of zeros that one step makes: an end to it must be near.
const MAX_ZEROS: u64 = 1 << 30;

/// What is committed into; at least as long as the disk.
#[derive(Debug)]
pub enum Base<'a, S> {
    /// A raw image.
    Raw(&'a S),
    /// An add-cow disk.
    AddCow(&'a Image<S>),
}

impl<S: Storage> Base<'_, S> {
    /// The size of the blocks that are looked at for zeros, in bytes. An add-cow disk is given
    /// whole clusters of either kind: of a part it would have to fetch the rest.
    fn block(&self) -> u64 {
        match self {
            Self::Raw(_) => sparse::BLOCK,
            Self::AddCow(image) => image.state().cluster_size().bytes().max(sparse::BLOCK),
        }
    }

    /// Writes `data` at `offset`; blocks of zeros give their space back.
    async fn write(&self, offset: u64, data: &IoBuffer) -> Result<(), ImageError> {
        for run in sparse::runs(offset, data, self.block()) {
            let start = offset + run.start as u64;
            let range = ByteRange::between(start, start + run.len as u64);
            if run.is_zero {
                self.clear(range).await?;
                continue;
            }
            let data = data.slice(run.start, run.len);
            match self {
                Self::AddCow(image) => image.write(start, data).await?,
                Self::Raw(raw) => transfer::write_all(*raw, start, data)
                    .await
                    .map_err(ImageError::io("write", FileRole::Backing, range))?,
            }
        }
        Ok(())
    }

    /// Makes `range` read zeros.
    async fn clear(&self, range: ByteRange) -> Result<(), ImageError> {
        match self {
            Self::AddCow(image) => image.write_zeroes(range.start(), range.len(), true).await,
            Self::Raw(raw) => sparse::clear(*raw, range).await.map_err(ImageError::io(
                "zero",
                FileRole::Backing,
                range,
            )),
        }
    }

    /// Makes everything durable.
    async fn sync(&self) -> Result<(), ImageError> {
        match self {
            Self::AddCow(image) => image.flush().await,
            Self::Raw(raw) => {
                let nothing = ByteRange::between(0, 0);
                raw.sync().await.map_err(ImageError::io("sync", FileRole::Backing, nothing))
            }
        }
    }
}

/// Commits the add-cow disk `path` into its backing file, see [`commit`], and empties it unless
/// `keep`.
///
/// # Errors
/// `Open` and `Refused` with nothing changed; else as [`commit`].
pub fn commit_disk(path: &Path, keep: bool, progress: &impl Progress) -> Result<(), JobError> {
    let disk = DiskFiles::open(path, DiskAccess::WRITE)?;
    let Some(reference) = &disk.header.backing else {
        return Err(JobError::Refused(format!(
            "'{}' has no backing file to commit into",
            path.display()
        )));
    };
    // A chain that comes back to the disk is called that; to the locks below it would be a file in
    // use.
    drop(disk.open_backing(CacheMode::Buffered)?);
    let (base_path, format) = resolve(reference, folder_of(path))?;
    let named = Named::InFolder(folder_of(path));
    let size = disk.geometry.virtual_size();
    let cluster_size = disk.geometry.cluster_size();
    let map = ClusterMap { cluster_size, allocation: disk.allocation()? };
    let raw = FileStorage::new(Arc::clone(&disk.raw));
    let chain = Chain::new([ChainLayer::add_cow(raw, size, Arc::new(map))]);
    let pace = Pace::default();
    match format {
        DiskFormat::Raw => {
            let base = open_raw_base(&base_path, named, &disk)?;
            block_on(async {
                grow(&base, size).await?;
                commit(&chain, &Base::Raw(&base), pace, progress).await
            })?;
        }
        DiskFormat::AddCow => {
            let base = open_add_cow_base(&base_path, named, &disk)?;
            let base = base.handle(FileStorage::new);
            block_on(commit(&chain, &Base::AddCow(&base), pace, progress))?;
        }
        other => {
            return Err(JobError::Refused(format!(
                "backing file '{}' has format '{other}': only raw and add-cow files can be \
                 committed into",
                base_path.display()
            )));
        }
    }
    if keep { Ok(()) } else { reset_disk(&disk) }
}

/// Opens an add-cow base for writing, and makes it at least as long as the disk.
fn open_add_cow_base(
    path: &Path,
    named: Named<'_>,
    disk: &DiskFiles,
) -> Result<OpenImage, JobError> {
    let base = DiskFiles::open_checked(path, named, DiskAccess::WRITE, |_, _| Ok(()))?;
    let size = disk.geometry.virtual_size();
    if base.geometry.virtual_size() < size {
        let cluster_size = base.geometry.cluster_size();
        let new = BitmapGeometry::new(cluster_size, size)
            .map_err(|source| OpenError::Format { path: path.to_owned(), source })?;
        let below = base.open_backing(CacheMode::Buffered)?;
        let below = below.map(|chain| chain.handle(FileStorage::new));
        let side = FileStorage::new(Arc::clone(&base.side));
        let raw = FileStorage::new(Arc::clone(&base.raw));
        let (header, geometry) = (base.header.clone(), base.geometry);
        let parts = DiskParts { side: &side, raw: &raw, header, geometry };
        session::renew_in(&base.side)?;
        block_on(resize(&parts, below.as_ref(), new))?;
    }
    // It refuses to be opened a second time while it is locked.
    drop(base);
    let options = OpenOptions { writable: true, ..OpenOptions::READ_ONLY };
    let base = add_cow_named(path, named, options)?;
    base.side.as_ref().map_or(Ok(()), session::renew_in)?;
    Ok(base)
}

/// Opens a raw base for writing.
fn open_raw_base(path: &Path, named: Named<'_>, disk: &DiskFiles) -> Result<FileStorage, JobError> {
    let (role, access) = (FileRole::Backing, Access::ReadWrite);
    let base = open_unlocked(role, path, named, access, CacheMode::Buffered)?;
    // Before it is locked: a file that is locked already would refuse itself in other words.
    check_distinct(FileRole::Backing, &base, FileRole::Side, &disk.side)?;
    check_distinct(FileRole::Backing, &base, FileRole::Raw, &disk.raw)?;
    lock_for(FileRole::Backing, &base, Access::ReadWrite, Locking::On)?;
    Ok(FileStorage::new(base))
}

/// Copies into `base` what `disk` holds itself: a chain of one layer, the disk alone. The base has
/// it durably when this returns.
///
/// # Errors
/// `Image` if the host failed, `Interrupted`. The base holds some of it then; what the disk shows
/// has not changed.
///
/// # Cancel safety
/// None, see [`Image`].
pub async fn commit<S: Storage>(
    disk: &Chain<S>,
    base: &Base<'_, S>,
    pace: Pace,
    progress: &impl Progress,
) -> Result<(), JobError> {
    let total = disk.virtual_size();
    let done = Cell::new(0_u64);
    let mut pieces = Pieces::new(Some(disk));
    let mut next = 0;
    progress.update(0, total)?;
    copy::run::<_, _, JobError>(
        pace,
        async || {
            while next < total {
                let piece = pieces.first(ByteRange::between(next, total)).await?;
                let step = cut(piece, pace);
                next = step.range.end();
                if step.is_present {
                    return Ok(Some(step));
                }
                done.set(done.get() + step.range.len());
                progress.update(done.get(), total)?;
            }
            Ok(None)
        },
        async |step: Piece, buffer: IoBuffer| {
            let range = step.range;
            if step.is_zero {
                base.clear(range).await?;
            } else {
                let data = buffer.slice(0, usize::try_from(range.len()).unwrap_or(usize::MAX));
                disk.read(range.start(), data.clone()).await?;
                base.write(range.start(), &data).await?;
            }
            Ok(range.len())
        },
        async |len: u64| {
            done.set(done.get() + len);
            Ok(progress.update(done.get(), total)?)
        },
    )
    .await?;
    if !seeded::bug(Bug::BaseNotSynced) {
        base.sync().await?;
    }
    Ok(progress.update(total, total)?)
}

/// Makes a raw base at least `len` bytes long, durably: what is committed must fit. The disk shows
/// zeros past the end of its base, so it shows the same.
///
/// # Errors
/// `Image` if the host failed; the base may have its new length then.
pub async fn grow<S: Storage>(base: &S, len: u64) -> Result<(), JobError> {
    let io = |action| ImageError::io(action, FileRole::Backing, ByteRange::between(0, 0));
    if base.file_len().map_err(io("get the length of"))? < len {
        base.set_len(len).map_err(io("set the length of"))?;
        base.sync().await.map_err(io("sync"))?;
    }
    Ok(())
}

/// As much of a piece as one step does: data up to the next multiple of the step's length, so that
/// steps are aligned; zeros up to [`MAX_ZEROS`]; what the disk does not hold whole.
fn cut(piece: Piece, pace: Pace) -> Piece {
    let range = match piece {
        Piece { is_present: false, .. } => piece.range,
        Piece { is_zero: true, .. } => {
            let start = piece.range.start();
            piece.range.intersect(ByteRange::between(start, start.saturating_add(MAX_ZEROS)))
        }
        Piece { is_zero: false, .. } => pace.step_of(piece.range),
    };
    Piece { range, ..piece }
}
