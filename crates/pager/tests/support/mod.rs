//! Stores with known guests, a pager in a thread, and memory in a VMM's place.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "each test file uses a part, and panics when it cannot go on"
)]

use std::io;
use std::ops::Range;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;
use std::time::Duration;

use hypeman_pager::memory::WatchedMemory;
use hypeman_pager::{Event, MachineState, PagerClient, Recording, Registration, ServiceOptions, serve};
use hypeman_snapshots::{Codec, Elsewhere, MemoryId, MemorySource, MemoryStore, Options, PAGE_BYTES};
use tokio::sync::broadcast;

/// Leaves the test when the host cannot serve faults, and says so.
#[macro_export]
macro_rules! skip_unless_faults_can_be_served {
    () => {
        if let Err(error) = hypeman_pager::memory::probe() {
            eprintln!("SKIPPED: needs userfaultfd: {error}");
            return;
        }
    };
}

/// Four chunks and a bit.
pub const GUEST_PAGES: usize = 300;

/// The content of a page: zeros for 0, then text that compresses, then noise that does not.
pub fn page(seed: u16) -> Vec<u8> {
    match seed {
        0 => vec![0; PAGE_BYTES],
        1..=99 => {
            let text = format!("page {seed} says the same again and again. ");
            text.into_bytes().into_iter().cycle().take(PAGE_BYTES).collect()
        }
        _ => {
            let mut noise = vec![0; PAGE_BYTES];
            let mut hasher = blake3::Hasher::new();
            hasher.update(&seed.to_le_bytes()).finalize_xof().fill(&mut noise);
            noise
        }
    }
}

/// The memory of a guest, a seed a page.
#[derive(Clone, Debug)]
pub struct Guest(pub Vec<u16>);

impl Guest {
    /// Something in most places.
    pub fn busy() -> Self {
        let seed = |number: u16| if number.is_multiple_of(7) { 0 } else { number + 1 };
        Self((0..GUEST_PAGES as u16).map(seed).collect())
    }

    pub fn with(&self, changes: &[(usize, u16)]) -> Self {
        let mut changed = self.clone();
        changes
            .iter()
            .for_each(|(number, seed)| changed.0[*number] = *seed);
        changed
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|seed| page(*seed)).collect()
    }
}

struct Source(Vec<u8>);

impl MemorySource for Source {
    fn extents(&self) -> Vec<Range<u64>> {
        std::iter::once(0..self.0.len() as u64).collect()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        into.copy_from_slice(&self.0[offset as usize..][..into.len()]);
        Ok(())
    }
}

/// A store, and a pager beside it.
pub struct Place {
    directory: tempfile::TempDir,
    pub store: MemoryStore,
    service: Option<JoinHandle<io::Result<()>>>,
}

impl Place {
    pub fn new() -> Self {
        Self::with(|_| ())
    }

    pub fn with(change: impl FnOnce(&mut ServiceOptions)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = MemoryStore::open(&directory.path().join("memory"), Options::default()).unwrap();
        let socket = directory.path().join("pager.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut options = ServiceOptions {
            socket,
            release: "1".into(),
            cache_bytes: 64 << 20,
            graduate_after: None,
            recording: Recording::default(),
            lonely: Duration::from_secs(3600),
        };
        change(&mut options);
        let service = std::thread::spawn(move || serve(listener, options));
        Self {
            directory,
            store,
            service: Some(service),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn file(&self, id: MemoryId, name: &str) -> PathBuf {
        self.path("memory").join(id.to_string()).join(name)
    }

    pub fn capture(&self, guest: &Guest, parent: Option<&MemoryId>) -> MemoryId {
        let id = MemoryId::random().unwrap();
        let source = Source(guest.bytes());
        let bytes = source.0.len() as u64;
        self.store
            .capture(&id, bytes, parent, &source, Elsewhere::Zero)
            .unwrap();
        id
    }

    /// Leaves nothing but frames.
    pub fn frame(&self, id: MemoryId, codec: Codec) {
        let cancel = AtomicBool::new(false);
        self.store.compress(&id, codec, &cancel, &|_, _| ()).unwrap();
        self.store.drop_raw(id).unwrap();
    }

    pub async fn connect(&self) -> PagerClient {
        PagerClient::connect(&self.path("pager.sock"), "1").await.unwrap()
    }

    pub fn registration(&self, machine: &str, image: MemoryId) -> Registration {
        Registration {
            machine: machine.into(),
            store: self.path("memory"),
            image,
            memory_bytes: (GUEST_PAGES * PAGE_BYTES) as u64,
            socket: self.path(&format!("{machine}.sock")),
            overlay: Vec::new(),
            working_set: false,
        }
    }

    /// Registers a machine, and connects memory to it as Firecracker does.
    pub async fn machine(&self, client: &PagerClient, registration: Registration) -> Vmm {
        let (name, socket) = (registration.machine.clone(), registration.socket.clone());
        let mut events = client.events();
        client.register(registration).await.unwrap();
        let memory = Arc::new(WatchedMemory::new(GUEST_PAGES * PAGE_BYTES).unwrap());
        let stream = memory
            .send(&socket, memory.firecracker_message().as_bytes())
            .unwrap();
        until(&mut events, &name, |state| *state == MachineState::Serving).await;
        Vmm { memory, stream }
    }

    /// Waits for the pager's end, which must be a good one.
    pub fn join(mut self) {
        self.service.take().unwrap().join().unwrap().unwrap();
    }
}

/// A process in a VMM's place, as far as a pager sees one.
pub struct Vmm {
    pub memory: Arc<WatchedMemory>,
    pub stream: UnixStream,
}

impl Vmm {
    /// All of its memory, read by threads that wait for pages.
    pub async fn read_all(&self) -> Vec<u8> {
        let order = (0..GUEST_PAGES).collect();
        self.read_in(order).await
    }

    /// All of its memory, page by page in an order.
    pub async fn read_in(&self, order: Vec<usize>) -> Vec<u8> {
        let memory = Arc::clone(&self.memory);
        tokio::task::spawn_blocking(move || {
            let mut bytes = vec![0; memory.length()];
            for number in order {
                let offset = number * PAGE_BYTES;
                memory.read(offset, &mut bytes[offset..][..PAGE_BYTES]);
            }
            bytes
        })
        .await
        .unwrap()
    }

    pub async fn byte(&self, page: usize) -> u8 {
        let memory = Arc::clone(&self.memory);
        tokio::task::spawn_blocking(move || memory.byte(page * PAGE_BYTES))
            .await
            .unwrap()
    }

    pub async fn set_byte(&self, page: usize, value: u8) {
        let memory = Arc::clone(&self.memory);
        tokio::task::spawn_blocking(move || memory.set_byte(page * PAGE_BYTES, value))
            .await
            .unwrap();
    }

    /// Gives pages back, as a balloon does.
    pub async fn discard(&self, pages: Range<usize>) {
        let memory = Arc::clone(&self.memory);
        tokio::task::spawn_blocking(move || {
            memory
                .discard(pages.start * PAGE_BYTES, pages.len() * PAGE_BYTES)
                .unwrap();
        })
        .await
        .unwrap();
    }

    /// What the kernel says of the mapping: served or not.
    pub fn is_watched(&self) -> bool {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let start = format!("{:x}-", self.memory.address());
        let mapping = maps.split(&start).nth(1).unwrap();
        let flags = mapping.lines().find(|line| line.starts_with("VmFlags")).unwrap();
        flags.split_whitespace().any(|flag| flag == "um")
    }

    /// The pages that page tables show.
    pub fn shown(&self) -> Vec<bool> {
        use std::os::unix::fs::FileExt;
        let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
        let first = self.memory.address() / PAGE_BYTES as u64;
        let shown = |page: usize| {
            let mut word = [0; 8];
            pagemap
                .read_exact_at(&mut word, (first + page as u64) * 8)
                .unwrap();
            u64::from_ne_bytes(word) >> 62 != 0
        };
        (0..GUEST_PAGES).map(shown).collect()
    }
}

/// Waits for an event of a machine.
pub async fn until(
    events: &mut broadcast::Receiver<Event>,
    machine: &str,
    wanted: impl Fn(&MachineState) -> bool,
) -> MachineState {
    loop {
        let event = events.recv().await.unwrap();
        if event.machine == machine && wanted(&event.state) {
            return event.state;
        }
    }
}

pub fn is_failed(state: &MachineState) -> bool {
    matches!(state, MachineState::Failed { .. })
}
