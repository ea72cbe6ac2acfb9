//! Names, ids, prefixes, tags, limits and what is refused.

use hypeman_tests::{Server, encode, have, skip_unless};
use serde_json::{Value, json};

#[tokio::test]
async fn instances_are_found_by_id_name_and_prefix() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let client = server.client();
    let image = server.busybox().await;
    let mut ids = Vec::new();
    for (name, team) in [("one", "a"), ("two", "a"), ("three", "b/c=d +@")] {
        let guest = server
            .create(
                &image,
                json!({"name": name, "cmd": ["true"], "tags": {"team": team, "all": "x"}}),
            )
            .await;
        guest.wait_for("Stopped").await;
        ids.push(guest.id);
    }
    for key in [ids[0].as_str(), "one"] {
        assert_eq!(
            client.get(&format!("/instances/{key}")).await.expect(200).json()["id"],
            ids[0].as_str()
        );
    }
    let unique = (1..24)
        .find(|n| ids[1..].iter().all(|id| !id.starts_with(&ids[0][..*n])))
        .unwrap();
    assert_eq!(
        client
            .get(&format!("/instances/{}", &ids[0][..unique]))
            .await
            .expect(200)
            .json()["id"],
        ids[0].as_str()
    );
    client.get("/instances/nobody").await.refused(404, "not_found");
    client
        .get(&format!("/instances/{}", encode("../../etc")))
        .await
        .refused(404, "not_found");
    // Three ids cannot be made to share a prefix, but a thousand names can: the shared prefix of all ids is empty or ambiguous.
    if let Some(shared) = ids.iter().find_map(|id| {
        ids.iter()
            .find(|other| *other != id && other[..1] == id[..1])
            .map(|_| &id[..1])
    }) {
        client
            .get(&format!("/instances/{shared}"))
            .await
            .refused(409, "ambiguous");
    }

    let list = async |query: &str| -> Vec<String> {
        let list = client
            .get(&format!("/instances?{query}"))
            .await
            .expect(200)
            .json();
        let mut names: Vec<String> = list
            .as_array()
            .unwrap()
            .iter()
            .map(|instance| instance["name"].as_str().unwrap().to_owned())
            .collect();
        names.sort();
        names
    };
    assert_eq!(list("").await, ["one", "three", "two"]);
    assert_eq!(list("tags[team]=a").await, ["one", "two"]);
    assert_eq!(list("tags%5Bteam%5D=a&tags%5Ball%5D=x").await, ["one", "two"]);
    assert_eq!(
        list(&format!("tags%5Bteam%5D={}", encode("b/c=d +@"))).await,
        ["three"]
    );
    assert_eq!(list("tags[team]=a&tags[all]=y").await, Vec::<String>::new());
    assert_eq!(list("state=Stopped&tags[team]=a").await, ["one", "two"]);
    assert_eq!(list("state=Running").await, Vec::<String>::new());
    assert_eq!(list("state=Unknown").await, Vec::<String>::new());
    assert_eq!(client.get("/instances?state=Nonsense").await.status, 400);
}

#[tokio::test]
async fn requests_that_make_no_sense_are_refused_with_a_reason() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let client = server.client();
    let image = server.busybox().await;
    let base = json!({"name": "x", "image": image, "network": {"enabled": false}});
    let attempt = async |key: &str, value: Value| {
        let mut request = base.clone();
        request[key] = value;
        client.post("/instances", &request).await
    };
    attempt("size", json!("lots")).await.refused(400, "invalid_size");
    attempt("size", json!("1.5GB")).await.refused(400, "invalid_size");
    attempt("size", json!("1Gb")).await.refused(400, "invalid_size");
    attempt("overlay_size", json!("-1"))
        .await
        .refused(400, "invalid_overlay_size");
    attempt("hotplug_size", json!("x"))
        .await
        .refused(400, "invalid_hotplug_size");
    attempt("disk_io_bps", json!("fast"))
        .await
        .refused(400, "invalid_disk_io_bps");
    attempt("ttl", json!("tomorrow"))
        .await
        .refused(400, "invalid_ttl");
    attempt("platform", json!("plan9/mips"))
        .await
        .refused(400, "invalid_platform");
    for name in ["", "Upper", "-dash", "dash-", "under_score", &"x".repeat(64)] {
        assert_eq!(attempt("name", json!(name)).await.status, 400, "{name:?}");
    }
    for (key, value) in [
        ("vcpus", json!(17)),
        ("vcpus", json!(-1)),
        ("vcpus", json!("two")),
        ("size", json!("33GB")),
        ("overlay_size", json!("101GB")),
        ("hypervisor", json!("bhyve")),
        ("env", json!(["A=B"])),
        ("tags", json!({"": "x"})),
        ("tags", json!({"k": "é"})),
        ("tags", json!({"k".repeat(129): "x"})),
        (
            "tags",
            (0..51)
                .map(|i| (format!("k{i}"), json!("v")))
                .collect::<serde_json::Map<_, _>>()
                .into(),
        ),
    ] {
        let reply = attempt(key, value.clone()).await;
        assert!(
            (400..500).contains(&reply.status),
            "{key}={value}: {} {}",
            reply.status,
            reply.text()
        );
        let body = reply.json();
        assert!(body["code"].is_string() && body["message"].is_string(), "{body}");
    }
    let missing = client
        .post("/instances", &json!({"name": "x"}))
        .await
        .expect(400)
        .json();
    assert!(
        missing["message"].as_str().unwrap().contains("image"),
        "{missing}"
    );
    let request = client
        .request(reqwest::Method::POST, "/instances")
        .header("content-type", "application/json");
    assert_eq!(
        client
            .send(request.body("{\"name\": \"quote\\\" and"))
            .await
            .expect(400)
            .json()["code"],
        "Bad Request"
    );
    assert_eq!(
        client.get("/instances").await.json(),
        json!([]),
        "none of these left anything"
    );
    assert_eq!(server.vmms(), vec![]);
}

#[tokio::test]
async fn names_are_unique_and_sizes_are_echoed_for_people() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let client = server.client();
    let image = server.busybox().await;
    let guest = server
        .create(
            &image,
            json!({"name": "same", "cmd": ["true"], "overlay_size": "1GB"}),
        )
        .await;
    let request = json!({"name": "same", "image": image, "network": {"enabled": false}});
    client
        .post("/instances", &request)
        .await
        .refused(400, "name_conflict");
    assert_eq!(guest.inspect().await["overlay_size"], "1024.0 MB");
    guest.delete().await;
    let again = server
        .create(&image, json!({"name": "same", "cmd": ["true"]}))
        .await;
    assert_ne!(again.id, guest.id, "a name is free once its instance is gone");
}
