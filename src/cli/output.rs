//! How results are shown: in words or as JSON, sizes, and text that came out of a file.
//!
//! Promises: what came out of a file name or an image reaches a terminal only as printable text.
//!
//! Not here: which facts there are to show.

use std::error::Error;
use std::io::{self, BufWriter, Write};

use clap::ValueEnum;
use serde::Serialize;
use serde_json::ser::{PrettyFormatter, Serializer};

/// The way in which a verb shows what it found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Words, for people.
    Human,
    /// JSON, for programs; its keys are those of qemu-img where it has them.
    Json,
}

/// Standard output did not take a result.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the result")]
pub struct WriteError(#[source] io::Error);

/// Whether standard output has lost its reader.
#[must_use]
pub fn is_broken_pipe(error: &(dyn Error + 'static)) -> bool {
    let error = error.downcast_ref::<WriteError>();
    error.is_some_and(|WriteError(error)| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Prints a result. A bare [`io::Error`] of `write` is taken for one of standard output.
///
/// # Errors
/// [`WriteError`], or what else `write` returned.
pub fn print(
    write: impl FnOnce(&mut dyn Write) -> Result<(), Box<dyn Error>>,
) -> Result<(), Box<dyn Error>> {
    let mut out = BufWriter::new(io::stdout().lock());
    let result = write(&mut out).and_then(|()| Ok(out.flush()?));
    result.map_err(|error| match error.downcast::<io::Error>() {
        Ok(error) => Box::new(WriteError(*error)),
        Err(error) => error,
    })
}

/// `text` with control characters written as escapes, so that it stays on its line and does
/// nothing to a terminal.
#[must_use]
pub fn printable(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            result.extend(c.escape_default());
        } else {
            result.push(c);
        }
    }
    result
}

/// `bytes` with up to three digits, in the smallest unit that needs no more before the point:
/// `8 GiB`, `1.5 MiB`, `196 KiB`, `512 B`.
#[must_use]
pub fn human_size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    // `bytes` in a unit, with so many decimals and no point: 2^64 * 1000 fits in 128 bits. Rounded
    // once, from the exact number.
    let rounded = |unit: usize, decimals: u32| {
        let one = 1_u128 << (10 * unit);
        (u128::from(bytes) * 10_u128.pow(decimals) + one / 2) / one
    };
    // 1000 to 1023 of a unit have four digits: the next unit shows them with three.
    let unit = (0..UNITS.len() - 1).find(|&unit| rounded(unit, 0) < 1000);
    let unit = unit.unwrap_or(UNITS.len() - 1);
    let decimals = (1..=3).rev().find(|&decimals| rounded(unit, decimals) < 1000).unwrap_or(0);
    let thousandths = rounded(unit, decimals) * 10_u128.pow(3 - decimals);
    let text = format!("{}.{:03}", thousandths / 1000, thousandths % 1000);
    let text = text.trim_end_matches('0').trim_end_matches('.');
    format!("{text} {}", UNITS[unit])
}

/// A part of a total in percent with two decimals, rounded down.
#[must_use]
pub fn percent(part: u64, total: u64) -> String {
    let hundredths = u128::from(part) * 10_000 / u128::from(total.max(1));
    format!("{}.{:02}%", hundredths / 100, hundredths % 100)
}

/// Writes `value` as JSON over several lines, indented by four blanks as qemu-img does.
///
/// # Errors
/// What the writer said.
pub fn write_json(out: &mut dyn Write, value: &impl Serialize) -> io::Result<()> {
    let mut serializer =
        Serializer::with_formatter(&mut *out, PrettyFormatter::with_indent(b"    "));
    value.serialize(&mut serializer)?;
    writeln!(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits_and_the_largest_unit_that_fits() {
        let rows = [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (196 << 10, "196 KiB"),
            (999 << 10, "999 KiB"),
            (1000 << 10, "0.977 MiB"),
            ((8 << 30) + 512, "8 GiB"),
            (12_345_678, "11.8 MiB"),
            (1_536_000, "1.46 MiB"),
            (u64::MAX, "16 EiB"),
        ];
        for (bytes, text) in rows {
            assert_eq!(human_size(bytes), text, "{bytes}");
        }
    }

    #[test]
    fn control_characters_are_escaped_and_nothing_else() {
        assert_eq!(
            printable("a\nb\u{1b}[31m\u{9b} 'd' \u{e4}"),
            "a\\nb\\u{1b}[31m\\u{9b} 'd' \u{e4}"
        );
    }
}
