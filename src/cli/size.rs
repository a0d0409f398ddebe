//! Sizes as people write them: `8G`, `1.5k`, `0x1000`, `512b`.
//!
//! The suffixes are those of qemu-img, powers of 1024, in either case.
//! Computed in integers: what is written exactly is exact, and what does not fit is an error, never
//! a smaller number.
//!
//! Not here: what a size is for and which sizes are legal there.

/// The suffixes and the power of 2 that each stands for.
const SUFFIXES: [(char, u32); 7] =
    [('B', 0), ('K', 10), ('M', 20), ('G', 30), ('T', 40), ('P', 50), ('E', 60)];

/// The most digits behind the point: `10^MAX_FRACTION_DIGITS << 60` fits in 128 bits.
const MAX_FRACTION_DIGITS: usize = 18;

/// Why a text is no size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// It is not written like one.
    #[error(
        "invalid size '{0}': expected a number such as 4096, 0x1000 or 1.5G, \
         with one of the suffixes b, k, M, G, T, P, E or none (bytes)"
    )]
    Syntax(String),
    /// It is less than nothing.
    #[error("invalid size '{0}': must not be negative")]
    Negative(String),
    /// It does not fit in 64 bits.
    #[error("invalid size '{0}': larger than the largest possible file")]
    TooLarge(String),
    /// It is no whole number of bytes by its own unit.
    #[error("invalid size '{0}': a fraction of a byte")]
    Fraction(String),
}

impl SizeError {
    /// The same about `text`, of which what was parsed is a part.
    #[must_use]
    pub fn about(self, text: &str) -> Self {
        let text = text.to_owned();
        match self {
            Self::Syntax(_) => Self::Syntax(text),
            Self::Negative(_) => Self::Negative(text),
            Self::TooLarge(_) => Self::TooLarge(text),
            Self::Fraction(_) => Self::Fraction(text),
        }
    }
}

/// The bytes that `text` stands for.
///
/// A fraction that is no whole number of bytes is rounded down: `0.1G` is 107374182.
///
/// # Errors
/// See [`SizeError`].
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let syntax = || SizeError::Syntax(text.to_owned());
    let too_large = || SizeError::TooLarge(text.to_owned());
    if let Some(digits) = text.strip_prefix('-') {
        let number = digits.starts_with(|c: char| c.is_ascii_digit());
        return Err(if number { SizeError::Negative(text.to_owned()) } else { syntax() });
    }
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        // Without suffix: b and E are digits here.
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(syntax());
        }
        return u64::from_str_radix(digits, 16).map_err(|_| too_large());
    }
    let (number, shift) = SUFFIXES
        .iter()
        .find_map(|&(suffix, shift)| {
            let either = [suffix, suffix.to_ascii_lowercase()];
            Some((text.strip_suffix(either)?, shift))
        })
        .unwrap_or((text, 0));
    let (whole, fraction) = number.split_once('.').map_or((number, None), |(a, b)| (a, Some(b)));
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    if !is_number(whole) || !fraction.is_none_or(is_number) {
        return Err(syntax());
    }
    // Only digits are left, so all that can go wrong is the length.
    let whole: u64 = whole.parse().map_err(|_| too_large())?;
    let part = fraction.map_or(Ok(0), |digits| fraction_of(digits, shift).ok_or_else(syntax))?;
    if shift == 0 && fraction.is_some() {
        return Err(SizeError::Fraction(text.to_owned()));
    }
    let bytes = (u128::from(whole) << shift) + part;
    u64::try_from(bytes).map_err(|_| too_large())
}

/// `0.digits` times `2^shift`, rounded down; `None` for more digits than anybody means.
fn fraction_of(digits: &str, shift: u32) -> Option<u128> {
    if digits.len() > MAX_FRACTION_DIGITS {
        return None;
    }
    let value: u128 = digits.parse().ok()?;
    let scale = 10_u128.checked_pow(u32::try_from(digits.len()).ok()?)?;
    Some((value << shift) / scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_powers_of_1024() {
        let rows = [
            ("0", 0),
            ("512", 512),
            ("512b", 512),
            ("512B", 512),
            ("1k", 1 << 10),
            ("1K", 1 << 10),
            ("64M", 64 << 20),
            ("64m", 64 << 20),
            ("1e", 1 << 60),
            ("8G", 8 << 30),
            ("2T", 2 << 40),
            ("3P", 3 << 50),
            ("7E", 7 << 60),
            ("15E", 15 << 60),
            ("0x10", 16),
            ("0X1f", 31),
            ("0x1E", 30),
            ("0x7fffffffffffffff", i64::MAX.cast_unsigned()),
            ("18446744073709551615", u64::MAX),
            ("007", 7),
        ];
        for (text, bytes) in rows {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn fractions_are_exact_where_they_can_be_and_rounded_down_where_not() {
        let rows = [
            ("1.5G", 3 << 29),
            ("0.5k", 512),
            ("1.0M", 1 << 20),
            ("0.1G", 107_374_182),
            ("15.999999999999999999E", u64::MAX - 1),
            ("0.000000000000000001E", 1),
        ];
        for (text, bytes) in rows {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        assert_eq!(parse("1.5"), Err(SizeError::Fraction("1.5".into())));
        assert_eq!(parse("1.5b"), Err(SizeError::Fraction("1.5b".into())));
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        for text in
            ["16E", "18446744073709551616", "99999999999999999999999", "0x10000000000000000", "20E"]
        {
            assert_eq!(parse(text), Err(SizeError::TooLarge(text.into())), "{text}");
        }
    }

    #[test]
    fn garbage_is_an_error() {
        for text in [
            "",
            " ",
            "G",
            "b",
            "1 G",
            " 1",
            "1 ",
            "1KB",
            "1KiB",
            "1e9",
            "+1",
            "1_000",
            "1,5G",
            "1.G",
            ".5G",
            "1.2.3",
            "0x",
            "0x1k",
            "0xg",
            "0x-1",
            "1.0000000000000000000G",
            "-",
            "-x",
            "1x",
            "\u{661}",
        ] {
            assert_eq!(parse(text), Err(SizeError::Syntax(text.into())), "{text:?}");
        }
        for text in ["-1", "-5G", "-0", "-1.5k"] {
            assert_eq!(parse(text), Err(SizeError::Negative(text.into())), "{text}");
        }
    }
}
