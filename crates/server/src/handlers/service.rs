//! The server itself: health, capabilities, the API's document and its page.

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{Html, IntoResponse};
use hypeman_api::service as api;
use hypeman_network::Availability;
use hypeman_vmm::{Accelerator, Capabilities};

use crate::state::AppState;

/// Answers as long as the server does.
#[utoipa::path(get, path = "/health", tag = "service", operation_id = "getHealth",
    responses((status = 200, description = "The server answers.", body = api::Health)))]
pub async fn health() -> Json<api::Health> {
    Json(api::Health {
        status: api::HealthStatus::Ok,
    })
}

/// What this server on this host can do, probed now.
#[utoipa::path(get, path = "/capabilities", tag = "service", operation_id = "getCapabilities",
    responses((status = 200, description = "Abilities of server, host and hypervisors.", body = api::Capabilities)))]
pub async fn capabilities(State(state): State<AppState>) -> Json<api::Capabilities> {
    let host = state.engine.capabilities().await;
    let mut runtimes: Vec<api::CapabilitiesRuntime> = host
        .runtimes
        .iter()
        .map(|runtime| self::runtime(runtime.kind, &runtime.capabilities))
        .collect();
    runtimes.sort_by(|a, b| a.name.cmp(&b.name));
    let default = crate::convert::instance::hypervisor_to_api(host.default_runtime)
        .as_str()
        .to_owned();
    let available = runtimes
        .iter()
        .any(|runtime| runtime.name == default && runtime.available);
    let networked = host.network == Availability::Available;
    let default_platform = host.platforms.first().cloned().unwrap_or_default();
    Json(api::Capabilities {
        server: api::CapabilitiesServer {
            version: state.version.to_string(),
            api_version: hypeman_api::API_VERSION.to_owned(),
        },
        host: api::CapabilitiesHost {
            os: std::env::consts::OS.to_owned(),
            arch: hypeman_core::platform::Architecture::host()
                .map_or(
                    std::env::consts::ARCH,
                    hypeman_core::platform::Architecture::as_str,
                )
                .to_owned(),
        },
        default_runtime: api::CapabilitiesDefaultRuntime {
            name: default,
            available,
        },
        runtimes,
        network: api::CapabilitiesNetwork {
            model: api::NetworkModel::Bridge,
            gateway: networked.then(|| host.gateway.to_string()),
            subnet: networked.then_some(host.subnet),
            guest_to_guest: false,
        },
        images: api::CapabilitiesImages {
            platforms: host.platforms,
            default_platform,
        },
        features: ["instances", "images", "exec", "logs"]
            .map(str::to_owned)
            .to_vec(),
    })
}

fn runtime(kind: hypeman_vmm::VmmKind, capabilities: &Capabilities) -> api::CapabilitiesRuntime {
    let name = crate::convert::instance::hypervisor_to_api(kind)
        .as_str()
        .to_owned();
    match capabilities {
        Capabilities::Available {
            version,
            accelerator,
            features,
        } => api::CapabilitiesRuntime {
            name,
            available: true,
            features: features.iter().filter_map(feature_name).collect(),
            unavailable_reason: None,
            version: Some(version.clone()),
            accelerator: Some(
                match accelerator {
                    Accelerator::Kvm => "kvm",
                    Accelerator::Tcg => "tcg",
                }
                .to_owned(),
            ),
        },
        Capabilities::Unavailable { reason } => api::CapabilitiesRuntime {
            name,
            available: false,
            features: Vec::new(),
            unavailable_reason: Some(reason.clone()),
            version: None,
            accelerator: None,
        },
    }
}

fn feature_name(feature: &hypeman_vmm::Feature) -> Option<String> {
    serde_json::to_value(feature).ok()?.as_str().map(str::to_owned)
}

/// `GET /spec.json`
pub async fn spec_json(State(state): State<AppState>) -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, "application/json")],
        state.spec.json.clone(),
    )
}

/// `GET /spec.yaml`
pub async fn spec_yaml(State(state): State<AppState>) -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, "application/vnd.oai.openapi")],
        state.spec.yaml.clone(),
    )
}

/// `GET /swagger`: a page that needs nothing but this server.
pub async fn swagger() -> impl IntoResponse {
    let policy =
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'";
    (
        [(header::CONTENT_SECURITY_POLICY, policy)],
        Html(include_str!("../swagger.html")),
    )
}
