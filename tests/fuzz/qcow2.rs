//! Qcow2 files of any bytes, also with an external data file.
//!
//! An input is a header, mostly right, table entries and compressed clusters, or the file's bytes
//! as they are. The oracle is a reader of its own: where it finds data, the same must be read, or
//! nothing; where tables make no sense to it, it has no opinion. What is refused is refused for any
//! reason; that good files are accepted is shown by `tests/qcow2.rs` and by the corpus.

#![expect(clippy::big_endian_bytes, reason = "qcow2 is")]

use addcow::image::chain::DiskFormat;

use super::files::{MAX_LEN, Source, Sparse, in_folder, len, name, stays};
use super::inflate::{Inflated, inflate};
use super::layer::{Reader, clusters, compare, open};
use super::{Input, Outcome, Scratch, pattern, to_u32, to_u64, to_usize};

/// Extension: format of the backing file.
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Extension: name of the data file.
const DATA_FILE: u32 = 0x4441_5441;
/// Where a table entry has an offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Runs one input.
pub fn run(bytes: &[u8]) -> Outcome {
    let mut input = Input::new(bytes);
    let mode = input.u8();
    let seed = input.u16().into();
    let (base, raw) = (len(&mut input), len(&mut input));
    let file = if mode & 15 == 15 {
        let mut file = Sparse::default();
        file.put(0, input.rest());
        file
    } else {
        fields(&mut input, mode)
    };
    in_folder(|scratch| {
        file.write(scratch, "disk");
        Sparse::data(0x10, raw).write(scratch, "disk.raw");
        Sparse::data(0x20, base).write(scratch, "base.img");
        Outcome { executed: u64::from(check(scratch, seed)) }
    })
}

/// The bytes of an extension.
fn extension(kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = [kind.to_be_bytes(), to_u32(data.len()).to_be_bytes()].concat();
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

/// Reads a header field by field, and then table entries and clusters.
fn fields(input: &mut Input<'_>, mode: u8) -> Sparse {
    let oddities = if mode >> 7 == 1 { input.u16() } else { 0 };
    let odd = |bit: u8| oddities >> bit & 1 == 1;
    let bits = 9 + u32::from(input.u8() % 4) + if mode & 15 == 14 { 6 } else { 0 };
    let cluster = 1_u64 << bits;
    let version = if mode >> 4 & 1 == 1 { 2_u32 } else { 3 };
    let external = mode >> 5 & 1 == 1 && version == 3;
    let size = if odd(0) { input.edge() } else { len(input) };
    let reach = cluster * cluster / 8;
    let l1_entries = if odd(1) { input.u32() } else { to_u32(to_usize(size.div_ceil(reach) % 64)) };
    let (l1, refcounts) = (cluster * 3, cluster);
    let l1 = if odd(2) { input.edge() } else { l1 };
    let backing = if mode >> 6 & 1 == 1 { name(input) } else { Vec::new() };
    let incompatible = if odd(3) { input.edge() } else { u64::from(external) * 4 };
    let autoclear = if odd(4) { input.edge() } else { 0 };
    let mut extensions = Vec::new();
    let format: &[u8] = if odd(5) { input.take(7) } else { b"raw" };
    if !backing.is_empty() {
        extensions.extend(extension(BACKING_FORMAT, format));
    }
    if external {
        let data: Vec<u8> = if odd(6) { name(input) } else { b"disk.raw".into() };
        extensions.extend(extension(DATA_FILE, &data));
    }
    if odd(7) {
        let (kind, len) = (input.u32(), usize::from(input.u8() % 64));
        extensions.extend(extension(kind, input.take(len)));
    }
    extensions.extend([0; 8]);
    let length = if version == 2 { 72 } else { 104 };
    let backing_at = to_u64(length + extensions.len());
    let backing_at = if backing.is_empty() { 0 } else { backing_at };
    let mut bytes = b"QFI\xfb".to_vec();
    bytes.extend(version.to_be_bytes());
    bytes.extend(if odd(8) { input.edge() } else { backing_at }.to_be_bytes());
    bytes.extend(to_u32(backing.len()).to_be_bytes());
    bytes.extend(if odd(9) { input.u32() } else { bits }.to_be_bytes());
    bytes.extend(size.to_be_bytes());
    bytes.extend(if odd(10) { input.u32() } else { 0 }.to_be_bytes());
    bytes.extend(l1_entries.to_be_bytes());
    bytes.extend(l1.to_be_bytes());
    bytes.extend(if odd(11) { input.edge() } else { refcounts }.to_be_bytes());
    bytes.extend(if odd(12) { input.u32() } else { 1 }.to_be_bytes());
    bytes.extend([0; 12]);
    if version == 3 {
        [incompatible, 0, autoclear].iter().for_each(|word| bytes.extend(word.to_be_bytes()));
        bytes.extend(if odd(13) { input.u32() } else { 4 }.to_be_bytes());
        bytes.extend(if odd(14) { input.u32() } else { 104 }.to_be_bytes());
    }
    bytes.extend(extensions);
    bytes.extend(backing);
    body(input, bytes, cluster, l1)
}

/// Puts the header into a file, reads table entries and clusters, and adds them.
fn body(input: &mut Input<'_>, header: Vec<u8>, cluster: u64, l1: u64) -> Sparse {
    let mut file = Sparse::default();
    let clusters = 8 + u64::from(input.u8() % 56);
    for index in 8..clusters {
        file.put(index * cluster, &pattern(0x30, index * cluster, to_usize(cluster.min(4096))));
    }
    file.put(0, &header);
    file.put(cluster, &(cluster * 2).to_be_bytes());
    file.len = (clusters * cluster).min(MAX_LEN);
    let tables = [l1, cluster * 4, cluster * 5, cluster * 6];
    while !input.is_empty() {
        let command = input.u8();
        if command >= 232 {
            let at = cluster * (8 + u64::from(input.u8() % 56)) + u64::from(command & 3) * 100;
            let len = usize::from(input.u16() % 2048);
            let data = if command & 4 == 0 { deflated(input, len) } else { input.take(len).into() };
            file.put(at, &data);
            continue;
        }
        let index = u64::from(input.u8());
        let at = tables[usize::from(command % 4)].saturating_add(8 * index);
        let place = u64::from(input.u8() % 72) * cluster;
        let own = index * cluster;
        let value = match command >> 2 {
            0..=15 => 1 << 63 | place,
            16..=23 => place,
            24..=29 => 1 << 63 | own,
            30..=33 => u64::from(input.u8() & 1),
            34..=45 => {
                let shift = 62 - (cluster.trailing_zeros() - 8);
                let sectors = u64::from(input.u8() % 8);
                let sectors = sectors & ((1 << (62 - shift)) - 1);
                1 << 62 | sectors << shift | (place + u64::from(command & 3) * 100)
            }
            46..=51 => 1 << 63 | place | 1,
            _ => input.edge(),
        };
        if at < MAX_LEN {
            file.put(at, &value.to_be_bytes());
        }
    }
    file
}

/// A deflate stream of one stored block.
fn deflated(input: &mut Input<'_>, len: usize) -> Vec<u8> {
    let len = u16::try_from(len).expect("short");
    let mut bytes = vec![1];
    bytes.extend(len.to_le_bytes());
    bytes.extend((!len).to_le_bytes());
    bytes.extend(pattern(0x40, input.u16().into(), len.into()));
    bytes
}

/// A qcow2 file as the published text reads it.
struct Disk {
    /// The file.
    file: Source,
    /// Version 3 or later.
    is_v3: bool,
    /// log2 of the cluster size.
    bits: u32,
    /// Size of the disk.
    size: u64,
    /// Where the L1 table is.
    l1: u64,
    /// The external data file.
    data: Option<Source>,
    /// The backing file.
    base: Option<Source>,
}

/// What the header names.
struct Names {
    /// The backing file and its format.
    backing: Option<(Vec<u8>, Vec<u8>)>,
    /// The data file.
    data: Option<Vec<u8>>,
}

impl Disk {
    /// Reads a header, whose rules are not checked, and the names in it.
    fn read_header(file: Source) -> (Self, Names) {
        let fixed = file.read(0, 104);
        let word = |at: usize| u32::from_be_bytes(fixed[at..at + 4].try_into().expect("4 bytes"));
        let long = |at: usize| u64::from_be_bytes(fixed[at..at + 8].try_into().expect("8 bytes"));
        let is_v3 = word(4) >= 3;
        let cluster = 1_u64 << word(20).min(21);
        let (backing_at, backing_len) = (long(8), usize::try_from(word(16)).expect("64 bits"));
        let end = if backing_at == 0 { cluster } else { backing_at.min(cluster) };
        let mut at = if is_v3 { u64::from(word(100)) } else { 72 };
        let (mut format, mut data) = (Vec::new(), None);
        while at + 8 <= end {
            let prefix = u64::from_be_bytes(file.word(at));
            let (kind, len) = (prefix >> 32, to_usize(prefix & u64::from(u32::MAX)));
            if kind == 0 || to_u64(len) > cluster {
                break;
            }
            let bytes = file.read(at + 8, len);
            if kind == u64::from(BACKING_FORMAT) {
                format = bytes;
            } else if kind == u64::from(DATA_FILE) {
                data = Some(bytes);
            }
            at += 8 + to_u64(len).next_multiple_of(8);
        }
        let name = || file.read(backing_at, backing_len.min(1023));
        let backing = (backing_at != 0).then(|| (name(), format));
        let data = data.filter(|_| is_v3 && long(72) & 4 != 0);
        let (bits, size, l1) = (word(20), long(24) & !511, long(40));
        (Self { file, is_v3, bits, size, l1, data: None, base: None }, Names { backing, data })
    }

    /// The bytes of a part of a cluster; `None` where there is no opinion.
    fn part(&self, at: u64, len: usize) -> Option<Vec<u8>> {
        let cluster = 1_u64 << self.bits;
        let (index, within) = (at >> self.bits, at % cluster);
        let per_table = cluster / 8;
        let below = || match &self.base {
            Some(base) => base.read(at, len),
            None => vec![0; len],
        };
        let l1 = self.entry(self.l1, index / per_table)?;
        if l1 & !(1 << 63 | OFFSET) != 0 || !(l1 & OFFSET).is_multiple_of(cluster) {
            return None;
        }
        if l1 & OFFSET == 0 {
            return Some(below());
        }
        let entry = self.entry(l1 & OFFSET, index % per_table)?;
        if entry >> 62 & 1 == 1 {
            return self.compressed(entry).map(|all| {
                let start = to_usize(within);
                all.bytes[start..start + len].to_vec()
            });
        }
        let (offset, copied) = (entry & OFFSET, entry >> 63 == 1);
        let reserved = entry & !(1 << 63 | OFFSET | u64::from(self.is_v3)) != 0;
        if reserved || !offset.is_multiple_of(cluster) {
            return None;
        }
        if entry & 1 == 1 {
            return Some(vec![0; len]);
        }
        if offset == 0 && !(copied && self.data.is_some()) {
            return Some(below());
        }
        let misplaced = self.data.is_some() && offset != index * cluster;
        let source = self.data.as_ref().unwrap_or(&self.file);
        let there = offset.checked_add(cluster).is_some_and(|end| end <= source.len);
        (there && !misplaced).then(|| source.read(offset + within, len))
    }

    /// An entry of a table; `None` past the end of the file.
    fn entry(&self, table: u64, index: u64) -> Option<u64> {
        let at = table.checked_add(index * 8)?;
        (at + 8 <= self.file.len).then(|| u64::from_be_bytes(self.file.word(at)))
    }

    /// A compressed cluster.
    fn compressed(&self, entry: u64) -> Option<Inflated> {
        let shift = 62 - (self.bits - 8);
        let offset = entry & ((1 << shift) - 1);
        let sectors = (entry & !(3 << 62)) >> shift;
        let len = (sectors + 1) * 512 - offset % 512;
        if self.data.is_some() || entry >> 63 == 1 || offset >= self.file.len {
            return None;
        }
        let there = len.min(self.file.len - offset);
        inflate(&self.file.read(offset, to_usize(there)), 1 << self.bits)
    }
}

impl Reader for Disk {
    const IS_STRICT: bool = false;

    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, len: usize) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        for (at, len) in clusters(offset, len, 1 << self.bits) {
            bytes.extend(self.part(at, len)?);
        }
        Some(bytes)
    }

    fn is_flawed(&self, offset: u64, len: usize) -> bool {
        let per_table = (1 << self.bits) / 8;
        let mut entries = clusters(offset, len, 1 << self.bits).flat_map(|(at, _)| {
            let l1 = self.entry(self.l1, (at >> self.bits) / per_table).unwrap_or(0);
            let table = l1 & OFFSET;
            (0..per_table).map(move |index| self.entry(table, index)).filter(move |_| table != 0)
        });
        entries.any(|entry| {
            let reserved = !(1 << 63 | OFFSET | u64::from(self.is_v3));
            entry.is_none_or(|entry| {
                let misplaced = entry & OFFSET & ((1 << self.bits) - 1) != 0;
                let compressed = entry >> 62 & 1 == 1;
                let bad = if compressed { 1 << 63 } else { reserved };
                // What follows the cluster's bytes in its stream may be judged, too.
                let goes_on = || self.compressed(entry).is_none_or(|all| !all.is_whole);
                entry & bad != 0 || !compressed && misplaced || compressed && goes_on()
            })
        })
    }
}

/// Opens the disk, and compares what it shows. Returns whether there was anything to compare.
fn check(scratch: &Scratch, seed: u64) -> bool {
    let file = Source::open(scratch, b"disk").expect("it was written");
    let (mut disk, names) = Disk::read_header(file);
    let (backing, data) = (names.backing, names.data);
    let all = backing.iter().map(|(name, _)| name).chain(&data);
    if all.into_iter().any(|name| !stays(name)) {
        return false;
    }
    let Ok(chain) = open(scratch, DiskFormat::Qcow2) else { return false };
    if let Some(name) = &data {
        disk.data = Some(Source::open(scratch, name).expect("a file that was opened"));
    }
    if let Some((name, format)) = &backing {
        if format != b"raw" {
            return false;
        }
        disk.base = Some(Source::open(scratch, name).expect("a file that was opened"));
    }
    compare(&chain, &disk, seed);
    true
}
