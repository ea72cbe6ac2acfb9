//! What the workload prints, where the machine has no port for it but a vsock device: a stream of bytes that
//! outlives its connections.
//!
//! ```text
//! guest                                            host
//!  │ HELLO   mark, token, first, sent               │   the guest connects
//!  ├───────────────────────────────────────────────►│
//!  │                 START   token, offset          │   go on from here
//!  │◄───────────────────────────────────────────────┤
//!  │ the bytes from there on                        │
//!  ├───────────────────────────────────────────────►│
//!  │                 offset, offset, …              │   written up to here
//!  │◄───────────────────────────────────────────────┤
//! ```
//!
//! Offsets count what was printed since the boot. The guest keeps what the host has not acknowledged
//! ([`Outbox`]), so a connection may end anywhere: the next one goes on at the first byte that the host has not
//! written, which only the host knows. Every START brings a new *token*, and a HELLO the last one that the guest
//! was given: it names the history that both ends share.
//!
//! Invariants:
//! - Nothing is lost: the host begins nowhere behind the guest's first unacknowledged byte, unless that history
//!   shows that it has what lies between.
//! - Nothing is doubled, however often either end vanishes. A guest that was taken back to an older snapshot
//!   repeats at most what was on its way then.
//! - Messages have fixed sizes: no length on the wire can lie. A lying guest spoils its own log, a lying host its
//!   own record.

mod outbox;
pub use outbox::{HELD, Nonsense, Outbox};

/// Bytes of a HELLO.
pub const HELLO: usize = MARK.len() + TOKEN + 2 * OFFSET;

/// Bytes of a START.
pub const START: usize = TOKEN + OFFSET;

/// Bytes of an acknowledgement.
pub const OFFSET: usize = 8;

/// Bytes of a token.
pub const TOKEN: usize = 16;

/// Names the protocol and its version.
const MARK: [u8; 16] = *b"\xa7hypeman-log 1\r\n";

/// Random bytes that the host draws for each connection. Zeros: none was given yet.
pub type Token = [u8; TOKEN];

/// What the guest says first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// From the last START that reached the guest.
    pub token: Token,
    /// The first byte that was not acknowledged, and so the oldest that the guest still has.
    pub first: u64,
    /// The end of what may have left the guest. Never before `first`.
    pub sent: u64,
}

impl Hello {
    /// As it travels.
    pub fn encode(&self) -> [u8; HELLO] {
        let mut bytes = [0; HELLO];
        let (mark, rest) = bytes.split_at_mut(MARK.len());
        let (token, rest) = rest.split_at_mut(TOKEN);
        let (first, sent) = rest.split_at_mut(OFFSET);
        mark.copy_from_slice(&MARK);
        token.copy_from_slice(&self.token);
        first.copy_from_slice(&self.first.to_be_bytes());
        sent.copy_from_slice(&self.sent.to_be_bytes());
        bytes
    }

    /// `None` when it is not one.
    pub fn decode(bytes: &[u8; HELLO]) -> Option<Hello> {
        let rest = bytes.strip_prefix(&MARK)?;
        let (token, rest) = rest.split_first_chunk()?;
        let (first, sent) = rest.split_first_chunk()?;
        let hello = Hello {
            token: *token,
            first: u64::from_be_bytes(*first),
            sent: u64::from_be_bytes(*sent.first_chunk()?),
        };
        (hello.first <= hello.sent).then_some(hello)
    }
}

/// How much of which history the host has written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Of the connection that the last byte came by.
    pub token: Token,
    /// The end of what is written.
    pub offset: u64,
}

/// Where the host lets the guest go on. Within `first..=sent`, whatever the host remembers.
pub fn resume(written: Option<Position>, hello: &Hello) -> u64 {
    match written {
        // All that was sent since came by this very connection, in order. A guest that has sent less than is
        // written was taken back to an earlier instant of it: up to there both are one history.
        Some(written) if written.token == hello.token => written.offset.clamp(hello.first, hello.sent),
        // Another history lies between, or none: what the guest has was perhaps never seen.
        _ => hello.first,
    }
}

/// The host's answer to a HELLO.
pub fn start(token: Token, offset: u64) -> [u8; START] {
    let mut bytes = [0; START];
    let (head, tail) = bytes.split_at_mut(TOKEN);
    head.copy_from_slice(&token);
    tail.copy_from_slice(&acknowledgement(offset));
    bytes
}

/// The host has written all before `offset`.
pub fn acknowledgement(offset: u64) -> [u8; OFFSET] {
    offset.to_be_bytes()
}

#[cfg(test)]
mod tests;
