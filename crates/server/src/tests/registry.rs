//! The registry as clients use it.

use std::collections::BTreeMap;

use axum::http::{Method, StatusCode};
use base64::Engine as _;
use bytes::Bytes;
use hypeman_images::Digest;
use serde_json::json;

use super::support::{Answer, Server, token};
use crate::auth::Scope;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

struct Client<'a> {
    server: &'a Server,
    authorization: String,
}

impl<'a> Client<'a> {
    fn new(server: &'a Server) -> Self {
        Self {
            server,
            authorization: format!("Bearer {}", token(None)),
        }
    }

    async fn send(&self, method: Method, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut all = vec![("authorization", self.authorization.clone())];
        all.extend(headers.iter().map(|(name, value)| (*name, (*value).to_owned())));
        self.server
            .send(method, path, &all, Bytes::copy_from_slice(body))
            .await
    }

    async fn open(&self, repository: &str) -> String {
        let answer = self
            .send(
                Method::POST,
                &format!("/v2/{repository}/blobs/uploads/"),
                &[],
                b"",
            )
            .await;
        assert_eq!(answer.status, StatusCode::ACCEPTED);
        answer.header("location").to_owned()
    }

    /// Pushes a blob in one body.
    async fn push(&self, repository: &str, content: &[u8]) -> String {
        let digest = Digest::of(content).to_string();
        let location = self.open(repository).await;
        let answer = self
            .send(Method::PUT, &format!("{location}?digest={digest}"), &[], content)
            .await;
        assert_eq!(answer.status, StatusCode::CREATED, "{answer:?}");
        assert_eq!(answer.header("docker-content-digest"), digest);
        digest
    }
}

fn code(answer: &Answer) -> String {
    answer.json()["errors"][0]["code"].as_str().unwrap().to_owned()
}

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
async fn both_forms_of_authorization() {
    let server = Server::start().await;
    let anonymous = server.send(Method::GET, "/v2/", &[], Bytes::new()).await;
    assert_eq!(
        (anonymous.status, code(&anonymous).as_str()),
        (StatusCode::UNAUTHORIZED, "UNAUTHORIZED")
    );
    assert!(anonymous.header("www-authenticate").starts_with("Basic"));
    assert_eq!(
        anonymous.json()["errors"][0]["message"],
        "registry authentication required"
    );
    let basic = base64::engine::general_purpose::STANDARD.encode(format!("{}:x", token(None)));
    for header in [format!("Bearer {}", token(None)), format!("Basic {basic}")] {
        for path in ["/v2", "/v2/"] {
            let answer = server
                .send(
                    Method::GET,
                    path,
                    &[("authorization", header.clone())],
                    Bytes::new(),
                )
                .await;
            assert_eq!(answer.status, StatusCode::OK);
            assert_eq!(answer.header("docker-distribution-api-version"), "registry/2.0");
        }
    }
    server.stop().await;
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
async fn a_refusal_reaches_a_client_that_still_sends() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let server = Server::start().await;
    let body = vec![0; 32 << 20];
    let head = |token: &str| {
        format!(
            "POST /v2/a/blobs/uploads/?digest=sha256:{:064} HTTP/1.1\r\nHost: {}\r\n\
             Authorization: Bearer {token}\r\nContent-Length: {}\r\n\r\n",
            0,
            server.address,
            body.len()
        )
    };
    let mut connection = tokio::net::TcpStream::connect(server.address).await.unwrap();
    // Sends everything before it looks for an answer, and then goes on with the same connection.
    for (token, status) in [
        ("nonsense".to_owned(), "401"),
        (token(Some(&[Scope::ImageRead])), "403"),
    ] {
        connection.write_all(head(&token).as_bytes()).await.unwrap();
        connection.write_all(&body).await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"]}") {
            assert!(connection.read_buf(&mut answer).await.unwrap() > 0);
        }
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    }
    drop(connection);
    server.stop().await;
}

#[tokio::test]
async fn limited_tokens_keep_to_their_scopes() {
    let server = Server::start().await;
    let reader = Client {
        server: &server,
        authorization: format!("Bearer {}", token(Some(&[Scope::ImageRead]))),
    };
    let answer = reader.send(Method::POST, "/v2/a/blobs/uploads/", &[], b"").await;
    assert_eq!(
        (answer.status, code(&answer).as_str()),
        (StatusCode::FORBIDDEN, "DENIED")
    );
    let answer = reader.send(Method::GET, "/v2/a/tags/list", &[], b"").await;
    assert_eq!(
        (answer.status, code(&answer).as_str()),
        (StatusCode::NOT_FOUND, "NAME_UNKNOWN")
    );
    let other = Client {
        server: &server,
        authorization: format!("Bearer {}", token(Some(&[Scope::InstanceRead]))),
    };
    assert_eq!(
        other.send(Method::GET, "/v2/", &[], b"").await.status,
        StatusCode::OK
    );
    assert_eq!(
        other.send(Method::GET, "/v2/a/tags/list", &[], b"").await.status,
        StatusCode::FORBIDDEN
    );
    server.stop().await;
}

#[tokio::test]
async fn a_blob_in_chunks() {
    let server = Server::start().await;
    let client = Client::new(&server);
    let location = client.open("deep/er/and/deeper").await;
    let chunk = client
        .send(Method::PATCH, &location, &[("content-range", "0-4")], b"hello")
        .await;
    assert_eq!(
        (chunk.status, chunk.header("range")),
        (StatusCode::ACCEPTED, "0-4")
    );
    let location = chunk.header("location").to_owned();

    let gap = client
        .send(Method::PATCH, &location, &[("content-range", "9-10")], b"xx")
        .await;
    assert_eq!(
        (gap.status, gap.header("range")),
        (StatusCode::RANGE_NOT_SATISFIABLE, "0-4")
    );

    let status = client.send(Method::GET, &location, &[], b"").await;
    assert_eq!(
        (status.status, status.header("range")),
        (StatusCode::NO_CONTENT, "0-4")
    );

    let chunk = client.send(Method::PATCH, &location, &[], b", ").await;
    assert_eq!(chunk.header("range"), "0-6");
    let digest = Digest::of(b"hello, world").to_string();
    let encoded = digest.replace(':', "%3A");
    let done = client
        .send(
            Method::PUT,
            &format!("{location}?digest={encoded}"),
            &[],
            b"world",
        )
        .await;
    assert_eq!(done.status, StatusCode::CREATED);

    let path = format!("/v2/deep/er/and/deeper/blobs/{digest}");
    let head = client.send(Method::HEAD, &path, &[], b"").await;
    assert_eq!(
        (head.status, head.header("content-length")),
        (StatusCode::OK, "12")
    );
    assert_eq!(
        client.send(Method::GET, &path, &[], b"").await.body,
        "hello, world"
    );
    let part = client
        .send(Method::GET, &path, &[("range", "bytes=7-")], b"")
        .await;
    assert_eq!(
        (part.status, part.header("content-range")),
        (StatusCode::PARTIAL_CONTENT, "bytes 7-11/12")
    );
    assert_eq!(part.body, "world");
    let outside = client
        .send(Method::GET, &path, &[("range", "bytes=12-")], b"")
        .await;
    assert_eq!(
        (outside.status, outside.header("content-range")),
        (StatusCode::RANGE_NOT_SATISFIABLE, "bytes */12")
    );
    let gone = client.send(Method::GET, &location, &[], b"").await;
    assert_eq!(
        (gone.status, code(&gone).as_str()),
        (StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN")
    );
    server.stop().await;
}

#[tokio::test]
async fn other_ways_to_bring_a_blob() {
    let server = Server::start().await;
    let client = Client::new(&server);
    let digest = Digest::of(b"single").to_string();
    let single = client
        .send(
            Method::POST,
            &format!("/v2/a/blobs/uploads/?digest={digest}"),
            &[],
            b"single",
        )
        .await;
    assert_eq!(single.status, StatusCode::CREATED);
    let mounted = client
        .send(
            Method::POST,
            &format!("/v2/b/blobs/uploads/?mount={digest}&from=a"),
            &[],
            b"",
        )
        .await;
    assert_eq!(
        (mounted.status, mounted.header("location")),
        (StatusCode::CREATED, format!("/v2/b/blobs/{digest}").as_str())
    );
    let unknown = Digest::of(b"unknown").to_string();
    let fallback = client
        .send(
            Method::POST,
            &format!("/v2/b/blobs/uploads/?mount={unknown}&from=a"),
            &[],
            b"",
        )
        .await;
    assert_eq!(fallback.status, StatusCode::ACCEPTED);
    let cancelled = client
        .send(Method::DELETE, fallback.header("location"), &[], b"")
        .await;
    assert_eq!(cancelled.status, StatusCode::NO_CONTENT);
    server.stop().await;
}

#[tokio::test]
async fn a_blob_that_is_not_what_it_says() {
    let server = Server::start().await;
    let client = Client::new(&server);
    let digest = Digest::of(b"promised").to_string();
    let location = client.open("a").await;
    let answer = client
        .send(
            Method::PUT,
            &format!("{location}?digest={digest}"),
            &[],
            b"delivered",
        )
        .await;
    assert_eq!(
        (answer.status, code(&answer).as_str()),
        (StatusCode::BAD_REQUEST, "DIGEST_INVALID")
    );
    let answer = client
        .send(Method::HEAD, &format!("/v2/a/blobs/{digest}"), &[], b"")
        .await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND);
    let location = client.open("a").await;
    for path in [location.clone(), format!("{location}?digest=md5:00")] {
        let answer = client.send(Method::PUT, &path, &[], b"").await;
        assert_eq!(
            (answer.status, code(&answer).as_str()),
            (StatusCode::BAD_REQUEST, "DIGEST_INVALID"),
            "{path}"
        );
    }
    for path in ["/v2/a/blobs/uploads/../../x", "/v2/a/blobs/uploads/not-an-id"] {
        assert_eq!(
            client.send(Method::PATCH, path, &[], b"x").await.status,
            StatusCode::NOT_FOUND,
            "{path}"
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
fn write_layout(path: &std::path::Path) {
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
