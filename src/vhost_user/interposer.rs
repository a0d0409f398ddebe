//! Between the real socket and the framework's: passes whole messages both ways.
//!
//! The framework only accepts connections of its own, so a socket that is connected already
//! (`--fd`) could not be served without this; and here is the place for messages that the framework
//! does not know. File descriptors travel with the message that they came with: messages are read
//! one by one, because the kernel would glue bytes of the next message to them otherwise.
//!
//! Most messages are not understood here. GET_INFLIGHT_FD and SET_INFLIGHT_FD are answered and not
//! passed on: the framework ends the connection over them. The device hears of rings that start and
//! stop (SET_VRING_KICK, GET_VRING_BASE) before the other side does. A queue size that is not a
//! power of two ends the connection, where the framework would go on with another size than the
//! driver's.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::recovery::{QueueShape, RecoveryError, Region};

/// Bytes of a message header: request, flags, size of the payload (vhost-user, "Header").
const HEADER_LEN: usize = 12;

/// The largest payload: what the framework accepts (4096 with the header). The largest real one is
/// a memory table or a device configuration.
const MAX_PAYLOAD: usize = 4096;

/// The most file descriptors of one message: what the framework accepts.
const MAX_FDS: usize = 32;

/// `VHOST_USER_GET_FEATURES`: without payload.
const GET_FEATURES: u32 = 1;

/// `VHOST_USER_SET_VRING_NUM`: payload queue index and size, 32 bits each.
const SET_VRING_NUM: u32 = 8;

/// `VHOST_USER_GET_VRING_BASE`: a ring is to stop.
const GET_VRING_BASE: u32 = 11;

/// `VHOST_USER_SET_VRING_KICK`: a ring is about to start.
const SET_VRING_KICK: u32 = 12;

/// `VHOST_USER_GET_INFLIGHT_FD`: payload as of [`SET_INFLIGHT_FD`], the sizes being ignored.
const GET_INFLIGHT_FD: u32 = 31;

/// `VHOST_USER_SET_INFLIGHT_FD`: payload size and offset of the region in its file, 64 bits each;
/// number and size of the queues, 16 bits each. With the region's file.
const SET_INFLIGHT_FD: u32 = 32;

/// Bytes of that payload. Front ends that send a C structure add four bytes of padding, and expect
/// as many back.
const INFLIGHT_LEN: std::ops::RangeInclusive<usize> = 20..=24;

/// Header flag: the version of the protocol, which is 1.
const FLAG_VERSION: u32 = 1;

/// Header flag of a message that wants to hear whether it succeeded (REPLY_ACK).
const FLAG_NEED_REPLY: u32 = 8;

/// Header flag of an answer, which repeats the request's number.
const FLAG_REPLY: u32 = 4;

/// Why passing messages ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The front end closed its side, or broke the protocol.
    FrontEnd,
    /// The framework closed its side: it did not accept a message.
    Framework,
    /// A queue cannot run by the front end's fault: memory or recovery state is not as it must be.
    Queue,
    /// We were told to stop.
    Stopped,
}

/// What the device does with messages about inflight regions.
pub trait InflightMessages {
    /// GET_INFLIGHT_FD: a new region for these queues.
    ///
    /// # Errors
    /// Why there is none; the connection ends then.
    fn get(&self, shape: QueueShape) -> Result<Region, RecoveryError>;

    /// SET_INFLIGHT_FD: the region in `file`, of `len` bytes.
    ///
    /// # Errors
    /// Why it cannot be used; the connection ends then.
    fn set(&self, file: File, len: u64, shape: QueueShape) -> Result<(), RecoveryError>;

    /// SET_VRING_KICK: a ring starts, with a region or without.
    ///
    /// # Errors
    /// Why it may not; the connection ends then.
    fn ring_starts(&self) -> Result<(), RecoveryError>;

    /// GET_VRING_BASE was obeyed: a ring is at rest, and the front end about to hear of it.
    fn ring_stopped(&self);
}

/// Passes messages between `front` and `framework` until one of them hangs up, or `stop` or
/// `queue_failed` becomes readable, also in the middle of a message: a front end that sends half of
/// one, or does not take its answers, must not keep us from ending.
///
/// # Errors
/// If waiting or passing on fails; the connection is of no use then.
pub fn pass(
    front: &UnixStream,
    framework: &UnixStream,
    stop: BorrowedFd<'_>,
    queue_failed: BorrowedFd<'_>,
    device: &impl InflightMessages,
) -> io::Result<End> {
    let ends = &[stop, queue_failed];
    loop {
        let mut fds = [
            PollFd::new(front, PollFlags::IN),
            PollFd::new(framework, PollFlags::IN),
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
            PollFd::from_borrowed_fd(queue_failed, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        let [front_ready, framework_ready, stopped, queue_failed] =
            fds.map(|fd| !fd.revents().is_empty());
        if stopped {
            return Ok(End::Stopped);
        }
        if queue_failed {
            return Ok(End::Queue);
        }
        // Answers first: the framework's last words must reach the front end.
        if framework_ready && !pass_answer(front, framework, ends, device)? {
            return Ok(End::Framework);
        }
        if front_ready {
            let Some(message) = receive_message(front, ends)? else { return Ok(End::FrontEnd) };
            if !from_front(message, front, framework, ends, device)? {
                return Ok(End::FrontEnd);
            }
        }
    }
}

/// Passes a message of the framework's on. Returns whether both sides are there.
fn pass_answer(
    front: &UnixStream,
    framework: &UnixStream,
    ends: &[BorrowedFd<'_>],
    device: &impl InflightMessages,
) -> io::Result<bool> {
    let Some(answer) = receive_message(framework, ends)? else { return Ok(false) };
    if answer.request() == GET_VRING_BASE {
        device.ring_stopped();
    }
    answer.send(front, ends)
}

/// Passes a message of the front end's on. Returns whether both sides are there.
///
/// While the framework takes nothing, its answers are passed on: it may be waiting for that itself,
/// and a front end that sends ahead would never get them. And a front end that has gone is noticed.
fn pass_request(
    message: &Message,
    front: &UnixStream,
    framework: &UnixStream,
    ends: &[BorrowedFd<'_>],
    device: &impl InflightMessages,
) -> io::Result<bool> {
    let wait = || {
        let mut fds = vec![
            PollFd::new(framework, PollFlags::OUT | PollFlags::IN),
            // A hang-up is always reported.
            PollFd::new(front, PollFlags::empty()),
        ];
        fds.extend(ends.iter().map(|end| PollFd::from_borrowed_fd(*end, PollFlags::IN)));
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => return Ok(true),
            other => other?,
        };
        if fds[1..].iter().any(|fd| !fd.revents().is_empty()) {
            return Ok(false);
        }
        let has_answer = fds[0].revents().contains(PollFlags::IN);
        if has_answer { pass_answer(front, framework, ends, device) } else { Ok(true) }
    };
    message.send_waiting(framework, wait)
}

/// Asks the framework for its features, which changes nothing, and waits for the answer: its thread
/// has called the device then.
///
/// # Errors
/// If it does not answer.
pub fn greet(framework: &UnixStream) -> io::Result<()> {
    let header = [GET_FEATURES, FLAG_VERSION, 0].map(u32::to_le_bytes);
    send(framework, header.as_flattened(), &[], || wait(framework, PollFlags::OUT, &[]))?;
    match receive_message(framework, &[])? {
        Some(answer) if answer.request() == GET_FEATURES && answer.has_flag(FLAG_REPLY) => Ok(()),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// A whole message.
struct Message {
    /// Header and payload.
    bytes: Vec<u8>,
    /// The descriptors that came with it.
    fds: Vec<OwnedFd>,
}

impl Message {
    /// The answer to a message, with the same number and this payload.
    fn answer_to(request: u32, payload: &[u8], fds: Vec<OwnedFd>) -> Self {
        let len = u32::try_from(payload.len()).unwrap_or_default();
        let header = [request, FLAG_VERSION | FLAG_REPLY, len].map(u32::to_le_bytes);
        Self { bytes: [header.as_flattened(), payload].concat(), fds }
    }

    /// Which message it is.
    fn request(&self) -> u32 {
        word(&self.bytes, 0).unwrap_or_default()
    }

    /// Whether a flag is set in its header.
    fn has_flag(&self, flag: u32) -> bool {
        word(&self.bytes, 4).is_some_and(|flags| flags & flag != 0)
    }

    /// What follows the header.
    fn payload(&self) -> &[u8] {
        self.bytes.get(HEADER_LEN..).unwrap_or_default()
    }

    /// Sends it. Returns whether the peer is there; it may be one of `ends` that says no.
    fn send(&self, to: &UnixStream, ends: &[BorrowedFd<'_>]) -> io::Result<bool> {
        self.send_waiting(to, || wait(to, PollFlags::OUT, ends))
    }

    /// The same; `wait` waits while the peer takes no more, and says whether to go on.
    fn send_waiting(
        &self,
        to: &UnixStream,
        wait: impl FnMut() -> io::Result<bool>,
    ) -> io::Result<bool> {
        match send(to, &self.bytes, &self.fds, wait) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
            result => result.map(|()| true),
        }
    }
}

/// Receives one message. `None` if the peer hung up, or sent none that may be, or one of `ends` is
/// readable before it is complete.
fn receive_message(from: &UnixStream, ends: &[BorrowedFd<'_>]) -> io::Result<Option<Message>> {
    let mut message = Message { bytes: vec![0; HEADER_LEN], fds: Vec::new() };
    if !receive(from, &mut message.bytes, &mut message.fds, ends)? {
        return Ok(None);
    }
    let size = word(&message.bytes, 8).and_then(|size| usize::try_from(size).ok());
    let size = size.unwrap_or(usize::MAX);
    if size > MAX_PAYLOAD {
        return Ok(None);
    }
    message.bytes.resize(HEADER_LEN + size, 0);
    let whole = receive(from, &mut message.bytes[HEADER_LEN..], &mut message.fds, ends)?;
    Ok(whole.then_some(message))
}

/// Answers a message of the front end, or passes it on. Returns whether the connection goes on.
fn from_front(
    message: Message,
    front: &UnixStream,
    framework: &UnixStream,
    ends: &[BorrowedFd<'_>],
    device: &impl InflightMessages,
) -> io::Result<bool> {
    let request = message.request();
    if message.has_flag(FLAG_REPLY) {
        return pass_request(&message, front, framework, ends, device);
    }
    if matches!(request, GET_INFLIGHT_FD | SET_INFLIGHT_FD) {
        return match answer_inflight(message, device) {
            Ok(None) => Ok(true),
            Ok(Some(answer)) => answer.send(front, ends),
            Err(error) => {
                log::error!("front end: {error}");
                Ok(false)
            }
        };
    }
    if request == SET_VRING_NUM
        && let Some(queue_size) = word(message.payload(), 4)
        && !queue_size.is_power_of_two()
    {
        log::error!("front end: queue size {queue_size} is not a power of two");
        return Ok(false);
    }
    if request == SET_VRING_KICK
        && let Err(error) = device.ring_starts()
    {
        log::error!("a queue cannot start: {error}");
        return Ok(false);
    }
    pass_request(&message, front, framework, ends, device)
}

/// Answers a message about an inflight region.
fn answer_inflight(
    message: Message,
    device: &impl InflightMessages,
) -> Result<Option<Message>, RecoveryError> {
    let bad = RecoveryError::Refused("the message about it is malformed");
    let payload = message.payload();
    let number = |offset: usize| {
        let bytes = payload.get(offset..).and_then(|rest| rest.first_chunk());
        bytes.map(|bytes| u64::from_le_bytes(*bytes))
    };
    let (Some(len), Some(offset), Some(shape), true) =
        (number(0), number(8), word(payload, 16), INFLIGHT_LEN.contains(&payload.len()))
    else {
        return Err(bad);
    };
    let [a, b, c, d] = shape.to_le_bytes();
    let shape = QueueShape { queues: u16::from_le_bytes([a, b]), size: u16::from_le_bytes([c, d]) };
    if message.request() == GET_INFLIGHT_FD {
        let region = device.get(shape)?;
        let mut answer = payload.to_vec();
        answer[..8].copy_from_slice(&region.bytes().to_le_bytes());
        answer[8..16].fill(0);
        let fd = region.file().try_clone().map_err(RecoveryError::Memory)?;
        return Ok(Some(Message::answer_to(GET_INFLIGHT_FD, &answer, vec![fd.into()])));
    }
    let wants_reply = message.has_flag(FLAG_NEED_REPLY);
    let mut fds = message.fds.into_iter();
    let (Some(fd), None, 0) = (fds.next(), fds.next(), offset) else { return Err(bad) };
    device.set(fd.into(), len, shape)?;
    let done = || Message::answer_to(SET_INFLIGHT_FD, &0_u64.to_le_bytes(), Vec::new());
    Ok(wants_reply.then(done))
}

/// The 32-bit word at byte `offset` of a message. vhost-user is in the machine's own byte order,
/// and every machine that we run on is little-endian, as is the framework.
fn word(message: &[u8], offset: usize) -> Option<u32> {
    let bytes = message.get(offset..)?.first_chunk::<4>()?;
    Some(u32::from_le_bytes(*bytes))
}

/// Waits until `socket` is ready as `wanted`. Returns false if one of `ends` is readable.
fn wait(socket: &UnixStream, wanted: PollFlags, ends: &[BorrowedFd<'_>]) -> io::Result<bool> {
    let mut fds = vec![PollFd::new(socket, wanted)];
    fds.extend(ends.iter().map(|end| PollFd::from_borrowed_fd(*end, PollFlags::IN)));
    loop {
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        return Ok(fds[1..].iter().all(|end| end.revents().is_empty()));
    }
}

/// Receives exactly `bytes.len()` bytes and the descriptors that come with them. Returns false if
/// the peer hung up before, or one of `ends` is readable.
fn receive(
    from: &UnixStream,
    bytes: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    ends: &[BorrowedFd<'_>],
) -> io::Result<bool> {
    let mut done = 0;
    while done < bytes.len() {
        if !wait(from, PollFlags::IN, ends)? {
            return Ok(false);
        }
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

/// Sends a message with its descriptors. `BrokenPipe` if the peer hung up, or if it does not take
/// the message and `wait` says that this is not worth waiting for.
fn send(
    to: &UnixStream,
    bytes: &[u8],
    fds: &[OwnedFd],
    mut wait: impl FnMut() -> io::Result<bool>,
) -> io::Result<()> {
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
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        done += match sendmsg(to, &parts, &mut control, flags) {
            Err(rustix::io::Errno::INTR) => 0,
            Err(rustix::io::Errno::AGAIN) => {
                if !wait()? {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                0
            }
            other => other?,
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::thread;
    use std::time::Duration;

    use rustix::event::Timespec;

    use crate::vhost_user::vring::new_eventfd;

    /// A device without inflight regions.
    struct Device;

    impl InflightMessages for Device {
        fn get(&self, _: QueueShape) -> Result<Region, RecoveryError> {
            Err(RecoveryError::Refused("there is none"))
        }

        fn set(&self, _: File, _: u64, _: QueueShape) -> Result<(), RecoveryError> {
            Err(RecoveryError::Refused("there is none"))
        }

        fn ring_starts(&self) -> Result<(), RecoveryError> {
            Ok(())
        }

        fn ring_stopped(&self) {}
    }

    /// More messages than a socket holds.
    const MESSAGES: usize = 600;

    /// The longest that a side waits for the other.
    const LIMIT: Option<Duration> = Some(Duration::from_secs(20));

    /// A front end that has sent [`MESSAGES`] by the time that the framework begins to take them:
    /// `reads` of them have an answer of the largest size. Returns how passing ended.
    fn flood(reads: usize) -> End {
        let (front, ours) = UnixStream::pair().unwrap();
        let (framework, theirs) = UnixStream::pair().unwrap();
        let never = new_eventfd().unwrap();
        for stream in [&front, &theirs] {
            stream.set_read_timeout(LIMIT).unwrap();
            stream.set_write_timeout(LIMIT).unwrap();
        }
        let request = Message::answer_to(GET_FEATURES, &[], Vec::new()).bytes;
        let request = [&request[..4], &[1, 0, 0, 0], &request[8..]].concat();
        let answer = Message::answer_to(GET_FEATURES, &[7; MAX_PAYLOAD], Vec::new()).bytes;
        thread::scope(|scope| {
            let never = never.as_fd();
            let passing =
                scope.spawn(move || pass(&ours, &framework, never, never, &Device).unwrap());
            let mut sender = front.try_clone().unwrap();
            let sent = scope.spawn(move || {
                // It ends early if nobody takes them.
                (0..MESSAGES).take_while(|_| sender.write_all(&request).is_ok()).count()
            });
            // By then all sockets on the way are full.
            thread::sleep(Duration::from_millis(300));
            let working = scope.spawn(move || {
                let mut theirs = theirs;
                for _ in 0..reads {
                    theirs.read_exact(&mut [0; HEADER_LEN]).unwrap();
                    theirs.write_all(&answer).unwrap();
                }
                // It works on something until everybody else has gone.
                let mut fds = [PollFd::new(&theirs, PollFlags::empty())];
                let limit = Timespec { tv_sec: 20, tv_nsec: 0 };
                reads == MESSAGES || poll(&mut fds, Some(&limit)).unwrap() > 0
            });
            let mut front = front;
            for _ in 0..reads {
                front.read_exact(&mut [0; HEADER_LEN + MAX_PAYLOAD]).expect("an answer");
            }
            front.shutdown(std::net::Shutdown::Both).unwrap();
            sent.join().unwrap();
            assert!(working.join().unwrap(), "nobody has noticed that the front end is gone");
            passing.join().unwrap()
        })
    }

    #[test]
    fn a_front_end_that_sends_ahead_gets_every_answer() {
        flood(MESSAGES);
    }

    #[test]
    fn a_front_end_that_goes_while_the_framework_is_busy_is_noticed() {
        assert_eq!(flood(0), End::FrontEnd);
    }
}
