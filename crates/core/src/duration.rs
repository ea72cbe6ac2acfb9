//! Durations in Go's syntax: `300ms`, `1.5h`, `2h45m`, `0`; and Go's canonical echo (`5m` comes back `5m0s`).
//!
//! Values are signed nanoseconds of 64 bits, as in Go: at most about 292 years either way. The grammar has a
//! sign; callers that cannot use a negative duration say so themselves with [`parse_positive`].

use std::time::Duration;

use crate::InvalidValue;

const NANOSECOND: u64 = 1;
const MICROSECOND: u64 = 1_000;
const MILLISECOND: u64 = 1_000_000;
const SECOND: u64 = 1_000_000_000;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;

/// Longest text that is looked at.
const MAX_TEXT: usize = 128;

/// Reads a duration in nanoseconds, sign included.
///
/// # Errors
/// `invalid_duration` when it is not Go's syntax or does not fit; callers put the code of their own field.
pub fn parse(text: &str) -> Result<i64, InvalidValue> {
    let refuse = || {
        let shown: String = text.chars().take(40).collect();
        InvalidValue::new(
            "invalid_duration",
            format!("{shown:?} is not a duration such as 30s, 5m or 1h30m"),
        )
    };
    if text.len() > MAX_TEXT {
        return Err(refuse());
    }
    let (negative, mut rest) = match text.as_bytes().first() {
        Some(b'-') => (true, &text[1..]),
        Some(b'+') => (false, &text[1..]),
        _ => (false, text),
    };
    if rest == "0" {
        return Ok(0);
    }
    if rest.is_empty() {
        return Err(refuse());
    }
    let mut total: u64 = 0;
    while !rest.is_empty() {
        let (value, remaining) = component(rest).ok_or_else(refuse)?;
        total = total
            .checked_add(value)
            .filter(|total| *total <= 1 << 63)
            .ok_or_else(refuse)?;
        rest = remaining;
    }
    if negative {
        // -2⁶³ is a value, +2⁶³ is not.
        Ok(0i64.wrapping_sub_unsigned(total))
    } else {
        i64::try_from(total).map_err(|_| refuse())
    }
}

/// One `number unit` at the start of `text`, in nanoseconds, and what follows it.
fn component(text: &str) -> Option<(u64, &str)> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (whole, mut rest) = text.split_at(digits);
    let mut fraction = "";
    if let Some(after) = rest.strip_prefix('.') {
        let digits = after.bytes().take_while(u8::is_ascii_digit).count();
        (fraction, rest) = after.split_at(digits);
    }
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let unit_length = rest
        .find(|c: char| c == '.' || c.is_ascii_digit())
        .unwrap_or(rest.len());
    let (unit, rest) = rest.split_at(unit_length);
    let unit = match unit {
        "ns" => NANOSECOND,
        // U+00B5 micro sign and U+03BC Greek letter mu, both of which Go reads.
        "us" | "\u{b5}s" | "\u{3bc}s" => MICROSECOND,
        "ms" => MILLISECOND,
        "s" => SECOND,
        "m" => MINUTE,
        "h" => HOUR,
        _ => return None,
    };
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let mut value = whole.checked_mul(unit)?;
    // Digits beyond the eighteenth are below a nanosecond for every unit.
    let mut scale = u128::from(unit);
    let mut numerator: u128 = 0;
    let mut denominator: u128 = 1;
    for digit in fraction.bytes().take(18) {
        numerator = numerator * 10 + u128::from(digit - b'0');
        denominator *= 10;
    }
    scale *= numerator;
    value = value.checked_add(u64::try_from(scale / denominator).ok()?)?;
    Some((value, rest))
}

/// Reads a duration that must not be negative.
///
/// # Errors
/// `invalid_duration` as for [`parse`], or when negative.
pub fn parse_non_negative(text: &str) -> Result<Duration, InvalidValue> {
    let nanoseconds = parse(text)?;
    u64::try_from(nanoseconds)
        .map(Duration::from_nanos)
        .map_err(|_| InvalidValue::new("invalid_duration", "the duration must not be negative"))
}

/// Reads a duration that must be greater than zero.
///
/// # Errors
/// `invalid_duration` as for [`parse`], or when zero or negative.
pub fn parse_positive(text: &str) -> Result<Duration, InvalidValue> {
    let duration = parse_non_negative(text)?;
    if duration.is_zero() {
        return Err(InvalidValue::new(
            "invalid_duration",
            "the duration must be greater than zero",
        ));
    }
    Ok(duration)
}

/// Writes a duration in Go's canonical form: `0s`, `1.5s`, `300ms`, `5m0s`, `2h45m0s`.
#[must_use]
pub fn format(duration: Duration) -> String {
    format_nanoseconds(i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX))
}

/// Writes signed nanoseconds in Go's canonical form.
#[must_use]
pub fn format_nanoseconds(nanoseconds: i64) -> String {
    let magnitude = nanoseconds.unsigned_abs();
    let sign = if nanoseconds < 0 { "-" } else { "" };
    if magnitude == 0 {
        return "0s".to_owned();
    }
    if magnitude < SECOND {
        let (unit, name) = if magnitude < MICROSECOND {
            (NANOSECOND, "ns")
        } else if magnitude < MILLISECOND {
            (MICROSECOND, "\u{b5}s")
        } else {
            (MILLISECOND, "ms")
        };
        return format!("{sign}{}{name}", decimal(magnitude, unit));
    }
    let seconds = decimal(magnitude % MINUTE, SECOND);
    let minutes = magnitude / MINUTE;
    if minutes == 0 {
        format!("{sign}{seconds}s")
    } else if minutes < 60 {
        format!("{sign}{minutes}m{seconds}s")
    } else {
        format!("{sign}{}h{}m{seconds}s", minutes / 60, minutes % 60)
    }
}

/// `value / unit` exactly, without trailing zeros. `unit` is a power of ten.
fn decimal(value: u64, unit: u64) -> String {
    let (whole, part) = (value / unit, value % unit);
    if part == 0 {
        return whole.to_string();
    }
    let digits = unit.ilog10() as usize;
    let fraction = format!("{part:0digits$}");
    format!("{whole}.{}", fraction.trim_end_matches('0'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn table() {
        for (text, nanoseconds, echo) in [
            ("0", 0i64, "0s"),
            ("0s", 0, "0s"),
            ("+0", 0, "0s"),
            ("-0", 0, "0s"),
            ("5m", 300_000_000_000, "5m0s"),
            ("300ms", 300_000_000, "300ms"),
            ("1.5h", 5_400_000_000_000, "1h30m0s"),
            ("2h45m", 9_900_000_000_000, "2h45m0s"),
            ("1.5s", 1_500_000_000, "1.5s"),
            (".5s", 500_000_000, "500ms"),
            ("1.s", 1_000_000_000, "1s"),
            ("10us", 10_000, "10µs"),
            ("10µs", 10_000, "10µs"),
            ("10μs", 10_000, "10µs"),
            ("1ns", 1, "1ns"),
            ("1.1us", 1_100, "1.1µs"),
            ("-1.5s", -1_500_000_000, "-1.5s"),
            ("1s500ms", 1_500_000_000, "1.5s"),
            ("90s", 90_000_000_000, "1m30s"),
            ("8760h", 31_536_000_000_000_000, "8760h0m0s"),
            ("9223372036854775807ns", i64::MAX, "2562047h47m16.854775807s"),
            ("-9223372036854775808ns", i64::MIN, "-2562047h47m16.854775808s"),
            ("0.100000000000000000000h", 360_000_000_000, "6m0s"),
        ] {
            assert_eq!(parse(text), Ok(nanoseconds), "{text}");
            assert_eq!(format_nanoseconds(nanoseconds), echo, "{text}");
        }
        for text in [
            "",
            "-",
            "+",
            "1",
            "3",
            "s",
            ".s",
            "1.",
            "1d",
            "1 s",
            "1h ",
            "--1s",
            "1sm",
            "9223372036854775808ns",
            "3000000h",
            "1S",
            "１s",
            "1e3s",
        ] {
            assert_eq!(parse(text).unwrap_err().code, "invalid_duration", "{text:?}");
        }
        assert!(parse(&"1s".repeat(100)).is_err());
        assert!(parse_positive("0s").is_err());
        assert!(parse_non_negative("-1s").is_err());
        assert_eq!(parse_positive("1m"), Ok(Duration::from_secs(60)));
    }

    proptest! {
        #[test]
        fn the_echo_reads_back_as_itself(nanoseconds: i64) {
            let echo = format_nanoseconds(nanoseconds);
            prop_assert_eq!(parse(&echo), Ok(nanoseconds));
        }

        #[test]
        fn never_panics(text in ".{0,40}") {
            let _ = parse(&text);
        }
    }
}
