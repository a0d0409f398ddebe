//! The block device: a request becomes a call on the image, the result becomes a status byte.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

use super::chain::Chain;
use super::config::{DeviceConfig, WRITEBACK_OFFSET, has_feature, offered_features, read_config};
use super::request::{Fault, Request, RequestError, Used, ZeroSegment};
use crate::image::{Image, ImageError, ImageState};
use crate::log_limit::LogLimit;
use crate::storage::{IoBuffer, Storage};

/// Bytes of the string that GET_ID answers (5.2.6: padded with zeros, no NUL if it has 20).
const ID_LEN: usize = 20;

/// What the queues of a device share.
#[derive(Debug)]
pub struct DeviceState {
    /// What never changes.
    config: DeviceConfig,
    /// The image's shared state: size, access.
    image: Arc<ImageState>,
    /// Feature bits that the driver accepted.
    features: AtomicU64,
    /// Whether the driver may count on its flushes (write-back), as CONFIG_WCE sets it.
    writeback: AtomicBool,
    /// `writeback` of a device that was just reset.
    initial_writeback: bool,
    /// Bounds what requests write to the log.
    log_limit: LogLimit,
}

impl DeviceState {
    /// A device on `image`, write-back unless told otherwise.
    #[must_use]
    pub fn new(config: DeviceConfig, image: Arc<ImageState>, writeback: bool) -> Self {
        Self {
            config,
            image,
            features: AtomicU64::new(0),
            writeback: AtomicBool::new(writeback),
            initial_writeback: writeback,
            log_limit: LogLimit::default(),
        }
    }

    /// What never changes.
    #[must_use]
    pub fn config(&self) -> &DeviceConfig {
        &self.config
    }

    /// Feature bits that the device offers, those of the transport excluded.
    #[must_use]
    pub fn offered_features(&self) -> u64 {
        offered_features(&self.image)
    }

    /// The driver accepted these features.
    pub fn set_features(&self, features: u64) {
        self.features.store(features, Ordering::Relaxed);
        // 5.2.5.2: a driver that can turn the cache on and not flush it starts without.
        if has_feature(features, VIRTIO_BLK_F_CONFIG_WCE)
            && !has_feature(features, VIRTIO_BLK_F_FLUSH)
        {
            self.set_writeback(false);
        }
    }

    /// Whether the device is a write-back cache, as CONFIG_WCE shows it.
    pub fn is_writeback(&self) -> bool {
        self.writeback.load(Ordering::Relaxed)
    }

    /// Makes the device a write-back cache, or one that writes through.
    pub fn set_writeback(&self, writeback: bool) {
        self.writeback.store(writeback, Ordering::Relaxed);
    }

    /// The driver reset the device.
    pub fn reset(&self) {
        self.features.store(0, Ordering::Relaxed);
        self.set_writeback(self.initial_writeback);
    }

    /// `len` bytes of the configuration from byte `offset`.
    #[must_use]
    pub fn read_config(&self, offset: u32, len: u32) -> Vec<u8> {
        read_config(&self.image, &self.config, self.is_writeback(), offset, len)
    }

    /// The driver writes the configuration. Returns whether it may: only `writeback`, with 0 or 1.
    pub fn write_config(&self, offset: u32, bytes: &[u8]) -> bool {
        match (offset, bytes) {
            (WRITEBACK_OFFSET, [value @ (0 | 1)]) => {
                self.set_writeback(*value == 1);
                true
            }
            _ => false,
        }
    }

    /// Whether every write must be stable before it completes (5.2.6.2): the driver does not flush,
    /// or has turned the write-back cache off.
    fn is_write_through(&self) -> bool {
        let features = self.features.load(Ordering::Relaxed);
        if has_feature(features, VIRTIO_BLK_F_CONFIG_WCE) {
            !self.is_writeback()
        } else {
            !has_feature(features, VIRTIO_BLK_F_FLUSH) || !self.initial_writeback
        }
    }
}

/// One queue's view of the device.
#[derive(Debug)]
pub struct BlockDevice<S> {
    /// What all queues share.
    state: Arc<DeviceState>,
    /// This thread's handle on the image.
    image: Image<S>,
}

impl<S: Storage> BlockDevice<S> {
    /// The device for one queue's thread.
    #[must_use]
    pub fn new(state: Arc<DeviceState>, image: Image<S>) -> Self {
        Self { state, image }
    }

    /// Carries out the request in `chain` and answers it.
    ///
    /// # Cancel safety
    /// None: drive it to its end (see [`Image`]).
    pub async fn serve(&self, chain: Chain) -> Used {
        let head = chain.head;
        let features = self.state.features.load(Ordering::Relaxed);
        let Some((request, completion)) = Request::parse(chain, features) else {
            self.state.log_limit.debug(|| log::debug!("request without a status byte"));
            return Used::untouched(head);
        };
        let result = match request {
            Ok(request) => self.execute(request).await,
            Err(error) => Err(error),
        };
        if let Err(error) = &result {
            self.report(error);
        }
        completion.finish(result.as_ref().map(|filled| *filled))
    }

    /// Carries out a request. Returns how many bytes of device-writable data it filled.
    async fn execute(&self, request: Request) -> Result<usize, RequestError> {
        match request {
            Request::Read { offset, data } => {
                let len = data.len();
                self.image.read(offset, data).await?;
                Ok(len)
            }
            Request::Write { offset, data } => {
                self.image.write(offset, data).await?;
                self.settle().await
            }
            Request::GetId { data } => Ok(self.write_id(&data)),
            // Boxed, here and below: a request's future is moved into its place, and the rare kinds
            // would make it several times as large.
            rare => Box::pin(self.execute_rare(rare)).await,
        }
    }

    /// Carries out a request of a kind that is not moving data.
    async fn execute_rare(&self, request: Request) -> Result<usize, RequestError> {
        match request {
            Request::Flush => {
                self.image.flush().await?;
                Ok(0)
            }
            Request::Discard(segments) => {
                self.check_segments(&segments)?;
                for segment in segments {
                    self.image.discard(segment.range.start(), segment.range.len()).await?;
                }
                self.settle().await
            }
            Request::WriteZeroes(segments) => {
                self.check_segments(&segments)?;
                for ZeroSegment { range, unmap } in segments {
                    self.image.write_zeroes(range.start(), range.len(), unmap).await?;
                }
                self.settle().await
            }
            Request::Read { .. } | Request::Write { .. } | Request::GetId { .. } => Ok(0),
        }
    }

    /// Ends a change of the disk: makes it stable now if the driver does not flush.
    async fn settle(&self) -> Result<usize, RequestError> {
        if self.state.is_write_through() {
            Box::pin(self.image.flush()).await?;
        }
        Ok(0)
    }

    /// Refuses a list of segments of which any lies outside the disk, before anything is done.
    fn check_segments(&self, segments: &[ZeroSegment]) -> Result<(), ImageError> {
        let size = self.image.state().virtual_size();
        match segments.iter().find(|segment| segment.range.end() > size) {
            Some(outside) => Err(ImageError::OutOfRange { range: outside.range, size }),
            None => Ok(()),
        }
    }

    /// Writes the serial, padded with zeros, as far as `data` goes. Returns the bytes written.
    fn write_id(&self, data: &IoBuffer) -> usize {
        let mut id = self.state.config.serial.clone();
        id.resize(ID_LEN, 0);
        id.truncate(data.len());
        data.copy_from(0, &id);
        id.len()
    }

    /// Writes an error to the log: the host's for the operator, the guest's for who looks.
    fn report(&self, error: &RequestError) {
        match error.fault() {
            Fault::Guest => self.state.log_limit.debug(|| log::debug!("guest request: {error}")),
            Fault::Host => self.state.log_limit.error(|| {
                let source = std::error::Error::source(error);
                let cause = source.map(|e| format!(": {e}")).unwrap_or_default();
                log::error!("request failed: {error}{cause}");
            }),
        }
    }
}
