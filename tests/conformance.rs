//! One suite for all storages: what the copy-on-write core relies on holds over blocking files,
//! over io_uring, each buffered and past the page cache, and over the simulated disk alike.
//!
//! Files lie in the build folder, which is on a real disk: tmpfs knows no direct I/O. Where the
//! file system refuses it, the direct engines run buffered and say so.
//!
//! Not here: speed, faults, what the core does with a storage.

mod rig;

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use addcow::executor::TaskPool;
use addcow::storage::file::FileStorage;
use addcow::storage::host_file::{Access, CacheMode, HostFile};
use addcow::storage::sim::{SimDisk, SimStorage};
use addcow::storage::uring::{Ring, UringStorage};
use addcow::storage::{Alignment, IoBuffer, Storage, ZeroMode, transfer};
use addcow::units::ByteRange;
use fastrand::Rng;
use rig::{Task, run_tasks};
use tempfile::TempDir;

/// Longest time for one test; whatever hangs is ended then.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Ends the process if it is not dropped in time: a thread that sleeps in the kernel cannot fail.
struct Watchdog {
    /// Dropping it tells the thread that all is well.
    _alive: mpsc::Sender<()>,
}

impl Watchdog {
    /// Starts the clock.
    fn new() -> Self {
        let (alive, watched) = mpsc::channel::<()>();
        std::thread::spawn(move || {
            if watched.recv_timeout(TIMEOUT) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("conformance: nothing has happened for {TIMEOUT:?}");
                std::process::abort();
            }
        });
        Self { _alive: alive }
    }
}

/// A way to make storages and to drive their futures.
trait Engine {
    /// Its storage.
    type Storage: Storage + Clone + 'static;

    /// A new file with this content.
    fn file(&self, content: &[u8]) -> Self::Storage;

    /// Runs tasks to their end.
    fn drive(&self, tasks: Vec<Task<'_>>);

    /// Runs one task.
    fn run(&self, task: impl Future<Output = ()>) {
        self.drive(vec![Box::pin(task)]);
    }

    /// What the offset and length of a write must be a multiple of.
    fn write_unit(&self, storage: &Self::Storage) -> u64 {
        if storage.alignment() == Alignment::NONE { 1 } else { 512 }
    }
}

/// Makes real files.
struct Files {
    /// Where.
    folder: TempDir,
    /// In which mode.
    cache: CacheMode,
    /// Whether they are mapped.
    mapped: bool,
}

impl Files {
    /// An empty folder on a real disk.
    fn new(cache: CacheMode) -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        Self { folder, cache, mapped: false }
    }

    /// An empty folder below `place`, for files that are mapped.
    fn mapped(place: &str) -> Self {
        let folder = tempfile::tempdir_in(place).unwrap();
        Self { folder, cache: CacheMode::Buffered, mapped: true }
    }

    /// A new file with this content.
    fn make(&self, content: &[u8]) -> Arc<HostFile> {
        let path = self.folder.path().join(format!("{:x}", fastrand::u64(..)));
        File::create_new(&path).unwrap().write_all(content).unwrap();
        let file = HostFile::open(&path, Access::ReadWrite, self.cache).unwrap();
        if self.mapped {
            file.map();
            assert_eq!(file.mapping().is_some(), !content.is_empty());
        }
        Arc::new(file)
    }
}

/// Blocking files.
struct Blocking(Files);

impl Engine for Blocking {
    type Storage = FileStorage;

    fn file(&self, content: &[u8]) -> FileStorage {
        FileStorage::new(self.0.make(content))
    }

    fn drive(&self, tasks: Vec<Task<'_>>) {
        run_tasks(&SimDisk::new(0), &mut Rng::with_seed(1), tasks);
    }
}

/// io_uring, driven as a queue drives it.
struct Uring {
    /// Files.
    files: Files,
    /// The ring.
    ring: Rc<Ring>,
}

impl Engine for Uring {
    type Storage = UringStorage;

    fn file(&self, content: &[u8]) -> UringStorage {
        self.ring.storage(self.files.make(content))
    }

    fn drive(&self, tasks: Vec<Task<'_>>) {
        let mut pool = TaskPool::new(tasks.len(), Box::new(|| {}));
        for task in tasks {
            let _done = pool.start(task);
        }
        while pool.running() > 0 {
            if pool.may_sleep() {
                assert!(self.ring.in_flight() > 0, "tasks wait for nothing");
                self.ring.submit_and_wait().unwrap();
            }
            pool.awake();
            self.ring.reap(|_| {});
            pool.poll_ready(|()| {});
        }
    }
}

/// The simulated disk.
struct Sim(SimDisk);

impl Engine for Sim {
    type Storage = SimStorage;

    fn file(&self, content: &[u8]) -> SimStorage {
        self.0.create(content)
    }

    fn drive(&self, tasks: Vec<Task<'_>>) {
        run_tasks(&self.0, &mut Rng::with_seed(1), tasks);
    }
}

/// `len` bytes of which no two neighbours are alike for long.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    Rng::with_seed(seed).fill(&mut bytes);
    bytes
}

/// `len` bytes in memory that is aligned to nothing, in `pieces` segments.
fn scattered(rng: &mut Rng, len: usize, pieces: usize) -> IoBuffer {
    let mut left = len;
    let mut parts = Vec::new();
    for piece in 0..pieces {
        let len =
            if piece + 1 == pieces { left } else { rng.usize(0..=left.min(2 * len / pieces)) };
        left -= len;
        let skip = rng.usize(0..70);
        parts.push(IoBuffer::zeroed(skip + len).slice(skip, len));
    }
    IoBuffer::concat(&parts)
}

/// The whole file.
async fn content<S: Storage>(storage: &S) -> Vec<u8> {
    let len = usize::try_from(storage.file_len().unwrap()).unwrap();
    let buffer = IoBuffer::zeroed(len);
    assert_eq!(transfer::read_up_to(storage, 0, buffer.clone()).await.unwrap(), len);
    buffer.to_vec()
}

/// Random writes and reads, at any offset that the file allows, from memory of any shape.
fn reads_give_what_was_written<E: Engine>(engine: &E) {
    let mut model = noise(1, 300_000);
    let storage = engine.file(&model);
    let unit = usize::try_from(engine.write_unit(&storage)).unwrap();
    engine.run(async {
        let mut rng = Rng::with_seed(2);
        for round in 0..150 {
            let start = rng.usize(0..model.len() / unit) * unit;
            let most = (model.len() - start).min(40_000);
            let len = rng.usize(0..=most / unit) * unit;
            let pieces = [1, 2, 7, 1500][rng.usize(0..4)];
            let data = noise(round, len);
            let buffer = scattered(&mut rng, len, pieces);
            buffer.copy_from(0, &data);
            let offset = start as u64;
            transfer::write_all(&storage, offset, buffer).await.unwrap();
            model[start..start + len].copy_from_slice(&data);
            let start = rng.usize(0..model.len());
            let len = rng.usize(0..=(model.len() - start).min(40_000));
            let buffer = scattered(&mut rng, len, pieces);
            let got = transfer::read_up_to(&storage, start as u64, buffer.clone()).await.unwrap();
            assert_eq!(got, len);
            assert!(buffer.to_vec() == model[start..start + len], "{len} bytes at {start}");
        }
        assert!(content(&storage).await == model);
    });
}

/// What lies past the end of a file, whose length is a multiple of nothing.
fn the_end_of_the_file_is_found<E: Engine>(engine: &E) {
    let model = noise(3, 10_007);
    let storage = engine.file(&model);
    engine.run(async {
        assert_eq!(storage.file_len().unwrap(), 10_007);
        for (start, len) in [(0, 20_000), (10_006, 1), (10_006, 5000), (9_999, 8), (8192, 4096)] {
            let buffer = IoBuffer::from_bytes(&vec![0x55; len]);
            let got = transfer::read_up_to(&storage, start, buffer.clone()).await.unwrap();
            let first = usize::try_from(start).unwrap();
            let there = (10_007 - first).min(len);
            assert_eq!(got, there, "{len} at {start}");
            transfer::read_or_zero(&storage, start, buffer.clone()).await.unwrap();
            let mut want = model[first..first + there].to_vec();
            want.resize(len, 0);
            assert!(buffer.to_vec() == want, "{len} at {start}");
        }
        for start in [10_007, 10_240, 12_288, 1 << 40] {
            let buffer = IoBuffer::from_bytes(&[0x55; 700]);
            let got = transfer::read_up_to(&storage, start, buffer.clone()).await.unwrap();
            assert_eq!(got, 0, "at {start}");
            transfer::read_or_zero(&storage, start, buffer.clone()).await.unwrap();
            assert_eq!(buffer.to_vec(), [0; 700]);
        }
        assert_eq!(transfer::read_up_to(&storage, 5, IoBuffer::zeroed(0)).await.unwrap(), 0);
    });
}

/// Zeroing in both modes: just the range, never the length.
fn zeroing_hits_the_range_and_nothing_else<E: Engine>(engine: &E) {
    for mode in [ZeroMode::ZeroRange, ZeroMode::PunchHole] {
        let mut model = noise(4, 100_000 / 512 * 512);
        let storage = engine.file(&model);
        engine.run(async {
            for (start, end) in [(0, 512), (4096, 16_384), (5632, 20_992), (90_112, 99_840)] {
                let range = ByteRange::between(start, end);
                transfer::write_zeroes(&storage, range, mode).await.unwrap();
                model[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()].fill(0);
                assert!(content(&storage).await == model, "{mode:?} {range:?}");
            }
            let range = ByteRange::between(40_960, 49_152);
            transfer::discard(&storage, range).await.unwrap();
            model[40_960..49_152].fill(0);
            assert!(content(&storage).await == model, "discard");
            assert_eq!(storage.file_len().unwrap(), model.len() as u64);
        });
    }
}

/// Length, sync, and where there is data.
fn lengths_and_holes_are_told_truly<E: Engine>(engine: &E) {
    let storage = engine.file(&noise(5, 8192));
    engine.run(async {
        storage.set_len(3 << 20).unwrap();
        assert_eq!(storage.file_len().unwrap(), 3 << 20);
        let block = IoBuffer::from_bytes(&[0x66; 4096]);
        transfer::write_all(&storage, 2 << 20, block).await.unwrap();
        storage.sync().await.unwrap();
        let bytes = content(&storage).await;
        let mut covered = 0;
        while let Some(data) = storage.next_data(covered).unwrap() {
            assert!(data.end() > covered, "no progress at {covered}");
            let start = usize::try_from(data.start().max(covered)).unwrap();
            let hole = &bytes[usize::try_from(covered).unwrap()..start];
            assert!(hole.iter().all(|byte| *byte == 0), "data before {start} is called a hole");
            covered = data.end();
        }
        assert!(bytes[usize::try_from(covered).unwrap()..].iter().all(|byte| *byte == 0));
        assert_eq!(storage.next_data(3 << 20).unwrap(), None);
        storage.set_len(5120).unwrap();
        assert!(content(&storage).await == noise(5, 8192)[..5120]);
        storage.set_len(8192).unwrap();
        assert!(
            content(&storage).await[5120..].iter().all(|byte| *byte == 0),
            "new bytes are zeros"
        );
    });
}

/// Thousands at once: each writes its own block, reads it back, and some sync in between.
fn thousands_at_once_do_not_disturb_each_other<E: Engine>(engine: &E) {
    const TASKS: u64 = 3000;
    let storage = engine.file(&[]);
    storage.set_len(TASKS * 1024).unwrap();
    let task = |number: u64| -> Task<'_> {
        let storage = storage.clone();
        Box::pin(async move {
            let data = noise(number, 1024);
            let block = IoBuffer::concat(&[
                IoBuffer::from_bytes(&data[..512]),
                IoBuffer::from_bytes(&data[512..]),
            ]);
            transfer::write_all(&storage, number * 1024, block).await.unwrap();
            if number.is_multiple_of(500) {
                storage.sync().await.unwrap();
            }
            let seen = IoBuffer::zeroed(1024);
            transfer::read_or_zero(&storage, number * 1024, seen.clone()).await.unwrap();
            assert!(seen.to_vec() == data, "task {number}");
        })
    };
    engine.drive((0..TASKS).map(task).collect());
    engine.run(async {
        let all: Vec<u8> = (0..TASKS).flat_map(|number| noise(number, 1024)).collect();
        assert!(content(&storage).await == all);
    });
}

/// Offsets that no file has end in an error, not in a panic.
fn absurd_offsets_are_refused<E: Engine>(engine: &E) {
    let storage = engine.file(&noise(6, 4096));
    engine.run(async {
        for offset in [i64::MAX.unsigned_abs() - 511, 1 << 63, u64::MAX - 511] {
            let buffer = IoBuffer::zeroed(512);
            let written = storage.write(offset, buffer.clone()).await;
            assert!(written.is_err(), "wrote {written:?} at {offset:#x}");
            let read = storage.read(offset, buffer).await;
            assert!(!matches!(read, Ok(1..)), "read {read:?} at {offset:#x}");
            let range = ByteRange::between(offset, offset + 511);
            let zeroed = storage.zero(range, ZeroMode::PunchHole).await;
            assert!(zeroed.is_err(), "zeroed at {offset:#x}");
        }
        assert!(content(&storage).await == noise(6, 4096));
    });
}

/// The whole suite.
fn conforms<E: Engine>(engine: &E) {
    let _watchdog = Watchdog::new();
    reads_give_what_was_written(engine);
    the_end_of_the_file_is_found(engine);
    zeroing_hits_the_range_and_nothing_else(engine);
    lengths_and_holes_are_told_truly(engine);
    thousands_at_once_do_not_disturb_each_other(engine);
}

/// Files past the page cache; says so if there is no such thing here.
fn direct() -> Files {
    let files = Files::new(CacheMode::Direct);
    let alignment = files.make(&[0; 4096]).alignment();
    println!("direct I/O wants {alignment:?}");
    if alignment == Alignment::NONE {
        eprintln!("no direct I/O in {}: running buffered", files.folder.path().display());
    }
    files
}

/// An engine on a new ring.
fn uring(files: Files) -> Uring {
    Uring { files, ring: Ring::new().unwrap() }
}

#[test]
fn io_uring_on_tmpfs_conforms() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    conforms(&uring(Files { folder, cache: CacheMode::Direct, mapped: false }));
}

#[test]
fn io_uring_with_files_mapped_from_tmpfs_conforms() {
    conforms(&uring(Files::mapped("/dev/shm")));
}

#[test]
fn io_uring_with_files_mapped_from_the_page_cache_conforms() {
    conforms(&uring(Files::mapped(env!("CARGO_TARGET_TMPDIR"))));
}

#[test]
fn the_simulated_disk_conforms() {
    conforms(&Sim(SimDisk::new(7)));
}

#[test]
fn blocking_files_conform() {
    conforms(&Blocking(Files::new(CacheMode::Buffered)));
    absurd_offsets_are_refused(&Blocking(Files::new(CacheMode::Buffered)));
}

#[test]
fn blocking_direct_files_conform() {
    conforms(&Blocking(direct()));
}

#[test]
fn io_uring_conforms() {
    conforms(&uring(Files::new(CacheMode::Buffered)));
    absurd_offsets_are_refused(&uring(Files::new(CacheMode::Buffered)));
}

#[test]
fn direct_io_uring_conforms() {
    conforms(&uring(direct()));
}

/// How many descriptors on files below `folder` this process has.
fn open_below(folder: &Path) -> usize {
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap();
    let targets = descriptors.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    targets.filter(|target| target.starts_with(folder)).count()
}

/// The ring keeps buffer and file of an abandoned operation until the kernel is done with them, and
/// its own end waits for all of them.
#[test]
fn operations_dropped_in_flight_end_before_the_ring_does() {
    let _watchdog = Watchdog::new();
    for files in [Files::new(CacheMode::Buffered), direct()] {
        let engine = uring(files);
        let file = engine.files.make(&vec![0x11; 256 * 4096]);
        let storage = engine.ring.storage(Arc::clone(&file));
        let mut pool: TaskPool<Task<'_>> = TaskPool::new(512, Box::new(|| {}));
        for block in 0..256_u64 {
            let (reader, writer) = (storage.clone(), storage.clone());
            let read: Task<'_> = Box::pin(async move {
                let _ = reader.read(block * 4096, IoBuffer::zeroed(4096)).await;
            });
            let write: Task<'_> = Box::pin(async move {
                let data = IoBuffer::from_bytes(&[0x22; 4096]);
                let _ = writer.write(block * 4096, data).await;
            });
            assert_eq!((pool.start(read), pool.start(write)), (None, None));
        }
        engine.ring.submit().unwrap();
        assert_eq!(engine.ring.in_flight(), 512, "nothing is taken before `reap`");
        drop(pool);
        assert_eq!(engine.ring.in_flight(), 512, "the kernel still has them");
        // Memory that the kernel may still write to must not be given to anybody else.
        let canaries: Vec<IoBuffer> =
            (0..512).map(|_| IoBuffer::from_bytes(&[0x33; 4096])).collect();
        let Uring { files, ring } = engine;
        drop(storage);
        drop(ring);
        assert!(canaries.iter().all(|canary| canary.to_vec() == [0x33; 4096]));
        let path = file.path().to_owned();
        assert_eq!(std::fs::read(path).unwrap(), vec![0x22; 256 * 4096], "all writes have ended");
        drop(file);
        assert_eq!(open_below(files.folder.path()), 0, "no descriptor is left behind");
    }
}

/// A dropped operation's place is used again, and its late completion goes to nobody.
#[test]
fn a_late_completion_does_not_answer_a_later_operation() {
    let _watchdog = Watchdog::new();
    let engine = uring(direct());
    let storage = engine.file(&noise(8, 64 * 4096));
    for round in 0..200_u64 {
        let mut pool: TaskPool<Task<'_>> = TaskPool::new(64, Box::new(|| {}));
        for block in 0..64 {
            let storage = storage.clone();
            let _done = pool.start(Box::pin(async move {
                let _ = storage.read(block * 4096, IoBuffer::zeroed(4096)).await;
            }));
        }
        if round % 2 == 0 {
            engine.ring.submit().unwrap();
        }
        drop(pool);
        let block = usize::try_from(round % 64).unwrap();
        engine.run(async {
            let seen = IoBuffer::zeroed(512);
            let offset = block as u64 * 4096;
            assert_eq!(storage.read(offset, seen.clone()).await.unwrap(), 512);
            assert!(seen.to_vec() == noise(8, 64 * 4096)[block * 4096..block * 4096 + 512]);
        });
    }
}
