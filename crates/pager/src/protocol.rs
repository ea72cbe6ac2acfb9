//! What a server and a pager say to each other: one JSON object a line, on a unix socket.
//!
//! ```text
//!  server                                pager
//!  {"id":1,"do":"hello",…}         ──►
//!                                  ◄──   {"id":1,"ok":{"is":"hello",…}}      or {"id":1,"refused":{…}}
//!                                  ◄──   {"event":{…}}                       at any time after
//! ```
//! The versions of both may differ, because a pager outlives the server that started it. `hello` and `drain` mean the
//! same in all of them; everything else only between two with the same [`PROTOCOL`]. Within one protocol, answers only
//! grow by fields that may be absent.

use std::path::PathBuf;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hypeman_snapshots::MemoryId;
use serde::{Deserialize, Serialize};

use crate::cache::CacheStats;
use crate::latency::Latency;

/// Raised whenever an older side would misunderstand.
pub const PROTOCOL: u32 = 1;
/// The longest line, bytes.
pub(crate) const MAX_LINE: usize = 4 << 20;
/// Pages that one machine may have for itself.
pub const MAX_OVERLAY_PAGES: usize = 256;

/// A question of a server.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Call {
    pub(crate) id: u64,
    #[serde(flatten)]
    pub(crate) request: Request,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub(crate) enum Request {
    /// Comes first.
    Hello {
        protocol: u32,
        release: String,
    },
    /// Listen for a VMM.
    Register(Box<Registration>),
    /// The machine is gone, or shall not be served any longer.
    Forget {
        machine: String,
    },
    /// Make the page tables tell which pages the guest gave back; the machine stands still.
    Settle {
        machine: String,
    },
    /// Fill all of the machine's memory and let it go, now.
    Graduate {
        machine: String,
    },
    Stats,
    Health,
    /// Take no more machines; end with the last one.
    Drain,
}

/// An answer or an event.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Line {
    Ok { id: u64, ok: Reply },
    Refused { id: u64, refused: Refused },
    Event { event: Event },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub(crate) enum Reply {
    Hello(Hello),
    Done,
    Stats(Box<Stats>),
    Health(Health),
}

/// Why a question was not answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    /// For programs.
    pub code: RefusedCode,
    /// For people.
    pub message: String,
}

/// Kinds of refusals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusedCode {
    /// The two speak different protocols.
    Protocol,
    /// The request can never succeed.
    Invalid,
    /// There is no such machine.
    NotFound,
    /// There is such a machine already.
    Exists,
    /// It takes no more machines.
    Draining,
    /// The image cannot be read.
    Image,
    /// The image is damaged.
    Damaged,
    /// The host refuses something.
    Host,
    /// A later version says something new.
    #[serde(other)]
    Other,
}

/// Who a pager is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Its protocol.
    pub protocol: u32,
    /// The release that started it.
    pub release: String,
    /// Its process. The kernel would name whoever made the socket, which is the server.
    pub pid: i32,
    /// Whether it takes no more machines.
    pub draining: bool,
    /// Machines that it knows.
    #[serde(default)]
    pub machines: Vec<MachineReport>,
}

/// A machine to serve: its VMM, and nobody else, may connect to `socket`, once, and gets exactly this image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
    /// A name: lower-case letters, digits and dashes.
    pub machine: String,
    /// The directory of the memory store.
    pub store: PathBuf,
    /// The image. The server holds it for as long as the machine is served.
    pub image: MemoryId,
    /// The size of the guest's memory, which must be the image's.
    pub memory_bytes: u64,
    /// Where to listen. The directory exists, and only the server and the VMM can enter it. The VMM runs as the
    /// pager's own user, or as the one to whom a jail has given the socket.
    pub socket: PathBuf,
    /// Pages that this machine has for itself, in place of the image's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub overlay: Vec<OverlayPage>,
    /// Fetch the recorded working set ahead; record one when there is none.
    pub working_set: bool,
}

/// A page of one machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverlayPage {
    /// Where it begins in guest RAM.
    pub offset: u64,
    /// What it holds.
    #[serde(with = "as_text")]
    pub bytes: Vec<u8>,
}

mod as_text {
    use super::*;

    pub(super) fn serialize<S: serde::Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: serde::Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD.decode(text).map_err(serde::de::Error::custom)
    }
}

/// What became of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum MachineState {
    /// Its VMM has not connected yet.
    Waiting,
    /// Its faults are answered.
    Serving,
    /// All of its memory is there; it needs nobody any more.
    Graduated,
    /// A fault stays unanswered for ever: the machine must be killed.
    Failed {
        /// Why, for people.
        reason: String,
        /// Stored bytes are wrong, so trying again cannot help.
        damaged: bool,
    },
    /// The VMM has ended, or the server asked to forget it.
    Gone,
}

/// Numbers of one machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineReport {
    /// Its name.
    pub machine: String,
    /// Its image.
    pub image: MemoryId,
    /// What became of it.
    #[serde(flatten)]
    pub state: MachineState,
    /// Faults that were answered.
    pub faults: u64,
    /// Pages that came with those answers.
    pub faulted_pages: u64,
    /// Pages that were there before anybody asked.
    pub fetched_pages: u64,
    /// The size of its memory, bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// How much of its memory is there, bytes. Nothing is counted any more once it has graduated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub populated_bytes: Option<u64>,
    /// How long answers took; absent before the first fault.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency: Option<Latency>,
    /// Whether its working set is being recorded.
    pub recording: bool,
    /// Chunks of the working set that is fetched ahead.
    pub working_set_chunks: u64,
    /// Where its memory lies in its VMM, once that has said so.
    #[serde(default)]
    pub regions: Vec<MemoryRegion>,
}

/// A part of guest RAM that lies in one piece in the VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRegion {
    /// Where in the VMM.
    pub address: u64,
    /// Where in guest RAM.
    pub offset: u64,
    /// How much.
    pub length: u64,
}

/// Numbers of a pager.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// The pieces of all images.
    pub cache: CacheStats,
    /// All machines that it knows.
    pub machines: Vec<MachineReport>,
}

/// How a pager feels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// How long the oldest unanswered fault of a machine that has not failed has waited, milliseconds.
    pub oldest_fault_ms: u64,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// To which machine.
    pub machine: String,
    /// What became of it.
    #[serde(flatten)]
    pub state: MachineState,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_told_apart() {
        let event = Line::Event {
            event: Event {
                machine: "m".into(),
                state: MachineState::Failed {
                    reason: "r".into(),
                    damaged: true,
                },
            },
        };
        let text = serde_json::to_string(&event).unwrap();
        assert_eq!(
            text,
            r#"{"event":{"machine":"m","state":"failed","reason":"r","damaged":true}}"#
        );
        assert!(matches!(serde_json::from_str(&text).unwrap(), Line::Event { .. }));
        let done = serde_json::from_str(r#"{"id":3,"ok":{"is":"done"}}"#).unwrap();
        assert!(matches!(
            done,
            Line::Ok {
                id: 3,
                ok: Reply::Done
            }
        ));
        let refused = r#"{"id":3,"refused":{"code":"of_tomorrow","message":"no"}}"#;
        let Line::Refused { refused, .. } = serde_json::from_str(refused).unwrap() else {
            panic!("a refusal");
        };
        assert_eq!(refused.code, RefusedCode::Other);
    }

    #[test]
    fn reports_of_other_releases_are_understood() {
        let report = |more: &str| {
            let image = "0".repeat(32);
            let text = format!(
                r#"{{"machine":"m","image":"{image}","state":"serving","faults":3,"faulted_pages":24,"fetched_pages":0,
                    "recording":false,"working_set_chunks":0{more}}}"#
            );
            serde_json::from_str::<MachineReport>(&text).unwrap()
        };
        let old = report("");
        assert_eq!((old.state, old.faults), (MachineState::Serving, 3));
        assert_eq!(
            (old.memory_bytes, old.populated_bytes, old.latency),
            (None, None, None)
        );
        let newer = report(
            r#","populated_bytes":4096,"latency":{"p50_us":7,"p99_us":9,"max_us":9,"p999_us":9},"mood":{"good":true}"#,
        );
        assert_eq!(
            (newer.state, newer.populated_bytes),
            (MachineState::Serving, Some(4096))
        );
        assert_eq!(newer.latency.map(|latency| latency.p99_us), Some(9));
    }

    #[test]
    fn hello_and_drain_stay_as_they_are() {
        let hello: Call =
            serde_json::from_str(r#"{"id":1,"do":"hello","protocol":9,"release":"2.0"}"#).unwrap();
        assert!(matches!(hello.request, Request::Hello { protocol: 9, .. }));
        let drain: Call = serde_json::from_str(r#"{"id":2,"do":"drain"}"#).unwrap();
        assert!(matches!(drain.request, Request::Drain));
    }
}
