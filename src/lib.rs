//! addcow: copy-on-write disks over plain raw images, served to virtual machines.
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test that cannot go on should panic"))]

pub mod cli;
pub mod executor;
pub mod format;
mod helper;
pub mod image;
pub mod jobs;
pub mod log_limit;
pub mod sandbox;
pub mod seeded;
pub mod storage;
mod sync;
pub mod units;
pub mod vhost_user;
pub mod virtio;
