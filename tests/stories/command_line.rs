//! The command line, as a user types it.

use std::path::Path;

use hypeman_tests::{ImageBuilder, LayerBuilder, Server, have, skip_unless};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

#[tokio::test]
async fn a_day_on_the_command_line() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let cli = server.command_line();
    ImageBuilder::busybox()
        .unwrap()
        .build()
        .write_archive(&server.scratch().join("app.tar"), "1");
    cli.run(&["push", "app.tar", "app:1"]).await.ok();
    assert!(cli.run(&["image", "list"]).await.ok().contains("app:1"));

    let image = format!("{}/app:1", server.host());
    let id = cli
        .run(&[
            "run",
            &image,
            "--name",
            "web",
            "--memory",
            "128MB",
            "--cpus",
            "1",
            "--network=false",
            "-e",
            "A=b",
            "-l",
            "team=x",
        ])
        .await
        .ok();
    assert_eq!(id.lines().count(), 1, "only the id: {id:?}");
    cli.run(&["wait", "web", "--state", "Running", "--timeout", "5m"])
        .await
        .ok();
    let table = cli.run(&["ps"]).await.ok();
    assert!(table.contains("web") && table.contains("Running"), "{table}");
    assert_eq!(cli.run(&["ps", "-q"]).await.ok(), id);
    let listed: Value = serde_json::from_str(&cli.run(&["ps", "-a", "--format", "json"]).await.ok()).unwrap();
    assert_eq!(listed[0]["id"], id.as_str());
    let lines = cli.run(&["ps", "-a", "--format", "jsonl"]).await.ok();
    assert_eq!(serde_json::from_str::<Value>(&lines).unwrap()["name"], "web");
    assert!(
        cli.run(&["ps", "-a", "--format", "yaml"])
            .await
            .ok()
            .contains("name: web")
    );
    assert_eq!(cli.run(&["ps", "-q", "--tag", "team=y"]).await.ok(), "");

    assert!(
        !cli.run(&["inspect", "web"]).await.ok().contains("\"b\""),
        "values of variables are hidden"
    );
    assert!(
        cli.run(&["inspect", "web", "--show-env"])
            .await
            .ok()
            .contains('b')
    );
    assert_eq!(
        cli.run(&["exec", "web", "--", "sh", "-c", "echo $A"]).await.ok(),
        "b"
    );
    assert_eq!(
        cli.run(&["exec", "web", "--", "sh", "-c", "exit 17"]).await.code,
        17
    );
    assert_eq!(cli.run(&["exec", "absent", "--", "true"]).await.code, 255);
    let piped = cli
        .run_with_input(&["exec", "web", "--", "head", "-c", "5"], b"piped in")
        .await;
    assert_eq!(piped.ok(), "piped");
    assert!(cli.run(&["stats", "web"]).await.ok().contains("web"));
    cli.run(&["logs", "web", "--tail", "5"]).await.ok();

    let refused = cli.run(&["rm", "web"]).await;
    assert_ne!(refused.code, 0, "a running instance needs -f");
    assert!(
        refused.stderr.contains("-f"),
        "and the refusal says so: {}",
        refused.stderr
    );
    cli.run(&["stop", "web"]).await.ok();
    assert_eq!(cli.run(&["ps", "-q"]).await.ok(), "");
    assert_eq!(cli.run(&["ps", "-a", "-q"]).await.ok(), id);
    cli.run(&["start", "web"]).await.ok();
    assert_ne!(
        cli.run(&["wait", "web", "--state", "Stopped", "--timeout", "200ms"])
            .await
            .code,
        0
    );
    cli.run(&["rm", "-f", "web"]).await.ok();
    assert_eq!(cli.run(&["ps", "-a", "-q"]).await.ok(), "");
    cli.run(&["image", "delete", &image]).await.ok();
    assert_eq!(cli.run(&["image", "list", "-q"]).await.ok(), "");
}

#[tokio::test]
async fn an_image_of_the_local_docker_is_pushed() {
    let server = Server::start().await;
    let saved = server.scratch().join("saved.tar");
    ImageBuilder::empty()
        .layer(LayerBuilder::default().file("content", 0o644, b"from docker"))
        .cmd(&["/content"])
        .build()
        .write_archive(&saved, "1");
    let home = tempfile::tempdir().unwrap();
    let socket = home.path().join("docker.sock");
    let daemon = docker_daemon(&socket, std::fs::read(&saved).unwrap());
    let at = |socket: &Path| format!("unix://{}", socket.display());
    let cli = server.command_line().with("DOCKER_HOST", &at(&socket));

    let name = format!("{}/team/app:1", server.host());
    assert_eq!(cli.run(&["push", "team/app:1"]).await.ok(), name);
    let renamed = format!("{}/other:2", server.host());
    assert_eq!(
        cli.run(&["push", "local", "team/app:1", "other:2", "-q"])
            .await
            .ok(),
        renamed
    );
    let listed = cli.run(&["image", "list", "-q"]).await.ok();
    assert!(listed.contains(&name) && listed.contains(&renamed), "{listed}");

    let refused = async |cli: &hypeman_tests::CommandLine, image: &str| {
        let finished = cli.run(&["push", image]).await;
        assert_eq!((finished.code, finished.stdout.as_str()), (1, ""), "{image}");
        finished.stderr
    };
    let absent = refused(&cli, "absent").await;
    assert!(
        absent.contains("no archive or directory absent, and Docker has no image absent")
            && absent.contains("hypeman pull absent"),
        "{absent}"
    );
    let broken = refused(&cli, "broken:1").await;
    assert!(broken.contains("cannot be read"), "{broken}");
    daemon.abort();

    let alone = server
        .command_line()
        .with("DOCKER_HOST", &at(&home.path().join("nothing.sock")));
    let told = refused(&alone, "team/app:1").await;
    assert!(
        told.contains("no Docker daemon answers") && told.contains("hypeman push app.tar"),
        "{told}"
    );
    let elsewhere = server.command_line().with("DOCKER_HOST", "tcp://127.0.0.1:1");
    let told = refused(&elsewhere, "team/app:1").await;
    assert!(told.contains("docker save team/app:1 | hypeman push -"), "{told}");
}

/// Stands in for Docker: has the image `team/app:1`, breaks off in the middle of `broken:1`, and knows no other.
fn docker_daemon(socket: &Path, archive: Vec<u8>) -> tokio::task::JoinHandle<()> {
    let listener = UnixListener::bind(socket).unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            // A client that has hung up is no failure of the daemon.
            let _ = docker_answer(&mut stream, &archive).await;
        }
    })
}

async fn docker_answer(stream: &mut UnixStream, archive: &[u8]) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        request.push(stream.read_u8().await?);
    }
    let whole = request.starts_with(b"GET /images/team/app:1/get HTTP/1.1\r\n");
    if !whole && !request.starts_with(b"GET /images/broken:1/get HTTP/1.1\r\n") {
        let body = r#"{"message":"No such image"}"#;
        let head = format!(
            "HTTP/1.1 404 Not Found\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
            body.len()
        );
        return stream.write_all(format!("{head}{body}").as_bytes()).await;
    }
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/x-tar\r\ntransfer-encoding: chunked\r\n\
                connection: close\r\n\r\n";
    stream.write_all(head.as_bytes()).await?;
    let sent = if whole {
        archive
    } else {
        &archive[..archive.len() / 2]
    };
    for piece in sent.chunks(1000) {
        stream
            .write_all(format!("{:x}\r\n", piece.len()).as_bytes())
            .await?;
        stream.write_all(piece).await?;
        stream.write_all(b"\r\n").await?;
    }
    match whole {
        true => stream.write_all(b"0\r\n\r\n").await,
        false => Ok(()),
    }
}

#[tokio::test]
async fn what_needs_no_instance() {
    let server = Server::start().await;
    let cli = server.command_line();
    assert!(cli.run(&["health"]).await.ok().contains("ok"));
    assert!(cli.run(&["capabilities"]).await.ok().contains("qemu"));
    assert!(
        cli.run(&["resources"])
            .await
            .ok()
            .to_lowercase()
            .contains("memory")
    );
    assert!(cli.run(&["pagers"]).await.ok().starts_with("VERSION"));
    assert!(cli.run(&["version"]).await.ok().contains('.'));
    for shell in ["bash", "zsh", "fish"] {
        assert!(
            cli.run(&["completion", shell]).await.ok().contains("hypeman"),
            "{shell}"
        );
    }
    assert!(
        cli.run(&["token", "list-scopes"])
            .await
            .ok()
            .contains("instance:write")
    );
    let secret = cli.clone().with("JWT_SECRET", server.secret());
    let minted = secret
        .run(&[
            "token",
            "create",
            "--user-id",
            "u",
            "--duration",
            "1h",
            "--scopes",
            "image:read",
        ])
        .await
        .ok();
    let limited = server.client().with_token(Some(&minted));
    assert_eq!(limited.get("/images").await.status, 200);
    assert_eq!(limited.get("/instances").await.status, 403);
    assert_ne!(
        secret
            .run(&["token", "create", "--user-id", "u", "--scopes", "world:rule"])
            .await
            .code,
        0
    );

    let doctor = cli.run(&["doctor"]).await;
    let said = format!("{}{}", doctor.stdout, doctor.stderr).to_lowercase();
    for word in ["kvm", "qemu", "kernel", "disk", "pagers"] {
        assert!(said.contains(word), "doctor looks at {word}: {said}");
    }
}

#[tokio::test]
async fn errors_say_what_to_do_next() {
    let server = Server::start().await;
    let cli = server.command_line();
    let absent = cli.run(&["inspect", "absent"]).await;
    assert_ne!(absent.code, 0);
    assert!(absent.stderr.contains("absent"), "{}", absent.stderr);
    let elsewhere = cli.clone().with("HYPEMAN_BASE_URL", "http://127.0.0.1:1");
    let lost = elsewhere.run(&["ps"]).await;
    assert_ne!(lost.code, 0);
    assert!(
        lost.stderr.contains("hypeman serve") || lost.stderr.contains("HYPEMAN_BASE_URL"),
        "{}",
        lost.stderr
    );
    let stranger = cli.clone().with("HYPEMAN_API_KEY", "nonsense");
    let denied = stranger.run(&["ps"]).await;
    assert_ne!(denied.code, 0);
    assert!(denied.stderr.contains("token"), "{}", denied.stderr);
}
