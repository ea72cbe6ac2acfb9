//! The connection to a guest's agent: made, configured, followed, and made again when it breaks.
//!
//! ```text
//!   connect ──► unconfigured? ──► configure ──► follow events ──► lost ──► connect …
//!         └───► goes on from a captured state? ──► welcome ──┘      until the run ends
//!                                    │ refused
//!                                    └──► Failed
//! ```
//!
//! A guest that goes on from a captured state is welcomed before anybody may use it, and before its workload moves:
//! told the time, or, being a copy, who it is now.
//!
//! In systemd mode the agent is a process that can die while the machine runs on. The VMM tells at once that nobody
//! holds the agent's port open any more, or the guest's kernel does where the way there is vsock; pings find an agent
//! that is there and does not get on.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hypeman_guest_api::host::{GuestClient, GuestEvents};
use hypeman_guest_api::{AgentKey, ChannelError, GuestConfig, GuestEvent, InitMode, Reconfiguration};
use hypeman_vmm::{AgentChannel, Machine};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// How long one attempt waits for a guest that still boots. Another attempt follows.
const BOOT_DEADLINE: Duration = Duration::from_secs(300);
/// How long a guest that is up may take for the first answer on a connection, before another one is made. QEMU can lose
/// hold of one when its machine stood still while the last one ended: then nothing of it ever reaches the guest.
const FIRST_ANSWER: Duration = Duration::from_secs(1);
/// Mounting and starting the program, on a slow host.
const CONFIGURE_DEADLINE: Duration = Duration::from_secs(120);
const RECONNECT_PAUSE: Duration = Duration::from_millis(100);
const PING_INTERVAL: Duration = Duration::from_millis(500);
const PING_DEADLINE: Duration = Duration::from_secs(3);
const AGENT_ENDED: &str = "the guest agent has ended";

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

/// What a configured guest is told before anything else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Welcome {
    /// Nothing: it is new, or never stopped.
    Nothing,
    /// The time: it stood still.
    Time,
    /// Who it is now: it is a copy, and still has the secret of the original.
    Identity {
        /// That secret.
        former_key: AgentKey,
    },
}

/// A running connection task; ends when dropped.
#[derive(Debug)]
pub(crate) struct Link {
    task: JoinHandle<()>,
    events: mpsc::Receiver<LinkEvent>,
}

impl Link {
    /// Starts to reach the agent of a machine that boots or goes on. `config` is what an unconfigured guest gets, with
    /// time and entropy added when it is sent.
    pub(crate) fn start(
        machine: &Arc<dyn Machine>,
        key: AgentKey,
        config: GuestConfig,
        welcome: Welcome,
    ) -> Self {
        Self::spawn(machine, key, config, welcome, false, BOOT_DEADLINE)
    }

    /// Starts to reach the agent of a machine that was running when the server last looked, if it `was_reached` then.
    pub(crate) fn resume(
        machine: &Arc<dyn Machine>,
        key: AgentKey,
        config: GuestConfig,
        welcome: Welcome,
        was_reached: bool,
    ) -> Self {
        Self::spawn(machine, key, config, welcome, was_reached, FIRST_ANSWER)
    }

    fn spawn(
        machine: &Arc<dyn Machine>,
        key: AgentKey,
        config: GuestConfig,
        welcome: Welcome,
        reached: bool,
        patience: Duration,
    ) -> Self {
        let (sender, events) = mpsc::channel(64);
        let guest = Guest {
            channel: machine.agent_channel(),
            port: (config.init_mode == InitMode::Systemd)
                .then(|| machine.agent_port())
                .flatten(),
            key,
            config,
            welcome,
            patience,
        };
        Self {
            task: tokio::spawn(guest.run(sender, reached)),
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

enum End {
    ReceiverGone,
    Refused(String),
    Lost { was_connected: bool, reason: String },
}

fn lost(was_connected: bool, reason: impl ToString) -> End {
    End::Lost {
        was_connected,
        reason: reason.to_string(),
    }
}

/// Whom the task talks to.
struct Guest {
    channel: AgentChannel,
    /// What the VMM says of the agent's port, where the agent can die alone.
    port: Option<watch::Receiver<Option<bool>>>,
    key: AgentKey,
    config: GuestConfig,
    /// What it is told before anything else, once.
    welcome: Welcome,
    /// How long its first answer may take before it is asked anew, and longer.
    patience: Duration,
}

impl Guest {
    async fn run(mut self, events: mpsc::Sender<LinkEvent>, reached: bool) {
        let mut connected_before = reached;
        if reached && self.port_is_closed() && events.send(LinkEvent::Lost(AGENT_ENDED.into())).await.is_err()
        {
            return;
        }
        loop {
            let event = match self.connection(&events).await {
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

    fn port_is_closed(&self) -> bool {
        self.port
            .as_ref()
            .is_some_and(|port| *port.borrow() == Some(false))
    }

    /// Whether a connection that ends before the first answer tells that an agent which was there has ended: over vsock
    /// the guest's kernel hangs up where nobody listens.
    fn hangs_up_without_agent(&self) -> bool {
        self.config.init_mode == InitMode::Systemd && matches!(self.channel, AgentChannel::VsockSocket { .. })
    }

    async fn connection(&mut self, events: &mpsc::Sender<LinkEvent>) -> End {
        // What is said of the port from here on is about the agent that will answer.
        if let Some(port) = &mut self.port {
            port.mark_unchanged();
        }
        let present_key = match &self.welcome {
            Welcome::Identity { former_key } => former_key,
            Welcome::Nothing | Welcome::Time => &self.key,
        };
        let (client, reports) = match answer(&self.channel, present_key, self.patience).await {
            Ok(connection) => connection,
            // It was told already, and the answer got lost: it must prove itself with the new secret, and confirm.
            Err(ChannelError::NotAuthentic) if *present_key != self.key => {
                self.welcome = Welcome::Identity {
                    former_key: self.key.clone(),
                };
                return lost(false, "the guest has another secret");
            }
            Err(ChannelError::NotAuthentic) => {
                return End::Refused("the guest could not prove its identity".into());
            }
            Err(ChannelError::Closed) if self.hangs_up_without_agent() => return lost(false, AGENT_ENDED),
            Err(error) => return lost(false, error),
        };
        if !client.is_configured() {
            let config = match freshened(&self.config) {
                Ok(config) => config,
                Err(error) => return lost(false, error),
            };
            match client.configure(&config, CONFIGURE_DEADLINE).await {
                Ok(()) => {}
                Err(ChannelError::Refused(refusal)) => return End::Refused(refusal.message),
                Err(error) => {
                    client.close();
                    return lost(false, error);
                }
            }
        }
        if client.is_configured() {
            match greet(&client, &self.welcome, &self.config).await {
                Ok(()) => self.welcome = Welcome::Nothing,
                Err(ChannelError::Refused(refusal)) => return End::Refused(refusal.message),
                Err(error) => {
                    client.close();
                    return lost(false, error);
                }
            }
        }
        if events.send(LinkEvent::Connected(client.clone())).await.is_err() {
            return End::ReceiverGone;
        }
        let end = self.follow(&client, reports, events).await;
        // Its events may have ended alone; sessions still hold the connection, and the port serves one at a time.
        client.close();
        end
    }

    /// Passes on what the guest reports until the connection is over.
    async fn follow(
        &mut self,
        client: &GuestClient,
        mut reports: GuestEvents,
        events: &mpsc::Sender<LinkEvent>,
    ) -> End {
        let mortal = self.config.init_mode == InitMode::Systemd;
        // Why the agent would end: its machine is about to power off, which is no reason to worry.
        let mut asked_to_end = false;
        loop {
            let event = tokio::select! {
                report = reports.next() => match report {
                    Some(GuestEvent::AskedToEnd) => {
                        asked_to_end = true;
                        continue;
                    }
                    Some(report) => LinkEvent::Guest(report),
                    None => return lost(true, "the guest agent closed the connection"),
                },
                () = closed(&mut self.port) => {
                    if asked_to_end {
                        let _ = events.send(LinkEvent::Guest(GuestEvent::AskedToEnd)).await;
                    }
                    return lost(true, AGENT_ENDED);
                }
                () = silence(client), if mortal => return lost(true, "the guest agent does not answer"),
            };
            if events.send(event).await.is_err() {
                return End::ReceiverGone;
            }
        }
    }
}

/// Tells a guest that goes on what it has missed. Only then may its workload move.
async fn greet(client: &GuestClient, welcome: &Welcome, config: &GuestConfig) -> Result<(), ChannelError> {
    match welcome {
        Welcome::Nothing => {}
        Welcome::Time => drop(client.synchronise_clock().await?),
        Welcome::Identity { .. } => {
            let fresh = freshened(config)?;
            client
                .reconfigure(&Reconfiguration {
                    key: fresh.key,
                    instance_id: fresh.instance_id,
                    hostname: fresh.hostname,
                    time_unix_nanos: fresh.time_unix_nanos,
                    entropy: fresh.entropy,
                    network: fresh.network,
                })
                .await?;
            client.synchronise_clock().await?;
        }
    }
    client.thaw().await
}

/// Resolves when the VMM says that the guest has closed its end.
async fn closed(port: &mut Option<watch::Receiver<Option<bool>>>) {
    let Some(port) = port else {
        return std::future::pending().await;
    };
    while port.changed().await.is_ok() {
        if *port.borrow_and_update() == Some(false) {
            return;
        }
    }
    // The VMM's process is gone, which others tell.
    std::future::pending().await
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

/// Connects until the guest answers; after `patience`, and later ever more of it, anew.
async fn answer(
    channel: &AgentChannel,
    key: &AgentKey,
    mut patience: Duration,
) -> Result<(GuestClient, GuestEvents), ChannelError> {
    let begun = tokio::time::Instant::now();
    loop {
        let stream = channel.connect().await?;
        match GuestClient::connect(stream, Some(key), patience).await {
            Err(ChannelError::Deadline) if begun.elapsed() < BOOT_DEADLINE => {
                tracing::debug!(?patience, "the guest does not answer: it is asked anew");
                patience *= 2;
            }
            outcome => return outcome,
        }
    }
}

/// Time and entropy are worth something only if they are taken at the last moment.
fn freshened(config: &GuestConfig) -> io::Result<GuestConfig> {
    Ok(GuestConfig {
        time_unix_nanos: now_unix_nanos(),
        entropy: crate::random::bytes::<64>()?.to_vec(),
        ..config.clone()
    })
}

fn now_unix_nanos() -> i128 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_nanos());
    i128::try_from(now).unwrap_or(i128::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_that_leads_nowhere_is_not_the_last() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("agent.sock");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let channel = AgentChannel::SerialSocket(socket);
        let asked = tokio::spawn(async move {
            answer(&channel, &AgentKey([0; 32]), Duration::from_millis(1))
                .await
                .map(drop)
        });
        // Nobody reads what comes on the first one, nor hangs up.
        let _silent = listener.accept().await.unwrap();
        let (second, _) = listener.accept().await.unwrap();
        // The machine is gone: that is an answer, too.
        drop((second, listener));
        assert!(matches!(asked.await.unwrap(), Err(ChannelError::Closed)));
    }
}
