//! What can be changed while the machine runs.

use std::io;

use async_trait::async_trait;
use hypeman_jail::{Show, hide_from, show_to};
use serde_json::json;

use super::config::{self, ZONE};
use super::machine::CloudHypervisorMachine;
use crate::blocking::blocking;
use crate::files::io_error;
use crate::rest::CALL_DEADLINE;
use crate::{Adjust, Disk, Machine, VmmError};

#[async_trait]
impl Adjust for CloudHypervisorMachine {
    async fn set_memory(&self, bytes: u64) -> Result<(), VmmError> {
        let wanted = json!({ "id": ZONE, "desired_ram": bytes });
        self.control()
            .order("vm.resize-zone", Some(&wanted), CALL_DEADLINE)
            .await
            .map(drop)
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
        // Not of an answer that is missing: it may have the disk.
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
        self.hide(disk).await
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
