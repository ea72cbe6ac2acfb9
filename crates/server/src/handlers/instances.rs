//! Instances.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use hypeman_api::error::code;
use hypeman_api::instance as api;
use hypeman_api::query::{DeleteInstanceQuery, ListInstancesQuery, StatQuery, WaitQuery};
use hypeman_core::duration;
use hypeman_engine::InstanceFilter;
use jiff::Timestamp;

use super::{PathId, path_text, resolve};
use crate::convert::{instance as convert, request};
use crate::error::{ApiError, ApiResult};
use crate::extract::{JsonBody, Params, TagFilter};
use crate::state::{AppState, Stage};

/// Wait when none is given, and the longest one.
const DEFAULT_WAIT: Duration = Duration::from_secs(60);
const LONGEST_WAIT: Duration = Duration::from_secs(300);

/// All instances, filtered by state and tags.
#[utoipa::path(get, path = "/instances", tag = "instances", operation_id = "listInstances",
    params(ListInstancesQuery,
        ("tags" = Option<std::collections::BTreeMap<String, String>>, Query, style = DeepObject, explode = true,
            description = "Only objects with all of these tags: `tags[team]=backend`.")),
    responses((status = 200, description = "Instances.", body = [api::Instance])))]
pub async fn list(
    State(state): State<AppState>,
    Params(query): Params<ListInstancesQuery>,
    tags: TagFilter,
) -> ApiResult<Response> {
    if query.state.is_none() && tags.0.is_empty() {
        let version = state.engine.instances_version();
        let all = || state.engine.list_instances(&InstanceFilter::default());
        let body = state.all_instances.get(version, all);
        return Ok(json(body.map_err(|error| ApiError::internal(&error))?));
    }
    let filter = InstanceFilter {
        state: query.state.map(convert::state_to_core),
        tags: tags.0,
    };
    let now = Timestamp::now();
    let instances: Vec<api::Instance> = state
        .engine
        .list_instances(&filter)
        .iter()
        .map(|instance| convert::to_api(instance, now))
        .collect();
    let body = serde_json::to_vec(&instances).map_err(|error| ApiError::internal(&error))?;
    Ok(json(body.into()))
}

fn json(body: Bytes) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

/// Creates an instance and starts it.
#[utoipa::path(post, path = "/instances", tag = "instances", operation_id = "createInstance",
    request_body = api::CreateInstanceRequest,
    responses(
        (status = 201, description = "The instance; it may still be initializing.", body = api::Instance),
        (status = 404, description = "No such image or platform.", body = hypeman_api::ErrorBody),
        (status = 409, description = "The host has no room for it.", body = hypeman_api::ErrorBody),
        (status = 424, description = "The registry cannot be reached or trusted.", body = hypeman_api::ErrorBody),
        (status = 429, description = "The registry asks to come back later.", body = hypeman_api::ErrorBody),
    ))]
pub async fn create(
    State(state): State<AppState>,
    JsonBody(body): JsonBody<api::CreateInstanceRequest>,
) -> ApiResult<(StatusCode, Json<api::Instance>)> {
    let request = request::create(body, Timestamp::now())?;
    let instance = state.engine.create_instance(request).await?;
    Ok((
        StatusCode::CREATED,
        Json(convert::to_api(&instance, Timestamp::now())),
    ))
}

/// One instance.
#[utoipa::path(get, path = "/instances/{id}", tag = "instances", operation_id = "getInstance",
    params(("id" = String, Path, description = "Id, name or id prefix.")),
    responses((status = 200, description = "The instance.", body = api::Instance)))]
pub async fn get(State(state): State<AppState>, id: PathId) -> ApiResult<Json<api::Instance>> {
    let id = resolve(&state.engine, &path_text(id)?)?;
    let instance = state.engine.get_instance(&id)?;
    Ok(Json(convert::to_api(&instance, Timestamp::now())))
}

/// Changes an instance; absent parts stay.
#[utoipa::path(patch, path = "/instances/{id}", tag = "instances", operation_id = "updateInstance",
    params(("id" = String, Path, description = "Id, name or id prefix.")),
    request_body = api::UpdateInstanceRequest,
    responses((status = 200, description = "The instance.", body = api::Instance)))]
pub async fn update(
    State(state): State<AppState>,
    id: PathId,
    JsonBody(body): JsonBody<api::UpdateInstanceRequest>,
) -> ApiResult<Json<api::Instance>> {
    let id = resolve(&state.engine, &path_text(id)?)?;
    let update = request::update(&body, Timestamp::now())?;
    let instance = state.engine.update_instance(&id, update).await?;
    Ok(Json(convert::to_api(&instance, Timestamp::now())))
}

/// Deletes an instance in any state.
#[utoipa::path(delete, path = "/instances/{id}", tag = "instances", operation_id = "deleteInstance",
    params(("id" = String, Path, description = "Id, name or id prefix."), DeleteInstanceQuery),
    responses((status = 204, description = "Deleted.")))]
pub async fn delete(
    State(state): State<AppState>,
    id: PathId,
    Params(query): Params<DeleteInstanceQuery>,
) -> ApiResult<StatusCode> {
    let id = resolve(&state.engine, &path_text(id)?)?;
    state
        .engine
        .delete_instance(&id, query.graceful_shutdown.unwrap_or(true))
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Starts a stopped instance.
#[utoipa::path(post, path = "/instances/{id}/start", tag = "instances", operation_id = "startInstance",
    params(("id" = String, Path, description = "Id, name or id prefix.")),
    request_body = api::StartInstanceRequest,
    responses((status = 200, description = "The instance; it may still be initializing.", body = api::Instance)))]
pub async fn start(
    State(state): State<AppState>,
    id: PathId,
    JsonBody(body): JsonBody<api::StartInstanceRequest>,
) -> ApiResult<Json<api::Instance>> {
    let id = resolve(&state.engine, &path_text(id)?)?;
    let instance = state.engine.start_instance(&id, request::start(body)?).await?;
    Ok(Json(convert::to_api(&instance, Timestamp::now())))
}

/// Stops a running instance, asking its program first.
#[utoipa::path(post, path = "/instances/{id}/stop", tag = "instances", operation_id = "stopInstance",
    params(("id" = String, Path, description = "Id, name or id prefix.")),
    responses((status = 200, description = "The instance, stopped.", body = api::Instance)))]
pub async fn stop(State(state): State<AppState>, id: PathId) -> ApiResult<Json<api::Instance>> {
    let id = resolve(&state.engine, &path_text(id)?)?;
    let instance = state.engine.stop_instance(&id).await?;
    Ok(Json(convert::to_api(&instance, Timestamp::now())))
}

/// Waits for a state. Returns early when another state has settled; compare `state`.
#[utoipa::path(get, path = "/instances/{id}/wait", tag = "instances", operation_id = "waitForState",
    params(("id" = String, Path, description = "Id, name or id prefix."), WaitQuery),
    responses((status = 200, description = "How the wait ended.", body = api::WaitResponse)))]
pub async fn wait(
    State(state): State<AppState>,
    id: PathId,
    Params(query): Params<WaitQuery>,
) -> ApiResult<Json<api::WaitResponse>> {
    let id = resolve(&state.engine, &path_text(id)?)?;
    if query.state == api::InstanceState::Unknown {
        return Err(ApiError::invalid(
            code::INVALID_STATE,
            "Unknown is not a state that can be waited for",
        ));
    }
    let timeout = match query.timeout.as_deref() {
        None | Some("") => DEFAULT_WAIT,
        Some(text) => duration::parse_non_negative(text)
            .map_err(|error| error.in_field("timeout").with_code(code::INVALID_TIMEOUT))?,
    };
    let target = convert::state_to_core(query.state);
    let outcome = tokio::select! {
        outcome = state.engine.wait_instance(&id, target, timeout.min(LONGEST_WAIT)) => outcome?,
        () = state.reached(Stage::Draining) => return Err(hypeman_engine::EngineError::ShuttingDown.into()),
    };
    Ok(Json(convert::wait_to_api(outcome)))
}

/// What an instance uses.
#[utoipa::path(get, path = "/instances/{id}/stats", tag = "instances", operation_id = "getInstanceStats",
    params(("id" = String, Path, description = "Id, name or id prefix.")),
    responses((status = 200, description = "Usage; zeros while it does not run.", body = api::InstanceStats)))]
pub async fn stats(State(state): State<AppState>, id: PathId) -> ApiResult<Json<api::InstanceStats>> {
    let id = resolve(&state.engine, &path_text(id)?)?;
    let instance = state.engine.get_instance(&id)?;
    let stats = state.engine.instance_stats(&id).await?;
    Ok(Json(convert::stats_to_api(&instance, &stats)))
}

/// A path in the guest.
#[utoipa::path(get, path = "/instances/{id}/stat", tag = "instances", operation_id = "statInstancePath",
    params(("id" = String, Path, description = "Id, name or id prefix."), StatQuery),
    responses((status = 200, description = "What is there, if anything.", body = api::PathInfo)))]
pub async fn stat(
    State(state): State<AppState>,
    id: PathId,
    Params(query): Params<StatQuery>,
) -> ApiResult<Json<api::PathInfo>> {
    let id = resolve(&state.engine, &path_text(id)?)?;
    if query.path.is_empty() || query.path.contains('\0') {
        return Err(ApiError::schema("path is required and must not hold a null byte"));
    }
    let guest = state.engine.guest(&id)?;
    let info = guest
        .stat(&query.path, query.follow_links.unwrap_or(false))
        .await?;
    Ok(Json(convert::path_to_api(info)))
}
