//! QED files of any bytes.
//!
//! An input is a header, mostly right, and entries of its tables: clusters of the file, the numbers
//! with a meaning of their own, or anything. The oracle is a reader of its own. What it accepts
//! must be accepted and read the same; the rest must be refused, or fail when it is read.

use addcow::image::chain::DiskFormat;

use super::files::{MAX_LEN, Source, Sparse, in_folder, len, name, stays};
use super::layer::{Reader, clusters, compare, open};
use super::{Input, Outcome, Scratch, pattern, to_u32, to_u64, to_usize};

/// Bytes of the header.
const HEADER: usize = 64;

/// Runs one input.
pub fn run(bytes: &[u8]) -> Outcome {
    let mut input = Input::new(bytes);
    let mode = input.u8();
    let seed = input.u16().into();
    let base = len(&mut input);
    let file = if mode & 15 == 15 {
        let mut file = Sparse::default();
        file.put(0, input.rest());
        file
    } else {
        fields(&mut input, mode)
    };
    in_folder(|scratch| {
        file.write(scratch, "disk");
        Sparse::data(0x20, base).write(scratch, "base.img");
        Outcome { executed: u64::from(check(scratch, seed)) }
    })
}

/// Reads a header field by field, and table entries.
fn fields(input: &mut Input<'_>, mode: u8) -> Sparse {
    let odd = |bit: u8| mode >> 7 == 1 && mode >> bit & 1 == 1;
    let bits = 12 + input.u8() % 3 + if mode & 15 == 14 { input.u8() % 12 } else { 0 };
    let cluster = if odd(4) { input.u32() } else { 1 << bits };
    let table = if odd(5) { input.u32() } else { 1 << (input.u8() % 2) };
    let header = if odd(6) { input.u32() } else { 1 };
    let (size, clusters) = (len(input), 2 + u64::from(input.u8() % 48));
    let unit = u64::from(cluster).clamp(4096, 1 << 26);
    let size = if odd(3) { input.edge() } else { size & !511 };
    let backing = if mode >> 4 & 1 == 1 { name(input) } else { Vec::new() };
    let raw_flag = if input.u8() < 240 { 4 } else { 0 };
    let features = u64::from(!backing.is_empty()) * (1 | raw_flag);
    let features = if odd(2) { input.edge() } else { features };
    let l1 = if odd(1) { input.edge() } else { unit };
    let mut bytes = b"QED\0".to_vec();
    [cluster, table, header].iter().for_each(|word| bytes.extend(word.to_le_bytes()));
    [features, 0, 0, l1, size].iter().for_each(|word| bytes.extend(word.to_le_bytes()));
    bytes.extend(u32::to_le_bytes(if odd(0) { input.u32() } else { 64 }));
    bytes.extend(to_u32(backing.len()).to_le_bytes());
    bytes.extend(&backing);
    let mut file = Sparse::default();
    // Data that tells where it lies, in the first clusters behind the tables.
    for index in 0..clusters.min(32) {
        let at = index * unit;
        file.put(at, &if index < 4 { vec![0; 4096] } else { pattern(0x30, at, 4096) });
    }
    file.put(0, &bytes);
    file.len = (clusters * unit + u64::from(mode & 8) * 64).min(MAX_LEN);
    let tables = [l1, unit * 3, unit * 5, unit * u64::from(input.u8() % 8)];
    while !input.is_empty() {
        let table = tables[usize::from(input.u8() % 4)];
        let at = table.saturating_add(8 * u64::from(input.u8()));
        let value = match input.u8() {
            byte @ 0..=1 => byte.into(),
            byte @ 2..=199 => u64::from(byte % 64) * unit,
            byte @ 200..=219 => tables[usize::from(byte % 4)],
            _ => input.edge(),
        };
        if at < file.len.saturating_sub(8) {
            file.parts.push((at, value.to_le_bytes().into()));
        }
    }
    file
}

/// A QED file as the published text reads it.
struct Disk {
    /// The file.
    file: Source,
    /// Bytes of a cluster.
    cluster: u64,
    /// Bytes of a table.
    table: u64,
    /// Bytes of the header.
    header: u64,
    /// Size of the disk.
    size: u64,
    /// The L2 tables, as far as they map the disk.
    l1: Vec<u64>,
    /// Name of the backing file.
    backing: Option<Vec<u8>>,
    /// The backing file.
    base: Option<Source>,
}

impl Disk {
    /// Reads header and L1 table; an error says which rule they break.
    fn read_header(file: Source) -> Result<Self, &'static str> {
        let fixed = file.read(0, HEADER);
        let word = |at: usize| u32::from_le_bytes(fixed[at..at + 4].try_into().expect("4 bytes"));
        let long = |at: usize| u64::from_le_bytes(fixed[at..at + 8].try_into().expect("8 bytes"));
        let (cluster, clusters) = (u64::from(word(4)), u64::from(word(8)));
        if file.len < to_u64(HEADER) || &fixed[..4] != b"QED\0" {
            return Err("magic");
        }
        if long(16) & !7 != 0 || long(16) & 2 != 0 {
            return Err("features");
        }
        if !cluster.is_power_of_two() || !(1 << 12..=1 << 26).contains(&cluster) {
            return Err("cluster size");
        }
        if !clusters.is_power_of_two() || clusters > 16 {
            return Err("table size");
        }
        let header = cluster * u64::from(word(12));
        if header == 0 || header >= (1 << 31) - 1 {
            return Err("header size");
        }
        let (table, size) = (cluster * clusters, long(48));
        let entries = u128::from(table / 8);
        let most = (entries * entries * u128::from(cluster)).min((1 << 63) - 1);
        if size % 512 != 0 || u128::from(size) > most {
            return Err("image size");
        }
        let mut disk =
            Self { file, cluster, table, header, size, l1: Vec::new(), backing: None, base: None };
        if long(16) & 1 == 1 {
            disk.backing = Some(disk.name(word(56).into(), word(60).into())?);
            if long(16) & 4 == 0 {
                return Err("format of the backing file");
            }
        }
        disk.read_l1(long(40))?;
        Ok(disk)
    }

    /// Reads the name of the backing file.
    fn name(&self, offset: u64, size: u64) -> Result<Vec<u8>, &'static str> {
        let placed = offset >= to_u64(HEADER) && offset + size <= self.header;
        if !placed || !(1..=1023).contains(&size) || offset + size > self.file.len {
            return Err("place of the name");
        }
        let bytes = self.file.read(offset, to_usize(size));
        let first = bytes.iter().find(|byte| [b':', b'/'].contains(byte));
        let bad = bytes.contains(&0) || first == Some(&b':');
        if bad { Err("name") } else { Ok(bytes) }
    }

    /// Whether so many bytes from a cluster on lie behind the header, in the file's whole clusters.
    fn is_place(&self, offset: u64, len: u64) -> bool {
        let end = self.file.len / self.cluster * self.cluster;
        let fits = offset.checked_add(len).is_some_and(|last| last <= end);
        offset.is_multiple_of(self.cluster) && offset >= self.header && fits
    }

    /// Reads the L1 table.
    fn read_l1(&mut self, offset: u64) -> Result<(), &'static str> {
        if !self.is_place(offset, self.table) {
            return Err("place of the L1 table");
        }
        let reach = self.table / 8 * self.cluster;
        let count = self.size.div_ceil(reach);
        let bytes = self.file.read(offset, to_usize(count * 8));
        let entries = bytes.as_chunks().0.iter().map(|entry| u64::from_le_bytes(*entry));
        self.l1 = entries.collect();
        let mut used: Vec<u64> = self.l1.iter().copied().filter(|entry| *entry != 0).collect();
        if used.iter().any(|entry| !self.is_place(*entry, self.table)) {
            return Err("place of an L2 table");
        }
        used.push(offset);
        used.sort_unstable();
        let apart = used.windows(2).all(|pair| pair[1] - pair[0] >= self.table);
        if apart { Ok(()) } else { Err("tables that share bytes") }
    }
}

impl Reader for Disk {
    const IS_STRICT: bool = true;

    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, len: usize) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        for (at, len) in clusters(offset, len, self.cluster) {
            let (cluster, within) = (at / self.cluster, at % self.cluster);
            let entries = self.table / 8;
            let entry = match self.l1[to_usize(cluster / entries)] {
                0 => 0,
                table => u64::from_le_bytes(self.file.word(table + cluster % entries * 8)),
            };
            match (entry, &self.base) {
                (0, Some(base)) => bytes.extend(base.read(at, len)),
                (0 | 1, _) => bytes.extend(vec![0; len]),
                (data, _) if self.is_place(data, self.cluster) => {
                    bytes.extend(self.file.read(data + within, len));
                }
                _ => return None,
            }
        }
        Some(bytes)
    }

    fn is_flawed(&self, _offset: u64, _len: usize) -> bool {
        false
    }
}

/// Opens the disk, and compares what it shows. Returns whether there was anything to compare.
fn check(scratch: &Scratch, seed: u64) -> bool {
    let file = Source::open(scratch, b"disk").expect("it was written");
    let own = file.inode();
    let mut wanted = Disk::read_header(file);
    if let Ok(disk) = &mut wanted
        && let Some(name) = &disk.backing
    {
        if !stays(name) {
            return false;
        }
        let base = Source::open(scratch, name);
        disk.base = base.filter(|base| base.inode() != own);
        if disk.base.is_none() {
            wanted = Err("backing file");
        }
    }
    match (wanted, open(scratch, DiskFormat::Qed)) {
        (Ok(disk), Ok(chain)) => compare(&chain, &disk, seed),
        (Err(_), Err(_)) => return false,
        (Ok(_), Err(error)) => panic!("a good file is refused: {error}"),
        (Err(rule), Ok(_)) => panic!("a file is accepted that breaks the rule about {rule}"),
    }
    true
}
