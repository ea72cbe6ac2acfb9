//! The guest's events, in order, from the first of the boot.

use super::Channel;
use crate::{EventMessage, GuestEvent, frame, mux::MuxStream};
use tokio::io::{ReadHalf, WriteHalf};

/// Reader of the guest's events.
///
/// The first ones after a connection tell again what happened before, so that a server that comes back learns
/// the truth. Asking for the next event says that the previous one is dealt with: the guest waits a short
/// time for that word about its end before it powers off.
pub struct GuestEvents {
    reader: ReadHalf<MuxStream>,
    writer: WriteHalf<MuxStream>,
    _permit: tokio::sync::OwnedSemaphorePermit,
    _connection: std::sync::Arc<super::Connection>,
    delivered: u64,
    acknowledged: u64,
}

impl GuestEvents {
    pub(super) fn new(channel: Channel) -> Self {
        let (reader, writer) = tokio::io::split(channel.stream);
        GuestEvents {
            reader,
            writer,
            _permit: channel._permit,
            _connection: channel.connection,
            delivered: 0,
            acknowledged: 0,
        }
    }

    /// The next event; `None` when the connection is gone or the guest broke the protocol.
    ///
    /// Not cancel safe while an event arrives: call it from one loop.
    pub async fn next(&mut self) -> Option<GuestEvent> {
        if self.acknowledged < self.delivered {
            let word = EventMessage::Acknowledge {
                below: self.delivered,
            };
            frame::write_header(&mut self.writer, &word).await.ok()?;
            self.acknowledged = self.delivered;
        }
        match frame::read_header(&mut self.reader).await.ok()? {
            EventMessage::Event { number, event } if number == self.delivered => {
                self.delivered += 1;
                Some(event)
            }
            _ => None,
        }
    }
}
