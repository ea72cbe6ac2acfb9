//! Copies against a peer that behaves, and against guests that try to do harm.

// Helpers of tests may panic like the tests themselves.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::io::Cursor;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use common::{bytes, connection, next_json, say, text};
use futures::StreamExt as _;
use hypeman_cli::copy::EntryKind;
use hypeman_cli::copy::archive::Archive;
use hypeman_cli::copy::local::LocalTree;
use hypeman_cli::copy::receive::{Fetch, Links, receive};
use hypeman_cli::copy::send::{Outgoing, send, walk};
use hypeman_cli::error::CliError;
use proptest::prelude::*;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

fn fetch() -> Fetch {
    Fetch {
        guest_path: "/data".to_owned(),
        follow_links: false,
        links: Links::Inside,
    }
}

fn header(path: &str, members: Value) -> Message {
    let mut header = json!({
        "type": "header", "path": path, "mode": 0o644, "is_dir": false, "size": 0, "mtime": 1_700_000_000
    });
    for (key, value) in members.as_object().into_iter().flatten() {
        header[key] = value.clone();
    }
    text(header.to_string())
}

fn end(last: bool) -> Message {
    text(json!({"type": "end", "final": last}).to_string())
}

/// Receives what the peer sends as `copy` below `place`.
async fn received(place: &Path, frames: Vec<Message>) -> Result<Vec<String>, CliError> {
    let (client, mut peer) = connection().await;
    let playing = tokio::spawn(async move {
        let request = next_json(&mut peer).await;
        assert_eq!(request, json!({"direction": "from", "guest_path": "/data"}));
        say(&mut peer, frames).await;
    });
    let mut tree = LocalTree::named(place, "copy", false)?;
    let outcome = receive(client, &fetch(), &mut tree, |_, _| ()).await;
    drop(tree);
    playing.await.unwrap();
    outcome
}

/// Everything below a directory, by relative path.
fn listing(directory: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(next) = open.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            names.push(path.strip_prefix(directory).unwrap().display().to_string());
            if fs::symlink_metadata(&path).unwrap().is_dir() {
                open.push(path);
            }
        }
    }
    names.sort();
    names
}

#[tokio::test]
async fn a_tree_arrives_with_modes_times_and_links() {
    let place = tempfile::tempdir().unwrap();
    let frames = vec![
        header("data", json!({"is_dir": true, "mode": 0o555})),
        end(false),
        header("data/file", json!({"size": 6, "mode": 0o640})),
        bytes(b"abc"),
        bytes(b"def"),
        end(false),
        header(
            "data/link",
            json!({"is_symlink": true, "link_target": "file", "mode": 0o777}),
        ),
        end(false),
        header("data/empty", json!({})),
        end(true),
    ];
    received(place.path(), frames).await.unwrap();
    let copy = place.path().join("copy");
    assert_eq!(listing(&copy), ["empty", "file", "link"]);
    assert_eq!(fs::read(copy.join("link")).unwrap(), b"abcdef");
    let metadata = fs::metadata(copy.join("file")).unwrap();
    assert_eq!(
        (metadata.mode() & 0o7777, metadata.mtime()),
        (0o640, 1_700_000_000)
    );
    let top = fs::metadata(&copy).unwrap();
    assert_eq!((top.mode() & 0o7777, top.mtime()), (0o555, 1_700_000_000));
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
}

#[tokio::test]
async fn hostile_guests_write_nothing_outside_and_leave_nothing_half() {
    let out = "../escaped";
    let cases: Vec<(Vec<Message>, &str)> = vec![
        (
            vec![header(out, json!({"size": 1})), bytes(b"x"), end(true)],
            "unsafe path",
        ),
        (vec![header("/escaped", json!({})), end(true)], "unsafe path"),
        (
            vec![header("data/../../escaped", json!({})), end(true)],
            "unsafe path",
        ),
        (vec![header("data//x", json!({})), end(true)], "unsafe path"),
        (vec![header("data\\x", json!({})), end(true)], "unsafe path"),
        (vec![header("", json!({})), end(true)], "unsafe path"),
        (vec![header("data/./x", json!({})), end(true)], "unsafe path"),
        (
            vec![
                header("data", json!({"is_symlink": true, "link_target": "/etc"})),
                end(true),
            ],
            "link target",
        ),
        (
            vec![
                header("data", json!({"is_symlink": true, "link_target": "../escaped"})),
                end(true),
            ],
            "link target",
        ),
        (
            vec![header("data", json!({"is_symlink": true})), end(true)],
            "link target",
        ),
        (
            vec![
                header(
                    "data",
                    json!({"is_symlink": true, "is_dir": true, "link_target": "x"}),
                ),
                end(true),
            ],
            "order",
        ),
        (
            vec![header("data", json!({"size": 2})), bytes(b"abc"), end(true)],
            "longer than announced",
        ),
        (
            vec![header("data", json!({"size": 2})), bytes(b"a"), end(true)],
            "shorter than announced",
        ),
        (
            vec![
                header("data", json!({"size": 2})),
                header("data", json!({})),
                end(true),
            ],
            "out of order",
        ),
        (
            vec![header("data", json!({"size": -1})), end(true)],
            "not a copy message",
        ),
        (
            vec![header("data", json!({"mode": -1})), end(true)],
            "not a copy message",
        ),
        (
            vec![header("data", json!({"is_dir": "yes"})), end(true)],
            "not a copy message",
        ),
        (
            vec![header("data", json!({})), text(r#"{"type":"end"}"#)],
            "not a copy message",
        ),
        (vec![bytes(b"x")], "out of order"),
        (vec![end(false)], "out of order"),
        (vec![end(true)], "nothing to copy"),
        (vec![text(r#"{"type":"result","success":true}"#)], "out of order"),
        (
            vec![
                header("data", json!({"is_dir": true})),
                end(false),
                header("other", json!({})),
                end(true),
            ],
            "two trees",
        ),
        (
            vec![header("data", json!({"is_dir": true})), end(false)],
            "before the copy was complete",
        ),
        (
            vec![header("data", json!({"size": 5})), bytes(b"ab")],
            "before the copy was complete",
        ),
        (
            vec![
                header("data", json!({"size": 5})),
                bytes(b"ab"),
                Message::Close(None),
            ],
            "before the copy was complete",
        ),
        (
            vec![text(r#"{"type":"error","message":"denied","path":"data/x"}"#)],
            "data/x: denied",
        ),
    ];
    for (frames, expected) in cases {
        let outside = tempfile::tempdir().unwrap();
        let place = outside.path().join("place");
        fs::create_dir(&place).unwrap();
        let failure = received(&place, frames).await.expect_err(expected);
        assert!(
            failure.to_string().contains(expected),
            "{failure} instead of {expected}"
        );
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1, "{expected}");
        let left: Vec<_> = listing(&place)
            .into_iter()
            .filter(|name| name != "copy")
            .collect();
        assert!(left.is_empty(), "{expected} left {left:?}");
    }
}

#[tokio::test]
async fn a_link_that_was_sent_before_is_never_written_through() {
    let outside = tempfile::tempdir().unwrap();
    let place = outside.path().join("place");
    fs::create_dir(&place).unwrap();
    fs::create_dir(place.join("elsewhere")).unwrap();
    let frames = vec![
        header("data", json!({"is_dir": true, "mode": 0o755})),
        end(false),
        header("data/real", json!({"is_dir": true, "mode": 0o755})),
        end(false),
        header("data/door", json!({"is_symlink": true, "link_target": "real"})),
        end(false),
        header("data/door/file", json!({"size": 1})),
        bytes(b"x"),
        end(true),
    ];
    let failure = received(&place, frames).await.unwrap_err();
    assert!(
        failure
            .to_string()
            .contains("a link or file stands where a directory belongs"),
        "{failure}"
    );
    assert_eq!(listing(&place.join("copy")), ["door", "real"]);
}

#[tokio::test]
async fn links_that_lead_out_are_left_out_of_an_ordinary_tree() {
    let place = tempfile::tempdir().unwrap();
    let frames = vec![
        header("data", json!({"is_dir": true, "mode": 0o755})),
        end(false),
        header(
            "data/mtab",
            json!({"is_symlink": true, "link_target": "/proc/mounts"}),
        ),
        end(false),
        header("data/file", json!({"size": 1})),
        bytes(b"x"),
        end(true),
    ];
    let left_out = received(place.path(), frames).await.unwrap();
    assert_eq!(left_out.len(), 1);
    assert!(left_out[0].contains("data/mtab -> /proc/mounts"), "{left_out:?}");
    assert_eq!(listing(&place.path().join("copy")), ["file"]);
}

#[tokio::test]
async fn a_link_of_the_user_inside_the_destination_is_not_followed_either() {
    let outside = tempfile::tempdir().unwrap();
    let place = outside.path().join("place");
    let victim = outside.path().join("victim");
    fs::create_dir_all(place.join("copy")).unwrap();
    fs::create_dir(&victim).unwrap();
    symlink(&victim, place.join("copy/sub")).unwrap();
    let frames = vec![
        header("data", json!({"is_dir": true, "mode": 0o755})),
        end(false),
        header("data/sub", json!({"is_dir": true, "mode": 0o755})),
        end(false),
        header("data/sub/file", json!({"size": 1})),
        bytes(b"x"),
        end(true),
    ];
    assert!(received(&place, frames).await.is_err());
    assert_eq!(fs::read_dir(&victim).unwrap().count(), 0);
}

#[tokio::test]
async fn a_file_replaces_a_link_and_keeps_what_it_pointed_to() {
    let place = tempfile::tempdir().unwrap();
    fs::write(place.path().join("precious"), "old").unwrap();
    symlink("precious", place.path().join("copy")).unwrap();
    received(
        place.path(),
        vec![header("data", json!({"size": 3})), bytes(b"new"), end(true)],
    )
    .await
    .unwrap();
    assert_eq!(fs::read(place.path().join("precious")).unwrap(), b"old");
    assert_eq!(fs::read(place.path().join("copy")).unwrap(), b"new");
}

#[tokio::test]
async fn content_goes_into_an_existing_directory() {
    let place = tempfile::tempdir().unwrap();
    fs::write(place.path().join("kept"), "").unwrap();
    let (client, mut peer) = connection().await;
    tokio::spawn(async move {
        next_json(&mut peer).await;
        let frames = vec![
            header("data", json!({"is_dir": true, "mode": 0o700})),
            end(false),
            header("data/new", json!({"size": 1})),
            bytes(b"x"),
            end(true),
        ];
        say(&mut peer, frames).await;
    });
    let mut tree = LocalTree::merged(place.path(), false).unwrap();
    receive(client, &fetch(), &mut tree, |_, _| ()).await.unwrap();
    assert_eq!(listing(place.path()), ["kept", "new"]);
}

#[tokio::test]
async fn a_tree_becomes_a_tar_archive() {
    let (client, mut peer) = connection().await;
    tokio::spawn(async move {
        next_json(&mut peer).await;
        let frames = vec![
            header("data", json!({"is_dir": true, "mode": 0o755})),
            end(false),
            header("data/file", json!({"size": 3, "uid": 7})),
            bytes(b"abc"),
            end(false),
            header(
                "data/link",
                json!({"is_symlink": true, "link_target": "/etc/hosts"}),
            ),
            end(true),
        ];
        say(&mut peer, frames).await;
    });
    let mut bytes = Vec::new();
    let mut archive = Archive::new(&mut bytes);
    receive(
        client,
        &Fetch {
            links: Links::Any,
            ..fetch()
        },
        &mut archive,
        |_, _| (),
    )
    .await
    .unwrap();
    drop(archive);
    let mut archive = tar::Archive::new(bytes.as_slice());
    let names: Vec<String> = archive
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap().path().unwrap().display().to_string())
        .collect();
    assert_eq!(names, ["data/", "data/file", "data/link"]);
}

fn outgoing(kind: EntryKind) -> Outgoing {
    Outgoing {
        guest_path: "/srv/file".to_owned(),
        kind,
        mode: 0o600,
        mtime: 5,
        owner: Some((0, 0)),
    }
}

/// Sends a file of five bytes to a peer that answers with `answer` after the end.
async fn sent(content: &[u8], answer: Vec<Message>) -> (Result<(), CliError>, Vec<u8>) {
    let (client, mut peer) = connection().await;
    let guest = tokio::spawn(async move {
        let request = next_json(&mut peer).await;
        assert_eq!(
            request,
            json!({
                "direction": "to", "guest_path": "/srv/file", "mode": 0o600, "uid": 0, "gid": 0, "mtime": 5
            })
        );
        let mut heard = Vec::new();
        while let Some(Ok(frame)) = peer.next().await {
            match frame {
                Message::Binary(bytes) => heard.extend_from_slice(&bytes),
                Message::Text(frame) => {
                    assert_eq!(frame.as_str(), r#"{"type":"end"}"#);
                    break;
                }
                _ => break,
            }
        }
        say(&mut peer, answer).await;
        heard
    });
    let file = outgoing(EntryKind::File { size: 5 });
    let outcome = send(client, &file, &mut Cursor::new(content), |_| ()).await;
    (outcome, guest.await.unwrap())
}

#[tokio::test]
async fn a_file_is_sent_whole_and_confirmed() {
    let confirmed = vec![text(r#"{"type":"result","success":true,"bytes_written":5}"#)];
    let (outcome, heard) = sent(b"hello and what grew meanwhile", confirmed).await;
    outcome.unwrap();
    assert_eq!(heard, b"hello");
}

#[tokio::test]
async fn a_copy_that_is_not_confirmed_is_a_failure() {
    let cases = [
        (
            vec![text(r#"{"type":"result","success":true,"bytes_written":4}"#)],
            "the guest says it wrote 4",
        ),
        (
            vec![text(r#"{"type":"result","success":true}"#)],
            "the guest says it wrote 0",
        ),
        (
            vec![text(r#"{"type":"result","success":false,"error":"no space"}"#)],
            "/srv/file: no space",
        ),
        (
            vec![text(r#"{"type":"error","message":"is a directory"}"#)],
            "is a directory",
        ),
        (vec![text("{}")], "not a copy message"),
        (vec![end(true)], "an entry of the guest"),
        (vec![Message::Close(None)], "before the copy was complete"),
        (vec![], "before the copy was complete"),
    ];
    for (answer, expected) in cases {
        let (outcome, _) = sent(b"hello", answer).await;
        let failure = outcome.expect_err(expected);
        assert!(
            failure.to_string().contains(expected),
            "{failure} instead of {expected}"
        );
    }
}

#[tokio::test]
async fn a_file_that_shrinks_is_never_announced_as_whole() {
    let (outcome, heard) = sent(b"hi", vec![]).await;
    assert!(outcome.unwrap_err().to_string().contains("became shorter"));
    assert_eq!(heard, b"hi");
}

#[test]
fn a_walk_lists_parents_first_and_keeps_links() {
    let place = tempfile::tempdir().unwrap();
    let top = place.path().join("top");
    fs::create_dir_all(top.join("b/c")).unwrap();
    fs::write(top.join("b/c/file"), "1234").unwrap();
    fs::write(top.join("a"), "12").unwrap();
    symlink("../a", top.join("b/link")).unwrap();
    let walked = walk(&top, false).unwrap();
    let names: Vec<_> = walked.entries.iter().map(|entry| entry.below.as_str()).collect();
    assert_eq!(names, ["", "a", "b", "b/c", "b/c/file", "b/link"]);
    assert_eq!(walked.bytes(), 6);
    assert_eq!(
        walked.entries[5].kind,
        EntryKind::Link {
            target: "../a".to_owned()
        }
    );
    assert_eq!(
        walk(&top, true).unwrap().entries[5].kind,
        EntryKind::File { size: 2 }
    );
    symlink("..", top.join("b/circle")).unwrap();
    assert!(walk(&top, true).unwrap_err().to_string().contains("circle"));
    assert!(walk(&top, false).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever frames a guest sends, nothing appears outside the destination and no temporary file stays.
    #[test]
    fn no_sequence_of_frames_escapes(
        frames in prop::collection::vec(
            prop_oneof![
                ("(data|data/[ab]|data/a/[bc]|\\.\\./x|/x|data/\\.\\./x)", any::<bool>(), any::<bool>(), 0u64..4,
                    "(a|\\.\\.|\\.\\./\\.\\.|/|a/b)?")
                    .prop_map(|(path, is_dir, is_symlink, size, link_target)| header(&path, json!({
                        "is_dir": is_dir, "is_symlink": is_symlink, "size": size, "link_target": link_target
                    }))),
                any::<bool>().prop_map(end),
                prop::collection::vec(any::<u8>(), 0..4).prop_map(|content| bytes(&content)),
            ],
            0..12,
        )
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let place = outside.path().join("place");
        fs::create_dir(&place).unwrap();
        let _ = runtime.block_on(received(&place, frames));
        prop_assert_eq!(listing(outside.path()).iter().filter(|name| !name.starts_with("place")).count(), 0);
        let strangers: Vec<_> = listing(&place).into_iter().filter(|name| {
            !name.starts_with("copy") || name.contains(".hypeman-cp-")
        }).collect();
        prop_assert!(strangers.is_empty(), "{:?}", strangers);
    }
}
