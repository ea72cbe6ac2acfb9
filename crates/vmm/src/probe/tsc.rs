//! The frequency of the host's time stamp counter, which a guest without hardware help cannot measure itself.
#![allow(unsafe_code)]

use std::time::{Duration, Instant};

/// Shortest distance of two readings that gives the frequency to a few parts in a million.
const BASE: Duration = Duration::from_millis(50);

/// A first reading, so that the second one need not wait.
#[derive(Debug)]
pub(crate) struct TscFrequency {
    start: Option<(u64, Instant)>,
}

impl TscFrequency {
    /// Takes the first reading.
    pub(crate) fn start() -> Self {
        Self { start: reading() }
    }

    /// The frequency in kHz; `None` where there is no such counter or it makes no sense. Waits only when less
    /// than 50 ms have passed since the first reading.
    pub(crate) async fn khz(&self) -> Option<u64> {
        let (first, since) = self.start?;
        tokio::time::sleep(BASE.saturating_sub(since.elapsed())).await;
        let (second, now) = reading()?;
        let nanoseconds = now.duration_since(since).as_nanos();
        let ticks = u128::from(second.checked_sub(first)?);
        let khz = u64::try_from(ticks * 1_000_000 / nanoseconds.max(1)).ok()?;
        (100_000..20_000_000).contains(&khz).then_some(khz)
    }
}

/// Counter and clock at one instant: of a few tries the one that was disturbed least.
fn reading() -> Option<(u64, Instant)> {
    (0..5)
        .filter_map(|_| {
            let before = counter()?;
            let now = Instant::now();
            let after = counter()?;
            let width = after.checked_sub(before)?;
            Some((width, (before + width / 2, now)))
        })
        .min_by_key(|(width, _)| *width)
        .map(|(_, pair)| pair)
}

#[cfg(target_arch = "x86_64")]
fn counter() -> Option<u64> {
    // SAFETY: every x86-64 processor has the instruction, and Linux lets user programs use it.
    Some(unsafe { core::arch::x86_64::_rdtsc() })
}

#[cfg(not(target_arch = "x86_64"))]
fn counter() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn two_measurements_agree() {
        if counter().is_none() {
            println!("SKIPPED: no time stamp counter");
            return;
        }
        let first = TscFrequency::start().khz().await.unwrap();
        let second = TscFrequency::start().khz().await.unwrap();
        assert!(first.abs_diff(second) < first / 100, "{first} and {second} kHz");
    }
}
