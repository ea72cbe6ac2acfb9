//! Whether numbers can be judged: enough of them, and taken while nothing else decided them.
//!
//! What the machine does on its own is seen while the bench itself stands still. The load average would not do: it is
//! mostly the bench's own.

use std::fs;
use std::time::Duration;

use crate::load::pause;
use crate::statistics::Sample;

/// Fewer runs than this say nothing.
const FEWEST: usize = 5;
/// Share of all processors that others may use.
const MOST: f64 = 0.15;
/// How long the bench stands still to see what others do.
const LOOK: Duration = Duration::from_millis(250);

/// What others did meanwhile.
#[derive(Debug, Default)]
pub struct Calm {
    shares: Vec<f64>,
}

impl Calm {
    /// Stands still for a moment and notes how busy the processors are without the bench.
    pub fn look(&mut self) {
        let before = times();
        pause(LOOK);
        if let (Some(before), Some(after)) = (before, times()) {
            self.shares.push(busy_share(before, after));
        }
    }

    /// Why a number must not be judged, if so: the reference took `reference` meanwhile, and ours `ours`.
    pub fn disturbance(&self, ours: &Sample, reference: &Sample) -> Option<String> {
        let fewest = ours.len().min(reference.len());
        if fewest < FEWEST {
            return Some(format!("{fewest} runs are too few"));
        }
        let others = self.others();
        if others > MOST {
            return Some(format!("others used {:.0} % of the processors", others * 100.0));
        }
        let (median, upper) = (reference.median(), reference.percentile(75.0));
        (upper > median.mul_f64(1.5)).then(|| {
            format!(
                "the reference itself varied, by {:.1} times",
                upper.as_secs_f64() / median.as_secs_f64()
            )
        })
    }

    /// The middle of what was seen: one look may meet the end of our own last step.
    fn others(&self) -> f64 {
        let mut shares = self.shares.clone();
        shares.sort_by(f64::total_cmp);
        shares.get(shares.len() / 2).copied().unwrap_or(0.0)
    }
}

/// Ticks of all processors since the boot: busy, and in all.
fn times() -> Option<(u64, u64)> {
    let text = fs::read_to_string("/proc/stat").ok()?;
    parse(text.lines().next()?)
}

/// `cpu user nice system idle iowait irq softirq steal …`
fn parse(line: &str) -> Option<(u64, u64)> {
    let ticks: Vec<u64> = line
        .strip_prefix("cpu ")?
        .split_whitespace()
        .take(8)
        .map(str::parse)
        .collect::<Result<_, _>>()
        .ok()?;
    let all: u64 = ticks.iter().sum();
    let idle = ticks.get(3)? + ticks.get(4)?;
    Some((all - idle, all))
}

fn busy_share(before: (u64, u64), after: (u64, u64)) -> f64 {
    let [busy, all] = [after.0 - before.0, after.1 - before.1].map(|ticks| ticks as f64);
    if all > 0.0 { busy / all } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(milliseconds: &[u64]) -> Sample {
        milliseconds
            .iter()
            .map(|run| Duration::from_millis(*run))
            .collect()
    }

    #[test]
    fn few_runs_a_busy_machine_and_a_shaky_reference_are_not_judged() {
        let steady = runs(&[100, 101, 102, 103, 104]);
        let quiet = Calm {
            shares: vec![0.02, 0.9, 0.01],
        };
        assert_eq!(quiet.disturbance(&steady, &steady), None);
        let busy = Calm {
            shares: vec![0.5, 0.4, 0.01],
        };
        let why = |calm: &Calm, reference: &Sample| calm.disturbance(&steady, reference).unwrap();
        assert!(why(&busy, &steady).contains("others used 40 %"));
        assert!(why(&quiet, &runs(&[1, 2, 3])).contains("3 runs"));
        assert!(why(&quiet, &runs(&[100, 100, 100, 200, 200])).contains("2.0 times"));
    }

    #[test]
    fn waiting_for_a_disk_is_not_being_busy() {
        let before = parse("cpu  10 0 10 100 20 0 0 0 0 0").unwrap();
        let after = parse("cpu  20 0 10 130 80 0 0 0 0 0").unwrap();
        assert_eq!((before, after), ((20, 140), (30, 240)));
        assert!((busy_share(before, after) - 0.1).abs() < 1e-9);
        assert_eq!(parse("intr 1 2"), None);
    }
}
