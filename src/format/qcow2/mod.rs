//! qcow2 metadata, versions 2 and 3: bytes on one side, checked values on the other.
//!
//! Written from the published specification of the format and from what qemu-img does. Reading is
//! for backing files (`image`) and for `adopt`; writing is for `export`, which makes version 3
//! files with an external data file and nothing else. What a header may say and still be refused
//! by us is in [`Header::check_readable`].
//!
//! Not here: reading or writing files, compressed clusters, internal snapshots, bitmaps.

pub mod entry;
pub mod error;
mod extension;
pub mod header;
pub mod layout;

pub use entry::{L2Content, L2Entry, TableEntry};
pub use error::Qcow2Error;
pub use extension::{Extension, FeatureName};
pub use header::{Backing, Header};
pub use layout::Layout;
