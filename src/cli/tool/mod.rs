//! `addcow`: the image tool. Its verbs, and what they have in common.
//!
//! Verbs, options, JSON keys and exit codes follow qemu-img where it has them (docs/addcow.md).
//!
//! Not here: the work itself (`image`).

mod adopt;
mod below;
mod check;
mod commit;
mod compare;
mod completions;
mod convert;
mod create;
mod detach;
mod export;
mod info;
mod man;
mod map;
mod measure;
mod picture;
mod rebase;
mod reset;
mod resize;
mod snapshot;
mod stream;

use std::error::Error;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::builder::PossibleValue;
use clap::{Args, Command, CommandFactory, Parser, Subcommand, ValueEnum};

use super::Outcome;
use super::manual;
use super::names::NameArguments;
use super::output::Output;
use crate::image::OpenError;
use crate::image::chain::DiskFormat;
use crate::jobs::JobError;
use crate::storage::lock::Locking;

/// The program's name in its messages.
const PROGRAM: &str = "addcow";

/// What helps a verb that only looks if a file is in use.
const ADVICE_TO_LOOK: &str = "-U looks at it all the same";

/// Copy-on-write disks over plain raw images.
#[derive(Debug, Parser)]
#[command(name = PROGRAM, version, disable_help_subcommand = true, max_term_width = 80,
          subcommand_value_name = "VERB", subcommand_help_heading = "Verbs",
          after_help = "See addcow VERB --help for each of them.")]
struct Arguments {
    /// What to do.
    #[command(subcommand)]
    verb: Verb,
    /// Where names inside the disks' files may lead
    #[command(flatten)]
    names: NameArguments,
}

/// What can be done.
#[derive(Debug, Subcommand)]
enum Verb {
    /// Make a new disk
    Create(create::Arguments),
    /// Show what a disk is made of
    Info(info::Arguments),
    /// Look for errors in an add-cow file
    Check(check::Arguments),
    /// Show where the bytes of a disk are
    Map(map::Arguments),
    /// Make a disk larger or smaller
    Resize(resize::Arguments),
    /// Give a disk another backing file
    Rebase(rebase::Arguments),
    /// Make a new overlay on a disk
    Snapshot(snapshot::Arguments),
    /// Put a disk back to what its backing file shows
    Reset(reset::Arguments),
    /// Remove the add-cow file of a disk that is complete without it
    Detach(detach::Arguments),
    /// Copy everything that a disk shows of its backing files into its image file
    Stream(stream::Arguments),
    /// Copy what a disk holds itself into its backing file
    Commit(commit::Arguments),
    /// Make a new disk that shows what another one shows
    Convert(convert::Arguments),
    /// Find out whether two disks show the same
    Compare(compare::Arguments),
    /// Show how long the files of a new disk would be
    Measure(measure::Arguments),
    /// Make an add-cow disk of a qcow2 file with an external data file, copying nothing
    Adopt(adopt::Arguments),
    /// Make a qcow2 file over the raw image of a disk, copying nothing
    Export(export::Arguments),
    /// Print a script that lets a shell complete command lines
    #[command(hide = true)]
    Completions(completions::Arguments),
    /// Make the man pages
    #[command(hide = true)]
    Man(man::Arguments),
}

/// What every verb on an existing disk takes.
#[derive(Debug, Args)]
struct DiskArguments {
    /// Format of the disk; never found out from its content
    #[arg(short, long, value_name = "FMT", default_value = "add-cow")]
    format: DiskFormat,
    /// How the result is shown
    #[arg(long, value_name = "FORM", default_value = "human")]
    output: Output,
    /// Look at the disk even if it is in use: what is seen may not fit together
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The disk: its add-cow file, or with -f an image of another format
    #[arg(value_name = "DISK")]
    disk: PathBuf,
}

impl DiskArguments {
    /// Whether the disk's files are locked.
    fn locking(&self) -> Locking {
        locking(self.force_share)
    }
}

/// Whether files are locked, given whether -U was.
fn locking(force_share: bool) -> Locking {
    if force_share { Locking::Off } else { Locking::On }
}

/// The names of the formats on the command line are those in headers.
impl ValueEnum for DiskFormat {
    fn value_variants<'a>() -> &'a [Self] {
        &Self::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name()))
    }
}

/// The definition of the command line.
#[must_use]
pub fn command() -> Command {
    Arguments::command().mut_subcommands(|verb| {
        let examples = manual::examples(verb.get_name());
        verb.after_long_help(examples)
    })
}

/// Runs the tool with the arguments of its process, the program's own name first.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    super::run(command(), arguments, |arguments: Arguments| {
        arguments.names.install()?;
        let advice = arguments.verb.advice_when_in_use();
        let outcome = match arguments.verb {
            Verb::Create(arguments) => create::run(arguments),
            Verb::Info(arguments) => info::run(&arguments),
            Verb::Check(arguments) => check::run(&arguments),
            Verb::Map(arguments) => map::run(&arguments),
            Verb::Resize(arguments) => resize::run(&arguments),
            Verb::Rebase(arguments) => rebase::run(arguments),
            Verb::Snapshot(arguments) => snapshot::run(arguments),
            Verb::Reset(arguments) => reset::run(&arguments),
            Verb::Detach(arguments) => detach::run(&arguments),
            Verb::Stream(arguments) => stream::run(&arguments),
            Verb::Commit(arguments) => commit::run(&arguments),
            Verb::Convert(arguments) => convert::run(arguments),
            Verb::Compare(arguments) => compare::run(&arguments),
            Verb::Measure(arguments) => measure::run(&arguments),
            Verb::Adopt(arguments) => adopt::run(arguments),
            Verb::Export(arguments) => export::run(arguments),
            Verb::Completions(arguments) => completions::run(&arguments),
            Verb::Man(arguments) => man::run(&arguments),
        };
        outcome.or_else(|error| with_advice(error, advice))
    })
}

impl Verb {
    /// What helps if a file of the disk is in use.
    fn advice_when_in_use(&self) -> &'static str {
        match self {
            Self::Info(_) | Self::Map(_) | Self::Measure(_) => ADVICE_TO_LOOK,
            Self::Check(arguments) if !arguments.repairs() => ADVICE_TO_LOOK,
            Self::Convert(_) => "stop it; -U reads a disk in use all the same",
            _ => "stop it first",
        }
    }
}

/// An error of a job that does not say which disk it is about.
#[derive(Debug, thiserror::Error)]
#[error("'{}'", path.display())]
struct OnDisk {
    /// The disk.
    path: PathBuf,
    /// What happened.
    source: JobError,
}

/// Says which disk an error of a job is about, unless it names the file already.
fn on_disk(path: &Path) -> impl FnOnce(JobError) -> Box<dyn Error> {
    move |source| match source {
        JobError::Image(_) | JobError::Header(_) => {
            Box::new(OnDisk { path: path.to_owned(), source })
        }
        other => Box::new(other),
    }
}

/// Adds `advice` to an error which says that a file is in use; and to one which says that a file is
/// there already, what replaces it.
fn with_advice(error: Box<dyn Error>, advice: &str) -> Outcome {
    let open_error = match error.downcast_ref::<JobError>() {
        Some(JobError::Open(error)) => Some(error),
        _ => error.downcast_ref::<OpenError>(),
    };
    match open_error {
        Some(OpenError::InUse { .. }) => Err(format!("{error} ({advice})").into()),
        Some(OpenError::Exists { .. }) => Err(format!("{error} (--force replaces it)").into()),
        _ => Err(error),
    }
}
