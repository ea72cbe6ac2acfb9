//! The OpenAPI document: made from the handlers and the wire types, completed from the route table.
//!
//! What every route of a kind can answer is added here once: 400 where a request can be malformed, 401 and 403
//! where a scope is needed, 404 and 409 where an id is resolved, 413 where a body is read, 500 and 503 everywhere.

use bytes::Bytes;
use utoipa::OpenApi;
use utoipa::openapi::path::Operation;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{Components, ContentBuilder, HttpMethod, Ref, RefOr, ResponseBuilder};

use crate::handlers::{
    events, images, instances, logs, pagers, resources, schedules, service, snapshots, standby, travel,
    verify,
};
use crate::middleware::Access;
use crate::routes::{Route, table};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Hypeman",
        description = "Run OCI images as virtual machines.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    servers((url = "http://localhost:4973")),
    paths(
        service::health, service::capabilities, resources::resources, pagers::list, events::events,
        images::list, images::create, images::get, images::delete, images::tag,
        instances::list, instances::create, instances::get, instances::update, instances::delete,
        instances::start, instances::stop, instances::wait, instances::stats, instances::stat,
        standby::standby, standby::restore, standby::fork, logs::logs,
        snapshots::create, snapshots::restore, snapshots::list, snapshots::get, snapshots::delete,
        snapshots::fork, snapshots::usage, verify::verify,
        travel::export, travel::import, schedules::get, schedules::set, schedules::delete,
    ),
    components(schemas(hypeman_api::ErrorBody, hypeman_api::query::LogSource)),
    tags(
        (name = "service", description = "The server itself."),
        (name = "resources", description = "What the host has and what instances take of it."),
        (name = "images", description = "OCI images as root disks."),
        (name = "instances", description = "Virtual machines."),
        (name = "snapshots", description = "Instances as they were at one instant."),
    ),
)]
struct Document;

const BEARER: &str = "bearerAuth";

/// The document in both forms.
#[derive(Debug, Clone)]
pub struct Rendered {
    /// For `/spec.json`.
    pub json: Bytes,
    /// For `/spec.yaml`.
    pub yaml: Bytes,
}

/// The document as served.
///
/// # Errors
/// When it cannot be serialised, which the tests rule out.
pub fn render() -> Result<Rendered, serde_json::Error> {
    let document = document();
    let value = serde_json::to_value(&document)?;
    let mut json = serde_json::to_string_pretty(&value)?;
    json.push('\n');
    let yaml = serde_norway::to_string(&value).map_err(serde::ser::Error::custom)?;
    Ok(Rendered {
        json: json.into(),
        yaml: yaml.into(),
    })
}

/// The document.
#[must_use]
pub fn document() -> utoipa::openapi::OpenApi {
    let mut document = Document::openapi();
    document.info.version = hypeman_api::API_VERSION.to_owned();
    document.info.contact = None;
    let components = document.components.get_or_insert_with(Components::new);
    let mut scheme = Http::new(HttpAuthScheme::Bearer);
    scheme.bearer_format = Some("JWT".to_owned());
    components.add_security_scheme(BEARER, SecurityScheme::Http(scheme));
    for route in table().iter().filter(|route| route.documented) {
        let item = document.paths.paths.get_mut(route.path);
        if let Some(operation) = item.and_then(|item| operation_mut(item, route)) {
            complete(operation, route);
        }
    }
    document
}

fn operation_mut<'a>(item: &'a mut utoipa::openapi::PathItem, route: &Route) -> Option<&'a mut Operation> {
    let method = match route.method.as_ref()?.as_str() {
        "GET" => HttpMethod::Get,
        "POST" => HttpMethod::Post,
        "PATCH" => HttpMethod::Patch,
        "PUT" => HttpMethod::Put,
        "DELETE" => HttpMethod::Delete,
        _ => return None,
    };
    match method {
        HttpMethod::Get => item.get.as_mut(),
        HttpMethod::Post => item.post.as_mut(),
        HttpMethod::Patch => item.patch.as_mut(),
        HttpMethod::Put => item.put.as_mut(),
        _ => item.delete.as_mut(),
    }
}

fn complete(operation: &mut Operation, route: &Route) {
    let has_parameters = operation
        .parameters
        .as_ref()
        .is_some_and(|parameters| !parameters.is_empty());
    let has_body = operation.request_body.is_some();
    if has_parameters || has_body {
        error(
            operation,
            "400",
            "The request breaks the schema, a grammar or a limit.",
        );
    }
    match route.access {
        Access::Scoped(scope) => {
            error(
                operation,
                "401",
                "The token is missing, invalid or of the wrong kind.",
            );
            error(operation, "403", &format!("The token lacks the scope {scope}."));
            operation.security = Some(vec![SecurityRequirement::new(BEARER, Vec::<String>::new())]);
        }
        Access::PublicUnlessLimited(scope) => {
            error(
                operation,
                "403",
                &format!("A limited token lacks the scope {scope}."),
            );
            operation.security = Some(Vec::new());
        }
        Access::Public | Access::Registry => operation.security = Some(Vec::new()),
    }
    if route.path.contains("{id}") {
        error(operation, "404", "There is no such resource.");
        error(
            operation,
            "409",
            "Several resources match, or the state does not allow it.",
        );
    }
    if has_body {
        error(operation, "408", "The body did not arrive in time.");
        error(operation, "413", "The body is too large.");
    }
    error(
        operation,
        "500",
        "Something unexpected; the server log tells more.",
    );
    error(
        operation,
        "503",
        "The server is shutting down, or the request took too long.",
    );
}

/// Adds an error response unless the handler describes its own.
fn error(operation: &mut Operation, status: &str, description: &str) {
    let content = ContentBuilder::new()
        .schema(Some(Ref::from_schema_name("Error")))
        .build();
    let response = ResponseBuilder::new()
        .description(description)
        .content("application/json", content)
        .build();
    operation
        .responses
        .responses
        .entry(status.to_owned())
        .or_insert_with(|| RefOr::T(response));
}
