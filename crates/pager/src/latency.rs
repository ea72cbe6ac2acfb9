//! How long answers took, counted in buckets that grow with the time: no lock, no history, less than a kilobyte.
//!
//! ```text
//!  microseconds  0 │ 1 │ 2 │ 3 │ 4 │ 5 │ 6 │ 7 │ 8-9 │ 10-11 │ 12-13 │ 14-15 │ 16-19 │ …    four for each doubling
//! ```
//! Invariant: a quantile is at least the true one and less than a quarter above it, for times up to [`LONGEST`].

use std::array;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Buckets for each doubling of the time.
const STEPS: usize = 4;
/// A little more than a minute, microseconds. What takes longer is counted with it.
const LONGEST: u64 = (1 << 26) - 1;
/// As many as [`LONGEST`] needs.
const BUCKETS: usize = 100;

/// How long a machine's faults waited for their answers, from when the pager heard of each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    /// Half of them waited no longer, microseconds.
    pub p50_us: u64,
    /// All but one in a hundred waited no longer, microseconds.
    pub p99_us: u64,
    /// The longest, microseconds.
    pub max_us: u64,
}

/// Counts of times. Many threads may add at once.
#[derive(Debug)]
pub(crate) struct Latencies {
    counts: [AtomicU64; BUCKETS],
    longest: AtomicU64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self {
            counts: array::from_fn(|_| AtomicU64::new(0)),
            longest: AtomicU64::new(0),
        }
    }
}

impl Latencies {
    pub(crate) fn add(&self, time: Duration) {
        let microseconds = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.longest.fetch_max(microseconds, Ordering::Relaxed);
        if let Some(count) = self.counts.get(bucket(microseconds)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// What was counted; `None` before the first.
    pub(crate) fn report(&self) -> Option<Latency> {
        let counts: Vec<u64> = self
            .counts
            .iter()
            .map(|count| count.load(Ordering::Relaxed))
            .collect();
        let max_us = self.longest.load(Ordering::Relaxed);
        let quantile = |percent| quantile(&counts, percent).map(|time| time.min(max_us));
        Some(Latency {
            p50_us: quantile(50)?,
            p99_us: quantile(99)?,
            max_us,
        })
    }
}

/// The bucket of a time.
fn bucket(microseconds: u64) -> usize {
    let time = microseconds.min(LONGEST);
    if time < STEPS as u64 {
        return time as usize;
    }
    let doublings = time.ilog2() as usize;
    STEPS * (doublings - 1) + (time >> (doublings - 2)) as usize % STEPS
}

/// The longest time of a bucket.
fn last_of(bucket: usize) -> u64 {
    if bucket < STEPS {
        return bucket as u64;
    }
    let doublings = bucket / STEPS + 1;
    let next = (STEPS + bucket % STEPS + 1) as u64;
    (next << (doublings - 2)) - 1
}

/// The time that so many of a hundred did not exceed; `None` of none.
fn quantile(counts: &[u64], percent: u64) -> Option<u64> {
    let total: u64 = counts.iter().sum();
    let rank = total.saturating_mul(percent).div_ceil(100).max(1);
    let mut seen = 0;
    let found = counts.iter().position(|count| {
        seen += *count;
        seen >= rank
    });
    found.map(last_of)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_quantile_is_the_true_one_or_a_little_more(
            mut times in prop::collection::vec(prop_oneof![0..50_u64, 0..5_000_u64, 0..=LONGEST], 1..200),
        ) {
            let latencies = Latencies::default();
            for time in &times {
                latencies.add(Duration::from_micros(*time));
            }
            times.sort_unstable();
            let told = latencies.report().unwrap();
            prop_assert_eq!(told.max_us, times[times.len() - 1]);
            for (percent, told) in [(50, told.p50_us), (99, told.p99_us)] {
                let truth = times[(times.len() * percent).div_ceil(100) - 1];
                prop_assert!(truth <= told, "{percent}: {told} instead of {truth}");
                prop_assert!((told - truth) * 4 <= truth, "{percent}: {told} instead of {truth}");
            }
        }

        #[test]
        fn every_time_lies_in_one_bucket_and_buckets_follow_each_other(time in 0..=LONGEST) {
            let own = bucket(time);
            prop_assert!(time <= last_of(own));
            prop_assert!(own == 0 || last_of(own - 1) < time);
        }
    }

    #[test]
    fn nothing_is_told_of_nothing_and_the_longest_time_has_a_place() {
        let latencies = Latencies::default();
        assert_eq!(latencies.report(), None);
        latencies.add(Duration::from_secs(3600));
        let told = latencies.report().unwrap();
        assert_eq!((told.p50_us, told.max_us), (LONGEST, 3_600_000_000));
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
        assert_eq!(last_of(BUCKETS - 1), LONGEST);
    }
}
