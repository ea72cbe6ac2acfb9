//! The stream of events: how it begins, is taken up again, refused, and ended.

use axum::http::{Method, StatusCode};
use bytes::Bytes;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::support::{Server, token};

/// An open stream, read as it comes.
struct Listener {
    stream: TcpStream,
    heard: String,
}

impl Listener {
    async fn open(server: &Server, query: &str, headers: &str) -> Self {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        let request = format!(
            "GET /events{query} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\n{headers}\r\n",
            token(None)
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        Self {
            stream,
            heard: String::new(),
        }
    }

    /// Reads on until a line that begins with `text` was heard, and answers it.
    async fn hear(&mut self, text: &str) -> String {
        loop {
            let (whole, _) = self.heard.rsplit_once('\n').unwrap_or_default();
            if let Some(line) = whole.lines().find(|line| line.starts_with(text)) {
                return line.to_owned();
            }
            assert!(
                self.more().await > 0,
                "the stream ended before {text:?}: {}",
                self.heard
            );
        }
    }

    async fn more(&mut self) -> usize {
        let mut buffer = [0; 4096];
        let read = self.stream.read(&mut buffer).await.unwrap();
        self.heard.push_str(std::str::from_utf8(&buffer[..read]).unwrap());
        read
    }
}

#[tokio::test]
async fn a_listener_learns_at_once_where_it_stands_and_can_come_back() {
    let server = Server::start().await;
    let mut first = Listener::open(&server, "", "").await;
    let line = first.hear("id: ").await;
    assert!(
        first.heard.contains("content-type: text/event-stream"),
        "{}",
        first.heard
    );
    let cursor = line.strip_prefix("id: ").unwrap().to_owned();

    let mut by_query = Listener::open(&server, &format!("?cursor={cursor}"), "").await;
    assert_eq!(by_query.hear("id: ").await, line);
    // The header is the newer one of both.
    let header = format!("Last-Event-ID: {cursor}\r\n");
    let mut by_header = Listener::open(&server, "?cursor=nonsense", &header).await;
    assert_eq!(by_header.hear("id: ").await, line);
    server.stop().await;
    // The end of the server is the end of the stream, in good order: the last, empty chunk.
    while first.more().await > 0 {}
    assert!(first.heard.ends_with("\r\n0\r\n\r\n"), "{:?}", first.heard);
}

#[tokio::test]
async fn cursors_that_lead_nowhere_are_refused() {
    let server = Server::start().await;
    for (query, last, status, code) in [
        ("?cursor=nonsense", "", StatusCode::BAD_REQUEST, "invalid_cursor"),
        ("", "nonsense", StatusCode::BAD_REQUEST, "invalid_cursor"),
        (
            "?cursor=00000000deadbeef-00000000000000000001",
            "",
            StatusCode::GONE,
            "cursor_gone",
        ),
    ] {
        let mut headers = vec![("authorization", format!("Bearer {}", token(None)))];
        if !last.is_empty() {
            headers.push(("last-event-id", last.to_owned()));
        }
        let answer = server
            .send(Method::GET, &format!("/events{query}"), &headers, Bytes::new())
            .await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (status, code),
            "{query} {last}"
        );
    }
    server.stop().await;
}
