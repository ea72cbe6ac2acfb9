//! Every failure of the API as a status, a stable code and a message; the one place where engine errors become
//! HTTP.
//!
//! Unexpected failures answer with a fixed text: their cause goes to the log, under the request's id.

use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hypeman_api::error::{ErrorBody, ErrorDetail, code};
use hypeman_core::InvalidValue;
use hypeman_engine::EngineError;
use hypeman_guest_api::{ChannelError, RefusalCode};
use hypeman_images::ImageError;
use hypeman_network::NetworkError;
use hypeman_vmm::VmmError;

/// Header by which official clients learn that repeating the request is useless.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// The text of all unexpected failures.
const INTERNAL: &str = "an unexpected error occurred; the server log tells more under this request's id";

/// Result of a handler.
pub type ApiResult<T> = Result<T, ApiError>;

/// A failed request.
#[derive(Debug, Clone)]
pub struct ApiError {
    status: StatusCode,
    // Boxed: results carry it through every layer, and success must stay small.
    body: Box<ErrorBody>,
    retry: Retry,
}

/// Whether the same request may succeed later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Retry {
    /// What clients do by themselves for the status is right.
    Default,
    /// It will fail again until something else changes.
    Never,
    /// After so many seconds.
    After(u64),
}

impl ApiError {
    /// An error of a handler.
    pub fn new(status: StatusCode, code: impl Into<String>, message: impl Into<String>) -> Self {
        // Clients repeat each 409 by themselves, so it must say when that is useless.
        let retry = if status == StatusCode::CONFLICT {
            Retry::Never
        } else {
            Retry::Default
        };
        Self {
            status,
            body: Box::new(ErrorBody::new(code, message)),
            retry,
        }
    }

    /// 400 with one of the contract's codes.
    pub fn invalid(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }

    /// An error of the layers before the handlers, whose code is the status text.
    pub fn layer(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, status.canonical_reason().unwrap_or("Error"), message)
    }

    /// 400 for a request that breaks the schema.
    pub fn schema(message: impl Into<String>) -> Self {
        Self::layer(StatusCode::BAD_REQUEST, message)
    }

    /// 500; the cause is logged and not told.
    pub fn internal(cause: &dyn std::fmt::Display) -> Self {
        tracing::error!(%cause, "request failed");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, code::INTERNAL_ERROR, INTERNAL)
    }

    /// 404 of the layer that turns names into ids.
    pub fn not_found(detail: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::NOT_FOUND, code::NOT_FOUND, "resource not found");
        error.body.details.push(ErrorDetail {
            code: Some(code::NOT_FOUND.to_owned()),
            message: Some(detail.into()),
        });
        error
    }

    /// The same error, with the promise that repeating can help.
    #[must_use]
    fn retryable(mut self) -> Self {
        self.retry = Retry::Default;
        self
    }

    #[must_use]
    fn retry_after(mut self, seconds: u64) -> Self {
        self.retry = Retry::After(seconds);
        self
    }

    /// The same error with another status, for codes whose status depends on the route.
    #[must_use]
    pub fn with_status(self, status: StatusCode) -> Self {
        Self::new(status, self.body.code, self.body.message)
    }

    /// The same error under another code, for failures whose name depends on the route.
    #[must_use]
    pub fn with_code(mut self, code: &'static str) -> Self {
        code.clone_into(&mut self.body.code);
        self
    }

    /// What it says, to be part of another answer.
    #[must_use]
    pub fn into_body(self) -> ErrorBody {
        *self.body
    }

    /// Its status.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// Its stable code.
    #[must_use]
    pub fn code(&self) -> &str {
        &self.body.code
    }

    /// Its message.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.body.message
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(*self.body)).into_response();
        match self.retry {
            Retry::Default => {}
            Retry::Never => {
                response
                    .headers_mut()
                    .insert(SHOULD_RETRY, HeaderValue::from_static("false"));
            }
            Retry::After(seconds) => {
                response
                    .headers_mut()
                    .insert(header::RETRY_AFTER, HeaderValue::from(seconds));
            }
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<InvalidValue> for ApiError {
    fn from(error: InvalidValue) -> Self {
        let mut converted = Self::invalid(error.code, error.message.clone());
        if !error.field.is_empty() {
            converted.body.message = format!("{}: {}", error.field, error.message);
            converted.body.details.push(ErrorDetail {
                code: Some(error.code.to_owned()),
                message: Some(converted.body.message.clone()),
            });
        }
        converted
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        let message = error.to_string();
        if error.is_out_of_space() {
            return Self::new(StatusCode::CONFLICT, code::INSUFFICIENT_RESOURCES, message).retryable();
        }
        match error {
            EngineError::NotFound { .. } => Self::new(StatusCode::NOT_FOUND, code::NOT_FOUND, message),
            EngineError::Ambiguous { .. } => Self::new(
                StatusCode::CONFLICT,
                code::AMBIGUOUS,
                "multiple resources match, use full ID",
            ),
            EngineError::InvalidState(_) => Self::new(StatusCode::CONFLICT, code::INVALID_STATE, message),
            EngineError::Expired => Self::new(StatusCode::CONFLICT, code::INSTANCE_EXPIRED, message),
            EngineError::NameConflict(_) => Self::invalid(code::NAME_CONFLICT, message),
            EngineError::ForkNameConflict(_) => Self::new(StatusCode::CONFLICT, code::NAME_CONFLICT, message),
            EngineError::Conflict(_) => Self::new(StatusCode::CONFLICT, code::CONFLICT, message),
            EngineError::Incompatible(_) => Self::new(StatusCode::CONFLICT, code::INCOMPATIBLE, message),
            EngineError::Damaged(_) => Self::new(StatusCode::CONFLICT, code::SNAPSHOT_DAMAGED, message),
            EngineError::RestoreFailed(_) => Self::new(StatusCode::CONFLICT, code::RESTORE_FAILED, message),
            EngineError::MemoryInUse { .. } => Self::new(StatusCode::CONFLICT, code::MEMORY_IN_USE, message),
            EngineError::Invalid { code, .. } => Self::invalid(code, message),
            EngineError::ImageNotReady(_) => Self::invalid(code::IMAGE_NOT_READY, message),
            EngineError::InsufficientResources(_) => {
                Self::new(StatusCode::CONFLICT, code::INSUFFICIENT_RESOURCES, message).retryable()
            }
            EngineError::CredentialConflict => {
                Self::new(StatusCode::CONFLICT, code::CREDENTIAL_CONFLICT, message).retryable()
            }
            EngineError::LogNotFound => Self::new(StatusCode::NOT_FOUND, code::LOG_NOT_FOUND, message),
            EngineError::Image(error) => from_image(&error),
            EngineError::Vmm(error) => from_vmm(&error),
            EngineError::Guest(error) => Self::from(error),
            EngineError::Network(error) => from_network(&error),
            // The operator can read what is missing nowhere else, and the text names no secrets.
            EngineError::Kernel(_) => Self::new(StatusCode::CONFLICT, code::INSUFFICIENT_RESOURCES, message),
            EngineError::ShuttingDown => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", message).retry_after(2)
            }
            _ => Self::internal(&message),
        }
    }
}

fn from_image(error: &ImageError) -> ApiError {
    let message = error.to_string();
    match error {
        ImageError::NotFound(_) => ApiError::new(StatusCode::NOT_FOUND, code::NOT_FOUND, message),
        ImageError::PlatformNotAvailable { .. } => {
            ApiError::new(StatusCode::NOT_FOUND, code::PLATFORM_NOT_AVAILABLE, message)
        }
        ImageError::RateLimited { retry_after, .. } => {
            let seconds = retry_after.map_or(30, |after| after.as_secs().max(1));
            ApiError::new(StatusCode::TOO_MANY_REQUESTS, code::RATE_LIMITED, message).retry_after(seconds)
        }
        // The fault is another server's: not our 5xx, and repeating was tried already.
        ImageError::Network { .. } | ImageError::UnsafeServer { .. } => {
            ApiError::new(StatusCode::FAILED_DEPENDENCY, error.code(), message)
        }
        ImageError::Busy(_) | ImageError::Cancelled => {
            ApiError::new(StatusCode::CONFLICT, code::CONFLICT, message).retryable()
        }
        ImageError::Io { .. } => ApiError::internal(&message),
        _ => ApiError::invalid(error.code(), message),
    }
}

fn from_vmm(error: &VmmError) -> ApiError {
    match error {
        VmmError::Unsupported { .. } | VmmError::Unavailable(_) => {
            ApiError::invalid(code::INVALID_REQUEST, error.to_string())
        }
        VmmError::Gone => {
            ApiError::new(StatusCode::CONFLICT, code::INVALID_STATE, error.to_string()).retryable()
        }
        _ => ApiError::internal(error),
    }
}

fn from_network(error: &NetworkError) -> ApiError {
    match error {
        NetworkError::Unavailable(_) => ApiError::invalid(
            code::INVALID_REQUEST,
            format!("{error}; or create the instance with network.enabled=false"),
        ),
        NetworkError::Exhausted { .. } => ApiError::new(
            StatusCode::CONFLICT,
            code::INSUFFICIENT_RESOURCES,
            error.to_string(),
        )
        .retryable(),
        _ => ApiError::internal(error),
    }
}

impl From<ChannelError> for ApiError {
    fn from(error: ChannelError) -> Self {
        let message = error.to_string();
        match error {
            ChannelError::Closed | ChannelError::Captured | ChannelError::Deadline => {
                Self::new(StatusCode::CONFLICT, code::INVALID_STATE, message).retryable()
            }
            ChannelError::Refused(refusal) => match refusal.code {
                RefusalCode::AgentDisabled
                | RefusalCode::NotConfigured
                | RefusalCode::SetupFailed
                | RefusalCode::ShuttingDown => Self::new(StatusCode::CONFLICT, code::INVALID_STATE, message),
                RefusalCode::NotFound => Self::new(StatusCode::NOT_FOUND, code::NOT_FOUND, message),
                _ => Self::invalid(code::INVALID_REQUEST, message),
            },
            _ => Self::internal(&message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(error: ApiError, name: &str) -> Option<String> {
        error
            .into_response()
            .headers()
            .get(name)
            .map(|value| value.to_str().unwrap().to_owned())
    }

    #[test]
    fn permanent_conflicts_say_so() {
        let state = ApiError::from(EngineError::InvalidState("cannot start".into()));
        assert_eq!(
            (state.status(), state.code()),
            (StatusCode::CONFLICT, "invalid_state")
        );
        assert_eq!(header(state, "x-should-retry").as_deref(), Some("false"));
        let resources = ApiError::from(EngineError::InsufficientResources("no memory".into()));
        assert_eq!(resources.status(), StatusCode::CONFLICT);
        assert_eq!(header(resources, "x-should-retry"), None);
    }

    #[test]
    fn duplicate_names_are_400_as_clients_expect() {
        let error = ApiError::from(EngineError::NameConflict("web".into()));
        assert_eq!(
            (error.status(), error.code()),
            (StatusCode::BAD_REQUEST, "name_conflict")
        );
    }

    #[test]
    fn what_snapshots_refuse_is_permanent_and_has_a_code_of_its_own() {
        for (error, code) in [
            (EngineError::ForkNameConflict("web".into()), "name_conflict"),
            (EngineError::Conflict("the name is taken".into()), "conflict"),
            (
                EngineError::Incompatible("QEMU 8.2, not 9.0".into()),
                "incompatible",
            ),
            (
                EngineError::Damaged("frame 7 of memory".into()),
                "snapshot_damaged",
            ),
            (EngineError::RestoreFailed("no answer".into()), "restore_failed"),
            (EngineError::MemoryInUse { bytes: 1 << 20 }, "memory_in_use"),
        ] {
            let error = ApiError::from(error);
            assert_eq!((error.status(), error.code()), (StatusCode::CONFLICT, code));
            assert_eq!(
                header(error, "x-should-retry").as_deref(),
                Some("false"),
                "{code}"
            );
        }
    }

    #[test]
    fn causes_of_internal_errors_stay_inside() {
        let io = std::io::Error::other("secret path");
        let error = ApiError::from(EngineError::Io {
            context: "/var/lib/x".into(),
            source: io,
        });
        assert_eq!(
            (error.status(), error.code()),
            (StatusCode::INTERNAL_SERVER_ERROR, "internal_error")
        );
        assert!(!error.message().contains("secret") && !error.message().contains("/var"));
    }

    #[test]
    fn registries_that_limit_us_are_told_to_clients() {
        let limited = ImageError::RateLimited {
            host: "r.example".into(),
            retry_after: None,
        };
        let error = ApiError::from(EngineError::Image(limited));
        assert_eq!(
            (error.status(), error.code()),
            (StatusCode::TOO_MANY_REQUESTS, "rate_limited")
        );
        assert_eq!(header(error, "retry-after").as_deref(), Some("30"));
    }

    #[test]
    fn quotes_in_messages_stay_valid_json() {
        let body = serde_json::to_string(&ErrorBody::new("x", "a \"quoted\" word")).unwrap();
        assert!(serde_json::from_str::<ErrorBody>(&body).is_ok());
    }
}
