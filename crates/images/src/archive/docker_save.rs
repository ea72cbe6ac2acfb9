//! `docker save` archives: `manifest.json` names configs and layers by path; digests have to be computed.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;

use serde::Deserialize;
use sha2::Digest as _;

use super::spool::{Compression, sniff};
use super::tarball::Table;
use super::{Archive, ArchivedImage, Place, WHAT, read_bounded};
use crate::digest::Digest;
use crate::error::{ImageError, Result};
use crate::manifest::{Descriptor, ImageConfig, MAX_LAYERS, Manifest, media_type};

/// Most images of one archive.
const MAX_IMAGES: usize = 1024;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Item {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Option<Vec<String>>,
}

/// Finds the images and writes an OCI manifest for each.
pub(super) fn read(archive: &mut Archive, table: &Table) -> Result<()> {
    let tar = match &archive.tar {
        Some(tar) => tar
            .try_clone()
            .map_err(|error| ImageError::io("read an archive", error))?,
        None => return Err(ImageError::document(WHAT, "it is no tar")),
    };
    let list = read_bounded(&table.extent(&tar, "manifest.json")?, WHAT)?;
    let items: Vec<Item> = serde_json::from_slice(&list)
        .map_err(|error| ImageError::document("manifest.json", error.to_string()))?;
    if items.len() > MAX_IMAGES {
        return Err(ImageError::document(WHAT, "it has too many images"));
    }
    // Images of one archive share layers; each is hashed once.
    let mut hashed: HashMap<u64, Descriptor> = HashMap::new();
    for item in items {
        let place = table.extent(&tar, &item.config)?;
        let config = read_bounded(&place, "image config")?;
        let config_blob = Descriptor::of(media_type::OCI_CONFIG, &config);
        archive.blobs.insert(
            config_blob.digest,
            Place::Tar {
                offset: place.offset,
                size: place.size,
            },
        );
        let config = ImageConfig::parse(config)?;

        let paths = item.layers.unwrap_or_default();
        if paths.len() > MAX_LAYERS {
            return Err(ImageError::Unsupported(format!(
                "it has {} layers; the limit is {MAX_LAYERS}",
                paths.len()
            )));
        }
        let mut layers = Vec::with_capacity(paths.len());
        for (position, path) in paths.iter().enumerate() {
            let place = table.extent(&tar, path)?;
            let layer = match hashed.get(&place.offset) {
                Some(layer) => layer.clone(),
                None => hash_layer(&place.file, place.offset, place.size)?,
            };
            hashed.insert(place.offset, layer.clone());
            // An uncompressed layer is its own diff id; a mismatch means that the archive is damaged.
            match config.diff_ids.get(position) {
                Some(expected) if layer.media_type == media_type::OCI_LAYER && *expected != layer.digest => {
                    return Err(ImageError::DigestMismatch {
                        expected: *expected,
                        actual: layer.digest,
                    });
                }
                _ => {}
            }
            archive.blobs.insert(
                layer.digest,
                Place::Tar {
                    offset: place.offset,
                    size: place.size,
                },
            );
            layers.push(layer);
        }
        let manifest = Manifest::assemble(media_type::OCI_MANIFEST, config_blob, layers)?;
        config.check_matches(&manifest)?;
        archive.add_document(&manifest.raw)?;
        let root = Descriptor::of(media_type::OCI_MANIFEST, &manifest.raw);
        archive.images.push(ArchivedImage {
            names: item.repo_tags.unwrap_or_default(),
            root,
        });
    }
    Ok(())
}

fn hash_layer(tar: &File, offset: u64, size: u64) -> Result<Descriptor> {
    let mut hasher = sha2::Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    let mut done = 0;
    let mut kind = media_type::OCI_LAYER;
    while done < size {
        let want = (size - done).min(buffer.len() as u64) as usize;
        tar.read_exact_at(&mut buffer[..want], offset + done)
            .map_err(|error| ImageError::io("read an archive", error))?;
        if done == 0 {
            kind = match sniff(&buffer[..want]) {
                None => media_type::OCI_LAYER,
                Some(Compression::Gzip) => media_type::OCI_LAYER_GZIP,
                Some(Compression::Zstd) => media_type::OCI_LAYER_ZSTD,
            };
        }
        hasher.update(&buffer[..want]);
        done += want as u64;
    }
    Ok(Descriptor::new(kind, Digest::from_hasher(hasher), size))
}
