//! Descriptor chains: every legal framing works, every broken chain is refused whole.
//!
//! Legal by VIRTIO 1.3, 2.7.4: any cut of a request into descriptors, indirect tables, any ring
//! size and index. A chain whose structure is broken comes back with length 0 and has no effect
//! on the disk or on guest memory, and the next request works.
//!
//! Not here: what requests mean (`device.rs`).

mod common;

use std::time::Duration;

use common::disk::{Daemon, Disk};
use common::guest::{F_EVENT_IDX, F_INDIRECT, Guest, Setup};
use common::mem::{BOUNDARY, END, EXTRA};
use common::request::{Framing, IOERR, OK, Request, UNTOUCHED, header};
use common::ring::{Buffer, DESC_SIZE, Desc, INDIRECT, NEXT, WRITE, chain};
use common::rng::Rng;
use common::{SECTOR, TIMEOUT, assert_bytes, pattern, to_u32, to_u64};

/// A small disk and a guest with `setup` on it.
fn small(setup: Setup) -> (Disk, Daemon, Guest) {
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    let guest = daemon.guest(setup);
    (disk, daemon, guest)
}

/// Writes, reads back and asks for the serial with the same cuts, direct and indirect.
fn check_framing(guest: &mut Guest, readable: &[usize], writable: &[usize], seed: u64) {
    let data = pattern(seed, 64, 5 * SECTOR);
    for framing in [Framing::cut(readable, writable), Framing::cut(readable, writable).indirect()] {
        let sector = 64 + u64::from(framing.indirect) * 512;
        let write = Request::write(sector, &data);
        assert_eq!(guest.request(0, &write, &framing).status(), OK, "write with {framing:?}");
        let reply = guest.request(0, &Request::read(sector, data.len()), &framing);
        assert_eq!(reply.status(), OK, "read with {framing:?}");
        assert_bytes(reply.data(), &data, &format!("{framing:?}"));
        let reply = guest.request(0, &Request::get_id(20), &framing);
        assert_eq!(reply.status(), OK, "GET_ID with {framing:?}");
        assert_eq!(guest.request(0, &Request::flush(), &framing).status(), OK);
    }
}

#[test]
fn header_cut_anywhere_is_understood() {
    let (_disk, _daemon, mut guest) = small(Setup::default());
    for at in 0..=40 {
        check_framing(&mut guest, &[at], &[], to_u64(at));
    }
    for cuts in [&[4, 4, 4, 4][..], &[8, 8], &[1; 16], &[0, 5, 0, 11, 0, 0], &[15, 2], &[10, 100]] {
        check_framing(&mut guest, cuts, &[], 99);
    }
}

#[test]
fn data_cut_into_odd_pieces_is_understood() {
    let (_disk, _daemon, mut guest) = small(Setup::default());
    for cuts in [&[1, 3, 511, 513, 7][..], &[512; 4], &[100; 25], &[0, 2559], &[2560, 0], &[33; 60]]
    {
        let readable: Vec<usize> = [16].iter().chain(cuts).copied().collect();
        check_framing(&mut guest, &readable, cuts, 5);
    }
}

#[test]
fn status_lies_in_the_last_writable_byte_wherever_that_is() {
    let (_disk, _daemon, mut guest) = small(Setup::default());
    // Alone, with one or all bytes of data, and followed by descriptors without a byte.
    for cuts in [&[2560][..], &[2559], &[], &[2560, 1, 0, 0], &[0, 0, 2561, 0], &[1]] {
        check_framing(&mut guest, &[16], cuts, 6);
    }
    for writable in [1, 2, 3, 64, 513] {
        let mut request = Request::write(9, &pattern(1, 9, SECTOR));
        request.writable = writable;
        for framing in [Framing::joined(), Framing::cut(&[16], &[writable - 1])] {
            let reply = guest.request(0, &request, &framing);
            assert_eq!(reply.status(), OK);
            assert!(reply.data().iter().all(|&byte| byte == 0), "no other byte carries anything");
        }
    }
}

#[test]
fn sixty_four_descriptors_of_a_sector_each_are_understood() {
    let (_disk, _daemon, mut guest) = small(Setup::default());
    let data = pattern(8, 300, 64 * SECTOR);
    let readable: Vec<usize> = [16].into_iter().chain([SECTOR; 64]).collect();
    for framing in [Framing::cut(&readable, &[SECTOR; 64]), Framing::cut(&readable, &[1000; 32])] {
        for framing in [framing.clone(), framing.indirect()] {
            let status = guest.request(0, &Request::write(300, &data), &framing).status();
            assert_eq!(status, OK, "write");
            let reply = guest.request(0, &Request::read(300, data.len()), &framing);
            assert_bytes(reply.data(), &data, "read of 64 pieces");
        }
    }
}

#[test]
fn random_framings_are_understood() {
    let mut rng = Rng::new(17);
    for without in [0, F_EVENT_IDX, F_INDIRECT] {
        let setup = Setup::without(without);
        let (disk, _daemon, mut guest) = small(setup);
        let mut model = common::model::Model::new(disk.initial());
        for _ in 0..150 {
            let (sector, count) = (rng.pick(0..8000), rng.index(60));
            let data = pattern(rng.next(), sector, count * SECTOR);
            let write = Request::write(sector, &data);
            let framing = Framing::random(&mut rng, &write, 20);
            assert_eq!(guest.request(0, &write, &framing).status(), OK, "{framing:?}");
            model.write(sector, &data);
            let read = Request::read(sector, data.len());
            let framing = Framing::random(&mut rng, &read, 20);
            let reply = guest.request(0, &read, &framing);
            model.check(sector, reply.data(), &format!("{framing:?}"));
        }
        model.check(0, &guest.read_all(), "the disk afterwards");
    }
}

#[test]
fn buffer_that_straddles_two_memory_regions_is_one_buffer() {
    let (_disk, _daemon, mut guest) = small(Setup::default());
    let data = pattern(12, 40, 8 * SECTOR);
    let half = to_u64(data.len() / 2) + 7;
    let place = BOUNDARY - half;
    let header_at = |guest: &Guest, kind| {
        let addr = guest.mem.alloc_filled(16, 0);
        guest.mem.write(addr, &header(kind, 40));
        Buffer { addr, len: 16, writable: false }
    };
    let status = Buffer { addr: guest.mem.alloc_filled(1, UNTOUCHED), len: 1, writable: true };
    guest.mem.write(place, &data);
    let body = Buffer { addr: place, len: to_u32(data.len()), writable: false };
    let buffers = [header_at(&guest, 1), body, status];
    guest.rings[0].add(&buffers);
    guest.kick(0);
    assert_eq!(guest.rings[0].wait().len, 1, "used length of the write");
    assert_eq!(guest.mem.read(status.addr, 1), [OK], "status of the write");
    guest.mem.write(place, &vec![0; data.len()]);
    let buffers = [header_at(&guest, 0), Buffer { writable: true, ..body }, status];
    guest.rings[0].add(&buffers);
    guest.kick(0);
    assert_eq!(guest.rings[0].wait().len, body.len + 1, "used length of the read");
    assert_bytes(&guest.mem.read(place, data.len()), &data, "data over the boundary");
    // The header and an indirect table over the boundary as well.
    let place = BOUNDARY - 24;
    guest.mem.write(BOUNDARY - 8, &header(0, 41));
    let data_in = Buffer { addr: EXTRA - EXTRA / 2 - 8192, len: 512, writable: true };
    let head = Buffer { addr: BOUNDARY - 8, len: 16, writable: false };
    let table: Vec<u8> =
        chain(&[head, data_in, status], &[0, 1, 2]).into_iter().flat_map(Desc::bytes).collect();
    let table_at = place - 32;
    guest.mem.write(table_at, &table[..]);
    guest.mem.write(BOUNDARY - 8, &header(0, 41));
    let desc = Desc { addr: table_at, len: to_u32(table.len()), flags: INDIRECT, next: 0 };
    guest.rings[0].put(100, desc);
    guest.rings[0].publish(100);
    guest.kick(0);
    assert_eq!(guest.rings[0].wait().len, 513, "used length with a header over the boundary");
    assert_bytes(&guest.mem.read(data_in.addr, SECTOR), &data[SECTOR..2 * SECTOR], "sector 41");
}

#[test]
fn indirect_table_over_the_boundary_of_two_regions_is_understood() {
    let (disk, _daemon, mut guest) = small(Setup::default());
    let head = Buffer { addr: guest.mem.alloc_filled(16, 0), len: 16, writable: false };
    guest.mem.write(head.addr, &header(0, 9));
    let data = Buffer { addr: guest.mem.alloc_filled(513, 1), len: 513, writable: true };
    let table: Vec<u8> = chain(&[head, data], &[0, 1]).into_iter().flat_map(Desc::bytes).collect();
    for before in [16, 8, 1, 20] {
        guest.mem.write(BOUNDARY - before, &table);
        // The write-only flag of a descriptor with a table means nothing (2.7.5.3.2).
        for flags in [INDIRECT, INDIRECT | WRITE] {
            let desc = Desc { addr: BOUNDARY - before, len: 32, flags, next: 0 };
            guest.rings[0].put(7, desc);
            guest.rings[0].publish(7);
            guest.kick(0);
            assert_eq!(guest.rings[0].wait().len, 513, "used length");
            let want = &disk.initial()[9 * SECTOR..10 * SECTOR];
            assert_bytes(&guest.mem.read(data.addr, SECTOR), want, "data");
            guest.mem.write(data.addr, &[1; 513]);
        }
    }
}

#[test]
fn ring_indices_wrap_around_without_a_trace() {
    for without in [0, F_EVENT_IDX] {
        for size in [2, 4, 256] {
            let setup = Setup { size, start: 0xfff0, ..Setup::without(without) };
            let (disk, _daemon, mut guest) = small(setup);
            let initial = disk.initial();
            for round in 0..64 {
                let request = Request::read(round, SECTOR);
                let reply = guest.request(0, &request, &Framing::joined());
                let want = &initial[SECTOR * usize::try_from(round).expect("small")..][..SECTOR];
                assert_bytes(reply.data(), want, "a read while the indices wrap");
            }
            assert_eq!(guest.stop_ring(0), 0x30, "next index after the wrap");
        }
    }
}

#[test]
fn rings_of_every_size_work() {
    for bits in 0..=15 {
        let setup = Setup { size: 1 << bits, start: 0xffff, ..Setup::default() };
        let (_disk, _daemon, mut guest) = small(setup);
        // Two or more chains at once where they fit, and more requests than entries on small
        // rings, so that slots are used again.
        for round in 0..6 {
            let batch = (guest.rings[0].room() / 2).clamp(1, 64);
            let framing = if bits == 0 { Framing::joined().indirect() } else { Framing::joined() };
            for at in 0..batch {
                let sector = to_u64(at * 8 + round);
                guest.submit(0, &Request::write(sector, &pattern(1, sector, SECTOR)), &framing);
            }
            guest.kick(0);
            for _ in 0..batch {
                assert_eq!(guest.finish(0).1.status(), OK, "ring of {} entries", 1 << bits);
            }
        }
    }
}

#[test]
fn full_ring_of_requests_is_answered_one_for_one() {
    for without in [0, F_EVENT_IDX] {
        let setup = Setup { size: 256, ..Setup::without(without) };
        let (disk, _daemon, mut guest) = small(setup);
        let initial = disk.initial();
        for _ in 0..5 {
            let mut sectors = std::collections::HashMap::new();
            while guest.rings[0].room() >= 2 {
                let sector = to_u64(guest.rings[0].room()) * 13;
                let request = Request::read(sector, SECTOR);
                sectors.insert(guest.submit(0, &request, &Framing::joined()), sector);
                guest.kick(0);
            }
            while let Some(sector) = (!sectors.is_empty()).then(|| guest.finish(0)) {
                let at = sectors.remove(&sector.0).expect("a request of this round");
                let want = &initial[SECTOR * usize::try_from(at).expect("small")..][..SECTOR];
                assert_bytes(sector.1.data(), want, "one of 128 requests");
            }
        }
    }
}

#[test]
fn device_does_not_call_a_driver_that_wants_no_calls() {
    let (_disk, _daemon, mut guest) = small(Setup::without(F_EVENT_IDX));
    assert_eq!(guest.status(&Request::flush()), OK);
    while guest.rings[0].wait_for_call(Duration::from_millis(20)) {}
    guest.rings[0].mute(true);
    guest.submit(0, &Request::flush(), &Framing::joined());
    guest.kick(0);
    let end = std::time::Instant::now() + TIMEOUT;
    let used = loop {
        if let Some(used) = guest.rings[0].pop() {
            break used;
        }
        assert!(std::time::Instant::now() < end, "no used entry within {TIMEOUT:?}");
        std::thread::yield_now();
    };
    assert_eq!(guest.collect(0, used).status(), OK);
    assert!(!guest.rings[0].wait_for_call(Duration::from_millis(50)), "a call despite the flag");
    guest.rings[0].mute(false);
    assert_eq!(guest.status(&Request::flush()), OK, "calls come again");
}

#[test]
fn kicks_without_a_request_do_no_harm() {
    let (_disk, _daemon, mut guest) = small(Setup::default());
    for _ in 0..20 {
        guest.rings[0].kick_always();
        guest.submit(0, &Request::flush(), &Framing::joined());
        guest.rings[0].kick_always();
        guest.rings[0].kick_always();
        assert_eq!(guest.finish(0).1.status(), OK);
    }
    assert_eq!(guest.rings[0].pop(), None, "nothing is answered twice");
}

/// The parts of a write of one sector, laid out by hand so that a test can break it.
struct Parts {
    /// Header of a write to sector 0.
    header: Buffer,
    /// One sector of data.
    data: Buffer,
    /// A writable kilobyte, the status at its end.
    status: Buffer,
}

impl Parts {
    /// Places the parts in guest memory.
    fn new(guest: &Guest) -> Self {
        let mem = &guest.mem;
        let place = |bytes: &[u8], writable| {
            let addr = mem.alloc_filled(bytes.len(), 0);
            mem.write(addr, bytes);
            Buffer { addr, len: to_u32(bytes.len()), writable }
        };
        Self {
            header: place(&header(1, 0), false),
            data: place(&pattern(66, 0, SECTOR), false),
            status: place(&[UNTOUCHED; 1024], true),
        }
    }

    /// The descriptors 10, 20 and 30 of a good write.
    fn descs(&self) -> [(u16, Desc); 3] {
        let slots = [10, 20, 30];
        let descs = chain(&[self.header, self.data, self.status], &slots);
        [0, 1, 2].map(|at| (slots[at], descs[at]))
    }
}

/// Puts a broken chain with head `head` on the ring: it comes back with length 0, nothing has
/// changed anywhere, and the next request works.
fn refused(guest: &mut Guest, parts: &Parts, before: &[u8], head: u16, what: &str) {
    guest.rings[0].publish(head);
    let driver_area = guest.rings[0].driver_area();
    guest.kick(0);
    let used = guest.rings[0].wait();
    assert_eq!((used.head, used.len), (head, 0), "{what}: used entry");
    assert!(guest.rings[0].driver_area().starts_with(&driver_area[..128 * DESC_SIZE + 4]));
    let writable = guest.mem.read(parts.status.addr, 1024);
    assert_eq!(writable, [UNTOUCHED; 1024], "{what}: guest memory was written");
    let data = guest.mem.read(parts.data.addr, SECTOR);
    assert_bytes(&data, &pattern(66, 0, SECTOR), "the readable part");
    assert_bytes(&guest.read(0, before.len()), before, &format!("{what}: the disk"));
}

/// Breaks a good write with `break_it` and checks that it is refused.
fn refused_write(what: &str, break_it: impl Fn(&mut [(u16, Desc); 3])) {
    let (disk, _daemon, mut guest) = small(Setup::default());
    let parts = Parts::new(&guest);
    let mut descs = parts.descs();
    break_it(&mut descs);
    for (slot, desc) in descs {
        guest.rings[0].put(slot, desc);
    }
    refused(&mut guest, &parts, &disk.initial()[..8 * SECTOR], 10, what);
}

#[test]
fn hand_made_write_that_is_not_broken_is_done() {
    let (_disk, _daemon, mut guest) = small(Setup::default());
    let parts = Parts::new(&guest);
    for (slot, desc) in parts.descs() {
        guest.rings[0].put(slot, desc);
    }
    guest.rings[0].publish(10);
    guest.kick(0);
    assert_eq!(guest.rings[0].wait().len, 1024, "used length");
    assert_eq!(guest.mem.read(parts.status.addr + 1023, 1), [OK]);
    assert_bytes(&guest.read(0, SECTOR), &pattern(66, 0, SECTOR), "the sector written");
}

#[test]
fn chain_with_a_loop_is_refused() {
    for target in [10, 20, 30] {
        refused_write("loop from the end", |descs| {
            descs[2].1.flags |= NEXT;
            descs[2].1.next = target;
        });
    }
    for target in [10, 20] {
        refused_write("loop among readable descriptors", |descs| descs[1].1.next = target);
    }
    refused_write("loop of one", |descs| descs[0].1.next = 10);
    refused_write("loop of one without bytes", |descs| {
        descs[0].1.len = 0;
        descs[0].1.next = 10;
    });
}

#[test]
fn chain_with_next_out_of_range_is_refused() {
    for next in [128, 129, 0x7fff, 0xffff] {
        refused_write("next of the header", |descs| descs[0].1.next = next);
        refused_write("next of the data", |descs| descs[1].1.next = next);
        refused_write("next of the status", |descs| {
            descs[2].1.flags |= NEXT;
            descs[2].1.next = next;
        });
    }
}

#[test]
fn chain_with_a_buffer_outside_memory_is_refused() {
    for at in 0..3 {
        for addr in [END, END - 1, EXTRA, u64::MAX - 15, u64::MAX, 1 << 63, 0xffff_ffff_0000] {
            let len = if at == 0 { 16 } else { 512 };
            refused_write("buffer outside memory", |descs| {
                descs[at].1.addr = addr;
                descs[at].1.len = len;
            });
        }
    }
    refused_write("buffer longer than memory", |descs| descs[2].1.len = u32::MAX);
}

#[test]
fn chain_with_readable_after_writable_is_refused() {
    refused_write("writable header", |descs| descs[0].1.flags |= WRITE);
    refused_write("writable data before readable status", |descs| {
        descs[1].1.flags |= WRITE;
        descs[2].1.flags &= !WRITE;
    });
    let (disk, _daemon, mut guest) = small(Setup::default());
    let parts = Parts::new(&guest);
    let buffers = [parts.header, parts.status, parts.data];
    for (slot, desc) in [4, 5, 6].into_iter().zip(chain(&buffers, &[4, 5, 6])) {
        guest.rings[0].put(slot, desc);
    }
    refused(&mut guest, &parts, &disk.initial()[..SECTOR], 4, "status in the middle");
}

#[test]
fn chain_of_more_than_four_gigabytes_is_refused() {
    let (disk, _daemon, mut guest) = small(Setup::default());
    let parts = Parts::new(&guest);
    // 65 times all of the memory, readable: legal lengths each, too many together.
    let all =
        Buffer { addr: 0, len: to_u32(usize::try_from(END).expect("small")), writable: false };
    let mut buffers = vec![parts.header];
    buffers.extend([all; 65]);
    buffers.push(parts.status);
    let slots: Vec<u16> = (0..67).collect();
    for (slot, desc) in slots.iter().zip(chain(&buffers, &slots)) {
        guest.rings[0].put(*slot, desc);
    }
    refused(&mut guest, &parts, &disk.initial()[..SECTOR], 0, "more than 4 GiB");
}

/// An indirect table with a good write, as bytes and as descriptors.
fn good_table(parts: &Parts) -> Vec<Desc> {
    chain(&[parts.header, parts.data, parts.status], &[0, 1, 2])
}

/// Checks that a chain with the descriptor `outer` for the table `inner` is refused; the closure
/// breaks either. Descriptors 40 and 41 are put on the ring.
fn refused_indirect(what: &str, break_it: impl Fn(&mut [Desc; 2], &mut Vec<Desc>)) {
    let (disk, _daemon, mut guest) = small(Setup::default());
    let parts = Parts::new(&guest);
    let mut inner = good_table(&parts);
    let addr = guest.mem.alloc_filled(4096, 0);
    let len = to_u32(inner.len() * DESC_SIZE);
    let rest = Desc { addr: parts.status.addr, len: 1024, flags: WRITE, next: 0 };
    let mut outer = [Desc { addr, len, flags: INDIRECT, next: 0 }, rest];
    break_it(&mut outer, &mut inner);
    let table: Vec<u8> = inner.into_iter().flat_map(Desc::bytes).collect();
    guest.mem.write(addr, &table);
    guest.rings[0].put(40, outer[0]);
    guest.rings[0].put(41, outer[1]);
    refused(&mut guest, &parts, &disk.initial()[..SECTOR], 40, what);
}

#[test]
fn indirect_table_of_a_wrong_length_is_refused() {
    for len in [0, 1, 8, 15, 17, 24, 47, 49, 0xffff_ffff] {
        refused_indirect(&format!("table of {len} bytes"), |outer, _| outer[0].len = len);
    }
}

#[test]
fn indirect_table_outside_memory_is_refused() {
    for addr in [END, END - 8, END - 32, u64::MAX - 7, u64::MAX - 15, EXTRA] {
        refused_indirect("table outside memory", |outer, _| outer[0].addr = addr);
    }
}

#[test]
fn indirect_table_that_is_not_the_end_of_its_chain_is_refused() {
    refused_indirect("INDIRECT and NEXT", |outer, _| {
        outer[0].flags |= NEXT;
        outer[0].next = 41;
    });
}

#[test]
fn indirect_table_inside_an_indirect_table_is_refused() {
    for at in 0..3 {
        refused_indirect("nested table", |outer, inner| {
            let again = Desc { flags: INDIRECT, next: 0, ..outer[0] };
            inner[at] = again;
        });
        refused_indirect("nested table with next", |_, inner| inner[at].flags |= INDIRECT);
    }
}

#[test]
fn indirect_chain_that_loops_or_leaves_its_table_is_refused() {
    for next in [0, 1, 2, 3, 4, 127, 0xffff] {
        refused_indirect("end of the table goes on", |_, inner| {
            inner[2].flags |= NEXT;
            inner[2].next = next;
        });
    }
    for next in [0, 1, 3, 0x8000] {
        refused_indirect("middle of the table goes astray", |_, inner| inner[1].next = next);
    }
    refused_indirect("buffer outside memory", |_, inner| inner[1].addr = END - 511);
    refused_indirect("readable after writable", |_, inner| inner[0].flags |= WRITE);
}

#[test]
fn indirect_table_without_the_feature_is_refused() {
    let (disk, _daemon, mut guest) = small(Setup::without(F_INDIRECT));
    let parts = Parts::new(&guest);
    let table: Vec<u8> = good_table(&parts).into_iter().flat_map(Desc::bytes).collect();
    let addr = guest.mem.alloc_filled(table.len(), 0);
    guest.mem.write(addr, &table);
    let desc = Desc { addr, len: to_u32(table.len()), flags: INDIRECT, next: 0 };
    guest.rings[0].put(40, desc);
    refused(&mut guest, &parts, &disk.initial()[..SECTOR], 40, "INDIRECT was not negotiated");
}

#[test]
fn chain_without_a_writable_byte_comes_back_with_length_0() {
    let (_disk, _daemon, mut guest) = small(Setup::default());
    for request in [Request::flush(), Request::read(0, 0), Request::new(99, 0, &[1; 99], 0)] {
        let request = Request { writable: 0, ..request };
        guest.request(0, &request, &Framing::usual(&request));
    }
    let short = Request { readable: vec![1; 5], writable: 0 };
    guest.request(0, &short, &Framing::joined());
    // The same with a writable descriptor that holds no byte.
    let parts = Parts::new(&guest);
    let buffers = [parts.header, Buffer { len: 0, ..parts.status }];
    guest.rings[0].add(&buffers);
    guest.kick(0);
    assert_eq!(guest.rings[0].wait().len, 0);
    assert_eq!(guest.status(&Request::flush()), OK, "the next request");
}

#[test]
fn status_byte_that_is_not_writable_is_not_written() {
    let (disk, _daemon, mut guest) = small(Setup::default());
    let parts = Parts::new(&guest);
    let mut descs = parts.descs();
    descs[2].1.flags = 0;
    for (slot, desc) in descs {
        guest.rings[0].put(slot, desc);
    }
    guest.rings[0].publish(10);
    guest.kick(0);
    assert_eq!(guest.rings[0].wait().len, 0, "used length");
    assert_eq!(guest.mem.read(parts.status.addr, 1024), [UNTOUCHED; 1024], "a readable buffer");
    // Header, sector and the kilobyte are three sectors of data: sectors beyond stay.
    let at = 3 * SECTOR;
    assert_bytes(&guest.read(3, SECTOR), &disk.initial()[at..at + SECTOR], "the sector after");
}

#[test]
fn head_out_of_range_does_not_stop_the_ring() {
    let (_disk, _daemon, mut guest) = small(Setup::default());
    for head in [128, 0x8000, 0xffff] {
        guest.rings[0].publish(head);
        let good = guest.submit(0, &Request::flush(), &Framing::joined());
        guest.kick(0);
        // Whether a head that names no descriptor comes back is left open by the text.
        let mut used = guest.rings[0].wait();
        if used.head == head {
            assert_eq!(used.len, 0, "length for head {head}");
            used = guest.rings[0].wait();
        }
        assert_eq!(used.head, good);
        assert_eq!(guest.collect(0, used).status(), OK, "the request after head {head}");
        guest.rings[0].outstanding.remove(&head);
    }
}

#[test]
fn available_index_that_jumps_leaves_other_queues_and_the_daemon_alone() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&["--num-queues", "2"]);
    let mut guest = daemon.guest(Setup::queues(2, 128));
    for jump in [129, 0x4000, 0xffff] {
        let ring = &guest.rings[0];
        let index = ring.next_avail().wrapping_add(jump);
        guest.mem.store_u16(ring.avail + 2, index);
        ring.kick_always();
        let request = Request::read(3, SECTOR);
        let reply = guest.request(1, &request, &Framing::usual(&request));
        assert_eq!(reply.status(), OK, "the other queue after a jump of {jump}");
        guest.stop_ring(0);
        guest.rings[0].restart(0);
        guest.start_ring(0);
        assert_eq!(guest.status(&Request::flush()), OK, "the queue after it was set up again");
    }
    assert!(daemon.is_alive());
}

#[test]
fn head_that_is_made_available_twice_does_not_harm_the_daemon() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    let mut guest = daemon.guest(Setup::default());
    let parts = Parts::new(&guest);
    for (slot, desc) in parts.descs() {
        guest.rings[0].put(slot, desc);
    }
    for _ in 0..8 {
        guest.rings[0].publish_unknown(10);
    }
    guest.rings[0].kick_always();
    let used = guest.rings[0].used;
    let end = std::time::Instant::now() + TIMEOUT;
    while guest.mem.load_u16(used + 2) != 8 {
        assert!(std::time::Instant::now() < end, "eight uses of one chain within {TIMEOUT:?}");
        std::thread::yield_now();
    }
    assert_eq!(guest.stop_ring(0), 8);
    guest.rings[0].restart(0);
    guest.start_ring(0);
    assert_bytes(&guest.read(0, SECTOR), &pattern(66, 0, SECTOR), "what all of them wrote");
}

#[test]
fn request_header_that_fails_still_gets_a_status_in_a_long_chain() {
    let (_disk, _daemon, mut guest) = small(Setup::default());
    let request = Request { readable: vec![0; 15], writable: 600 };
    let reply = guest.request(0, &request, &Framing::cut(&[1; 15], &[7; 80]));
    assert_eq!(reply.status(), IOERR);
}
