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
//! is told; one answer clears it, also one that is a no.
//!
//! Whatever else it is asked for that can wait, waits from the first miss to the next answer: a VMM that hangs holds up its
//! driver once, and only its checks, which are short, go on.

use hypeman_vmm::VmmError;

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
    /// After a check that came to this.
    pub(super) fn after<T>(self, check: &Result<T, VmmError>) -> Self {
        match check {
            Ok(_) | Err(VmmError::Refused { .. }) => Self::Answers,
            Err(VmmError::Unresponsive { .. } | VmmError::Unanswered { .. } | VmmError::Io { .. }) => {
                self.missed()
            }
            // Its end is told by the process itself.
            Err(_) => self,
        }
    }

    fn missed(self) -> Self {
        match self {
            Self::Answers => Self::Missed,
            Self::Missed | Self::Silent => Self::Silent,
        }
    }

    /// Whether it may be asked for what can wait.
    pub(super) fn may_be_asked(self) -> bool {
        self == Self::Answers
    }

    /// Whether it is to be told.
    pub(super) fn is_told(self) -> bool {
        self == Self::Silent
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    type Check = Result<(), VmmError>;

    /// What is told after each check of which `true` was answered, whatever the answer, and whatever was missed.
    fn told(checks: &[bool]) -> Vec<bool> {
        let answers: [fn() -> Check; 2] = [
            || Ok(()),
            || {
                Err(VmmError::Refused {
                    command: "vm.info".into(),
                    message: "no".into(),
                })
            },
        ];
        let misses: [fn() -> Check; 3] = [
            || {
                Err(VmmError::Unresponsive {
                    command: "vm.info".into(),
                    after: Duration::from_millis(800),
                })
            },
            || {
                Err(VmmError::Unanswered {
                    command: "vm.info".into(),
                    reason: "the connection ended".into(),
                })
            },
            || {
                Err(VmmError::Io {
                    context: "cannot connect".into(),
                    source: std::io::ErrorKind::ConnectionRefused.into(),
                })
            },
        ];
        let mut silence = Silence::default();
        let mut told = Vec::new();
        for (at, &answered) in checks.iter().enumerate() {
            let check = match answered {
                true => answers[at % answers.len()](),
                false => misses[at % misses.len()](),
            };
            silence = silence.after(&check);
            told.push(silence.is_told());
        }
        told
    }

    #[test]
    fn one_missed_check_is_no_news_and_the_second_in_a_row_is() {
        assert_eq!(told(&[true, false, false, false]), [false, false, true, true]);
    }

    #[test]
    fn the_end_of_the_process_is_neither_an_answer_nor_a_miss() {
        for silence in [Silence::Answers, Silence::Missed, Silence::Silent] {
            assert_eq!(silence.after::<()>(&Err(VmmError::Gone)), silence);
        }
    }

    #[test]
    fn an_answer_clears_it_and_misses_are_counted_anew() {
        assert_eq!(told(&[false, true, false, true, false]), [false; 5]);
        assert_eq!(
            told(&[false, false, true, false, false]),
            [false, true, false, false, true]
        );
    }

    proptest! {
        /// A driver has turns, with and without a check before it asks for something that can wait; what comes of that
        /// counts like a check.
        #[test]
        fn a_vmm_that_hangs_holds_up_one_turn_and_is_asked_again_once_it_answers(
            turns in prop::collection::vec(any::<(bool, bool)>(), 0..60),
        ) {
            let mut silence = Silence::default();
            let mut held_up = 0;
            for (hangs, is_checked) in turns {
                let outcome: Check = match hangs {
                    true => Err(VmmError::Unresponsive {
                        command: "vm.resize-zone".into(),
                        after: Duration::from_secs(10),
                    }),
                    false => Ok(()),
                };
                if is_checked {
                    silence = silence.after(&outcome);
                }
                let is_asked = silence.may_be_asked();
                if is_asked {
                    silence = silence.after(&outcome);
                }
                prop_assert!(is_asked || hangs || !is_checked, "it answers, and is not asked");
                held_up = match (hangs, is_asked || is_checked) {
                    (true, _) => held_up + u32::from(is_asked),
                    (false, true) => 0,
                    (false, false) => held_up,
                };
                prop_assert!(held_up <= 1);
            }
        }
    }
}
