//! The log stream: server-sent events, each a JSON string.

use bytes::BytesMut;
use reqwest::Method;

use crate::Client;

/// An open log stream.
#[derive(Debug)]
pub struct LogStream {
    response: reqwest::Response,
    buffer: BytesMut,
}

impl LogStream {
    /// Opens the log of an instance; `query` such as `tail=5&follow=true`.
    pub async fn open(client: &Client, instance: &str, query: &str) -> Self {
        let request = client.request(Method::GET, &format!("/instances/{instance}/logs?{query}"));
        let response = request.send().await.expect("log stream");
        assert_eq!(response.status(), 200, "log stream refused");
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

    /// Next line; `None` at the end.
    pub async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\n\n") {
                let event = self.buffer.split_to(end + 2);
                let event = std::str::from_utf8(&event).expect("events are UTF-8");
                let Some(data) = event.trim_end().strip_prefix("data:") else {
                    continue;
                };
                return Some(serde_json::from_str(data.trim_start()).expect("the event is a JSON string"));
            }
            let chunk = tokio::time::timeout(crate::PATIENCE, self.response.chunk())
                .await
                .expect("gave up waiting for a log line")
                .expect("log stream")?;
            self.buffer.extend_from_slice(&chunk);
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
