//! A file tree of the shape of a distribution with an application on top, as an OCI layout with five gzip layers.
//!
//! Many small files, some large ones; half of the bytes compress well and half do not; upper layers replace and
//! remove some of what lower ones brought. The same bytes each time.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read as _, Write};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::error::{BenchError, Result};
use crate::registry::digest;

const LAYERS: usize = 5;
const FILES_PER_FOLDER: usize = 40;

/// The written image.
#[derive(Debug)]
pub struct Layout {
    /// An OCI layout with the tag `bench`.
    pub folder: PathBuf,
    /// Its layers, lowest first.
    pub layers: Vec<PathBuf>,
    /// Entries over all layers.
    pub entries: usize,
}

/// Writes an image of about `bytes` in its layers' files.
///
/// # Errors
/// The disk is full.
pub fn write(folder: &Path, bytes: usize) -> Result<Layout> {
    write_layout(folder, bytes).map_err(|error| BenchError::io("write an image", error))
}

fn write_layout(folder: &Path, bytes: usize) -> io::Result<Layout> {
    let blobs = folder.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let (mut layers, mut descriptors, mut diff_ids, mut entries) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for number in 0..LAYERS {
        let path = blobs.join(format!("layer-{number}"));
        let (diff_id, count) = write_layer(&path, number, bytes / LAYERS, &mut random)?;
        entries += count;
        let (blob, size) = hash(&path)?;
        let named = blobs.join(blob.trim_start_matches("sha256:"));
        fs::rename(&path, &named)?;
        layers.push(named);
        diff_ids.push(diff_id);
        descriptors.push(json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": blob, "size": size,
        }));
    }
    let store = |document: String| -> io::Result<(String, usize)> {
        let name = digest(document.as_bytes());
        fs::write(blobs.join(name.trim_start_matches("sha256:")), &document)?;
        Ok((name, document.len()))
    };
    let (config, size) = store(
        json!({
            "architecture": "amd64", "os": "linux", "config": {},
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        })
        .to_string(),
    )?;
    let (manifest, manifest_size) = store(
        json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": size },
            "layers": descriptors,
        })
        .to_string(),
    )?;
    let index = json!({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": manifest, "size": manifest_size,
            "annotations": { "org.opencontainers.image.ref.name": "bench" },
        }],
    });
    fs::write(folder.join("index.json"), index.to_string())?;
    fs::write(folder.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}")?;
    Ok(Layout {
        folder: folder.to_owned(),
        layers,
        entries,
    })
}

/// Writes one layer; returns the digest of its uncompressed bytes and the number of its entries.
fn write_layer(path: &Path, number: usize, bytes: usize, random: &mut Random) -> io::Result<(String, usize)> {
    let gzip = GzEncoder::new(BufWriter::new(File::create(path)?), Compression::default());
    let mut tar = tar::Builder::new(Hashing {
        inner: gzip,
        hasher: Sha256::new(),
    });
    let (mut written, mut files, mut entries) = (0, 0, 0);
    let mut content = Vec::new();
    while written < bytes {
        let folder = format!("usr/lib/part{number}/group{:04}", files / FILES_PER_FOLDER);
        if files % FILES_PER_FOLDER == 0 {
            add(&mut tar, tar::EntryType::Directory, &folder, &[])?;
            entries += 1;
        }
        // Three quarters of the bytes in large files, nearly all files small: as distributions are.
        let size = match files % 200 {
            0 => 2 << 20,
            n if n % 10 == 0 => 96 << 10,
            _ => 512 + (random.next() as usize & 0x1fff),
        };
        fill(&mut content, size, random);
        // Each tenth file of an upper layer replaces one of the layer below.
        let below = number > 0 && files % 10 == 3;
        let name = if below {
            folder.replace(&format!("part{number}"), &format!("part{}", number - 1))
        } else {
            folder
        };
        add(
            &mut tar,
            tar::EntryType::Regular,
            &format!("{name}/file{files:06}"),
            &content,
        )?;
        if number > 0 && files % 50 == 7 {
            let gone = format!(
                "usr/lib/part{}/group{:04}/.wh.file{files:06}",
                number - 1,
                files / FILES_PER_FOLDER
            );
            add(&mut tar, tar::EntryType::Regular, &gone, &[])?;
            entries += 1;
        }
        written += size;
        files += 1;
        entries += 1;
    }
    let hashing = tar.into_inner()?;
    let mut text = String::from("sha256:");
    for byte in hashing.hasher.finalize() {
        text += &format!("{byte:02x}");
    }
    hashing.inner.finish()?.flush()?;
    Ok((text, entries))
}

fn add(
    tar: &mut tar::Builder<impl Write>,
    kind: tar::EntryType,
    name: &str,
    content: &[u8],
) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(if kind.is_dir() { 0o755 } else { 0o644 });
    header.set_size(content.len() as u64);
    header.set_mtime(1_700_000_000);
    tar.append_data(&mut header, name, content)
}

/// Half noise, half text.
fn fill(content: &mut Vec<u8>, size: usize, random: &mut Random) {
    content.clear();
    while content.len() < size {
        if content.len() & 0x2000 == 0 {
            content.extend(random.next().to_le_bytes());
        } else {
            content.extend(format!("entry {:03} of the table of symbols\n", random.next() % 500).bytes());
        }
    }
    content.truncate(size);
}

fn hash(path: &Path) -> io::Result<(String, u64)> {
    let mut file = File::open(path)?;
    let (mut hasher, mut buffer, mut size) = (Sha256::new(), vec![0; 1 << 20], 0);
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
        size += count as u64;
    }
    let mut text = String::from("sha256:");
    for byte in hasher.finalize() {
        text += &format!("{byte:02x}");
    }
    Ok((text, size))
}

struct Hashing<W> {
    inner: W,
    hasher: Sha256,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Xorshift: fast, and the same bytes each time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_image_comes_out_each_time() {
        let folder = tempfile::tempdir().unwrap();
        let one = write(&folder.path().join("one"), 14 << 20).unwrap();
        let two = write(&folder.path().join("two"), 14 << 20).unwrap();
        assert_eq!(one.layers.len(), LAYERS);
        assert!(one.entries > 100);
        let names = |layout: &Layout| -> Vec<_> {
            layout
                .layers
                .iter()
                .map(|l| l.file_name().unwrap().to_owned())
                .collect()
        };
        assert_eq!(names(&one), names(&two));
    }
}
