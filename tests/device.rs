//! What each block request does, by the text of VIRTIO 1.3, 5.2.6.
//!
//! The statuses, the used length, the content of the disk afterwards, and that a refused request
//! changes nothing. Every reply's used length is checked by the front end itself.
//!
//! Not here: how chains may look (`chains.rs`), messages and lifecycle (`vhost_user.rs`).

mod common;

use common::disk::{Daemon, Disk, Shape};
use common::guest::{F_DISCARD, F_RO, F_WRITE_ZEROES, Guest, Setup};
use common::request::{
    DISCARD, Framing, GET_ID, HEADER, IN, IOERR, OK, OUT, Request, UNMAP, UNSUPP, WRITE_ZEROES,
    payload,
};
use common::{KIB, MIB, SECTOR, assert_bytes, pattern, to_u64, to_usize};

/// A small disk of 64 KiB clusters over a full base, with a guest on it.
fn small() -> (Disk, Daemon, Guest) {
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    let guest = daemon.guest(Setup::default());
    (disk, daemon, guest)
}

/// Checks that the guest still sees what it saw before it did anything.
fn assert_untouched(disk: &Disk, guest: &mut Guest) {
    assert_bytes(&guest.read_all(), &disk.initial(), "the disk after refused requests");
}

/// The reply to `request` in the usual framing, for more than its status.
fn data_of(guest: &mut Guest, request: &Request) -> (u8, Vec<u8>) {
    let reply = guest.request(0, request, &Framing::usual(request));
    (reply.status(), reply.data().to_vec())
}

#[test]
fn read_of_an_unwritten_disk_shows_the_base_and_never_the_raw_image() {
    let (disk, _daemon, mut guest) = small();
    assert_bytes(&guest.read_all(), &disk.initial(), "the disk before any write");
}

#[test]
fn write_is_read_back_and_leaves_its_surroundings_and_the_base_alone() {
    let (disk, _daemon, mut guest) = small();
    let (base, mut want) = (disk.base_file(), disk.initial());
    for (sector, sectors) in [(3, 1), (127, 2), (1000, 300), (8191, 1), (0, 1), (256, 128)] {
        let data = pattern(sector, 7, sectors * SECTOR);
        guest.write(sector, &data);
        assert_bytes(&guest.read(sector, data.len()), &data, "read after write");
        want[to_usize(sector) * SECTOR..][..data.len()].copy_from_slice(&data);
    }
    assert_bytes(&guest.read_all(), &want, "the disk after partial writes");
    assert_bytes(&disk.base_file(), &base, "the base file");
}

#[test]
fn read_and_copy_that_straddle_the_end_of_a_short_base_see_zeros_beyond_it() {
    for base in [MIB + 512, MIB - 3 * 512, 0] {
        let disk = Disk::create(Shape::new(2 * MIB + 512, 64 * KIB).base(base));
        let mut daemon = disk.serve(&[]);
        let mut guest = daemon.guest(Setup::default());
        let mut want = disk.initial();
        assert_bytes(&guest.read(0, want.len()), &want, "one read over the end of the base");
        let first = (base / 512).saturating_sub(2);
        let data = pattern(9, first, 3 * SECTOR);
        guest.write(first, &data);
        want[to_usize(first) * SECTOR..][..data.len()].copy_from_slice(&data);
        assert_bytes(&guest.read_all(), &want, "a write over the end of the base");
        let last = disk.sectors() - 1;
        guest.write(last, &data[..SECTOR]);
        want[to_usize(last) * SECTOR..].copy_from_slice(&data[..SECTOR]);
        assert_bytes(&guest.read_all(), &want, "a write to the partial last cluster");
    }
}

#[test]
fn base_longer_than_the_disk_is_cut_off_at_the_end_of_the_disk() {
    let disk = Disk::create(Shape::new(MIB + 1024, 64 * KIB).base(2 * MIB));
    let mut daemon = disk.serve(&[]);
    let mut guest = daemon.guest(Setup::default());
    let mut want = disk.initial();
    assert_eq!(guest.config().capacity(), disk.sectors());
    guest.write(disk.sectors() - 1, &pattern(5, 0, SECTOR));
    let at = want.len() - SECTOR;
    want[at..].copy_from_slice(&pattern(5, 0, SECTOR));
    assert_bytes(&guest.read_all(), &want, "a disk that ends inside a cluster");
    let raw = std::fs::metadata(disk.path("disk.raw")).expect("the raw image").len();
    assert_eq!(raw, disk.shape.size, "a copy must not make the raw image longer");
}

#[test]
fn range_beyond_the_end_fails_and_changes_nothing() {
    let (disk, _daemon, mut guest) = small();
    let end = disk.sectors();
    let data = pattern(1, 0, 4 * SECTOR);
    // 2^55 sectors are 2^64 bytes: these would wrap to the start of the disk.
    let wrapping = 1 << 55;
    for sector in [end, end - 1, end - 3, end + 1, wrapping, wrapping + 1, wrapping - 1, u64::MAX] {
        guest.read_fails(sector, data.len());
        assert_eq!(guest.status(&Request::write(sector, &data)), IOERR, "write at {sector}");
    }
    guest.read_fails(1, to_usize(disk.shape.size));
    assert_untouched(&disk, &mut guest);
}

#[test]
fn last_sector_is_readable_and_writable() {
    let (disk, _daemon, mut guest) = small();
    let (last, data) = (disk.sectors() - 1, pattern(2, 0, SECTOR));
    guest.write(last, &data);
    assert_bytes(&guest.read(last, SECTOR), &data, "the last sector");
}

#[test]
fn length_that_is_no_multiple_of_a_sector_fails_and_changes_nothing() {
    let (disk, _daemon, mut guest) = small();
    for len in [1, 511, 513, 1023, 4095, 4097] {
        guest.read_fails(8, len);
        let status = guest.status(&Request::write(8, &pattern(3, 0, len)));
        assert_eq!(status, IOERR, "write of {len} bytes");
    }
    assert_untouched(&disk, &mut guest);
}

#[test]
fn empty_read_and_write_within_the_disk_do_nothing_and_succeed() {
    let (disk, _daemon, mut guest) = small();
    for sector in [0, 1, disk.sectors() - 1] {
        assert_eq!(guest.status(&Request::read(sector, 0)), OK, "empty read at {sector}");
        assert_eq!(guest.status(&Request::write(sector, &[])), OK, "empty write at {sector}");
    }
    assert_untouched(&disk, &mut guest);
}

#[test]
fn header_shorter_than_sixteen_bytes_fails() {
    let (disk, _daemon, mut guest) = small();
    for len in 0..HEADER {
        for kind in [IN, OUT, GET_ID, 99] {
            let mut request = Request::new(kind, 0, &[], SECTOR + 1);
            request.readable.truncate(len);
            let reply = guest.request(0, &request, &Framing::joined());
            assert_eq!(reply.status(), IOERR, "type {kind} with {len} bytes of header");
            assert!(reply.data().iter().all(|&byte| byte == 0), "no data for a bad header");
        }
    }
    assert_untouched(&disk, &mut guest);
}

#[test]
fn unknown_request_types_are_unsupported_and_change_nothing() {
    let (disk, _daemon, mut guest) = small();
    for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 16, 18, 24, 26, 0x100, 1 << 31, u32::MAX] {
        let (status, data) = data_of(&mut guest, &Request::new(kind, 0, &[0; 512], 513));
        assert_eq!(status, UNSUPP, "type {kind}");
        assert!(data.iter().all(|&byte| byte == 0), "extra writable bytes are zeroed");
    }
    assert_untouched(&disk, &mut guest);
}

#[test]
fn flush_succeeds_and_extra_writable_bytes_of_any_request_are_zeroed() {
    let (_disk, _daemon, mut guest) = small();
    assert_eq!(guest.status(&Request::flush()), OK);
    let sector = pattern(4, 0, SECTOR);
    let zeroes = payload(&[(64, 1, 0)]);
    for (kind, bytes) in [(4, &[][..]), (OUT, &sector[..]), (WRITE_ZEROES, &zeroes[..])] {
        let (status, data) = data_of(&mut guest, &Request::new(kind, 0, bytes, 100));
        assert_eq!(status, OK, "type {kind} with a large status area");
        assert_eq!(data, [0; 99], "type {kind}: bytes before the status");
    }
}

#[test]
fn get_id_gives_the_serial_padded_with_zeros() {
    for (serial, stored) in [("abc-17", "abc-17"), ("12345678901234567890", "12345678901234567890")]
    {
        let disk = Disk::create(Shape::new(MIB, 64 * KIB));
        let mut daemon = disk.serve(&["--serial", serial]);
        let mut guest = daemon.guest(Setup::default());
        for len in [20, 1, 6, 19, 21, 64] {
            let (status, data) = data_of(&mut guest, &Request::get_id(len));
            assert_eq!(status, OK, "GET_ID with {len} bytes");
            let mut want = stored.as_bytes().to_vec();
            want.resize(20, 0);
            want.resize(len, 0);
            assert_eq!(data, want, "serial in {len} bytes");
        }
        assert_eq!(guest.status(&Request::get_id(0)), OK, "GET_ID without room");
    }
}

#[test]
fn read_only_disk_refuses_every_change_and_can_be_read() {
    let disk = Disk::create(Shape::new(MIB, 64 * KIB));
    let files = ["disk.raw", "disk.add-cow", "base.img"].map(|name| disk.path(name));
    let before = files.each_ref().map(|file| std::fs::read(file).expect("a file of the disk"));
    let mut daemon = disk.serve(&["--read-only"]);
    let mut guest = daemon.guest(Setup::default());
    assert_ne!(guest.offered & F_RO, 0, "RO is offered");
    assert_eq!(guest.offered & (F_DISCARD | F_WRITE_ZEROES), 0, "nothing that changes is offered");
    assert_eq!(guest.status(&Request::write(0, &pattern(1, 0, 4096))), IOERR, "write");
    assert_eq!(guest.status(&Request::write(0, &[])), IOERR, "empty write");
    // Not negotiated and not allowed: either status is right, success is not.
    for request in [Request::discard(&[(0, 8, 0)]), Request::write_zeroes(&[(0, 8, UNMAP)])] {
        assert!([IOERR, UNSUPP].contains(&guest.status(&request)), "{request:?}");
    }
    assert_eq!(guest.status(&Request::flush()), OK, "flush");
    assert_untouched(&disk, &mut guest);
    drop(guest);
    daemon.stop();
    let after = files.each_ref().map(|file| std::fs::read(file).expect("a file of the disk"));
    assert!(before == after, "a file of a read-only disk has changed");
}

#[test]
fn raw_image_alone_is_served_in_place() {
    let disk = Disk::create(Shape::new(MIB, 64 * KIB));
    let content = pattern(77, 0, to_usize(MIB));
    std::fs::write(disk.path("disk.raw"), &content).expect("the raw image");
    let mut daemon = disk.serve_raw(&[]);
    let mut guest = daemon.guest(Setup::default());
    assert_bytes(&guest.read_all(), &content, "a raw image");
    guest.write(5, &pattern(1, 0, SECTOR));
    assert_eq!(guest.status(&Request::write_zeroes(&[(100, 3, UNMAP)])), OK);
    guest.read_fails(disk.sectors(), SECTOR);
    assert_eq!(guest.status(&Request::flush()), OK);
    drop(guest);
    daemon.stop();
    let raw = std::fs::read(disk.path("disk.raw")).expect("the raw image");
    let mut want = content;
    want[5 * SECTOR..6 * SECTOR].copy_from_slice(&pattern(1, 0, SECTOR));
    want[100 * SECTOR..103 * SECTOR].fill(0);
    assert_bytes(&raw, &want, "the raw image afterwards");
}

#[test]
fn disk_without_a_base_reads_zeros_until_written() {
    let disk = Disk::create(Shape::new(MIB, 64 * KIB).no_base());
    let mut daemon = disk.serve(&[]);
    let mut guest = daemon.guest(Setup::default());
    guest.write(130, &pattern(6, 130, SECTOR));
    let mut want = vec![0; to_usize(MIB)];
    want[130 * SECTOR..131 * SECTOR].copy_from_slice(&pattern(6, 130, SECTOR));
    assert_bytes(&guest.read_all(), &want, "a disk without a base");
}

/// The two requests made of segments.
const SEGMENT_REQUESTS: [u32; 2] = [DISCARD, WRITE_ZEROES];

#[test]
fn discard_and_write_zeroes_are_unsupported_unless_negotiated() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    let mut guest = daemon.guest(Setup::without(F_DISCARD | F_WRITE_ZEROES));
    for kind in SEGMENT_REQUESTS {
        let request = Request::new(kind, 0, &payload(&[(0, 128, 0)]), 1);
        assert_eq!(guest.status(&request), UNSUPP, "type {kind} without its feature");
    }
    assert_untouched(&disk, &mut guest);
}

#[test]
fn payload_that_is_not_whole_segments_fails_and_changes_nothing() {
    let (disk, _daemon, mut guest) = small();
    let segments = payload(&[(0, 128, 0), (256, 128, 0)]);
    for kind in SEGMENT_REQUESTS {
        for len in [0, 1, 8, 15, 17, 24, 31] {
            let status = guest.status(&Request::new(kind, 0, &segments[..len], 1));
            assert_eq!(status, IOERR, "type {kind} with {len} bytes of payload");
        }
    }
    assert_untouched(&disk, &mut guest);
}

#[test]
fn reserved_flags_and_unmap_on_discard_are_unsupported_and_change_nothing() {
    let (disk, _daemon, mut guest) = small();
    let flags = [2, 4, 0x80, 1 << 31, u32::MAX, 3];
    for (kind, flag) in flags.iter().flat_map(|&flag| SEGMENT_REQUESTS.map(|kind| (kind, flag))) {
        let segments = payload(&[(0, 128, 0), (128, 128, flag)]);
        let status = guest.status(&Request::new(kind, 0, &segments, 1));
        assert_eq!(status, UNSUPP, "type {kind} with flags {flag:#x}");
    }
    assert_eq!(guest.status(&Request::discard(&[(0, 128, UNMAP)])), UNSUPP, "discard with unmap");
    assert_untouched(&disk, &mut guest);
}

#[test]
fn more_segments_or_sectors_than_announced_fail_and_change_nothing() {
    let (disk, _daemon, mut guest) = small();
    let config = guest.config();
    let limits = [
        (DISCARD, config.max_discard_seg(), config.max_discard_sectors()),
        (WRITE_ZEROES, config.max_write_zeroes_seg(), config.max_write_zeroes_sectors()),
    ];
    for (kind, most_segments, most_sectors) in limits {
        assert!(most_segments > 1 && most_sectors > 0, "type {kind}: several segments are offered");
        let count = usize::try_from(most_segments).expect("small") + 1;
        let many = vec![(0, 1, 0); count];
        assert_eq!(guest.status(&Request::new(kind, 0, &payload(&many), 1)), IOERR, "type {kind}");
        if let Some(sectors) = most_sectors.checked_add(1) {
            let long = payload(&[(0, sectors, 0)]);
            assert_eq!(guest.status(&Request::new(kind, 0, &long, 1)), IOERR, "type {kind}");
        }
    }
    assert_untouched(&disk, &mut guest);
    for (kind, most_segments, _) in limits {
        let all: Vec<_> = (0..u64::from(most_segments)).map(|at| (8 * at, 1, 0)).collect();
        let request = Request::new(kind, 0, &payload(&all), 1);
        assert_eq!(guest.status(&request), OK, "type {kind} with as many as announced");
    }
}

#[test]
fn one_segment_out_of_range_fails_and_none_is_executed() {
    let (disk, _daemon, mut guest) = small();
    let end = disk.sectors();
    for kind in SEGMENT_REQUESTS {
        for bad in [(end, 1), (end - 1, 2), (u64::MAX, 1), (1 << 55, 8), ((1 << 55) - 4, 8)] {
            for at in 0..3 {
                let mut segments = vec![(0, 128, 0), (1024, 256, 0)];
                segments.insert(at, (bad.0, bad.1, 0));
                let status = guest.status(&Request::new(kind, 0, &payload(&segments), 1));
                assert_eq!(status, IOERR, "type {kind} with {bad:?} as segment {at}");
            }
        }
    }
    assert_untouched(&disk, &mut guest);
}

#[test]
fn write_zeroes_reads_zeros_where_the_base_has_data_and_in_parts_of_clusters() {
    for flags in [0, UNMAP] {
        let (disk, _daemon, mut guest) = small();
        let mut want = disk.initial();
        guest.write(2048, &pattern(8, 2048, 256 * SECTOR));
        want[2048 * SECTOR..][..256 * SECTOR].copy_from_slice(&pattern(8, 2048, 256 * SECTOR));
        let segments =
            [(0, 128), (130, 1), (255, 2), (700, 500), (2050, 3), (2100, 100), (8191, 1)];
        for (sector, count) in segments {
            assert_eq!(guest.status(&Request::write_zeroes(&[(sector, count, flags)])), OK);
            let (at, len) = (to_usize(sector) * SECTOR, to_usize(u64::from(count)) * SECTOR);
            want[at..at + len].fill(0);
            assert_bytes(&guest.read(sector, len), &want[at..at + len], "zeroed sectors");
        }
        assert_bytes(&guest.read_all(), &want, "the disk after write-zeroes");
    }
}

#[test]
fn several_segments_in_one_request_are_all_executed() {
    let (disk, _daemon, mut guest) = small();
    let mut want = disk.initial();
    let segments = [(5, 1), (128, 128), (400, 3), (403, 2), (8000, 192)];
    let request = Request::write_zeroes(&segments.map(|(sector, count)| (sector, count, UNMAP)));
    // Cut inside a segment, and several segments in one descriptor.
    let reply = guest.request(0, &request, &Framing::cut(&[16, 7, 30, 1], &[]));
    assert_eq!(reply.status(), OK);
    for (sector, count) in segments {
        let (at, len) = (to_usize(sector) * SECTOR, to_usize(u64::from(count)) * SECTOR);
        want[at..at + len].fill(0);
    }
    assert_bytes(&guest.read_all(), &want, "the disk after five segments");
}

#[test]
fn discard_leaves_each_sector_old_or_zero_and_never_changes_its_mind() {
    for (cluster, sectors) in [(4 * KIB, 1000), (64 * KIB, 3000)] {
        let disk = Disk::create(Shape::new(4 * MIB, cluster));
        let mut daemon = disk.serve(&[]);
        let mut guest = daemon.guest(Setup::default());
        let mut model = common::model::Model::new(disk.initial());
        let data = pattern(3, 512, 2048 * SECTOR);
        guest.write(512, &data);
        model.write(512, &data);
        for segments in [[(100, sectors, 0), (7001, 3, 0)], [(1, 1, 0), (4096, 128, 0)]] {
            assert_eq!(guest.status(&Request::discard(&segments)), OK);
            segments.iter().for_each(|&(first, count, _)| model.discard(first, u64::from(count)));
        }
        let seen = guest.read_all();
        model.check(0, &seen, "after discard");
        // A write beside a discarded sector must not bring old bytes back.
        for sector in [105, 600, 1400, 4100] {
            guest.write(sector, &data[..SECTOR]);
            model.write(sector, &data[..SECTOR]);
        }
        model.check(0, &guest.read_all(), "after discard and writes beside it");
        assert_eq!(guest.status(&Request::flush()), OK);
        drop(guest);
        daemon.stop();
        let mut guest_again = disk.serve(&[]);
        let bytes = guest_again.guest(Setup::default()).read_all();
        model.check(0, &bytes, "after discard and a restart");
    }
}

#[test]
fn discard_of_whole_clusters_gives_space_back() {
    let disk = Disk::create(Shape::new(8 * MIB, 64 * KIB).sparse(0));
    let mut daemon = disk.serve(&[]);
    let mut guest = daemon.guest(Setup::default());
    for first in (0..8192).step_by(2048) {
        guest.write(first, &pattern(1, first, 2048 * SECTOR));
    }
    assert_eq!(guest.status(&Request::flush()), OK);
    let blocks = |name| {
        let file = std::fs::metadata(disk.path(name)).expect("a file of the disk");
        std::os::unix::fs::MetadataExt::blocks(&file)
    };
    let full = blocks("disk.raw");
    assert!(full * 512 >= 4 * MIB, "written clusters take space: {full} blocks");
    assert_eq!(guest.status(&Request::discard(&[(0, 8192, 0)])), OK);
    assert_eq!(guest.status(&Request::flush()), OK);
    let left = blocks("disk.raw");
    assert!(left < full / 8, "discarded clusters are punched: {left} of {full} blocks are left");
}

#[test]
fn large_requests_of_many_clusters_work() {
    let disk = Disk::create(Shape::new(16 * MIB, 4 * KIB));
    let mut daemon = disk.serve(&[]);
    let mut guest = daemon.guest(Setup::default());
    let data = pattern(11, 3, 12 * to_usize(MIB) + SECTOR);
    guest.write(3, &data);
    assert_bytes(&guest.read(3, data.len()), &data, "12 MiB in one request");
    let last = 3 + to_u64(data.len() / SECTOR);
    let tail = disk.initial()[to_usize(last) * SECTOR..][..SECTOR].to_vec();
    assert_bytes(&guest.read(last, SECTOR), &tail, "the sector after it");
}
