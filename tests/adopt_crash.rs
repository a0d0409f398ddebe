//! Power cuts and faults while a qcow2 disk is adopted or exported, and damaged tables.
//!
//! The files lie on the simulated disk. After a cut before any operation, whatever of the unsynced
//! sectors gets through, the qcow2 file and the data file's allocated clusters have the bytes that
//! they had; adopting can be done again; and once it has ended the new disk is durable.
//!
//! Replay: `ADDCOW_SEED=N cargo test --test adopt_crash NAME`. Not here: names and real files
//! (`adopt.rs`); a cut around the rename, which the file system makes whole.

mod rig;

use std::cell::Cell;
use std::error::Error;

use addcow::executor::block_on;
use addcow::format::qcow2::header::EXTERNAL_DATA;
use addcow::format::qcow2::layout::REFCOUNT_ORDER;
use addcow::format::qcow2::{Header as Qcow2Header, L2Content, L2Entry};
use addcow::format::{BitmapGeometry, FileName, FileReference, FileRole, Header};
use addcow::image::allocation::AllocationMap;
use addcow::image::chain::Chain;
use addcow::image::{Image, ImageState, load};
use addcow::jobs::Unwatched;
use addcow::jobs::qcow2::tables::Tables;
use addcow::jobs::qcow2::takeover::Takeover;
use addcow::jobs::qcow2::walk::states;
use addcow::storage::sim::{Fault, SimDisk, SimStorage};
use addcow::storage::{IoBuffer, Storage};
use addcow::units::ClusterSize;
use fastrand::Rng;
use rig::{Outcome, base_seed, run_tasks, scaled};

/// Number of the qcow2 file on the simulated disk.
const QCOW2: usize = 0;
/// Number of the data file.
const DATA: usize = 1;
/// Number of the add-cow file that is made.
const SIDE: usize = 2;
/// Number of the backing file, if there is one.
const BACKING: usize = 3;

/// What a cluster of the disk is in the qcow2 file.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Cluster {
    Unallocated,
    Data,
    /// Reads zeros; with a place in the data file or without.
    Zero(bool),
}

/// A qcow2 disk.
#[derive(Debug, Clone)]
struct Disk {
    cluster_size: ClusterSize,
    size: u64,
    clusters: Vec<Cluster>,
    data: Vec<u8>,
    backing: Option<Vec<u8>>,
}

/// A length as an index.
fn index(len: u64) -> usize {
    usize::try_from(len).unwrap()
}

impl Disk {
    /// A small disk with something special.
    fn random(rng: &mut Rng) -> Self {
        let cluster_size = ClusterSize::from_bits(rng.u32(9..=13)).unwrap();
        let cluster = cluster_size.bytes();
        let size = rng.u64(1..=6 * cluster.max(4096) / 512) * 512;
        let kind = |rng: &mut Rng| match rng.u32(0..6) {
            0 | 1 => Cluster::Unallocated,
            2 => Cluster::Zero(false),
            3 => Cluster::Zero(true),
            _ => Cluster::Data,
        };
        let clusters = (0..cluster_size.count(size)).map(|_| kind(rng)).collect();
        let padded = size.next_multiple_of(cluster);
        let data_len = match rng.u32(0..4) {
            0 => rng.u64(0..=size),
            1 => padded,
            2 => size + rng.u64(0..512).min(padded - size),
            _ => size,
        };
        let hole = rng.u64(0..=data_len);
        let data = (0..data_len).map(|at| if at < hole { rng.u8(..) } else { 0 }).collect();
        let backing_len = rng.u64(1..2 * size);
        let backing = rng.bool().then(|| (0..backing_len).map(|_| rng.u8(..)).collect());
        Self { cluster_size, size, clusters, data, backing }
    }

    /// The bytes of cluster `number`, cut at the end of the disk.
    fn range(&self, number: usize) -> std::ops::Range<usize> {
        let cluster = index(self.cluster_size.bytes());
        number * cluster..((number + 1) * cluster).min(index(self.size))
    }

    /// What the disk shows.
    fn content(&self) -> Vec<u8> {
        let mut bytes = vec![0; index(self.size)];
        for (number, cluster) in self.clusters.iter().enumerate() {
            let range = self.range(number);
            let source = match cluster {
                Cluster::Data => Some(&self.data),
                Cluster::Unallocated => self.backing.as_ref(),
                Cluster::Zero(_) => None,
            };
            if let Some(source) = source {
                let end = range.end.min(source.len());
                let start = range.start.min(end);
                bytes[start..end].copy_from_slice(&source[start..end]);
            }
        }
        bytes
    }

    /// The same disk in simulated files, with an empty add-cow file.
    fn files(&self, seed: u64) -> SimDisk {
        let disk = SimDisk::new(seed);
        disk.set_max_delay(0);
        let _ = disk.create(&self.qcow2());
        let _ = disk.create(&self.data);
        let _ = disk.create(&[]);
        if let Some(backing) = &self.backing {
            let _ = disk.create(backing);
        }
        disk
    }

    /// The qcow2 file, written by what `export` uses; zero clusters are put in afterwards.
    fn qcow2(&self) -> Vec<u8> {
        let geometry = BitmapGeometry::new(self.cluster_size, self.size).unwrap();
        let allocation = AllocationMap::empty(&geometry).unwrap();
        for (number, cluster) in (0..).zip(&self.clusters) {
            if *cluster != Cluster::Unallocated {
                allocation.mark(number..number + 1);
            }
        }
        let tables = Tables::plan(&allocation, self.cluster_size, self.size).unwrap();
        let header = self.header(&tables);
        let file = SimDisk::new(0).create(&[]);
        block_on(tables.write(&file, &header.encode().unwrap(), &Unwatched)).unwrap();
        let mut bytes = file.content();
        for (number, cluster) in (0..).zip(&self.clusters) {
            if let Cluster::Zero(is_placed) = *cluster {
                let guest = self.cluster_size.start_of(number);
                let reserved = is_placed.then_some(guest);
                let entry = L2Entry { content: L2Content::Zero { reserved }, copied: is_placed };
                let at = l2_place(&bytes, &header, number).unwrap();
                bytes[at..at + 8].copy_from_slice(&big_endian(entry.encode().unwrap()));
            }
        }
        bytes
    }

    /// The header of the qcow2 file.
    fn header(&self, tables: &Tables<'_>) -> Qcow2Header {
        let layout = tables.layout();
        Qcow2Header {
            version: 3,
            cluster_size: self.cluster_size,
            size: self.size,
            crypt_method: 0,
            l1_entries: u32::try_from(layout.l1_entries()).unwrap(),
            l1_offset: layout.l1_offset(),
            refcount_table_offset: layout.refcount_table_offset(),
            refcount_table_clusters: u32::try_from(layout.refcount_table_clusters()).unwrap(),
            refcount_order: REFCOUNT_ORDER,
            snapshots: 0,
            snapshots_offset: 0,
            incompatible: EXTERNAL_DATA,
            compatible: 0,
            autoclear: 0,
            compression: 0,
            backing: None,
            data_file: Some(FileName::new(FileRole::Data, "d").unwrap()),
            feature_names: Vec::new(),
            extensions: Vec::new(),
        }
    }

    /// The header of the add-cow file.
    fn new_header(&self) -> Header {
        let reference = |role, name| FileReference {
            name: FileName::new(role, name).unwrap(),
            format: "raw".to_owned(),
        };
        Header {
            cluster_size: self.cluster_size.max(ClusterSize::from_bits(12).unwrap()),
            backing: self.backing.as_ref().map(|_| reference(FileRole::Backing, "b")),
            image: reference(FileRole::Image, "d"),
            all_allocated: self.backing.is_none(),
            compat_features: 0,
        }
    }

    /// The backing file as the jobs see it.
    fn chain(&self, disk: &SimDisk) -> Option<Chain<SimStorage>> {
        let len = self.backing.as_ref()?.len();
        Some(Chain::raw(disk.file(BACKING), len as u64))
    }

    /// Adopts the disk into the empty file [`SIDE`].
    async fn adopt(&self, disk: &SimDisk) -> Result<(), Box<dyn Error>> {
        let file = disk.file(QCOW2);
        let header = Qcow2Header::decode(&file.content()).unwrap();
        let states = states(&file, &header, &Unwatched).await?;
        let takeover = Takeover::plan(&self.new_header(), states, self.cluster_size, self.size)?;
        let (data, side) = (disk.file(DATA), disk.file(SIDE));
        takeover.carry_out(&data, &side, self.chain(disk).as_ref(), &Unwatched).await?;
        Ok(())
    }

    /// Fails unless everything is as it was that a qcow2 reader can see.
    fn check_old(&self, disk: &SimDisk, what: &str) {
        assert!(disk.file(QCOW2).content() == self.qcow2(), "{what}: the qcow2 file was changed");
        let data = disk.file(DATA).content();
        let byte = |bytes: &[u8], at: usize| bytes.get(at).copied().unwrap_or(0);
        for (number, cluster) in self.clusters.iter().enumerate() {
            let mut range = self.range(number);
            let same = range.all(|at| byte(&data, at) == byte(&self.data, at));
            assert!(*cluster != Cluster::Data || same, "{what}: cluster {number} was changed");
        }
    }

    /// Fails unless the add-cow disk opens and shows what the qcow2 disk did.
    fn check_new(&self, disk: &SimDisk, what: &str) {
        let (side, raw) = (disk.file(SIDE), disk.file(DATA));
        let header = block_on(load::header(&side)).unwrap();
        assert_eq!(header, Header { compat_features: header.compat_features, ..self.new_header() });
        let len = raw.file_len().unwrap();
        let geometry = BitmapGeometry::new(header.cluster_size, len).unwrap();
        assert_eq!(geometry.virtual_size(), self.size, "{what}");
        assert_eq!(side.file_len().unwrap(), geometry.file_len());
        let bits = block_on(load::bitmap(&side, &geometry)).unwrap();
        let bits = if header.all_allocated {
            assert_eq!(bits.count(), Some(geometry.clusters()), "{what}: bits that are not 1");
            AllocationMap::all()
        } else {
            bits
        };
        let chain = self.chain(disk);
        let backing_len = chain.as_ref().map_or(0, Chain::virtual_size);
        let state = ImageState::add_cow(geometry, bits, backing_len, false);
        let image = Image::new(std::sync::Arc::new(state), raw, Some(side), chain);
        let buffer = IoBuffer::zeroed(index(self.size));
        block_on(image.read(0, buffer.clone())).unwrap();
        let (found, expected) = (buffer.to_vec(), self.content());
        let at = (0..found.len()).find(|&at| found[at] != expected[at]);
        assert_eq!(at, None, "{what}: the first byte that differs\n{self:?}");
    }
}

/// A number as it is stored.
fn big_endian(value: u64) -> [u8; 8] {
    let mut bytes = value.to_le_bytes();
    bytes.reverse();
    bytes
}

/// A number that is stored at byte `at` of a file.
fn number_at(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(8)?)?;
    Some(bytes.iter().fold(0, |value, &byte| value << 8 | u64::from(byte)))
}

/// Where the L2 entry of cluster `number` is in the file; `None` without an L2 table.
fn l2_place(bytes: &[u8], header: &Qcow2Header, number: u64) -> Option<usize> {
    let entries = header.cluster_size.bytes() / 8;
    let l1 = number_at(bytes, index(header.l1_offset + number / entries * 8))?;
    let table = l1 & 0x00ff_ffff_ffff_fe00;
    (table != 0).then(|| index(table + number % entries * 8))
}

/// Runs an adoption until it is done or the power goes.
fn run(disk: &SimDisk, old: &Disk, seed: u64) -> Outcome {
    let task = async {
        if let Err(error) = old.adopt(disk).await {
            // A change of a file's length does not wait: it fails when the power has gone.
            assert!(disk.is_stopped(), "ADDCOW_SEED={seed}: failed without a fault: {error:?}");
        }
    };
    let outcome = run_tasks(disk, &mut Rng::with_seed(seed), vec![Box::pin(task)]);
    if disk.is_stopped() { Outcome::Stopped } else { outcome }
}

#[test]
fn adopting_survives_every_cut() {
    let base = base_seed(0xada);
    let mut cuts = 0;
    for seed in base..base + scaled(400) {
        let mut rng = Rng::with_seed(seed);
        let old = Disk::random(&mut rng);
        let files = old.files(seed);
        for cut in files.operations().. {
            let what = format!("ADDCOW_SEED={seed}: cut before operation {cut}");
            let disk = files.fork();
            disk.stop_at(cut);
            let outcome = run(&disk, &old, seed);
            cuts += 1;
            for keep in 0..4 {
                let disk = disk.fork();
                disk.power_cut_choosing(|versions| match keep {
                    0 => versions,
                    1 => versions - 1,
                    _ => rng.usize(0..=versions),
                });
                old.check_old(&disk, &what);
                if outcome == Outcome::Done {
                    old.check_new(&disk, &what);
                } else {
                    // Nobody has seen the new file: it goes, and the next try begins with another.
                    disk.file(SIDE).set_len(0).unwrap();
                    assert_eq!(run(&disk, &old, seed), Outcome::Done);
                    disk.power_cut();
                    old.check_new(&disk, &what);
                }
            }
            if outcome == Outcome::Done {
                break;
            }
        }
    }
    println!("{cuts} cuts");
    assert!(cuts > scaled(2000), "{cuts}");
}

#[test]
fn a_failing_host_leaves_the_old_disk_as_it_was() {
    let base = base_seed(0xfa1);
    for seed in base..base + scaled(300) {
        let old = Disk::random(&mut Rng::with_seed(seed));
        let files = old.files(seed);
        for at in files.operations().. {
            let disk = files.fork();
            disk.set_fault(at, Fault::Error(libc::EIO), false);
            let result = block_on(old.adopt(&disk));
            let what = format!("ADDCOW_SEED={seed}: operation {at} fails");
            old.check_old(&disk, &what);
            let done = disk.operations();
            if result.is_ok() && done <= at {
                break;
            }
            assert!(result.is_err(), "{what}: nobody heard of it");
        }
    }
}

/// Whatever is wrong with the tables, nothing panics, and what is accepted is what they say.
#[test]
fn damaged_tables_are_refused_or_read_as_they_are() {
    let base = base_seed(0xdead);
    let (accepted, refused) = (Cell::new(0), Cell::new(0));
    for seed in base..base + scaled(20_000) {
        let mut rng = Rng::with_seed(seed);
        let old = Disk::random(&mut rng);
        let mut bytes = old.qcow2();
        for _ in 0..rng.usize(1..4) {
            // Most of a file is zeros: aim at what is not, and at places beside it.
            let used: Vec<usize> = (0..bytes.len()).filter(|&at| bytes[at] != 0).collect();
            let at = (used[rng.usize(0..used.len())] + rng.usize(0..3)).min(bytes.len() - 1);
            bytes[at] = [0, 1, 0x80, 0xff, bytes[at] ^ 1 << rng.u32(0..8)][rng.usize(0..5)];
        }
        if rng.u32(0..8) == 0 {
            bytes.truncate(rng.usize(0..bytes.len()));
        }
        let Ok(header) = Qcow2Header::decode(&bytes) else { continue };
        if header.check_readable().is_err() || !header.has_external_data() {
            continue;
        }
        let disk = SimDisk::new(seed);
        disk.set_max_delay(0);
        let file = disk.create(&bytes);
        let Ok(found) = block_on(states(&file, &header, &Unwatched)) else {
            refused.set(refused.get() + 1);
            continue;
        };
        accepted.set(accepted.get() + 1);
        for number in 0..header.cluster_size.count(header.virtual_size()).min(1 << 16) {
            let guest = header.cluster_size.start_of(number);
            let entry = l2_place(&bytes, &header, number).and_then(|at| number_at(&bytes, at));
            let expected = match entry.unwrap_or(0) {
                0 => (false, false),
                entry if entry == 1 || entry == 1 << 63 | guest | 1 => (false, true),
                entry if entry == 1 << 63 | guest => (true, false),
                entry => panic!("ADDCOW_SEED={seed}: entry {entry:#x} at {guest:#x} is accepted"),
            };
            let one = number..number + 1;
            let found = (found.data.is_allocated(one.clone()), found.zero.is_allocated(one));
            assert_eq!(found, expected, "ADDCOW_SEED={seed}: at {guest:#x}");
        }
    }
    println!("{} accepted, {} refused", accepted.get(), refused.get());
    assert!(accepted.get() > scaled(1000) && refused.get() > scaled(1000));
}

/// The file gets its name only once it is written and synced, so any cut before is harmless; after,
/// all of it is there.
#[test]
fn an_exported_file_is_durable_when_it_is_written() {
    let base = base_seed(0xe49);
    for seed in base..base + scaled(500) {
        let mut rng = Rng::with_seed(seed);
        let old = Disk::random(&mut rng);
        let disk = SimDisk::new(seed);
        let geometry = BitmapGeometry::new(old.cluster_size, old.size).unwrap();
        let allocation = AllocationMap::empty(&geometry).unwrap();
        (0..geometry.clusters()).filter(|_| rng.bool()).for_each(|c| allocation.mark(c..c + 1));
        let tables = Tables::plan(&allocation, old.cluster_size, old.size).unwrap();
        let header = old.header(&tables);
        let file = disk.create(&[]);
        block_on(tables.write(&file, &header.encode().unwrap(), &Unwatched)).unwrap();
        disk.power_cut_choosing(|versions| versions);
        assert_eq!(file.file_len().unwrap(), tables.layout().file_len());
        let found = block_on(states(&file, &header, &Unwatched)).unwrap();
        assert_eq!(found.zero.count(), Some(0));
        for cluster in 0..geometry.clusters() {
            let both = [&found.data, &allocation].map(|map| map.is_allocated(cluster..cluster + 1));
            assert_eq!(both[0], both[1], "ADDCOW_SEED={seed}: cluster {cluster}");
        }
    }
}
