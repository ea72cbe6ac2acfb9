//! Failures in the terms of the distribution specification.

use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hypeman_api::registry::{RegistryError, RegistryErrors};
use hypeman_engine::EngineError;
use hypeman_images::ImageError;

use crate::error::ApiError;

/// Result of a registry handler.
pub type RegistryResult<T> = Result<T, RegistryFailure>;

/// A failed registry request.
#[derive(Debug)]
pub struct RegistryFailure {
    status: StatusCode,
    code: &'static str,
    message: String,
    headers: Vec<(HeaderName, String)>,
}

impl RegistryFailure {
    /// A failure with one of the specification's codes.
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            headers: Vec::new(),
        }
    }

    /// 401. Clients learn here that basic authentication works, which every registry client knows.
    pub fn unauthorized() -> Self {
        Self::new(
            StatusCode::UNAUTHORIZED,
            "UNAUTHORIZED",
            "registry authentication required",
        )
        .with(header::WWW_AUTHENTICATE, "Basic realm=\"hypeman\"")
    }

    /// 403.
    pub fn denied() -> Self {
        Self::new(
            StatusCode::FORBIDDEN,
            "DENIED",
            "the token does not allow this in this repository",
        )
    }

    /// 405.
    pub fn unsupported() -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "UNSUPPORTED",
            "the operation is not supported",
        )
    }

    /// 404 for a path that is none of the specification's.
    pub fn unknown_path() -> Self {
        Self::new(StatusCode::NOT_FOUND, "NAME_UNKNOWN", "there is no such endpoint")
    }

    /// 404 for a manifest.
    pub fn manifest_unknown() -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "MANIFEST_UNKNOWN",
            "manifest unknown to registry",
        )
    }

    /// 400 for a digest that is none.
    pub fn digest_invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "DIGEST_INVALID", message)
    }

    /// The same failure with a header.
    #[must_use]
    pub fn with(mut self, name: HeaderName, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// The same failure, where what is missing is an upload.
    #[must_use]
    pub fn of_upload(mut self) -> Self {
        if self.status == StatusCode::NOT_FOUND {
            self.code = "BLOB_UPLOAD_UNKNOWN";
        }
        self
    }
}

impl From<ImageError> for RegistryFailure {
    fn from(error: ImageError) -> Self {
        let message = error.to_string();
        match error {
            ImageError::NotFound(_) => Self::new(StatusCode::NOT_FOUND, "BLOB_UNKNOWN", message),
            ImageError::InvalidName { .. } => Self::new(StatusCode::BAD_REQUEST, "NAME_INVALID", message),
            ImageError::InvalidDigest(_) | ImageError::DigestMismatch { .. } => Self::digest_invalid(message),
            ImageError::InvalidDocument { .. }
            | ImageError::Unsupported(_)
            | ImageError::InvalidPlatform(_)
            | ImageError::PlatformNotAvailable { .. } => {
                Self::new(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", message)
            }
            ImageError::SizeMismatch { .. } => Self::new(StatusCode::BAD_REQUEST, "SIZE_INVALID", message),
            ImageError::TooLarge { .. } => Self::new(StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID", message),
            ImageError::RangeNotSatisfiable { offset } => {
                Self::new(StatusCode::RANGE_NOT_SATISFIABLE, "BLOB_UPLOAD_INVALID", message)
                    .with(header::RANGE, range(offset))
            }
            ImageError::Busy(_) => Self::new(StatusCode::TOO_MANY_REQUESTS, "TOOMANYREQUESTS", message)
                .with(header::RETRY_AFTER, "1"),
            ImageError::NoSpace(_) => Self::new(StatusCode::INSUFFICIENT_STORAGE, "DENIED", message),
            ImageError::Io { source, .. } if is_client_fault(&source) => Self::new(
                StatusCode::BAD_REQUEST,
                "BLOB_UPLOAD_INVALID",
                "the body broke off or stalled",
            ),
            _ => internal(&message),
        }
    }
}

/// Whether the client's stream broke, rather than our disk.
fn is_client_fault(error: &std::io::Error) -> bool {
    error.get_ref().is_some()
}

/// The `Range` of what an upload holds.
pub fn range(offset: u64) -> String {
    format!("0-{}", offset.saturating_sub(1))
}

fn internal(cause: &dyn std::fmt::Display) -> RegistryFailure {
    let error = ApiError::internal(cause);
    RegistryFailure::new(error.status(), "UNKNOWN", error.message())
}

impl From<EngineError> for RegistryFailure {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Image(ImageError::NotFound(what)) => Self::new(
                StatusCode::BAD_REQUEST,
                "MANIFEST_BLOB_UNKNOWN",
                format!("{what} is not here; push it before the manifest"),
            ),
            EngineError::Image(error) => error.into(),
            EngineError::NotFound { .. } => Self::manifest_unknown(),
            EngineError::Invalid {
                code: "invalid_name",
                message,
            } => Self::new(StatusCode::BAD_REQUEST, "NAME_INVALID", message),
            EngineError::Invalid {
                code: code @ "MANIFEST_BLOB_UNKNOWN",
                message,
            } => Self::new(StatusCode::BAD_REQUEST, code, message),
            EngineError::Invalid { message, .. } => {
                Self::new(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", message)
            }
            EngineError::InsufficientResources(message) => {
                Self::new(StatusCode::INSUFFICIENT_STORAGE, "DENIED", message)
            }
            other => {
                let error = ApiError::from(other);
                Self::new(error.status(), "UNKNOWN", error.message())
            }
        }
    }
}

impl IntoResponse for RegistryFailure {
    fn into_response(self) -> Response {
        let body = RegistryErrors {
            errors: vec![RegistryError {
                code: self.code.to_owned(),
                message: self.message,
            }],
        };
        let mut response = (self.status, axum::Json(body)).into_response();
        for (name, value) in self.headers {
            if let Ok(value) = HeaderValue::from_str(&value) {
                response.headers_mut().insert(name, value);
            }
        }
        response
    }
}
