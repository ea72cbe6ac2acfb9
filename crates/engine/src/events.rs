//! What happens on this server, as one ordered stream that can be listened to and taken up again.
//!
//! ```text
//!  drivers, jobs ── publish ──► ring of the last events, numbered from 1 ──► listeners, each with its own position
//!                                  │ the oldest goes when it is full            │ position gone: the listener ends
//!                                  ▼                                            ▼
//!                          cursor = run of the server + number          comes back with a cursor, or lists anew
//! ```
//!
//! Invariants:
//! - A listener gets each event from its position on, in order and once, or it ends; it never misses one unknowingly.
//! - Publishing never waits: not for listeners, not for a disk. What listeners hold up is their own position.
//! - A cursor is only good in the run of the server that gave it. Events are news and not the truth: after a gap a
//!   client lists what there is.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{Engine, EngineError};

/// Events that are kept for listeners that are behind or come back.
const CAPACITY: usize = 8192;

/// Longest text that is looked at as a cursor.
const LONGEST_CURSOR: usize = 64;

/// What an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// An instance: its state has changed, `Created` and `Deleted` included.
    Instance,
    /// A snapshot: `Created`, `Deleted`, or where its compression is.
    Snapshot,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Listening again with this goes on after it.
    pub cursor: String,
    /// When.
    pub time: Timestamp,
    /// What kind of object.
    pub kind: EventKind,
    /// Its id.
    pub subject: String,
    /// What became of it.
    pub state: String,
}

/// A cursor that does not lead anywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CursorRefusal {
    /// No server writes such a cursor.
    #[error("this is not a cursor of an event")]
    Malformed,
    /// What followed it is no longer known: it is too old, or of an earlier run of the server.
    #[error("the events after this cursor are gone; list what there is, then listen without a cursor")]
    Gone,
}

/// Why a listener gets nothing more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ListenerEnd {
    /// It was so slow that events which it had not taken are gone.
    #[error("the listener was too slow; events that it has not seen are gone")]
    TooSlow,
    /// The server stops.
    #[error("the server is shutting down")]
    Closing,
}

#[derive(Debug)]
struct Ring {
    /// Number of the first event in `events`; numbers begin with 1.
    first: u64,
    events: VecDeque<Arc<Event>>,
}

impl Ring {
    /// Number that the next event gets.
    fn next(&self) -> u64 {
        self.first + self.events.len() as u64
    }
}

#[derive(Debug)]
struct Shared {
    /// Tells the runs of the server apart.
    epoch: String,
    capacity: usize,
    ring: Mutex<Ring>,
    /// [`Ring::next`], for whoever waits for more.
    grown: watch::Sender<u64>,
    closing: CancellationToken,
}

/// The stream. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Events {
    shared: Arc<Shared>,
}

impl Events {
    /// An empty stream, which ends for its listeners with `closing`.
    ///
    /// # Errors
    /// There is no randomness to tell this run from others.
    pub(crate) fn new(closing: CancellationToken) -> Result<Self, EngineError> {
        let epoch =
            crate::random::hex::<8>().map_err(|error| EngineError::io("random number of this run", error))?;
        Ok(Self::with_capacity(epoch, CAPACITY, closing))
    }

    fn with_capacity(epoch: String, capacity: usize, closing: CancellationToken) -> Self {
        let ring = Ring {
            first: 1,
            events: VecDeque::with_capacity(capacity),
        };
        Self {
            shared: Arc::new(Shared {
                epoch,
                capacity,
                grown: watch::Sender::new(ring.next()),
                ring: Mutex::new(ring),
                closing,
            }),
        }
    }

    /// Tells all listeners. Call it after what it says can be seen by queries.
    pub(crate) fn publish(&self, kind: EventKind, subject: &str, state: &str) {
        let shared = &self.shared;
        let mut ring = shared.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let event = Event {
            cursor: cursor(&shared.epoch, ring.next()),
            time: Timestamp::now(),
            kind,
            subject: subject.to_owned(),
            state: state.to_owned(),
        };
        if ring.events.len() == shared.capacity {
            ring.events.pop_front();
            ring.first += 1;
        }
        ring.events.push_back(Arc::new(event));
        // Under the lock, so that the numbers told never go back.
        shared.grown.send_replace(ring.next());
    }

    /// Listens from now on, or from after a cursor.
    ///
    /// # Errors
    /// The cursor leads nowhere.
    pub(crate) fn listen(&self, after: Option<&str>) -> Result<EventListener, CursorRefusal> {
        let grown = self.shared.grown.subscribe();
        let ring = self.shared.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let next = match after {
            None => ring.next(),
            Some(text) => {
                let (epoch, number) = parse(text).ok_or(CursorRefusal::Malformed)?;
                let next = number.saturating_add(1);
                if epoch != self.shared.epoch || next < ring.first || next > ring.next() {
                    return Err(CursorRefusal::Gone);
                }
                next
            }
        };
        drop(ring);
        Ok(EventListener {
            shared: Arc::clone(&self.shared),
            grown,
            next,
        })
    }
}

/// Numbers are of one length, so that cursors of a run also sort as text.
fn cursor(epoch: &str, number: u64) -> String {
    format!("{epoch}-{number:020}")
}

fn parse(text: &str) -> Option<(&str, u64)> {
    if text.len() > LONGEST_CURSOR {
        return None;
    }
    let (epoch, number) = text.split_once('-')?;
    let known = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_hexdigit());
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !known(epoch) || !digits(number) {
        return None;
    }
    Some((epoch, number.parse().ok()?))
}

/// A position in the stream.
#[derive(Debug)]
pub struct EventListener {
    shared: Arc<Shared>,
    grown: watch::Receiver<u64>,
    next: u64,
}

impl EventListener {
    /// Cursor of the last event that was taken, or of the place where listening began.
    #[must_use]
    pub fn cursor(&self) -> String {
        cursor(&self.shared.epoch, self.next - 1)
    }

    /// The next event. May be cancelled without losing one.
    ///
    /// # Errors
    /// There will be none for this listener.
    pub async fn next(&mut self) -> Result<Arc<Event>, ListenerEnd> {
        loop {
            if let Some(event) = self.take()? {
                return Ok(event);
            }
            let closing = self.shared.closing.clone();
            tokio::select! {
                () = closing.cancelled() => return Err(ListenerEnd::Closing),
                grown = self.grown.wait_for(|next| *next > self.next) => {
                    // The sender lives as long as this listener does.
                    drop(grown.map_err(|_| ListenerEnd::Closing)?);
                }
            }
        }
    }

    /// Completes when events that it has not taken are gone: [`EventListener::next`] would say that it is too slow.
    pub async fn overrun(&self) {
        let last = self.next + self.shared.capacity as u64;
        // The sender lives as long as this listener does.
        drop(self.grown.clone().wait_for(|next| *next > last).await);
    }

    /// The event at this position, if it has happened.
    fn take(&mut self) -> Result<Option<Arc<Event>>, ListenerEnd> {
        let ring = self.shared.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let place = self.next.checked_sub(ring.first).ok_or(ListenerEnd::TooSlow)?;
        let place = usize::try_from(place).unwrap_or(usize::MAX);
        let event = ring.events.get(place).cloned();
        drop(ring);
        if event.is_some() {
            self.next += 1;
        }
        Ok(event)
    }
}

impl Engine {
    /// Listens to what happens: from now on, or from after the cursor of an event.
    ///
    /// # Errors
    /// The cursor leads nowhere.
    pub fn events(&self, after: Option<&str>) -> Result<EventListener, CursorRefusal> {
        self.shared().events.listen(after)
    }

    /// Says that something has happened, for tests of those who listen.
    #[cfg(feature = "fault-points")]
    pub fn tell(&self, kind: EventKind, subject: &str, state: &str) {
        self.shared().events.publish(kind, subject, state);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stream(capacity: usize) -> Events {
        Events::with_capacity("ab12".into(), capacity, CancellationToken::new())
    }

    fn publish(events: &Events, number: usize) {
        events.publish(EventKind::Instance, "a", &number.to_string());
    }

    #[tokio::test]
    async fn a_listener_hears_what_happens_from_its_beginning_on() {
        let events = stream(10);
        publish(&events, 0);
        let mut listener = events.listen(None).unwrap();
        let begun = listener.cursor();
        let speaker = events.clone();
        tokio::spawn(async move { (1..4).for_each(|number| publish(&speaker, number)) });
        for expected in ["1", "2", "3"] {
            let event = listener.next().await.unwrap();
            assert_eq!(
                (event.state.as_str(), event.cursor.clone()),
                (expected, listener.cursor())
            );
        }
        // The place where it began leads to the same.
        let mut again = events.listen(Some(&begun)).unwrap();
        assert_eq!(again.next().await.unwrap().state, "1");
    }

    #[tokio::test]
    async fn whoever_is_too_slow_is_told_so_and_skips_nothing() {
        let events = stream(2);
        let mut listener = events.listen(None).unwrap();
        publish(&events, 1);
        let first = listener.next().await.unwrap();
        (2..5).for_each(|number| publish(&events, number));
        assert_eq!(listener.next().await, Err(ListenerEnd::TooSlow));
        assert_eq!(
            events.listen(Some(&first.cursor)).unwrap_err(),
            CursorRefusal::Gone
        );
    }

    #[tokio::test]
    async fn whoever_takes_nothing_is_known_to_be_too_slow_without_asking() {
        use futures::FutureExt as _;

        let events = stream(2);
        let mut listener = events.listen(None).unwrap();
        (1..3).for_each(|number| publish(&events, number));
        assert!(listener.overrun().now_or_never().is_none(), "both are kept");
        publish(&events, 3);
        listener.overrun().await;
        assert_eq!(listener.next().await, Err(ListenerEnd::TooSlow));
    }

    #[tokio::test]
    async fn listeners_end_with_the_server() {
        let closing = CancellationToken::new();
        let events = Events::with_capacity("ab12".into(), 2, closing.clone());
        let mut listener = events.listen(None).unwrap();
        publish(&events, 1);
        closing.cancel();
        // What has happened is still told.
        assert_eq!(listener.next().await.unwrap().state, "1");
        assert_eq!(listener.next().await, Err(ListenerEnd::Closing));
    }

    #[test]
    fn foreign_cursors_lead_nowhere() {
        let events = stream(2);
        publish(&events, 1);
        for (text, refusal) in [
            ("", CursorRefusal::Malformed),
            ("1", CursorRefusal::Malformed),
            ("ab12-", CursorRefusal::Malformed),
            ("-1", CursorRefusal::Malformed),
            ("ab12-1x", CursorRefusal::Malformed),
            ("ab12-+1", CursorRefusal::Malformed),
            ("ab12-99999999999999999999999", CursorRefusal::Malformed),
            ("ab12-2", CursorRefusal::Gone),
            ("ab12-18446744073709551615", CursorRefusal::Gone),
            ("cd34-1", CursorRefusal::Gone),
        ] {
            assert_eq!(events.listen(Some(text)).unwrap_err(), refusal, "{text}");
        }
        assert!(events.listen(Some(&"a".repeat(100))).is_err());
        assert!(events.listen(Some("ab12-0")).is_ok());
    }

    proptest! {
        #[test]
        fn nobody_misses_or_repeats_an_event_whatever_the_pace(
            // Each step publishes some events, then lets a listener take some or come back by its cursor.
            steps in prop::collection::vec((0usize..4, 0usize..3, 0usize..6, any::<bool>()), 1..60),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let events = stream(5);
                let mut published = 0;
                let mut listeners: Vec<(Option<EventListener>, usize)> =
                    (0..3).map(|_| (events.listen(None).ok(), 0)).collect();
                for (more, who, takes, comes_back) in steps {
                    for _ in 0..more {
                        publish(&events, published);
                        published += 1;
                    }
                    let (listener, expected) = &mut listeners[who];
                    let Some(current) = listener.as_mut() else { continue };
                    if comes_back {
                        match events.listen(Some(&current.cursor())) {
                            Ok(again) => *current = again,
                            Err(refusal) => {
                                prop_assert_eq!(refusal, CursorRefusal::Gone);
                                prop_assert!(published - *expected > 5);
                                *listener = None;
                                continue;
                            }
                        }
                    }
                    for _ in 0..takes.min(published - *expected) {
                        match current.next().await {
                            Ok(event) => {
                                prop_assert_eq!(&event.state, &expected.to_string());
                                *expected += 1;
                            }
                            Err(end) => {
                                prop_assert_eq!(end, ListenerEnd::TooSlow);
                                prop_assert!(published - *expected > 5);
                                *listener = None;
                                break;
                            }
                        }
                    }
                }
                Ok(())
            })?;
        }
    }
}
