//! Lists of snapshots as JSON: written in pieces, straight from what the engine holds.
//!
//! A hundred thousand snapshots are tens of megabytes. Nothing is copied into objects of the wire first, and nobody
//! holds the whole text, however slowly a client takes it.
//!
//! Invariant: what is written is what the [`api::Snapshot`] of the same snapshot would be.

use bytes::Bytes;
use hypeman_api::instance::Hypervisor;
use hypeman_api::policy::SnapshotCompressionConfig;
use hypeman_api::snapshot as api;
use hypeman_engine::{CompressionState, ListedSnapshot};
use jiff::Timestamp;
use serde::{Serialize, Serializer};

use super::compression;
use super::instance::hypervisor_to_api;
use super::snapshot::{kind_to_api, signed};

/// Bytes after which a piece ends.
const PIECE: usize = 128 << 10;
/// Room in a piece for the snapshot that ends it; more is made where tags are many.
const LAST: usize = 4 << 10;

/// [`api::Snapshot`] without owning anything. The fields are in its order.
#[derive(Debug, Serialize)]
struct Written<'a> {
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    kind: api::SnapshotKind,
    #[serde(skip_serializing_if = "Tags::is_empty")]
    tags: Tags<'a>,
    source_instance_id: &'a str,
    source_instance_name: &'a str,
    source_hypervisor: Hypervisor,
    created_at: Timestamp,
    size_bytes: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    compression: Option<SnapshotCompressionConfig>,
    #[serde(skip_serializing_if = "Option::is_none")]
    compression_state: Option<api::SnapshotCompressionState>,
    #[serde(skip_serializing_if = "Option::is_none")]
    compression_error: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    compressed_size_bytes: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    uncompressed_size_bytes: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<&'a str>,
}

#[derive(Debug, Clone, Copy)]
struct Tags<'a>(&'a [(Box<str>, Box<str>)]);

impl Tags<'_> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Serialize for Tags<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(key, value)| (key, value)))
    }
}

impl<'a> Written<'a> {
    fn new(listed: &'a ListedSnapshot) -> Self {
        let summary = &*listed.summary;
        let memory = summary.memory.as_ref();
        let state = match listed.compression {
            CompressionState::None => api::SnapshotCompressionState::None,
            CompressionState::Compressing => api::SnapshotCompressionState::Compressing,
            CompressionState::Compressed { .. } => api::SnapshotCompressionState::Compressed,
            CompressionState::Error { .. } => api::SnapshotCompressionState::Error,
        };
        Self {
            id: &summary.id,
            name: summary.name.as_deref(),
            kind: kind_to_api(summary.kind),
            tags: Tags(&summary.tags),
            source_instance_id: &summary.source_id,
            source_instance_name: &summary.source_name,
            source_hypervisor: hypervisor_to_api(summary.source_hypervisor),
            created_at: summary.created_at,
            size_bytes: signed(summary.size_bytes),
            compression: memory
                .and_then(|memory| compression::of_memory(memory.compression, &listed.compression)),
            compression_state: memory.map(|_| state),
            compression_error: match &listed.compression {
                CompressionState::Error { reason } => Some(reason),
                _ => None,
            },
            compressed_size_bytes: match listed.compression {
                CompressionState::Compressed { bytes, .. } => Some(signed(bytes)),
                _ => None,
            },
            uncompressed_size_bytes: memory.map(|memory| signed(memory.bytes)),
            parent: summary.parent.as_deref(),
        }
    }
}

/// A list as JSON, in pieces; at least one.
pub fn pieces(snapshots: Vec<ListedSnapshot>) -> impl Iterator<Item = serde_json::Result<Bytes>> + Send {
    let mut left = snapshots.into_iter();
    let mut separator = b'[';
    let mut ended = false;
    std::iter::from_fn(move || {
        if ended {
            return None;
        }
        let mut piece = Vec::with_capacity(PIECE + LAST);
        while piece.len() < PIECE {
            let Some(snapshot) = left.next() else {
                if separator == b'[' {
                    piece.push(separator);
                }
                piece.push(b']');
                ended = true;
                break;
            };
            piece.push(separator);
            separator = b',';
            if let Err(error) = serde_json::to_writer(&mut piece, &Written::new(&snapshot)) {
                ended = true;
                return Some(Err(error));
            }
        }
        Some(Ok(Bytes::from(piece)))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use hypeman_core::snapshot::Algorithm;
    use hypeman_engine::SnapshotSummary;
    use serde_json::{Value, json};

    use super::super::samples::record;
    use super::super::snapshot::to_api;
    use super::*;

    /// A record as the engine lists it, and as it is shown alone.
    fn both(memory: Value, state: CompressionState) -> (ListedSnapshot, api::Snapshot) {
        let mut record = record(memory);
        let listed = ListedSnapshot {
            summary: Arc::new(SnapshotSummary::new(1, &record)),
            compression: state.clone(),
        };
        if let Some(memory) = record.memory.as_mut() {
            memory.state = state;
        }
        (listed, to_api(&record))
    }

    fn text(snapshots: Vec<ListedSnapshot>) -> (String, usize) {
        let pieces: Vec<Bytes> = pieces(snapshots).collect::<Result<_, _>>().unwrap();
        (String::from_utf8(pieces.concat()).unwrap(), pieces.len())
    }

    fn every_state() -> Vec<(ListedSnapshot, api::Snapshot)> {
        let memory = |compression: Value| json!({"image": "m", "bytes": 4096, "compression": compression, "agent_key": ""});
        let on = || memory(json!({"On": {"algorithm": "lz4", "level": 3}}));
        let done = |algorithm| CompressionState::Compressed {
            bytes: 1024,
            algorithm,
        };
        let reason = "no space left on \"device\"".to_owned();
        vec![
            both(Value::Null, CompressionState::None),
            both(memory(json!("Off")), CompressionState::None),
            both(on(), CompressionState::Compressing),
            both(on(), done(Some(Algorithm::Lz4))),
            both(on(), done(Some(Algorithm::Zstd))),
            both(on(), CompressionState::Error { reason }),
        ]
    }

    #[test]
    fn a_list_says_of_each_what_is_said_of_it_alone() {
        let (listed, alone): (Vec<_>, Vec<_>) = every_state().into_iter().unzip();
        assert_eq!(text(listed).0, serde_json::to_string(&alone).unwrap());
        assert_eq!(text(Vec::new()), ("[]".to_owned(), 1));
    }

    #[test]
    fn a_long_list_comes_in_pieces_that_are_one_document() {
        let (listed, alone): (Vec<_>, Vec<_>) = every_state().into_iter().cycle().take(2000).unzip();
        let (text, pieces) = text(listed);
        assert!(pieces > 3, "{pieces} pieces of {} bytes", text.len());
        assert_eq!(text, serde_json::to_string(&alone).unwrap());
    }
}
