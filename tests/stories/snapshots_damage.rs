//! Damage is found wherever it lies, is named, and never becomes a guest.

use std::path::PathBuf;

use hypeman_tests::{Server, Snapshot, files, flip, have, makes, skip_unless};
use serde_json::json;

/// Every file that a snapshot consists of, while there is no memory but its own.
pub(crate) fn parts(server: &Server, snapshot: &Snapshot) -> Vec<PathBuf> {
    let mut parts = files(&server.data_directory().join("snapshots").join(&snapshot.id));
    parts.extend(files(&server.data_directory().join("memory")));
    parts.retain(|part| !part.ends_with("verified"));
    assert!(parts.len() >= 5, "{parts:?}");
    parts
}

#[tokio::test]
async fn a_flipped_bit_anywhere_is_named_and_never_becomes_a_guest() {
    skip_unless!(have("busybox"), "needs busybox-static");
    for hypervisor in makes() {
        a_flipped_bit_never_becomes_a_guest(hypervisor).await;
    }
}

async fn a_flipped_bit_never_becomes_a_guest(hypervisor: &str) {
    let server = Server::start().await;
    let image = server.busybox().await;
    let overrides = json!({"name": "origin", "hypervisor": hypervisor});
    let guest = server.counting(&image, overrides).await;
    for compressed in [false, true] {
        let body = json!({"kind": "Standby", "compression": {"enabled": compressed}});
        let snapshot = guest.take(body).await;
        if compressed {
            snapshot.compressed().await;
        }
        for part in parts(&server, &snapshot) {
            flip(&part);
            let verified = snapshot.verify().await;
            assert!(verified["damage"].is_string(), "{}: {verified}", part.display());
            let reply = snapshot.try_fork(&json!({"name": "never"})).await;
            assert!(
                reply.status >= 400 && reply.text().contains("damaged"),
                "{}: {} {}",
                part.display(),
                reply.status,
                reply.text()
            );
            assert_eq!(server.vmms().len(), 1, "only the source runs");
            flip(&part);
            let verified = snapshot.verify().await;
            assert!(verified["damage"].is_null(), "{}: {verified}", part.display());
        }
        snapshot.delete().await;
    }
    guest.goes_on(0).await;
    assert_eq!(server.guests().await.len(), 1);
}

#[tokio::test]
async fn a_flipped_bit_in_the_root_disk_is_named_and_nothing_goes_on_above_it() {
    skip_unless!(have("busybox"), "needs busybox-static");
    for hypervisor in makes() {
        a_flipped_bit_in_the_root_disk_is_named(hypervisor).await;
    }
}

async fn a_flipped_bit_in_the_root_disk_is_named(hypervisor: &str) {
    let server = Server::start().await;
    let image = server.busybox().await;
    let overrides = json!({"name": "origin", "hypervisor": hypervisor});
    let guest = server.counting(&image, overrides).await;
    let snapshot = guest.capture().await;
    guest.standby().await;
    let mut disks = files(&server.data_directory().join("images"));
    disks.retain(|file| file.ends_with("rootfs.erofs"));
    assert_eq!(disks.len(), 1, "{disks:?}");
    flip(&disks[0]);
    let verified = snapshot.verify().await;
    assert_eq!(verified["state"], "damaged", "{verified}");
    assert!(
        verified["damage"].as_str().unwrap().contains("the root disk"),
        "{verified}"
    );
    let fork = snapshot.try_fork(&json!({"name": "never"})).await;
    let restore = guest.post_empty("/restore").await;
    for reply in [fork, restore] {
        assert!(
            reply.status >= 400 && reply.text().contains("the root disk"),
            "{} {}",
            reply.status,
            reply.text()
        );
    }
    assert!(server.vmms().is_empty());
    flip(&disks[0]);
    snapshot.is_intact().await;
    guest.restore().await;
    guest.goes_on(1).await;
}
