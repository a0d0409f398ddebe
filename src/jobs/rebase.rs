//! Rebasing: another backing file for a disk that goes on showing the same.
//!
//! Where the disk has nothing itself, and the old chain shows other bytes than the new one, those
//! of the old chain are copied into the disk. Only when that is durable does the header name the
//! new backing file.
//!
//! Promises: a cut between any two I/Os leaves a disk that shows what it showed before, over the
//! old chain or over the new one; rebasing again completes it. A rebase of the name alone promises
//! nothing about what the disk shows: whoever asks for it knows that both files do the same.
//!
//! Not here: reading chains (`image::chain`), and the steps of a header change (`format::change`).

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::executor::block_on;
use crate::format::{FileReference, Header, HeaderChange};
use crate::image::chain::open::resolve;
use crate::image::chain::{Chain, ChainOptions, ChainPiece, OpenChain, PieceContent};
use crate::image::inspect::{DiskAccess, DiskFiles};
use crate::image::open::{OpenImage, check_distinct, folder_of};
use crate::image::{FileRole, Image, ImageState, session};
use crate::jobs::parts::DiskParts;
use crate::jobs::{JobError, Progress};
use crate::seeded::{self, Bug};
use crate::storage::file::FileStorage;
use crate::storage::host_file::{Access, CacheMode, FileIdentity, HostFile};
use crate::storage::name_policy::Named;
use crate::storage::{IoBuffer, Storage};
use crate::units::ByteRange;

/// How much of the disk is compared at once, in bytes; a whole cluster at least.
const WINDOW_LEN: u64 = 1 << 20;

/// How much of the disk is passed over at once where the chains are known to show the same, in
/// bytes.
const MAX_EQUAL: u64 = 1 << 30;

/// What is done about the bytes that the disk shows of its backing file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// They are copied where the new backing file differs.
    Safe,
    /// Nothing: only the name is changed. The backing files need not be there.
    NameOnly,
}

/// Gives the add-cow disk `path` the backing file `backing`, whose name is relative to the folder
/// of `path`; or none.
///
/// # Errors
/// `Open` and `Header` with nothing changed; `Image` and `Interrupted` with a disk that shows what
/// it showed.
pub fn rebase_disk(
    path: &Path,
    backing: Option<&FileReference>,
    mode: Mode,
    progress: &dyn Progress,
) -> Result<(), JobError> {
    let disk = DiskFiles::open(path, DiskAccess::WRITE)?;
    let (side, raw) =
        (FileStorage::new(Arc::clone(&disk.side)), FileStorage::new(Arc::clone(&disk.raw)));
    let (header, geometry) = (disk.header.clone(), disk.geometry);
    let parts = DiskParts { side: &side, raw: &raw, header, geometry };
    // What the header cannot say is better known before hours of copying.
    let change = block_on(parts.plan_header(|area| HeaderChange::to_backing(area, backing)))?;
    if mode == Mode::NameOnly {
        check_name(&disk, backing)?;
        session::renew_in(&disk.side)?;
        return block_on(parts.change_header(change));
    }
    let new = open_new(&disk, backing)?;
    if disk.header.all_allocated {
        session::renew_in(&disk.side)?;
        return block_on(parts.change_header(change));
    }
    let disk = open_image(disk, new.as_ref())?;
    let (image, old) = (disk.handle(FileStorage::new), disk.backing.as_ref());
    let handle = |chain: Option<&OpenChain>| chain.map(|chain| chain.handle(FileStorage::new));
    let is_same_file = |in_old, in_new| {
        let identity = |chain: Option<&OpenChain>, place| identity_of(chain?, place);
        identity(old, in_old).is_some_and(|old| Some(old) == identity(new.as_ref(), in_new))
    };
    let handles = (handle(old), handle(new.as_ref()));
    let chains =
        Chains { old: handles.0.as_ref(), new: handles.1.as_ref(), is_same_file: &is_same_file };
    disk.side.as_ref().map_or(Ok(()), session::renew_in)?;
    block_on(rebase(&parts, &image, &chains, change, progress))
}

/// Opens the chain of `backing`, in which none of the disk's own files may be.
fn open_new(
    disk: &DiskFiles,
    backing: Option<&FileReference>,
) -> Result<Option<OpenChain>, JobError> {
    // With ALL_ALLOCATED it is not needed now, but it will be once the disk is reset.
    let header = Header { backing: backing.cloned(), all_allocated: false, ..disk.header.clone() };
    let own: [(FileRole, &HostFile); 2] =
        [(FileRole::Side, &disk.side), (FileRole::Raw, &disk.raw)];
    let folder = folder_of(disk.side.path());
    let (named, options) = (Named::Operator, ChainOptions::BUFFERED);
    Ok(OpenChain::below(&header, folder, named, options, &own)?)
}

/// Refuses a backing file that is one of the disk's own files, or in a format that could not be
/// opened. It need not be there.
fn check_name(disk: &DiskFiles, backing: Option<&FileReference>) -> Result<(), JobError> {
    let Some(backing) = backing else { return Ok(()) };
    let (path, _) = resolve(backing, folder_of(disk.side.path()))?;
    let Ok(file) = HostFile::open(&path, Access::ReadOnly, CacheMode::Buffered) else {
        return Ok(());
    };
    for (role, own) in [(FileRole::Side, &disk.side), (FileRole::Raw, &disk.raw)] {
        check_distinct(FileRole::Backing, &file, role, own)?;
    }
    Ok(())
}

/// The disk as [`rebase`] needs it, with `new` to come.
fn open_image(disk: DiskFiles, new: Option<&OpenChain>) -> Result<OpenImage, JobError> {
    let old = disk.open_backing(CacheMode::Buffered)?;
    let allocation = disk.allocation()?;
    let len = |chain: Option<&OpenChain>| chain.map_or(0, OpenChain::virtual_size);
    let backing_len = len(old.as_ref()).max(len(new));
    let state = ImageState::add_cow(disk.geometry, allocation, backing_len, true);
    Ok(OpenImage {
        state: Arc::new(state),
        raw: disk.raw,
        side: Some(disk.side),
        backing: old,
        header: Some(disk.header),
    })
}

/// Who a file of a chain is: the layer, and the file's number in it.
fn identity_of(chain: &OpenChain, (layer, file): (usize, usize)) -> Option<FileIdentity> {
    Some(chain.layers().get(layer)?.files().nth(file)?.identity())
}

/// The chains between which a disk moves.
pub struct Chains<'a, S> {
    /// Where it stands; without one there are zeros.
    pub old: Option<&'a Chain<S>>,
    /// Where it will stand.
    pub new: Option<&'a Chain<S>>,
    /// Whether a file of the old chain is one of the new chain's. A file is given as the number of
    /// its layer and its own number in it.
    pub is_same_file: &'a dyn Fn((usize, usize), (usize, usize)) -> bool,
}

impl<S> std::fmt::Debug for Chains<'_, S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chains").finish_non_exhaustive()
    }
}

/// Copies into `image`, which stands on the old chain, what the new one would show otherwise, and
/// then changes the header of `parts`, which are those of the image.
///
/// The image must not take what lies behind the end of the old chain for zeros that need no bit:
/// its state has the length of the longer chain. So nothing is read through the image; what is not
/// allocated comes from the old chain.
///
/// # Errors
/// `Image` if the host failed, `Interrupted`. The disk shows what it showed, over either chain.
///
/// # Cancel safety
/// A future that is dropped is like a cut, see above; but it must not be dropped while the host
/// still works, see [`Image`].
pub async fn rebase<S: Storage>(
    parts: &DiskParts<'_, S>,
    image: &Image<S>,
    chains: &Chains<'_, S>,
    change: HeaderChange,
    progress: &dyn Progress,
) -> Result<(), JobError> {
    let copied = copy_all(image, chains, progress).await;
    // After an error too: what was copied need not be copied again.
    let is_late = seeded::bug(Bug::RebaseHeaderFirst);
    let flushed = if is_late { Ok(()) } else { image.flush().await };
    copied?;
    flushed?;
    parts.change_header(change).await
}

/// Copies without making it durable.
async fn copy_all<S: Storage>(
    image: &Image<S>,
    chains: &Chains<'_, S>,
    progress: &dyn Progress,
) -> Result<(), JobError> {
    let state = image.state();
    let (size, end) = (state.cluster_size(), state.virtual_size());
    let clusters = size.count(end);
    let per_window = size.count(WINDOW_LEN);
    let mut cursors = (Cursor::new(chains.old), Cursor::new(chains.new));
    let mut next = 0;
    while next < clusters {
        progress.update(size.start_of(next), end)?;
        let (is_allocated, run_end) = state.allocation().run(next..clusters);
        if is_allocated {
            next = run_end;
            continue;
        }
        let run = ByteRange::between(size.start_of(next), size.start_of(run_end).min(end));
        let equal = equal_start(&mut cursors, chains, run).await?;
        let equal_end = if equal.end() == run.end() { run_end } else { size.index(equal.end()) };
        if equal_end == next {
            let window = next..run_end.min(next + per_window);
            next = window.end;
            compare_and_copy(image, chains, window).await?;
        } else {
            next = equal_end;
        }
    }
    Ok(progress.update(end, end)?)
}

/// How far from the start of `run` the two chains are known to show the same without reading it.
async fn equal_start<S: Storage>(
    cursors: &mut (Cursor<'_, S>, Cursor<'_, S>),
    chains: &Chains<'_, S>,
    run: ByteRange,
) -> Result<ByteRange, JobError> {
    // An end to the look-ups of one step, however fragmented the chains are.
    let limit = run.end().min(run.start().saturating_add(MAX_EQUAL));
    let mut position = run.start();
    while position < limit {
        let rest = ByteRange::between(position, limit);
        let old = cursors.0.first(rest).await?;
        let new = cursors.1.first(rest).await?;
        let is_equal = match (old.content, new.content) {
            (PieceContent::Zero, PieceContent::Zero) => true,
            (
                PieceContent::Data { file, offset },
                PieceContent::Data { file: in_new, offset: at },
            ) => offset == at && (chains.is_same_file)((old.depth, file), (new.depth, in_new)),
            _ => false,
        };
        if !is_equal {
            break;
        }
        position = old.range.end().min(new.range.end());
    }
    Ok(ByteRange::between(run.start(), position))
}

/// What is to be done with a cluster that is not allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    /// Nothing: the new chain shows the same.
    Nothing,
    /// It is made zeros.
    Zero,
    /// It is written.
    Write,
}

/// Copies those of `window`, clusters that are not allocated, that the new chain shows otherwise.
async fn compare_and_copy<S: Storage>(
    image: &Image<S>,
    chains: &Chains<'_, S>,
    window: Range<u64>,
) -> Result<(), JobError> {
    let state = image.state();
    let size = state.cluster_size();
    let start = size.start_of(window.start);
    let len = size.start_of(window.end).min(state.virtual_size()) - start;
    // A window, or one cluster: 2 MiB at most.
    let data = IoBuffer::zeroed(usize::try_from(len).unwrap_or(usize::MAX));
    let other = IoBuffer::zeroed(data.len());
    for (chain, buffer) in [(chains.old, &data), (chains.new, &other)] {
        if let Some(chain) = chain {
            chain.read(start, buffer.clone()).await?;
        }
    }
    let cluster = usize::try_from(size.bytes()).unwrap_or(usize::MAX);
    let (shown, others) = (data.to_vec(), other.to_vec());
    let work = shown.chunks(cluster).zip(others.chunks(cluster)).map(|(shown, other)| {
        if shown == other {
            Work::Nothing
        } else if shown.iter().all(|&byte| byte == 0) {
            Work::Zero
        } else {
            Work::Write
        }
    });
    let work: Vec<Work> = work.collect();
    let mut at = 0;
    for run in work.chunk_by(|a, b| a == b) {
        let bytes = (run.len() * cluster).min(data.len() - at);
        let offset = start + at as u64;
        match run.first() {
            None | Some(Work::Nothing) => {}
            Some(Work::Zero) => image.write_zeroes(offset, bytes as u64, true).await?,
            Some(Work::Write) => image.write(offset, data.slice(at, bytes)).await?,
        }
        at += bytes;
    }
    Ok(())
}

/// Looks up what a chain holds. Remembers the last answer, since pieces of one chain are often
/// large where those of the other are small, and file systems may take long to tell where data
/// ends.
struct Cursor<'a, S> {
    /// The chain; without one there are only zeros.
    chain: Option<&'a Chain<S>>,
    /// The last answer.
    known: Option<ChainPiece>,
}

impl<'a, S: Storage> Cursor<'a, S> {
    /// Knows nothing yet.
    fn new(chain: Option<&'a Chain<S>>) -> Self {
        Self { chain, known: None }
    }

    /// The first piece of `range`, which must not be empty.
    async fn first(&mut self, range: ByteRange) -> Result<ChainPiece, JobError> {
        let is_in =
            |piece: &ChainPiece| (piece.range.start()..piece.range.end()).contains(&range.start());
        let piece = match (self.known.filter(is_in), self.chain) {
            (Some(known), _) => known,
            (None, Some(chain)) => {
                let to_the_end = ByteRange::between(range.start(), i64::MAX.cast_unsigned());
                chain.piece(to_the_end).await?
            }
            (None, None) => {
                ChainPiece { range, depth: 0, present: false, content: PieceContent::Zero }
            }
        };
        self.known = Some(piece);
        let content = match piece.content {
            PieceContent::Data { file, offset } => {
                let skipped = range.start() - piece.range.start();
                PieceContent::Data { file, offset: offset.saturating_add(skipped) }
            }
            other => other,
        };
        Ok(ChainPiece { range: piece.range.intersect(range), content, ..piece })
    }
}
