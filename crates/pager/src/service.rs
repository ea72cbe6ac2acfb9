//! The pager's process: machines, what they share, and when it ends.
//!
//! ```text
//!             ┌─ connection of a server (a thread that reads, one that writes)
//!  listener ──┤                                        ┌─ thread of a machine
//!             └─ … ──► register, forget, … ──► machines┤
//!                                                      └─ … all share one cache
//!  ends: nobody needs it (no server, no machine) for a while, or it was told to drain and the last machine is gone
//! ```

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::audience::Audience;
use crate::cache::Cache;
use crate::connection;
use crate::image::Images;
use crate::machine::Machine;
use crate::protocol::{Health, Hello, MachineState, PROTOCOL, Stats};
use crate::recorder::Recording;

/// A machine's thread does little; this many bytes of stack are plenty.
const STACK: usize = 512 * 1024;
/// How long servers may take to hear the last events.
const GOODBYE: Duration = Duration::from_secs(10);

/// How a pager behaves.
#[derive(Debug, Clone)]
pub struct ServiceOptions {
    /// Its socket, removed when it ends.
    pub socket: PathBuf,
    /// The release that started it, told to those who connect.
    pub release: String,
    /// Bytes of images that are kept in RAM.
    pub cache_bytes: u64,
    /// How long a machine is served before all of its memory is filled; `None`: until it ends.
    pub graduate_after: Option<Duration>,
    /// When a working set is complete.
    pub recording: Recording,
    /// How long it waits for a server when it has no machine, before it ends.
    pub lonely: Duration,
}

/// A pager.
pub(crate) struct Service {
    pub(crate) options: ServiceOptions,
    pub(crate) cache: Arc<Cache>,
    pub(crate) images: Images,
    pub(crate) audience: Arc<Audience>,
    machines: Mutex<HashMap<String, Arc<Machine>>>,
    draining: AtomicBool,
    /// Threads of machines that have not said their last word.
    running: AtomicUsize,
    /// No more is heard, and what was said is still written out.
    ending: AtomicBool,
    servers: Mutex<HashMap<u64, UnixStream>>,
    /// Raised whenever something happened that may be the end.
    changed: OwnedFd,
    /// Wakes the thread that lets machines go.
    graduates: Mutex<Graduates>,
    next_connection: AtomicU64,
}

#[derive(Default)]
struct Graduates {
    thread: Option<thread::Thread>,
    asked: Vec<String>,
}

/// Serves until nobody needs it.
///
/// # Errors
/// Those of the host, at the start.
pub fn serve(listener: UnixListener, options: ServiceOptions) -> std::io::Result<()> {
    // Sockets of machines are for those alone whom the server lets in.
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    listener.set_nonblocking(true)?;
    let service = Arc::new(Service {
        cache: Arc::new(Cache::new(options.cache_bytes)),
        images: Images::default(),
        audience: Arc::default(),
        machines: Mutex::default(),
        draining: AtomicBool::new(false),
        running: AtomicUsize::new(0),
        ending: AtomicBool::new(false),
        servers: Mutex::default(),
        changed: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        graduates: Mutex::default(),
        next_connection: AtomicU64::new(0),
        options,
    });
    let graduates = {
        let service = Arc::clone(&service);
        thread::Builder::new()
            .name("graduates".into())
            .stack_size(STACK)
            .spawn(move || service.let_machines_go())?
    };
    service.graduates().thread = Some(graduates.thread().clone());
    let outcome = service.accept(&listener);
    // New servers must not find it any more; those that are connected see the end of the connection.
    let _ = std::fs::remove_file(&service.options.socket);
    service.draining.store(true, Ordering::SeqCst);
    service.machines().values().for_each(|machine| machine.stop());
    service.say_goodbye();
    outcome
}

impl Service {
    pub(crate) fn machines(&self) -> MutexGuard<'_, HashMap<String, Arc<Machine>>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn graduates(&self) -> MutexGuard<'_, Graduates> {
        self.graduates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
        self.look_up();
    }

    /// Makes the main thread look whether this is the end.
    fn look_up(&self) {
        let _ = rustix::io::write(&self.changed, &1_u64.to_ne_bytes());
    }

    pub(crate) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    /// Closes the connections when the last events are written out.
    fn say_goodbye(&self) {
        self.ending.store(true, Ordering::SeqCst);
        self.audience.leave();
        for server in self.servers().values() {
            // One that is gone already needs no end.
            let _ = server.shutdown(std::net::Shutdown::Read);
        }
        let end = Instant::now() + GOODBYE;
        while !self.servers().is_empty() && Instant::now() < end {
            let mut descriptors = [PollFd::new(&self.changed, PollFlags::IN)];
            let second = Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            };
            let _ = poll(&mut descriptors, Some(&second));
            let _ = rustix::io::read(&self.changed, &mut [0; 8]);
        }
    }

    fn accept(self: &Arc<Self>, listener: &UnixListener) -> std::io::Result<()> {
        let mut lonely_since = Some(Instant::now());
        loop {
            // Read before the machines: what was registered before it was told to drain is seen.
            let draining = self.is_draining();
            let alive = {
                // One that is being registered is started with the list held.
                let _registering = self.machines();
                self.running.load(Ordering::SeqCst) > 0
            };
            if draining && !alive {
                return Ok(());
            }
            if alive || !self.servers().is_empty() {
                lonely_since = None;
            } else {
                let since = *lonely_since.get_or_insert_with(Instant::now);
                if since.elapsed() >= self.options.lonely {
                    return Ok(());
                }
            }
            let timeout = lonely_since.map(|since| {
                let left = self.options.lonely.saturating_sub(since.elapsed()) + Duration::from_millis(1);
                Timespec {
                    tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
                    tv_nsec: left.subsec_nanos().into(),
                }
            });
            let mut descriptors = [
                PollFd::new(listener, PollFlags::IN),
                PollFd::new(&self.changed, PollFlags::IN),
            ];
            match poll(&mut descriptors, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let _ = rustix::io::read(&self.changed, &mut [0; 8]);
            match listener.accept() {
                Ok((stream, _)) => self.connected(stream),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => tracing::warn!(%error, "a server could not connect"),
            }
        }
    }

    fn servers(&self) -> MutexGuard<'_, HashMap<u64, UnixStream>> {
        self.servers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connected(self: &Arc<Self>, stream: UnixStream) {
        let service = Arc::clone(self);
        let number = self.next_connection.fetch_add(1, Ordering::Relaxed);
        let kept = stream
            .try_clone()
            .map(|stream| self.servers().insert(number, stream));
        let spawned = kept.and_then(|_| {
            thread::Builder::new()
                .name(format!("server-{number}"))
                .stack_size(STACK)
                .spawn(move || {
                    let _left = Left(&service, number);
                    if let Err(error) = connection::run(&service, &stream) {
                        tracing::warn!(%error, "a server was cut off");
                    }
                })
        });
        if let Err(error) = spawned {
            tracing::error!(%error, "a server cannot be served");
            self.servers().remove(&number);
        }
    }

    /// Runs a machine that was registered, until it has ended.
    pub(crate) fn start(
        self: &Arc<Self>,
        machine: &Arc<Machine>,
        listener: UnixListener,
        working_set: Option<hypeman_snapshots::WorkingSet>,
    ) -> std::io::Result<()> {
        let (service, owned) = (Arc::clone(self), Arc::clone(machine));
        self.running.fetch_add(1, Ordering::SeqCst);
        let spawned = thread::Builder::new()
            .name(format!("machine-{}", machine.id))
            .stack_size(STACK)
            .spawn(move || {
                let _last = Last(&service);
                crate::session::run(&owned, listener);
                service.ended(&owned);
            });
        if let Err(error) = spawned {
            self.running.fetch_sub(1, Ordering::SeqCst);
            return Err(error);
        }
        if let Some(set) = working_set {
            let owned = Arc::clone(machine);
            thread::Builder::new()
                .name(format!("fetch-{}", machine.id))
                .stack_size(STACK)
                .spawn(move || crate::background::prefetch(&owned, &set))?;
        }
        Ok(())
    }

    /// A graduated machine stays known, so that a server that starts later can ask. Any other is gone, and told to be
    /// when it is.
    fn ended(&self, machine: &Arc<Machine>) {
        if machine.state() != MachineState::Graduated {
            self.forget(machine);
        }
    }

    pub(crate) fn forget(&self, machine: &Arc<Machine>) {
        let mut machines = self.machines();
        if machines
            .get(&machine.id)
            .is_some_and(|known| Arc::ptr_eq(known, machine))
        {
            machines.remove(&machine.id);
        }
        drop(machines);
        machine.become_(MachineState::Gone);
    }

    /// Lets a machine go as soon as its turn comes.
    pub(crate) fn graduate(&self, machine: &str) {
        let mut graduates = self.graduates();
        graduates.asked.push(machine.to_owned());
        if let Some(thread) = &graduates.thread {
            thread.unpark();
        }
    }

    /// The thread that fills the memory of machines that run for long, one after the other.
    fn let_machines_go(&self) {
        // Whatever else this host does comes first.
        let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), 19);
        loop {
            let asked = std::mem::take(&mut self.graduates().asked);
            let (due, next) = self.due(&asked);
            for machine in due {
                if crate::background::graduate(&machine) {
                    tracing::info!(
                        machine = machine.id,
                        "a machine has all of its memory and is let go"
                    );
                }
            }
            match next {
                Some(wait) => thread::park_timeout(wait),
                None => thread::park(),
            }
        }
    }

    /// Machines whose time has come, and how long until there may be another one.
    fn due(&self, asked: &[String]) -> (Vec<Arc<Machine>>, Option<Duration>) {
        let mut due = Vec::new();
        let after = self.options.graduate_after;
        for machine in self.machines().values().filter(|machine| machine.is_serving()) {
            let served = machine
                .serving_since
                .get()
                .map(Instant::elapsed)
                .unwrap_or_default();
            if asked.contains(&machine.id) || after.is_some_and(|after| served >= after) {
                due.push(Arc::clone(machine));
            }
        }
        // Often enough that nobody waits much longer than the rule says.
        (
            due,
            after.map(|after| (after / 8).max(Duration::from_millis(100))),
        )
    }

    pub(crate) fn hello(&self) -> Hello {
        Hello {
            protocol: PROTOCOL,
            release: self.options.release.clone(),
            pid: rustix::process::getpid().as_raw_pid(),
            draining: self.is_draining(),
            machines: self.machines().values().map(|machine| machine.report()).collect(),
        }
    }

    pub(crate) fn stats(&self) -> Stats {
        Stats {
            cache: self.cache.stats(),
            machines: self.machines().values().map(|machine| machine.report()).collect(),
        }
    }

    pub(crate) fn health(&self) -> Health {
        let machines = self.machines();
        let oldest = machines
            .values()
            .filter_map(|machine| machine.oldest_fault())
            .min();
        Health {
            oldest_fault_ms: oldest.map_or(0, |since| {
                since.elapsed().as_millis().try_into().unwrap_or(u64::MAX)
            }),
        }
    }
}

/// The thread of a machine, until this is dropped.
struct Last<'a>(&'a Service);

impl Drop for Last<'_> {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::SeqCst);
        self.0.look_up();
    }
}

/// A server that is connected, until this is dropped.
struct Left<'a>(&'a Arc<Service>, u64);

impl Drop for Left<'_> {
    fn drop(&mut self) {
        self.0.servers().remove(&self.1);
        self.0.look_up();
    }
}
