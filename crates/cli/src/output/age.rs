//! Times as people say them: `3 minutes ago`, `in 2 hours`.

use jiff::Timestamp;

/// How long ago (or ahead) an RFC 3339 time is, seen from `now`. Text that is no time is shown as it is.
pub fn age(time: &str, now: Timestamp) -> String {
    let Ok(then) = time.parse::<Timestamp>() else {
        return time.to_owned();
    };
    let seconds = now.as_second() - then.as_second();
    match seconds {
        0..=1 => "just now".to_owned(),
        2.. => format!("{} ago", span(seconds.unsigned_abs())),
        ..0 => format!("in {}", span(seconds.unsigned_abs())),
    }
}

/// A length of time in its largest whole unit.
pub fn span(seconds: u64) -> String {
    const UNITS: [(u64, &str); 6] = [
        (365 * 86_400, "year"),
        (30 * 86_400, "month"),
        (7 * 86_400, "week"),
        (86_400, "day"),
        (3_600, "hour"),
        (60, "minute"),
    ];
    let (count, unit) = UNITS
        .iter()
        // A unit is used from twice its length on, so that 90 minutes do not read as one hour.
        .find(|(length, _)| seconds >= 2 * length)
        .map_or((seconds, "second"), |(length, unit)| (seconds / length, *unit));
    format!("{count} {unit}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_read_naturally() {
        let now: Timestamp = "2026-09-01T12:00:00Z".parse().unwrap();
        let cases = [
            ("2026-09-01T12:00:00.5Z", "just now"),
            ("2026-09-01T11:59:59Z", "just now"),
            ("2026-09-01T11:59:01Z", "59 seconds ago"),
            ("2026-09-01T11:58:10Z", "110 seconds ago"),
            ("2026-09-01T11:10:00Z", "50 minutes ago"),
            ("2026-09-01T10:30:00+02:00", "3 hours ago"),
            ("2026-08-30T11:00:00Z", "2 days ago"),
            ("2026-08-01T00:00:00Z", "4 weeks ago"),
            ("2020-08-01T00:00:00Z", "6 years ago"),
            ("2026-09-01T14:30:00Z", "in 2 hours"),
            ("whenever", "whenever"),
        ];
        for (time, expected) in cases {
            assert_eq!(age(time, now), expected, "{time}");
        }
    }
}
