//! A data directory whose files share blocks: disks of snapshots and forks cost nothing until they are written.

use std::path::{Path, PathBuf};
use std::process::Command;

use hypeman_tests::{LoopDisk, Server, ServerOptions, eventually, have, hypervisors, skip_unless};
use serde_json::json;

/// Megabytes that the guest writes to its disk: far more than what a snapshot's other parts take.
const WRITTEN: u64 = 96;

/// Bytes that a promise may be off: what others write meanwhile, and what the file system keeps for itself.
const SLACK: u64 = 16 << 20;

/// Bytes that are free on the file system of a directory.
fn free(directory: &Path) -> u64 {
    let told = rustix::fs::statvfs(directory).unwrap();
    told.f_bfree * told.f_frsize
}

/// Bytes of a file that another file has as well, as the file system tells.
fn shared_bytes(path: &Path) -> u64 {
    let output = Command::new("filefrag")
        .arg("-v")
        .arg("-b4096")
        .arg(path)
        .output()
        .expect("filefrag");
    let text = String::from_utf8(output.stdout).unwrap();
    // "  0:        0..     255:      34816..     35071:    256:             shared"
    text.lines()
        .filter(|line| line.split([' ', ',']).any(|flag| flag == "shared"))
        .filter_map(|line| line.split(':').nth(3)?.trim().parse::<u64>().ok())
        .sum::<u64>()
        * 4096
}

/// The writable layer of each directory below `parent`.
fn layers(parent: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for directory in std::fs::read_dir(parent).unwrap().flatten() {
        for file in std::fs::read_dir(directory.path()).unwrap().flatten() {
            let name = file.file_name().into_string().unwrap();
            if name.starts_with("overlay") {
                found.push(file.path());
            }
        }
    }
    found
}

#[tokio::test]
async fn where_files_share_blocks_disks_are_multiplied_for_nothing() {
    skip_unless!(have("busybox"), "needs busybox-static");
    skip_unless!(have("filefrag"), "needs filefrag of e2fsprogs");
    skip_unless!(have("mkfs.xfs"), "needs mkfs.xfs of xfsprogs");
    let Some(disk) = LoopDisk::mount_sharing(3072) else {
        skip_unless!(false, "needs root, a loop device and a kernel with XFS");
        return;
    };
    let server = Server::start_with(ServerOptions {
        data_directory: Some(disk.path().join("d")),
        settings: vec![("limits.min_free_disk", json!("1MB"))],
        ..ServerOptions::default()
    })
    .await;
    let client = server.client();
    let image = server.busybox().await;
    let data = server.data_directory();
    for hypervisor in hypervisors() {
        let guest = server
            .run(&image, json!({"hypervisor": hypervisor, "overlay_size": "512MB"}))
            .await;
        let path = format!("/instances/{}", guest.id);
        guest
            .output(&format!(
                "dd if=/dev/urandom of=/root/noise bs=1M count={WRITTEN} 2>/dev/null; \
                 md5sum </root/noise >/root/sum; echo before >/root/note; sync"
            ))
            .await;
        // What is written while the capture runs belongs to the guest alone.
        guest
            .output("sh -c 'while :; do date >>/root/busy; sync; done' >/dev/null 2>&1 </dev/null &")
            .await;
        let snapshot = client
            .post(&format!("{path}/snapshots"), &json!({"kind": "Standby"}))
            .await
            .expect(201)
            .json();
        let id = snapshot["id"].as_str().unwrap();
        let captured = data.join("snapshots").join(id).join("overlay.raw");
        let shared = shared_bytes(&captured);
        assert!(
            shared >= WRITTEN << 20,
            "only {shared} bytes of the disk are shared"
        );

        guest.output("echo after >/root/note; sync").await;
        let forks = client
            .post(
                &format!("/snapshots/{id}/fork"),
                &json!({"name": "child", "count": 3}),
            )
            .await
            .expect(201)
            .json();
        let mut children = Vec::new();
        for fork in forks["forks"].as_array().unwrap() {
            assert!(fork["error"].is_null(), "{fork}");
            children.push(server.guest(fork["instance"]["id"].as_str().unwrap()));
        }
        let layers = layers(&data.join("instances"));
        assert_eq!(layers.len(), 4, "{layers:?}");
        for layer in &layers {
            let shared = shared_bytes(layer);
            assert!(
                shared >= WRITTEN << 20,
                "{}: only {shared} bytes are shared",
                layer.display()
            );
        }
        for (number, child) in children.iter().enumerate() {
            assert_eq!(child.output("cat /root/note").await, "before");
            assert_eq!(
                child
                    .output("md5sum </root/noise | cmp - /root/sum && echo same")
                    .await,
                "same"
            );
            child.output(&format!("echo {number} >/root/note; sync")).await;
        }
        for (number, child) in children.iter().enumerate() {
            assert_eq!(child.output("cat /root/note").await, number.to_string());
        }
        assert_eq!(guest.output("cat /root/note").await, "after");

        // What others share is not the snapshot's own, and what is its own comes back with it.
        let usage = format!("/snapshots/{id}/usage");
        let cost = client.get(&usage).await.expect(200).json();
        let bytes = |cost: &serde_json::Value, field: &str| cost[field].as_u64().unwrap();
        assert!(bytes(&cost, "shared_bytes") >= WRITTEN << 20, "{cost}");
        assert!(bytes(&cost, "own_bytes") < (WRITTEN << 20) / 2, "{cost}");

        // Read back whole: blocks that the guests have written since are not the snapshot's.
        let verified = client
            .post_empty(&format!("/snapshots/{id}/verify"))
            .await
            .expect(200)
            .json();
        assert_eq!(verified["state"], "intact", "{verified}");
        guest.stop().await;
        client
            .post(&format!("{path}/snapshots/{id}/restore"), &json!({}))
            .await
            .expect(200);
        assert_eq!(guest.output("cat /root/note").await, "before");
        assert_eq!(
            guest
                .output("md5sum </root/noise | cmp - /root/sum && echo same")
                .await,
            "same"
        );
        for child in children {
            child.delete().await;
        }
        guest.delete().await;
        // Now nobody shares its disk, as soon as the file system has taken the others' back.
        eventually("its disk is its own", || async {
            let cost = client.get(&usage).await.expect(200).json();
            bytes(&cost, "own_bytes") >= WRITTEN << 20
        })
        .await;
        let cost = client.get(&usage).await.expect(200).json();
        let before = free(data);
        client.delete(&format!("/snapshots/{id}")).await.expect(204);
        let promised = bytes(&cost, "freed_by_delete_bytes");
        eventually("what was promised has come back", || async {
            free(data) + SLACK > before + promised
        })
        .await;
    }
}
