//! Exec and copy frames, with the real agent running as a part of this process instead of in a VM.

use std::future::Future;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::ws::WebSocketUpgrade;
use axum::routing::get;
use futures::{SinkExt as _, StreamExt as _};
use hypeman_guest::agent::{Agent, Machine, Reaper};
use hypeman_guest_api::host::GuestClient;
use hypeman_guest_api::{AgentKey, GuestConfig, GuestEvent, InitMode, Program, Reconfiguration};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use crate::handlers::{copy, exec};
use crate::state::Stage;

/// A machine that is this process.
struct NoMachine;

impl Machine for NoMachine {
    fn configure<'a>(
        &'a self,
        agent: &'a Rc<Agent>,
        _: &'a GuestConfig,
    ) -> Pin<Box<dyn Future<Output = Result<(), String>> + 'a>> {
        Box::pin(async move {
            agent.events.push(GuestEvent::ProgramStarted);
            Ok(())
        })
    }

    fn reconfigure(&self, _: &Reconfiguration) -> Result<(), String> {
        Ok(())
    }

    fn set_time(&self, _: i128) -> Result<(), String> {
        Ok(())
    }

    fn freeze(&self) -> Pin<Box<dyn Future<Output = Result<(), String>> + '_>> {
        Box::pin(async { Ok(()) })
    }

    fn thaw(&self) {}

    fn session_group(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn shutdown(&self, agent: &Rc<Agent>, _: Duration) {
        agent.begin_ending();
    }
}

async fn guest() -> GuestClient {
    let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, async move {
            let agent = Agent::new(Box::new(NoMachine), Reaper::start(false).unwrap());
            far.set_nonblocking(true).unwrap();
            agent.serve(tokio::net::UnixStream::from_std(far).unwrap()).await;
        });
    });
    near.set_nonblocking(true).unwrap();
    let stream = tokio::net::UnixStream::from_std(near).unwrap();
    let deadline = Duration::from_secs(120);
    let (client, _) = GuestClient::connect(stream, None, deadline).await.unwrap();
    let program = Program {
        argv: vec!["true".into()],
        environment: Vec::new(),
        working_directory: String::new(),
        user: String::new(),
    };
    let config = GuestConfig {
        key: AgentKey([1; 32]),
        instance_id: "id".into(),
        hostname: "test".into(),
        time_unix_nanos: 0,
        entropy: Vec::new(),
        init_mode: InitMode::Exec,
        program,
        network: None,
        volumes: Vec::new(),
        skip_agent: false,
    };
    client.configure(&config, deadline).await.unwrap();
    client
}

/// A server with the two endpoints in front of one guest.
struct Streams {
    base: String,
    /// Dropping it would end all sessions.
    _stage: Arc<watch::Sender<Stage>>,
}

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

impl Streams {
    async fn start() -> Self {
        let client = guest().await;
        let (stage, watched) = watch::channel(Stage::Serving);
        let for_exec = client.clone();
        let router = axum::Router::new()
            .route(
                "/exec",
                get(move |upgrade: WebSocketUpgrade| async move {
                    upgrade.on_upgrade(move |socket| {
                        let guest = move || Ok(for_exec.clone());
                        exec::session(guest, watched, "id".into(), "tester".into(), socket)
                    })
                }),
            )
            .route(
                "/cp",
                get(move |upgrade: WebSocketUpgrade| async move {
                    upgrade.on_upgrade(move |socket| copy::transfer(client, socket))
                }),
            );
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("ws://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self {
            base,
            _stage: Arc::new(stage),
        }
    }

    async fn open(&self, path: &str) -> Socket {
        tokio_tungstenite::connect_async(format!("{}{path}", self.base))
            .await
            .unwrap()
            .0
    }

    async fn exec(&self, request: Value) -> Socket {
        let mut socket = self.open("/exec").await;
        send(&mut socket, &request).await;
        socket
    }

    async fn run(&self, request: Value) -> (Vec<u8>, Value) {
        let mut socket = self.exec(request).await;
        finish(&mut socket).await
    }

    async fn upload(&self, request: Value, content: &[u8]) -> Value {
        let mut socket = self.open("/cp").await;
        send(&mut socket, &request).await;
        for chunk in content.chunks(32 * 1024) {
            socket.send(Message::binary(chunk.to_vec())).await.unwrap();
        }
        send(&mut socket, &json!({"type": "end"})).await;
        text(&mut socket).await
    }

    /// All frames of a download; content as strings.
    async fn download(&self, request: Value) -> Vec<Value> {
        let mut socket = self.open("/cp").await;
        send(&mut socket, &request).await;
        let mut frames = Vec::new();
        while let Some(Ok(message)) = socket.next().await {
            match message {
                Message::Text(text) => {
                    let frame: Value = serde_json::from_str(&text).unwrap();
                    if frame["final"] == true {
                        // The server leaves the first word to the client, as SDKs need it.
                        socket.close(None).await.unwrap();
                    }
                    frames.push(frame);
                }
                Message::Binary(data) => {
                    assert!(data.len() <= 32 * 1024);
                    frames.push(Value::from(String::from_utf8(data.to_vec()).unwrap()));
                }
                _ => {}
            }
        }
        frames
    }
}

async fn send(socket: &mut Socket, frame: &Value) {
    socket.send(Message::text(frame.to_string())).await.unwrap();
}

async fn text(socket: &mut Socket) -> Value {
    loop {
        match socket.next().await.unwrap().unwrap() {
            Message::Text(text) => return serde_json::from_str(&text).unwrap(),
            Message::Ping(_) | Message::Pong(_) => {}
            other => panic!("unexpected {other:?}"),
        }
    }
}

/// Output until the control frame, which must be the last frame.
async fn finish(socket: &mut Socket) -> (Vec<u8>, Value) {
    let mut output = Vec::new();
    loop {
        match socket.next().await.unwrap().unwrap() {
            Message::Binary(data) => {
                assert!(data.len() <= 32 * 1024, "{}", data.len());
                output.extend_from_slice(&data);
            }
            Message::Text(text) => {
                let control = serde_json::from_str(&text).unwrap();
                assert!(matches!(socket.next().await, Some(Ok(Message::Close(_)))));
                return (output, control);
            }
            _ => {}
        }
    }
}

fn sh(script: &str) -> Value {
    json!({"command": ["sh", "-c", script], "tty": false})
}

#[tokio::test(flavor = "multi_thread")]
async fn output_is_merged_and_the_exit_code_comes_alone() {
    let streams = Streams::start().await;
    let (output, control) = streams.run(sh("echo out; echo err >&2; exit 7")).await;
    let mut lines: Vec<&str> = std::str::from_utf8(&output).unwrap().lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["err", "out"]);
    assert_eq!(control, json!({"exitCode": 7}));
}

#[tokio::test(flavor = "multi_thread")]
async fn environment_and_directory() {
    let streams = Streams::start().await;
    let mut request = sh("echo $WORD; pwd");
    request["env"] = json!({"WORD": "hello"});
    request["cwd"] = json!("/usr");
    assert_eq!(
        streams.run(request).await,
        (b"hello\n/usr\n".to_vec(), json!({"exitCode": 0}))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_run_says_so_and_exits_127() {
    let streams = Streams::start().await;
    let (output, control) = streams.run(json!({"command": ["/no/such/program"]})).await;
    assert!(
        output.starts_with(b"Error: ") && output.ends_with(b"\r\n"),
        "{:?}",
        String::from_utf8_lossy(&output)
    );
    assert_eq!(control, json!({"exitCode": 127}));
}

#[tokio::test(flavor = "multi_thread")]
async fn input_reaches_the_command_and_can_end() {
    let streams = Streams::start().await;
    let mut socket = streams.exec(sh("cat; echo done")).await;
    socket
        .send(Message::binary(&b"binary \xff\0 input\n"[..]))
        .await
        .unwrap();
    socket.send(Message::text("typed text\n")).await.unwrap();
    send(&mut socket, &json!({"stdin": "eof"})).await;
    let (output, control) = finish(&mut socket).await;
    assert_eq!(output, b"binary \xff\0 input\ntyped text\ndone\n");
    assert_eq!(control, json!({"exitCode": 0}));
}

#[tokio::test(flavor = "multi_thread")]
async fn much_data_both_ways_at_once() {
    let streams = Streams::start().await;
    let mut socket = streams.exec(sh("cat")).await;
    let input: Vec<u8> = (0..3u32 << 20)
        .map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let expected = input.clone();
    let (mut sink, mut stream) = socket.split();
    let sender = tokio::spawn(async move {
        // One message of several megabytes, as the SDK sends its input.
        sink.send(Message::binary(input)).await.unwrap();
        sink.send(Message::text(r#"{"stdin":"eof"}"#)).await.unwrap();
        sink
    });
    let mut output = Vec::new();
    loop {
        match stream.next().await.unwrap().unwrap() {
            Message::Binary(data) => output.extend_from_slice(&data),
            Message::Text(text) => {
                assert_eq!(text, r#"{"exitCode":0}"#);
                break;
            }
            _ => {}
        }
    }
    assert!(output == expected);
    socket = sender.await.unwrap().reunite(stream).unwrap();
    let _ = socket.close(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_has_a_size_that_changes() {
    let streams = Streams::start().await;
    let request =
        json!({"command": ["sh", "-c", "stty size; read x; stty size"], "tty": true, "rows": 30, "cols": 90});
    let mut socket = streams.exec(request).await;
    let mut output = Vec::new();
    while !output.ends_with(b"30 90\r\n") {
        if let Message::Binary(data) = socket.next().await.unwrap().unwrap() {
            output.extend_from_slice(&data);
        }
    }
    send(&mut socket, &json!({"resize": {"rows": 40, "cols": 120}})).await;
    socket.send(Message::binary(&b"\n"[..])).await.unwrap();
    let (rest, control) = finish(&mut socket).await;
    assert!(String::from_utf8_lossy(&rest).contains("40 120"), "{rest:?}");
    assert_eq!(control, json!({"exitCode": 0}));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_timeout_ends_the_command() {
    let streams = Streams::start().await;
    let mut request = sh("sleep 1000");
    request["timeout"] = json!(1);
    assert_eq!(streams.run(request).await.1, json!({"exitCode": 124}));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_takes_its_command_along() {
    let streams = Streams::start().await;
    let directory = tempfile::tempdir().unwrap();
    let pipe = directory.path().join("held");
    std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
    // The reader sees the end of the pipe when the command that holds it open is gone.
    let mut socket = streams
        .exec(sh(&format!(
            "exec 3>{}; echo ready; exec sleep 1000",
            pipe.display()
        )))
        .await;
    let reader = tokio::spawn({
        let pipe = pipe.clone();
        async move { tokio::fs::read(pipe).await.unwrap() }
    });
    assert_eq!(socket.next().await.unwrap().unwrap().into_data(), "ready\n");
    drop(socket);
    assert!(reader.await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn first_frames_that_are_no_request() {
    let streams = Streams::start().await;
    for first in [
        Message::binary(&b"x"[..]),
        Message::text("x"),
        Message::text("[]"),
        Message::text(r#"{"command":"ls"}"#),
    ] {
        let mut socket = streams.open("/exec").await;
        socket.send(first).await.unwrap();
        assert!(text(&mut socket).await["error"].is_string());
    }
    for first in [
        Message::binary(&b"x"[..]),
        Message::text("x"),
        Message::text(r#"{"direction":"up","guest_path":"/x"}"#),
        Message::text(r#"{"direction":"to","guest_path":""}"#),
    ] {
        let mut socket = streams.open("/cp").await;
        socket.send(first).await.unwrap();
        assert_eq!(text(&mut socket).await["type"], "error");
    }
}

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
