//! A guest with its virtual machine monitor: a vhost-user front end that does block requests.
//!
//! Negotiates, maps memory, starts rings and moves requests, with every message answered (or
//! refused) before the next one and within the time limit. A reply is checked for what holds for
//! every request: the used length is exact, and no byte around or in front of the writable
//! buffers has changed.
//!
//! Relies on the front end of the `vhost` crate for the encoding of messages.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::mem::Memory;
use super::request::{Framing, IOERR, OK, Reply, Request, UNTOUCHED, lengths};
use super::ring::{Buffer, Ring, Used};
use super::{TIMEOUT, to_u32, to_u64};

/// Feature bit: most segments of a request are in the config space.
pub const F_SEG_MAX: u64 = 1 << 2;
/// Feature bit: the disk is read-only.
pub const F_RO: u64 = 1 << 5;
/// Feature bit: the block size is in the config space.
pub const F_BLK_SIZE: u64 = 1 << 6;
/// Feature bit: FLUSH is understood.
pub const F_FLUSH: u64 = 1 << 9;
/// Feature bit: the topology is in the config space.
pub const F_TOPOLOGY: u64 = 1 << 10;
/// Feature bit: the driver may switch the write cache.
pub const F_CONFIG_WCE: u64 = 1 << 11;
/// Feature bit: several queues.
pub const F_MQ: u64 = 1 << 12;
/// Feature bit: DISCARD is understood.
pub const F_DISCARD: u64 = 1 << 13;
/// Feature bit: WRITE_ZEROES is understood.
pub const F_WRITE_ZEROES: u64 = 1 << 14;
/// Feature bit: indirect descriptors.
pub const F_INDIRECT: u64 = 1 << 28;
/// Feature bit: event indices.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// Feature bit of vhost-user: protocol features exist.
pub const F_PROTOCOL: u64 = 1 << 30;
/// Feature bit: the interface of VIRTIO 1.
pub const F_VERSION_1: u64 = 1 << 32;

/// All feature bits that a driver of these tests knows.
pub const KNOWN: u64 = F_SEG_MAX
    | F_RO
    | F_BLK_SIZE
    | F_FLUSH
    | F_TOPOLOGY
    | F_CONFIG_WCE
    | F_MQ
    | F_DISCARD
    | F_WRITE_ZEROES
    | F_INDIRECT
    | F_EVENT_IDX
    | F_VERSION_1;

/// All protocol features that the front end of these tests knows.
pub fn known_protocol() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
}

/// Bytes of config space that the tests read: what VIRTIO 1.3 defines up to write-zeroes.
pub const CONFIG_LEN: u32 = 60;

/// How much lies untouched before and after each writable buffer, in bytes.
const GUARD: usize = 48;

/// What a guest asks for.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Feature bits that the driver knows; the offered ones among them are negotiated.
    pub features: u64,
    /// Protocol features that the front end knows.
    pub protocol: VhostUserProtocolFeatures,
    /// Queues to start.
    pub queues: usize,
    /// Entries of each queue.
    pub size: u16,
    /// Where the ring indices begin.
    pub start: u16,
}

impl Default for Setup {
    fn default() -> Self {
        let protocol = known_protocol();
        Self { features: KNOWN, protocol, queues: 1, size: 128, start: 0 }
    }
}

impl Setup {
    /// Every known feature but the bits `without`.
    pub fn without(without: u64) -> Self {
        Self { features: KNOWN & !without, ..Self::default() }
    }

    /// `queues` queues of `size` entries.
    pub fn queues(queues: usize, size: u16) -> Self {
        Self { queues, size, ..Self::default() }
    }
}

/// What a watchdog looks at.
#[derive(Debug, Default)]
struct Watched {
    /// When the pending message is late; none when nothing is pending.
    late: Option<Instant>,
    /// Whether the guest is gone.
    done: bool,
}

/// Ends a message that gets no answer by shutting the socket down.
#[derive(Debug)]
struct Watchdog {
    /// What is watched, and where changes of it are told.
    state: Arc<(Mutex<Watched>, Condvar)>,
}

impl Watchdog {
    /// Watches over the messages on `stream`.
    fn new(stream: UnixStream) -> Self {
        let state = Arc::new((Mutex::new(Watched::default()), Condvar::new()));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            let (lock, changed) = &*shared;
            let mut state = lock.lock().expect("watchdog state");
            while !state.done {
                if state.late.is_some_and(|end| Instant::now() >= end) {
                    let _ = stream.shutdown(std::net::Shutdown::Both);
                    return;
                }
                let pause = Duration::from_millis(if state.late.is_some() { 100 } else { 60_000 });
                state = changed.wait_timeout(state, pause).expect("watchdog state").0;
            }
        });
        Self { state }
    }

    /// Starts (with a time) or ends (without) the watch over one message.
    fn set(&self, end: Option<Instant>) {
        self.state.0.lock().expect("watchdog state").late = end;
        self.state.1.notify_one();
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.state.0.lock().expect("watchdog state").done = true;
        self.state.1.notify_one();
    }
}

/// A request that the device has.
#[derive(Clone, Debug)]
pub struct Pending {
    /// Writable buffers in chain order: address and length.
    writable: Vec<(u64, usize)>,
    /// Readable buffers with what they must still hold.
    readable: Vec<(u64, Vec<u8>)>,
}

/// A guest connected to a daemon.
#[derive(Debug)]
pub struct Guest {
    /// Its memory.
    pub mem: Arc<Memory>,
    /// Its virtqueues.
    pub rings: Vec<Ring>,
    /// Features that the device offers.
    pub offered: u64,
    /// Features that were negotiated.
    pub features: u64,
    /// Protocol features that the device offers.
    pub protocol: VhostUserProtocolFeatures,
    /// What it asked for.
    pub setup: Setup,
    /// Requests in flight by queue and head.
    pending: HashMap<(usize, u16), Pending>,
    /// What the device wants to get back after its death; none before [`Guest::keep_inflight`].
    inflight: Option<Kept>,
    /// The socket once more, for messages that the encoder cannot express.
    stream: UnixStream,
    /// The message encoder.
    front: FrontDebug,
    /// Bounds each message.
    watchdog: Watchdog,
}

/// Memory that is kept for the device.
struct Kept {
    /// What the device said about it.
    region: VhostUserInflight,
    /// Its file.
    file: File,
}

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kept").field("len", &self.region.mmap_size).finish_non_exhaustive()
    }
}

/// The front end of `vhost`, which does not implement `Debug`.
struct FrontDebug(Frontend);

impl std::fmt::Debug for FrontDebug {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Frontend")
    }
}

impl Guest {
    /// A guest on `stream` with everything negotiated and all rings running.
    pub fn start(stream: UnixStream, setup: Setup) -> Self {
        let mut guest = Self::negotiate(stream, setup);
        guest.start_rings();
        guest
    }

    /// The same, and it keeps what the device needs to go on after its death.
    pub fn start_recoverable(stream: UnixStream, setup: Setup) -> Self {
        let mut guest = Self::negotiate(stream, setup);
        guest.keep_inflight();
        guest.start_rings();
        guest
    }

    /// Tells the device about memory.
    pub fn share_memory(&mut self) {
        let table = self.mem.table();
        self.must("SET_MEM_TABLE", |front| front.set_mem_table(&table).map(drop));
    }

    /// Tells the device about memory, and starts all rings.
    fn start_rings(&mut self) {
        self.share_memory();
        for queue in 0..self.rings.len() {
            self.start_ring(queue);
        }
    }

    /// Gets the memory for requests in flight, and hands it back, as QEMU does before rings start.
    pub fn keep_inflight(&mut self) {
        let queues = u16::try_from(self.setup.queues).expect("few queues");
        let shape = VhostUserInflight::new(0, 0, queues, self.setup.size);
        let got = self.must("GET_INFLIGHT_FD", |front| front.get_inflight_fd(&shape));
        self.inflight = Some(Kept { region: got.0, file: got.1 });
        self.give_inflight().expect("SET_INFLIGHT_FD");
    }

    /// Hands the memory for requests in flight back.
    pub fn give_inflight(&mut self) -> vhost::Result<()> {
        let kept = self.inflight.take().expect("kept before");
        let fd = kept.file.as_raw_fd();
        let result = self.message("SET_INFLIGHT_FD", |f| f.set_inflight_fd(&kept.region, fd));
        self.inflight = Some(kept);
        result
    }

    /// The memory for requests in flight.
    pub fn inflight(&mut self) -> (&mut VhostUserInflight, &mut File) {
        let kept = self.inflight.as_mut().expect("kept before");
        (&mut kept.region, &mut kept.file)
    }

    /// Hangs up, and keeps everything for another connection.
    pub fn hang_up(&self) {
        self.stream.shutdown(std::net::Shutdown::Both).expect("hang up");
    }

    /// Goes on with another process behind `stream`, knowing nothing but what is in memory: rings
    /// begin where the used ring ends. Whether it accepted the memory for requests in flight.
    pub fn reconnect(&mut self, stream: UnixStream) -> vhost::Result<()> {
        self.reconnect_at(stream, Ring::device_index)
    }

    /// The same; `base` says where a ring begins.
    pub fn reconnect_at(
        &mut self,
        stream: UnixStream,
        base: impl Fn(&Ring) -> u16,
    ) -> vhost::Result<()> {
        self.watchdog = Watchdog::new(stream.try_clone().expect("another descriptor"));
        self.stream = stream.try_clone().expect("another descriptor");
        self.front = FrontDebug(Frontend::from_stream(stream, 64));
        self.hand_shake();
        if self.inflight.is_some() {
            self.give_inflight()?;
        }
        let table = self.mem.table();
        self.must("SET_MEM_TABLE", |front| front.set_mem_table(&table).map(drop));
        for queue in 0..self.rings.len() {
            let base = base(&self.rings[queue]);
            self.configure_ring_at(queue, base);
            self.enable(queue, true);
            // As QEMU does: what was kicked for may have gone with the old process.
            self.rings[queue].kick_always();
        }
        Ok(())
    }

    /// A guest that has negotiated features but told nothing about memory and rings.
    pub fn negotiate(stream: UnixStream, setup: Setup) -> Self {
        let watchdog = Watchdog::new(stream.try_clone().expect("another descriptor"));
        let raw = stream.try_clone().expect("another descriptor");
        let front = FrontDebug(Frontend::from_stream(stream, 64));
        let mem = Arc::new(Memory::new());
        let mut guest = Self {
            mem,
            rings: Vec::new(),
            offered: 0,
            features: 0,
            protocol: VhostUserProtocolFeatures::empty(),
            setup,
            pending: HashMap::new(),
            inflight: None,
            stream: raw,
            front,
            watchdog,
        };
        guest.hand_shake();
        let features = guest.features;
        let (event_idx, setup) = (features & F_EVENT_IDX != 0, guest.setup.clone());
        let ring = |_| Ring::new(&guest.mem, setup.size, setup.start, event_idx);
        guest.rings = (0..setup.queues).map(ring).collect();
        guest
    }

    /// Negotiates features.
    fn hand_shake(&mut self) {
        self.offered = self.must("GET_FEATURES", |front| front.get_features());
        self.protocol = self.must("GET_PROTOCOL_FEATURES", |f| f.get_protocol_features());
        let protocol = self.protocol & self.setup.protocol;
        self.must("SET_PROTOCOL_FEATURES", |front| front.set_protocol_features(protocol));
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            self.front.0.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        self.must("SET_OWNER", |front| front.set_owner());
        self.features = self.offered & self.setup.features | F_PROTOCOL;
        let features = self.features;
        self.must("SET_FEATURES", |front| front.set_features(features));
    }

    /// Sends a message; an error means that it was refused or that the connection is gone.
    ///
    /// # Panics
    /// If there is no answer within [`TIMEOUT`].
    pub fn message<T>(
        &mut self,
        what: &str,
        send: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> vhost::Result<T> {
        let end = Instant::now() + TIMEOUT;
        self.watchdog.set(Some(end));
        let answer = send(&mut self.front.0);
        self.watchdog.set(None);
        assert!(Instant::now() < end, "{what}: no answer within {TIMEOUT:?}");
        answer
    }

    /// Sends a message that has to be accepted.
    pub fn must<T>(
        &mut self,
        what: &str,
        send: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> T {
        self.message(what, send).unwrap_or_else(|error| panic!("{what} refused: {error}"))
    }

    /// Gives ring `queue` a file of any kind as its kick (`code` 12) or its call (`code` 13);
    /// whether the device took it.
    pub fn set_ring_file(&mut self, code: u32, queue: u64, file: &impl AsRawFd) -> bool {
        let need_reply = 8 | 1;
        let mut message: Vec<u8> =
            [code, need_reply, 8].into_iter().flat_map(u32::to_le_bytes).collect();
        message.extend_from_slice(&queue.to_le_bytes());
        self.stream.send_with_fds(&[&message[..]], &[file.as_raw_fd()]).expect("send a message");
        self.stream.set_read_timeout(Some(TIMEOUT)).expect("a time limit");
        let mut reply = [0; 20];
        let got = self.stream.read_exact(&mut reply);
        self.stream.set_read_timeout(None).expect("no time limit");
        let gone = |error: &std::io::Error| error.kind() != std::io::ErrorKind::WouldBlock;
        assert!(got.as_ref().err().is_none_or(gone), "no answer to message {code}");
        got.is_ok() && reply[12..] == [0; 8]
    }

    /// Tells the device about ring `queue` and enables it.
    pub fn start_ring(&mut self, queue: usize) {
        self.configure_ring(queue);
        self.enable(queue, true);
    }

    /// Tells the device about ring `queue` without enabling it.
    pub fn configure_ring(&mut self, queue: usize) {
        let base = self.rings[queue].next_avail();
        self.configure_ring_at(queue, base);
    }

    /// The same with `base` as the index of the next chain.
    fn configure_ring_at(&mut self, queue: usize, base: u16) {
        let size = self.rings[queue].size;
        let config = self.ring_config(queue);
        self.must("SET_VRING_NUM", |front| front.set_vring_num(queue, size));
        self.must("SET_VRING_BASE", |front| front.set_vring_base(queue, base));
        self.must("SET_VRING_ADDR", |front| front.set_vring_addr(queue, &config));
        let call = self.rings[queue].call.try_clone().expect("another descriptor");
        let kick = self.rings[queue].kick.try_clone().expect("another descriptor");
        self.must("SET_VRING_CALL", |front| front.set_vring_call(queue, &call));
        self.must("SET_VRING_KICK", |front| front.set_vring_kick(queue, &kick));
    }

    /// Where ring `queue` lies.
    pub fn ring_config(&self, queue: usize) -> VringConfigData {
        let ring = &self.rings[queue];
        VringConfigData {
            queue_max_size: ring.size,
            queue_size: ring.size,
            flags: 0,
            desc_table_addr: self.mem.user(ring.desc),
            used_ring_addr: self.mem.user(ring.used),
            avail_ring_addr: self.mem.user(ring.avail),
            log_addr: None,
        }
    }

    /// Enables or disables ring `queue`.
    pub fn enable(&mut self, queue: usize, enable: bool) {
        self.must("SET_VRING_ENABLE", |front| front.set_vring_enable(queue, enable));
    }

    /// Stops ring `queue` and returns the index of the next chain that the device would take.
    pub fn stop_ring(&mut self, queue: usize) -> u16 {
        let base = self.must("GET_VRING_BASE", |front| front.get_vring_base(queue));
        u16::try_from(base).expect("a ring index")
    }

    /// `len` bytes of the config space from `offset` on.
    pub fn config_at(&mut self, offset: u32, len: usize) -> Vec<u8> {
        let blank = vec![0; len];
        let flags = VhostUserConfigFlags::WRITABLE;
        let get = |f: &mut Frontend| f.get_config(offset, to_u32(len), flags, &blank);
        self.must("GET_CONFIG", get).1
    }

    /// The defined part of the config space.
    pub fn config(&mut self) -> Config {
        Config(self.config_at(0, usize::try_from(CONFIG_LEN).expect("small")))
    }

    /// Puts `request` on ring `queue` without a kick.
    pub fn submit(&mut self, queue: usize, request: &Request, framing: &Framing) -> u16 {
        let (buffers, pending) = self.place(request, framing);
        let ring = &mut self.rings[queue];
        let indirect = framing.indirect && self.features & F_INDIRECT != 0;
        let head = if indirect { ring.add_indirect(&buffers) } else { ring.add(&buffers) };
        self.track(queue, head, pending);
        head
    }

    /// Places the bytes of `request` in guest memory, cut as `framing` says.
    pub fn place(&self, request: &Request, framing: &Framing) -> (Vec<Buffer>, Pending) {
        let mut pending = Pending { writable: Vec::new(), readable: Vec::new() };
        let mut buffers = Vec::new();
        let mut done = 0;
        for len in lengths(request.readable.len(), &framing.readable) {
            let bytes = request.readable[done..done + len].to_vec();
            let addr = self.mem.buffer(len);
            self.mem.write(addr, &bytes);
            buffers.push(Buffer { addr, len: to_u32(len), writable: false });
            pending.readable.push((addr, bytes));
            done += len;
        }
        for len in lengths(request.writable, &framing.writable) {
            let addr = self.mem.buffer(len + 2 * GUARD);
            self.mem.write(addr, &vec![UNTOUCHED; len + 2 * GUARD]);
            let addr = addr + to_u64(GUARD);
            buffers.push(Buffer { addr, len: to_u32(len), writable: true });
            pending.writable.push((addr, len));
        }
        (buffers, pending)
    }

    /// Remembers what lies where for the chain `head` that a test has put on the ring by hand.
    pub fn track(&mut self, queue: usize, head: u16, pending: Pending) {
        self.pending.insert((queue, head), pending);
    }

    /// Kicks ring `queue` if the device wants it.
    pub fn kick(&mut self, queue: usize) {
        self.rings[queue].kick();
    }

    /// Waits for one request of ring `queue`: its head and its reply.
    pub fn finish(&mut self, queue: usize) -> (u16, Reply) {
        let used = self.rings[queue].wait();
        (used.head, self.collect(queue, used))
    }

    /// Checks and collects what the device wrote for the finished chain `used`.
    pub fn collect(&mut self, queue: usize, used: Used) -> Reply {
        let pending = self.pending.remove(&(queue, used.head)).expect("a request in flight");
        for (addr, bytes) in pending.readable {
            assert_eq!(self.mem.read(addr, bytes.len()), bytes, "a readable buffer was changed");
        }
        let mut writable = Vec::new();
        let guard = to_u64(GUARD);
        for (addr, len) in pending.writable {
            for (place, side) in [(addr - guard, "before"), (addr + to_u64(len), "after")] {
                let bytes = self.mem.read(place, GUARD);
                assert_eq!(bytes, [UNTOUCHED; GUARD], "bytes {side} a writable buffer changed");
            }
            writable.extend(self.mem.read(addr, len));
        }
        Reply { used_len: used.len, writable }
    }

    /// Does one request alone on ring `queue` and checks that the used length is exact.
    pub fn request(&mut self, queue: usize, request: &Request, framing: &Framing) -> Reply {
        let head = self.submit(queue, request, framing);
        self.kick(queue);
        let (back, reply) = self.finish(queue);
        assert_eq!(back, head, "another chain came back");
        assert_eq!(reply.used_len, to_u32(request.writable), "used length of {framing:?}");
        reply
    }

    /// Does one request on queue 0 in the usual framing; the status.
    pub fn status(&mut self, request: &Request) -> u8 {
        self.request(0, request, &Framing::usual(request)).status()
    }

    /// Reads `len` bytes at `sector`, which has to work.
    pub fn read(&mut self, sector: u64, len: usize) -> Vec<u8> {
        let request = Request::read(sector, len);
        let reply = self.request(0, &request, &Framing::usual(&request));
        assert_eq!(reply.status(), OK, "read of {len} bytes at sector {sector}");
        reply.data().to_vec()
    }

    /// Writes `data` at `sector`, which has to work.
    pub fn write(&mut self, sector: u64, data: &[u8]) {
        let status = self.status(&Request::write(sector, data));
        assert_eq!(status, OK, "write of {} bytes at sector {sector}", data.len());
    }

    /// Checks that a read of `len` bytes at `sector` fails and leaks nothing into the data area.
    pub fn read_fails(&mut self, sector: u64, len: usize) {
        let request = Request::read(sector, len);
        let reply = self.request(0, &request, &Framing::usual(&request));
        assert_eq!(reply.status(), IOERR, "read of {len} bytes at sector {sector}");
        assert!(reply.data().iter().all(|&byte| byte == 0), "a failed read zeroes its data");
    }

    /// Reads the whole disk in pieces of 1 MiB.
    pub fn read_all(&mut self) -> Vec<u8> {
        let sectors = self.config().capacity();
        let mut bytes = Vec::new();
        for first in (0..sectors).step_by(2048) {
            let count = usize::try_from((sectors - first).min(2048)).expect("small");
            bytes.extend(self.read(first, count * super::SECTOR));
        }
        bytes
    }
}

/// The config space of a block device (VIRTIO 1.3, 5.2.4).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config(pub Vec<u8>);

impl Config {
    /// The 16-bit field at `at`.
    pub fn u16_at(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.0[at], self.0[at + 1]])
    }

    /// The 32-bit field at `at`.
    pub fn u32_at(&self, at: usize) -> u32 {
        u32::from(self.u16_at(at)) | u32::from(self.u16_at(at + 2)) << 16
    }

    /// Size of the disk in sectors.
    pub fn capacity(&self) -> u64 {
        u64::from(self.u32_at(0)) | u64::from(self.u32_at(4)) << 32
    }

    /// Most data descriptors of one request.
    pub fn seg_max(&self) -> u32 {
        self.u32_at(12)
    }

    /// Block size in bytes.
    pub fn blk_size(&self) -> u32 {
        self.u32_at(20)
    }

    /// log2 of logical blocks per physical block.
    pub fn physical_block_exp(&self) -> u8 {
        self.0[24]
    }

    /// First aligned logical block.
    pub fn alignment_offset(&self) -> u8 {
        self.0[25]
    }

    /// Smallest good request in logical blocks.
    pub fn min_io_size(&self) -> u16 {
        self.u16_at(26)
    }

    /// Best request in logical blocks.
    pub fn opt_io_size(&self) -> u32 {
        self.u32_at(28)
    }

    /// Cache mode: 0 write-through, 1 write-back.
    pub fn writeback(&self) -> u8 {
        self.0[32]
    }

    /// How many queues there are.
    pub fn num_queues(&self) -> u16 {
        self.u16_at(34)
    }

    /// Most sectors of a discard segment.
    pub fn max_discard_sectors(&self) -> u32 {
        self.u32_at(36)
    }

    /// Most segments of a discard.
    pub fn max_discard_seg(&self) -> u32 {
        self.u32_at(40)
    }

    /// Alignment of discards in sectors.
    pub fn discard_sector_alignment(&self) -> u32 {
        self.u32_at(44)
    }

    /// Most sectors of a write-zeroes segment.
    pub fn max_write_zeroes_sectors(&self) -> u32 {
        self.u32_at(48)
    }

    /// Most segments of a write-zeroes.
    pub fn max_write_zeroes_seg(&self) -> u32 {
        self.u32_at(52)
    }

    /// Whether write-zeroes with the unmap flag may deallocate.
    pub fn write_zeroes_may_unmap(&self) -> u8 {
        self.0[56]
    }
}
