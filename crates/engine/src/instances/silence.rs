//! Whether a VMM is silent, or was only late once.
//!
//! ```text
//!            missed             missed
//!  Answers ─────────► Missed ─────────► Silent ──┐ missed
//!     ▲                  │                │  ▲───┘
//!     └───── answered ───┴──── answered ──┘
//! ```
//!
//! On a host that is short of processors a VMM that is well may let a check pass. A second one in a row proves more, and
//! is told; one answer clears it.

/// What the checks of a VMM have shown so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Silence {
    /// It answered the last check.
    #[default]
    Answers,
    /// It let one check pass.
    Missed,
    /// It let two or more pass, one after the other.
    Silent,
}

impl Silence {
    /// After a check without an answer.
    pub(super) fn missed(self) -> Self {
        match self {
            Self::Answers => Self::Missed,
            Self::Missed | Self::Silent => Self::Silent,
        }
    }

    /// Whether it is to be told.
    pub(super) fn is_told(self) -> bool {
        self == Self::Silent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is told after each check of which `true` was answered.
    fn told(checks: &[bool]) -> Vec<bool> {
        let mut silence = Silence::default();
        let mut told = Vec::new();
        for answered in checks {
            silence = match answered {
                true => Silence::default(),
                false => silence.missed(),
            };
            told.push(silence.is_told());
        }
        told
    }

    #[test]
    fn one_missed_check_is_no_news_and_the_second_in_a_row_is() {
        assert_eq!(told(&[true, false, false, false]), [false, false, true, true]);
    }

    #[test]
    fn an_answer_clears_it_and_misses_are_counted_anew() {
        assert_eq!(told(&[false, true, false, true, false]), [false; 5]);
        assert_eq!(
            told(&[false, false, true, false, false]),
            [false, true, false, false, true]
        );
    }
}
