//! Which command may run in which state.

use super::{InstanceState, Lifecycle};
use crate::snapshot::SnapshotKind;

/// What a client can ask of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Boot it.
    Start,
    /// Power it off.
    Stop,
    /// Remove it, from whatever state.
    Delete,
    /// Change what may change.
    Update,
    /// Use the agent: exec, cp, stat.
    UseAgent,
    /// Put memory and devices on disk and end the VMM.
    Standby,
    /// Go on with what standby kept.
    Restore,
    /// Make another instance of it.
    Fork {
        /// The source may be running.
        from_running: bool,
    },
    /// Keep it as a snapshot.
    Snapshot {
        /// What of it.
        kind: SnapshotKind,
    },
    /// Replace memory and disk by those of a snapshot. A VMM that still exists is ended first.
    RestoreSnapshot,
}

/// A command that the state does not allow. Permanent: repeating it does not help.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("instance must be {expected} to {verb} (current state: {state})")]
pub struct Refusal {
    /// State it is in.
    pub state: InstanceState,
    /// States that allow the command, for people.
    pub expected: &'static str,
    /// What was asked, for people.
    pub verb: &'static str,
}

/// Decides whether `command` may run now.
///
/// # Errors
/// [`Refusal`] when the state does not allow it; the state is untouched.
pub fn permit(state: &Lifecycle, command: Command) -> Result<(), Refusal> {
    let current = state.state();
    let refuse = |expected, verb| {
        Err(Refusal {
            state: current,
            expected,
            verb,
        })
    };
    match command {
        Command::Delete | Command::Update => Ok(()),
        Command::Start => match state {
            Lifecycle::Stopped => Ok(()),
            _ => refuse("stopped", "start"),
        },
        // A paused or unreachable machine can still be taken down: the grace is skipped, not the command.
        Command::Stop => match state {
            Lifecycle::Initializing(_)
            | Lifecycle::Running
            | Lifecycle::Paused
            | Lifecycle::ShuttingDown
            | Lifecycle::Unknown { .. } => Ok(()),
            _ => refuse("running", "stop"),
        },
        Command::UseAgent => match state {
            Lifecycle::Running => Ok(()),
            _ => refuse("running", "use its agent"),
        },
        Command::Standby => match state {
            Lifecycle::Running => Ok(()),
            _ => refuse("running", "go to standby"),
        },
        Command::Restore => match state {
            Lifecycle::Standby => Ok(()),
            _ => refuse("in standby", "be restored"),
        },
        Command::Fork { from_running } => match state {
            Lifecycle::Stopped | Lifecycle::Standby => Ok(()),
            Lifecycle::Running if from_running => Ok(()),
            _ => refuse(
                "stopped or in standby (or running, with from_running=true)",
                "be forked",
            ),
        },
        Command::Snapshot {
            kind: SnapshotKind::Standby,
        } => match state {
            Lifecycle::Running | Lifecycle::Standby => Ok(()),
            _ => refuse("running or in standby", "make a snapshot of kind Standby"),
        },
        Command::Snapshot {
            kind: SnapshotKind::Stopped,
        } => match state {
            Lifecycle::Stopped => Ok(()),
            _ => refuse("stopped", "make a snapshot of kind Stopped"),
        },
        Command::RestoreSnapshot => match state {
            Lifecycle::Initializing(_) | Lifecycle::Running => {
                refuse("stopped or in standby", "restore a snapshot")
            }
            _ => Ok(()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::{Observation, Readiness, UnknownCause};

    fn every_state() -> Vec<Lifecycle> {
        vec![
            Lifecycle::Created,
            Lifecycle::Initializing(Readiness::default()),
            Lifecycle::Running,
            Lifecycle::Paused,
            Lifecycle::ShuttingDown,
            Lifecycle::Stopped,
            Lifecycle::Standby,
            Lifecycle::Running.observe(&Observation::Unresponsive {
                cause: UnknownCause::Vmm,
                reason: "hung".into(),
            }),
        ]
    }

    #[test]
    fn only_a_stopped_instance_starts() {
        for state in every_state() {
            assert_eq!(
                permit(&state, Command::Start).is_ok(),
                state == Lifecycle::Stopped,
                "{state:?}"
            );
        }
    }

    #[test]
    fn whatever_has_a_vmm_can_be_stopped_and_nothing_else() {
        for state in every_state() {
            assert_eq!(
                permit(&state, Command::Stop).is_ok(),
                state.has_vmm(),
                "{state:?}"
            );
        }
    }

    #[test]
    fn delete_is_always_allowed_and_the_agent_only_while_running() {
        for state in every_state() {
            assert!(permit(&state, Command::Delete).is_ok());
            assert_eq!(
                permit(&state, Command::UseAgent).is_ok(),
                state == Lifecycle::Running,
                "{state:?}"
            );
        }
    }

    #[test]
    fn what_keeps_or_brings_back_memory_has_the_states_of_the_contract() {
        use InstanceState as S;
        let standby_snapshot = Command::Snapshot {
            kind: SnapshotKind::Standby,
        };
        let stopped_snapshot = Command::Snapshot {
            kind: SnapshotKind::Stopped,
        };
        let fork = |from_running| Command::Fork { from_running };
        for (command, allowed) in [
            (Command::Standby, vec![S::Running]),
            (Command::Restore, vec![S::Standby]),
            (fork(false), vec![S::Stopped, S::Standby]),
            (fork(true), vec![S::Running, S::Stopped, S::Standby]),
            (standby_snapshot, vec![S::Running, S::Standby]),
            (stopped_snapshot, vec![S::Stopped]),
            (
                Command::RestoreSnapshot,
                vec![
                    S::Created,
                    S::Paused,
                    S::Shutdown,
                    S::Stopped,
                    S::Standby,
                    S::Unknown,
                ],
            ),
        ] {
            for state in every_state() {
                assert_eq!(
                    permit(&state, command).is_ok(),
                    allowed.contains(&state.state()),
                    "{command:?} in {state:?}"
                );
            }
        }
    }

    #[test]
    fn a_refusal_says_what_would_be_needed() {
        let refusal = permit(&Lifecycle::Running, Command::Start).unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "instance must be stopped to start (current state: Running)"
        );
    }
}
