//! The stream of events: how it begins, is taken up again, refused, and ended, also for those who do not read it.

use axum::http::{Method, StatusCode};
use bytes::Bytes;
use futures::FutureExt as _;
use hypeman_engine::EventKind;
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

    /// Reads on until so many events with a number were told, and answers the numbers and the last cursor.
    async fn numbers(&mut self, count: usize) -> (Vec<usize>, String) {
        let (mut told, mut cursor) = (Vec::new(), String::new());
        loop {
            while let Some(end) = self.heard.find('\n') {
                let line: String = self.heard.drain(..=end).collect();
                if let Some(id) = line.strip_prefix("id: ") {
                    id.trim_end().clone_into(&mut cursor);
                }
                if let Some((_, state)) = line.split_once("\"state\":\"") {
                    told.push(state.split(' ').next().unwrap().parse().unwrap());
                }
            }
            if told.len() >= count {
                return (told, cursor);
            }
            assert!(self.more().await > 0, "the stream ended");
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

/// Lets something happen, as long as it takes space.
fn happen(server: &Server, numbers: std::ops::Range<usize>) {
    let padding = "x".repeat(2_000);
    for number in numbers {
        let state = format!("{number} {padding}");
        server.engine.tell(EventKind::Instance, "i", &state);
    }
}

#[tokio::test]
async fn who_reads_nothing_is_cut_off_and_everybody_else_hears_everything() {
    const BATCH: usize = 1_000;
    let server = Server::start_with(|config| config.max_connections = 2).await;
    let mut stalled = Listener::open(&server, "", "").await;
    stalled.hear("id: ").await;
    let mut reader = Listener::open(&server, "", "").await;
    reader.hear("id: ").await;
    // There is no room for a third client before one of them is gone.
    let mut third = Box::pin(server.get("/health"));
    let mut happened = 0;
    let (answer, cursor) = loop {
        assert!(happened < 1_000 * BATCH, "who reads nothing still has its place");
        let batch = happened..happened + BATCH;
        happen(&server, batch.clone());
        let (told, cursor) = reader.numbers(BATCH).await;
        assert_eq!(told, batch.collect::<Vec<_>>());
        happened += BATCH;
        if let Some(answer) = (&mut third).now_or_never() {
            break (answer, cursor);
        }
    };
    drop(third);
    assert_eq!(answer.status, StatusCode::OK);

    // Who left and comes back in time has missed nothing, and others have not either.
    happen(&server, happened..happened + BATCH);
    let missed: Vec<_> = (happened..happened + BATCH).collect();
    let mut back = Listener::open(&server, &format!("?cursor={cursor}"), "").await;
    assert_eq!(back.numbers(BATCH).await.0, missed);
    assert_eq!(reader.numbers(BATCH).await.0, missed);
    drop(back);

    // Who was cut off gets what was on its way, sees that it is not all, and is told that it is too late.
    while stalled.more().await > 0 {}
    assert!(!stalled.heard.ends_with("\r\n0\r\n\r\n"));
    let (whole, _) = stalled.heard.rsplit_once('\n').unwrap();
    let mut ids = whole.lines().rev().filter_map(|line| line.strip_prefix("id: "));
    let late = server
        .get(&format!("/events?cursor={}", ids.next().unwrap()))
        .await;
    assert_eq!(
        (late.status, late.code().as_str()),
        (StatusCode::GONE, "cursor_gone")
    );
    drop(reader);
    server.stop().await;
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
