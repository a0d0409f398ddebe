//! Mapped files: what is moved without a system call, what is not, and pages that vanish.
//!
//! Not here: that the bytes are right whatever way they take (`conformance.rs`, `workload.rs`).

mod common;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use addcow::storage::IoBuffer;
use addcow::storage::host_file::{Access, CacheMode, HostFile};
use addcow::units::ByteRange;
use common::disk::{Disk, Shape};
use common::guest::Setup;
use common::{MIB, SECTOR, assert_bytes};
use tempfile::TempDir;

/// Length of the piece of a file that is looked at at once.
const BLOCK: u64 = 256 << 10;

/// A file of `data` bytes of 0x5a, then a hole up to `len`, opened and mapped.
fn mapped(place: &str, data: usize, len: u64, access: Access) -> (TempDir, Arc<HostFile>) {
    let folder = tempfile::tempdir_in(place).unwrap();
    let path = folder.path().join("file");
    let mut file = File::create_new(&path).unwrap();
    file.write_all(&vec![0x5a; data]).unwrap();
    file.set_len(len).unwrap();
    let file = HostFile::open(&path, access, CacheMode::Buffered).unwrap();
    file.map();
    (folder, Arc::new(file))
}

/// Whether a read at `offset` is served from the mapping.
fn reads(file: &HostFile, offset: u64) -> bool {
    let buffer = IoBuffer::zeroed(4096);
    let done = file.mapping().unwrap().read(offset, &buffer);
    assert!(!done || buffer.to_vec() == [0x5a; 4096]);
    done
}

#[test]
fn on_tmpfs_data_is_served_and_a_hole_stays_one() {
    let data = usize::try_from(2 * BLOCK).unwrap();
    let (_folder, file) = mapped("/dev/shm", data + 4096, 4 * BLOCK, Access::ReadWrite);
    let before = file.allocated_len().unwrap();
    assert!(reads(&file, 0) && reads(&file, BLOCK) && reads(&file, 2 * BLOCK - 4096));
    // A block with a hole is left alone as a whole: touching it would make the host fill it.
    assert!(!reads(&file, 2 * BLOCK) && !reads(&file, 3 * BLOCK));
    let data = IoBuffer::from_bytes(&[0x77; 4096]);
    assert!(!file.mapping().unwrap().write(3 * BLOCK, &data));
    assert_eq!(file.allocated_len().unwrap(), before);
    assert!(file.mapping().unwrap().write(BLOCK, &data));
    let mut found = [0; 4096];
    file.file().read_exact_at(&mut found, BLOCK).unwrap();
    assert_eq!(found, [0x77; 4096]);
}

#[test]
fn a_block_that_fills_up_is_noticed_and_one_that_was_punched_is_forgotten() {
    let (_folder, file) = mapped("/dev/shm", 4096, BLOCK, Access::ReadWrite);
    assert!(!reads(&file, 0));
    file.file().write_all_at(&vec![0x5a; usize::try_from(BLOCK).unwrap()], 0).unwrap();
    assert!((0..100).any(|_| reads(&file, 0)), "never looked at again");
    file.mapping().unwrap().forget(ByteRange::between(4096, 8192));
    let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file.file(), punch, 0, BLOCK).unwrap();
    assert!(!reads(&file, 0));
    assert_eq!(file.allocated_len().unwrap(), 0);
}

#[test]
fn ranges_outside_the_file_and_writes_to_a_backing_file_are_not_served() {
    let len = usize::try_from(BLOCK).unwrap() + 100;
    let (_folder, file) = mapped("/dev/shm", len, len as u64, Access::ReadOnly);
    assert!(reads(&file, 0));
    for offset in [BLOCK, len as u64, BLOCK * 4, u64::MAX - 100, u64::MAX] {
        assert!(!reads(&file, offset), "{offset}");
    }
    assert!(!file.mapping().unwrap().write(0, &IoBuffer::zeroed(512)));
}

#[test]
fn a_page_that_vanishes_ends_the_use_of_its_mapping_and_nothing_else() {
    let data = usize::try_from(2 * BLOCK).unwrap();
    let (_folder, file) = mapped("/dev/shm", data, 2 * BLOCK, Access::ReadWrite);
    let (_other_folder, other) = mapped("/dev/shm", data, 2 * BLOCK, Access::ReadWrite);
    assert!(reads(&file, BLOCK) && reads(&other, BLOCK));
    file.file().set_len(4096).unwrap();
    assert!(!reads(&file, BLOCK), "a page that is gone was served");
    assert!(!reads(&file, 0), "a mapping with a missing page was used again");
    assert!(!file.mapping().unwrap().write(0, &IoBuffer::zeroed(512)));
    assert!(reads(&other, BLOCK));
}

#[test]
fn in_the_page_cache_only_what_is_cached_is_served() {
    let data = usize::try_from(BLOCK).unwrap();
    let (folder, file) = mapped(env!("CARGO_TARGET_TMPDIR"), data, BLOCK, Access::ReadWrite);
    assert!(reads(&file, 0), "just written");
    assert!(!file.mapping().unwrap().write(0, &IoBuffer::zeroed(512)), "left to the host's I/O");
    rustix::fs::fsync(file.file()).unwrap();
    drop(file);
    let path = folder.path().join("file");
    let file = HostFile::open(&path, Access::ReadOnly, CacheMode::Buffered).unwrap();
    file.map();
    rustix::fs::fadvise(file.file(), 0, None, rustix::fs::Advice::DontNeed).unwrap();
    assert!(!reads(&file, 0), "not in the cache");
}

#[test]
fn a_guest_gets_an_error_for_bytes_that_were_cut_off_and_the_rest_goes_on() {
    let disk = Disk::create(Shape::new(4 * MIB, 64 << 10).in_memory());
    let mut daemon = disk.serve(&[]);
    let mut guest = daemon.guest(Setup::default());
    // Twice: the first read of a piece may take the ordinary way.
    for sector in [0, 4096, 0, 4096] {
        guest.read(sector, 8 * SECTOR);
    }
    let base = File::options().write(true).open(disk.path("base.img")).unwrap();
    base.set_len(MIB).unwrap();
    guest.read_fails(4096, 8 * SECTOR);
    assert_bytes(&guest.read(0, 8 * SECTOR), &disk.base_bytes(0, 8 * SECTOR), "before the cut");
    drop(guest);
    assert!(daemon.is_alive());
    daemon.stop();
}
