//! Frames of `GET /instances/{id}/cp` (WebSocket). One connection carries one transfer.
//!
//! ```text
//! to:    client CopyRequest, binary chunks, CopyClientFrame::End     server CopyServerFrame::Result
//! from:  client CopyRequest      server { Header, binary chunks of `size` in all, End } for each entry
//! ```

use serde::{Deserialize, Serialize};

/// Largest binary frame that either side sends.
pub const MAX_CHUNK: usize = 32 * 1024;

/// Which way a copy goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CopyDirection {
    /// Into the guest.
    To,
    /// Out of the guest.
    From,
}

/// The first frame: what to copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyRequest {
    /// Which way.
    pub direction: CopyDirection,
    /// Path in the guest.
    pub guest_path: String,
    /// Into the guest: the entry is a directory.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_dir: bool,
    /// Into the guest: permission bits; 0644 or 0755 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<u32>,
    /// Out of the guest: links are followed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub follow_links: bool,
    /// Into the guest: name of the file when `guest_path` is a directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub src_basename: Option<String>,
    /// Into the guest: owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// Into the guest: group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
    /// Into the guest: make a symbolic link that says this; no bytes follow. An addition to the contract.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_target: Option<String>,
    /// Into the guest: modification time, seconds since 1970; now when absent. An addition to the contract.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtime: Option<i64>,
}

/// A later text frame of the client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum CopyClientFrame {
    /// All bytes were sent.
    End,
}

/// A text frame of the server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum CopyServerFrame {
    /// An entry begins.
    Header(CopyHeader),
    /// The entry is complete.
    End {
        /// It was the last one.
        #[serde(rename = "final")]
        last: bool,
    },
    /// Answer to a copy into the guest.
    Result(CopyResult),
    /// The copy failed.
    Error {
        /// Why.
        message: String,
        /// Where.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        path: Option<String>,
    },
}

/// An entry that is copied out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyHeader {
    /// Relative path that begins with the base name of what was asked for.
    pub path: String,
    /// Permission bits, at most 0777.
    pub mode: u32,
    /// A directory.
    pub is_dir: bool,
    /// A symbolic link.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_symlink: bool,
    /// Target of the link.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub link_target: String,
    /// Bytes that follow.
    pub size: u64,
    /// Seconds since 1970.
    pub mtime: i64,
    /// Owner.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub uid: u32,
    /// Group.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub gid: u32,
}

/// Outcome of a copy into the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyResult {
    /// Whether it is there.
    pub success: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Bytes of the file; left out when there are none.
    #[serde(default, skip_serializing_if = "is_zero_long")]
    pub bytes_written: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(value: &u32) -> bool {
    *value == 0
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero_long(value: &u64) -> bool {
    *value == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_have_the_fields_that_sdks_check() {
        let text = |frame: &CopyServerFrame| serde_json::to_string(frame).unwrap();
        assert_eq!(
            text(&CopyServerFrame::Result(CopyResult {
                success: true,
                error: None,
                bytes_written: 0
            })),
            r#"{"type":"result","success":true}"#
        );
        assert_eq!(
            text(&CopyServerFrame::End { last: true }),
            r#"{"type":"end","final":true}"#
        );
        assert_eq!(
            text(&CopyServerFrame::Header(CopyHeader {
                path: "a/b".into(),
                mode: 0o644,
                size: 3,
                mtime: 9,
                ..CopyHeader::default()
            })),
            r#"{"type":"header","path":"a/b","mode":420,"is_dir":false,"size":3,"mtime":9}"#
        );
        assert_eq!(
            serde_json::from_str::<CopyClientFrame>(r#"{"type":"end"}"#).unwrap(),
            CopyClientFrame::End
        );
        assert!(serde_json::from_str::<CopyRequest>(r#"{"direction":"sideways","guest_path":"/"}"#).is_err());
    }
}
