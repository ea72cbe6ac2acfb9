//! The connection to a guest's agent: made, configured, followed, and made again when it breaks.
//!
//! ```text
//!   connect ──► unconfigured? ──► configure ──► follow events ──► lost ──► connect …
//!                                    │ refused                      until the run ends
//!                                    └──► Failed
//! ```

use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hypeman_guest_api::host::GuestClient;
use hypeman_guest_api::{AgentKey, ChannelError, GuestConfig, GuestEvent, InitMode};
use hypeman_vmm::AgentChannel;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// How long one attempt waits for a guest that still boots. Another attempt follows.
const BOOT_DEADLINE: Duration = Duration::from_secs(300);
/// Mounting and starting the program, on a slow host.
const CONFIGURE_DEADLINE: Duration = Duration::from_secs(120);
const RECONNECT_PAUSE: Duration = Duration::from_millis(100);
/// Under systemd the agent is a process that can die while the machine runs on, and nothing but silence shows it.
const PING_INTERVAL: Duration = Duration::from_millis(500);
const PING_DEADLINE: Duration = Duration::from_secs(3);

/// What happens on the connection.
pub(crate) enum LinkEvent {
    /// The agent is reached and has its configuration.
    Connected(GuestClient),
    /// The guest reports.
    Guest(GuestEvent),
    /// The agent answers no more; attempts go on.
    Lost(String),
    /// The guest can't become the instance; no attempt follows.
    Failed(String),
}

/// A running connection task; ends when dropped.
#[derive(Debug)]
pub(crate) struct Link {
    task: JoinHandle<()>,
    events: mpsc::Receiver<LinkEvent>,
}

impl Link {
    /// Starts to reach the agent. `config` is what an unconfigured guest gets, with time and entropy added when
    /// it is sent.
    pub(crate) fn start(channel: AgentChannel, key: AgentKey, config: GuestConfig) -> Self {
        let (sender, events) = mpsc::channel(64);
        Self {
            task: tokio::spawn(run(channel, key, config, sender)),
            events,
        }
    }

    /// The next event. Cancel safe. After `Failed` there is none.
    pub(crate) async fn next(&mut self) -> LinkEvent {
        match self.events.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }

    /// An event that is already there.
    pub(crate) fn try_next(&mut self) -> Option<LinkEvent> {
        self.events.try_recv().ok()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run(channel: AgentChannel, key: AgentKey, config: GuestConfig, events: mpsc::Sender<LinkEvent>) {
    let mut connected_before = false;
    loop {
        let end = connection(&channel, &key, &config, &events).await;
        let event = match end {
            End::ReceiverGone => return,
            End::Refused(reason) => LinkEvent::Failed(reason),
            End::Lost {
                was_connected,
                reason,
            } => {
                connected_before |= was_connected;
                tracing::debug!(%reason, "agent connection");
                if !connected_before {
                    tokio::time::sleep(RECONNECT_PAUSE).await;
                    continue;
                }
                LinkEvent::Lost(reason)
            }
        };
        let last = matches!(event, LinkEvent::Failed(_));
        if events.send(event).await.is_err() || last {
            return;
        }
        tokio::time::sleep(RECONNECT_PAUSE).await;
    }
}

enum End {
    ReceiverGone,
    Refused(String),
    Lost { was_connected: bool, reason: String },
}

async fn connection(
    channel: &AgentChannel,
    key: &AgentKey,
    config: &GuestConfig,
    events: &mpsc::Sender<LinkEvent>,
) -> End {
    let lost = |was_connected, reason: String| End::Lost {
        was_connected,
        reason,
    };
    let stream = match open(channel).await {
        Ok(stream) => stream,
        Err(error) => return lost(false, error.to_string()),
    };
    let (client, mut reports) = match GuestClient::connect(stream, Some(key), BOOT_DEADLINE).await {
        Ok(connection) => connection,
        Err(ChannelError::NotAuthentic) => {
            return End::Refused("the guest could not prove its identity".into());
        }
        Err(error) => return lost(false, error.to_string()),
    };
    if !client.is_configured() {
        let config = match freshened(config) {
            Ok(config) => config,
            Err(error) => return lost(false, error.to_string()),
        };
        match client.configure(&config, CONFIGURE_DEADLINE).await {
            Ok(()) => {}
            Err(ChannelError::Refused(refusal)) => return End::Refused(refusal.message),
            Err(error) => {
                client.close();
                return lost(false, error.to_string());
            }
        }
    }
    if events.send(LinkEvent::Connected(client.clone())).await.is_err() {
        return End::ReceiverGone;
    }
    let watched = config.init_mode == InitMode::Systemd;
    loop {
        tokio::select! {
            report = reports.next() => match report {
                Some(report) => if events.send(LinkEvent::Guest(report)).await.is_err() {
                    return End::ReceiverGone;
                },
                None => {
                    // Its events may have ended alone; sessions still hold the connection, and the port serves one
                    // at a time.
                    client.close();
                    return lost(true, "the guest agent closed the connection".into());
                }
            },
            () = silence(&client), if watched => {
                client.close();
                return lost(true, "the guest agent does not answer".into());
            }
        }
    }
}

/// Resolves when the agent stops answering.
async fn silence(client: &GuestClient) {
    loop {
        tokio::time::sleep(PING_INTERVAL).await;
        if client.ping(PING_DEADLINE).await.is_err() {
            return;
        }
    }
}

/// Time and entropy are worth something only if they are taken at the last moment.
fn freshened(config: &GuestConfig) -> io::Result<GuestConfig> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_nanos());
    Ok(GuestConfig {
        time_unix_nanos: i128::try_from(now).unwrap_or(i128::MAX),
        entropy: crate::random::bytes::<64>()?.to_vec(),
        ..config.clone()
    })
}

async fn open(channel: &AgentChannel) -> io::Result<UnixStream> {
    match channel {
        AgentChannel::SerialSocket(path) => UnixStream::connect(path).await,
        AgentChannel::VsockSocket { path, port } => {
            let mut stream = UnixStream::connect(path).await?;
            stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
            // `OK <port>\n`, read bytewise so that nothing behind it is swallowed.
            let mut answer = Vec::new();
            while answer.last() != Some(&b'\n') && answer.len() < 64 {
                answer.push(stream.read_u8().await?);
            }
            if answer.starts_with(b"OK ") {
                Ok(stream)
            } else {
                Err(io::ErrorKind::ConnectionRefused.into())
            }
        }
    }
}
