//! What a disk still needs of the files below it, for `info`.
//!
//! Never fails: a disk whose backing files cannot be used is still described, with a note that says
//! why that much is unknown.
//!
//! Not here: finding the pieces (`image::map`).

use std::path::Path;

use crate::cli::causes;
use crate::image::chain::{ChainOptions, DiskFormat, OpenChain};
use crate::image::map::bytes_below;
use crate::units::SECTOR_SIZE;

/// What a disk needs of its backing files.
#[derive(Debug)]
pub struct Below {
    /// Bytes of the disk that only a file below it has; `None` if that cannot be found out.
    pub left_to_stream: Option<u64>,
    /// What a reader should know, one sentence each.
    pub notes: Vec<String>,
}

impl Below {
    /// Finds out for the add-cow disk `path`, which a person has named, and whose files are opened
    /// with `options`.
    pub fn of(path: &Path, options: ChainOptions) -> Self {
        match OpenChain::open(path, DiskFormat::AddCow, options) {
            Err(error) => Self { left_to_stream: None, notes: vec![causes(&error)] },
            Ok(chain) => Self::of_open(&chain),
        }
    }

    /// Finds out for the add-cow disk at the top of a chain that is open.
    pub fn of_open(chain: &OpenChain) -> Self {
        let mut notes: Vec<String> = note_about_length(chain).into_iter().collect();
        let left_to_stream = bytes_below(chain).map_err(|error| notes.push(causes(&error))).ok();
        Self { left_to_stream, notes }
    }
}

/// What it means that the backing file and the disk do not have one length.
fn note_about_length(chain: &OpenChain) -> Option<String> {
    let disk = chain.virtual_size();
    let backing = chain.layers().get(1)?.virtual_size();
    // A disk is made of whole sectors, so the backing file may end in the last of them.
    if backing.div_ceil(SECTOR_SIZE) == disk.div_ceil(SECTOR_SIZE) {
        return None;
    }
    let (backing_is, meaning) = if backing < disk {
        ("shorter", "beyond its end the disk reads zeros")
    } else {
        ("longer", "what it has beyond the disk's end is never shown")
    };
    let sizes = format!("{backing} bytes, not {disk}");
    Some(format!("the backing file is {backing_is} than the disk ({sizes}): {meaning}"))
}
