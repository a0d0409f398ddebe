//! The daemon; everything is in [`addcow::cli::daemon`].

use std::process::ExitCode;

fn main() -> ExitCode {
    addcow::cli::daemon::main(std::env::args_os())
}
