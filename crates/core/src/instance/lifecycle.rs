//! The state of an instance and what observations make of it.

use serde::{Deserialize, Serialize};

/// The eight states of the contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum InstanceState {
    Created,
    Initializing,
    Running,
    Paused,
    Shutdown,
    Stopped,
    Standby,
    Unknown,
}

impl InstanceState {
    /// All states, in the order of a life.
    pub const ALL: [Self; 8] = [
        Self::Created,
        Self::Initializing,
        Self::Running,
        Self::Paused,
        Self::Shutdown,
        Self::Stopped,
        Self::Standby,
        Self::Unknown,
    ];

    /// The name used by the contract.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "Created",
            Self::Initializing => "Initializing",
            Self::Running => "Running",
            Self::Paused => "Paused",
            Self::Shutdown => "Shutdown",
            Self::Stopped => "Stopped",
            Self::Standby => "Standby",
            Self::Unknown => "Unknown",
        }
    }

    /// Whether waiting for another state is pointless without a new command: `GET /wait` returns early.
    #[must_use]
    pub fn is_settled(self) -> bool {
        matches!(self, Self::Stopped | Self::Standby | Self::Unknown)
    }
}

impl std::fmt::Display for InstanceState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How far the guest has come in this run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Readiness {
    /// The image's program was started.
    pub program_started: bool,
    /// The agent serves requests, or the instance asked to have none.
    pub agent_ready: bool,
}

impl Readiness {
    /// Whether the instance counts as running.
    #[must_use]
    pub fn complete(self) -> bool {
        self.program_started && self.agent_ready
    }
}

/// How the last run ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Code as a shell reports it. `None` when the run ended without the guest telling.
    pub code: Option<i32>,
    /// For people.
    pub message: String,
}

/// Why a state is `Unknown`. It decides what makes the state known again; the reason beside it is for people only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnknownCause {
    /// The guest's agent does not answer. Its machine may be well.
    Agent,
    /// The VMM does not answer, or its machine waits for memory that nobody gives it.
    Vmm,
    /// What was begun could neither be finished nor undone. Nobody is asked about it any more: it stays so until its VMM
    /// is gone.
    Leftover,
}

/// Where an instance is, with what is valid there.
///
/// Never stored: a server that starts looks at its machines anew. What records keep is the [`InstanceState`] alone, in
/// the [`PhaseClock`](super::PhaseClock).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lifecycle {
    /// The record exists; nothing runs yet.
    Created,
    /// A VMM runs and the guest is on its way.
    Initializing(Readiness),
    /// Program started, agent answering.
    Running,
    /// vCPUs are stopped.
    Paused,
    /// The guest was asked to power off, or says that it does.
    ShuttingDown,
    /// Nothing runs.
    Stopped,
    /// Memory and devices are kept on disk.
    Standby,
    /// A VMM exists, but what it does can't be learnt.
    Unknown {
        /// Why.
        cause: UnknownCause,
        /// Why, for people.
        reason: String,
        /// What it was before, to go back to when it answers again.
        before: Box<Lifecycle>,
    },
}

/// Something that was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Observation {
    /// The VMM runs the machine.
    Launched {
        /// No agent was asked for, so none is awaited.
        without_agent: bool,
    },
    /// The guest started the image's program.
    ProgramStarted,
    /// The guest's agent answers.
    AgentReady,
    /// vCPUs were stopped.
    Paused,
    /// vCPUs go on.
    Resumed,
    /// The guest was told to power off, or its program ended.
    ShutdownBegun,
    /// The VMM process is gone.
    VmmGone,
    /// Memory and devices are on disk for good, and no VMM runs.
    StandbyReached,
    /// A VMM runs on with memory and devices from disk.
    Restored {
        /// No agent was asked for, so none is awaited.
        without_agent: bool,
    },
    /// Memory and devices are no longer kept; only the disk counts.
    MemoryDropped,
    /// What it does can't be learnt any more.
    Unresponsive {
        /// Why.
        cause: UnknownCause,
        /// Why, for people.
        reason: String,
    },
    /// The guest's agent answers. Its words come through the VMM, so that one is not silent either.
    Responsive,
    /// The VMM answers, and its machine waits for nobody. Of the agent that says nothing.
    VmmResponsive,
}

impl Lifecycle {
    /// The state as the contract names it.
    #[must_use]
    pub fn state(&self) -> InstanceState {
        match self {
            Self::Created => InstanceState::Created,
            Self::Initializing(_) => InstanceState::Initializing,
            Self::Running => InstanceState::Running,
            Self::Paused => InstanceState::Paused,
            Self::ShuttingDown => InstanceState::Shutdown,
            Self::Stopped => InstanceState::Stopped,
            Self::Standby => InstanceState::Standby,
            Self::Unknown { .. } => InstanceState::Unknown,
        }
    }

    /// Why the state is `Unknown`.
    #[must_use]
    pub fn error(&self) -> Option<&str> {
        match self {
            Self::Unknown { reason, .. } => Some(reason),
            _ => None,
        }
    }

    /// Whether a VMM process belongs to this state.
    #[must_use]
    pub fn has_vmm(&self) -> bool {
        !matches!(self, Self::Created | Self::Stopped | Self::Standby)
    }

    /// What the state becomes after `observation`. Observations that mean nothing in a state leave it alone.
    #[must_use]
    pub fn observe(self, observation: &Observation) -> Self {
        match (self, observation) {
            (state, Observation::VmmGone) if state.has_vmm() => Self::Stopped,
            (Self::Created | Self::Stopped | Self::Standby, Observation::Launched { without_agent }) => {
                Self::Initializing(Readiness {
                    program_started: false,
                    agent_ready: *without_agent,
                })
            }
            // What is captured was running, so its program is started. Whether its agent answers is still to be seen.
            (Self::Created | Self::Stopped | Self::Standby, Observation::Restored { without_agent }) => {
                Self::progress(Readiness {
                    program_started: true,
                    agent_ready: *without_agent,
                })
            }
            (_, Observation::StandbyReached) => Self::Standby,
            (Self::Created | Self::Stopped | Self::Standby, Observation::MemoryDropped) => Self::Stopped,
            (state @ (Self::Created | Self::Stopped | Self::Standby), _) => state,
            (
                state @ Self::Unknown {
                    cause: UnknownCause::Leftover,
                    ..
                },
                Observation::Unresponsive { .. } | Observation::Responsive | Observation::VmmResponsive,
            ) => state,
            (Self::Unknown { before, .. }, Observation::Responsive) => *before,
            (
                Self::Unknown {
                    cause: UnknownCause::Vmm,
                    before,
                    ..
                },
                Observation::VmmResponsive,
            ) => *before,
            (Self::Unknown { before, .. }, Observation::Unresponsive { cause, reason }) => Self::Unknown {
                cause: *cause,
                reason: reason.clone(),
                before,
            },
            // Progress is remembered below the veil, so that nothing is missed when it lifts.
            (
                Self::Unknown {
                    cause,
                    reason,
                    before,
                },
                other,
            ) => Self::Unknown {
                cause,
                reason,
                before: Box::new(before.observe(other)),
            },
            (state, Observation::Unresponsive { cause, reason }) => Self::Unknown {
                cause: *cause,
                reason: reason.clone(),
                before: Box::new(state),
            },
            (Self::Initializing(readiness), Observation::ProgramStarted) => Self::progress(Readiness {
                program_started: true,
                ..readiness
            }),
            (Self::Initializing(readiness), Observation::AgentReady) => Self::progress(Readiness {
                agent_ready: true,
                ..readiness
            }),
            (Self::Running, Observation::Paused) => Self::Paused,
            (Self::Paused, Observation::Resumed) => Self::Running,
            (Self::Initializing(_) | Self::Running, Observation::ShutdownBegun) => Self::ShuttingDown,
            (state, _) => state,
        }
    }

    fn progress(readiness: Readiness) -> Self {
        if readiness.complete() {
            Self::Running
        } else {
            Self::Initializing(readiness)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cause() -> impl Strategy<Value = UnknownCause> {
        prop_oneof![
            Just(UnknownCause::Agent),
            Just(UnknownCause::Vmm),
            Just(UnknownCause::Leftover),
        ]
    }

    fn unresponsive(cause: UnknownCause) -> Observation {
        let reason = "nobody knows".to_owned();
        Observation::Unresponsive { cause, reason }
    }

    fn observation() -> impl Strategy<Value = Observation> {
        prop_oneof![
            any::<bool>().prop_map(|without_agent| Observation::Launched { without_agent }),
            Just(Observation::ProgramStarted),
            Just(Observation::AgentReady),
            Just(Observation::Paused),
            Just(Observation::Resumed),
            Just(Observation::ShutdownBegun),
            Just(Observation::VmmGone),
            Just(Observation::StandbyReached),
            any::<bool>().prop_map(|without_agent| Observation::Restored { without_agent }),
            Just(Observation::MemoryDropped),
            (cause(), "[a-z]{1,8}").prop_map(|(cause, reason)| Observation::Unresponsive { cause, reason }),
            Just(Observation::Responsive),
            Just(Observation::VmmResponsive),
        ]
    }

    proptest! {
        #[test]
        fn the_vmm_is_there_exactly_between_launch_and_its_end(history in prop::collection::vec(observation(), 0..40)) {
            let mut state = Lifecycle::Created;
            let mut vmm = false;
            for seen in &history {
                match seen {
                    Observation::Launched { .. } | Observation::Restored { .. } => vmm = true,
                    Observation::VmmGone | Observation::StandbyReached => vmm = false,
                    _ => {}
                }
                state = state.observe(seen);
                prop_assert_eq!(state.has_vmm(), vmm);
                prop_assert_eq!(state.error().is_some(), state.state() == InstanceState::Unknown);
            }
        }

        #[test]
        fn an_unknown_state_never_nests(history in prop::collection::vec(observation(), 0..40)) {
            let state = history.iter().fold(Lifecycle::Created, Lifecycle::observe);
            if let Lifecycle::Unknown { before, .. } = state {
                prop_assert_ne!(before.state(), InstanceState::Unknown);
            }
        }

        #[test]
        fn an_answer_of_the_vmm_clears_its_own_silence_and_nothing_else(
            history in prop::collection::vec(observation(), 0..40),
        ) {
            let state = history.iter().fold(Lifecycle::Created, Lifecycle::observe);
            let expected = match state.clone() {
                Lifecycle::Unknown { cause: UnknownCause::Vmm, before, .. } => *before,
                other => other,
            };
            prop_assert_eq!(state.observe(&Observation::VmmResponsive), expected);
        }

        #[test]
        fn the_words_of_a_reason_decide_nothing(history in prop::collection::vec(observation(), 0..40)) {
            let (mut state, mut reworded) = (Lifecycle::Created, Lifecycle::Created);
            for seen in history {
                state = state.observe(&seen);
                let other_words = match seen {
                    Observation::Unresponsive { cause, .. } => unresponsive(cause),
                    other => other,
                };
                reworded = reworded.observe(&other_words);
                prop_assert_eq!(reworded.state(), state.state());
            }
        }

        #[test]
        fn what_was_left_over_is_told_until_its_vmm_is_gone(
            history in prop::collection::vec(observation(), 0..40),
        ) {
            let leftover = Lifecycle::Running.observe(&unresponsive(UnknownCause::Leftover));
            let is_end = |seen: &Observation| matches!(seen, Observation::VmmGone | Observation::StandbyReached);
            let until_then = history.iter().take_while(|&seen| !is_end(seen));
            let state = until_then.fold(leftover.clone(), Lifecycle::observe);
            prop_assert_eq!(state.error(), leftover.error());
        }

        #[test]
        fn the_order_of_program_and_agent_does_not_matter(agent_first in any::<bool>()) {
            let order = if agent_first {
                [Observation::AgentReady, Observation::ProgramStarted]
            } else {
                [Observation::ProgramStarted, Observation::AgentReady]
            };
            let launched = Lifecycle::Created.observe(&Observation::Launched { without_agent: false });
            let half = launched.observe(&order[0]);
            prop_assert_eq!(half.state(), InstanceState::Initializing);
            prop_assert_eq!(half.observe(&order[1]), Lifecycle::Running);
        }
    }

    #[test]
    fn standby_is_left_by_being_restored_or_by_losing_the_memory() {
        let standby = Lifecycle::Running.observe(&Observation::StandbyReached);
        assert_eq!(standby, Lifecycle::Standby);
        let restored = standby
            .clone()
            .observe(&Observation::Restored { without_agent: false });
        assert_eq!(restored.state(), InstanceState::Initializing);
        assert_eq!(restored.observe(&Observation::AgentReady), Lifecycle::Running);
        let without_agent = standby
            .clone()
            .observe(&Observation::Restored { without_agent: true });
        assert_eq!(without_agent, Lifecycle::Running);
        assert_eq!(
            standby.clone().observe(&Observation::MemoryDropped),
            Lifecycle::Stopped
        );
        assert_eq!(standby.clone().observe(&Observation::VmmGone), standby);
        assert_eq!(
            Lifecycle::Running.observe(&Observation::MemoryDropped),
            Lifecycle::Running
        );
    }

    #[test]
    fn readiness_gained_while_nobody_could_look_counts() {
        let state = [
            Observation::Launched { without_agent: false },
            Observation::ProgramStarted,
            unresponsive(UnknownCause::Agent),
            Observation::AgentReady,
            Observation::Responsive,
        ]
        .iter()
        .fold(Lifecycle::Created, Lifecycle::observe);
        assert_eq!(state, Lifecycle::Running);
    }

    #[test]
    fn an_agent_that_answers_speaks_for_its_vmm_and_not_the_other_way_round() {
        let silent = |cause| Lifecycle::Running.observe(&unresponsive(cause));
        for cause in [UnknownCause::Agent, UnknownCause::Vmm] {
            assert_eq!(
                silent(cause).observe(&Observation::Responsive),
                Lifecycle::Running
            );
        }
        let lost_agent = silent(UnknownCause::Agent);
        assert_eq!(
            lost_agent.clone().observe(&Observation::VmmResponsive),
            lost_agent
        );
    }

    #[test]
    fn what_was_told_last_counts() {
        let state = [
            unresponsive(UnknownCause::Vmm),
            unresponsive(UnknownCause::Agent),
            Observation::VmmResponsive,
        ]
        .iter()
        .fold(Lifecycle::Running, Lifecycle::observe);
        assert_eq!(state.state(), InstanceState::Unknown);
    }
}
