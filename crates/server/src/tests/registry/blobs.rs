//! Blobs: in chunks, at once, from another repository, and what is not what it says.

use axum::http::{Method, StatusCode};
use hypeman_images::Digest;

use super::{Client, code};
use crate::tests::support::Server;

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
