//! One machine: what it is made of, what became of it, and how its pages are filled.
//!
//! ```text
//!  Waiting ──► Serving ──► Graduated (all pages are there; the kernel needs us no more)
//!     └──────────┴──► Failed (a fault stays unanswered) ──► Gone
//! ```
//! Invariants:
//! * Messages of the kernel are read, and pages are filled, under the lock of the ledger. So nothing fills a page from
//!   the image after the guest gave it back: the removal either was noted before, or the kernel refuses to fill.
//! * A page is filled from the machine's own pages, from verified bytes of its image, or with zeros; never otherwise.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use hypeman_snapshots::{CHUNK_BYTES, PAGE_BYTES, Piece};
use rustix::event::{EventfdFlags, eventfd};

use crate::audience::Audience;
use crate::cache::Cache;
use crate::image::Image;
use crate::latency::Latencies;
use crate::ledger::{Ledger, PAGES, around, locate, mask_of, runs};
use crate::protocol::{Event, MachineReport, MachineState};
use crate::recorder::{Recorder, Recording};
use crate::regions::Regions;
use crate::uffd::{Refusal, Uffd};

/// Why filling pages came to a halt.
#[derive(Debug)]
pub(crate) enum Halt {
    /// Messages must be read first.
    Changing,
    /// The process is gone.
    Ended,
    /// It cannot be done, ever.
    Failed { reason: String, damaged: bool },
}

impl From<hypeman_snapshots::Error> for Halt {
    fn from(error: hypeman_snapshots::Error) -> Self {
        Self::Failed {
            damaged: error.is_damage(),
            reason: error.to_string(),
        }
    }
}

/// What a VMM handed over.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) uffd: Uffd,
    pub(crate) regions: Regions,
}

/// Faults that wait, so that others can let them go first.
#[derive(Debug, Default)]
struct Queue {
    waiting: usize,
    since: Option<Instant>,
}

pub(crate) struct Machine {
    pub(crate) id: String,
    pub(crate) image: Arc<Image>,
    pub(crate) socket: PathBuf,
    overlay: BTreeMap<u32, BTreeMap<usize, Box<[u8]>>>,
    pub(crate) cache: Arc<Cache>,
    audience: Arc<Audience>,
    state: Mutex<MachineState>,
    state_changed: Condvar,
    pub(crate) link: OnceLock<Link>,
    ledger: Mutex<Ledger>,
    recorder: Mutex<Option<Recorder>>,
    /// Until what was recorded is kept.
    pub(crate) recording: AtomicBool,
    queue: Mutex<Queue>,
    queue_empty: Condvar,
    /// Readable when the machine's thread should look at `stopping` and `released`.
    pub(crate) kick: OwnedFd,
    stopping: AtomicBool,
    /// Its memory is complete and unregistered.
    pub(crate) released: AtomicBool,
    pub(crate) serving_since: OnceLock<Instant>,
    faults: AtomicU64,
    faulted_pages: AtomicU64,
    fetched_pages: AtomicU64,
    /// As the ledger says, for those who must not wait for it.
    populated_pages: AtomicU64,
    pub(crate) latencies: Latencies,
    pub(crate) working_set_chunks: AtomicU64,
}

/// What a machine is made of.
pub(crate) struct Parts {
    pub(crate) id: String,
    pub(crate) image: Arc<Image>,
    pub(crate) socket: PathBuf,
    /// Whole pages by their place in guest RAM.
    pub(crate) overlay: Vec<(u64, Vec<u8>)>,
    pub(crate) recording: Option<Recording>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Machine {
    pub(crate) fn new(parts: Parts, cache: Arc<Cache>, audience: Arc<Audience>) -> std::io::Result<Self> {
        let mut overlay: BTreeMap<u32, BTreeMap<usize, Box<[u8]>>> = BTreeMap::new();
        for (offset, bytes) in parts.overlay {
            let (chunk, page) = locate(offset);
            overlay.entry(chunk).or_default().insert(page, bytes.into());
        }
        Ok(Self {
            id: parts.id,
            image: parts.image,
            socket: parts.socket,
            overlay,
            cache,
            audience,
            state: Mutex::new(MachineState::Waiting),
            state_changed: Condvar::new(),
            link: OnceLock::new(),
            ledger: Mutex::default(),
            recording: AtomicBool::new(parts.recording.is_some()),
            recorder: Mutex::new(parts.recording.map(Recorder::new)),
            queue: Mutex::default(),
            queue_empty: Condvar::new(),
            kick: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            stopping: AtomicBool::new(false),
            released: AtomicBool::new(false),
            serving_since: OnceLock::new(),
            faults: AtomicU64::new(0),
            faulted_pages: AtomicU64::new(0),
            fetched_pages: AtomicU64::new(0),
            populated_pages: AtomicU64::new(0),
            latencies: Latencies::default(),
            working_set_chunks: AtomicU64::new(0),
        })
    }

    pub(crate) fn state(&self) -> MachineState {
        locked(&self.state).clone()
    }

    /// Goes on to another state and tells everybody. What has ended stays so.
    pub(crate) fn become_(&self, next: MachineState) {
        let mut state = locked(&self.state);
        if *state == next || *state == MachineState::Gone {
            return;
        }
        *state = next.clone();
        // Told under the lock: two changes are heard in their order.
        self.audience.tell(Event {
            machine: self.id.clone(),
            state: next,
        });
        drop(state);
        self.state_changed.notify_all();
        locked(&self.queue).since = None;
        self.queue_empty.notify_all();
    }

    /// Waits until the machine is served; `false` when it never will be.
    pub(crate) fn wait_until_served(&self) -> bool {
        let state = locked(&self.state);
        let waiting = |state: &mut MachineState| *state == MachineState::Waiting && !self.is_stopping();
        let state = self
            .state_changed
            .wait_while(state, waiting)
            .unwrap_or_else(PoisonError::into_inner);
        *state == MachineState::Serving
    }

    pub(crate) fn is_serving(&self) -> bool {
        *locked(&self.state) == MachineState::Serving && !self.is_stopping()
    }

    /// Asks the machine's thread to end.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        // Whoever looked before waits by now.
        drop(locked(&self.state));
        self.state_changed.notify_all();
        drop(locked(&self.queue));
        self.queue_empty.notify_all();
        self.wake();
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Makes the machine's thread look up.
    pub(crate) fn wake(&self) {
        // It fails only when it was written 2^64 times and nobody looked.
        let _ = rustix::io::write(&self.kick, &1_u64.to_ne_bytes());
    }

    pub(crate) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        locked(&self.ledger)
    }

    /// The ledger has changed.
    pub(crate) fn note_populated(&self, ledger: &Ledger) {
        self.populated_pages.store(ledger.populated(), Ordering::Relaxed);
    }

    pub(crate) fn recorder(&self) -> MutexGuard<'_, Option<Recorder>> {
        locked(&self.recorder)
    }

    /// So many faults wait now.
    pub(crate) fn set_waiting(&self, count: usize) {
        let mut queue = locked(&self.queue);
        queue.waiting = count;
        queue.since = (count > 0).then(|| queue.since.unwrap_or_else(Instant::now));
        if count == 0 {
            self.queue_empty.notify_all();
        }
    }

    /// Lets faults go first. `false` when there is nothing to do any more.
    pub(crate) fn let_faults_go_first(&self) -> bool {
        let queue = locked(&self.queue);
        let busy = |queue: &mut Queue| queue.waiting > 0 && !self.is_stopping() && queue.since.is_some();
        drop(
            self.queue_empty
                .wait_while(queue, busy)
                .unwrap_or_else(PoisonError::into_inner),
        );
        self.is_serving()
    }

    /// Since when the oldest fault waits.
    pub(crate) fn oldest_fault(&self) -> Option<Instant> {
        locked(&self.queue).since.filter(|_| self.is_serving())
    }

    pub(crate) fn report(&self) -> MachineReport {
        let memory = self.image.reader().memory_bytes();
        let populated = self.populated_pages.load(Ordering::Relaxed) * PAGE_BYTES as u64;
        MachineReport {
            machine: self.id.clone(),
            image: self.image.reader().id(),
            state: self.state(),
            faults: self.faults.load(Ordering::Relaxed),
            faulted_pages: self.faulted_pages.load(Ordering::Relaxed),
            fetched_pages: self.fetched_pages.load(Ordering::Relaxed),
            memory_bytes: Some(memory),
            // The last chunk may reach beyond the end.
            populated_bytes: Some(populated.min(memory)),
            latency: self.latencies.report(),
            recording: self.recording.load(Ordering::SeqCst),
            working_set_chunks: self.working_set_chunks.load(Ordering::Relaxed),
            regions: self
                .link
                .get()
                .map(|link| link.regions.all().collect())
                .unwrap_or_default(),
        }
    }

    /// Answers a fault at a place in guest RAM.
    pub(crate) fn answer(&self, offset: u64) -> Result<(), Halt> {
        let (chunk, page) = locate(offset);
        let bit = 1 << page;
        let nonzero = self.image.nonzero(chunk);
        let own = self.own_pages(chunk);
        let needed = bit & nonzero & !own & !self.ledger().removed(chunk) != 0;
        // Reading may take long; the lock is for filling alone.
        let piece = match needed {
            true => Some(self.image.piece(&self.cache, chunk)?),
            false => None,
        };
        let mut ledger = self.ledger();
        let (removed, missing) = (ledger.removed(chunk), !ledger.filled(chunk));
        let own = own & !removed;
        let pages = match &piece {
            _ if own & bit != 0 => page..page + 1,
            Some(_) if removed & bit == 0 => {
                let window = ledger.window(chunk, page);
                around(page, nonzero & !own & !removed & missing, window)
            }
            // Zero pages cost nothing but entries in tables.
            _ => around(page, (removed | !nonzero) & !own & missing, PAGES),
        };
        self.fill(&mut ledger, chunk, pages.clone(), piece.as_deref())?;
        ledger.answered(chunk, &pages);
        drop(ledger);
        self.faults.fetch_add(1, Ordering::Relaxed);
        self.faulted_pages
            .fetch_add(pages.len() as u64, Ordering::Relaxed);
        if let Some(recorder) = &mut *self.recorder() {
            recorder.note(chunk, mask_of(&pages), Instant::now());
        }
        Ok(())
    }

    /// Fills pages of a chunk before anybody asks for them. Those that are there stay as they are.
    pub(crate) fn fetch(&self, chunk: u32, wanted: u64, piece: Option<&Piece>) -> Result<(), Halt> {
        let mut ledger = self.ledger();
        let nonzero = self.image.nonzero(chunk);
        let own = self.own_pages(chunk);
        let (removed, missing) = (ledger.removed(chunk), !ledger.filled(chunk) & wanted);
        // One kind after the other, so that each run of pages comes from one place.
        let own = own & !removed;
        let stored = nonzero & !own & !removed;
        let kinds = [own, stored, !(own | stored)];
        for run in kinds.into_iter().flat_map(|kind| runs(kind & missing)) {
            // Own pages do not lie one after the other in memory.
            let step = if own & mask_of(&run) != 0 { 1 } else { run.len() };
            for start in run.clone().step_by(step) {
                self.fill(&mut ledger, chunk, start..start + step, piece)?;
            }
            self.fetched_pages.fetch_add(run.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Pages of a chunk that the machine has for itself.
    pub(crate) fn own_pages(&self, chunk: u32) -> u64 {
        let pages = self.overlay.get(&chunk).into_iter().flat_map(BTreeMap::keys);
        pages.fold(0, |mask, page| mask | 1 << page)
    }

    /// Fills pages that all come from one place: own pages one by one.
    fn fill(
        &self,
        ledger: &mut Ledger,
        chunk: u32,
        pages: Range<usize>,
        piece: Option<&Piece>,
    ) -> Result<(), Halt> {
        let Some(Link { uffd, regions }) = self.link.get() else {
            return Err(Halt::Ended);
        };
        let bit = 1 << pages.start;
        let own = self.overlay.get(&chunk).and_then(|own| own.get(&pages.start));
        let source: Option<&[u8]> = match (own, piece) {
            _ if ledger.removed(chunk) & bit != 0 => None,
            (Some(own), _) => Some(own),
            (None, Some(piece)) if piece.nonzero & bit != 0 => {
                let before = (piece.nonzero & (bit - 1)).count_ones() as usize * PAGE_BYTES;
                piece.pages.get(before..before + pages.len() * PAGE_BYTES)
            }
            (None, _) => None,
        };
        // The index says that there is something, and what was read does not have it.
        let stored =
            ledger.removed(chunk) & bit == 0 && (own.is_some() || self.image.nonzero(chunk) & bit != 0);
        if stored && source.is_none() {
            return Err(Halt::Failed {
                reason: format!("page {} of chunk {chunk} was not read", pages.start),
                damaged: false,
            });
        }
        let base = u64::from(chunk) * CHUNK_BYTES as u64 + (pages.start * PAGE_BYTES) as u64;
        for span in regions.spans(base..base + (pages.len() * PAGE_BYTES) as u64) {
            let (length, first) = (span.length as usize, (span.offset - base) as usize);
            let mut done = 0;
            while done < length {
                let address = span.address + done as u64;
                let filled = match source {
                    Some(bytes) => uffd.copy(address, &bytes[first + done..first + length]),
                    None => uffd.zero(address, length - done),
                };
                done += match filled {
                    Ok(bytes) => bytes,
                    // Somebody was faster, or there is nothing any more: whoever waits looks again.
                    Err(Refusal::Present | Refusal::Unmapped) => {
                        uffd.wake(address, PAGE_BYTES);
                        PAGE_BYTES
                    }
                    Err(Refusal::Changing) => return Err(Halt::Changing),
                    Err(Refusal::Ended) => return Err(Halt::Ended),
                    Err(Refusal::Failed(errno)) => {
                        return Err(Halt::Failed {
                            reason: format!("the kernel does not fill guest memory at {base:#x}: {errno}"),
                            damaged: false,
                        });
                    }
                };
            }
        }
        ledger.fill(chunk, &pages);
        self.note_populated(ledger);
        Ok(())
    }
}
