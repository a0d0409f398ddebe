//! Reading: resolve, then fetch each extent.

use std::cell::Cell;

use futures_util::StreamExt;
use futures_util::stream;

use super::extent::{Extent, ExtentKind};
use super::{FileRole, Image, ImageError};
use crate::seeded::{self, Bug};
use crate::storage::{IoBuffer, Storage, transfer};

/// How many extents of one request are fetched at the same time: enough to keep a disk busy, few
/// enough that a fragmented request does not fill the ring.
const PARALLEL_EXTENTS: usize = 16;

impl<S: Storage> Image<S> {
    /// Reads `data.len()` bytes from byte `offset` of the disk.
    ///
    /// # Errors
    /// `OutOfRange` before anything is read; `Io` if the host failed, the buffer's content is then
    /// unspecified.
    ///
    /// # Cancel safety
    /// None, see [`Image`].
    pub async fn read(&self, offset: u64, data: IoBuffer) -> Result<(), ImageError> {
        let range = self.state.check_range(offset, data.len() as u64)?;
        let mut extents = self.state.extents(range);
        let Some(first) = extents.next() else { return Ok(()) };
        if first.range == range {
            return self.read_extent(first, data).await;
        }
        // A request answered with an error must leave no I/O behind that still writes into its
        // buffer, so all pieces are driven to their end, whatever becomes of one of them.
        let failure = Cell::new(None);
        Box::pin(stream::iter(std::iter::once(first).chain(extents)).for_each_concurrent(
            PARALLEL_EXTENTS,
            |extent| {
                let start = usize::try_from(extent.range.start() - offset).unwrap_or(usize::MAX);
                let len = usize::try_from(extent.range.len()).unwrap_or(usize::MAX);
                let piece = data.slice(start, len);
                let failure = &failure;
                async move {
                    if let Err(error) = self.read_extent(extent, piece).await {
                        failure.set(Some(error));
                    }
                }
            },
        ))
        .await;
        failure.into_inner().map_or(Ok(()), Err)
    }

    /// Reads one extent.
    async fn read_extent(&self, extent: Extent, data: IoBuffer) -> Result<(), ImageError> {
        let storage = match (extent.kind, &self.backing) {
            (ExtentKind::Data, _) => &self.raw,
            (ExtentKind::Backing, Some(chain)) => match chain.as_raw() {
                Some(storage) => storage,
                // Boxed, or the future of every request would be as large as the walk down a chain.
                None => return Box::pin(chain.read(extent.range.start(), data)).await,
            },
            (ExtentKind::Zero, _) | (ExtentKind::Backing, None) => {
                if !seeded::bug(Bug::ShortBackingNotZeroed) {
                    data.fill_zero();
                }
                return Ok(());
            }
        };
        // The extent ends where the file did when it was opened: one that has become shorter is an
        // error, not zeros.
        transfer::read_exact(storage, extent.range.start(), data).await.map_err(|error| {
            let role = match extent.kind {
                ExtentKind::Data => FileRole::Raw,
                ExtentKind::Backing | ExtentKind::Zero => FileRole::Backing,
            };
            ImageError::io("read", role, extent.range)(error)
        })
    }
}
