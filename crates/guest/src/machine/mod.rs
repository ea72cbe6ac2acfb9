//! What only process 1 of a virtual machine does.
//!
//! Order of a boot: pseudo file systems, kernel modules, agent port; then nothing until the host says who we
//! are; then disks, root, identity, network, program, and the modules that nothing waited for. Nothing of an instance is
//! known before that, so a machine may be captured while it waits and become any instance later.

mod cgroup;
mod clock;
mod console;
mod disks;
mod ending;
mod freezer;
mod handover;
mod identity;
mod inherited;
mod instance;
mod log_stream;
mod modules;
mod network;
mod port;
mod program;
mod pseudo;
mod users;
mod vsock;

pub use handover::ProcessName;

use std::{rc::Rc, time::Duration};

use hypeman_guest_api::GuestEvent;
use rustix::process::{Pid, WaitOptions, wait};
use tokio::{
    runtime::Builder,
    signal::unix::{SignalKind, signal},
    task::LocalSet,
};

use crate::{
    agent::{Agent, Reaper},
    log, log_line,
};
use instance::Instance;

/// Boots. Never returns: the machine ends by power-off.
pub fn run(name: ProcessName) -> ! {
    pseudo::mount_early();
    log::open();
    if let Err(error) = boot(name) {
        log_line!("the guest program cannot go on: {error}");
    }
    // The kernel panics when process 1 ends; a machine that cannot work is left for the host to see and kill.
    loop {
        if wait(WaitOptions::empty()).is_err() {
            pause();
        }
    }
}

fn boot(name: ProcessName) -> std::io::Result<()> {
    let late = modules::load();
    handover::ignore_broken_pipes();
    // Many sessions need many descriptors; what is started gets limits of its own.
    let _ = rustix::process::setrlimit(
        rustix::process::Resource::Nofile,
        rustix::process::Rlimit {
            current: Some(65_536),
            maximum: Some(524_288),
        },
    );
    let runtime = Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, serve(name, late))
}

async fn serve(name: ProcessName, late: modules::Late) -> std::io::Result<()> {
    let reaper = Reaper::start(true)?;
    // Inits end all processes politely first; the agent stays for the host. Handled rather than ignored, because
    // that is not inherited by what we start.
    let _polite = [SignalKind::interrupt(), SignalKind::hangup()].map(signal);
    let mut terminate = signal(SignalKind::terminate())?;
    let agent = Agent::new(Box::new(Instance::new(name, late)), reaper);
    let told = Rc::clone(&agent);
    tokio::task::spawn_local(async move {
        while terminate.recv().await.is_some() {
            // As process 1 we are the init: whoever signals us then asks for nothing that we do.
            if std::process::id() != 1 {
                return told.events.push(GuestEvent::AskedToEnd);
            }
        }
    });
    if vsock::is_present() {
        return serve_vsock(&agent).await;
    }
    let port = Rc::new(port::Port::new(port::open_agent_port().await?)?);
    loop {
        port.host_is_there().await;
        agent.serve(port::PortStream::new(Rc::clone(&port))).await;
        // The host may be gone and back already; let it not become a race of our own.
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

async fn serve_vsock(agent: &Rc<Agent>) -> std::io::Result<()> {
    let listener = vsock::Listener::bind()?;
    loop {
        match listener.accept().await {
            Ok(stream) => {
                let agent = Rc::clone(agent);
                tokio::task::spawn_local(async move { agent.serve(stream).await });
            }
            Err(error) => {
                log_line!("vsock: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

fn pause() {
    // No process is left to wait for: nothing can happen any more but a signal.
    let _ = rustix::event::poll(&mut [], None);
}

/// Process 1 itself.
fn init_process() -> Pid {
    Pid::INIT
}
