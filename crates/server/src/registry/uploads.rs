//! Writing blobs: in one request, in one body after a session was opened, or in chunks.

use std::collections::BTreeMap;

use axum::extract::Request;
use axum::http::{HeaderName, StatusCode, header};
use axum::response::Response;
use hypeman_images::blobs::{ContentRange, UploadId};
use hypeman_images::{Digest, ImageError};
use percent_encoding::percent_decode_str;

use super::error::{RegistryFailure, RegistryResult, range};
use super::{CONTENT_DIGEST, empty, path, set};
use crate::auth::{RegistryAccess, RegistryGrant};
use crate::extract::streamed;
use crate::state::AppState;

const UPLOAD_ID: HeaderName = HeaderName::from_static("docker-upload-uuid");

/// `POST <name>/blobs/uploads/`: opens a session, takes a blob over from another repository, or stores a body.
pub async fn start(
    state: &AppState,
    grant: &RegistryGrant,
    repository: String,
    request: Request,
) -> RegistryResult<Response> {
    let query = query(request.uri().query());
    if let Some(wanted) = query.get("mount") {
        let digest = path::digest(wanted)?;
        // Blobs are stored once for all repositories; a builder may only take over what it can see.
        let readable = query
            .get("from")
            .is_none_or(|from| grant.allows(Some(from), RegistryAccess::Pull));
        if readable && state.engine.registry_promise_blob(&digest).await?.is_some() {
            return Ok(created(&repository, &digest));
        }
    }
    if let Some(wanted) = query.get("digest") {
        let digest = path::digest(wanted)?;
        let length = request
            .headers()
            .get(header::CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok()?.parse().ok());
        state
            .engine
            .blobs()
            .put_stream(streamed(request.into_body()), &digest, length)
            .await?;
        return stored(state, &repository, &digest).await;
    }
    let id = state.engine.blobs().start_upload().await?;
    Ok(accepted(StatusCode::ACCEPTED, &repository, &id, 0))
}

/// `GET` of a session: how much is there.
pub async fn status(state: &AppState, repository: &str, id: &str) -> RegistryResult<Response> {
    let id = session(id)?;
    let offset = state.engine.blobs().upload_offset(&id).await.map_err(of_upload)?;
    Ok(accepted(StatusCode::NO_CONTENT, repository, &id, offset))
}

/// `PATCH` of a session: the next chunk.
pub async fn append(
    state: &AppState,
    repository: &str,
    id: &str,
    request: Request,
) -> RegistryResult<Response> {
    let id = session(id)?;
    let chunk_range = content_range(&request)?;
    let outcome = state
        .engine
        .blobs()
        .append_upload(&id, chunk_range, streamed(request.into_body()))
        .await;
    let offset =
        outcome.map_err(|error| of_upload(error).with(header::LOCATION, location(repository, &id)))?;
    Ok(accepted(StatusCode::ACCEPTED, repository, &id, offset))
}

/// `PUT` of a session: the last chunk, if any, and the digest.
pub async fn finish(
    state: &AppState,
    repository: &str,
    id: &str,
    request: Request,
) -> RegistryResult<Response> {
    let id = session(id)?;
    let query = query(request.uri().query());
    let wanted = query
        .get("digest")
        .ok_or_else(|| RegistryFailure::digest_invalid("the query must name the digest"))?;
    let digest = path::digest(wanted)?;
    let chunk_range = content_range(&request)?;
    let blobs = state.engine.blobs();
    let empty_body = request
        .headers()
        .get(header::CONTENT_LENGTH)
        .is_some_and(|length| length == "0");
    if !empty_body {
        blobs
            .append_upload(&id, chunk_range, streamed(request.into_body()))
            .await
            .map_err(of_upload)?;
    }
    blobs.finish_upload(&id, &digest).await.map_err(of_upload)?;
    stored(state, repository, &digest).await
}

/// `DELETE` of a session: it is forgotten.
pub async fn cancel(state: &AppState, id: &str) -> RegistryResult<Response> {
    state
        .engine
        .blobs()
        .cancel_upload(&session(id)?)
        .await
        .map_err(of_upload)?;
    Ok(empty(StatusCode::NO_CONTENT))
}

fn session(id: &str) -> RegistryResult<UploadId> {
    id.parse().map_err(of_upload)
}

fn of_upload(error: ImageError) -> RegistryFailure {
    RegistryFailure::from(error).of_upload()
}

fn content_range(request: &Request) -> RegistryResult<Option<ContentRange>> {
    let Some(value) = request.headers().get(header::CONTENT_RANGE) else {
        return Ok(None);
    };
    let invalid = || {
        RegistryFailure::new(
            StatusCode::BAD_REQUEST,
            "BLOB_UPLOAD_INVALID",
            "Content-Range is not start-end",
        )
    };
    value
        .to_str()
        .map_err(|_| invalid())?
        .parse()
        .map(Some)
        .map_err(|_| invalid())
}

fn query(text: Option<&str>) -> BTreeMap<String, String> {
    let decode = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    text.unwrap_or_default()
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(name, value)| (decode(name), decode(value)))
        .collect()
}

fn location(repository: &str, id: &UploadId) -> String {
    format!("/v2/{repository}/blobs/uploads/{id}")
}

fn accepted(status: StatusCode, repository: &str, id: &UploadId, offset: u64) -> Response {
    let mut response = empty(status);
    set(&mut response, header::LOCATION, &location(repository, id));
    set(&mut response, UPLOAD_ID, &id.to_string());
    set(&mut response, header::RANGE, &range(offset));
    response
}

/// The answer to a blob that came whole. It stays until its manifest comes.
async fn stored(state: &AppState, repository: &str, digest: &Digest) -> RegistryResult<Response> {
    match state.engine.registry_promise_blob(digest).await? {
        Some(_) => Ok(created(repository, digest)),
        // Taken away in the instant between: the client sends it again.
        None => Err(of_upload(ImageError::NotFound(format!("blob {digest}")))),
    }
}

fn created(repository: &str, digest: &Digest) -> Response {
    let mut response = empty(StatusCode::CREATED);
    set(
        &mut response,
        header::LOCATION,
        &format!("/v2/{repository}/blobs/{digest}"),
    );
    set(&mut response, CONTENT_DIGEST, &digest.to_string());
    response
}
