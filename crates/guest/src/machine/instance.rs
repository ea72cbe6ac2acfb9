//! Becoming an instance, being it, and ending it.
//!
//! ```text
//! empty ─ configure ─► exec mode:    program runs ── its end, or shutdown ──► all killed, output drained,
//!   │                                                                        host told, disks clean, off
//!   │                  systemd mode: init runs ───── shutdown: asked to end ─► off (by the init, or by force)
//!   └─ shutdown ─► off
//! ```

use std::{
    cell::{OnceCell, RefCell},
    future::Future,
    os::fd::{AsFd, BorrowedFd},
    pin::Pin,
    rc::Rc,
    time::Duration,
};

use hypeman_guest_api::{ExitReason, GuestConfig, GuestEvent, InitMode, Reconfiguration};
use rustix::{
    process::{Signal, kill_process},
    stdio::{dup2_stderr, dup2_stdin, dup2_stdout},
};

use super::{
    cgroup::{self, Group},
    clock,
    console::{Output, Sink},
    disks::{self, Disks},
    ending,
    freezer::Freezer,
    handover::{self, ProcessName},
    identity, inherited,
    modules::Late,
    network, program, pseudo,
};
use crate::{
    agent::{Agent, Ending, Machine},
    log_line,
};

/// How long the host may take to hear of the end.
const LAST_WORD: Duration = Duration::from_secs(2);

/// How long killed processes may hold on to the output, and a host that has to take it may be away.
const DRAIN: Duration = Duration::from_secs(5);

/// Time for the answer to a request to reach the host before the machine goes down.
const ANSWER_LEAVES: Duration = Duration::from_millis(20);

/// Bytes that make a generator forget what it shares with that of another machine: its whole key.
const LEAST_ENTROPY: usize = 32;

/// The realtime signal by which systemd is told to power off: the 4th after the first of its C library.
const SYSTEMD_POWER_OFF: i32 = 34 + 4;

enum Life {
    Empty,
    Program { leader: rustix::process::Pid },
    Init,
    Over,
}

/// See the module.
pub(super) struct Instance {
    name: ProcessName,
    power_switch: bool,
    late_modules: RefCell<Option<Late>>,
    life: RefCell<Life>,
    disks: Rc<RefCell<Option<Disks>>>,
    freezer: OnceCell<Freezer>,
    sessions: OnceCell<Group>,
}

impl Instance {
    pub(super) fn new(name: ProcessName, late_modules: Late) -> Instance {
        Instance {
            name,
            power_switch: ending::has_power_switch(),
            late_modules: RefCell::new(Some(late_modules)),
            life: RefCell::new(Life::Empty),
            disks: Rc::new(RefCell::new(None)),
            freezer: OnceCell::new(),
            sessions: OnceCell::new(),
        }
    }

    async fn become_instance(&self, agent: &Rc<Agent>, config: &GuestConfig) -> Result<(), String> {
        clock::set(config.time_unix_nanos).map_err(|error| format!("clock: {error}"))?;
        clock::credit_entropy(&config.entropy).map_err(|error| format!("entropy: {error}"))?;
        // A kernel that waited for these bytes has taken them already.
        let _ = clock::reseed();
        let disks = disks::assemble(&config.volumes).await?;
        *self.disks.borrow_mut() = Some(disks);
        self.freezer.get_or_init(Freezer::open);
        if let Some(group) = Group::of_sessions() {
            self.sessions.get_or_init(|| group);
        }
        pseudo::relax_for_containers();
        if let Err(error) = identity::apply(&config.hostname, &config.instance_id, config.network.as_ref()) {
            log_line!("{error}");
        }
        network::apply(config.network.as_ref())?;
        match config.init_mode {
            InitMode::Exec => self.run_program(agent, config),
            InitMode::Systemd => self.run_init(agent, config),
        }?;
        if let Some(late) = self.late_modules.take() {
            tokio::task::spawn_blocking(move || late.load());
        }
        Ok(())
    }

    fn run_program(&self, agent: &Rc<Agent>, config: &GuestConfig) -> Result<(), String> {
        let output = Sink::open()
            .and_then(Output::start)
            .map_err(|error| format!("output: {error}"))?;
        // Some images write to the output of process 1.
        let _ = dup2_stdout(&output.writer).and_then(|()| dup2_stderr(&output.writer));
        let started = program::start(&config.program, &output.writer, Group::of_program().as_ref());
        let Output { writer, drained } = output;
        drop(writer);
        match started {
            Ok(leader) => {
                *self.life.borrow_mut() = Life::Program { leader };
                let ended = agent.reaper.watch(leader);
                agent.events.push(GuestEvent::ProgramStarted);
                self.end_with(agent, drained, async move { ended.await.ok() });
            }
            Err(reason) => self.end_now(agent, drained, reason),
        }
        Ok(())
    }

    fn run_init(&self, agent: &Rc<Agent>, config: &GuestConfig) -> Result<(), String> {
        match handover::become_init(&config.program, self.name) {
            Ok(()) => {
                *self.life.borrow_mut() = Life::Init;
                agent.events.push(GuestEvent::ProgramStarted);
            }
            Err(reason) => {
                let (_, drained) = tokio::sync::watch::channel(true);
                self.end_now(agent, drained, reason);
            }
        }
        Ok(())
    }

    /// Waits for the program's end in the background and then ends the machine.
    fn end_with(
        &self,
        agent: &Rc<Agent>,
        drained: tokio::sync::watch::Receiver<bool>,
        ended: impl Future<Output = Option<Ending>> + 'static,
    ) {
        let end = self.end(agent, drained);
        let agent = Rc::clone(agent);
        tokio::task::spawn_local(async move {
            let ending = ended.await.unwrap_or(Ending::Code(-1));
            agent.begin_ending();
            end(program::explain(ending, cgroup::memory_kills())).await;
        });
    }

    fn end_now(&self, agent: &Rc<Agent>, drained: tokio::sync::watch::Receiver<bool>, reason: ExitReason) {
        agent.begin_ending();
        *self.life.borrow_mut() = Life::Over;
        let end = self.end(agent, drained);
        tokio::task::spawn_local(async move { end(reason).await });
    }

    fn end(
        &self,
        agent: &Rc<Agent>,
        mut drained: tokio::sync::watch::Receiver<bool>,
    ) -> impl FnOnce(ExitReason) -> Pin<Box<dyn Future<Output = ()>>> + 'static {
        let (agent, disks, power_switch) = (Rc::clone(agent), Rc::clone(&self.disks), self.power_switch);
        move |reason| {
            Box::pin(async move {
                if std::process::id() == 1 {
                    ending::kill_all();
                    release_output();
                }
                // The host must find all output when it hears of the end.
                let _ = tokio::time::timeout(DRAIN, drained.wait_for(|drained| *drained)).await;
                agent.events.push(GuestEvent::Exited(reason));
                agent.events.acknowledged(LAST_WORD).await;
                switch_off(&disks, power_switch);
            })
        }
    }
}

/// Gives up our own hold on the program's output.
fn release_output() {
    if let Ok(null) = std::fs::File::options().read(true).write(true).open("/dev/null") {
        let _ = dup2_stdin(&null)
            .and_then(|()| dup2_stdout(&null))
            .and_then(|()| dup2_stderr(&null));
    }
}

fn switch_off(disks: &Rc<RefCell<Option<Disks>>>, power_switch: bool) {
    if let Some(disks) = disks.borrow().as_ref() {
        disks.close();
    }
    ending::power_off(power_switch);
}

impl Machine for Instance {
    fn configure<'a>(
        &'a self,
        agent: &'a Rc<Agent>,
        config: &'a GuestConfig,
    ) -> Pin<Box<dyn Future<Output = Result<(), String>> + 'a>> {
        Box::pin(self.become_instance(agent, config))
    }

    fn reconfigure(&self, identity: &Reconfiguration) -> Result<(), String> {
        // The clock while the host's word about it is fresh, then what others could confuse us by: an address that
        // another machine has, and random numbers that it draws too.
        self.set_time(identity.time_unix_nanos)?;
        // A machine without an interface has no connection to anybody else's address either.
        if network::take_down()?
            && let Err(error) = inherited::end()
        {
            log_line!("the source's connections are left to their time limits: {error}");
        }
        network::apply(identity.network.as_ref())?;
        if identity.entropy.len() < LEAST_ENTROPY {
            return Err(format!(
                "entropy: {} bytes are too few, {LEAST_ENTROPY} are needed",
                identity.entropy.len()
            ));
        }
        clock::credit_entropy(&identity.entropy).map_err(|error| format!("entropy: {error}"))?;
        clock::reseed().map_err(|error| format!("entropy: reseeding: {error}"))?;
        identity::apply(
            &identity.hostname,
            &identity.instance_id,
            identity.network.as_ref(),
        )
    }

    fn set_time(&self, time_unix_nanos: i128) -> Result<(), String> {
        clock::set(time_unix_nanos).map_err(|error| format!("clock: {error}"))
    }

    fn freeze(&self) -> Pin<Box<dyn Future<Output = Result<(), String>> + '_>> {
        Box::pin(async {
            match self.freezer.get() {
                Some(freezer) => freezer.freeze().await,
                // Nothing of an instance is there that could move.
                None => Ok(()),
            }
        })
    }

    fn thaw(&self) {
        if let Some(freezer) = self.freezer.get() {
            freezer.thaw();
        }
    }

    fn session_group(&self) -> Option<BorrowedFd<'_>> {
        self.sessions.get().map(Group::as_fd)
    }

    fn shutdown(&self, agent: &Rc<Agent>, grace: Duration) {
        // Nobody who stands still can end.
        self.thaw();
        let disks = Rc::clone(&self.disks);
        let power_switch = self.power_switch;
        match *self.life.borrow() {
            // The end is under way.
            Life::Over => {}
            Life::Empty => {
                tokio::task::spawn_local(async move {
                    tokio::time::sleep(ANSWER_LEAVES).await;
                    switch_off(&disks, power_switch);
                });
            }
            Life::Program { leader } => {
                let _ = kill_process(leader, Signal::TERM);
                let agent = Rc::clone(agent);
                tokio::task::spawn_local(async move {
                    tokio::time::sleep(grace).await;
                    if !agent.is_ending() {
                        let _ = kill_process(leader, Signal::KILL);
                    }
                });
            }
            Life::Init => {
                tokio::task::spawn_local(async move {
                    // Some inits end everything within a moment: the answer to the host leaves first.
                    tokio::time::sleep(ANSWER_LEAVES).await;
                    ask_init_to_end();
                    tokio::time::sleep(grace).await;
                    log_line!("the init did not end in time");
                    switch_off(&disks, power_switch);
                });
            }
        }
    }
}

/// Every init has a signal of its own for this.
fn ask_init_to_end() {
    let init = super::init_process();
    let program = std::fs::read_link("/proc/1/exe")
        .map(|path| path.to_string_lossy().into_owned())
        .unwrap_or_default();
    let asked = if program.ends_with("/systemd") {
        super::handover::send_realtime(init, SYSTEMD_POWER_OFF)
    } else if program.ends_with("/busybox") {
        kill_process(init, Signal::USR2).is_ok()
    } else {
        kill_process(init, Signal::POWER).is_ok() && kill_process(init, Signal::TERM).is_ok()
    };
    if !asked {
        log_line!("cannot signal the init");
    }
}
