//! What the driver of an instance can be asked for, and what the journal calls it.

use std::sync::Arc;

use hypeman_core::instance::{Command, InstanceState};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::capture::{CapturePlan, Captured};
use super::model::{Instance, InstanceUpdate, StartOverrides};
use super::rewind::Target;
use crate::EngineError;
use crate::snapshots::leases::Lease;
use crate::snapshots::{Snapshot, StandbyRequest};

/// An operation in the journal. What recovery does with it stands in `recovery`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Operation {
    /// Undone: the client was never told of the instance.
    Create,
    /// Undone: the instance is stopped.
    Start,
    /// Finished.
    Stop,
    /// Finished.
    Delete,
    /// Undone before the state is committed: the guest goes on. Finished after.
    Standby,
    /// Undone before the machine is committed: still in standby. Finished after.
    Restore,
    /// Undone: the guest goes on.
    Capture,
}

impl Operation {
    /// Whether a machine that was running when it was cut goes on.
    pub(crate) fn spares_machine(self) -> bool {
        matches!(self, Self::Standby | Self::Restore | Self::Capture)
    }

    /// As it stands in the journal.
    pub(crate) fn encode(self) -> String {
        serde_json::to_string(&self).unwrap_or_default()
    }
}

pub(crate) type Reply<T> = oneshot::Sender<Result<T, EngineError>>;

/// What can be asked of a driver.
#[derive(Debug)]
pub(crate) enum Request {
    /// First boot, asked by the creation; a failure removes the instance.
    Boot(Reply<Arc<Instance>>),
    /// Boot again.
    Start(StartOverrides, Reply<Arc<Instance>>),
    /// Power off.
    Stop(Reply<Arc<Instance>>),
    /// Change what may change.
    Update(InstanceUpdate, Reply<Arc<Instance>>),
    /// Remove for good.
    Delete {
        /// Give the guest time to end.
        graceful: bool,
        /// Answer.
        reply: Reply<()>,
    },
    /// Keep memory and devices on disk and let the machine go.
    Standby(StandbyRequest, Reply<Arc<Instance>>),
    /// Go on from standby.
    Restore(Reply<Arc<Instance>>),
    /// Take the parts of a snapshot, when `permit` allows it.
    Capture {
        /// For the decision.
        command: Command,
        /// What they become.
        plan: Box<CapturePlan>,
        /// Answer.
        reply: Reply<Captured>,
    },
    /// Become what a snapshot holds.
    Rewind {
        /// Snapshot.
        snapshot: Snapshot,
        /// Keeps its parts, whatever becomes of the client.
        lease: Lease,
        /// In which state, on what.
        target: Target,
        /// Answer.
        reply: Reply<Arc<Instance>>,
    },
    /// First life of a fork, asked by its creation; a failure removes the instance.
    Hatch {
        /// What it is a copy of.
        parts: Snapshot,
        /// In which state it begins.
        target: InstanceState,
        /// Answer.
        reply: Reply<Arc<Instance>>,
    },
    /// Look at the sizes of the logs.
    RotateLogs,
}
