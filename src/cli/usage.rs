//! What is wrong with a command line, in one line of our own words.
//!
//! The parser explains itself over several lines and calls everything an argument. Here it is one
//! line that names the option or verb, what was probably meant, and where to read on.
//!
//! Not here: values that are well-formed and still impossible; each verb checks its own.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Command, Error};

use super::size::SizeError;

/// The line for `error`, which `command` found in `arguments` (the program's name first).
pub fn line(command: &Command, arguments: &[OsString], error: &Error) -> String {
    let hidden = hidden_option(command, arguments, error);
    let error = hidden.as_ref().unwrap_or(error);
    let what = negative_size(arguments, error).unwrap_or_else(|| what(error));
    let mut help = command.get_name().to_owned();
    if let Some(verb) = verb_of(command, arguments) {
        help = format!("{help} {verb}");
    }
    format!("{what} (see {help} --help)")
}

/// The verb that was given, if there is one of that name.
fn verb_of<'a>(command: &Command, arguments: &'a [OsString]) -> Option<&'a str> {
    let mut words = arguments.iter().skip(1).filter_map(|argument| argument.to_str());
    let verb = words.find(|word| !word.starts_with('-'))?;
    command.find_subcommand(verb).map(|_| verb)
}

/// The error about an option that does not exist, where it was taken for a value that may start
/// with a dash, such as a relative size, and the value was then one too many.
fn hidden_option(command: &Command, arguments: &[OsString], error: &Error) -> Option<Error> {
    let is_option = |error: &Error, yes| {
        let blamed = text(error, ContextKind::InvalidArg).unwrap_or_default();
        error.kind() == ErrorKind::UnknownArgument && blamed.starts_with("--") == yes
    };
    if !is_option(error, false) {
        return None;
    }
    let strict = |verb: Command| verb.mut_args(|argument| argument.allow_hyphen_values(false));
    let strict = command.clone().mut_subcommands(strict);
    strict.try_get_matches_from(arguments).err().filter(|error| is_option(error, true))
}

/// What to say where a negative size was taken for an option.
fn negative_size(arguments: &[OsString], error: &Error) -> Option<String> {
    let is_number = |text: &&str| {
        text.strip_prefix('-').is_some_and(|n| n.starts_with(|c: char| c.is_ascii_digit()))
    };
    let blamed = match error.kind() {
        ErrorKind::UnknownArgument => text(error, ContextKind::InvalidArg)?,
        // An option whose value starts with a dash seems to have none.
        ErrorKind::InvalidValue if text(error, ContextKind::InvalidValue)?.is_empty() => "-0",
        _ => return None,
    };
    // The parser names only the first letter of what it took for a group of short options.
    let size = arguments.iter().filter_map(|argument| argument.to_str()).find(is_number)?;
    is_number(&blamed).then(|| SizeError::Negative(size.to_owned()).to_string())
}

/// What is wrong.
fn what(error: &Error) -> String {
    let argument = text(error, ContextKind::InvalidArg).unwrap_or_default();
    match error.kind() {
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => "nothing to do".to_owned(),
        ErrorKind::InvalidSubcommand => {
            let verb = text(error, ContextKind::InvalidSubcommand).unwrap_or_default();
            format!("unknown verb '{verb}'{}", meant(error, ContextKind::SuggestedSubcommand))
        }
        ErrorKind::UnknownArgument if argument.starts_with('-') => {
            format!("unknown option '{argument}'{}", meant(error, ContextKind::SuggestedArg))
        }
        ErrorKind::UnknownArgument => format!("unexpected argument '{argument}'"),
        ErrorKind::MissingRequiredArgument => {
            format!("missing: {}", texts(error, ContextKind::InvalidArg).join(", "))
        }
        ErrorKind::ArgumentConflict => match texts(error, ContextKind::PriorArg).as_slice() {
            [] => parsers_words(error),
            [prior] if *prior == argument => format!("'{argument}' is given twice"),
            priors => format!("'{argument}' cannot be used with '{}'", priors.join("' or '")),
        },
        ErrorKind::InvalidValue => invalid_value(error, argument),
        _ => parsers_words(error),
    }
}

/// What to say about a value that is none of those allowed.
fn invalid_value(error: &Error, argument: &str) -> String {
    let value = text(error, ContextKind::InvalidValue).unwrap_or_default();
    let allowed = texts(error, ContextKind::ValidValue);
    let allowed = match allowed.split_last() {
        None => String::new(),
        Some((only, [])) => format!(": expected {only}"),
        Some((last, others)) => format!(": expected {} or {last}", others.join(", ")),
    };
    if value.is_empty() {
        format!("'{argument}' needs a value{allowed}")
    } else {
        format!("invalid value '{value}' for '{argument}'{allowed}")
    }
}

/// What was probably meant, if anything is near enough.
fn meant(error: &Error, kind: ContextKind) -> String {
    let names = texts(error, kind);
    if names.is_empty() {
        String::new()
    } else {
        format!(": did you mean '{}'?", names.join("' or '"))
    }
}

/// The parser's own words, as far as they say what is wrong.
fn parsers_words(error: &Error) -> String {
    let text = error.to_string();
    let body = text.trim_start().strip_prefix("error: ").unwrap_or(&text);
    let end = ["\n\nUsage:", "\n\nFor more information"]
        .iter()
        .filter_map(|mark| body.find(mark))
        .min()
        .unwrap_or(body.len());
    let (body, _) = body.split_at(end);
    body.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A piece of the error that is one text.
fn text(error: &Error, kind: ContextKind) -> Option<&str> {
    match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text),
        _ => None,
    }
}

/// A piece of the error that is one text or several.
fn texts(error: &Error, kind: ContextKind) -> Vec<&str> {
    match error.get(kind) {
        Some(ContextValue::String(text)) => vec![text],
        Some(ContextValue::Strings(texts)) => texts.iter().map(String::as_str).collect(),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Arg, ArgAction, value_parser};

    /// What is said about a command line.
    fn said(words: &[&str]) -> String {
        let flag = |name| Arg::new(name).long(name).action(ArgAction::SetTrue);
        let output = Arg::new("output").long("output").value_name("FORM");
        let verb = Command::new("make")
            .arg(flag("force"))
            .arg(flag("quiet").short('q').conflicts_with("force"))
            .arg(output.value_parser(["human", "json"]))
            .arg(Arg::new("number").short('n').value_name("N").value_parser(value_parser!(u8)))
            .arg(Arg::new("disk").value_name("DISK").required(true));
        let signed = Arg::new("size").value_name("SIZE").required(true);
        let size = Command::new("size").arg(flag("force")).arg(signed.allow_hyphen_values(true));
        let command = Command::new("prog").subcommands([verb, size]).subcommand_required(true);
        let arguments: Vec<OsString> = words.iter().map(OsString::from).collect();
        let error = command.clone().try_get_matches_from(&arguments).unwrap_err();
        line(&command, &arguments, &error)
    }

    #[test]
    fn unknown_words_are_named_with_what_was_probably_meant() {
        let rows: [(&[&str], &str); 7] = [
            (&["prog", "mak"], "unknown verb 'mak': did you mean 'make'? (see prog --help)"),
            (&["prog", "frobnicate"], "unknown verb 'frobnicate' (see prog --help)"),
            (
                &["prog", "make", "--forse", "d"],
                "unknown option '--forse': did you mean '--force'? (see prog make --help)",
            ),
            (&["prog", "make", "-x", "d"], "unknown option '-x' (see prog make --help)"),
            (&["prog", "make", "d", "e"], "unexpected argument 'e' (see prog make --help)"),
            (
                &["prog", "size", "--forse", "-1"],
                "unknown option '--forse': did you mean '--force'? (see prog size --help)",
            ),
            (&["prog", "--make"], "unknown option '--make' (see prog --help)"),
        ];
        for (words, expected) in rows {
            assert_eq!(said(words), expected, "{words:?}");
        }
    }

    #[test]
    fn what_is_missing_or_too_much_or_no_choice_is_named() {
        let rows: [(&[&str], &str); 7] = [
            (&["prog", "make"], "missing: <DISK> (see prog make --help)"),
            (
                &["prog", "make", "--force", "--force", "d"],
                "'--force' is given twice (see prog make --help)",
            ),
            (
                &["prog", "make", "-q", "--force", "d"],
                "'--quiet' cannot be used with '--force' (see prog make --help)",
            ),
            (
                &["prog", "make", "--output", "xml", "d"],
                "invalid value 'xml' for '--output <FORM>': expected human or json \
                 (see prog make --help)",
            ),
            (
                &["prog", "make", "d", "--output"],
                "'--output <FORM>' needs a value: expected human or json (see prog make --help)",
            ),
            (
                &["prog", "make", "-n", "999", "d"],
                "invalid value '999' for '-n <N>': 999 is not in 0..=255 (see prog make --help)",
            ),
            (
                &["prog", "make", "-n", "-1k", "d"],
                "invalid size '-1k': must not be negative (see prog make --help)",
            ),
        ];
        for (words, expected) in rows {
            assert_eq!(said(words), expected, "{words:?}");
        }
    }

    #[test]
    fn a_negative_size_is_called_that() {
        assert_eq!(
            said(&["prog", "make", "d", "-1.5G"]),
            "invalid size '-1.5G': must not be negative (see prog make --help)"
        );
    }
}
