//! Standby, its end, and forks of instances.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use hypeman_api::error::code;
use hypeman_api::instance::Instance;
use hypeman_api::snapshot as api;
use jiff::Timestamp;

use super::snapshots::{forked, refused};
use super::{PathId, path_text, resolve};
use crate::convert::{fork as forks, instance, snapshot};
use crate::error::ApiResult;
use crate::extract::{JsonBody, OptionalJsonBody};
use crate::state::AppState;

/// Keeps memory and devices of a running instance on disk and ends its VMM.
#[utoipa::path(post, path = "/instances/{id}/standby", tag = "instances", operation_id = "standbyInstance",
    params(("id" = String, Path, description = "Id, name or id prefix.")),
    request_body = Option<api::StandbyInstanceRequest>,
    responses(
        (status = 200, description = "The instance, its state durable.", body = Instance),
        (status = 501, description = "The hypervisor cannot be captured.", body = hypeman_api::ErrorBody),
    ))]
pub async fn standby(
    State(state): State<AppState>,
    id: PathId,
    OptionalJsonBody(body): OptionalJsonBody<api::StandbyInstanceRequest>,
) -> ApiResult<Json<Instance>> {
    let id = resolve(&state.engine, &path_text(id)?)?;
    let request = snapshot::standby(&body.unwrap_or_default())?;
    let suspended = state.engine.standby_instance(&id, request).await;
    let suspended = suspended.map_err(|error| refused(error, code::INVALID_STATE))?;
    Ok(Json(instance::to_api(&suspended, Timestamp::now())))
}

/// Goes on with what standby kept.
#[utoipa::path(post, path = "/instances/{id}/restore", tag = "instances", operation_id = "restoreInstance",
    params(("id" = String, Path, description = "Id, name or id prefix.")),
    responses(
        (status = 200, description = "The instance; it may still be initializing.", body = Instance),
        (status = 501, description = "The hypervisor cannot be restored.", body = hypeman_api::ErrorBody),
    ))]
pub async fn restore(State(state): State<AppState>, id: PathId) -> ApiResult<Json<Instance>> {
    let id = resolve(&state.engine, &path_text(id)?)?;
    let restored = state.engine.restore_instance(&id).await;
    let restored = restored.map_err(|error| refused(error, code::INVALID_STATE))?;
    Ok(Json(instance::to_api(&restored, Timestamp::now())))
}

/// Makes instances out of another one, each with an identity of its own. A running source goes on.
#[utoipa::path(post, path = "/instances/{id}/fork", tag = "instances", operation_id = "forkInstance",
    params(("id" = String, Path, description = "Id, name or id prefix.")),
    request_body = api::ForkInstanceRequest,
    responses(
        (status = 201, description = "The new instance; with `count` a result for each.", body = api::ForkResponse),
        (status = 409, description = "The source's state does not allow it, the name is taken, or there is no room.",
            body = hypeman_api::ErrorBody),
        (status = 501, description = "The hypervisor cannot be captured.", body = hypeman_api::ErrorBody),
    ))]
pub async fn fork(
    State(state): State<AppState>,
    id: PathId,
    JsonBody(body): JsonBody<api::ForkInstanceRequest>,
) -> ApiResult<(StatusCode, Json<api::ForkResponse>)> {
    let id = resolve(&state.engine, &path_text(id)?)?;
    let several = body.count.is_some();
    let request = forks::of_instance(body)?;
    let describe = |error| refused(error, code::INVALID_STATE);
    let outcomes = state.engine.fork_instance(&id, request).await.map_err(describe)?;
    forked(outcomes, several, describe)
}
