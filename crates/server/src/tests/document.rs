//! The OpenAPI document against the route table and the file in the repository.
//!
//! After a wanted change: `UPDATE_GOLDEN=1 cargo test -p hypeman-server`, and read the difference.

use std::collections::BTreeSet;
use std::path::Path;

use axum::http::{Method, StatusCode};
use bytes::Bytes;
use serde_json::Value;

use super::support::Server;
use crate::middleware::Access;
use crate::openapi::render;
use crate::routes::table;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../api/openapi.json");

fn document() -> Value {
    serde_json::from_slice(&render().unwrap().json).unwrap()
}

fn operations(document: &Value) -> Vec<(String, String, Value)> {
    let mut found = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            if ["get", "post", "put", "patch", "delete"].contains(&method.as_str()) {
                found.push((method.to_uppercase(), path.clone(), operation.clone()));
            }
        }
    }
    found
}

#[test]
fn it_is_what_the_repository_holds() {
    let rendered = render().unwrap().json;
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(GOLDEN, &rendered).unwrap();
    }
    let golden = std::fs::read(Path::new(GOLDEN)).unwrap_or_default();
    assert!(
        golden == rendered,
        "crates/api/openapi.json differs; run with UPDATE_GOLDEN=1 and read the difference"
    );
}

#[test]
fn it_has_exactly_the_routes_of_the_table() {
    let document = document();
    let described: BTreeSet<(String, String)> = operations(&document)
        .into_iter()
        .map(|(method, path, _)| (method, path))
        .collect();
    let routed: BTreeSet<(String, String)> = table()
        .iter()
        .filter(|route| route.documented)
        .map(|route| (route.method.as_ref().unwrap().to_string(), route.path.to_owned()))
        .collect();
    assert_eq!(described, routed);
}

#[test]
fn it_says_where_a_token_is_needed() {
    let document = document();
    for (method, path, operation) in operations(&document) {
        let routes = table();
        let route = routes.iter().find(|route| {
            route.path == path
                && route
                    .method
                    .as_ref()
                    .is_some_and(|candidate| candidate.as_str() == method)
        });
        let scoped = matches!(route.unwrap().access, Access::Scoped(_));
        assert_eq!(
            operation["security"].as_array().unwrap().is_empty(),
            !scoped,
            "{method} {path}"
        );
        assert_eq!(
            operation["responses"].get("401").is_some(),
            scoped,
            "{method} {path}"
        );
        for status in ["500", "503"] {
            assert!(
                operation["responses"].get(status).is_some(),
                "{method} {path} {status}"
            );
        }
        assert!(operation["operationId"].is_string(), "{method} {path}");
    }
    assert_eq!(document["openapi"], "3.1.0");
    assert_eq!(document["info"]["version"], "0.3.0");
}

#[test]
fn every_reference_in_it_leads_somewhere() {
    fn walk(value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(fields) => {
                if let Some(Value::String(reference)) = fields.get("$ref") {
                    found.insert(reference.clone());
                }
                fields.values().for_each(|field| walk(field, found));
            }
            Value::Array(items) => items.iter().for_each(|item| walk(item, found)),
            _ => {}
        }
    }
    let document = document();
    let mut references = BTreeSet::new();
    walk(&document, &mut references);
    assert!(references.len() > 10);
    for reference in references {
        assert!(
            document.pointer(reference.trim_start_matches('#')).is_some(),
            "{reference}"
        );
    }
}

#[tokio::test]
async fn it_is_served_in_both_forms_and_shown_without_help_from_elsewhere() {
    let server = Server::start().await;
    let json = server.send(Method::GET, "/spec.json", &[], Bytes::new()).await;
    assert_eq!(json.json(), document());
    let yaml = server.send(Method::GET, "/spec.yaml", &[], Bytes::new()).await;
    assert_eq!(
        (yaml.status, yaml.header("content-type")),
        (StatusCode::OK, "application/vnd.oai.openapi")
    );
    let parsed: Value = serde_norway::from_slice(&yaml.body).unwrap();
    assert_eq!(parsed, document());
    let page = server.send(Method::GET, "/swagger", &[], Bytes::new()).await;
    assert!(page.header("content-type").starts_with("text/html"));
    let page = String::from_utf8(page.body.to_vec()).unwrap();
    assert!(!page.contains("http://") && !page.contains("https://") && !page.contains("src="));
    server.stop().await;
}
