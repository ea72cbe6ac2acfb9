//! A guest that is a thread of this process: the real agent without a machine.

use std::future::Future;
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use hypeman_guest::agent::{Agent, Machine, Reaper};
use hypeman_guest_api::host::GuestClient;
use hypeman_guest_api::{AgentKey, GuestConfig, GuestEvent, InitMode, Program, Reconfiguration};

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

/// Starts one and waits until it is configured.
pub(super) async fn start() -> GuestClient {
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
