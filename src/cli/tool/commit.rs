//! `addcow commit`: what a disk holds itself gets into its backing file.
//!
//! Not here: the work itself (`jobs::commit`).

use std::path::PathBuf;

use clap::Args;

use crate::cli::Outcome;
use crate::cli::output::print;
use crate::cli::progress::ProgressLine;
use crate::cli::tool::on_disk;
use crate::jobs::commit::commit_disk;

/// The command line of `addcow commit`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Leave the disk as it is: do not empty it afterwards
    #[arg(short = 'd', long)]
    keep: bool,
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

/// Commits a disk.
pub fn run(arguments: &Arguments) -> Outcome {
    {
        let line = ProgressLine::new(arguments.progress && !arguments.quiet)?;
        commit_disk(&arguments.disk, arguments.keep, &line).map_err(on_disk(&arguments.disk))?;
    }
    if !arguments.quiet {
        print(|out| Ok(writeln!(out, "Image committed.")?))?;
    }
    Ok(0)
}
