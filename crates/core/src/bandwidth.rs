//! Network bandwidth. Text ending in `bps` counts **bits** with decimal prefixes (`1Gbps` is 125 000 000 bytes
//! a second); everything else is a byte rate with binary prefixes (`125MB/s`).
//!
//! Case is not looked at, so `100MBps` is 100 megabit. That is the contract's, surprising as it is.

use crate::{InvalidValue, size};

/// Reads a bandwidth in bytes a second.
///
/// # Errors
/// `invalid_bandwidth` when it is neither of the two forms, or overflows. Callers put the code of their own
/// field in its place.
pub fn parse(text: &str) -> Result<u64, InvalidValue> {
    let refuse = |why: String| {
        InvalidValue::new(
            "invalid_bandwidth",
            format!("not a bandwidth such as 1Gbps or 125MB/s: {why}"),
        )
    };
    if text.len() > 64 {
        return Err(refuse("too long".to_owned()));
    }
    let lower = text.trim().to_ascii_lowercase();
    if let Some(bits) = lower.strip_suffix("bps") {
        return parse_bits(bits)
            .ok_or_else(|| refuse(format!("{text:?} is not a whole number of bits with k, m or g")));
    }
    let bare = lower.strip_suffix("/s").unwrap_or(&lower);
    let bare = bare.strip_suffix("ps").unwrap_or(bare);
    size::parse(bare).map_err(|error| refuse(error.message))
}

fn parse_bits(text: &str) -> Option<u64> {
    let (number, factor) = match text.as_bytes().last()? {
        b'k' => (&text[..text.len() - 1], 1_000),
        b'm' => (&text[..text.len() - 1], 1_000_000),
        b'g' => (&text[..text.len() - 1], 1_000_000_000),
        _ => (text, 1),
    };
    let number = number.trim_matches(' ');
    if number.is_empty() || !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let bits: u64 = number.parse().ok()?;
    bits.checked_mul(factor).map(|bits| bits / 8)
}

/// Writes a bandwidth the way the API echoes it; `None` for 0, which means unlimited and is left out.
#[must_use]
pub fn format(bytes_per_second: u64) -> Option<String> {
    crate::rate::format(bytes_per_second)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn table() {
        for (text, rate) in [
            ("1Gbps", 125_000_000),
            ("100Mbps", 12_500_000),
            ("100MBps", 12_500_000),
            ("8bps", 1),
            ("8 kbps", 1000),
            ("100MB/s", 104_857_600),
            ("125MB/s", 131_072_000),
            ("1gb", 1 << 30),
            (" 1Gbps ", 125_000_000),
            ("0", 0),
            ("7bps", 0),
        ] {
            assert_eq!(parse(text), Ok(rate), "{text}");
        }
        for text in [
            "",
            "bps",
            "gbps",
            "1.5Gbps",
            "-1Gbps",
            "1Tbps",
            "99999999999999999999bps",
            "18446744073709551615gbps",
            "fast",
            "+1mbps",
        ] {
            assert_eq!(parse(text).unwrap_err().code, "invalid_bandwidth", "{text}");
        }
        assert_eq!(format(125_000_000).as_deref(), Some("119.2 MB/s"));
        assert_eq!(format(0), None);
    }

    proptest! {
        #[test]
        fn never_panics(text in ".{0,80}") {
            let _ = parse(&text);
        }
    }
}
