//! The channel with both ends in this process, over streams that behave badly.
// The lints' exception for tests does not reach helpers of integration tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]
#![cfg(feature = "host")]

use std::time::Duration;

use hypeman_guest_api::{
    AgentKey, ChannelError, EventMessage, ExecEvent, ExecRequest, GuestEvent, PathInfo, RefusalCode, Reply,
    Request,
    frame::{self, Frame, MAXIMUM_DATA, MAXIMUM_HEADER},
    handshake::{self, BeaconReader},
    host::{CopyItem, ExecOutput, GuestClient},
    mux::{GuestMux, MuxStream},
};
use proptest::prelude::*;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, duplex};

const KEY: AgentKey = AgentKey([7; 32]);
const SOON: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(60);

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// A guest that answers each stream by a function of the test's.
async fn guest<S, F, W>(mut stream: S, key: Option<AgentKey>, answer: F)
where
    S: AsyncRead + AsyncWrite + Unpin,
    F: Fn(Request, MuxStream) -> W + Send + 'static,
    W: Future<Output = ()> + Send + 'static,
{
    if handshake::guest(&mut stream, key.as_ref()).await.is_err() {
        return;
    }
    let mut mux = GuestMux::new(stream);
    while let Some(mut stream) = mux.next().await {
        let request = frame::read_header::<Request, _>(&mut stream).await.unwrap();
        tokio::spawn(answer(request, stream));
    }
}

async fn reply(stream: &mut MuxStream, reply: Reply) {
    frame::write_header(stream, &reply).await.unwrap();
}

/// Answers events and leaves the rest to the test.
async fn only_events(request: Request, mut stream: MuxStream) {
    if request == Request::Events {
        reply(&mut stream, Reply::Done).await;
        let event = EventMessage::Event {
            number: 0,
            event: GuestEvent::AgentReady,
        };
        frame::write_header(&mut stream, &event).await.unwrap();
    }
    // Held open: the test is about what does not come.
    std::future::pending::<()>().await;
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_handshake_finds_its_way_through_any_leftovers(
        to_guest in proptest::collection::vec(any::<u8>(), 0..300),
        to_host in proptest::collection::vec(any::<u8>(), 0..300),
        torn in 0..66usize,
    ) {
        runtime().block_on(async {
            let (mut host, mut guest_end) = duplex(1 << 16);
            // A host that died in the middle of its preamble, after whatever came before.
            host.write_all(&to_guest).await.unwrap();
            host.write_all(&b"\xa7hypeman-hello\r\n0123456789012345678901234567890123456789012345678"[..torn.min(65)]).await.unwrap();
            guest_end.write_all(&to_host).await.unwrap();
            let guest = tokio::spawn(async move { handshake::guest(&mut guest_end, Some(&KEY)).await.unwrap() });
            let agreed = handshake::host(&mut host, Some(&KEY), Duration::from_millis(1)).await.unwrap();
            assert!(agreed.configured);
            guest.await.unwrap();
        });
    }

    #[test]
    fn frames_survive_the_way_in_any_size(payload in proptest::collection::vec(any::<u8>(), 0..200_000)) {
        runtime().block_on(async {
            let (mut near, mut far) = duplex(1000);
            let sent = payload.clone();
            tokio::spawn(async move { frame::write_data(&mut near, &sent).await.unwrap() });
            let mut received = Vec::new();
            while let Some(frame) = frame::read_frame(&mut far).await.unwrap() {
                let Frame::Data(data) = frame else { panic!("data came as something else") };
                assert!(data.len() <= MAXIMUM_DATA);
                received.extend_from_slice(&data);
            }
            assert_eq!(received, payload);
        });
    }

    #[test]
    fn any_bytes_are_a_frame_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
        runtime().block_on(async {
            let mut reader = bytes.as_slice();
            // Never a panic, never more memory than the bytes.
            while let Ok(Some(_)) = frame::read_frame(&mut reader).await {}
        });
    }
}

#[tokio::test]
async fn a_length_that_lies_is_refused_before_anything_is_allocated() {
    for (kind, limit) in [(1u8, MAXIMUM_HEADER), (2, MAXIMUM_DATA), (3, MAXIMUM_DATA)] {
        let mut bytes = vec![kind];
        bytes.extend_from_slice(&(limit as u32 + 1).to_be_bytes());
        let error = frame::read_frame(&mut bytes.as_slice()).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidData);
        bytes[1..5].copy_from_slice(&(limit as u32).to_be_bytes());
        let error = frame::read_frame(&mut bytes.as_slice()).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
    }
}

#[tokio::test]
async fn only_the_holder_of_the_key_gets_in() {
    for (guest_key, host_key, expected) in [
        (Some(KEY), Some(AgentKey([8; 32])), "proof"),
        (Some(KEY), None, "key"),
        (Some(KEY), Some(KEY), "in"),
        (None, Some(KEY), "in"),
        (None, None, "in"),
    ] {
        let (host, guest_end) = duplex(1 << 16);
        let configured = guest_key.is_some();
        tokio::spawn(guest(guest_end, guest_key, only_events));
        let outcome = GuestClient::connect(host, host_key.as_ref(), LONG).await;
        match (expected, outcome) {
            ("in", Ok((client, mut events))) => {
                assert_eq!(client.is_configured(), configured);
                assert_eq!(events.next().await, Some(GuestEvent::AgentReady));
            }
            ("proof", Err(ChannelError::NotAuthentic)) | ("key", Err(ChannelError::KeyRequired)) => {}
            (expected, outcome) => panic!("{expected}: {:?}", outcome.err()),
        }
    }
}

#[tokio::test]
async fn a_guest_refuses_a_host_that_pretends() {
    // A man in the middle who answers for the guest learns nothing that opens the guest later: the guest's own
    // nonce is in the proof.
    let (mut host, mut guest_end) = duplex(1 << 16);
    let waiting = tokio::spawn(async move { handshake::guest(&mut guest_end, Some(&KEY)).await.is_ok() });
    let mut preamble = b"\xa7hypeman-hello\r\n\x00\x01".to_vec();
    preamble.resize(66, 1);
    host.write_all(&preamble).await.unwrap();
    let mut answer = [0; 16 + 32 + 67];
    host.read_exact(&mut answer).await.unwrap();
    let mut proof = b"\xa7hypeman-proof\r\n".to_vec();
    proof.extend_from_slice(&answer[51..83]);
    proof.extend_from_slice(&[0; 32]);
    host.write_all(&proof).await.unwrap();
    let mut begin = [0; 49];
    host.read_exact(&mut begin).await.unwrap();
    assert_eq!(begin[48], 1, "refused");
    assert!(!waiting.is_finished());
    drop(host);
    assert!(!waiting.await.unwrap());
}

#[tokio::test]
async fn a_guest_that_stays_silent_costs_a_deadline() {
    let (host, guest_end) = duplex(1 << 16);
    let error = GuestClient::connect(host, None, SOON).await.err().unwrap();
    assert!(matches!(error, ChannelError::Deadline), "{error}");
    drop(guest_end);

    let (host, guest_end) = duplex(1 << 16);
    tokio::spawn(guest(guest_end, Some(KEY), only_events));
    let (client, _events) = GuestClient::connect(host, Some(&KEY), LONG).await.unwrap();
    assert!(matches!(client.ping(SOON).await, Err(ChannelError::Deadline)));
}

#[tokio::test]
async fn the_end_of_the_stream_ends_everything() {
    let (host, guest_end) = duplex(1 << 16);
    let guest = tokio::spawn(guest(guest_end, Some(KEY), only_events));
    let (client, mut events) = GuestClient::connect(host, Some(&KEY), LONG).await.unwrap();
    events.next().await.unwrap();
    guest.abort();
    client.closed().await;
    assert!(events.next().await.is_none());
    assert!(matches!(client.stat("/", false).await, Err(ChannelError::Closed)));
}

#[tokio::test]
async fn a_closed_client_lets_go_under_its_sessions() {
    let (host, guest_end) = duplex(1 << 16);
    let guest = tokio::spawn(guest(guest_end, Some(KEY), only_events));
    let (client, mut events) = GuestClient::connect(host, Some(&KEY), LONG).await.unwrap();
    client.close();
    client.closed().await;
    guest.await.unwrap();
    while events.next().await.is_some() {}
}

#[tokio::test]
async fn sessions_of_a_connection_that_a_capture_ends_say_so_and_others_do_not() {
    use hypeman_guest_api::CopyFrom;
    let answer = |request: Request, mut stream: MuxStream| async move {
        match request {
            Request::Exec(_) => {
                reply(&mut stream, Reply::Done).await;
                frame::write_data(&mut stream, b"so far").await.unwrap();
                std::future::pending::<()>().await;
            }
            Request::CopyFrom(_) => {
                reply(&mut stream, Reply::Done).await;
                std::future::pending::<()>().await;
            }
            other => only_events(other, stream).await,
        }
    };
    for captured in [true, false] {
        // As over vsock: what the VMM ended at the guest's side stays open at this one.
        let (host, guest_end) = tokio::net::UnixStream::pair().unwrap();
        tokio::spawn(guest(guest_end, Some(KEY), answer));
        let (client, _events) = GuestClient::connect(host, Some(&KEY), LONG).await.unwrap();
        let mut command = client.exec(ExecRequest::default()).await.unwrap();
        let mut copy = client.copy_from(CopyFrom::default()).await.unwrap();
        let said = command.next().await.unwrap();
        assert_eq!(said, Some(ExecOutput::Stdout("so far".into())));
        if captured {
            client.note_captured();
        }
        client.close();
        for end in [
            command.next().await.map(drop).unwrap_err(),
            copy.next().await.map(drop).unwrap_err(),
        ] {
            assert_eq!(matches!(end, ChannelError::Captured), captured, "{end}");
            assert_eq!(matches!(end, ChannelError::Closed), !captured, "{end}");
        }
    }
}

#[tokio::test]
async fn a_flood_that_nobody_reads_stops_at_the_window_and_harms_no_one() {
    let (host, guest_end) = duplex(1 << 16);
    let (count_sender, mut count) = tokio::sync::watch::channel(0usize);
    let answer = move |request: Request, mut stream: MuxStream| {
        let count = count_sender.clone();
        async move {
            match request {
                Request::Exec(_) => {
                    reply(&mut stream, Reply::Done).await;
                    while frame::write_data(&mut stream, &[0; 16 * 1024]).await.is_ok() {
                        count.send_modify(|sent| *sent += 16 * 1024);
                    }
                }
                Request::Stat { .. } => reply(&mut stream, Reply::Path(PathInfo::default())).await,
                other => only_events(other, stream).await,
            }
        }
    };
    tokio::spawn(guest(guest_end, Some(KEY), answer));
    let (client, _events) = GuestClient::connect(host, Some(&KEY), LONG).await.unwrap();
    let mut session = client.exec(ExecRequest::default()).await.unwrap();
    count.wait_for(|sent| *sent >= 128 * 1024).await.unwrap();
    for _ in 0..200 {
        assert!(!client.stat("/", false).await.unwrap().exists);
    }
    // One window of 256 KiB and what is in flight, however long we wait.
    assert!(
        *count.borrow() <= 512 * 1024,
        "{} bytes went out",
        *count.borrow()
    );
    for _ in 0..100 {
        assert!(matches!(
            session.next().await.unwrap(),
            Some(ExecOutput::Stdout(_))
        ));
    }
}

#[tokio::test]
async fn a_guest_that_lies_about_a_copy_is_caught() {
    use hypeman_guest_api::{CopyEntry, CopyFrom, CopyMessage, EntryKind};
    let entry = |path: &str, kind, size| {
        CopyMessage::Entry(CopyEntry {
            path: path.into(),
            kind,
            mode: 0o644,
            uid: 0,
            gid: 0,
            size,
            modification_time_nanos: 0,
            link_target: None,
        })
    };
    let lies: Vec<(Vec<CopyMessage>, usize)> = vec![
        (vec![entry("../x", EntryKind::File, 0)], 0),
        (vec![entry("/x", EntryKind::File, 0)], 0),
        (vec![entry("a//x", EntryKind::File, 0)], 0),
        (vec![entry("d", EntryKind::Directory, 5)], 0),
        (vec![entry("f", EntryKind::File, 5)], 6),
        (vec![entry("f", EntryKind::File, 5), CopyMessage::End], 0),
    ];
    for (messages, bytes) in lies {
        let told = messages.clone();
        let (host, guest_end) = duplex(1 << 16);
        let answer = move |request: Request, mut stream: MuxStream| {
            let told = told.clone();
            async move {
                if !matches!(request, Request::CopyFrom(_)) {
                    return only_events(request, stream).await;
                }
                reply(&mut stream, Reply::Done).await;
                for message in &told {
                    frame::write_header(&mut stream, message).await.unwrap();
                }
                frame::write_data(&mut stream, &vec![0; bytes]).await.unwrap();
                std::future::pending::<()>().await;
            }
        };
        tokio::spawn(guest(guest_end, Some(KEY), answer));
        let (client, _events) = GuestClient::connect(host, Some(&KEY), LONG).await.unwrap();
        let mut copy = client.copy_from(CopyFrom::default()).await.unwrap();
        let error = loop {
            match copy.next().await {
                Ok(Some(CopyItem::Entry(_))) => {}
                Ok(other) => panic!("{messages:?}: {other:?}"),
                Err(error) => break error,
            }
        };
        assert!(
            matches!(error, ChannelError::Protocol(_)),
            "{messages:?}: {error}"
        );
    }
}

#[tokio::test]
async fn a_new_host_is_noticed_in_the_middle_of_a_stream() {
    let (mut host, guest_end) = duplex(1 << 16);
    let cell = std::sync::Arc::new(std::sync::Mutex::new(Some(handshake::beacon(&KEY))));
    let mut reader = BeaconReader::new(guest_end, cell);
    let mut preamble = b"bytes of a dead host ... \xa7hypeman-hello\r\n\0\x01".to_vec();
    preamble.extend_from_slice(&handshake::beacon(&KEY));
    for byte in preamble {
        // Byte by byte: the sign may be cut anywhere.
        host.write_all(&[byte]).await.unwrap();
    }
    let mut everything = Vec::new();
    let error = reader.read_to_end(&mut everything).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn the_future_may_add_words() {
    let refusal: hypeman_guest_api::Refusal =
        serde_json::from_str(r#"{"code":"a_code_of_next_year","message":"m","more":1}"#).unwrap();
    assert_eq!(refusal.code, RefusalCode::Failed);
    let event: ExecEvent = serde_json::from_str(r#"{"exited":{"code":3,"core_dumped":true}}"#).unwrap();
    assert_eq!(event, ExecEvent::Exited { code: 3 });
}
