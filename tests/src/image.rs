//! Images made on the spot: layers as tar streams, pushed through the server's registry or written as archives.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use flate2::{Compression, write::GzEncoder};
use reqwest::Method;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{Client, Reply};

/// `sha256:` and the hexadecimal digest.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("sha256:{hex}")
}

/// The two families of media types that registries speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MediaFamily {
    /// Open Container Initiative.
    Oci,
    /// Docker, schema 2.
    Docker,
}

impl MediaFamily {
    fn manifest(self) -> &'static str {
        match self {
            Self::Oci => "application/vnd.oci.image.manifest.v1+json",
            Self::Docker => "application/vnd.docker.distribution.manifest.v2+json",
        }
    }

    fn config(self) -> &'static str {
        match self {
            Self::Oci => "application/vnd.oci.image.config.v1+json",
            Self::Docker => "application/vnd.docker.container.image.v1+json",
        }
    }

    fn layer(self) -> &'static str {
        match self {
            Self::Oci => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Docker => "application/vnd.docker.image.rootfs.diff.tar.gzip",
        }
    }
}

/// One layer in the making.
pub struct LayerBuilder {
    tar: tar::Builder<Vec<u8>>,
}

impl std::fmt::Debug for LayerBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LayerBuilder(..)")
    }
}

impl Default for LayerBuilder {
    fn default() -> Self {
        Self {
            tar: tar::Builder::new(Vec::new()),
        }
    }
}

impl LayerBuilder {
    fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size);
        header.set_mtime(1_700_000_000);
        header.set_uid(0);
        header.set_gid(0);
        header
    }

    /// A regular file.
    #[must_use]
    pub fn file(mut self, path: &str, mode: u32, bytes: &[u8]) -> Self {
        let mut header = Self::header(tar::EntryType::Regular, mode, bytes.len() as u64);
        self.tar
            .append_data(&mut header, path, bytes)
            .expect("file entry");
        self
    }

    /// A directory.
    #[must_use]
    pub fn directory(mut self, path: &str, mode: u32) -> Self {
        let mut header = Self::header(tar::EntryType::Directory, mode, 0);
        self.tar
            .append_data(&mut header, path, std::io::empty())
            .expect("directory entry");
        self
    }

    /// A symbolic link.
    #[must_use]
    pub fn symlink(mut self, path: &str, target: &str) -> Self {
        let mut header = Self::header(tar::EntryType::Symlink, 0o777, 0);
        self.tar
            .append_link(&mut header, path, target)
            .expect("symlink entry");
        self
    }

    /// A hard link.
    #[must_use]
    pub fn hard_link(mut self, path: &str, target: &str) -> Self {
        let mut header = Self::header(tar::EntryType::Link, 0o644, 0);
        self.tar
            .append_link(&mut header, path, target)
            .expect("hard link entry");
        self
    }

    /// An entry whose name and link target are written as they are, however hostile.
    #[must_use]
    pub fn raw(mut self, kind: tar::EntryType, name: &str, target: &str, bytes: &[u8]) -> Self {
        let mut header = Self::header(kind, 0o644, bytes.len() as u64);
        let fields = header.as_mut_bytes();
        fields[..name.len()].copy_from_slice(name.as_bytes());
        fields[157..157 + target.len()].copy_from_slice(target.as_bytes());
        header.set_cksum();
        self.tar.append(&header, bytes).expect("raw entry");
        self
    }

    /// The tar stream.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.tar.into_inner().expect("tar")
    }
}

/// An image in the making.
#[derive(Debug)]
pub struct ImageBuilder {
    layers: Vec<(Vec<u8>, String)>,
    config: Value,
    family: MediaFamily,
}

impl ImageBuilder {
    /// An image without layers.
    #[must_use]
    pub fn empty() -> Self {
        Self {
            layers: Vec::new(),
            config: json!({}),
            family: MediaFamily::Oci,
        }
    }

    /// The host's static busybox with all its applets; runs `sleep` until told otherwise. `None` without one.
    #[must_use]
    pub fn busybox() -> Option<Self> {
        let program = std::fs::read("/bin/busybox").ok()?;
        let names = std::process::Command::new("/bin/busybox")
            .arg("--list")
            .output()
            .ok()?;
        let mut layer = LayerBuilder::default();
        for directory in [
            "bin", "dev", "etc", "proc", "root", "run", "sys", "usr", "usr/bin", "var",
        ] {
            layer = layer.directory(directory, 0o755);
        }
        layer = layer
            .directory("tmp", 0o1777)
            .file("bin/busybox", 0o755, &program)
            .file(
                "etc/passwd",
                0o644,
                b"root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000::/tmp:/bin/sh\n",
            )
            .file("etc/group", 0o644, b"root:x:0:\nalice:x:1000:\n");
        for name in String::from_utf8_lossy(&names.stdout)
            .lines()
            .filter(|name| *name != "busybox")
        {
            layer = layer.symlink(&format!("bin/{name}"), "busybox");
        }
        Some(Self::empty().layer(layer).cmd(&["sleep", "100000"]))
    }

    /// Busybox with its own init as process 1, as an image with systemd has it.
    #[must_use]
    pub fn busybox_init() -> Option<Self> {
        let inittab = b"::sysinit:/bin/sh -c 'echo init is up > /tmp/up'\n::respawn:/bin/sleep 1000\n::shutdown:/bin/sync\n";
        let layer = LayerBuilder::default()
            .directory("sbin", 0o755)
            .symlink("sbin/init", "../bin/busybox")
            .file("etc/inittab", 0o644, inittab);
        Some(Self::busybox()?.layer(layer).cmd(&["/sbin/init"]))
    }

    /// Adds a layer.
    #[must_use]
    pub fn layer(self, layer: LayerBuilder) -> Self {
        self.tar_layer(&layer.finish())
    }

    /// Adds a layer from a tar stream.
    #[must_use]
    pub fn tar_layer(self, tar: &[u8]) -> Self {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(tar).expect("gzip");
        let blob = encoder.finish().expect("gzip");
        self.blob_layer(blob, &sha256(tar))
    }

    /// Adds a layer blob as it is, under the diff id that is claimed for it.
    #[must_use]
    pub fn blob_layer(mut self, blob: Vec<u8>, diff_id: &str) -> Self {
        self.layers.push((blob, diff_id.to_owned()));
        self
    }

    /// Sets a field of the image's configuration, such as `Cmd` or `User`.
    #[must_use]
    pub fn config(mut self, field: &str, value: Value) -> Self {
        self.config[field] = value;
        self
    }

    /// Sets the command.
    #[must_use]
    pub fn cmd(self, words: &[&str]) -> Self {
        self.config("Cmd", json!(words))
    }

    /// Chooses the media types.
    #[must_use]
    pub fn family(mut self, family: MediaFamily) -> Self {
        self.family = family;
        self
    }

    /// Puts it together.
    #[must_use]
    pub fn build(self) -> Image {
        let diff_ids: Vec<&String> = self.layers.iter().map(|(_, diff_id)| diff_id).collect();
        let config = json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "config": self.config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        })
        .to_string()
        .into_bytes();
        let mut blobs = BTreeMap::new();
        let layers: Vec<Value> = self
            .layers
            .into_iter()
            .map(|(blob, _)| {
                let descriptor =
                    json!({"mediaType": self.family.layer(), "digest": sha256(&blob), "size": blob.len()});
                blobs.insert(sha256(&blob), blob);
                descriptor
            })
            .collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": self.family.manifest(),
            "config": {"mediaType": self.family.config(), "digest": sha256(&config), "size": config.len()},
            "layers": layers,
        })
        .to_string()
        .into_bytes();
        blobs.insert(sha256(&config), config);
        Image {
            manifest,
            media_type: self.family.manifest(),
            blobs,
        }
    }
}

/// A complete image.
#[derive(Debug, Clone)]
pub struct Image {
    /// Manifest as it is pushed.
    pub manifest: Vec<u8>,
    /// Media type of the manifest.
    pub media_type: &'static str,
    /// Configuration and layers by digest.
    pub blobs: BTreeMap<String, Vec<u8>>,
}

impl Image {
    /// Digest of the manifest.
    #[must_use]
    pub fn digest(&self) -> String {
        sha256(&self.manifest)
    }

    /// Uploads a blob in one request; the answer of the last step.
    pub async fn push_blob(client: &Client, repository: &str, digest: &str, bytes: &[u8]) -> Reply {
        let start = client
            .post_empty(&format!("/v2/{repository}/blobs/uploads/"))
            .await
            .expect(202);
        let location = start.header("location").to_owned();
        let path = location
            .find("/v2/")
            .map(|at| location[at..].to_owned())
            .expect("Location names the registry");
        let joint = if path.contains('?') { '&' } else { '?' };
        let request = client
            .request(
                Method::PUT,
                &format!("{path}{joint}digest={}", crate::encode(digest)),
            )
            .header("content-type", "application/octet-stream")
            .body(bytes.to_vec());
        client.send(request).await
    }

    /// Uploads the manifest.
    pub async fn push_manifest(&self, client: &Client, repository: &str, reference: &str) -> Reply {
        let request = client
            .request(Method::PUT, &format!("/v2/{repository}/manifests/{reference}"))
            .header("content-type", self.media_type)
            .body(self.manifest.clone());
        client.send(request).await
    }

    /// Pushes everything as `repository:tag`.
    pub async fn push(&self, client: &Client, repository: &str, tag: &str) -> Reply {
        for (digest, bytes) in &self.blobs {
            Self::push_blob(client, repository, digest, bytes)
                .await
                .expect(201);
        }
        self.push_manifest(client, repository, tag).await.expect(201)
    }

    /// Writes an OCI layout directory.
    pub fn write_layout(&self, directory: &Path, tag: &str) {
        let blobs = directory.join("blobs/sha256");
        std::fs::create_dir_all(&blobs).expect("layout");
        for (digest, bytes) in self.blobs.iter().chain([(&self.digest(), &self.manifest)]) {
            std::fs::write(blobs.join(digest.trim_start_matches("sha256:")), bytes).expect("blob");
        }
        let index = json!({"schemaVersion": 2, "manifests": [{
            "mediaType": self.media_type, "digest": self.digest(), "size": self.manifest.len(),
            "annotations": {"org.opencontainers.image.ref.name": tag},
        }]});
        std::fs::write(directory.join("index.json"), index.to_string()).expect("index");
        std::fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("marker");
    }

    /// Writes an OCI archive: the layout as a tar file.
    pub fn write_archive(&self, path: &Path, tag: &str) {
        let layout = tempfile::tempdir().expect("directory");
        self.write_layout(layout.path(), tag);
        let mut tar = tar::Builder::new(std::fs::File::create(path).expect("archive"));
        tar.append_dir_all(".", layout.path()).expect("archive");
        tar.finish().expect("archive");
    }
}
