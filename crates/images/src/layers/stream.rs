//! One layer's bytes: read, counted, hashed and decompressed in a thread of their own, handed over in buffers.
//!
//! ```text
//!  thread:  source ─► count, sha256 ─► gunzip | unzstd ─► cap ──┐ few buffers at a time
//!  caller:  tar reader ◄── sha256 (diff id) ◄── LayerStream ◄───┘
//! ```
//!
//! The compressed side is checked when the decompressor is done: length, then digest. Buffers travel back to be
//! filled again, so a layer takes the same memory whatever its size.

use std::cell::RefCell;
use std::io::{self, BufRead, BufReader, Read};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use sha2::{Digest as _, Sha256};

use super::error::{ConvertError, LayerProblem};
use super::limits::Limits;
use super::{ConvertObserver, LayerSource};

const BUFFER: usize = 128 << 10;
const BUFFERS_UNDER_WAY: usize = 4;

/// Counts that all layers of a conversion share.
#[derive(Default)]
pub(crate) struct Totals {
    pub(crate) compressed: AtomicU64,
    pub(crate) uncompressed: AtomicU64,
}

type Message = Result<Vec<u8>, ConvertError>;

/// The sending half of a layer: runs until the layer ends, fails, or nobody listens any more.
pub(crate) struct LayerDecoder<'a> {
    layer: usize,
    source: &'a LayerSource,
    limits: &'a Limits,
    totals: &'a Totals,
    total: u64,
    sender: SyncSender<Message>,
    used: Receiver<Vec<u8>>,
}

/// The receiving half: uncompressed bytes.
pub(crate) struct LayerStream<'a> {
    layer: usize,
    receiver: Receiver<Message>,
    used: SyncSender<Vec<u8>>,
    buffer: Vec<u8>,
    consumed: usize,
    hasher: Option<Sha256>,
    failure: Option<ConvertError>,
    ended: bool,
    totals: &'a Totals,
    total: u64,
    observer: &'a dyn ConvertObserver,
}

/// Both halves for one layer. `total` is the compressed size of all layers, for progress and for what they may grow to.
pub(crate) fn open<'a>(
    layer: usize,
    source: &'a LayerSource,
    limits: &'a Limits,
    totals: &'a Totals,
    total: u64,
    observer: &'a dyn ConvertObserver,
) -> (LayerDecoder<'a>, LayerStream<'a>) {
    let (sender, receiver) = sync_channel(BUFFERS_UNDER_WAY);
    // One more than can be under way, so that giving a buffer back never waits.
    let (used_sender, used) = sync_channel(BUFFERS_UNDER_WAY + 2);
    let decoder = LayerDecoder {
        layer,
        source,
        limits,
        totals,
        total,
        sender,
        used,
    };
    let stream = LayerStream {
        layer,
        receiver,
        used: used_sender,
        buffer: Vec::new(),
        consumed: 0,
        hasher: source.diff_id.is_some().then(Sha256::new),
        failure: None,
        ended: false,
        totals,
        total,
        observer,
    };
    (decoder, stream)
}

/// The hexadecimal part of a `sha256:` digest.
pub(crate) fn check_digest_form(digest: &str) -> Result<&str, LayerProblem> {
    digest
        .strip_prefix("sha256:")
        .filter(|hex| hex.len() == 64 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')))
        .ok_or_else(|| LayerProblem::DigestForm(digest.chars().take(128).collect()))
}

fn spell(hasher: Sha256) -> String {
    hasher
        .finalize()
        .iter()
        .fold(String::from("sha256:"), |mut text, byte| {
            use std::fmt::Write as _;
            let _ = write!(text, "{byte:02x}");
            text
        })
}

/// What the compressed side has seen.
struct Meter {
    read: u64,
    announced: u64,
    hasher: Option<Sha256>,
    longer: bool,
    failure: Option<io::Error>,
}

/// Counts and hashes what passes. The decompressors hide where an error came from, so it is kept aside.
struct Metered<'a> {
    source: Box<dyn Read + Send>,
    meter: Rc<RefCell<Meter>>,
    totals: &'a Totals,
}

impl Read for Metered<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut meter = self.meter.borrow_mut();
        let count = match self.source.read(buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Err(error),
            Err(error) => {
                meter.failure = Some(error);
                return Err(io::Error::other("the source failed"));
            }
        };
        meter.read += count as u64;
        self.totals.compressed.fetch_add(count as u64, Ordering::Relaxed);
        if meter.read > meter.announced {
            meter.longer = true;
            return Err(io::Error::other("the layer is longer than announced"));
        }
        if let Some(hasher) = &mut meter.hasher {
            hasher.update(&buffer[..count]);
        }
        Ok(count)
    }
}

impl LayerDecoder<'_> {
    /// Decodes the layer to its end.
    pub(crate) fn run(self) {
        if let Err(error) = self.decode() {
            // Nobody listening is fine: the other side has failed or was cancelled.
            let _ = self.sender.send(Err(error));
        }
    }

    fn problem(&self, problem: LayerProblem) -> ConvertError {
        ConvertError::Layer {
            layer: self.layer,
            problem,
        }
    }

    fn decode(&self) -> Result<(), ConvertError> {
        let source = (self.source.open)().map_err(|source| ConvertError::Source {
            layer: self.layer,
            source,
        })?;
        let meter = Rc::new(RefCell::new(Meter {
            read: 0,
            announced: self.source.size,
            hasher: self.source.digest.is_some().then(Sha256::new),
            longer: false,
            failure: None,
        }));
        let metered = Metered {
            source,
            meter: Rc::clone(&meter),
            totals: self.totals,
        };
        let fault = |error: &io::Error| self.fault(error, &mut meter.borrow_mut());
        let mut input = BufReader::with_capacity(BUFFER, metered);
        let mut decoder = self.decompressor(&mut input, &fault)?;
        loop {
            let mut buffer = self.used.try_recv().unwrap_or_default();
            buffer.resize(BUFFER, 0);
            let mut filled = 0;
            while filled < BUFFER {
                match decoder.read(&mut buffer[filled..]) {
                    Ok(0) => break,
                    Ok(count) => filled += count,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(fault(&error)),
                }
            }
            buffer.truncate(filled);
            self.check_growth(filled as u64)?;
            let ended = filled < BUFFER;
            if filled > 0 && self.sender.send(Ok(buffer)).is_err() {
                return Ok(());
            }
            if ended {
                break;
            }
        }
        drop(decoder);
        self.check_source(&mut input, &meter)?;
        // An empty buffer is the end.
        let _ = self.sender.send(Ok(Vec::new()));
        Ok(())
    }

    /// Chooses by what the stream begins with; media types lie too often.
    fn decompressor<'r>(
        &self,
        input: &'r mut BufReader<Metered<'_>>,
        fault: &dyn Fn(&io::Error) -> ConvertError,
    ) -> Result<Box<dyn Read + 'r>, ConvertError> {
        let magic = loop {
            match input.fill_buf() {
                Ok(bytes) => {
                    let mut magic = [0; 6];
                    let length = bytes.len().min(magic.len());
                    magic[..length].copy_from_slice(&bytes[..length]);
                    break magic;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(fault(&error)),
            }
        };
        let unsupported = |name| Err(self.problem(LayerProblem::Compression(name)));
        match magic {
            [0x1f, 0x8b, ..] => Ok(Box::new(flate2::bufread::MultiGzDecoder::new(input))),
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
                let mut decoder =
                    zstd::stream::read::Decoder::with_buffer(input).map_err(|error| fault(&error))?;
                decoder
                    .window_log_max(self.limits.zstd_window_log)
                    .map_err(|error| fault(&error))?;
                Ok(Box::new(decoder))
            }
            [b'B', b'Z', b'h', b'1'..=b'9', ..] => unsupported("bzip2"),
            [0xfd, b'7', b'z', b'X', b'Z', 0] => unsupported("xz"),
            [0x04, 0x22, 0x4d, 0x18, ..] => unsupported("lz4"),
            _ => Ok(Box::new(input)),
        }
    }

    fn fault(&self, error: &io::Error, meter: &mut Meter) -> ConvertError {
        if let Some(source) = meter.failure.take() {
            return ConvertError::Source {
                layer: self.layer,
                source,
            };
        }
        self.problem(if meter.longer {
            LayerProblem::Size {
                announced: meter.announced,
                longer: true,
            }
        } else if error.kind() == io::ErrorKind::UnexpectedEof {
            LayerProblem::Truncated
        } else {
            LayerProblem::Corrupt(error.to_string())
        })
    }

    /// What all layers come to, in whatever order they are read, so that the verdict does not depend on it.
    fn check_growth(&self, more: u64) -> Result<(), ConvertError> {
        let limits = self.limits;
        let grown = self.totals.uncompressed.fetch_add(more, Ordering::Relaxed) + more;
        if grown > limits.uncompressed_bytes {
            return Err(self.problem(LayerProblem::TooManyBytes {
                limit: limits.uncompressed_bytes,
            }));
        }
        if grown > limits.ratio_floor && grown > self.total.saturating_mul(limits.ratio) {
            return Err(self.problem(LayerProblem::Ratio { limit: limits.ratio }));
        }
        Ok(())
    }

    /// The compressed bytes must end here, be as many as announced, and have their digest.
    fn check_source(
        &self,
        input: &mut BufReader<Metered<'_>>,
        meter: &Rc<RefCell<Meter>>,
    ) -> Result<(), ConvertError> {
        loop {
            match input.fill_buf() {
                Ok([]) => break,
                Ok(_) => {
                    let text = "data follows the end of the compressed stream";
                    return Err(self.problem(LayerProblem::Corrupt(text.into())));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.fault(&error, &mut meter.borrow_mut())),
            }
        }
        let mut meter = meter.borrow_mut();
        if meter.read != meter.announced {
            return Err(self.problem(LayerProblem::Size {
                announced: meter.announced,
                longer: false,
            }));
        }
        if let (Some(hasher), Some(expected)) = (meter.hasher.take(), &self.source.digest) {
            let actual = spell(hasher);
            if actual != *expected {
                return Err(self.problem(LayerProblem::Digest {
                    expected: expected.clone(),
                    actual,
                }));
            }
        }
        Ok(())
    }
}

impl LayerStream<'_> {
    /// What went wrong below the archive, if something did.
    pub(crate) fn take_failure(&mut self) -> Option<ConvertError> {
        self.failure.take()
    }

    /// Reads to the end of the layer and checks the digest of the uncompressed bytes.
    pub(crate) fn finish(mut self, expected: Option<&str>) -> Result<(), ConvertError> {
        while !self.ended {
            self.next_buffer()?;
        }
        if let (Some(hasher), Some(expected)) = (self.hasher.take(), expected) {
            let actual = spell(hasher);
            if actual != expected {
                let problem = LayerProblem::DiffId {
                    expected: expected.to_owned(),
                    actual,
                };
                return Err(ConvertError::Layer {
                    layer: self.layer,
                    problem,
                });
            }
        }
        Ok(())
    }

    fn next_buffer(&mut self) -> Result<(), ConvertError> {
        if self.observer.cancelled() {
            return Err(ConvertError::Cancelled);
        }
        let old = std::mem::take(&mut self.buffer);
        self.consumed = 0;
        if old.capacity() > 0 {
            let _ = self.used.try_send(old);
        }
        self.buffer = match self.receiver.recv() {
            Ok(message) => message?,
            // The thread is gone without a word; it cannot have ended the layer.
            Err(_) => {
                return Err(ConvertError::Layer {
                    layer: self.layer,
                    problem: LayerProblem::Truncated,
                });
            }
        };
        self.ended = self.buffer.is_empty();
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&self.buffer);
        }
        self.observer.progress(
            self.totals.compressed.load(Ordering::Relaxed).min(self.total),
            self.total,
        );
        Ok(())
    }
}

impl Read for LayerStream<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let count = available.len().min(into.len());
        into[..count].copy_from_slice(&available[..count]);
        self.consume(count);
        Ok(count)
    }
}

impl BufRead for LayerStream<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.consumed == self.buffer.len()
            && !self.ended
            && let Err(failure) = self.next_buffer()
        {
            self.ended = true;
            self.buffer.clear();
            self.failure = Some(failure);
            return Err(io::Error::other("the layer failed"));
        }
        Ok(&self.buffer[self.consumed..])
    }

    fn consume(&mut self, count: usize) {
        self.consumed = (self.consumed + count).min(self.buffer.len());
    }
}
