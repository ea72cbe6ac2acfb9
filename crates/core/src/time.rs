//! Points in time: RFC 3339 in, UTC with up to nanoseconds out.

use jiff::Timestamp;

use crate::InvalidValue;

/// Reads an RFC 3339 time.
///
/// # Errors
/// `invalid_request` when it is not one; callers put the code of their own field in its place.
pub fn parse(text: &str) -> Result<Timestamp, InvalidValue> {
    // `Timestamp` also reads forms that RFC 3339 does not have (no seconds, named zones in brackets).
    let strict = text.len() <= 64
        && text.len() >= 20
        && text
            .as_bytes()
            .get(10)
            .is_some_and(|byte| matches!(byte, b'T' | b't' | b' '))
        && text.as_bytes().get(16) == Some(&b':')
        && !text.contains('[');
    strict.then(|| text.parse().ok()).flatten().ok_or_else(|| {
        InvalidValue::new(
            "invalid_request",
            "a time must be RFC 3339, such as 2026-01-31T12:00:00Z",
        )
    })
}

/// Writes a time as RFC 3339 in UTC.
#[must_use]
pub fn format(time: Timestamp) -> String {
    time.to_string()
}

/// Whole milliseconds from `earlier` to `later`; 0 when the clock went backwards.
#[must_use]
pub fn milliseconds_between(earlier: Timestamp, later: Timestamp) -> u64 {
    let nanoseconds = later.as_nanosecond() - earlier.as_nanosecond();
    u64::try_from(nanoseconds / 1_000_000).unwrap_or(0)
}

/// `time + duration` in nanoseconds; `None` beyond what a timestamp can hold.
#[must_use]
pub fn checked_add(time: Timestamp, duration: std::time::Duration) -> Option<Timestamp> {
    let sum = time
        .as_nanosecond()
        .checked_add(i128::try_from(duration.as_nanos()).ok()?)?;
    Timestamp::from_nanosecond(sum).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc_3339_only() {
        for (text, echo) in [
            ("2026-01-31T12:00:00Z", "2026-01-31T12:00:00Z"),
            ("2026-01-31T12:00:00.123456789Z", "2026-01-31T12:00:00.123456789Z"),
            ("2026-01-31T12:00:00+02:00", "2026-01-31T10:00:00Z"),
        ] {
            assert_eq!(format(parse(text).unwrap()), echo);
        }
        for text in [
            "",
            "tomorrow",
            "2026-01-31",
            "2026-01-31T12:00Z",
            "2026-01-31T12:00:00",
            "2026-13-31T12:00:00Z",
            "1769860800",
            "2026-01-31T12:00:00+02:00[Europe/Berlin]",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn arithmetic_is_total() {
        let time = parse("2026-01-31T12:00:00Z").unwrap();
        let later = checked_add(time, std::time::Duration::from_millis(1500)).unwrap();
        assert_eq!(milliseconds_between(time, later), 1500);
        assert_eq!(milliseconds_between(later, time), 0);
        assert_eq!(checked_add(time, std::time::Duration::MAX), None);
    }
}
