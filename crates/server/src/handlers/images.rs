//! Images.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use hypeman_api::error::code;
use hypeman_api::image::{CreateImageRequest, Image, TagImageRequest};

use super::path_text;
use crate::convert::image::{to_api, to_engine};
use crate::error::{ApiError, ApiResult};
use crate::extract::{JsonBody, TagFilter};
use crate::state::AppState;

/// All images, filtered by tags.
#[utoipa::path(get, path = "/images", tag = "images", operation_id = "listImages",
    params(("tags" = Option<std::collections::BTreeMap<String, String>>, Query, style = DeepObject, explode = true,
        description = "Only objects with all of these tags: `tags[team]=backend`.")),
    responses((status = 200, description = "Images.", body = [Image])))]
pub async fn list(State(state): State<AppState>, filter: TagFilter) -> ApiResult<Json<Vec<Image>>> {
    let images = state.engine.list_images(&filter.0);
    Ok(Json(images.into_iter().map(to_api).collect()))
}

/// Fetches an image and makes a root disk of it, in the background.
#[utoipa::path(post, path = "/images", tag = "images", operation_id = "createImage",
    request_body = CreateImageRequest,
    responses(
        (status = 202, description = "The image, on its way.", body = Image),
        (status = 404, description = "The registry has no such image or platform.", body = hypeman_api::ErrorBody),
        (status = 409, description = "In flight with other credentials, or no room.", body = hypeman_api::ErrorBody),
        (status = 424, description = "The registry cannot be reached or trusted.", body = hypeman_api::ErrorBody),
        (status = 429, description = "The registry asks to come back later.", body = hypeman_api::ErrorBody),
    ))]
pub async fn create(
    State(state): State<AppState>,
    JsonBody(request): JsonBody<CreateImageRequest>,
) -> ApiResult<(StatusCode, Json<Image>)> {
    let image = state.engine.create_image(to_engine(request)?).await?;
    Ok((StatusCode::ACCEPTED, Json(to_api(image))))
}

/// One image.
#[utoipa::path(get, path = "/images/{name}", tag = "images", operation_id = "getImage",
    params(("name" = String, Path, description = "Reference, percent-encoded.")),
    responses(
        (status = 200, description = "The image.", body = Image),
        (status = 404, description = "No such image.", body = hypeman_api::ErrorBody),
    ))]
pub async fn get(
    State(state): State<AppState>,
    name: Result<Path<String>, PathRejection>,
) -> ApiResult<Json<Image>> {
    let image = state.engine.get_image(&path_text(name)?)?;
    Ok(Json(to_api(image)))
}

/// Deletes a tag; the content goes with the last tag.
#[utoipa::path(delete, path = "/images/{name}", tag = "images", operation_id = "deleteImage",
    params(("name" = String, Path, description = "Reference, percent-encoded.")),
    responses(
        (status = 204, description = "Deleted."),
        (status = 404, description = "No such image.", body = hypeman_api::ErrorBody),
        (status = 409, description = "In use.", body = hypeman_api::ErrorBody),
    ))]
pub async fn delete(
    State(state): State<AppState>,
    name: Result<Path<String>, PathRejection>,
) -> ApiResult<StatusCode> {
    state.engine.delete_image(&path_text(name)?).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Points a local tag at an image; nothing is fetched or converted.
#[utoipa::path(post, path = "/images/{name}/tag", tag = "images", operation_id = "tagImage",
    params(("name" = String, Path, description = "Reference of the source, percent-encoded.")),
    request_body = TagImageRequest,
    responses(
        (status = 200, description = "The image under its new tag.", body = Image),
        (status = 404, description = "No such image.", body = hypeman_api::ErrorBody),
        (status = 409, description = "The source is not ready.", body = hypeman_api::ErrorBody),
    ))]
pub async fn tag(
    State(state): State<AppState>,
    name: Result<Path<String>, PathRejection>,
    JsonBody(request): JsonBody<TagImageRequest>,
) -> ApiResult<Json<Image>> {
    let image = state
        .engine
        .tag_image(&path_text(name)?, &request.target)
        .await
        .map_err(|error| {
            let error = ApiError::from(error);
            if error.code() == code::IMAGE_NOT_READY {
                error.with_status(StatusCode::CONFLICT)
            } else {
                error
            }
        })?;
    Ok(Json(to_api(image)))
}
