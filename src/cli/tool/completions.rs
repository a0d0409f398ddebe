//! `addcow completions`: what a shell needs to complete command lines.
//!
//! Made from the definitions of the command lines, of which verbs that help does not show are left
//! out.
//!
//! Not here: how a shell loads it (docs/addcow.md).

use clap::{Args, Command, ValueEnum};
use clap_complete::{Shell, generate};

use crate::cli::output::print;
use crate::cli::{Outcome, daemon};

/// The command line of `addcow completions`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// The shell that is to complete
    #[arg(value_name = "SHELL")]
    shell: Shell,
    /// The program whose command line is to be completed
    #[arg(value_name = "PROGRAM", default_value = "addcow")]
    program: Program,
}

/// A program of this package.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Program {
    /// The image tool.
    Addcow,
    /// The daemon.
    Addcowd,
}

/// Prints the script.
pub fn run(arguments: &Arguments) -> Outcome {
    let mut command = match arguments.program {
        Program::Addcow => without_hidden_verbs(&super::command()),
        Program::Addcowd => daemon::command(),
    };
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    generate(arguments.shell, &mut command, name, &mut script);
    print(|out| Ok(out.write_all(&script)?))?;
    Ok(0)
}

/// The same command with the verbs that help shows.
fn without_hidden_verbs(command: &Command) -> Command {
    let visible = command.get_subcommands().filter(|verb| !verb.is_hide_set());
    Command::new(super::PROGRAM)
        .version(env!("CARGO_PKG_VERSION"))
        .disable_help_subcommand(true)
        .args(command.get_arguments())
        .subcommands(visible)
}
