//! The one table of routes: method, path, who may use it, how long it may take, what answers.
//!
//! The router is made from it, the OpenAPI document is completed from it, and tests hold all three together.

use std::time::Duration;

use axum::Router;
use axum::handler::Handler;
use axum::http::{Method, StatusCode, Uri};
use axum::routing::{MethodFilter, MethodRouter, any, on};

use crate::auth::Scope::{
    ImageDelete, ImageRead, ImageWrite, InstanceDelete, InstanceRead, InstanceWrite, ResourceRead,
    SnapshotDelete, SnapshotRead, SnapshotWrite,
};
use crate::error::ApiError;
use crate::handlers::{
    copy, events, exec, images, instances, logs, pagers, resources, schedules, service, snapshots, standby,
    travel, verify,
};
use crate::linger::linger;
use crate::middleware::{Access, Guard, envelope, guard};
use crate::registry;
use crate::state::AppState;

/// Answers from memory or the database.
const QUICK: Option<Duration> = Some(Duration::from_secs(30));
/// Asks a guest, a VMM or a registry.
const SLOW: Option<Duration> = Some(Duration::from_secs(15 * 60));
/// Streams, waits, and what has limits of its own.
const OWN: Option<Duration> = None;

/// One route.
pub struct Route {
    /// Its method; `None` is any.
    pub method: Option<Method>,
    /// Its path as the router and the OpenAPI document write it.
    pub path: &'static str,
    /// Who may use it.
    pub access: Access,
    /// How long its handler may take.
    pub limit: Option<Duration>,
    /// Whether the OpenAPI document has it.
    pub documented: bool,
    handler: MethodRouter<AppState>,
}

fn route<H, T>(
    method: Method,
    path: &'static str,
    access: Access,
    limit: Option<Duration>,
    handler: H,
) -> Route
where
    H: Handler<T, AppState>,
    T: 'static,
{
    let filter = match method {
        Method::POST => MethodFilter::POST,
        Method::PUT => MethodFilter::PUT,
        Method::PATCH => MethodFilter::PATCH,
        Method::DELETE => MethodFilter::DELETE,
        _ => MethodFilter::GET,
    };
    Route {
        method: Some(method),
        path,
        access,
        limit,
        documented: true,
        handler: on(filter, handler),
    }
}

impl Route {
    fn undocumented(mut self) -> Self {
        self.documented = false;
        self
    }

    fn registry(path: &'static str) -> Self {
        Self {
            method: None,
            path,
            access: Access::Registry,
            limit: OWN,
            documented: false,
            handler: any(registry::dispatch),
        }
    }
}

/// All routes.
#[must_use]
#[rustfmt::skip]
pub fn table() -> Vec<Route> {
    use Access::{Public, PublicUnlessLimited, Scoped};
    vec![
        route(Method::GET, "/health", PublicUnlessLimited(ResourceRead), QUICK, service::health),
        route(Method::GET, "/capabilities", Scoped(ResourceRead), SLOW, service::capabilities),
        route(Method::GET, "/resources", Scoped(ResourceRead), QUICK, resources::resources),
        route(Method::GET, "/pagers", Scoped(ResourceRead), QUICK, pagers::list),
        route(Method::GET, "/events", Scoped(InstanceRead), OWN, events::events),
        route(Method::GET, "/spec.json", Public, QUICK, service::spec_json).undocumented(),
        route(Method::GET, "/spec.yaml", Public, QUICK, service::spec_yaml).undocumented(),
        route(Method::GET, "/swagger", Public, QUICK, service::swagger).undocumented(),

        route(Method::GET, "/images", Scoped(ImageRead), QUICK, images::list),
        route(Method::POST, "/images", Scoped(ImageWrite), SLOW, images::create),
        route(Method::GET, "/images/{name}", Scoped(ImageRead), QUICK, images::get),
        route(Method::DELETE, "/images/{name}", Scoped(ImageDelete), SLOW, images::delete),
        route(Method::POST, "/images/{name}/tag", Scoped(ImageWrite), SLOW, images::tag),

        route(Method::GET, "/instances", Scoped(InstanceRead), QUICK, instances::list),
        route(Method::POST, "/instances", Scoped(InstanceWrite), SLOW, instances::create),
        route(Method::GET, "/instances/{id}", Scoped(InstanceRead), QUICK, instances::get),
        route(Method::PATCH, "/instances/{id}", Scoped(InstanceWrite), SLOW, instances::update),
        route(Method::DELETE, "/instances/{id}", Scoped(InstanceDelete), SLOW, instances::delete),
        route(Method::POST, "/instances/{id}/start", Scoped(InstanceWrite), SLOW, instances::start),
        route(Method::POST, "/instances/{id}/stop", Scoped(InstanceWrite), SLOW, instances::stop),
        route(Method::POST, "/instances/{id}/standby", Scoped(InstanceWrite), SLOW, standby::standby),
        route(Method::POST, "/instances/{id}/restore", Scoped(InstanceWrite), SLOW, standby::restore),
        route(Method::POST, "/instances/{id}/fork", Scoped(InstanceWrite), SLOW, standby::fork),
        route(Method::GET, "/instances/{id}/wait", Scoped(InstanceRead), OWN, instances::wait),
        route(Method::GET, "/instances/{id}/logs", Scoped(InstanceRead), OWN, logs::logs),
        route(Method::GET, "/instances/{id}/stats", Scoped(InstanceRead), QUICK, instances::stats),
        route(Method::GET, "/instances/{id}/stat", Scoped(InstanceRead), SLOW, instances::stat),
        route(Method::GET, "/instances/{id}/exec", Scoped(InstanceWrite), OWN, exec::exec).undocumented(),
        route(Method::GET, "/instances/{id}/cp", Scoped(InstanceWrite), OWN, copy::copy).undocumented(),

        route(Method::POST, "/instances/{id}/snapshots", Scoped(SnapshotWrite), SLOW, snapshots::create),
        route(Method::POST, "/instances/{id}/snapshots/{snapshot_id}/restore", Scoped(SnapshotWrite), SLOW, snapshots::restore),
        route(Method::GET, "/instances/{id}/snapshot-schedule", Scoped(SnapshotRead), QUICK, schedules::get),
        route(Method::PUT, "/instances/{id}/snapshot-schedule", Scoped(SnapshotWrite), QUICK, schedules::set),
        route(Method::DELETE, "/instances/{id}/snapshot-schedule", Scoped(SnapshotDelete), QUICK, schedules::delete),
        route(Method::GET, "/snapshots", Scoped(SnapshotRead), QUICK, snapshots::list),
        route(Method::POST, "/snapshots/import", Scoped(SnapshotWrite), OWN, travel::import),
        route(Method::GET, "/snapshots/{id}", Scoped(SnapshotRead), QUICK, snapshots::get),
        route(Method::DELETE, "/snapshots/{id}", Scoped(SnapshotDelete), SLOW, snapshots::delete),
        route(Method::POST, "/snapshots/{id}/fork", Scoped(SnapshotWrite), SLOW, snapshots::fork),
        route(Method::POST, "/snapshots/{id}/verify", Scoped(SnapshotWrite), OWN, verify::verify),
        route(Method::GET, "/snapshots/{id}/export", Scoped(SnapshotWrite), OWN, travel::export),
        route(Method::GET, "/snapshots/{id}/usage", Scoped(SnapshotRead), SLOW, snapshots::usage),

        Route::registry("/v2"),
        Route::registry("/v2/"),
        Route::registry("/v2/{*path}"),
    ]
}

/// The router of the whole API.
pub fn router(state: &AppState) -> Router {
    let mut router = Router::new();
    for route in table() {
        let checks = Guard {
            state: state.clone(),
            access: route.access,
            limit: route.limit,
        };
        let guarded = axum::middleware::from_fn_with_state(checks, guard);
        // The registry takes every method in one handler, which `route_layer` does not reach.
        let handler = match route.method {
            Some(_) => route.handler.route_layer(guarded),
            None => route.handler.layer(guarded),
        };
        router = router.route(route.path, handler);
    }
    router
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(axum::middleware::from_fn(envelope))
        .layer(axum::middleware::from_fn(linger))
        .with_state(state.clone())
}

async fn unknown(method: Method, uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(200).collect();
    ApiError::layer(
        StatusCode::NOT_FOUND,
        format!("there is no endpoint {method} {path}; /swagger lists all"),
    )
}

async fn wrong_method(method: Method) -> ApiError {
    ApiError::layer(
        StatusCode::METHOD_NOT_ALLOWED,
        format!("this endpoint does not answer {method}"),
    )
}
