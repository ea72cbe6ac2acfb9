//! Who hears what happens: every connected server, in order, or cut off when it does not listen.

use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::protocol::{Event, Line};

/// Lines that may wait for one listener.
const QUEUE: usize = 4096;

/// All listeners.
#[derive(Debug, Default)]
pub(crate) struct Audience(Mutex<Vec<SyncSender<String>>>);

impl Audience {
    fn listeners(&self) -> MutexGuard<'_, Vec<SyncSender<String>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A queue that somebody writes out. It ends when too much waits in it.
    pub(crate) fn line(&self) -> (SyncSender<String>, Receiver<String>) {
        sync_channel(QUEUE)
    }

    /// From now on this queue hears of everything.
    pub(crate) fn join(&self, queue: SyncSender<String>) {
        self.listeners().push(queue);
    }

    /// Nobody hears any more. What waits in the queues is still written out.
    pub(crate) fn leave(&self) {
        self.listeners().clear();
    }

    /// Tells all.
    pub(crate) fn tell(&self, event: Event) {
        let Ok(text) = serde_json::to_string(&Line::Event { event }) else {
            return;
        };
        self.listeners()
            .retain(|queue| match queue.try_send(text.clone()) {
                Ok(()) => true,
                // One that was cut off reconnects, and is told then what holds.
                Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => false,
            });
    }
}
