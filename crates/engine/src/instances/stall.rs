//! Whether a machine stands still because the host has no space for what its guest writes.
//!
//! ```text
//!        stalled              not stalled               not stalled
//!  No ───────────► Stalled ───────────────► Doubtful ───────────────► No
//!                     ▲         stalled         │
//!                     └─────────────────────────┘
//! ```
//!
//! The VMM tries the write again and again, and for the instant of each try it seems to run. So one look that finds it
//! running proves nothing, a second one does. A stalled machine is told at once: a VMM says so for no other reason.

use hypeman_vmm::RunState;

/// What the looks at a machine have shown so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Stall {
    /// It gets on.
    #[default]
    No,
    /// It waits for space.
    Stalled,
    /// It waited for space at the last look but one.
    Doubtful,
}

impl Stall {
    /// After a look that found `state`.
    pub(super) fn seen(self, state: RunState) -> Self {
        match (state, self) {
            (RunState::Stalled, _) => Self::Stalled,
            (_, Self::Stalled) => Self::Doubtful,
            (_, Self::Doubtful | Self::No) => Self::No,
        }
    }

    /// For people, while it lasts.
    pub(super) fn reason(self) -> Option<&'static str> {
        match self {
            Self::No => None,
            Self::Stalled | Self::Doubtful => {
                Some("no space on the host for its disk; it goes on by itself once there is")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(looks: &[RunState]) -> Vec<bool> {
        let mut stall = Stall::default();
        let mut told = Vec::new();
        for &state in looks {
            stall = stall.seen(state);
            told.push(stall.reason().is_some());
        }
        told
    }

    #[test]
    fn it_is_told_from_the_first_look_to_the_second_that_finds_it_running() {
        use RunState::{Paused, Running, Stalled};
        assert_eq!(told(&[Running, Paused, Running]), [false; 3]);
        assert_eq!(
            told(&[Running, Stalled, Running, Running, Running]),
            [false, true, true, false, false]
        );
    }

    #[test]
    fn a_try_in_between_does_not_make_it_flicker() {
        use RunState::{Running, Stalled};
        assert_eq!(told(&[Stalled, Running, Stalled, Running, Stalled]), [true; 5]);
    }
}
