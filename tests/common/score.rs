//! The figures that a suite ends with, for people and for `scripts/scorecard`.
//!
//! A figure is one line, `scorecard: NAME key=value key=value`. It goes to the standard output,
//! also while the harness keeps what tests print for itself, and into the file that
//! `ADDCOW_SCORECARD` names, if it names one. Lines of several threads and processes do not mix:
//! each is one write at the end of the file.
//!
//! Uses nothing else of `common`, so that a test without the front end can take it alone:
//! `#[path = "common/score.rs"] mod score;`. Not here: what the figures should be; a suite asserts
//! that itself, and `scripts/scorecard` has the targets.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{Write as _, stdout};

/// Prints the figures of the suite `name`: one word, like the keys.
pub fn score(name: &str, figures: &[(&str, u64)]) {
    let is_word = |text: &str| !text.is_empty() && !text.contains([' ', '=', '\n']);
    assert!(is_word(name) && figures.iter().all(|(key, _)| is_word(key)), "{name}: {figures:?}");
    let mut line = format!("scorecard: {name}");
    for (key, value) in figures {
        write!(line, " {key}={value}").expect("a string takes everything");
    }
    line.push('\n');
    // Past the harness, which has a hold on `print!` only.
    stdout().write_all(line.as_bytes()).expect("a standard output");
    let Some(path) = std::env::var_os("ADDCOW_SCORECARD") else { return };
    let file = File::options().append(true).create(true).open(&path);
    let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
    written.unwrap_or_else(|error| panic!("ADDCOW_SCORECARD={}: {error}", path.display()));
}
