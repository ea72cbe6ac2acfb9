//! A guest's memory, devices and disk are kept, brought back, multiplied, and never mixed up.

use hypeman_tests::{Client, Guest, Server, eventually, have, hypervisors, makes, skip_unless};
use serde_json::{Value, json};

use crate::snapshots_schedules::turn;

/// Counts in memory for ever: the number of a process that goes on exactly where it was.
const COUNT: &str = "sh -c 'n=0; while :; do n=$((n+1)); echo $n > /dev/shm/count; sleep 0.05; done' \
                     >/dev/null 2>&1 </dev/null &";

pub(crate) async fn counter(guest: &Guest) -> u64 {
    // The shell empties the file before it writes to it.
    let text = guest
        .output("until n=$(cat /dev/shm/count) && [ -n \"$n\" ]; do :; done; echo $n")
        .await;
    text.parse()
        .unwrap_or_else(|_| panic!("a number instead of {text:?}"))
}

/// Waits in the guest until it has counted further, and says how far. One command: on some hosts each takes seconds.
pub(crate) const COUNTS_ON: &str = "look() { n=; while [ -z \"$n\" ]; do { read n < /dev/shm/count; } 2>/dev/null; done; }; \
                                    look; first=$n; while look; [ \"$n\" = \"$first\" ]; do :; done; echo $n";

/// A guest with something in its memory and something on its disk.
pub(crate) async fn counting(server: &Server, image: &str, overrides: Value) -> Guest {
    let guest = server.run(image, overrides).await;
    guest
        .output(&format!(
            "{COUNT} echo before > /root/note && sync; until test -s /dev/shm/count; do sleep 0.05; done"
        ))
        .await;
    guest
}

/// It counts further than it had; how far it has come.
pub(crate) async fn goes_on(guest: &Guest, at_least: u64) -> u64 {
    let text = guest.output(COUNTS_ON).await;
    let now = text
        .parse()
        .unwrap_or_else(|_| panic!("a number instead of {text:?}"));
    assert!(now > at_least, "{now} after {at_least}");
    now
}

async fn fork(client: &Client, path: &str, body: Value) -> Value {
    client.post(path, &body).await.expect(201).json()
}

#[tokio::test]
async fn a_guest_in_standby_goes_on_where_it_was() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let client = server.client();
    let image = server.busybox().await;
    for hypervisor in hypervisors() {
        let guest = counting(&server, &image, json!({"hypervisor": hypervisor})).await;
        let path = format!("/instances/{}", guest.id);
        client
            .post_empty(&format!("{path}/restore"))
            .await
            .refused(409, "invalid_state");
        for _ in 0..3 {
            let before = counter(&guest).await;
            let standby = client
                .post_empty(&format!("{path}/standby"))
                .await
                .expect(200)
                .json();
            assert_eq!(standby["state"], "Standby", "{standby}");
            assert_eq!(standby["has_snapshot"], true, "{standby}");
            assert_eq!(server.vmms(), vec![]);
            client
                .post_empty(&format!("{path}/standby"))
                .await
                .refused(409, "invalid_state");
            let back = client
                .post_empty(&format!("{path}/restore"))
                .await
                .expect(200)
                .json();
            assert_eq!(back["state"], "Running", "{back}");
            goes_on(&guest, before).await;
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
    eventually("the memory of nobody is gone", || async {
        std::fs::read_dir(server.data_directory().join("memory"))
            .unwrap()
            .count()
            == 0
    })
    .await;
}

#[tokio::test]
async fn a_running_guest_is_captured_brought_back_and_multiplied() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let client = server.client();
    let image = server.busybox().await;
    for hypervisor in hypervisors() {
        let guest = counting(
            &server,
            &image,
            json!({"name": "origin", "hypervisor": hypervisor}),
        )
        .await;
        let path = format!("/instances/{}", guest.id);
        let at_capture = counter(&guest).await;
        let body = json!({"kind": "Standby", "name": "baseline", "tags": {"team": "stories"}});
        let snapshot = client
            .post(&format!("{path}/snapshots"), &body)
            .await
            .expect(201)
            .json();
        assert_eq!(guest.inspect().await["state"], "Running", "the source runs on");
        goes_on(&guest, at_capture).await;
        client
            .post(&format!("{path}/snapshots"), &body)
            .await
            .refused(409, "conflict");
        let id = snapshot["id"].as_str().unwrap();
        assert_eq!(snapshot["kind"], "Standby");
        assert_eq!(snapshot["source_instance_id"], guest.id.as_str());
        assert_eq!(snapshot["source_hypervisor"], hypervisor);
        assert_eq!(snapshot["compression_state"], "none");
        assert!(snapshot["size_bytes"].as_u64().unwrap() > 1 << 20, "{snapshot}");
        let listed = client
            .get("/snapshots?kind=Standby&name=baseline&tags%5Bteam%5D=stories")
            .await
            .expect(200)
            .json();
        assert_eq!(listed.as_array().unwrap().len(), 1, "{listed}");
        assert_eq!(listed[0]["id"], id);

        guest.output("echo after > /root/note && sync").await;
        let later = counter(&guest).await;
        let restore = format!("{path}/snapshots/{id}/restore");
        client
            .post(&restore, &json!({}))
            .await
            .refused(409, "invalid_state");
        guest.stop().await;
        let back = client.post(&restore, &json!({})).await.expect(200).json();
        assert_eq!(back["state"], "Running", "{back}");
        assert_eq!(
            guest.output("cat /root/note").await,
            "before",
            "the disk of the capture"
        );
        assert!(counter(&guest).await < later + 1_000);
        goes_on(&guest, at_capture).await;

        let forks = fork(
            client,
            &format!("/snapshots/{id}/fork"),
            json!({"name": "child", "count": 4}),
        )
        .await;
        let forks = forks["forks"].as_array().unwrap().clone();
        assert_eq!(forks.len(), 4);
        let mut machine_ids = std::collections::BTreeSet::new();
        for one in &forks {
            assert!(one["error"].is_null(), "{one}");
            let child = server.guest(one["instance"]["id"].as_str().unwrap());
            assert_eq!(child.inspect().await["state"], "Running");
            let name = one["name"].as_str().unwrap();
            assert_eq!(child.output("hostname").await, name);
            goes_on(&child, at_capture).await;
            machine_ids.insert(child.output("cat /etc/machine-id").await);
            assert_eq!(child.output("cat /root/note").await, "before");
            child.output(&format!("echo {name} > /root/note && sync")).await;
        }
        assert_eq!(machine_ids.len(), 4, "each has an identity of its own");
        client.delete(&format!("/snapshots/{id}")).await.expect(204);
        client
            .get(&format!("/snapshots/{id}"))
            .await
            .refused(404, "not_found");
        for one in &forks {
            let child = server.guest(one["instance"]["id"].as_str().unwrap());
            assert_eq!(
                child.output("cat /root/note").await,
                one["name"].as_str().unwrap()
            );
            goes_on(&child, at_capture).await;
            child.delete().await;
        }
        guest.delete().await;
    }
    eventually("nothing is left", || async {
        ["memory", "snapshots", "instances"].iter().all(|directory| {
            std::fs::read_dir(server.data_directory().join(directory))
                .unwrap()
                .count()
                == 0
        })
    })
    .await;
    assert_eq!(server.vmms(), vec![]);
}

#[tokio::test]
async fn an_instance_is_forked_in_each_of_its_states() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let client = server.client();
    let image = server.busybox().await;
    let guest = counting(&server, &image, json!({"name": "origin"})).await;
    let path = format!("/instances/{}", guest.id);
    client
        .post(&format!("{path}/fork"), &json!({"name": "refused"}))
        .await
        .refused(409, "invalid_state");
    let live = fork(
        client,
        &format!("{path}/fork"),
        json!({"name": "live", "from_running": true}),
    )
    .await;
    assert_eq!(live["state"], "Running", "{live}");
    goes_on(&guest, 0).await;
    let live = server.guest(live["id"].as_str().unwrap());
    assert_eq!(live.output("hostname").await, "live");
    goes_on(&live, 0).await;
    client
        .post(
            &format!("{path}/fork"),
            &json!({"name": "live", "from_running": true}),
        )
        .await
        .refused(409, "name_conflict");

    client.post_empty(&format!("{path}/standby")).await.expect(200);
    let asleep = fork(client, &format!("{path}/fork"), json!({"name": "asleep"})).await;
    assert_eq!(asleep["state"], "Standby", "{asleep}");
    let asleep = server.guest(asleep["id"].as_str().unwrap());
    client
        .post_empty(&format!("/instances/{}/restore", asleep.id))
        .await
        .expect(200);
    assert_eq!(asleep.output("hostname").await, "asleep");
    let cold = fork(
        client,
        &format!("{path}/fork"),
        json!({"name": "cold", "target_state": "Stopped"}),
    )
    .await;
    assert_eq!(cold["state"], "Stopped", "{cold}");
    let cold = server.guest(cold["id"].as_str().unwrap());
    cold.start(json!({})).await;
    assert_eq!(cold.output("cat /root/note; hostname").await, "before\ncold");
    assert_eq!(
        cold.shell("cat /dev/shm/count").await.exit_code,
        1,
        "memory was left behind"
    );
    client.post_empty(&format!("{path}/restore")).await.expect(200);
    goes_on(&guest, 0).await;
    for guest in [&guest, &live, &asleep, &cold] {
        guest.delete().await;
    }
}

#[tokio::test]
async fn a_stopped_snapshot_changes_the_hypervisor_and_a_standby_one_does_not() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let client = server.client();
    let image = server.busybox().await;
    // From each that the host offers to each other one, in a ring.
    let kinds = hypervisors();
    let mut others: Vec<&str> = kinds[1..].to_vec();
    others.push(kinds[0]);
    let first = kinds[0];
    let guest = counting(&server, &image, json!({"name": "origin", "hypervisor": first})).await;
    let path = format!("/instances/{}", guest.id);
    client
        .post(&format!("{path}/snapshots"), &json!({"kind": "Stopped"}))
        .await
        .refused(409, "conflict");
    let warm = client
        .post(&format!("{path}/snapshots"), &json!({"kind": "Standby"}))
        .await
        .expect(201)
        .json();
    let warm_path = format!("/snapshots/{}/fork", warm["id"].as_str().unwrap());
    client
        .post(
            &warm_path,
            &json!({"name": "other", "target_hypervisor": "qemu-microvm"}),
        )
        .await
        .refused(400, "invalid_request");
    guest.stop().await;
    client
        .post(&format!("{path}/snapshots"), &json!({"kind": "Standby"}))
        .await
        .refused(409, "conflict");
    let compressed = json!({"kind": "Stopped", "compression": {"enabled": true}});
    client
        .post(&format!("{path}/snapshots"), &compressed)
        .await
        .refused(400, "invalid_snapshot_compression");
    let cold = client
        .post(
            &format!("{path}/snapshots"),
            &json!({"kind": "Stopped", "name": "cold"}),
        )
        .await
        .expect(201)
        .json();
    let id = cold["id"].as_str().unwrap();
    assert!(cold.get("uncompressed_size_bytes").is_none(), "{cold}");
    // Nothing is given to a hypervisor that cannot run it, not even to lie there.
    let nowhere = json!({"name": "nowhere", "target_state": "Stopped", "target_hypervisor": "vz"});
    client
        .post(&format!("/snapshots/{id}/fork"), &nowhere)
        .await
        .refused(400, "invalid_request");
    client
        .post(
            &format!("{path}/snapshots/{id}/restore"),
            &json!({"target_state": "Stopped", "target_hypervisor": "vz"}),
        )
        .await
        .refused(400, "invalid_request");
    assert_eq!(guest.inspect().await["hypervisor"], first);
    let child = fork(client, &format!("/snapshots/{id}/fork"), json!({"name": "still"})).await;
    assert_eq!(child["state"], "Stopped", "{child}");
    for kind in &others {
        let name = format!("on-{kind}");
        let body = json!({"name": name, "target_state": "Running", "target_hypervisor": kind});
        let child = fork(client, &format!("/snapshots/{id}/fork"), body).await;
        assert_eq!(child["hypervisor"], *kind, "{child}");
        let child = server.guest(child["id"].as_str().unwrap());
        child.wait_for("Running").await;
        assert_eq!(
            child.output("cat /root/note; hostname").await,
            format!("before\n{name}")
        );
        child.delete().await;
    }
    for kind in &others {
        let body = json!({"target_state": "Running", "target_hypervisor": kind});
        let back = client
            .post(&format!("{path}/snapshots/{id}/restore"), &body)
            .await
            .expect(200)
            .json();
        assert_eq!(back["hypervisor"], *kind, "{back}");
        guest.wait_for("Running").await;
        assert_eq!(guest.output("cat /root/note").await, "before");
        guest.stop().await;
    }
}

#[tokio::test]
async fn a_compressed_snapshot_is_restored_straight_from_its_frames() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let client = server.client();
    let image = server.busybox().await;
    let guest = counting(&server, &image, json!({"name": "origin"})).await;
    guest
        .output("head -c 20000000 /dev/urandom > /dev/shm/random; sha256sum /dev/shm/random > /dev/shm/sum")
        .await;
    let path = format!("/instances/{}", guest.id);
    for compression in [
        json!({"enabled": true}),
        json!({"enabled": true, "algorithm": "zstd", "level": 19}),
        json!({"enabled": true, "algorithm": "lz4"}),
        json!({"enabled": true, "algorithm": "lz4", "level": 9}),
    ] {
        let body = json!({"kind": "Standby", "compression": compression});
        let snapshot = client
            .post(&format!("{path}/snapshots"), &body)
            .await
            .expect(201)
            .json();
        let shown = format!("/snapshots/{}", snapshot["id"].as_str().unwrap());
        eventually("it is compressed", || async {
            client.get(&shown).await.expect(200).json()["compression_state"] == "compressed"
        })
        .await;
        let compressed = client.get(&shown).await.json();
        let (small, large) = (
            compressed["compressed_size_bytes"].as_u64().unwrap(),
            compressed["uncompressed_size_bytes"].as_u64().unwrap(),
        );
        assert!(small < large, "{compressed}");
        let verified = client
            .post_empty(&format!("{shown}/verify"))
            .await
            .expect(200)
            .json();
        assert!(verified["damage"].is_null(), "{verified}");
        let usage = client.get(&format!("{shown}/usage")).await.expect(200).json();
        assert!(usage["own_bytes"].as_u64().unwrap() > 0, "{usage}");
        let child = fork(client, &format!("{shown}/fork"), json!({"name": "child"})).await;
        let child = server.guest(child["id"].as_str().unwrap());
        child.output("sha256sum -c /dev/shm/sum").await;
        goes_on(&child, 0).await;
        client.delete(&shown).await.expect(204);
        goes_on(&child, 0).await;
        child.delete().await;
    }
    for wrong in [
        json!({"enabled": true, "algorithm": "zstd", "level": 20}),
        json!({"enabled": true, "algorithm": "lz4", "level": 10}),
    ] {
        let body = json!({"kind": "Standby", "compression": wrong});
        let reply = client.post(&format!("{path}/snapshots"), &body).await;
        assert_eq!(reply.status, 400, "{}", reply.text());
    }
    let standby = json!({"compression": {"enabled": true, "algorithm": "lz4"}, "compression_delay": "0s"});
    client
        .post(&format!("{path}/standby"), &standby)
        .await
        .expect(200);
    client.post_empty(&format!("{path}/restore")).await.expect(200);
    guest.output("sha256sum -c /dev/shm/sum").await;
    client
        .post(&format!("{path}/standby"), &json!({"compression_delay": "soon"}))
        .await
        .refused(400, "invalid_compression_delay");
}

/// Bytes on disk of each memory image, the largest first.
fn images(server: &Server) -> Vec<u64> {
    use std::os::unix::fs::MetadataExt;
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
    let client = server.client();
    let image = server.busybox().await;
    let guest = server
        .run(&image, json!({"name": "origin", "size": "256MB"}))
        .await;
    guest
        .output("head -c 60000000 /dev/urandom > /dev/shm/ballast")
        .await;
    let path = format!("/instances/{}", guest.id);
    client.post_empty(&format!("{path}/standby")).await.expect(200);
    let whole = images(&server)[0];
    assert!(whole > 60_000_000, "{whole}");
    client.post_empty(&format!("{path}/restore")).await.expect(200);
    guest.output("head -c 4000000 /dev/urandom > /dev/shm/more").await;
    client.post_empty(&format!("{path}/standby")).await.expect(200);
    let sizes = images(&server);
    assert_eq!(sizes.len(), 2, "the second stands on the first: {sizes:?}");
    assert!(sizes[1] > 4_000_000 && sizes[1] < whole / 3, "{sizes:?}");
    client.post_empty(&format!("{path}/restore")).await.expect(200);
    guest
        .output(
            "test $(stat -c %s /dev/shm/ballast) = 60000000 && test $(stat -c %s /dev/shm/more) = 4000000",
        )
        .await;
    // Each says what memory it holds, of which it stores little.
    for _ in 0..2 {
        let snapshot = client
            .post(&format!("{path}/snapshots"), &json!({"kind": "Standby"}))
            .await
            .expect(201)
            .json();
        let memory = snapshot["uncompressed_size_bytes"].as_u64().unwrap();
        assert!(memory > 64_000_000 && memory <= 256 << 20, "{snapshot}");
        assert!(snapshot["size_bytes"].as_u64().unwrap() >= memory, "{snapshot}");
        let shown = format!("/snapshots/{}", snapshot["id"].as_str().unwrap());
        let usage = client.get(&format!("{shown}/usage")).await.expect(200).json();
        assert!(usage["own_bytes"].as_u64().unwrap() < whole / 3, "{usage}");
        let verified = client.post_empty(&format!("{shown}/verify")).await;
        let verified = verified.expect(200).json();
        assert_eq!(verified["state"], "intact", "{verified}");
        assert_eq!(verified["verified_bytes"], verified["total_bytes"], "{verified}");
        assert!(verified["total_bytes"].as_u64().unwrap() >= memory, "{verified}");
    }
    let sizes = images(&server);
    assert!(sizes.iter().skip(1).all(|size| *size < whole / 3), "{sizes:?}");
    guest.delete().await;
}

/// Every file of a directory and below.
pub(crate) fn files(directory: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(next) = open.pop() {
        for entry in std::fs::read_dir(&next).unwrap().flatten() {
            match entry.file_type().unwrap().is_dir() {
                true => open.push(entry.path()),
                false => found.push(entry.path()),
            }
        }
    }
    found.sort();
    found
}

/// Turns one bit of a file in the middle of its data.
pub(crate) fn flip(path: &std::path::Path) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let start = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(0)).unwrap();
    let end = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(start)).unwrap();
    let place = start + (end - start) / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, place).unwrap();
    file.write_all_at(&[byte[0] ^ 1], place).unwrap();
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
    let client = server.client();
    let image = server.busybox().await;
    let request = json!({"name": "origin", "hypervisor": hypervisor});
    let guest = counting(&server, &image, request).await;
    let path = format!("/instances/{}", guest.id);
    for compression in [json!({"enabled": false}), json!({"enabled": true})] {
        let compressed = compression["enabled"] == true;
        let body = json!({"kind": "Standby", "compression": compression});
        let snapshot = client
            .post(&format!("{path}/snapshots"), &body)
            .await
            .expect(201)
            .json();
        let id = snapshot["id"].as_str().unwrap().to_owned();
        let shown = format!("/snapshots/{id}");
        if compressed {
            eventually("it is compressed", || async {
                client.get(&shown).await.expect(200).json()["compression_state"] == "compressed"
            })
            .await;
        }
        let mut parts = files(&server.data_directory().join("snapshots").join(&id));
        parts.extend(files(&server.data_directory().join("memory")));
        parts.retain(|part| !part.ends_with("verified"));
        assert!(parts.len() >= 5, "{parts:?}");
        for part in parts {
            flip(&part);
            let verified = client
                .post_empty(&format!("{shown}/verify"))
                .await
                .expect(200)
                .json();
            assert!(verified["damage"].is_string(), "{}: {verified}", part.display());
            let reply = client
                .post(&format!("{shown}/fork"), &json!({"name": "never"}))
                .await;
            assert!(
                reply.status >= 400 && reply.text().contains("damaged"),
                "{}: {} {}",
                part.display(),
                reply.status,
                reply.text()
            );
            assert_eq!(server.vmms().len(), 1, "only the source runs");
            flip(&part);
            let verified = client
                .post_empty(&format!("{shown}/verify"))
                .await
                .expect(200)
                .json();
            assert!(verified["damage"].is_null(), "{}: {verified}", part.display());
        }
        client.delete(&shown).await.expect(204);
    }
    goes_on(&guest, 0).await;
    assert_eq!(client.get("/instances").await.json().as_array().unwrap().len(), 1);
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
    let client = server.client();
    let image = server.busybox().await;
    let request = json!({"name": "origin", "hypervisor": hypervisor});
    let guest = counting(&server, &image, request).await;
    let path = format!("/instances/{}", guest.id);
    let snapshot = client
        .post(&format!("{path}/snapshots"), &json!({"kind": "Standby"}))
        .await
        .expect(201)
        .json();
    let shown = format!("/snapshots/{}", snapshot["id"].as_str().unwrap());
    client.post_empty(&format!("{path}/standby")).await.expect(200);
    let mut disks = files(&server.data_directory().join("images"));
    disks.retain(|file| file.ends_with("rootfs.erofs"));
    assert_eq!(disks.len(), 1, "{disks:?}");
    flip(&disks[0]);
    let verified = client.post_empty(&format!("{shown}/verify")).await;
    let verified = verified.expect(200).json();
    assert_eq!(verified["state"], "damaged", "{verified}");
    assert!(
        verified["damage"].as_str().unwrap().contains("the root disk"),
        "{verified}"
    );
    let fork = client
        .post(&format!("{shown}/fork"), &json!({"name": "never"}))
        .await;
    let restore = client.post_empty(&format!("{path}/restore")).await;
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
    let verified = client.post_empty(&format!("{shown}/verify")).await;
    assert_eq!(verified.expect(200).json()["state"], "intact");
    client.post_empty(&format!("{path}/restore")).await.expect(200);
    goes_on(&guest, 1).await;
}

#[tokio::test]
async fn a_schedule_makes_and_retires_snapshots() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let clock = tempfile::NamedTempFile::new().unwrap();
    let mut server = Server::start().await;
    server.kill();
    let turned = ("HYPEMAN_CLOCK".to_owned(), clock.path().display().to_string());
    server.start_again_with(vec![turned]).await;
    let client = server.client().clone();
    let image = server.busybox().await;
    let guest = counting(&server, &image, json!({"name": "origin"})).await;
    let path = format!("/instances/{}/snapshot-schedule", guest.id);
    client.get(&path).await.refused(404, "not_found");
    let put = async |body: Value| {
        client
            .send(client.request(reqwest::Method::PUT, &path).json(&body))
            .await
    };
    put(json!({"interval": "30s", "retention": {"max_count": 1}}))
        .await
        .refused(400, "invalid_request");
    put(json!({"interval": "1m", "retention": {}}))
        .await
        .refused(400, "invalid_request");
    let body = json!({"interval": "1h", "retention": {"max_count": 2}, "name_prefix": "hourly", "metadata": {"by": "clock"}});
    let set = put(body).await.expect(200).json();
    assert_eq!(set["interval"], "1h0m0s", "{set}");
    let mut last = Value::Null;
    for hour in 1..=3 {
        turn(clock.path(), hour * 4_000);
        eventually("the clock strikes", || async {
            let shown = client.get(&path).await.expect(200).json();
            shown["last_snapshot_id"].is_string() && shown["last_snapshot_id"] != last
        })
        .await;
        last = client.get(&path).await.json()["last_snapshot_id"].clone();
    }
    eventually("two are kept", || async {
        let kept = client
            .get("/snapshots?tags%5Bby%5D=clock")
            .await
            .expect(200)
            .json();
        kept.as_array().unwrap().len() == 2
    })
    .await;
    let kept = client.get("/snapshots").await.json();
    assert_eq!(kept[0]["id"], last, "newest first");
    assert!(kept[0]["name"].as_str().unwrap().starts_with("hourly-"), "{kept}");
    guest.delete().await;
    client.get(&path).await.expect(200);
    for snapshot in kept.as_array().unwrap() {
        let path = format!("/snapshots/{}", snapshot["id"].as_str().unwrap());
        client.delete(&path).await.expect(204);
    }
    client.get(&path).await.refused(404, "not_found");
}
