//! Snapshots that leave as one file, and those that arrive as one.

use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use futures::StreamExt as _;
use hypeman_api::snapshot as api;
use hypeman_core::name;
use hypeman_engine::{Snapshot, SnapshotExport};

use super::{PathId, path_text};
use crate::convert::snapshot as convert;
use crate::error::{ApiError, ApiResult};
use crate::extract::{Params, streamed};
use crate::state::AppState;

/// What a client may still send of a body that was refused, bytes: it reads the answer only after it has sent all.
const UNWANTED: usize = 1 << 30;
/// How long it may take to.
const UNWANTED_PATIENCE: Duration = Duration::from_secs(60);

/// A snapshot as one file, which holds and checks all of it: memory, devices, both disks, and what is known of its
/// source, the environment of its program and the key of its guest included. It is streamed; an answer that breaks off
/// is not a file that anybody imports.
#[utoipa::path(get, path = "/snapshots/{id}/export", tag = "snapshots", operation_id = "exportSnapshot",
    params(("id" = String, Path, description = "Id.")),
    responses(
        (status = 200, description = "The file.", body = String, content_type = "application/octet-stream"),
        (status = 409, description = "A part is damaged.", body = hypeman_api::ErrorBody),
    ))]
pub async fn export(State(state): State<AppState>, id: PathId) -> ApiResult<Response> {
    let export = state.engine.export_snapshot(&path_text(id)?).await?;
    let disposition = disposition(&export.snapshot)?;
    let content = futures::stream::unfold(Some(export), |export: Option<SnapshotExport>| async {
        let mut export = export?;
        match export.next().await? {
            Ok(bytes) => Some((Ok(bytes), Some(export))),
            // The status is out already: only a connection that breaks can say it.
            Err(error) => Some((Err(std::io::Error::other(error)), None)),
        }
    });
    let mut response = Body::from_stream(content).into_response();
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/octet-stream"),
    );
    headers.insert(header::CONTENT_DISPOSITION, disposition);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

/// Names and ids need no quoting.
fn disposition(snapshot: &Snapshot) -> ApiResult<HeaderValue> {
    let name = snapshot.name.as_deref().unwrap_or(&snapshot.id);
    HeaderValue::from_str(&format!("attachment; filename=\"{name}.hypeman\""))
        .map_err(|error| ApiError::internal(&error))
}

/// Makes a snapshot of a file that an export wrote, here or on another server. It gets an id of its own. The image that
/// its instance was made of need not be here: the file holds the root disk. Whether this host can run captured memory
/// is judged when it is restored. A body that is not whole leaves nothing.
#[utoipa::path(post, path = "/snapshots/import", tag = "snapshots", operation_id = "importSnapshot",
    params(api::ImportSnapshotQuery),
    request_body(content = String, description = "The file.", content_type = "application/octet-stream"),
    responses(
        (status = 201, description = "The snapshot, durable.", body = api::Snapshot),
        (status = 400, description = "The file is damaged or asks for more than is allowed.",
            body = hypeman_api::ErrorBody),
        (status = 409, description = "The name is taken, the file is of another format, or the disk is full.",
            body = hypeman_api::ErrorBody),
    ))]
pub async fn import(
    State(state): State<AppState>,
    Params(query): Params<api::ImportSnapshotQuery>,
    body: Body,
) -> ApiResult<(StatusCode, Json<api::Snapshot>)> {
    if let Some(name) = &query.name {
        name::check(name).map_err(|error| ApiError::schema(error.message))?;
    }
    let mut body = Box::pin(streamed(body));
    match state.engine.import_snapshot(query.name, &mut body).await {
        Ok(snapshot) => Ok((StatusCode::CREATED, Json(convert::to_api(&snapshot)))),
        Err(error) => {
            let mut left = UNWANTED;
            let rest = async {
                while let Some(Ok(piece)) = body.next().await {
                    left = left.saturating_sub(piece.len());
                    if left == 0 {
                        break;
                    }
                }
            };
            // Whether the rest came or not, the answer is the same.
            let _ = tokio::time::timeout(UNWANTED_PATIENCE, rest).await;
            Err(error.into())
        }
    }
}
