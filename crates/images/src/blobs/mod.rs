//! The content-addressed store of manifests, configs and layers.
//!
//! ```text
//!  <dir>/blobs/sha256/<hex>   committed blobs; the name is the digest of the bytes, always
//!  <dir>/partial/<hex>        downloads that can be continued: a prefix of the blob, not yet verified
//!  <dir>/uploads/<uuid>       upload sessions of the registry endpoints; survive a restart
//!  <dir>/tmp/<uuid>           everything else under way; emptied when the store opens
//! ```
//!
//! Invariants:
//! * A blob appears by one rename, after its digest matched and its bytes were synced; then its directory is synced.
//! * Each unfinished file is held by an advisory lock while someone writes it, so that a write left behind by a
//!   cancelled task can never mix with its successor's.
//! * A failed write for lack of space removes what it wrote, and no write takes the disk's reserve.

mod sink;
mod upload;
mod writer;

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::{Stream, StreamExt as _};

pub use upload::{ContentRange, UploadId};
pub use writer::BlobWriter;

use crate::digest::Digest;
use crate::error::{ImageError, Result};
use crate::manifest::MAX_DOCUMENT_BYTES;

/// Limits of a [`BlobStore`].
#[derive(Debug, Clone)]
pub struct BlobStoreOptions {
    /// Largest blob, in bytes.
    pub max_blob_bytes: u64,
    /// Most bytes in all unfinished uploads together.
    pub max_pending_upload_bytes: u64,
    /// Most unfinished uploads.
    pub max_uploads: usize,
    /// Unfinished uploads that nothing was added to for so long are removed.
    pub upload_max_age: Duration,
    /// Interrupted downloads older than this are removed when the store opens. Zero removes all.
    pub partial_max_age: Duration,
    /// Bytes of the disk that no blob may take.
    pub reserve_bytes: u64,
}

impl Default for BlobStoreOptions {
    fn default() -> Self {
        Self {
            max_blob_bytes: crate::manifest::MAX_BLOB_BYTES,
            max_pending_upload_bytes: 512 << 30,
            max_uploads: 256,
            upload_max_age: Duration::from_secs(24 * 3600),
            partial_max_age: Duration::from_secs(24 * 3600),
            reserve_bytes: 0,
        }
    }
}

/// A committed blob, as listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobInfo {
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// When it was committed, or found again by [`BlobStore::touch`] and the transfers.
    pub modified: SystemTime,
}

/// The store. Cheap to clone; all clones are one store.
#[derive(Clone)]
pub struct BlobStore {
    shared: Arc<Shared>,
}

struct Shared {
    blobs: PathBuf,
    partial: PathBuf,
    uploads: PathBuf,
    tmp: PathBuf,
    options: BlobStoreOptions,
    transfers: Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
    sessions: Mutex<upload::Sessions>,
}

/// Held while a blob is being fetched, so that two pulls of one blob become one download.
pub struct TransferLock(#[allow(dead_code, reason = "held for its drop")] tokio::sync::OwnedMutexGuard<()>);

impl BlobStore {
    /// Opens a store, creates its directories, and removes what an earlier process left unfinished beyond its age.
    ///
    /// # Errors
    /// [`ImageError::NoSpace`], [`ImageError::Io`].
    pub async fn open(dir: impl Into<PathBuf>, options: BlobStoreOptions) -> Result<Self> {
        let dir = dir.into();
        let shared = Shared {
            blobs: dir.join("blobs/sha256"),
            partial: dir.join("partial"),
            uploads: dir.join("uploads"),
            tmp: dir.join("tmp"),
            options,
            transfers: Mutex::default(),
            sessions: Mutex::default(),
        };
        let store = Self {
            shared: Arc::new(shared),
        };
        let opened = store.clone();
        blocking(move || {
            opened
                .prepare()
                .map_err(|error| ImageError::io("open the blob store", error))
        })
        .await?;
        Ok(store)
    }

    fn prepare(&self) -> io::Result<()> {
        let shared = &self.shared;
        for dir in [&shared.blobs, &shared.partial, &shared.uploads, &shared.tmp] {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        }
        remove_older(&shared.tmp, Duration::ZERO)?;
        remove_older(&shared.partial, shared.options.partial_max_age)?;
        remove_older(&shared.uploads, shared.options.upload_max_age)?;
        let pending = directory_bytes(&shared.uploads)?;
        lock(&shared.sessions).pending_bytes = pending;
        Ok(())
    }

    /// Where a blob is or would be. The path stays valid for as long as the blob is not deleted.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.shared.blobs.join(digest.hex())
    }

    /// The limits that the store was opened with.
    pub fn options(&self) -> &BlobStoreOptions {
        &self.shared.options
    }

    /// The size of a blob in bytes, or `None` when it is not here.
    ///
    /// # Errors
    /// [`ImageError::Io`].
    pub async fn size(&self, digest: &Digest) -> Result<Option<u64>> {
        match tokio::fs::metadata(self.path(digest)).await {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(ImageError::io(format!("look up blob {digest}"), error)),
        }
    }

    /// As [`BlobStore::size`], and marks the blob as just used: a collector that spares young blobs will not take it
    /// from under someone who found it instead of storing it.
    ///
    /// # Errors
    /// [`ImageError::Io`].
    pub async fn touch(&self, digest: &Digest) -> Result<Option<u64>> {
        let (path, digest) = (self.path(digest), *digest);
        blocking(move || {
            let touched = fs::File::open(&path).and_then(|file| {
                file.set_modified(SystemTime::now())?;
                Ok(file.metadata()?.len())
            });
            match touched {
                Ok(size) => Ok(Some(size)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(ImageError::io(format!("look up blob {digest}"), error)),
            }
        })
        .await
    }

    /// Whether a blob is here.
    ///
    /// # Errors
    /// [`ImageError::Io`].
    pub async fn exists(&self, digest: &Digest) -> Result<bool> {
        Ok(self.size(digest).await?.is_some())
    }

    /// Opens a blob for reading; the number is its size in bytes.
    ///
    /// # Errors
    /// [`ImageError::NotFound`], [`ImageError::Io`].
    pub async fn open_blob(&self, digest: &Digest) -> Result<(tokio::fs::File, u64)> {
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => ImageError::NotFound(format!("blob {digest}")),
            _ => ImageError::io(format!("open blob {digest}"), error),
        };
        let file = tokio::fs::File::open(self.path(digest)).await.map_err(failed)?;
        let size = file.metadata().await.map_err(failed)?.len();
        Ok((file, size))
    }

    /// Reads a manifest, index or config whole, and verifies it.
    ///
    /// # Errors
    /// [`ImageError::NotFound`], [`ImageError::TooLarge`], [`ImageError::DigestMismatch`], [`ImageError::Io`].
    pub async fn read_document(&self, digest: &Digest) -> Result<Bytes> {
        let (file, size) = self.open_blob(digest).await?;
        if size > MAX_DOCUMENT_BYTES {
            return Err(ImageError::TooLarge {
                what: format!("document {digest}"),
                limit: MAX_DOCUMENT_BYTES,
            });
        }
        let file = file.into_std().await;
        let expected = *digest;
        blocking(move || {
            let mut bytes = Vec::new();
            file.take(MAX_DOCUMENT_BYTES)
                .read_to_end(&mut bytes)
                .map_err(|error| ImageError::io(format!("read blob {expected}"), error))?;
            match Digest::of(&bytes) {
                actual if actual == expected => Ok(bytes.into()),
                actual => Err(ImageError::DigestMismatch { expected, actual }),
            }
        })
        .await
    }

    /// Stores bytes that are in memory, such as a manifest.
    ///
    /// # Errors
    /// [`ImageError::NoSpace`], [`ImageError::Io`].
    pub async fn put_bytes(&self, bytes: Bytes) -> Result<Digest> {
        let digest = Digest::of(&bytes);
        if self.touch(&digest).await? == Some(bytes.len() as u64) {
            return Ok(digest);
        }
        let mut writer = self.writer().await?;
        writer.write(bytes).await?;
        writer.finish(&digest).await?;
        Ok(digest)
    }

    /// Stores a stream whose digest is known; the answer is its size in bytes. The stream is verified while it is
    /// written; nothing of a stream that does not match remains.
    ///
    /// # Errors
    /// [`ImageError::DigestMismatch`], [`ImageError::SizeMismatch`], [`ImageError::TooLarge`],
    /// [`ImageError::NoSpace`], [`ImageError::Io`].
    pub async fn put_stream<S, E>(&self, stream: S, digest: &Digest, size: Option<u64>) -> Result<u64>
    where
        S: Stream<Item = Result<Bytes, E>>,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let mut writer = self.writer().await?;
        let mut stream = std::pin::pin!(stream);
        let limit = size.unwrap_or(self.shared.options.max_blob_bytes);
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|error| ImageError::io("receive a blob", io::Error::other(error)))?;
            if writer.offset() + chunk.len() as u64 > limit {
                let actual = writer.offset() + chunk.len() as u64;
                return Err(match size {
                    Some(expected) => ImageError::SizeMismatch {
                        what: digest.to_string(),
                        expected,
                        actual,
                    },
                    None => ImageError::TooLarge {
                        what: digest.to_string(),
                        limit,
                    },
                });
            }
            writer.write(chunk).await?;
        }
        let actual = writer.offset();
        if let Some(expected) = size
            && expected != actual
        {
            return Err(ImageError::SizeMismatch {
                what: digest.to_string(),
                expected,
                actual,
            });
        }
        writer.finish(digest).await?;
        Ok(actual)
    }

    /// Removes a blob; `false` when it was not here. Readers that have it open keep it.
    ///
    /// # Errors
    /// [`ImageError::Io`].
    pub async fn delete(&self, digest: &Digest) -> Result<bool> {
        match tokio::fs::remove_file(self.path(digest)).await {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(ImageError::io(format!("delete blob {digest}"), error)),
        }
    }

    /// All committed blobs, in no order.
    ///
    /// # Errors
    /// [`ImageError::Io`].
    pub async fn list(&self) -> Result<Vec<BlobInfo>> {
        let blobs = self.shared.blobs.clone();
        blocking(move || list(&blobs).map_err(|error| ImageError::io("list blobs", error))).await
    }

    /// Removes unfinished uploads that nothing was added to for [`BlobStoreOptions::upload_max_age`], and interrupted
    /// downloads beyond [`BlobStoreOptions::partial_max_age`]. For a periodic task.
    ///
    /// # Errors
    /// [`ImageError::Io`].
    pub async fn sweep(&self) -> Result<()> {
        self.expire_uploads().await?;
        let store = self.clone();
        blocking(move || {
            let age = store
                .shared
                .options
                .partial_max_age
                .max(Duration::from_secs(3600));
            remove_older(&store.shared.partial, age).map_err(|error| ImageError::io("sweep downloads", error))
        })
        .await
    }

    /// Waits until no one else in this process fetches the blob.
    pub async fn lock_transfer(&self, digest: &Digest) -> TransferLock {
        let turn = {
            let mut transfers = lock(&self.shared.transfers);
            transfers.retain(|_, turn| turn.strong_count() > 0);
            match transfers.get(digest).and_then(Weak::upgrade) {
                Some(turn) => turn,
                None => {
                    let turn = Arc::default();
                    transfers.insert(*digest, Arc::downgrade(&turn));
                    turn
                }
            }
        };
        TransferLock(turn.lock_owned().await)
    }
}

/// Runs blocking file work off the async threads.
pub(crate) async fn blocking<T, F>(work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(ImageError::io("blocking file work", io::Error::other(error))),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes renames and removals in a directory durable.
fn sync_directory(dir: &Path) -> io::Result<()> {
    fs::File::open(dir)?.sync_all()
}

/// Opens a file that only this process's user may read.
fn private_options() -> fs::OpenOptions {
    let mut options = fs::OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    options
}

fn list(dir: &Path) -> io::Result<Vec<BlobInfo>> {
    let mut blobs = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let Some(digest) = entry.file_name().to_str().and_then(Digest::from_hex) else {
            continue;
        };
        match entry.metadata() {
            Ok(metadata) if metadata.is_file() => {
                let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                blobs.push(BlobInfo {
                    digest,
                    size: metadata.len(),
                    modified,
                });
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(blobs)
}

fn remove_older(dir: &Path, age: Duration) -> io::Result<()> {
    let now = SystemTime::now();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let modified = entry
            .metadata()
            .and_then(|metadata| metadata.modified())
            .unwrap_or(SystemTime::UNIX_EPOCH);
        if age > Duration::ZERO && now.duration_since(modified).unwrap_or_default() < age {
            continue;
        }
        match fs::remove_file(entry.path()) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn directory_bytes(dir: &Path) -> io::Result<u64> {
    let mut total = 0;
    for entry in fs::read_dir(dir)? {
        total += entry?.metadata().map_or(0, |metadata| metadata.len());
    }
    Ok(total)
}
