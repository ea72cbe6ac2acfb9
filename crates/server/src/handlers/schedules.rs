//! The snapshot schedule of an instance. It outlives the instance, which is then found by its id alone.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use hypeman_api::snapshot as api;
use hypeman_core::id::is_id;
use hypeman_engine::{Engine, EngineError};

use super::{PathId, path_text, resolve};
use crate::convert::schedule as convert;
use crate::error::ApiResult;
use crate::extract::JsonBody;
use crate::state::AppState;

/// The schedule of an instance.
#[utoipa::path(get, path = "/instances/{id}/snapshot-schedule", tag = "snapshots",
    operation_id = "getInstanceSnapshotSchedule",
    params(("id" = String, Path, description = "Id, name or id prefix; the id of a deleted instance.")),
    responses((status = 200, description = "The schedule.", body = api::SnapshotSchedule)))]
pub async fn get(State(state): State<AppState>, id: PathId) -> ApiResult<Json<api::SnapshotSchedule>> {
    let id = owner(&state.engine, path_text(id)?)?;
    let schedule = state.engine.get_schedule(&id).await?;
    Ok(Json(convert::to_api(schedule)))
}

/// Sets or changes the schedule of an instance. Only another interval changes when it runs next.
#[utoipa::path(put, path = "/instances/{id}/snapshot-schedule", tag = "snapshots",
    operation_id = "setInstanceSnapshotSchedule",
    params(("id" = String, Path, description = "Id, name or id prefix.")),
    request_body = api::SetSnapshotScheduleRequest,
    responses((status = 200, description = "The schedule.", body = api::SnapshotSchedule)))]
pub async fn set(
    State(state): State<AppState>,
    id: PathId,
    JsonBody(body): JsonBody<api::SetSnapshotScheduleRequest>,
) -> ApiResult<Json<api::SnapshotSchedule>> {
    let id = resolve(&state.engine, &path_text(id)?)?;
    let schedule = state.engine.set_schedule(&id, convert::to_engine(body)?).await?;
    Ok(Json(convert::to_api(schedule)))
}

/// Ends the schedule of an instance. Its snapshots stay.
#[utoipa::path(delete, path = "/instances/{id}/snapshot-schedule", tag = "snapshots",
    operation_id = "deleteInstanceSnapshotSchedule",
    params(("id" = String, Path, description = "Id, name or id prefix; the id of a deleted instance.")),
    responses((status = 204, description = "Ended.")))]
pub async fn delete(State(state): State<AppState>, id: PathId) -> ApiResult<StatusCode> {
    let id = owner(&state.engine, path_text(id)?)?;
    state.engine.delete_schedule(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The id that a schedule is of: of an instance, or what may be one that is gone.
fn owner(engine: &Engine, text: String) -> ApiResult<String> {
    match engine.resolve_instance(&text) {
        Err(EngineError::NotFound { .. }) if is_id(&text) => Ok(text),
        _ => resolve(engine, &text),
    }
}
