//! Copies in and out.

use std::os::unix::fs::{PermissionsExt as _, symlink};

use futures::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use super::{Streams, send};

#[tokio::test(flavor = "multi_thread")]
async fn a_file_goes_in() {
    let streams = Streams::start().await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("new/parents/file");
    let content: Vec<u8> = (0..100_000u32).map(|index| index as u8).collect();
    let request = json!({"direction": "to", "guest_path": path, "is_dir": false, "mode": 0o600});
    let result = streams.upload(request, &content).await;
    assert_eq!(
        result,
        json!({"type": "result", "success": true, "bytes_written": 100_000})
    );
    assert!(std::fs::read(&path).unwrap() == content);
    assert_eq!(
        std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777,
        0o600
    );

    let empty = directory.path().join("empty");
    let result = streams
        .upload(json!({"direction": "to", "guest_path": empty}), b"")
        .await;
    assert_eq!(
        result,
        json!({"type": "result", "success": true}),
        "no bytes_written for nothing written"
    );

    let into =
        json!({"direction": "to", "guest_path": directory.path(), "src_basename": "named", "mode": 0o644});
    assert_eq!(streams.upload(into, b"abc").await["success"], true);
    assert_eq!(std::fs::read(directory.path().join("named")).unwrap(), b"abc");

    let made = directory.path().join("made");
    let result = streams
        .upload(
            json!({"direction": "to", "guest_path": made, "is_dir": true, "mode": 0o755}),
            b"",
        )
        .await;
    assert_eq!(result, json!({"type": "result", "success": true}));
    assert!(made.is_dir());
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_cannot_be_are_failures_with_reasons() {
    let streams = Streams::start().await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "x").unwrap();
    for request in [
        json!({"direction": "to", "guest_path": file, "is_dir": true}),
        json!({"direction": "to", "guest_path": directory.path()}),
        json!({"direction": "to", "guest_path": file, "mode": 0o100_644}),
        json!({"direction": "to", "guest_path": directory.path(), "src_basename": "../up"}),
    ] {
        let result = streams
            .upload(request.clone(), b"content that is read and dropped")
            .await;
        assert_eq!(
            (&result["type"], &result["success"]),
            (&json!("result"), &json!(false)),
            "{request}"
        );
        assert!(
            result["error"].as_str().is_some_and(|error| !error.is_empty()),
            "{request}"
        );
    }
    assert_eq!(std::fs::read(&file).unwrap(), b"x");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_breaks_off_never_happened() {
    let streams = Streams::start().await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    let mut socket = streams.open("/cp").await;
    send(&mut socket, &json!({"direction": "to", "guest_path": path})).await;
    socket.send(Message::binary(vec![1; 1000])).await.unwrap();
    socket.close(None).await.unwrap();
    while let Some(Ok(_)) = socket.next().await {}
    // A later transfer on the same guest shows that the broken one is over.
    let other = directory.path().join("other");
    assert_eq!(
        streams
            .upload(json!({"direction": "to", "guest_path": other}), b"x")
            .await["success"],
        true
    );
    assert!(!path.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_comes_out_as_clients_want_it() {
    let streams = Streams::start().await;
    let directory = tempfile::tempdir().unwrap();
    let tree = directory.path().join("tree");
    std::fs::create_dir_all(tree.join("sub")).unwrap();
    std::fs::write(tree.join("a"), "first").unwrap();
    std::fs::write(tree.join("sub/empty"), "").unwrap();
    symlink("../a", tree.join("sub/inside")).unwrap();
    symlink("/etc/passwd", tree.join("absolute")).unwrap();
    symlink("../../outside", tree.join("outside")).unwrap();
    let frames = streams
        .download(json!({"direction": "from", "guest_path": tree, "follow_links": false}))
        .await;
    let headers: Vec<&Value> = frames.iter().filter(|frame| frame["type"] == "header").collect();
    let mut paths: Vec<&str> = headers
        .iter()
        .map(|header| header["path"].as_str().unwrap())
        .collect();
    assert_eq!(paths[0], "tree", "parents first");
    paths.sort_unstable();
    assert_eq!(
        paths,
        ["tree", "tree/a", "tree/sub", "tree/sub/empty", "tree/sub/inside"]
    );
    for header in headers {
        let path = header["path"].as_str().unwrap();
        assert_eq!(header["is_dir"], matches!(path, "tree" | "tree/sub"));
        assert!(header["mode"].as_u64().unwrap() <= 0o777 && header["mtime"].as_i64().unwrap() > 0);
        if path == "tree/sub/inside" {
            assert_eq!(
                (&header["is_symlink"], &header["link_target"]),
                (&json!(true), &json!("../a"))
            );
        }
    }
    let ends: Vec<bool> = frames
        .iter()
        .filter(|frame| frame["type"] == "end")
        .map(|frame| frame["final"].as_bool().unwrap())
        .collect();
    assert_eq!(ends, [false, false, false, false, true]);
    let at = frames.iter().position(|frame| frame["path"] == "tree/a").unwrap();
    assert_eq!(
        (&frames[at]["size"], &frames[at + 1]),
        (&json!(5), &json!("first"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_comes_out_and_what_is_none_is_an_error() {
    let streams = Streams::start().await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "x".repeat(100_000)).unwrap();
    let frames = streams
        .download(json!({"direction": "from", "guest_path": file}))
        .await;
    assert_eq!(
        (&frames[0]["path"], &frames[0]["size"]),
        (&json!("file"), &json!(100_000))
    );
    let content: usize = frames.iter().filter_map(Value::as_str).map(str::len).sum();
    assert_eq!(content, 100_000);
    assert_eq!(frames.last().unwrap(), &json!({"type": "end", "final": true}));

    let missing = streams
        .download(json!({"direction": "from", "guest_path": "/no/such/file"}))
        .await;
    assert_eq!((missing.len(), &missing[0]["type"]), (1, &json!("error")));
    let pipe = directory.path().join("pipe");
    std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
    let special = streams
        .download(json!({"direction": "from", "guest_path": pipe}))
        .await;
    assert_eq!((special.len(), &special[0]["type"]), (1, &json!("error")));
}
