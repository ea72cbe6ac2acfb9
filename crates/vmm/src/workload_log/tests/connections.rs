//! Connections that end, restored guests, lying guests.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use hypeman_guest_api::workload_log::{HELD, OFFSET, START, TOKEN};

use super::*;

async fn end_of(stream: &mut UnixStream) {
    let mut rest = Vec::new();
    // Reset or closed.
    let _ = stream.read_to_end(&mut rest).await;
}

#[tokio::test]
async fn what_is_printed_is_in_a_private_file_when_it_is_acknowledged() {
    let place = Place::new();
    let log = place.listen();
    let mut guest = place.guest();
    guest.print(b"one\xff\0");
    guest.deliver().await;
    assert_eq!(fs::read(place.log()).unwrap(), b"one\xff\0");
    for path in [place.log(), beside(&place.log(), ".position")] {
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
    }
    guest.print(b"two");
    guest.deliver().await;
    assert_eq!(fs::read(place.log()).unwrap(), b"one\xff\0two");
    drop(log);
    assert!(!place.socket().exists());
}

#[tokio::test]
async fn a_guest_that_goes_away_with_words_under_way_has_them_written() {
    let place = Place::new();
    let log = place.listen();
    let mut guest = place.guest();
    guest.fill(HELD);
    while guest.outbox.room() == 0 {
        guest.step().await;
    }
    let sent = loop {
        let piece = guest.outbox.unsent();
        match guest.stream.as_mut().unwrap().try_write(piece) {
            Ok(count) => guest.outbox.left(count),
            Err(_) => break guest.printed.len() - guest.outbox.unsent().len(),
        }
        if guest.outbox.unsent().is_empty() {
            break guest.printed.len();
        }
    };
    drop(guest.stream.take());
    log.settled().await;
    let written = place.content();
    assert!(written.len() <= sent && guest.printed.starts_with(&written));
    guest.deliver().await;
    assert!(place.content() == guest.printed);
}

#[tokio::test]
async fn listening_again_goes_on_where_it_stopped() {
    let place = Place::new();
    let mut guest = place.guest();
    for round in 0..20 {
        let log = place.listen();
        guest.fill(200_000);
        guest.some_steps(round).await;
        drop(log);
    }
    let _log = place.listen();
    guest.deliver().await;
    assert!(place.content() == guest.printed);
}

#[tokio::test]
async fn a_restored_guest_neither_loses_nor_repeats_what_was_under_way() {
    let place = Place::new();
    let mut log = place.listen();
    let mut guest = place.guest();
    for round in 0..20 {
        guest.fill(200_000);
        guest.some_steps(round).await;
        // Standby: what the VMM still had is written or not; the memory knows nothing of it.
        let captured = guest.captured();
        drop(guest);
        if round % 2 == 0 {
            log.settled().await;
        }
        drop(log);
        guest = captured;
        log = place.listen();
    }
    guest.deliver().await;
    assert!(place.content() == guest.printed);
}

#[tokio::test]
async fn a_guest_taken_back_to_an_older_instant_goes_on_from_there() {
    let place = Place::new();
    let _log = place.listen();
    let mut guest = place.guest();
    guest.print(b"first ");
    guest.deliver().await;
    let mut older = guest.captured();
    guest.print(b"forgotten ");
    guest.deliver().await;
    older.print(b"second ");
    older.deliver().await;
    assert_eq!(place.content(), b"first forgotten second ");
    // What was under way is written once where it surely came, and again where nobody can know.
    older.print(b"third ");
    let mut oldest = older.captured();
    older.connect().await;
    older.deliver().await;
    oldest.print(b"fourth");
    oldest.deliver().await;
    assert_eq!(place.content(), b"first forgotten second third third fourth");
}

#[tokio::test]
async fn a_fork_begins_with_what_its_source_had_under_way() {
    let place = Place::new();
    let _log = place.listen();
    let mut source = place.guest();
    source.print(b"old ");
    source.deliver().await;
    source.print(b"under way ");
    let mut fork = source.captured();
    source.deliver().await;
    let other = Place::new();
    let _other_log = other.listen();
    fork.socket = other.socket();
    fork.print(b"own");
    fork.deliver().await;
    assert_eq!(other.content(), b"under way own");
}

#[tokio::test]
async fn a_newer_connection_replaces_an_older_one() {
    let place = Place::new();
    let log = place.listen();
    let mut guest = place.guest();
    guest.print(b"one ");
    guest.deliver().await;
    let mut older = guest.stream.take().unwrap();
    // One that says nothing, and one that says what nobody understands, change nothing.
    let silent = UnixStream::connect(place.socket()).await.unwrap();
    let mut garbage = UnixStream::connect(place.socket()).await.unwrap();
    garbage.write_all(&[b'x'; 10 * HELLO]).await.unwrap();
    end_of(&mut garbage).await;
    assert!(
        older
            .try_read(&mut [0])
            .is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    );
    guest.print(b"two ");
    guest.deliver().await;
    end_of(&mut older).await;
    drop(silent);
    assert_eq!(place.content(), b"one two ");
    drop(guest);
    log.settled().await;
}

#[tokio::test]
async fn whoever_listens_later_takes_over() {
    let place = Place::new();
    let earlier = place.listen();
    let mut guest = place.guest();
    guest.fill(HELD);
    guest.some_steps(3).await;
    // Its machine has ended, but its handle is not dropped yet.
    let _log = place.listen();
    let refused = earlier.reopen().await;
    assert!(matches!(refused, Err(VmmError::Gone)));
    guest.deliver().await;
    drop(earlier);
    guest.fill(100_000);
    guest.deliver().await;
    assert!(place.socket().exists());
    assert!(place.content() == guest.printed);
}

#[tokio::test]
async fn a_lying_guest_spoils_nothing_but_its_own_log() {
    let place = Place::new();
    let _log = place.listen();
    let hello = |first, sent| Hello {
        token: [9; TOKEN],
        first,
        sent,
    };
    // At the end of all offsets.
    let mut liar = UnixStream::connect(place.socket()).await.unwrap();
    liar.write_all(&hello(u64::MAX - 3, u64::MAX).encode())
        .await
        .unwrap();
    let mut answer = [0; START];
    liar.read_exact(&mut answer).await.unwrap();
    let _ = liar.write_all(b"more than fits").await;
    end_of(&mut liar).await;
    // Backwards.
    let mut liar = UnixStream::connect(place.socket()).await.unwrap();
    liar.write_all(&hello(7, 3).encode()).await.unwrap();
    end_of(&mut liar).await;
    // One that never listens: it may send until all buffers are full, and is replaced like any other.
    let mut liar = UnixStream::connect(place.socket()).await.unwrap();
    liar.write_all(&hello(0, 0).encode()).await.unwrap();
    for _ in 0..100_000 / OFFSET {
        if liar.try_write(b"x").is_err() {
            tokio::task::yield_now().await;
        }
    }
    let mut guest = place.guest();
    guest.print(b"honest");
    guest.deliver().await;
    end_of(&mut liar).await;
    let content = place.content();
    let (lies, truth) = content.split_at(content.len() - b"honest".len());
    assert!(lies.iter().all(|byte| *byte == b'x'));
    assert_eq!(truth, b"honest");
}
