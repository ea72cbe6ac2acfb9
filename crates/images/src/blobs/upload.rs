//! Upload sessions: blobs that arrive in chunks over several requests, and over restarts of the server.
//!
//! ```text
//!  start ──► open ──append──► open ──finish(digest)──► blob
//!             │                 └─ mismatch, no space ─► gone
//!             └─ cancel, age ──► gone
//! ```
//!
//! Invariants:
//! * The offset is the length of the session's file; a chunk is taken only when it starts there.
//! * One request at a time writes a session; a second one is refused as busy.
//! * The hash is carried along in memory; after a restart or a broken request it is computed again from the file.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use rand::Rng as _;

use super::sink::Sink;
use super::writer::BlobWriter;
use super::{BlobStore, blocking, lock, remove_older};
use crate::digest::Digest;
use crate::error::{ImageError, Result};

/// Names an upload session: a random UUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct UploadId([u8; 16]);

impl UploadId {
    pub(super) fn random() -> Self {
        let mut bytes: [u8; 16] = rand::rng().random();
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Self(bytes)
    }
}

impl fmt::Display for UploadId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                formatter.write_str("-")?;
            }
            write!(formatter, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl FromStr for UploadId {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self> {
        let unknown = || ImageError::NotFound("upload".to_owned());
        if text.len() != 36 || !text.is_ascii() {
            return Err(unknown());
        }
        let hex: String = text.split('-').collect();
        let number = u128::from_str_radix(&hex, 16).map_err(|_| unknown())?;
        let id = Self(number.to_be_bytes());
        if id.to_string() == text {
            Ok(id)
        } else {
            Err(unknown())
        }
    }
}

/// The `Content-Range` of an upload chunk: first and last byte, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContentRange {
    /// Offset of the chunk's first byte.
    pub start: u64,
    /// Offset of the chunk's last byte.
    pub end: u64,
}

impl FromStr for ContentRange {
    type Err = ImageError;

    /// Reads `start-end` as the registry protocol has it, and `bytes start-end/total` as HTTP has it.
    fn from_str(text: &str) -> Result<Self> {
        let number = |digits: &str| -> Option<u64> {
            let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
            plain.then(|| digits.parse().ok()).flatten()
        };
        let range = text
            .trim()
            .trim_start_matches("bytes")
            .trim_start_matches(['=', ' ']);
        let range = range.split('/').next().unwrap_or_default();
        let parsed = range.split_once('-').and_then(|(start, end)| {
            let (start, end) = (number(start)?, number(end)?);
            (start <= end).then_some(Self { start, end })
        });
        parsed.ok_or_else(|| ImageError::document("Content-Range", "it is not start-end"))
    }
}

#[derive(Default)]
pub(super) struct Sessions {
    open: HashMap<UploadId, Arc<Session>>,
    /// Bytes in all unfinished uploads.
    pub(super) pending_bytes: u64,
}

struct Session {
    /// Bytes accepted; what status requests see while a chunk is arriving.
    offset: AtomicU64,
    /// `None` when the hash state was lost with a broken request and must be computed again.
    sink: tokio::sync::Mutex<Option<Sink>>,
}

impl Session {
    /// The right to write, for one request at a time.
    fn write(&self, id: &UploadId) -> Result<tokio::sync::MutexGuard<'_, Option<Sink>>> {
        let free = self.sink.try_lock();
        free.map_err(|_| ImageError::Busy(format!("upload {id}")))
    }
}

impl BlobStore {
    fn upload_path(&self, id: &UploadId) -> PathBuf {
        self.shared.uploads.join(id.to_string())
    }

    /// Begins an upload.
    ///
    /// # Errors
    /// [`ImageError::Busy`] when there are too many, [`ImageError::NoSpace`], [`ImageError::Io`].
    pub async fn start_upload(&self) -> Result<UploadId> {
        self.expire_uploads().await?;
        let (store, id) = (self.clone(), UploadId::random());
        blocking(move || {
            let failed = |error| ImageError::io("start an upload", error);
            if std::fs::read_dir(&store.shared.uploads).map_err(failed)?.count()
                >= store.shared.options.max_uploads
            {
                return Err(ImageError::Busy(
                    "the upload area (too many unfinished uploads)".to_owned(),
                ));
            }
            let sink =
                Sink::create(&store.upload_path(&id), store.shared.options.reserve_bytes).map_err(failed)?;
            let session = Session {
                offset: AtomicU64::new(0),
                sink: tokio::sync::Mutex::new(Some(sink)),
            };
            lock(&store.shared.sessions).open.insert(id, Arc::new(session));
            Ok(id)
        })
        .await
    }

    /// How many bytes of an upload are here.
    ///
    /// # Errors
    /// [`ImageError::NotFound`], [`ImageError::Io`].
    pub async fn upload_offset(&self, id: &UploadId) -> Result<u64> {
        let on_disk = match tokio::fs::metadata(self.upload_path(id)).await {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(not_found(id)),
            Err(error) => return Err(ImageError::io("look up an upload", error)),
        };
        let session = lock(&self.shared.sessions).open.get(id).cloned();
        let Some(session) = session else {
            return Ok(on_disk);
        };
        let Ok(mut slot) = session.sink.try_lock() else {
            return Ok(session.offset.load(Ordering::Relaxed));
        };
        // A request that was cut may still have a write under way: taking the file up again waits for its end, so that
        // the client continues where the file really ends.
        let sink = self.take_sink(id, &mut slot).await?;
        let offset = sink.written();
        session.offset.store(offset, Ordering::Relaxed);
        *slot = Some(sink);
        Ok(offset)
    }

    fn session(&self, id: &UploadId) -> Result<Arc<Session>> {
        let mut sessions = lock(&self.shared.sessions);
        if let Some(session) = sessions.open.get(id) {
            return Ok(session.clone());
        }
        let size = match std::fs::metadata(self.upload_path(id)) {
            Ok(metadata) => metadata.len(),
            Err(_) => return Err(not_found(id)),
        };
        let session = Arc::new(Session {
            offset: AtomicU64::new(size),
            sink: tokio::sync::Mutex::default(),
        });
        sessions.open.insert(*id, session.clone());
        Ok(session)
    }

    async fn take_sink(&self, id: &UploadId, slot: &mut Option<Sink>) -> Result<Sink> {
        if let Some(sink) = slot.take() {
            return Ok(sink);
        }
        let (path, id) = (self.upload_path(id), *id);
        let reserve = self.shared.options.reserve_bytes;
        blocking(move || {
            Sink::resume(&path, false, u64::MAX, reserve).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => not_found(&id),
                _ => ImageError::io("continue an upload", error),
            })
        })
        .await
    }

    /// Appends a chunk; the answer is the new offset. When the request breaks, the bytes that came stay and the client
    /// may continue from [`BlobStore::upload_offset`].
    ///
    /// # Errors
    /// [`ImageError::NotFound`], [`ImageError::Busy`] while another request writes it,
    /// [`ImageError::RangeNotSatisfiable`], [`ImageError::SizeMismatch`] when the chunk is not as long as its range,
    /// [`ImageError::TooLarge`], [`ImageError::NoSpace`] (the upload is gone then), [`ImageError::Io`].
    pub async fn append_upload<S, E>(
        &self,
        id: &UploadId,
        range: Option<ContentRange>,
        chunk: S,
    ) -> Result<u64>
    where
        S: Stream<Item = Result<Bytes, E>>,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let session = self.session(id)?;
        let mut slot = session.write(id)?;
        let sink = self.take_sink(id, &mut slot).await?;
        let start = sink.written();
        session.offset.store(start, Ordering::Relaxed);
        if let Some(range) = range
            && range.start != start
        {
            *slot = Some(sink);
            return Err(ImageError::RangeNotSatisfiable { offset: start });
        }
        let mut writer = BlobWriter::new(self.clone(), self.upload_path(id), sink, true);
        let outcome = self.receive(&session, &mut writer, range, chunk).await;
        if let Err(ImageError::NoSpace(what)) = outcome {
            drop(writer);
            drop(slot);
            self.forget_upload(id).await?;
            return Err(ImageError::NoSpace(what));
        }
        let flushed = writer.into_sink().await;
        match flushed {
            Ok(sink) => {
                session.offset.store(sink.written(), Ordering::Relaxed);
                let offset = sink.written();
                *slot = Some(sink);
                outcome.map(|()| offset)
            }
            Err(error) => {
                drop(slot);
                if matches!(error, ImageError::NoSpace(_)) {
                    self.forget_upload(id).await?;
                }
                Err(error)
            }
        }
    }

    async fn receive<S, E>(
        &self,
        session: &Session,
        writer: &mut BlobWriter,
        range: Option<ContentRange>,
        chunk: S,
    ) -> Result<()>
    where
        S: Stream<Item = Result<Bytes, E>>,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let start = writer.offset();
        let expected = range.map(|range| range.end - range.start + 1);
        let mut chunk = std::pin::pin!(chunk);
        while let Some(bytes) = chunk.next().await {
            let bytes =
                bytes.map_err(|error| ImageError::io("receive an upload", io::Error::other(error)))?;
            let offset = writer.offset() + bytes.len() as u64;
            if let Some(expected) = expected
                && offset - start > expected
            {
                return Err(ImageError::SizeMismatch {
                    what: "chunk".into(),
                    expected,
                    actual: offset - start,
                });
            }
            let limit = self.shared.options.max_blob_bytes;
            if offset > limit {
                return Err(ImageError::TooLarge {
                    what: "upload".to_owned(),
                    limit,
                });
            }
            self.reserve(bytes.len() as u64)?;
            writer.write(bytes).await?;
            session.offset.store(offset, Ordering::Relaxed);
        }
        match (expected, writer.offset() - start) {
            (Some(expected), actual) if actual != expected => Err(ImageError::SizeMismatch {
                what: "chunk".to_owned(),
                expected,
                actual,
            }),
            _ => Ok(()),
        }
    }

    fn reserve(&self, bytes: u64) -> Result<()> {
        let limit = self.shared.options.max_pending_upload_bytes;
        let mut sessions = lock(&self.shared.sessions);
        let pending = sessions.pending_bytes.saturating_add(bytes);
        if pending > limit {
            return Err(ImageError::TooLarge {
                what: "all unfinished uploads together".to_owned(),
                limit,
            });
        }
        sessions.pending_bytes = pending;
        Ok(())
    }

    /// Ends an upload: verifies its digest and makes it a blob; the answer is its size in bytes. On a mismatch the
    /// upload is removed.
    ///
    /// # Errors
    /// [`ImageError::NotFound`], [`ImageError::Busy`], [`ImageError::DigestMismatch`], [`ImageError::NoSpace`],
    /// [`ImageError::Io`].
    pub async fn finish_upload(&self, id: &UploadId, digest: &Digest) -> Result<u64> {
        let session = self.session(id)?;
        let mut slot = session.write(id)?;
        let sink = self.take_sink(id, &mut slot).await?;
        let size = sink.written();
        let outcome = BlobWriter::new(self.clone(), self.upload_path(id), sink, true)
            .finish(digest)
            .await;
        drop(slot);
        self.release(id, size);
        outcome.map(|()| size)
    }

    /// Ends an upload without a blob.
    ///
    /// # Errors
    /// [`ImageError::NotFound`], [`ImageError::Busy`], [`ImageError::Io`].
    pub async fn cancel_upload(&self, id: &UploadId) -> Result<()> {
        let session = self.session(id)?;
        let slot = session.write(id)?;
        drop(slot);
        self.forget_upload(id).await
    }

    async fn forget_upload(&self, id: &UploadId) -> Result<()> {
        let path = self.upload_path(id);
        let size = lock(&self.shared.sessions)
            .open
            .get(id)
            .map(|session| session.offset.load(Ordering::Relaxed));
        let removed = blocking(move || {
            let on_disk = std::fs::metadata(&path).map_or(0, |metadata| metadata.len());
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(ImageError::io("remove an upload", error))
                }
                _ => Ok(on_disk),
            }
        });
        let on_disk = removed.await?;
        self.release(id, size.unwrap_or(on_disk));
        Ok(())
    }

    fn release(&self, id: &UploadId, bytes: u64) {
        let mut sessions = lock(&self.shared.sessions);
        sessions.open.remove(id);
        sessions.pending_bytes = sessions.pending_bytes.saturating_sub(bytes);
    }

    /// Removes sessions that nothing was added to for too long.
    pub(super) async fn expire_uploads(&self) -> Result<()> {
        let store = self.clone();
        blocking(move || {
            let failed = |error| ImageError::io("expire uploads", error);
            let age = store
                .shared
                .options
                .upload_max_age
                .max(std::time::Duration::from_secs(1));
            remove_older(&store.shared.uploads, age).map_err(failed)?;
            let mut sessions = lock(&store.shared.sessions);
            sessions
                .open
                .retain(|id, _| store.shared.uploads.join(id.to_string()).exists());
            if sessions.open.is_empty() {
                sessions.pending_bytes = super::directory_bytes(&store.shared.uploads).map_err(failed)?;
            }
            Ok(())
        })
        .await
    }
}

fn not_found(id: &UploadId) -> ImageError {
    ImageError::NotFound(format!("upload {id}"))
}
