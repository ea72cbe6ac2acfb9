//! Manifests and tags: images that come in, how they are named, and that they go out as they came in.

use std::collections::BTreeMap;
use std::path::Path;

use axum::http::{Method, StatusCode};
use hypeman_images::Digest;
use serde_json::json;

use super::{Client, code};
use crate::tests::support::{Server, token};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// A layer with nothing in it: two blocks of zeros end a tar archive.
const EMPTY_LAYER: [u8; 1024] = [0; 1024];

fn config() -> Vec<u8> {
    let diff = Digest::of(&EMPTY_LAYER).to_string();
    json!({
        "architecture": "amd64", "os": "linux", "config": {"Cmd": ["/bin/true"]},
        "rootfs": {"type": "layers", "diff_ids": [diff]}, "history": []
    })
    .to_string()
    .into_bytes()
}

fn manifest(config: &[u8]) -> Vec<u8> {
    json!({
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": Digest::of(config).to_string(), "size": config.len()},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": Digest::of(&EMPTY_LAYER).to_string(), "size": EMPTY_LAYER.len()}]
    })
    .to_string()
    .into_bytes()
}
#[tokio::test]
async fn an_image_is_named_after_the_address_that_was_pushed_to_and_no_other_registrys() {
    let server = Server::start().await;
    let client = Client::new(&server);
    let config = config();
    client.push("library/alpine", &config).await;
    client.push("library/alpine", &EMPTY_LAYER).await;
    let put = async |host: &str| {
        let headers = [("content-type", MANIFEST), ("host", host)];
        client
            .send(
                Method::PUT,
                "/v2/library/alpine/manifests/latest",
                &headers,
                &manifest(&config),
            )
            .await
    };
    for host in ["docker.io", "registry-1.docker.io:443", "quay.io", "a b"] {
        let answer = put(host).await;
        assert_eq!(
            (answer.status, code(&answer).as_str()),
            (StatusCode::BAD_REQUEST, "NAME_INVALID"),
            "{host}"
        );
    }
    assert_eq!(server.get("/images").await.json(), json!([]));
    for (host, registry) in [
        ("hypeman.example.com", "hypeman.example.com"),
        ("hypeman", "hypeman:80"),
    ] {
        assert_eq!(put(host).await.status, StatusCode::CREATED);
        let name = format!("{registry}/library/alpine:latest").replace('/', "%2F");
        assert_eq!(
            server.get(&format!("/images/{name}")).await.status,
            StatusCode::OK
        );
    }
    server.stop().await;
}
#[tokio::test]
async fn an_image_there_and_back() {
    let server = Server::start().await;
    let client = Client::new(&server);
    let config = config();
    let manifest = manifest(&config);
    let digest = Digest::of(&manifest).to_string();

    let early = client
        .send(
            Method::PUT,
            "/v2/team/app/manifests/v1",
            &[("content-type", MANIFEST)],
            &manifest,
        )
        .await;
    assert_eq!(
        (early.status, code(&early).as_str()),
        (StatusCode::BAD_REQUEST, "MANIFEST_BLOB_UNKNOWN")
    );
    client.push("team/app", &config).await;
    client.push("team/app", &EMPTY_LAYER).await;
    for reference in ["v1", "v2", digest.as_str()] {
        let path = format!("/v2/team/app/manifests/{reference}");
        let put = client
            .send(Method::PUT, &path, &[("content-type", MANIFEST)], &manifest)
            .await;
        assert_eq!(put.status, StatusCode::CREATED, "{put:?}");
        assert_eq!(put.header("docker-content-digest"), digest);
    }
    for reference in ["v1", digest.as_str()] {
        let path = format!("/v2/team/app/manifests/{reference}");
        let head = client.send(Method::HEAD, &path, &[], b"").await;
        assert_eq!(
            (head.status, head.header("content-type")),
            (StatusCode::OK, MANIFEST)
        );
        assert_eq!(head.header("content-length"), manifest.len().to_string());
        let get = client.send(Method::GET, &path, &[], b"").await;
        assert_eq!(get.body, manifest);
        assert_eq!(get.header("docker-content-digest"), digest);
    }
    let tags = client.send(Method::GET, "/v2/team/app/tags/list", &[], b"").await;
    assert_eq!(tags.json(), json!({"name": "team/app", "tags": ["v1", "v2"]}));
    let page = client
        .send(Method::GET, "/v2/team/app/tags/list?n=1", &[], b"")
        .await;
    assert_eq!(page.json()["tags"], json!(["v1"]));
    assert_eq!(
        page.header("link"),
        "</v2/team/app/tags/list?n=1&last=v1>; rel=\"next\""
    );

    let name = format!("{}/team/app:v1", server.address);
    let image = server.get(&format!("/images/{}", percent(&name))).await;
    assert_eq!(image.status, StatusCode::OK, "{image:?}");
    assert_eq!(image.json()["name"], name.as_str());

    let deleted = client
        .send(Method::DELETE, "/v2/team/app/manifests/v1", &[], b"")
        .await;
    assert_eq!(deleted.status, StatusCode::ACCEPTED);
    let gone = client
        .send(Method::GET, "/v2/team/app/manifests/v1", &[], b"")
        .await;
    assert_eq!(
        (gone.status, code(&gone).as_str()),
        (StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN")
    );
    server.stop().await;
}

#[tokio::test]
async fn an_index_with_its_manifests() {
    let server = Server::start().await;
    let client = Client::new(&server);
    let config = config();
    let manifest = manifest(&config);
    let digest = Digest::of(&manifest).to_string();
    client.push("multi", &config).await;
    client.push("multi", &EMPTY_LAYER).await;
    let put = client
        .send(
            Method::PUT,
            &format!("/v2/multi/manifests/{digest}"),
            &[("content-type", MANIFEST)],
            &manifest,
        )
        .await;
    assert_eq!(put.status, StatusCode::CREATED, "{put:?}");
    let index = json!({
        "schemaVersion": 2, "mediaType": INDEX,
        "manifests": [{"mediaType": MANIFEST, "digest": digest, "size": manifest.len(), "platform": {"os": "linux", "architecture": "amd64"}}]
    })
    .to_string();
    let put = client
        .send(
            Method::PUT,
            "/v2/multi/manifests/latest",
            &[("content-type", INDEX)],
            index.as_bytes(),
        )
        .await;
    assert_eq!(put.status, StatusCode::CREATED, "{put:?}");
    let get = client
        .send(Method::GET, "/v2/multi/manifests/latest", &[], b"")
        .await;
    assert_eq!(
        (get.header("content-type"), &get.body[..]),
        (INDEX, index.as_bytes())
    );
    server.stop().await;
}

#[tokio::test]
async fn manifests_that_are_none() {
    let server = Server::start().await;
    let client = Client::new(&server);
    for (body, kind) in [
        ("", MANIFEST),
        ("{", MANIFEST),
        ("[]", MANIFEST),
        ("{}", MANIFEST),
        ("{}", "text/plain"),
        (r#"{"schemaVersion":1}"#, MANIFEST),
    ] {
        let answer = client
            .send(
                Method::PUT,
                "/v2/a/manifests/x",
                &[("content-type", kind)],
                body.as_bytes(),
            )
            .await;
        assert_eq!(
            (answer.status, code(&answer).as_str()),
            (StatusCode::BAD_REQUEST, "MANIFEST_INVALID"),
            "{body} {kind}"
        );
    }
    let huge = vec![b' '; 5 << 20];
    let answer = client
        .send(
            Method::PUT,
            "/v2/a/manifests/x",
            &[("content-type", MANIFEST)],
            &huge,
        )
        .await;
    assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
    let config = config();
    client.push("a", &config).await;
    client.push("a", &EMPTY_LAYER).await;
    let other = Digest::of(b"other").to_string();
    let answer = client
        .send(
            Method::PUT,
            &format!("/v2/a/manifests/{other}"),
            &[("content-type", MANIFEST)],
            &manifest(&config),
        )
        .await;
    assert_eq!(
        (answer.status, code(&answer).as_str()),
        (StatusCode::BAD_REQUEST, "DIGEST_INVALID")
    );
    server.stop().await;
}

#[tokio::test]
async fn skopeo_pushes_and_pulls() {
    if std::process::Command::new("skopeo")
        .arg("--version")
        .output()
        .is_err()
    {
        println!("SKIPPED: skopeo is not installed");
        return;
    }
    let server = Server::start().await;
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    write_layout(&source);
    let remote = format!("docker://{}/some/where/app:v1", server.address);
    let back = format!("oci:{}:v1", directory.path().join("back").display());
    let credentials = format!("{}:x", token(None));
    for arguments in [
        vec![
            "copy",
            "--preserve-digests",
            "--dest-tls-verify=false",
            "--dest-creds",
            &credentials,
            &format!("oci:{}:v1", source.display()),
            &remote,
        ],
        vec![
            "copy",
            "--preserve-digests",
            "--src-tls-verify=false",
            "--src-creds",
            &credentials,
            &remote,
            &back,
        ],
    ] {
        let output = tokio::process::Command::new("skopeo")
            .args(["--insecure-policy"])
            .args(&arguments)
            .output()
            .await
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let digest = |layout: &str| {
        let index = std::fs::read(directory.path().join(layout).join("index.json")).unwrap();
        let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
        index["manifests"][0]["digest"].clone()
    };
    assert_eq!(digest("source"), digest("back"));
    server.stop().await;
}

/// An OCI layout with one image.
fn write_layout(path: &Path) {
    let config = config();
    let manifest = manifest(&config);
    let blobs = path.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    for content in [&config[..], &manifest, &EMPTY_LAYER] {
        std::fs::write(blobs.join(Digest::of(content).hex()), content).unwrap();
    }
    let annotations = BTreeMap::from([("org.opencontainers.image.ref.name", "v1")]);
    let index = json!({
        "schemaVersion": 2,
        "manifests": [{"mediaType": MANIFEST, "digest": Digest::of(&manifest).to_string(), "size": manifest.len(), "annotations": annotations}]
    });
    std::fs::write(path.join("index.json"), index.to_string()).unwrap();
    std::fs::write(path.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

fn percent(text: &str) -> String {
    percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
}
