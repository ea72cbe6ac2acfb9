//! Docker's credential helpers, played by small scripts.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use hypeman_images::{ImageError, RegistryClient};

use super::support::{Registry, amd64, answer, client_with, noise};

/// A directory with a Docker configuration and helpers.
struct Docker {
    home: tempfile::TempDir,
}

impl Docker {
    fn new(config: &serde_json::Value) -> Self {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("config.json"), config.to_string()).unwrap();
        Self { home }
    }

    fn path(&self) -> &Path {
        self.home.path()
    }

    /// Installs a helper. A process of its own writes it: a file that is open for writing in this one could be
    /// inherited by what another test starts, and would be busy when it is to be run.
    fn helper(&self, name: &str, script: &str) {
        let mut writer = Command::new("sh")
            .args(["-c", "cat > \"$1\" && chmod 755 \"$1\"", "sh"])
            .arg(self.path().join(format!("docker-credential-{name}")))
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let text = format!("#!/bin/sh\ncd {}\n{script}\n", self.path().display());
        writer.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        assert!(writer.wait().unwrap().success());
    }

    fn client(&self, limit: Duration) -> RegistryClient {
        client_with(|options| {
            options.docker_config = Some(self.path().join("config.json"));
            // The scripts need the system's programs too.
            options.helper_path = Some(format!("{}:/usr/bin:/bin", self.path().display()).into());
            options.helper_timeout = limit;
        })
    }
}

/// A registry with an image that is for user `user` with password `pass` alone.
async fn closed_registry() -> Registry {
    let registry = Registry::start().await;
    registry.add_image(&["v1"], "amd64", &[noise(1, 10)]);
    registry.hook(|seen| {
        (seen.authorization() != Some("Basic dXNlcjpwYXNz"))
            .then(|| answer(401, &[("www-authenticate", "Basic")], ""))
    });
    registry
}

const LONG: Duration = Duration::from_secs(600);

#[tokio::test]
async fn a_helper_is_told_the_registry_on_its_standard_input_and_gives_credentials() {
    let registry = closed_registry().await;
    let host = registry.address.to_string();
    let docker = Docker::new(&serde_json::json!({"credHelpers": {&host: "test-1"}, "credsStore": "absent"}));
    docker.helper(
        "test-1",
        "echo \"$@\" > words; cat > asked; echo '{\"Username\":\"user\",\"Secret\":\"pass\"}'",
    );
    docker
        .client(LONG)
        .resolve(&registry.reference("app:v1"), &amd64(), None)
        .await
        .unwrap();
    let read = |name: &str| std::fs::read_to_string(docker.path().join(name)).unwrap();
    assert_eq!(read("asked"), format!("{host}\n"));
    assert_eq!(read("words"), "get\n", "no word of anybody else is an argument");
}

#[tokio::test]
async fn a_public_image_needs_no_helper_that_works() {
    let registry = Registry::start().await;
    registry.add_image(&["v1"], "amd64", &[noise(1, 10)]);
    let docker = Docker::new(&serde_json::json!({"credsStore": "absent"}));
    docker
        .client(LONG)
        .resolve(&registry.reference("app:v1"), &amd64(), None)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_helper_that_fails_is_named_and_what_it_said_is_not() {
    let registry = closed_registry().await;
    let host = registry.address.to_string();
    let cases = [
        ("absent", "", "docker-credential-absent, which"),
        ("fails", "echo hunter2; exit 3", "docker-credential-fails failed"),
        ("babbles", "echo hunter2", "no credentials"),
        ("floods", "while :; do echo hunter2; done", "said more than"),
        ("../fails", "", "lower-case"),
        ("fails;true", "", "lower-case"),
    ];
    for (name, script, told) in cases {
        let docker = Docker::new(&serde_json::json!({"auths": {&host: {}}, "credsStore": name}));
        if !script.is_empty() {
            docker.helper(name, script);
        }
        let client = docker.client(LONG);
        let reference = registry.reference("app:v1");
        let error = client.resolve(&reference, &amd64(), None).await.unwrap_err();
        assert!(
            matches!(error, ImageError::Unauthorized { .. }),
            "{name}: {error}"
        );
        assert!(error.to_string().contains(told), "{name}: {error}");
        assert!(
            !format!("{error} {error:?}").contains("hunter2"),
            "{name}: {error}"
        );
    }
}

#[tokio::test]
async fn a_helper_that_knows_nothing_is_no_failure() {
    let registry = closed_registry().await;
    let docker = Docker::new(&serde_json::json!({"credsStore": "empty"}));
    docker.helper("empty", "echo credentials not found in native keychain; exit 1");
    let client = docker.client(LONG);
    let error = client
        .resolve(&registry.reference("app:v1"), &amd64(), None)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("may need credentials"), "{error}");
}

#[tokio::test]
async fn a_helper_that_hangs_is_ended_at_its_deadline() {
    let registry = closed_registry().await;
    let docker = Docker::new(&serde_json::json!({"credsStore": "hangs"}));
    docker.helper("hangs", "exec sleep 100000");
    let client = docker.client(Duration::from_millis(50));
    let error = client
        .resolve(&registry.reference("app:v1"), &amd64(), None)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("gave no answer"), "{error}");
}
