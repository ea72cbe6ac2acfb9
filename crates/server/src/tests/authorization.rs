//! Every route against the scope table.

use axum::http::{Method, StatusCode};
use bytes::Bytes;

use super::support::{Server, token};
use crate::auth::{ALL, Scope};
use crate::middleware::Access;
use crate::routes::{Route, table};

fn concrete(route: &Route) -> String {
    if route.path == "/events" {
        // Without this it would answer forever.
        return "/events?cursor=none".to_owned();
    }
    route
        .path
        .replace("{id}", "aaaaaaaaaaaaaaaaaaaaaaaa")
        .replace("{snapshot_id}", "bbbbbbbbbbbbbbbbbbbbbbbb")
        .replace("{name}", "nothing")
        .replace("{*path}", "")
}

#[tokio::test]
async fn every_scoped_route_wants_a_token_and_its_scope() {
    let server = Server::start().await;
    for route in table() {
        let Access::Scoped(scope) = route.access else {
            continue;
        };
        let method = route.method.clone().unwrap();
        let path = concrete(&route);
        let what = format!("{method} {path}");

        let anonymous = server.send(method.clone(), &path, &[], Bytes::new()).await;
        assert_eq!(anonymous.status, StatusCode::UNAUTHORIZED, "{what}");
        assert_eq!(anonymous.code(), "Unauthorized", "{what}");
        assert_eq!(anonymous.message(), "authorization header required", "{what}");

        let others: Vec<Scope> = ALL.iter().copied().filter(|other| *other != scope).collect();
        let header = [("authorization", format!("Bearer {}", token(Some(&others))))];
        let limited = server.send(method.clone(), &path, &header, Bytes::new()).await;
        assert_eq!(limited.status, StatusCode::FORBIDDEN, "{what}");
        assert_eq!(limited.code(), "Forbidden", "{what}");
        assert_eq!(
            limited.message(),
            format!("missing required scope: {scope}"),
            "{what}"
        );

        let header = [("authorization", format!("Bearer {}", token(Some(&[scope]))))];
        let allowed = server.send(method, &path, &header, Bytes::new()).await;
        assert!(
            !matches!(allowed.status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN),
            "{what}: {}",
            allowed.status
        );
        assert!(!allowed.status.is_server_error(), "{what}: {}", allowed.status);
    }
    server.stop().await;
}

#[tokio::test]
async fn the_scope_of_each_route_is_the_contracts() {
    use Scope::{
        ImageDelete, ImageRead, ImageWrite, InstanceDelete, InstanceRead, InstanceWrite, ResourceRead,
        SnapshotDelete, SnapshotRead, SnapshotWrite,
    };
    for route in table() {
        let Access::Scoped(scope) = route.access else {
            continue;
        };
        let method = route.method.clone().unwrap();
        // What a guest holds is more than what is known of it.
        let content = ["/exec", "/cp", "/export"];
        let read = method == Method::GET && !content.iter().any(|end| route.path.ends_with(end));
        let family = if route.path.contains("/snapshot") {
            "snapshots"
        } else {
            route.path.split('/').nth(1).unwrap()
        };
        let expected = match (family, read, method == Method::DELETE) {
            ("instances" | "events", true, _) => InstanceRead,
            ("instances", false, true) => InstanceDelete,
            ("instances", false, false) => InstanceWrite,
            ("images", true, _) => ImageRead,
            ("images", false, true) => ImageDelete,
            ("images", false, false) => ImageWrite,
            ("snapshots", true, _) => SnapshotRead,
            ("snapshots", false, true) => SnapshotDelete,
            ("snapshots", false, false) => SnapshotWrite,
            _ => ResourceRead,
        };
        assert_eq!(scope, expected, "{method} {}", route.path);
    }
}

#[test]
fn nothing_but_these_routes_is_open_without_a_scope() {
    let routes = table();
    let open = |access: Access| -> Vec<&'static str> {
        let routes = routes.iter().filter(|route| route.access == access);
        routes.map(|route| route.path).collect()
    };
    assert_eq!(open(Access::Public), ["/spec.json", "/spec.yaml", "/swagger"]);
    assert_eq!(
        open(Access::PublicUnlessLimited(Scope::ResourceRead)),
        ["/health"]
    );
    // These check their own kind of token, see the tests of the registry.
    assert_eq!(open(Access::Registry), ["/v2", "/v2/", "/v2/{*path}"]);
    let scoped = routes
        .iter()
        .filter(|route| matches!(route.access, Access::Scoped(_)))
        .count();
    assert_eq!(
        scoped + 7,
        routes.len(),
        "a kind of access that no test here looks at"
    );
    for route in routes.iter().filter(|route| route.access != Access::Registry) {
        let method = route.method.clone().unwrap();
        assert!(
            matches!(route.access, Access::Scoped(_)) || method == Method::GET,
            "{method} {} changes something for everyone",
            route.path
        );
    }
}

#[tokio::test]
async fn health_and_documents_need_no_token() {
    let server = Server::start().await;
    for path in ["/health", "/spec.json", "/spec.yaml", "/swagger"] {
        let answer = server.send(Method::GET, path, &[], Bytes::new()).await;
        assert_eq!(answer.status, StatusCode::OK, "{path}");
    }
    let health = server.send(Method::GET, "/health", &[], Bytes::new()).await;
    assert_eq!(health.body, r#"{"status":"ok"}"#);
    let limited = [(
        "authorization",
        format!("Bearer {}", token(Some(&[Scope::ImageRead]))),
    )];
    let answer = server.send(Method::GET, "/health", &limited, Bytes::new()).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (StatusCode::FORBIDDEN, "Forbidden")
    );
    server.stop().await;
}

#[tokio::test]
async fn tokens_of_the_wrong_kind_are_refused_with_the_contracts_words() {
    let server = Server::start().await;
    for (header, message) in [
        ("Basic abc".to_owned(), "invalid authorization header format"),
        ("Bearer".to_owned(), "invalid authorization header format"),
        ("Bearer nonsense".to_owned(), "invalid token"),
        // {"alg":"none"} . {"sub":"x","exp":4102444800}
        (
            "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJ4IiwiZXhwIjo0MTAyNDQ0ODAwfQ.".to_owned(),
            "invalid token",
        ),
    ] {
        let answer = server
            .send(
                Method::GET,
                "/instances",
                &[("authorization", header.clone())],
                Bytes::new(),
            )
            .await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{header}");
        assert_eq!(answer.message(), message, "{header}");
    }
    server.stop().await;
}
