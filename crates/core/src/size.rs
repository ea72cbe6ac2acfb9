//! Sizes in bytes: `1GB`, `512 MiB`, `1024`. Powers of 1024, whole numbers, no sign.
//!
//! The echo is the contract's: one decimal, and a unit only once the value is **strictly greater** than it,
//! so 1 GiB is written `1024.0 MB`. Values of whole kilobytes below that survive a round trip; larger ones
//! lose what one decimal cannot show.

use crate::InvalidValue;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
const PIB: u64 = 1 << 50;
const EIB: u64 = 1 << 60;

/// Longest text that is looked at.
const MAX_TEXT: usize = 64;

/// Reads a size in bytes.
///
/// # Errors
/// `invalid_size` when the text is not a whole number with an optional unit, names bits (`Kb`, `Mb`, …), or
/// exceeds 64 bits.
///
/// ```
/// assert_eq!(hypeman_core::size::parse("2GB").unwrap(), 2 << 30);
/// ```
pub fn parse(text: &str) -> Result<u64, InvalidValue> {
    let refuse = |why: &str| {
        let shown: String = text.chars().take(MAX_TEXT).collect();
        InvalidValue::new("invalid_size", format!("{shown:?} is not a size: {why}"))
    };
    if text.len() > MAX_TEXT {
        return Err(refuse("too long"));
    }
    let trimmed = text.trim_matches(' ');
    let digits = trimmed.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = trimmed.split_at(digits);
    if number.is_empty() {
        return Err(refuse("it must begin with a whole number, such as 512MB or 2GB"));
    }
    let number: u64 = number
        .parse()
        .map_err(|_| refuse("the number does not fit 64 bits"))?;
    let unit = unit.trim_start_matches(' ');
    if matches!(unit, "Kb" | "Mb" | "Gb" | "Tb" | "Pb" | "Eb") {
        return Err(refuse("that unit means bits; write KB, MB, GB, … for bytes"));
    }
    let factor = factor(unit)
        .ok_or_else(|| refuse("use a whole number and one of B, KB, MB, GB, TB, PB, EB (powers of 1024)"))?;
    number
        .checked_mul(factor)
        .ok_or_else(|| refuse("the value does not fit 64 bits"))
}

fn factor(unit: &str) -> Option<u64> {
    let unit = unit.to_ascii_lowercase();
    Some(match unit.as_str() {
        "" | "b" | "byte" | "bytes" => 1,
        "k" | "kb" | "kib" | "kilo" | "kilobyte" | "kilobytes" => KIB,
        "m" | "mb" | "mib" | "mega" | "megabyte" | "megabytes" => MIB,
        "g" | "gb" | "gib" | "giga" | "gigabyte" | "gigabytes" => GIB,
        "t" | "tb" | "tib" | "tera" | "terabyte" | "terabytes" => TIB,
        "p" | "pb" | "pib" | "peta" | "petabyte" | "petabytes" => PIB,
        "e" | "eb" | "eib" | "exa" | "exabyte" | "exabytes" => EIB,
        _ => return None,
    })
}

/// Writes a size the way the API echoes it: `0 B`, `1024 B`, `512.0 MB`, `1024.0 MB`, `2.0 GB`.
#[must_use]
pub fn format(bytes: u64) -> String {
    let units = [
        (EIB, "EB"),
        (PIB, "PB"),
        (TIB, "TB"),
        (GIB, "GB"),
        (MIB, "MB"),
        (KIB, "KB"),
    ];
    for (unit, name) in units {
        if bytes > unit {
            return format!("{} {name}", one_decimal(bytes, unit));
        }
    }
    format!("{bytes} B")
}

/// `bytes / unit` with one decimal, rounded half to even on the exact value, as `printf("%.1f")` does.
fn one_decimal(bytes: u64, unit: u64) -> String {
    let tenths = u128::from(bytes) * 10;
    let unit = u128::from(unit);
    let (mut quotient, remainder) = (tenths / unit, tenths % unit);
    if remainder * 2 > unit || (remainder * 2 == unit && quotient % 2 == 1) {
        quotient += 1;
    }
    format!("{}.{}", quotient / 10, quotient % 10)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn accepted() {
        for (text, bytes) in [
            ("0", 0),
            ("1", 1),
            ("1024", 1024),
            ("1B", 1),
            ("1 byte", 1),
            ("2bytes", 2),
            ("1k", KIB),
            ("1kB", KIB),
            ("1KB", KIB),
            ("1KiB", KIB),
            ("1 kilo", KIB),
            ("1 KiloByte", KIB),
            ("3kilobytes", 3 * KIB),
            ("1GB", GIB),
            ("1 GB", GIB),
            ("  1GB ", GIB),
            ("1G", GIB),
            ("1gb", GIB),
            ("512MB", 512 * MIB),
            ("512m", 512 * MIB),
            ("10GB", 10 * GIB),
            ("1TB", TIB),
            ("1PB", PIB),
            ("15eib", 15 * EIB),
            ("007", 7),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn refused() {
        for text in [
            "",
            " ",
            "GB",
            "-1",
            "+1",
            "1.5GB",
            "1,5GB",
            "1e3",
            "1Kb",
            "1Mb",
            "1Gb",
            "1Tb",
            "1Pb",
            "1Eb",
            "1XB",
            "1 G B",
            "16EB",
            "18446744073709551616",
            "0x10",
            "１",
            "1\tGB",
            "1GB/s",
            "one",
        ] {
            assert_eq!(parse(text).unwrap_err().code, "invalid_size", "{text:?}");
        }
        assert!(parse(&"1".repeat(1000)).is_err());
    }

    #[test]
    fn echo() {
        for (bytes, text) in [
            (0, "0 B"),
            (1, "1 B"),
            (KIB, "1024 B"),
            (KIB + 1, "1.0 KB"),
            (MIB, "1024.0 KB"),
            (512 * MIB, "512.0 MB"),
            (GIB, "1024.0 MB"),
            (2 * GIB, "2.0 GB"),
            (3 * GIB / 2, "1.5 GB"),
            (10 * GIB, "10.0 GB"),
            (125_000_000, "119.2 MB"),
            (TIB, "1024.0 GB"),
            (u64::MAX, "16.0 EB"),
        ] {
            assert_eq!(format(bytes), text);
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in ".{0,80}") {
            let _ = parse(&text);
        }

        #[test]
        fn bare_bytes_are_themselves(bytes: u64) {
            prop_assert_eq!(parse(&bytes.to_string()), Ok(bytes));
        }

        #[test]
        fn the_echo_agrees_with_floating_point(bytes in 0u64..1 << 52) {
            let echoed = format(bytes);
            for (unit, name) in [(PIB, "PB"), (TIB, "TB"), (GIB, "GB"), (MIB, "MB"), (KIB, "KB")] {
                if bytes > unit {
                    prop_assert_eq!(echoed, format!("{:.1} {name}", bytes as f64 / unit as f64));
                    return Ok(());
                }
            }
            prop_assert_eq!(echoed, format!("{bytes} B"));
        }
    }
}
