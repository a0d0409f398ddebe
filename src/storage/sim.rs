//! A simulated disk: what the tests of the copy-on-write core run on.
//!
//! A [`SimDisk`] holds files with a volatile cache. A write lands in the cache; a sync makes
//! durable what had completed when it was *called*; a power cut keeps of everything else any
//! subset, sector by sector. Operations take a random number of polls, so concurrent requests
//! interleave, and any operation can be told to fail. Everything random comes from one seed.
//!
//! What it does not model: loss of a file's length (`set_len` is durable at once), sectors torn
//! below 512 bytes, a medium that lies about a sync.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;
use std::task::Poll;

use fastrand::Rng;

use super::{Alignment, IoBuffer, Storage, ZeroMode};
use crate::units::{ByteRange, SECTOR_SIZE};

/// Sector size as a buffer length.
const SECTOR_LEN: usize = 512;

/// The content of one sector.
type Sector = [u8; SECTOR_LEN];

/// Sectors by number; absent ones are zeros.
type Sectors = BTreeMap<u64, Sector>;

/// Which operation is to go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Fails with this errno; nothing is done.
    Error(i32),
    /// A transfer moves at most this many bytes; a sync or a zeroing is not affected.
    Short(usize),
}

/// One operation, as the log keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// A read of this range.
    Read(ByteRange),
    /// A write of this range, logged when it has landed in the cache.
    Write(ByteRange),
    /// This range made to read zeros, logged when it has landed in the cache.
    Zero(ByteRange),
    /// A sync, logged when it was called.
    SyncStart,
    /// A sync, logged when it has completed.
    SyncEnd,
}

/// One file of the disk.
#[derive(Debug, Default)]
struct SimFile {
    /// Length in bytes.
    len: u64,
    /// What survives a power cut for certain.
    durable: Sectors,
    /// Writes not covered by a sync, oldest first: when they landed, where, and what.
    pending: Vec<(u64, u64, Sector)>,
}

impl SimFile {
    /// The sector as a read sees it.
    fn sector(&self, number: u64) -> Sector {
        let latest = self.pending.iter().rev().find(|(_, n, _)| *n == number);
        latest
            .map(|(_, _, bytes)| *bytes)
            .or_else(|| self.durable.get(&number).copied())
            .unwrap_or([0; SECTOR_LEN])
    }

    /// Copies bytes out. The range lies inside the file.
    fn read(&self, offset: u64, bytes: &mut [u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let start = usize::try_from(at % SECTOR_SIZE).unwrap_or_default();
            let len = (SECTOR_LEN - start).min(bytes.len() - done);
            let sector = self.sector(at / SECTOR_SIZE);
            bytes[done..done + len].copy_from_slice(&sector[start..start + len]);
            done += len;
        }
    }

    /// Puts bytes into the cache at time `now`.
    fn write(&mut self, now: u64, offset: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let start = usize::try_from(at % SECTOR_SIZE).unwrap_or_default();
            let len = (SECTOR_LEN - start).min(bytes.len() - done);
            let mut sector = self.sector(at / SECTOR_SIZE);
            sector[start..start + len].copy_from_slice(&bytes[done..done + len]);
            self.pending.push((now, at / SECTOR_SIZE, sector));
            done += len;
        }
        self.len = self.len.max(offset + bytes.len() as u64);
    }

    /// Makes durable what landed before `now`.
    fn sync(&mut self, now: u64) {
        let (covered, later): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.pending).into_iter().partition(|(when, _, _)| *when < now);
        self.pending = later;
        for (_, number, bytes) in covered {
            self.durable.insert(number, bytes);
        }
    }

    /// Loses power: of every unsynced sector any one of its versions may have got through.
    fn cut(&mut self, rng: &mut Rng) {
        let pending = std::mem::take(&mut self.pending);
        let mut versions: BTreeMap<u64, Vec<Sector>> = BTreeMap::new();
        for (_, number, bytes) in pending {
            versions.entry(number).or_default().push(bytes);
        }
        for (number, versions) in versions {
            let choice = rng.usize(0..=versions.len());
            if let Some(bytes) = versions.get(choice) {
                self.durable.insert(number, *bytes);
            }
        }
    }
}

/// The disk's state.
#[derive(Debug)]
struct State {
    /// Files by number.
    files: Vec<SimFile>,
    /// Source of everything random.
    rng: Rng,
    /// The most polls that an operation takes.
    max_delay: u32,
    /// Operations started so far; also the clock.
    started: u64,
    /// The operation that goes wrong, counted from 0, and how.
    fault: Option<(u64, Fault)>,
    /// Whether every operation from then on goes wrong too.
    fault_is_lasting: bool,
    /// What was done, in order, by file.
    log: Vec<(usize, Operation)>,
}

/// A simulated disk with some files.
#[derive(Debug, Clone)]
pub struct SimDisk {
    /// Shared with the storages of the files.
    state: Rc<RefCell<State>>,
}

impl SimDisk {
    /// An empty disk whose random choices follow from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let state = State {
            files: Vec::new(),
            rng: Rng::with_seed(seed),
            max_delay: 3,
            started: 0,
            fault: None,
            fault_is_lasting: false,
            log: Vec::new(),
        };
        Self { state: Rc::new(RefCell::new(state)) }
    }

    /// Adds a file with this content, durable already.
    #[must_use]
    pub fn create(&self, content: &[u8]) -> SimStorage {
        let mut file = SimFile::default();
        file.write(0, 0, content);
        file.sync(1);
        let mut state = self.state.borrow_mut();
        state.files.push(file);
        SimStorage { disk: self.clone(), file: state.files.len() - 1 }
    }

    /// Loses power. Storages stay usable afterwards, as after a reboot.
    pub fn power_cut(&self) {
        let state = &mut *self.state.borrow_mut();
        for file in &mut state.files {
            file.cut(&mut state.rng);
        }
    }

    /// Lets operation number `index` (from 0, reads included) go wrong, and if `lasting` every
    /// later one too.
    pub fn set_fault(&self, index: u64, fault: Fault, lasting: bool) {
        let mut state = self.state.borrow_mut();
        state.fault = Some((index, fault));
        state.fault_is_lasting = lasting;
    }

    /// No faults any more.
    pub fn clear_fault(&self) {
        self.state.borrow_mut().fault = None;
    }

    /// Operations started so far.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.state.borrow().started
    }

    /// What was done so far: the file's number in order of creation, and what.
    #[must_use]
    pub fn log(&self) -> Vec<(usize, Operation)> {
        self.state.borrow().log.clone()
    }

    /// Counts an operation in. Returns its time and what is to go wrong with it.
    fn start(&self) -> (u64, Option<Fault>) {
        let mut state = self.state.borrow_mut();
        let index = state.started;
        state.started += 1;
        let fault =
            state.fault.filter(|(at, _)| *at == index || (state.fault_is_lasting && index > *at));
        (index, fault.map(|(_, fault)| fault))
    }

    /// Lets other tasks run, a random number of times.
    async fn delay(&self) {
        let mut left = {
            let mut state = self.state.borrow_mut();
            let most = state.max_delay;
            state.rng.u32(0..=most)
        };
        std::future::poll_fn(|context| {
            if left == 0 {
                return Poll::Ready(());
            }
            left -= 1;
            context.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }

    /// Adds to the log.
    fn record(&self, file: usize, operation: Operation) {
        self.state.borrow_mut().log.push((file, operation));
    }
}

/// One file of a [`SimDisk`].
#[derive(Debug, Clone)]
pub struct SimStorage {
    /// The disk.
    disk: SimDisk,
    /// Number of the file.
    file: usize,
}

impl SimStorage {
    /// The whole content as a read sees it.
    #[must_use]
    pub fn content(&self) -> Vec<u8> {
        let state = self.disk.state.borrow();
        let file = &state.files[self.file];
        let mut bytes = vec![0; usize::try_from(file.len).expect("simulated files are small")];
        file.read(0, &mut bytes);
        bytes
    }

    /// Starts an operation: its time, and how many of `len` bytes it may move.
    fn start(&self, len: usize) -> io::Result<(u64, usize)> {
        match self.disk.start() {
            (_, Some(Fault::Error(code))) => Err(io::Error::from_raw_os_error(code)),
            (now, Some(Fault::Short(most))) => Ok((now, len.min(most))),
            (now, None) => Ok((now, len)),
        }
    }

    /// Lets `bytes` land in the cache.
    fn land(&self, offset: u64, bytes: &[u8]) {
        let state = &mut *self.disk.state.borrow_mut();
        state.files[self.file].write(state.started, offset, bytes);
    }
}

impl Storage for SimStorage {
    async fn read(&self, offset: u64, buffer: IoBuffer) -> io::Result<usize> {
        let (_, len) = self.start(buffer.len())?;
        self.disk.delay().await;
        let left = self.file_len()?.saturating_sub(offset);
        let mut bytes = vec![0; len.min(usize::try_from(left).unwrap_or(usize::MAX))];
        self.disk.state.borrow().files[self.file].read(offset, &mut bytes);
        buffer.copy_from(0, &bytes);
        self.disk.record(self.file, Operation::Read(ByteRange::between(offset, offset + left)));
        Ok(bytes.len())
    }

    async fn write(&self, offset: u64, buffer: IoBuffer) -> io::Result<usize> {
        let (_, len) = self.start(buffer.len())?;
        self.disk.delay().await;
        let bytes = buffer.slice(0, len).to_vec();
        self.land(offset, &bytes);
        let range = ByteRange::between(offset, offset + len as u64);
        self.disk.record(self.file, Operation::Write(range));
        self.disk.delay().await;
        Ok(len)
    }

    async fn zero(&self, range: ByteRange, _mode: ZeroMode) -> io::Result<()> {
        self.start(0)?;
        self.disk.delay().await;
        let range = range.intersect(ByteRange::between(0, self.file_len()?));
        let zeros = vec![0; usize::try_from(range.len()).map_err(io::Error::other)?];
        self.land(range.start(), &zeros);
        self.disk.record(self.file, Operation::Zero(range));
        self.disk.delay().await;
        Ok(())
    }

    async fn sync(&self) -> io::Result<()> {
        let (now, _) = self.start(0)?;
        self.disk.record(self.file, Operation::SyncStart);
        self.disk.delay().await;
        self.disk.state.borrow_mut().files[self.file].sync(now + 1);
        self.disk.record(self.file, Operation::SyncEnd);
        Ok(())
    }

    fn file_len(&self) -> io::Result<u64> {
        Ok(self.disk.state.borrow().files[self.file].len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let file = &mut self.disk.state.borrow_mut().files[self.file];
        let kept = len.div_ceil(SECTOR_SIZE);
        file.durable.retain(|number, _| *number < kept);
        file.pending.retain(|(_, number, _)| *number < kept);
        file.len = len;
        Ok(())
    }

    fn alignment(&self) -> Alignment {
        Alignment::NONE
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<ByteRange>> {
        let len = self.file_len()?;
        Ok((offset < len).then(|| ByteRange::between(offset, len)))
    }
}
