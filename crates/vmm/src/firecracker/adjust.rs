//! What can be changed while the machine runs: its balloon. Firecracker gives a running guest neither memory nor disks,
//! and takes none away.

use async_trait::async_trait;
use hyper::Method;
use serde_json::{Value, json};

use super::machine::FirecrackerMachine;
use crate::rest::CALL_DEADLINE;
use crate::{Adjust, Disk, VmmError, VmmKind};

const MEBIBYTE: u64 = 1 << 20;
const ADDED_MEMORY: &str = "memory that is added while the machine runs";

#[async_trait]
impl Adjust for FirecrackerMachine {
    async fn set_memory(&self, _bytes: u64) -> Result<(), VmmError> {
        unsupported(ADDED_MEMORY)
    }

    async fn added_memory(&self) -> Result<u64, VmmError> {
        unsupported(ADDED_MEMORY).map(|()| 0)
    }

    async fn set_balloon(&self, bytes: u64) -> Result<(), VmmError> {
        self.client()
            .call(Method::PATCH, "/balloon", Some(&balloon(bytes)), CALL_DEADLINE)
            .await
            .map(drop)
    }

    async fn attach_disk(&self, _index: usize, _disk: &Disk) -> Result<(), VmmError> {
        unsupported("disks that are added while the machine runs")
    }

    async fn detach_disk(&self, _index: usize, _disk: &Disk) -> Result<(), VmmError> {
        unsupported("disks that are taken away while the machine runs")
    }

    async fn resize_disk(&self, _index: usize, _bytes: u64) -> Result<(), VmmError> {
        unsupported("disks whose size changes while the machine runs")
    }
}

/// The balloon is counted in MiB. The guest gives up no more than was asked for.
fn balloon(bytes: u64) -> Value {
    json!({ "amount_mib": bytes / MEBIBYTE })
}

fn unsupported(feature: &'static str) -> Result<(), VmmError> {
    Err(VmmError::Unsupported {
        kind: VmmKind::Firecracker,
        feature,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_balloon_is_never_larger_than_was_asked_for() {
        assert_eq!(balloon(64 << 20), json!({ "amount_mib": 64 }));
        assert_eq!(balloon((64 << 20) - 1), json!({ "amount_mib": 63 }));
        assert_eq!(balloon(0), json!({ "amount_mib": 0 }));
    }
}
