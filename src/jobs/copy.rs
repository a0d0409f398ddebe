//! The loop of every job that goes through a disk: plan a step, work on several, count.
//!
//! A job says what the next step is and how one is done; here several of them are kept under way,
//! each with a buffer of its own, out of a few that are used again and again. After an error no
//! step is begun any more, and those under way are driven to their end, since the host may still
//! read and write their buffers.
//!
//! On blocking storage a step is done as soon as it is begun, so the steps come one after the other
//! and share one buffer, which then stays in the processor's cache.
//!
//! Not here: what is copied where, and what is true of a disk after an error.

use std::cell::RefCell;

use futures_util::future::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};

use crate::image::ImageError;
use crate::image::chain::{Chain, ChainPiece, PieceContent};
use crate::storage::{IoBuffer, Storage};
use crate::units::ByteRange;

/// How a job goes about its work.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// How many bytes one step moves, at least 1: the length of the buffers.
    pub step_len: u64,
    /// After how many bytes a job that can go on after a cut makes durable what it has done.
    pub flush_len: u64,
}

/// The usual pace. Steps large enough that a call costs little beside the copying, and small enough
/// that what was read is still in the processor's cache when it is written; what is not durable is
/// seconds of work on a slow disk.
impl Default for Pace {
    fn default() -> Self {
        Self { step_len: 512 << 10, flush_len: 1 << 30 }
    }
}

impl Pace {
    /// The first part of `range` that one step can move: up to the next multiple of the step's
    /// length, so that steps stay aligned.
    #[must_use]
    pub fn step_of(self, range: ByteRange) -> ByteRange {
        let start = range.start();
        let end = start.saturating_add(self.step_len - start % self.step_len);
        range.intersect(ByteRange::between(start, end))
    }
}

/// How many steps are under way at the same time: enough to keep a disk busy.
const IN_FLIGHT: usize = 4;

/// Buffers that are not in use.
#[derive(Debug)]
struct Buffers {
    /// The length of each in bytes.
    len: usize,
    /// The buffers, the one used last at the end.
    free: RefCell<Vec<IoBuffer>>,
}

impl Buffers {
    /// A buffer; the one used last if there is one.
    fn take(&self) -> IoBuffer {
        let free = self.free.borrow_mut().pop();
        free.unwrap_or_else(|| IoBuffer::zeroed(self.len))
    }

    /// Takes one back.
    fn put(&self, buffer: IoBuffer) {
        self.free.borrow_mut().push(buffer);
    }
}

/// What a chain holds, looked up piece by piece: an answer is kept for as long as steps stay inside
/// it. File systems may take long to tell where data ends.
#[derive(Debug)]
pub struct Pieces<'a, S> {
    /// The chain; without one there are only zeros.
    chain: Option<&'a Chain<S>>,
    /// The last answer.
    known: Option<Piece>,
}

/// A piece of a chain that is alike.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    /// Which bytes; never empty.
    pub range: ByteRange,
    /// Whether they are known to be zeros.
    pub is_zero: bool,
    /// Whether a layer has them.
    pub is_present: bool,
}

impl<'a, S: Storage> Pieces<'a, S> {
    /// Knows nothing yet.
    #[must_use]
    pub fn new(chain: Option<&'a Chain<S>>) -> Self {
        Self { chain, known: None }
    }

    /// The first piece of `range`, which must not be empty.
    ///
    /// # Errors
    /// As [`Chain::piece`].
    pub async fn first(&mut self, range: ByteRange) -> Result<Piece, ImageError> {
        let is_in = |piece: &Piece| {
            !piece.range.intersect(range).is_empty() && piece.range.start() <= range.start()
        };
        let piece = match (self.known.filter(is_in), self.chain) {
            (Some(known), _) => known,
            (None, None) => Piece { range, is_zero: true, is_present: false },
            (None, Some(chain)) => {
                let ChainPiece { range, present, content, .. } = chain.piece(range).await?;
                Piece { range, is_zero: content == PieceContent::Zero, is_present: present }
            }
        };
        self.known = Some(piece);
        Ok(Piece { range: piece.range.intersect(range), ..piece })
    }
}

/// Goes through the steps that `plan` names until it names no more. `work` does one, with a buffer
/// of one step's length and any content; `done` hears of each that was done, not always in order.
///
/// # Errors
/// The first error of any of the three. No step is under way any more then.
pub async fn run<Step, Report, E>(
    pace: Pace,
    mut plan: impl AsyncFnMut() -> Result<Option<Step>, E>,
    work: impl AsyncFn(Step, IoBuffer) -> Result<Report, E>,
    mut done: impl AsyncFnMut(Report) -> Result<(), E>,
) -> Result<(), E> {
    let len = usize::try_from(pace.step_len).unwrap_or(usize::MAX);
    let buffers = Buffers { len, free: RefCell::default() };
    let one = async |step| {
        let buffer = buffers.take();
        let result = work(step, buffer.clone()).await;
        buffers.put(buffer);
        result
    };
    let mut running = FuturesUnordered::new();
    let mut outcome = Ok(());
    let mut more = true;
    loop {
        let mut finished = None;
        if more && outcome.is_ok() && running.len() < IN_FLIGHT {
            match plan().await {
                Ok(Some(step)) => running.push(one(step)),
                Ok(None) => more = false,
                Err(error) => outcome = Err(error),
            }
            // On blocking storage it is done already.
            finished = running.next().now_or_never();
        }
        let room = more && outcome.is_ok() && running.len() < IN_FLIGHT;
        let finished = match finished {
            Some(finished) => finished,
            None if room => continue,
            None => running.next().await,
        };
        match finished {
            Some(Ok(report)) if outcome.is_ok() => outcome = done(report).await,
            Some(Err(error)) if outcome.is_ok() => outcome = Err(error),
            Some(_) => {}
            None if !more || outcome.is_err() => return outcome,
            None => {}
        }
    }
}
