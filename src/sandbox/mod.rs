//! The sandbox: what the daemon gives up once everything that it needs is open (promise P6).
//!
//! ```text
//!   start        fork the broker, while there is nothing to inherit
//!   (the disk is opened, the socket bound)
//!   confine      main thread: no capabilities, no new privileges, no paths (Landlock); all threads
//!                from here on inherit that. Starts the spawners
//!   enter        each thread, first of all: the system calls of its own profile; the main thread
//!                once it has started what it starts itself
//!   on_spawner   what starts threads afterwards
//! ```
//!
//! A thread is born with the system calls of the one that starts it. So whoever starts threads may
//! do all that these may, besides what starting one takes. The threads that work on bytes from
//! outside start none: they ask a spawner, a thread that does nothing else and sees no such byte.
//!
//! On a kernel that lacks a piece the rest is done, and the caller hears what is missing. The
//! rings of io_uring, which pass by any filter of system calls, are restricted where they are made
//! (`storage::uring`).
//!
//! Not here: when which thread enters what (`cli::daemon`, `vhost_user`).

pub mod broker;
pub mod filter;
mod fork;
pub mod profile;
pub mod rights;

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use broker::{Broker, SocketIdentity};
use filter::Filters;
use profile::Profile;
use rights::Landlock;

use crate::helper::Helper;

/// A piece of the sandbox that the host does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    /// No Landlock.
    #[error("this kernel has no Landlock: paths are not confined")]
    Landlock,
    /// An old Landlock.
    #[error("this kernel's Landlock is old: TCP, abstract sockets or signals are not confined")]
    NewLandlock,
    /// No seccomp.
    #[error("this kernel has no seccomp filters: system calls are not confined")]
    Seccomp,
}

/// The sandbox of this process.
#[derive(Debug, Clone)]
pub struct Sandbox {
    /// What threads share.
    shared: Arc<Shared>,
}

/// What the threads of a sandbox share.
#[derive(Debug)]
struct Shared {
    /// Whether rights are given up at all.
    confined: bool,
    /// Makes sockets for us; without it we do that ourselves.
    broker: Option<Broker>,
    /// Filters and spawners, once it has been seen that the host knows filters.
    confinement: OnceLock<Confinement>,
}

/// What confined threads need.
#[derive(Debug)]
struct Confinement {
    /// The filters by profile, in the order of [`Profile::ALL`].
    filters: Arc<[Filters]>,
    /// Who starts threads, by what these are.
    spawners: Vec<(Profile, Helper)>,
}

impl Confinement {
    /// Makes all filters, and starts the spawners, each of which enters its profile.
    fn new() -> io::Result<Self> {
        let filters: Arc<[Filters]> =
            Profile::ALL.map(Filters::new).into_iter().collect::<io::Result<_>>()?;
        let mut spawners = Vec::new();
        for profile in Profile::ALL {
            if let Some(child) = profile.child() {
                let spawner = Helper::start(profile.name())?;
                let filters = Arc::clone(&filters);
                spawner.run_blocking(move || install(&filters, profile))??;
                spawners.push((child, spawner));
            }
        }
        Ok(Self { filters, spawners })
    }
}

/// Installs the filters of a profile, one of `filters`.
fn install(filters: &[Filters], profile: Profile) -> io::Result<()> {
    let index = Profile::ALL.iter().position(|other| *other == profile);
    let filter = index.and_then(|index| filters.get(index));
    filter.map_or_else(|| Err(io::ErrorKind::NotFound.into()), Filters::install)
}

impl Sandbox {
    /// No sandbox: nothing is given up, and the process makes its sockets itself. For tests.
    #[must_use]
    pub fn none() -> Self {
        Self::new(false, None)
    }

    /// Starts the broker, for the daemon with its socket at `socket`. `confined`: whether rights
    /// will be given up. To be called while there is one thread and no open file.
    ///
    /// # Errors
    /// That the host has no process for it.
    pub fn start(socket: Option<&Path>, confined: bool) -> io::Result<Self> {
        if confined {
            fork::keep_to_one_arena();
        }
        Ok(Self::new(confined, Some(Broker::start(socket, confined)?)))
    }

    /// A sandbox with that broker.
    fn new(confined: bool, broker: Option<Broker>) -> Self {
        Self { shared: Arc::new(Shared { confined, broker, confinement: OnceLock::new() }) }
    }

    /// Whether rights are given up.
    #[must_use]
    pub fn is_confined(&self) -> bool {
        self.shared.confined
    }

    /// Gives up what neither the main thread nor any thread that is started from here on needs, and
    /// starts the spawners. The main thread's system calls remain until it enters its profile.
    /// Returns what the host could not take. Without confinement it does nothing.
    ///
    /// # Errors
    /// If the broker or the host failed: the process must not serve anybody.
    pub fn confine(&self) -> io::Result<Vec<Missing>> {
        let mut missing = Vec::new();
        if let Some(broker) = &self.shared.broker {
            broker.wait_until_ready()?;
        }
        if !self.shared.confined {
            return Ok(missing);
        }
        // Remembered: later some kernels could only be asked through a file.
        let _ = rustix::param::page_size();
        rights::drop_privileges()?;
        match rights::give_up_paths(None)? {
            Landlock::Complete => {}
            Landlock::Partial => missing.push(Missing::NewLandlock),
            Landlock::Missing => missing.push(Missing::Landlock),
        }
        match Confinement::new() {
            Ok(confinement) => drop(self.shared.confinement.set(confinement)),
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                missing.push(Missing::Seccomp);
            }
            Err(error) => return Err(error),
        }
        Ok(missing)
    }

    /// Gives up what the calling thread does not need. Does nothing where the host has no filters.
    ///
    /// # Errors
    /// What the host said: the thread must not go on.
    pub fn enter(&self, profile: Profile) -> io::Result<()> {
        let confinement = self.shared.confinement.get();
        confinement.map_or(Ok(()), |confinement| install(&confinement.filters, profile))
    }

    /// The same for a thread that was started before [`Sandbox::confine`].
    ///
    /// # Errors
    /// What the host said: the thread must not go on.
    pub fn enter_late(&self, profile: Profile) -> io::Result<()> {
        if self.shared.confined {
            rights::drop_privileges()?;
            rights::give_up_paths(None)?;
        }
        self.enter(profile)
    }

    /// Does `work`, which starts threads that will enter the profile `child`, and waits for it: on
    /// their spawner, or here if there is none.
    ///
    /// # Errors
    /// That `work` has panicked on the spawner.
    pub fn on_spawner<T: Send + 'static>(
        &self,
        child: Profile,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let spawners = self.shared.confinement.get().map(|confinement| &confinement.spawners);
        let spawner =
            spawners.and_then(|spawners| spawners.iter().find(|(theirs, _)| *theirs == child));
        match spawner {
            Some((_, spawner)) => spawner.run_blocking(work),
            None => Ok(work()),
        }
    }

    /// A new listener of our own, and a connection to it that waits to be accepted.
    ///
    /// # Errors
    /// What the host said; `BrokenPipe` if the broker is gone, and with it all further pairs.
    pub fn pair(&self) -> io::Result<(UnixListener, UnixStream)> {
        match &self.shared.broker {
            Some(broker) => broker.pair(),
            None => broker::private_pair(broker::random_token()?),
        }
    }

    /// Removes the socket's path, if it is still that socket.
    ///
    /// # Errors
    /// What the host said.
    pub fn remove_socket(&self, socket: SocketIdentity) -> io::Result<()> {
        let broker = self.shared.broker.as_ref();
        broker.map_or_else(|| Err(io::ErrorKind::NotFound.into()), |b| b.remove_socket(socket))
    }
}
