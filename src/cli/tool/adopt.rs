//! `addcow adopt`: an add-cow disk out of a qcow2 file with an external data file.
//!
//! Not here: what can be adopted, and how (`jobs::adopt`).

use std::path::{Path, PathBuf};

use clap::Args;

use crate::cli::Outcome;
use crate::cli::output::{human_size, print, printable};
use crate::cli::progress::ProgressLine;
use crate::jobs::adopt::{AdoptOptions, Adopted, from_qcow2};

/// The extension of the new file where no name is given.
const EXTENSION: &str = "add-cow";

/// The command line of `addcow adopt`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// The data file [default: what DISK says, relative to the folder of DISK]
    #[arg(long, value_name = "FILE")]
    data_file: Option<PathBuf>,
    /// Show progress
    #[arg(short, long)]
    progress: bool,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// Replace an existing NEW
    #[arg(long)]
    force: bool,
    /// The qcow2 file
    #[arg(value_name = "DISK")]
    disk: PathBuf,
    /// The add-cow file to make [default: DISK with the extension .add-cow]
    #[arg(value_name = "NEW")]
    new: Option<PathBuf>,
}

/// Adopts a disk.
pub fn run(arguments: Arguments) -> Outcome {
    let Arguments { data_file, progress, quiet, force, disk, new } = arguments;
    let new = new.unwrap_or_else(|| disk.with_extension(EXTENSION));
    let options = AdoptOptions { qcow2: disk, new, data_file, force };
    let adopted = {
        let progress = ProgressLine::new(progress && !quiet)?;
        from_qcow2(&options, &progress)?
    };
    if !quiet {
        print(|out| Ok(writeln!(out, "{}", printable(&summary(&options, &adopted)))?))?;
    }
    Ok(0)
}

/// The line that says what was made.
fn summary(options: &AdoptOptions, adopted: &Adopted) -> String {
    let Adopted { header, geometry, allocated, changed } = adopted;
    let image: &Path = header.image.name.as_ref();
    let mut line = format!(
        "Adopted '{}' as '{}', fmt=add-cow cluster_size={} size={} image_file={}",
        options.qcow2.display(),
        options.new.display(),
        header.cluster_size.bytes(),
        geometry.virtual_size(),
        image.display(),
    );
    if let Some(backing) = &header.backing {
        let name: &Path = backing.name.as_ref();
        line += &format!(" backing_file={} backing_fmt={}", name.display(), backing.format);
    }
    line += &format!(" allocated={allocated}/{}", geometry.clusters());
    for (bytes, what) in [(changed.zeroed, "zeroed"), (changed.copied, "copied from backing_file")]
    {
        if bytes > 0 {
            line += &format!(" ({} {what})", human_size(bytes));
        }
    }
    line
}
