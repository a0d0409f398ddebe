//! `addcow detach`: the raw image becomes the disk, and the add-cow file goes.
//!
//! Not here: when that is possible (`jobs::detach`).

use std::path::PathBuf;

use clap::Args;

use crate::cli::Outcome;
use crate::cli::output::{print, printable};
use crate::jobs::detach;

/// The command line of `addcow detach`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// The disk: its add-cow file, which is removed
    #[arg(value_name = "DISK")]
    disk: PathBuf,
}

/// Detaches a raw image.
pub fn run(arguments: &Arguments) -> Outcome {
    let raw = detach::detach(&arguments.disk)?;
    if !arguments.quiet {
        let name = printable(&raw.display().to_string());
        print(|out| Ok(writeln!(out, "'{name}' is the disk now, a raw image.")?))?;
    }
    Ok(0)
}
