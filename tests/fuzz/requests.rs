//! Descriptor chains and block requests, on a virtqueue in the test's own memory.
//!
//! An input makes a disk on the simulated host and then either requests, framed at random and
//! sometimes broken in one place, or the raw bytes of rings, descriptors and headers. Both go
//! through the ring, the chain walker and the device as a queue's thread would send them.
//!
//! The oracle is a second reading of VIRTIO 1.3: it walks each chain in a copy of guest memory,
//! says which statuses are right and what every byte of memory and disk must be afterwards. So a
//! broken chain has to be refused without a byte written, and a good one answered exactly. Chains
//! that run at the same time are checked the same way, if they share no memory: a sector may then
//! show whatever one of them left in it.
//!
//! Not here: threads, kicks and calls (`messages`), faults of the host (`tests/faults.rs`).

use std::any::Any;
use std::rc::Rc;
use std::sync::Arc;

use addcow::executor::{TaskPool, block_on};
use addcow::format::BitmapGeometry;
use addcow::image::chain::Chain as BackingChain;
use addcow::image::{Image, ImageState};
use addcow::storage::IoBuffer;
use addcow::storage::buffer::IoMemory;
use addcow::storage::sim::{SimDisk, SimStorage};
use addcow::virtio::chain::{self, Chain};
use addcow::virtio::config::DeviceConfig;
use addcow::virtio::device::{BlockDevice, DeviceState};
use addcow::virtio::guest_memory::{GuardedMemory, GuestMap};
use addcow::virtio::request::Used;
use addcow::virtio::ring::{RingSetup, SplitRing};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::content::{Additions, Change, Disk};
use super::disk::Files;
use super::oracle::{INDIRECT, Memory, NEXT, REGIONS, Rules, WRITE, Walked, Wanted};
use super::{Input, Outcome, pattern, to_u32, to_u64, to_usize};

/// Bytes in a sector.
const SECTOR: usize = 512;
/// Guest addresses of descriptor table, available and used ring, for up to 128 entries.
const RINGS: [u64; 3] = [0, 0x800, 0xc00];
/// The same for rings of eight entries in the mode of raw bytes.
const RAW_RINGS: [u64; 3] = [0, 0x80, 0xa0];
/// Where buffers begin, behind the rings.
const BUFFERS: u64 = 0x1100;
/// The most chains of an input.
const MAX_CHAINS: u32 = 64;
/// The most chains that run at the same time.
const MAX_BATCH: usize = 8;
/// What GET_ID answers.
const SERIAL: &[u8] = b"fuzz";

/// Runs one input.
pub fn run(bytes: &[u8]) -> Outcome {
    let mut input = Input::new(bytes);
    let mode = input.u8();
    let mut bench = Bench::new(&mut input, mode);
    if mode & 1 == 0 {
        while !input.is_empty() && bench.chains < MAX_CHAINS && !bench.is_dead {
            bench.step(&mut input);
        }
    } else {
        bench.write(0, input.rest());
        bench.batch_size = if mode & 2 == 0 { 1 } else { MAX_BATCH };
    }
    bench.serve();
    bench.finish();
    Outcome { executed: bench.executed }
}

/// A chain that was taken.
#[derive(Debug)]
struct Taken {
    /// Its head.
    head: u16,
    /// As the text reads it; `None` if it is broken.
    walked: Option<Walked>,
    /// What it is to do.
    wanted: Wanted,
    /// As the code reads it.
    chain: Option<Chain>,
}

/// Everything of one input.
struct Bench {
    /// Guest memory as the driver sees it.
    memory: Arc<GuestMemoryMmap<()>>,
    /// Guest memory as the device sees it.
    map: Rc<GuestMap>,
    /// The map as an owner.
    owner: Rc<dyn Any>,
    /// The ring.
    ring: SplitRing,
    /// Where its parts are.
    rings: [u64; 3],
    /// Entries.
    size: u16,
    /// Whether indirect descriptors were negotiated.
    indirect: bool,
    /// The device.
    device: BlockDevice<SimStorage>,
    /// How requests are judged.
    rules: Rules,
    /// What the disk shows.
    disk: Disk,
    /// Its files.
    host: SimDisk,
    /// Its shared state.
    state: Arc<ImageState>,
    /// The shape of its bitmap.
    geometry: BitmapGeometry,
    /// Whether every write is stable before it is answered.
    writethrough: bool,
    /// The driver's available index.
    next_avail: u16,
    /// The device's.
    taken: u16,
    /// What the used ring must show.
    used: u16,
    /// Where the next buffer goes.
    free: u64,
    /// Chains that run at the same time.
    batch_size: usize,
    /// Chains so far.
    chains: u32,
    /// Requests that were carried out.
    executed: u64,
    /// Whether data is still checked: not after requests of one batch shared memory.
    exact: bool,
    /// Whether the ring is beyond use.
    is_dead: bool,
    /// Seed of the next data.
    tag: u64,
}

impl Bench {
    /// Reads what disk, device and ring are like.
    fn new(input: &mut Input<'_>, mode: u8) -> Self {
        let (concurrent, read_only) = (mode & 2 != 0, mode & 0xe0 == 0xe0);
        let files = Files::new(input, concurrent, read_only);
        let ranges = REGIONS.map(|(start, len)| (GuestAddress(start), len));
        let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&ranges).expect("memory"));
        let map = GuestMap::new(GuardedMemory::new(Arc::clone(&memory)).expect("guards"));
        let ring_bits = input.u8();
        let (size, rings) = match mode & 1 {
            0 => (1 << (ring_bits % 8), RINGS),
            _ => (8, RAW_RINGS),
        };
        let start = match ring_bits >> 6 {
            0 => 0,
            1 => 0xfffd,
            2 => 0x7fff,
            _ => 1,
        };
        let start = if mode & 1 == 0 { start } else { 0 };
        let setup = RingSetup {
            size,
            descriptors: rings[0],
            available: rings[1],
            used: rings[2],
            event_idx: mode & 4 != 0,
            next_avail: start,
            next_used: start,
        };
        let ring = SplitRing::new(&map, setup).expect("a good ring");
        let config = DeviceConfig { num_queues: 1, queue_size: 128, serial: SERIAL.into() };
        let device = DeviceState::new(config, Arc::clone(files.image.state()), mode & 16 == 0);
        // Without FLUSH and CONFIG_WCE, too: every write has to be stable at once.
        let left_out = 1 << 9 | 1 << 11 | 1 << 13 | 1 << 14 | 1 << 28;
        let features = if mode & 8 == 0 { u64::MAX } else { !left_out };
        device.set_features(features);
        let sectors = to_u64(files.disk.sectors());
        let state = Arc::clone(files.image.state());
        let rules = Rules { sectors, read_only, zeroes: mode & 8 == 0 };
        Self {
            owner: map.owner(),
            map,
            ring,
            rings,
            size,
            indirect: mode & 8 == 0,
            device: BlockDevice::new(Arc::new(device), files.image),
            rules,
            disk: files.disk,
            host: files.host,
            state,
            geometry: files.geometry,
            writethrough: mode & 8 != 0 || mode & 16 != 0,
            memory,
            next_avail: start,
            taken: start,
            used: start,
            free: BUFFERS,
            batch_size: if concurrent { MAX_BATCH } else { 1 },
            chains: 0,
            executed: 0,
            exact: true,
            is_dead: false,
            tag: 1,
        }
    }

    /// Driver: writes as much of `bytes` as is memory.
    fn write(&self, address: u64, bytes: &[u8]) {
        let len = bytes.len().min(REGIONS[0].1 + REGIONS[1].1);
        self.memory.write(&bytes[..len], GuestAddress(address)).map(drop).unwrap_or_default();
    }

    /// A copy of guest memory.
    fn copy(&self) -> Memory {
        let region = |(start, len): (u64, usize)| {
            let mut bytes = vec![0; len];
            self.memory.read_slice(&mut bytes, GuestAddress(start)).expect("memory");
            bytes
        };
        Memory { regions: REGIONS.map(region) }
    }

    /// Driver: a place for a buffer; it may share memory with an older one.
    fn allocate(&mut self, len: usize) -> u64 {
        let len = to_u64(len);
        let ends = [REGIONS[1].0 + to_u64(REGIONS[1].1), REGIONS[2].0 + to_u64(REGIONS[2].1)];
        let fits = |at: u64| ends.iter().any(|end| at < *end && at + len <= *end);
        let starts = [self.free, REGIONS[2].0, BUFFERS];
        let at = starts.into_iter().find(|at| fits(*at)).unwrap_or(BUFFERS);
        self.free = at + len;
        at
    }

    /// Does one thing that the input says.
    fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() {
            byte @ 0..=239 => {
                self.offer(input, byte % 16);
                if self.batch_size == 1 || byte >= 200 {
                    self.serve();
                }
            }
            240..=247 => {
                let address = input.u16();
                self.write(address.into(), &[input.u8()]);
            }
            _ => self.serve(),
        }
    }

    /// The bytes of a request: its readable part, and how many writable ones.
    fn request(&mut self, input: &mut Input<'_>, kind: u8) -> (Vec<u8>, usize) {
        let sectors = self.rules.sectors;
        let sector = match input.u8() {
            byte @ 0..=223 => u64::from(byte) % sectors,
            byte @ 224..=231 => (sectors + u64::from(byte & 7)).saturating_sub(4),
            _ => input.edge(),
        };
        let (count, odd) = (usize::from(input.u8() % 33), input.u8());
        let len = count * SECTOR + if odd > 240 { usize::from(odd) } else { 0 };
        let status = if odd % 8 == 7 { usize::from(odd) } else { 1 };
        let header = |kind: u32, sector: u64| {
            [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
        };
        match kind {
            0..=3 => (header(0, sector), len + status),
            4..=8 => {
                self.tag += 1;
                let data = pattern(0x80, self.tag << 20, len);
                ([header(1, sector), data].concat(), status)
            }
            9 => (header(4, 0), status),
            10 => (header(8, sector), usize::from(odd) % 40),
            11..=13 => {
                let kind = if kind == 11 { 11 } else { 13 };
                let mut readable = header(kind, 0);
                for _ in 0..1 + input.u8() % 5 {
                    readable.extend(self.segment(input));
                }
                readable.truncate(readable.len() - if odd > 240 { 3 } else { 0 });
                (readable, status)
            }
            14 => (header(input.u32(), sector), len + status),
            _ => (input.take(len % 1024).to_vec(), status - 1),
        }
    }

    /// The bytes of a segment, mostly a good one.
    fn segment(&self, input: &mut Input<'_>) -> Vec<u8> {
        let byte = input.u8();
        let first = if byte < 248 { u64::from(byte) % self.rules.sectors } else { input.edge() };
        let byte = input.u8();
        let count = match byte {
            0..=239 => to_u32(usize::from(byte % 40)).min(to_u32(to_usize(self.rules.sectors))),
            _ => input.u32(),
        };
        let flags = [0, 0, 1, 1, 0, 1, 2, 1 << 31][usize::from(input.u8() % 8)];
        let left = self.rules.sectors.saturating_sub(first);
        let count = if byte < 200 { u64::from(count).min(left) } else { count.into() };
        let count = u32::try_from(count).expect("was 32 bits");
        [&first.to_le_bytes()[..], &count.to_le_bytes(), &u32::to_le_bytes(flags)].concat()
    }

    /// Driver: cuts a part of a request into buffers, and places them.
    fn place(&mut self, input: &mut Input<'_>, len: usize, cuts: usize) -> Vec<(u64, u32)> {
        let mut ends: Vec<usize> = (0..cuts).map(|_| input.below(len + 1)).collect();
        ends.push(len);
        ends.sort_unstable();
        let mut start = 0;
        let mut buffers = Vec::new();
        for end in ends {
            buffers.push((self.allocate(end - start), to_u32(end - start)));
            start = end;
        }
        buffers
    }

    /// Driver: makes a request of this kind available.
    fn offer(&mut self, input: &mut Input<'_>, kind: u8) {
        let (readable, writable) = self.request(input, kind);
        let framing = input.u8();
        let cuts = [framing >> 2 & 7, framing >> 5].map(usize::from);
        let outs = self.place(input, readable.len(), cuts[0]);
        let ins = match writable {
            0 => Vec::new(),
            len => self.place(input, len, cuts[1]),
        };
        let mut done = 0;
        for &(address, len) in &outs {
            let len = usize::try_from(len).expect("64 bits");
            self.write(address, &readable[done..done + len]);
            done += len;
        }
        for &(address, len) in &ins {
            self.write(address, &vec![0x5a; usize::try_from(len).expect("64 bits")]);
        }
        let ins = ins.into_iter().map(|(address, len)| (address, len, WRITE));
        let buffers: Vec<_> = outs.into_iter().map(|(a, len)| (a, len, 0)).chain(ins).collect();
        let breaks = (input.u8(), input.u8());
        let inside = self.indirect && (framing & 1 == 1 || buffers.len() > self.size.into());
        // Some of the buffers may come before the descriptor that names the table.
        let before = if !inside {
            buffers.len().min(self.size.into())
        } else if framing & 2 == 2 {
            1.min(usize::from(self.size) - 1)
        } else {
            0
        };
        let slots = self.slots(input.u8(), before + usize::from(inside));
        let mut outer = link(&buffers[..before], &slots, inside);
        if inside {
            let numbers: Vec<u16> = (0..).take(buffers.len() - before).collect();
            let mut table = link(&buffers[before..], &numbers, false);
            if breaks.0 & 1 == 1 {
                self.spoil(input, &mut table, breaks);
            }
            let bytes = table.iter().flat_map(|entry| encode(*entry)).collect::<Vec<u8>>();
            let address = self.allocate(bytes.len() + 16).next_multiple_of(16);
            self.write(address, &bytes);
            outer.push((address, to_u32(bytes.len()), INDIRECT, 0));
        }
        if !inside || breaks.0 & 1 == 0 {
            self.spoil(input, &mut outer, breaks);
        }
        for (slot, entry) in slots.iter().zip(&outer) {
            self.write(self.rings[0] + u64::from(*slot) * 16, &encode(*entry));
        }
        self.publish(slots[0]);
    }

    /// Distinct slots of the table, from `first` on.
    fn slots(&self, first: u8, count: usize) -> Vec<u16> {
        // Odd, and the size is a power of two: each slot comes once.
        let slot = |step: u16| (u16::from(first).wrapping_add(step.wrapping_mul(37))) % self.size;
        (0..).map(slot).take(count.max(1)).collect()
    }

    /// Breaks a chain in one place, or not at all.
    fn spoil(&self, input: &mut Input<'_>, table: &mut [Entry], (how, which): (u8, u8)) {
        if how < 176 || table.is_empty() {
            return;
        }
        let last = table.len() - 1;
        let any = usize::from(which) % table.len();
        let link = u16::from(which) % self.size;
        match how >> 1 & 15 {
            0 => (table[last].2, table[last].3) = (table[last].2 | NEXT, link),
            1 => (table[any].2, table[any].3) = (table[any].2 | NEXT, input.u16()),
            2 => table[any].0 = input.edge(),
            3 => table[any].1 = input.u32(),
            4 => table[any].2 ^= WRITE,
            5 => table[any].2 |= INDIRECT,
            6 => table[any].2 ^= NEXT,
            7 => table[any].1 = 0,
            8 => table[any].1 = table[any].1.wrapping_add(8),
            9 => (table[any].0, table[any].1) = (REGIONS[1].0 + 0x3fff, 2),
            10 => table[any].2 = input.u16(),
            11 => table[any].0 = table[0].0,
            12 => table[any].0 = self.rings[usize::from(which % 3)],
            13 => table[any].0 = REGIONS[2].0.wrapping_sub(input.edge()),
            _ => table[any].0 = u64::from(input.u16()),
        }
    }

    /// Driver: puts a head on the available ring.
    fn publish(&mut self, head: u16) {
        let slot = u64::from(self.next_avail % self.size);
        self.write(self.rings[1] + 4 + 2 * slot, &head.to_le_bytes());
        self.next_avail = self.next_avail.wrapping_add(1);
        self.write(self.rings[1] + 2, &self.next_avail.to_le_bytes());
        self.chains += 1;
        // More than the ring holds would be another program's mistake, and another test.
        if self.next_avail.wrapping_sub(self.taken) >= self.size {
            self.serve();
        }
    }
}

/// A descriptor: address, length, flags, next.
type Entry = (u64, u32, u16, u16);

/// The sixteen bytes of a descriptor.
fn encode((address, len, flags, next): Entry) -> Vec<u8> {
    let (flags, next) = (flags.to_le_bytes(), next.to_le_bytes());
    [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags, &next].concat()
}

/// Links buffers that lie in these slots; `goes_on` if one more slot follows the last.
fn link(buffers: &[(u64, u32, u16)], slots: &[u16], goes_on: bool) -> Vec<Entry> {
    let entry = |(index, (address, len, flags)): (usize, &(u64, u32, u16))| {
        let more = index + 1 < buffers.len() || goes_on;
        let next = if more { slots[index + 1] } else { 0xeeee };
        (*address, *len, flags | if more { NEXT } else { 0 }, next)
    };
    buffers.iter().enumerate().map(entry).collect()
}

impl Bench {
    /// Device: serves what is available, in batches.
    fn serve(&mut self) {
        while !self.is_dead {
            let before = self.copy();
            let mut batch = Vec::new();
            while batch.len() < self.batch_size && !self.is_dead {
                match self.ring.pop() {
                    Ok(Some(head)) => batch.push(self.take(&before, head)),
                    Ok(None) => break,
                    Err(_) => self.is_dead = true,
                }
            }
            if batch.is_empty() {
                return;
            }
            self.is_dead |= self.is_huge(&batch);
            let used = self.run_batch(&mut batch);
            let after = self.copy();
            self.check_memory(&batch, &before, &after);
            self.check(&batch, &used, &after);
            self.report(&used);
        }
    }

    /// Whether chains move so much that this is to be the last batch: the same memory many times.
    fn is_huge(&self, batch: &[Taken]) -> bool {
        let parts = batch.iter().filter_map(|taken| taken.walked.as_ref());
        let bytes: u64 =
            parts.map(|walked| Walked::len(&walked.readable) + Walked::len(&walked.writable)).sum();
        // The raw bytes of rings may make any number of chains available.
        bytes > 1 << 20 || self.taken.wrapping_sub(self.next_avail) > 4096
    }

    /// Takes a chain, by the text and by the code.
    fn take(&mut self, before: &Memory, head: u16) -> Taken {
        let slot = u64::from(self.taken % self.size);
        let offered = before.number(self.rings[1] + 4 + 2 * slot, 2);
        assert_eq!(u64::from(head), offered, "head");
        self.taken = self.taken.wrapping_add(1);
        let walked = before.walk(self.rings[0], self.size, self.indirect, head);
        let mut list = Rc::new(IoMemory::default());
        let table = (self.ring.descriptors(), self.ring.size());
        let chain = chain::walk(&self.map, &self.owner, table, self.indirect, head, &mut list);
        let wanted = match (&walked, &chain) {
            (Some(walked), Ok(chain)) => {
                assert_eq!(to_u64(chain.readable.len()), Walked::len(&walked.readable), "readable");
                assert_eq!(to_u64(chain.writable.len()), Walked::len(&walked.writable), "writable");
                // What is longer than the disk is refused without a look at all of it.
                let readable = before.gather_up_to(&walked.readable, 1 << 17);
                self.rules.judge(&readable, Walked::len(&walked.writable))
            }
            (None, Err(_)) => Wanted::Silent,
            (walked, chain) => panic!("chain {head}: the text reads {walked:?}, we {chain:?}"),
        };
        Taken { head, walked, wanted, chain: chain.ok() }
    }

    /// Runs the chains of a batch. Returns their used entries in the order of the batch.
    fn run_batch(&mut self, batch: &mut [Taken]) -> Vec<Used> {
        let mut used: Vec<Option<Used>> = vec![None; batch.len()];
        let device = &self.device;
        let mut pool = TaskPool::new(MAX_BATCH, Box::new(|| {}));
        for (index, taken) in batch.iter_mut().enumerate() {
            match taken.chain.take() {
                None => used[index] = Some(Used::untouched(taken.head)),
                Some(chain) if self.batch_size == 1 => {
                    used[index] = Some(block_on(device.serve(chain)));
                }
                Some(chain) => {
                    let task = async move { (index, device.serve(chain).await) };
                    if let Some((index, entry)) = pool.start(task) {
                        used[index] = Some(entry);
                    }
                }
            }
        }
        let mut polls = 0;
        while pool.running() > 0 {
            pool.poll_ready(|(index, entry)| used[index] = Some(entry));
            polls += 1;
            assert!(polls < 10_000_000, "a request does not end");
        }
        used.into_iter().map(|entry| entry.expect("each chain was served")).collect()
    }

    /// Checks that only device-writable memory of sound chains has changed.
    fn check_memory(&self, batch: &[Taken], before: &Memory, after: &Memory) {
        let mut wanted = before.clone();
        for walked in batch.iter().filter_map(|taken| taken.walked.as_ref()) {
            for (address, len) in &walked.writable {
                wanted.copy_from(after, *address, *len);
            }
        }
        assert!(wanted == *after, "memory was written that is not the device's to write");
    }

    /// Checks the answers and what they did.
    fn check(&mut self, batch: &[Taken], used: &[Used], after: &Memory) {
        let mut changes = Vec::new();
        for (taken, used) in batch.iter().zip(used) {
            assert_eq!(taken.head, used.head, "head of the used entry");
            let len = taken.walked.as_ref().map_or(0, |walked| Walked::len(&walked.writable));
            let len = u32::try_from(len).unwrap_or(u32::MAX);
            assert_eq!(used.len, len, "used length of {taken:?}");
            match &taken.wanted {
                Wanted::Write(sector, bytes) => changes.push(Change::Write(*sector, bytes.clone())),
                Wanted::Zero(ranges, discard) => {
                    changes.push(Change::Zero(ranges.clone(), *discard));
                }
                _ => {}
            }
        }
        self.exact &= batch.len() == 1 || !share_memory(batch);
        let additions = if batch.len() == 1 { <_>::default() } else { Disk::additions(&changes) };
        for taken in batch {
            self.check_answer(taken, &additions, after, batch.len() == 1);
        }
        if self.exact {
            self.disk.apply(Disk::additions(&changes));
        }
    }

    /// Checks status and data of one answer.
    fn check_answer(
        &mut self,
        taken: &Taken,
        additions: &Additions,
        after: &Memory,
        is_alone: bool,
    ) {
        let Some(walked) = &taken.walked else { return };
        let Some((data, status)) = after.ends_of(&walked.writable) else { return };
        if overlap(&walked.writable) || !self.exact {
            self.executed += u64::from(status == 0);
            return;
        }
        if let Wanted::Refused(right) = &taken.wanted {
            assert!(right.contains(&status), "status {status}, not one of {right:?}");
        } else {
            assert_eq!(status, 0, "status of {taken:?}");
            self.executed += 1;
        }
        match &taken.wanted {
            Wanted::Read(sector, len) => {
                assert_eq!(data.len(), *len);
                self.disk.check(*sector, &data, additions, "read");
                if is_alone {
                    self.disk.decide(*sector, &data);
                }
            }
            Wanted::Serial => {
                let mut serial = SERIAL.to_vec();
                serial.resize(20, 0);
                serial.resize(data.len(), 0);
                assert_eq!(data, serial, "serial");
            }
            _ => assert!(data.iter().all(|byte| *byte == 0), "data before the status byte"),
        }
    }

    /// Device: publishes the answers, which have to show in the used ring.
    fn report(&mut self, used: &[Used]) {
        for entry in used {
            self.ring.push_used(entry.head, entry.len);
        }
        self.ring.publish();
        let memory = self.copy();
        for entry in used {
            let slot = u64::from(self.used % self.size);
            let at = self.rings[2] + 4 + 8 * slot;
            let newer = used.len() > usize::from(self.size);
            let shown = (memory.number(at, 4), memory.number(at + 4, 4));
            assert!(newer || shown == (entry.head.into(), entry.len.into()), "used entry");
            self.used = self.used.wrapping_add(1);
        }
        assert_eq!(memory.number(self.rings[2] + 2, 2), u64::from(self.used), "used index");
    }

    /// Compares the whole disk, as a reader sees it and as its files hold it after a flush.
    fn finish(&mut self) {
        let file = |number| self.host.file(number);
        let backing = file(2).content().len();
        let chain = (backing > 0).then(|| BackingChain::raw(file(2), to_u64(backing)));
        let image = Image::new(Arc::clone(&self.state), file(0), Some(file(1)), chain);
        let buffer = IoBuffer::zeroed(self.disk.sectors() * SECTOR);
        block_on(image.read(0, buffer.clone())).expect("the whole disk can be read");
        if self.exact {
            self.disk.check(0, &buffer.to_vec(), &Additions::new(), "at the end");
        }
        let before = Files::flat_view(&self.host, &self.geometry);
        block_on(image.flush()).expect("no faults");
        let flat = Files::flat_view(&self.host, &self.geometry);
        let names = "the files after a flush";
        assert!(flat == buffer.to_vec(), "{names} hold something else than the disk shows");
        self.host.power_cut();
        let flat = Files::flat_view(&self.host, &self.geometry);
        assert!(flat == buffer.to_vec(), "{names} and a power cut");
        // A write-through device has told the driver that everything was stable.
        assert!(!self.writethrough || before == flat, "write-through, but not stable");
    }
}

/// Whether any two of these buffers share a byte.
fn overlap(buffers: &[(u64, u32)]) -> bool {
    let mut sorted: Vec<_> = buffers.iter().filter(|(_, len)| *len > 0).collect();
    sorted.sort_unstable();
    sorted.windows(2).any(|pair| pair[0].0 + u64::from(pair[0].1) > pair[1].0)
}

/// Whether a chain's writable memory is used by another chain of the batch, too.
fn share_memory(batch: &[Taken]) -> bool {
    let chains: Vec<&Walked> = batch.iter().filter_map(|taken| taken.walked.as_ref()).collect();
    let all: Vec<_> = chains.iter().flat_map(|chain| chain.writable.clone()).collect();
    // What is read may be read by several, but not be written by any.
    let is_written = |buffer: &(u64, u32)| all.iter().any(|other| overlap(&[*buffer, *other]));
    overlap(&all) || chains.iter().any(|chain| chain.readable.iter().any(is_written))
}
