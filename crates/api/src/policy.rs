//! Policies that an instance can carry, and their status.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How snapshots of an instance are stored.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotPolicy {
    /// Compression of memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<SnapshotCompressionConfig>,
    /// How long standby memory stays uncompressed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "30s")]
    pub standby_compression_delay: Option<String>,
}

/// Compression of snapshot memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotCompressionConfig {
    /// Whether memory is compressed.
    pub enabled: bool,
    /// With what; zstd when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub algorithm: Option<CompressionAlgorithm>,
    /// zstd 1 to 19, lz4 0 to 9.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 19)]
    pub level: Option<i32>,
}

/// Compression algorithms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum CompressionAlgorithm {
    /// Zstandard.
    Zstd,
    /// LZ4.
    Lz4,
}

/// When an instance without inbound connections goes to standby.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AutoStandbyPolicy {
    /// Whether it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enabled: Option<bool>,
    /// How long no connection must exist.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "10m")]
    pub idle_timeout: Option<String>,
    /// Clients that do not count.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ignore_source_cidrs: Vec<String>,
    /// Ports that do not count.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<i32>)]
    pub ignore_destination_ports: Vec<u16>,
}

/// How an instance's workload is probed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HealthCheck {
    /// Kind of probe.
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<HealthCheckType>,
    /// Time between probes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "10s")]
    pub interval: Option<String>,
    /// Limit of one probe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "2s")]
    pub timeout: Option<String>,
    /// Time after a start in which failures do not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "30s")]
    pub start_period: Option<String>,
    /// Failures in a row that make it unhealthy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub failure_threshold: Option<i32>,
    /// Successes in a row that make it healthy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub success_threshold: Option<i32>,
    /// For type `http`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HealthCheckHttp>,
    /// For type `tcp`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp: Option<HealthCheckTcp>,
    /// For type `exec`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec: Option<HealthCheckExec>,
}

/// Kinds of probe.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum HealthCheckType {
    /// No probe.
    #[default]
    None,
    /// An HTTP GET with an expected status.
    Http,
    /// A TCP connection.
    Tcp,
    /// A command in the guest.
    Exec,
}

/// An HTTP probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HealthCheckHttp {
    /// Port in the guest.
    #[schema(value_type = i32, minimum = 1, maximum = 65535)]
    pub port: u16,
    /// Path; `/` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// `http` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scheme: Option<HealthCheckScheme>,
    /// 200 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 100, maximum = 599)]
    pub expected_status: Option<i32>,
}

/// Schemes of HTTP probes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum HealthCheckScheme {
    /// Plain.
    Http,
    /// TLS.
    Https,
}

/// A TCP probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HealthCheckTcp {
    /// Port in the guest.
    #[schema(value_type = i32, minimum = 1, maximum = 65535)]
    pub port: u16,
}

/// A command as a probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HealthCheckExec {
    /// Program and arguments; exit code 0 is healthy.
    #[schema(min_items = 1)]
    pub command: Vec<String>,
    /// Working directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
}

/// What the probes found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InstanceHealthStatus {
    /// Verdict.
    pub status: HealthState,
    /// Successes in a row.
    pub consecutive_successes: i32,
    /// Failures in a row.
    pub consecutive_failures: i32,
    /// End of the last probe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime, nullable = false)]
    pub last_checked_at: Option<Timestamp>,
    /// End of the last good probe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime, nullable = false)]
    pub last_success_at: Option<Timestamp>,
    /// End of the last bad probe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime, nullable = false)]
    pub last_failure_at: Option<Timestamp>,
    /// What the last bad probe said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub last_error: Option<String>,
}

/// Verdicts of probes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum HealthState {
    Disabled,
    Starting,
    Healthy,
    Unhealthy,
    Unknown,
}

/// When an instance is started again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RestartPolicy {
    /// After which exits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<RestartMode>,
    /// Wait before each attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "5s")]
    pub backoff: Option<String>,
    /// Attempts in a row; 0 is unlimited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0)]
    pub max_attempts: Option<i32>,
    /// Running this long forgets earlier attempts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "10m")]
    pub stable_after: Option<String>,
}

/// Exits that lead to a restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RestartMode {
    /// None.
    Never,
    /// All.
    Always,
    /// Non-zero codes, signals, lack of memory and unknown reasons.
    OnFailure,
}

/// What the restart policy did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RestartStatus {
    /// Attempts in a row.
    pub attempts: i32,
    /// The last attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime, nullable = false)]
    pub last_attempt_at: Option<Timestamp>,
    /// The next attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime, nullable = false)]
    pub next_attempt_at: Option<Timestamp>,
    /// Why there will be none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub blocked_reason: Option<RestartBlock>,
    /// What else than an exit led to the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub last_reason: Option<RestartReason>,
}

/// Why an instance is not started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RestartBlock {
    /// A user stopped it.
    ManualStop,
    /// It failed too often.
    MaxAttemptsExceeded,
}

/// What else than an exit leads to a restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RestartReason {
    /// Its probes failed.
    HealthCheckFailed,
}
