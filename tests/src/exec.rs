//! Exec over WebSocket, frame by frame as the contract has it.

use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use crate::Client;

pub(crate) type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// Connects to a WebSocket route; `Err` carries the status of a refusal before the upgrade and its body.
pub(crate) async fn connect(client: &Client, path: &str) -> Result<Socket, (u16, Value)> {
    let url = format!("{}{path}", client.base().replacen("http", "ws", 1));
    let mut request = url.into_client_request().expect("URL");
    if let Some(token) = client.token() {
        request.headers_mut().insert(
            "authorization",
            format!("Bearer {token}").parse().expect("header"),
        );
    }
    match connect_async(request).await {
        Ok((socket, _)) => Ok(socket),
        Err(tungstenite::Error::Http(response)) => {
            let body = response
                .body()
                .as_ref()
                .and_then(|body| serde_json::from_slice(body).ok());
            Err((response.status().as_u16(), body.unwrap_or(Value::Null)))
        }
        Err(error) => panic!("WebSocket {path}: {error}"),
    }
}

/// What a command printed and how it ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Executed {
    /// Standard output and error, merged.
    pub output: Vec<u8>,
    /// Exit code.
    pub exit_code: i64,
}

impl Executed {
    /// Output as text, white space at the end removed.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.output).trim_end().to_owned()
    }
}

/// A running command.
#[derive(Debug)]
pub struct ExecSession {
    socket: Socket,
    /// Output so far.
    pub output: Vec<u8>,
}

impl ExecSession {
    /// Starts a command in a running instance.
    ///
    /// # Errors
    /// Status and body when the server refuses before the upgrade.
    pub async fn start(client: &Client, instance: &str, request: &Value) -> Result<Self, (u16, Value)> {
        let mut socket = connect(client, &format!("/instances/{instance}/exec")).await?;
        socket
            .send(Message::text(request.to_string()))
            .await
            .expect("first frame");
        Ok(Self {
            socket,
            output: Vec::new(),
        })
    }

    /// Sends bytes to standard input.
    pub async fn input(&mut self, bytes: &[u8]) {
        self.socket
            .send(Message::binary(bytes.to_vec()))
            .await
            .expect("stdin frame");
    }

    /// Changes the size of the terminal.
    pub async fn resize(&mut self, rows: u16, columns: u16) {
        let frame = json!({"resize": {"rows": rows, "cols": columns}}).to_string();
        self.socket
            .send(Message::text(frame))
            .await
            .expect("resize frame");
    }

    /// Reads until the output holds `text`; fails the story when the command ends before.
    pub async fn read_until(&mut self, text: &str) {
        while !String::from_utf8_lossy(&self.output).contains(text) {
            let ended = self.next().await;
            let so_far = String::from_utf8_lossy(&self.output).into_owned();
            assert!(
                ended.is_none() || so_far.contains(text),
                "ended ({ended:?}) before {text:?}: {so_far:?}"
            );
        }
    }

    /// Reads to the end.
    pub async fn finish(mut self) -> Executed {
        loop {
            if let Some(exit_code) = self.next().await {
                return Executed {
                    output: self.output,
                    exit_code,
                };
            }
        }
    }

    /// Reads to the end, and what the close frame after that says: its code and its reason.
    pub async fn finish_and_close(mut self) -> (Executed, (u16, String)) {
        let exit_code = loop {
            if let Some(exit_code) = self.next().await {
                break exit_code;
            }
        };
        let frame = tokio::time::timeout(crate::PATIENCE, self.socket.next())
            .await
            .expect("gave up waiting for the close frame");
        let Some(Ok(Message::Close(Some(close)))) = frame else {
            panic!("{frame:?} instead of a close frame");
        };
        let ended = Executed {
            output: self.output,
            exit_code,
        };
        (ended, (close.code.into(), close.reason.to_string()))
    }

    /// Takes one frame; the exit code when it was the last.
    async fn next(&mut self) -> Option<i64> {
        let frame = tokio::time::timeout(crate::PATIENCE, self.socket.next())
            .await
            .expect("gave up waiting for an exec frame")
            .expect("the stream ended without an exit code")
            .expect("exec frame");
        match frame {
            Message::Binary(bytes) => {
                assert!(
                    bytes.len() <= 1 << 20,
                    "a frame above the clients' limit: {}",
                    bytes.len()
                );
                self.output.extend_from_slice(&bytes);
                None
            }
            Message::Text(text) => {
                let control: Value = serde_json::from_str(&text).expect("control frame is JSON");
                let object = control.as_object().expect("control frame is an object");
                assert_eq!(object.len(), 1, "the last frame has exactly one key: {control}");
                Some(control["exitCode"].as_i64().expect("exitCode is an integer"))
            }
            Message::Close(_) => panic!(
                "closed without an exit code; output {:?}",
                String::from_utf8_lossy(&self.output)
            ),
            _ => None,
        }
    }
}
