//! `addcow reset`: a disk back to what its backing file shows.
//!
//! Not here: what is done to the files (`jobs::reset`).

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use crate::cli::Outcome;
use crate::cli::output::print;
use crate::cli::tool::on_disk;
use crate::executor::block_on;
use crate::image::inspect::{DiskAccess, DiskFiles};
use crate::image::session;
use crate::jobs::parts::DiskParts;
use crate::jobs::reset;
use crate::storage::file::FileStorage;

/// The command line of `addcow reset`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// The disk: its add-cow file
    #[arg(value_name = "DISK")]
    disk: PathBuf,
}

/// Resets a disk.
pub fn run(arguments: &Arguments) -> Outcome {
    let disk = DiskFiles::open(&arguments.disk, DiskAccess::WRITE)?;
    // What the disk will show must be there: what it holds itself is about to go.
    let _backing = disk.open_backing_of_emptied()?;
    let (side, raw) =
        (FileStorage::new(Arc::clone(&disk.side)), FileStorage::new(Arc::clone(&disk.raw)));
    let header = disk.header.clone();
    session::renew_in(&disk.side)?;
    let parts = DiskParts { side: &side, raw: &raw, header, geometry: disk.geometry };
    block_on(reset::reset(&parts)).map_err(on_disk(&arguments.disk))?;
    if !arguments.quiet {
        print(|out| Ok(writeln!(out, "Image reset.")?))?;
    }
    Ok(0)
}
