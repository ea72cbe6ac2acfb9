//! Streams of server-sent events: logs, whose events are JSON strings, and what happens, whose events are objects.

use bytes::BytesMut;
use reqwest::Method;
use serde_json::Value;

use crate::Client;

/// The data of events, as they come.
#[derive(Debug)]
struct Events {
    response: reqwest::Response,
    buffer: BytesMut,
}

impl Events {
    async fn open(request: reqwest::RequestBuilder) -> Self {
        let response = request.send().await.expect("event stream");
        assert_eq!(response.status(), 200, "event stream refused");
        let kind = response.headers()["content-type"]
            .to_str()
            .expect("text")
            .to_owned();
        assert!(kind.starts_with("text/event-stream"), "{kind}");
        Self {
            response,
            buffer: BytesMut::new(),
        }
    }

    /// Data of the next event that has any; `None` at the end.
    async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\n\n") {
                let event = self.buffer.split_to(end + 2);
                let event = std::str::from_utf8(&event).expect("events are UTF-8");
                let Some(data) = event.lines().find_map(|line| line.strip_prefix("data:")) else {
                    continue;
                };
                return Some(serde_json::from_str(data.trim_start()).expect("the data is JSON"));
            }
            let chunk = tokio::time::timeout(crate::PATIENCE, self.response.chunk())
                .await
                .expect("gave up waiting for an event")
                .expect("event stream")?;
            self.buffer.extend_from_slice(&chunk);
        }
    }
}

/// What happens on a server.
#[derive(Debug)]
pub struct EventStream(Events);

impl EventStream {
    /// Listens from now on, or from after a cursor, as a client that was cut off does.
    pub async fn open(client: &Client, last: Option<&str>) -> Self {
        let request = client.request(Method::GET, "/events");
        Self(
            Events::open(match last {
                Some(last) => request.header("last-event-id", last),
                None => request,
            })
            .await,
        )
    }

    /// The next event.
    pub async fn next(&mut self) -> Value {
        self.0.next().await.expect("the stream has no end")
    }
}

/// An open log stream.
#[derive(Debug)]
pub struct LogStream(Events);

impl LogStream {
    /// Opens the log of an instance; `query` such as `tail=5&follow=true`.
    pub async fn open(client: &Client, instance: &str, query: &str) -> Self {
        let path = format!("/instances/{instance}/logs?{query}");
        Self(Events::open(client.request(Method::GET, &path)).await)
    }

    /// Next line; `None` at the end.
    pub async fn next(&mut self) -> Option<String> {
        match self.0.next().await? {
            Value::String(line) => Some(line),
            other => panic!("a log event is a JSON string, not {other}"),
        }
    }

    /// Reads on until a line holds `text`.
    pub async fn wait_for(&mut self, text: &str) -> String {
        loop {
            let line = self
                .next()
                .await
                .unwrap_or_else(|| panic!("the log ended before {text:?}"));
            if line.contains(text) {
                return line;
            }
        }
    }

    /// All lines to the end.
    pub async fn all(mut self) -> Vec<String> {
        let mut lines = Vec::new();
        while let Some(line) = self.next().await {
            lines.push(line);
        }
        lines
    }
}
