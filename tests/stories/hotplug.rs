//! Memory beside what a guest boots with: `hotplug_size`.

use hypeman_tests::{Guest, Server, eventually, have, hypervisors, skip_unless, told_on};
use serde_json::json;

use crate::crash::cut;
use crate::crash_snapshots::post;

/// KiB of memory that the guest sees.
async fn memory(guest: &Guest) -> u64 {
    let text = guest.output("cat /proc/meminfo").await;
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let number = total.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    number.unwrap_or_else(|| panic!("MemTotal instead of {text:?}"))
}

/// It has most of its 256 MiB. The kernel keeps some for itself.
async fn has_all_of_it(guest: &Guest) {
    eventually("the guest has all of its memory", || async {
        memory(guest).await > 180 << 10
    })
    .await;
}

/// A guest that has as much beside the 128 MB with which it booted. `None` where there is no Cloud Hypervisor.
async fn with_more(name: &str) -> Option<(Server, Guest)> {
    if !told_on("cloud-hypervisor") {
        return None;
    }
    let server = Server::start().await;
    let image = server.busybox().await;
    let asked = json!({
        "name": name, "hypervisor": "cloud-hypervisor", "size": "128MB", "hotplug_size": "128MB",
        "cmd": ["sleep", "infinity"],
    });
    let guest = server.run(&image, asked).await;
    has_all_of_it(&guest).await;
    Some((server, guest))
}

#[tokio::test]
async fn a_guest_gets_more_memory_gives_it_back_to_be_captured_and_has_it_again() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let Some((server, guest)) = with_more("origin").await else {
        return;
    };
    let fill = "mkdir /ballast && mount -t tmpfs -o size=200m none /ballast \
                && head -c 65536 /dev/urandom > /ballast/kept && md5sum /ballast/kept";
    let sum = guest.output(fill).await;

    // A snapshot of the running guest: its copy has the content, and as much memory.
    let snapshot = guest.capture().await;
    has_all_of_it(&guest).await;
    let child = snapshot
        .fork(json!({"name": "child", "target_state": "Running"}))
        .await;
    assert_eq!(child.output("md5sum /ballast/kept").await, sum);
    has_all_of_it(&child).await;
    child.delete().await;

    // Standby and back.
    let asleep = guest.standby().await;
    assert_eq!(asleep["state"], "Standby", "{asleep}");
    let awake = guest.restore().await;
    assert_eq!(awake["state"], "Running", "{awake}");
    assert_eq!(guest.output("md5sum /ballast/kept").await, sum);
    has_all_of_it(&guest).await;

    // What does not fit into `size` cannot be captured; nothing of it is lost.
    guest
        .output("dd if=/dev/zero of=/ballast/large bs=1M count=110 2>/dev/null")
        .await;
    let refusal = guest.post("/standby", &json!({})).await;
    refusal.refused(409, "memory_in_use");
    assert_eq!(guest.inspect().await["state"], "Running");
    eventually("its agent answers", || guest.is_reachable()).await;
    has_all_of_it(&guest).await;
    assert_eq!(guest.output("wc -c < /ballast/large").await, "115343360");
    assert_eq!(guest.output("md5sum /ballast/kept").await, sum);
    guest.output("rm /ballast/large").await;
    let asleep = guest.standby().await;
    assert_eq!(asleep["state"], "Standby", "{asleep}");
    guest.restore().await;
    assert_eq!(guest.output("md5sum /ballast/kept").await, sum);
    has_all_of_it(&guest).await;
    guest.delete().await;
    snapshot.delete().await;
    server.emptied(&["memory", "snapshots", "instances"]).await;
    assert_eq!(server.vmms(), vec![]);
}

#[tokio::test]
async fn memory_stays_given_when_the_server_comes_back() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let Some((mut server, guest)) = with_more("kept").await else {
        return;
    };
    server.kill();
    server.start_again().await;
    let guest = server.guest(&guest.id);
    guest.wait_for("Running").await;
    has_all_of_it(&guest).await;
    let asleep = guest.standby().await;
    assert_eq!(asleep["state"], "Standby", "{asleep}");
    guest.restore().await;
    has_all_of_it(&guest).await;
    guest.delete().await;
}

#[tokio::test]
async fn memory_that_was_given_back_is_had_again_when_the_server_dies_before_the_capture() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let Some((mut server, guest)) = with_more("cut").await else {
        return;
    };
    for (point, path, body) in [
        (
            "capture.given_back",
            guest.path("/snapshots"),
            json!({"kind": "Standby"}),
        ),
        ("standby.given_back", guest.path("/standby"), json!({})),
    ] {
        cut(&mut server, point, async |client| post(client, path, body).await).await;
        guest.wait_for("Running").await;
        has_all_of_it(&guest).await;
    }
    assert_eq!(server.listed("/snapshots").await, Vec::<String>::new());
    guest.delete().await;
}

#[tokio::test]
async fn hypervisors_that_cannot_add_memory_say_so() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let capabilities = server.client().get("/capabilities").await.expect(200).json();
    for hypervisor in hypervisors() {
        let runtimes = capabilities["runtimes"].as_array().expect("runtimes");
        let runtime = runtimes.iter().find(|runtime| runtime["name"] == hypervisor);
        let features = runtime.expect("its runtime")["features"].as_array().cloned();
        if features.unwrap_or_default().contains(&json!("hotplug-memory")) {
            assert_eq!(hypervisor, "cloud-hypervisor");
            continue;
        }
        let request = json!({
            "name": "more", "image": image, "hypervisor": hypervisor, "hotplug_size": "512MB",
            "network": {"enabled": false},
        });
        let refusal = server.client().post("/instances", &request).await;
        refusal.refused(400, "invalid_hotplug_size");
    }
    assert_eq!(server.vmms(), vec![]);
}
