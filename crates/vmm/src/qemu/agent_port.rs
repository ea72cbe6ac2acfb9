//! Whether the guest has the agent's port open.
//!
//! The socket on our side stays open when the process in the guest that held the port is gone: only QEMU knows, and
//! tells by an event. It tells at most once a second; what happens faster shows as its outcome.

use serde_json::Value;
use tokio::sync::watch;

use super::arguments::{AGENT_CHARDEV, AGENT_PORT_DEVICE};
use super::qmp::QmpEvent;

/// What QEMU last said; `None` before its first word.
#[derive(Debug)]
pub(super) struct AgentPort(watch::Sender<Option<bool>>);

impl Default for AgentPort {
    fn default() -> Self {
        Self::new()
    }
}

impl AgentPort {
    pub(super) fn new() -> Self {
        Self(watch::channel(None).0)
    }

    /// Each word of QEMU counts as a change, also when it says again what it said last.
    pub(super) fn subscribe(&self) -> watch::Receiver<Option<bool>> {
        self.0.subscribe()
    }

    pub(super) fn note(&self, event: &QmpEvent) {
        if event.name == "VSERPORT_CHANGE" && event.data["id"] == AGENT_PORT_DEVICE {
            self.0.send_replace(event.data["open"].as_bool());
        }
    }

    /// Takes the answer to `query-chardev`, for what happened while nobody listened.
    pub(super) fn learn(&self, answer: &Value) {
        let ours = answer
            .as_array()
            .into_iter()
            .flatten()
            .find(|chardev| chardev["label"] == AGENT_CHARDEV);
        if let Some(open) = ours.and_then(|chardev| chardev["frontend-open"].as_bool()) {
            self.0.send_replace(Some(open));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(id: &str, open: bool) -> QmpEvent {
        QmpEvent {
            name: "VSERPORT_CHANGE".to_owned(),
            data: json!({ "id": id, "open": open }),
        }
    }

    #[test]
    fn only_the_agents_own_port_counts() {
        let port = AgentPort::new();
        let mut said = port.subscribe();
        port.note(&event("log-port", false));
        assert!(!said.has_changed().unwrap());
        port.note(&event("agent-port", true));
        assert_eq!(*said.borrow_and_update(), Some(true));
        port.note(&event("agent-port", false));
        assert_eq!(*said.borrow_and_update(), Some(false));
        port.note(&event("agent-port", false));
        assert!(said.has_changed().unwrap());
    }

    #[test]
    fn what_was_missed_is_learnt_from_the_list_of_devices() {
        let port = AgentPort::new();
        port.learn(&json!([
            { "label": "log", "filename": "file", "frontend-open": true },
            { "label": "agent", "filename": "unix", "frontend-open": false },
        ]));
        assert_eq!(*port.subscribe().borrow(), Some(false));
        port.learn(&json!({}));
        assert_eq!(*port.subscribe().borrow(), Some(false));
    }
}
