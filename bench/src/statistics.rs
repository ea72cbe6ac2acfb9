//! Medians and percentiles.

use std::time::Duration;

/// Durations of repeated runs.
#[derive(Debug, Clone, Default)]
pub struct Sample {
    sorted: Vec<Duration>,
}

impl FromIterator<Duration> for Sample {
    fn from_iter<T: IntoIterator<Item = Duration>>(runs: T) -> Self {
        let mut sorted: Vec<Duration> = runs.into_iter().collect();
        sorted.sort_unstable();
        Self { sorted }
    }
}

impl Sample {
    /// How many runs.
    pub fn len(&self) -> usize {
        self.sorted.len()
    }

    /// All runs, the shortest first.
    pub fn iter(&self) -> impl Iterator<Item = Duration> {
        self.sorted.iter().copied()
    }

    /// The middle run, or the mean of the two in the middle; zero without runs.
    pub fn median(&self) -> Duration {
        let middle = self.sorted.len() / 2;
        match (self.sorted.len() % 2, self.sorted.get(middle)) {
            (0, Some(upper)) => (*upper + self.sorted[middle - 1]) / 2,
            (_, Some(run)) => *run,
            (_, None) => Duration::ZERO,
        }
    }

    /// The smallest run that at least `percent` of all runs do not exceed; zero without runs.
    pub fn percentile(&self, percent: f64) -> Duration {
        let rank = (percent / 100.0 * self.sorted.len() as f64).ceil() as usize;
        self.sorted
            .get(rank.saturating_sub(1))
            .copied()
            .unwrap_or(Duration::ZERO)
    }
}

/// A duration in milliseconds.
pub fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Half of the runs are not above and half are not below the median.
        #[test]
        fn a_median_has_as_many_runs_on_either_side(runs in proptest::collection::vec(0u64..1_000_000, 1..60)) {
            let sample: Sample = runs.iter().map(|run| Duration::from_micros(*run)).collect();
            let median = sample.median();
            let not_above = sample.sorted.iter().filter(|run| **run <= median).count();
            let not_below = sample.sorted.iter().filter(|run| **run >= median).count();
            prop_assert!(not_above * 2 >= runs.len() && not_below * 2 >= runs.len());
            prop_assert!(sample.percentile(99.0) >= median);
            prop_assert_eq!(sample.percentile(100.0), *sample.sorted.last().unwrap());
        }
    }

    #[test]
    fn without_runs_everything_is_zero() {
        let sample = Sample::default();
        assert_eq!(
            (sample.median(), sample.percentile(99.0)),
            (Duration::ZERO, Duration::ZERO)
        );
    }
}
