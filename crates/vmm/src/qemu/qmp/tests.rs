//! The client against a peer that we play ourselves, well and badly.

use std::sync::Mutex;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::*;

const SOON: Duration = Duration::from_secs(20);

struct Peer {
    reader: tokio::io::Lines<BufReader<tokio::io::ReadHalf<DuplexStream>>>,
    writer: tokio::io::WriteHalf<DuplexStream>,
}

impl Peer {
    async fn send(&mut self, bytes: &str) {
        self.writer.write_all(bytes.as_bytes()).await.unwrap();
    }

    async fn question(&mut self) -> Value {
        serde_json::from_str(&self.reader.next_line().await.unwrap().unwrap()).unwrap()
    }

    /// The part of a well-behaved start.
    async fn greet(&mut self) {
        self.send("{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n")
            .await;
        let question = self.question().await;
        assert_eq!(question["execute"], "qmp_capabilities");
        self.answer(&question, json!({})).await;
    }

    async fn answer(&mut self, question: &Value, value: Value) {
        let line = json!({ "return": value, "id": question["id"] }).to_string() + "\r\n";
        self.send(&line).await;
    }
}

fn pair() -> (DuplexStream, Peer) {
    let (ours, theirs) = tokio::io::duplex(4096);
    let (read, writer) = tokio::io::split(theirs);
    (
        ours,
        Peer {
            reader: BufReader::new(read).lines(),
            writer,
        },
    )
}

async fn negotiate(ours: DuplexStream, events: EventSink) -> Result<QmpClient, QmpError> {
    let (read, write) = tokio::io::split(ours);
    QmpClient::negotiate(read, write, events).await
}

fn no_events() -> EventSink {
    Arc::new(|_| {})
}

async fn connected(events: EventSink) -> (QmpClient, Peer) {
    let (ours, mut peer) = pair();
    let (client, ()) = tokio::join!(negotiate(ours, events), peer.greet());
    (client.unwrap(), peer)
}

#[tokio::test]
async fn answers_find_their_questions_in_any_order() {
    let (client, mut peer) = connected(no_events()).await;
    let first = client.execute("query-status", Value::Null, SOON);
    let second = client.execute("query-name", json!({ "full": true }), SOON);
    let peer_part = async {
        let one = peer.question().await;
        let two = peer.question().await;
        assert_eq!(two["arguments"]["full"], true);
        peer.answer(&two, json!("second")).await;
        peer.answer(&one, json!("first")).await;
    };
    let (first, second, ()) = tokio::join!(first, second, peer_part);
    assert_eq!(first.unwrap(), "first");
    assert_eq!(second.unwrap(), "second");
}

#[tokio::test]
async fn a_refusal_carries_the_words_of_the_vmm() {
    let (client, mut peer) = connected(no_events()).await;
    let peer_part = async {
        let question = peer.question().await;
        let line =
            json!({ "error": { "class": "GenericError", "desc": "no such thing" }, "id": question["id"] });
        peer.send(&format!("{line}\n")).await;
    };
    let (answer, ()) = tokio::join!(client.execute("cont", Value::Null, SOON), peer_part);
    assert!(matches!(answer, Err(QmpError::Refused(message)) if message == "no such thing"));
}

#[tokio::test]
async fn a_peer_that_hangs_costs_one_caller_its_deadline_and_the_connection_goes_on() {
    let (client, mut peer) = connected(no_events()).await;
    let answer = client
        .execute("stop", Value::Null, Duration::from_millis(20))
        .await;
    assert!(matches!(answer, Err(QmpError::Timeout)));
    assert!(
        lock(&client.pending).answers.is_empty(),
        "nobody waits for the late answer"
    );
    let peer_part = async {
        let late = peer.question().await;
        peer.answer(&late, json!("late")).await;
        let question = peer.question().await;
        peer.answer(&question, json!("in time")).await;
    };
    let (answer, ()) = tokio::join!(client.execute("query-status", Value::Null, SOON), peer_part);
    assert_eq!(answer.unwrap(), "in time");
}

#[tokio::test]
async fn a_peer_that_reads_nothing_fills_a_bounded_queue_and_every_caller_gets_away() {
    let (client, _peer) = connected(no_events()).await;
    let padding = "x".repeat(64 * 1024);
    let callers = (0..OUTGOING_LIMIT + 20).map(|_| {
        client.execute(
            "stop",
            json!({ "padding": padding.clone() }),
            Duration::from_millis(50),
        )
    });
    let mut outcomes = Vec::new();
    for caller in callers.map(Box::pin).collect::<Vec<_>>() {
        outcomes.push(caller.await);
    }
    assert!(
        outcomes
            .iter()
            .all(|outcome| matches!(outcome, Err(QmpError::Timeout)))
    );
    assert!(lock(&client.pending).answers.is_empty());
}

#[tokio::test]
async fn half_lines_and_lines_in_one_piece_are_put_together() {
    let (client, mut peer) = connected(no_events()).await;
    let peer_part = async {
        let question = peer.question().await;
        let text = format!(
            "{{\"event\":\"STOP\"}}\r\n{{\"return\": {{\"a\": 1}}, \"id\": {}}}\r\n",
            question["id"]
        );
        for piece in text.as_bytes().chunks(3) {
            peer.writer.write_all(piece).await.unwrap();
            tokio::task::yield_now().await;
        }
    };
    let (answer, ()) = tokio::join!(client.execute("query", Value::Null, SOON), peer_part);
    assert_eq!(answer.unwrap()["a"], 1);
}

#[tokio::test]
async fn events_arrive_in_order_and_a_flood_does_not_drown_an_answer() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&seen);
    let (client, mut peer) = connected(Arc::new(move |event| sink.lock().unwrap().push(event))).await;
    let peer_part = async {
        let question = peer.question().await;
        for number in 0..5000 {
            peer.send(&format!(
                "{{\"event\": \"TICK\", \"data\": {{\"n\": {number}}}, \"timestamp\": {{}}}}\n"
            ))
            .await;
        }
        peer.send("not JSON at all\n{\"return\": {}, \"id\": 99999}\n{\"id\": \"text\"}\n[]\n")
            .await;
        peer.answer(&question, json!("after the flood")).await;
    };
    let (answer, ()) = tokio::join!(client.execute("query", Value::Null, SOON), peer_part);
    assert_eq!(answer.unwrap(), "after the flood");
    let numbers: Vec<u64> = seen
        .lock()
        .unwrap()
        .iter()
        .map(|event| event.data["n"].as_u64().unwrap())
        .collect();
    assert_eq!(numbers, (0..5000).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_line_without_end_ends_the_connection_instead_of_filling_memory() {
    let (client, mut peer) = connected(no_events()).await;
    let peer_part = async {
        let chunk = "y".repeat(16 * 1024);
        while peer.writer.write_all(chunk.as_bytes()).await.is_ok() {
            if client.is_closed() {
                break;
            }
        }
    };
    let (answer, ()) = tokio::join!(client.execute("query", Value::Null, SOON), peer_part);
    assert!(matches!(answer, Err(QmpError::Closed(_))));
    assert!(client.is_closed());
}

#[tokio::test]
async fn the_end_of_the_peer_answers_all_who_wait() {
    let (client, mut peer) = connected(no_events()).await;
    let peer_part = async {
        peer.question().await;
        drop(peer);
    };
    let (answer, ()) = tokio::join!(client.execute("quit", Value::Null, SOON), peer_part);
    assert!(matches!(answer, Err(QmpError::Closed(_))));
    assert!(matches!(
        client.execute("query", Value::Null, SOON).await,
        Err(QmpError::Closed(_))
    ));
}

#[tokio::test]
async fn something_else_behind_the_socket_is_refused() {
    for greeting in ["HTTP/1.1 400 Bad Request\r\n", "{\"event\": \"STOP\"}\n", "[]\n"] {
        let (ours, mut peer) = pair();
        let (client, ()) = tokio::join!(negotiate(ours, no_events()), peer.send(greeting));
        assert!(matches!(client, Err(QmpError::Closed(_))));
    }
}

#[tokio::test]
async fn a_silent_socket_is_given_up_after_the_deadline() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qmp.sock");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let outcome = QmpClient::connect(&path, Duration::from_millis(20), no_events()).await;
    assert!(matches!(outcome, Err(QmpError::Timeout)));
    let (mut stream, _) = listener.accept().await.unwrap();
    assert_eq!(
        stream.read(&mut [0; 16]).await.unwrap(),
        0,
        "the client went away"
    );
    let missing = QmpClient::connect(&directory.path().join("none"), SOON, no_events()).await;
    assert!(matches!(missing, Err(QmpError::Connect(_))));
}
