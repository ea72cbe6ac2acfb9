//! What happens, as server-sent events: in order, resumable, and never with a gap that the listener does not see.
//!
//! ```text
//!  id: <cursor>                          where listening begins, at once
//!
//!  id: <cursor>
//!  data: {"cursor":…,"time":…,"kind":"instance","subject":…,"state":"Running"}
//!
//!  : still here                          while nothing happens, with the cursor so far
//!  id: <cursor>
//! ```
//!
//! A listener that is too slow is cut off, by whoever writes for it and not by what it reads: one that reads nothing
//! holds up nobody and keeps no place. Clients come back with `Last-Event-ID` by themselves; a 410 tells those for whom
//! that is too late to list what there is.

use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, StatusCode};
use axum::response::Response;
use bytes::Bytes;
use hypeman_api::error::code;
use hypeman_api::event as api;
use hypeman_engine::{CursorRefusal, Event, EventKind, EventListener, ListenerEnd};
use tokio::sync::mpsc;

use super::event_stream;
use crate::auth::{Identity, Scope};
use crate::error::{ApiError, ApiResult};
use crate::extract::Params;
use crate::state::{AppState, Cut, Stage};

/// Header by which clients of event streams say what they heard last.
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// Silence after which a sign of life is sent: proxies close what is silent for a minute.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// How long a listener may take nothing at all, when more waits for it than the kernel holds.
const STALLED: Duration = Duration::from_secs(60);

/// Pieces that wait for the connection; the events behind them wait where they are kept anyway.
const WAITING: usize = 16;

/// Listens to what happens. Events of snapshots are shown to tokens that may see snapshots.
#[utoipa::path(get, path = "/events", tag = "service", operation_id = "listenEvents",
    params(api::EventsQuery,
        ("Last-Event-ID" = Option<String>, Header, description = "The cursor that was heard last.")),
    responses(
        (status = 200, description = "Events whose data is an object, and whose id is its cursor.",
            content_type = "text/event-stream", body = api::Event),
        (status = 410, description = "The events after the cursor are gone: list what there is, then listen anew.",
            body = hypeman_api::ErrorBody),
    ))]
pub async fn events(
    State(state): State<AppState>,
    Extension(identity): Extension<Identity>,
    Extension(cut): Extension<Cut>,
    Params(query): Params<api::EventsQuery>,
    headers: HeaderMap,
) -> ApiResult<Response> {
    // A client that was cut off repeats its first URL; the header is newer than the cursor in it.
    let heard = match headers.get(LAST_EVENT_ID).filter(|value| !value.is_empty()) {
        Some(value) => Some(value.to_str().unwrap_or("?").to_owned()),
        None => query.cursor.filter(|cursor| !cursor.is_empty()),
    };
    let listener = state.engine.events(heard.as_deref()).map_err(refused)?;
    let listening = Listening {
        listener,
        state,
        identity,
        begun: false,
    };
    let (pieces, body) = mpsc::channel(WAITING);
    tokio::spawn(tell(listening, pieces, cut));
    Ok(event_stream(futures::stream::unfold(body, next_of)))
}

async fn next_of(mut body: mpsc::Receiver<Piece>) -> Option<(Piece, mpsc::Receiver<Piece>)> {
    let piece = body.recv().await?;
    Some((piece, body))
}

fn refused(refusal: CursorRefusal) -> ApiError {
    match refusal {
        CursorRefusal::Malformed => ApiError::invalid(code::INVALID_CURSOR, refusal.to_string()),
        CursorRefusal::Gone => ApiError::new(StatusCode::GONE, code::CURSOR_GONE, refusal.to_string()),
    }
}

struct Listening {
    listener: EventListener,
    state: AppState,
    identity: Identity,
    begun: bool,
}

/// What is written at once.
type Piece = Result<Bytes, std::io::Error>;

/// Tells a listener what happens until one of both goes. Not by the connection's own task: that one waits for the
/// client, and would never learn that it has waited too long.
async fn tell(mut listening: Listening, pieces: mpsc::Sender<Piece>, cut: Cut) {
    loop {
        let next = tokio::select! {
            next = listening.next() => next,
            () = pieces.closed() => return,
        };
        let piece = match next {
            Ok(piece) => piece,
            // The end of the body.
            Err(ListenerEnd::Closing) => return,
            // Not an end in good order: the client must notice that something is missing.
            Err(ListenerEnd::TooSlow) => return cut.now(),
        };
        tokio::select! {
            sent = pieces.send(piece) => {
                if sent.is_err() {
                    return;
                }
            }
            () = listening.listener.overrun() => return cut.now(),
            () = tokio::time::sleep(STALLED) => return cut.now(),
        }
    }
}

impl Listening {
    /// The next piece. May be cancelled without losing one.
    async fn next(&mut self) -> Result<Piece, ListenerEnd> {
        if !self.begun {
            self.begun = true;
            return Ok(Ok(Bytes::from(format!("id: {}\n\n", self.listener.cursor()))));
        }
        loop {
            let event = tokio::select! {
                event = self.listener.next() => event?,
                () = tokio::time::sleep(HEARTBEAT) => {
                    let piece = format!(": still here\nid: {}\n\n", self.listener.cursor());
                    return Ok(Ok(Bytes::from(piece)));
                }
                () = self.state.reached(Stage::Draining) => return Err(ListenerEnd::Closing),
            };
            if may_see(&self.identity, event.kind) {
                return Ok(written(&event).map_err(std::io::Error::other));
            }
        }
    }
}

fn may_see(identity: &Identity, kind: EventKind) -> bool {
    identity.permissions.allow(match kind {
        EventKind::Instance => Scope::InstanceRead,
        EventKind::Snapshot => Scope::SnapshotRead,
    })
}

fn written(event: &Arc<Event>) -> serde_json::Result<Bytes> {
    let shown = api::Event {
        cursor: event.cursor.clone(),
        time: event.time,
        kind: match event.kind {
            EventKind::Instance => api::EventKind::Instance,
            EventKind::Snapshot => api::EventKind::Snapshot,
        },
        subject: event.subject.clone(),
        state: event.state.clone(),
    };
    let json = serde_json::to_string(&shown)?;
    Ok(Bytes::from(format!("id: {}\ndata: {json}\n\n", event.cursor)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_two_lines_with_its_cursor_as_id() {
        let event = Arc::new(Event {
            cursor: "ab12-00000000000000000001".into(),
            time: "2026-06-01T00:00:00Z".parse().unwrap(),
            kind: EventKind::Snapshot,
            subject: "q7z1w7l2af4l8y7q1h7g2m3s".into(),
            state: "compressed\n\nid: forged".into(),
        });
        assert_eq!(
            written(&event).unwrap(),
            "id: ab12-00000000000000000001\ndata: {\"cursor\":\"ab12-00000000000000000001\",\
             \"time\":\"2026-06-01T00:00:00Z\",\"kind\":\"snapshot\",\"subject\":\"q7z1w7l2af4l8y7q1h7g2m3s\",\
             \"state\":\"compressed\\n\\nid: forged\"}\n\n"
        );
    }
}
