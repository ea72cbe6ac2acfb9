//! Files and trees into an instance and out again.

use hypeman_tests::{Server, have, skip_unless};
use serde_json::json;

#[tokio::test]
async fn files_go_in_with_mode_and_owner() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let guest = server.run(&image, json!({})).await;

    let bytes: Vec<u8> = (0..=255).cycle().take(1_000_003).collect();
    let result = guest
        .copy_in(
            "/data/deep/er/file",
            &bytes,
            json!({"mode": 0o640, "uid": 1000, "gid": 7}),
        )
        .await;
    assert_eq!(
        (&result["type"], &result["success"]),
        (&json!("result"), &json!(true)),
        "{result}"
    );
    assert_eq!(result["bytes_written"], bytes.len());
    assert_eq!(
        guest.output("stat -c '%a %u:%g %s' /data/deep/er/file").await,
        "640 1000:7 1000003"
    );
    assert_eq!(guest.output("stat -c %a /data/deep").await, "755");

    // Root can be asked for, and the defaults are 0644 and 0755.
    guest.output("mkdir /own && chown 5:5 /own").await;
    guest
        .copy_in("/own/root", b"x", json!({"uid": 0, "gid": 0}))
        .await;
    assert_eq!(guest.output("stat -c '%a %u:%g' /own/root").await, "644 0:0");
    let empty = guest.copy_in("/own/empty", b"", json!({})).await;
    assert_eq!(empty["success"], true);
    assert!(
        empty.get("bytes_written").is_none(),
        "left out when nothing was written: {empty}"
    );
    let made = guest.copy_in_directory("/own/directory", json!({})).await;
    assert_eq!(
        (&made["success"], made.get("bytes_written")),
        (&json!(true), None),
        "{made}"
    );
    assert_eq!(guest.output("stat -c %a /own/directory").await, "755");

    // Kinds do not change under the user's hands.
    assert_eq!(
        guest.copy_in("/own/directory", b"x", json!({})).await["success"],
        false
    );
    assert_eq!(
        guest.copy_in_directory("/own/root", json!({})).await["success"],
        false
    );
}

#[tokio::test]
async fn a_broken_off_upload_leaves_nothing_and_the_old_file() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let guest = server.run(&image, json!({})).await;
    guest.copy_in("/data/file", b"old", json!({})).await;
    guest.break_off_copy("/data/file", &vec![7; 100_000]).await;
    guest.break_off_copy("/data/other", &vec![7; 100_000]).await;
    let settled = "for i in 1 2 3 4 5 6 7 8 9 10; do [ $(ls -A /data | wc -l) = 1 ] && break; sleep 1; done; ls -A /data; cat /data/file";
    assert_eq!(guest.output(settled).await, "file\nold");
}

#[tokio::test]
async fn trees_come_out_with_links_modes_owners_and_times() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let guest = server.run(&image, json!({})).await;
    guest
        .output(
            "mkdir -p /tree/sub/empty && cd /tree && head -c 300000 /dev/urandom > big && sha256sum big | cut -c1-64 > sum && \
             echo hi > sub/hi && chmod 0600 sub/hi && chown 12:34 sub/hi && ln -s sub/hi link && : > nothing && \
             touch -d '2001-02-03 04:05:06' sub/hi && chmod 0750 sub",
        )
        .await;
    let entries = guest.copy_out("/tree", false).await.unwrap();
    let paths: Vec<&str> = entries.iter().map(hypeman_tests::Entry::path).collect();
    assert_eq!(paths[0], "tree", "{paths:?}");
    let find = |path: &str| {
        entries
            .iter()
            .find(|entry| entry.path() == path)
            .unwrap_or_else(|| panic!("{path} in {paths:?}"))
    };
    let position = |path: &str| paths.iter().position(|other| *other == path).unwrap();
    assert!(
        position("tree/sub") < position("tree/sub/hi"),
        "parents come first: {paths:?}"
    );
    assert_eq!(find("tree/sub/empty").header["is_dir"], true);
    assert_eq!(find("tree/sub").header["mode"], 0o750);
    assert_eq!(find("tree/nothing").header["size"], 0);
    let link = find("tree/link");
    assert_eq!(
        (&link.header["is_symlink"], &link.header["link_target"]),
        (&json!(true), &json!("sub/hi"))
    );
    let small = find("tree/sub/hi");
    assert_eq!(small.bytes, b"hi\n");
    assert_eq!(
        (&small.header["mode"], &small.header["uid"], &small.header["gid"]),
        (&json!(0o600), &json!(12), &json!(34))
    );
    assert_eq!(small.header["mtime"], 981_173_106);
    let sum = hypeman_tests::sha256(&find("tree/big").bytes);
    assert_eq!(
        format!(
            "sha256:{}",
            String::from_utf8_lossy(&find("tree/sum").bytes).trim()
        ),
        sum
    );

    let one = guest.copy_out("/tree/sub/hi", false).await.unwrap();
    assert_eq!((one.len(), one[0].path()), (1, "hi"));
    let followed = guest.copy_out("/tree/link", true).await.unwrap();
    assert_eq!(
        (followed[0].bytes.as_slice(), &followed[0].header["is_dir"]),
        (b"hi\n".as_slice(), &json!(false))
    );
    assert!(
        guest
            .copy_out("/absent", false)
            .await
            .unwrap_err()
            .contains("absent")
    );
}

#[tokio::test]
async fn trees_survive_the_way_in_and_out_on_the_command_line() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let guest = server.run(&image, json!({"name": "copier"})).await;
    let cli = server.command_line();
    let scratch = server.scratch();
    let tree = scratch.join("in");
    std::fs::create_dir_all(tree.join("sub/empty")).unwrap();
    std::fs::write(tree.join("sub/a"), b"a").unwrap();
    std::fs::write(tree.join("b"), vec![1; 70_000]).unwrap();
    cli.run(&["cp", "in", "copier:/fresh"]).await.ok();
    assert_eq!(
        guest.output("cd /fresh && find . | sort | tr '\\n' ' '").await,
        ". ./b ./sub ./sub/a ./sub/empty"
    );
    // An existing directory takes the source under its own name; `/.` means its content.
    cli.run(&["cp", "in", "copier:/fresh"]).await.ok();
    assert_eq!(guest.output("ls /fresh/in").await, "b\nsub");
    guest.output("mkdir /flat").await;
    cli.run(&["cp", "in/.", "copier:/flat"]).await.ok();
    assert_eq!(guest.output("ls /flat").await, "b\nsub");
    // File into a directory, and out again under a new name.
    cli.run(&["cp", "in/b", "copier:/flat/sub/"]).await.ok();
    assert_eq!(guest.output("wc -c < /flat/sub/b").await, "70000");
    cli.run(&["cp", "copier:/flat", "out"]).await.ok();
    assert_eq!(std::fs::read(scratch.join("out/sub/a")).unwrap(), b"a");
    assert!(scratch.join("out/sub/empty").is_dir());
    // What cannot be is refused.
    assert_ne!(
        cli.run(&["cp", "in", "copier:/flat/b"]).await.code,
        0,
        "directory onto file"
    );
    assert_ne!(
        cli.run(&["cp", "in/b", "copier:/nowhere/"]).await.code,
        0,
        "no such directory"
    );
    assert_ne!(
        cli.run(&["cp", "copier:/absent", "x"]).await.code,
        0,
        "no such source"
    );
}
