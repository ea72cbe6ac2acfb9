//! Requests about snapshots that are decided before any instance is touched.

use axum::http::{Method, StatusCode};
use bytes::Bytes;
use serde_json::{Value, json};

use super::support::{Server, token};

const NOBODY: &str = "aaaaaaaaaaaaaaaaaaaaaaaa";

#[tokio::test]
async fn what_belongs_to_no_instance_is_not_found() {
    let server = Server::start().await;
    for (method, path, body) in [
        (Method::POST, "/instances/web/standby", ""),
        (Method::POST, "/instances/web/restore", ""),
        (Method::POST, "/instances/web/fork", r#"{"name":"copy"}"#),
        (Method::POST, "/instances/web/snapshots", r#"{"kind":"Standby"}"#),
        (
            Method::POST,
            "/instances/web/snapshots/bbbbbbbbbbbbbbbbbbbbbbbb/restore",
            "{}",
        ),
        (Method::GET, "/instances/web/snapshot-schedule", ""),
        (
            Method::PUT,
            "/instances/web/snapshot-schedule",
            r#"{"interval":"1h","retention":{"max_count":1}}"#,
        ),
        (Method::DELETE, "/instances/web/snapshot-schedule", ""),
    ] {
        let answer = server.ask(method.clone(), path, body).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (StatusCode::NOT_FOUND, "not_found"),
            "{method} {path}"
        );
        assert_eq!(answer.message(), "resource not found", "{method} {path}");
    }
    server.stop().await;
}

#[tokio::test]
async fn bodies_are_required_or_not_as_the_contract_says() {
    let server = Server::start().await;
    for path in [
        "/instances/web/fork".to_owned(),
        "/instances/web/snapshots".to_owned(),
        format!("/instances/web/snapshots/{NOBODY}/restore"),
        format!("/snapshots/{NOBODY}/fork"),
    ] {
        let answer = server.ask(Method::POST, &path, "").await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (StatusCode::BAD_REQUEST, "Bad Request"),
            "{path}"
        );
    }
    let schedule = server
        .ask(Method::PUT, "/instances/web/snapshot-schedule", "")
        .await;
    assert_eq!(schedule.status, StatusCode::BAD_REQUEST);
    // These get as far as looking for the instance.
    for (path, body) in [
        ("standby", ""),
        ("standby", "{}"),
        ("standby", "null"),
        ("restore", ""),
    ] {
        let answer = server
            .ask(Method::POST, &format!("/instances/web/{path}"), body)
            .await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND, "{path} {body}");
    }
    let headers = [
        ("authorization", format!("Bearer {}", token(None))),
        ("content-type", "text/plain".to_owned()),
    ];
    let plain = server
        .send(
            Method::POST,
            "/instances/web/standby",
            &headers,
            Bytes::from_static(b"{}"),
        )
        .await;
    assert_eq!(plain.status, StatusCode::BAD_REQUEST);
    server.stop().await;
}

#[tokio::test]
async fn bodies_are_held_to_the_schema() {
    let server = Server::start().await;
    let schedule = |change: Value| {
        let mut body = json!({"interval": "1h", "retention": {"max_count": 1}});
        body.as_object_mut()
            .unwrap()
            .extend(change.as_object().unwrap().clone());
        body
    };
    for (method, path, body) in [
        (Method::POST, "/instances/web/standby", json!([])),
        (Method::POST, "/instances/web/standby", json!({"compression": {}})),
        (
            Method::POST,
            "/instances/web/standby",
            json!({"compression": {"enabled": true, "algorithm": "gzip"}}),
        ),
        (Method::POST, "/instances/web/snapshots", json!({})),
        (
            Method::POST,
            "/instances/web/snapshots",
            json!({"kind": "Running"}),
        ),
        (Method::POST, "/instances/web/fork", json!({"from_running": true})),
        (
            Method::POST,
            "/instances/web/fork",
            json!({"name": "copy", "target_state": "Paused"}),
        ),
        (
            Method::POST,
            "/instances/web/fork",
            json!({"name": "copy", "count": "many"}),
        ),
        (
            Method::POST,
            "/snapshots/aaaaaaaaaaaaaaaaaaaaaaaa/fork",
            json!({"name": "copy", "target_hypervisor": "xen"}),
        ),
        (
            Method::POST,
            "/snapshots/aaaaaaaaaaaaaaaaaaaaaaaa/fork",
            json!({"name": "Copy"}),
        ),
        (
            Method::POST,
            "/snapshots/aaaaaaaaaaaaaaaaaaaaaaaa/fork",
            json!({"name": "copy", "count": 101}),
        ),
        (
            Method::PUT,
            "/instances/web/snapshot-schedule",
            schedule(json!({"retention": {"max_count": -1}})),
        ),
        (
            Method::PUT,
            "/instances/web/snapshot-schedule",
            json!({"interval": "1h"}),
        ),
    ] {
        let answer = server.ask(method, path, &body.to_string()).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (StatusCode::BAD_REQUEST, "Bad Request"),
            "{path} {body}"
        );
    }
    server.stop().await;
}

#[tokio::test]
async fn filters_of_the_list_are_checked() {
    let server = Server::start().await;
    for query in [
        "kind=Running",
        "limit=0",
        "limit=-1",
        "limit=ten",
        "tags=x",
        "tags[a]=1&tags[a]=2",
    ] {
        let answer = server.get(&format!("/snapshots?{query}")).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (StatusCode::BAD_REQUEST, "Bad Request"),
            "{query}"
        );
    }
    server.stop().await;
}

#[tokio::test]
async fn the_document_names_what_each_call_answers() {
    let document: Value = serde_json::from_slice(&crate::openapi::render().unwrap().json).unwrap();
    let answers = |path: &str, method: &str| -> Vec<String> {
        document["paths"][path][method]["responses"]
            .as_object()
            .unwrap()
            .keys()
            .cloned()
            .collect()
    };
    for (path, method, status) in [
        ("/instances/{id}/snapshots", "post", "501"),
        ("/instances/{id}/fork", "post", "201"),
        ("/snapshots/{id}/fork", "post", "409"),
        ("/snapshots", "get", "200"),
        ("/snapshots/{id}/verify", "post", "404"),
    ] {
        assert!(
            answers(path, method).iter().any(|found| found == status),
            "{method} {path} {status}"
        );
    }
    let standby = &document["paths"]["/instances/{id}/standby"]["post"]["requestBody"];
    assert_ne!(standby["required"], true, "{standby}");
    let snapshot = &document["components"]["schemas"]["Snapshot"];
    let required: Vec<&str> = snapshot["required"]
        .as_array()
        .unwrap()
        .iter()
        .map(|field| field.as_str().unwrap())
        .collect();
    assert_eq!(
        required,
        [
            "id",
            "kind",
            "source_instance_id",
            "source_instance_name",
            "source_hypervisor",
            "created_at",
            "size_bytes"
        ]
    );
}
