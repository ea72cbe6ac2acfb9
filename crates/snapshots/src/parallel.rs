//! Work on numbered items by all cores, until one fails.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use crate::Result;

/// Calls `work` for each number below `count`. Every thread has a state of its own, made by `start`; all states are
/// returned. The first failure stops everything and is the result.
pub(crate) fn each<State: Send>(
    count: usize,
    start: impl Fn() -> Result<State> + Sync,
    work: impl Fn(&mut State, usize) -> Result<()> + Sync,
) -> Result<Vec<State>> {
    let cores = thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let run = || -> Result<State> {
        let mut state = start()?;
        while !stop.load(Ordering::Relaxed) {
            let item = next.fetch_add(1, Ordering::Relaxed);
            if item >= count {
                break;
            }
            work(&mut state, item).inspect_err(|_| stop.store(true, Ordering::Relaxed))?;
        }
        Ok(state)
    };
    let run = &run;
    if cores.min(count) <= 1 {
        return Ok(vec![run()?]);
    }
    thread::scope(|scope| {
        let threads: Vec<_> = (1..cores.min(count)).map(|_| scope.spawn(run)).collect();
        let mut results = vec![run()];
        for thread in threads {
            results.push(
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            );
        }
        results.into_iter().collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn each_item_is_worked_on_once() {
        let states = each(
            1000,
            || Ok(Vec::new()),
            |seen, item| {
                seen.push(item);
                Ok(())
            },
        )
        .unwrap();
        let mut seen: Vec<usize> = states.into_iter().flatten().collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn a_failure_is_the_result() {
        let fail = |_: &mut (), item| if item == 7 { Err(Error::Cancelled) } else { Ok(()) };
        assert!(matches!(each(100, || Ok(()), fail), Err(Error::Cancelled)));
    }
}
