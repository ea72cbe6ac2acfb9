//! What of a paused machine belongs to one instant, and the order in which it is taken.
//!
//! ```text
//!  together:         save ─► keep                 devices first:    save ─┬─► keep
//!                    settle ─► memory                               │     ├─► settle ─► memory
//!                    disk                                           │     └─► disk
//!                                                                   └─ failed: nothing else
//! ```
//!
//! Invariants:
//! - Of a machine whose devices still write until their state is saved, memory and disk are looked at after that, and not
//!   at all where it failed: the guest does not stand still for copies that nobody can use.
//! - Served memory is settled right before it is looked at: what has written to it had pages brought.
//! - What was begun has come to its end when the guest may go on.

use hypeman_vmm::Machine;

use crate::EngineError;

/// When memory and disk may be looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Beside the saving of the devices.
    Together,
    /// Once the devices are saved.
    DevicesFirst,
}

impl Order {
    /// The fastest that this machine bears.
    pub(super) fn of(machine: &dyn Machine) -> Self {
        if machine.rests_while_saving() {
            Self::Together
        } else {
            Self::DevicesFirst
        }
    }
}

/// One instant of a paused machine: the ways to all that is taken of it. None of them is begun before [`Moment::take`].
pub(super) struct Moment<Save, Keep, Settle, Memory, Disk> {
    /// Saves the devices.
    pub(super) save: Save,
    /// Puts their state where it is to be.
    pub(super) keep: Keep,
    /// Makes the page tables tell what memory there is, and whether it is still served.
    pub(super) settle: Settle,
    /// Takes the memory, which is still served or not.
    pub(super) memory: Memory,
    /// Fixes the instant of the disk.
    pub(super) disk: Disk,
}

impl<Save, Keep, Settle, Memory, Disk> Moment<Save, Keep, Settle, Memory, Disk> {
    /// Takes all of it from a paused machine: the devices as they were kept, and the memory.
    ///
    /// # Errors
    /// Those of the parts.
    pub(super) async fn take<State, Keeping, Devices, Taking, Taken>(
        self,
        order: Order,
    ) -> Result<(Devices, Taken), EngineError>
    where
        Save: Future<Output = Result<State, EngineError>>,
        Keep: FnOnce(State) -> Keeping,
        Keeping: Future<Output = Result<Devices, EngineError>>,
        Settle: Future<Output = Result<bool, EngineError>>,
        Memory: FnOnce(bool) -> Taking,
        Taking: Future<Output = Result<Taken, EngineError>>,
        Disk: Future<Output = Result<(), EngineError>>,
    {
        let Self {
            save,
            keep,
            settle,
            memory,
            disk,
        } = self;
        let taking = async move {
            let served = settle.await?;
            memory(served).await
        };
        let (devices, taken, disk) = match order {
            Order::Together => {
                let keeping = async move {
                    let state = save.await?;
                    keep(state).await
                };
                tokio::join!(keeping, taking, disk)
            }
            Order::DevicesFirst => {
                let state = save.await?;
                tokio::join!(keep(state), taking, disk)
            }
        };
        disk?;
        Ok((devices?, taken?))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// Which step fails.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Fails {
        Nothing,
        Save,
        Memory,
    }

    fn outcome(fails: bool) -> Result<(), EngineError> {
        match fails {
            true => Err(EngineError::InvalidState("as the test wants it".into())),
            false => Ok(()),
        }
    }

    /// Takes parts that only note when they are begun, or done where that is later.
    async fn taken(order: Order, fails: Fails) -> (bool, Vec<&'static str>) {
        let steps = RefCell::new(Vec::new());
        let note = |step: &'static str| steps.borrow_mut().push(step);
        let note = &note;
        let moment = Moment {
            save: async move {
                note("saving");
                tokio::task::yield_now().await;
                note("saved");
                outcome(fails == Fails::Save)
            },
            keep: move |()| async move {
                note("kept");
                outcome(false)
            },
            settle: async move {
                note("settled");
                Ok(true)
            },
            memory: move |served: bool| async move {
                assert!(served);
                note("memory");
                outcome(fails == Fails::Memory)
            },
            disk: async move {
                note("disk");
                tokio::task::yield_now().await;
                note("disk fixed");
                outcome(false)
            },
        };
        let whole = moment.take(order).await.is_ok();
        (whole, steps.take())
    }

    #[track_caller]
    fn assert_in_order(steps: &[&str], expected: &[&str]) {
        let places: Vec<_> = expected
            .iter()
            .map(|wanted| steps.iter().position(|step| step == wanted))
            .collect();
        assert!(places.iter().all(Option::is_some), "{steps:?}");
        assert!(places.is_sorted(), "{steps:?} instead of {expected:?}");
    }

    #[tokio::test]
    async fn memory_and_disk_wait_for_devices_that_write_until_they_are_saved() {
        let (whole, steps) = taken(Order::DevicesFirst, Fails::Nothing).await;
        assert!(whole);
        assert_in_order(&steps, &["saving", "saved", "settled", "memory"]);
        assert_in_order(&steps, &["saved", "disk", "disk fixed"]);
        assert_in_order(&steps, &["saved", "kept"]);
    }

    #[tokio::test]
    async fn a_machine_that_rests_gives_all_at_the_same_time() {
        let (whole, steps) = taken(Order::Together, Fails::Nothing).await;
        assert!(whole);
        assert_in_order(&steps, &["settled", "memory", "saved", "kept"]);
        assert_in_order(&steps, &["disk", "saved"]);
    }

    #[tokio::test]
    async fn devices_that_cannot_be_saved_cost_the_guest_no_copy() {
        let (whole, steps) = taken(Order::DevicesFirst, Fails::Save).await;
        assert!(!whole);
        assert_eq!(steps, ["saving", "saved"]);
    }

    #[tokio::test]
    async fn whatever_fails_the_guest_goes_on_only_after_all_that_was_begun() {
        for order in [Order::Together, Order::DevicesFirst] {
            let (whole, steps) = taken(order, Fails::Memory).await;
            assert!(!whole);
            assert_in_order(&steps, &["saved", "kept"]);
            assert_in_order(&steps, &["disk", "disk fixed"]);
        }
        let (whole, steps) = taken(Order::Together, Fails::Save).await;
        assert!(!whole);
        assert_in_order(&steps, &["settled", "memory"]);
        assert_in_order(&steps, &["disk", "disk fixed"]);
        assert!(!steps.contains(&"kept"));
    }
}
