//! Which state and which hypervisor a restored or forked instance gets.

use super::SnapshotKind;
use crate::instance::InstanceState;

/// States that an instance can be made in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Its guest goes on, or boots when there is no memory.
    Running,
    /// Its memory stays on disk.
    Standby,
    /// Only its disk is used.
    Stopped,
}

impl From<Target> for InstanceState {
    fn from(target: Target) -> Self {
        match target {
            Target::Running => Self::Running,
            Target::Standby => Self::Standby,
            Target::Stopped => Self::Stopped,
        }
    }
}

/// A target that cannot be. Permanent, and the request's fault: the contract's code is `invalid_request`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetRefusal {
    /// Not one of the three.
    #[error("target_state must be Running, Standby or Stopped, not {0}")]
    NotATarget(InstanceState),
    /// Standby without memory.
    #[error("target_state Standby needs memory, and only the disk is there; use Stopped or Running")]
    NoMemory,
    /// Memory of one hypervisor for another.
    #[error(
        "target_hypervisor can differ only for snapshots of kind Stopped: memory and devices belong to the \
         hypervisor that they were captured from; leave it out"
    )]
    ForeignMemory,
}

/// The state that a snapshot is restored or forked to.
///
/// # Errors
/// [`TargetRefusal`] when the kind cannot become what was asked for.
pub fn snapshot_target(
    kind: SnapshotKind,
    requested: Option<InstanceState>,
) -> Result<Target, TargetRefusal> {
    let default = match kind {
        SnapshotKind::Standby => Target::Running,
        SnapshotKind::Stopped => Target::Stopped,
    };
    choose(kind.has_memory(), default, requested)
}

/// The state of a fork of an instance that is `source` now: the same when nothing was asked for.
///
/// # Errors
/// [`TargetRefusal`] when the source cannot become what was asked for, or cannot be forked in its state at all.
pub fn fork_target(source: InstanceState, requested: Option<InstanceState>) -> Result<Target, TargetRefusal> {
    let (has_memory, default) = match source {
        InstanceState::Running => (true, Target::Running),
        InstanceState::Standby => (true, Target::Standby),
        InstanceState::Stopped => (false, Target::Stopped),
        other => return Err(TargetRefusal::NotATarget(other)),
    };
    choose(has_memory, default, requested)
}

fn choose(
    has_memory: bool,
    default: Target,
    requested: Option<InstanceState>,
) -> Result<Target, TargetRefusal> {
    match requested {
        None => Ok(default),
        Some(InstanceState::Running) => Ok(Target::Running),
        Some(InstanceState::Stopped) => Ok(Target::Stopped),
        Some(InstanceState::Standby) if has_memory => Ok(Target::Standby),
        Some(InstanceState::Standby) => Err(TargetRefusal::NoMemory),
        Some(other) => Err(TargetRefusal::NotATarget(other)),
    }
}

/// The hypervisor of what is made of a snapshot taken from `source`.
///
/// # Errors
/// [`TargetRefusal::ForeignMemory`] when there is memory and another hypervisor was asked for.
pub fn hypervisor_of<H: PartialEq>(
    kind: SnapshotKind,
    source: H,
    requested: Option<H>,
) -> Result<H, TargetRefusal> {
    match requested {
        Some(other) if kind.has_memory() && other != source => Err(TargetRefusal::ForeignMemory),
        Some(other) => Ok(other),
        None => Ok(source),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_table_of_the_contract() {
        use InstanceState as S;
        for (kind, requested, expected) in [
            (SnapshotKind::Standby, None, Ok(Target::Running)),
            (SnapshotKind::Standby, Some(S::Running), Ok(Target::Running)),
            (SnapshotKind::Standby, Some(S::Standby), Ok(Target::Standby)),
            (SnapshotKind::Standby, Some(S::Stopped), Ok(Target::Stopped)),
            (SnapshotKind::Stopped, None, Ok(Target::Stopped)),
            (SnapshotKind::Stopped, Some(S::Stopped), Ok(Target::Stopped)),
            (SnapshotKind::Stopped, Some(S::Running), Ok(Target::Running)),
            (
                SnapshotKind::Stopped,
                Some(S::Standby),
                Err(TargetRefusal::NoMemory),
            ),
        ] {
            assert_eq!(
                snapshot_target(kind, requested),
                expected,
                "{kind} to {requested:?}"
            );
        }
    }

    #[test]
    fn a_fork_of_an_instance_is_as_its_source_unless_told() {
        use InstanceState as S;
        for source in [S::Running, S::Standby, S::Stopped] {
            assert_eq!(S::from(fork_target(source, None).unwrap()), source);
        }
        assert_eq!(
            fork_target(S::Stopped, Some(S::Standby)),
            Err(TargetRefusal::NoMemory)
        );
        assert_eq!(fork_target(S::Standby, Some(S::Stopped)), Ok(Target::Stopped));
        assert_eq!(
            fork_target(S::Unknown, None),
            Err(TargetRefusal::NotATarget(S::Unknown))
        );
    }

    #[test]
    fn only_a_disk_changes_its_hypervisor() {
        use SnapshotKind::{Standby, Stopped};
        assert_eq!(
            hypervisor_of(Stopped, "qemu", Some("qemu-microvm")),
            Ok("qemu-microvm")
        );
        assert_eq!(hypervisor_of(Stopped, "qemu", None), Ok("qemu"));
        assert_eq!(hypervisor_of(Standby, "qemu", Some("qemu")), Ok("qemu"));
        assert_eq!(
            hypervisor_of(Standby, "qemu", Some("qemu-microvm")),
            Err(TargetRefusal::ForeignMemory)
        );
    }

    proptest! {
        #[test]
        fn nothing_without_memory_becomes_standby(
            source in prop::sample::select(InstanceState::ALL.to_vec()),
            requested in prop::option::of(prop::sample::select(InstanceState::ALL.to_vec())),
        ) {
            prop_assert_ne!(snapshot_target(SnapshotKind::Stopped, requested), Ok(Target::Standby));
            if let Ok(Target::Standby) = fork_target(source, requested) {
                prop_assert!(matches!(source, InstanceState::Running | InstanceState::Standby));
            }
            // What was asked for is what one gets, or nothing.
            if let (Ok(target), Some(wanted)) = (fork_target(source, requested), requested) {
                prop_assert_eq!(InstanceState::from(target), wanted);
            }
        }
    }
}
