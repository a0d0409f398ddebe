//! The command lines: arguments, output, exit codes. The only place that prints.

pub mod daemon;

use std::error::Error;
use std::process::ExitCode;

/// An error and its causes as one line: `what: why: why that`. A cause that the line has already
/// said is left out.
#[must_use]
pub fn error_line(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    line.replace('\n', " ")
}

/// Ends a program whose arguments could not be understood: help and version are printed as they
/// are, everything else becomes one line.
pub fn usage_error(program: &str, error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        print!("{error}");
        return ExitCode::SUCCESS;
    }
    let text = error.to_string();
    let first = text.split("\n\n").next().unwrap_or_default();
    let line = first.split_whitespace().collect::<Vec<_>>().join(" ");
    eprintln!("{program}: {}", line.strip_prefix("error: ").unwrap_or(&line));
    ExitCode::FAILURE
}
