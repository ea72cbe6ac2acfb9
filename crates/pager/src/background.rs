//! Pages that are there before anybody asks: the working set at a restore, and all of memory in the end.
//!
//! ```text
//!  registered ─► read the working set's chunks into the cache ─► VMM connects ─► fill them, in order   (a thread each)
//!  served for long enough ─► read and fill every chunk ─► unregister ─► the machine needs nobody       (one at a time)
//! ```
//! Faults go first, always. A damaged chunk ends this work and nothing else: the guest may never touch it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use hypeman_snapshots::WorkingSet;

use crate::machine::{Halt, Machine};
use crate::uffd::Refusal;

/// Fetches a working set ahead of the machine's faults.
pub(crate) fn prefetch(machine: &Machine, set: &WorkingSet) {
    machine
        .working_set_chunks
        .store(set.chunks.len() as u64, Ordering::Relaxed);
    // The VMM is being started meanwhile: what is read now is not waited for later.
    let mut room = machine.cache.bound() / 2;
    for (chunk, _) in &set.chunks {
        if machine.is_stopping() || machine.link.get().is_some() {
            break;
        }
        match read(machine, *chunk, true) {
            Ok(piece) => room = room.saturating_sub(piece.map_or(0, |piece| piece.pages.len() as u64)),
            Err(error) => return quietly(machine, "the working set cannot be fetched", error),
        }
        if room == 0 {
            break;
        }
    }
    if !machine.wait_until_served() {
        return;
    }
    for (chunk, pages) in &set.chunks {
        if !machine.let_faults_go_first() {
            return;
        }
        if let Err(error) = fill(machine, *chunk, *pages, true) {
            return quietly(machine, "the working set cannot be fetched", error);
        }
    }
}

/// Fills all that is missing and lets the machine go. `false` when it stays served.
pub(crate) fn graduate(machine: &Machine) -> bool {
    let chunks = machine.image.reader().chunks();
    for chunk in 0..chunks {
        let stored = machine.image.nonzero(chunk) | machine.own_pages(chunk);
        if stored == 0 {
            continue;
        }
        if !machine.let_faults_go_first() {
            return false;
        }
        if let Err(error) = fill(machine, chunk, stored, false) {
            quietly(machine, "a machine cannot be let go", error);
            return false;
        }
    }
    release(machine)
}

/// Unregisters a machine of which every page that is not zero is there: the kernel fills the others with zeros itself.
fn release(machine: &Machine) -> bool {
    let Some(link) = machine.link.get() else {
        return false;
    };
    let ledger = machine.ledger();
    for span in link.regions.all() {
        match link.uffd.unregister(span.address, span.length) {
            Ok(()) | Err(Refusal::Unmapped) => {}
            Err(refusal) => {
                // Some regions may be free by now. That is no harm: all that is not zero is there.
                tracing::warn!(machine = machine.id, ?refusal, "a machine cannot be let go");
                return false;
            }
        }
    }
    drop(ledger);
    machine.released.store(true, Ordering::SeqCst);
    machine.wake();
    true
}

/// Fills the pages that the guest gave back with zeros, so that page tables tell the whole truth: what is not there
/// is what the image has. The machine stands still meanwhile.
pub(crate) fn settle(machine: &Machine) -> Result<(), Halt> {
    let holes = machine.ledger().holes();
    for (chunk, pages) in holes {
        retried(|| machine.fetch(chunk, pages, None))?;
    }
    Ok(())
}

fn fill(machine: &Machine, chunk: u32, pages: u64, keep: bool) -> Result<(), Halt> {
    let missing = pages & !machine.ledger().filled(chunk);
    if missing == 0 {
        return Ok(());
    }
    let piece = read(machine, chunk, keep)?;
    retried(|| machine.fetch(chunk, missing, piece.as_deref()))
}

/// What the image has in a chunk; nothing is read for one that is all zero.
fn read(machine: &Machine, chunk: u32, keep: bool) -> Result<Option<Arc<hypeman_snapshots::Piece>>, Halt> {
    if machine.image.nonzero(chunk) == 0 {
        return Ok(None);
    }
    let piece = match keep {
        true => machine.image.piece(&machine.cache, chunk),
        false => machine.image.passing_piece(&machine.cache, chunk),
    };
    Ok(Some(piece?))
}

/// Tries again while pages are being removed: the machine's thread hears of it, and the remover goes on.
fn retried(mut work: impl FnMut() -> Result<(), Halt>) -> Result<(), Halt> {
    loop {
        match work() {
            Err(Halt::Changing) => std::thread::yield_now(),
            other => return other,
        }
    }
}

fn quietly(machine: &Machine, what: &str, halt: Halt) {
    if let Halt::Failed { reason, .. } = halt {
        tracing::warn!(machine = machine.id, reason, "{what}");
    }
}
