//! OCI layouts: `index.json` names the images, `blobs/sha256/` holds everything.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::path::Path;

use serde::Deserialize;

use super::tarball::Table;
use super::{Archive, ArchivedImage, Place, WHAT, read_bounded};
use crate::digest::Digest;
use crate::error::{ImageError, Result};
use crate::manifest::{Descriptor, Document, Index, media_type};
use crate::registry::Extent;

/// Most images of one archive.
const MAX_IMAGES: usize = 1024;
/// Most blobs that are looked at to see whether an image is complete.
const MAX_VISITS: usize = 65_536;
/// Annotations that name an image, the more telling first.
const NAMES: [&str; 2] = ["io.containerd.image.name", "org.opencontainers.image.ref.name"];

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Marker {
    image_layout_version: String,
}

/// Finds the images of a layout in a tar.
///
/// # Errors
/// [`ImageError::NotFound`] when an image is not complete.
pub(super) fn read_tar(archive: &mut Archive, table: &Table) -> Result<()> {
    let read = |name: &str| {
        let tar = archive
            .tar
            .as_ref()
            .ok_or_else(|| ImageError::document(WHAT, "it is no tar"))?;
        read_bounded(&table.extent(tar, name)?, WHAT)
    };
    check_marker(&read("oci-layout")?)?;
    let index = read("index.json")?;
    for (name, offset, size) in table.files() {
        if let Some(digest) = name.strip_prefix("blobs/sha256/").and_then(Digest::from_hex) {
            archive.blobs.insert(digest, Place::Tar { offset, size });
        }
    }
    add_images(archive, index)
}

/// Finds the images of a layout in a directory.
///
/// # Errors
/// [`ImageError::NotFound`] when an image is not complete.
pub(super) fn read_directory(archive: &mut Archive, dir: &Path) -> Result<()> {
    let read = |name: &str| {
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => ImageError::document(WHAT, format!("the directory has no {name}")),
            _ => ImageError::io(format!("read {name}"), error),
        };
        let file = File::open(dir.join(name)).map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        read_bounded(
            &Extent {
                file,
                offset: 0,
                size,
            },
            WHAT,
        )
    };
    check_marker(&read("oci-layout")?)?;
    let index = read("index.json")?;
    let blobs = dir.join("blobs/sha256");
    let failed = |error| ImageError::io("list the blobs of an OCI layout", error);
    for entry in std::fs::read_dir(&blobs).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if let Some(digest) = entry.file_name().to_str().and_then(Digest::from_hex) {
            archive.blobs.insert(digest, Place::File { path: entry.path() });
        }
    }
    add_images(archive, index)
}

fn check_marker(bytes: &[u8]) -> Result<()> {
    let marker: Marker = serde_json::from_slice(bytes)
        .map_err(|error| ImageError::document("oci-layout", error.to_string()))?;
    match marker.image_layout_version.starts_with("1.") {
        true => Ok(()),
        false => Err(ImageError::document("oci-layout", "its version is not 1")),
    }
}

fn add_images(archive: &mut Archive, index: bytes::Bytes) -> Result<()> {
    let Document::Index(index) = Document::parse(index, Some(media_type::OCI_INDEX))? else {
        return Err(ImageError::document("index.json", "it is not an index"));
    };
    let mut images: Vec<ArchivedImage> = Vec::new();
    for entry in index.manifests.iter().take(MAX_IMAGES) {
        let root = complete_root(archive, entry)?;
        let names = NAMES
            .iter()
            .filter_map(|key| entry.annotations.get(*key).cloned())
            .take(1)
            .collect();
        match images.iter_mut().find(|image| image.root.digest == root.digest) {
            Some(image) => image.names.extend::<Vec<_>>(names),
            None => images.push(ArchivedImage { names, root }),
        }
    }
    archive.images = images;
    Ok(())
}

/// The entry itself when all of it is here; else the one platform of it that is.
fn complete_root(archive: &Archive, entry: &Descriptor) -> Result<Descriptor> {
    let missing = match first_missing(archive, entry)? {
        None => return Ok(entry.clone()),
        Some(missing) => missing,
    };
    let not_found = ImageError::NotFound(format!("blob {missing} in the archive"));
    if !archive.blobs.contains_key(&entry.digest) {
        return Err(not_found);
    }
    let Document::Index(Index { manifests, .. }) =
        Document::parse(archive.document(&entry.digest)?, Some(&entry.media_type))?
    else {
        return Err(not_found);
    };
    let mut complete = Vec::new();
    for child in manifests {
        let is_image = child
            .platform
            .as_ref()
            .is_none_or(|platform| platform.os != "unknown");
        if is_image && first_missing(archive, &child)?.is_none() {
            complete.push(child);
        }
    }
    match complete.len() {
        1 => Ok(complete.remove(0)),
        _ => Err(not_found),
    }
}

/// The first blob under a descriptor that the archive lacks.
fn first_missing(archive: &Archive, root: &Descriptor) -> Result<Option<Digest>> {
    let mut open = vec![root.clone()];
    let mut seen = HashSet::new();
    while let Some(descriptor) = open.pop() {
        if !seen.insert(descriptor.digest) {
            continue;
        }
        if seen.len() > MAX_VISITS {
            return Err(ImageError::document(WHAT, "its images have too many parts"));
        }
        if !archive.blobs.contains_key(&descriptor.digest) {
            return Ok(Some(descriptor.digest));
        }
        let kind = descriptor.media_type.as_str();
        if media_type::is_index(kind) || media_type::is_manifest(kind) {
            let document = Document::parse(archive.document(&descriptor.digest)?, Some(kind))?;
            open.extend(document.references().into_iter().cloned());
        }
    }
    Ok(None)
}
