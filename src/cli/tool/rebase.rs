//! `addcow rebase`: another backing file for a disk.
//!
//! Not here: what is copied, and in which order (`jobs::rebase`).

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;

use crate::cli::Outcome;
use crate::cli::progress::ProgressLine;
use crate::cli::tool::create::backing_reference;
use crate::cli::tool::on_disk;
use crate::jobs::rebase::{Mode, rebase_disk};

/// The command line of `addcow rebase`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// The new backing file, relative to the folder of DISK; an empty name for none
    #[arg(short, long, value_name = "FILE")]
    backing: OsString,
    /// Its format; needed, since formats are never probed
    #[arg(short = 'F', long, value_name = "FMT")]
    backing_format: Option<OsString>,
    /// Change the name only. The disk shows something else afterwards, unless both backing files
    /// hold the same; neither of them need be there
    #[arg(short = 'u', long = "unsafe")]
    name_only: bool,
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

/// Rebases a disk.
pub fn run(arguments: Arguments) -> Outcome {
    let backing = match arguments.backing.is_empty() {
        false => backing_reference(Some(arguments.backing), arguments.backing_format)?,
        true if arguments.backing_format.is_some() => {
            return Err("a backing format (-F) needs a backing file (-b)".into());
        }
        true => None,
    };
    let mode = if arguments.name_only { Mode::NameOnly } else { Mode::Safe };
    let progress = ProgressLine::new(arguments.progress && !arguments.quiet)?;
    let path = &arguments.disk;
    rebase_disk(path, backing.as_ref(), mode, &progress).map_err(on_disk(path))?;
    Ok(0)
}
