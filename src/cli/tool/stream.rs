//! `addcow stream`: everything that a disk shows of its backing chain gets into its raw image.
//!
//! Not here: the work itself (`jobs::stream`).

use std::path::PathBuf;

use clap::Args;

use crate::cli::Outcome;
use crate::cli::progress::ProgressLine;
use crate::cli::tool::on_disk;
use crate::jobs::stream::stream_disk;

/// The command line of `addcow stream`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Show progress
    #[arg(short, long)]
    progress: bool,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// The disk: its add-cow file
    #[arg(value_name = "DISK")]
    disk: PathBuf,
}

/// Streams into a disk.
pub fn run(arguments: &Arguments) -> Outcome {
    let line = ProgressLine::new(arguments.progress && !arguments.quiet)?;
    stream_disk(&arguments.disk, &line).map_err(on_disk(&arguments.disk))?;
    Ok(0)
}
