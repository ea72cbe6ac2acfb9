//! Images, both ways.

use std::collections::BTreeMap;

use hypeman_api::image as api;
use hypeman_core::{platform::Platform, tags};
use hypeman_engine::{CreateImage, Image, ImageStatus};
use hypeman_images::Credentials;

use crate::error::ApiResult;

/// An image as clients see it.
#[must_use]
pub fn to_api(image: Image) -> api::Image {
    api::Image {
        name: image.name,
        digest: image.digest,
        platform: Some(image.platform).filter(|platform| !platform.is_empty()),
        status: match image.status {
            ImageStatus::Pending => api::ImageStatus::Pending,
            ImageStatus::Pulling => api::ImageStatus::Pulling,
            ImageStatus::Converting => api::ImageStatus::Converting,
            ImageStatus::Ready => api::ImageStatus::Ready,
            ImageStatus::Failed => api::ImageStatus::Failed,
        },
        queue_position: image.queue_position,
        progress: image.progress,
        error: image.error,
        size_bytes: image
            .size_bytes
            .map(|size| i64::try_from(size).unwrap_or(i64::MAX)),
        entrypoint: image.entrypoint,
        cmd: image.cmd,
        env: image
            .env
            .into_iter()
            .map(|entry| split_variable(&entry))
            .collect::<BTreeMap<_, _>>(),
        working_dir: Some(image.working_dir).filter(|directory| !directory.is_empty()),
        tags: image.tags,
        created_at: image.created_at,
    }
}

fn split_variable(entry: &str) -> (String, String) {
    let (name, value) = entry.split_once('=').unwrap_or((entry, ""));
    (name.to_owned(), value.to_owned())
}

/// A request for an image, checked.
///
/// # Errors
/// `invalid_platform` or `invalid_request`.
pub fn to_engine(request: api::CreateImageRequest) -> ApiResult<CreateImage> {
    let platform = platform(request.platform.as_deref())?;
    tags::check(&request.tags)?;
    Ok(CreateImage {
        name: request.name,
        platform,
        credentials: request.credentials.as_ref().and_then(credentials),
        tags: request.tags,
    })
}

/// A platform, where one is asked for, as the engine knows it.
pub(super) fn platform(text: Option<&str>) -> ApiResult<Option<String>> {
    let parsed = text.map(Platform::parse).transpose()?;
    Ok(parsed.map(|platform| platform.to_string()))
}

/// Credentials, unless all of them are empty: then the server's own are used.
fn credentials(given: &api::RegistryCredentials) -> Option<Credentials> {
    let text = |field: &Option<String>| field.clone().unwrap_or_default();
    Credentials::from_fields(
        &text(&given.username),
        &text(&given.password),
        &text(&given.registry_token),
    )
}
