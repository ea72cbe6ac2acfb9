//! The check of the pagers that serve memory of machines: how many, of which releases, and whether they answer.

use std::io;
use std::path::Path;
use std::time::Duration;

use hypeman_pager::{Found, Sighting, survey};

use super::Check;

const NAME: &str = "pagers";
/// How long each may take to answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// A fault that waits for so long is not merely slow, milliseconds.
const STUCK: u64 = 10_000;

/// Asks the pagers that serve this data directory.
pub(super) async fn examine(data: &Path) -> Check {
    let directory = hypeman_engine::pager_directory(data);
    match survey(&directory, env!("CARGO_PKG_VERSION"), PATIENCE).await {
        Ok(sightings) => verdict(&sightings),
        // Nothing of ours can be there then.
        Err(failure) if failure.kind() == io::ErrorKind::NotADirectory => verdict(&[]),
        Err(failure) => Check::warn(
            NAME,
            format!("{}: {failure}", directory.display()),
            "run this as the user that runs the server",
        ),
    }
}

fn verdict(sightings: &[Sighting]) -> Check {
    // What has ended serves nobody.
    let there: Vec<&Sighting> = sightings
        .iter()
        .filter(|sighting| sighting.found != Found::Gone)
        .collect();
    if there.is_empty() {
        return Check::ok(NAME, "none runs; the server starts one when a machine needs it");
    }
    let told: Vec<String> = there.iter().map(|sighting| told(sighting)).collect();
    let found = format!("{}: {}", there.len(), told.join(", "));
    let fix = there.iter().find_map(|sighting| fix(&sighting.found));
    match fix {
        Some(fix) => Check::warn(NAME, found, fix),
        None => Check::ok(NAME, found),
    }
}

/// A pager in words.
fn told(sighting: &Sighting) -> String {
    let release = &sighting.release;
    match &sighting.found {
        Found::Well { hello, health } => {
            let machines = match hello.machines.len() {
                1 => "1 machine".to_owned(),
                count => format!("{count} machines"),
            };
            let draining = if hello.draining { ", draining" } else { "" };
            let stuck = match health.oldest_fault_ms {
                waited if waited >= STUCK => format!(", a fault waits for {} s", waited / 1000),
                _ => String::new(),
            };
            format!(
                "{} (process {}, {machines}{draining}{stuck})",
                hello.release, hello.pid
            )
        }
        Found::Foreign => format!("{release} (of another protocol: it ends with its last machine)"),
        Found::Silent => format!("{release} (does not answer)"),
        Found::Gone => format!("{release} (has ended)"),
        Found::Unknown { reason } => format!("{release} ({reason})"),
    }
}

/// What to do about it, when there is something to do.
fn fix(found: &Found) -> Option<&'static str> {
    match found {
        Found::Silent => Some(
            "its machines stand still: let it go on if it was stopped; otherwise kill it, and start or restore them \
             again",
        ),
        Found::Unknown { .. } => Some("run this as the user that runs the server"),
        Found::Well { health, .. } if health.oldest_fault_ms >= STUCK => {
            Some("see whether the disk of the data directory answers, and what system/pager.log in it says")
        }
        Found::Well { .. } | Found::Foreign | Found::Gone => None,
    }
}

#[cfg(test)]
mod tests {
    use hypeman_pager::{Health, Hello, PROTOCOL};

    use super::*;
    use crate::doctor::Verdict;

    fn sighting(found: Found) -> Sighting {
        Sighting {
            release: "0.9".into(),
            found,
        }
    }

    fn well(draining: bool, oldest_fault_ms: u64) -> Found {
        Found::Well {
            hello: Hello {
                protocol: PROTOCOL,
                release: "1.0".into(),
                pid: 12,
                draining,
                machines: Vec::new(),
            },
            health: Health { oldest_fault_ms },
        }
    }

    #[test]
    fn no_pager_and_pagers_that_answer_are_well() {
        let none = verdict(&[sighting(Found::Gone)]);
        assert_eq!(none.verdict, Verdict::Ok);
        assert!(none.found.starts_with("none runs"), "{none:?}");
        let two = verdict(&[
            sighting(well(false, 5)),
            sighting(well(true, 0)),
            sighting(Found::Foreign),
        ]);
        assert_eq!((two.verdict, two.fix), (Verdict::Ok, None));
        assert_eq!(
            two.found,
            "3: 1.0 (process 12, 0 machines), 1.0 (process 12, 0 machines, draining), 0.9 (of another protocol: it \
             ends with its last machine)"
        );
    }

    #[test]
    fn one_that_does_not_answer_or_whose_fault_is_stuck_is_told_with_a_way_out() {
        let silent = verdict(&[sighting(well(false, 0)), sighting(Found::Silent)]);
        assert_eq!(silent.verdict, Verdict::Warn);
        assert!(silent.found.ends_with("0.9 (does not answer)"), "{silent:?}");
        assert!(
            silent
                .fix
                .is_some_and(|fix| fix.starts_with("its machines stand still"))
        );
        let stuck = verdict(&[sighting(well(false, STUCK + 500))]);
        assert!(stuck.found.contains("a fault waits for 10 s"), "{stuck:?}");
        assert!(stuck.fix.is_some_and(|fix| fix.contains("pager.log")));
    }

    #[tokio::test]
    async fn a_data_directory_that_does_not_exist_has_no_pagers() {
        let temporary = tempfile::tempdir().unwrap();
        let check = examine(&temporary.path().join("not/yet")).await;
        assert_eq!(check.verdict, Verdict::Ok, "{check:?}");
    }
}
