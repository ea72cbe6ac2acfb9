//! A guest in standby goes on only with the version of the VMM that wrote its state, wherever that stands.

use std::path::{Path, PathBuf};

use hypeman_tests::{Server, ServerOptions, eventually, have, skip_unless, told_on};
use serde_json::json;

use crate::service::says;

/// Where a program is.
fn on_path(program: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap();
    std::env::split_paths(&path)
        .map(|directory| directory.join(program))
        .find(|file| file.is_file())
        .unwrap()
}

/// `key`: that of the binary in the configuration; `newer`: what a later release says of itself.
async fn goes_on_with_its_own_version(hypervisor: &str, key: &'static str, newer: &str) {
    skip_unless!(have("busybox"), "needs busybox-static");
    if !told_on(hypervisor) {
        return;
    }
    let genuine = on_path(hypervisor);
    let put = |place: &Path| {
        std::fs::create_dir_all(place.parent().unwrap()).unwrap();
        std::fs::copy(&genuine, place).unwrap();
    };
    let folder = tempfile::tempdir().unwrap();
    let installed = folder.path().join(hypervisor);
    put(&installed);
    let server = Server::start_with(ServerOptions {
        settings: vec![(key, json!(installed))],
        ..ServerOptions::default()
    })
    .await;
    let image = server.busybox().await;
    let guest = server.counting(&image, json!({"hypervisor": hypervisor})).await;
    let counted = guest.count().await;
    guest.standby().await;
    eventually("its machine ends", || async { server.vmms().is_empty() }).await;

    // An upgrade takes its version away: it is not given to another one.
    says(&installed, newer);
    let message = guest.post_empty("/restore").await.refused(409, "incompatible");
    assert!(
        message.contains("this host has 99.0.0") && message.contains("install that version again"),
        "{message}"
    );
    assert_eq!(guest.inspect().await["state"], "Standby");
    assert_eq!(server.vmms(), vec![]);

    // Beside the new one it is found, by what it says and not by the name of its directory.
    let beside = format!("system/vmm/{hypervisor}/kept/{hypervisor}");
    put(&server.data_directory().join(beside));
    guest.restore().await;
    guest.goes_on(counted).await;
    guest.delete().await;
    assert_eq!(server.vmms(), vec![]);
}

#[tokio::test]
async fn a_guest_in_standby_goes_on_with_its_own_version_on_cloud_hypervisor() {
    let key = "hypervisor.cloud_hypervisor_binary_path";
    goes_on_with_its_own_version("cloud-hypervisor", key, "cloud-hypervisor v99.0").await;
}

#[tokio::test]
async fn a_guest_in_standby_goes_on_with_its_own_version_on_firecracker() {
    let key = "hypervisor.firecracker_binary_path";
    goes_on_with_its_own_version("firecracker", key, "Firecracker v99.0.0").await;
}
