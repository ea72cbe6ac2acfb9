//! Manifests and indexes. Writing one makes an image of it.

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::response::Response;
use hypeman_images::manifest::MAX_DOCUMENT_BYTES;

use super::error::{RegistryFailure, RegistryResult};
use super::{CONTENT_DIGEST, empty, set};
use crate::extract::read_body;
use crate::state::AppState;

/// `GET` and `HEAD` of a manifest.
pub async fn read(
    state: &AppState,
    method: &Method,
    repository: &str,
    reference: &str,
) -> RegistryResult<Response> {
    let manifest = state
        .engine
        .registry_manifest(repository, reference)?
        .ok_or_else(RegistryFailure::manifest_unknown)?;
    let mut response = if method == Method::HEAD {
        empty(StatusCode::OK)
    } else {
        Response::new(Body::from(
            state.engine.blobs().read_document(&manifest.digest).await?,
        ))
    };
    set(&mut response, CONTENT_DIGEST, &manifest.digest.to_string());
    set(&mut response, header::ETAG, &format!("\"{}\"", manifest.digest));
    set(&mut response, header::CONTENT_TYPE, &manifest.media_type);
    response
        .headers_mut()
        .insert(header::CONTENT_LENGTH, HeaderValue::from(manifest.size));
    Ok(response)
}

/// `PUT` of a manifest.
pub async fn write(
    state: &AppState,
    repository: &str,
    reference: &str,
    request: Request,
) -> RegistryResult<Response> {
    let (parts, body) = request.into_parts();
    let text = |name| {
        parts
            .headers
            .get(name)
            .and_then(|value: &HeaderValue| value.to_str().ok())
            .map(str::to_owned)
    };
    let host = text(header::HOST).unwrap_or_else(|| "localhost".to_owned());
    let media_type = text(header::CONTENT_TYPE)
        .and_then(|kind| kind.split(';').next().map(|kind| kind.trim().to_owned()))
        .filter(|kind| !kind.is_empty() && kind.len() <= 255)
        .unwrap_or_default();
    let limit = usize::try_from(MAX_DOCUMENT_BYTES).unwrap_or(usize::MAX);
    let bytes = read_body(body, limit)
        .await
        .map_err(|error| RegistryFailure::new(error.status(), "MANIFEST_INVALID", error.message()))?;
    let digest = state
        .engine
        .registry_put_manifest(&host, repository, reference, &media_type, bytes.into())
        .await?;
    let mut response = empty(StatusCode::CREATED);
    set(
        &mut response,
        header::LOCATION,
        &format!("/v2/{repository}/manifests/{digest}"),
    );
    set(&mut response, CONTENT_DIGEST, &digest.to_string());
    Ok(response)
}

/// `DELETE` of a manifest or a tag.
pub async fn delete(state: &AppState, repository: &str, reference: &str) -> RegistryResult<Response> {
    if state
        .engine
        .registry_delete_manifest(repository, reference)
        .await?
    {
        Ok(empty(StatusCode::ACCEPTED))
    } else {
        Err(RegistryFailure::manifest_unknown())
    }
}
