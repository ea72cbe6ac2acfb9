//! Frames of `GET /instances/{id}/exec` (WebSocket).
//!
//! ```text
//! client: text ExecRequest, then binary stdin and text ExecControl
//! server: binary output (stdout and stderr merged), then text ExecExit as the last frame, then close with ExecEnd
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

/// Why the server closes after the last frame: the code and the reason of its close frame. An addition to the contract:
/// whoever looks no further than at [`ExecExit`] sees a failure with its words in the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExecEnd {
    /// All was said.
    Ordinary,
    /// A snapshot of the instance, or the rotation of its logs, ended the session, and the command with it; the exit code
    /// is 127 and not the command's. Only on hypervisors without the feature `snapshot-keeps-connections`.
    Snapshot,
}

impl ExecEnd {
    /// Code of the close frame, of RFC 6455, 7.4: 1000, or one of those that are left to applications.
    pub fn close_code(self) -> u16 {
        match self {
            Self::Ordinary => 1000,
            Self::Snapshot => 4001,
        }
    }

    /// Reason in the close frame.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Ordinary => "",
            Self::Snapshot => "ended_by_snapshot",
        }
    }

    /// What a close frame with this code says.
    pub fn of_close_code(code: u16) -> Self {
        if code == Self::Snapshot.close_code() {
            Self::Snapshot
        } else {
            Self::Ordinary
        }
    }
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
    fn the_close_frame_tells_why() {
        for end in [ExecEnd::Ordinary, ExecEnd::Snapshot] {
            assert_eq!(ExecEnd::of_close_code(end.close_code()), end);
            // RFC 6455, 5.5: a control frame holds 125 bytes, two of them the code.
            assert!(end.reason().len() <= 123);
        }
        // A server that goes away, and codes that mean something to others.
        for code in [1001, 1006, 1011, 4000, 4002] {
            assert_eq!(ExecEnd::of_close_code(code), ExecEnd::Ordinary);
        }
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
