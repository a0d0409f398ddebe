//! An export: one disk behind one socket, for one front end at a time, again and again.
//!
//! The listener lives as long as the export, so a front end that reconnects never finds the socket
//! missing; each connection gets a new state of the framework, whose own cannot be used twice. When
//! a connection ends, however it ends, its queues are drained before their memory goes away, and
//! the disk is flushed.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;

use super::SharedMemory;
use super::backend::{BlkBackend, CONTROL_THREAD};
use super::interposer::{self, End};
use super::queue::QueueContext;
use super::recovery::{Recovery, RecoveryError};
use super::vring::{new_eventfd, ring_eventfd};
use crate::executor::block_on;
use crate::image::ImageError;
use crate::image::open::OpenImage;
use crate::log_limit::LogLimit;
use crate::sandbox::Sandbox;
use crate::sandbox::profile::Profile;
use crate::storage::file::FileStorage;
use crate::virtio::config::DeviceConfig;
use crate::virtio::device::DeviceState;

/// How long a connection is left waiting that the host has nothing left for.
const SHORTAGE_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// The framework, for one connection.
type Framework = VhostUserDaemon<Arc<BlkBackend>>;

/// Where front ends come from.
#[derive(Debug)]
pub enum Endpoint {
    /// They connect to this listener, one after the other.
    Listening(UnixListener),
    /// One is connected already; the export ends with it.
    Connected(UnixStream),
}

/// Stops an export, from any thread.
#[derive(Debug, Clone)]
pub struct StopHandle {
    /// Readable once the export is to stop.
    event: Arc<OwnedFd>,
}

impl StopHandle {
    /// A handle that has not been used.
    ///
    /// # Errors
    /// If there is no file descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self { event: new_eventfd()? })
    }

    /// Stops the export: requests that were taken are finished, the disk is flushed.
    pub fn stop(&self) {
        ring_eventfd(&self.event);
    }
}

/// Why serving ended badly.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The socket, a thread or a descriptor could not be had.
    #[error("{action}: {source}")]
    Io {
        /// What we were doing.
        action: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// The process that makes sockets for us has ended: no front end can be served any more.
    #[error("the broker process is gone")]
    Broker,
    /// The framework could not be set up.
    #[error("cannot set up the connection: {0}")]
    Framework(String),
    /// The disk cannot be prepared for being taken over.
    #[error(transparent)]
    Recovery(RecoveryError),
    /// The last flush failed: writes since the flush before may be lost in a power cut.
    #[error("final flush: {0}")]
    Flush(#[source] ImageError),
}

/// Makes an [`ExportError::Io`] of what the host said.
fn failed<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> ExportError {
    move |source| ExportError::Io { action, source: source.into() }
}

/// A disk that is served.
#[derive(Debug)]
pub struct Export {
    /// The disk.
    image: Arc<OpenImage>,
    /// What is fixed about the device.
    config: DeviceConfig,
    /// Whether a device that was just reset caches writes until they are flushed.
    writeback: bool,
    /// How its queues run.
    tuning: Tuning,
    /// What of it outlives this process.
    recovery: Arc<Recovery>,
    /// Told when to stop.
    stop: StopHandle,
    /// What threads give up, and where their sockets come from.
    sandbox: Sandbox,
}

/// How queues run.
#[derive(Debug, Clone, Copy)]
pub struct Tuning {
    /// The longest that a queue polls before it sleeps.
    pub poll_limit: Duration,
    /// Whether guest memory is registered with each queue's io_uring: faster, but pinned.
    pub register_memory: bool,
}

impl Export {
    /// An export of `image`, which `stop` ends.
    ///
    /// # Errors
    /// If the add-cow file cannot be read, or the host does not tell its boot.
    pub fn new(
        image: OpenImage,
        config: DeviceConfig,
        writeback: bool,
        tuning: Tuning,
        stop: StopHandle,
    ) -> Result<Self, RecoveryError> {
        let image = Arc::new(image);
        let recovery = Arc::new(Recovery::new(Arc::clone(&image), config.num_queues)?);
        let sandbox = Sandbox::none();
        Ok(Self { image, config, writeback, tuning, recovery, stop, sandbox })
    }

    /// The same in a sandbox: each thread gives up what it does not need.
    #[must_use]
    pub fn in_sandbox(self, sandbox: Sandbox) -> Self {
        Self { sandbox, ..self }
    }

    /// The disk.
    #[must_use]
    pub fn image(&self) -> &OpenImage {
        &self.image
    }

    /// Serves until it is stopped, or until the only front end hangs up. Then flushes the disk.
    ///
    /// # Errors
    /// If the listener fails or the last flush does. What happens on one connection ends only that.
    pub fn serve(&self, endpoint: Endpoint) -> Result<(), ExportError> {
        let served = match endpoint {
            Endpoint::Connected(stream) => self.serve_connection(&stream).map(|_| ()),
            Endpoint::Listening(listener) => self.serve_listener(&listener),
        };
        let flushed = self.flush().map_err(ExportError::Flush);
        served.and(flushed)
    }

    /// Serves one connection after the other.
    fn serve_listener(&self, listener: &UnixListener) -> Result<(), ExportError> {
        listener.set_nonblocking(true).map_err(failed("cannot prepare the socket"))?;
        while let Some(stream) = self.accept(listener)? {
            log::info!("front end connected");
            match self.serve_connection(&stream) {
                Ok(End::Stopped) => return Ok(()),
                Ok(end) => log::info!("connection ended by {}", name_of(end)),
                Err(ExportError::Broker) => return Err(ExportError::Broker),
                Err(error) => log::error!("connection ended: {error}"),
            }
            if let Err(error) = self.flush() {
                log::error!("flush after a connection: {error}");
            }
        }
        Ok(())
    }

    /// The next connection, or `None` if the export is to stop.
    fn accept(&self, listener: &UnixListener) -> Result<Option<UnixStream>, ExportError> {
        let mut is_short = false;
        loop {
            if self.stops_before(Some(listener), None)? {
                return Ok(None);
            }
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false).map_err(failed("cannot prepare a connection"))?;
                    return Ok(Some(stream));
                }
                Err(error) if is_passing(&error) => {}
                Err(error) if is_shortage(&error) => {
                    if !is_short {
                        log::error!("cannot accept a connection yet: {error}");
                    }
                    is_short = true;
                    // The connection waits, so that waiting for one would not be a pause.
                    if self.stops_before(None, Some(&SHORTAGE_PAUSE))? {
                        return Ok(None);
                    }
                }
                Err(error) => return Err(failed("cannot accept a connection")(error)),
            }
        }
    }

    /// Waits until there is a connection, but not longer than `limit`. Returns whether the export
    /// is to stop.
    fn stops_before(
        &self,
        listener: Option<&UnixListener>,
        limit: Option<&Timespec>,
    ) -> Result<bool, ExportError> {
        let mut fds = vec![PollFd::new(&*self.stop.event, PollFlags::IN)];
        fds.extend(listener.map(|listener| PollFd::new(listener, PollFlags::IN)));
        match poll(&mut fds, limit) {
            Err(rustix::io::Errno::INTR) => return Ok(false),
            other => other.map_err(failed("cannot wait for a connection"))?,
        };
        Ok(!fds[0].revents().is_empty())
    }

    /// Serves one connection. Its queues are drained when this returns.
    fn serve_connection(&self, front: &UnixStream) -> Result<End, ExportError> {
        let image = Arc::clone(&self.image);
        let state = Arc::clone(&image.state);
        let device = Arc::new(DeviceState::new(self.config.clone(), state, self.writeback));
        let Tuning { poll_limit, register_memory } = self.tuning;
        let log_limit = LogLimit::default();
        let context = QueueContext { image, device, poll_limit, register_memory, log_limit };
        let memory = SharedMemory::new(GuestMemoryMmap::new());
        let backend = BlkBackend::new(context, Arc::clone(&self.recovery))
            .map_err(failed("cannot set up the connection"))?;
        let backend = Arc::new(backend.in_sandbox(self.sandbox.clone()));
        let theirs = Arc::clone(&backend);
        let make = || VhostUserDaemon::new(CONTROL_THREAD.into(), theirs, memory);
        let daemon = match self.on_spawner(Profile::Queue, make) {
            Ok(daemon) => daemon,
            Err(error) => {
                // It has let go of the threads that it had started already, and they run on.
                backend.abandon();
                return Err(error);
            }
        };
        let entry = new_eventfd().map_err(failed("cannot set up the connection"))?;
        let (mut daemon, ours) = self.connect_framework(daemon)?;
        if let Err(error) = self.confine_threads(&daemon, &ours, &entry) {
            drop(ours);
            log_end(daemon.wait());
            return Err(error);
        }
        let end =
            interposer::pass(front, &ours, self.stop.event.as_fd(), backend.failed(), &*backend);
        // The framework ends with its socket, but not before it has worked off what it got: then
        // nothing changes the rings any more, and they can be stopped for good.
        drop(ours);
        log_end(daemon.wait());
        backend.close();
        drop(daemon);
        end.map_err(failed("cannot pass messages on"))
    }

    /// Starts the framework on a socket of its own and returns it, with our end of the socket. If
    /// it cannot be started, it is gone with all of its threads.
    fn connect_framework(
        &self,
        mut daemon: Framework,
    ) -> Result<(Framework, UnixStream), ExportError> {
        const ACTION: &str = "cannot set up the connection";
        // The framework takes a connection only from a listener. This one lives for as long as
        // the start.
        let (listener, ours) = self.sandbox.pair().map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => ExportError::Broker,
            _ => failed(ACTION)(error),
        })?;
        let start = move || daemon.start(&mut Listener::from(listener)).map(|()| daemon);
        let mut daemon = self.on_spawner(Profile::Control, start)?;
        // If another process was quicker, its connection was accepted and ours went with the
        // listener.
        let mut fds = [PollFd::new(&ours, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let ended = poll(&mut fds, Some(&now)).map_err(failed(ACTION))?;
        if ended == 0 {
            return Ok((daemon, ours));
        }
        daemon.request_shutdown();
        log_end(daemon.wait());
        Err(ExportError::Framework("another process took the private socket".into()))
    }

    /// Lets the framework do what starts threads of that kind.
    fn on_spawner<T: Send + 'static>(
        &self,
        child: Profile,
        work: impl FnOnce() -> vhost_user_backend::Result<T> + Send + 'static,
    ) -> Result<T, ExportError> {
        match self.sandbox.on_spawner(child, work) {
            Ok(done) => done.map_err(|error| ExportError::Framework(error.to_string())),
            Err(error) => Err(ExportError::Framework(error.to_string())),
        }
    }

    /// Lets the framework's threads give up what they do not need, before the front end has sent
    /// anything: they only call us when there is something to do, so they get it. Each of them
    /// sees `entry` become readable once.
    fn confine_threads(
        &self,
        daemon: &Framework,
        ours: &UnixStream,
        entry: &OwnedFd,
    ) -> Result<(), ExportError> {
        if !self.sandbox.is_confined() {
            return Ok(());
        }
        ring_eventfd(entry);
        let once = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for thread in daemon.get_epoll_handlers() {
            let event = u64::from(self.config.num_queues) + 1;
            let registered = thread.register_listener(entry.as_raw_fd(), once, event);
            registered.map_err(failed("cannot confine a thread"))?;
        }
        interposer::greet(ours).map_err(failed("cannot confine a thread"))
    }

    /// Makes what was written durable.
    fn flush(&self) -> Result<(), ImageError> {
        block_on(self.image.handle(FileStorage::new).flush())
    }
}

/// Notes how the framework's control thread ended. A hang-up is an error to it.
fn log_end(result: vhost_user_backend::Result<()>) {
    if let Err(error) = result {
        log::debug!("control thread ended: {error}");
    }
}

/// Whether accepting failed for a reason that the next connection does not share.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
    )
}

/// Whether accepting failed because the host, or this process, has run out of something. Others may
/// give it back, and the disk need not be closed for that.
fn is_shortage(error: &io::Error) -> bool {
    use rustix::io::Errno;
    matches!(
        Errno::from_io_error(error),
        Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS)
    )
}

/// Who ended a connection, for the log.
fn name_of(end: End) -> &'static str {
    match end {
        End::FrontEnd => "the front end",
        End::Framework => "a message that was not accepted",
        End::Queue => "a queue that could not go on",
        End::Stopped => "a stop",
    }
}
