//! Pagers as processes: started when needed, older than the server or of another release, killed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    reason = "a test that cannot go on should panic"
)]

use std::io;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use hypeman_pager::memory::{WatchedMemory, probe};
use hypeman_pager::{
    Condition, MachineState, Pager, PagerError, PagerEvent, PagerOptions, Registration, Served,
};
use hypeman_snapshots::{Elsewhere, MemoryId, MemorySource, MemoryStore, Options, PAGE_BYTES};
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::broadcast;

const PAGES: usize = 100;

macro_rules! skip_unless_faults_can_be_served {
    () => {
        if let Err(error) = probe() {
            eprintln!("SKIPPED: needs userfaultfd: {error}");
            return;
        }
    };
}

/// Guest memory in which each page tells its number.
struct Guest;

impl MemorySource for Guest {
    fn extents(&self) -> Vec<Range<u64>> {
        std::iter::once(0..(PAGES * PAGE_BYTES) as u64).collect()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        for (number, page) in into.chunks_mut(PAGE_BYTES).enumerate() {
            page.fill(1 + (offset / PAGE_BYTES as u64) as u8 + number as u8);
        }
        Ok(())
    }
}

struct Place {
    directory: tempfile::TempDir,
    image: MemoryId,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = MemoryStore::open(&directory.path().join("memory"), Options::default()).unwrap();
        let image = MemoryId::random().unwrap();
        let bytes = (PAGES * PAGE_BYTES) as u64;
        store
            .capture(&image, bytes, None, &Guest, Elsewhere::Zero)
            .unwrap();
        Self { directory, image }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// As a server of a release would have it.
    fn pager(&self, release: &str) -> Pager {
        Pager::new(PagerOptions {
            program: env!("CARGO_BIN_EXE_hypeman").into(),
            directory: self.path("run"),
            log: self.path("pager.log"),
            release: release.into(),
            cache_bytes: 1 << 20,
            graduate_after: None,
        })
    }

    fn registration(&self, machine: &str) -> Registration {
        Registration {
            machine: machine.into(),
            store: self.path("memory"),
            image: self.image,
            memory_bytes: (PAGES * PAGE_BYTES) as u64,
            socket: self.path(&format!("{machine}.sock")),
            overlay: Vec::new(),
            working_set: false,
        }
    }

    async fn machine(&self, pager: &Pager, name: &str) -> Machine {
        let mut events = pager.events();
        let served = pager.register(self.registration(name)).await.unwrap();
        let memory = Arc::new(WatchedMemory::new(PAGES * PAGE_BYTES).unwrap());
        let message = memory.firecracker_message();
        let stream = memory.send(&served.socket, message.as_bytes()).unwrap();
        until(&mut events, name, MachineState::Serving).await;
        Machine {
            memory,
            stream,
            served,
        }
    }

    fn sockets(&self) -> usize {
        std::fs::read_dir(self.path("run")).map_or(0, Iterator::count)
    }
}

struct Machine {
    memory: Arc<WatchedMemory>,
    stream: UnixStream,
    served: Served,
}

impl Machine {
    async fn check(&self, page: usize) {
        let memory = Arc::clone(&self.memory);
        let byte = tokio::task::spawn_blocking(move || memory.byte(page * PAGE_BYTES))
            .await
            .unwrap();
        assert_eq!(usize::from(byte), page + 1);
    }
}

async fn until(events: &mut broadcast::Receiver<PagerEvent>, name: &str, wanted: MachineState) {
    loop {
        match events.recv().await.unwrap() {
            PagerEvent::Machine { machine, state } if machine == name && state == wanted => return,
            PagerEvent::Machine { .. } => {}
            PagerEvent::Gone { reason, .. } => panic!("the pager is gone: {reason}"),
        }
    }
}

async fn gone(events: &mut broadcast::Receiver<PagerEvent>) -> Vec<String> {
    loop {
        if let PagerEvent::Gone { machines, .. } = events.recv().await.unwrap() {
            return machines;
        }
    }
}

fn signal(pid: i32, signal: Signal) {
    assert_ne!(pid, rustix::process::getpid().as_raw_pid());
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

#[tokio::test]
async fn a_killed_pager_is_reported_and_another_one_starts() {
    skip_unless_faults_can_be_served!();
    let place = Place::new();
    let pager = place.pager("1.0");
    let mut events = pager.events();
    let machine = place.machine(&pager, "victim").await;
    machine.check(3).await;
    let client = Arc::clone(machine.served.pager());
    assert_eq!(pager.ensure().await.unwrap().pid(), client.pid(), "one is enough");
    let failed = {
        let served = machine.served.clone();
        tokio::spawn(async move { served.failed().await })
    };
    signal(client.pid(), Signal::KILL);
    // Whoever waits is told, in each of the ways.
    assert_eq!(gone(&mut events).await, ["victim"]);
    assert!(failed.await.unwrap().contains("the pager is gone"));
    client.gone().await;
    assert!(matches!(*client.condition().borrow(), Condition::Gone { .. }));
    let refused = client.register(place.registration("late")).await;
    assert!(matches!(refused, Err(PagerError::Gone(_))), "{refused:?}");
    let other = place.machine(&pager, "next").await;
    other.check(7).await;
    assert_ne!(other.served.pager().pid(), client.pid());
    drop(other.stream);
    other.served.pager().drain().await.unwrap();
    other.served.pager().gone().await;
}

#[tokio::test]
async fn a_pager_outlives_the_server_and_an_upgrade() {
    skip_unless_faults_can_be_served!();
    let place = Place::new();
    let first = place.pager("1.0");
    let old = place.machine(&first, "old").await;
    old.check(1).await;
    let pid = old.served.pager().pid();
    let (memory, stream) = (Arc::clone(&old.memory), old.stream.try_clone().unwrap());
    // Registered, and its VMM was never started.
    let lost = first.register(place.registration("lost")).await.unwrap();
    drop((old, lost, first));

    // The server starts again: the same pager goes on.
    let again = place.pager("1.0");
    again.adopt().await.unwrap();
    assert_eq!(again.machine("old"), Some(MachineState::Serving));
    let mut events = again.events();
    again.forget_others(|name| name == "old").await;
    until(&mut events, "lost", MachineState::Gone).await;
    assert_eq!(again.machine("lost"), None);
    assert_eq!(again.ensure().await.unwrap().pid(), pid);
    drop(again);

    // A newer one starts its own, and the old one goes on beside it until its machine is gone.
    let newer = place.pager("2.0");
    newer.adopt().await.unwrap();
    let mut events = newer.events();
    let young = place.machine(&newer, "young").await;
    assert_ne!(young.served.pager().pid(), pid);
    assert_eq!(place.sockets(), 2);
    let elder = newer.pager_of("old").unwrap();
    assert_eq!((elder.pid(), elder.hello().release.as_str()), (pid, "1.0"));
    young.check(5).await;
    let served = Arc::clone(&memory);
    let byte = tokio::task::spawn_blocking(move || served.byte(50 * PAGE_BYTES))
        .await
        .unwrap();
    assert_eq!(byte, 51);
    drop(stream);
    // Nobody is hurt by this end.
    assert_eq!(gone(&mut events).await, Vec::<String>::new());
    assert_eq!(place.sockets(), 1);
    young.check(6).await;
    young.served.pager().drain().await.unwrap();
    drop(young.stream);
    young.served.pager().gone().await;
    assert_eq!(place.sockets(), 0);
}

#[tokio::test]
async fn what_a_killed_pager_leaves_is_cleared_away() {
    skip_unless_faults_can_be_served!();
    let place = Place::new();
    let pager = place.pager("1.0");
    let client = pager.ensure().await.unwrap();
    signal(client.pid(), Signal::KILL);
    client.gone().await;
    assert_eq!(place.sockets(), 1);
    let again = place.pager("1.0");
    again.adopt().await.unwrap();
    assert_eq!(place.sockets(), 0);
}

#[tokio::test]
async fn a_pager_that_cannot_start_says_why() {
    let place = Place::new();
    let mut options = PagerOptions {
        program: "/bin/false".into(),
        directory: place.path("run"),
        log: place.path("pager.log"),
        release: "1.0".into(),
        cache_bytes: 1,
        graduate_after: None,
    };
    let ends = Pager::new(options.clone()).ensure().await;
    assert!(ends.unwrap_err().to_string().contains("pager.log says why"));
    options.program = "/no such program".into();
    let absent = Pager::new(options).ensure().await;
    assert!(matches!(absent, Err(PagerError::Start(_))), "{absent:?}");
    assert_eq!(place.sockets(), 0);
}
