//! The command line, as a user types it.

use hypeman_tests::{ImageBuilder, Server, have, skip_unless};
use serde_json::Value;

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
    for word in ["kvm", "qemu", "kernel", "disk"] {
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
