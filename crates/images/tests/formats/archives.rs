//! Archives of each kind, made by hand and by skopeo, as sources of a push.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use hypeman_images::manifest::{Document, media_type};
use hypeman_images::{
    Archive, ArchiveOptions, ContentSource as _, Descriptor, Digest, ImageError, Manifest, Platform,
};

fn layer(name: &str) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(5);
    header.set_mode(0o644);
    builder.append_data(&mut header, name, &b"hello"[..]).unwrap();
    builder.into_inner().unwrap()
}

fn config(layers: &[&[u8]]) -> Vec<u8> {
    let diff_ids: Vec<_> = layers.iter().map(|layer| Digest::of(layer)).collect();
    let rootfs = serde_json::json!({"type": "layers", "diff_ids": diff_ids});
    serde_json::to_vec(
        &serde_json::json!({"os": "linux", "architecture": "amd64", "config": {}, "rootfs": rootfs}),
    )
    .unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

struct Tar(tar::Builder<Vec<u8>>);

impl Tar {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn file(mut self, name: &str, bytes: &[u8]) -> Self {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        self.0.append_data(&mut header, name, bytes).unwrap();
        self
    }

    fn link(mut self, name: &str, target: &str) -> Self {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        self.0.append_link(&mut header, name, target).unwrap();
        self
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

async fn open(bytes: &[u8]) -> Result<Archive, ImageError> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    Archive::open(file.path(), &ArchiveOptions::default()).await
}

fn read(archive: &Archive, digest: &Digest) -> Vec<u8> {
    let extent = archive.locate(digest).unwrap();
    let mut bytes = vec![0; extent.size as usize];
    extent.file.read_exact_at(&mut bytes, extent.offset).unwrap();
    bytes
}

/// Reads the manifest and checks that every blob is what its digest says.
fn check(archive: &Archive, root: &Descriptor) -> Manifest {
    let raw = read(archive, &root.digest);
    let manifest = match Document::parse(raw.into(), Some(&root.media_type)).unwrap() {
        Document::Manifest(manifest) => manifest,
        Document::Index(index) => {
            let entry = hypeman_images::manifest::choose(&index, &Platform::linux("amd64")).unwrap();
            return check(archive, entry);
        }
    };
    manifest.check_runnable().unwrap();
    for blob in manifest.layers.iter().chain([&manifest.config]) {
        let bytes = read(archive, &blob.digest);
        assert_eq!((Digest::of(&bytes), bytes.len() as u64), (blob.digest, blob.size));
    }
    manifest
}

fn docker_save() -> (Vec<u8>, Vec<u8>, Vec<u8>) {
    let (first, second) = (layer("a"), layer("b"));
    let list = serde_json::json!([
        {"Config": "config.json", "RepoTags": ["app:1", "other:2"], "Layers": ["one/layer.tar", "two/layer.tar"]},
        {"Config": "third.json", "RepoTags": null, "Layers": ["three/layer.tar"]},
    ]);
    let bytes = Tar::new()
        .file("one/layer.tar", &first)
        .file("./two/layer.tar", &second)
        .link("three/layer.tar", "../one/layer.tar")
        .link("escape", "../../etc/passwd")
        .file("config.json", &config(&[&first, &second]))
        .file("third.json", &config(&[&first]))
        .file("manifest.json", list.to_string().as_bytes())
        .bytes();
    (bytes, first, second)
}

#[tokio::test]
async fn a_docker_save_archive_is_read_in_place_plain_or_compressed_or_streamed() {
    let (plain, first, second) = docker_save();
    let zstd = zstd::encode_all(&plain[..], 1).unwrap();
    let streamed = Archive::read(std::io::Cursor::new(plain.clone()), &ArchiveOptions::default())
        .await
        .unwrap();
    for archive in [
        open(&plain).await.unwrap(),
        open(&gzip(&plain)).await.unwrap(),
        open(&zstd).await.unwrap(),
        streamed,
    ] {
        assert_eq!(archive.images().len(), 2);
        let image = archive.image(Some("docker.io/library/app:1")).unwrap();
        assert_eq!(image.names, ["app:1", "other:2"]);
        let manifest = check(&archive, &image.root);
        assert_eq!(manifest.layers[0].digest, Digest::of(&first));
        assert_eq!(manifest.layers[1].digest, Digest::of(&second));
        assert_eq!(manifest.layers[0].media_type, media_type::OCI_LAYER);
        check(&archive, &archive.images()[1].root);
        let error = archive.image(None).unwrap_err();
        assert!(error.to_string().contains("app:1"), "{error}");
        assert!(archive.image(Some("nope")).is_err());
    }
}

#[tokio::test]
async fn compressed_layers_of_a_docker_save_archive_keep_their_compression() {
    let plain = layer("a");
    let packed = gzip(&plain);
    let list = serde_json::json!([{"Config": "c", "Layers": ["l"]}]);
    let bytes = Tar::new()
        .file("c", &config(&[&plain]))
        .file("l", &packed)
        .file("manifest.json", list.to_string().as_bytes());
    let archive = open(&bytes.bytes()).await.unwrap();
    let manifest = check(&archive, &archive.image(None).unwrap().root);
    assert_eq!(manifest.layers[0].media_type, media_type::OCI_LAYER_GZIP);
    assert_eq!(manifest.layers[0].digest, Digest::of(&packed));
}

#[tokio::test]
async fn broken_archives_are_refused_with_the_reason() {
    let (good, first, _) = docker_save();
    let list = |config: &str, layers: &[&str]| {
        serde_json::json!([{"Config": config, "Layers": layers}])
            .to_string()
            .into_bytes()
    };
    let good_config = config(&[&first]);
    let cases = [
        ("nothing", Vec::new(), "invalid_manifest"),
        (
            "text",
            b"hello, this is not an archive".to_vec(),
            "invalid_manifest",
        ),
        ("zeros", vec![0; 10_240], "invalid_manifest"),
        ("cut off", good[..600].to_vec(), "invalid_manifest"),
        ("cut gzip", gzip(&good)[..200].to_vec(), "invalid_manifest"),
        (
            "no layer",
            Tar::new()
                .file("c", &good_config)
                .file("manifest.json", &list("c", &["l"]))
                .bytes(),
            "not_found",
        ),
        (
            "no config",
            Tar::new()
                .file("l", &first)
                .file("manifest.json", &list("c", &["l"]))
                .bytes(),
            "not_found",
        ),
        (
            "host path",
            Tar::new()
                .file("manifest.json", &list("/etc/passwd", &["/etc/passwd"]))
                .bytes(),
            "not_found",
        ),
        (
            "climbing",
            Tar::new()
                .file("manifest.json", &list("../../etc/passwd", &[]))
                .bytes(),
            "not_found",
        ),
        (
            "link loop",
            Tar::new()
                .link("c", "c")
                .file("manifest.json", &list("c", &[]))
                .bytes(),
            "not_found",
        ),
        (
            "wrong layer",
            Tar::new()
                .file("c", &good_config)
                .file("l", &layer("z"))
                .file("manifest.json", &list("c", &["l"]))
                .bytes(),
            "digest_mismatch",
        ),
        (
            "fewer layers",
            Tar::new()
                .file("c", &good_config)
                .file("manifest.json", &list("c", &[]))
                .bytes(),
            "invalid_manifest",
        ),
        (
            "two of one name",
            Tar::new()
                .file("manifest.json", b"[]")
                .file("manifest.json", b"[ ]")
                .bytes(),
            "invalid_manifest",
        ),
        (
            "no image",
            Tar::new().file("manifest.json", b"[]").bytes(),
            "invalid_manifest",
        ),
        (
            "huge list",
            Tar::new().file("manifest.json", &vec![b' '; 5 << 20]).bytes(),
            "too_large",
        ),
    ];
    for (what, bytes, code) in cases {
        let error = open(&bytes).await.unwrap_err();
        assert_eq!(error.code(), code, "{what}: {error}");
    }
    let missing = Archive::open("/does/not/exist", &ArchiveOptions::default())
        .await
        .unwrap_err();
    assert_eq!(missing.code(), "not_found");
}

#[tokio::test]
async fn a_bomb_is_stopped_at_the_spool_limit() {
    let options = ArchiveOptions {
        max_spooled_bytes: 1 << 20,
        ..ArchiveOptions::default()
    };
    let bomb = gzip(&vec![0; 64 << 20]);
    let error = Archive::read(std::io::Cursor::new(bomb), &options)
        .await
        .unwrap_err();
    assert_eq!(error.code(), "too_large");
}

#[tokio::test]
async fn a_modern_docker_save_whose_index_names_absent_platforms_still_has_its_image() {
    let bytes = layer("a");
    let config = config(&[&bytes]);
    let manifest = Manifest::assemble(
        media_type::OCI_MANIFEST,
        Descriptor::of(media_type::OCI_CONFIG, &config),
        vec![Descriptor::of(media_type::OCI_LAYER, &bytes)],
    )
    .unwrap();
    let platform = |architecture: &str| serde_json::json!({"os": "linux", "architecture": architecture});
    let here = Descriptor::of(media_type::OCI_MANIFEST, &manifest.raw);
    let index = serde_json::json!({"schemaVersion": 2, "mediaType": media_type::OCI_INDEX, "manifests": [
        {"mediaType": here.media_type, "digest": here.digest, "size": here.size, "platform": platform("amd64")},
        {"mediaType": here.media_type, "digest": Digest::of(b"absent"), "size": 6, "platform": platform("arm64")},
    ]});
    let index = index.to_string().into_bytes();
    let top = serde_json::json!({"schemaVersion": 2, "manifests": [{
        "mediaType": media_type::OCI_INDEX, "digest": Digest::of(&index), "size": index.len(),
        "annotations": {"io.containerd.image.name": "docker.io/library/app:1"},
    }]});
    let blob = |bytes: &[u8]| format!("blobs/sha256/{}", Digest::of(bytes).hex());
    let archive = Tar::new()
        .file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)
        .file("index.json", top.to_string().as_bytes())
        .file(&blob(&index), &index)
        .file(&blob(&manifest.raw), &manifest.raw)
        .file(&blob(&config), &config)
        .file(&blob(&bytes), &bytes)
        .bytes();
    let archive = open(&archive).await.unwrap();
    let image = archive.image(Some("app:1")).unwrap();
    assert_eq!(image.root.digest, manifest.digest);
    check(&archive, &image.root);
}

fn skopeo(arguments: &[&str]) -> bool {
    match Command::new("skopeo")
        .arg("--insecure-policy")
        .args(arguments)
        .output()
    {
        Ok(output) if output.status.success() => true,
        Ok(output) => panic!(
            "skopeo {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        ),
        Err(error) => {
            println!("SKIPPED: skopeo cannot be run: {error}");
            false
        }
    }
}

fn write_layout(dir: &Path) {
    let layers = [layer("a"), layer("b")];
    let config = config(&[&layers[0], &layers[1]]);
    let packed: Vec<Vec<u8>> = layers.iter().map(|layer| gzip(layer)).collect();
    let descriptors = packed
        .iter()
        .map(|layer| Descriptor::of(media_type::OCI_LAYER_GZIP, layer))
        .collect();
    let descriptor = Descriptor::of(media_type::OCI_CONFIG, &config);
    let manifest = Manifest::assemble(media_type::OCI_MANIFEST, descriptor, descriptors).unwrap();
    let mut root = Descriptor::of(media_type::OCI_MANIFEST, &manifest.raw);
    root.annotations
        .insert("org.opencontainers.image.ref.name".to_owned(), "v1".to_owned());
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [root]});
    std::fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
    std::fs::write(dir.join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    std::fs::write(dir.join("index.json"), index.to_string()).unwrap();
    for blob in packed.iter().chain([&config, &manifest.raw.to_vec()]) {
        std::fs::write(dir.join("blobs/sha256").join(Digest::of(blob).hex()), blob).unwrap();
    }
}

#[tokio::test]
async fn what_skopeo_writes_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    write_layout(&dir.path().join("layout"));
    let source = format!("oci:{}:v1", at("layout"));
    let options = ArchiveOptions::default();
    let own = Archive::open(dir.path().join("layout"), &options).await.unwrap();
    let original = check(&own, &own.image(Some("v1")).unwrap().root);

    let targets = [
        format!("docker-archive:{}:example.com/app:1", at("docker.tar")),
        format!("oci-archive:{}:v1", at("oci.tar")),
        format!("oci:{}:v1", at("copy")),
    ];
    for target in &targets {
        if !skopeo(&["copy", "-q", &source, target]) {
            return;
        }
    }
    let docker = Archive::open(dir.path().join("docker.tar"), &options)
        .await
        .unwrap();
    let manifest = check(&docker, &docker.image(Some("example.com/app:1")).unwrap().root);
    assert_eq!(manifest.layers[0].digest, Digest::of(&layer("a")));
    for name in ["oci.tar", "copy"] {
        let archive = Archive::open(dir.path().join(name), &options).await.unwrap();
        assert_eq!(
            check(&archive, &archive.image(None).unwrap().root).layers,
            original.layers,
            "{name}"
        );
    }
    // The whole archive packed, as people do by hand.
    let mut plain = Vec::new();
    std::fs::File::open(dir.path().join("oci.tar"))
        .unwrap()
        .read_to_end(&mut plain)
        .unwrap();
    let packed = open(&gzip(&plain)).await.unwrap();
    check(&packed, &packed.image(None).unwrap().root);
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config::with_cases(200))]
    #[test]
    fn no_damage_to_an_archive_makes_the_reader_panic(
        damage in proptest::collection::vec((0..20_000usize, proptest::prelude::any::<u8>()), 1..20),
        cut in 0..20_000usize,
    ) {
        let (mut bytes, _, _) = docker_save();
        for (position, byte) in damage {
            let length = bytes.len();
            bytes[position % length] = byte;
        }
        bytes.truncate(bytes.len().saturating_sub(cut / 4));
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        if let Ok(archive) = runtime.block_on(open(&bytes)) {
            for image in archive.images() {
                let _ = archive.locate(&image.root.digest).unwrap();
            }
        }
    }
}
