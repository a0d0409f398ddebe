//! A host in memory for the models of threads: files with a volatile cache, and a tap on each.
//!
//! An operation takes several steps, one for each sector and one at either end, and calls the
//! model's `step` before each; that is where a model checker lets another thread go on. A sync
//! makes durable what had landed when it was called, and not before it returns. Each change of a
//! file is shown to the file's observer at once, with no step in between.
//!
//! Not here: faults, power cuts, files that change their length.

use std::io;
use std::sync::{Arc, Mutex, OnceLock};

use addcow::storage::{Alignment, IoBuffer, Storage, ZeroMode};
use addcow::units::ByteRange;

/// Bytes in a sector.
pub const SECTOR: usize = 512;

/// The content of a file, in the cache or on stable storage.
#[derive(Debug, Clone)]
pub struct Content {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// For each sector the number of the change that it had last.
    changed: Vec<u64>,
}

/// Sees every change of a file.
type Observer = Box<dyn Fn(&HostFile) + Send + Sync>;

/// A file.
pub struct HostFile {
    /// What a read sees.
    cache: Mutex<Content>,
    /// What a power cut leaves for certain.
    durable: Mutex<Content>,
    /// Called before each step of an operation.
    step: fn(),
    /// Called after each change.
    observer: OnceLock<Observer>,
}

impl std::fmt::Debug for HostFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostFile").finish_non_exhaustive()
    }
}

/// One thread's access to a file.
#[derive(Debug, Clone)]
pub struct HostStorage(pub Arc<HostFile>);

impl HostFile {
    /// A file with these bytes, whole sectors of them, all durable.
    pub fn new(bytes: Vec<u8>, step: fn()) -> Arc<Self> {
        let changed = vec![0; bytes.len() / SECTOR];
        let content = Content { bytes, changed };
        let (cache, durable) = (Mutex::new(content.clone()), Mutex::new(content));
        Arc::new(Self { cache, durable, step, observer: OnceLock::new() })
    }

    /// Shows every change from now on to `observer`.
    pub fn observe(&self, observer: impl Fn(&Self) + Send + Sync + 'static) {
        assert!(self.observer.set(Box::new(observer)).is_ok(), "one observer a file");
    }

    /// What a read would see now.
    pub fn cached(&self) -> Vec<u8> {
        self.cache.lock().expect("no panic while held").bytes.clone()
    }

    /// What a power cut would leave now for certain.
    pub fn durable(&self) -> Vec<u8> {
        self.durable.lock().expect("no panic while held").bytes.clone()
    }

    /// Changes a piece of one sector.
    fn change(&self, offset: usize, len: usize, change: impl FnOnce(&mut [u8])) {
        (self.step)();
        let mut cache = self.cache.lock().expect("no panic while held");
        change(&mut cache.bytes[offset..offset + len]);
        cache.changed[offset / SECTOR] += 1;
        drop(cache);
        if let Some(observer) = self.observer.get() {
            observer(self);
        }
    }
}

/// The pieces of `offset..offset + len` that lie in one sector each.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (usize, usize)> {
    let (mut at, end) = (index(offset), index(offset) + len);
    std::iter::from_fn(move || {
        let piece = (at, (SECTOR - at % SECTOR).min(end - at));
        at += piece.1;
        (piece.1 > 0).then_some(piece)
    })
}

/// An offset as an index.
fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("a small file")
}

impl Storage for HostStorage {
    async fn read(&self, offset: u64, buffer: IoBuffer) -> io::Result<usize> {
        let end = self.0.cached().len();
        let len = buffer.len().min(end.saturating_sub(index(offset)));
        for (at, count) in pieces(offset, len) {
            (self.0.step)();
            let cache = self.0.cache.lock().expect("no panic while held");
            buffer.copy_from(at - index(offset), &cache.bytes[at..at + count]);
        }
        (self.0.step)();
        Ok(len)
    }

    async fn write(&self, offset: u64, buffer: IoBuffer) -> io::Result<usize> {
        let bytes = buffer.to_vec();
        for (at, count) in pieces(offset, bytes.len()) {
            let piece = &bytes[at - index(offset)..][..count];
            self.0.change(at, count, |target| target.copy_from_slice(piece));
        }
        (self.0.step)();
        Ok(bytes.len())
    }

    async fn zero(&self, range: ByteRange, _mode: ZeroMode) -> io::Result<()> {
        for (at, count) in pieces(range.start(), index(range.len())) {
            self.0.change(at, count, |target| target.fill(0));
        }
        (self.0.step)();
        Ok(())
    }

    async fn sync(&self) -> io::Result<()> {
        (self.0.step)();
        let covered = self.0.cache.lock().expect("no panic while held").clone();
        (self.0.step)();
        let mut durable = self.0.durable.lock().expect("no panic while held");
        for (sector, &changed) in covered.changed.iter().enumerate() {
            // A sync that was called before has not seen what this one has.
            if durable.changed[sector] < changed {
                let range = sector * SECTOR..(sector + 1) * SECTOR;
                durable.bytes[range.clone()].copy_from_slice(&covered.bytes[range]);
                durable.changed[sector] = changed;
            }
        }
        drop(durable);
        (self.0.step)();
        Ok(())
    }

    fn file_len(&self) -> io::Result<u64> {
        Ok(self.0.cached().len() as u64)
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn alignment(&self) -> Alignment {
        Alignment::NONE
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<ByteRange>> {
        (self.0.step)();
        let bytes = self.0.cached();
        let is_data = |at: &usize| bytes[at * SECTOR..(at + 1) * SECTOR] != [0; SECTOR];
        let sector = (index(offset) / SECTOR..bytes.len() / SECTOR).find(is_data);
        Ok(sector.map(|at| {
            let start = (at * SECTOR).max(index(offset)) as u64;
            ByteRange::between(start, ((at + 1) * SECTOR) as u64)
        }))
    }
}
