//! The list of all instances, by far the most frequent request, kept serialised.
//!
//! ```text
//!  an instance changes ─► serialised once, but for one number:   {…"running":|…}
//!  a list is asked for ─► young, and nothing has changed?         as it is
//!                         else the pieces joined, each with how long it has been in its phase by now
//! ```
//!
//! Invariant: a list is what serialising all instances at that instant would give. Only its phase clocks may be up to
//! [`LIST_AGE`] old.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hypeman_engine::Instance;
use jiff::Timestamp;
use serde::ser::Error as _;

use crate::convert::instance::to_api;

/// How old the phase clocks of a list may be.
const LIST_AGE: Duration = Duration::from_millis(100);
/// Stands where the number will: as a number behind a name it is nowhere else, for quotes within text are escaped.
const PLACE: i64 = i64::MAX;

/// See the module.
#[derive(Debug, Default)]
pub struct AllInstances(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    pieces: HashMap<String, Piece>,
    list: Option<List>,
}

/// The last list.
#[derive(Debug)]
struct List {
    version: u64,
    made: Instant,
    bytes: Bytes,
}

/// One instance without the time that it has spent in its phase.
#[derive(Debug)]
struct Piece {
    of: Arc<Instance>,
    head: Vec<u8>,
    tail: Vec<u8>,
    /// Milliseconds in the phase before it began for the last time, and when that was.
    spent: i64,
    since: Timestamp,
}

impl AllInstances {
    /// The list as JSON. `version` grows with each change of an instance; it was read before `instances` is called.
    ///
    /// # Errors
    /// An instance cannot be serialised.
    pub fn get(
        &self,
        version: u64,
        instances: impl FnOnce() -> Vec<Arc<Instance>>,
    ) -> Result<Bytes, serde_json::Error> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.list(version, Instant::now(), instances)
    }
}

impl Kept {
    fn list(
        &mut self,
        version: u64,
        now: Instant,
        instances: impl FnOnce() -> Vec<Arc<Instance>>,
    ) -> Result<Bytes, serde_json::Error> {
        if let Some(list) = &self.list
            && list.version >= version
            && now.duration_since(list.made) < LIST_AGE
        {
            return Ok(list.bytes.clone());
        }
        let bytes = self.join(&instances(), Timestamp::now())?;
        self.list = Some(List {
            version,
            made: now,
            bytes: bytes.clone(),
        });
        Ok(bytes)
    }

    fn join(&mut self, instances: &[Arc<Instance>], now: Timestamp) -> Result<Bytes, serde_json::Error> {
        let mut known = std::mem::take(&mut self.pieces);
        let former = self.list.as_ref().map_or(0, |list| list.bytes.len());
        let mut bytes = Vec::with_capacity(former + former / 8);
        bytes.push(b'[');
        for instance in instances {
            let id = &instance.record.id;
            let piece = match known.remove(id) {
                Some(piece) if Arc::ptr_eq(&piece.of, instance) => piece,
                _ => Piece::new(instance)?,
            };
            if bytes.len() > 1 {
                bytes.push(b',');
            }
            piece.write(now, &mut bytes);
            self.pieces.insert(id.clone(), piece);
        }
        bytes.push(b']');
        Ok(bytes.into())
    }
}

impl Piece {
    fn new(instance: &Arc<Instance>) -> Result<Self, serde_json::Error> {
        let since = instance.record.phases.since();
        let mut shown = to_api(instance, since);
        let phase = shown.current_phase.clone().unwrap_or_default();
        let spent = shown.phase_durations_ms.insert(phase.clone(), PLACE);
        let text = serde_json::to_vec(&shown)?;
        let (name, place) = (format!("\"{phase}\":"), PLACE.to_string());
        let wanted = format!("{name}{place}");
        let at = text
            .windows(wanted.len())
            .position(|window| window == wanted.as_bytes())
            .ok_or_else(|| serde_json::Error::custom("an instance without its phase"))?;
        Ok(Self {
            of: Arc::clone(instance),
            head: text[..at + name.len()].to_vec(),
            tail: text[at + wanted.len()..].to_vec(),
            spent: spent.unwrap_or_default(),
            since,
        })
    }

    fn write(&self, now: Timestamp, bytes: &mut Vec<u8>) {
        // A wall clock that was set back counts as no time at all.
        let more = now
            .as_millisecond()
            .saturating_sub(self.since.as_millisecond())
            .max(0);
        bytes.extend_from_slice(&self.head);
        bytes.extend_from_slice(self.spent.saturating_add(more).to_string().as_bytes());
        bytes.extend_from_slice(&self.tail);
    }
}

#[cfg(test)]
mod tests {
    use hypeman_core::instance::{InstanceState, PhaseClock};
    use hypeman_engine::InstanceRecord;
    use serde_json::{Value, json};

    use super::*;

    fn at(milliseconds: i64) -> Timestamp {
        Timestamp::from_millisecond(milliseconds).unwrap()
    }

    fn instance(id: &str, phases: &PhaseClock, tag: &str) -> Arc<Instance> {
        let record: InstanceRecord = serde_json::from_value(json!({
            "id": id, "name": id, "image": "a:1", "image_digest": "", "platform": "linux/amd64",
            "memory_bytes": 1024, "hotplug_bytes": 0, "overlay_bytes": 1024, "vcpus": 1,
            "environment": {}, "hypervisor": "qemu", "tags": { "tag": tag },
            "skip_kernel_headers": false, "skip_guest_agent": false, "created_at": at(0),
            "phases": phases, "boot_artifacts": "",
        }))
        .unwrap();
        Arc::new(Instance {
            record: Arc::new(record),
            state: phases.current(),
            state_error: None,
        })
    }

    fn as_ever(instances: &[Arc<Instance>], now: Timestamp) -> Value {
        let shown: Vec<_> = instances.iter().map(|instance| to_api(instance, now)).collect();
        serde_json::to_value(shown).unwrap()
    }

    #[test]
    fn a_list_of_pieces_is_what_serialising_all_would_give() {
        let mut phases = PhaseClock::start(InstanceState::Created, at(0));
        phases.enter(InstanceState::Running, at(10));
        let fresh = instance("fresh", &phases, "");
        phases.enter(InstanceState::Stopped, at(500));
        phases.enter(InstanceState::Running, at(900));
        // Who puts the place into a text does not get it filled.
        let odd = instance("odd", &phases, "\"running\":9223372036854775807");
        let mut instances = vec![fresh, odd];
        let mut kept = Kept::default();
        for now in [900, 901, 123_456, 5] {
            let bytes = kept.join(&instances, at(now)).unwrap();
            let list: Value = serde_json::from_slice(&bytes).unwrap();
            assert_eq!(list, as_ever(&instances, at(now)), "at {now}");
        }
        // One changes, one goes.
        phases.enter(InstanceState::Standby, at(2_000));
        instances = vec![instance("odd", &phases, "changed")];
        let bytes = kept.join(&instances, at(3_000)).unwrap();
        assert_eq!(
            serde_json::from_slice::<Value>(&bytes).unwrap(),
            as_ever(&instances, at(3_000))
        );
        assert_eq!(kept.pieces.len(), 1);
        assert_eq!(&*kept.join(&[], at(3_000)).unwrap(), b"[]");
    }

    #[test]
    fn a_list_is_made_anew_when_something_changed_or_it_is_old() {
        let mut kept = Kept::default();
        let (now, phases) = (Instant::now(), PhaseClock::start(InstanceState::Running, at(0)));
        let one = || vec![instance("a", &phases, "")];
        let first = kept.list(1, now, one).unwrap();
        assert_eq!(kept.list(1, now, || unreachable!("it is there")).unwrap(), first);
        assert_eq!(&*kept.list(2, now, Vec::new).unwrap(), b"[]");
        assert_ne!(&*kept.list(2, now + LIST_AGE, one).unwrap(), b"[]");
    }
}
