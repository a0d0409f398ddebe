//! Between the real socket and the framework's: passes whole messages both ways.
//!
//! The framework only accepts connections of its own, so a socket that is connected already
//! (`--fd`) could not be served without this; and here is the place for messages that the framework
//! does not know. File descriptors travel with the message that they came with: messages are read
//! one by one, because the kernel would glue bytes of the next message to them otherwise.
//!
//! Messages are not understood here, with one exception: a queue size that is not a power of two
//! ends the connection, where the framework would go on with another size than the driver's.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Bytes of a message header: request, flags, size of the payload (vhost-user, "Header").
const HEADER_LEN: usize = 12;

/// The largest payload: what the framework accepts (4096 with the header). The largest real one is
/// a memory table or a device configuration.
const MAX_PAYLOAD: usize = 4096;

/// The most file descriptors of one message: what the framework accepts.
const MAX_FDS: usize = 32;

/// `VHOST_USER_SET_VRING_NUM`: payload queue index and size, 32 bits each.
const SET_VRING_NUM: u32 = 8;

/// Header flag of an answer, which repeats the request's number.
const FLAG_REPLY: u32 = 4;

/// Why passing messages ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The front end closed its side, or broke the protocol.
    FrontEnd,
    /// The framework closed its side: it did not accept a message.
    Framework,
    /// We were told to stop.
    Stopped,
}

/// Passes messages between `front` and `framework` until one of them hangs up or `stop` becomes
/// readable.
///
/// # Errors
/// If waiting or passing on fails; the connection is of no use then.
pub fn pass(front: &UnixStream, framework: &UnixStream, stop: BorrowedFd<'_>) -> io::Result<End> {
    loop {
        let mut fds = [
            PollFd::new(front, PollFlags::IN),
            PollFd::new(framework, PollFlags::IN),
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        let [front_ready, framework_ready, stopped] = fds.map(|fd| !fd.revents().is_empty());
        if stopped {
            return Ok(End::Stopped);
        }
        // Answers first: the framework's last words must reach the front end.
        if framework_ready && !pass_message(framework, front)? {
            return Ok(End::Framework);
        }
        if front_ready && !pass_message(front, framework)? {
            return Ok(End::FrontEnd);
        }
    }
}

/// Passes one message. Returns whether there was a whole one that may pass.
fn pass_message(from: &UnixStream, to: &UnixStream) -> io::Result<bool> {
    let mut message = vec![0; HEADER_LEN];
    let mut fds = Vec::new();
    if !receive(from, &mut message, &mut fds)? {
        return Ok(false);
    }
    let size = word(&message, 8).and_then(|size| usize::try_from(size).ok()).unwrap_or(usize::MAX);
    if size > MAX_PAYLOAD {
        return Ok(false);
    }
    message.resize(HEADER_LEN + size, 0);
    if !receive(from, &mut message[HEADER_LEN..], &mut fds)? {
        return Ok(false);
    }
    if word(&message, 0) == Some(SET_VRING_NUM)
        && word(&message, 4).is_some_and(|flags| flags & FLAG_REPLY == 0)
        && let Some(queue_size) = word(&message, HEADER_LEN + 4)
        && !queue_size.is_power_of_two()
    {
        log::error!("front end: queue size {queue_size} is not a power of two");
        return Ok(false);
    }
    match send(to, &message, &fds) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        result => result.map(|()| true),
    }
}

/// The 32-bit word at byte `offset` of a message. vhost-user is in the machine's own byte order,
/// and every machine that we run on is little-endian, as is the framework.
fn word(message: &[u8], offset: usize) -> Option<u32> {
    let bytes = message.get(offset..)?.first_chunk::<4>()?;
    Some(u32::from_le_bytes(*bytes))
}

/// Receives exactly `bytes.len()` bytes and the descriptors that come with them. Returns false if
/// the peer hung up before.
fn receive(from: &UnixStream, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<bool> {
    let mut done = 0;
    while done < bytes.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes[done..])];
        let got = match recvmsg(from, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(rustix::io::Errno::CONNRESET) => return Ok(false),
            other => other?,
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        // Descriptors that did not fit are closed by the kernel; a message without all of its
        // descriptors is not the one that was sent.
        if got.bytes == 0 || got.flags.contains(ReturnFlags::CTRUNC) || fds.len() > MAX_FDS {
            return Ok(false);
        }
        done += got.bytes;
    }
    Ok(true)
}

/// Sends a message with its descriptors.
fn send(to: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
    let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let mut done = 0;
    while done < bytes.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        // The descriptors go with the first byte, as they came.
        if done == 0 && !borrowed.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&borrowed));
        }
        let parts = [IoSlice::new(&bytes[done..])];
        done += match sendmsg(to, &parts, &mut control, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => 0,
            other => other?,
        };
    }
    Ok(())
}
