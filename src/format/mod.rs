//! The add-cow file: bytes on one side, checked values on the other.
//!
//! The format is specified in `docs/format.md`; a test decodes the example printed there. Every
//! byte that comes in is taken to be hostile (I8): whatever it is, the answer is a value or a
//! [`FormatError`], never a panic. Only [`crate::units`] is used, so everything here can be tested
//! and fuzzed without a file.
//!
//! Other programs' formats have modules and errors of their own: `qcow2`, `qed`.
//!
//! Not here: reading or writing files, opening what a name refers to, comparing files by identity
//! (names that differ may still be one file), and the bits themselves (`image`).
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

pub mod bitmap;
pub mod change;
pub mod error;
pub mod header;
pub mod qcow2;
pub mod qed;
pub mod reference;
pub mod session;

pub use bitmap::{BitmapGeometry, decode_words, encode_words};
pub use change::HeaderChange;
pub use error::FormatError;
pub use header::{FIXED_HEADER_LEN, Header, MAX_HEADER_LEN, MIN_HEADER_LEN, is_add_cow};
pub use reference::{FileName, FileReference, FileRole};
pub use session::{SESSION_OFFSET, decode_session, encode_session};
