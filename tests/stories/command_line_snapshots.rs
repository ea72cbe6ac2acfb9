//! Snapshots on the command line, as a user types it.

use hypeman_tests::{Server, eventually, have, skip_unless};
use serde_json::Value;

#[tokio::test]
async fn snapshots_on_the_command_line() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let cli = server.command_line();
    let image = server.busybox().await;
    let run = [
        "run",
        &image,
        "--name",
        "web",
        "--memory",
        "128MB",
        "--cpus",
        "1",
        "--network=false",
    ];
    let policy = [
        "--snapshot-compression-algorithm",
        "lz4",
        "--snapshot-compression-delay",
        "90s",
    ];
    let id = cli.run(&[&run[..], &policy[..]].concat()).await.ok();
    cli.run(&["wait", "web", "--state", "Running", "--timeout", "5m"])
        .await
        .ok();
    let inspected: Value =
        serde_json::from_str(&cli.run(&["inspect", "web", "--format", "json"]).await.ok()).unwrap();
    assert_eq!(
        inspected["snapshot_policy"]["compression"]["algorithm"], "lz4",
        "{inspected}"
    );
    let shell =
        async |instance: &str, line: &str| cli.run(&["exec", instance, "--", "sh", "-c", line]).await.ok();
    shell(
        "web",
        "echo kept > /dev/shm/memory; echo before > /root/note; sync",
    )
    .await;

    // To sleep and back.
    assert_eq!(cli.run(&["standby", "web"]).await.ok(), "web");
    assert!(cli.run(&["ps", "-a"]).await.ok().contains("Standby"));
    assert_eq!(cli.run(&["ps", "-q", "--state", "Standby"]).await.ok(), id);
    let refused = cli.run(&["standby", "web"]).await;
    assert_eq!(refused.code, 1, "{}", refused.stderr);
    assert!(refused.stderr.contains("Standby"), "{}", refused.stderr);
    assert_eq!(cli.run(&["restore", "web"]).await.ok(), "web");
    assert_eq!(shell("web", "cat /dev/shm/memory").await, "kept");

    // Snapshots, each of the one before.
    let create = ["snapshot", "create", "web", "--compression-enabled", "false"];
    let first = cli
        .run(&[&create[..], &["--name", "first", "-l", "team=x"]].concat())
        .await
        .ok();
    assert_eq!(first.len(), 24, "only the id: {first:?}");
    let taken = cli.run(&[&create[..], &["--name", "first"]].concat()).await;
    assert_eq!(taken.code, 1);
    assert!(taken.stderr.contains("first"), "{}", taken.stderr);
    shell("web", "echo after > /root/note; sync").await;
    cli.run(&["stop", "web"]).await.ok();
    assert_eq!(
        cli.run(&["snapshot", "restore", "web", "first"]).await.ok(),
        "web"
    );
    assert_eq!(
        shell("web", "cat /root/note /dev/shm/memory").await,
        "before\nkept"
    );
    let create = [
        "snapshot",
        "create",
        "web",
        "--name",
        "second",
        "--compression-algorithm",
        "zstd",
    ];
    let second = cli.run(&create).await.ok();
    let state = async || {
        let shown = cli
            .run(&["snapshot", "get", "second", "--format", "json"])
            .await
            .ok();
        serde_json::from_str::<Value>(&shown).unwrap()["compression_state"].clone()
    };
    eventually("it is compressed", || async { state().await == "compressed" }).await;

    let table = cli.run(&["snapshot", "list"]).await.ok();
    for word in [
        "SNAPSHOT ID",
        "RATIO",
        &first,
        &second,
        "first",
        "Standby",
        "web",
        "compressed",
        "x  ",
    ] {
        assert!(table.contains(word), "{word}: {table}");
    }
    let ids = format!("{second}\n{first}");
    assert_eq!(cli.run(&["snapshot", "list", "-q"]).await.ok(), ids);
    assert_eq!(
        cli.run(&["snapshot", "ls", "-q", "--source", "web", "--kind", "standby"])
            .await
            .ok(),
        ids
    );
    assert_eq!(
        cli.run(&["snapshot", "list", "-q", "-l", "team=x"]).await.ok(),
        first
    );
    assert_eq!(
        cli.run(&["snapshot", "list", "-q", "--name", "second"])
            .await
            .ok(),
        second
    );
    assert_eq!(
        cli.run(&["snapshot", "list", "-q", "--kind", "stopped"])
            .await
            .ok(),
        ""
    );
    assert_eq!(
        cli.run(&["snapshot", "list", "-q", "--limit", "1"]).await.ok(),
        second
    );
    let page = ["snapshot", "list", "-q", "--limit", "1", "--cursor", &second];
    assert_eq!(cli.run(&page).await.ok(), first);
    let described = cli.run(&["snapshot", "get", &second]).await.ok();
    assert!(
        described.contains("zstd level 1") && described.contains(&first),
        "{described}"
    );
    let tree = cli.run(&["snapshot", "tree"]).await.ok();
    let lines: Vec<&str> = tree.lines().collect();
    assert!(
        lines[0].starts_with(&format!("{first} first (web, Standby")),
        "{tree}"
    );
    assert!(
        lines[1].starts_with(&format!("└─ {second} second (web, Standby")),
        "{tree}"
    );
    let verified = cli.run(&["snapshot", "verify", "first", &second]).await.ok();
    assert_eq!(verified.matches("is intact").count(), 2, "{verified}");
    let usage = cli.run(&["snapshot", "usage", "first", "second"]).await.ok();
    assert!(
        usage.contains("FREED BY DELETE") && usage.contains("iB"),
        "{usage}"
    );

    // Forks of an instance and of snapshots.
    let refused = cli.run(&["fork", "web", "copy"]).await;
    assert_eq!(
        refused.code, 1,
        "a running source has to be asked for: {}",
        refused.stderr
    );
    let copy = cli.run(&["fork", "web", "copy", "--from-running"]).await.ok();
    assert_eq!(shell("copy", "hostname; cat /dev/shm/memory").await, "copy\nkept");
    let many = cli
        .run(&["snapshot", "fork", "second", "worker", "--count", "3"])
        .await
        .ok();
    assert_eq!(many.lines().count(), 3, "only the ids: {many:?}");
    for number in 1..=3 {
        let name = format!("worker-{number}");
        assert_eq!(
            shell(&name, "hostname; cat /root/note").await,
            format!("{name}\nbefore")
        );
    }
    let again = cli
        .run(&["snapshot", "fork", "second", "worker", "--count", "4"])
        .await;
    assert_eq!(again.code, 1, "three names are taken: {}", again.stderr);
    assert_eq!(
        again.stdout.lines().count(),
        1,
        "and the fourth is made: {}",
        again.stdout
    );
    assert!(again.stderr.contains("3 of 4 forks failed"), "{}", again.stderr);
    let cold = cli
        .run(&["snapshot", "fork", "first", "cold", "--target-state", "stopped"])
        .await
        .ok();
    assert!(
        cli.run(&["ps", "-q", "--state", "Stopped"])
            .await
            .ok()
            .contains(&cold)
    );

    let schedule = ["snapshot", "schedule"];
    let set = ["set", "web", "--interval", "1h", "--max-count", "24"];
    assert!(
        cli.run(&[&schedule[..], &set[..]].concat())
            .await
            .ok()
            .contains("the newest 24")
    );
    assert!(
        cli.run(&[&schedule[..], &["get", "web"]].concat())
            .await
            .ok()
            .contains("1h0m0s")
    );
    cli.run(&[&schedule[..], &["delete", "web"]].concat()).await.ok();
    assert_ne!(cli.run(&[&schedule[..], &["get", "web"]].concat()).await.code, 0);

    // The snapshots outlive their source; what is damaged is named and not started.
    cli.run(&["rm", "-f", "web"]).await.ok();
    assert_eq!(
        cli.run(&["snapshot", "list", "-q", "--source", &id]).await.ok(),
        ids
    );
    let disk = server
        .data_directory()
        .join("snapshots")
        .join(&first)
        .join("overlay.raw");
    std::fs::File::options()
        .write(true)
        .open(&disk)
        .unwrap()
        .set_len(4096)
        .unwrap();
    let damaged = cli.run(&["snapshot", "verify", "second", "first"]).await;
    assert_eq!(damaged.code, 1, "{}", damaged.stdout);
    assert!(damaged.stdout.contains("second is intact"), "{}", damaged.stdout);
    assert!(damaged.stderr.contains("first is damaged"), "{}", damaged.stderr);
    assert_eq!(cli.run(&["snapshot", "fork", "first", "never"]).await.code, 1);
    cli.run(&["snapshot", "delete", "first", &second]).await.ok();
    assert_eq!(cli.run(&["snapshot", "list", "-q"]).await.ok(), "");
    assert_ne!(cli.run(&["snapshot", "get", "first"]).await.code, 0);
    assert_eq!(
        shell("worker-4", "hostname; cat /dev/shm/memory").await,
        "worker-4\nkept"
    );
    cli.run(&["rm", "--all", "-f"]).await.ok();
    assert_eq!(cli.run(&["ps", "-a", "-q"]).await.ok(), "", "{copy}");
    assert_eq!(server.vmms(), vec![]);
}
