//! Manifests, indexes and configs.

use bytes::Bytes;
use hypeman_images::manifest::{self, Document, MAX_DOCUMENT_BYTES, media_type};
use hypeman_images::{Descriptor, Digest, ImageConfig, Manifest, Platform};
use proptest::prelude::*;
use serde_json::{Value, json};

fn descriptor(kind: &str) -> Value {
    json!({"mediaType": kind, "digest": Digest::of(kind.as_bytes()), "size": 7})
}

fn image(kind: &str, config: &str, layers: &[&str]) -> Value {
    let layers: Vec<Value> = layers.iter().map(|layer| descriptor(layer)).collect();
    json!({"schemaVersion": 2, "mediaType": kind, "config": descriptor(config), "layers": layers})
}

fn parse(value: &Value) -> hypeman_images::Result<Document> {
    Document::parse(value.to_string().into(), None)
}

fn runnable(value: &Value) -> hypeman_images::Result<()> {
    match parse(value)? {
        Document::Manifest(manifest) => manifest.check_runnable(),
        Document::Index(_) => panic!("an index"),
    }
}

#[test]
fn both_families_are_runnable() {
    let oci = image(
        media_type::OCI_MANIFEST,
        media_type::OCI_CONFIG,
        &[
            media_type::OCI_LAYER,
            media_type::OCI_LAYER_GZIP,
            media_type::OCI_LAYER_ZSTD,
        ],
    );
    runnable(&oci).unwrap();
    let docker = image(
        media_type::DOCKER_MANIFEST,
        media_type::DOCKER_CONFIG,
        &[media_type::DOCKER_LAYER_GZIP],
    );
    runnable(&docker).unwrap();
    let mut untyped = oci;
    untyped.as_object_mut().unwrap().remove("mediaType");
    runnable(&untyped).unwrap();
}

#[test]
fn what_cannot_be_run_is_refused_with_the_reason() {
    let with_layer = |kind: &str| image(media_type::OCI_MANIFEST, media_type::OCI_CONFIG, &[kind]);
    let mut with_urls = with_layer(media_type::OCI_LAYER);
    with_urls["layers"][0]["urls"] = json!(["https://elsewhere.example/layer"]);
    for (value, word) in [
        (
            with_layer("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"),
            "foreign",
        ),
        (
            with_layer("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"),
            "foreign",
        ),
        (
            with_layer("application/vnd.oci.image.layer.v1.tar+gzip+encrypted"),
            "encrypted",
        ),
        (with_layer("application/x-something"), "unknown media type"),
        (with_urls, "foreign"),
        (
            image(
                media_type::OCI_MANIFEST,
                "application/vnd.cncf.helm.config.v1+json",
                &[],
            ),
            "not a container image",
        ),
        (
            image(
                media_type::OCI_MANIFEST,
                media_type::OCI_CONFIG,
                &[media_type::OCI_LAYER; 128],
            ),
            "128 layers",
        ),
        (
            json!({"schemaVersion": 1, "name": "x", "fsLayers": []}),
            "schema version 1",
        ),
        (json!({"schemaVersion": 2, "fsLayers": []}), "schema version 1"),
    ] {
        let error = runnable(&value).unwrap_err();
        assert_eq!(error.code(), "unsupported_image", "{value}");
        assert!(error.to_string().contains(word), "{error}");
    }
    let signed = "application/vnd.docker.distribution.manifest.v1+prettyjws";
    let error = Document::parse(Bytes::from_static(b"{}"), Some(signed)).unwrap_err();
    assert_eq!(error.code(), "unsupported_image");
}

#[test]
fn ambiguous_and_malformed_documents_are_refused() {
    let good = image(
        media_type::OCI_MANIFEST,
        media_type::OCI_CONFIG,
        &[media_type::OCI_LAYER],
    );
    let mut both = good.clone();
    both["manifests"] = json!([]);
    let mut negative = good.clone();
    negative["layers"][0]["size"] = json!(-1);
    let mut weak = good.clone();
    weak["config"]["digest"] = json!("md5:00");
    let mut lying = good.clone();
    lying["mediaType"] = json!(media_type::OCI_INDEX);
    for value in [
        both,
        negative,
        weak,
        lying,
        json!({}),
        json!([]),
        json!({"schemaVersion": 2}),
        json!(null),
    ] {
        assert_eq!(parse(&value).unwrap_err().code(), "invalid_manifest", "{value}");
    }
    let huge = json!({"schemaVersion": 2, "config": descriptor("x"), "layers": [{"digest": Digest::of(b""), "size": u64::MAX}]});
    assert_eq!(parse(&huge).unwrap_err().code(), "too_large");
    let error = Document::parse(good.to_string().into(), Some(media_type::OCI_INDEX)).unwrap_err();
    assert!(error.to_string().contains("was served as"), "{error}");
    Document::parse(
        good.to_string().into(),
        Some("application/vnd.oci.image.manifest.v1+json; charset=utf-8"),
    )
    .unwrap();
    Document::parse(good.to_string().into(), Some("text/plain")).unwrap();
    let padded = vec![b' '; MAX_DOCUMENT_BYTES as usize + 1];
    assert_eq!(
        Document::parse(padded.into(), None).unwrap_err().code(),
        "too_large"
    );
    let deep = "[".repeat(100_000);
    assert!(Document::parse(deep.into(), None).is_err());
}

#[test]
fn the_platform_is_chosen_sensibly() {
    let entry = |platform: Option<Value>, mark: &str| {
        let mut entry = descriptor(media_type::OCI_MANIFEST);
        entry["digest"] = json!(Digest::of(mark.as_bytes()));
        if let Some(platform) = platform {
            entry["platform"] = platform;
        }
        entry
    };
    let linux = |architecture: &str, variant: Option<&str>| {
        Some(json!({"os": "linux", "architecture": architecture, "variant": variant}))
    };
    let unknown = || Some(json!({"os": "unknown", "architecture": "unknown"}));
    let choose = |entries: &[Value], wanted: &str| {
        let value = json!({"schemaVersion": 2, "mediaType": media_type::DOCKER_LIST, "manifests": entries});
        let Document::Index(index) = parse(&value).unwrap() else {
            panic!("no index")
        };
        manifest::choose(&index, &Platform::parse(wanted).unwrap()).map(|chosen| chosen.digest)
    };
    let all = [
        entry(linux("amd64", Some("v3")), "v3"),
        entry(linux("amd64", None), "amd"),
        entry(linux("arm64", Some("v8")), "arm"),
        entry(linux("amd64", None), "second"),
        entry(unknown(), "attestation"),
    ];
    assert_eq!(choose(&all, "linux/amd64").unwrap(), Digest::of(b"amd"));
    assert_eq!(choose(&all, "linux/arm64").unwrap(), Digest::of(b"arm"));
    assert_eq!(choose(&all, "linux/amd64/v3").unwrap(), Digest::of(b"v3"));
    let error = choose(&all, "linux/s390x").unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("available: linux/amd64/v3, linux/amd64, linux/arm64/v8"),
        "{error}"
    );
    let alone = [entry(None, "alone"), entry(unknown(), "attestation")];
    assert_eq!(choose(&alone, "linux/amd64").unwrap(), Digest::of(b"alone"));
    assert_eq!(
        choose(&[], "linux/amd64").unwrap_err().code(),
        "platform_not_available"
    );
}

#[test]
fn a_config_is_read_with_nulls_and_gaps() {
    let config = json!({
        "architecture": "amd64", "os": "linux", "variant": "",
        "config": {
            "Entrypoint": null, "Cmd": ["sh", "-c", "true"], "Env": ["A=b", "C="], "WorkingDir": "/w", "User": "1:2",
            "StopSignal": "SIGINT", "Labels": {"k": "v"}, "ExposedPorts": {"80/tcp": {}}, "Volumes": {"/data": {}},
            "OnBuild": null, "Healthcheck": {"Test": ["NONE"]}
        },
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(b"x")]},
        "history": [{"created_by": "x"}],
    });
    let config = ImageConfig::parse(config.to_string().into()).unwrap();
    assert!(config.entrypoint.is_empty());
    assert_eq!(config.cmd, ["sh", "-c", "true"]);
    assert_eq!(config.env, ["A=b", "C="]);
    assert_eq!((config.working_dir.as_str(), config.user.as_str()), ("/w", "1:2"));
    assert_eq!(config.stop_signal.as_deref(), Some("SIGINT"));
    assert_eq!(config.labels["k"], "v");
    assert_eq!(
        (config.exposed_ports, config.volumes),
        (vec!["80/tcp".to_owned()], vec!["/data".to_owned()])
    );
    assert_eq!(config.diff_ids, [Digest::of(b"x")]);
    assert_eq!(config.platform, Platform::linux("amd64"));

    let bare = ImageConfig::parse(Bytes::from_static(br#"{"rootfs":{"type":"layers"}}"#)).unwrap();
    bare.check_platform(&Platform::linux("arm64")).unwrap();
    for bad in [
        json!({}),
        json!({"rootfs": {"type": "other"}}),
        json!({"rootfs": {"diff_ids": ["nope"]}}),
        json!({"rootfs": {}, "config": {"Cmd": "text"}}),
        json!({"rootfs": {}, "config": {"Cmd": ["a\u{0}b"]}}),
        json!({"rootfs": {}, "config": {"Env": ["=x"]}}),
    ] {
        assert!(ImageConfig::parse(bad.to_string().into()).is_err(), "{bad}");
    }
}

#[test]
fn conversion_to_oci_keeps_the_blobs() {
    let docker = image(
        media_type::DOCKER_MANIFEST,
        media_type::DOCKER_CONFIG,
        &[media_type::DOCKER_LAYER_GZIP],
    );
    let docker = Manifest::parse(docker.to_string().into(), None).unwrap();
    let oci = docker.to_oci().unwrap();
    assert_eq!(oci.layers[0].media_type, media_type::OCI_LAYER_GZIP);
    assert_eq!(oci.layers[0].digest, docker.layers[0].digest);
    assert_eq!(
        Manifest::parse(oci.raw.clone(), Some(media_type::OCI_MANIFEST)).unwrap(),
        oci
    );
    assert_eq!(oci.to_oci().unwrap(), oci);
}

proptest! {
    #[test]
    fn no_bytes_make_the_parsers_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        let _ = Document::parse(bytes.clone().into(), None);
        let _ = ImageConfig::parse(bytes.into());
    }

    #[test]
    fn no_damage_to_a_good_document_makes_the_parser_panic(
        position in 0..1000usize, byte in any::<u8>(), cut in 0..1000usize,
    ) {
        let good = image(media_type::OCI_MANIFEST, media_type::OCI_CONFIG, &[media_type::OCI_LAYER]);
        let mut bytes = good.to_string().into_bytes();
        let length = bytes.len();
        bytes[position % length] = byte;
        bytes.truncate(length - cut % length);
        if let Ok(document) = Document::parse(bytes.clone().into(), None) {
            prop_assert_eq!(document.digest(), Digest::of(&bytes));
        }
    }

    #[test]
    fn a_written_manifest_reads_back(sizes in proptest::collection::vec(0..1u64 << 30, 0..20)) {
        let layer = |size: &u64| Descriptor::new(media_type::OCI_LAYER, Digest::of(&size.to_le_bytes()), *size);
        let config = Descriptor::new(media_type::OCI_CONFIG, Digest::of(b"config"), 6);
        let layers = sizes.iter().map(layer).collect();
        let manifest = Manifest::assemble(media_type::OCI_MANIFEST, config, layers).unwrap();
        prop_assert_eq!(Manifest::parse(manifest.raw.clone(), None).unwrap(), manifest);
    }
}
