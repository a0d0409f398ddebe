//! What outlives the daemon: requests in flight and new bits, in memory that the front end keeps
//! (vhost-user, "Inflight I/O tracking"; design: docs/decisions/0010-recovery.md).
//!
//! ```text
//!   GET_INFLIGHT_FD   we make a region and hand it out
//!   SET_INFLIGHT_FD   the front end gives it back: at once, or to the process after this one,
//!                     which takes its bits and, as each ring starts, its requests
//! ```
//!
//! A region is only good for the disk, in the state, on the host, for which it was made: it names
//! the boot of the host, both files by (device, inode), the session of the add-cow file and the
//! shape of the disk. Any other is refused, since its bits would show wrong bytes. What it says
//! beyond that is not trusted: the front end can write to it.
//!
//! Not here: the messages (`interposer`), and what is done with requests (`virtio::inflight`).

use std::fs::File;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use super::backend::MAX_QUEUE_SIZE;
use crate::executor::block_on;
use crate::image::ImageError;
use crate::image::journal::{BitJournal, JournalError};
use crate::image::open::OpenImage;
use crate::image::session::{self, Session};
use crate::storage::file::FileStorage;
use crate::storage::shared_memory::SharedMemory;
use crate::virtio::inflight::InflightQueue;

/// The first word of a region: it is one of ours, in the layout of this version.
const MAGIC: u64 = u64::from_le_bytes(*b"addcowR1");

/// Words of a region before its first queue; the header takes the first [`HEADER_WORDS`] of them.
const QUEUES_START: usize = 512;

/// Words of the header, with the checksum at its end.
const HEADER_WORDS: usize = 13;

/// The word after the header: the write cache as the driver has set it (VIRTIO 1.3, 5.2.5), since
/// front ends do not set it again when they reconnect. 0: not kept.
const WRITEBACK_WORD: usize = HEADER_WORDS;

/// Every write is stable when it completes: the driver does not flush.
const WRITE_THROUGH: u64 = 1;

/// Writes are stable after a flush.
const WRITE_BACK: u64 = 2;

/// Each queue, and the bits, begin at a multiple of so many words: a cache line.
const ALIGNMENT: usize = 8;

/// How many queues of which size a front end has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueShape {
    /// Number of queues.
    pub queues: u16,
    /// Entries of each: a power of two, 1 to 32768.
    pub size: u16,
}

/// Why there is no region.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    /// The front end asks for queues that the device does not have.
    #[error("{} queues of {} entries are not what this device has", .0.queues, .0.size)]
    Shape(QueueShape),
    /// A ring that the front end's region has no place for.
    #[error("the front end's inflight region is for {} queues of at most {} entries, not for \
             queue {index} with {size}", .shape.queues, .shape.size)]
    NoPlace {
        /// What the region is for.
        shape: QueueShape,
        /// The number of the queue.
        index: usize,
        /// How many entries it has.
        size: u16,
    },
    /// What the front end gave back cannot be used.
    #[error("recovery state is refused: {0}")]
    Refused(&'static str),
    /// Its bits make no sense.
    #[error("recovery state is refused: {0}")]
    Journal(#[from] JournalError),
    /// Memory for it could not be had or mapped.
    #[error("recovery state: {0}")]
    Memory(#[source] io::Error),
    /// The disk could not be read or written.
    #[error("recovery: {0}")]
    Disk(#[from] ImageError),
}

/// Where things lie in a region, in words.
#[derive(Debug, Clone, Copy)]
struct Layout {
    /// The queues.
    shape: QueueShape,
    /// Words from one queue to the next.
    stride: usize,
    /// The first word with bits.
    bits: usize,
    /// All words.
    words: usize,
}

impl Layout {
    /// The layout for these queues and so many clusters; `None` if it does not fit into memory.
    fn new(shape: QueueShape, clusters: u64) -> Option<Self> {
        let stride = InflightQueue::words(shape.size).next_multiple_of(ALIGNMENT);
        let queues = usize::from(shape.queues).checked_mul(stride)?;
        let bits = QUEUES_START.checked_add(queues)?;
        let words = bits.checked_add(BitJournal::words(clusters)?)?;
        Some(Self { shape, stride, bits, words })
    }

    /// All bytes.
    fn bytes(&self) -> u64 {
        self.words as u64 * 8
    }
}

/// A region in use.
#[derive(Debug)]
pub struct Region {
    /// Its memory.
    memory: Arc<SharedMemory>,
    /// What lies where.
    layout: Layout,
    /// The new bits; `None` if the disk has none.
    pub journal: Option<Arc<BitJournal>>,
}

impl Region {
    /// The requests in flight of queue `index`, which has `size` entries.
    ///
    /// # Errors
    /// `NoPlace` if the region is not for such a queue.
    pub fn queue(&self, index: usize, size: u16) -> Result<InflightQueue, RecoveryError> {
        let Layout { shape, stride, .. } = self.layout;
        let has_place = index < usize::from(shape.queues) && size <= shape.size;
        let first = index.checked_mul(stride).and_then(|words| QUEUES_START.checked_add(words));
        match first.filter(|_| has_place) {
            Some(first) => Ok(InflightQueue::new(Arc::clone(&self.memory), first, size)),
            None => Err(RecoveryError::NoPlace { shape, index, size }),
        }
    }

    /// Whether the device was a write-back cache, as far as that was kept.
    #[must_use]
    pub fn writeback(&self) -> Option<bool> {
        match self.memory.word(WRITEBACK_WORD)?.load(Ordering::SeqCst) {
            WRITE_THROUGH => Some(false),
            WRITE_BACK => Some(true),
            _ => None,
        }
    }

    /// Keeps whether the device is a write-back cache.
    pub fn keep_writeback(&self, writeback: bool) {
        if let Some(word) = self.memory.word(WRITEBACK_WORD) {
            word.store(if writeback { WRITE_BACK } else { WRITE_THROUGH }, Ordering::SeqCst);
        }
    }

    /// Bytes of the region.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.layout.bytes()
    }

    /// The file that the front end keeps.
    #[must_use]
    pub fn file(&self) -> &File {
        self.memory.file()
    }
}

/// Where the disk's session stands.
#[derive(Debug)]
enum Stage {
    /// Nothing has been done to the disk that the region of this session does not know: it may
    /// still be taken.
    Untouched(Session),
    /// The front end that is there goes on with that session.
    Begun(Session),
}

/// The recovery of one disk, for as long as it is served.
#[derive(Debug)]
pub struct Recovery {
    /// The disk.
    image: Arc<OpenImage>,
    /// The most queues.
    max_queues: u16,
    /// The boot of the host.
    boot: [u64; 2],
    /// Where the session stands.
    stage: Mutex<Stage>,
}

impl Recovery {
    /// The recovery of `image`, served with up to `max_queues` queues.
    ///
    /// # Errors
    /// `Disk` if the add-cow file cannot be read, `Memory` if the host does not tell its boot.
    pub fn new(image: Arc<OpenImage>, max_queues: u16) -> Result<Self, RecoveryError> {
        let is_writable = image.state.is_writable();
        // Also of a disk without new bits: its requests in flight are good for one session, too.
        let session = match &image.side {
            Some(side) if is_writable => {
                block_on(session::read(&FileStorage::new(Arc::clone(side))))?
            }
            _ => Session::Impossible,
        };
        if is_writable && image.state.clusters() > 0 && session == Session::Impossible {
            log::warn!(
                "the add-cow file's names leave no room for a session number: clusters that are \
                 new since the last flush are lost if this process is killed"
            );
        }
        let boot = boot_id().map_err(RecoveryError::Memory)?;
        Ok(Self { image, max_queues, boot, stage: Mutex::new(Stage::Untouched(session)) })
    }

    /// Begins a session of this process's own, unless it has one: from here on older regions know
    /// less than the disk does.
    ///
    /// # Errors
    /// `Disk`, with what the host said.
    pub fn begin(&self) -> Result<(), RecoveryError> {
        let mut stage = self.stage.lock().expect("no panic while held");
        let Stage::Untouched(old) = *stage else { return Ok(()) };
        let new = match &self.image.side {
            Some(side) if old != Session::Impossible => {
                block_on(session::renew(&FileStorage::new(Arc::clone(side))))?
            }
            _ => Session::Impossible,
        };
        *stage = Stage::Begun(new);
        Ok(())
    }

    /// The front end has gone. Its region may come back for as long as nobody else uses the disk:
    /// who does begins a session of its own.
    pub fn leave(&self) {
        let mut stage = self.stage.lock().expect("no panic while held");
        if let Stage::Begun(session) = *stage {
            *stage = Stage::Untouched(session);
        }
    }

    /// Makes a region for a front end with these queues.
    ///
    /// # Errors
    /// `Shape`, `Disk` and `Memory`.
    pub fn offer(&self, shape: QueueShape) -> Result<Region, RecoveryError> {
        self.check_shape(shape)?;
        self.begin()?;
        let layout = self.layout(shape)?;
        let memory = SharedMemory::create("addcowd-inflight", layout.words);
        let memory = memory.map_err(RecoveryError::Memory)?;
        for (index, value) in self.header(shape, self.session()).into_iter().enumerate() {
            if let Some(word) = memory.word(index) {
                word.store(value, Ordering::SeqCst);
            }
        }
        Ok(self.region(memory, layout))
    }

    /// Takes a region of `len` bytes that a front end gives back, and with it the bits that are new
    /// to this process: they are durable when this returns. No queue runs meanwhile.
    ///
    /// # Errors
    /// `Refused` and `Journal` if it is not for this disk as it is now, or damaged: nothing has
    /// changed then. `Disk` if the host failed.
    pub fn accept(&self, file: File, len: u64, shape: QueueShape) -> Result<Region, RecoveryError> {
        self.check_shape(shape)?;
        let layout = self.layout(shape)?;
        let memory = SharedMemory::open(file).map_err(RecoveryError::Memory)?;
        if memory.words() != layout.words || len != layout.bytes() {
            return Err(RecoveryError::Refused("its length is not that of this disk's"));
        }
        let session = self.session();
        let word = |index| memory.word(index).map_or(0, |word| word.load(Ordering::SeqCst));
        let found: [u64; HEADER_WORDS] = std::array::from_fn(word);
        check_header(&found, &self.header(shape, session))?;
        let region = self.region(memory, layout);
        if let Some(journal) = &region.journal {
            let new = journal.replay(self.image.state.allocation())?;
            if new > 0 {
                log::info!("{new} clusters were new when the last process ended: taken over");
            }
            // Syncs the raw image before it writes a bit (I1). Also where no bit came out of the
            // region: bits that another region of this process holds are not in this one.
            match block_on(self.image.handle(FileStorage::new).flush()) {
                // Nothing can be written any more, so nothing can be lost.
                Ok(()) | Err(ImageError::Failed) => {}
                Err(error) => return Err(error.into()),
            }
        }
        *self.stage.lock().expect("no panic while held") = Stage::Begun(session);
        Ok(region)
    }

    /// The session that this process goes on with, or would if it were given a region now.
    fn session(&self) -> Session {
        match *self.stage.lock().expect("no panic while held") {
            Stage::Untouched(session) | Stage::Begun(session) => session,
        }
    }

    /// Refuses queues that the device does not have.
    fn check_shape(&self, shape: QueueShape) -> Result<(), RecoveryError> {
        let QueueShape { queues, size } = shape;
        let is_fine = (1..=self.max_queues).contains(&queues)
            && size.is_power_of_two()
            && usize::from(size) <= MAX_QUEUE_SIZE;
        if is_fine { Ok(()) } else { Err(RecoveryError::Shape(shape)) }
    }

    /// How many clusters have a bit in a region.
    fn clusters(&self) -> u64 {
        match self.session() {
            Session::Impossible => 0,
            _ => self.image.state.clusters(),
        }
    }

    /// The layout of a region.
    fn layout(&self, shape: QueueShape) -> Result<Layout, RecoveryError> {
        let no_memory = || RecoveryError::Memory(io::ErrorKind::OutOfMemory.into());
        Layout::new(shape, self.clusters()).ok_or_else(no_memory)
    }

    /// A region in that memory.
    fn region(&self, memory: SharedMemory, layout: Layout) -> Region {
        let memory = Arc::new(memory);
        let clusters = self.clusters();
        let journal = (clusters > 0)
            .then(|| Arc::new(BitJournal::new(Arc::clone(&memory), layout.bits, clusters)));
        Region { memory, layout, journal }
    }

    /// The header of a region for this disk.
    fn header(&self, shape: QueueShape, session: Session) -> [u64; HEADER_WORDS] {
        let files = [self.image.side.as_ref(), Some(&self.image.raw)].map(|file| {
            file.map_or([0, 0], |file| [file.identity().device, file.identity().inode])
        });
        let state = &self.image.state;
        let mut header = [
            MAGIC,
            self.boot[0],
            self.boot[1],
            files[0][0],
            files[0][1],
            files[1][0],
            files[1][1],
            match session {
                Session::Number(number) => number,
                Session::Impossible | Session::Never => 0,
            },
            state.virtual_size(),
            state.cluster_size().bytes(),
            self.clusters(),
            u64::from(shape.queues) << 16 | u64::from(shape.size),
            0,
        ];
        header[HEADER_WORDS - 1] = checksum(&header);
        header
    }
}

/// Says what is wrong with a header, if it is not the one that is wanted.
fn check_header(
    found: &[u64; HEADER_WORDS],
    wanted: &[u64; HEADER_WORDS],
) -> Result<(), RecoveryError> {
    let refused = |what| Err(RecoveryError::Refused(what));
    let differs = |range: std::ops::Range<usize>| found[range.clone()] != wanted[range];
    if differs(0..1) {
        refused("it is not one of this version of addcowd")
    } else if found[HEADER_WORDS - 1] != checksum(found) {
        refused("its checksum is wrong")
    } else if differs(1..3) {
        refused("it is of another boot of a host")
    } else if differs(3..7) {
        refused("it is for other files")
    } else if differs(7..8) {
        refused("the disk was changed without it")
    } else if differs(8..11) {
        refused("the disk has another shape now")
    } else if differs(11..12) {
        refused("it is for other queues")
    } else {
        Ok(())
    }
}

/// The checksum of a header: FNV-1a over its words but the last. Against accidents, not attacks.
fn checksum(header: &[u64; HEADER_WORDS]) -> u64 {
    let words = header.iter().take(HEADER_WORDS - 1);
    words.flat_map(|word| word.to_le_bytes()).fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The identity of this boot of the host, as two numbers.
fn boot_id() -> io::Result<[u64; 2]> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let parse = |digits: Option<&str>| {
        digits.and_then(|digits| u64::from_str_radix(digits, 16).ok()).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "/proc/sys/kernel/random/boot_id is no UUID")
        })
    };
    Ok([parse(digits.get(..16))?, parse(digits.get(16..32))?])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every size of every number of queues, for disks of no cluster, few, and too many: the parts
    /// of a region follow one another, each at the start of a cache line, and nothing overflows.
    #[test]
    fn the_parts_of_every_region_have_room_and_do_not_overlap() {
        let clusters = [0, 1, 63, 64, 65, 511, 512, 513, 1 << 32, (1 << 54) - 1, 1 << 63, u64::MAX];
        for size in (0..=15).map(|bits| 1_u16 << bits) {
            for queues in (0..=64).chain([1000, u16::MAX]) {
                for clusters in clusters {
                    let layout = Layout::new(QueueShape { queues, size }, clusters).unwrap();
                    let wide = |number: usize| u128::try_from(number).unwrap();
                    let (entries, count) = (u128::from(size) + 1, u128::from(queues));
                    let stride = entries.div_ceil(8) * 8;
                    let bits = 512 + count * stride;
                    let words = bits + u128::from(clusters).div_ceil(64);
                    assert!(wide(HEADER_WORDS) <= wide(QUEUES_START));
                    assert_eq!((wide(layout.stride), wide(layout.bits)), (stride, bits));
                    assert_eq!(wide(layout.words), words);
                    assert_eq!(u128::from(layout.bytes()), words * 8);
                    // The last queue ends before the bits begin.
                    let last = 512 + count.saturating_sub(1) * stride + entries;
                    assert!(count == 0 || last <= bits, "{queues} queues of {size}");
                }
            }
        }
    }

    /// A header is taken only if every word is the one that is wanted, and the reason that is given
    /// is the first that is true.
    #[test]
    fn a_header_with_any_other_word_is_refused() {
        let mut wanted: [u64; HEADER_WORDS] =
            std::array::from_fn(|index| 0x0101_0101 * (index as u64 + 1));
        wanted[0] = MAGIC;
        wanted[HEADER_WORDS - 1] = checksum(&wanted);
        assert!(check_header(&wanted, &wanted).is_ok());
        for index in 0..HEADER_WORDS {
            for other in (0..64).map(|bit| wanted[index] ^ (1 << bit)).chain([0, u64::MAX]) {
                let mut found = wanted;
                found[index] = other;
                let damaged = check_header(&found, &wanted);
                let said = |result: Result<(), RecoveryError>| result.unwrap_err().to_string();
                let first = if index == 0 { "not one of this version" } else { "checksum" };
                assert!(said(damaged).contains(first), "word {index} as {other:#x}");
                // With a checksum that is right for it.
                found[HEADER_WORDS - 1] = checksum(&found);
                let why = match index {
                    0 => "not one of this version",
                    1..3 => "another boot",
                    3..7 => "other files",
                    7 => "changed without it",
                    8..11 => "another shape",
                    11 => "other queues",
                    // The checksum itself: repaired.
                    _ => continue,
                };
                let refused = said(check_header(&found, &wanted));
                assert!(refused.contains(why), "word {index} as {other:#x}: {refused}");
            }
        }
    }
}
