//! A second process, which does the few things that the first one has given up.
//!
//! The framework takes a connection only from a listener, so each front end needs a private pair of
//! sockets, made with socket, bind and connect; and the socket's path is removed at the end. Rather
//! than allow all that to the process that works for a hostile guest, a child does it. It can do
//! nothing else: it has no files, no paths but the folder with the socket, and ends with us.
//!
//! Promises: made before anything is opened; holds none of our descriptors, locks or output;
//! removes a socket only if it is the one that we bound. Signals that stop us leave it alone: it
//! ends when its socket does.
//!
//! Not here: what becomes of the sockets (`vhost_user::export`).

use std::ffi::CString;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;
use std::sync::Mutex;

use nix::sys::signal::SigSet;
use rustix::fs::{AtFlags, Mode, OFlags, open, statat, unlinkat};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::process::{Pid, Signal, getpid, getppid, set_parent_process_death_signal};
use rustix::rand::{GetRandomFlags, getrandom};
use rustix::stdio::{stdin, stdout};

use super::filter::Filters;
use super::fork;
use super::profile::Profile;
use super::rights;

/// Asks for a pair of sockets.
const PAIR: u64 = 1;

/// Asks to remove the socket with this (device, inode).
const REMOVE: u64 = 2;

/// Words of a request: what, device, inode.
const REQUEST_WORDS: usize = 3;

/// Bytes of an answer: an errno, 0 for success. With [`PAIR`] two descriptors come with it.
const ANSWER_LEN: usize = 4;

/// The (device, inode) of a socket's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketIdentity {
    /// Device of the file system.
    pub device: u64,
    /// Inode on it.
    pub inode: u64,
}

/// The broker, as its parent sees it.
#[derive(Debug)]
pub struct Broker {
    /// Requests and answers. One at a time.
    channel: Mutex<OwnedFd>,
    /// The process.
    process: Pid,
}

impl Broker {
    /// Starts it. `socket`: the path that it may remove at the end. `confined`: whether it gives up
    /// its rights. To be called while there is one thread and no open file.
    ///
    /// # Errors
    /// That the host has no process or descriptor for it.
    pub fn start(socket: Option<&Path>, confined: bool) -> io::Result<Self> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let parent = getpid();
        let place = socket.and_then(place_of);
        let (folder, name) = place.unzip();
        let work = || {
            // Whatever goes wrong: the parent finds the channel closed.
            drop(Service::start(parent, name, confined).and_then(|mut service| service.run()));
        };
        let process = fork::in_child(theirs, folder, work)?;
        Ok(Self { channel: Mutex::new(ours), process })
    }

    /// Its process.
    #[must_use]
    pub fn process(&self) -> Pid {
        self.process
    }

    /// Waits until it has given up its rights.
    ///
    /// # Errors
    /// If it could not, and has ended.
    pub fn wait_until_ready(&self) -> io::Result<()> {
        self.answer(&self.lock()).map(drop)
    }

    /// A new listener, and a connection to it that waits to be accepted.
    ///
    /// # Errors
    /// What the host said; `BrokenPipe` if the process is gone.
    pub fn pair(&self) -> io::Result<(UnixListener, UnixStream)> {
        let mut fds = self.ask([PAIR, 0, 0])?.into_iter();
        match (fds.next(), fds.next()) {
            (Some(listener), Some(stream)) => Ok((listener.into(), stream.into())),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Removes the socket's path, if it is still that socket.
    ///
    /// # Errors
    /// What the host said; `BrokenPipe` if the process is gone.
    pub fn remove_socket(&self, socket: SocketIdentity) -> io::Result<()> {
        self.ask([REMOVE, socket.device, socket.inode]).map(drop)
    }

    /// The channel.
    fn lock(&self) -> std::sync::MutexGuard<'_, OwnedFd> {
        self.channel.lock().expect("no panic while held")
    }

    /// Sends a request and waits for the answer.
    fn ask(&self, request: [u64; REQUEST_WORDS]) -> io::Result<Vec<OwnedFd>> {
        let channel = self.lock();
        let request = request.map(u64::to_le_bytes);
        let parts = [IoSlice::new(request.as_flattened())];
        let mut nothing = SendAncillaryBuffer::default();
        retry(|| sendmsg(&*channel, &parts, &mut nothing, SendFlags::NOSIGNAL))?;
        self.answer(&channel)
    }

    /// Waits for an answer.
    fn answer(&self, channel: &OwnedFd) -> io::Result<Vec<OwnedFd>> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; ANSWER_LEN];
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = retry(|| recvmsg(channel, &mut parts, &mut control, flags))?;
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        match (got.bytes, i32::from_le_bytes(bytes)) {
            (ANSWER_LEN, 0) => Ok(fds),
            (ANSWER_LEN, errno) => Err(io::Error::from_raw_os_error(errno)),
            _ => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

/// The folder and the name of a socket; `None` if there is no such folder, in which no socket will
/// be made either.
fn place_of(path: &Path) -> Option<(OwnedFd, CString)> {
    let name = CString::new(path.file_name()?.as_bytes()).ok()?;
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let folder = folder.unwrap_or_else(|| Path::new("."));
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Some((open(folder, flags, Mode::empty()).ok()?, name))
}

/// A listener with a name that nobody else has, and a connection to it.
///
/// # Errors
/// What the host said.
pub fn private_pair(token: u64) -> io::Result<(UnixListener, UnixStream)> {
    // No allocation: the broker may not ask for memory.
    let mut name = *b"addcowd/----------------";
    for (place, digit) in name[8..].iter_mut().zip(0..16) {
        let nibble = (token >> (60 - 4 * digit)) & 15;
        *place = b"0123456789abcdef"[usize::try_from(nibble).unwrap_or(0)];
    }
    let address = SocketAddr::from_abstract_name(name)?;
    let listener = UnixListener::bind_addr(&address)?;
    let stream = UnixStream::connect_addr(&address)?;
    Ok((listener, stream))
}

/// A number that other processes do not have.
///
/// # Errors
/// What the host said.
pub fn random_token() -> io::Result<u64> {
    let mut bytes = [0; 8];
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(u64::from_le_bytes(bytes))
}

/// The broker's own side. Its channel is descriptor 0, the socket's folder 1.
struct Service {
    /// The name of the socket in its folder, if there is one.
    name: Option<CString>,
    /// The name of the next pair.
    token: u64,
}

impl Service {
    /// Gives up all rights but the few that are needed.
    fn start(parent: Pid, name: Option<CString>, confined: bool) -> io::Result<Self> {
        // Blocked, not ignored: also what a terminal or a supervisor sends to the whole group.
        SigSet::all().thread_block()?;
        set_parent_process_death_signal(Some(Signal::KILL))?;
        rustix::thread::set_name(c"addcowd-broker")?;
        if getppid() != Some(parent) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let service = Self { name, token: random_token()? };
        if confined {
            rights::drop_privileges()?;
            rights::give_up_paths(service.folder())?;
            match Filters::new(Profile::Broker)?.install() {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
                result => result?,
            }
        }
        Ok(service)
    }

    /// The folder of the socket.
    fn folder(&self) -> Option<BorrowedFd<'static>> {
        self.name.as_ref().map(|_| stdout())
    }

    /// Answers requests until the parent is gone.
    fn run(&mut self) -> io::Result<()> {
        answer(Ok(()), &[])?;
        loop {
            let mut request = [0; 8 * REQUEST_WORDS];
            let mut parts = [IoSliceMut::new(&mut request)];
            let mut nothing = RecvAncillaryBuffer::default();
            let got = retry(|| recvmsg(stdin(), &mut parts, &mut nothing, RecvFlags::empty()))?;
            if got.bytes != request.len() {
                return Ok(());
            }
            let (words, _) = request.as_chunks::<8>();
            match [words[0], words[1], words[2]].map(u64::from_le_bytes) {
                [PAIR, _, _] => {
                    self.token = self.token.wrapping_add(1);
                    match private_pair(self.token) {
                        Ok((listener, stream)) => {
                            answer(Ok(()), &[listener.as_fd(), stream.as_fd()])?;
                        }
                        Err(error) => answer(Err(error), &[])?,
                    }
                }
                [REMOVE, device, inode] => {
                    answer(self.remove(SocketIdentity { device, inode }), &[])?;
                }
                _ => return Ok(()),
            }
        }
    }

    /// Removes the socket, if it is that one.
    fn remove(&self, socket: SocketIdentity) -> io::Result<()> {
        let (Some(folder), Some(name)) = (self.folder(), &self.name) else {
            return Err(Errno::NOENT.into());
        };
        let stat = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if (SocketIdentity { device: stat.st_dev, inode: stat.st_ino }) != socket {
            return Err(Errno::EXIST.into());
        }
        Ok(unlinkat(folder, name, AtFlags::empty())?)
    }
}

/// Sends an answer to the parent.
fn answer(result: io::Result<()>, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let errno = result.err().map_or(0, |error| error.raw_os_error().unwrap_or(libc::EIO));
    let bytes = errno.to_le_bytes();
    let parts = [IoSlice::new(&bytes)];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    retry(|| sendmsg(stdin(), &parts, &mut control, SendFlags::NOSIGNAL))?;
    Ok(())
}

/// Calls `call` until it is not interrupted.
fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}
