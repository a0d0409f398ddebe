//! Is the arithmetic right for every small number, and at the edges of 31, 32, 63 and 64 bits?
//!
//! What decides where a byte goes has no loops worth the name: ranges, clusters, places of bits,
//! extents, rounding, layouts. It is compared here with what the words in the documentation say, in
//! 128 bits or counted out byte by byte, over all small arguments and all near the limits. Where a
//! range of clusters is to be found, the oracle is the definition of a single cluster's belonging,
//! asked at both ends of the answer.
//!
//! Not here: random tests, and anything with more than one request.

mod rig;
#[path = "common/score.rs"]
mod score;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use addcow::executor::block_on;
use addcow::format::BitmapGeometry;
use addcow::format::bitmap::MAX_VIRTUAL_SIZE;
use addcow::image::allocation::AllocationMap;
use addcow::image::chain::Chain;
use addcow::image::extent::ExtentKind;
use addcow::image::journal::BitJournal;
use addcow::image::{Image, ImageError, ImageState};
use addcow::jobs::parts::DiskParts;
use addcow::jobs::resize::resize;
use addcow::storage::IoBuffer;
use addcow::storage::Storage;
use addcow::storage::shared_memory::SharedMemory;
use addcow::storage::sim::SimStorage;
use addcow::units::{ByteRange, ClusterSize};
use addcow::virtio::inflight::InflightQueue;
use rig::{RAW, Rig, SECTOR, SIDE, Setup};
use score::score;

/// Numbers of interest: all small ones, and those around the powers of two at which something ends.
fn numbers() -> Vec<u64> {
    let mut found: BTreeSet<u64> = (0..=16).collect();
    for bits in [8, 9, 10, 12, 21, 31, 32, 33, 51, 54, 55, 62, 63] {
        found.extend(around(1 << bits));
    }
    found.extend(u64::MAX - 3..=u64::MAX);
    // Where sectors end that have a byte position.
    found.extend(around(u64::MAX / SECTOR));
    found.into_iter().collect()
}

/// Up to three less and three more.
fn around(number: u64) -> impl Iterator<Item = u64> {
    number.saturating_sub(3)..=number.saturating_add(3)
}

/// Every cluster size.
fn cluster_sizes() -> impl Iterator<Item = ClusterSize> {
    (9..=21).map(|bits| ClusterSize::from_bits(bits).expect("in range"))
}

/// In 128 bits nothing here overflows.
fn wide(number: u64) -> u128 {
    u128::from(number)
}

/// A range of non-negative numbers as it is, if its end fits.
fn fits(start: u128, len: u128) -> Option<(u128, u128)> {
    let max = wide(u64::MAX);
    (start <= max && len <= max && start + len <= max).then_some((start, start + len))
}

/// Start and end of a range.
fn ends(range: ByteRange) -> (u128, u128) {
    (wide(range.start()), wide(range.end()))
}

#[test]
fn ranges_of_bytes_and_sectors() {
    let mut cases = 0;
    for a in numbers() {
        for b in numbers() {
            let (wide_a, wide_b) = (wide(a), wide(b));
            assert_eq!(ByteRange::new(a, b).map(ends), fits(wide_a, wide_b), "{a} {b}");
            let sectors = ByteRange::from_sectors(a, b).map(ends);
            assert_eq!(sectors, fits(wide_a * 512, wide_b * 512), "{a} {b}");
            let between = ByteRange::between(a, b);
            assert_eq!(ends(between), (wide_a, wide_a.max(wide_b)));
            assert_eq!(wide(between.len()), wide_b.saturating_sub(wide_a));
            assert_eq!(between.is_empty(), b <= a);
            cases += 3;
        }
    }
    let few = [0, 1, 2, 3, 511, 512, 513, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, u64::MAX];
    let ranges: Vec<ByteRange> =
        few.iter().flat_map(|&a| few.iter().map(move |&b| ByteRange::between(a, b))).collect();
    for &one in &ranges {
        for &other in &ranges {
            let both = one.intersect(other);
            let is_in = |range: ByteRange, x: u64| range.start() <= x && x < range.end();
            for x in few.iter().flat_map(|&x| around(x)) {
                assert_eq!(is_in(both, x), is_in(one, x) && is_in(other, x), "{one:?} {other:?}");
            }
            assert_eq!(both.start(), one.start().max(other.start()));
            cases += 1;
        }
    }
    score("exhaustive_ranges", &[("cases", cases)]);
}

#[test]
fn sizes_of_clusters() {
    for bits in (0..=70).chain([u32::MAX]) {
        let found = ClusterSize::from_bits(bits).map(ClusterSize::bits);
        assert_eq!(found, (9..=21).contains(&bits).then_some(bits));
    }
    let powers = (0..64).flat_map(|bits| around(1 << bits));
    for bytes in numbers().into_iter().chain(powers) {
        let legal = (9..=21).find(|bits| 1 << bits == bytes);
        assert_eq!(ClusterSize::from_bytes(bytes).map(ClusterSize::bits), legal, "{bytes}");
    }
}

/// Numbers of interest for clusters of that size: the general ones, and those around borders.
fn cluster_numbers(size: ClusterSize) -> Vec<u64> {
    let bytes = size.bytes();
    let mut found: BTreeSet<u64> = [0, 1, 1 << 32, 1 << 63].into_iter().collect();
    let last = u64::MAX / bytes * bytes;
    for border in [bytes, 2 * bytes, 3 * bytes, MAX_VIRTUAL_SIZE, last - bytes, last] {
        found.extend([border - 512, border - 1, border, border.saturating_add(1)]);
    }
    found.insert(u64::MAX);
    found.into_iter().collect()
}

/// Asserts that `found` has exactly those clusters that `belongs`, which are one run, or none of
/// `near`. What is inside a run needs no look: the rule is about order alone.
fn check_clusters(
    found: std::ops::Range<u64>,
    near: &[u64],
    belongs: impl Fn(u128) -> bool,
    what: &dyn Fn() -> String,
) {
    let edges = [found.start, found.end].into_iter().flat_map(|edge| {
        [edge.checked_sub(1), Some(edge), edge.checked_add(1)].into_iter().flatten()
    });
    for cluster in edges.chain(near.iter().copied()) {
        assert_eq!(found.contains(&cluster), belongs(wide(cluster)), "{cluster}: {}", what());
    }
}

#[test]
fn bytes_become_clusters_and_back() {
    let mut cases = 0;
    for size in cluster_sizes() {
        let bytes = wide(size.bytes());
        for x in numbers().into_iter().chain(cluster_numbers(size)) {
            assert_eq!(wide(size.index(x)), wide(x) / bytes);
            assert_eq!(wide(size.count(x)), wide(x).div_ceil(bytes));
            assert_eq!(wide(size.start_of(x)), (wide(x) * bytes).min(wide(u64::MAX)));
            cases += 3;
        }
        let numbers = cluster_numbers(size);
        let near: Vec<u64> = numbers.iter().map(|&number| size.index(number)).collect();
        for &start in &numbers {
            for &end in &numbers {
                let range = ByteRange::between(start, end);
                let (start, end) = ends(range);
                let what = || format!("{range:?} in clusters of {size:?}");
                let touches = |k: u128| k * bytes < end && (k + 1) * bytes > start;
                if !range.is_empty() {
                    check_clusters(size.touched(range), &near, touches, &what);
                }
                cases += 1;
                for &disk in &numbers {
                    let disk_len = wide(disk);
                    let covers = |k: u128| {
                        let last = ((k + 1) * bytes).min(disk_len);
                        k * bytes < disk_len && start <= k * bytes && last <= end
                    };
                    // Elsewhere ranges are checked to lie on the disk.
                    if end <= disk_len {
                        check_clusters(size.covered(range, disk), &near, covers, &what);
                        cases += 1;
                    }
                }
            }
        }
    }
    score("exhaustive_clusters", &[("cases", cases)]);
}

/// Checks the places that a bitmap gives to one cluster, or to none if there is no such.
fn check_place(geometry: &BitmapGeometry, cluster: u64) {
    let header = wide(geometry.cluster_size().bytes()).max(4096);
    let (byte, mask) = geometry.position(cluster);
    assert_eq!(wide(byte), header + wide(cluster) / 8);
    assert_eq!(u64::from(mask), 1 << (cluster % 8));
    let page = geometry.page_of(cluster);
    let (start, end) = ends(geometry.page_range(page));
    assert!(start <= wide(byte) && wide(byte) < end, "{geometry:?} {cluster}");
    assert_eq!(start, header + wide(page) * 4096);
    assert!(geometry.page_words(page).contains(&(cluster / 64)));
    assert_eq!(geometry.word_mask(cluster / 64) >> (cluster % 64) & 1, 1);
}

#[test]
fn bits_have_the_places_of_the_specification() {
    let mut cases = 0;
    for size in cluster_sizes() {
        let bytes = wide(size.bytes());
        let sizes = numbers().into_iter().chain(cluster_numbers(size));
        for len in sizes.chain([64, 65, 4096 * 8, 4096 * 8 + 1].map(|n| n * size.bytes())) {
            let geometry = BitmapGeometry::new(size, len);
            assert_eq!(geometry.is_ok(), len <= MAX_VIRTUAL_SIZE, "{len}");
            let Ok(geometry) = geometry else { continue };
            let disk = wide(len) / 512 * 512;
            let clusters = disk.div_ceil(bytes);
            let used = clusters.div_ceil(8);
            let padded = used.div_ceil(bytes) * bytes;
            assert_eq!(wide(geometry.virtual_size()), disk);
            assert_eq!(wide(geometry.clusters()), clusters);
            assert_eq!(wide(geometry.used_len()), used);
            assert_eq!(wide(geometry.padded_len()), padded);
            assert_eq!(wide(geometry.file_len()), bytes.max(4096) + padded);
            assert_eq!(wide(geometry.pages()), padded.div_ceil(4096));
            assert_eq!(wide(geometry.words()), clusters.div_ceil(64));
            let count = geometry.clusters();
            let near = [0, 1, 7, 8, 63, 64, 65, 32767, 32768].into_iter();
            for cluster in near.chain(around(count)).filter(|&cluster| cluster < count) {
                check_place(&geometry, cluster);
                cases += 1;
            }
            for word in [0, 1, u64::MAX].into_iter().chain(around(geometry.words())) {
                let mask = geometry.word_mask(word);
                for bit in 0..64 {
                    let has = wide(word) * 64 + bit < clusters;
                    assert_eq!(mask >> bit & 1 == 1, has, "{geometry:?} {word} {bit}");
                }
                cases += 1;
            }
            for page in [u64::MAX].into_iter().chain(around(geometry.pages())) {
                let (start, end) = ends(geometry.page_range(page));
                let from = (wide(page) * 4096).min(padded);
                assert_eq!(end - start, (from + 4096).min(padded) - from);
                assert!(start >= bytes.max(4096) && end <= wide(geometry.file_len()));
                cases += 1;
            }
        }
    }
    score("exhaustive_bitmap", &[("cases", cases)]);
}

/// Every range of clusters of a map of three words and a bit: what is marked, what is found, how
/// far a run goes, and what the journal holds.
#[test]
fn runs_of_bits() {
    /// Clusters of the map.
    const CLUSTERS: u64 = 193;
    let size = ClusterSize::from_bits(9).expect("in range");
    let geometry = BitmapGeometry::new(size, CLUSTERS * 512).expect("small");
    let mut cases = 0;
    for clusters in numbers() {
        let words = BitJournal::words(clusters).map(|words| words as u128);
        assert_eq!(words, Some(wide(clusters).div_ceil(64)));
    }
    for start in 0..CLUSTERS {
        for end in start..=CLUSTERS {
            let map = AllocationMap::empty(&geometry).expect("memory");
            map.mark(start..end);
            let is_in = |cluster: u64| start <= cluster && cluster < end;
            for word in 0..=geometry.words() {
                let bits = (0..64).filter(|bit| is_in(word * 64 + bit));
                assert_eq!(map.word(word), bits.fold(0, |all, bit| all | 1 << bit));
            }
            assert_eq!(map.count(), Some(end - start));
            // Around the borders of the marked ones, of words and of the disk.
            let near = [0, 1, 63, 64, 127, 128, 191, 192, CLUSTERS].into_iter();
            let near = near.chain(around(start)).chain(around(end)).filter(|x| *x <= CLUSTERS);
            let near: BTreeSet<u64> = near.collect();
            for &from in &near {
                for &to in near.range(from + 1..) {
                    let all = (from..to).all(is_in);
                    assert_eq!(map.is_allocated(from..to), all, "{start}..{end}: {from}..{to}");
                    let other = (from..to).find(|x| is_in(*x) != is_in(from)).unwrap_or(to);
                    assert_eq!(map.run(from..to), (is_in(from), other));
                    cases += 1;
                }
            }
        }
    }
    score("exhaustive_bits", &[("cases", cases)]);
}

/// Where each byte of a range is, by the words of docs/format.md, "What the guest sees".
fn check_extents(
    state: &ImageState,
    range: ByteRange,
    bits: u64,
    backing_len: u64,
    points: &[u64],
) {
    let kind_of = |byte: u64| {
        if bits >> state.cluster_size().index(byte) & 1 == 1 {
            ExtentKind::Data
        } else if byte < backing_len {
            ExtentKind::Backing
        } else {
            ExtentKind::Zero
        }
    };
    let mut at = range.start();
    for extent in state.extents(range) {
        assert!(extent.range.start() == at && !extent.range.is_empty(), "{range:?}");
        at = extent.range.end();
        let edges = [extent.range.start(), extent.range.end() - 1];
        let inner = points.iter().copied().filter(|x| *x >= edges[0] && *x <= edges[1]);
        for byte in inner.chain(edges) {
            assert_eq!(extent.kind, kind_of(byte), "{byte} in {range:?} {bits:b} {backing_len}");
        }
    }
    assert_eq!(at, range.end().max(range.start()));
}

#[test]
fn extents_lead_where_the_bits_and_the_backing_file_say() {
    let mut cases = 0;
    for (cluster_bits, len) in [(9, 5 * 512), (10, 9 * 512), (21, (5 << 21) - 512)] {
        let size = ClusterSize::from_bits(cluster_bits).expect("in range");
        let bytes = size.bytes();
        let geometry = BitmapGeometry::new(size, len).expect("small");
        let mut points: BTreeSet<u64> = [0, 1, len - 1, len].into_iter().collect();
        for border in (1..=5).map(|k| k * bytes) {
            points.extend([border - 512, border - 1, border, border + 1, border + 512]);
        }
        let far = [1 << 32, 1 << 63, u64::MAX];
        let backing_lens: Vec<u64> = points.iter().copied().chain(far).collect();
        let inside: Vec<u64> = points.range(..=len).copied().collect();
        for bits in 0..1 << geometry.clusters() {
            for &backing_len in &backing_lens {
                let map = AllocationMap::empty(&geometry).expect("memory");
                let marked = (0..geometry.clusters()).filter(|k| bits >> k & 1 == 1);
                marked.for_each(|k| map.mark(k..k + 1));
                let state = ImageState::add_cow(geometry, map, backing_len, true);
                for (index, &start) in inside.iter().enumerate() {
                    for &end in &inside[index..] {
                        let range = ByteRange::between(start, end);
                        check_extents(&state, range, bits, backing_len, &backing_lens);
                        cases += 1;
                    }
                }
            }
        }
    }
    score("exhaustive_extents", &[("cases", cases)]);
}

/// Every cluster of such a disk allocated or not, as a bit each.
fn setups(cluster_bits: u32, sectors: u64, backing: Option<u64>) -> impl Iterator<Item = Setup> {
    let clusters = (sectors * SECTOR).div_ceil(1 << cluster_bits);
    (0..1_u64 << clusters).map(move |bits| Setup {
        cluster_bits,
        sectors,
        backing_len: backing,
        allocated: (0..clusters).filter(|k| bits >> k & 1 == 1).collect(),
        all_allocated: false,
    })
}

/// What a disk shows, opened anew, whatever its length is now.
fn shown(rig: &Rig) -> Vec<u8> {
    let state = rig.open();
    let len = usize::try_from(state.virtual_size()).expect("small");
    let buffer = IoBuffer::from_bytes(&vec![0x55; len]);
    block_on(rig.handle(&state).read(0, buffer.clone())).expect("it can be read");
    buffer.to_vec()
}

/// Requests outside the disk, at every edge: refused, and nothing done.
#[test]
fn what_lies_outside_the_disk_is_refused() {
    let setup = Setup { sectors: 9, ..Setup::plain(10, 5) };
    let rig = Rig::new(&setup, 1);
    let (before, size) = (shown(&rig), 9 * 512);
    let state = rig.open();
    let image: Image<SimStorage> = rig.handle(&state);
    let mut cases = 0;
    for offset in numbers().into_iter().chain(around(size)) {
        for len in numbers().into_iter().chain(around(size)) {
            let lies_on_it = wide(offset) + wide(len) <= wide(size);
            if lies_on_it && len > 0 {
                continue;
            }
            let is_refused = |result| matches!(result, Err(ImageError::OutOfRange { .. }));
            let zeroed = block_on(image.write_zeroes(offset, len, true));
            assert_eq!(is_refused(zeroed), !lies_on_it, "{offset} {len}");
            let discarded = block_on(image.discard(offset, len));
            assert_eq!(is_refused(discarded), !lies_on_it, "{offset} {len}");
            cases += 2;
        }
    }
    drop(image);
    assert!(shown(&rig) == before, "something has changed");
    score("exhaustive_outside", &[("cases", cases)]);
}

/// Every range of sectors of small disks, every set of allocated clusters: zeroing zeroes exactly
/// the range; a discard zeroes the allocated clusters that lie whole in it, and changes no other
/// byte that the guest sees.
#[test]
fn zeroes_and_discards_round_as_they_should() {
    let mut cases = 0;
    for (sectors, backing) in [(9, Some(9 * 512)), (9, Some(5 * 512 + 300)), (8, None)] {
        for setup in setups(10, sectors, backing) {
            let made = Rig::new(&setup, 1);
            let before = shown(&made);
            let at = |sector: u64| usize::try_from(sector * SECTOR).expect("small");
            for start in 0..sectors {
                for end in start..=sectors {
                    let (offset, len) = (start * SECTOR, (end - start) * SECTOR);
                    let rig = made.fork();
                    let image = rig.handle(&rig.open());
                    block_on(image.write_zeroes(offset, len, end % 2 == 0)).expect("no faults");
                    block_on(image.flush()).expect("no faults");
                    let mut expected = before.clone();
                    expected[at(start)..at(end)].fill(0);
                    assert!(shown(&rig) == expected, "zeroes {start}..{end} of {setup:?}");

                    let rig = made.fork();
                    let image = rig.handle(&rig.open());
                    block_on(image.discard(offset, len)).expect("no faults");
                    let mut expected = before.clone();
                    for &cluster in &setup.allocated {
                        let (first, last) = (cluster * 2, (cluster * 2 + 2).min(sectors));
                        if start <= first && last <= end {
                            expected[at(first)..at(last)].fill(0);
                        }
                    }
                    assert!(shown(&rig) == expected, "discard {start}..{end} of {setup:?}");
                    cases += 2;
                }
            }
        }
    }
    score("exhaustive_rounding", &[("cases", cases)]);
}

/// Every small disk to every small size, over backing files of every length: what was there stays,
/// what is new is zeros, even where the backing file goes on.
#[test]
fn resized_disks_show_what_they_showed_and_zeros() {
    let mut cases = 0;
    let backing_lens = (0..=8).flat_map(|sectors| [sectors * 512, sectors * 512 + 200]);
    for backing in backing_lens.map(Some).chain([None]) {
        for old in 1..=6 {
            for setup in setups(10, old, backing) {
                let made = Rig::new(&setup, 1);
                let before = shown(&made);
                for new in 1..=7 {
                    let rig = made.fork();
                    let (raw, side) = (rig.disk.file(RAW), rig.disk.file(SIDE));
                    let chain = rig.backing().map(|file| {
                        let len = file.file_len().expect("a length");
                        Chain::raw(file, len)
                    });
                    let geometry = BitmapGeometry::new(setup.cluster_size(), new * SECTOR);
                    let resized = block_on(async {
                        let parts = DiskParts::load(&side, &raw).await.expect("a disk");
                        resize(&parts, chain.as_ref(), geometry.expect("small")).await
                    });
                    resized.expect("no faults");
                    let mut expected = before.clone();
                    expected.resize(usize::try_from(new * SECTOR).expect("small"), 0);
                    assert!(shown(&rig) == expected, "{setup:?} to {new} sectors");
                    cases += 1;
                }
            }
        }
    }
    score("exhaustive_resize", &[("cases", cases)]);
}

/// Every content of the words of a queue of three entries, out of those that differ for it: each
/// head comes at most once, in the order of the numbers, and what was published does not come.
#[test]
fn any_words_of_an_inflight_queue() {
    /// Set in an entry that is done.
    const DONE: u64 = 1 << 63;
    let values = [0, 1, 2, 3, DONE - 1, DONE, DONE | 1, DONE | 2, u64::MAX];
    let copies = [0, 7, 0xffff, 0x1_0007, u64::MAX];
    let memory = SharedMemory::create("test", InflightQueue::words(3)).expect("memory");
    let memory = Arc::new(memory);
    let store =
        |word: usize, value| memory.word(word).expect("there").store(value, Ordering::Relaxed);
    let mut cases = 0;
    for copy in copies {
        for content in 0..values.len().pow(3) {
            let entry = |head: u32| values[content / values.len().pow(head) % values.len()];
            store(0, copy);
            for head in 0..3 {
                store(usize::try_from(head).expect("small") + 1, entry(head));
            }
            let mut queue = InflightQueue::new(Arc::clone(&memory), 0, 3);
            let is_over = |value: u64| value == 0 || (copy != 7 && value & DONE != 0);
            let taken = (0..3_u16).map(|head| (entry(u32::from(head)), head));
            let mut expected: Vec<(u64, u16)> = taken
                .filter(|(value, _)| !is_over(*value))
                .map(|(value, head)| (value & !DONE, head))
                .collect();
            expected.sort_unstable();
            let expected: Vec<u16> = expected.into_iter().map(|(_, head)| head).collect();
            assert_eq!(queue.recover(7), expected, "{copy:#x} and {content}");
            // The next process finds the same, whatever there was.
            let mut next = InflightQueue::new(Arc::clone(&memory), 0, 3);
            assert_eq!(next.recover(7), expected, "{copy:#x} and {content}, again");
            cases += 1;
        }
    }
    score("exhaustive_inflight", &[("cases", cases)]);
}
