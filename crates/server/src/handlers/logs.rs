//! Logs as server-sent events: one JSON string a line, nothing held back, nothing cut.

use axum::extract::State;
use axum::response::Response;
use bytes::Bytes;
use hypeman_api::query::{LogSource, LogsQuery};
use hypeman_engine::LogFollower;

use super::{PathId, event_stream, path_text, resolve};
use crate::error::ApiResult;
use crate::extract::Params;
use crate::state::{AppState, Stage};

/// Lines shown when `tail` is absent.
const DEFAULT_TAIL: u32 = 100;

/// A log of an instance, line by line.
#[utoipa::path(get, path = "/instances/{id}/logs", tag = "instances", operation_id = "getInstanceLogs",
    params(("id" = String, Path, description = "Id, name or id prefix."), LogsQuery),
    responses((status = 200, description = "Events whose data is a line as a JSON string.",
        content_type = "text/event-stream", body = String)))]
pub async fn logs(
    State(state): State<AppState>,
    id: PathId,
    Params(query): Params<LogsQuery>,
) -> ApiResult<Response> {
    let id = resolve(&state.engine, &path_text(id)?)?;
    let source = match query.source.unwrap_or_default() {
        LogSource::App => hypeman_engine::LogSource::App,
        LogSource::Vmm => hypeman_engine::LogSource::Vmm,
        LogSource::Hypeman => hypeman_engine::LogSource::Hypeman,
    };
    let tail = usize::try_from(query.tail.unwrap_or(DEFAULT_TAIL)).unwrap_or(usize::MAX);
    let follower = state
        .engine
        .instance_logs(&id, source, tail, query.follow.unwrap_or(false))
        .await?;
    let events = futures::stream::unfold((follower, state), next_event);
    Ok(event_stream(events))
}

type Event = Result<Bytes, std::io::Error>;

async fn next_event(
    (mut follower, state): (LogFollower, AppState),
) -> Option<(Event, (LogFollower, AppState))> {
    let line = tokio::select! {
        line = follower.next() => line,
        () = state.reached(Stage::Draining) => return None,
    };
    match line {
        Ok(None) => None,
        Ok(Some(line)) => Some((Ok(event(&line)), (follower, state))),
        Err(error) => {
            tracing::warn!(%error, "a log stream ended early");
            Some((
                Err(std::io::Error::other("the log could not be read")),
                (follower, state),
            ))
        }
    }
}

/// `data: "<line>"` and an empty line. Bytes that are not UTF-8 become U+FFFD: JSON knows no others.
fn event(line: &[u8]) -> Bytes {
    let text = String::from_utf8_lossy(line);
    let text = text.strip_suffix('\r').unwrap_or(&text);
    let quoted = serde_json::Value::from(text).to_string();
    Bytes::from(format!("data: {quoted}\n\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_one_event() {
        assert_eq!(event(b"hello"), "data: \"hello\"\n\n");
        assert_eq!(event(b"crlf\r"), "data: \"crlf\"\n\n");
        assert_eq!(
            event(b"a \"quote\" and \x1b[0m"),
            "data: \"a \\\"quote\\\" and \\u001b[0m\"\n\n"
        );
        assert_eq!(event(b"line\rbreak\x00"), "data: \"line\\rbreak\\u0000\"\n\n");
        assert_eq!(event(b"\xff"), "data: \"\u{fffd}\"\n\n");
        let long = "x".repeat(1 << 20);
        assert_eq!(event(long.as_bytes()).len(), (1 << 20) + "data: \"\"\n\n".len());
    }
}
