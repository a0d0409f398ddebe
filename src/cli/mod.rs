//! The command lines: arguments in, text and exit codes out. The only code that prints.
//!
//! Promises: an error is exactly one line on standard error, `program: what: why`, whatever bytes
//! a file name or an image holds; and nothing is printed twice. The only place where the pieces
//! of the program are put together.
//!
//! Not here: anything that a caller other than a person or a script could want.

pub mod daemon;
pub mod manual;
mod names;
pub mod output;
pub mod progress;
pub mod size;
pub mod tool;
mod usage;

use std::error::Error;
use std::ffi::OsString;
use std::io;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Command, FromArgMatches};

use crate::jobs::{Interrupted, JobError};

/// Exit code when what was asked for could not be done, or was not understood: as qemu-img, which
/// makes no difference between the two.
pub const EXIT_FAILURE: u8 = 1;

/// What a command ends with: an exit code, or an error for standard error and [`EXIT_FAILURE`].
pub type Outcome = Result<u8, Box<dyn Error>>;

/// Parses the arguments of a process, the program's own name first, runs what they ask for, and
/// reports.
///
/// Help and version go to standard output with exit code 0. A reader of standard output that has
/// gone away (`addcow map disk | head`) ends the command without a word.
pub fn run<A: FromArgMatches>(
    definition: Command,
    arguments: impl IntoIterator<Item = OsString>,
    command: impl FnOnce(A) -> Outcome,
) -> ExitCode {
    let program = definition.get_name().to_owned();
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let parsed = definition.clone().try_get_matches_from(&arguments);
    let code = match parsed.and_then(|matches| A::from_arg_matches(&matches)) {
        Ok(arguments) => command(arguments).unwrap_or_else(|error| {
            if !output::is_broken_pipe(error.as_ref()) {
                eprintln!("{}", error_line(&program, error.as_ref()));
            }
            if is_interruption(error.as_ref()) {
                progress::end_by_signal();
            }
            EXIT_FAILURE
        }),
        Err(error)
            if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) =>
        {
            // Nobody left to tell if this fails.
            drop(error.print());
            0
        }
        Err(error) => {
            let line = usage::line(&definition, &arguments, &error);
            eprintln!("{program}: {}", output::printable(&line));
            EXIT_FAILURE
        }
    };
    ExitCode::from(code)
}

/// Whether a signal has ended the command.
fn is_interruption(error: &(dyn Error + 'static)) -> bool {
    error.is::<Interrupted>()
        || matches!(error.downcast_ref(), Some(JobError::Interrupted(Interrupted)))
}

/// An action that failed. Why is its source: an error of the host keeps its own type up to
/// [`error_line`], which knows how to say it.
#[derive(Debug, thiserror::Error)]
#[error("{action}")]
struct Failed {
    /// What could not be done, to what.
    action: String,
    /// Why.
    source: Box<dyn Error>,
}

/// Says which action an error is about.
fn failed<E: Into<Box<dyn Error>>>(action: impl Into<String>) -> impl FnOnce(E) -> Box<dyn Error> {
    move |source| Box::new(Failed { action: action.into(), source: source.into() })
}

/// The line that reports `error`: the program, then what went wrong, then why, as far as known.
#[must_use]
pub fn error_line(program: &str, error: &(dyn Error + 'static)) -> String {
    output::printable(&format!("{program}: {}", causes(error)))
}

/// What went wrong, then why, as far as known.
fn causes(error: &(dyn Error + 'static)) -> String {
    let mut texts = vec![host_text(error)];
    let mut next = error.source();
    while let Some(error) = next {
        let text = host_text(error);
        // An error that only passes on another one says the same again.
        if texts.last() != Some(&text) {
            texts.push(text);
        }
        next = error.source();
    }
    texts.join(": ")
}

/// What an error says, without the number that the standard library puts behind the host's words.
fn host_text(error: &(dyn Error + 'static)) -> String {
    let text = error.to_string();
    match error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
        Some(code) => text.trim_end_matches(&format!(" (os error {code})")).to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An error with a cause.
    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Layer(&'static str, #[source] Option<Box<dyn Error>>);

    #[test]
    fn an_action_that_failed_is_followed_by_the_hosts_words_alone() {
        let host = io::Error::from_raw_os_error(2);
        assert_eq!(
            error_line("addcowd", failed("cannot listen on 'a'")(host).as_ref()),
            "addcowd: cannot listen on 'a': No such file or directory"
        );
        assert_eq!(
            error_line("addcowd", failed("cannot listen on 'a'")("it is in use").as_ref()),
            "addcowd: cannot listen on 'a': it is in use"
        );
    }

    #[test]
    fn causes_are_joined_on_one_line_and_never_repeated() {
        let host = io::Error::from_raw_os_error(2);
        let inner = Layer("cannot open 'a\nb'", Some(Box::new(host)));
        let same = Layer("cannot open 'a\nb'", Some(Box::new(inner)));
        assert_eq!(
            error_line("addcow", &same),
            r"addcow: cannot open 'a\nb': No such file or directory"
        );
    }
}
