//! Every kind of failure has the envelope, the right status and a stable code.

use axum::http::{Method, StatusCode};
use bytes::Bytes;
use serde_json::json;

use super::support::{Server, token};

#[tokio::test]
async fn unknown_paths_and_methods() {
    let server = Server::start().await;
    let answer = server.get("/nothing/here").await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (StatusCode::NOT_FOUND, "Not Found")
    );
    let answer = server.ask(Method::PUT, "/instances", "{}").await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed")
    );
    assert!(answer.header("allow").contains("POST"), "{:?}", answer.headers);
    assert!(answer.header("content-type").starts_with("application/json"));
    server.stop().await;
}

#[tokio::test]
async fn requests_are_named() {
    let server = Server::start().await;
    let fresh = server.get("/health").await;
    assert_eq!(fresh.header("x-request-id").len(), 32);
    let given = server
        .send(
            Method::GET,
            "/health",
            &[("x-request-id", "mine-1".into())],
            Bytes::new(),
        )
        .await;
    assert_eq!(given.header("x-request-id"), "mine-1");
    let hostile = server
        .send(
            Method::GET,
            "/health",
            &[("x-request-id", "a b\"c".into())],
            Bytes::new(),
        )
        .await;
    assert_eq!(hostile.header("x-request-id").len(), 32);
    assert_eq!(server.get("/nothing").await.header("x-request-id").len(), 32);
    server.stop().await;
}

#[tokio::test]
async fn bodies_are_checked_before_anything_happens() {
    let server = Server::start().await;
    for body in [
        "",
        "{",
        "[]",
        "\"x\"",
        "{}",
        r#"{"name":1,"image":"alpine"}"#,
        r#"{"name":"web"}"#,
        r#"{"name":"Not-Valid","image":"alpine"}"#,
        r#"{"name":"web","image":"alpine","hypervisor":"xen"}"#,
        r#"{"name":"web","image":"alpine","vcpus":"two"}"#,
        r#"{"name":"web","image":"alpine","vcpus":0}"#,
    ] {
        let answer = server.ask(Method::POST, "/instances", body).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (StatusCode::BAD_REQUEST, "Bad Request"),
            "{body}"
        );
    }
    let headers = [
        ("authorization", format!("Bearer {}", token(None))),
        ("content-type", "text/plain".to_owned()),
    ];
    let answer = server
        .send(Method::POST, "/instances", &headers, Bytes::from_static(b"{}"))
        .await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    let huge = format!(r#"{{"name":"{}"}}"#, "a".repeat(2 << 20));
    let answer = server.ask(Method::POST, "/instances", &huge).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (StatusCode::PAYLOAD_TOO_LARGE, "Payload Too Large")
    );
    server.stop().await;
}

#[tokio::test]
async fn codes_of_fields() {
    let server = Server::start().await;
    for (extra, code) in [
        (json!({"size": "1Gb"}), "invalid_size"),
        (json!({"overlay_size": "x"}), "invalid_overlay_size"),
        (json!({"ttl": "soon"}), "invalid_ttl"),
        (json!({"platform": "linux/s390x"}), "invalid_platform"),
    ] {
        let mut body = json!({"name": "web", "image": "alpine"});
        body.as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        let answer = server.ask(Method::POST, "/instances", &body.to_string()).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (StatusCode::BAD_REQUEST, code),
            "{body}"
        );
    }
    server.stop().await;
}

#[tokio::test]
async fn queries_are_checked() {
    let server = Server::start().await;
    for path in [
        "/instances?state=Sleeping",
        "/instances?tags=x",
        "/instances/web/logs?tail=-1",
        "/instances/web/logs?follow=maybe",
        "/instances/web/logs?source=kernel",
        "/instances/web/stat",
        "/instances/web/wait",
        "/instances/web/wait?state=Nowhere",
    ] {
        let answer = server.get(path).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (StatusCode::BAD_REQUEST, "Bad Request"),
            "{path}"
        );
    }
    for path in [
        "/instances",
        "/instances?state=Unknown",
        "/instances?tags%5Ba%2Fb%5D=c%20d",
        "/images",
        "/images?tags[a]=b",
    ] {
        let answer = server.get(path).await;
        assert_eq!(
            (answer.status, answer.json()),
            (StatusCode::OK, json!([])),
            "{path}"
        );
    }
    server.stop().await;
}

#[tokio::test]
async fn what_is_not_there() {
    let server = Server::start().await;
    for (method, path) in [
        (Method::GET, "/instances/web"),
        (Method::DELETE, "/instances/web"),
        (Method::POST, "/instances/web/stop"),
        (Method::GET, "/instances/web/logs"),
        (Method::GET, "/instances/web/stats"),
        (Method::GET, "/instances/web/stat?path=/"),
        (Method::GET, "/instances/web/wait?state=Running"),
        (Method::GET, "/instances/web/exec"),
        (Method::GET, "/instances/web/cp"),
    ] {
        let answer = server.ask(method, path, "").await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (StatusCode::NOT_FOUND, "not_found"),
            "{path}"
        );
        assert_eq!(answer.message(), "resource not found", "{path}");
    }
    for path in ["/images/alpine", "/images/docker.io%2Flibrary%2Falpine%3Alatest"] {
        let answer = server.get(path).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (StatusCode::NOT_FOUND, "not_found"),
            "{path}"
        );
    }
    let answer = server.get("/images/Not%20A%20Name").await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (StatusCode::BAD_REQUEST, "invalid_name")
    );
    let answer = server.ask(Method::POST, "/instances/web/start", "").await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST, "start needs a body");
    server.stop().await;
}

#[tokio::test]
async fn capabilities_name_all_hypervisors() {
    let server = Server::start().await;
    let answer = server.get("/capabilities").await;
    assert_eq!(answer.status, StatusCode::OK);
    let document = answer.json();
    let names: Vec<&str> = document["runtimes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|runtime| runtime["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        ["cloud-hypervisor", "firecracker", "qemu", "qemu-microvm", "vz"]
    );
    assert_eq!(document["server"]["api_version"], "0.3.0");
    assert_eq!(document["default_runtime"]["name"], "qemu-microvm");
    server.stop().await;
}
