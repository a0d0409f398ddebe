//! virtio-blk: what a guest's requests mean. Knows guest memory, not sockets.
//!
//! Implemented of VIRTIO 1.3: split virtqueues (2.7) with indirect descriptors and event index, and
//! the block device (5.2) with FLUSH, CONFIG_WCE, DISCARD, WRITE_ZEROES, RO, MQ and GET_ID. Not
//! implemented: packed virtqueues, zoned devices, secure erase, lifetime queries.
//!
//! Everything here is written for a hostile guest (I8): metadata in guest memory is read once,
//! walks are bounded, and no input panics.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

pub mod chain;
pub mod config;
pub mod device;
pub mod guest_memory;
pub mod inflight;
pub mod request;
pub mod ring;
