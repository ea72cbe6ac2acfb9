//! The server itself: health and capabilities.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The server answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// Always `ok`.
    pub status: HealthStatus,
}

/// The only health that a server can report about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum HealthStatus {
    /// It answers.
    Ok,
}

/// What this server on this host can do, probed when asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Capabilities {
    /// This program.
    pub server: CapabilitiesServer,
    /// The machine that it runs on.
    pub host: CapabilitiesHost,
    /// The hypervisor of instances that do not name one.
    pub default_runtime: CapabilitiesDefaultRuntime,
    /// All hypervisors that this build knows, by name.
    pub runtimes: Vec<CapabilitiesRuntime>,
    /// How guests are connected.
    pub network: CapabilitiesNetwork,
    /// Which images can be run.
    pub images: CapabilitiesImages,
    /// Parts of the API that this server has, whatever the hypervisor.
    pub features: Vec<String>,
}

/// This program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CapabilitiesServer {
    /// Version of the program.
    pub version: String,
    /// Version of the contract.
    pub api_version: String,
}

/// The machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CapabilitiesHost {
    /// Operating system.
    #[schema(example = "linux")]
    pub os: String,
    /// Processor architecture in OCI terms.
    #[schema(example = "amd64")]
    pub arch: String,
}

/// The default hypervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CapabilitiesDefaultRuntime {
    /// Its name.
    pub name: String,
    /// Whether it can start a VM now.
    pub available: bool,
}

/// One hypervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CapabilitiesRuntime {
    /// Its name.
    pub name: String,
    /// Whether it can start a VM now.
    pub available: bool,
    /// What it can do on this host.
    pub features: Vec<String>,
    /// What is missing, and how to get it; only while unavailable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub unavailable_reason: Option<String>,
    /// Version found on this host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub version: Option<String>,
    /// What runs guest code, such as `kvm` or `tcg`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub accelerator: Option<String>,
}

/// How guests are connected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CapabilitiesNetwork {
    /// Kind of connection.
    pub model: NetworkModel,
    /// Address of the host as guests see it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub gateway: Option<String>,
    /// Network of the guests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub subnet: Option<String>,
    /// Whether guests reach each other directly.
    pub guest_to_guest: bool,
}

/// Kinds of connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum NetworkModel {
    /// A Linux bridge with one TAP device a VM.
    Bridge,
    /// Address translation inside the hypervisor.
    Nat,
}

/// Which images can be run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CapabilitiesImages {
    /// All platforms that run here.
    pub platforms: Vec<String>,
    /// The platform of requests that do not name one.
    pub default_platform: String,
}
