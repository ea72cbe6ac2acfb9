//! Against registries and clients of others: the reference implementation of the protocol, and skopeo.

use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use hypeman_images::manifest::media_type;
use hypeman_images::{Archive, ArchiveOptions, BlobStore, Credentials, ImageError, PushOptions, Reference};

use super::push::{root_of, stored_image};
use super::support::{amd64, client, store};

/// bcrypt of "pass".
const HTPASSWD: &str = "user:$2b$05$ABAxAXnUHSpEPMBFFXfxXexOPhC1sTBU4owhVl/7Q31oUBdbOEXHS\n";

/// The reference registry as a process, killed and removed in the end.
struct Distribution {
    child: Child,
    address: String,
    _dir: tempfile::TempDir,
}

impl Drop for Distribution {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Distribution {
    /// `None` where it is not installed.
    fn start(with_password: bool) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().display();
        let auth = match with_password {
            true => format!("auth: {{htpasswd: {{realm: test, path: {root}/htpasswd}}}}\n"),
            false => String::new(),
        };
        let config = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {root}/data}}}}\n\
             http: {{addr: '127.0.0.1:0'}}\n{auth}"
        );
        std::fs::write(dir.path().join("htpasswd"), HTPASSWD).unwrap();
        std::fs::write(dir.path().join("config.yml"), config).unwrap();
        let spawned = Command::new("docker-registry")
            .arg("serve")
            .arg(dir.path().join("config.yml"))
            .process_group(0)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = match spawned {
            Ok(child) => child,
            Err(error) => {
                println!("SKIPPED: docker-registry cannot be run: {error}");
                return None;
            }
        };
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = lines.by_ref().map_while(Result::ok).find_map(|line| {
            let (_, rest) = line.split_once("listening on ")?;
            Some(
                rest.chars()
                    .take_while(|character| character.is_ascii_digit() || ".:".contains(*character))
                    .collect(),
            )
        });
        // Whatever it still says is read away, so that it never waits for us.
        std::thread::spawn(move || lines.for_each(drop));
        Some(Self {
            child,
            address: address.unwrap(),
            _dir: dir,
        })
    }

    fn reference(&self, name: &str) -> Reference {
        Reference::parse(&format!("{}/{name}", self.address)).unwrap()
    }
}

async fn push_and_pull(registry: &Distribution, source: BlobStore, kind: &str, secret: Option<&Credentials>) {
    let manifest = stored_image(&source, kind, &[3_000_000, 0, 700_000]).await;
    let target = registry.reference("deep/er/app:v1");
    let client = client();
    let options = PushOptions::default();
    let source = Arc::new(source);
    let pushed = client
        .push(&source, &root_of(&manifest), &target, secret, &options, &())
        .await
        .unwrap();
    assert_eq!(pushed.digest, manifest.digest);
    assert_eq!(
        client
            .push(&source, &root_of(&manifest), &target, secret, &options, &())
            .await
            .unwrap()
            .bytes,
        0
    );
    assert_eq!(client.head(&target, secret).await.unwrap(), manifest.digest);
    let (_dir, store) = store().await;
    let resolved = client.resolve(&target, &amd64(), secret).await.unwrap();
    assert_eq!(resolved.manifest, manifest);
    client
        .pull(&target, &resolved, secret, &store, &())
        .await
        .unwrap();
    for layer in &manifest.layers {
        assert_eq!(store.size(&layer.digest).await.unwrap(), Some(layer.size));
    }
}

#[tokio::test]
async fn the_reference_registry_takes_and_gives_both_families() {
    let Some(registry) = Distribution::start(false) else {
        return;
    };
    for kind in [media_type::DOCKER_MANIFEST, media_type::OCI_MANIFEST] {
        let (_dir, source) = store().await;
        push_and_pull(&registry, source, kind, None).await;
    }
    let missing = client()
        .resolve(&registry.reference("nothing/here:v1"), &amd64(), None)
        .await
        .unwrap_err();
    assert!(matches!(missing, ImageError::NotFound(_)), "{missing}");
}

#[tokio::test]
async fn the_reference_registry_with_a_password() {
    let Some(registry) = Distribution::start(true) else {
        return;
    };
    let (_dir, source) = store().await;
    let secret = Credentials::basic("user", "pass");
    push_and_pull(&registry, source, media_type::OCI_MANIFEST, Some(&secret)).await;
    let target = registry.reference("deep/er/app:v1");
    for wrong in [None, Some(&Credentials::basic("user", "wrong"))] {
        let error = client().resolve(&target, &amd64(), wrong).await.unwrap_err();
        assert!(matches!(error, ImageError::Unauthorized { .. }), "{error}");
    }
}

#[tokio::test]
async fn skopeo_reads_what_was_pushed_from_an_archive_and_its_archive_can_be_pushed() {
    let Some(registry) = Distribution::start(false) else {
        return;
    };
    let (_dir, source) = store().await;
    let manifest = stored_image(&source, media_type::OCI_MANIFEST, &[100_000, 5_000]).await;
    let first = registry.reference("app:first");
    let options = PushOptions::default();
    client()
        .push(
            &Arc::new(source),
            &root_of(&manifest),
            &first,
            None,
            &options,
            &(),
        )
        .await
        .unwrap();

    let dir = tempfile::tempdir().unwrap();
    let archive = dir.path().join("image.tar");
    let output = Command::new("skopeo")
        .args(["--insecure-policy", "copy", "-q", "--src-tls-verify=false"])
        .arg(format!("docker://{first}"))
        .arg(format!("oci-archive:{}:again", archive.display()))
        .output();
    let Ok(output) = output else {
        println!("SKIPPED: skopeo cannot be run");
        return;
    };
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );

    let archive = Arc::new(Archive::open(&archive, &ArchiveOptions::default()).await.unwrap());
    let root = archive.image(None).unwrap().root.clone();
    let second = registry.reference("app:second");
    let pushed = client()
        .push(&archive, &root, &second, None, &options, &())
        .await
        .unwrap();
    assert_eq!(
        pushed.digest,
        client().resolve(&second, &amd64(), None).await.unwrap().digest
    );
}
