//! The HTTP client of the API.
//!
//! Small on purpose: a request, a bounded answer, the error envelope. Answers are [`Document`]s, so that what the
//! server adds later is shown too. TLS is set up only for an `https` base URL.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::{Method, RequestBuilder, Response, Url};
use serde::Serialize;

use crate::document::Document;
use crate::error::CliError;
use crate::settings::Settings;

/// An answer longer than this is not one of ours: a list of 100,000 instances stays below it.
const LARGEST_ANSWER: usize = 512 * 1024 * 1024;

/// An error envelope longer than this is cut.
pub(crate) const LARGEST_ERROR: usize = 64 * 1024;

/// Path segments keep only unreserved characters: an image reference is one segment, its slashes escaped.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// How long a connection may take to be established.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long an ordinary call may take. Lifecycle calls block on the server, and TCG guests are slow.
const CALL_TIMEOUT: Duration = Duration::from_secs(330);

/// A client of one server.
#[derive(Debug, Clone)]
pub struct Client {
    /// Made at the first request: `exec` and `cp` may never need it.
    http: OnceLock<reqwest::Client>,
    settings: Settings,
    debug: bool,
}

impl Client {
    /// Makes a client. Opens no connection.
    pub fn new(settings: Settings, debug: bool) -> Self {
        Self {
            http: OnceLock::new(),
            settings,
            debug,
        }
    }

    fn http(&self) -> Result<&reqwest::Client, CliError> {
        if let Some(http) = self.http.get() {
            return Ok(http);
        }
        choose_tls_provider();
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("hypeman/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none());
        if self.settings.base_url.starts_with("http:") {
            // Reading the system's certificates takes longer than most calls.
            builder = builder.tls_certs_only(Vec::new());
        }
        let http = builder
            .build()
            .map_err(|failure| CliError::failed(format!("cannot set up HTTP: {failure}")))?;
        Ok(self.http.get_or_init(|| http))
    }

    /// Which server this client talks to and how.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The URL of an API path made of segments, each escaped as one.
    ///
    /// # Errors
    /// When the base URL does not parse (it was checked when the settings were loaded).
    pub fn url(&self, segments: &[&str]) -> Result<Url, CliError> {
        let mut text = self.settings.base_url.clone();
        for segment in segments {
            if matches!(*segment, "" | "." | "..") {
                return Err(CliError::usage(format!("{segment:?} names nothing")));
            }
            text.push('/');
            text.extend(utf8_percent_encode(segment, SEGMENT));
        }
        Url::parse(&text).map_err(|failure| CliError::usage(format!("{text}: {failure}")))
    }

    /// `GET`, answered with a document.
    ///
    /// # Errors
    /// When the server refuses, is not reachable or answers something else than JSON.
    pub async fn get(&self, segments: &[&str], query: &[(String, String)]) -> Result<Document, CliError> {
        let response = self
            .send(Method::GET, segments, query, None::<&()>, Some(CALL_TIMEOUT))
            .await?;
        document(response).await
    }

    /// `GET` with a deadline of the caller's own, for calls that wait on the server.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn get_within(
        &self,
        segments: &[&str],
        query: &[(String, String)],
        limit: Duration,
    ) -> Result<Document, CliError> {
        let response = self
            .send(Method::GET, segments, query, None::<&()>, Some(limit))
            .await?;
        document(response).await
    }

    /// `GET`, answered with the response itself, for streams. No deadline for the whole.
    ///
    /// # Errors
    /// When the server refuses or is not reachable.
    pub async fn open(&self, segments: &[&str], query: &[(String, String)]) -> Result<Response, CliError> {
        self.send(Method::GET, segments, query, None::<&()>, None).await
    }

    /// `POST` without a body, answered with a stream of events. No deadline for the whole.
    ///
    /// # Errors
    /// When the server refuses or is not reachable.
    pub async fn follow(&self, segments: &[&str]) -> Result<Response, CliError> {
        self.send(Method::POST, segments, &[], None::<&()>, None).await
    }

    /// A request with a JSON body, answered with a document.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn call<B: Serialize>(
        &self,
        method: Method,
        segments: &[&str],
        body: Option<&B>,
    ) -> Result<Document, CliError> {
        let response = self.send(method, segments, &[], body, Some(CALL_TIMEOUT)).await?;
        document(response).await
    }

    /// `POST` of a stream of bytes, answered with a document. No deadline for the whole.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn upload(
        &self,
        segments: &[&str],
        query: &[(String, String)],
        body: reqwest::Body,
    ) -> Result<Document, CliError> {
        let request = self
            .request(&Method::POST, segments, query)?
            .header(reqwest::header::CONTENT_TYPE, "application/octet-stream")
            .body(body);
        document(self.answer(request, segments).await?).await
    }

    /// `DELETE`.
    ///
    /// # Errors
    /// When the server refuses or is not reachable.
    pub async fn delete(&self, segments: &[&str], query: &[(String, String)]) -> Result<(), CliError> {
        self.send(Method::DELETE, segments, query, None::<&()>, Some(CALL_TIMEOUT))
            .await
            .map(drop)
    }

    async fn send<B: Serialize>(
        &self,
        method: Method,
        segments: &[&str],
        query: &[(String, String)],
        body: Option<&B>,
        limit: Option<Duration>,
    ) -> Result<Response, CliError> {
        let mut request = self.request(&method, segments, query)?;
        request = match limit {
            Some(limit) => request.timeout(limit),
            // What has no deadline is a stream.
            None => request.header(reqwest::header::ACCEPT, "text/event-stream"),
        };
        if let Some(body) = body {
            request = request.json(body);
        }
        self.answer(request, segments).await
    }

    fn request(
        &self,
        method: &Method,
        segments: &[&str],
        query: &[(String, String)],
    ) -> Result<RequestBuilder, CliError> {
        let mut url = self.url(segments)?;
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        let request = self.http()?.request(method.clone(), url);
        Ok(match &self.settings.api_key {
            Some(key) => request.bearer_auth(key),
            None => request,
        })
    }

    async fn answer(&self, request: RequestBuilder, segments: &[&str]) -> Result<Response, CliError> {
        let request = request.build().map_err(|failure| self.transport(&failure))?;
        let (method, url) = (request.method().clone(), request.url().clone());
        let started = Instant::now();
        let answer = self.http()?.execute(request).await;
        if self.debug {
            let outcome = match &answer {
                Ok(response) => response.status().to_string(),
                Err(failure) => failure.to_string(),
            };
            crate::output::note(&format!(
                "{method} {url} → {outcome} ({} ms)",
                started.elapsed().as_millis()
            ));
        }
        let response = answer.map_err(|failure| self.transport(&failure))?;
        if response.status().is_success() {
            return Ok(response);
        }
        Err(about(refusal(response).await, segments))
    }

    fn transport(&self, failure: &reqwest::Error) -> CliError {
        if failure.is_timeout() && !failure.is_connect() {
            return CliError::TimedOut(format!("{} did not answer in time", self.settings.base_url));
        }
        unreachable(&self.settings.base_url, failure)
    }
}

/// Chooses who does the cryptography of TLS. The libraries want that said before their first use.
pub(crate) fn choose_tls_provider() {
    // An error means that it was chosen before.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// Turns a failed connection into the failure that says whether a server runs there at all.
pub(crate) fn unreachable(base_url: &str, failure: &(dyn std::error::Error + 'static)) -> CliError {
    let mut refused = false;
    let mut reason = failure.to_string();
    let mut cause = Some(failure);
    while let Some(error) = cause {
        reason = error.to_string();
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            refused |= io.kind() == std::io::ErrorKind::ConnectionRefused;
        }
        cause = error.source();
    }
    CliError::Unreachable {
        base_url: base_url.to_owned(),
        reason,
        refused,
    }
}

/// Puts the name that was asked for into an answer that only says "not found" or "more than one".
pub(crate) fn about(failure: CliError, segments: &[&str]) -> CliError {
    match (failure, segments.get(1)) {
        (
            CliError::Api {
                status: status @ (404 | 409),
                code,
                message,
            },
            Some(name),
        ) if !message.contains(name) => {
            let message = if message.is_empty() { code.clone() } else { message };
            CliError::Api {
                status,
                code,
                message: format!("{name}: {message}"),
            }
        }
        (failure, _) => failure,
    }
}

/// The failure that an error answer stands for.
async fn refusal(response: Response) -> CliError {
    let status = response.status();
    let body = bounded(response, LARGEST_ERROR).await.unwrap_or_default();
    refusal_from(
        status.as_u16(),
        status.canonical_reason().unwrap_or("error"),
        &body,
    )
}

/// The failure that a status and an error body stand for.
pub(crate) fn refusal_from(status: u16, reason: &str, body: &[u8]) -> CliError {
    let envelope = Document::parse(body).ok();
    // The registry endpoints answer with a list of errors.
    let first = envelope
        .as_ref()
        .and_then(|document| document.get("errors"))
        .and_then(|list| list.items().first());
    let source = first.or(envelope.as_ref());
    let code = source
        .and_then(|document| document.text("code"))
        .unwrap_or(reason)
        .to_owned();
    let mut message = source
        .and_then(|document| document.text("message"))
        .unwrap_or_default()
        .to_owned();
    if let Some(details) = envelope.as_ref().and_then(|document| document.get("details")) {
        for detail in details.items().iter().filter_map(|detail| detail.text("message")) {
            message.push_str("; ");
            message.push_str(detail);
        }
    }
    CliError::Api {
        status,
        code,
        message,
    }
}

async fn document(response: Response) -> Result<Document, CliError> {
    if response.status() == reqwest::StatusCode::NO_CONTENT {
        return Ok(Document::Null);
    }
    let body = bounded(response, LARGEST_ANSWER).await?;
    Document::parse(&body).map_err(|failure| CliError::Protocol(format!("it is not JSON ({failure})")))
}

/// Reads an answer that must not be longer than `limit`.
pub(crate) async fn bounded(response: Response, limit: usize) -> Result<Vec<u8>, CliError> {
    let mut body = Vec::new();
    let mut chunks = response.bytes_stream();
    while let Some(chunk) = chunks.next().await {
        let chunk =
            chunk.map_err(|failure| CliError::Protocol(format!("the answer broke off: {failure}")))?;
        if body.len() + chunk.len() > limit {
            return Err(CliError::Protocol(format!(
                "the answer is longer than {limit} bytes"
            )));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(base_url: &str) -> Client {
        Client::new(
            Settings {
                base_url: base_url.to_owned(),
                api_key: None,
            },
            false,
        )
    }

    #[test]
    fn an_image_reference_is_one_segment() {
        let url = client("http://localhost:8080")
            .url(&["images", "docker.io/library/alpine:latest"])
            .unwrap();
        assert_eq!(
            url.as_str(),
            "http://localhost:8080/images/docker.io%2Flibrary%2Falpine%3Alatest"
        );
    }

    #[test]
    fn dots_cannot_climb_out_of_the_path() {
        for wrong in ["", ".", ".."] {
            assert!(client("http://h").url(&["instances", wrong]).is_err());
        }
        let url = client("http://h/base")
            .url(&["instances", "../../x?y#z"])
            .unwrap();
        assert_eq!(url.as_str(), "http://h/base/instances/..%2F..%2Fx%3Fy%23z");
    }

    #[test]
    fn error_envelopes_of_all_kinds_become_one_failure() {
        let cases: [(&[u8], &str, &str); 4] = [
            (
                br#"{"code":"not_found","message":"no such"}"#,
                "not_found",
                "no such",
            ),
            (
                br#"{"errors":[{"code":"DENIED","message":"no"}]}"#,
                "DENIED",
                "no",
            ),
            (
                br#"{"code":"a","message":"b","details":[{"message":"c"}]}"#,
                "a",
                "b; c",
            ),
            (b"<html>", "Bad Gateway", ""),
        ];
        for (body, code, message) in cases {
            let CliError::Api {
                code: found,
                message: text,
                ..
            } = refusal_from(502, "Bad Gateway", body)
            else {
                panic!("not an API failure")
            };
            assert_eq!((found.as_str(), text.as_str()), (code, message));
        }
    }
}
