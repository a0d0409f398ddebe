//! Add-cow files of any bytes, over a raw image and a backing file of any length.
//!
//! An input is a header field by field, mostly right, with some bytes changed afterwards, or the
//! file's bytes as they are. The oracle is a reader of its own, written from `docs/format.md`: what
//! it accepts must be accepted and read the same, sector by sector; the rest must be refused.
//!
//! Disks are opened for reading only, as names may lead anywhere in the folder. Only raw backing
//! files are compared; for others it is enough that nothing breaks.

use addcow::executor::block_on;
use addcow::format::Header;
use addcow::image::check;
use addcow::image::open::{self, OpenOptions};
use addcow::storage::IoBuffer;
use addcow::storage::file::FileStorage;
use addcow::storage::lock::Locking;

use super::files::{Source, Sparse, in_folder, len, name, stays, windows};
use super::layer::clusters;
use super::{Input, Outcome, Scratch, to_u32, to_u64, to_usize};

/// Bytes of the fixed header.
const FIXED: usize = 76;

/// Runs one input.
pub fn run(bytes: &[u8]) -> Outcome {
    let mut input = Input::new(bytes);
    let mode = input.u8();
    let seed = input.u16().into();
    let (raw, base) = (len(&mut input), len(&mut input));
    let tail = input.edge();
    let mut side = if mode & 7 == 7 { raw_bytes(&mut input) } else { fields(&mut input, raw) };
    match mode >> 3 & 3 {
        0 => {}
        1 => side.len += tail % (1 << 26),
        2 => side.len = side.len.saturating_sub(tail),
        _ => side.len += 4096,
    }
    in_folder(|scratch| {
        side.write(scratch, "disk");
        Sparse::data(0x10, raw).write(scratch, "disk.raw");
        Sparse::data(0x20, base).write(scratch, "base.img");
        Outcome { executed: u64::from(compare(scratch, seed)) }
    })
}

/// A file of the bytes that are left.
fn raw_bytes(input: &mut Input<'_>) -> Sparse {
    let mut side = Sparse::default();
    side.put(0, input.rest());
    side
}

/// Reads a header field by field, and the bitmap's bytes.
fn fields(input: &mut Input<'_>, raw: u64) -> Sparse {
    let bits = match input.u8() {
        byte @ 0..=247 => 9 + u32::from(byte % 13),
        _ => input.u32(),
    };
    let oddities = input.u8();
    let odd = |bit: u8| oddities >> bit & 1 == 1;
    let features = if odd(0) && odd(7) { input.edge() } else { 0 };
    let compat = if odd(1) { input.edge() } else { 0 };
    let right = 1_u64 << bits.clamp(12, 21);
    let header_size = if odd(2) && odd(7) { input.edge() } else { right };
    let image = name(input);
    let backing = if odd(3) { Vec::new() } else { name(input) };
    let backing_at = if odd(4) && odd(7) { input.edge() } else { to_u64(FIXED) };
    let backing_at = if backing.is_empty() && !odd(5) { 0 } else { backing_at };
    let after = backing_at.max(to_u64(FIXED)).saturating_add(to_u64(backing.len()));
    let image_at = if odd(5) { input.edge() } else { after };
    let formats = ["raw", "raw", "raw", "raw", "add-cow", "qcow2", "qed", "", "rawrawrawrawrawr"];
    let format = |byte: u8| {
        let text = formats[usize::from(byte) * usize::from(odd(6)) % formats.len()].as_bytes();
        let mut field = [0; 16];
        field[..text.len()].copy_from_slice(text);
        field
    };
    let low = |value: u64| u32::try_from(value & u64::from(u32::MAX)).expect("masked");
    let words = [low(backing_at), to_u32(backing.len()), low(image_at), to_u32(image.len()), bits];
    let mut fixed = b"ACOW".to_vec();
    words.iter().for_each(|word| fixed.extend(word.to_le_bytes()));
    fixed.extend(features.to_le_bytes());
    fixed.extend(compat.to_le_bytes());
    fixed.extend(low(header_size).to_le_bytes());
    fixed.extend(format(input.u8()));
    fixed.extend(format(input.u8()));
    let mut side = Sparse { parts: Vec::new(), len: right };
    side.put(0, &fixed);
    for (at, bytes) in [(backing_at, backing), (image_at, image)] {
        if at < right {
            side.put(at, &bytes);
        }
    }
    for _ in 0..input.u8() % 4 {
        let at = u64::from(input.u16()) % 160;
        side.put(at, &[input.u8()]);
    }
    let used = raw.div_ceil(512 << bits.saturating_sub(9).min(12)).div_ceil(8);
    let bitmap = input.rest();
    side.put(right, &bitmap[..bitmap.len().min(to_usize(used))]);
    side.len = side.len.max(right + used);
    side
}

/// An add-cow disk as the published text reads it.
struct Disk {
    /// Bytes of a cluster.
    cluster: u64,
    /// Where the bitmap starts.
    header_size: u64,
    /// Name and format of the backing file.
    backing: Option<(Vec<u8>, Vec<u8>)>,
    /// Name and format of the image file.
    image: (Vec<u8>, Vec<u8>),
    /// Whether every cluster is in the image file.
    all_allocated: bool,
}

/// Reads a header; an error says which rule it breaks.
fn read_header(side: &Source) -> Result<Disk, &'static str> {
    if side.len < to_u64(FIXED) {
        return Err("length");
    }
    let fixed = side.read(0, FIXED);
    let word = |at: usize| u32::from_le_bytes(fixed[at..at + 4].try_into().expect("4 bytes"));
    let long = |at: usize| u64::from_le_bytes(fixed[at..at + 8].try_into().expect("8 bytes"));
    if &fixed[..4] != b"ACOW" {
        return Err("magic");
    }
    if long(24) != 0 {
        return Err("features");
    }
    if !(9..=21).contains(&word(20)) {
        return Err("cluster_bits");
    }
    let cluster = 1_u64 << word(20);
    let header_size = cluster.max(4096);
    if u64::from(word(40)) != header_size {
        return Err("header_size");
    }
    let name = |offset: u32, size: u32, most: u32| {
        let (offset, size) = (u64::from(offset), u64::from(size));
        let placed = offset >= to_u64(FIXED) && offset <= header_size - 2;
        if !placed || offset + size > header_size || size == 0 || size > u64::from(most) {
            return Err("place of a name");
        }
        let bytes = side.read(offset, to_usize(size));
        let first = bytes.iter().find(|byte| [b':', b'/'].contains(byte));
        if offset + size > side.len || bytes.contains(&0) || first == Some(&b':') {
            return Err("name");
        }
        Ok(bytes)
    };
    let image = (name(word(12), word(16), 4095)?, read_format(&fixed[60..76])?);
    let all_allocated = long(32) & 1 == 1;
    let backing = || match (word(4), word(8)) {
        (0, 0) => Ok(None),
        (0, _) | (_, 0) => Err("backing place"),
        (offset, size) => {
            let found = name(offset, size, 1023)?;
            let (from, to) = (u64::from(offset), u64::from(offset) + u64::from(size));
            let (start, end) = (u64::from(word(12)), u64::from(word(12)) + u64::from(word(16)));
            if from.max(start) < to.min(end) || found == image.0 {
                return Err("two names");
            }
            Ok(Some((found, read_format(&fixed[44..60])?)))
        }
    };
    let backing = match backing() {
        Err(_) if all_allocated => None,
        other => other?,
    };
    Ok(Disk { cluster, header_size, backing, image, all_allocated })
}

/// Reads the name of a format.
fn read_format(field: &[u8]) -> Result<Vec<u8>, &'static str> {
    let len = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    let (text, rest) = field.split_at(len);
    let good = !text.is_empty() && text.iter().all(u8::is_ascii_graphic);
    if good && rest.iter().all(|byte| *byte == 0) { Ok(text.to_vec()) } else { Err("format") }
}

/// The files of a disk that can be read.
struct Files {
    /// Its header.
    disk: Disk,
    /// The add-cow file.
    side: Source,
    /// The image file.
    raw: Source,
    /// The backing file, if it is there and needed.
    base: Option<Source>,
    /// Whether the backing file has another format than raw: then nothing is known here.
    unknown: bool,
}

/// Opens the files as the text says; an error says what is wrong.
fn open_files(scratch: &Scratch, disk: Disk, side: Source) -> Result<Files, &'static str> {
    if disk.image.1 != b"raw" {
        return Err("format of the image file");
    }
    let raw = Source::open(scratch, &disk.image.0).ok_or("image file")?;
    if raw.inode() == side.inode() || raw.len < 512 {
        return Err("image file");
    }
    let used = (raw.len / 512 * 512).div_ceil(disk.cluster).div_ceil(8);
    if !disk.all_allocated && side.len < disk.header_size + used {
        return Err("bitmap");
    }
    let mut files = Files { disk, side, raw, base: None, unknown: false };
    let Some((name, format)) = files.disk.backing.as_ref().filter(|_| !files.disk.all_allocated)
    else {
        return Ok(files);
    };
    if format != b"raw" {
        files.unknown = true;
        return Ok(files);
    }
    let base = Source::open(scratch, name).ok_or("backing file")?;
    if [files.side.inode(), files.raw.inode()].contains(&base.inode()) {
        return Err("backing file is another one");
    }
    files.base = Some(base);
    Ok(files)
}

impl Files {
    /// What the disk shows: `len` bytes from `offset` on, both whole sectors.
    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let part = |(at, len): (u64, usize)| {
            let cluster = at / self.disk.cluster;
            let byte = self.side.read(self.disk.header_size + cluster / 8, 1)[0];
            let allocated = self.disk.all_allocated || byte >> (cluster % 8) & 1 == 1;
            match (&self.base, allocated) {
                (_, true) => self.raw.read(at, len),
                (Some(base), false) => base.read(at, len),
                (None, false) => vec![0; len],
            }
        };
        clusters(offset, len, self.disk.cluster).flat_map(part).collect()
    }
}

/// Opens the disk, and compares what it shows. Returns whether there was anything to compare.
fn compare(scratch: &Scratch, seed: u64) -> bool {
    let side = Source::open(scratch, b"disk").expect("it was written");
    // What is decoded is decoded from any bytes, not only from those of a file.
    let _ = Header::decode(&side.read(0, to_usize(side.len.min(1 << 13))));
    let header = read_header(&side);
    if let Ok(disk) = &header {
        let names = [Some(&disk.image.0), disk.backing.as_ref().map(|(name, _)| name)];
        if names.into_iter().flatten().any(|name| !stays(name)) {
            return false;
        }
    }
    let wanted = header.and_then(|disk| open_files(scratch, disk, side));
    let path = scratch.path("disk");
    let opened = open::add_cow(&path, OpenOptions::READ_ONLY);
    let files = match (wanted, &opened) {
        (Ok(files), _) if files.unknown => files,
        (Ok(files), Ok(_)) => files,
        (Err(_), Err(_)) => return false,
        (Ok(_), Err(error)) => panic!("a good file is refused: {error}"),
        (Err(rule), Ok(_)) => panic!("a file is accepted that breaks the rule about {rule}"),
    };
    let Ok(image) = opened else { return false };
    let size = image.state.virtual_size();
    assert_eq!(size, files.raw.len / 512 * 512, "size of the disk");
    let handle = image.handle(FileStorage::new);
    for (offset, len) in windows(size, seed) {
        let buffer = IoBuffer::from_bytes(&vec![0xa5; len]);
        let read = block_on(handle.read(offset, buffer.clone()));
        if files.unknown {
            continue;
        }
        read.expect("a good disk can be read");
        let same = buffer.to_vec() == files.read(offset, len);
        assert!(same, "{len} bytes at {offset:#x} differ from what the text says");
    }
    drop((handle, image));
    let report = check::add_cow(&path, false, Locking::On);
    assert!(report.is_ok() || files.unknown, "it can be read, but not be checked");
    !files.unknown
}
