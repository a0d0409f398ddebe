//! A simulated disk: what the tests of the copy-on-write core run on.
//!
//! A [`SimDisk`] holds files with a volatile cache. A write lands in the cache; a sync makes
//! durable what had completed when it was *called*; a power cut keeps of everything else any
//! subset, sector by sector. What a failed sync should have made durable, no later sync makes
//! durable either: the host's cache takes it for clean. Operations take a random number of polls,
//! so concurrent requests interleave; any operation can be told to fail, and the power can go
//! before any operation. An observer sees each change before it lands. Everything random comes
//! from one seed.
//!
//! A changed length is lost and kept like the sectors, whole: the file has one of its lengths since
//! the last sync, and what a cut-off part held comes back with an older one. What a write adds
//! to a file's length is kept at once.
//!
//! What it does not model: sectors torn below 512 bytes, a medium that lies about a sync.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
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
    /// A transfer leaves out its last byte, if it has another one; nothing else is affected.
    ShortByOne,
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
    /// The file cut or grown to this many bytes.
    SetLen(u64),
    /// A sync, logged when it was called.
    SyncStart,
    /// A sync, logged when it has completed.
    SyncEnd,
}

/// One file of the disk.
#[derive(Debug, Default, Clone)]
struct SimFile {
    /// Length in bytes.
    len: u64,
    /// What survives a power cut for certain.
    durable: Sectors,
    /// What no sync has made durable, by sector, oldest version first; no list is empty.
    pending: BTreeMap<u64, Vec<Version>>,
    /// Changes of the length that no sync has made durable, oldest first.
    resizes: Vec<Resize>,
}

/// A change of a file's length.
#[derive(Debug, Clone)]
struct Resize {
    /// When it landed; [`NEVER_DURABLE`] once a sync that should have covered it has failed.
    landed: u64,
    /// The length before, in bytes.
    before: u64,
    /// What the part that was cut off would come back with.
    cut_off: Sectors,
}

/// What one write left in a sector.
#[derive(Debug, Clone)]
struct Version {
    /// When it landed; [`NEVER_DURABLE`] once a sync that should have covered it has failed.
    landed: u64,
    /// The whole sector after the write.
    bytes: Sector,
}

/// A time that no sync covers.
const NEVER_DURABLE: u64 = u64::MAX;

impl SimFile {
    /// The sector as a read sees it.
    fn sector(&self, number: u64) -> Sector {
        match self.pending.get(&number).and_then(|versions| versions.last()) {
            Some(version) => version.bytes,
            None => self.durable_sector(number),
        }
    }

    /// The sector as it is without what only the cache has.
    fn durable_sector(&self, number: u64) -> Sector {
        self.durable.get(&number).copied().unwrap_or([0; SECTOR_LEN])
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
            let versions = self.pending.entry(at / SECTOR_SIZE).or_default();
            versions.push(Version { landed: now, bytes: sector });
            done += len;
        }
        self.len = self.len.max(offset + bytes.len() as u64);
    }

    /// Makes durable what landed before `now`.
    fn sync(&mut self, now: u64) {
        let durable = &mut self.durable;
        self.pending.retain(|number, versions| {
            // Versions older than a durable one are gone, whatever became of their own sync.
            if let Some(last) = versions.iter().rposition(|version| version.landed < now) {
                durable.insert(*number, versions[last].bytes);
                versions.drain(..=last);
            }
            !versions.is_empty()
        });
        if let Some(last) = self.resizes.iter().rposition(|resize| resize.landed < now) {
            self.resizes.drain(..=last);
        }
    }

    /// Fails to make durable what landed before `now`: no later sync will do it.
    fn fail_sync(&mut self, now: u64) {
        for version in self.pending.values_mut().flatten() {
            if version.landed < now {
                version.landed = NEVER_DURABLE;
            }
        }
        for resize in &mut self.resizes {
            if resize.landed < now {
                resize.landed = NEVER_DURABLE;
            }
        }
    }

    /// Cuts or grows the file at time `now`. What is new reads zeros.
    fn set_len(&mut self, now: u64, len: u64) {
        let before = self.len;
        let end = len.min(before);
        let mut cut_off = self.durable.split_off(&end.div_ceil(SECTOR_SIZE));
        self.pending.split_off(&end.div_ceil(SECTOR_SIZE));
        // What the last sector holds behind the end must not show when the file grows.
        let (last, used) = (end / SECTOR_SIZE, usize::try_from(end % SECTOR_SIZE).unwrap_or(0));
        if used > 0 {
            if let Some(sector) = self.durable.get_mut(&last) {
                cut_off.insert(last, *sector);
                sector[used..].fill(0);
            }
            for version in self.pending.get_mut(&last).into_iter().flatten() {
                version.bytes[used..].fill(0);
            }
        }
        self.resizes.push(Resize { landed: now, before, cut_off });
        self.len = len;
    }

    /// How many versions each unsynced thing has: the sectors, then the length.
    fn unsynced(&self) -> impl Iterator<Item = usize> {
        let lengths = (!self.resizes.is_empty()).then_some(self.resizes.len());
        self.pending.values().map(Vec::len).chain(lengths)
    }

    /// Loses power: of every unsynced sector the version that `choose` names gets through, given
    /// how many there are; any higher number keeps the durable content. So it goes with the length.
    fn cut(&mut self, choose: &mut impl FnMut(usize) -> usize) {
        for (number, versions) in std::mem::take(&mut self.pending) {
            if let Some(version) = versions.get(choose(versions.len())) {
                self.durable.insert(number, version.bytes);
            }
        }
        if !self.resizes.is_empty() {
            let chosen = choose(self.resizes.len());
            let kept = if chosen < self.resizes.len() { chosen + 1 } else { 0 };
            for resize in self.resizes.split_off(kept).into_iter().rev() {
                self.len = resize.before;
                self.durable.extend(resize.cut_off);
            }
            self.resizes.clear();
            self.durable.split_off(&self.len.div_ceil(SECTOR_SIZE));
        }
    }
}

/// A kind of operation, to aim a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OperationKind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Zeroing.
    Zero,
    /// Changes of the length.
    SetLen,
    /// Syncs.
    Sync,
    /// Looks for data among holes; only if [`SimDisk::count_looks`] says so.
    Look,
}

/// Sees a change before it lands: the file's number, what, and the bytes of a write.
pub type Observer = Box<dyn FnMut(usize, Operation, &[u8])>;

/// The disk's state.
#[derive(Debug, Clone)]
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
    /// Every operation of this kind on this file goes wrong too, and how.
    aimed_fault: Option<(usize, OperationKind, Fault)>,
    /// What a fault has met, in order.
    faulted: Vec<(usize, OperationKind)>,
    /// Whether looks for data are operations.
    counts_looks: bool,
    /// The operation that is never carried out, like all after it: the power goes there.
    stop: Option<u64>,
    /// Whether an operation has met `stop`.
    is_stopped: bool,
    /// What was done, in order, by file.
    log: Vec<(usize, Operation)>,
}

impl State {
    /// What is to go wrong with operation number `index`.
    fn fault_of(&self, index: u64, file: usize, kind: OperationKind) -> Option<Fault> {
        let aimed = self.aimed_fault.filter(|(at, what, _)| (*at, *what) == (file, kind));
        let hits = |at: u64| at == index || (self.fault_is_lasting && index > at);
        let counted = self.fault.filter(|(at, _)| hits(*at));
        counted.map(|(_, fault)| fault).or(aimed.map(|(_, _, fault)| fault))
    }
}

/// A simulated disk with some files.
#[derive(Clone)]
pub struct SimDisk {
    /// Shared with the storages of the files.
    state: Rc<RefCell<State>>,
    /// Who sees each change; never called while `state` is borrowed.
    observer: Rc<RefCell<Option<Observer>>>,
}

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimDisk").field("state", &self.state).finish_non_exhaustive()
    }
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
            aimed_fault: None,
            faulted: Vec::new(),
            counts_looks: false,
            stop: None,
            is_stopped: false,
            log: Vec::new(),
        };
        Self { state: Rc::new(RefCell::new(state)), observer: Rc::default() }
    }

    /// A disk of its own in the same state, without faults, stop and observer.
    #[must_use]
    pub fn fork(&self) -> Self {
        let mut state = self.state.borrow().clone();
        (state.fault, state.aimed_fault, state.stop) = (None, None, None);
        state.is_stopped = false;
        Self { state: Rc::new(RefCell::new(state)), observer: Rc::default() }
    }

    /// The file with this number, counted from 0 in order of creation.
    #[must_use]
    pub fn file(&self, number: usize) -> SimStorage {
        assert!(number < self.state.borrow().files.len(), "no such file");
        SimStorage { disk: self.clone(), file: number }
    }

    /// Sets the most polls that one delay of an operation takes; 0 makes every operation ready at
    /// its first poll.
    pub fn set_max_delay(&self, polls: u32) {
        self.state.borrow_mut().max_delay = polls;
    }

    /// Lets `observer` see every change from now on. It may look at the disk, not change it.
    pub fn observe(&self, observer: Observer) {
        *self.observer.borrow_mut() = Some(observer);
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
        let mut rng = self.state.borrow_mut().rng.fork();
        self.power_cut_choosing(|versions| rng.usize(0..=versions));
    }

    /// Loses power as [`SimDisk::power_cut`], with `choose` in place of chance: for every unsynced
    /// sector, by file and number, it is told how many versions there are and names the one that
    /// got through, oldest first; that number itself stands for none of them. After the sectors of
    /// a file comes its length, if that is unsynced.
    pub fn power_cut_choosing(&self, mut choose: impl FnMut(usize) -> usize) {
        for file in &mut self.state.borrow_mut().files {
            file.cut(&mut choose);
        }
    }

    /// How many versions every unsynced sector and length has, in the order of
    /// [`SimDisk::power_cut_choosing`].
    #[must_use]
    pub fn unsynced(&self) -> Vec<usize> {
        let state = self.state.borrow();
        state.files.iter().flat_map(SimFile::unsynced).collect()
    }

    /// Lets the power go before operation number `index`: it and all after it stay unfinished for
    /// ever. Whoever drives the tasks asks [`SimDisk::is_stopped`], and drops them.
    pub fn stop_at(&self, index: u64) {
        self.state.borrow_mut().stop = Some(index);
    }

    /// Whether an operation has met the stop.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.state.borrow().is_stopped
    }

    /// Lets every operation of `kind` on file number `file` go wrong.
    pub fn aim_fault(&self, file: usize, kind: OperationKind, fault: Fault) {
        self.state.borrow_mut().aimed_fault = Some((file, kind, fault));
    }

    /// Lets operation number `index` (from 0, reads included) go wrong, and if `lasting` every
    /// later one too.
    pub fn set_fault(&self, index: u64, fault: Fault, lasting: bool) {
        let mut state = self.state.borrow_mut();
        state.fault = Some((index, fault));
        state.fault_is_lasting = lasting;
    }

    /// What a fault has met so far: the file's number in order of creation, and what.
    #[must_use]
    pub fn faulted(&self) -> Vec<(usize, OperationKind)> {
        self.state.borrow().faulted.clone()
    }

    /// Lets looks for data count as operations from now on, so that they can go wrong too. They
    /// change nothing, so whoever only cuts the power need not care.
    pub fn count_looks(&self) {
        self.state.borrow_mut().counts_looks = true;
    }

    /// No faults any more.
    pub fn clear_fault(&self) {
        let mut state = self.state.borrow_mut();
        (state.fault, state.aimed_fault) = (None, None);
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

    /// Counts an operation in. Returns its time and what is to go wrong with it; `None` if the
    /// power is gone.
    fn count(&self, file: usize, kind: OperationKind) -> Option<(u64, Option<Fault>)> {
        let state = &mut *self.state.borrow_mut();
        let index = state.started;
        state.is_stopped |= state.stop.is_some_and(|stop| index >= stop);
        state.started += u64::from(!state.is_stopped);
        let fault = state.fault_of(index, file, kind).filter(|_| !state.is_stopped);
        state.faulted.extend(fault.map(|_| (file, kind)));
        (!state.is_stopped).then_some((index, fault))
    }

    /// The same. Never ready once the power is gone.
    async fn start(&self, file: usize, kind: OperationKind) -> (u64, Option<Fault>) {
        match self.count(file, kind) {
            Some(started) => started,
            None => std::future::pending().await,
        }
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

    /// Shows a change to the observer.
    fn show(&self, file: usize, operation: Operation, bytes: &[u8]) {
        if let Some(observer) = self.observer.borrow_mut().as_mut() {
            observer(file, operation, bytes);
        }
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

    /// `len` bytes from byte `offset` on as a read sees them; zeros past the end of the file.
    #[must_use]
    pub fn content_at(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.disk.state.borrow().files[self.file].read(offset, &mut bytes);
        bytes
    }

    /// What a power cut would leave for certain of the sector with this number.
    #[must_use]
    pub fn durable_sector(&self, number: u64) -> [u8; SECTOR_LEN] {
        self.disk.state.borrow().files[self.file].durable_sector(number)
    }

    /// Starts an operation: its time, and how many of `len` bytes it may move.
    async fn start(&self, kind: OperationKind, len: usize) -> io::Result<(u64, usize)> {
        match self.disk.start(self.file, kind).await {
            (now, Some(Fault::Error(code))) => {
                // Failing takes time too: others come meanwhile, and wait.
                self.disk.delay().await;
                if kind == OperationKind::Sync {
                    self.disk.state.borrow_mut().files[self.file].fail_sync(now + 1);
                }
                Err(io::Error::from_raw_os_error(code))
            }
            (now, Some(Fault::Short(most))) => Ok((now, len.min(most))),
            (now, Some(Fault::ShortByOne)) => Ok((now, len.saturating_sub(1).max(len.min(1)))),
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
        let (_, len) = self.start(OperationKind::Read, buffer.len()).await?;
        self.disk.delay().await;
        let left = self.file_len()?.saturating_sub(offset);
        let mut bytes = vec![0; len.min(usize::try_from(left).unwrap_or(usize::MAX))];
        self.disk.state.borrow().files[self.file].read(offset, &mut bytes);
        buffer.copy_from(0, &bytes);
        let range = ByteRange::between(offset, offset + bytes.len() as u64);
        self.disk.record(self.file, Operation::Read(range));
        Ok(bytes.len())
    }

    async fn write(&self, offset: u64, buffer: IoBuffer) -> io::Result<usize> {
        let (_, len) = self.start(OperationKind::Write, buffer.len()).await?;
        self.disk.delay().await;
        let bytes = buffer.slice(0, len).to_vec();
        let range = ByteRange::between(offset, offset + len as u64);
        self.disk.show(self.file, Operation::Write(range), &bytes);
        self.land(offset, &bytes);
        self.disk.record(self.file, Operation::Write(range));
        self.disk.delay().await;
        Ok(len)
    }

    async fn zero(&self, range: ByteRange, _mode: ZeroMode) -> io::Result<()> {
        self.start(OperationKind::Zero, 0).await?;
        self.disk.delay().await;
        let range = range.intersect(ByteRange::between(0, self.file_len()?));
        let zeros = vec![0; usize::try_from(range.len()).map_err(io::Error::other)?];
        self.disk.show(self.file, Operation::Zero(range), &zeros);
        self.land(range.start(), &zeros);
        self.disk.record(self.file, Operation::Zero(range));
        self.disk.delay().await;
        Ok(())
    }

    async fn sync(&self) -> io::Result<()> {
        let (now, _) = self.start(OperationKind::Sync, 0).await?;
        self.disk.show(self.file, Operation::SyncStart, &[]);
        self.disk.record(self.file, Operation::SyncStart);
        self.disk.delay().await;
        self.disk.state.borrow_mut().files[self.file].sync(now + 1);
        self.disk.show(self.file, Operation::SyncEnd, &[]);
        self.disk.record(self.file, Operation::SyncEnd);
        Ok(())
    }

    fn file_len(&self) -> io::Result<u64> {
        Ok(self.disk.state.borrow().files[self.file].len)
    }

    /// Takes no time. Once the power is gone it fails, for want of a way to wait; whoever drives
    /// the task then finds the disk stopped.
    fn set_len(&self, len: u64) -> io::Result<()> {
        let Some((_, fault)) = self.disk.count(self.file, OperationKind::SetLen) else {
            return Err(io::Error::other("the power is gone"));
        };
        if let Some(Fault::Error(code)) = fault {
            return Err(io::Error::from_raw_os_error(code));
        }
        self.disk.show(self.file, Operation::SetLen(len), &[]);
        let state = &mut *self.disk.state.borrow_mut();
        state.files[self.file].set_len(state.started, len);
        state.log.push((self.file, Operation::SetLen(len)));
        Ok(())
    }

    fn alignment(&self) -> Alignment {
        Alignment::NONE
    }

    /// Every sector of zeros is a hole, so that nobody gets away with taking holes for something
    /// that only the file system makes.
    fn next_data(&self, offset: u64) -> io::Result<Option<ByteRange>> {
        let counts = self.disk.state.borrow().counts_looks;
        let started = counts.then(|| self.disk.count(self.file, OperationKind::Look)).flatten();
        if let Some((_, Some(Fault::Error(code)))) = started {
            return Err(io::Error::from_raw_os_error(code));
        }
        let state = self.disk.state.borrow();
        let file = &state.files[self.file];
        let end = file.len.div_ceil(SECTOR_SIZE);
        let is_data = |number: &u64| file.sector(*number) != [0; SECTOR_LEN];
        let Some(first) = (offset / SECTOR_SIZE..end).find(is_data) else { return Ok(None) };
        let behind = (first..end).find(|number| !is_data(number)).unwrap_or(end);
        let range = ByteRange::between(first * SECTOR_SIZE, behind * SECTOR_SIZE);
        let range = range.intersect(ByteRange::between(offset, file.len));
        Ok((!range.is_empty()).then_some(range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::block_on;

    /// A file of three sectors, each full of its number.
    fn file() -> (SimDisk, SimStorage) {
        let disk = SimDisk::new(1);
        disk.set_max_delay(0);
        let content: Vec<u8> = (1..=3).flat_map(|byte| [byte; SECTOR_LEN]).collect();
        let file = disk.create(&content);
        (disk, file)
    }

    #[test]
    fn a_length_without_a_sync_may_be_lost_and_brings_back_what_was_cut_off() {
        let (disk, file) = file();
        file.set_len(512).unwrap();
        file.set_len(1536).unwrap();
        let grown: Vec<u8> = [1, 0, 0].into_iter().flat_map(|byte| [byte; SECTOR_LEN]).collect();
        assert_eq!(file.content(), grown, "what was cut off is gone");
        assert_eq!(disk.unsynced(), [2]);
        let after = |choice| {
            let disk = disk.fork();
            disk.power_cut_choosing(|_| choice);
            disk.file(0).content()
        };
        assert_eq!(after(0), [1; 512]);
        assert_eq!(after(1), grown);
        let old: Vec<u8> = (1..=3).flat_map(|byte| [byte; SECTOR_LEN]).collect();
        assert_eq!(after(2), old);
        block_on(file.sync()).unwrap();
        assert!(disk.unsynced().is_empty());
        disk.power_cut();
        assert_eq!(file.content(), grown);
    }

    #[test]
    fn a_part_of_a_sector_that_was_cut_off_does_not_come_back() {
        let (disk, file) = file();
        file.set_len(1000).unwrap();
        file.set_len(1024).unwrap();
        block_on(file.sync()).unwrap();
        disk.power_cut();
        assert_eq!(file.content()[999..], [&[2][..], &[0; 24]].concat());
    }

    #[test]
    fn a_length_cannot_be_changed_without_power() {
        let (disk, file) = file();
        disk.stop_at(0);
        assert!(file.set_len(0).is_err());
        assert!(disk.is_stopped());
        assert_eq!(file.file_len().unwrap(), 1536);
    }
}
