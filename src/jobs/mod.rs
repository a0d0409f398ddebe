//! Jobs: work on a whole disk, as the image tool's verbs do it.
//!
//! Promises: a job that changes files can be cut between any two of its I/Os; the disk then opens,
//! and every sector reads a legal value. Each job is written over [`Storage`](crate::storage), so
//! that the same code runs on files and on the simulated disk of the tests.
//!
//! Not here: what a guest's requests do (`image`), and what a person sees (`cli`).

pub mod adopt;
pub mod commit;
pub mod compare;
pub mod convert;
pub mod copy;
pub mod detach;
pub mod error;
pub mod export;
pub mod measure;
mod names;
pub mod parts;
pub mod progress;
pub mod qcow2;
pub mod rebase;
pub mod reset;
pub mod resize;
pub mod snapshot;
pub mod stream;

pub use error::JobError;
pub use progress::{Interrupted, Progress, Unwatched};
