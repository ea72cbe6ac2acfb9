//! Small images, made here and pushed over the server's own `/v2`.

use std::fs;
use std::io::Write as _;
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::error::{BenchError, Result};
use crate::http::Connection;
use crate::server::{Server, expect, wait_for_image};

/// Where a static busybox is found.
const BUSYBOX: [&str; 2] = ["/bin/busybox", "/usr/bin/busybox"];
/// Commands that the benches use in a guest.
const COMMANDS: [&str; 8] = ["sh", "sleep", "true", "cat", "echo", "ls", "uname", "poweroff"];

/// `sha256:…` of some bytes.
pub fn digest(bytes: &[u8]) -> String {
    let mut text = String::from("sha256:");
    for byte in Sha256::digest(bytes) {
        text += &format!("{byte:02x}");
    }
    text
}

/// A static busybox of this host.
///
/// # Errors
/// There is none.
pub fn busybox() -> Result<Vec<u8>> {
    let path = BUSYBOX.iter().map(Path::new).find(|path| path.is_file());
    let path =
        path.ok_or_else(|| BenchError::Missing("busybox (package busybox-static) is not installed".into()))?;
    fs::read(path).map_err(|error| BenchError::io("read busybox", error))
}

/// Pushes an image with busybox and returns the name under which instances find it.
///
/// # Errors
/// There is no static busybox here, or the server refuses.
pub fn push_busybox(server: &Server) -> Result<String> {
    let program = busybox()?;
    let layer = busybox_layer(&program).map_err(|error| BenchError::io("make a layer", error))?;
    let mut unpacked = Vec::new();
    std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(layer.as_slice()), &mut unpacked)
        .map_err(|error| BenchError::io("unpack a layer", error))?;

    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": { "Cmd": ["/bin/sleep", "1000000"], "Env": ["PATH=/bin"] },
        "rootfs": { "type": "layers", "diff_ids": [digest(&unpacked)] },
    })
    .to_string();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": digest(config.as_bytes()),
            "size": config.len(),
        },
        "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
            "digest": digest(&layer),
            "size": layer.len(),
        }],
    })
    .to_string();

    let mut api = server.connect()?;
    for blob in [layer.as_slice(), config.as_bytes()] {
        push_blob(&mut api, "bench/busybox", blob)?;
    }
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let answer = api.call(
        "PUT",
        "/v2/bench/busybox/manifests/latest",
        kind,
        manifest.as_bytes(),
    )?;
    expect(&answer, 201, "the push of the manifest")?;
    wait_for_image(&mut api, "bench/busybox:latest")
}

fn push_blob(api: &mut Connection, repository: &str, blob: &[u8]) -> Result<()> {
    let answer = api.call("POST", &format!("/v2/{repository}/blobs/uploads/"), "", &[])?;
    expect(&answer, 202, "the start of an upload")?;
    let location = answer
        .location
        .ok_or_else(|| BenchError::Answer("an upload without a Location".into()))?;
    let place = match location
        .strip_prefix("http://")
        .and_then(|rest| rest.find('/').map(|at| &rest[at..]))
    {
        Some(path) => path.to_owned(),
        None => location,
    };
    let separator = if place.contains('?') { '&' } else { '?' };
    let path = format!("{place}{separator}digest={}", digest(blob));
    let answer = api.call("PUT", &path, "application/octet-stream", blob)?;
    expect(&answer, 201, "the push of a blob")
}

fn busybox_layer(program: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    let header = |kind, mode, size| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size);
        header.set_mtime(1_700_000_000);
        header
    };
    for folder in ["bin", "dev", "etc", "proc", "root", "sys", "tmp"] {
        tar.append_data(
            &mut header(tar::EntryType::Directory, 0o755, 0),
            folder,
            std::io::empty(),
        )?;
    }
    let mut file = header(tar::EntryType::Regular, 0o755, program.len() as u64);
    tar.append_data(&mut file, "bin/busybox", program)?;
    for command in COMMANDS {
        let mut link = header(tar::EntryType::Symlink, 0o777, 0);
        tar.append_link(&mut link, format!("bin/{command}"), "busybox")?;
    }
    let mut gzip = tar.into_inner()?;
    gzip.flush()?;
    gzip.finish()
}
