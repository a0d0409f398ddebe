//! `addcow`: the image tool. Its verbs, and what they have in common.
//!
//! Verbs, options, JSON keys and exit codes follow qemu-img where it has them (docs/addcow.md).
//!
//! Not here: the work itself (`image`).

mod check;
mod create;
mod info;
mod map;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::PossibleValue;
use clap::{Args, Parser, Subcommand, ValueEnum};

use super::output::Output;
use crate::image::chain::DiskFormat;

/// The program's name in its messages.
const PROGRAM: &str = "addcow";

/// Copy-on-write disks over plain raw images.
#[derive(Debug, Parser)]
#[command(name = PROGRAM, version, disable_help_subcommand = true)]
struct Arguments {
    /// What to do.
    #[command(subcommand)]
    verb: Verb,
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
    /// Accepted for the sake of qemu-img: disks are not locked yet
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The disk: its add-cow file, or with -f an image of another format
    #[arg(value_name = "DISK")]
    disk: PathBuf,
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

/// Runs the tool with the arguments of its process, the program's own name first.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    super::run(PROGRAM, arguments, |arguments: Arguments| match arguments.verb {
        Verb::Create(arguments) => create::run(arguments),
        Verb::Info(arguments) => info::run(&arguments),
        Verb::Check(arguments) => check::run(&arguments),
        Verb::Map(arguments) => map::run(&arguments),
    })
}
