//! What can be changed while the machine runs.

use async_trait::async_trait;
use serde_json::json;

use super::config::{self, ZONE};
use super::control::Control;
use crate::rest::CALL_DEADLINE;
use crate::{Adjust, Disk, VmmError};

#[async_trait]
impl Adjust for Control {
    async fn set_memory(&self, bytes: u64) -> Result<(), VmmError> {
        let wanted = json!({ "id": ZONE, "desired_ram": bytes });
        self.order("vm.resize-zone", Some(&wanted), CALL_DEADLINE)
            .await
            .map(drop)
    }

    async fn set_balloon(&self, bytes: u64) -> Result<(), VmmError> {
        let wanted = json!({ "desired_balloon": bytes });
        self.order("vm.resize", Some(&wanted), CALL_DEADLINE)
            .await
            .map(drop)
    }

    async fn attach_disk(&self, index: usize, disk: &Disk) -> Result<(), VmmError> {
        let description = config::disk((index, disk))?;
        self.order("vm.add-disk", Some(&description), CALL_DEADLINE)
            .await
            .map(drop)
    }

    async fn detach_disk(&self, index: usize) -> Result<(), VmmError> {
        let which = json!({ "id": config::disk_id(index) });
        self.order("vm.remove-device", Some(&which), CALL_DEADLINE)
            .await
            .map(drop)
    }

    async fn resize_disk(&self, index: usize, bytes: u64) -> Result<(), VmmError> {
        let wanted = json!({ "id": config::disk_id(index), "desired_size": bytes });
        self.order("vm.resize-disk", Some(&wanted), CALL_DEADLINE)
            .await
            .map(drop)
    }
}
