//! What can be changed while the machine runs.

use async_trait::async_trait;
use hypeman_jail::{Show, show_to};
use serde_json::json;

use super::config::{self, ZONE};
use super::machine::CloudHypervisorMachine;
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
        let shown = tokio::task::spawn_blocking(move || show_to(pid, &show)).await;
        shown
            .map_err(std::io::Error::other)
            .and_then(|shown| shown.map_err(std::io::Error::other))
            .map_err(io_error("cannot show its VMM", &disk.path))?;
        self.control()
            .order("vm.add-disk", Some(&description), CALL_DEADLINE)
            .await
            .map(drop)
    }

    async fn detach_disk(&self, index: usize) -> Result<(), VmmError> {
        let which = json!({ "id": config::disk_id(index) });
        self.control()
            .order("vm.remove-device", Some(&which), CALL_DEADLINE)
            .await
            .map(drop)
    }

    async fn resize_disk(&self, index: usize, bytes: u64) -> Result<(), VmmError> {
        let wanted = json!({ "id": config::disk_id(index), "desired_size": bytes });
        self.control()
            .order("vm.resize-disk", Some(&wanted), CALL_DEADLINE)
            .await
            .map(drop)
    }
}
