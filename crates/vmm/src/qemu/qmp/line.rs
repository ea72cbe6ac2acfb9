//! Lines of bounded length from a peer that is not trusted.

use std::io;

use tokio::io::{AsyncBufRead, AsyncBufReadExt};

/// Longest line taken. The longest answer to a command that we send is some tens of kilobytes.
pub(super) const LIMIT: usize = 1024 * 1024;

/// Reads one line without its end. A line that is too long, or cut off by the end of the stream, is an error.
pub(super) async fn read<R: AsyncBufRead + Unpin>(reader: &mut R) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    loop {
        let available = reader.fill_buf().await?;
        if available.is_empty() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the peer closed it"));
        }
        let (taken, complete) = match available.iter().position(|byte| *byte == b'\n') {
            Some(end) => (end + 1, true),
            None => (available.len(), false),
        };
        if line.len() + taken > LIMIT {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the peer sent a line without end",
            ));
        }
        line.extend_from_slice(&available[..taken]);
        reader.consume(taken);
        if complete {
            return Ok(line);
        }
    }
}
