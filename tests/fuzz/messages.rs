//! vhost-user messages in any order, with descriptors of any kind, to a whole export in this
//! process: interposer, framework, queues and io_uring over a disk in memory.
//!
//! An input is a script: whole steps of a sound front end, single messages with some bytes changed,
//! raw messages, writes into guest memory and into the inflight region, a memory file that gets
//! shorter. Whatever it says, the export has to end when the front end hangs up, leave no
//! descriptor and no thread behind, and the files have to be a sound disk: unchanged if it is
//! read-only; changed only where a guest wrote if the script did nothing odd.
//!
//! Not here: the sandbox, and what requests do exactly (`requests`).

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use addcow::image::check;
use addcow::image::open::{self, OpenOptions};
use addcow::storage::host_file::CacheMode;
use addcow::storage::lock::Locking;
use addcow::vhost_user::export::{Endpoint, Export, ExportError, StopHandle, Tuning};
use addcow::virtio::config::DeviceConfig;

use super::files::{Sparse, in_folder};
use super::wire::{self, Message, any_fd, new_eventfd, new_memfd, receive};
use super::{Input, Outcome, Scratch, pattern, to_u64};

/// Queues of the device.
const QUEUES: usize = 2;
/// Bytes of the disk.
const DISK: u64 = 64 << 10;
/// The first byte of the disk that the requests in memory write to.
const WRITTEN: u64 = DISK / 2;
/// Bytes of guest memory.
const MEMORY: u64 = 256 << 10;
/// Bytes of the memory of one queue: rings, headers, data, status.
const STRIDE: u64 = 0x8000;
/// Address of guest memory in the front end, made up.
const USER: u64 = 0x7f00_0000_0000;
/// Entries of a ring.
const RING: u32 = 16;
/// How long anything may take before it counts as a hang: more than a crowded machine makes of it.
const LIMIT: Duration = Duration::from_secs(40);
/// How long an answer is waited for, which need not come.
const ANSWER: Duration = Duration::from_millis(200);
/// Requests that lie ready on each ring.
const REQUESTS: u64 = 5;

/// Runs one input.
pub fn run(bytes: &[u8]) -> Outcome {
    let mut input = Input::new(bytes);
    in_folder(|scratch| {
        let before = footprint();
        let mode = input.u8();
        make_disk(scratch);
        let mut front = Front::start(scratch, mode);
        while !input.is_empty() && front.is_alive {
            front.step(&mut input, scratch);
        }
        let outcome = front.finish(scratch, mode & 3 == 3);
        let end = Instant::now() + LIMIT;
        // A thread that has ended is listed for a moment longer.
        while footprint() != before {
            let after = footprint();
            assert!(Instant::now() < end, "descriptors, threads: {before:?} before, {after:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
        outcome
    })
}

/// How many descriptors and threads this process has.
fn footprint() -> (usize, usize) {
    let count = |folder: &str| std::fs::read_dir(folder).expect("a list of our own").count();
    (count("/proc/self/fd"), count("/proc/self/task"))
}

/// The content of the add-cow file: clusters of 4 KiB, every third allocated.
fn side_file() -> Sparse {
    let mut bytes = b"ACOW".to_vec();
    [76_u32, 8, 84, 8, 12].iter().for_each(|word| bytes.extend(word.to_le_bytes()));
    bytes.extend([0; 16]);
    bytes.extend(4096_u32.to_le_bytes());
    bytes.extend(b"raw\0\0\0\0\0\0\0\0\0\0\0\0\0raw\0\0\0\0\0\0\0\0\0\0\0\0\0base.imgdisk.raw");
    let mut side = Sparse::default();
    side.put(0, &bytes);
    side.put(4096, &[0x49, 0x92]);
    side.len = 8192;
    side
}

/// Makes the disk's files.
fn make_disk(scratch: &Scratch) {
    side_file().write(scratch, "disk");
    Sparse::data(0x10, DISK).write(scratch, "disk.raw");
    Sparse::data(0x20, DISK).write(scratch, "base.img");
}

/// Guest memory with requests on two rings.
fn template() -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(STRIDE).expect("small") * QUEUES];
    for queue in 0..to_u64(QUEUES) {
        let base = queue * STRIDE;
        let mut put = |at: u64, new: &[u8]| {
            let at = usize::try_from(base + at).expect("small");
            bytes[at..at + new.len()].copy_from_slice(new);
        };
        // IN, OUT, FLUSH, GET_ID and WRITE_ZEROES, each with a header, data and a status byte.
        let segment = [&(WRITTEN / 512 + 8).to_le_bytes()[..], &[4, 0, 0, 0, 1, 0, 0, 0]].concat();
        let data = pattern(0x50, base, 8192);
        let sector = WRITTEN / 512 + queue * 24 + 3;
        let requests: [(u32, u64, &[u8], u32, u16); 5] = [
            (0, 5 + queue, &[0; 8192], 8192, 2),
            (1, sector, &data, 6144, 0),
            (4, 0, &[], 0, 0),
            (8, 0, &[0; 20], 20, 2),
            (13, 0, &segment, 16, 0),
        ];
        let mut slot = 0_u16;
        for (index, (kind, sector, data, len, flag)) in (0..).zip(requests) {
            let (header_at, data_at) = (0x1000 + index * 16, 0x2000 + index * 0x1000);
            let status_at = 0x7000 + index;
            put(header_at, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
            put(status_at, &[0xff]);
            put(0x404 + index * 2, &slot.to_le_bytes());
            let mut chain = vec![(header_at, 16, 0), (data_at, len, flag), (status_at, 1, 2)];
            chain.retain(|(_, len, _)| *len > 0);
            put(data_at, &data[..data.len().min(0x1000)]);
            let last = chain.len() - 1;
            for (at, (address, len, flags)) in chain.into_iter().enumerate() {
                let flags = flags | u16::from(at < last);
                let entry = [
                    &(base + address).to_le_bytes()[..],
                    &u32::to_le_bytes(len),
                    &u16::to_le_bytes(flags),
                    &(slot + 1).to_le_bytes(),
                ];
                put(u64::from(slot) * 16, &entry.concat());
                slot += 1;
            }
        }
        put(0x402, &u16::try_from(REQUESTS).expect("few").to_le_bytes());
    }
    bytes
}

/// A front end and the export that it talks to.
struct Front {
    /// Our end of the connection.
    socket: UnixStream,
    /// Guest memory.
    memory: File,
    /// The rings' kicks.
    kicks: [OwnedFd; QUEUES],
    /// The rings' calls.
    calls: [OwnedFd; QUEUES],
    /// The inflight region, if there was one.
    region: Option<OwnedFd>,
    /// Whether the script did nothing that changes what requests mean.
    is_tame: bool,
    /// Whether the connection is there.
    is_alive: bool,
    /// Stops the export.
    stop: StopHandle,
    /// How serving ended.
    ended: mpsc::Receiver<Result<(), ExportError>>,
    /// The thread that serves.
    thread: std::thread::JoinHandle<()>,
}

impl Front {
    /// Starts an export, connected.
    fn start(scratch: &Scratch, mode: u8) -> Self {
        let options = OpenOptions {
            writable: mode & 3 != 3,
            cache: CacheMode::Buffered,
            backing_cache: CacheMode::Buffered,
            locking: Locking::On,
        };
        let image = open::add_cow(&scratch.path("disk"), options).expect("a sound disk");
        if mode & 4 != 0 {
            image.map_files();
        }
        let stop = StopHandle::new().expect("a descriptor");
        let queues = u16::try_from(QUEUES).expect("few");
        let config = DeviceConfig { num_queues: queues, queue_size: 64, serial: b"fuzz".into() };
        let poll_limit = Duration::from_micros(if mode & 8 == 0 { 0 } else { 20 });
        let tuning = Tuning { poll_limit, register_memory: mode & 0x30 == 0x30 };
        let writeback = mode & 0x40 == 0;
        let export = Export::new(image, config, writeback, tuning, stop.clone()).expect("sound");
        let (socket, back) = UnixStream::pair().expect("sockets");
        socket.set_write_timeout(Some(LIMIT)).expect("a time limit");
        socket.set_read_timeout(Some(ANSWER)).expect("a time limit");
        let (sender, ended) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let result = export.serve(Endpoint::Connected(back));
            drop(export);
            sender.send(result).expect("somebody waits");
        });
        let memory = new_memfd(MEMORY);
        memory.write_all_at(&template(), 0).expect("space");
        Self {
            socket,
            memory,
            kicks: std::array::from_fn(|_| new_eventfd()),
            calls: std::array::from_fn(|_| new_eventfd()),
            region: None,
            is_tame: true,
            is_alive: true,
            stop,
            ended,
            thread,
        }
    }

    /// Sends a message, and takes what has been answered so far.
    fn send(&mut self, message: &Message) {
        self.is_alive &= message.send(&self.socket);
        self.take_answers();
    }

    /// Sends a sound message.
    fn say(&mut self, request: u32, words: &[u64], fds: Vec<OwnedFd>) {
        let payload: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.send(&Message::new(request, &payload, fds));
    }

    /// Takes what has been answered so far; keeps a region that comes.
    fn take_answers(&mut self) {
        let (fds, is_alive) = receive(&self.socket, false);
        self.is_alive &= is_alive;
        if let Some(fd) = fds.into_iter().next() {
            self.region = Some(fd);
        }
    }

    /// Waits until what was sent was worked off: a message that is answered comes back.
    fn settle(&mut self) {
        let payload: Vec<u8> = [0_u32, 8, 0, 0, 0].iter().flat_map(|w| w.to_le_bytes()).collect();
        self.is_alive &= Message::new(wire::GET_CONFIG, &payload, Vec::new()).send(&self.socket);
        if self.is_alive {
            let (fds, is_alive) = receive(&self.socket, true);
            self.is_alive &= is_alive;
            self.region = fds.into_iter().next().or(self.region.take());
        }
    }

    /// A copy of a descriptor.
    fn copy(fd: &impl AsFd) -> OwnedFd {
        fd.as_fd().try_clone_to_owned().expect("a descriptor")
    }

    /// Negotiates, and tells about memory.
    fn shake_hands(&mut self) {
        self.say(wire::GET_FEATURES, &[], Vec::new());
        self.say(wire::SET_OWNER, &[], Vec::new());
        self.say(wire::GET_PROTOCOL_FEATURES, &[], Vec::new());
        // MQ, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE, CONFIGURE_MEM_SLOTS
        let protocol = 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15;
        self.say(wire::SET_PROTOCOL_FEATURES, &[protocol], Vec::new());
        let features = 1 << 32 | 1 << 30 | 1 << 28 | 1 << 14 | 1 << 13 | 1 << 11 | 1 << 9;
        self.say(wire::SET_FEATURES, &[features], Vec::new());
        let table = [1, 0, MEMORY, USER, 0];
        self.say(wire::SET_MEM_TABLE, &table, vec![Self::copy(&self.memory)]);
    }

    /// Sets up and starts a ring.
    fn start_ring(&mut self, queue: usize) {
        let (index, base) = (to_u64(queue), USER + to_u64(queue) * STRIDE);
        let ring = u64::from(RING) << 32;
        self.say(wire::SET_VRING_NUM, &[index | ring], Vec::new());
        self.say(wire::SET_VRING_BASE, &[index], Vec::new());
        let addresses = [index, base, base + 0x800, base + 0x400, 0];
        self.say(wire::SET_VRING_ADDR, &addresses, Vec::new());
        self.say(wire::SET_VRING_CALL, &[index], vec![Self::copy(&self.calls[queue])]);
        self.say(wire::SET_VRING_KICK, &[index], vec![Self::copy(&self.kicks[queue])]);
        self.say(wire::SET_VRING_ENABLE, &[index | 1 << 32], Vec::new());
        self.kick(queue);
    }

    /// Kicks a ring.
    fn kick(&self, queue: usize) {
        // A full counter is a kick, too.
        let _ = rustix::io::write(&self.kicks[queue], &1_u64.to_le_bytes());
    }

    /// Waits a moment for the requests on a ring.
    fn wait(&self, queue: usize) {
        let mut index = [0; 2];
        let place = to_u64(queue) * STRIDE + 0x802;
        for _ in 0..40 {
            // It may be shorter by now.
            let _ = self.memory.read_at(&mut index, place);
            if u64::from(u16::from_le_bytes(index)) >= REQUESTS {
                return;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// Does one thing that the input says.
    fn step(&mut self, input: &mut Input<'_>, scratch: &Scratch) {
        let byte = input.u8();
        let queue = usize::from(byte >> 7);
        let index = to_u64(queue);
        match byte & 31 {
            0 | 1 => self.shake_hands(),
            2 | 3 => self.start_ring(queue),
            4 => self.kick(queue),
            5 | 6 => self.wait(queue),
            7 => self.poke(input),
            8 => self.ask_region(),
            9 => self.give_region(input, scratch),
            10 => self.say(wire::GET_VRING_BASE, &[index], Vec::new()),
            11 => self.say(wire::RESET_DEVICE, &[], Vec::new()),
            12 => {
                self.say(wire::SET_VRING_ENABLE, &[index | u64::from(byte >> 6 & 1) << 32], vec![])
            }
            13 => self.settle(),
            14 => self.poke_region(input),
            15 => self.add_region(input),
            16..=26 => self.change(input, scratch),
            27 | 28 => self.raw(input, scratch),
            29 => self.cut_short(input),
            30 => self.stop_early(input),
            _ => self.change_len(input),
        }
    }

    /// Makes the file behind guest memory shorter, or longer.
    fn change_len(&mut self, input: &mut Input<'_>) {
        let len = u64::from(input.u8()) << 10;
        self.is_tame = false;
        self.memory.set_len(len).expect("a length");
        self.take_answers();
    }

    /// Writes a byte into guest memory.
    fn poke(&mut self, input: &mut Input<'_>) {
        let at = u64::from(input.u16());
        self.is_tame = false;
        self.memory.write_all_at(&[input.u8()], at).expect("space");
    }

    /// Asks for an inflight region.
    fn ask_region(&mut self) {
        let shape = to_u64(QUEUES) | u64::from(RING) << 16;
        let payload = [[0; 16].as_slice(), &shape.to_le_bytes()[..4]].concat();
        self.send(&Message::new(wire::GET_INFLIGHT_FD, &payload, Vec::new()));
        self.settle();
    }

    /// Gives the region back, or something else.
    fn give_region(&mut self, input: &mut Input<'_>, scratch: &Scratch) {
        let odd = input.u8();
        let fd = match &self.region {
            Some(region) if odd < 192 => Self::copy(region),
            _ => self.any_fd(input, scratch),
        };
        let len = File::from(Self::copy(&fd)).metadata().map_or(0, |metadata| metadata.len());
        let len = if odd & 15 == 15 { input.edge() } else { len };
        let shape = to_u64(QUEUES) | u64::from(RING) << 16;
        let shape = if odd & 15 == 14 { input.u64() } else { shape };
        let payload = [&len.to_le_bytes()[..], &[0; 8], &shape.to_le_bytes()[..4]].concat();
        self.is_tame = false;
        self.send(&Message::new(wire::SET_INFLIGHT_FD, &payload, vec![fd]));
    }

    /// Writes a word into the inflight region.
    fn poke_region(&mut self, input: &mut Input<'_>) {
        let (at, value) = (u64::from(input.u16() % 8192), input.edge());
        self.is_tame = false;
        if let Some(region) = &self.region {
            // It may be of any kind and length.
            let _ = File::from(Self::copy(region)).write_at(&value.to_le_bytes(), at * 8);
        }
    }

    /// Adds or removes a memory region behind the others.
    fn add_region(&mut self, input: &mut Input<'_>) {
        let at = MEMORY + u64::from(input.u8() % 4) * 0x1000;
        let words = [0, at, 0x1000, USER + at, 0];
        if input.flag() {
            self.say(wire::ADD_MEM_REG, &words, vec![Self::copy(&self.memory)]);
        } else {
            self.say(wire::REM_MEM_REG, &words, Vec::new());
        }
        self.is_tame = false;
    }

    /// A descriptor of any kind.
    fn any_fd(&self, input: &mut Input<'_>, scratch: &Scratch) -> OwnedFd {
        let mut known: Vec<BorrowedFd<'_>> = vec![self.memory.as_fd(), self.memory.as_fd()];
        known.extend(self.kicks.iter().chain(&self.calls).map(AsFd::as_fd));
        known.extend(self.region.as_ref().map(AsFd::as_fd));
        any_fd(input, scratch, &known)
    }

    /// A message as a sound front end would send it, with some words changed.
    fn change(&mut self, input: &mut Input<'_>, scratch: &Scratch) {
        let request = u32::from(input.u8() % 46);
        let index = u64::from(input.u8() % 3);
        let words: Vec<u64> = match request {
            wire::SET_FEATURES => vec![1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 1 << 9],
            wire::SET_MEM_TABLE => {
                vec![2, 0, 0x1_0000, USER, 0, 0x1_0000, 0x1_0000, USER + 0x1_0000, 0x1_0000]
            }
            wire::SET_VRING_NUM => vec![index | u64::from(RING) << 32],
            wire::SET_VRING_ADDR => vec![index, USER, USER + 0x800, USER + 0x400, 0],
            wire::SET_VRING_BASE | wire::GET_VRING_BASE => vec![index],
            wire::SET_VRING_KICK | wire::SET_VRING_CALL | wire::SET_VRING_ERR => vec![index],
            wire::SET_PROTOCOL_FEATURES => vec![0xb22b],
            wire::SET_VRING_ENABLE => vec![index | 1 << 32],
            wire::GET_CONFIG => vec![60 << 32, 0, 0, 0, 0, 0, 0, 0, 0],
            wire::SET_CONFIG => vec![1 << 32 | 32, 1],
            wire::GET_INFLIGHT_FD | wire::SET_INFLIGHT_FD => vec![8192, 0, 2 | 16 << 16],
            wire::ADD_MEM_REG | wire::REM_MEM_REG => vec![0, MEMORY, 0x1000, USER + MEMORY, 0],
            _ => vec![0; usize::try_from(index).expect("small")],
        };
        let mut payload: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut changes = input.u8();
        while changes & 3 != 0 && !payload.is_empty() {
            let at = usize::from(input.u8()) % payload.len();
            let value = input.edge().to_le_bytes();
            let end = (at + if changes & 4 == 0 { 8 } else { 2 }).min(payload.len());
            payload[at..end].copy_from_slice(&value[..end - at]);
            changes -= 1;
        }
        let count = match request {
            wire::SET_MEM_TABLE => 2,
            wire::SET_VRING_KICK | wire::SET_VRING_CALL | wire::SET_VRING_ERR => 1,
            wire::SET_BACKEND_REQ_FD | wire::SET_INFLIGHT_FD | wire::ADD_MEM_REG => 1,
            _ => 0,
        };
        let count = if changes & 0x80 == 0 { count } else { changes >> 4 & 7 };
        let fds = (0..count).map(|_| self.any_fd(input, scratch)).collect();
        self.is_tame = false;
        let mut message = Message::new(request, &payload, fds);
        if changes & 8 != 0 {
            // No answer wanted.
            message.bytes[4] = 1;
        }
        self.send(&message);
    }

    /// A message of any bytes.
    fn raw(&mut self, input: &mut Input<'_>, scratch: &Scratch) {
        let count = match input.u8() {
            byte @ 0..=127 => byte % 4,
            byte => byte % 40,
        };
        let fds = (0..count).map(|_| self.any_fd(input, scratch)).collect();
        let len = usize::from(input.u16() % 512);
        let mut message = Message::new(input.u32(), input.take(len), fds);
        if input.flag() {
            message.bytes[4..12].copy_from_slice(&input.u64().to_le_bytes());
        }
        self.is_tame = false;
        self.send(&message);
    }

    /// A part of a message; what comes after is taken for its rest.
    fn cut_short(&mut self, input: &mut Input<'_>) {
        let mut message = Message::new(u32::from(input.u8() % 46), &[0; 64], Vec::new());
        message.bytes.truncate(usize::from(input.u8() % 76));
        self.is_tame = false;
        self.send(&message);
    }

    /// Stops the export while the front end goes on, sometimes.
    fn stop_early(&mut self, input: &mut Input<'_>) {
        if input.u8() & 7 == 7 {
            self.stop.stop();
        }
    }

    /// Hangs up, waits for the end of the export, and looks at what is left.
    fn finish(self, scratch: &Scratch, read_only: bool) -> Outcome {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        match self.ended.recv_timeout(LIMIT) {
            Err(_) => panic!("the export does not end {LIMIT:?} after its front end has gone"),
            Ok(Err(ExportError::Flush(error))) => panic!("the last flush failed: {error}"),
            Ok(_) => {}
        }
        self.thread.join().expect("no panic");
        let mut memory = vec![0xff; usize::try_from(STRIDE).expect("small") * QUEUES];
        let _ = self.memory.read_at(&mut memory, 0).expect("a file in memory");
        let status = |queue: u64| {
            let first = usize::try_from(queue * STRIDE + 0x7000).expect("small");
            &memory[first..first + 5]
        };
        let done = (0..to_u64(QUEUES)).flat_map(status).filter(|status| **status == 0);
        let executed = to_u64(done.count());
        check_files(scratch, read_only, self.is_tame);
        Outcome { executed }
    }
}

/// Checks that the files are a sound disk, changed only where that may be.
fn check_files(scratch: &Scratch, read_only: bool, is_tame: bool) {
    let read = |name: &str| std::fs::read(scratch.path(name)).expect("a file");
    let (side, raw, base) = (read("disk"), read("disk.raw"), read("base.img"));
    let size = usize::try_from(DISK).expect("small");
    assert!(base == pattern(0x20, 0, size), "the backing file was changed");
    let fresh = {
        side_file().write(scratch, "fresh");
        read("fresh")
    };
    if read_only {
        assert!(side == fresh && raw == pattern(0x10, 0, size), "a read-only disk was changed");
        return;
    }
    // All but the session number.
    assert!(side[..4080] == fresh[..4080] && side.len() == fresh.len(), "the header was changed");
    assert_eq!(raw.len(), size, "length of the raw image");
    let report = check::add_cow(&scratch.path("disk"), false, Locking::On);
    assert_eq!(report.expect("it opens").corruptions(), 0, "the disk is damaged");
    let half = usize::try_from(WRITTEN).expect("small");
    if is_tame {
        let same = raw[..half] == pattern(0x10, 0, size)[..half];
        assert!(same && side[4096] == fresh[4096], "something was written that nobody wrote");
    }
}
