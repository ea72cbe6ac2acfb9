//! Pagers are seen by who only looks: what answers, what is silent, and what is left of one that has ended.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::os::unix::net::UnixListener;
use std::time::Duration;

use hypeman_pager::{Found, Recording, ServiceOptions, Sighting, drain, serve, survey};

#[tokio::test]
async fn all_pagers_of_a_directory_are_seen_and_none_is_changed() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    // It has ended: its socket is left, and nobody listens.
    drop(UnixListener::bind(path("pager-0.7-aaaaaaaa.sock")).unwrap());
    std::fs::write(path("notes.sock"), "no pager's").unwrap();
    let socket = path("pager-0.9-cccccccc.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let options = ServiceOptions {
        socket: socket.clone(),
        release: "0.9".into(),
        cache_bytes: 1 << 20,
        graduate_after: None,
        recording: Recording::default(),
        lonely: Duration::from_secs(3600),
    };
    let service = std::thread::spawn(move || serve(listener, options));

    for _ in 0..2 {
        let seen = survey(directory.path(), "1.0", Duration::MAX).await.unwrap();
        let [gone, well] = seen.as_slice() else {
            panic!("two pagers: {seen:?}");
        };
        let left = Sighting {
            release: "0.7".into(),
            found: Found::Gone,
        };
        assert_eq!(*gone, left);
        let Found::Well { hello, health } = &well.found else {
            panic!("it answers: {well:?}");
        };
        assert_eq!((hello.release.as_str(), hello.draining), ("0.9", false));
        assert_eq!(hello.pid, i32::try_from(std::process::id()).unwrap());
        assert_eq!((hello.machines.len(), health.oldest_fault_ms), (0, 0));
    }
    assert_eq!(survey(&path("absent"), "1.0", Duration::ZERO).await.unwrap(), []);

    drain(&socket).await.unwrap();
    service.join().unwrap().unwrap();
}

#[tokio::test]
async fn one_that_never_answers_is_silent() {
    let directory = tempfile::tempdir().unwrap();
    let _deaf = UnixListener::bind(directory.path().join("pager-0.8-rc-bbbbbbbb.sock")).unwrap();
    let seen = survey(directory.path(), "1.0", Duration::from_millis(20))
        .await
        .unwrap();
    let silent = Sighting {
        release: "0.8-rc".into(),
        found: Found::Silent,
    };
    assert_eq!(seen, [silent]);
}
