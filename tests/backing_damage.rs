//! Does a damaged qcow2 file in a chain ever do worse than an error?
//!
//! Seeded mutations of headers and tables of real images: opening and reading must end soon, with
//! data or with an error, whatever the bytes are; and must never leave the image's own files.
//! Sound images are in `backing_chain.rs`.

#[path = "common/qemu.rs"]
mod qemu;

use std::fs;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use addcow::executor::block_on;
use addcow::image::chain::{ChainOptions, DiskFormat, OpenChain};
use addcow::storage::IoBuffer;
use addcow::storage::file::FileStorage;
use addcow::units::ByteRange;
use fastrand::Rng;
use qemu::Qemu;
use zerocopy::big_endian::U64;
use zerocopy::{FromBytes, IntoBytes};

/// How many damaged images are tried.
const ROUNDS: u64 = 3000;

/// How long one may take, which is far more than it needs.
const LIMIT: Duration = Duration::from_secs(20);

/// Virtual size of the sound images in bytes.
const SIZE: u64 = 600 << 10;

/// Numbers that are often one too many.
const EDGES: [u64; 14] = [
    0,
    1,
    2,
    0x1ff,
    0x200,
    0x1_0000,
    0xffff_fe00,
    u32::MAX as u64,
    1 << 40,
    1 << 56,
    1 << 62,
    1 << 63,
    i64::MAX as u64,
    u64::MAX,
];

/// Small images of each kind: many of their bytes are metadata.
fn sound_images(qemu: &Qemu, folder: &Path) -> Vec<Vec<u8>> {
    fs::write(folder.join("base.raw"), vec![0xba; 300 << 10]).unwrap();
    let kinds = [
        "-o cluster_size=512 -b base.raw -F raw",
        "-o cluster_size=4k,compat=0.10 -b base.raw -F raw",
        "-o cluster_size=4k,lazy_refcounts=on",
        "-o cluster_size=64k -b base.raw -F raw",
        "-o cluster_size=4k,data_file=data.raw",
    ];
    let mut images = Vec::new();
    for kind in kinds {
        qemu.ok(folder, &format!("qemu-img create -q -f qcow2 {kind} sound.qcow2 {SIZE}"));
        let commands: Vec<String> = (1..20_u64)
            .map(|n| format!("write -P {n} {} 9k", n * 31_744 % (SIZE - 10_000) / 512 * 512))
            .chain(["write -z 200k 64k".to_owned()])
            .collect();
        qemu.io(folder, "-f qcow2", "sound.qcow2", &commands);
        images.push(fs::read(folder.join("sound.qcow2")).unwrap());
    }
    let compress = "qemu-img convert -c -f qcow2 -O qcow2 -o cluster_size=4k";
    qemu.ok(folder, "qemu-img create -q -f qcow2 plain.qcow2 600k");
    qemu.io(folder, "-f qcow2", "plain.qcow2", &["write -P 7 0 500k".to_owned()]);
    qemu.ok(folder, &format!("{compress} plain.qcow2 sound.qcow2"));
    images.push(fs::read(folder.join("sound.qcow2")).unwrap());
    images
}

/// The big-endian number at a place of an image.
fn number(image: &[u8], at: usize) -> u64 {
    U64::read_from_bytes(&image[at..at + 8]).unwrap().get()
}

/// Damages an image in one to five places, most of them in its header or its tables.
fn damage(image: &[u8], rng: &mut Rng) -> Vec<u8> {
    let mut bytes = image.to_vec();
    let l1 = usize::try_from(number(image, 40)).unwrap();
    for _ in 0..rng.usize(1..6) {
        // The header, the L1 table, an L2 table (the clusters behind it), or anywhere.
        let area = match rng.u32(0..8) {
            0..3 => 0..112,
            3 => l1..l1 + 64,
            4..7 => l1..(l1 + 40_000).min(bytes.len()),
            _ => 0..bytes.len(),
        };
        let at = rng.usize(area.start..area.end.min(bytes.len() - 8)) / 8 * 8;
        let old = number(&bytes, at);
        let new = match rng.u32(0..5) {
            0 => old ^ 1 << rng.u32(0..64),
            1 => EDGES[rng.usize(..EDGES.len())],
            2 => old.wrapping_add(EDGES[rng.usize(..EDGES.len())]),
            3 => u64::from(rng.u32(..)) << 32 | old & 0xffff_ffff,
            _ => rng.u64(..),
        };
        bytes[at..at + 8].copy_from_slice(U64::new(new).as_bytes());
    }
    if rng.u32(0..20) == 0 {
        bytes.truncate(rng.usize(0..bytes.len()));
    }
    bytes
}

/// Opens a damaged image and reads all over it. Returns whether it could be opened, and how many
/// reads were answered with data.
fn try_out(path: &Path, rng: &mut Rng) -> (bool, u32) {
    let chain = match OpenChain::open(path, DiskFormat::Qcow2, ChainOptions::BUFFERED) {
        Ok(chain) => chain,
        Err(error) => {
            check(&error);
            return (false, 0);
        }
    };
    let handle = chain.handle(FileStorage::new);
    let size = chain.virtual_size();
    let mut answered = 0;
    for round in 0..60 {
        let start = if round % 2 == 0 { rng.u64(0..SIZE) } else { rng.u64(0..=size) };
        let len = rng.usize(1..40_000);
        let range = ByteRange::between(start, start.saturating_add(len as u64));
        match block_on(handle.piece(range)) {
            Ok(piece) => {
                assert_eq!(piece.range.start(), start);
                assert!(!piece.range.is_empty() && piece.range.end() <= range.end(), "{piece:?}");
            }
            Err(error) => check(&error),
        }
        match block_on(handle.read(start, IoBuffer::zeroed(len))) {
            Ok(()) => answered += 1,
            Err(error) => check(&error),
        }
    }
    (true, answered)
}

/// An error is one that a person can make something of, and not a panic that was caught.
fn check(error: &dyn std::error::Error) {
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        assert!(!text.is_empty() && !text.contains("assertion"), "{text}");
        next = error.source();
    }
}

#[test]
fn damaged_qcow2_files_give_data_or_an_error_and_never_a_panic_or_a_hang() {
    let Some(qemu) = Qemu::all("damaged_qcow2_files").into_iter().next() else { return };
    let seed = std::env::var("ADDCOW_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(7);
    println!("replay with ADDCOW_SEED={seed}");
    let folder = tempfile::tempdir().unwrap();
    let images = sound_images(&qemu, folder.path());
    let (sender, receiver) = channel();
    let path = folder.path().join("damaged.qcow2");
    let worker = std::thread::spawn(move || {
        for round in 0..ROUNDS {
            let mut rng = Rng::with_seed(seed + round);
            let image = damage(&images[rng.usize(..images.len())], &mut rng);
            // A new file each time: the one before may still be open.
            drop(fs::remove_file(&path));
            fs::write(&path, image).unwrap();
            if sender.send((round, try_out(&path, &mut rng))).is_err() {
                return;
            }
        }
    });
    let (mut opened, mut answered) = (0, 0);
    let mut last = None;
    loop {
        match receiver.recv_timeout(LIMIT) {
            Ok((round, (open, reads))) => {
                last = Some(round);
                opened += u64::from(open);
                answered += u64::from(reads);
            }
            Err(RecvTimeoutError::Timeout) => panic!("hangs after round {last:?} of seed {seed}"),
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    if worker.join().is_err() {
        panic!("the round after {last:?} of seed {seed} has failed");
    }
    println!("{opened} of {ROUNDS} could be opened, {answered} reads gave data");
    // Else the damage is such that nothing behind the header is ever tried.
    assert!(opened > ROUNDS / 4 && opened < ROUNDS && answered > ROUNDS * 5);
}
