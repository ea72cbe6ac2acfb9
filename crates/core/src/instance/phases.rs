//! How long an instance has spent in each state, for billing and for people.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::InstanceState;

/// Time spent in each state since creation. Time is handed in, never read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseClock {
    current: InstanceState,
    since: Timestamp,
    spent_ms: BTreeMap<InstanceState, u64>,
}

impl PhaseClock {
    /// Starts the clock in `state`.
    #[must_use]
    pub fn start(state: InstanceState, now: Timestamp) -> Self {
        Self {
            current: state,
            since: now,
            spent_ms: BTreeMap::new(),
        }
    }

    /// The state that the clock runs in.
    #[must_use]
    pub fn current(&self) -> InstanceState {
        self.current
    }

    /// Since when.
    #[must_use]
    pub fn since(&self) -> Timestamp {
        self.since
    }

    /// Goes over to `state` at `now`. The same state goes on without a break.
    pub fn enter(&mut self, state: InstanceState, now: Timestamp) {
        if state == self.current {
            return;
        }
        *self.spent_ms.entry(self.current).or_default() += elapsed_ms(self.since, now);
        self.current = state;
        self.since = now;
    }

    /// Milliseconds by state, the current one up to `now`.
    #[must_use]
    pub fn totals(&self, now: Timestamp) -> BTreeMap<InstanceState, u64> {
        let mut totals = self.spent_ms.clone();
        *totals.entry(self.current).or_default() += elapsed_ms(self.since, now);
        totals
    }
}

/// A wall clock that was set back counts as no time at all.
fn elapsed_ms(from: Timestamp, to: Timestamp) -> u64 {
    u64::try_from(to.as_millisecond().saturating_sub(from.as_millisecond())).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: i64) -> Timestamp {
        Timestamp::from_millisecond(milliseconds).unwrap()
    }

    #[test]
    fn phases_add_up_to_the_whole_life() {
        let mut clock = PhaseClock::start(InstanceState::Created, at(0));
        clock.enter(InstanceState::Initializing, at(10));
        clock.enter(InstanceState::Running, at(700));
        clock.enter(InstanceState::Stopped, at(5_000));
        clock.enter(InstanceState::Initializing, at(6_000));
        clock.enter(InstanceState::Running, at(6_500));
        let totals = clock.totals(at(10_000));
        assert_eq!(totals[&InstanceState::Initializing], 690 + 500);
        assert_eq!(totals[&InstanceState::Running], 4_300 + 3_500);
        assert_eq!(totals.values().sum::<u64>(), 10_000);
    }

    #[test]
    fn a_clock_set_back_never_counts_negative() {
        let mut clock = PhaseClock::start(InstanceState::Running, at(1_000));
        clock.enter(InstanceState::Stopped, at(400));
        assert_eq!(clock.totals(at(300)).values().sum::<u64>(), 0);
    }
}
