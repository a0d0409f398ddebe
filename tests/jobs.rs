//! Jobs on real files: is what a verb makes byte-equal to a flat model, and what is left of one
//! that was refused its space or was interrupted?
//!
//! Disks are random chains of overlays of any cluster size, with all kinds of pieces: data, holes,
//! zeros that are stored, garbage where nothing is allocated, ends inside clusters and sectors,
//! backing files that are shorter and longer. Replay: `ADDCOW_SEED=N cargo test --test jobs NAME`.
//!
//! Not here: power cuts (`crash_jobs.rs`), and QEMU's opinion (`qemu_img.rs`).

mod rig;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use addcow::executor::block_on;
use addcow::format::{FileName, FileReference, FileRole, Header};
use addcow::image::chain::{ChainOptions, DiskFormat, OpenChain};
use addcow::image::check;
use addcow::image::create::CreateOptions;
use addcow::jobs::commit::commit_disk;
use addcow::jobs::compare::{Difference, compare};
use addcow::jobs::convert::{ConvertOptions, Target, convert};
use addcow::jobs::copy::Pace;
use addcow::jobs::stream::stream_disk;
use addcow::jobs::{JobError, Unwatched};
use addcow::storage::IoBuffer;
use addcow::storage::file::FileStorage;
use addcow::storage::lock::Locking;
use addcow::units::ClusterSize;
use fastrand::Rng;
use rig::stack::{Shape, Stack};
use rig::{base_seed, scaled};
use tempfile::TempDir;

/// A chain of disks on real files: `0.add-cow` over `1.add-cow`, and so on, over `base.img`.
struct Lab {
    /// The folder.
    dir: TempDir,
    /// What the disks are, and what they show.
    stack: Stack,
}

impl Lab {
    /// Makes the files of a random chain.
    fn new(seed: u64, most_overlays: usize) -> Self {
        let mut rng = Rng::with_seed(seed);
        let overlays = rng.usize(1..=most_overlays);
        let shape = if rng.u32(0..4) == 0 {
            Shape::random(&mut rng, overlays)
        } else {
            Shape::random_of(&mut rng, overlays, 12..=17, 40)
        };
        let lab = Self {
            dir: tempfile::tempdir().expect("a temporary folder"),
            stack: Stack::new(&shape, seed),
        };
        let count = shape.overlays.len();
        for overlay in 0..count {
            let raw = lab.stack.raw(overlay).content();
            write_sparse(&lab.path(&format!("{overlay}.raw")), &raw, &mut rng);
            let backing = match &shape.base_len {
                _ if overlay + 1 < count => Some((format!("{}.add-cow", overlay + 1), "add-cow")),
                Some(_) => Some(("base.img".to_owned(), "raw")),
                None => None,
            };
            lab.write_side(overlay, backing);
        }
        if let Some(base) = lab.stack.base() {
            write_sparse(&lab.path("base.img"), &base.content(), &mut rng);
        }
        lab
    }

    /// The path of a file.
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The disk.
    fn disk(&self) -> PathBuf {
        self.path("0.add-cow")
    }

    /// What the disk shows, as it was made.
    fn content(&self) -> &[u8] {
        self.stack.content()
    }

    /// Writes the add-cow file of an overlay: the bits of the simulated one, with the names of the
    /// real files.
    fn write_side(&self, overlay: usize, backing: Option<(String, &str)>) {
        let old = block_on(self.stack.header(overlay));
        let header = Header {
            // Smaller clusters are read but not created: the header's word is the only difference.
            cluster_size: old.cluster_size.max(ClusterSize::from_bits(12).expect("in range")),
            backing: backing.map(|(name, format)| reference(FileRole::Backing, &name, format)),
            image: reference(FileRole::Image, &format!("{overlay}.raw"), "raw"),
            ..old
        };
        let mut bytes = header.encode().expect("a valid header");
        bytes[20..24].copy_from_slice(&old.cluster_size.bits().to_le_bytes());
        let area = usize::try_from(old.header_size()).expect("small");
        bytes.resize(area, 0);
        bytes.extend_from_slice(&self.stack.side(overlay).content()[area..]);
        fs::write(self.path(&format!("{overlay}.add-cow")), bytes).expect("the add-cow file");
    }
}

/// A reference to a file.
fn reference(role: FileRole, name: &str, format: &str) -> FileReference {
    FileReference { name: FileName::new(role, name).expect("plain"), format: format.to_owned() }
}

/// Writes a file; some of its blocks of zeros become holes.
fn write_sparse(path: &Path, bytes: &[u8], rng: &mut Rng) {
    let file = File::create(path).expect("a new file");
    file.set_len(bytes.len() as u64).expect("its length");
    for (index, block) in bytes.chunks(4096).enumerate() {
        if block.iter().any(|&byte| byte != 0) || rng.u32(0..3) == 0 {
            file.write_all_at(block, index as u64 * 4096).expect("a block");
        }
    }
}

/// What a disk shows, read through its chain.
fn bytes_of(path: &Path, format: DiskFormat) -> Vec<u8> {
    let chain = OpenChain::open(path, format, ChainOptions::BUFFERED).expect("it opens");
    let len = usize::try_from(chain.virtual_size()).expect("small");
    let buffer = IoBuffer::from_bytes(&vec![0x55; len]);
    block_on(chain.handle(FileStorage::new).read(0, buffer.clone())).expect("it can be read");
    buffer.to_vec()
}

/// Fails, without showing megabytes, unless two contents are equal.
#[track_caller]
fn assert_same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    if found != expected {
        let at = found.iter().zip(expected).position(|(a, b)| a != b);
        panic!("{what}: differs at byte {at:?} of {}", found.len());
    }
}

/// The space that a file takes, in bytes.
fn space(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&fs::metadata(path).expect("metadata")) * 512
}

/// Calls `test` with random chains.
fn for_each_lab(default_seed: u64, count: u64, test: impl Fn(Lab, &str)) {
    let base = base_seed(default_seed);
    for seed in base..base + scaled(count) {
        let lab = Lab::new(seed, 3);
        let what = format!("ADDCOW_SEED={seed}: {:?}", lab.stack.shape);
        assert_same(&bytes_of(&lab.disk(), DiskFormat::AddCow), lab.content(), &what);
        test(lab, &what);
    }
}

#[test]
fn a_stream_makes_the_raw_image_the_disk() {
    for_each_lab(0x1000, 150, |lab, what| {
        stream_disk(&lab.disk(), &Unwatched).expect(what);
        assert_same(&fs::read(lab.path("0.raw")).expect("a file"), lab.content(), what);
        let report = check::add_cow(&lab.disk(), false, Locking::On).expect(what);
        assert!(report.findings.is_empty(), "{what}: {:?}", report.findings);
        assert_eq!(Some(report.allocated), report.geometry.map(|g| g.clusters()), "{what}");
        // Nothing is left to do, and nothing below is needed.
        for other in ["base.img", "1.add-cow"] {
            fs::remove_file(lab.path(other)).ok();
        }
        stream_disk(&lab.disk(), &Unwatched).expect(what);
        assert_same(&bytes_of(&lab.disk(), DiskFormat::AddCow), lab.content(), what);
    });
}

#[test]
fn a_commit_makes_the_base_show_the_disk() {
    for_each_lab(0x2000, 150, |lab, what| {
        let below = lab.stack.contents[1].clone();
        let is_raw = lab.stack.shape.overlays.len() == 1;
        if is_raw && lab.stack.shape.base_len.is_none() {
            let error = commit_disk(&lab.disk(), false, &Unwatched).expect_err(what);
            assert!(matches!(error, JobError::Refused(_)), "{what}: {error}");
            return;
        }
        // First without emptying the disk.
        for keep in [true, false] {
            commit_disk(&lab.disk(), keep, &Unwatched).expect(what);
            assert_same(&bytes_of(&lab.disk(), DiskFormat::AddCow), lab.content(), what);
            let base = match is_raw {
                true => fs::read(lab.path("base.img")).expect("a file"),
                false => bytes_of(&lab.path("1.add-cow"), DiskFormat::AddCow),
            };
            let (start, rest) = base.split_at(lab.content().len());
            assert_same(start, lab.content(), what);
            assert_same(rest, below.get(start.len()..).unwrap_or_default(), what);
        }
        let report = check::add_cow(&lab.disk(), false, Locking::On).expect(what);
        assert_eq!(report.allocated, 0, "{what}: the disk is not empty");
        // A last part of a block has to stay.
        assert!(space(&lab.path("0.raw")) <= 4096, "{what}: its space was not given back");
    });
}

/// The options of a conversion of the lab's disk.
fn conversion(lab: &Lab, target: Target, block: Option<u64>) -> ConvertOptions {
    let (source, format) = (lab.disk(), DiskFormat::AddCow);
    ConvertOptions { source, format, locking: Locking::On, target, block }
}

#[test]
fn a_conversion_to_raw_is_the_disk() {
    for_each_lab(0x3000, 100, |lab, what| {
        for (index, block) in
            [Some(4096), Some(512), Some(3 * 512), Some(1 << 20), None].into_iter().enumerate()
        {
            let path = lab.path(&format!("flat{index}.img"));
            let target = Target::Raw { path: path.clone(), force: false };
            convert(&conversion(&lab, target, block), &Unwatched).expect(what);
            assert_same(&fs::read(&path).expect("a file"), lab.content(), what);
            match block {
                None => assert!(space(&path) >= lab.content().len() as u64, "{what}: has holes"),
                Some(4096) => {
                    let used = lab.content().chunks(4096).filter(|b| b.iter().any(|&b| b != 0));
                    assert!(space(&path) <= used.count() as u64 * 4096 + 4096, "{what}: {block:?}");
                }
                Some(_) => {}
            }
        }
        // The other way round, and of a raw image that may end anywhere.
        if lab.stack.base().is_some() {
            let path = lab.path("copy.img");
            let mut options =
                conversion(&lab, Target::Raw { path: path.clone(), force: false }, Some(4096));
            (options.source, options.format) = (lab.path("base.img"), DiskFormat::Raw);
            convert(&options, &Unwatched).expect(what);
            let mut expected = fs::read(lab.path("base.img")).expect("a file");
            expected.resize(expected.len().next_multiple_of(512), 0);
            assert_same(&fs::read(&path).expect("a file"), &expected, what);
        }
    });
}

#[test]
fn a_conversion_to_add_cow_shows_the_disk_and_holds_what_differs() {
    for_each_lab(0x4000, 100, |lab, what| {
        let mut rng = Rng::with_seed(lab.content().len() as u64);
        let mut backings = vec![None, Some(reference(FileRole::Backing, "0.add-cow", "add-cow"))];
        if lab.stack.base().is_some() {
            backings.push(Some(reference(FileRole::Backing, "base.img", "raw")));
        }
        for (index, backing) in backings.into_iter().enumerate() {
            let cluster_size = ClusterSize::from_bits(rng.u32(12..=21));
            let cluster = cluster_size.map_or(0, |c| usize::try_from(c.bytes()).expect("small"));
            let path = lab.path(&format!("new{index}.add-cow"));
            let target = CreateOptions {
                path: path.clone(),
                size: None,
                cluster_size,
                backing: backing.clone(),
                image: reference(FileRole::Image, &format!("new{index}.raw"), "raw"),
                reuse_image: false,
                force: false,
            };
            convert(&conversion(&lab, Target::AddCow(target), Some(4096)), &Unwatched).expect(what);
            assert_same(&bytes_of(&path, DiskFormat::AddCow), lab.content(), what);
            let report = check::add_cow(&path, false, Locking::On).expect(what);
            assert!(report.findings.is_empty(), "{what}: {:?}", report.findings);
            let below = match index {
                0 => None,
                1 => Some(lab.content().to_vec()),
                _ => Some(fs::read(lab.path("base.img")).expect("a file")),
            };
            let expected = match below {
                None => lab.content().len().div_ceil(cluster),
                Some(mut below) => {
                    below.resize(lab.content().len(), 0);
                    let clusters = lab.content().chunks(cluster).zip(below.chunks(cluster));
                    clusters.filter(|(ours, theirs)| ours != theirs).count()
                }
            };
            assert_eq!(report.allocated, expected as u64, "{what}: clusters over {backing:?}");
        }
    });
}

/// The first difference between two disks.
fn difference(
    one: (&Path, DiskFormat),
    other: (&Path, DiskFormat),
    pace: Pace,
) -> Option<Difference> {
    let open =
        |(path, format)| OpenChain::open(path, format, ChainOptions::BUFFERED).expect("it opens");
    let (one, other) = (open(one), open(other));
    let (one, other) = (one.handle(FileStorage::new), other.handle(FileStorage::new));
    block_on(compare([&one, &other], false, pace, &Unwatched)).expect("both can be read")
}

#[test]
fn a_comparison_finds_the_first_sector_that_differs() {
    for_each_lab(0x5000, 150, |lab, what| {
        let mut rng = Rng::with_seed(lab.content().len() as u64);
        let path = lab.path("flat.img");
        let mut flat = lab.content().to_vec();
        // Zeros behind the end make no difference.
        flat.resize(flat.len() + rng.usize(0..3) * 700, 0);
        write_sparse(&path, &flat, &mut rng);
        let pace = Pace { step_len: 1024 << rng.u32(0..10), ..Pace::default() };
        let (disk, raw) = (lab.disk(), (path.as_path(), DiskFormat::Raw));
        let disk = (disk.as_path(), DiskFormat::AddCow);
        assert_eq!(difference(disk, raw, pace), None, "{what}");
        assert_eq!(difference(raw, disk, pace), None, "{what}");
        for _ in 0..4 {
            let at = rng.usize(0..flat.len());
            flat[at] ^= 1 << rng.u32(0..8);
        }
        write_sparse(&path, &flat, &mut rng);
        let mut expected = lab.content().to_vec();
        expected.resize(flat.len(), 0);
        let first = expected.iter().zip(&flat).position(|(a, b)| a != b);
        let first = first.map(|at| Difference::Content { offset: at as u64 / 512 * 512 });
        assert_eq!(difference(disk, raw, pace), first, "{what}");
        assert_eq!(difference(raw, disk, pace), first, "{what}");
    });
}
