//! A ring whose worker is paused and drained around every change.
//!
//! The framework changes rings from its control thread whenever a message says so, also while they
//! run. Here each change goes through a [`Pause`]: the worker finishes what it has taken, gives its
//! position back and leaves; then the change is made; then the worker may start again. So
//! GET_VRING_BASE, a disabled ring, a device reset or a new kick find a ring at rest, and
//! outside the worker's loop no request is ever in flight.
//!
//! The framework gets an eventfd of ours in place of the kick. It is how a paused worker is started
//! again, and nobody but us writes to it, so the framework never blocks on reading a kick that was
//! consumed. The real kick is watched by the worker alone.
//!
//! Not here: what the worker does (`queue`).

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, MutexGuard};

use rustix::event::{EventfdFlags, eventfd};
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error as QueueError, QueueT};

use super::SharedMemory;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{self, Condvar, Mutex};
use crate::virtio::ring::{RingSetup, SplitRing};

/// A new eventfd that never blocks.
pub(super) fn new_eventfd() -> io::Result<Arc<OwnedFd>> {
    Ok(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
}

/// Rings an eventfd. A full counter (EAGAIN) is loud enough already.
#[expect(clippy::host_endian_bytes, reason = "eventfd(2) takes a number of the machine")]
pub(super) fn ring_eventfd(fd: &OwnedFd) {
    if let Err(error) = rustix::io::write(fd, &1_u64.to_ne_bytes())
        && error != rustix::io::Errno::AGAIN
    {
        log::error!("cannot signal an eventfd: {error}");
    }
}

/// What control thread and worker agree on.
#[derive(Debug, Default)]
struct ControlState {
    /// How many pauses are in force.
    pauses: u32,
    /// Whether the worker is in its loop.
    running: bool,
    /// The front end's kick, if it gave one.
    kick: Option<Arc<OwnedFd>>,
    /// The front end's call, if it gave one.
    call: Option<Arc<OwnedFd>>,
    /// Starts the worker: the eventfd that the framework takes for the kick.
    restart: Option<Arc<OwnedFd>>,
}

/// Control of one ring's worker.
#[derive(Debug)]
pub struct RingControl {
    /// What both sides agree on.
    state: Mutex<ControlState>,
    /// Told when the worker leaves its loop.
    left: Condvar,
    /// Whether a pause is in force; read by the worker without the lock.
    pause_wanted: AtomicBool,
    /// Whether the worker is to take the call anew and use it; read without the lock.
    call_wanted: AtomicBool,
    /// Wakes the worker.
    wake: Arc<OwnedFd>,
}

/// While this lives the ring is at rest.
#[derive(Debug)]
pub struct Pause<'a> {
    /// The ring's control.
    control: &'a RingControl,
}

impl Drop for Pause<'_> {
    fn drop(&mut self) {
        let mut state = self.control.lock();
        state.pauses -= 1;
        self.control.pause_wanted.store(state.pauses > 0, Ordering::SeqCst);
        if state.pauses == 0
            && let Some(restart) = &state.restart
        {
            // Seen only where the framework listens, which is when the ring is ready and enabled.
            ring_eventfd(restart);
        }
    }
}

impl RingControl {
    /// Control of a ring that has no kick yet.
    fn new() -> io::Result<Self> {
        Ok(Self {
            state: Mutex::default(),
            left: Condvar::new(),
            pause_wanted: AtomicBool::new(false),
            call_wanted: AtomicBool::new(false),
            wake: new_eventfd()?,
        })
    }

    /// The agreed state.
    fn lock(&self) -> sync::MutexGuard<'_, ControlState> {
        self.state.lock().expect("no panic while held")
    }

    /// Asks the worker to leave, without waiting for it.
    pub fn request_pause(&self) -> Pause<'_> {
        let mut state = self.lock();
        state.pauses += 1;
        self.pause_wanted.store(true, Ordering::SeqCst);
        ring_eventfd(&self.wake);
        Pause { control: self }
    }

    /// Waits until the worker has drained and left. There must be a pause in force.
    pub fn wait_until_left(&self) {
        let mut state = self.lock();
        while state.running {
            state = self.left.wait(state).expect("no panic while held");
        }
    }

    /// Brings the ring to rest.
    pub fn pause(&self) -> Pause<'_> {
        let pause = self.request_pause();
        self.wait_until_left();
        pause
    }

    /// Whether the worker should leave.
    #[must_use]
    pub fn pause_wanted(&self) -> bool {
        self.pause_wanted.load(Ordering::SeqCst)
    }

    /// What wakes the worker: rung by [`RingControl::request_pause`], and by whoever has a bell.
    #[must_use]
    pub fn wake_fd(&self) -> &Arc<OwnedFd> {
        &self.wake
    }

    /// Asks the worker to call the driver with the descriptor that it has now.
    fn request_call(&self) {
        self.call_wanted.store(true, Ordering::SeqCst);
        ring_eventfd(&self.wake);
    }

    /// The descriptor that the worker is to call from now on, and at once, if it was asked to since
    /// it was last here.
    #[must_use]
    pub fn wanted_call(&self) -> Option<Option<Arc<OwnedFd>>> {
        // A look costs nothing, and the worker looks in every turn.
        let wanted = self.call_wanted.load(Ordering::SeqCst)
            && self.call_wanted.swap(false, Ordering::SeqCst);
        wanted.then(|| self.lock().call.clone())
    }
}

/// A ring as the framework handles it.
#[derive(Clone)]
pub struct Vring {
    /// The framework's own state: addresses, size, positions.
    inner: VringMutex<SharedMemory>,
    /// The worker's control.
    control: Arc<RingControl>,
}

impl std::fmt::Debug for Vring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vring").field("control", &self.control).finish_non_exhaustive()
    }
}

/// The worker's right to run a ring. The ring is at rest again when it is dropped.
#[derive(Debug)]
pub struct RunPermit {
    /// The ring.
    vring: Vring,
    /// The front end's kick.
    pub kick: Arc<OwnedFd>,
    /// The front end's call, if it gave one. A later one is the control's to tell.
    pub call: Option<Arc<OwnedFd>>,
    /// Where the ring lies and where it stands.
    pub setup: RingSetup,
}

impl RunPermit {
    /// Gives the ring's position back.
    pub fn store_indices(&self, ring: &SplitRing) {
        let (next_avail, next_used) = ring.indices();
        let mut state = self.vring.inner.get_mut();
        let queue = state.get_queue_mut();
        queue.set_next_avail(next_avail);
        queue.set_next_used(next_used);
    }

    /// The ring's control.
    #[must_use]
    pub fn control(&self) -> &Arc<RingControl> {
        &self.vring.control
    }
}

impl Drop for RunPermit {
    fn drop(&mut self) {
        self.vring.control.lock().running = false;
        self.vring.control.left.notify_all();
    }
}

impl Vring {
    /// The worker's control.
    #[must_use]
    pub fn control(&self) -> &Arc<RingControl> {
        &self.control
    }

    /// Lets the calling thread run the ring, if it is started, enabled and not paused.
    #[must_use]
    pub fn enter(&self) -> Option<RunPermit> {
        let mut control = self.control.lock();
        let kick = control.kick.clone()?;
        let state = self.inner.get_ref();
        let queue = state.get_queue();
        if control.pauses > 0 || control.running || !queue.ready() || !state.is_enabled() {
            return None;
        }
        let setup = RingSetup {
            size: queue.size(),
            descriptors: queue.desc_table(),
            available: queue.avail_ring(),
            used: queue.used_ring(),
            event_idx: queue.event_idx_enabled(),
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
        };
        drop(state);
        control.running = true;
        let call = control.call.clone();
        drop(control);
        Some(RunPermit { vring: self.clone(), kick, call, setup })
    }

    /// Makes a change while the ring is at rest.
    fn change<R>(&self, change: impl FnOnce(&VringMutex<SharedMemory>) -> R) -> R {
        let _pause = self.control.pause();
        change(&self.inner)
    }
}

impl<'a> VringStateGuard<'a, SharedMemory> for Vring {
    type G = MutexGuard<'a, VringState<SharedMemory>>;
}

impl<'a> VringStateMutGuard<'a, SharedMemory> for Vring {
    type G = MutexGuard<'a, VringState<SharedMemory>>;
}

impl VringT<SharedMemory> for Vring {
    fn new(memory: SharedMemory, max_queue_size: u16) -> Result<Self, QueueError> {
        // The trait leaves no other error for "no file descriptors left".
        let control = RingControl::new().map_err(|_| QueueError::InvalidMaxSize)?;
        let inner = VringMutex::new(memory, max_queue_size)?;
        Ok(Self { inner, control: Arc::new(control) })
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, SharedMemory>>::G {
        self.inner.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, SharedMemory>>::G {
        self.inner.get_mut()
    }

    fn add_used(&self, head: u16, len: u32) -> Result<(), QueueError> {
        self.inner.add_used(head, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.control.request_call();
        Ok(())
    }

    fn enable_notification(&self) -> Result<bool, QueueError> {
        self.inner.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), QueueError> {
        self.inner.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, QueueError> {
        self.inner.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.change(|inner| inner.set_enabled(enabled));
    }

    fn set_queue_info(&self, table: u64, available: u64, used: u64) -> Result<(), QueueError> {
        self.change(|inner| inner.set_queue_info(table, available, used))
    }

    fn queue_next_avail(&self) -> u16 {
        self.inner.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.change(|inner| inner.set_queue_next_avail(base));
    }

    fn set_queue_next_used(&self, index: u16) {
        self.change(|inner| inner.set_queue_next_used(index));
    }

    fn queue_used_idx(&self) -> Result<u16, QueueError> {
        self.inner.queue_used_idx()
    }

    fn set_queue_size(&self, size: u16) {
        self.change(|inner| inner.set_queue_size(size));
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.change(|inner| inner.set_queue_event_idx(enabled));
    }

    fn set_queue_ready(&self, ready: bool) {
        self.change(|inner| inner.set_queue_ready(ready));
    }

    fn set_kick(&self, file: Option<File>) {
        let _pause = self.control.pause();
        let mut control = self.control.lock();
        control.kick = file.map(|file| Arc::new(OwnedFd::from(file)));
        if control.kick.is_none() {
            control.restart = None;
            self.inner.set_kick(None);
        } else if control.restart.is_none() {
            // A new kick for a ring that has one keeps the eventfd: the framework listens to it.
            match new_eventfd().and_then(|restart| Ok((restart.try_clone()?, restart))) {
                Ok((for_framework, restart)) => {
                    self.inner.set_kick(Some(File::from(for_framework)));
                    control.restart = Some(restart);
                }
                Err(error) => log::error!("cannot start a queue: {error}"),
            }
        }
    }

    fn read_kick(&self) -> io::Result<bool> {
        // This is our own eventfd, and reading it never blocks. An error here would end the
        // worker's thread for good, so there is none.
        if let Some(restart) = self.control.lock().restart.as_deref() {
            let _emptied = rustix::io::read(restart, &mut [0_u8; 8]);
        }
        Ok(self.inner.get_ref().is_enabled())
    }

    fn set_call(&self, file: Option<File>) {
        let call = file.map(|file| Arc::new(OwnedFd::from(file)));
        self.control.lock().call = call;
        // Calls that went to the old descriptor may not have been seen.
        self.control.request_call();
    }

    fn set_err(&self, file: Option<File>) {
        self.inner.set_err(file);
    }
}
