//! `addcow measure`: how long the files of a new disk would be.
//!
//! Not here: computing it (`jobs::measure`).

use std::error::Error;
use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::convert::OutputFormat;
use super::create::{
    Use, Uses, merge, options_help, parse_cluster_size, parse_size, split_options,
};
use super::locking;
use crate::cli::Outcome;
use crate::cli::output::{Output, print, write_json};
use crate::image::chain::{ChainOptions, DiskFormat, OpenChain};
use crate::jobs::measure::{Target, measure};

/// Why the other keys are not taken.
const NO_MATTER: &str = "the space that a disk needs does not depend on it";

/// The keys of `-o`.
const USES: Uses = [
    Use::SameAs("--size"),
    Use::Not(NO_MATTER),
    Use::Not(NO_MATTER),
    Use::Not(NO_MATTER),
    Use::Not(NO_MATTER),
    Use::OfAddCow,
];

/// The command line of `addcow measure`.
#[derive(Debug, Args)]
#[command(override_usage = "addcow measure [OPTIONS] <DISK>\n       \
                            addcow measure [OPTIONS] --size <SIZE>")]
pub struct Arguments {
    /// Format of DISK; never found out from its content
    #[arg(short, long, value_name = "FMT", default_value = "add-cow")]
    format: DiskFormat,
    /// Format of the new disk
    #[arg(short = 'O', long, value_name = "FMT", default_value = "raw")]
    output_format: OutputFormat,
    /// Options of the new disk, as key=value,...: size, cluster_size; `-o help` lists them
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<OsString>,
    /// Size of the new disk, in place of that of a disk
    #[arg(long, value_name = "SIZE", conflicts_with = "disk", allow_negative_numbers = true)]
    size: Option<OsString>,
    /// How the result is shown
    #[arg(long, value_name = "FORM", default_value = "human")]
    output: Output,
    /// Look at the disk even if it is in use
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The disk that the new one is to hold
    #[arg(value_name = "DISK", required_unless_present_any = ["size", "options"])]
    disk: Option<PathBuf>,
}

/// The result; the keys are those of qemu-img.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Measured {
    /// Bytes in the files of the new disk.
    required: u64,
    /// The same once every sector has been written.
    fully_allocated: u64,
}

/// Measures a new disk.
pub fn run(arguments: &Arguments) -> Outcome {
    let Some(given) = split_options(&arguments.options, &USES)? else {
        print(|out| Ok(out.write_all(options_help(&USES).as_bytes())?))?;
        return Ok(0);
    };
    let values = [arguments.size.clone(), None, None, None, None, None];
    let [size, _, _, _, _, cluster_size] = merge(values, given, &USES)?;
    if size.is_some() && arguments.disk.is_some() {
        return Err("option 'size' cannot be used with DISK, which has one".into());
    }
    let target = match arguments.output_format {
        OutputFormat::Raw if cluster_size.is_some() => {
            return Err("a raw image has no clusters (-O add-cow has)".into());
        }
        OutputFormat::Raw => Target::Raw,
        OutputFormat::AddCow => {
            Target::AddCow(cluster_size.as_deref().map(parse_cluster_size).transpose()?)
        }
    };
    let size = match size.as_ref() {
        Some(text) => parse_size(text)?,
        None => size_of(arguments)?,
    };
    let bytes = measure(target, size)?;
    print(|out| match arguments.output {
        Output::Json => Ok(write_json(out, &Measured { required: bytes, fully_allocated: bytes })?),
        Output::Human => {
            Ok(writeln!(out, "required size: {bytes}\nfully allocated size: {bytes}")?)
        }
    })?;
    Ok(0)
}

/// The size of the disk that was named.
fn size_of(arguments: &Arguments) -> Result<u64, Box<dyn Error>> {
    let disk = arguments.disk.as_ref().ok_or("no DISK and no --size given")?;
    let options =
        ChainOptions { locking: locking(arguments.force_share), ..ChainOptions::BUFFERED };
    Ok(OpenChain::open_top(disk, arguments.format, options)?.virtual_size())
}
