//! What the server says about itself.

use hypeman_tests::{Server, ServerOptions};
use serde_json::json;

#[tokio::test]
async fn the_public_pages_need_no_token_and_nothing_from_elsewhere() {
    let server = Server::start().await;
    let stranger = server.client().with_token(None);
    assert_eq!(
        stranger.get("/health").await.expect(200).json(),
        json!({"status": "ok"})
    );
    let spec = stranger.get("/spec.json").await.expect(200).json();
    assert!(
        spec["openapi"].as_str().unwrap().starts_with("3.1"),
        "{}",
        spec["openapi"]
    );
    assert!(spec["paths"]["/instances"]["post"].is_object());
    let yaml = stranger.get("/spec.yaml").await.expect(200);
    assert!(
        yaml.header("content-type")
            .starts_with("application/vnd.oai.openapi"),
        "{:?}",
        yaml.headers
    );
    let page = stranger.get("/swagger").await.expect(200);
    assert!(page.header("content-type").starts_with("text/html"));
    let text = page.text();
    for foreign in ["src=\"http", "src='http", "href=\"http", "src=\"//", "@import"] {
        assert!(
            !text.contains(foreign),
            "the page fetches from elsewhere: {foreign}"
        );
    }
}

#[tokio::test]
async fn capabilities_and_resources_tell_the_truth() {
    let server = Server::start().await;
    let client = server.client();
    let capabilities = client.get("/capabilities").await.expect(200).json();
    assert_eq!(capabilities["server"]["api_version"], "0.3.0");
    assert_eq!(capabilities["host"]["os"], "linux");
    let runtimes = capabilities["runtimes"].as_array().unwrap();
    let names: Vec<&str> = runtimes
        .iter()
        .map(|runtime| runtime["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        ["cloud-hypervisor", "firecracker", "qemu", "qemu-microvm", "vz"]
    );
    for runtime in runtimes {
        let name = runtime["name"].as_str().unwrap();
        let ours = match name {
            "vz" => false,
            "qemu" | "qemu-microvm" => hypeman_tests::have("qemu-system-x86_64"),
            _ => hypeman_tests::offers(name),
        };
        assert_eq!(runtime["available"], ours, "{runtime}");
        assert_eq!(runtime["unavailable_reason"].is_string(), !ours, "{runtime}");
        // No call hands over a device yet.
        let abilities = runtime["features"].as_array().unwrap();
        assert!(!abilities.contains(&json!("gpu-passthrough")), "{runtime}");
    }
    let features = capabilities["features"].as_array().unwrap();
    for feature in ["instances", "images", "exec", "logs"] {
        assert!(features.contains(&json!(feature)), "{feature}: {features:?}");
    }
    let resources = client.get("/resources").await.expect(200).json();
    for resource in ["cpu", "memory", "disk"] {
        assert!(
            resources[resource]["capacity"].as_u64().unwrap() > 0,
            "{resource}: {resources}"
        );
        assert!(resources[resource]["oversub_ratio"].is_number());
    }
    assert_eq!(resources["allocations"], json!([]));
    assert_eq!(client.get("/pagers").await.expect(200).json(), json!([]));
}

/// A program that says which version of a VMM it is, and is none.
pub(crate) fn says(path: &std::path::Path, banner: &str) {
    use std::os::unix::fs::PermissionsExt;
    // Under another name first: a program that is being written cannot be started.
    let fresh = path.with_extension("new");
    std::fs::write(&fresh, format!("#!/bin/sh\necho '{banner}'\n")).unwrap();
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::rename(&fresh, path).unwrap();
}

#[tokio::test]
async fn a_vmm_with_known_holes_is_unavailable_until_a_newer_one_takes_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let vmms = [
        (
            "cloud-hypervisor",
            "cloud-hypervisor v51.1",
            "51.2.0 or newer",
            "cloud-hypervisor v53.0",
        ),
        (
            "firecracker",
            "Firecracker v1.15.0",
            "1.15.1 or newer",
            "Firecracker v1.15.1",
        ),
    ];
    for (name, old, ..) in vmms {
        says(&folder.path().join(name), old);
    }
    let server = Server::start_with(ServerOptions {
        settings: vec![
            (
                "hypervisor.cloud_hypervisor_binary_path",
                json!(folder.path().join("cloud-hypervisor")),
            ),
            (
                "hypervisor.firecracker_binary_path",
                json!(folder.path().join("firecracker")),
            ),
        ],
        ..ServerOptions::default()
    })
    .await;
    let reason_of = async |name: &str| {
        let capabilities = server.client().get("/capabilities").await.expect(200).json();
        let runtimes = capabilities["runtimes"].as_array().unwrap();
        let runtime = runtimes.iter().find(|runtime| runtime["name"] == name).unwrap();
        runtime["unavailable_reason"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    for (name, _, needed, new) in vmms {
        let reason = reason_of(name).await;
        assert!(
            reason.contains("known holes") && reason.contains(needed),
            "{reason}"
        );
        says(&folder.path().join(name), new);
        // What is left is what the host lacks, if anything.
        let reason = reason_of(name).await;
        assert!(!reason.contains("known holes"), "{reason}");
    }
}

#[tokio::test]
async fn what_is_not_built_yet_is_absent() {
    let server = Server::start().await;
    for path in [
        "/volumes",
        "/builds",
        "/builders",
        "/pushes",
        "/ingresses",
        "/devices",
        "/nonsense",
    ] {
        assert_eq!(server.client().get(path).await.status, 404, "{path}");
    }
}

#[tokio::test]
async fn a_second_server_on_the_same_data_refuses_to_start() {
    let mut server = Server::start().await;
    let (started, said) = server.start_second();
    assert!(!started);
    let directory = server.data_directory().to_string_lossy().into_owned();
    assert!(said.contains(&directory), "says which directory: {said}");
    assert_eq!(server.client().get("/health").await.status, 200);
    assert!(server.terminate(), "a server that is asked to end ends well");
    server.start_again().await;
}
