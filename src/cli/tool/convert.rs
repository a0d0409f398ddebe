//! `addcow convert`: from its command line to a new disk that shows what another one shows.
//!
//! Not here: the work itself (`jobs::convert`), and what `-o` means (`create`).

use std::error::Error;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use clap::{Args, ValueEnum, ValueHint};

use super::create::{Use, Uses, Values, create_options, merge, options_help, split_options};
use super::locking;
use crate::cli::output::print;
use crate::cli::progress::ProgressLine;
use crate::cli::{Outcome, size};
use crate::image::chain::DiskFormat;
use crate::jobs::convert::{ConvertOptions, Target, convert};
use crate::units::SECTOR_SIZE;

/// The largest number for `-S`, in bytes: that of qemu-img.
const MAX_SPARSE: u64 = 16 << 20;

/// The keys of `-o`. A raw image has none of them.
const USES: Uses = [
    Use::Not("the size of a converted disk is that of the old one"),
    Use::SameAs("-B"),
    Use::SameAs("-F"),
    Use::OfAddCow,
    Use::OfAddCow,
    Use::OfAddCow,
];

/// The command line of `addcow convert`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Format of DISK; never found out from its content
    #[arg(short, long, value_name = "FMT", default_value = "add-cow")]
    format: DiskFormat,
    /// Format of OUT
    #[arg(short = 'O', long, value_name = "FMT", default_value = "raw")]
    output_format: OutputFormat,
    /// File that OUT stands on; relative to the folder of OUT. OUT gets what differs from it
    #[arg(short = 'B', long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    backing: Option<OsString>,
    /// Format of the backing file; needed with -B, since formats are never probed
    #[arg(short = 'F', long, value_name = "FMT")]
    backing_format: Option<OsString>,
    /// Options for OUT, as key=value,...; `-o help` lists them
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<OsString>,
    /// So many bytes of zeros become a hole; 0: none do, OUT takes all its space [default: 4K]
    #[arg(short = 'S', long, value_name = "SIZE")]
    sparse_size: Option<OsString>,
    /// Show progress
    #[arg(short, long)]
    progress: bool,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// Read the disk even if it is in use: what is copied may not fit together
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Replace an existing OUT, and its image file
    #[arg(long)]
    force: bool,
    /// The disk
    #[arg(value_name = "DISK", required_unless_present = "options")]
    disk: Option<PathBuf>,
    /// The disk to make
    #[arg(value_name = "OUT", required_unless_present = "options")]
    out: Option<PathBuf>,
}

/// What can be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// A raw image.
    Raw,
    /// An add-cow file and its raw image.
    AddCow,
}

/// Converts a disk.
pub fn run(arguments: Arguments) -> Outcome {
    let Some(given) = split_options(&arguments.options, &USES)? else {
        print(|out| Ok(out.write_all(options_help(&USES).as_bytes())?))?;
        return Ok(0);
    };
    let names = (arguments.disk.clone(), arguments.out.clone());
    let (Some(disk), Some(out)) = names else {
        return Err("DISK and OUT are needed (see addcow convert --help)".into());
    };
    let values: Values =
        [None, arguments.backing.clone(), arguments.backing_format.clone(), None, None, None];
    let values = merge(values, given, &USES)?;
    let options = ConvertOptions {
        source: disk,
        format: arguments.format,
        locking: locking(arguments.force_share),
        target: target(&arguments, out, values)?,
        block: block(arguments.sparse_size.as_deref())?,
    };
    let line = ProgressLine::new(arguments.progress && !arguments.quiet)?;
    convert(&options, &line)?;
    Ok(0)
}

/// The disk to make.
fn target(arguments: &Arguments, out: PathBuf, values: Values) -> Result<Target, Box<dyn Error>> {
    let force = arguments.force;
    match arguments.output_format {
        OutputFormat::Raw if values.iter().any(Option::is_some) => {
            Err("a raw image has no options and no backing file (-O add-cow has)".into())
        }
        OutputFormat::Raw => Ok(Target::Raw { path: out, force }),
        OutputFormat::AddCow => Ok(Target::AddCow(create_options(out, values, force)?)),
    }
}

/// How many bytes of zeros become a hole.
fn block(text: Option<&OsStr>) -> Result<Option<u64>, Box<dyn Error>> {
    let Some(text) = text else { return Ok(Some(crate::storage::sparse::BLOCK)) };
    let text = text.to_string_lossy();
    match size::parse(&text)? {
        0 => Ok(None),
        bytes if bytes <= MAX_SPARSE && bytes.is_multiple_of(SECTOR_SIZE) => Ok(Some(bytes)),
        _ => Err(format!("invalid sparse size '{text}': must be 0 or a multiple of 512 up to 16M")
            .into()),
    }
}
