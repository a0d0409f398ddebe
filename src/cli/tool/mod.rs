//! `addcow`: the image tool. Its verbs, and what they have in common.
//!
//! Verbs, options, JSON keys and exit codes follow qemu-img where it has them (docs/addcow.md).
//!
//! Not here: the work itself (`image`).

mod create;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

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
}

/// Runs the tool with the arguments of its process, the program's own name first.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    super::run(PROGRAM, arguments, |arguments: Arguments| match arguments.verb {
        Verb::Create(arguments) => create::run(arguments),
    })
}
