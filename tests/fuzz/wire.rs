//! vhost-user messages as bytes, and descriptors of every kind, for `messages`.
//!
//! Follows the message formats of the vhost-user text. Nothing is checked: a message may be as
//! broken as the input wants it.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, memfd_create, open};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::pipe::{PipeFlags, pipe_with};

use super::{Input, Scratch, to_u32};

/// Message numbers of the vhost-user text.
pub const GET_FEATURES: u32 = 1;
/// See [`GET_FEATURES`].
pub const SET_FEATURES: u32 = 2;
/// See [`GET_FEATURES`].
pub const SET_OWNER: u32 = 3;
/// See [`GET_FEATURES`].
pub const SET_MEM_TABLE: u32 = 5;
/// See [`GET_FEATURES`].
pub const SET_VRING_NUM: u32 = 8;
/// See [`GET_FEATURES`].
pub const SET_VRING_ADDR: u32 = 9;
/// See [`GET_FEATURES`].
pub const SET_VRING_BASE: u32 = 10;
/// See [`GET_FEATURES`].
pub const GET_VRING_BASE: u32 = 11;
/// See [`GET_FEATURES`].
pub const SET_VRING_KICK: u32 = 12;
/// See [`GET_FEATURES`].
pub const SET_VRING_CALL: u32 = 13;
/// See [`GET_FEATURES`].
pub const SET_VRING_ERR: u32 = 14;
/// See [`GET_FEATURES`].
pub const GET_PROTOCOL_FEATURES: u32 = 15;
/// See [`GET_FEATURES`].
pub const SET_PROTOCOL_FEATURES: u32 = 16;
/// See [`GET_FEATURES`].
pub const SET_VRING_ENABLE: u32 = 18;
/// See [`GET_FEATURES`].
pub const SET_BACKEND_REQ_FD: u32 = 21;
/// See [`GET_FEATURES`].
pub const GET_CONFIG: u32 = 24;
/// See [`GET_FEATURES`].
pub const SET_CONFIG: u32 = 25;
/// See [`GET_FEATURES`].
pub const GET_INFLIGHT_FD: u32 = 31;
/// See [`GET_FEATURES`].
pub const SET_INFLIGHT_FD: u32 = 32;
/// See [`GET_FEATURES`].
pub const RESET_DEVICE: u32 = 34;
/// See [`GET_FEATURES`].
pub const ADD_MEM_REG: u32 = 37;
/// See [`GET_FEATURES`].
pub const REM_MEM_REG: u32 = 38;

/// A message.
#[derive(Debug)]
pub struct Message {
    /// Header and payload.
    pub bytes: Vec<u8>,
    /// Its descriptors.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// A message with a sound header.
    pub fn new(request: u32, payload: &[u8], fds: Vec<OwnedFd>) -> Self {
        let header = [request, 1 | 8, to_u32(payload.len())].map(u32::to_le_bytes);
        Self { bytes: [header.as_flattened(), payload].concat(), fds }
    }

    /// Sends it. Returns whether the peer is there.
    pub fn send(&self, to: &UnixStream) -> bool {
        let borrowed: Vec<BorrowedFd<'_>> = self.fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !borrowed.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&borrowed));
        }
        let mut done = 0;
        while done < self.bytes.len() {
            let parts = [IoSlice::new(&self.bytes[done..])];
            match sendmsg(to, &parts, &mut control, SendFlags::NOSIGNAL) {
                Ok(sent) => done += sent,
                Err(_) => return false,
            }
            control.clear();
        }
        true
    }
}

/// Takes what has come so far, or with `wait` what comes next. Returns the descriptors that came
/// with it, and whether the peer is there.
pub fn receive(from: &UnixStream, wait: bool) -> (Vec<OwnedFd>, bool) {
    let mut fds = Vec::new();
    let mut flags = RecvFlags::CMSG_CLOEXEC;
    flags.set(RecvFlags::DONTWAIT, !wait);
    let mut bytes = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(from, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags);
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    let gone = match got {
        Ok(message) => message.bytes == 0,
        Err(error) => error != rustix::io::Errno::AGAIN,
    };
    (fds, !gone)
}

/// A new eventfd.
pub fn new_eventfd() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")
}

/// A new file in memory.
pub fn new_memfd(len: u64) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("fuzz", flags).expect("a file in memory"));
    file.set_len(len).expect("a length");
    file
}

/// A descriptor of any kind; `known` are those that the front end has.
pub fn any_fd(input: &mut Input<'_>, scratch: &Scratch, known: &[BorrowedFd<'_>]) -> OwnedFd {
    let kind = usize::from(input.u8() % 24);
    if let Some(fd) = known.get(kind) {
        return fd.try_clone_to_owned().expect("a descriptor");
    }
    let path = |name, flags| open(scratch.path(name), flags | OFlags::CLOEXEC, Mode::empty());
    let pipe = || pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
    match kind {
        8 => new_memfd(100).into(),
        9 => {
            let file = new_memfd(4096);
            let seals = SealFlags::from_bits_retain(u32::from(input.u8() & 31));
            fcntl_add_seals(&file, seals).expect("seals");
            file.into()
        }
        10 => pipe().0,
        11 => pipe().1,
        12 => path("folder", OFlags::RDONLY).expect("a folder"),
        13 => path("base.img", OFlags::PATH).expect("a file"),
        14 => path("base.img", OFlags::RDONLY).expect("a file"),
        15 => path("fifo", OFlags::RDWR).expect("a FIFO"),
        16 => {
            let kind = SocketType::STREAM;
            let pair = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None);
            pair.expect("sockets").0
        }
        17 => {
            let kind = SocketType::DGRAM;
            let pair = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None);
            pair.expect("sockets").0
        }
        18 => open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).expect("null"),
        19 => open("/dev/zero", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).expect("zero"),
        20 => rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC)
            .expect("an epoll"),
        21 => eventfd(u32::MAX, EventfdFlags::CLOEXEC).expect("an eventfd that blocks"),
        _ => new_eventfd(),
    }
}
