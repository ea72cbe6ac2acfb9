//! A guest's memory, devices and disk are kept, brought back, multiplied, and never mixed up.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;

use hypeman_tests::{Server, eventually, files, have, hypervisors, skip_unless};
use serde_json::{Value, json};

#[tokio::test]
async fn a_guest_in_standby_goes_on_where_it_was() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    for hypervisor in hypervisors() {
        let guest = server.counting(&image, json!({"hypervisor": hypervisor})).await;
        guest.post_empty("/restore").await.refused(409, "invalid_state");
        for _ in 0..3 {
            let before = guest.count().await;
            let standby = guest.standby().await;
            assert_eq!(standby["state"], "Standby", "{standby}");
            assert_eq!(standby["has_snapshot"], true, "{standby}");
            eventually("its machine ends", || async { server.vmms().is_empty() }).await;
            guest.post_empty("/standby").await.refused(409, "invalid_state");
            let back = guest.restore().await;
            assert_eq!(back["state"], "Running", "{back}");
            guest.goes_on(before).await;
            assert_eq!(guest.output("cat /root/note").await, "before");
            // Whatever the command itself takes.
            let host = || std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
            let before = host();
            let clock: u64 = guest.output("date +%s").await.parse().unwrap();
            let after = host();
            assert!(
                (before - 2..=after + 2).contains(&clock),
                "guest {clock}, host {before} to {after}"
            );
        }
        guest.delete().await;
    }
    // The memory of nobody.
    server.emptied(&["memory"]).await;
}

#[tokio::test]
async fn a_guest_that_cannot_be_put_to_standby_goes_on_with_its_workload() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let memory = server.data_directory().join("memory");
    let away = server.data_directory().join("away");
    for hypervisor in hypervisors() {
        let guest = server.counting(&image, json!({"hypervisor": hypervisor})).await;
        let before = guest.count().await;
        // Nothing can be made below a file: it fails when the guest stands still already.
        std::fs::rename(&memory, &away).unwrap();
        std::fs::write(&memory, "").unwrap();
        let refused = guest.post_empty("/standby").await;
        std::fs::remove_file(&memory).unwrap();
        std::fs::rename(&away, &memory).unwrap();
        assert!(refused.status >= 400, "{}", refused.text());
        // A VMM that is slow to answer on a busy host is not told to run, for that long.
        let shown = guest
            .wait_until("it answers", |shown| shown["state"] != "Unknown")
            .await;
        assert_eq!(shown["state"], "Running", "{shown}");
        let before = guest.goes_on(before).await;
        assert_eq!(server.vmms().len(), 1);
        guest.standby().await;
        guest.restore().await;
        guest.goes_on(before).await;
        guest.delete().await;
    }
}

#[tokio::test]
async fn a_running_guest_is_captured_brought_back_and_multiplied() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let client = server.client();
    let image = server.busybox().await;
    for hypervisor in hypervisors() {
        let overrides = json!({"name": "origin", "hypervisor": hypervisor});
        let guest = server.counting(&image, overrides).await;
        let at_capture = guest.count().await;
        let body = json!({"kind": "Standby", "name": "baseline", "tags": {"team": "stories"}});
        let taken = guest.post("/snapshots", &body).await.expect(201).json();
        let snapshot = server.snapshot(taken["id"].as_str().unwrap());
        assert_eq!(guest.inspect().await["state"], "Running", "the source runs on");
        guest.goes_on(at_capture).await;
        guest.post("/snapshots", &body).await.refused(409, "conflict");
        assert_eq!(taken["kind"], "Standby");
        assert_eq!(taken["source_instance_id"], guest.id.as_str());
        assert_eq!(taken["source_hypervisor"], hypervisor);
        assert_eq!(taken["compression_state"], "none");
        assert!(taken["size_bytes"].as_u64().unwrap() > 1 << 20, "{taken}");
        let found = server
            .listed("/snapshots?kind=Standby&name=baseline&tags%5Bteam%5D=stories")
            .await;
        assert_eq!(found, std::slice::from_ref(&snapshot.id));

        guest.output("echo after > /root/note && sync").await;
        let later = guest.count().await;
        guest
            .try_go_back(&snapshot, &json!({}))
            .await
            .refused(409, "invalid_state");
        guest.stop().await;
        let back = guest.go_back(&snapshot, json!({})).await;
        assert_eq!(back["state"], "Running", "{back}");
        assert_eq!(
            guest.output("cat /root/note").await,
            "before",
            "the disk of the capture"
        );
        assert!(guest.count().await < later + 1_000);
        guest.goes_on(at_capture).await;

        let forks = snapshot.forks(json!({"name": "child", "count": 4})).await;
        assert_eq!(forks.len(), 4);
        let mut machine_ids = BTreeSet::new();
        for (name, child) in &forks {
            assert_eq!(child.inspect().await["state"], "Running");
            assert_eq!(child.output("hostname").await, *name);
            child.goes_on(at_capture).await;
            machine_ids.insert(child.output("cat /etc/machine-id").await);
            assert_eq!(child.output("cat /root/note").await, "before");
            child.output(&format!("echo {name} > /root/note && sync")).await;
        }
        assert_eq!(machine_ids.len(), 4, "each has an identity of its own");
        snapshot.delete().await;
        client.get(&snapshot.path("")).await.refused(404, "not_found");
        for (name, child) in &forks {
            assert_eq!(child.output("cat /root/note").await, *name);
            child.goes_on(at_capture).await;
            child.delete().await;
        }
        guest.delete().await;
    }
    server.emptied(&["memory", "snapshots", "instances"]).await;
    assert_eq!(server.vmms(), vec![]);
}

#[tokio::test]
async fn an_instance_is_forked_in_each_of_its_states() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let guest = server.counting(&image, json!({"name": "origin"})).await;
    guest
        .post("/fork", &json!({"name": "refused"}))
        .await
        .refused(409, "invalid_state");
    let from_running = json!({"name": "live", "from_running": true});
    let live = guest.post("/fork", &from_running).await.expect(201).json();
    assert_eq!(live["state"], "Running", "{live}");
    guest.goes_on(0).await;
    let live = server.guest(live["id"].as_str().unwrap());
    assert_eq!(live.output("hostname").await, "live");
    live.goes_on(0).await;
    guest
        .post("/fork", &from_running)
        .await
        .refused(409, "name_conflict");

    guest.standby().await;
    let asleep = guest.fork(json!({"name": "asleep"})).await;
    assert_eq!(asleep.inspect().await["state"], "Standby");
    asleep.restore().await;
    assert_eq!(asleep.output("hostname").await, "asleep");
    let cold = guest
        .fork(json!({"name": "cold", "target_state": "Stopped"}))
        .await;
    assert_eq!(cold.inspect().await["state"], "Stopped");
    cold.start(json!({})).await;
    assert_eq!(cold.output("cat /root/note; hostname").await, "before\ncold");
    assert_eq!(
        cold.shell("cat /dev/shm/count").await.exit_code,
        1,
        "memory was left behind"
    );
    guest.restore().await;
    guest.goes_on(0).await;
    for guest in [&guest, &live, &asleep, &cold] {
        guest.delete().await;
    }
}

#[tokio::test]
async fn a_stopped_snapshot_changes_the_hypervisor_and_a_standby_one_does_not() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    // From each that the host offers to each other one, in a ring.
    let kinds = hypervisors();
    let mut others: Vec<&str> = kinds[1..].to_vec();
    others.push(kinds[0]);
    let first = kinds[0];
    let overrides = json!({"name": "origin", "hypervisor": first});
    let guest = server.counting(&image, overrides).await;
    let refused = async |body: Value, status: u16, code: &str| {
        guest.post("/snapshots", &body).await.refused(status, code);
    };
    refused(json!({"kind": "Stopped"}), 409, "conflict").await;
    let warm = guest.capture().await;
    warm.try_fork(&json!({"name": "other", "target_hypervisor": "qemu-microvm"}))
        .await
        .refused(400, "invalid_request");
    guest.stop().await;
    refused(json!({"kind": "Standby"}), 409, "conflict").await;
    let compressed = json!({"kind": "Stopped", "compression": {"enabled": true}});
    refused(compressed, 400, "invalid_snapshot_compression").await;
    let cold = guest.take(json!({"kind": "Stopped", "name": "cold"})).await;
    let shown = cold.inspect().await;
    assert!(shown.get("uncompressed_size_bytes").is_none(), "{shown}");
    // Nothing is given to a hypervisor that cannot run it, not even to lie there.
    cold.try_fork(&json!({"name": "nowhere", "target_state": "Stopped", "target_hypervisor": "vz"}))
        .await
        .refused(400, "invalid_request");
    guest
        .try_go_back(
            &cold,
            &json!({"target_state": "Stopped", "target_hypervisor": "vz"}),
        )
        .await
        .refused(400, "invalid_request");
    assert_eq!(guest.inspect().await["hypervisor"], first);
    let child = cold.fork(json!({"name": "still"})).await;
    assert_eq!(child.inspect().await["state"], "Stopped");
    for kind in &others {
        let name = format!("on-{kind}");
        let child = cold
            .fork(json!({"name": name, "target_state": "Running", "target_hypervisor": kind}))
            .await;
        assert_eq!(child.inspect().await["hypervisor"], *kind);
        child.wait_for("Running").await;
        assert_eq!(
            child.output("cat /root/note; hostname").await,
            format!("before\n{name}")
        );
        child.delete().await;
    }
    for kind in &others {
        let body = json!({"target_state": "Running", "target_hypervisor": kind});
        let back = guest.go_back(&cold, body).await;
        assert_eq!(back["hypervisor"], *kind, "{back}");
        guest.wait_for("Running").await;
        assert_eq!(guest.output("cat /root/note").await, "before");
        guest.stop().await;
    }
}

/// Bytes on disk of each memory image, the largest first.
fn images(server: &Server) -> Vec<u64> {
    let directory = server.data_directory().join("memory");
    let mut sizes: Vec<u64> = std::fs::read_dir(directory)
        .unwrap()
        .flatten()
        .map(|image| {
            let parts = files(&image.path()).into_iter();
            parts
                .map(|part| std::fs::metadata(part).unwrap().blocks() * 512)
                .sum()
        })
        .collect();
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    sizes
}

#[tokio::test]
async fn what_did_not_change_is_stored_once() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let guest = server
        .run(&image, json!({"name": "origin", "size": "256MB"}))
        .await;
    guest
        .output("head -c 60000000 /dev/urandom > /dev/shm/ballast")
        .await;
    guest.standby().await;
    let whole = images(&server)[0];
    assert!(whole > 60_000_000, "{whole}");
    guest.restore().await;
    guest.output("head -c 4000000 /dev/urandom > /dev/shm/more").await;
    guest.standby().await;
    let sizes = images(&server);
    assert_eq!(sizes.len(), 2, "the second stands on the first: {sizes:?}");
    assert!(sizes[1] > 4_000_000 && sizes[1] < whole / 3, "{sizes:?}");
    guest.restore().await;
    guest
        .output(
            "test $(stat -c %s /dev/shm/ballast) = 60000000 && test $(stat -c %s /dev/shm/more) = 4000000",
        )
        .await;
    // Each says what memory it holds, of which it stores little.
    for _ in 0..2 {
        let snapshot = guest.capture().await;
        let shown = snapshot.inspect().await;
        let memory = shown["uncompressed_size_bytes"].as_u64().unwrap();
        assert!(memory > 64_000_000 && memory <= 256 << 20, "{shown}");
        assert!(shown["size_bytes"].as_u64().unwrap() >= memory, "{shown}");
        let usage = snapshot.usage().await;
        assert!(usage["own_bytes"].as_u64().unwrap() < whole / 3, "{usage}");
        let verified = snapshot.is_intact().await;
        assert_eq!(verified["verified_bytes"], verified["total_bytes"], "{verified}");
        assert!(verified["total_bytes"].as_u64().unwrap() >= memory, "{verified}");
    }
    let sizes = images(&server);
    assert!(sizes.iter().skip(1).all(|size| *size < whole / 3), "{sizes:?}");
    guest.delete().await;
}
