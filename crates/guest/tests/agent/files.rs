//! Files, links and trees, in and out.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::time::Duration;

use hypeman_guest_api::host::CopyItem;
use hypeman_guest_api::{ChannelError, CopyFrom, CopyTo, EntryKind, RefusalCode};

use super::Guest;

#[tokio::test]
async fn files_links_and_trees_go_both_ways() {
    let (_guest, client) = Guest::configured().await;
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let write = |request: CopyTo, content: &'static [u8]| {
        let client = client.clone();
        async move {
            let mut copy = client.copy_to(request).await?;
            copy.send(content).await?;
            copy.finish().await
        }
    };
    let time = Some(1_234_567_890_987_654_321);
    let file = CopyTo {
        path: at("tree/sub/file"),
        mode: Some(0o640),
        modification_time_nanos: time,
        ..CopyTo::default()
    };
    assert_eq!(write(file, b"content").await.unwrap(), 7);
    let link = CopyTo {
        path: at("tree/link"),
        symlink_target: Some("sub/file".into()),
        ..CopyTo::default()
    };
    assert_eq!(write(link, b"").await.unwrap(), 0);
    let made = CopyTo {
        path: at("tree/empty"),
        is_directory: true,
        mode: Some(0o700),
        ..CopyTo::default()
    };
    assert_eq!(write(made, b"").await.unwrap(), 0);

    // A link to a file is written through, a running program can be replaced, a mode is kept.
    let through = CopyTo {
        path: at("tree/link"),
        ..CopyTo::default()
    };
    assert_eq!(write(through, b"other").await.unwrap(), 5);
    assert_eq!(fs::read(at("tree/sub/file")).unwrap(), b"other");
    assert_eq!(
        fs::metadata(at("tree/sub/file")).unwrap().permissions().mode() & 0o7777,
        0o640
    );

    let refusal = |outcome: Result<u64, ChannelError>| outcome.err().and_then(|error| error.refusal());
    let onto_directory = CopyTo {
        path: at("tree/sub"),
        ..CopyTo::default()
    };
    assert_eq!(
        refusal(write(onto_directory, b"x").await),
        Some(RefusalCode::IsDirectory)
    );
    let onto_file = CopyTo {
        path: at("tree/sub/file"),
        is_directory: true,
        ..CopyTo::default()
    };
    assert_eq!(
        refusal(write(onto_file, b"").await),
        Some(RefusalCode::NotDirectory)
    );

    // A transfer that stops half-way leaves what was there.
    let mut torn = client
        .copy_to(CopyTo {
            path: at("tree/sub/file"),
            ..CopyTo::default()
        })
        .await
        .unwrap();
    torn.send(b"half").await.unwrap();
    drop(torn);
    while fs::read_dir(at("tree/sub")).unwrap().count() > 1 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(fs::read(at("tree/sub/file")).unwrap(), b"other");

    symlink("..", at("tree/sub/up")).unwrap();
    for (follow_links, loops) in [(false, 0), (true, 1)] {
        let mut copy = client
            .copy_from(CopyFrom {
                path: at("tree"),
                follow_links,
            })
            .await
            .unwrap();
        let (mut entries, mut failures) = (Vec::new(), 0);
        while let Some(item) = copy.next().await.unwrap() {
            match item {
                CopyItem::Entry(entry) => entries.push(entry),
                CopyItem::Data(data) => assert_eq!(&data[..], b"other"),
                CopyItem::Failed { .. } => failures += 1,
            }
        }
        assert_eq!(failures, loops, "a link to a parent ends there");
        assert_eq!(entries[0].path, "tree");
        for (number, entry) in entries.iter().enumerate().skip(1) {
            let (parent, _) = entry.path.rsplit_once('/').unwrap();
            let known = |entry: &hypeman_guest_api::CopyEntry| entry.path == parent;
            assert!(
                entries[..number].iter().any(known),
                "parents first: {}",
                entry.path
            );
        }
        let link = entries.iter().find(|entry| entry.path == "tree/link").unwrap();
        assert_eq!(
            link.kind,
            if follow_links {
                EntryKind::File
            } else {
                EntryKind::Symlink
            }
        );
    }
    let missing = client
        .copy_from(CopyFrom {
            path: at("none"),
            ..CopyFrom::default()
        })
        .await
        .err()
        .unwrap();
    assert_eq!(missing.refusal(), Some(RefusalCode::NotFound));

    let info = client.stat(&at("tree/link"), false).await.unwrap();
    assert_eq!(
        (info.exists, info.is_symlink, info.link_target.as_deref()),
        (true, true, Some("sub/file"))
    );
    let info = client.stat(&at("tree/link"), true).await.unwrap();
    assert_eq!((info.is_file, info.size, info.is_symlink), (true, 5, false));
    assert!(
        !client
            .stat(&at("tree/sub/file/below"), true)
            .await
            .unwrap()
            .exists
    );
}
