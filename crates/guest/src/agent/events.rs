//! The events of this boot, kept from the first, so that a server that comes back hears them all.

use std::{cell::RefCell, time::Duration};

use hypeman_guest_api::{EventMessage, GuestEvent, Reply, frame};
use tokio::sync::watch;

use super::stream::SharedStream;

/// An append-only log with any number of readers.
pub struct EventLog {
    events: RefCell<Vec<GuestEvent>>,
    length: watch::Sender<u64>,
    acknowledged: watch::Sender<u64>,
}

impl Default for EventLog {
    fn default() -> Self {
        Self::new()
    }
}

impl EventLog {
    /// An empty log.
    pub fn new() -> Self {
        EventLog {
            events: RefCell::new(Vec::new()),
            length: watch::channel(0).0,
            acknowledged: watch::channel(0).0,
        }
    }

    /// Appends an event.
    pub fn push(&self, event: GuestEvent) {
        crate::log_line!("{event:?}");
        let mut events = self.events.borrow_mut();
        events.push(event);
        self.length.send_replace(events.len() as u64);
    }

    /// Waits until a host has dealt with all events so far, at most `patience`.
    pub async fn acknowledged(&self, patience: Duration) {
        let all = *self.length.borrow();
        let mut acknowledged = self.acknowledged.subscribe();
        // Late or never: the caller goes on in both cases.
        let _ = tokio::time::timeout(patience, acknowledged.wait_for(|below| *below >= all)).await;
    }

    pub(super) async fn serve(&self, mut stream: SharedStream) {
        if frame::write_header(&mut stream, &Reply::Done).await.is_err() {
            return;
        }
        let mut reader = stream.clone();
        let send = async {
            let mut length = self.length.subscribe();
            let mut number = 0;
            loop {
                let event = self.events.borrow().get(number as usize).cloned();
                let sent = match event {
                    Some(event) => {
                        let message = EventMessage::Event { number, event };
                        number += 1;
                        frame::write_header(&mut stream, &message).await.is_ok()
                    }
                    None => length.wait_for(|length| *length > number).await.is_ok(),
                };
                if !sent {
                    return;
                }
            }
        };
        let receive = async {
            while let Ok(EventMessage::Acknowledge { below }) = frame::read_header(&mut reader).await {
                self.acknowledged.send_if_modified(|known| {
                    let news = below > *known;
                    *known = below.max(*known);
                    news
                });
            }
        };
        tokio::select! {
            () = send => {}
            () = receive => {}
        }
    }
}
