//! Frames of `GET /instances/{id}/exec` (WebSocket).
//!
//! ```text
//! client: text ExecRequest, then binary stdin and text ExecControl
//! server: binary output (stdout and stderr merged), then text ExecExit as the last frame
//! ```

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Largest binary frame that either side sends.
pub const MAX_CHUNK: usize = 32 * 1024;

/// The first frame: what to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    /// Program and arguments; `/bin/sh` when empty.
    #[serde(default)]
    pub command: Vec<String>,
    /// Whether it gets a terminal.
    #[serde(default)]
    pub tty: bool,
    /// Environment, over the agent's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub env: Option<BTreeMap<String, String>>,
    /// Working directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Seconds until it is killed; 0 and absent are never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<u32>,
    /// Seconds that a starting agent is waited for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_for_agent: Option<u32>,
    /// Height of the terminal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<u16>,
    /// Width of the terminal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cols: Option<u16>,
}

/// A later text frame of the client. Exactly one field is set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecControl {
    /// The terminal changed its size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resize: Option<TerminalSize>,
    /// No more input follows. An addition to the contract that clients opt into by sending it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<StdinControl>,
}

/// What happens to the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StdinControl {
    /// It ends.
    Eof,
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Height.
    pub rows: u16,
    /// Width.
    pub cols: u16,
}

/// The server's last frame. Clients accept no other field beside this one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecExit {
    /// How the program ended.
    #[serde(rename = "exitCode")]
    pub exit_code: i32,
}

/// The server's only frame when the first one is no request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRefusal {
    /// Why.
    pub error: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_frame_has_one_key() {
        assert_eq!(
            serde_json::to_string(&ExecExit { exit_code: 7 }).unwrap(),
            r#"{"exitCode":7}"#
        );
    }

    #[test]
    fn requests_of_the_sdk_are_read() {
        let request: ExecRequest = serde_json::from_str(
            r#"{"command":["ls","-l"],"tty":false,"env":{"A":"1"},"cwd":"/tmp","timeout":5}"#,
        )
        .unwrap();
        assert_eq!(request.command, ["ls", "-l"]);
        assert_eq!(request.timeout, Some(5));
        let control: ExecControl = serde_json::from_str(r#"{"resize":{"rows":40,"cols":120}}"#).unwrap();
        assert_eq!(control.resize, Some(TerminalSize { rows: 40, cols: 120 }));
        assert!(serde_json::from_str::<ExecControl>(r#"{"echo":"hello"}"#).is_err());
    }
}
