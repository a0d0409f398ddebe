//! Models of what threads share, under loom: every order of their steps up to three preemptions,
//! and every value that the memory model lets a load return.
//!
//! It is the product's own code, built on loom's types (`src/sync.rs`):
//! `cargo test --release --features loom --example loom`. Loom says "deadlock" for a lost wake-up.
//! What must be alone is marked by a lock that is only ever tried; what one thread makes visible to
//! another is a cell whose every access loom checks.
//!
//! Not here: whole requests (`shuttle.rs`), the framework's threads, guest memory.
#![allow(
    clippy::arc_with_non_send_sync,
    reason = "loom runs its threads one at a time, and asks for no Send"
)]

#[allow(dead_code, reason = "no model here needs the host's observer")]
#[path = "host.rs"]
mod host;
#[path = "../common/score.rs"]
mod score;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};

use addcow::executor::{TaskPool, block_on};
use addcow::format::BitmapGeometry;
use addcow::image::allocation::AllocationMap;
use addcow::image::cluster_lock::ClusterLocks;
use addcow::image::{Image, ImageState};
use addcow::storage::IoBuffer;
use addcow::units::ClusterSize;
use addcow::vhost_user::SharedMemory;
use addcow::vhost_user::vring::Vring;
use loom::cell::UnsafeCell;
use loom::thread;
use vhost_user_backend::VringT;
use vm_memory::GuestMemoryMmap;

use host::{HostFile, HostStorage};

/// Runs `model` in every order of its threads' steps with at most three preemptions.
fn explore(name: &str, model: impl Fn() + Sync + Send + 'static) {
    let count = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&count);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.max_branches = 100_000;
    builder.check(move || {
        counter.fetch_add(1, Ordering::Relaxed);
        model();
    });
    let runs = count.load(Ordering::Relaxed);
    assert!(runs > 10, "{name}: only {runs} orders, so the threads share nothing");
    score::score("loom", &[("models", 1), (name, runs)]);
}

/// Something that one thread at a time may have, and hands on to the next.
#[derive(Default)]
struct Alone {
    /// Held by who has it.
    held: Mutex<()>,
    /// Written by who has it: loom sees whether the one before happened before.
    cell: UnsafeCell<u32>,
}

impl Alone {
    /// Has it for a few steps.
    fn enter(&self) {
        let held = self.held.try_lock().expect("nobody else has it");
        self.cell.with_mut(|_| ());
        thread::yield_now();
        drop(held);
    }
}

#[test]
fn a_cluster_lock_has_one_owner_and_none_sleeps_for_ever() {
    explore("cluster_lock", || {
        let shared = Arc::new((ClusterLocks::default(), Alone::default()));
        let threads = [0..1, 0..2].map(|clusters| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let _guard = block_on(shared.0.lock(clusters));
                shared.1.enter();
            })
        });
        let guard = block_on(shared.0.lock(0..1));
        shared.1.enter();
        drop(guard);
        threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
    });
}

#[test]
fn cluster_locks_over_several_words_never_deadlock() {
    explore("cluster_locks_over_words", || {
        let shared = Arc::new((ClusterLocks::default(), Alone::default()));
        // Both in both words; the second range begins at the end of the table.
        let last = ClusterLocks::CLUSTERS;
        let threads = [60..70, last - 3..last + 66].map(|clusters| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let _guard = block_on(shared.0.lock(clusters));
                shared.1.enter();
            })
        });
        threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
    });
}

/// The geometry of a disk of `clusters` clusters of one sector.
fn geometry(clusters: u64) -> BitmapGeometry {
    let size = ClusterSize::from_bits(9).expect("in range");
    BitmapGeometry::new(size, clusters * 512).expect("not too large")
}

/// A map of `clusters` clusters.
fn map(clusters: u64) -> AllocationMap {
    AllocationMap::empty(&geometry(clusters)).expect("enough memory")
}

#[test]
fn who_sees_a_bit_sees_the_data_of_the_cluster() {
    // How often the reader saw one bit, and both: or the model would show nothing.
    static SEEN: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];
    explore("bit_publication", || {
        let shared = Arc::new((map(2), UnsafeCell::new(0), UnsafeCell::new(0)));
        let reader = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let (map, first, second) = &*shared;
                if map.is_allocated(0..1) {
                    first.with(|_| ());
                    SEEN[0].fetch_add(1, Ordering::Relaxed);
                }
                if map.run(0..2) == (true, 2) {
                    first.with(|_| ());
                    second.with(|_| ());
                    SEEN[1].fetch_add(1, Ordering::Relaxed);
                }
            })
        };
        let writer = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                shared.1.with_mut(|_| ());
                shared.0.mark(0..1);
            })
        };
        shared.2.with_mut(|_| ());
        shared.0.mark(1..2);
        [reader, writer].into_iter().for_each(|thread| thread.join().expect("no panic"));
        assert!(shared.0.is_allocated(0..2), "no bit is lost");
    });
    assert!(SEEN.iter().all(|seen| seen.load(Ordering::Relaxed) > 0), "{SEEN:?}");
}

/// A map and the bits that its side file has.
struct Persisted {
    /// The map.
    map: AllocationMap,
    /// The first word of the bitmap in the side file; one flush at a time, as in the barrier.
    side: loom::sync::Mutex<u64>,
}

impl Persisted {
    /// A map of two clusters, nothing in the side file.
    fn new() -> Arc<Self> {
        Arc::new(Self { map: map(2), side: loom::sync::Mutex::new(0) })
    }

    /// What a flush does with the bits. Returns those that the side file has then.
    fn flush(&self) -> u64 {
        let mut side = self.side.lock().expect("no panic while held");
        let frozen = self.map.freeze();
        for (page, bytes) in frozen.pages() {
            assert_eq!(*page, 0);
            let new = u64::from(bytes[0]);
            assert_eq!(*side & !new, 0, "a bit went from 1 to 0");
            *side = new;
        }
        frozen.persisted();
        *side
    }
}

#[test]
fn a_flush_has_every_bit_that_was_marked_before_it() {
    explore("freeze_and_markers", || {
        let shared = Persisted::new();
        let marker = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                shared.map.mark(0..1);
                assert_eq!(shared.flush() & 1, 1, "a bit of its own");
            })
        };
        let seeing = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                // Somebody else's bit, seen as a writer of the allocated cluster sees it.
                if shared.map.is_allocated(0..1) {
                    assert_eq!(shared.flush() & 1, 1, "a bit that was seen");
                }
            })
        };
        shared.map.mark(1..2);
        assert_eq!(shared.flush() & 2, 2, "a bit of its own");
        marker.join().expect("no panic");
        seeing.join().expect("no panic");
    });
}

#[test]
fn a_bit_marked_during_a_freeze_is_in_that_flush_or_in_the_next() {
    explore("freeze_during_mark", || {
        let shared = Persisted::new();
        let markers = [0, 1].map(|cluster| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.map.mark(cluster..cluster + 1))
        });
        shared.flush();
        markers.into_iter().for_each(|marker| marker.join().expect("no panic"));
        assert_eq!(shared.flush(), 3, "a marked bit that no page is dirty for");
    });
}

/// An image of two clusters on files without steps of their own.
struct Disk {
    /// What its threads share.
    state: Arc<ImageState>,
    /// The raw image.
    raw: Arc<HostFile>,
    /// The side file.
    side: Arc<HostFile>,
}

impl Disk {
    /// An empty disk.
    fn new() -> Arc<Self> {
        let geometry = geometry(2);
        let state = ImageState::add_cow(geometry, map(2), 0, true);
        let file = |len| HostFile::new(vec![0; len], || ());
        let side = file(usize::try_from(geometry.file_len()).expect("small"));
        Arc::new(Self { state: Arc::new(state), raw: file(1024), side })
    }

    /// Writes one cluster, flushes, and checks that a power cut would not take it.
    fn write_and_flush(&self, cluster: u64) {
        let storage = |file: &Arc<HostFile>| HostStorage(Arc::clone(file));
        let (raw, side) = (storage(&self.raw), storage(&self.side));
        let image = Image::new(Arc::clone(&self.state), raw, Some(side), None);
        let byte = u8::try_from(cluster).expect("small") + 1;
        let write = image.write(cluster * 512, IoBuffer::from_bytes(&[byte; 512]));
        block_on(write).expect("no faults");
        block_on(image.flush()).expect("no faults");
        let (at, mask) = geometry(2).position(cluster);
        let bits = self.side.durable()[usize::try_from(at).expect("small")];
        assert_ne!(bits & mask, 0, "the bit is not durable");
        let start = usize::try_from(cluster * 512).expect("small");
        assert_eq!(self.raw.durable()[start..start + 512], [byte; 512], "the data is not durable");
    }
}

#[test]
fn a_flush_that_joins_a_pass_is_covered_by_it() {
    explore("flush_barrier", || {
        let disk = Disk::new();
        let other = {
            let disk = Arc::clone(&disk);
            thread::spawn(move || disk.write_and_flush(0))
        };
        disk.write_and_flush(1);
        other.join().expect("no panic");
    });
}

/// A ring, its worker's place, and how often it was changed.
struct Ring {
    /// The ring.
    vring: Vring,
    /// Who has the ring's position: its worker, or the thread that changes it.
    position: Alone,
    /// Changes made while it was at rest.
    changes: AtomicU64,
    /// How many of them the worker has seen on entering.
    seen: AtomicU64,
}

impl Ring {
    /// A ring that is ready to run.
    fn new() -> Arc<Self> {
        let vring = Vring::new(SharedMemory::new(GuestMemoryMmap::new()), 16).expect("a ring");
        vring.set_queue_ready(true);
        vring.set_enabled(true);
        // Its kick, which nobody kicks here; the framework listens to another one.
        vring.set_kick(Some(tempfile::tempfile().expect("a temporary file")));
        let (changes, seen) = (AtomicU64::new(1), AtomicU64::new(0));
        Arc::new(Self { vring, position: Alone::default(), changes, seen })
    }

    /// Whether the framework is told to start the worker. Empties what tells it.
    fn is_started(&self) -> bool {
        self.vring.get_ref().get_kick().as_ref().is_some_and(|kick| kick.consume().is_ok())
    }

    /// What a thread of the framework does, twice at most.
    fn work(&self) {
        for _ in 0..2 {
            if !self.is_started() || !self.vring.read_kick().expect("never fails") {
                thread::yield_now();
                continue;
            }
            let Some(permit) = self.vring.enter() else { continue };
            self.seen.store(self.changes.load(Ordering::SeqCst), Ordering::SeqCst);
            self.position.enter();
            // Serves until it is to leave; a ring that fails leaves before.
            if !permit.control().pause_wanted() {
                self.position.enter();
            }
        }
    }

    /// A change of the ring by the control thread.
    fn change(&self) {
        let pause = self.vring.control().pause();
        self.position.enter();
        self.changes.fetch_add(1, Ordering::SeqCst);
        drop(pause);
    }
}

#[test]
fn a_ring_is_at_rest_while_it_is_changed_and_starts_again_after() {
    explore("drain_and_submit", || {
        let ring = Ring::new();
        let worker = {
            let ring = Arc::clone(&ring);
            thread::spawn(move || ring.work())
        };
        ring.change();
        ring.change();
        worker.join().expect("no panic");
        let all_seen = ring.seen.load(Ordering::SeqCst) == ring.changes.load(Ordering::SeqCst);
        assert!(all_seen || ring.is_started(), "the worker would not start after a change");
    });
}

#[test]
fn two_pauses_at_once_keep_the_ring_at_rest_until_both_are_over() {
    explore("two_pauses", || {
        let ring = Ring::new();
        let worker = {
            let ring = Arc::clone(&ring);
            thread::spawn(move || ring.work())
        };
        let other = {
            let ring = Arc::clone(&ring);
            thread::spawn(move || {
                let pause = ring.vring.control().request_pause();
                ring.vring.control().wait_until_left();
                assert!(ring.vring.enter().is_none(), "a paused ring was entered");
                drop(pause);
            })
        };
        let pause = ring.vring.control().pause();
        assert!(ring.vring.enter().is_none(), "a paused ring was entered");
        drop(pause);
        other.join().expect("no panic");
        worker.join().expect("no panic");
        assert!(ring.seen.load(Ordering::SeqCst) == 1 || ring.is_started(), "nobody starts it");
    });
}

#[test]
fn a_wake_up_reaches_a_pool_that_falls_asleep() {
    explore("wake_up", || {
        // Whether the task may end, and its waker.
        let shared = Arc::new(loom::sync::Mutex::new((false, None::<Waker>)));
        let owner = thread::current();
        let mut pool = TaskPool::new(1, Box::new(move || owner.unpark()));
        let task = Arc::clone(&shared);
        let waiting = std::future::poll_fn(move |context| {
            let mut state = task.lock().expect("no panic while held");
            state.1 = Some(context.waker().clone());
            if state.0 { Poll::Ready(()) } else { Poll::Pending }
        });
        let mut is_done = pool.start(waiting).is_some();
        let waking = thread::spawn(move || {
            let mut state = shared.lock().expect("no panic while held");
            state.0 = true;
            let waker = state.1.take();
            drop(state);
            waker.into_iter().for_each(Waker::wake);
        });
        while !is_done {
            pool.poll_ready(|()| is_done = true);
            if !is_done && pool.may_sleep() {
                thread::park();
                pool.awake();
            }
        }
        waking.join().expect("no panic");
    });
}
