//! Which command may run in which state.

use super::{InstanceState, Lifecycle};

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
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::{Observation, Readiness};

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
    fn a_refusal_says_what_would_be_needed() {
        let refusal = permit(&Lifecycle::Running, Command::Start).unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "instance must be stopped to start (current state: Running)"
        );
    }
}
