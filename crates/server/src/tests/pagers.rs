//! What is told of pagers over the wire.

use axum::http::StatusCode;
use serde_json::json;

use super::support::Server;

#[tokio::test]
async fn a_server_without_pagers_has_an_empty_list_of_them() {
    let server = Server::start().await;
    let answer = server.get("/pagers").await;
    assert_eq!((answer.status, answer.json()), (StatusCode::OK, json!([])));
    server.stop().await;
}
