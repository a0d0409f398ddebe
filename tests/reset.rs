//! Does a reset cost the same whatever the size of the disk?
//!
//! Counted in operations and in bytes that move, on real sparse files; times are for people
//! (docs/addcow.md), since a test that asserts them fails on a busy machine.

use std::cell::RefCell;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use addcow::executor::block_on;
use addcow::format::{FileName, FileReference, FileRole};
use addcow::image::create::{CreateOptions, add_cow};
use addcow::image::inspect::{DiskAccess, DiskFiles};
use addcow::jobs::parts::DiskParts;
use addcow::jobs::reset::reset;
use addcow::storage::file::FileStorage;
use addcow::storage::{Alignment, IoBuffer, Storage, ZeroMode};
use addcow::units::ByteRange;

/// What was asked of a storage.
#[derive(Debug, Default, PartialEq, Eq, Clone, Copy)]
struct Counts {
    /// Calls of any kind.
    calls: u64,
    /// Bytes read.
    read: u64,
    /// Bytes written.
    written: u64,
}

/// A file that counts.
struct Counting {
    /// The file.
    file: FileStorage,
    /// The count.
    counts: RefCell<Counts>,
}

impl Counting {
    /// Counts what is asked of `file` from now on.
    fn new(file: FileStorage) -> Self {
        Self { file, counts: RefCell::default() }
    }

    /// Adds to the count.
    fn count(&self, read: usize, written: usize) {
        let mut counts = self.counts.borrow_mut();
        counts.calls += 1;
        counts.read += read as u64;
        counts.written += written as u64;
    }
}

impl Storage for Counting {
    async fn read(&self, offset: u64, buffer: IoBuffer) -> io::Result<usize> {
        self.count(buffer.len(), 0);
        self.file.read(offset, buffer).await
    }

    async fn write(&self, offset: u64, buffer: IoBuffer) -> io::Result<usize> {
        self.count(0, buffer.len());
        self.file.write(offset, buffer).await
    }

    async fn zero(&self, range: ByteRange, mode: ZeroMode) -> io::Result<()> {
        self.count(0, 0);
        self.file.zero(range, mode).await
    }

    async fn sync(&self) -> io::Result<()> {
        self.count(0, 0);
        self.file.sync().await
    }

    fn file_len(&self) -> io::Result<u64> {
        self.count(0, 0);
        self.file.file_len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.count(0, 0);
        self.file.set_len(len)
    }

    fn alignment(&self) -> Alignment {
        self.file.alignment()
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<ByteRange>> {
        self.count(0, 0);
        self.file.next_data(offset)
    }
}

/// Makes a disk of `gib` GiB over an empty base in `folder`, with every cluster allocated, and
/// counts what its reset asks of the two files.
fn reset_counted(folder: &Path, gib: u64) -> (Counts, Counts) {
    let reference = |role, name| FileReference {
        name: FileName::new(role, name).unwrap(),
        format: "raw".to_owned(),
    };
    let base = std::fs::File::create(folder.join("base.img")).unwrap();
    base.set_len(gib << 30).unwrap();
    let path = folder.join("disk.add-cow");
    let created = add_cow(&CreateOptions {
        path: path.clone(),
        size: Some(gib << 30),
        cluster_size: None,
        backing: Some(reference(FileRole::Backing, "base.img")),
        image: reference(FileRole::Image, "disk.raw"),
        reuse_image: true,
        force: true,
    })
    .unwrap();
    let side = std::fs::File::options().write(true).open(&path).unwrap();
    let ones = vec![0xff; usize::try_from(created.geometry.used_len()).unwrap()];
    side.write_all_at(&ones, created.geometry.offset()).unwrap();
    let disk = DiskFiles::open(&path, DiskAccess::WRITE).unwrap();
    assert_eq!(disk.allocated_clusters().unwrap(), created.geometry.clusters());
    let counting = |file| Counting::new(FileStorage::new(Arc::clone(file)));
    let (side, raw) = (counting(&disk.side), counting(&disk.raw));
    let (header, geometry) = (disk.header.clone(), disk.geometry);
    block_on(reset(&DiskParts { side: &side, raw: &raw, header, geometry })).unwrap();
    assert_eq!(disk.allocated_clusters().unwrap(), 0);
    assert_eq!(disk.raw.len().unwrap(), gib << 30);
    (side.counts.into_inner(), raw.counts.into_inner())
}

#[test]
fn reset_of_100_gib_does_what_that_of_1_gib_does() {
    let folder = tempfile::tempdir().unwrap();
    let small = reset_counted(folder.path(), 1);
    let large = reset_counted(folder.path(), 100);
    assert_eq!(small, large);
    let (side, raw) = large;
    assert!(side.calls + raw.calls <= 10, "{large:?}");
    assert_eq!((side.written, raw.written, raw.read), (0, 0, 0), "{large:?}");
    assert!(side.read <= 4096, "more than the header is read: {large:?}");
}
