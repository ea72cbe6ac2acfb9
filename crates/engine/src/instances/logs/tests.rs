//! A log is read from its last lines on, over rotations, to the end of its instance.

use std::io::Write;

use proptest::prelude::*;

use super::*;

async fn opened(path: &Path, tail: usize) -> Result<LogFollower, EngineError> {
    LogFollower::open(path, 1, tail, None).await
}

/// What keeps a log being followed: dropped, the instance is gone.
struct Life(LogWatcher, #[allow(dead_code)] tokio::sync::oneshot::Sender<()>);

async fn followed(path: &Path) -> Result<(LogFollower, Life), EngineError> {
    let (sender, gone) = tokio::sync::oneshot::channel();
    let life = Life(LogWatcher::default(), sender);
    let gone = Box::pin(async move { drop(gone.await) });
    let follower = LogFollower::open(path, 1, 10, Some((&life.0, gone))).await?;
    Ok((follower, life))
}

async fn lines(follower: &mut LogFollower) -> Vec<String> {
    let mut all = Vec::new();
    while let Some(line) = follower.next().await.unwrap() {
        all.push(String::from_utf8(line).unwrap());
    }
    all
}

#[tokio::test]
async fn the_tail_reaches_back_into_rotated_files() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("app.log");
    std::fs::write(rotated(&path, 1), "one\ntwo\nthree\n").unwrap();
    std::fs::write(&path, "four\r\nfive").unwrap();
    let mut follower = opened(&path, 3).await.unwrap();
    assert_eq!(lines(&mut follower).await, ["three", "four", "five"]);
    let mut all = opened(&path, 100).await.unwrap();
    assert_eq!(lines(&mut all).await, ["one", "two", "three", "four", "five"]);
}

#[tokio::test]
async fn a_log_that_was_never_written_is_not_found() {
    let directory = tempfile::tempdir().unwrap();
    let missing = opened(&directory.path().join("app.log"), 10).await;
    assert!(matches!(missing, Err(EngineError::LogNotFound)));
}

#[tokio::test]
async fn following_ends_when_the_instance_is_removed() {
    let directory = tempfile::tempdir().unwrap();
    let logs = directory.path().join("instance/logs");
    std::fs::create_dir_all(&logs).unwrap();
    let path = logs.join("app.log");
    let early = followed(&logs.join("none/app.log")).await;
    assert!(matches!(early, Err(EngineError::LogNotFound)));
    std::fs::write(&path, "one\nlast").unwrap();
    let (mut follower, life) = followed(&path).await.unwrap();
    assert_eq!(follower.next().await.unwrap().unwrap(), b"one");
    std::fs::remove_dir_all(&logs).unwrap();
    drop(life);
    assert_eq!(lines(&mut follower).await, ["last"]);
}

#[tokio::test]
async fn a_follower_that_comes_in_the_middle_of_a_rotation_sees_no_line_twice() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("app.log");
    std::fs::write(rotated(&path, 1), "one\n").unwrap();
    let (mut follower, _life) = followed(&path).await.unwrap();
    assert_eq!(follower.next().await.unwrap().unwrap(), b"one");
    std::fs::write(&path, "two\n").unwrap();
    assert_eq!(follower.next().await.unwrap().unwrap(), b"two");
}

#[tokio::test]
async fn a_long_line_survives_whole() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("app.log");
    let long = "x".repeat(1 << 20);
    std::fs::write(&path, format!("a\n{long}\nb\n")).unwrap();
    let mut follower = opened(&path, 2).await.unwrap();
    assert_eq!(lines(&mut follower).await, [long, "b".into()]);
}

#[tokio::test]
async fn a_follower_sees_each_line_once_while_the_log_rotates_under_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("app.log");
    let mut writer = std::fs::File::create(&path).unwrap();
    let (mut follower, _life) = followed(&path).await.unwrap();
    let (progress, reached) = std::sync::mpsc::channel();
    let writing = {
        let path = path.clone();
        tokio::task::spawn_blocking(move || {
            for number in 0..3_000 {
                if number % 500 == 499 {
                    // One rotated file is kept: the reader must have opened the one that goes now.
                    let oldest_kept = number - 999;
                    while oldest_kept > 0 && reached.recv().unwrap() < oldest_kept {}
                    std::fs::rename(&path, rotated(&path, 1)).unwrap();
                    // The old file still gets a line after its rename, as a VMM's would.
                    writeln!(writer, "{number}").unwrap();
                    writer = std::fs::File::create(&path).unwrap();
                } else {
                    writeln!(writer, "{number}").unwrap();
                }
            }
            writer
        })
    };
    for expected in 0..3_000 {
        let line = follower.next().await.unwrap().unwrap();
        assert_eq!(String::from_utf8(line).unwrap(), expected.to_string());
        let _ = progress.send(expected);
    }
    writing.await.unwrap();
}

#[tokio::test]
async fn a_follower_keeps_its_place_when_the_front_of_a_file_moves_to_the_rotated_one() {
    for read_before in [1, 3] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmm.log");
        std::fs::write(&path, "one\ntwo\nthree\n").unwrap();
        let (mut follower, _life) = followed(&path).await.unwrap();
        for expected in ["one", "two", "three"].into_iter().take(read_before) {
            assert_eq!(follower.next().await.unwrap().unwrap(), expected.as_bytes());
        }
        // The same file as before, without its first two lines.
        std::fs::write(rotated(&path, 1), "one\ntwo\n").unwrap();
        std::fs::write(&path, "three\n").unwrap();
        let mut file = std::fs::File::options().append(true).open(&path).unwrap();
        for expected in ["one", "two", "three"].into_iter().skip(read_before) {
            assert_eq!(follower.next().await.unwrap().unwrap(), expected.as_bytes());
        }
        let next = tokio::spawn(async move { follower.next().await.unwrap().unwrap() });
        tokio::task::yield_now().await;
        writeln!(file, "four").unwrap();
        assert_eq!(next.await.unwrap(), b"four");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn the_tail_is_what_splitting_the_whole_would_give(
        text in prop::collection::vec("[a-z]{0,9}", 0..30),
        ends_with_newline in any::<bool>(),
        tail in 0_usize..40,
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("app.log");
        let mut content = text.join("\n");
        if ends_with_newline && !content.is_empty() {
            content.push('\n');
        }
        std::fs::write(&path, &content).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let found = runtime.block_on(async {
            lines(&mut opened(&path, tail).await.unwrap()).await
        });
        let all: Vec<&str> = content.lines().collect();
        prop_assert_eq!(found, all[all.len().saturating_sub(tail)..].to_vec());
    }
}
