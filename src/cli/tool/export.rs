//! `addcow export`: a qcow2 file over the raw image of a disk.
//!
//! Not here: what is in it (`jobs::export`).

use std::path::PathBuf;

use clap::Args;

use crate::cli::Outcome;
use crate::cli::output::{print, printable};
use crate::cli::progress::ProgressLine;
use crate::jobs::export::{ExportOptions, Exported, to_qcow2};

/// The command line of `addcow export`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Name the raw image without its folder: QEMU then looks for it in its working directory
    #[arg(long)]
    relative: bool,
    /// Show progress
    #[arg(short, long)]
    progress: bool,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// Replace an existing OUT
    #[arg(long)]
    force: bool,
    /// The disk: its add-cow file
    #[arg(value_name = "DISK")]
    disk: PathBuf,
    /// The qcow2 file to make
    #[arg(value_name = "OUT")]
    out: PathBuf,
}

/// Exports a disk.
pub fn run(arguments: Arguments) -> Outcome {
    let Arguments { relative, progress, quiet, force, disk, out } = arguments;
    let options = ExportOptions { disk, out, relative, force };
    let exported = {
        let progress = ProgressLine::new(progress && !quiet)?;
        to_qcow2(&options, &progress)?
    };
    if !quiet {
        print(|out| Ok(writeln!(out, "{}", printable(&summary(&options, &exported)))?))?;
    }
    Ok(0)
}

/// The line that says what was made.
fn summary(options: &ExportOptions, Exported { header, file_len }: &Exported) -> String {
    let mut line = format!(
        "Exported '{}' as '{}', fmt=qcow2 cluster_size={} size={} metadata={file_len}",
        options.disk.display(),
        options.out.display(),
        header.cluster_size.bytes(),
        header.size,
    );
    if let Some(name) = &header.data_file {
        let name: &std::path::Path = name.as_ref();
        line += &format!(" data_file={}", name.display());
    }
    if header.has_raw_data() {
        line += " data_file_raw=on";
    }
    if let Some(backing) = &header.backing {
        let name: &std::path::Path = backing.name.as_ref();
        let format = backing.format.as_deref().unwrap_or_default();
        line += &format!(" backing_file={} backing_fmt={format}", name.display());
    }
    line
}
