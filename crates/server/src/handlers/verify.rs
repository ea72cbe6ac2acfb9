//! Reading a snapshot back: one result, or its progress as events for clients that accept them.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use hypeman_api::snapshot::{SnapshotVerification, VerificationState};
use hypeman_engine::{EngineError, VerifyProgress};
use tokio::sync::mpsc;

use super::{PathId, event_stream, path_text};
use crate::convert::snapshot as convert;
use crate::error::{ApiError, ApiResult};
use crate::state::{AppState, Stage};

/// Reads and checks every byte of a snapshot. With `Accept: text/event-stream` the progress is told as events with
/// the same object as data, the last of which is not `running`; else the answer is the result.
#[utoipa::path(post, path = "/snapshots/{id}/verify", tag = "snapshots", operation_id = "verifySnapshot",
    params(("id" = String, Path, description = "Id.")),
    responses((status = 200, description = "The result; with `Accept: text/event-stream` events with the progress.",
        content((SnapshotVerification = "application/json"), (String = "text/event-stream")))))]
pub async fn verify(State(state): State<AppState>, id: PathId, headers: HeaderMap) -> ApiResult<Response> {
    let progress = state.engine.verify_snapshot(&path_text(id)?).await?;
    if wants_events(&headers) {
        let source = Some((progress, state));
        return Ok(event_stream(futures::stream::unfold(source, next_event)));
    }
    Ok(Json(result(progress, &state).await?).into_response())
}

fn wants_events(headers: &HeaderMap) -> bool {
    headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|part| part.split(';').next())
        .any(|kind| kind.trim().eq_ignore_ascii_case("text/event-stream"))
}

/// The last of the progress.
async fn result(
    mut progress: mpsc::Receiver<VerifyProgress>,
    state: &AppState,
) -> ApiResult<SnapshotVerification> {
    loop {
        let next = tokio::select! {
            next = progress.recv() => next,
            () = state.reached(Stage::Draining) => return Err(EngineError::ShuttingDown.into()),
        };
        match next {
            Some(last) if last.outcome.is_some() => return Ok(convert::verification_to_api(last)),
            Some(_) => {}
            None => return Err(ApiError::internal(&"a verification ended without a result")),
        }
    }
}

type Source = Option<(mpsc::Receiver<VerifyProgress>, AppState)>;

async fn next_event(source: Source) -> Option<(Result<Bytes, std::io::Error>, Source)> {
    let (mut progress, state) = source?;
    let next = tokio::select! {
        next = progress.recv() => next,
        () = state.reached(Stage::Draining) => return None,
    };
    // An end without a result must not look like one.
    let broken = |reason: &str| Some((Err(std::io::Error::other(reason.to_owned())), None));
    let Some(next) = next else {
        return broken("the verification ended without a result");
    };
    let shown = convert::verification_to_api(next);
    let Ok(json) = serde_json::to_string(&shown) else {
        return broken("the progress could not be written");
    };
    let rest = (shown.state == VerificationState::Running).then_some((progress, state));
    Some((Ok(Bytes::from(format!("data: {json}\n\n"))), rest))
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn events_are_for_those_who_accept_them() {
        for (accept, events) in [
            ("text/event-stream", true),
            ("application/json, Text/Event-Stream;q=0.5", true),
            ("application/json", false),
            ("*/*", false),
            ("text/event-streams", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, HeaderValue::from_static(accept));
            assert_eq!(wants_events(&headers), events, "{accept}");
        }
        assert!(!wants_events(&HeaderMap::new()));
    }
}
