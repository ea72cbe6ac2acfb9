//! What can be changed while the machine runs.

use std::io;

use async_trait::async_trait;
use hypeman_jail::{Show, hide_from, show_to};
use serde_json::{Value, json};

use super::config::{self, ZONE};
use super::machine::CloudHypervisorMachine;
use crate::blocking::blocking;
use crate::files::io_error;
use crate::rest::CALL_DEADLINE;
use crate::{Adjust, Disk, Machine, VmmError};

/// What Cloud Hypervisor says of the machine's memory, in bytes.
#[derive(Debug, PartialEq, Eq)]
struct Zone {
    /// What it began with.
    size: u64,
    /// What it was told to have beside that.
    asked: u64,
    /// What the guest has of that.
    added: u64,
}

impl Zone {
    fn of(info: &Value) -> Result<Self, VmmError> {
        let told = &info["config"]["memory"]["zones"][0];
        let (Some(size), Some(actual)) = (told["size"].as_u64(), info["memory_actual_size"].as_u64()) else {
            return Err(VmmError::Refused {
                command: "vm.info".to_owned(),
                message: "it does not say how much memory there is".to_owned(),
            });
        };
        // What a balloon holds is not told, only what it should hold: on its way there this is off by the rest, too much
        // while it grows and too little while it shrinks. A device state is looked at itself before it is given out.
        let balloon = info["config"]["balloon"]["size"].as_u64().unwrap_or(0);
        Ok(Self {
            size,
            asked: told["hotplugged_size"].as_u64().unwrap_or(0),
            added: actual.saturating_sub(size.saturating_sub(balloon)),
        })
    }
}

#[async_trait]
impl Adjust for CloudHypervisorMachine {
    async fn set_memory(&self, bytes: u64) -> Result<(), VmmError> {
        let wanted = config::zone_bytes(self.spec(), bytes);
        let zone = Zone::of(&self.control().info(CALL_DEADLINE).await?)?;
        // It refuses to be told what it knows.
        if zone.size.saturating_add(zone.asked) == wanted {
            return Ok(());
        }
        let order = json!({ "id": ZONE, "desired_ram": wanted });
        self.control()
            .order("vm.resize-zone", Some(&order), CALL_DEADLINE)
            .await
            .map(drop)
    }

    async fn added_memory(&self) -> Result<u64, VmmError> {
        let zone = Zone::of(&self.control().info(CALL_DEADLINE).await?)?;
        Ok(zone.added)
    }

    async fn set_balloon(&self, bytes: u64) -> Result<(), VmmError> {
        let wanted = json!({ "desired_balloon": bytes });
        self.control()
            .order("vm.resize", Some(&wanted), CALL_DEADLINE)
            .await
            .map(drop)
    }

    async fn attach_disk(&self, index: usize, disk: &Disk) -> Result<(), VmmError> {
        let description = config::disk((index, disk))?;
        let show = match disk.read_only {
            true => Show::shared(&disk.path),
            false => Show::own(&disk.path),
        };
        let pid = self.process().pid;
        blocking(move || show_to(pid, &show).map_err(io::Error::other))
            .await
            .map_err(io_error("cannot show its VMM", &disk.path))?;
        let added = self
            .control()
            .order("vm.add-disk", Some(&description), CALL_DEADLINE)
            .await;
        // Only where it said no: after an answer that is missing it may have the disk.
        if matches!(added, Err(VmmError::Refused { .. }))
            && let Err(error) = self.hide(disk).await
        {
            tracing::warn!(%error, "a VMM still sees a disk that it refused");
        }
        added.map(drop)
    }

    async fn detach_disk(&self, index: usize, disk: &Disk) -> Result<(), VmmError> {
        let which = json!({ "id": config::disk_id(index) });
        self.control()
            .order("vm.remove-device", Some(&which), CALL_DEADLINE)
            .await?;
        // It keeps the file open until its guest has let go of the disk, and never finds it again.
        if let Err(error) = self.hide(disk).await {
            tracing::warn!(%error, "a VMM still sees a disk that was taken from it");
        }
        Ok(())
    }

    async fn resize_disk(&self, index: usize, bytes: u64) -> Result<(), VmmError> {
        let wanted = json!({ "id": config::disk_id(index), "desired_size": bytes });
        self.control()
            .order("vm.resize-disk", Some(&wanted), CALL_DEADLINE)
            .await
            .map(drop)
    }
}

impl CloudHypervisorMachine {
    /// Takes the file of a disk from the sight of the VMM.
    async fn hide(&self, disk: &Disk) -> Result<(), VmmError> {
        let (pid, path) = (self.process().pid, disk.path.clone());
        blocking(move || hide_from(pid, &path).map_err(io::Error::other))
            .await
            .map_err(io_error("cannot hide from its VMM", &disk.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_added_is_told_from_what_was_there() {
        let info = |asked: Value, balloon: u64, actual: u64| {
            json!({
                "config": {
                    "memory": { "size": 0, "zones": [{ "id": ZONE, "size": 1 << 30, "hotplugged_size": asked }] },
                    "balloon": { "size": balloon },
                },
                "memory_actual_size": actual,
            })
        };
        let zone = |asked, added| Zone {
            size: 1 << 30,
            asked,
            added,
        };
        let seen = |info: Value| Zone::of(&info).unwrap();
        assert_eq!(seen(info(Value::Null, 0, 1 << 30)), zone(0, 0));
        assert_eq!(
            seen(info(json!(256 << 20), 0, (1 << 30) + (64 << 20))),
            zone(256 << 20, 64 << 20)
        );
        assert_eq!(seen(info(json!(0), 32 << 20, (1 << 30) - (32 << 20))), zone(0, 0));
        assert!(Zone::of(&json!({ "config": {} })).is_err());
    }
}
