//! The device as the `vhost-user-backend` framework sees it.
//!
//! Never returns an error from [`VhostUserBackend::handle_event`], nor lets a panic through: either
//! would end the worker's thread without a word.

use std::cell::Cell;
use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use rustix::fs::{FileType, fstat, fstatfs};
use vhost::vhost_user::Backend;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::VhostUserBackend;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use vm_memory::{
    GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventNotifier};

use super::SharedMemory;
use super::exit_event::ExitEvents;
use super::interposer::InflightMessages;
use super::queue::{self, Heritage, QueueContext, QueueError};
use super::recovery::{QueueShape, Recovery, RecoveryError, Region};
use super::vring::{Pause, RingControl, Vring, new_eventfd, ring_eventfd};
use crate::executor::block_on;
use crate::sandbox::Sandbox;
use crate::sandbox::profile::Profile;
use crate::storage::file::FileStorage;
use crate::virtio::config::has_feature;
use crate::virtio::guest_memory::{GuardedMemory, GuestMap};

/// The most queues: the framework keeps the queues of a thread in the bits of a u64.
pub const MAX_QUEUES: u16 = 64;

/// The largest queue that we accept: the largest that VIRTIO allows (2.7). crosvm makes no smaller.
pub(super) const MAX_QUEUE_SIZE: usize = 32768;

/// The name of the framework's thread that handles messages.
pub(super) const CONTROL_THREAD: &str = "control";

/// File system type of FUSE (statfs(2), `FUSE_SUPER_MAGIC`).
const FUSE_MAGIC: i64 = 0x6573_5546;

/// File system type of overlayfs (`OVERLAYFS_SUPER_MAGIC`).
const OVERLAY_MAGIC: i64 = 0x794c_7630;

/// One connection's device.
pub struct BlkBackend {
    /// What its queues share.
    context: QueueContext,
    /// Guest memory, as the queues may use it.
    memory: Mutex<Option<Arc<GuardedMemory>>>,
    /// Readable once a queue has found that the connection cannot go on.
    failed: Arc<OwnedFd>,
    /// Feature bits that the front end accepted.
    features: AtomicU64,
    /// Control of each queue that has run, by thread.
    controls: Mutex<Vec<Option<Arc<RingControl>>>>,
    /// Set when the connection ends: no queue starts any more.
    closing: AtomicBool,
    /// What ends the framework's threads. Each of them keeps the device, and so this.
    exit_events: ExitEvents,
    /// What of this disk outlives the process.
    recovery: Arc<Recovery>,
    /// The region that the front end has set, if it has.
    region: Mutex<Option<Arc<Region>>>,
    /// The channel to the front end; kept open, and used once there is something to say.
    channel: Mutex<Option<Backend>>,
    /// What the framework's threads give up.
    sandbox: Sandbox,
    /// Goes with the device: see [`BlkBackend::abandon`]. The last field, so that it goes last.
    gone: Mutex<Option<mpsc::Sender<Infallible>>>,
}

impl std::fmt::Debug for BlkBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlkBackend").field("context", &self.context).finish_non_exhaustive()
    }
}

impl BlkBackend {
    /// The device of a new connection.
    ///
    /// # Errors
    /// If there are not enough file descriptors left.
    pub fn new(context: QueueContext, recovery: Arc<Recovery>) -> io::Result<Self> {
        let queues = usize::from(context.device.config().num_queues);
        let threads = queues.min(usize::from(MAX_QUEUES));
        Ok(Self {
            context,
            memory: Mutex::new(None),
            failed: new_eventfd()?,
            features: AtomicU64::new(0),
            controls: Mutex::new(vec![None; queues]),
            closing: AtomicBool::new(false),
            exit_events: ExitEvents::new(threads)?,
            recovery,
            region: Mutex::new(None),
            channel: Mutex::new(None),
            sandbox: Sandbox::none(),
            gone: Mutex::new(None),
        })
    }

    /// The same in a sandbox.
    #[must_use]
    pub fn in_sandbox(self, sandbox: Sandbox) -> Self {
        Self { sandbox, ..self }
    }

    /// Lets the calling thread, one of the framework's, give up what it does not need, the first
    /// time. A thread that cannot must not go on, and the process without it would be of no use.
    fn confine(&self, profile: Profile) {
        thread_local! {
            /// Whether this thread has done it.
            static CONFINED: Cell<bool> = const { Cell::new(false) };
        }
        if !CONFINED.replace(true)
            && let Err(error) = self.sandbox.enter(profile)
        {
            log::error!("sandbox: a {} thread is not confined: {error}", profile.name());
            std::process::abort();
        }
    }

    /// Becomes readable when a queue cannot run by the front end's fault: the connection is to end
    /// then.
    pub fn failed(&self) -> BorrowedFd<'_> {
        self.failed.as_fd()
    }

    /// Stops all queues for good, and waits until they have drained.
    pub fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
        self.at_rest(|| self.recovery.leave());
    }

    /// Ends the threads that the framework leaves behind when it cannot be set up, and waits until
    /// each has let go of the device and of all that it had. No queue has been started.
    pub fn abandon(self: Arc<Self>) {
        let (gone, waiting) = mpsc::channel();
        *self.gone.lock().expect("no panic while held") = Some(gone);
        self.exit_events.ring();
        drop(self);
        // Nothing ever comes: it ends with the last owner.
        let _ended = waiting.recv();
    }

    /// Brings all queues to rest, does something, and lets them go on. A queue that runs for the
    /// first time meanwhile waits in [`BlkBackend::register`]: it is known before or starts after,
    /// and never goes on with what the action has changed.
    fn at_rest(&self, action: impl FnOnce()) {
        let controls = self.lock_controls();
        // Ask all of them first, so that they drain at the same time.
        let pauses: Vec<Pause<'_>> =
            controls.iter().flatten().map(|control| control.request_pause()).collect();
        controls.iter().flatten().for_each(|control| control.wait_until_left());
        action();
        drop(pauses);
    }

    /// The queues' controls.
    fn lock_controls(&self) -> std::sync::MutexGuard<'_, Vec<Option<Arc<RingControl>>>> {
        self.controls.lock().expect("no panic while held")
    }

    /// Makes a queue's control known to [`BlkBackend::at_rest`]; names its thread the first time.
    fn register(&self, thread: usize, control: &Arc<RingControl>) {
        let mut controls = self.lock_controls();
        let Some(entry) = controls.get_mut(thread) else { return };
        if entry.is_none()
            && let Ok(name) = std::ffi::CString::new(format!("queue-{thread}"))
            && let Err(error) = rustix::thread::set_name(&name)
        {
            log::debug!("cannot name a thread: {error}");
        }
        *entry = Some(Arc::clone(control));
    }

    /// What outlives the process of queue `thread`, which has `size` entries; `None` if the front
    /// end keeps nothing.
    ///
    /// A queue that has no place in what it keeps must not run: the next process would find neither
    /// which clusters its writes have made new nor which requests it had taken, and would go on all
    /// the same, since the region is in order.
    fn heritage(&self, thread: usize, size: u16) -> Result<Option<Heritage>, RecoveryError> {
        let Some(region) = self.lock_region().clone() else { return Ok(None) };
        let inflight = region.queue(thread, size)?;
        Ok(Some(Heritage { inflight, journal: region.journal.clone() }))
    }

    /// The region that the front end has set.
    fn lock_region(&self) -> std::sync::MutexGuard<'_, Option<Arc<Region>>> {
        self.region.lock().expect("no panic while held")
    }

    /// Lets the region hold whether the device is a write-back cache.
    fn keep_writeback(&self) {
        if let Some(region) = &*self.lock_region() {
            region.keep_writeback(self.context.device.is_writeback());
        }
    }

    /// Runs a queue for as long as it is to run.
    fn run_queue(&self, thread: usize, vring: &Vring) {
        self.register(thread, vring.control());
        let Some(permit) = vring.enter() else { return };
        // Now that we count as running: who closes either waits for us, or is seen here.
        if self.closing.load(Ordering::SeqCst) {
            return;
        }
        let Some(memory) = self.lock_memory().clone() else { return };
        let map = GuestMap::new(memory);
        let features = self.features.load(Ordering::SeqCst);
        let indirect = has_feature(features, VIRTIO_RING_F_INDIRECT_DESC);
        log::debug!("queue {thread} runs: {:x?}", permit.setup);
        let heritage = self.heritage(thread, permit.setup.size).map_err(QueueError::from);
        let run = |heritage| queue::run(&self.context, &permit, &map, indirect, heritage);
        match heritage.and_then(run) {
            Ok(()) => log::debug!("queue {thread} is at rest"),
            Err(error) => {
                let limit = &self.context.log_limit;
                limit.error(|| log::error!("queue {thread} stopped: {error}"));
                if error.ends_connection() {
                    ring_eventfd(&self.failed);
                }
            }
        }
    }

    /// Guest memory, as the queues may use it.
    fn lock_memory(&self) -> std::sync::MutexGuard<'_, Option<Arc<GuardedMemory>>> {
        self.memory.lock().expect("no panic while held")
    }

    /// Takes new memory for the old. No queue runs meanwhile, and none starts if it is refused.
    fn take_memory(&self, memory: Arc<GuestMemoryMmap<()>>) -> io::Result<()> {
        // The old guards go first: the same region may be in both.
        *self.lock_memory() = None;
        memory.iter().try_for_each(check_region)?;
        *self.lock_memory() = Some(GuardedMemory::new(memory)?);
        Ok(())
    }
}

impl InflightMessages for BlkBackend {
    fn get(&self, shape: QueueShape) -> Result<Region, RecoveryError> {
        self.recovery.offer(shape)
    }

    fn set(&self, file: File, len: u64, shape: QueueShape) -> Result<(), RecoveryError> {
        let mut result = Ok(());
        // A front end that stops and starts its rings gives the region back each time.
        self.at_rest(|| {
            result = self.recovery.accept(file, len, shape).map(|region| {
                if let Some(writeback) = region.writeback() {
                    self.context.device.set_writeback(writeback);
                }
                *self.lock_region() = Some(Arc::new(region));
                self.keep_writeback();
            });
        });
        result
    }

    fn ring_starts(&self) -> Result<(), RecoveryError> {
        self.recovery.begin()
    }

    fn ring_stopped(&self) {
        // A front end whose guest resets the device forgets the region, and with it what was
        // completed and not flushed: from here on nobody may need it.
        let is_kept = self.lock_region().as_ref().is_some_and(|region| region.journal.is_some());
        if is_kept && let Err(error) = block_on(self.context.image.handle(FileStorage::new).flush())
        {
            self.context.log_limit.error(|| log::error!("flush as a ring stops: {error}"));
        }
    }
}

/// Refuses a memory region that its file does not hold, or whose file lets a process decide when a
/// page of it can be touched (FUSE): it could keep a queue for ever.
fn check_region(region: &GuestRegionMmap<()>) -> io::Result<()> {
    let refused = |what: String| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    let Some(place) = region.file_offset() else { return Ok(()) };
    let stat = fstat(place.file())?;
    let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    let len = u64::try_from(stat.st_size).unwrap_or(0);
    let end = place.start().checked_add(region.len());
    if is_file && end.is_none_or(|end| end > len) {
        return refused(format!("{} bytes, which is longer than its file", region.len()));
    }
    match fstatfs(place.file())?.f_type {
        FUSE_MAGIC => refused("its file is on FUSE".into()),
        // Its pages are those of a file that we cannot see, perhaps on FUSE.
        OVERLAY_MAGIC => refused("its file is on overlayfs".into()),
        _ => Ok(()),
    }
}

impl VhostUserBackend for BlkBackend {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        usize::from(self.context.device.config().num_queues)
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        // The first message of each connection asks for them: see `Export::confine_threads`.
        if std::thread::current().name() == Some(CONTROL_THREAD) {
            self.confine(Profile::Control);
        }
        self.context.device.offered_features() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn acked_features(&self, features: u64) {
        self.features.store(features, Ordering::SeqCst);
        self.context.device.set_features(features);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
    }

    fn reset_device(&self) {
        // The framework has disabled every ring before, which drained it.
        self.features.store(0, Ordering::SeqCst);
        self.context.device.reset();
        self.keep_writeback();
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The framework tells each ring.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.context.device.read_config(offset, size)
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        if self.context.device.write_config(offset, bytes) {
            self.keep_writeback();
        } else {
            // An error would end the connection, which is out of proportion: VIRTIO 1.3, 4.1.4.6
            // lets a device ignore a write to a field that is read-only.
            self.context.log_limit.warn(|| {
                let len = bytes.len();
                log::warn!("front end writes {len} bytes of configuration at {offset}: ignored");
            });
        }
        Ok(())
    }

    fn update_memory(&self, memory: SharedMemory) -> io::Result<()> {
        // The rings have resolved their addresses in the old memory: let them do it again.
        let mut result = Ok(());
        self.at_rest(|| result = self.take_memory(memory.memory().into_inner()));
        result.inspect_err(|error| log::error!("front end: memory region: {error}"))
    }

    fn set_backend_req_fd(&self, channel: Backend) {
        *self.channel.lock().expect("no panic while held") = Some(channel);
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.context.device.config().num_queues.min(MAX_QUEUES)).map(|q| 1 << q).collect()
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        // Without one the framework would wait for its workers for ever.
        Some(self.exit_events.hand_out())
    }

    fn handle_event(
        &self,
        event: u16,
        _events: EventSet,
        vrings: &[Vring],
        thread: usize,
    ) -> io::Result<()> {
        // Also for an event that is not a queue's: see `Export::confine_threads`.
        self.confine(Profile::Queue);
        if let Some(vring) = vrings.get(usize::from(event)) {
            let outcome = catch_unwind(AssertUnwindSafe(|| self.run_queue(thread, vring)));
            if outcome.is_err() {
                log::error!("queue {thread} stopped: internal error (see the panic message above)");
            }
        }
        Ok(())
    }
}
