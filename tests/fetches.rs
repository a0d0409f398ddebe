//! Is every byte that says what a request is fetched from guest memory once (I8)?
//!
//! A byte that is fetched twice may have changed in between, and then it is not what was checked
//! that is done. The processor counts the fetches, with watchpoints on the daemon's threads
//! (perf_event_open(2), `PERF_TYPE_BREAKPOINT`), so this is about the program that users run. There
//! are four of them, so each request is repeated until every byte of it has been watched.
//!
//! Not here: what a guest gains by changing bytes meanwhile (`hostile.rs`). Indices of rings are
//! fetched again and again: that is how the two sides talk.

mod common;

use std::io;

use common::disk::{Daemon, Disk, Shape};
use common::guest::{Guest, Setup};
use common::request::{Framing, HEADER, IOERR, OK, Request, UNSUPP};
use common::ring::{DESC_SIZE, Desc, INDIRECT, NEXT, WRITE};
use common::score::score;
use common::{MIB, SECTOR, pattern, to_u64, to_usize};
use perf_event::events::Breakpoint;
use perf_event::{Builder, Counter};
use rustix::io::Errno;

/// Watchpoints of a thread.
const WATCHPOINTS: usize = 4;

/// The bytes that say what the newest chain of ring 0 is: its entry in the available ring, its
/// descriptors, and the first `readable` bytes of what the device may read. Each with its kind.
fn metadata(guest: &Guest, head: u16, readable: usize) -> Vec<(&'static str, u64)> {
    let ring = &guest.rings[0];
    let newest = ring.next_avail().wrapping_sub(1) % ring.size;
    let entry = ring.avail + 4 + 2 * u64::from(newest);
    let mut bytes = Vec::new();
    let mut add = |kind, at: u64, len: usize| {
        bytes.extend((at..at + to_u64(len)).map(|address| (kind, address)));
    };
    add("available ring", entry, 2);
    let (mut table, mut index, mut left) = (ring.desc, head, readable);
    loop {
        let at = table + to_u64(DESC_SIZE) * u64::from(index);
        add("descriptor", at, DESC_SIZE);
        let desc = Desc::parse(&guest.mem.read(at, DESC_SIZE));
        if desc.flags & INDIRECT != 0 {
            (table, index) = (desc.addr, 0);
            continue;
        }
        if desc.flags & WRITE == 0 {
            let taken = left.min(to_usize(desc.len.into()));
            add("header or segment", desc.addr, taken);
            left -= taken;
        }
        if desc.flags & NEXT == 0 {
            return bytes;
        }
        index = desc.next;
    }
}

/// Counts what any thread of `daemon` does with the byte at guest-physical `address`.
fn watch(daemon: &Daemon, guest: &Guest, address: u64) -> io::Result<Vec<Counter>> {
    let place = daemon.address_of(guest.mem.place(address));
    let mut counters = Vec::new();
    for thread in daemon.thread_ids() {
        let mut watchpoint = Builder::new(Breakpoint::read_write(place, 1));
        match watchpoint.observe_pid(thread).any_cpu().build() {
            Ok(mut counter) => {
                counter.enable()?;
                counters.push(counter);
            }
            // The kernel's own threads for I/O come and go.
            Err(error) if Errno::from_io_error(&error) == Some(Errno::SRCH) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(counters)
}

/// How often each byte of `request` was fetched, with its kind. The answer must be `status`.
fn fetches(
    daemon: &Daemon,
    guest: &mut Guest,
    (request, framing, status): &(Request, Framing, u8),
) -> io::Result<Vec<(&'static str, u64)>> {
    // The payload of a write is data, which nobody decides anything on.
    let readable = if request.is_write() { HEADER } else { request.readable.len() };
    let mut counts = Vec::new();
    loop {
        // Nobody looks at a disabled ring: the watch begins before the first fetch.
        guest.enable(0, false);
        let head = guest.submit(0, request, framing);
        let bytes = metadata(guest, head, readable);
        let now = bytes.iter().skip(counts.len()).take(WATCHPOINTS);
        let watched: Vec<_> = now
            .map(|(kind, address)| Ok((*kind, watch(daemon, guest, *address)?)))
            .collect::<io::Result<_>>()?;
        guest.enable(0, true);
        guest.rings[0].kick_always();
        let (_, reply) = guest.finish(0);
        assert_eq!(reply.status(), *status, "{request:?}");
        // And it ends when the device is done with the ring.
        guest.enable(0, false);
        for (kind, mut counters) in watched {
            let each = counters.iter_mut().map(Counter::read).collect::<io::Result<Vec<_>>>()?;
            counts.push((kind, each.into_iter().sum()));
        }
        if counts.len() == bytes.len() {
            return Ok(counts);
        }
    }
}

/// Requests of every type, cut in several ways, with the status that each must get.
fn requests() -> Vec<(Request, Framing, u8)> {
    let data = pattern(3, 8, 8 * SECTOR);
    let segments = [(8, 8, 0), (64, 32, 0), (1000, 1, 0)];
    let all = [
        (Request::read(8, 8 * SECTOR), OK),
        (Request::write(8, &data), OK),
        (Request::write(3, &data[..SECTOR]), OK),
        (Request::flush(), OK),
        (Request::get_id(20), OK),
        (Request::discard(&segments), OK),
        (Request::write_zeroes(&segments), OK),
        (Request::read(u64::MAX, SECTOR), IOERR),
        (Request::new(77, 0, &[], 1), UNSUPP),
        (Request::write_zeroes(&[(8, 8, 2)]), UNSUPP),
    ];
    let cut = |(request, status): (Request, u8)| {
        let apart = Framing::cut(&[5, 4, 7, 9], &[]);
        let framings = [Framing::usual(&request), Framing::joined(), apart.clone()];
        let indirect = [Framing::usual(&request).indirect(), apart.indirect()];
        let framings = framings.into_iter().chain(indirect);
        framings.map(move |framing| (request.clone(), framing, status))
    };
    all.into_iter().flat_map(cut).collect()
}

#[test]
fn each_byte_of_a_request_but_its_data_is_fetched_once() {
    let mut watched = 0;
    for disk in [Disk::small(), Disk::create(Shape::new(4 * MIB, 64 << 10).in_memory())] {
        let mut daemon = disk.serve(&[]);
        let mut guest = daemon.guest(Setup::default());
        for case in requests() {
            let counts = match fetches(&daemon, &mut guest, &case) {
                Err(error) if cannot_watch(&error) => {
                    println!("SKIPPED: this machine has no watchpoints: {error}");
                    return;
                }
                counts => counts.expect("counts of fetches"),
            };
            for (at, (kind, count)) in counts.iter().enumerate() {
                assert_eq!(*count, 1, "byte {at} ({kind}) of {case:?}: {counts:?}");
            }
            watched += counts.len();
        }
        drop(guest);
        daemon.stop();
    }
    score("fetches", &[("bytes", to_u64(watched))]);
}

/// Whether it is the machine that has no watchpoints, or does not let us have them.
fn cannot_watch(error: &io::Error) -> bool {
    let reasons = [Errno::ACCESS, Errno::NOENT, Errno::NOSYS, Errno::OPNOTSUPP, Errno::PERM];
    Errno::from_io_error(error).is_some_and(|reason| reasons.contains(&reason))
}
