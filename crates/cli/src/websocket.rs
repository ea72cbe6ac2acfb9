//! WebSocket connections to the server, for `exec` and `cp`.

use std::io;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::http::{HeaderValue, header};
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async_tls_with_config};

use crate::client::{Client, about, choose_tls_provider, refusal_from, unreachable};
use crate::error::CliError;

/// A connection to the server, TLS or not.
pub(crate) type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// The contract's limit for one message to the client.
const LARGEST_MESSAGE: usize = 1024 * 1024;

/// How much the contract puts into one binary message.
pub(crate) const CHUNK: usize = 32 * 1024;

/// How long the connection and the upgrade may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(60);

/// What to do when the other side went away.
const GONE_HINT: &str =
    "the server may have stopped or the instance may be gone: see `hypeman health` and `hypeman ps -a`";

/// Opens a WebSocket at an API path.
///
/// # Errors
/// When the server refuses the upgrade (its error envelope is kept) or cannot be reached.
pub(crate) async fn connect(client: &Client, segments: &[&str]) -> Result<Socket, CliError> {
    let settings = client.settings();
    let url = client.url(segments)?;
    // The schemes map one to one: http → ws, https → wss.
    let address = url.as_str().replacen("http", "ws", 1);
    let mut request = address
        .as_str()
        .into_client_request()
        .map_err(|failure| CliError::usage(format!("{url} cannot be connected to: {failure}")))?;
    if let Some(key) = &settings.api_key {
        let mut value = HeaderValue::from_str(&format!("Bearer {key}"))
            .map_err(|_| CliError::usage("the API key has characters that no header can carry"))?;
        value.set_sensitive(true);
        request.headers_mut().insert(header::AUTHORIZATION, value);
    }
    if address.starts_with("wss:") {
        choose_tls_provider();
    }
    let limits = WebSocketConfig::default()
        .max_message_size(Some(LARGEST_MESSAGE))
        .max_frame_size(Some(LARGEST_MESSAGE));
    let connecting = connect_async_tls_with_config(request, Some(limits), true, None);
    let answer = tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting).await;
    match answer {
        Ok(Ok((socket, _))) => Ok(socket),
        Ok(Err(tungstenite::Error::Http(response))) => {
            let status = response.status();
            let body = response.body().as_deref().unwrap_or_default();
            Err(about(
                refusal_from(
                    status.as_u16(),
                    status.canonical_reason().unwrap_or("error"),
                    body,
                ),
                segments,
            ))
        }
        Ok(Err(failure @ (tungstenite::Error::Io(_) | tungstenite::Error::Tls(_)))) => {
            Err(unreachable(&settings.base_url, &failure))
        }
        Ok(Err(failure)) => Err(CliError::Protocol(format!("no WebSocket there: {failure}"))),
        Err(_) => Err(CliError::TimedOut(format!(
            "{} did not answer in time",
            settings.base_url
        ))),
    }
}

/// Whether an error means that the other side is gone, with or without a goodbye.
pub(crate) fn is_end(failure: &tungstenite::Error) -> bool {
    match failure {
        tungstenite::Error::ConnectionClosed
        | tungstenite::Error::AlreadyClosed
        | tungstenite::Error::Protocol(tungstenite::error::ProtocolError::ResetWithoutClosingHandshake) => {
            true
        }
        tungstenite::Error::Io(failure) => matches!(
            failure.kind(),
            io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted | io::ErrorKind::BrokenPipe
        ),
        _ => false,
    }
}

/// The failure that a broken WebSocket stands for.
pub(crate) fn broken(failure: &tungstenite::Error) -> CliError {
    match failure {
        gone if is_end(gone) => CliError::failed_with("the server closed the connection", GONE_HINT),
        tungstenite::Error::Io(failure) => {
            CliError::failed_with(format!("the connection broke: {failure}"), GONE_HINT)
        }
        tungstenite::Error::Capacity(_) => {
            CliError::Protocol(format!("a message is larger than {LARGEST_MESSAGE} bytes"))
        }
        other => CliError::Protocol(other.to_string()),
    }
}
