//! `addcow`, the image tool. Everything is in [`addcow::cli::tool`].

use std::process::ExitCode;

/// Runs the tool; its exit codes are those of [`addcow::cli::tool::main`].
fn main() -> ExitCode {
    addcow::cli::tool::main(std::env::args_os())
}
