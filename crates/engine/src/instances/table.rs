//! All instances of the server: found by id, name or prefix, listed without waiting for anybody.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use hypeman_guest_api::host::GuestClient;
use hypeman_vmm::Machine;
use tokio::sync::{Notify, mpsc, watch};

use super::model::{Instance, InstanceFilter};
use super::request::Request;
use crate::EngineError;

/// What the rest of the engine holds of an instance: the way to its driver and what the driver publishes.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) requests: mpsc::Sender<Request>,
    pub(crate) published: watch::Receiver<Arc<Instance>>,
    pub(crate) live: Live,
    /// Ends a running grace period: somebody wants the machine gone now.
    pub(crate) hurry: Notify,
}

/// The running machine and its agent, shared with queries that must not wait for the driver.
#[derive(Default)]
pub(crate) struct Live {
    machine: Mutex<Option<Arc<dyn Machine>>>,
    client: Mutex<Option<GuestClient>>,
    condemned: Mutex<Option<String>>,
}

impl std::fmt::Debug for Live {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Live")
            .field("machine", &self.machine)
            .finish_non_exhaustive()
    }
}

impl Live {
    pub(crate) fn machine(&self) -> Option<Arc<dyn Machine>> {
        self.machine
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(crate) fn client(&self) -> Option<GuestClient> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes why the machine is about to be killed by somebody else than its driver.
    pub(crate) fn condemn(&self, reason: String) {
        *self.condemned.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
    }

    /// Why somebody killed the machine; said once.
    pub(crate) fn condemned(&self) -> Option<String> {
        self.condemned
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    pub(crate) fn set_machine(&self, machine: Option<Arc<dyn Machine>>) {
        if machine.is_some() {
            // What was said of an earlier one.
            self.condemned();
        }
        *self.machine.lock().unwrap_or_else(PoisonError::into_inner) = machine;
    }

    pub(crate) fn set_client(&self, client: Option<GuestClient>) {
        *self.client.lock().unwrap_or_else(PoisonError::into_inner) = client;
    }
}

#[derive(Debug, Default)]
struct Index {
    by_id: BTreeMap<String, Arc<Slot>>,
    by_name: HashMap<String, String>,
}

/// The table. Locks are held for look-ups only, never over I/O.
#[derive(Debug, Default)]
pub(crate) struct Table {
    index: RwLock<Index>,
    version: AtomicU64,
}

impl Table {
    /// Adds a slot.
    ///
    /// # Errors
    /// [`EngineError::NameConflict`] when another instance has the name.
    pub(crate) fn insert(&self, slot: Arc<Slot>) -> Result<(), EngineError> {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        if index.by_name.contains_key(&slot.name) {
            return Err(EngineError::NameConflict(slot.name.clone()));
        }
        index.by_name.insert(slot.name.clone(), slot.id.clone());
        index.by_id.insert(slot.id.clone(), slot);
        drop(index);
        self.changed();
        Ok(())
    }

    pub(crate) fn remove(&self, id: &str) {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = index.by_id.remove(id) {
            index.by_name.remove(&slot.name);
        }
        drop(index);
        self.changed();
    }

    /// Says that something published has changed.
    pub(crate) fn changed(&self) {
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Grows with each change of anything published.
    pub(crate) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Exact id.
    pub(crate) fn get(&self, id: &str) -> Result<Arc<Slot>, EngineError> {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        index.by_id.get(id).cloned().ok_or_else(|| not_found(id))
    }

    /// Id, then name, then prefix of an id.
    pub(crate) fn resolve(&self, text: &str) -> Result<String, EngineError> {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        if index.by_id.contains_key(text) {
            return Ok(text.to_owned());
        }
        if let Some(id) = index.by_name.get(text) {
            return Ok(id.clone());
        }
        if text.is_empty() {
            return Err(not_found(text));
        }
        let mut matches = index
            .by_id
            .range::<str, _>((Bound::Included(text), Bound::Unbounded))
            .map(|(id, _)| id)
            .take_while(|id| id.starts_with(text));
        match (matches.next(), matches.next()) {
            (None, _) => Err(not_found(text)),
            (Some(id), None) => Ok(id.clone()),
            (Some(_), Some(_)) => Err(EngineError::Ambiguous {
                name: text.to_owned(),
            }),
        }
    }

    pub(crate) fn has_name(&self, name: &str) -> bool {
        self.index
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .by_name
            .contains_key(name)
    }

    pub(crate) fn slots(&self) -> Vec<Arc<Slot>> {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        index.by_id.values().cloned().collect()
    }

    /// Whether an instance is in standby on this memory image.
    pub(crate) fn stands_on(&self, image: &str) -> bool {
        self.slots().iter().any(|slot| {
            let instance = slot.published.borrow();
            let standby = instance.record.standby.as_ref();
            standby.is_some_and(|standby| standby.memory.image == image)
        })
    }

    /// What the drivers last published.
    pub(crate) fn list(&self, filter: &InstanceFilter) -> Vec<Arc<Instance>> {
        self.slots()
            .iter()
            .map(|slot| slot.published.borrow().clone())
            .filter(|instance| filter.state.is_none_or(|state| state == instance.state))
            .filter(|instance| hypeman_core::tags::matches(&filter.tags, &instance.record.tags))
            .collect()
    }
}

fn not_found(text: &str) -> EngineError {
    EngineError::NotFound {
        kind: "instance",
        name: text.to_owned(),
    }
}
