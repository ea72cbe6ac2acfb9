//! Scheduled snapshots: when the next one is due, what it is called, and which old ones go.
//!
//! ```text
//!   set ──► now + interval + jitter ──► due ──► run ──► now + interval + jitter ──► …
//!            ▲                                   └─► after success: retention
//!            └── only a changed interval comes back here; a change of anything else keeps the next run
//! ```
//!
//! Invariants, held by the tests:
//! - After a run the next one lies at least one interval ahead: what was missed is not made up.
//! - None lies further ahead than an interval and its jitter, however the clock was set when it was planned.
//! - The jitter is the same for an instance at all times, so schedules that were set together drift apart.
//! - Retention names only snapshots that it was shown, oldest first, and never the newest for its number.

use std::time::Duration;

use jiff::Timestamp;

use crate::{InvalidValue, name, time};

/// Shortest time between two runs.
pub const MIN_INTERVAL: Duration = Duration::from_secs(60);

/// Prefix of the names when none is asked for.
pub const DEFAULT_PREFIX: &str = "scheduled";

/// No jitter is longer.
const MAX_JITTER: Duration = Duration::from_secs(300);

/// Which snapshots a schedule keeps. A rule that is `None` or zero is no rule.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retention {
    /// The newest so many.
    pub max_count: Option<u32>,
    /// Those that are no older.
    pub max_age: Option<Duration>,
}

impl Retention {
    fn count_rule(self) -> Option<usize> {
        self.max_count
            .filter(|count| *count > 0)
            .map(|count| usize::try_from(count).unwrap_or(usize::MAX))
    }

    fn age_rule(self) -> Option<Duration> {
        self.max_age.filter(|age| !age.is_zero())
    }
}

/// A snapshot that a schedule made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scheduled<'a> {
    /// Its id.
    pub id: &'a str,
    /// When it was made.
    pub created_at: Timestamp,
}

/// Checks a schedule.
///
/// # Errors
/// `invalid_request`: the interval is too short, nothing would ever be deleted, or the prefix is no prefix.
pub fn check(interval: Duration, retention: Retention, prefix: Option<&str>) -> Result<(), InvalidValue> {
    if interval < MIN_INTERVAL {
        return Err(
            InvalidValue::new("invalid_request", "interval must be at least a minute (1m)")
                .in_field("interval"),
        );
    }
    if retention.count_rule().is_none() && retention.age_rule().is_none() {
        return Err(InvalidValue::new(
            "invalid_request",
            "retention needs max_count or max_age greater than zero, for the disk would fill up without",
        )
        .in_field("retention"));
    }
    match prefix {
        Some(prefix) => name::check_prefix(prefix).map_err(|error| error.in_field("name_prefix")),
        None => Ok(()),
    }
}

/// When the schedule of `instance` runs next, seen from `now`: after it was set, or after a run.
#[must_use]
pub fn next_run(now: Timestamp, interval: Duration, instance: &str) -> Timestamp {
    let ahead = interval.saturating_add(jitter(interval, instance));
    time::checked_add(now, ahead).unwrap_or(Timestamp::MAX)
}

/// When the schedule runs next after it was set again, or after the clock was: only another interval changes that, or
/// a clock that has gone back behind the one by which it was planned.
#[must_use]
pub fn next_run_after_change(
    now: Timestamp,
    interval: Duration,
    instance: &str,
    before: Option<(Duration, Timestamp)>,
) -> Timestamp {
    match before {
        Some((old_interval, next)) if old_interval == interval => next.min(next_run(now, interval, instance)),
        _ => next_run(now, interval, instance),
    }
}

/// Up to a tenth of the interval, and at most five minutes, the same for an instance at all times.
fn jitter(interval: Duration, instance: &str) -> Duration {
    let window = (interval / 10).min(MAX_JITTER);
    let window = u64::try_from(window.as_millis()).unwrap_or(u64::MAX).max(1);
    Duration::from_millis(spread(instance) % window)
}

/// FNV-1a: the same on every host and in every version, unlike the standard library's hashes.
fn spread(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The name of a snapshot that is made at `now`: the prefix and the second, in UTC.
///
/// A prefix of [`name::MAX_PREFIX_LENGTH`] leaves room for exactly that.
#[must_use]
pub fn snapshot_name(prefix: Option<&str>, now: Timestamp) -> String {
    format!(
        "{}-{}",
        prefix.unwrap_or(DEFAULT_PREFIX),
        now.strftime("%Y%m%d-%H%M%S")
    )
}

/// Which of a schedule's snapshots go now, oldest first. Whoever made a snapshot by hand is not asked.
#[must_use]
pub fn expired<'a>(retention: Retention, now: Timestamp, snapshots: &[Scheduled<'a>]) -> Vec<&'a str> {
    let mut newest_first: Vec<&Scheduled<'a>> = snapshots.iter().collect();
    newest_first.sort_by(|a, b| (b.created_at, b.id).cmp(&(a.created_at, a.id)));
    let keep = retention.count_rule().unwrap_or(usize::MAX);
    let too_old = |snapshot: &Scheduled<'_>| {
        retention
            .age_rule()
            .and_then(|age| time::checked_add(snapshot.created_at, age))
            .is_some_and(|end| end < now)
    };
    newest_first
        .into_iter()
        .enumerate()
        .filter(|(position, snapshot)| *position >= keep || too_old(snapshot))
        .map(|(_, snapshot)| snapshot.id)
        .rev()
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn count(max_count: u32) -> Retention {
        Retention {
            max_count: Some(max_count),
            max_age: None,
        }
    }

    #[test]
    fn a_schedule_needs_an_interval_and_an_end() {
        assert!(check(MIN_INTERVAL, count(1), None).is_ok());
        assert!(check(HOUR, count(0), None).is_err());
        assert!(check(HOUR, Retention::default(), None).is_err());
        let age = Retention {
            max_count: Some(0),
            max_age: Some(HOUR),
        };
        assert!(check(HOUR, age, Some("nightly")).is_ok());
        let almost = MIN_INTERVAL - Duration::from_nanos(1);
        assert_eq!(check(almost, age, None).unwrap_err().field, "interval");
        assert_eq!(
            check(HOUR, age, Some("Nightly")).unwrap_err().field,
            "name_prefix"
        );
        assert!(check(HOUR, age, Some(&"a".repeat(47))).is_ok());
        assert!(check(HOUR, age, Some(&"a".repeat(48))).is_err());
    }

    #[test]
    fn only_another_interval_moves_the_next_run() {
        let now = at("2026-06-01T12:00:00Z");
        let planned = at("2026-06-01T12:10:00Z");
        assert_eq!(
            next_run_after_change(now, HOUR, "a", Some((HOUR, planned))),
            planned
        );
        assert_eq!(
            next_run_after_change(now, 2 * HOUR, "a", Some((HOUR, planned))),
            next_run(now, 2 * HOUR, "a")
        );
        assert_eq!(
            next_run_after_change(now, HOUR, "a", None),
            next_run(now, HOUR, "a")
        );
    }

    #[test]
    fn a_clock_that_was_ahead_once_does_not_put_a_schedule_off() {
        let now = at("2026-06-01T12:00:00Z");
        let astray = next_run(at("2031-01-01T00:00:00Z"), HOUR, "a");
        let set_right = next_run_after_change(now, HOUR, "a", Some((HOUR, astray)));
        assert_eq!(set_right, next_run(now, HOUR, "a"));
        // What is due, or as far ahead as it may be, stays.
        for planned in [at("2026-05-01T00:00:00Z"), set_right] {
            assert_eq!(
                next_run_after_change(now, HOUR, "a", Some((HOUR, planned))),
                planned
            );
        }
    }

    #[test]
    fn instances_that_were_set_together_run_apart() {
        let now = at("2026-06-01T12:00:00Z");
        let runs: std::collections::BTreeSet<_> = (0..100)
            .map(|number| next_run(now, HOUR, &format!("tz4a98xxat96iws9zmbr{number:04}")))
            .collect();
        assert!(runs.len() > 90, "{} different times", runs.len());
    }

    #[test]
    fn names_say_when() {
        let now = at("2026-06-01T02:03:04.9Z");
        assert_eq!(snapshot_name(None, now), "scheduled-20260601-020304");
        assert_eq!(snapshot_name(Some("nightly"), now), "nightly-20260601-020304");
    }

    #[test]
    fn the_newest_stay_and_the_old_go() {
        let now = at("2026-06-01T12:00:00Z");
        let snapshots: Vec<Scheduled<'_>> = [
            ("noon", "2026-06-01T12:00:00Z"),
            ("nine", "2026-06-01T09:00:00Z"),
            ("eleven", "2026-06-01T11:00:00Z"),
            ("ten", "2026-06-01T10:00:00Z"),
        ]
        .map(|(id, created)| Scheduled {
            id,
            created_at: at(created),
        })
        .to_vec();
        assert_eq!(expired(count(2), now, &snapshots), ["nine", "ten"]);
        let age = Retention {
            max_count: None,
            max_age: Some(2 * HOUR),
        };
        // Exactly two hours old is no older than two hours.
        assert_eq!(expired(age, now, &snapshots), ["nine"]);
        let both = Retention {
            max_count: Some(3),
            max_age: Some(HOUR),
        };
        assert_eq!(expired(both, now, &snapshots), ["nine", "ten"]);
        assert!(expired(Retention::default(), now, &snapshots).is_empty());
    }

    proptest! {
        #[test]
        fn the_next_run_is_never_early_and_never_late(
            now in 0i64..4_000_000_000,
            seconds in 60u64..100_000_000,
            instance in "[a-z][a-z0-9]{23}",
        ) {
            let now = Timestamp::from_second(now).unwrap();
            let interval = Duration::from_secs(seconds);
            let ahead = Duration::from_millis(time::milliseconds_between(now, next_run(now, interval, &instance)));
            prop_assert!(ahead >= interval);
            prop_assert!(ahead <= interval + (interval / 10).min(MAX_JITTER));
            // The jitter does not depend on when it is asked for.
            let later = now + HOUR;
            prop_assert_eq!(next_run(later, interval, &instance), next_run(now, interval, &instance) + HOUR);
        }

        #[test]
        fn names_hold_the_rule_for_every_prefix(
            prefix in prop::option::of("[a-z0-9]([a-z0-9-]{0,45}[a-z0-9])?"),
            now in 0i64..200_000_000_000,
        ) {
            let name = snapshot_name(prefix.as_deref(), Timestamp::from_second(now).unwrap());
            prop_assert!(name::is_valid(&name), "{}", name);
        }

        #[test]
        fn what_stays_is_newer_than_what_goes_by_count(
            times in prop::collection::vec(0i64..1000, 0..40),
            keep in 1u32..10,
        ) {
            let ids: Vec<String> = (0..times.len()).map(|number| number.to_string()).collect();
            let snapshots: Vec<Scheduled<'_>> = ids.iter().zip(&times).map(|(id, second)| Scheduled {
                id,
                created_at: Timestamp::from_second(*second).unwrap(),
            }).collect();
            let gone = expired(count(keep), Timestamp::from_second(2000).unwrap(), &snapshots);
            prop_assert_eq!(gone.len(), times.len().saturating_sub(keep as usize));
            let time_of = |id: &str| times[id.parse::<usize>().unwrap()];
            let oldest_kept = ids.iter().filter(|id| !gone.contains(&id.as_str())).map(|id| time_of(id)).min();
            for pair in gone.windows(2) {
                prop_assert!(time_of(pair[0]) <= time_of(pair[1]), "oldest first");
            }
            if let (Some(oldest_kept), Some(last)) = (oldest_kept, gone.last()) {
                prop_assert!(time_of(last) <= oldest_kept);
            }
        }
    }
}
