//! Images in files: `docker save` archives, OCI archives and OCI layout directories, as sources of blobs.
//!
//! ```text
//!  file ─┬─ tar ───────────────────────► indexed in place ─┬─ oci-layout, index.json ─► OCI
//!        └─ gzip, zstd ─► unnamed spool ──► (a plain tar) ─┘  manifest.json ─────────► docker save
//!  directory ─────────────────────────────────────────────────────────────────────────► OCI
//! ```
//!
//! Invariants:
//! * Nothing is unpacked. A tar is read once for its table of contents; a blob is a range of the file.
//! * Names and links inside an archive are only ever looked up in that table, never on the host.
//! * Memory use does not depend on the size of the archive; documents are bounded.

mod docker_save;
mod oci_layout;
mod spool;
mod tarball;

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use crate::blobs::blocking;
use crate::digest::Digest;
use crate::error::{ImageError, Result};
use crate::manifest::{Descriptor, MAX_DOCUMENT_BYTES};
use crate::reference::Reference;
use crate::registry::{ContentSource, Extent};

const WHAT: &str = "image archive";

/// Where and how much may be spooled.
#[derive(Debug, Clone)]
pub struct ArchiveOptions {
    /// Directory for unnamed temporary files.
    pub spool_dir: PathBuf,
    /// Largest uncompressed archive, in bytes, when it has to be spooled.
    pub max_spooled_bytes: u64,
}

impl Default for ArchiveOptions {
    fn default() -> Self {
        Self {
            spool_dir: std::env::temp_dir(),
            max_spooled_bytes: 256 << 30,
        }
    }
}

/// One image of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchivedImage {
    /// The names that the archive gives it, as written there.
    pub names: Vec<String>,
    /// Its manifest or index.
    pub root: Descriptor,
}

/// An opened archive.
#[derive(Debug)]
pub struct Archive {
    blobs: HashMap<Digest, Place>,
    images: Vec<ArchivedImage>,
    /// The tar, or nothing for a directory.
    tar: Option<File>,
    /// Manifests that we had to write.
    written: File,
}

/// Where a blob is.
#[derive(Debug, Clone)]
enum Place {
    Tar { offset: u64, size: u64 },
    Written { offset: u64, size: u64 },
    File { path: PathBuf },
}

impl Archive {
    /// Opens a file or an OCI layout directory.
    ///
    /// # Errors
    /// [`ImageError::NotFound`], [`ImageError::InvalidDocument`] for what is no image archive or a broken one,
    /// [`ImageError::TooLarge`], [`ImageError::DigestMismatch`], [`ImageError::NoSpace`], [`ImageError::Io`].
    pub async fn open(path: impl Into<PathBuf>, options: &ArchiveOptions) -> Result<Self> {
        let (path, options) = (path.into(), options.clone());
        blocking(move || {
            let failed = |error: io::Error| match error.kind() {
                io::ErrorKind::NotFound => ImageError::NotFound(path.display().to_string()),
                _ => ImageError::io(format!("open {}", path.display()), error),
            };
            let file = File::open(&path).map_err(failed)?;
            let kind = file.metadata().map_err(failed)?.file_type();
            if kind.is_dir() {
                return Self::from_directory(&path, &options);
            }
            if !kind.is_file() {
                return Self::from_stream(Box::new(file), &options);
            }
            match spool::compression_of(&file).map_err(failed)? {
                None => Self::from_tar(file, &options),
                Some(_) => Self::from_stream(Box::new(file), &options),
            }
        })
        .await
    }

    /// Reads an archive from a stream, such as standard input, through an unnamed temporary file.
    ///
    /// # Errors
    /// As [`Archive::open`].
    pub async fn read(stream: impl Read + Send + 'static, options: &ArchiveOptions) -> Result<Self> {
        let options = options.clone();
        blocking(move || Self::from_stream(Box::new(stream), &options)).await
    }

    fn from_stream(stream: Box<dyn Read + Send>, options: &ArchiveOptions) -> Result<Self> {
        Self::from_tar(spool::spool(stream, options)?, options)
    }

    fn empty(tar: Option<File>, options: &ArchiveOptions) -> Result<Self> {
        let written = tempfile::tempfile_in(&options.spool_dir)
            .map_err(|error| ImageError::io("create a temporary file", error))?;
        Ok(Self {
            blobs: HashMap::new(),
            images: Vec::new(),
            tar,
            written,
        })
    }

    fn from_directory(dir: &Path, options: &ArchiveOptions) -> Result<Self> {
        let mut archive = Self::empty(None, options)?;
        oci_layout::read_directory(&mut archive, dir)?;
        archive.checked()
    }

    fn from_tar(file: File, options: &ArchiveOptions) -> Result<Self> {
        let table = tarball::index(&file)?;
        let mut archive = Self::empty(Some(file), options)?;
        let has_docker = table.find("manifest.json").is_some();
        if table.find("index.json").is_some() && table.find("oci-layout").is_some() {
            match oci_layout::read_tar(&mut archive, &table) {
                Ok(()) => return archive.checked(),
                // Recent `docker save` writes both, and its index may name platforms that are not in the archive.
                Err(ImageError::NotFound(_)) if has_docker => archive.images.clear(),
                Err(error) => return Err(error),
            }
        }
        if !has_docker {
            return Err(ImageError::document(
                WHAT,
                "it is neither a docker save nor an OCI archive",
            ));
        }
        docker_save::read(&mut archive, &table)?;
        archive.checked()
    }

    fn checked(self) -> Result<Self> {
        match self.images.is_empty() {
            true => Err(ImageError::document(WHAT, "it has no image")),
            false => Ok(self),
        }
    }

    /// The images, in the archive's order.
    pub fn images(&self) -> &[ArchivedImage] {
        &self.images
    }

    /// The image with a name, or the only image. Names match as written or in normalised form.
    ///
    /// # Errors
    /// [`ImageError::NotFound`] listing the names that there are.
    pub fn image(&self, name: Option<&str>) -> Result<&ArchivedImage> {
        let found = match (name, &self.images[..]) {
            (None, [only]) => Some(only),
            (None, _) => None,
            (Some(name), images) => {
                let normal = Reference::parse(name).ok();
                let matches = |candidate: &String| {
                    candidate == name || (normal.is_some() && Reference::parse(candidate).ok() == normal)
                };
                images.iter().find(|image| image.names.iter().any(matches))
            }
        };
        found.ok_or_else(|| {
            let names: Vec<_> = self
                .images
                .iter()
                .flat_map(|image| image.names.iter())
                .take(32)
                .cloned()
                .collect();
            let wanted = name.unwrap_or("an unnamed single image");
            ImageError::NotFound(format!("{wanted} in the archive (it has: {})", names.join(", ")))
        })
    }

    fn place_of(&self, digest: &Digest) -> io::Result<Extent> {
        let missing = || {
            io::Error::new(
                io::ErrorKind::NotFound,
                format!("blob {digest} is not in the archive"),
            )
        };
        match self.blobs.get(digest).ok_or_else(missing)? {
            Place::File { path } => {
                let file = File::open(path)?;
                let size = file.metadata()?.len();
                Ok(Extent {
                    file,
                    offset: 0,
                    size,
                })
            }
            Place::Tar { offset, size } => {
                let file = self.tar.as_ref().ok_or_else(missing)?.try_clone()?;
                Ok(Extent {
                    file,
                    offset: *offset,
                    size: *size,
                })
            }
            Place::Written { offset, size } => Ok(Extent {
                file: self.written.try_clone()?,
                offset: *offset,
                size: *size,
            }),
        }
    }

    /// Reads a document blob and verifies it.
    fn document(&self, digest: &Digest) -> Result<Bytes> {
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => ImageError::NotFound(format!("blob {digest} in the archive")),
            _ => ImageError::io(format!("read blob {digest}"), error),
        };
        let extent = self.place_of(digest).map_err(failed)?;
        let bytes = read_bounded(&extent, WHAT)?;
        match Digest::of(&bytes) {
            actual if actual == *digest => Ok(bytes),
            actual => Err(ImageError::DigestMismatch {
                expected: *digest,
                actual,
            }),
        }
    }

    /// Adds a document of our own making.
    fn add_document(&mut self, bytes: &[u8]) -> Result<Digest> {
        let digest = Digest::of(bytes);
        let failed = |error| ImageError::io("write a temporary file", error);
        let offset = self.written.metadata().map_err(failed)?.len();
        self.written.write_all(bytes).map_err(failed)?;
        self.blobs.insert(
            digest,
            Place::Written {
                offset,
                size: bytes.len() as u64,
            },
        );
        Ok(digest)
    }
}

/// Reads a range that must be a document, whole.
fn read_bounded(extent: &Extent, what: &'static str) -> Result<Bytes> {
    if extent.size > MAX_DOCUMENT_BYTES {
        return Err(ImageError::TooLarge {
            what: what.to_owned(),
            limit: MAX_DOCUMENT_BYTES,
        });
    }
    let mut bytes = vec![0; extent.size as usize];
    extent
        .file
        .read_exact_at(&mut bytes, extent.offset)
        .map_err(|error| ImageError::io("read an archive", error))?;
    Ok(bytes.into())
}

impl ContentSource for Archive {
    fn locate(&self, digest: &Digest) -> io::Result<Extent> {
        self.place_of(digest)
    }
}
