//! `addcow compare`: whether two disks show the same.
//!
//! Messages and exit codes are those of qemu-img.
//!
//! Not here: comparing (`jobs::compare`).

use std::error::Error;
use std::path::PathBuf;

use clap::Args;

use super::{ADVICE_TO_LOOK, PROGRAM, locking, with_advice};
use crate::cli::output::print;
use crate::cli::progress::ProgressLine;
use crate::cli::{Outcome, error_line};
use crate::executor::block_on;
use crate::image::ImageError;
use crate::image::chain::{ChainOptions, DiskFormat, OpenChain};
use crate::jobs::JobError;
use crate::jobs::compare::{CompareError, Difference, compare};
use crate::jobs::copy::Pace;
use crate::storage::file::FileStorage;
use crate::units::SECTOR_SIZE;

/// Exit code when the disks differ.
const EXIT_DIFFERENT: u8 = 1;
/// Exit code when a disk cannot be opened.
const EXIT_OPEN: u8 = 2;
/// Exit code when it cannot be found out where the bytes of a disk are.
const EXIT_MAP: u8 = 3;
/// Exit code when a disk cannot be read.
const EXIT_READ: u8 = 4;

/// The command line of `addcow compare`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Format of DISK; never found out from its content
    #[arg(short, long, value_name = "FMT", default_value = "add-cow")]
    format: DiskFormat,
    /// Format of OTHER
    #[arg(short = 'F', long, value_name = "FMT", default_value = "add-cow")]
    other_format: DiskFormat,
    /// Also compare the sizes, and what is stored and what only known to be zeros
    #[arg(short, long)]
    strict: bool,
    /// Show progress
    #[arg(short, long)]
    progress: bool,
    /// Print nothing: the exit code tells
    #[arg(short, long)]
    quiet: bool,
    /// Look at the disks even if they are in use: what is seen may not fit together
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The disk
    #[arg(value_name = "DISK")]
    disk: PathBuf,
    /// The disk that it is compared with
    #[arg(value_name = "OTHER")]
    other: PathBuf,
}

/// Compares two disks.
pub fn run(arguments: &Arguments) -> Outcome {
    let open = |path: &PathBuf, format| {
        let locking = locking(arguments.force_share);
        OpenChain::open(path, format, ChainOptions { locking, ..ChainOptions::BUFFERED })
    };
    let first = open(&arguments.disk, arguments.format);
    let second =
        first.and_then(|first| Ok((first, open(&arguments.other, arguments.other_format)?)));
    let (first, second) = match second {
        Ok(both) => both,
        Err(error) => {
            let error = with_advice(error.into(), ADVICE_TO_LOOK);
            return error.or_else(|error| Ok(fail(error.as_ref(), EXIT_OPEN)));
        }
    };
    let sizes = [sectors_of(&first), sectors_of(&second)];
    if arguments.strict && sizes[0] != sizes[1] {
        say(arguments, "Strict mode: Image size mismatch!")?;
        return Ok(EXIT_DIFFERENT);
    }
    let (first, second) = (first.handle(FileStorage::new), second.handle(FileStorage::new));
    let result = {
        let line = ProgressLine::new(arguments.progress && !arguments.quiet)?;
        block_on(compare([&first, &second], arguments.strict, Pace::default(), &line))
    };
    match result {
        Ok(difference) => report(arguments, sizes, difference),
        Err(CompareError::Interrupted(interrupted)) => Err(JobError::from(interrupted).into()),
        Err(CompareError::Map(index, error)) => {
            Ok(fail(&in_disk(arguments, index, error), EXIT_MAP))
        }
        Err(CompareError::Read(index, error)) => {
            Ok(fail(&in_disk(arguments, index, error), EXIT_READ))
        }
    }
}

/// The size of a disk in bytes; a last part of a sector counts as one.
fn sectors_of(chain: &OpenChain) -> u64 {
    chain.virtual_size().checked_next_multiple_of(SECTOR_SIZE).unwrap_or(u64::MAX)
}

/// Says in what disks of these sizes differ.
fn report(arguments: &Arguments, sizes: [u64; 2], difference: Option<Difference>) -> Outcome {
    let place = difference.map_or(u64::MAX, |difference| match difference {
        Difference::Content { offset } | Difference::Status { offset } => offset,
    });
    // As far as both go they are equal.
    if sizes[0] != sizes[1] && place >= sizes[0].min(sizes[1]) {
        say(arguments, "Warning: Image size mismatch!")?;
    }
    let Some(difference) = difference else {
        say(arguments, "Images are identical.")?;
        return Ok(0);
    };
    say(arguments, &describe(difference))?;
    Ok(EXIT_DIFFERENT)
}

/// Reports an error that has an exit code of its own.
fn fail(error: &(dyn Error + 'static), code: u8) -> u8 {
    eprintln!("{}", error_line(PROGRAM, error));
    code
}

/// Prints a line, unless nothing is to be printed.
fn say(arguments: &Arguments, line: &str) -> Result<(), Box<dyn Error>> {
    if arguments.quiet { Ok(()) } else { print(|out| Ok(writeln!(out, "{line}")?)) }
}

/// Where the disks differ, in words.
fn describe(difference: Difference) -> String {
    match difference {
        Difference::Content { offset } => format!("Content mismatch at offset {offset}!"),
        Difference::Status { offset } => {
            format!("Strict mode: Offset {offset} block status mismatch!")
        }
    }
}

/// What went wrong, and with which of the two disks.
#[derive(Debug, thiserror::Error)]
#[error("cannot compare '{}'", path.display())]
struct DiskError {
    /// The disk's name.
    path: PathBuf,
    /// What went wrong.
    source: ImageError,
}

/// Says which disk an error is about.
fn in_disk(arguments: &Arguments, index: usize, source: ImageError) -> DiskError {
    let path = if index == 0 { &arguments.disk } else { &arguments.other };
    DiskError { path: path.clone(), source }
}
