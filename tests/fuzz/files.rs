//! Files of hostile images, in the scratch folder, and which parts of a disk are compared.
//!
//! Not here: what is in the files, and who reads them.

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::{FileExt, symlink};
use std::os::unix::net::UnixListener;

use rustix::fs::{CWD, FileType, Mode, mknodat};

use super::{Input, Scratch, pattern, to_u64, to_usize};

/// The longest file that an input may ask for, in bytes; nearly all of it is a hole.
pub const MAX_LEN: u64 = 16 << 30;

/// How much of a data file is filled at its start and at its end.
const FILLED: u64 = 64 << 10;

/// File names that an image may hold: good ones, and those of everything that must be refused.
const NAMES: [&str; 16] = [
    "disk.raw",
    "base.img",
    "link",
    "hard",
    "disk",
    "folder",
    "fifo",
    "gone",
    "socket",
    "loop",
    "lower",
    "missing",
    "nbd:disk",
    "./disk.raw",
    "json:{}",
    "base.img",
];

thread_local! {
    /// The scratch folder of this thread.
    static FOLDER: RefCell<Option<Scratch>> = const { RefCell::new(None) };
}

/// Calls `action` with this thread's folder, in which every kind of file has a name.
pub fn in_folder<T>(action: impl FnOnce(&Scratch) -> T) -> T {
    FOLDER.with_borrow_mut(|folder| action(folder.get_or_insert_with(make_folder)))
}

/// Makes a folder with one file of each kind.
fn make_folder() -> Scratch {
    let scratch = Scratch::new();
    let path = |name| scratch.path(name);
    std::fs::write(path("disk.raw"), b"").expect("a file");
    std::fs::write(path("base.img"), b"").expect("a file");
    std::fs::hard_link(path("disk.raw"), path("hard")).expect("a hard link");
    std::fs::create_dir(path("folder")).expect("a folder");
    for (name, target) in [("link", "base.img"), ("gone", "nowhere"), ("loop", "loop")] {
        symlink(target, path(name)).expect("a symbolic link");
    }
    mknodat(CWD, path("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a FIFO");
    drop(UnixListener::bind(path("socket")).expect("a socket"));
    scratch
}

/// A name: one of the table, or any bytes without the folder's end.
pub fn name(input: &mut Input<'_>) -> Vec<u8> {
    match input.u8() {
        byte @ 0..=239 => {
            let most = NAMES.len();
            // The good ones come most often.
            let index = if byte < 160 { usize::from(byte % 2) } else { usize::from(byte) % most };
            NAMES[index].into()
        }
        _ => {
            let len = usize::from(input.u8());
            input.take(len).to_vec()
        }
    }
}

/// Whether a name stays in the folder: others are not followed here, whatever they are.
pub fn stays(name: &[u8]) -> bool {
    let plain = name.strip_prefix(b"./").unwrap_or(name);
    !plain.contains(&b'/') && plain != b".."
}

/// A length in bytes for a data file.
pub fn len(input: &mut Input<'_>) -> u64 {
    let class = input.u8();
    let number = u64::from(input.u16());
    match class {
        0..=159 => (1 + number % 512) * 512,
        160..=199 => number,
        200..=231 => number << 9 << (class & 7),
        _ => (1 << (class % 35)) + number,
    }
    .min(MAX_LEN)
}

/// A file with holes.
#[derive(Debug, Default, Clone)]
pub struct Sparse {
    /// Where which bytes are; later ones win.
    pub parts: Vec<(u64, Vec<u8>)>,
    /// Its length in bytes.
    pub len: u64,
}

impl Sparse {
    /// A data file of `len` bytes: filled at both ends with what tells where it comes from.
    pub fn data(tag: u8, len: u64) -> Self {
        let filled = to_usize(len.min(FILLED));
        let tail = len.saturating_sub(FILLED);
        let parts = [0, tail].map(|at| (at, pattern(tag, at, filled)));
        Self { parts: parts.into(), len }
    }

    /// Puts bytes somewhere; the file is at least that long.
    pub fn put(&mut self, offset: u64, bytes: &[u8]) {
        self.len = self.len.max(offset + to_u64(bytes.len()));
        self.parts.push((offset, bytes.to_vec()));
    }

    /// Makes the file `name`.
    pub fn write(&self, scratch: &Scratch, name: &str) {
        let file = File::create(scratch.path(name)).expect("a file");
        for (offset, bytes) in &self.parts {
            file.write_all_at(bytes, *offset).expect("space");
        }
        file.set_len(self.len).expect("a length");
    }
}

/// A file that the independent readers read.
#[derive(Debug)]
pub struct Source {
    /// The file.
    file: File,
    /// Its length in bytes.
    pub len: u64,
}

impl Source {
    /// Opens the file `name`; `None` if it is no regular file, or not there.
    pub fn open(scratch: &Scratch, name: &[u8]) -> Option<Self> {
        let path = scratch.path(std::str::from_utf8(name).ok()?);
        // Looked at first: a FIFO would wait for its other end.
        let metadata = std::fs::metadata(&path).ok().filter(std::fs::Metadata::is_file)?;
        Some(Self { file: File::open(path).ok()?, len: metadata.len() })
    }

    /// Who the file is.
    pub fn inode(&self) -> u64 {
        std::os::unix::fs::MetadataExt::ino(&self.file.metadata().expect("an open file"))
    }

    /// `len` bytes at `offset`; zeros past the end.
    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let there = to_usize(self.len.saturating_sub(offset).min(to_u64(len)));
        self.file.read_exact_at(&mut bytes[..there], offset).expect("it is that long");
        bytes
    }

    /// The eight bytes at `offset`.
    pub fn word(&self, offset: u64) -> [u8; 8] {
        self.read(offset, 8).try_into().expect("8 bytes")
    }
}

/// Which parts of a disk of `size` bytes are read, in pieces of odd lengths: all of a small one.
pub fn windows(size: u64, seed: u64) -> Vec<(u64, usize)> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut found = Vec::new();
    let mut all = |start: u64, end: u64, rng: &mut fastrand::Rng| {
        let mut at = start;
        while at < end {
            let len = (rng.u64(1..=96) * 512).min(end - at);
            found.push((at, to_usize(len)));
            at += len;
        }
    };
    if size <= 192 << 10 {
        all(0, size, &mut rng);
        return found;
    }
    let sectors = size / 512;
    let mut starts = vec![0, sectors.saturating_sub(192)];
    // Around powers of two, where tables end, and anywhere.
    starts.extend((16..34).map(|bit| (1 << bit) / 512 - 8));
    starts.extend((0..4).map(|_| rng.u64(0..sectors)));
    for start in starts.into_iter().filter(|start| *start < sectors) {
        let end = (start + rng.u64(1..=192)).min(sectors);
        all(start * 512, end * 512, &mut rng);
    }
    found
}
