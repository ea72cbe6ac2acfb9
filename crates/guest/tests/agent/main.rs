//! The agent as an ordinary process serves it: real commands and files, the real channel, no machine.
// The lints' exception for tests does not reach helpers of integration tests.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs,
    future::Future,
    os::{fd::BorrowedFd, unix::net::UnixStream},
    pin::Pin,
    rc::Rc,
    time::Duration,
};

use hypeman_guest::agent::{Agent, Machine, Reaper};
use hypeman_guest_api::{
    AgentKey, ChannelError, ExecRequest, GuestConfig, GuestEvent, InitMode, Program, Reconfiguration,
    RefusalCode,
    host::{ExecOutput, GuestClient, GuestEvents},
};

mod files;

const KEY: AgentKey = AgentKey([7; 32]);
const LONG: Duration = Duration::from_secs(120);

/// A machine that is this process: it has nothing to set up.
struct NoMachine;

impl Machine for NoMachine {
    fn configure<'a>(
        &'a self,
        agent: &'a Rc<Agent>,
        config: &'a GuestConfig,
    ) -> Pin<Box<dyn Future<Output = Result<(), String>> + 'a>> {
        Box::pin(async move {
            if config.hostname == "broken" {
                return Err("this machine is broken".into());
            }
            agent.events.push(GuestEvent::ProgramStarted);
            Ok(())
        })
    }

    fn reconfigure(&self, _: &Reconfiguration) -> Result<(), String> {
        Ok(())
    }

    fn set_time(&self, _: i128) -> Result<(), String> {
        Err("no clock".into())
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

/// An agent on a thread of its own; each stream that is sent becomes a connection.
struct Guest(std::sync::mpsc::Sender<UnixStream>);

impl Guest {
    fn start() -> Guest {
        let (sender, streams) = std::sync::mpsc::channel::<UnixStream>();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            tokio::task::LocalSet::new().block_on(&runtime, async move {
                let agent = Agent::new(Box::new(NoMachine), Reaper::start(false).unwrap());
                loop {
                    match streams.try_recv() {
                        Ok(stream) => {
                            stream.set_nonblocking(true).unwrap();
                            let stream = tokio::net::UnixStream::from_std(stream).unwrap();
                            let agent = Rc::clone(&agent);
                            tokio::task::spawn_local(async move { agent.serve(stream).await });
                        }
                        Err(std::sync::mpsc::TryRecvError::Empty) => {
                            tokio::time::sleep(Duration::from_millis(1)).await;
                        }
                        Err(_) => return,
                    }
                }
            });
        });
        Guest(sender)
    }

    async fn connect(&self, key: Option<&AgentKey>) -> (GuestClient, GuestEvents) {
        let (near, far) = UnixStream::pair().unwrap();
        self.0.send(far).unwrap();
        near.set_nonblocking(true).unwrap();
        GuestClient::connect(tokio::net::UnixStream::from_std(near).unwrap(), key, LONG)
            .await
            .unwrap()
    }

    async fn configured() -> (Guest, GuestClient) {
        let guest = Guest::start();
        let (client, _) = guest.connect(None).await;
        client.configure(&config("test"), LONG).await.unwrap();
        (guest, client)
    }
}

fn config(hostname: &str) -> GuestConfig {
    GuestConfig {
        key: KEY,
        instance_id: "id".into(),
        hostname: hostname.into(),
        time_unix_nanos: 0,
        entropy: Vec::new(),
        init_mode: InitMode::Exec,
        program: Program {
            argv: vec!["true".into()],
            environment: vec![("FROM_IMAGE".into(), "image".into())],
            working_directory: String::new(),
            user: String::new(),
        },
        network: None,
        volumes: Vec::new(),
        skip_agent: false,
    }
}

fn script(text: &str) -> ExecRequest {
    ExecRequest {
        command: vec!["sh".into(), "-c".into(), text.into()],
        ..ExecRequest::default()
    }
}

async fn run(client: &GuestClient, request: ExecRequest) -> (Vec<u8>, Vec<u8>, i32) {
    let mut session = client.exec(request).await.unwrap();
    let (mut out, mut errors) = (Vec::new(), Vec::new());
    loop {
        match session
            .next()
            .await
            .unwrap()
            .expect("a session ends with an exit code")
        {
            ExecOutput::Stdout(data) => out.extend_from_slice(&data),
            ExecOutput::Stderr(data) => errors.extend_from_slice(&data),
            ExecOutput::Exit(code) => return (out, errors, code),
        }
    }
}

/// Waits until a process is gone (or only its remains are).
async fn is_gone(pid: &str) {
    while fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z ")) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn nothing_is_served_before_the_configuration_and_events_are_told_again() {
    let guest = Guest::start();
    let (client, mut events) = guest.connect(None).await;
    assert!(!client.is_configured());
    let refused = client.exec(script("true")).await.err().unwrap();
    assert_eq!(refused.refusal(), Some(RefusalCode::NotConfigured));
    client.configure(&config("test"), LONG).await.unwrap();
    assert_eq!(events.next().await, Some(GuestEvent::ProgramStarted));
    assert_eq!(events.next().await, Some(GuestEvent::AgentReady));
    drop((client, events));
    let (client, mut events) = guest.connect(Some(&KEY)).await;
    assert!(client.is_configured());
    assert_eq!(events.next().await, Some(GuestEvent::ProgramStarted));
    assert_eq!(events.next().await, Some(GuestEvent::AgentReady));
    let refused = client.set_time(0).await.err().unwrap();
    assert_eq!(refused.to_string(), "no clock");
}

#[tokio::test]
async fn a_guest_that_cannot_become_the_instance_says_why() {
    let guest = Guest::start();
    let (client, mut events) = guest.connect(None).await;
    let refused = client.configure(&config("broken"), LONG).await.err().unwrap();
    assert_eq!(
        (refused.refusal(), refused.to_string().as_str()),
        (Some(RefusalCode::SetupFailed), "this machine is broken")
    );
    assert!(matches!(
        events.next().await,
        Some(GuestEvent::SetupFailed { .. })
    ));
}

#[tokio::test]
async fn commands_have_environment_directory_streams_and_exit_codes() {
    let (_guest, client) = Guest::configured().await;
    let mut request = script("echo $FROM_IMAGE $FROM_REQUEST; pwd; echo no >&2; exit 7");
    request.environment = vec![("FROM_REQUEST".into(), "request".into())];
    request.working_directory = Some("/usr".into());
    assert_eq!(
        run(&client, request).await,
        (b"image request\n/usr\n".to_vec(), b"no\n".to_vec(), 7)
    );
    assert_eq!(run(&client, script("kill -9 $$")).await.2, 137);
    let refusal = |command: &str| {
        let client = client.clone();
        let command = vec![command.to_owned()];
        async move {
            client
                .exec(ExecRequest {
                    command,
                    ..ExecRequest::default()
                })
                .await
                .err()
                .unwrap()
        }
    };
    let missing = refusal("no-such-command").await;
    assert_eq!(
        (missing.refusal(), missing.to_string().as_str()),
        (
            Some(RefusalCode::CommandNotFound),
            "command not found: no-such-command"
        )
    );
    assert_eq!(
        refusal("/etc/passwd").await.refusal(),
        Some(RefusalCode::CommandNotExecutable)
    );
}

#[tokio::test]
async fn input_is_binary_safe_and_ends_when_told() {
    let (_guest, client) = Guest::configured().await;
    let content: Vec<u8> = (0..2_000_000u32).map(|number| (number * 7 % 256) as u8).collect();
    let request = ExecRequest {
        command: vec!["cat".into()],
        ..ExecRequest::default()
    };
    let (mut input, mut output) = client.exec(request).await.unwrap().split();
    let sent = content.clone();
    let sender = tokio::spawn(async move {
        for chunk in sent.chunks(50_000) {
            input.write(chunk).await.unwrap();
        }
        input.close_stdin().await.unwrap();
        input
    });
    let mut received = Vec::new();
    while let Some(said) = output.next().await.unwrap() {
        match said {
            ExecOutput::Stdout(data) => received.extend_from_slice(&data),
            ExecOutput::Stderr(_) => panic!("cat complains"),
            ExecOutput::Exit(code) => assert_eq!(code, 0),
        }
    }
    assert!(received == content);
    sender.await.unwrap();
}

#[tokio::test]
async fn time_limits_kill_the_whole_session() {
    let (_guest, client) = Guest::configured().await;
    let mut limit = Duration::from_millis(200);
    let said = loop {
        let mut request = script("echo $$; sleep 1000 & sleep 1000");
        request.timeout = Some(limit);
        let (said, _, code) = run(&client, request).await;
        assert_eq!(code, 124);
        // On a host that stalls, the limit may be over before the shell could say its number.
        if said.ends_with(b"\n") {
            break said;
        }
        limit *= 2;
    };
    is_gone(String::from_utf8(said).unwrap().trim()).await;
}

#[tokio::test]
async fn a_session_that_is_dropped_takes_its_processes_along() {
    let (_guest, client) = Guest::configured().await;
    for text in [
        "trap '' HUP; echo $$; sleep 1000",
        "echo $$; exec yes > /dev/null",
    ] {
        let mut session = client.exec(script(text)).await.unwrap();
        let Some(ExecOutput::Stdout(said)) = session.next().await.unwrap() else {
            panic!("no pid")
        };
        // Nobody reads it: input backs up before the host gives up.
        let blocked = tokio::time::timeout(Duration::from_millis(300), async {
            loop {
                session.write(&[0; 60_000]).await.unwrap();
            }
        });
        assert!(blocked.await.is_err());
        drop(session);
        is_gone(String::from_utf8_lossy(&said).trim()).await;
    }
}

#[tokio::test]
async fn what_a_command_left_in_the_background_does_not_hold_the_session() {
    let (_guest, client) = Guest::configured().await;
    let (said, _, code) = run(&client, script("sleep 30 & echo $!; echo done")).await;
    assert_eq!(code, 0);
    let said = String::from_utf8(said).unwrap();
    assert!(said.ends_with("done\n"));
    let pid = said.lines().next().unwrap();
    assert!(
        fs::metadata(format!("/proc/{pid}")).is_ok(),
        "it goes on as after any shell"
    );
    run(&client, script(&format!("kill {pid}"))).await;
}

#[tokio::test]
async fn twenty_sessions_stream_while_one_stalls() {
    let (_guest, client) = Guest::configured().await;
    let mut stalled = client.exec(script("yes")).await.unwrap();
    stalled.next().await.unwrap();
    let sessions: Vec<_> = (0..20)
        .map(|number| {
            let client = client.clone();
            tokio::spawn(
                async move { run(&client, script(&format!("yes {number} | head -c 1000000"))).await },
            )
        })
        .collect();
    for session in sessions {
        let (said, errors, code) = session.await.unwrap();
        assert_eq!((said.len(), errors.len(), code), (1_000_000, 0, 0));
    }
}

#[tokio::test]
async fn a_terminal_is_one() {
    let (_guest, client) = Guest::configured().await;
    let mut request = script("test -t 0 && test -t 1 && stty size; read line; echo got $line");
    request.tty = Some((33, 99));
    let mut session = client.exec(request).await.unwrap();
    session.write(b"words\n").await.unwrap();
    let mut said = String::new();
    while let Some(output) = session.next().await.unwrap() {
        match output {
            ExecOutput::Stdout(data) => said.push_str(&String::from_utf8_lossy(&data)),
            ExecOutput::Stderr(_) => panic!("a terminal has one output"),
            ExecOutput::Exit(code) => assert_eq!(code, 0),
        }
    }
    assert!(said.contains("33 99") && said.contains("got words"), "{said:?}");
}

#[tokio::test]
async fn a_new_key_ends_what_was_connected_with_the_old_one() {
    let (guest, bystander) = Guest::configured().await;
    let (heir, _events) = guest.connect(Some(&KEY)).await;
    let key = AgentKey([9; 32]);
    let identity = Reconfiguration {
        key: key.clone(),
        instance_id: "other".into(),
        hostname: "other".into(),
        time_unix_nanos: 0,
        entropy: vec![1; 64],
        network: None,
    };
    heir.reconfigure(&identity).await.unwrap();
    bystander.closed().await;
    heir.ping(LONG).await.unwrap();
    let (later, _events) = guest.connect(Some(&key)).await;
    later.ping(LONG).await.unwrap();
    heir.ping(LONG).await.unwrap();

    // It is the turn of the heir when the key changes again.
    later.reconfigure(&identity).await.unwrap();
    heir.closed().await;
    later.ping(LONG).await.unwrap();
    let (near, far) = UnixStream::pair().unwrap();
    guest.0.send(far).unwrap();
    near.set_nonblocking(true).unwrap();
    let near = tokio::net::UnixStream::from_std(near).unwrap();
    let refused = GuestClient::connect(near, Some(&KEY), LONG).await.err().unwrap();
    assert!(matches!(refused, ChannelError::NotAuthentic), "{refused:?}");
}

#[tokio::test]
async fn a_clock_that_cannot_be_set_is_told() {
    let (_guest, client) = Guest::configured().await;
    let refused = client.synchronise_clock().await.err().unwrap();
    assert_eq!(refused.refusal(), Some(RefusalCode::Failed));
}
