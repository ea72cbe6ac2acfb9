//! What is asked for about instances: to be made, to be changed, to be started.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Hypervisor, VolumeMount};
use crate::policy::{AutoStandbyPolicy, HealthCheck, RestartPolicy, SnapshotPolicy};

/// Asks for an instance.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CreateInstanceRequest {
    /// Its name: lower-case letters, digits and dashes.
    #[schema(
        pattern = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$",
        min_length = 1,
        max_length = 63,
        example = "web-1"
    )]
    pub name: String,
    /// OCI reference of its image.
    #[schema(min_length = 1, example = "docker.io/library/alpine:latest")]
    pub image: String,
    /// `os/arch[/variant]`; the host's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^[a-z0-9]+/[a-z0-9]+(/[a-z0-9.]+)?$")]
    pub platform: Option<String>,
    /// Memory; 1GB when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "1GB")]
    pub size: Option<String>,
    /// Memory that can be added while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<String>,
    /// Size of the writable layer; 10GB when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "10GB")]
    pub overlay_size: Option<String>,
    /// Virtual CPUs; 2 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub vcpus: Option<i32>,
    /// Limit of its disks, such as `100MB/s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "100MB/s")]
    pub disk_io_bps: Option<String>,
    /// Environment, over the image's.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Credentials that the guest uses without seeing them, by the name of a variable.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub credentials: BTreeMap<String, CredentialPolicy>,
    /// Its network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<CreateInstanceNetwork>,
    /// Host devices by id or name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<String>,
    /// A share of a GPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<CreateInstanceGpu>,
    /// Its data volumes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<VolumeMount>,
    /// Its hypervisor; the server's default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor: Option<Hypervisor>,
    /// How its snapshots are stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_policy: Option<SnapshotPolicy>,
    /// When it goes to standby.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_standby: Option<AutoStandbyPolicy>,
    /// How it is probed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheck>,
    /// When it is started again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart_policy: Option<RestartPolicy>,
    /// Its lifetime as a Go duration; `0s` is unlimited. Not together with `expires_at`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "2h")]
    pub ttl: Option<String>,
    /// When it is deleted. Not together with `ttl`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(format = DateTime)]
    pub expires_at: Option<String>,
    /// Leaves out kernel headers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skip_kernel_headers: Option<bool>,
    /// Leaves out the agent: no exec, copy and stat.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skip_guest_agent: Option<bool>,
    /// Replaces the image's entrypoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the image's arguments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmd: Option<Vec<String>>,
    /// Its tags.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(schema_with = crate::tags::schema)]
    pub tags: BTreeMap<String, String>,
}

/// How a new instance is connected.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CreateInstanceNetwork {
    /// Whether it is; true when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enabled: Option<bool>,
    /// Limit towards the instance, such as `1Gbps` or `125MB/s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_download: Option<String>,
    /// Limit from the instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_upload: Option<String>,
    /// Outbound traffic through the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<EgressPolicy>,
}

/// Outbound traffic through the server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EgressPolicy {
    /// Whether it goes through the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enabled: Option<bool>,
    /// What may go around it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enforcement: Option<EgressEnforcement>,
}

/// What may go around the server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EgressEnforcement {
    /// `all` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<EgressMode>,
}

/// Traffic that must go through the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EgressMode {
    /// All TCP.
    All,
    /// TCP ports 80 and 443.
    HttpHttpsOnly,
}

/// A share of a GPU for a new instance.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CreateInstanceGpu {
    /// Profile of the share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<String>,
}

/// A credential that the guest uses without seeing it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CredentialPolicy {
    /// Where the real value is.
    pub source: CredentialSource,
    /// Where it is put in.
    #[schema(min_items = 1)]
    pub inject: Vec<CredentialInjection>,
}

/// Where the real value of a credential is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CredentialSource {
    /// Key of the request's `env`.
    #[schema(min_length = 1)]
    pub env: String,
}

/// Where a credential is put in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CredentialInjection {
    /// Hosts that get it; all when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<String>,
    /// In what form.
    #[serde(rename = "as")]
    pub form: CredentialForm,
}

/// A header made from a credential.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CredentialForm {
    /// Name of the header.
    #[schema(min_length = 1)]
    pub header: String,
    /// Its value, with `${value}` in it.
    #[schema(min_length = 1)]
    pub format: String,
}

/// Changes an instance; absent parts stay.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct UpdateInstanceRequest {
    /// New values of credentials.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub env: Option<BTreeMap<String, String>>,
    /// When it goes to standby.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_standby: Option<AutoStandbyPolicy>,
    /// How it is probed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheck>,
    /// When it is started again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart_policy: Option<RestartPolicy>,
    /// Its lifetime from now; `0s` is unlimited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<String>,
    /// When it is deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(format = DateTime)]
    pub expires_at: Option<String>,
}

/// Starts an instance; what is given replaces what was stored.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StartInstanceRequest {
    /// Replaces the entrypoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the arguments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmd: Option<Vec<String>>,
}
