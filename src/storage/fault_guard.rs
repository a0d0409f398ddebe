//! Memory that may vanish: a page of a mapped file that is gone when it is touched.
//!
//! Touching a mapped page that its file no longer has (it was cut, its file system is full, the
//! medium is broken) raises SIGBUS, which would end the process. Here a range of addresses is
//! registered instead: its missing pages become zeros when they are touched, and the range is
//! marked. Whoever copies to or from such a range asks [`FaultGuard::has_faulted`] *afterwards*,
//! and takes what was copied for nothing if it has.
//!
//! A SIGBUS anywhere else does what it did before; in a confined thread it ends the process, too,
//! but as a forbidden system call (SIGSYS).
//!
//! Not here: what is mapped, and what to do instead (`mapping`).
#![expect(unsafe_code, reason = "a signal handler, which maps a page over the missing one")]

use std::cell::UnsafeCell;
use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};

/// The most ranges at a time: the 509 memory slots of a guest, and the files of a disk.
const MAX_RANGES: usize = 640;

/// A registered range, as the handler sees it.
struct Slot {
    /// First address; [`FREE`] or [`RESERVED`] without a range.
    start: AtomicUsize,
    /// Address behind the last one.
    end: AtomicUsize,
    /// Size of the range's pages in bytes, a power of two.
    page_size: AtomicUsize,
    /// Whether a page was missing.
    faulted: AtomicBool,
    /// Whether it is counted in [`LOST_MEMORY`] then.
    is_memory: AtomicBool,
}

impl Slot {
    /// Whether its range holds `address`.
    fn holds(&self, address: usize) -> bool {
        let start = self.start.load(Ordering::Acquire);
        start > RESERVED && start <= address && address < self.end.load(Ordering::Relaxed)
    }
}

/// `Slot::start` of a slot that nobody has.
const FREE: usize = 0;

/// `Slot::start` of a slot that is being filled.
const RESERVED: usize = 1;

/// All ranges.
static SLOTS: [Slot; MAX_RANGES] = [const {
    Slot {
        start: AtomicUsize::new(FREE),
        end: AtomicUsize::new(0),
        page_size: AtomicUsize::new(0),
        faulted: AtomicBool::new(false),
        is_memory: AtomicBool::new(false),
    }
}; MAX_RANGES];

/// How many of the present ranges of guest memory have a page that was missing.
static LOST_MEMORY: AtomicUsize = AtomicUsize::new(0);

/// Whether `address` lies in guest memory of which pages are missing: its connection is about to
/// end. Whoever fills much of it asks this in between, and leaves it, since a page that was
/// replaced takes memory of ours when it is written, and an entry of the host's table of mappings.
#[must_use]
pub fn is_lost_memory(address: usize) -> bool {
    let is_there = |slot: &Slot| slot.is_memory.load(Ordering::Relaxed) && slot.holds(address);
    LOST_MEMORY.load(Ordering::Acquire) > 0 && SLOTS.iter().any(is_there)
}

/// How many pages were missing so far, in all ranges.
static MISSING: AtomicUsize = AtomicUsize::new(0);

/// How many pages were missing so far, in all ranges. Whoever has many ranges asks this first, and
/// each of them only if it has changed.
#[must_use]
pub fn missing_pages() -> usize {
    // As in `FaultGuard::has_faulted`. And acquired: who sees the number sees the marks it counts.
    fence(Ordering::Acquire);
    MISSING.load(Ordering::Acquire)
}

/// What SIGBUS did before.
struct Previous(UnsafeCell<MaybeUninit<libc::sigaction>>);

// SAFETY: written once, before our handler is installed; only read by that handler.
unsafe impl Sync for Previous {}

/// What SIGBUS did before.
static PREVIOUS: Previous = Previous(UnsafeCell::new(MaybeUninit::uninit()));

/// Whether the handler could be installed; the errno if not.
static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();

/// Sets the handler of SIGBUS now, for a process that may not do that any more when the first range
/// is registered.
///
/// # Errors
/// What the host said.
pub fn prepare() -> io::Result<()> {
    INSTALLED.get_or_init(install).map_err(io::Error::from_raw_os_error)
}

/// The registration of a range of addresses. Must be dropped before the range is unmapped, or
/// something else could come to lie there.
#[derive(Debug)]
pub struct FaultGuard {
    /// Its place in the table.
    slot: usize,
}

impl FaultGuard {
    /// Registers `range`, which must begin and end at page boundaries, the pages being of
    /// `page_size` bytes: a power of two, more than the host's only for huge pages.
    ///
    /// # Errors
    /// `QuotaExceeded` if too many ranges are registered, or why there is no handler.
    pub fn new(range: Range<usize>, page_size: usize) -> io::Result<Self> {
        Self::register(range, page_size, false)
    }

    /// The same for a range of guest memory: see [`is_lost_memory`].
    ///
    /// # Errors
    /// Those of [`FaultGuard::new`].
    pub fn of_memory(range: Range<usize>, page_size: usize) -> io::Result<Self> {
        Self::register(range, page_size, true)
    }

    /// Registers a range.
    fn register(range: Range<usize>, page_size: usize, is_memory: bool) -> io::Result<Self> {
        prepare()?;
        let reserve = |slot: &Slot| {
            let order = Ordering::Acquire;
            slot.start.compare_exchange(FREE, RESERVED, order, Ordering::Relaxed).is_ok()
        };
        let Some(index) = SLOTS.iter().position(reserve) else {
            return Err(io::ErrorKind::QuotaExceeded.into());
        };
        let slot = &SLOTS[index];
        slot.faulted.store(false, Ordering::Relaxed);
        slot.is_memory.store(is_memory, Ordering::Relaxed);
        slot.end.store(range.end, Ordering::Relaxed);
        slot.page_size.store(page_size, Ordering::Relaxed);
        // Last: from here on the handler believes the slot.
        slot.start.store(range.start, Ordering::Release);
        Ok(Self { slot: index })
    }

    /// Whether a page of the range was missing when it was touched. To be asked after a copy: what
    /// was copied before is good only if the answer is no.
    #[must_use]
    pub fn has_faulted(&self) -> bool {
        // The handler marks the range before it maps the page, so whoever has seen the page's zeros
        // sees the mark.
        fence(Ordering::Acquire);
        SLOTS[self.slot].faulted.load(Ordering::Relaxed)
    }
}

impl Drop for FaultGuard {
    fn drop(&mut self) {
        let slot = &SLOTS[self.slot];
        if slot.faulted.load(Ordering::Acquire) && slot.is_memory.load(Ordering::Relaxed) {
            LOST_MEMORY.fetch_sub(1, Ordering::Release);
        }
        slot.start.store(FREE, Ordering::Release);
    }
}

/// Installs the handler.
fn install() -> Result<(), i32> {
    // SAFETY: all-zero bytes are a valid `sigaction` (no handler, empty mask, no flags).
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handle as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `action` is complete; the old action goes to memory that nobody reads before this
    // call has returned, save for our handler, which finds no range then.
    let result =
        unsafe { libc::sigaction(libc::SIGBUS, &raw const action, PREVIOUS.0.get().cast()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)) }
}

/// The handler of SIGBUS. Calls nothing that is not async-signal-safe: mmap(2) and sigaction(2) are
/// bare system calls.
extern "C" fn handle(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel hands a valid siginfo to a handler that was installed with SA_SIGINFO.
    let info = unsafe { &*info };
    // SAFETY: SIGBUS fills in the address.
    let address = unsafe { info.si_addr() }.addr();
    if !replace_page(address) {
        // Not ours: the instruction is run again, and then does what it did before.
        // SAFETY: `install` has filled PREVIOUS before any signal can arrive here.
        unsafe { libc::sigaction(libc::SIGBUS, PREVIOUS.0.get().cast(), std::ptr::null_mut()) };
    }
}

/// Puts a page of zeros where one is missing. Returns whether the address is in a registered range
/// and that was possible.
fn replace_page(address: usize) -> bool {
    let Some(slot) = SLOTS.iter().find(|slot| slot.holds(address)) else { return false };
    let first = !slot.faulted.swap(true, Ordering::AcqRel);
    if first && slot.is_memory.load(Ordering::Relaxed) {
        LOST_MEMORY.fetch_add(1, Ordering::Release);
    }
    MISSING.fetch_add(1, Ordering::Release);
    let size = slot.page_size.load(Ordering::Relaxed);
    let page = address & !(size - 1);
    let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the page lies in a range that is registered, hence mapped, and whose owner expects
    // pages to be replaced; nothing else lies there.
    let mapped = unsafe { libc::mmap(page as *mut libc::c_void, size, access, flags, -1, 0) };
    mapped != libc::MAP_FAILED
}
