//! How often a guest's clock is set anew.
//!
//! A clock is as far from ours as its setting took to be answered, at most. The first answer after a restore is late,
//! because the guest's memory has yet to come; the next are faster. Where they do not become faster the guest or its host
//! is slow, and its workload stands still while it is asked: asking on would only make that longer.

use std::time::Duration;

/// How far the guest's clock may be from ours, where the guest can answer that fast.
pub const CLOCK_TOLERANCE: Duration = Duration::from_millis(40);
/// Most attempts.
const ATTEMPTS: u32 = 10;
/// Attempts in a row that may bring nothing.
const IN_VAIN: u32 = 2;

/// What the attempts have come to.
#[derive(Debug, Default)]
pub(super) struct Attempts {
    made: u32,
    best: Option<Duration>,
    in_vain: u32,
}

impl Attempts {
    /// After one that was answered within `bound`: whether another may come notably closer.
    pub(super) fn is_another_worth_it(&mut self, bound: Duration) -> bool {
        self.made += 1;
        // Less than three quarters of the best.
        let is_closer = self.best.is_none_or(|best| bound * 4 < best * 3);
        self.in_vain = if is_closer { 0 } else { self.in_vain + 1 };
        self.best = Some(self.best.map_or(bound, |best| best.min(bound)));
        bound >= CLOCK_TOLERANCE && self.in_vain < IN_VAIN && self.made < ATTEMPTS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many attempts are made where they would be answered so fast.
    fn made(milliseconds: &[u64]) -> usize {
        let mut attempts = Attempts::default();
        let goes_on = |&&bound: &&u64| attempts.is_another_worth_it(Duration::from_millis(bound));
        milliseconds.iter().take_while(goes_on).count() + 1
    }

    #[test]
    fn a_fast_answer_is_enough() {
        assert_eq!(made(&[39, 1]), 1);
        assert_eq!(made(&[400, 39, 1]), 2);
    }

    #[test]
    fn a_guest_that_becomes_faster_is_asked_on() {
        assert_eq!(made(&[900, 600, 400, 250, 150, 90, 60, 30, 1]), 8);
    }

    #[test]
    fn a_slow_guest_is_asked_three_times() {
        assert_eq!(made(&[100, 100, 100, 100]), 3);
        assert_eq!(made(&[100, 200, 90, 1]), 3);
        // One that was held up once is not given up.
        assert_eq!(made(&[100, 200, 50, 49, 48, 47]), 5);
    }

    #[test]
    fn no_guest_is_asked_for_ever() {
        let halves: Vec<u64> = (0..20).map(|attempt| (1 << 40) >> attempt).collect();
        assert_eq!(made(&halves), ATTEMPTS as usize);
    }
}
