//! Writing one blob: buffered, hashed and stored off the async threads, one buffer ahead.
//!
//! While one buffer is being hashed and written, the next is being filled. A writer holds at most two buffers.

use std::io;
use std::path::PathBuf;

use bytes::Bytes;
use tokio::task::JoinHandle;

use super::sink::Sink;
use super::{BlobStore, blocking};
use crate::digest::Digest;
use crate::error::{ImageError, Result};

/// Bytes gathered before they are handed to a blocking thread.
const BUFFER_BYTES: usize = 512 << 10;

/// Writes one blob. Dropping it removes what was written, except for downloads, which can be continued later.
pub struct BlobWriter {
    store: BlobStore,
    path: PathBuf,
    state: State,
    buffer: Vec<u8>,
    /// Bytes accepted, buffered ones included.
    offset: u64,
    keep: bool,
}

enum State {
    Idle(Sink),
    Writing(JoinHandle<(Sink, io::Result<()>)>),
    Gone,
}

impl BlobStore {
    /// Begins a blob whose digest is not known to the store yet.
    ///
    /// # Errors
    /// [`ImageError::NoSpace`], [`ImageError::Io`].
    pub async fn writer(&self) -> Result<BlobWriter> {
        let path = self.shared.tmp.join(super::UploadId::random().to_string());
        let (created, reserve) = (path.clone(), self.shared.options.reserve_bytes);
        let sink = blocking(move || {
            Sink::create(&created, reserve).map_err(|error| ImageError::io("create a blob", error))
        });
        Ok(BlobWriter::new(self.clone(), path, sink.await?, false))
    }

    /// Begins or continues the download of a blob of `size` bytes. The caller holds its
    /// [transfer lock](BlobStore::lock_transfer). [`BlobWriter::offset`] says where to continue.
    ///
    /// # Errors
    /// [`ImageError::NoSpace`] also when the disk evidently cannot hold the rest; [`ImageError::Io`].
    pub async fn download_writer(&self, digest: &Digest, size: u64) -> Result<BlobWriter> {
        let path = self.shared.partial.join(digest.hex());
        let (opened, partial, digest) = (path.clone(), self.shared.partial.clone(), *digest);
        let reserve = self.shared.options.reserve_bytes;
        let sink = blocking(move || {
            let failed = |error| ImageError::io(format!("blob {digest}"), error);
            let sink = Sink::resume(&opened, true, size, reserve).map_err(failed)?;
            let disk = rustix::fs::statvfs(&partial).map_err(|error| failed(error.into()))?;
            let needed = reserve.saturating_add(size - sink.written());
            if disk.f_bavail.saturating_mul(disk.f_frsize) < needed {
                let _ = std::fs::remove_file(&opened);
                return Err(ImageError::NoSpace(format!("blob {digest} of {size} bytes")));
            }
            Ok(sink)
        });
        Ok(BlobWriter::new(self.clone(), path, sink.await?, true))
    }
}

impl BlobWriter {
    pub(super) fn new(store: BlobStore, path: PathBuf, sink: Sink, keep: bool) -> Self {
        let offset = sink.written();
        Self {
            store,
            path,
            state: State::Idle(sink),
            buffer: Vec::new(),
            offset,
            keep,
        }
    }

    /// Bytes accepted so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// [`ImageError::NoSpace`] (everything written is removed), [`ImageError::Io`]. After an error the writer is of
    /// no further use.
    pub async fn write(&mut self, bytes: Bytes) -> Result<()> {
        self.offset += bytes.len() as u64;
        self.buffer.extend_from_slice(&bytes);
        if self.buffer.len() >= BUFFER_BYTES {
            self.hand_over().await?;
        }
        Ok(())
    }

    /// Waits for the buffer under way and starts writing the gathered one.
    async fn hand_over(&mut self) -> Result<()> {
        let mut sink = self.settle().await?;
        let buffer = std::mem::replace(&mut self.buffer, Vec::with_capacity(BUFFER_BYTES * 5 / 4));
        self.state = State::Writing(tokio::task::spawn_blocking(move || {
            let result = sink.write(&buffer);
            (sink, result)
        }));
        Ok(())
    }

    /// Takes the sink, after the write under way.
    async fn settle(&mut self) -> Result<Sink> {
        let outcome = match &mut self.state {
            State::Writing(task) => task.await.map_err(io::Error::other),
            State::Idle(_) | State::Gone => match std::mem::replace(&mut self.state, State::Gone) {
                State::Idle(sink) => Ok((sink, Ok(()))),
                _ => Err(io::Error::other("an earlier write failed")),
            },
        };
        self.state = State::Gone;
        match outcome.and_then(|(sink, result)| result.map(|()| sink)) {
            Ok(sink) => Ok(sink),
            Err(error) => Err(self.fail(error)),
        }
    }

    fn fail(&mut self, error: io::Error) -> ImageError {
        let error = ImageError::io("write a blob", error);
        if matches!(error, ImageError::NoSpace(_)) {
            self.keep = false;
            self.remove();
        }
        error
    }

    fn remove(&self) {
        if let Err(error) = std::fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove an unfinished blob");
        }
    }

    /// Hands all gathered bytes to the file and gives the sink back, for an upload session to keep.
    pub(super) async fn into_sink(mut self) -> Result<Sink> {
        let buffer = std::mem::take(&mut self.buffer);
        let mut sink = self.settle().await?;
        let written = tokio::task::spawn_blocking(move || {
            let result = sink.write(&buffer);
            (sink, result)
        });
        match written
            .await
            .map_err(io::Error::other)
            .and_then(|(sink, result)| result.map(|()| sink))
        {
            Ok(sink) => {
                self.keep = true;
                Ok(sink)
            }
            Err(error) => Err(self.fail(error)),
        }
    }

    /// Starts again from byte 0, for a server that cannot continue.
    ///
    /// # Errors
    /// [`ImageError::Io`].
    pub async fn restart(&mut self) -> Result<()> {
        self.buffer.clear();
        let mut sink = self.settle().await?;
        let restarted = blocking(move || {
            sink.restart()
                .map_err(|error| ImageError::io("restart a blob", error))?;
            Ok(sink)
        });
        self.state = State::Idle(restarted.await?);
        self.offset = 0;
        Ok(())
    }

    /// Verifies the digest and commits the blob. On a mismatch nothing remains.
    ///
    /// # Errors
    /// [`ImageError::DigestMismatch`], [`ImageError::NoSpace`], [`ImageError::Io`].
    pub async fn finish(mut self, expected: &Digest) -> Result<()> {
        let buffer = std::mem::take(&mut self.buffer);
        let mut sink = self.settle().await?;
        let (from, to, expected) = (self.path.clone(), self.store.path(expected), *expected);
        let committed = blocking(move || {
            let failed = |error| ImageError::io(format!("commit blob {expected}"), error);
            sink.write(&buffer).map_err(failed)?;
            match sink.digest() {
                actual if actual != expected => Err(ImageError::DigestMismatch { expected, actual }),
                _ => sink.commit(&from, &to).map_err(failed),
            }
        });
        // Whatever the outcome, nothing under the unfinished name is worth keeping now.
        self.keep = false;
        committed.await
    }

    /// Drops the writer and removes what it wrote, even for a download.
    pub fn discard(mut self) {
        self.keep = false;
    }
}

impl Drop for BlobWriter {
    fn drop(&mut self) {
        if !self.keep {
            self.remove();
        }
    }
}
