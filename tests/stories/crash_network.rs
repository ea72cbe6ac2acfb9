//! The server dies at each step of what is done with an instance on the network: no TAP is left, and none is missing.

use std::collections::BTreeSet;

use hypeman_tests::{Guest, Server, have, is_root, or_skip, skip_unless};
use serde_json::json;

use crate::crash::{Traces, cut, group, settled};
use crate::network::Namespace;

/// Names of the links in this network namespace.
fn links() -> BTreeSet<String> {
    Namespace::output(&["ip", "-o", "link"])
        .lines()
        .filter_map(|line| line.split(": ").nth(1))
        .filter_map(|name| name.split('@').next().map(str::to_owned))
        .collect()
}

/// The links are those of before, and one more where the instance runs.
fn one_link_if_it_runs(alone: &BTreeSet<String>, state: &str, point: &str) {
    let now = links();
    let more: Vec<&String> = now.difference(alone).collect();
    assert_eq!(more.len(), usize::from(state == "Running"), "{point}: {more:?}");
    assert!(alone.is_subset(&now), "{point}: {alone:?} became {now:?}");
}

/// What runs has the address that the API shows.
async fn reachable(guest: &Guest) {
    let shown = guest.inspect().await;
    let address = shown["network"]["ip"].as_str().unwrap();
    assert!(guest.output("ip -4 -o addr show eth0").await.contains(address));
}

#[tokio::test]
async fn what_is_done_on_the_network_is_cut_at_each_step() {
    skip_unless!(
        have("busybox") && is_root() && have("ip") && have("nft"),
        "needs root, ip, nft and busybox-static"
    );
    let _namespace = or_skip!(Namespace::enter(), "cannot make network namespaces here");
    Namespace::run(&["sysctl", "-qw", "net.ipv4.ip_forward=1"]);
    let mut server = Server::start().await;
    let image = server.busybox().await;
    let wired = json!({"name": "cut", "network": {"enabled": true}});
    // The first one brings the bridge, which stays.
    server.run(&image, wired.clone()).await.delete().await;
    let alone = links();

    for point in group("create.") {
        let request = json!({
            "name": "cut", "image": image, "size": "128MB", "overlay_size": "256MB", "vcpus": 1,
            "network": {"enabled": true},
        });
        cut(&mut server, point, async |client| {
            client.try_post("/instances", &request).await
        })
        .await;
        if let [guest] = server.guests().await.as_slice() {
            let state = settled(&server, guest, &["Running", "Stopped"]).await;
            one_link_if_it_runs(&alone, &state, point);
            guest.delete().await;
        }
        assert_eq!(links(), alone, "{point}");
    }

    let guest = server.run(&image, wired.clone()).await;
    let traces = Traces::of(&server, &guest).await;
    for (operation, points) in [("start", group("start.")), ("stop", group("stop."))] {
        let path = format!("/instances/{}/{operation}", guest.id);
        for point in points {
            if operation == "start" {
                guest.stop().await;
                assert_eq!(links(), alone, "before {point}");
            }
            cut(&mut server, point, async |client| {
                client.try_post(&path, &json!({})).await
            })
            .await;
            let state = settled(&server, &guest, &["Running", "Stopped"]).await;
            one_link_if_it_runs(&alone, &state, point);
            traces.left_nothing(&server, &state, point);
            if state == "Stopped" {
                guest.start(json!({})).await;
            }
            reachable(&guest).await;
        }
    }
    guest.delete().await;
    assert_eq!(links(), alone);

    for point in group("delete.") {
        let guest = server.run(&image, wired.clone()).await;
        let path = format!("/instances/{}", guest.id);
        cut(&mut server, point, async |client| client.try_delete(&path).await).await;
        if !server.guests().await.is_empty() {
            let state = settled(&server, &guest, &["Running", "Stopped"]).await;
            one_link_if_it_runs(&alone, &state, point);
            guest.delete().await;
        }
        assert_eq!(links(), alone, "{point}");
        assert_eq!(server.vmms(), vec![], "{point}");
    }
}
