//! The memory that a guest has beside what it boots with (`hotplug_size`): when it gets it, and gives it back.
//!
//! ```text
//!                 the guest is up                 a capture begins
//!   Withheld ──────────────────────► Given ─────────────────────────────► TakenBack ─► captured, or refused
//!    │   ▲                             ▲                                      │
//!    │   └─ a new machine, or one that │                                      │
//!    │      another server started     └────────── the guest goes on ─────────┘
//!    └─► Missing: its VMM has none, because the machine is from before there was any
//! ```
//!
//! A guest is captured with the memory that it booted with and nothing else. Its workload is held still first: what gives
//! back memory needs room for what was in there, and nobody else may take that room, nor be killed for want of it. What
//! does not fit into `size` stays where it is: then the capture is refused, and the guest may have all of its memory again.
//!
//! Invariants:
//! - A workload is held still for this no longer than [`PATIENCE`], and what the VMM takes to answer.
//! - It goes on only after the VMM was told that the guest may have again what it had, and [`HEAD_START`] later at the
//!   latest: a guest that takes it more slowly does so beside its workload.
//! - A VMM that hangs when it is asked to give memory is asked again only after it has answered something.
//! - Whatever is thought here of the memory of a guest, the VMM looks for itself before it gives a device state.

use std::sync::Arc;
use std::time::Duration;

use hypeman_core::instance::Lifecycle;
use hypeman_vmm::{Adjust, Machine, VmmError};
use tokio::time::Instant;

use super::driver::Driver;
use crate::EngineError;

/// How often a guest is looked at that gives back memory. It needs some 100 ms for it.
const LOOK: Duration = Duration::from_millis(10);
/// How long a guest may get no further.
const STANDSTILL: Duration = Duration::from_secs(10);
/// How often it is asked anew. A kernel that could not free a block tries again by itself only after most of a minute.
const REMINDER: Duration = Duration::from_secs(1);
/// How long it may take in all: its workload stands still.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a guest that gets back what it had may take it before its workload goes on. It needs some 100 ms.
const HEAD_START: Duration = Duration::from_secs(1);

/// What is known of the memory that may be added to a machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Added {
    /// Nothing was asked for, as far as this server knows.
    #[default]
    Withheld,
    /// The guest may have all of it.
    Given,
    /// The guest gives it back, or has done so. It had so many bytes.
    TakenBack(u64),
    /// There is none.
    Missing,
}

impl Added {
    /// Whether the guest is to have its memory now. `goes_on`: it was captured once, so its kernel is up from the start.
    fn is_due(self, hotplug_bytes: u64, lifecycle: &Lifecycle, goes_on: bool) -> bool {
        let is_up = match lifecycle {
            Lifecycle::Running => true,
            Lifecycle::Initializing(_) => goes_on,
            _ => false,
        };
        is_up && hotplug_bytes > 0 && matches!(self, Self::Withheld | Self::TakenBack(_))
    }

    /// After the VMM was asked to give it. `None`: nobody knows, and it is to be asked again. So it is of what the guest
    /// once had, whatever the VMM says: that is not missing, and the guest must have it again.
    fn after(self, given: &Result<(), VmmError>) -> Option<Self> {
        match given {
            Ok(()) => Some(Self::Given),
            Err(VmmError::Refused { .. } | VmmError::Unsupported { .. }) if self.had() == 0 => {
                Some(Self::Missing)
            }
            Err(_) => None,
        }
    }

    /// What it had before it was to give it back.
    fn had(self) -> u64 {
        match self {
            Self::TakenBack(bytes) => bytes,
            Self::Withheld | Self::Given | Self::Missing => 0,
        }
    }
}

/// How a guest gets on with what it was asked for.
#[derive(Debug, Default)]
struct Progress {
    /// Least that was left so far, in bytes, and when it was seen first.
    least: Option<(u64, Duration)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Done,
    OnItsWay,
    Stuck,
}

impl Progress {
    /// After a look that found so many bytes left, `elapsed` after the guest was asked.
    fn seen(&mut self, left: u64, elapsed: Duration) -> Standing {
        if left == 0 {
            return Standing::Done;
        }
        let since = match self.least {
            Some((least, since)) if left >= least => since,
            _ => {
                self.least = Some((left, elapsed));
                elapsed
            }
        };
        match elapsed >= PATIENCE || elapsed.saturating_sub(since) >= STANDSTILL {
            true => Standing::Stuck,
            false => Standing::OnItsWay,
        }
    }
}

/// Has the guest keep only so many bytes. Waits until it has given back the rest, or gets no further. What is left.
async fn given_back(adjust: &dyn Adjust, keep: u64) -> Result<u64, VmmError> {
    let asked = Instant::now();
    let mut reminded: Option<Instant> = None;
    let mut progress = Progress::default();
    loop {
        if reminded.is_none_or(|reminded| reminded.elapsed() >= REMINDER) {
            adjust.set_memory(keep).await?;
            reminded = Some(Instant::now());
        }
        let left = adjust.added_memory().await?;
        if progress.seen(left, asked.elapsed()) != Standing::OnItsWay {
            return Ok(left);
        }
        tokio::time::sleep(LOOK).await;
    }
}

impl Driver {
    /// Lets the guest have all of its memory, if that is due. It takes it when it can; only one that had it before has a
    /// head start before its workload. What fails is tried again at a later turn, and tells what a check of the VMM would.
    pub(super) async fn give_memory(&mut self) {
        let Some(run) = &self.run else { return };
        let recorded = self.record.run.as_ref();
        let goes_on = recorded.is_some_and(|run| run.base.is_some());
        let before = run.added;
        if !before.is_due(self.record.hotplug_bytes, &self.lifecycle, goes_on) {
            return;
        }
        let machine = Arc::clone(&run.machine);
        let all = self.record.memory_bytes.saturating_add(self.record.hotplug_bytes);
        let given = match machine.adjust() {
            Some(adjust) => adjust.set_memory(all).await,
            None => Err(VmmError::Unsupported {
                kind: self.record.hypervisor,
                feature: "memory that is added while the machine runs",
            }),
        };
        self.silence = self.silence.after(&given);
        if let Err(error) = &given {
            tracing::warn!(instance = %self.record.id, %error, "memory not given");
        }
        let Some(after) = before.after(&given) else { return };
        if after == Added::Missing {
            self.log
                .line("its machine has no memory beside what it began with: start it anew");
        }
        self.note(after);
        let had = before.had();
        if let Some(adjust) = machine.adjust().filter(|_| had > 0 && after == Added::Given) {
            let taken = async {
                while adjust.added_memory().await.is_ok_and(|added| added < had) {
                    tokio::time::sleep(LOOK).await;
                }
            };
            // One that is slower takes it beside its workload.
            let _ = tokio::time::timeout(HEAD_START, taken).await;
        }
    }

    /// Takes back what was added, for a capture. The workload is held still. How many bytes it was.
    ///
    /// # Errors
    /// [`EngineError::MemoryInUse`] when the guest uses it. The caller lets the guest go on, with
    /// [`Driver::give_memory`].
    pub(super) async fn take_memory_back(&mut self, machine: &Arc<dyn Machine>) -> Result<u64, EngineError> {
        let Some(added) = self.run.as_ref().map(|run| run.added) else {
            return Ok(0);
        };
        let Some(adjust) = machine.adjust() else {
            return Ok(0);
        };
        if self.record.hotplug_bytes == 0 || added == Added::Missing {
            return Ok(0);
        }
        let had = adjust.added_memory().await?;
        self.note(Added::TakenBack(had));
        match given_back(adjust, self.record.memory_bytes).await? {
            0 => Ok(had),
            bytes => Err(EngineError::MemoryInUse { bytes }),
        }
    }

    fn note(&mut self, added: Added) {
        if let Some(run) = &mut self.run {
            run.added = added;
        }
    }
}

#[cfg(test)]
mod tests {
    use hypeman_core::instance::{Observation, UnknownCause};
    use proptest::prelude::*;

    use super::*;

    const SOME: u64 = 1 << 30;

    fn states() -> Vec<Lifecycle> {
        let booting = Lifecycle::Created.observe(&Observation::Launched { without_agent: false });
        let unknown = Lifecycle::Running.observe(&Observation::Unresponsive {
            cause: UnknownCause::Vmm,
            reason: "x".into(),
        });
        vec![
            Lifecycle::Created,
            booting,
            Lifecycle::Running,
            Lifecycle::Paused,
            Lifecycle::ShuttingDown,
            Lifecycle::Stopped,
            Lifecycle::Standby,
            unknown,
        ]
    }

    #[test]
    fn a_guest_gets_its_memory_once_it_is_up() {
        let due = |added: Added, goes_on| -> Vec<bool> {
            let states = states();
            let all = states.iter().map(|state| added.is_due(SOME, state, goes_on));
            all.collect()
        };
        let when_running = [false, false, true, false, false, false, false, false];
        let when_it_goes_on = [false, true, true, false, false, false, false, false];
        for added in [Added::Withheld, Added::TakenBack(0), Added::TakenBack(SOME)] {
            assert_eq!(due(added, false), when_running);
            assert_eq!(due(added, true), when_it_goes_on);
        }
        for added in [Added::Given, Added::Missing] {
            assert_eq!(due(added, true), [false; 8]);
        }
        assert!(!Added::Withheld.is_due(0, &Lifecycle::Running, true));
    }

    #[test]
    fn a_machine_without_it_is_not_asked_again_but_a_silent_one_and_one_that_had_it_are() {
        let refused = VmmError::Refused {
            command: "x".into(),
            message: "no".into(),
        };
        let refused = Err(refused);
        let unanswered = Err(VmmError::Unanswered {
            command: "x".into(),
            reason: "the connection ended".into(),
        });
        for nothing_known in [Added::Withheld, Added::TakenBack(0)] {
            assert_eq!(nothing_known.after(&refused), Some(Added::Missing));
            assert_eq!(nothing_known.after(&Err(VmmError::Gone)), None);
            assert_eq!(nothing_known.after(&unanswered), None, "it may have been given");
        }
        assert_eq!(Added::TakenBack(SOME).after(&refused), None, "it was there");
        assert_eq!(Added::TakenBack(SOME).after(&Ok(())), Some(Added::Given));
    }

    #[test]
    fn a_guest_that_gets_on_is_waited_for() {
        let mut progress = Progress::default();
        for second in 0..29 {
            let left = SOME - second;
            assert_eq!(
                progress.seen(left, Duration::from_secs(second)),
                Standing::OnItsWay
            );
        }
        assert_eq!(progress.seen(0, Duration::from_secs(29)), Standing::Done);
    }

    #[test]
    fn a_guest_that_gets_no_further_is_not() {
        let mut progress = Progress::default();
        assert_eq!(progress.seen(SOME, Duration::ZERO), Standing::OnItsWay);
        assert_eq!(
            progress.seen(SOME / 2, Duration::from_secs(2)),
            Standing::OnItsWay
        );
        // What it takes again is no progress.
        assert_eq!(progress.seen(SOME, Duration::from_secs(11)), Standing::OnItsWay);
        assert_eq!(progress.seen(SOME / 2, Duration::from_secs(12)), Standing::Stuck);
    }

    proptest! {
        /// Whatever a guest does, nobody waits for it for ever, and it is done only when nothing is left.
        #[test]
        fn every_wait_ends(looks in prop::collection::vec((any::<u64>(), 1_u64..1000), 1..200)) {
            let mut progress = Progress::default();
            let mut elapsed = Duration::ZERO;
            for (left, milliseconds) in looks {
                elapsed += Duration::from_millis(milliseconds);
                let standing = progress.seen(left, elapsed);
                prop_assert_eq!(standing == Standing::Done, left == 0);
                prop_assert!(elapsed < PATIENCE || standing != Standing::OnItsWay);
            }
        }
    }
}
