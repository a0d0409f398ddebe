//! Is every sector a register, whatever overlaps on two queues of the real daemon?
//!
//! Two threads drive a queue each: reads, writes of 512 bytes to 256 KiB, zeroes, discards and
//! flushes, several at a time, all of them on the same 64 sectors and some of what lies around.
//! Every sector written has a tag of its own. What each sector showed to whom and when is checked
//! by `common/registers.rs`. Each history begins on clusters that nobody has written, so copying up
//! goes on beside everything else.
//!
//! With direct I/O a sector that is torn fails at once. The page cache copies sectors piece by
//! piece, also while somebody else writes them (no host promises more), so there the words of a
//! sector, and if need be its bytes, are the registers: a read may tear between two writes that it
//! overlaps, and between no others.
//!
//! `ADDCOW_SEED=N` runs other sequences (schedules are the machine's), `ADDCOW_HISTORIES=N` more.
//!
//! Not here: faults, crashes, one thing at a time (`fsx.rs`).

mod common;
#[path = "common/registers.rs"]
mod registers;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::disk::{Disk, Shape};
use common::guest::Setup;
use common::mem::Memory;
use common::request::{DISCARD, FLUSH, HEADER, IN, OK, OUT, UNMAP, WRITE_ZEROES, header, payload};
use common::ring::{Buffer, Ring};
use common::rng::{Rng, mix};
use common::score::score;
use common::{KIB, MIB, SECTOR, to_u32, to_u64, to_usize};
use registers::{Action, Event};

/// Sectors that everybody fights for.
const HOT: u64 = 64;
/// Most sectors of a request: 256 KiB.
const LONGEST: u64 = 512;
/// Sectors of the part of the disk that one history has for itself.
const PART: u64 = 2048;
/// Requests of one queue at the same time.
const DEPTH: usize = 5;
/// Requests of one queue in a history.
const REQUESTS: u64 = 1000;

/// What a sector holds that was not written.
const INITIAL: u64 = u64::MAX;

/// What stands for a sector whose words are not alike. Nothing else has this value.
const TORN: u64 = u64::MAX - 1;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Reads.
    Read,
    /// Writes tags made of this number.
    Write(u64),
    /// Zeroes, with these flags.
    Zero(u32),
    /// Discards.
    Discard,
    /// Flushes.
    Flush,
}

/// A request and when it ran.
#[derive(Clone, Debug)]
struct Record {
    /// What it did.
    kind: Kind,
    /// First sector.
    sector: u64,
    /// Sectors.
    count: u64,
    /// Before it was given to the device.
    start: u64,
    /// After it had come back.
    end: u64,
    /// What was read, by sector; [`TORN`] where the words of a sector are not alike.
    tags: Vec<u64>,
    /// The words of torn sectors.
    torn: HashMap<u64, Vec<u64>>,
}

impl Record {
    /// A request that has not run.
    fn new(kind: Kind, sector: u64, count: u64) -> Self {
        Self { kind, sector, count, start: 0, end: 0, tags: Vec::new(), torn: HashMap::new() }
    }
}

/// The tag that write `number` puts into `sector`.
fn tag(number: u64, sector: u64) -> u64 {
    number << 24 | sector
}

/// Where a request's bytes lie in guest memory.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// The header.
    header: u64,
    /// The data, [`LONGEST`] sectors.
    data: u64,
    /// The status.
    status: u64,
}

/// What all threads know of a history.
#[derive(Clone)]
struct Ground {
    /// Guest memory.
    mem: Arc<Memory>,
    /// What the disk held before.
    initial: Arc<Vec<u8>>,
    /// Counts starts and ends of requests.
    clock: Arc<AtomicU64>,
    /// First sector of the history's part of the disk.
    first: u64,
    /// First sector that everybody fights for.
    hot: u64,
}

impl Ground {
    /// What the disk held in `sector` before.
    fn before(&self, sector: u64) -> &[u8] {
        &self.initial[to_usize(sector) * SECTOR..][..SECTOR]
    }

    /// The tag of a sector that was read; none if it is torn, which means that it is neither one
    /// that was written, nor zeros, nor the base's.
    fn tag_of(&self, sector: u64, bytes: &[u8]) -> Option<u64> {
        let (words, _) = bytes.as_chunks::<8>();
        if words.iter().all(|word| *word == words[0]) {
            return Some(u64::from_le_bytes(words[0]));
        }
        (bytes == self.before(sector)).then_some(INITIAL)
    }

    /// The tags of the words of a torn sector.
    fn tags_of_words(&self, sector: u64, bytes: &[u8]) -> Vec<u64> {
        let words = bytes.as_chunks::<8>().0.iter().zip(self.before(sector).as_chunks::<8>().0);
        let tag = |(word, before): (&[u8; 8], &[u8; 8])| {
            if word == before { INITIAL } else { u64::from_le_bytes(*word) }
        };
        words.map(tag).collect()
    }
}

/// One queue's driver.
struct Driver {
    /// What all threads know.
    ground: Ground,
    /// The queue.
    ring: Ring,
    /// Where requests may lie that the device does not have.
    free: Vec<Place>,
    /// Requests that the device has, by head.
    flying: HashMap<u16, (Place, Record)>,
    /// Where choices come from.
    rng: Rng,
    /// What was done.
    done: Vec<Record>,
}

impl Driver {
    /// The next thing to do; `number` is its own in the whole test.
    fn next(&mut self, number: u64) -> Record {
        let rng = &mut self.rng;
        let count = match rng.pick(0..16) {
            0..5 => 1,
            5..10 => rng.pick(2..9),
            10..15 => rng.pick(9..HOT + 1),
            _ => rng.pick(HOT..LONGEST + 1),
        };
        let kind = match rng.pick(0..24) {
            0..10 => Kind::Read,
            10..18 => Kind::Write(number),
            18..20 => Kind::Zero(if rng.one_in(2) { UNMAP } else { 0 }),
            20..22 => Kind::Discard,
            _ => Kind::Flush,
        };
        // Its first or its last sector is a hot one, but for some that are anywhere.
        let ground = &self.ground;
        let limit = ground.first + PART - count;
        let near = ground.hot + rng.pick(0..HOT);
        let sector = match rng.pick(0..16) {
            0 => rng.pick(ground.first..limit + 1),
            1..8 => near.saturating_sub(count - 1).max(ground.first),
            _ => near.min(limit),
        };
        Record::new(kind, sector, count)
    }

    /// Gives a request to the device.
    fn submit(&mut self, mut record: Record) {
        let place = self.free.pop().expect("a free place");
        let mem = &self.ground.mem;
        let (sector, len) = (record.sector, to_usize(record.count) * SECTOR);
        let segment = |flags| payload(&[(sector, to_u32(to_usize(record.count)), flags)]);
        let (kind, data) = match record.kind {
            Kind::Read => (IN, Vec::new()),
            Kind::Write(number) => {
                let tags = (sector..sector + record.count).map(|sector| tag(number, sector));
                (OUT, tags.flat_map(|tag| tag.to_le_bytes().repeat(SECTOR / 8)).collect())
            }
            Kind::Zero(flags) => (WRITE_ZEROES, segment(flags)),
            Kind::Discard => (DISCARD, segment(0)),
            Kind::Flush => (FLUSH, Vec::new()),
        };
        let is_transfer = matches!(record.kind, Kind::Read | Kind::Write(_));
        mem.write(place.header, &header(kind, if is_transfer { sector } else { 0 }));
        mem.write(place.data, &data);
        mem.write(place.status, &[0xff]);
        let readable = |addr, len| Buffer { addr, len: to_u32(len), writable: false };
        let writable = |addr, len| Buffer { addr, len: to_u32(len), writable: true };
        let mut buffers = vec![readable(place.header, HEADER)];
        if record.kind == Kind::Read {
            buffers.push(writable(place.data, len));
        } else if !data.is_empty() {
            buffers.push(readable(place.data, data.len()));
        }
        buffers.push(writable(place.status, 1));
        record.start = self.ground.clock.fetch_add(1, Ordering::SeqCst);
        let head = self.ring.add(&buffers);
        self.ring.kick();
        self.flying.insert(head, (place, record));
    }

    /// Waits for a request.
    fn finish(&mut self) {
        let used = self.ring.wait();
        let end = self.ground.clock.fetch_add(1, Ordering::SeqCst);
        let (place, mut record) = self.flying.remove(&used.head).expect("a request in flight");
        record.end = end;
        let mem = &self.ground.mem;
        assert_eq!(mem.read(place.status, 1), [OK], "status of {record:?}");
        let len = to_usize(record.count) * SECTOR;
        let written = if record.kind == Kind::Read { len + 1 } else { 1 };
        assert_eq!(used.len, to_u32(written), "used length of {record:?}");
        if record.kind == Kind::Read {
            let bytes = mem.read(place.data, len);
            for (sector, bytes) in (record.sector..).zip(bytes.chunks(SECTOR)) {
                let tag = self.ground.tag_of(sector, bytes);
                if tag.is_none() {
                    record.torn.insert(sector, self.ground.tags_of_words(sector, bytes));
                }
                record.tags.push(tag.unwrap_or(TORN));
            }
        }
        self.free.push(place);
        self.done.push(record);
    }

    /// Does `REQUESTS` requests, the first with number `number`, and then reads all of the part.
    fn run(mut self, number: u64) -> (Ring, Vec<Place>, Vec<Record>) {
        for number in number..number + REQUESTS {
            let record = self.next(number);
            self.submit(record);
            // Now and then everything comes to its end, so that a history has quiet moments.
            let keep = if self.rng.one_in(100) { 0 } else { DEPTH - 1 };
            while self.flying.len() > keep {
                self.finish();
            }
        }
        for sector in (self.ground.first..self.ground.first + PART).step_by(to_usize(LONGEST)) {
            self.submit(Record::new(Kind::Read, sector, LONGEST));
            while !self.flying.is_empty() {
                self.finish();
            }
        }
        (self.ring, self.free, self.done)
    }
}

/// What the histories of a part were like.
#[derive(Debug, Default)]
struct Figures {
    /// Effects on single sectors.
    operations: u64,
    /// Of those, reads.
    reads: u64,
    /// Reads that were torn.
    torn: u64,
    /// Effects that overlapped another one on the same sector.
    overlapping: u64,
}

/// What happened to one sector: each effect with the words that a torn read saw.
type Effects<'a> = Vec<(Event, Option<&'a Vec<u64>>)>;

/// Checks the history of every sector of a part.
fn check(ground: &Ground, records: &[Record], figures: &mut Figures) {
    let mut sectors: Vec<Effects<'_>> = vec![Vec::new(); to_usize(PART)];
    for record in records {
        for index in 0..record.count {
            let sector = record.sector + index;
            let action = match record.kind {
                Kind::Read => Action::Read(record.tags[to_usize(index)]),
                Kind::Write(number) => Action::Write(tag(number, sector)),
                Kind::Zero(_) => Action::Write(0),
                Kind::Discard => Action::Perhaps(0),
                Kind::Flush => continue,
            };
            let event = Event { action, start: record.start, end: record.end };
            sectors[to_usize(sector - ground.first)].push((event, record.torn.get(&sector)));
            figures.operations += 1;
            figures.reads += u64::from(matches!(action, Action::Read(_)));
        }
    }
    for (sector, mut effects) in (ground.first..).zip(sectors) {
        effects.sort_unstable_by_key(|(event, _)| event.start);
        let mut latest = 0;
        for (event, torn) in &effects {
            figures.overlapping += u64::from(event.start < latest);
            figures.torn += u64::from(torn.is_some());
            latest = latest.max(event.end);
        }
        check_sector(ground, sector, &effects);
    }
}

/// Checks the history of one sector: of all its words at once, if no read was torn.
fn check_sector(ground: &Ground, sector: u64, effects: &Effects<'_>) {
    let before = ground.tag_of(sector, ground.before(sector)).expect("it is itself");
    let words = if effects.iter().any(|(_, torn)| torn.is_some()) { SECTOR / 8 } else { 1 };
    let mut last: Vec<Event> = Vec::new();
    for word in 0..words {
        let event = |(event, torn): &(Event, Option<&Vec<u64>>)| match torn {
            Some(tags) => Event { action: Action::Read(tags[word]), ..*event },
            None => *event,
        };
        let events: Vec<Event> = effects.iter().map(event).collect();
        // Neighbours mostly have the same history.
        if events == last {
            continue;
        }
        if let Err(at) = registers::check(before, &events) {
            let around = &events[at.saturating_sub(12)..(at + 12).min(events.len())];
            let what = format!("word {word} of sector {sector}");
            let may_tear = words > 1 && are_registers(ground, sector, word, &events);
            assert!(may_tear, "{what} is no register at {:x?} in {around:#x?}", events[at]);
        }
        last = events;
    }
}

/// Whether the bytes of a word of a torn sector are registers. Processors that copy with one
/// instruction for the whole (`rep movs`) may be interrupted at any byte: found by the soak, in a
/// read of zeros being overwritten that saw the first byte of a word still zero.
fn are_registers(ground: &Ground, sector: u64, word: usize, events: &[Event]) -> bool {
    let before = u64::from_le_bytes(ground.before(sector).as_chunks().0[word]);
    (0..8).all(|byte| {
        let of = |tag| if tag == INITIAL { before } else { tag } >> (8 * byte) & 0xff;
        let action = |action| match action {
            Action::Read(tag) => Action::Read(of(tag)),
            Action::Write(tag) => Action::Write(of(tag)),
            Action::Perhaps(tag) => Action::Perhaps(of(tag)),
        };
        let events: Vec<Event> =
            events.iter().map(|event| Event { action: action(event.action), ..*event }).collect();
        registers::check(of(before), &events).is_ok()
    })
}

/// Runs histories on a disk of `shape`.
fn histories(shape: Shape, seed: u64, options: &[&str], figures: &mut Figures) {
    let seeds = Rng::new(seed).next();
    let disk = Disk::create(shape);
    let mut daemon = disk.serve(&[&["--num-queues", "2"], options].concat());
    let mut guest = daemon.guest(Setup::queues(2, 128));
    let mut rings = std::mem::take(&mut guest.rings);
    let place = |_| {
        let data = guest.mem.alloc(to_usize(LONGEST) * SECTOR, 16);
        Place { header: guest.mem.alloc(HEADER, 16), data, status: guest.mem.alloc(1, 16) }
    };
    let mut places: Vec<Vec<Place>> = (0..2).map(|_| (0..DEPTH).map(place).collect()).collect();
    let initial = Arc::new(disk.initial());
    let clock = Arc::new(AtomicU64::new(1));
    for part in 0..disk.sectors() / PART {
        let first = part * PART;
        // Across the border of two clusters of any size up to 64 KiB.
        let hot = first + PART / 2 - HOT / 2;
        let (mem, initial, clock) =
            (Arc::clone(&guest.mem), Arc::clone(&initial), Arc::clone(&clock));
        let ground = Ground { mem, initial, clock, first, hot };
        let driver = |(queue, (ring, free)): (u64, (Ring, Vec<Place>))| {
            let (ground, flying, done) = (ground.clone(), HashMap::new(), Vec::new());
            let rng = Rng::quiet(mix(seeds ^ (2 * part + queue)));
            let driver = Driver { ground, ring, free, flying, rng, done };
            // Numbers start at 1: 0 is what zeros look like.
            let number = 1 + (2 * part + queue) * REQUESTS;
            std::thread::spawn(move || driver.run(number))
        };
        let queues = (0..).zip(rings.drain(..).zip(places.drain(..)));
        let threads: Vec<_> = queues.map(driver).collect();
        let mut records = Vec::new();
        for thread in threads {
            let (ring, free, done) = thread.join().expect("a driver that came to its end");
            rings.push(ring);
            places.push(free);
            records.extend(done);
        }
        check(&ground, &records, figures);
    }
    guest.rings = rings;
    drop(guest);
    daemon.stop();
}

#[test]
fn every_sector_is_a_register() {
    let parts = if cfg!(debug_assertions) { 3 } else { 16 };
    let parts = std::env::var("ADDCOW_HISTORIES").ok().map_or(parts, |n| n.parse().expect("N"));
    let size = parts * PART * to_u64(SECTOR);
    let begin = Instant::now();
    let mut figures = Figures::default();
    for (index, (shape, options)) in (0..).zip([
        (Shape::new(size, 64 * KIB), &[][..]),
        (Shape::new(size, 4 * KIB), &["--cache", "buffered"]),
        (Shape::new(size, 4 * KIB).in_memory(), &[]),
        (Shape::new(size, 2 * MIB).base(size - 300 * KIB - 512), &[]),
    ]) {
        let torn = figures.torn;
        let is_direct = !shape.in_memory && options.is_empty();
        histories(shape, 0x11ea + index, options, &mut figures);
        assert!(!is_direct || torn == figures.torn, "torn sectors with direct I/O");
    }
    let Figures { operations, reads, torn, overlapping } = figures;
    let seconds = begin.elapsed().max(Duration::from_secs(1)).as_secs();
    score(
        "linear",
        &[
            ("lin_ops", operations),
            ("reads", reads),
            ("torn_in_page_cache", torn),
            ("overlapping", overlapping),
            ("histories", 4 * parts),
            ("violations", 0),
            ("seconds", seconds),
        ],
    );
    assert!(overlapping > operations / 10, "{overlapping} of {operations} overlap: too few");
    assert!(cfg!(debug_assertions) || operations >= 1_000_000, "only {operations} operations");
}

/// Checks a history of whole-sector writes of numbers 1 and 2, one after the other or overlapping,
/// and a read whose first word is the first write's and whose others are the second's.
fn check_torn(writes: [(u64, u64); 2], read: (u64, u64)) {
    let (mem, clock) = (Arc::new(Memory::new()), Arc::new(AtomicU64::new(1)));
    let initial = Arc::new(vec![0; to_usize(PART) * SECTOR]);
    let ground = Ground { mem, initial, clock, first: 0, hot: 0 };
    let timed = |kind, (start, end)| Record { start, end, ..Record::new(kind, 3, 1) };
    let mut words = vec![tag(2, 3); SECTOR / 8];
    words[0] = tag(1, 3);
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    assert_eq!(ground.tag_of(3, &bytes), None, "a torn sector is known for one");
    let words = ground.tags_of_words(3, &bytes);
    let torn = Record { tags: vec![TORN], torn: [(3, words)].into(), ..timed(Kind::Read, read) };
    let records = [timed(Kind::Write(1), writes[0]), timed(Kind::Write(2), writes[1]), torn];
    let mut figures = Figures::default();
    check(&ground, &records, &mut figures);
    assert_eq!((figures.operations, figures.torn), (3, 1));
}

#[test]
fn a_read_may_tear_between_writes_that_it_overlaps() {
    check_torn([(1, 2), (3, 9)], (4, 5));
    check_torn([(1, 9), (2, 8)], (10, 11));
}

#[test]
#[should_panic(expected = "is no register")]
fn a_sector_torn_by_an_old_write_is_refused() {
    check_torn([(1, 2), (3, 4)], (5, 6));
}

/// As [`check_torn`], but it is the first word that is torn, behind its first `bytes` bytes.
fn check_torn_word(writes: [(u64, u64); 2], read: (u64, u64), bytes: usize) {
    let ground = Ground {
        mem: Arc::new(Memory::new()),
        initial: Arc::new(vec![0; to_usize(PART) * SECTOR]),
        clock: Arc::new(AtomicU64::new(1)),
        first: 0,
        hot: 0,
    };
    let timed = |kind, (start, end)| Record { start, end, ..Record::new(kind, 3, 1) };
    let mut words = vec![tag(0x102, 3); SECTOR / 8];
    let mut first = words[0].to_le_bytes();
    first[..bytes].copy_from_slice(&tag(0x201, 3).to_le_bytes()[..bytes]);
    words[0] = u64::from_le_bytes(first);
    let torn = Record { tags: vec![TORN], torn: [(3, words)].into(), ..timed(Kind::Read, read) };
    let records =
        [timed(Kind::Write(0x201), writes[0]), timed(Kind::Write(0x102), writes[1]), torn];
    check(&ground, &records, &mut Figures::default());
}

#[test]
fn a_word_may_tear_between_writes_that_its_read_overlaps() {
    check_torn_word([(1, 2), (3, 9)], (4, 5), 4);
    check_torn_word([(1, 9), (2, 8)], (10, 11), 4);
}

#[test]
#[should_panic(expected = "is no register")]
fn a_word_torn_by_an_old_write_is_refused() {
    check_torn_word([(1, 2), (3, 4)], (5, 6), 4);
}
