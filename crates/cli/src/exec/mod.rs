//! Running a command in a guest over one WebSocket.
//!
//! ```text
//!  client                                   server
//!    │ text   {"command":[…],"tty":…}  ───►   │
//!    │ binary stdin, text {"resize":…} ───►   │  ◄─── binary output
//!    │ text   {"stdin":"eof"}          ───►   │  ◄─── text {"exitCode":N}, the last message
//! ```
//!
//! Input and output run side by side: a command that writes much while it reads much cannot block itself.
//! The session ends with the exit code and with nothing else; a connection that closes earlier is a failure. Where the
//! code is the server's own, its close frame tells whether a snapshot of the instance ended the session.

mod terminal;

use std::io;
use std::pin::pin;
use std::time::Duration;

use futures::{Sink, SinkExt as _, Stream, StreamExt as _};
use hypeman_api::exec::{ExecControl, ExecEnd, ExecRequest, StdinControl, TerminalSize};
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::{self, Message};

pub use terminal::{RawMode, Terminal, spawn_stdin};

use crate::document::Document;
use crate::error::CliError;
use crate::websocket::{broken, is_end};

/// The server's exit code when there is none of the command, which commands have as well.
const NOT_RUN: u8 = 127;
/// How long the server's close frame is waited for after [`NOT_RUN`].
const CLOSE_PATIENCE: Duration = Duration::from_secs(2);

/// What goes to the guest while the command runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// Standard input.
    Bytes(Vec<u8>),
    /// Standard input ends.
    End,
    /// The terminal changed its size.
    Resize {
        /// Rows.
        rows: u16,
        /// Columns.
        columns: u16,
    },
}

/// Runs one session to its end and answers the command's exit code.
///
/// `output` gets the merged output in order. When it fails, the session ends.
///
/// # Errors
/// [`CliError::EndedBySnapshot`]; or when the connection ends before the exit code, the server breaks the protocol, or output cannot be written.
pub async fn session<S>(
    socket: S,
    request: &ExecRequest,
    input: mpsc::Receiver<Input>,
    mut output: impl FnMut(&[u8]) -> io::Result<()>,
) -> Result<u8, CliError>
where
    S: Stream<Item = Result<Message, tungstenite::Error>> + Sink<Message, Error = tungstenite::Error>,
{
    let (mut to_guest, mut from_guest) = socket.split();
    let first = serde_json::to_string(request).map_err(|failure| CliError::failed(failure.to_string()))?;
    to_guest
        .send(Message::text(first))
        .await
        .map_err(|failure| broken(&failure))?;

    let mut sending = pin!(send_input(&mut to_guest, input, request.tty));
    let mut sent = false;
    loop {
        let message = tokio::select! {
            // Output first: what the command said before it ended must be shown, whatever happens to the input.
            biased;
            message = from_guest.next() => message,
            outcome = &mut sending, if !sent => {
                sent = true;
                // A guest that no longer reads may still have said its last words: only the reading side decides.
                outcome.ok();
                continue;
            }
        };
        match message {
            Some(Ok(Message::Binary(bytes))) => {
                output(&bytes).map_err(|failure| CliError::io("cannot write the output", failure))?;
            }
            Some(Ok(Message::Text(text))) => {
                let code = verdict(text.as_str())?;
                if code == NOT_RUN && end_of(&mut from_guest).await == ExecEnd::Snapshot {
                    return Err(CliError::EndedBySnapshot);
                }
                return Ok(code);
            }
            Some(Ok(Message::Close(frame))) => {
                let reason = frame
                    .map(|frame| frame.reason.to_string())
                    .filter(|reason| !reason.is_empty());
                return Err(ended_early(reason.as_deref()));
            }
            Some(Ok(_)) => {}
            None => return Err(ended_early(None)),
            Some(Err(failure)) if is_end(&failure) => {
                return Err(ended_early(None));
            }
            Some(Err(failure)) => return Err(broken(&failure)),
        }
    }
}

/// What the server's close frame says. A server that does not close in time has nothing to say.
async fn end_of<S>(from_guest: &mut S) -> ExecEnd
where
    S: Stream<Item = Result<Message, tungstenite::Error>> + Unpin,
{
    let close = async {
        while let Some(Ok(message)) = from_guest.next().await {
            if let Message::Close(Some(frame)) = message {
                return ExecEnd::of_close_code(frame.code.into());
            }
        }
        ExecEnd::Ordinary
    };
    let close = tokio::time::timeout(CLOSE_PATIENCE, close).await;
    close.unwrap_or(ExecEnd::Ordinary)
}

async fn send_input<S>(
    to_guest: &mut S,
    mut input: mpsc::Receiver<Input>,
    tty: bool,
) -> Result<(), tungstenite::Error>
where
    S: Sink<Message, Error = tungstenite::Error> + Unpin,
{
    while let Some(item) = input.recv().await {
        let message = match item {
            Input::Bytes(bytes) => Message::binary(bytes),
            Input::Resize { rows, columns } if tty => {
                let resize = Some(TerminalSize { rows, cols: columns });
                control(&ExecControl {
                    resize,
                    ..ExecControl::default()
                })
            }
            Input::Resize { .. } => continue,
            // A terminal has no end of input, only the character that means it.
            Input::End if tty => Message::binary(vec![4]),
            Input::End => control(&ExecControl {
                stdin: Some(StdinControl::Eof),
                ..ExecControl::default()
            }),
        };
        to_guest.send(message).await?;
    }
    Ok(())
}

fn control(message: &ExecControl) -> Message {
    // Plain data with text keys: this cannot fail.
    Message::text(serde_json::to_string(message).unwrap_or_default())
}

fn ended_early(reason: Option<&str>) -> CliError {
    let because = reason.map(|reason| format!(" ({reason})")).unwrap_or_default();
    CliError::failed_with(
        format!("the connection closed before the command ended{because}"),
        "the instance may have stopped: see `hypeman ps -a` and `hypeman logs`",
    )
}

/// The exit code in the last message, or the failure that it reports.
fn verdict(text: &str) -> Result<u8, CliError> {
    let shown = || text.chars().take(200).collect::<String>();
    let document = Document::parse(text.as_bytes())
        .map_err(|_| CliError::Protocol(format!("not a message: {:?}", shown())))?;
    if let Some(code) = document.integer("exitCode") {
        let low = u8::try_from(code.rem_euclid(256)).unwrap_or(u8::MAX);
        // What does not fit a byte must not turn into success.
        return Ok(if low == 0 && code != 0 { u8::MAX } else { low });
    }
    match document.text("error") {
        Some(error) => Err(CliError::failed(error.to_owned())),
        None => Err(CliError::Protocol(format!("not a message: {:?}", shown()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_fit_a_byte_and_failure_stays_failure() {
        for (text, expected) in [
            ("0", 0),
            ("7", 7),
            ("255", 255),
            ("256", 255),
            ("-1", 255),
            ("137", 137),
        ] {
            assert_eq!(
                verdict(&format!(r#"{{"exitCode":{text}}}"#)).unwrap(),
                expected,
                "{text}"
            );
        }
    }

    #[test]
    fn other_last_messages_are_failures() {
        for text in [
            "",
            "null",
            "{}",
            r#"{"exitCode":"0"}"#,
            r#"{"exitCode":0.5}"#,
            "exitCode",
        ] {
            assert!(matches!(verdict(text), Err(CliError::Protocol(_))), "{text}");
        }
        assert_eq!(
            verdict(r#"{"error":"no agent"}"#).unwrap_err().to_string(),
            "no agent"
        );
    }

    #[test]
    fn the_first_message_says_only_what_was_asked_for() {
        let request = ExecRequest {
            command: vec!["true".to_owned()],
            ..ExecRequest::default()
        };
        assert_eq!(
            serde_json::to_string(&request).unwrap(),
            r#"{"command":["true"],"tty":false}"#
        );
    }
}
