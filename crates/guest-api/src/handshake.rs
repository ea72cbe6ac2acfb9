//! Finds the start of a connection in a byte stream that may hold anything, and proves both ends to each other.
//!
//! A serial port has no connections of its own: either end may meet leftovers of a peer that died in the
//! middle of a word. So each step begins with a mark that is searched for, not expected:
//!
//! ```text
//! host                                                    guest
//!  │ PREAMBLE  mark, version, beacon, host nonce            │   repeated until answered
//!  ├───────────────────────────────────────────────────────►│
//!  │    ANSWER mark, host nonce, version, state, guest nonce, proof(key, "guest", both nonces)
//!  │◄───────────────────────────────────────────────────────┤   one for each preamble
//!  │ PROOF     mark, guest nonce, proof(key, "host", both nonces)
//!  ├───────────────────────────────────────────────────────►│
//!  │                         BEGIN mark, host nonce, verdict│
//!  │◄───────────────────────────────────────────────────────┤
//!  │ ◄──────────────────────── yamux ─────────────────────► │
//! ```
//!
//! The marks of the guest carry the host's nonce, so an answer to a dead host is never taken for ours. A proof
//! is BLAKE3 keyed with the secret of this boot; before the guest is configured there is no secret, and both
//! proofs are zeros. The *beacon* is derived from the key: a guest that is still in a connection whose host
//! vanished unnoticed recognises it in the middle of the stream ([`BeaconReader`]) and starts over, while no
//! workload can forge it.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};

use crate::AgentKey;

/// Version of everything above the handshake.
pub const VERSION: u16 = 1;

/// Time until the preamble is sent for the second time; from then on it doubles.
const FIRST_REPEAT: std::time::Duration = std::time::Duration::from_millis(4);

const MARK: usize = 16;
const NONCE: usize = 32;
const PROOF: usize = 32;

const PREAMBLE_MARK: [u8; MARK] = *b"\xa7hypeman-hello\r\n";
const ANSWER_MARK: [u8; MARK] = *b"\xa7hypeman-guest\r\n";
const PROOF_MARK: [u8; MARK] = *b"\xa7hypeman-proof\r\n";
const BEGIN_MARK: [u8; MARK] = *b"\xa7hypeman-begin\r\n";

/// Bytes of a preamble after its mark.
const PREAMBLE_BODY: usize = 2 + MARK + NONCE;
/// Bytes of an answer after mark and host nonce.
const ANSWER_BODY: usize = 2 + 1 + NONCE + PROOF;

const STATE_WAITING: u8 = 0;
const STATE_CONFIGURED: u8 = 1;

const VERDICT_ACCEPTED: u8 = 0;
const VERDICT_REFUSED: u8 = 1;

/// Random bytes of one connection attempt.
pub type Nonce = [u8; NONCE];

/// A fresh nonce from the kernel.
///
/// # Errors
/// When the kernel has no random bytes to give.
pub fn fresh_nonce() -> io::Result<Nonce> {
    let mut nonce = [0; NONCE];
    let mut filled = 0;
    while filled < nonce.len() {
        // Not blocking: at the first contact of a boot the pool may be empty, and no secret exists yet.
        filled += rustix::rand::getrandom(&mut nonce[filled..], rustix::rand::GetRandomFlags::INSECURE)?;
    }
    Ok(nonce)
}

fn proof(key: Option<&AgentKey>, side: &[u8], host: &Nonce, guest: &Nonce, state: u8) -> blake3::Hash {
    let Some(key) = key else {
        return blake3::Hash::from_bytes([0; PROOF]);
    };
    let mut hasher = blake3::Hasher::new_keyed(&key.0);
    hasher.update(b"hypeman agent channel 1 ").update(side);
    hasher.update(host).update(guest).update(&[state]);
    hasher.finalize()
}

/// The sign by which a guest with this key recognises a new preamble in the middle of a stream.
pub fn beacon(key: &AgentKey) -> [u8; MARK] {
    let hash = blake3::keyed_hash(&key.0, b"hypeman agent beacon 1");
    let mut beacon = [0; MARK];
    beacon.copy_from_slice(&hash.as_bytes()[..MARK]);
    beacon
}

/// What both ends agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agreement {
    /// The guest has its configuration.
    pub configured: bool,
    /// Version that the peer speaks.
    pub version: u16,
}

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The byte stream failed or ended.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The peer is configured and we have no key.
    #[error("a key is needed")]
    KeyRequired,
    /// The peer does not know the key.
    #[error("the peer could not prove that it knows the key")]
    NotAuthentic,
}

/// Reads until one of the marks has gone by and returns its index. Skips anything else, byte by byte, with no
/// more memory than the longest mark.
async fn find_mark<R: AsyncRead + Unpin>(reader: &mut R, marks: &[&[u8]]) -> io::Result<usize> {
    let longest = marks.iter().map(|mark| mark.len()).max().unwrap_or(0);
    let mut tail: Vec<u8> = Vec::with_capacity(longest * 2);
    loop {
        let byte = reader.read_u8().await?;
        if tail.len() == longest * 2 {
            tail.drain(..longest);
        }
        tail.push(byte);
        if let Some(found) = marks.iter().position(|mark| tail.ends_with(mark)) {
            return Ok(found);
        }
    }
}

/// The host's side. Sends the preamble again until an answer comes, soon at first and then each `repeat`: a guest
/// that was just restored loses one while it notices that its former host is gone. The caller sets the deadline by
/// dropping the future. The stream is positioned exactly behind the guest's begin afterwards.
///
/// # Errors
/// See [`HandshakeError`].
pub async fn host<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    key: Option<&AgentKey>,
    repeat: std::time::Duration,
) -> Result<Agreement, HandshakeError> {
    let nonce = fresh_nonce()?;
    let mut preamble = Vec::with_capacity(MARK + PREAMBLE_BODY);
    preamble.extend_from_slice(&PREAMBLE_MARK);
    preamble.extend_from_slice(&VERSION.to_be_bytes());
    // Without a key the field is random, so that its length never tells anything.
    preamble.extend_from_slice(
        &key.map_or_else(|| fresh_nonce().map(|n| first_mark(&n)), |key| Ok(beacon(key)))?,
    );
    preamble.extend_from_slice(&nonce);

    let (mut reader, mut writer) = tokio::io::split(stream);
    let answer_mark = [ANSWER_MARK.as_slice(), &nonce].concat();
    let begin_mark = [BEGIN_MARK.as_slice(), &nonce].concat();

    let mut body = [0; ANSWER_BODY];
    {
        let read = async {
            find_mark(&mut reader, &[&answer_mark]).await?;
            reader.read_exact(&mut body).await?;
            Ok::<(), io::Error>(())
        };
        tokio::pin!(read);
        let mut pause = repeat.min(FIRST_REPEAT);
        loop {
            // Never given up half-way: a torn preamble would swallow the head of the proof that follows.
            writer.write_all(&preamble).await?;
            writer.flush().await?;
            tokio::select! {
                result = &mut read => { result?; break }
                () = tokio::time::sleep(pause) => pause = repeat.min(pause * 2),
            }
        }
    }
    let version = u16::from_be_bytes([body[0], body[1]]);
    let state = body[2];
    let mut guest_nonce = [0; NONCE];
    guest_nonce.copy_from_slice(&body[3..3 + NONCE]);
    let mut guest_proof = [0; PROOF];
    guest_proof.copy_from_slice(&body[3 + NONCE..]);

    let configured = state == STATE_CONFIGURED;
    let effective_key = if configured {
        let Some(key) = key else {
            return Err(HandshakeError::KeyRequired);
        };
        // `Hash` compares in constant time.
        if proof(Some(key), b"guest", &nonce, &guest_nonce, state) != blake3::Hash::from_bytes(guest_proof) {
            return Err(HandshakeError::NotAuthentic);
        }
        Some(key)
    } else {
        None
    };

    let mut message = Vec::with_capacity(MARK + NONCE + PROOF);
    message.extend_from_slice(&PROOF_MARK);
    message.extend_from_slice(&guest_nonce);
    message.extend_from_slice(proof(effective_key, b"host", &nonce, &guest_nonce, state).as_bytes());
    writer.write_all(&message).await?;
    writer.flush().await?;

    find_mark(&mut reader, &[&begin_mark]).await?;
    match reader.read_u8().await? {
        VERDICT_ACCEPTED => Ok(Agreement { configured, version }),
        _ => Err(HandshakeError::NotAuthentic),
    }
}

fn first_mark(nonce: &Nonce) -> [u8; MARK] {
    let mut mark = [0; MARK];
    mark.copy_from_slice(&nonce[..MARK]);
    mark
}

/// The guest's side: waits, as long as it takes, for a host that proves itself.
///
/// A host with a wrong proof is told so, and the search goes on.
///
/// # Errors
/// When the byte stream fails or ends.
pub async fn guest<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    key: Option<&AgentKey>,
) -> Result<Agreement, HandshakeError> {
    let state = if key.is_some() {
        STATE_CONFIGURED
    } else {
        STATE_WAITING
    };
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut current: Option<(Nonce, Nonce, u16)> = None;
    loop {
        if find_mark(&mut reader, &[&PREAMBLE_MARK, &PROOF_MARK]).await? == 0 {
            let mut body = [0; PREAMBLE_BODY];
            reader.read_exact(&mut body).await?;
            let mut host_nonce = [0; NONCE];
            host_nonce.copy_from_slice(&body[2 + MARK..]);
            // The same host again keeps its guest nonce, so that any of the answers serves it.
            let guest_nonce = match current {
                Some((known, nonce, _)) if known == host_nonce => nonce,
                _ => fresh_nonce()?,
            };
            current = Some((host_nonce, guest_nonce, u16::from_be_bytes([body[0], body[1]])));
            let mut answer = Vec::with_capacity(MARK + NONCE + ANSWER_BODY);
            answer.extend_from_slice(&ANSWER_MARK);
            answer.extend_from_slice(&host_nonce);
            answer.extend_from_slice(&VERSION.to_be_bytes());
            answer.push(state);
            answer.extend_from_slice(&guest_nonce);
            answer.extend_from_slice(proof(key, b"guest", &host_nonce, &guest_nonce, state).as_bytes());
            writer.write_all(&answer).await?;
            writer.flush().await?;
            continue;
        }
        let mut body = [0; NONCE + PROOF];
        reader.read_exact(&mut body).await?;
        let Some((host_nonce, guest_nonce, version)) = current else {
            continue;
        };
        if body[..NONCE] != guest_nonce {
            continue;
        }
        let mut host_proof = [0; PROOF];
        host_proof.copy_from_slice(&body[NONCE..]);
        let accepted =
            proof(key, b"host", &host_nonce, &guest_nonce, state) == blake3::Hash::from_bytes(host_proof);
        let mut begin = Vec::with_capacity(MARK + NONCE + 1);
        begin.extend_from_slice(&BEGIN_MARK);
        begin.extend_from_slice(&host_nonce);
        begin.push(if accepted {
            VERDICT_ACCEPTED
        } else {
            VERDICT_REFUSED
        });
        writer.write_all(&begin).await?;
        writer.flush().await?;
        if accepted {
            return Ok(Agreement {
                configured: key.is_some(),
                version,
            });
        }
        current = None;
    }
}

/// Shared cell with the beacon to look for; empty while the guest has no key.
pub type BeaconCell = std::sync::Arc<std::sync::Mutex<Option<[u8; MARK]>>>;

/// Passes a stream through and fails it with `ConnectionReset` when a new host knocks in the middle of it.
///
/// The host repeats its preamble, so the one that is lost here is not missed.
pub struct BeaconReader<S> {
    inner: S,
    beacon: BeaconCell,
    /// The last bytes of the previous read, where a beacon may have begun.
    tail: Vec<u8>,
}

impl<S> BeaconReader<S> {
    /// Watches `inner` for the beacon in the cell.
    pub fn new(inner: S, beacon: BeaconCell) -> Self {
        BeaconReader {
            inner,
            beacon,
            tail: Vec::with_capacity(MARK * 2),
        }
    }

    fn knocks(&mut self, fresh: &[u8]) -> bool {
        let beacon = match self.beacon.lock() {
            Ok(cell) => *cell,
            Err(_) => None,
        };
        let Some(beacon) = beacon else { return false };
        let head = &fresh[..fresh.len().min(MARK - 1)];
        self.tail.extend_from_slice(head);
        let found = contains(&self.tail, &beacon) || contains(fresh, &beacon);
        if fresh.len() >= MARK - 1 {
            self.tail.clear();
            self.tail.extend_from_slice(&fresh[fresh.len() - (MARK - 1)..]);
        } else if self.tail.len() > MARK - 1 {
            let surplus = self.tail.len() - (MARK - 1);
            self.tail.drain(..surplus);
        }
        found
    }
}

fn contains(haystack: &[u8], needle: &[u8; MARK]) -> bool {
    let mut rest = haystack;
    while let Some(at) = rest.iter().position(|byte| *byte == needle[0]) {
        rest = &rest[at..];
        if rest.len() < MARK {
            return false;
        }
        if rest[..MARK] == *needle {
            return true;
        }
        rest = &rest[1..];
    }
    false
}

impl<S: AsyncRead + Unpin> AsyncRead for BeaconReader<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        match Pin::new(&mut self.inner).poll_read(cx, buf) {
            Poll::Ready(Ok(())) => {}
            other => return other,
        }
        if self.knocks(&buf.filled()[before..]) {
            buf.set_filled(before);
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for BeaconReader<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
