//! What happens on the server, as listeners hear it.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// What an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum EventKind {
    /// An instance: its state has changed, `Created` and `Deleted` included.
    Instance,
    /// A snapshot: `Created`, `Deleted`, or the state of its compression.
    Snapshot,
}

/// Something that happened. Events are news; what there is, lists say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Listening again with this goes on after it. Opaque.
    pub cursor: String,
    /// When it happened.
    #[schema(value_type = String, format = DateTime)]
    pub time: Timestamp,
    /// What it is about.
    pub kind: EventKind,
    /// Id of the instance or snapshot.
    pub subject: String,
    /// What became of it.
    #[schema(example = "Running")]
    pub state: String,
}

/// Of `GET /events`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct EventsQuery {
    /// Go on after this event; from now on when absent. A `Last-Event-ID` header comes first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(nullable = false)]
    pub cursor: Option<String>,
}
