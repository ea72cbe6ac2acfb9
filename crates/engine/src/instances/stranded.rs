//! A machine that stands still though nobody means it to: its capture could not let it go on, or a server died before it
//! did.
//!
//! Only the driver of an instance pauses its machine, and lets it go on before it looks at anything else. Clients cannot.
//! So whatever is found paused between two requests has been left so, and is resumed until it goes on.
//!
//! Invariant: a guest that sleeps of its own will is left alone, and so is a machine that waits for space.

use std::sync::Arc;

use hypeman_core::instance::{Lifecycle, Observation};
use hypeman_vmm::RunState;

use super::driver::Driver;

/// What is to be done with a machine that was looked at between two requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Remedy {
    Nothing,
    /// Let it go on.
    Resume,
    /// It goes on already: a command to do so was carried out after nobody waited for it any more.
    Note,
}

fn remedy(lifecycle: &Lifecycle, seen: RunState) -> Remedy {
    match (lifecycle, seen) {
        (Lifecycle::Unknown { before, .. }, _) => remedy(before, seen),
        (state, RunState::Paused) if state.has_vmm() => Remedy::Resume,
        (Lifecycle::Paused, RunState::Running) => Remedy::Note,
        _ => Remedy::Nothing,
    }
}

impl Driver {
    /// Sees that a machine goes on which was found in this state, between two requests.
    pub(super) async fn free_stranded(&mut self, seen: RunState) {
        let Some(run) = &self.run else { return };
        let machine = Arc::clone(&run.machine);
        match remedy(&self.lifecycle, seen) {
            Remedy::Nothing => return,
            Remedy::Note => {}
            Remedy::Resume => {
                if let Err(error) = machine.resume().await {
                    // Tried again after the next look.
                    tracing::error!(instance = %self.record.id, %error, "found paused, and not resumed");
                    return;
                }
                self.log.line("its machine was found paused: resumed");
            }
        }
        self.observe(&Observation::Resumed);
        self.mend_connections("to let it go on").await;
    }
}

#[cfg(test)]
mod tests {
    use hypeman_core::instance::UnknownCause;

    use super::*;

    const SEEN: [RunState; 6] = [
        RunState::Created,
        RunState::Running,
        RunState::Paused,
        RunState::Suspended,
        RunState::Stalled,
        RunState::Shutdown,
    ];

    fn unknown(before: Lifecycle) -> Lifecycle {
        before.observe(&Observation::Unresponsive {
            cause: UnknownCause::Agent,
            reason: "x".into(),
        })
    }

    fn with_a_machine() -> Vec<Lifecycle> {
        let booting = Lifecycle::Created.observe(&Observation::Launched { without_agent: false });
        vec![
            booting,
            Lifecycle::Running,
            Lifecycle::Paused,
            Lifecycle::ShuttingDown,
        ]
    }

    #[test]
    fn what_is_found_paused_is_resumed_whatever_it_is_thought_to_be() {
        for state in with_a_machine() {
            assert_eq!(remedy(&state, RunState::Paused), Remedy::Resume, "{state:?}");
            assert_eq!(remedy(&unknown(state), RunState::Paused), Remedy::Resume);
        }
        for state in [Lifecycle::Created, Lifecycle::Stopped, Lifecycle::Standby] {
            assert_eq!(remedy(&state, RunState::Paused), Remedy::Nothing, "{state:?}");
        }
    }

    #[test]
    fn what_goes_on_is_no_longer_called_paused() {
        assert_eq!(remedy(&Lifecycle::Paused, RunState::Running), Remedy::Note);
        assert_eq!(
            remedy(&unknown(Lifecycle::Paused), RunState::Running),
            Remedy::Note
        );
        assert_eq!(remedy(&Lifecycle::Running, RunState::Running), Remedy::Nothing);
    }

    #[test]
    fn a_guest_that_sleeps_and_a_machine_that_waits_are_left_alone() {
        for state in with_a_machine() {
            for seen in SEEN {
                let resumed = remedy(&state, seen) == Remedy::Resume;
                assert_eq!(resumed, seen == RunState::Paused, "{state:?}, {seen:?}");
            }
        }
    }
}
