//! `addcow snapshot`: a new overlay on a disk, which stays from then on as it is.
//!
//! Not here: making it (`jobs::snapshot`).

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;

use crate::cli::Outcome;
use crate::cli::output::{print, printable};
use crate::cli::tool::create::{image_reference, summary, with_advice};
use crate::jobs::JobError;
use crate::jobs::snapshot::{Snapshot, snapshot};

/// The command line of `addcow snapshot`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// The new overlay's image file; relative to the folder of NEW [default: NEW with the extension
    /// .raw]
    #[arg(short, long, value_name = "FILE")]
    image: Option<OsString>,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// Replace an existing NEW, and use the image file without -i even if it exists
    #[arg(long)]
    force: bool,
    /// The disk: its add-cow file
    #[arg(value_name = "DISK")]
    disk: PathBuf,
    /// The add-cow file to make
    #[arg(value_name = "NEW")]
    new: PathBuf,
}

/// Makes a snapshot.
pub fn run(arguments: Arguments) -> Outcome {
    let reuse_image = arguments.image.is_some() || arguments.force;
    let made = snapshot(Snapshot {
        disk: &arguments.disk,
        path: &arguments.new,
        image: image_reference(&arguments.new, arguments.image, None)?,
        reuse_image,
        force: arguments.force,
    });
    let made = match made {
        Err(JobError::Open(error)) => return Err(with_advice(error)),
        made => made?,
    };
    if !arguments.quiet {
        let summary = printable(&summary(&arguments.new, &made));
        print(|out| Ok(writeln!(out, "{summary}")?))?;
    }
    Ok(0)
}
