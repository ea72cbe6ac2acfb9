//! Snapshots: taken of instances, listed, restored in place, made into other instances, deleted.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::stream;
use hypeman_api::error::code;
use hypeman_api::instance::Instance;
use hypeman_api::snapshot as api;
use hypeman_engine::{EngineError, ForkOutcome};
use hypeman_vmm::VmmError;
use jiff::Timestamp;

use super::{PathId, PathIds, path_text, path_texts, resolve};
use crate::convert::{fork as forks, instance, listed, snapshot as convert};
use crate::error::{ApiError, ApiResult};
use crate::extract::{JsonBody, Params, TagFilter};
use crate::state::AppState;

/// Takes a snapshot. A running source goes on.
#[utoipa::path(post, path = "/instances/{id}/snapshots", tag = "snapshots", operation_id = "createInstanceSnapshot",
    params(("id" = String, Path, description = "Id, name or id prefix.")),
    request_body = api::CreateSnapshotRequest,
    responses(
        (status = 201, description = "The snapshot, durable.", body = api::Snapshot),
        (status = 409, description = "The state does not allow this kind, or the name is taken.",
            body = hypeman_api::ErrorBody),
        (status = 501, description = "The hypervisor cannot be captured.", body = hypeman_api::ErrorBody),
    ))]
pub async fn create(
    State(state): State<AppState>,
    id: PathId,
    JsonBody(body): JsonBody<api::CreateSnapshotRequest>,
) -> ApiResult<(StatusCode, Json<api::Snapshot>)> {
    let id = resolve(&state.engine, &path_text(id)?)?;
    let made = state.engine.create_snapshot(&id, convert::create(body)?).await;
    let made = made.map_err(|error| refused(error, code::CONFLICT))?;
    Ok((StatusCode::CREATED, Json(convert::to_api(&made))))
}

/// Gives an instance back what a snapshot of it holds.
#[utoipa::path(post, path = "/instances/{id}/snapshots/{snapshot_id}/restore", tag = "snapshots",
    operation_id = "restoreInstanceSnapshot",
    params(("id" = String, Path, description = "Id, name or id prefix."),
        ("snapshot_id" = String, Path, description = "Id of a snapshot of this instance.")),
    request_body = api::RestoreSnapshotRequest,
    responses(
        (status = 200, description = "The instance; it may still be initializing.", body = Instance),
        (status = 404, description = "There is no such instance, snapshot of it, or image any more.",
            body = hypeman_api::ErrorBody),
        (status = 409, description = "The instance runs, or the snapshot does not fit this host.",
            body = hypeman_api::ErrorBody),
        (status = 501, description = "The hypervisor cannot be restored.", body = hypeman_api::ErrorBody),
    ))]
pub async fn restore(
    State(state): State<AppState>,
    ids: PathIds,
    JsonBody(body): JsonBody<api::RestoreSnapshotRequest>,
) -> ApiResult<Json<Instance>> {
    let (id, snapshot) = path_texts(ids)?;
    let id = resolve(&state.engine, &id)?;
    let restored = state
        .engine
        .restore_snapshot(&id, &snapshot, forks::restore(body))
        .await;
    let restored = restored.map_err(|error| refused(error, code::INVALID_STATE))?;
    Ok(Json(instance::to_api(&restored, Timestamp::now())))
}

/// All snapshots, newest first, filtered by kind, name, source and tags.
#[utoipa::path(get, path = "/snapshots", tag = "snapshots", operation_id = "listSnapshots",
    params(api::ListSnapshotsQuery,
        ("tags" = Option<std::collections::BTreeMap<String, String>>, Query, style = DeepObject, explode = true,
            description = "Only objects with all of these tags: `tags[team]=backend`.")),
    responses((status = 200, description = "Snapshots.", body = [api::Snapshot])))]
pub async fn list(
    State(state): State<AppState>,
    Params(query): Params<api::ListSnapshotsQuery>,
    tags: TagFilter,
) -> ApiResult<Response> {
    let snapshots = state
        .engine
        .list_snapshots(convert::filter(query, tags.0)?)
        .await?;
    let mut pieces = listed::pieces(snapshots);
    let (first, second) = (pieces.next(), pieces.next());
    let body = match (first, second) {
        (Some(whole), None) => Body::from(whole.map_err(|error| ApiError::internal(&error))?),
        // The next piece is written when the client has taken the former ones.
        (first, second) => Body::from_stream(stream::iter(first.into_iter().chain(second).chain(pieces))),
    };
    Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response())
}

/// One snapshot.
#[utoipa::path(get, path = "/snapshots/{id}", tag = "snapshots", operation_id = "getSnapshot",
    params(("id" = String, Path, description = "Id.")),
    responses((status = 200, description = "The snapshot.", body = api::Snapshot)))]
pub async fn get(State(state): State<AppState>, id: PathId) -> ApiResult<Json<api::Snapshot>> {
    let snapshot = state.engine.get_snapshot(&path_text(id)?).await?;
    Ok(Json(convert::to_api(&snapshot)))
}

/// Deletes a snapshot. What other snapshots, forks and running instances share with it stays.
#[utoipa::path(delete, path = "/snapshots/{id}", tag = "snapshots", operation_id = "deleteSnapshot",
    params(("id" = String, Path, description = "Id.")),
    responses((status = 204, description = "Deleted.")))]
pub async fn delete(State(state): State<AppState>, id: PathId) -> ApiResult<StatusCode> {
    state.engine.delete_snapshot(&path_text(id)?).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Makes instances out of a snapshot, each with an identity of its own.
#[utoipa::path(post, path = "/snapshots/{id}/fork", tag = "snapshots", operation_id = "forkSnapshot",
    params(("id" = String, Path, description = "Id.")),
    request_body = api::ForkSnapshotRequest,
    responses(
        (status = 201, description = "The new instance; with `count` a result for each.", body = api::ForkResponse),
        (status = 409, description = "The name is taken, the snapshot does not fit this host, or it has no room.",
            body = hypeman_api::ErrorBody),
        (status = 501, description = "The hypervisor cannot be restored.", body = hypeman_api::ErrorBody),
    ))]
pub async fn fork(
    State(state): State<AppState>,
    id: PathId,
    JsonBody(body): JsonBody<api::ForkSnapshotRequest>,
) -> ApiResult<(StatusCode, Json<api::ForkResponse>)> {
    let id = path_text(id)?;
    let several = body.count.is_some();
    let request = forks::of_snapshot(body)?;
    let describe = |error| match error {
        // The contract knows one code for whatever is taken here.
        EngineError::ForkNameConflict(_) => ApiError::from(error).with_code(code::CONFLICT),
        other => refused(other, code::CONFLICT),
    };
    let outcomes = state.engine.fork_snapshot(&id, request).await.map_err(describe)?;
    forked(outcomes, several, describe)
}

/// What a snapshot costs on disk, and what deleting it would give back.
#[utoipa::path(get, path = "/snapshots/{id}/usage", tag = "snapshots", operation_id = "getSnapshotUsage",
    params(("id" = String, Path, description = "Id.")),
    responses((status = 200, description = "Bytes on disk, now.", body = api::SnapshotUsage)))]
pub async fn usage(State(state): State<AppState>, id: PathId) -> ApiResult<Json<api::SnapshotUsage>> {
    let usage = state.engine.snapshot_usage(&path_text(id)?).await?;
    Ok(Json(convert::usage_to_api(usage)))
}

/// The answer to a request for forks.
pub(super) fn forked(
    outcomes: Vec<ForkOutcome>,
    several: bool,
    describe: impl Fn(EngineError) -> ApiError,
) -> ApiResult<(StatusCode, Json<api::ForkResponse>)> {
    let now = Timestamp::now();
    let shown = |instance: Arc<hypeman_engine::Instance>| instance::to_api(&instance, now);
    let response = if several {
        let forks = outcomes
            .into_iter()
            .map(|outcome| forks::result(outcome.name, outcome.result.map(shown).map_err(&describe)))
            .collect();
        api::ForkResponse::Several(api::ForkResults { forks })
    } else {
        let only = outcomes
            .into_iter()
            .next()
            .ok_or_else(|| ApiError::internal(&"a fork without an outcome"))?;
        api::ForkResponse::One(Box::new(only.result.map(shown).map_err(describe)?))
    };
    Ok((StatusCode::CREATED, Json(response)))
}

/// A refusal in the contract's words: what the state does not allow has a code of the route, and a hypervisor
/// that cannot do it is 501.
pub(super) fn refused(error: EngineError, state_code: &'static str) -> ApiError {
    match error {
        EngineError::InvalidState(_) => ApiError::from(error).with_code(state_code),
        EngineError::Vmm(VmmError::Unsupported { .. }) => ApiError::new(
            StatusCode::NOT_IMPLEMENTED,
            code::NOT_SUPPORTED,
            error.to_string(),
        ),
        other => other.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(name: &str) -> ForkOutcome {
        ForkOutcome {
            name: name.to_owned(),
            result: Err(EngineError::ForkNameConflict(name.to_owned())),
        }
    }

    #[test]
    fn one_fork_answers_with_its_error_and_several_with_a_result_for_each() {
        let one = forked(vec![failed("web")], false, ApiError::from).unwrap_err();
        assert_eq!(
            (one.status(), one.code()),
            (StatusCode::CONFLICT, "name_conflict")
        );

        let outcomes = vec![failed("web-1"), failed("web-2")];
        let (status, Json(answer)) = forked(outcomes, true, ApiError::from).unwrap();
        assert_eq!(status, StatusCode::CREATED);
        let api::ForkResponse::Several(results) = answer else {
            panic!("{answer:?}");
        };
        let names: Vec<&str> = results.forks.iter().map(|fork| fork.name.as_str()).collect();
        assert_eq!(names, ["web-1", "web-2"]);
        for fork in results.forks {
            assert_eq!(
                (fork.instance, fork.error.unwrap().code),
                (None, "name_conflict".to_owned())
            );
        }
    }

    #[test]
    fn what_the_state_forbids_has_the_code_of_the_route() {
        let refusal = || EngineError::InvalidState("instance must be stopped".into());
        assert_eq!(refused(refusal(), code::CONFLICT).code(), "conflict");
        assert_eq!(refused(refusal(), code::INVALID_STATE).code(), "invalid_state");
    }
}
