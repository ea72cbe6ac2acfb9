//! Commands in a guest over a WebSocket.
//!
//! ```text
//!  client ── text: request ──► exec in the guest
//!  client ── binary: stdin, text: resize / stdin eof ──► input task ──► guest
//!  client ◄── binary: output, 32 KiB at most ◄── output loop ◄── guest
//!  client ◄── text: {"exitCode":N}, close
//! ```
//!
//! A session whose connection to the guest breaks ends with the reason as output and exit code 127, as the contract has
//! it; that a snapshot broke it, the code of the close frame says ([`api::ExecEnd`]).
//!
//! Input and output are pumped independently: a command that does not read its input never holds up its
//! output, and the other way round. When the client goes, both ends are dropped and the guest kills the session.

use std::time::{Duration, Instant};

use axum::Extension;
use axum::extract::rejection::PathRejection;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, State};
use axum::response::Response;
use bytes::Bytes;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt as _, StreamExt as _};
use hypeman_api::exec as api;
use hypeman_guest_api::host::{ExecInput, ExecOutput, ExecReader, ExecSession, GuestClient};
use hypeman_guest_api::{ChannelError, ExecRequest, RefusalCode};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use super::{path_text, resolve, socket};
use crate::auth::Identity;
use crate::error::ApiResult;
use crate::state::{AppState, Stage, reached};
use crate::strict;

/// Exit code when the command could not be run at all.
const NOT_RUN: i32 = 127;
/// Exit code when the command exists but cannot be executed.
const NOT_EXECUTABLE: i32 = 126;

/// Longest wait for an agent that a client can ask for.
const LONGEST_AGENT_WAIT: Duration = Duration::from_secs(600);

/// `GET /instances/{id}/exec`
pub async fn exec(
    State(state): State<AppState>,
    Extension(identity): Extension<Identity>,
    id: Result<Path<String>, PathRejection>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> ApiResult<Response> {
    let id = resolve(&state.engine, &path_text(id)?)?;
    // Refused before the upgrade, so that clients see a status and not a closed socket.
    state.engine.guest(&id)?;
    let upgrade = socket::accept(upgrade)?;
    let sessions = state.sessions.clone();
    let stage = state.stage.clone();
    let subject = identity.subject;
    let instance = id.clone();
    let guest = move || state.engine.guest(&id).map_err(|_| ChannelError::Closed);
    Ok(upgrade
        .on_upgrade(move |socket| sessions.track_future(session(guest, stage, instance, subject, socket))))
}

/// One session. `guest` is asked anew for each attempt to reach an agent that is still starting.
pub(crate) async fn session(
    guest: impl Fn() -> Result<GuestClient, ChannelError>,
    stage: watch::Receiver<Stage>,
    instance: String,
    subject: String,
    mut socket: WebSocket,
) {
    let request = match socket::first_text(&mut socket)
        .await
        .map(|text| strict::from_slice::<api::ExecRequest>(text.as_bytes()))
    {
        Some(Ok(request)) => request,
        Some(Err(error)) => return refuse(socket, format!("invalid request: {error}")).await,
        None => return refuse(socket, "the first frame must be a JSON text frame".to_owned()).await,
    };
    let command = request.command.clone();
    tracing::info!(instance, subject, ?command, tty = request.tty, "exec started");
    let started = Instant::now();
    let code = match start(guest, request).await {
        Ok(session) => run(stage, session, socket).await,
        Err(error) => {
            let not_executable = error.refusal() == Some(RefusalCode::CommandNotExecutable);
            let code = if not_executable { NOT_EXECUTABLE } else { NOT_RUN };
            fail(socket, &error, code).await;
            Some(code)
        }
    };
    let milliseconds = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    tracing::info!(instance, subject, ?command, ?code, milliseconds, "exec ended");
}

async fn refuse(mut socket: WebSocket, error: String) {
    socket::send_json(&mut socket, &api::ExecRefusal { error }).await;
    socket::close(socket).await;
}

async fn fail(mut socket: WebSocket, error: &ChannelError, code: i32) {
    let text = Bytes::from(format!("Error: {error}\r\n"));
    if socket::send(&mut socket, Message::Binary(text)).await {
        socket::send_json(&mut socket, &api::ExecExit { exit_code: code }).await;
    }
    socket::close(socket).await;
}

async fn start(
    guest: impl Fn() -> Result<GuestClient, ChannelError>,
    request: api::ExecRequest,
) -> Result<ExecSession, ChannelError> {
    let wait = Duration::from_secs(request.wait_for_agent.unwrap_or(0).into()).min(LONGEST_AGENT_WAIT);
    let deadline = tokio::time::Instant::now() + wait;
    let request = ExecRequest {
        command: request.command,
        tty: request.tty.then(|| {
            (
                request.rows.unwrap_or(24).max(1),
                request.cols.unwrap_or(80).max(1),
            )
        }),
        environment: request.env.unwrap_or_default().into_iter().collect(),
        working_directory: request.cwd.filter(|directory| !directory.is_empty()),
        timeout: request
            .timeout
            .filter(|seconds| *seconds > 0)
            .map(|seconds| Duration::from_secs(seconds.into())),
    };
    loop {
        let attempt = match guest() {
            Ok(guest) => guest.exec(request.clone()).await,
            Err(error) => Err(error),
        };
        match attempt {
            Err(ChannelError::Closed | ChannelError::Deadline) if tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            outcome => return outcome,
        }
    }
}

/// How a session ended.
struct Ended {
    /// `None` when there is no exit code, or nobody to take it.
    code: Option<i32>,
    why: api::ExecEnd,
}

impl Ended {
    fn with(code: Option<i32>) -> Self {
        Self {
            code,
            why: api::ExecEnd::Ordinary,
        }
    }
}

/// Pumps until the command ends, the client goes or the server goes down. `None` when there is no exit code.
async fn run(stage: watch::Receiver<Stage>, session: ExecSession, socket: WebSocket) -> Option<i32> {
    let (input, reader) = session.split();
    let (mut sink, stream) = socket.split();
    let client_gone = pump_input(input, stream);
    tokio::pin!(client_gone);
    let (ended, client_left) = {
        let output = pump_output(reader, &mut sink);
        tokio::pin!(output);
        tokio::select! {
            // A command that ended wins over a client that closed at the same time.
            biased;
            ended = &mut output => (ended, false),
            () = &mut client_gone => (Ended::with(None), true),
            () = reached(stage, Stage::Cutting) => (Ended::with(None), false),
        }
    };
    if client_left {
        return None;
    }
    let goodbye = socket::goodbye_because(ended.why.close_code(), ended.why.reason());
    let _ = tokio::time::timeout(socket::SEND_STALL, sink.send(goodbye)).await;
    // The client's remaining frames are read, else the kernel resets the connection and loses ours.
    let _ = tokio::time::timeout(Duration::from_secs(5), client_gone).await;
    ended.code
}

/// Sends output, then the exit code. There is none when the client does not take it or the guest is gone.
async fn pump_output(mut reader: ExecReader, sink: &mut SplitSink<WebSocket, Message>) -> Ended {
    let (sender, mut receiver) = tokio::sync::mpsc::channel(1);
    // `next` must not be cancelled, and pings must not wait for output: so one reads and the other sends.
    let read = async move {
        loop {
            let output = reader.next().await;
            let last = !matches!(output, Ok(Some(ExecOutput::Stdout(_) | ExecOutput::Stderr(_))));
            if sender.send(output).await.is_err() || last {
                return;
            }
        }
    };
    let write = async {
        let mut ping = tokio::time::interval_at(tokio::time::Instant::now() + socket::PING, socket::PING);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let output = tokio::select! {
                output = receiver.recv() => output,
                _ = ping.tick() => {
                    if !socket::send(sink, Message::Ping(Bytes::new())).await {
                        return Ended::with(None);
                    }
                    continue;
                }
            };
            match output {
                Some(Ok(Some(ExecOutput::Stdout(data) | ExecOutput::Stderr(data)))) => {
                    if !send_chunks(sink, data).await {
                        return Ended::with(None);
                    }
                }
                Some(Ok(Some(ExecOutput::Exit(code)))) => {
                    let taken = socket::send_json(sink, &api::ExecExit { exit_code: code }).await;
                    return Ended::with(taken.then_some(code));
                }
                Some(Err(error)) => {
                    let text = Bytes::from(format!("Error: {error}\r\n"));
                    socket::send(sink, Message::Binary(text)).await;
                    let taken = socket::send_json(sink, &api::ExecExit { exit_code: NOT_RUN }).await;
                    let why = match error {
                        ChannelError::Captured => api::ExecEnd::Snapshot,
                        _ => api::ExecEnd::Ordinary,
                    };
                    return Ended {
                        code: taken.then_some(NOT_RUN),
                        why,
                    };
                }
                Some(Ok(None)) | None => return Ended::with(None),
            }
        }
    };
    // When the client stops taking, the reader is dropped with this select.
    tokio::pin!(read, write);
    tokio::select! {
        biased;
        ended = &mut write => ended,
        () = &mut read => write.await,
    }
}

async fn send_chunks(sink: &mut SplitSink<WebSocket, Message>, mut data: Bytes) -> bool {
    while !data.is_empty() {
        let chunk = data.split_to(data.len().min(api::MAX_CHUNK));
        if !socket::send(sink, Message::Binary(chunk)).await {
            return false;
        }
    }
    true
}

/// Forwards input until the client goes. After the command has taken all it will, frames are read and dropped.
async fn pump_input(mut input: ExecInput, mut stream: SplitStream<WebSocket>) {
    let mut open = true;
    loop {
        let message = match stream.next().await {
            Some(Ok(message)) => message,
            Some(Err(_)) | None => return,
        };
        let forwarded = match message {
            Message::Binary(data) if open => write_chunks(&mut input, &data).await,
            Message::Text(text) if open => match serde_json::from_str::<api::ExecControl>(text.as_str()) {
                Ok(control) => apply(&mut input, control).await,
                // Clients without control frames type text.
                Err(_) => write_chunks(&mut input, text.as_bytes()).await,
            },
            Message::Close(_) => return,
            _ => Ok(()),
        };
        open &= forwarded.is_ok();
    }
}

async fn write_chunks(input: &mut ExecInput, data: &[u8]) -> Result<(), ChannelError> {
    for chunk in data.chunks(api::MAX_CHUNK) {
        input.write(chunk).await?;
    }
    Ok(())
}

async fn apply(input: &mut ExecInput, control: api::ExecControl) -> Result<(), ChannelError> {
    if let Some(size) = control.resize.filter(|size| size.rows > 0 && size.cols > 0) {
        input.resize(size.rows, size.cols).await?;
    }
    if control.stdin == Some(api::StdinControl::Eof) {
        input.close_stdin().await?;
    }
    Ok(())
}
