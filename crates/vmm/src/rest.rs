//! A client of a VMM's REST interface on a unix socket.
//!
//! One connection for each call: making one costs microseconds, and none can be in an odd state.
//!
//! Invariants:
//! - A call to a process that has ended is [`VmmError::Gone`], whatever the socket said first.
//! - [`VmmError::Refused`] is the VMM's own no and nothing else: an answer that did not arrive, or that nobody
//!   understands, is [`VmmError::Unanswered`].

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{ACCEPT, CONTENT_TYPE, HOST};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde_json::Value;

use crate::VmmError;
use crate::files::io_error;
use crate::process::ProcessHandle;
use crate::socket::connect_to_vmm;

/// How long a call may take that does its work at once.
pub(crate) const CALL_DEADLINE: Duration = Duration::from_secs(10);
/// Far above what a VMM says.
const ANSWER_LIMIT: usize = 4 << 20;
/// What is shown of a VMM's words.
const WORDS_LIMIT: usize = 500;

/// The way to one VMM process.
#[derive(Debug, Clone)]
pub(crate) struct RestClient {
    socket: PathBuf,
    process: Arc<ProcessHandle>,
}

/// Why a call failed, before it is known whether the process lives.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("cannot connect: {0}")]
    Connect(#[from] std::io::Error),
    #[error("{0}")]
    Http(#[from] hyper::Error),
    #[error("{0}")]
    Request(#[from] hyper::http::Error),
    #[error("the answer is broken: {0}")]
    Answer(Box<dyn std::error::Error + Send + Sync>),
}

impl RestClient {
    pub(crate) fn new(socket: PathBuf, process: Arc<ProcessHandle>) -> Self {
        Self { socket, process }
    }

    pub(crate) fn process(&self) -> &Arc<ProcessHandle> {
        &self.process
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Sends one request and reads the answer; [`Value::Null`] where it has no body.
    pub(crate) async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        deadline: Duration,
    ) -> Result<Value, VmmError> {
        if self.process.ended_now().is_some() {
            return Err(VmmError::Gone);
        }
        let command = format!("{method} {path}");
        match tokio::time::timeout(deadline, self.exchange(method, path, body)).await {
            Ok(Ok((true, answer))) if answer.is_empty() => Ok(Value::Null),
            Ok(Ok((true, answer))) => serde_json::from_slice(&answer)
                .map_err(|error| VmmError::unanswered(command, error.to_string())),
            Ok(Ok((false, answer))) => Err(VmmError::refused(command, words(&answer))),
            Ok(Err(_)) if self.process.ends_soon().await => Err(VmmError::Gone),
            Ok(Err(Failure::Connect(source))) => Err(io_error("cannot connect to", &self.socket)(source)),
            Ok(Err(failure)) => Err(VmmError::unanswered(command, failure.to_string())),
            Err(_) => Err(VmmError::unresponsive(command, deadline)),
        }
    }

    /// Whether it succeeded, and the body.
    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<(bool, Bytes), Failure> {
        let stream = connect_to_vmm(&self.socket).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "localhost")
            .header(ACCEPT, "application/json")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))?;
        let answer = sender.send_request(request).await?;
        let good = answer.status().is_success();
        let body = Limited::new(answer.into_body(), ANSWER_LIMIT).collect().await;
        connection.abort();
        Ok((good, body.map_err(Failure::Answer)?.to_bytes()))
    }
}

/// What the VMM says in an error: a JSON object with its words, a list of them, or plain text.
fn words(answer: &[u8]) -> String {
    let text = match serde_json::from_slice::<Value>(answer) {
        Ok(Value::Object(object)) => object
            .get("fault_message")
            .and_then(Value::as_str)
            .map(str::to_owned)
            .unwrap_or_else(|| Value::Object(object).to_string()),
        Ok(Value::Array(parts)) => {
            let parts = parts.iter().map(|part| part.as_str().unwrap_or_default());
            parts.collect::<Vec<_>>().join(": ")
        }
        _ => String::from_utf8_lossy(answer).into_owned(),
    };
    text.chars()
        .filter(|letter| !letter.is_control())
        .take(WORDS_LIMIT)
        .collect()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::ProcessIdentity;

    /// Answers one request and returns what it was.
    fn answer_once(listener: UnixListener, answer: &'static str) -> std::thread::JoinHandle<String> {
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            let mut buffer = [0; 4096];
            while !request.ends_with(b"}") {
                let count = stream.read(&mut buffer).unwrap();
                request.extend_from_slice(&buffer[..count]);
            }
            stream.write_all(answer.as_bytes()).unwrap();
            String::from_utf8(request).unwrap()
        })
    }

    fn client(socket: &Path) -> RestClient {
        let identity = ProcessIdentity::read(std::process::id()).unwrap();
        let process = ProcessHandle::of_recorded(&identity).unwrap().unwrap();
        RestClient::new(socket.to_owned(), Arc::new(process))
    }

    async fn ask(answer: &'static str, deadline: Duration) -> (Result<Value, VmmError>, String) {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("api.sock");
        let server = answer_once(UnixListener::bind(&socket).unwrap(), answer);
        let body = serde_json::json!({ "state": "Paused" });
        let result = client(&socket)
            .call(Method::PATCH, "/vm", Some(&body), deadline)
            .await;
        (result, server.join().unwrap())
    }

    #[tokio::test]
    async fn a_request_carries_its_body_and_an_answer_its_value() {
        let answer = "HTTP/1.1 200 \r\nContent-Length: 9\r\n\r\n{\"a\": 1 }";
        let (result, request) = ask(answer, CALL_DEADLINE).await;
        assert_eq!(result.unwrap()["a"], 1);
        assert!(request.starts_with("PATCH /vm HTTP/1.1"), "{request}");
        assert!(request.ends_with("{\"state\":\"Paused\"}"), "{request}");
        let (result, _) = ask("HTTP/1.1 204 No Content\r\n\r\n", CALL_DEADLINE).await;
        assert_eq!(result.unwrap(), Value::Null);
    }

    #[tokio::test]
    async fn refusals_have_the_words_of_the_vmm() {
        let answer = "HTTP/1.1 400 \r\nContent-Length: 28\r\n\r\n{\"fault_message\": \"not now\"}";
        let (result, _) = ask(answer, CALL_DEADLINE).await;
        match result.unwrap_err() {
            VmmError::Refused { command, message } => {
                assert_eq!((command.as_str(), message.as_str()), ("PATCH /vm", "not now"));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(words(br#"["one", "two"]"#), "one: two");
        assert_eq!(words(b"plain\x1b[31m"), "plain[31m");
    }

    #[tokio::test]
    async fn an_answer_that_breaks_off_or_makes_no_sense_is_no_refusal() {
        for broken in [
            "",
            "HTTP/1.1 20",
            "HTTP/1.1 400 \r\nContent-Length: 28\r\n\r\n{\"fault_message\": \"no",
            "HTTP/1.1 200 \r\nContent-Length: 9\r\n\r\n{\"a\"",
            "HTTP/1.1 200 \r\nContent-Length: 1\r\n\r\n{",
            "never heard of HTTP\r\n\r\n",
        ] {
            let (result, _) = ask(broken, CALL_DEADLINE).await;
            assert!(
                matches!(result, Err(VmmError::Unanswered { .. })),
                "{broken:?}: {result:?}"
            );
        }
    }

    #[tokio::test]
    async fn silence_and_absence_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("api.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let silent = client(&socket)
            .call(Method::GET, "/", None, Duration::from_millis(20))
            .await;
        assert!(matches!(silent, Err(VmmError::Unresponsive { .. })), "{silent:?}");
        drop(listener);
        let absent = client(&socket).call(Method::GET, "/", None, CALL_DEADLINE).await;
        assert!(matches!(absent, Err(VmmError::Io { .. })), "{absent:?}");
    }
}
