//! The registry as clients use it: who may, here; what is kept in it, below.

use axum::http::{Method, StatusCode};
use base64::Engine as _;
use bytes::Bytes;
use hypeman_images::Digest;

use super::support::{Answer, Server, token};
use crate::auth::Scope;

mod blobs;
mod manifests;

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
