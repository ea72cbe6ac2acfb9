//! The guest's end: what was printed and is not acknowledged.
//!
//! ```text
//!     first            next                 end
//! ──────┼────────────────┼────────────────────┼──►  offsets
//!  gone │ sent, not told │ to be sent         │ printed next
//!       └──────────────── held ───────────────┘
//! ```

use std::collections::VecDeque;

use super::{HELLO, Hello, OFFSET, START, TOKEN, Token};

/// Most bytes that wait for the host. Whoever prints more waits with them.
pub const HELD: usize = 1024 * 1024;

/// The host broke the protocol: the connection is of no use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nonsense;

/// See the module. Knows no socket: the caller moves the bytes.
#[derive(Debug, Clone, Default)]
pub struct Outbox {
    token: Token,
    held: VecDeque<u8>,
    first: u64,
    /// The end of what may have left on any connection.
    sent: u64,
    /// What leaves next on this connection; `None` until the host has said where to start.
    next: Option<u64>,
    /// The head of a message of the host.
    partial: [u8; START],
    received: usize,
}

impl Outbox {
    /// Empty, at the start of the stream.
    pub fn new() -> Outbox {
        Outbox::default()
    }

    /// How many bytes it takes.
    pub fn room(&self) -> usize {
        HELD - self.held.len()
    }

    /// Whether the host has written everything.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Whether the host owes an answer on this connection.
    pub fn waits(&self) -> bool {
        self.next.is_none_or(|next| next > self.first)
    }

    /// Takes as much as there is room for.
    pub fn push(&mut self, printed: &[u8]) -> usize {
        let count = printed.len().min(self.room());
        self.held.extend(&printed[..count]);
        count
    }

    /// The first words on a new connection.
    pub fn greet(&mut self) -> [u8; HELLO] {
        self.next = None;
        self.received = 0;
        let hello = Hello {
            token: self.token,
            first: self.first,
            sent: self.sent,
        };
        hello.encode()
    }

    /// Bytes that can leave on this connection now. They count as sent from here on: of a write that fails
    /// nobody knows how far it came.
    pub fn unsent(&mut self) -> &[u8] {
        let Some(next) = self.next else { return &[] };
        let (front, back) = self.held.as_slices();
        let skipped = offset_in(self.first, next);
        let piece = match skipped.checked_sub(front.len()) {
            None => &front[skipped..],
            Some(skipped) => &back[skipped.min(back.len())..],
        };
        self.sent = self.sent.max(next.saturating_add(piece.len() as u64));
        piece
    }

    /// So many of them have left.
    pub fn left(&mut self, count: usize) {
        self.next = self.next.map(|next| next.saturating_add(count as u64));
    }

    /// Takes what the host says, in pieces of any size. `true` when it says that it has come further.
    ///
    /// # Errors
    /// It acknowledges what it cannot have.
    pub fn hear(&mut self, mut said: &[u8]) -> Result<bool, Nonsense> {
        let mut came_further = false;
        while !said.is_empty() {
            let length = if self.next.is_none() { START } else { OFFSET };
            let count = said.len().min(length - self.received);
            let (now, later) = said.split_at(count);
            self.partial[self.received..][..count].copy_from_slice(now);
            self.received += count;
            said = later;
            if self.received < length {
                break;
            }
            self.received = 0;
            came_further |= self.obey()?;
        }
        Ok(came_further)
    }

    /// Carries out a whole message.
    fn obey(&mut self) -> Result<bool, Nonsense> {
        let (token, offset) = match self.next {
            None => self.partial.split_at(TOKEN),
            Some(_) => (&[][..], &self.partial[..OFFSET]),
        };
        let offset = u64::from_be_bytes(offset.try_into().map_err(|_| Nonsense)?);
        if !(self.first..=self.next.unwrap_or(self.sent)).contains(&offset) {
            return Err(Nonsense);
        }
        if self.next.is_none() {
            self.token.copy_from_slice(token);
            self.next = Some(offset);
        }
        let written = offset_in(self.first, offset);
        self.held.drain(..written.min(self.held.len()));
        self.first = offset;
        Ok(written > 0)
    }
}

fn offset_in(first: u64, offset: u64) -> usize {
    // What is held fits into memory.
    usize::try_from(offset.saturating_sub(first)).unwrap_or(usize::MAX)
}
