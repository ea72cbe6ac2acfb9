//! Instances: the driver of each, the table of all, their disks and logs.

mod action_log;
mod added_memory;
mod books;
mod boot;
pub(crate) mod capture;
mod create;
pub(crate) mod disks;
mod driver;
pub(crate) mod fork;
mod instant;
mod link;
mod loadable;
mod log_watch;
mod logs;
mod model;
mod recovery;
mod reports;
mod request;
pub(crate) mod rewind;
mod rotation;
mod shutdown;
mod silence;
mod stall;
mod standby;
mod stillness;
mod stranded;
mod table;

pub(crate) use create::{check_hypervisor, check_size, create};
pub(crate) use log_watch::LogWatcher;
pub use logs::LogFollower;
pub use model::{
    CreateInstance, Expiry, Instance, InstanceFilter, InstanceRecord, InstanceStats, InstanceUpdate,
    LogSource, NetworkRecord, NetworkRequest, RunRecord, StandbyRecord, StartOverrides, WaitOutcome,
};
pub(crate) use recovery::recover;
pub(crate) use request::Request;
pub(crate) use rotation::{GROWTH_CHECK, overgrown};
pub(crate) use table::{Slot, Table};
