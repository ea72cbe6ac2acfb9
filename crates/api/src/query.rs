//! Query parameters.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::instance::InstanceState;

/// Of `GET /instances`. The `tags[key]=value` filter is read separately.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ListInstancesQuery {
    /// Only instances in this state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(nullable = false)]
    pub state: Option<InstanceState>,
}

/// Of `DELETE /instances/{id}`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct DeleteInstanceQuery {
    /// Whether the guest is asked to shut down first; true when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(nullable = false, default = true)]
    pub graceful_shutdown: Option<bool>,
}

/// Of `GET /instances/{id}/logs`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct LogsQuery {
    /// Lines from the end; 100 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(nullable = false, minimum = 0, default = 100)]
    pub tail: Option<u32>,
    /// Whether new lines follow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(nullable = false, default = false)]
    pub follow: Option<bool>,
    /// Which log; `app` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(nullable = false)]
    pub source: Option<LogSource>,
}

/// Logs of an instance.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogSource {
    /// Console of the guest.
    #[default]
    App,
    /// Output of the VMM.
    Vmm,
    /// What the server did.
    Hypeman,
}

/// Of `GET /instances/{id}/stat`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct StatQuery {
    /// Path in the guest.
    #[param(min_length = 1)]
    pub path: String,
    /// Whether links are followed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(nullable = false, default = false)]
    pub follow_links: Option<bool>,
}

/// Of `GET /instances/{id}/wait`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct WaitQuery {
    /// State to wait for.
    pub state: InstanceState,
    /// Longest wait as a Go duration; 60s when absent, at most 5m.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(nullable = false, example = "60s")]
    pub timeout: Option<String>,
}
