//! The flush barrier: what makes a write survive a power cut.
//!
//! Upholds I1, I4 and I6: the raw image is synced before the bitmap pages that claim its clusters
//! are written, and those are synced before the guest is answered. Concurrent flushes share one
//! pass; a flush never joins a pass that had begun before it came, because that pass may have
//! frozen its bits too early.
//!
//! Not here: deciding which bits are new (`allocation`), retrying a failed sync (it is final).

use std::io;
use std::task::{Poll, Waker};

use super::allocation::FrozenBits;
use super::{FileRole, Image, ImageError};
use crate::seeded::{self, Bug};
use crate::storage::{IoBuffer, Storage, transfer};
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::units::ByteRange;

/// The largest single write of bitmap pages, in bytes.
const MAX_PAGES_WRITE: u64 = 1 << 20;

/// Orders the flushes of one image.
#[derive(Debug, Default)]
pub struct FlushBarrier {
    /// Which pass is where.
    passes: Mutex<Passes>,
    /// A sync has failed (I6).
    failed: AtomicBool,
}

/// How a pass ended; `Err` keeps the errno, if there was one.
type PassResult = Result<(), Option<i32>>;

/// Passes, numbered from 1.
#[derive(Debug, Default)]
struct Passes {
    /// The last pass that was begun.
    begun: u64,
    /// Whether it still runs.
    running: bool,
    /// The last pass that was finished, and how; `None` before the first.
    finished: Option<(u64, PassResult)>,
    /// Flushes that wait for the running pass to end.
    waiting: Vec<Waker>,
}

/// What a flush does next.
enum Turn {
    /// Carry out a pass.
    Lead,
    /// A pass that covers this flush has ended so.
    Joined(PassResult),
}

impl FlushBarrier {
    /// `Failed` if a sync has failed.
    pub(super) fn check(&self) -> Result<(), ImageError> {
        if self.failed.load(Ordering::Acquire) { Err(ImageError::Failed) } else { Ok(()) }
    }

    /// Waits for this flush's turn.
    async fn turn(&self) -> Turn {
        let mut mine = None;
        std::future::poll_fn(|context| {
            let mut passes = self.passes.lock().expect("no panic while held");
            let joins = passes.running && seeded::bug(Bug::JoinsRunningPass);
            let first_that_counts = *mine.get_or_insert(passes.begun + u64::from(!joins));
            if let Some((pass, result)) = passes.finished
                && pass >= first_that_counts
            {
                return Poll::Ready(Turn::Joined(result));
            }
            if !passes.running {
                passes.running = true;
                passes.begun += 1;
                return Poll::Ready(Turn::Lead);
            }
            passes.waiting.push(context.waker().clone());
            Poll::Pending
        })
        .await
    }
}

/// A pass being carried out. Dropping it unfinished lets another flush lead.
struct Pass<'a> {
    /// The barrier.
    barrier: &'a FlushBarrier,
    /// How it ended, once it did.
    result: Option<PassResult>,
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let mut passes = self.barrier.passes.lock().expect("no panic while held");
        passes.running = false;
        if let Some(result) = self.result {
            passes.finished = Some((passes.begun, result));
        }
        let waiting = std::mem::take(&mut passes.waiting);
        drop(passes);
        waiting.into_iter().for_each(Waker::wake);
    }
}

impl<S: Storage> Image<S> {
    /// Makes every write that completed before this call survive a power cut.
    ///
    /// # Errors
    /// `Io` if a sync failed, and `Failed` for every flush after it: nothing is durable for certain
    /// any more. `Io` too if a bitmap page could not be written; a later flush tries that again.
    ///
    /// # Cancel safety
    /// None, see [`Image`].
    pub async fn flush(&self) -> Result<(), ImageError> {
        let state = self.state();
        if !state.is_writable() {
            return Ok(());
        }
        state.barrier.check()?;
        match state.barrier.turn().await {
            Turn::Joined(Ok(())) => Ok(()),
            Turn::Joined(Err(code)) => {
                state.barrier.check()?;
                let source = code.map_or(io::ErrorKind::Other.into(), io::Error::from_raw_os_error);
                Err(ImageError::io("flush", FileRole::Side, ByteRange::between(0, 0))(source))
            }
            Turn::Lead => {
                let mut pass = Pass { barrier: &state.barrier, result: None };
                // Again: the pass that this flush has waited for may have failed.
                let result = match state.barrier.check() {
                    Ok(()) => self.pass().await,
                    failed => failed,
                };
                pass.result = Some(match &result {
                    Ok(()) => Ok(()),
                    Err(ImageError::Io { source, .. }) => Err(source.raw_os_error()),
                    Err(_) => Err(None),
                });
                result
            }
        }
    }

    /// One pass: freeze, sync the raw image, write the bits, sync the side file.
    async fn pass(&self) -> Result<(), ImageError> {
        let state = self.state();
        let frozen = state.allocation().freeze();
        if seeded::bug(Bug::CleanFlushDoesNothing) && frozen.pages().is_empty() {
            return Ok(());
        }
        #[cfg(feature = "seeded-bugs")]
        if let (Some(side), true) = (&self.side, seeded::bug(Bug::BitsBeforeRawSync)) {
            self.write_pages(side, &frozen).await?;
        }
        // Only now: the sync must cover the data of every frozen bit (I1).
        if !seeded::bug(Bug::RawNotSynced) {
            self.sync(&self.raw, FileRole::Raw).await?;
        }
        let frozen = Some(frozen).filter(|_| !seeded::bug(Bug::BitsOfLateWrites));
        let frozen = frozen.unwrap_or_else(|| state.allocation().freeze());
        let (Some(side), false) = (&self.side, frozen.pages().is_empty()) else { return Ok(()) };
        self.write_pages(side, &frozen).await?;
        if !seeded::bug(Bug::SideNotSynced) {
            self.sync(side, FileRole::Side).await?;
        }
        frozen.persisted();
        Ok(())
    }

    /// Syncs one file; a failure is final (I6).
    async fn sync(&self, storage: &S, role: FileRole) -> Result<(), ImageError> {
        storage.sync().await.map_err(|error| {
            let is_final = !seeded::bug(Bug::FailedSyncRetried);
            self.state.barrier.failed.store(is_final, Ordering::Release);
            log::error!("cannot sync {role}: {error}; writes and flushes are refused from now on");
            ImageError::io("sync", role, ByteRange::between(0, 0))(error)
        })
    }

    /// Writes frozen pages to the side file, neighbours together.
    async fn write_pages(&self, side: &S, frozen: &FrozenBits<'_>) -> Result<(), ImageError> {
        let Some(geometry) = self.state.geometry else { return Ok(()) };
        let mut pages = frozen.pages().iter().peekable();
        while let Some((first, content)) = pages.next() {
            let mut range = geometry.page_range(*first);
            let mut bytes = content.clone();
            while let Some((_, more)) = pages.next_if(|(page, _)| {
                geometry.page_range(*page).start() == range.end() && range.len() < MAX_PAGES_WRITE
            }) {
                bytes.extend_from_slice(more);
                range = ByteRange::between(range.start(), range.end() + more.len() as u64);
            }
            transfer::write_all(side, range.start(), IoBuffer::from_bytes(&bytes))
                .await
                .map_err(ImageError::io("write bitmap of", FileRole::Side, range))?;
        }
        Ok(())
    }
}
