//! The in-tree front end: what the tests of the device share.
//!
//! A test starts the real daemon on a disk in a temporary folder ([`disk`]), connects to it as a
//! virtual machine monitor would ([`guest`]) and puts descriptor chains on rings of its own
//! ([`ring`], [`mem`]) that can express what no driver would send. Requests and their framings
//! are in [`request`], the model of a disk and the seeded workload in [`model`].
//!
//! Promises: every wait ends within [`TIMEOUT`] with a message that says what was waited for.
//!
//! Not here: anything from the library under test. The oracle is the text of VIRTIO 1.3 and of
//! the vhost-user protocol, so nothing is imported from the crate itself.

#![allow(dead_code, reason = "each test file uses its own part of the front end")]

use std::time::Duration;

pub mod disk;
pub mod guest;
pub mod mem;
pub mod model;
pub mod request;
pub mod ring;
pub mod rng;
pub mod score;

/// How long anything may take before the test fails: far above what a busy machine needs.
pub const TIMEOUT: Duration = Duration::from_secs(5);

/// Bytes in a sector, the unit of the protocol.
pub const SECTOR: usize = 512;

/// 1 KiB.
pub const KIB: u64 = 1024;
/// 1 MiB.
pub const MIB: u64 = 1024 * KIB;
/// 1 GiB.
pub const GIB: u64 = 1024 * MIB;

/// `value` as an index or a length in memory.
pub fn to_usize(value: u64) -> usize {
    usize::try_from(value).expect("fits the address space")
}

/// `value` as a 64-bit offset or length.
pub fn to_u64(value: usize) -> u64 {
    u64::try_from(value).expect("fits 64 bits")
}

/// `value` as a 32-bit length.
pub fn to_u32(value: usize) -> u32 {
    u32::try_from(value).expect("fits 32 bits")
}

/// `len` bytes in which every sector differs from its neighbours and from other seeds: the sector
/// number and the seed in each 16-byte group, never all zeros.
pub fn pattern(seed: u64, first_sector: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 16);
    let mut position = 0;
    while bytes.len() < len {
        let sector = first_sector.wrapping_add(position / to_u64(SECTOR));
        let mixed = rng::mix(seed ^ sector.wrapping_mul(0x9e37_79b9) ^ (position << 40));
        bytes.extend_from_slice(&(sector << 8 | 0x80).to_le_bytes());
        bytes.extend_from_slice(&(mixed | 1).to_le_bytes());
        position += 16;
    }
    bytes.truncate(len);
    bytes
}

/// Fails with the position of the first difference instead of megabytes of numbers.
pub fn assert_bytes(got: &[u8], want: &[u8], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    // At once, since they nearly always agree: byte by byte is slow where tests are not optimised.
    if got == want {
        return;
    }
    if let Some(at) = (0..got.len()).find(|&at| got[at] != want[at]) {
        let end = (at + 16).min(got.len());
        panic!(
            "{what}: byte {at:#x} of {:#x} differs: got {:02x?}, want {:02x?}",
            got.len(),
            &got[at..end],
            &want[at..end]
        );
    }
}
