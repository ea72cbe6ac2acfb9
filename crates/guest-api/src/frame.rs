//! Frames on one stream: `kind: u8`, `length: u32` big endian, payload.
//!
//! Invariants: a header is at most [`MAXIMUM_HEADER`] bytes and a data frame at most [`MAXIMUM_DATA`]; a longer
//! length is an error before anything is allocated, and memory grows only with bytes that really arrived.

use std::io;

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest JSON header in bytes.
pub const MAXIMUM_HEADER: usize = 1024 * 1024;

/// Longest data frame in bytes.
pub const MAXIMUM_DATA: usize = 64 * 1024;

const KIND_HEADER: u8 = 1;
const KIND_DATA: u8 = 2;
const KIND_ERROR_DATA: u8 = 3;
const PREFIX: usize = 5;

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// JSON.
    Header(Bytes),
    /// Standard input, standard output or content of a file.
    Data(Bytes),
    /// Standard error.
    ErrorData(Bytes),
}

impl Frame {
    /// The message in a header frame; any other frame is an error.
    pub fn header<T: DeserializeOwned>(&self) -> io::Result<T> {
        match self {
            Frame::Header(json) => {
                serde_json::from_slice(json).map_err(|error| invalid(format!("malformed header: {error}")))
            }
            _ => Err(invalid("data where a header was expected".into())),
        }
    }
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

/// Reads the next frame; `None` when the stream ends between frames.
///
/// Not cancel safe: give it a task of its own or drop the stream with it.
///
/// # Errors
/// `InvalidData` for an unknown kind or an excessive length, `UnexpectedEof` in the middle of a frame.
pub async fn read_frame<R: AsyncRead + Unpin>(reader: &mut R) -> io::Result<Option<Frame>> {
    let mut prefix = [0; PREFIX];
    if reader.read(&mut prefix[..1]).await? == 0 {
        return Ok(None);
    }
    reader.read_exact(&mut prefix[1..]).await?;
    let kind = prefix[0];
    let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
    let limit = match kind {
        KIND_HEADER => MAXIMUM_HEADER,
        KIND_DATA | KIND_ERROR_DATA => MAXIMUM_DATA,
        _ => return Err(invalid(format!("unknown kind of frame {kind}"))),
    };
    if length > limit {
        return Err(invalid(format!(
            "frame of {length} bytes, at most {limit} are allowed"
        )));
    }
    let mut payload = Vec::with_capacity(length.min(MAXIMUM_DATA));
    if reader.take(length as u64).read_to_end(&mut payload).await? < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let payload = Bytes::from(payload);
    Ok(Some(match kind {
        KIND_HEADER => Frame::Header(payload),
        KIND_DATA => Frame::Data(payload),
        _ => Frame::ErrorData(payload),
    }))
}

/// Reads a header; the end of the stream is `UnexpectedEof`.
///
/// # Errors
/// As [`read_frame`], and `InvalidData` when the frame is no such header.
pub async fn read_header<T: DeserializeOwned, R: AsyncRead + Unpin>(reader: &mut R) -> io::Result<T> {
    match read_frame(reader).await? {
        Some(frame) => frame.header(),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

async fn write_frame<W: AsyncWrite + Unpin>(writer: &mut W, kind: u8, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len()).map_err(|_| invalid("frame too long".into()))?;
    // One buffer, so that prefix and payload travel in one packet.
    let mut frame = Vec::with_capacity(PREFIX + payload.len());
    frame.push(kind);
    frame.extend_from_slice(&length.to_be_bytes());
    frame.extend_from_slice(payload);
    writer.write_all(&frame).await?;
    writer.flush().await
}

/// Writes a header.
///
/// # Errors
/// `InvalidData` when it is longer than [`MAXIMUM_HEADER`], else those of the stream.
pub async fn write_header<T: Serialize, W: AsyncWrite + Unpin>(
    writer: &mut W,
    message: &T,
) -> io::Result<()> {
    let json = serde_json::to_vec(message).map_err(|error| invalid(error.to_string()))?;
    if json.len() > MAXIMUM_HEADER {
        return Err(invalid(format!(
            "header of {} bytes, at most {MAXIMUM_HEADER} are allowed",
            json.len()
        )));
    }
    write_frame(writer, KIND_HEADER, &json).await
}

/// Writes data, split into frames of at most [`MAXIMUM_DATA`].
///
/// # Errors
/// Those of the stream.
pub async fn write_data<W: AsyncWrite + Unpin>(writer: &mut W, data: &[u8]) -> io::Result<()> {
    for chunk in data.chunks(MAXIMUM_DATA) {
        write_frame(writer, KIND_DATA, chunk).await?;
    }
    Ok(())
}

/// As [`write_data`], for the standard error.
///
/// # Errors
/// Those of the stream.
pub async fn write_error_data<W: AsyncWrite + Unpin>(writer: &mut W, data: &[u8]) -> io::Result<()> {
    for chunk in data.chunks(MAXIMUM_DATA) {
        write_frame(writer, KIND_ERROR_DATA, chunk).await?;
    }
    Ok(())
}
