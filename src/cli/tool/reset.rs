//! `addcow reset`: a disk back to what its backing file shows.
//!
//! Not here: what is done to the files (`jobs::reset`).

use std::path::PathBuf;

use clap::Args;

use crate::cli::Outcome;
use crate::cli::output::print;
use crate::cli::tool::on_disk;
use crate::image::inspect::{DiskAccess, DiskFiles};
use crate::jobs::reset::reset_disk;

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
    reset_disk(&disk).map_err(on_disk(&arguments.disk))?;
    if !arguments.quiet {
        print(|out| Ok(writeln!(out, "Image reset.")?))?;
    }
    Ok(0)
}
