//! A data directory whose files share blocks: disks of snapshots and forks cost nothing until they are written.

use std::path::{Path, PathBuf};
use std::process::Command;

use hypeman_tests::{
    Guest, LoopDisk, Server, ServerOptions, eventually, have, hypervisors, or_skip, skip_unless,
};
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

/// What the guest wrote is what it wrote.
async fn has_its_noise(guest: &Guest) {
    let compared = guest.output("md5sum </root/noise | cmp - /root/sum && echo same");
    assert_eq!(compared.await, "same");
}

#[tokio::test]
async fn where_files_share_blocks_disks_are_multiplied_for_nothing() {
    skip_unless!(have("busybox"), "needs busybox-static");
    skip_unless!(have("filefrag"), "needs filefrag of e2fsprogs");
    skip_unless!(have("mkfs.xfs"), "needs mkfs.xfs of xfsprogs");
    let disk = or_skip!(
        LoopDisk::mount_sharing(3072),
        "needs root, a loop device and a kernel with XFS"
    );
    let server = Server::start_with(ServerOptions {
        data_directory: Some(disk.path().join("d")),
        settings: vec![("limits.min_free_disk", json!("1MB"))],
        ..ServerOptions::default()
    })
    .await;
    let image = server.busybox().await;
    let data = server.data_directory();
    for hypervisor in hypervisors() {
        let guest = server
            .run(&image, json!({"hypervisor": hypervisor, "overlay_size": "512MB"}))
            .await;
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
        let snapshot = guest.capture().await;
        let captured = data.join("snapshots").join(&snapshot.id).join("overlay.raw");
        let shared = shared_bytes(&captured);
        assert!(
            shared >= WRITTEN << 20,
            "only {shared} bytes of the disk are shared"
        );

        guest.output("echo after >/root/note; sync").await;
        let children = snapshot.forks(json!({"name": "child", "count": 3})).await;
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
        for (name, child) in &children {
            assert_eq!(child.output("cat /root/note").await, "before");
            has_its_noise(child).await;
            child.output(&format!("echo {name} >/root/note; sync")).await;
        }
        for (name, child) in &children {
            assert_eq!(child.output("cat /root/note").await, *name);
        }
        assert_eq!(guest.output("cat /root/note").await, "after");

        // What others share is not the snapshot's own, and what is its own comes back with it.
        let cost = snapshot.usage().await;
        let bytes = |cost: &serde_json::Value, field: &str| cost[field].as_u64().unwrap();
        assert!(bytes(&cost, "shared_bytes") >= WRITTEN << 20, "{cost}");
        assert!(bytes(&cost, "own_bytes") < (WRITTEN << 20) / 2, "{cost}");

        // Read back whole: blocks that the guests have written since are not the snapshot's.
        snapshot.is_intact().await;
        guest.stop().await;
        guest.go_back(&snapshot, json!({})).await;
        assert_eq!(guest.output("cat /root/note").await, "before");
        has_its_noise(&guest).await;
        for (_, child) in children {
            child.delete().await;
        }
        guest.delete().await;
        // Now nobody shares its disk, as soon as the file system has taken the others' back.
        eventually("its disk is its own", || async {
            bytes(&snapshot.usage().await, "own_bytes") >= WRITTEN << 20
        })
        .await;
        let cost = snapshot.usage().await;
        let before = free(data);
        snapshot.delete().await;
        let promised = bytes(&cost, "freed_by_delete_bytes");
        eventually("what was promised has come back", || async {
            free(data) + SLACK > before + promised
        })
        .await;
    }
}
