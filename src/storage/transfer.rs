//! Whole transfers over a bare [`Storage`]: short reads and writes, interruptions, alignment, and
//! zeroing where the file cannot do it by itself.
//!
//! Relies on virtual sizes and cluster sizes being multiples of 512 bytes: an aligned file is only
//! ever *written* at sector positions (`host_file` opens no file for direct I/O that would want
//! more), so a bounce buffer is enough and nothing is ever read back to be written again.

use std::io;

use tokio::sync::SemaphorePermit;

use super::buffer::PAGE_SIZE;
use super::{IoBuffer, Storage, ZeroMode};
use crate::units::ByteRange;

/// The most bytes that go through a bounce buffer at once; larger transfers go in pieces. With
/// [`Storage::bounce_budget`] it bounds the memory of requests that do not fit the file's
/// alignment.
const BOUNCE_LEN: usize = 128 << 10;

/// The most zeros that are written at once, in bytes.
const ZEROS_LEN: usize = 1 << 20;

/// How often in a row an interrupted call is made again before the interruption is an error: far
/// more than a signal or a full queue explains, and an end to a host that never says anything else.
const MAX_INTERRUPTIONS: u32 = 1000;

/// Reads `buffer.len()` bytes from `offset`, fewer only at the end of the file. Returns how many.
///
/// # Errors
/// What the storage said; the buffer's content is then unspecified.
pub async fn read_up_to<S: Storage>(
    storage: &S,
    offset: u64,
    buffer: IoBuffer,
) -> io::Result<usize> {
    if buffer.is_empty() {
        return Ok(0);
    }
    if !is_aligned(storage, offset, &buffer) {
        return Box::pin(read_in_bounces(storage, offset, &buffer)).await;
    }
    // The transfer that simply works. Everything else is boxed, here and in `write_all`: it would
    // make the future of every request several times as large.
    match storage.read(offset, buffer.clone()).await {
        Ok(got) if got >= buffer.len() => Ok(buffer.len()),
        first => Box::pin(read_on(storage, offset, &buffer, first)).await,
    }
}

/// Whether a transfer may go to the storage as it is.
fn is_aligned<S: Storage>(storage: &S, offset: u64, buffer: &IoBuffer) -> bool {
    let rule = storage.alignment();
    offset.is_multiple_of(rule.offset)
        && (buffer.len() as u64).is_multiple_of(rule.offset)
        && buffer.is_aligned(rule.memory)
}

/// Memory for a bounce buffer, to be held while it is in use.
async fn lease<S: Storage>(storage: &S, bytes: usize) -> Option<SemaphorePermit<'_>> {
    match storage.bounce_budget() {
        Some(budget) => Some(budget.lease(bytes).await),
        None => None,
    }
}

/// Reads an unaligned buffer, piece by piece.
async fn read_in_bounces<S: Storage>(
    storage: &S,
    offset: u64,
    buffer: &IoBuffer,
) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        let part = buffer.slice(done, (buffer.len() - done).min(BOUNCE_LEN));
        let got = read_bounced(storage, offset + done as u64, &part).await?;
        done += got;
        if got < part.len() {
            break;
        }
    }
    Ok(done)
}

/// Reads `buffer.len()` bytes from `offset`.
///
/// # Errors
/// As [`read_up_to`]; `UnexpectedEof` if the file ends before.
pub async fn read_exact<S: Storage>(storage: &S, offset: u64, buffer: IoBuffer) -> io::Result<()> {
    let len = buffer.len();
    if read_up_to(storage, offset, buffer).await? < len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}

/// Reads `buffer.len()` bytes from `offset`; what lies past the end of the file reads as zeros.
///
/// # Errors
/// As [`read_up_to`].
pub async fn read_or_zero<S: Storage>(
    storage: &S,
    offset: u64,
    buffer: IoBuffer,
) -> io::Result<()> {
    let got = read_up_to(storage, offset, buffer.clone()).await?;
    if got < buffer.len() {
        buffer.tail(got).fill_zero();
    }
    Ok(())
}

/// Writes the whole of `buffer` at `offset`.
///
/// # Errors
/// What the storage said, `WriteZero` if it took nothing. Any part may have been written.
pub async fn write_all<S: Storage>(storage: &S, offset: u64, buffer: IoBuffer) -> io::Result<()> {
    if buffer.is_empty() {
        return Ok(());
    }
    if !buffer.is_aligned(storage.alignment().memory) {
        return Box::pin(write_in_bounces(storage, offset, &buffer)).await;
    }
    match storage.write(offset, buffer.clone()).await {
        Ok(put) if put >= buffer.len() => Ok(()),
        first => Box::pin(write_on(storage, offset, &buffer, first)).await,
    }
}

/// Writes an unaligned buffer, piece by piece.
async fn write_in_bounces<S: Storage>(
    storage: &S,
    offset: u64,
    buffer: &IoBuffer,
) -> io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        let part = buffer.slice(done, (buffer.len() - done).min(BOUNCE_LEN));
        let _lease = lease(storage, part.len()).await;
        let bounce = IoBuffer::zeroed(part.len());
        bounce.copy_from_buffer(&part);
        let offset = offset + done as u64;
        let first = storage.write(offset, bounce.clone()).await;
        write_on(storage, offset, &bounce, first).await?;
        done += part.len();
    }
    Ok(())
}

/// Makes `range` read zeros: by giving the blocks back or marking them (`preferred` first), and
/// where the file can do neither, by writing zeros.
///
/// # Errors
/// What the storage said. Any part of the range may then hold old bytes.
pub async fn write_zeroes<S: Storage>(
    storage: &S,
    range: ByteRange,
    preferred: ZeroMode,
) -> io::Result<()> {
    let other = match preferred {
        ZeroMode::ZeroRange => ZeroMode::PunchHole,
        ZeroMode::PunchHole => ZeroMode::ZeroRange,
    };
    for mode in [preferred, other] {
        match zero_uninterrupted(storage, range, mode).await {
            Err(error) if is_unsupported(&error) => {}
            result => return result,
        }
    }
    let zeros = IoBuffer::zeros(usize::try_from(range.len()).unwrap_or(usize::MAX).min(ZEROS_LEN));
    let mut offset = range.start();
    while offset < range.end() {
        let left = usize::try_from(range.end() - offset).unwrap_or(usize::MAX);
        let part = zeros.slice(0, left.min(zeros.len()));
        let len = part.len() as u64;
        write_all(storage, offset, part).await?;
        offset += len;
    }
    Ok(())
}

/// Gives the blocks of `range` back, if the file can; otherwise does nothing, which a discard may.
///
/// # Errors
/// What the storage said, unless it was that it cannot.
pub async fn discard<S: Storage>(storage: &S, range: ByteRange) -> io::Result<()> {
    match zero_uninterrupted(storage, range, ZeroMode::PunchHole).await {
        Err(error) if is_unsupported(&error) => Ok(()),
        result => result,
    }
}

/// Whether `error` says "this file cannot", as against "this went wrong".
fn is_unsupported(error: &io::Error) -> bool {
    // fallocate(2): EOPNOTSUPP by file system, ENODEV by file type, EINVAL by block devices that
    // know neither mode.
    error.kind() == io::ErrorKind::Unsupported
        || [libc::EOPNOTSUPP, libc::ENODEV, libc::ENOSYS, libc::EINVAL]
            .into_iter()
            .any(|code| error.raw_os_error() == Some(code))
}

/// `Storage::zero`, again after an interruption.
async fn zero_uninterrupted<S: Storage>(
    storage: &S,
    range: ByteRange,
    mode: ZeroMode,
) -> io::Result<()> {
    let mut interruptions = 0;
    loop {
        match storage.zero(range, mode).await {
            Err(error) => check_interruption(error, &mut interruptions)?,
            Ok(()) => return Ok(()),
        }
    }
}

/// `Ok` if the call may simply be made again: it was interrupted, and not for ever.
fn check_interruption(error: io::Error, interruptions: &mut u32) -> io::Result<()> {
    *interruptions += 1;
    match error.kind() {
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
            if *interruptions <= MAX_INTERRUPTIONS =>
        {
            Ok(())
        }
        _ => Err(error),
    }
}

/// Goes on with reading an aligned buffer after its first transfer, until it is full or the file
/// ends.
async fn read_on<S: Storage>(
    storage: &S,
    offset: u64,
    buffer: &IoBuffer,
    first: io::Result<usize>,
) -> io::Result<usize> {
    let mut result = first;
    let mut done = 0;
    let mut interruptions = 0;
    loop {
        match result {
            Ok(0) => return Ok(done),
            Ok(got) => {
                interruptions = 0;
                done = (done + got).min(buffer.len());
            }
            Err(error) => check_interruption(error, &mut interruptions)?,
        }
        // A direct read that stops in the middle of a block has met the end of the file; going on
        // from there would be misaligned.
        if done == buffer.len() || !(done as u64).is_multiple_of(storage.alignment().offset) {
            return Ok(done);
        }
        result = storage.read(offset + done as u64, buffer.tail(done)).await;
    }
}

/// Reads `part` (at most [`BOUNCE_LEN`] bytes) through an aligned buffer of our own, widened to
/// what the file wants.
async fn read_bounced<S: Storage>(storage: &S, offset: u64, part: &IoBuffer) -> io::Result<usize> {
    let unit = PAGE_SIZE as u64;
    let lead = usize::try_from(offset % unit).map_err(io::Error::other)?;
    let len = (lead + part.len()).next_multiple_of(PAGE_SIZE);
    let _lease = lease(storage, len).await;
    let bounce = IoBuffer::zeroed(len);
    let start = offset - lead as u64;
    let first = storage.read(start, bounce.clone()).await;
    let got = read_on(storage, start, &bounce, first).await?;
    let useful = got.saturating_sub(lead).min(part.len());
    part.slice(0, useful).copy_from_buffer(&bounce.slice(lead, useful));
    Ok(useful)
}

/// Goes on with writing an aligned buffer after its first transfer, until all of it is written.
async fn write_on<S: Storage>(
    storage: &S,
    offset: u64,
    buffer: &IoBuffer,
    first: io::Result<usize>,
) -> io::Result<()> {
    let mut result = first;
    let mut done = 0;
    let mut interruptions = 0;
    loop {
        match result {
            Ok(0) if done < buffer.len() => return Err(io::ErrorKind::WriteZero.into()),
            Ok(put) => {
                interruptions = 0;
                done = (done + put).min(buffer.len());
            }
            Err(error) => check_interruption(error, &mut interruptions)?,
        }
        if done == buffer.len() {
            return Ok(());
        }
        result = storage.write(offset + done as u64, buffer.tail(done)).await;
    }
}
