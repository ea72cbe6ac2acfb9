//! Verified pieces of memory images in RAM, shared by all machines, within a bound.
//!
//! ```text
//!            ┌─ there ───────────────────────────────► used just now
//!  get(key) ─┼─ somebody loads it ─► wait ─► there, or the next one loads
//!            └─ nobody has it ─► load (no lock held) ─► there ─► the least used go until the bound holds again
//! ```
//! A key names content: the image that owns the newest pages of a chunk, and the chunk. A machine that still copies
//! from a piece keeps it alive after it went from here, so the bound may be exceeded by one piece for each thread.
//!
//! Invariant: a piece is loaded by one thread at a time, and what is here was verified. A failure is kept by nobody.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use hypeman_snapshots::{MemoryId, Piece, PieceBuffers};

/// What a piece is the content of.
pub(crate) type Key = (MemoryId, u32);

enum Slot {
    /// Some thread reads it.
    Loading,
    /// It is here; when it was used last.
    Here(Arc<Piece>, u64),
}

#[derive(Default)]
struct Shelf {
    slots: HashMap<Key, Slot>,
    /// What is here by its last use, the oldest first.
    uses: BTreeMap<u64, Key>,
    clock: u64,
    bytes: u64,
}

impl Shelf {
    fn touch(&mut self, key: Key) -> Option<Arc<Piece>> {
        self.clock += 1;
        let Some(Slot::Here(piece, used)) = self.slots.get_mut(&key) else {
            return None;
        };
        self.uses.remove(used);
        *used = self.clock;
        self.uses.insert(self.clock, key);
        Some(Arc::clone(piece))
    }

    fn put(&mut self, key: Key, piece: Arc<Piece>, bound: u64) {
        self.clock += 1;
        self.bytes += size(&piece);
        self.uses.insert(self.clock, key);
        self.slots.insert(key, Slot::Here(piece, self.clock));
        while self.bytes > bound {
            let Some((_, oldest)) = self.uses.pop_first() else {
                break;
            };
            if let Some(Slot::Here(piece, _)) = self.slots.remove(&oldest) {
                self.bytes -= size(&piece);
            }
        }
    }
}

/// Room that a piece takes, its place in the tables included.
fn size(piece: &Piece) -> u64 {
    piece.pages.len() as u64 + 256
}

/// See the module.
pub(crate) struct Cache {
    bound: u64,
    shelf: Mutex<Shelf>,
    loaded: Condvar,
    buffers: Mutex<Vec<PieceBuffers>>,
    hits: AtomicU64,
    misses: AtomicU64,
    read: AtomicU64,
}

/// Numbers for people.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CacheStats {
    /// Bytes that pieces take now.
    pub bytes: u64,
    /// Bytes that they may take.
    pub bound: u64,
    /// How often a piece was there.
    pub hits: u64,
    /// How often one had to be read.
    pub misses: u64,
    /// Bytes that were read from stores, compressed ones as they lie there.
    pub read_bytes: u64,
}

impl Cache {
    pub(crate) fn new(bound: u64) -> Self {
        Self {
            bound,
            shelf: Mutex::default(),
            loaded: Condvar::new(),
            buffers: Mutex::default(),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            read: AtomicU64::new(0),
        }
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The piece, from here or by `load`.
    pub(crate) fn get<E>(
        &self,
        key: Key,
        load: impl FnOnce(&mut PieceBuffers) -> Result<Piece, E>,
    ) -> Result<Arc<Piece>, E> {
        let mut shelf = self.shelf();
        loop {
            if let Some(piece) = shelf.touch(key) {
                self.hits.fetch_add(1, Ordering::Relaxed);
                return Ok(piece);
            }
            if !shelf.slots.contains_key(&key) {
                break;
            }
            shelf = self.loaded.wait(shelf).unwrap_or_else(PoisonError::into_inner);
        }
        shelf.slots.insert(key, Slot::Loading);
        drop(shelf);
        // Also when loading panics, nobody may wait for it for ever.
        let _claim = Claim(self, key);
        let piece = Arc::new(self.load(load)?);
        self.shelf().put(key, Arc::clone(&piece), self.bound);
        Ok(piece)
    }

    /// The piece, without keeping it here: for those who read an image from end to end.
    pub(crate) fn pass<E>(
        &self,
        key: Key,
        load: impl FnOnce(&mut PieceBuffers) -> Result<Piece, E>,
    ) -> Result<Arc<Piece>, E> {
        match self.shelf().slots.get(&key) {
            Some(Slot::Here(piece, _)) => return Ok(Arc::clone(piece)),
            Some(Slot::Loading) | None => {}
        }
        self.load(load).map(Arc::new)
    }

    fn load<E>(&self, load: impl FnOnce(&mut PieceBuffers) -> Result<Piece, E>) -> Result<Piece, E> {
        let pool = || self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let spare = pool().pop();
        let mut buffers = spare.unwrap_or_default();
        let piece = load(&mut buffers);
        pool().push(buffers);
        let piece = piece?;
        self.misses.fetch_add(1, Ordering::Relaxed);
        self.read.fetch_add(piece.read, Ordering::Relaxed);
        Ok(piece)
    }

    pub(crate) fn bound(&self) -> u64 {
        self.bound
    }

    pub(crate) fn stats(&self) -> CacheStats {
        CacheStats {
            bytes: self.shelf().bytes,
            bound: self.bound,
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            read_bytes: self.read.load(Ordering::Relaxed),
        }
    }
}

/// Somebody loads a piece, until this is dropped.
struct Claim<'a>(&'a Cache, Key);

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut shelf = self.0.shelf();
        if let Some(Slot::Loading) = shelf.slots.get(&self.1) {
            shelf.slots.remove(&self.1);
        }
        self.0.loaded.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    fn piece(number: u8) -> Piece {
        Piece {
            nonzero: 1,
            pages: vec![number; 4096],
            read: 100,
        }
    }

    fn key(chunk: u32) -> Key {
        ("0".repeat(32).parse().unwrap(), chunk)
    }

    #[test]
    fn the_least_used_goes_first_and_the_bound_holds() {
        let cache = Cache::new(3 * 4400);
        let get = |chunk: u32| {
            cache
                .get(key(chunk), |_| Ok::<_, ()>(piece(chunk as u8)))
                .unwrap()
        };
        for chunk in [1, 2, 3, 1, 4] {
            assert_eq!(get(chunk).pages[0], chunk as u8);
            assert!(cache.stats().bytes <= cache.bound());
        }
        assert_eq!((cache.stats().hits, cache.stats().misses), (1, 4));
        get(1);
        get(2);
        assert_eq!((cache.stats().hits, cache.stats().misses), (2, 5));
        assert_eq!(cache.stats().read_bytes, 500);
    }

    #[test]
    fn many_who_want_the_same_read_it_once() {
        let cache = Cache::new(1 << 20);
        let loads = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let load = |_: &mut PieceBuffers| {
                        loads.fetch_add(1, Ordering::SeqCst);
                        std::thread::yield_now();
                        Ok::<_, ()>(piece(1))
                    };
                    assert_eq!(cache.get(key(1), load).unwrap().pages[0], 1);
                });
            }
        });
        assert_eq!(loads.into_inner(), 1);
    }

    #[test]
    fn a_failure_is_told_to_its_own_and_the_next_one_tries_again() {
        let cache = Cache::new(1 << 20);
        assert_eq!(cache.get(key(1), |_| Err("damaged")), Err("damaged"));
        assert!(cache.get(key(1), |_| Ok::<_, ()>(piece(1))).is_ok());
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            cache.get(key(2), |_| -> Result<Piece, ()> { panic!("in the middle") })
        }));
        assert!(panicked.is_err());
        assert!(cache.get(key(2), |_| Ok::<_, ()>(piece(1))).is_ok());
    }
}
