//! A command that runs in the guest.

use bytes::Bytes;
use tokio::io::{ReadHalf, WriteHalf};

use super::Channel;
use crate::{
    ChannelError, ExecControl, ExecEvent,
    frame::{self, Frame},
    mux::MuxStream,
};

/// Keeps the connection for the halves of a session.
type Keep = std::sync::Arc<(
    tokio::sync::OwnedSemaphorePermit,
    std::sync::Arc<super::Connection>,
)>;

/// A running command. When both halves are dropped the guest kills what the session started.
pub struct ExecSession {
    input: ExecInput,
    reader: ExecReader,
}

/// The way in: standard input and the size of the terminal.
pub struct ExecInput {
    writer: WriteHalf<MuxStream>,
    _keep: Keep,
}

/// The way out.
pub struct ExecReader {
    reader: ReadHalf<MuxStream>,
    exited: bool,
    keep: Keep,
}

/// What a command said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecOutput {
    /// Standard output, or the terminal. At most 64 KiB.
    Stdout(Bytes),
    /// Standard error. At most 64 KiB.
    Stderr(Bytes),
    /// The command ended with this code; nothing follows.
    Exit(i32),
}

impl ExecSession {
    pub(super) fn new(channel: Channel) -> Self {
        let keep = Keep::new((channel._permit, channel.connection));
        let (reader, writer) = tokio::io::split(channel.stream);
        ExecSession {
            input: ExecInput {
                writer,
                _keep: Keep::clone(&keep),
            },
            reader: ExecReader {
                reader,
                exited: false,
                keep,
            },
        }
    }

    /// Both directions, for two tasks.
    pub fn split(self) -> (ExecInput, ExecReader) {
        (self.input, self.reader)
    }

    /// See [`ExecInput::write`].
    ///
    /// # Errors
    /// Those of the channel.
    pub async fn write(&mut self, data: &[u8]) -> Result<(), ChannelError> {
        self.input.write(data).await
    }

    /// See [`ExecInput::close_stdin`].
    ///
    /// # Errors
    /// Those of the channel.
    pub async fn close_stdin(&mut self) -> Result<(), ChannelError> {
        self.input.close_stdin().await
    }

    /// See [`ExecInput::resize`].
    ///
    /// # Errors
    /// Those of the channel.
    pub async fn resize(&mut self, rows: u16, columns: u16) -> Result<(), ChannelError> {
        self.input.resize(rows, columns).await
    }

    /// See [`ExecReader::next`].
    ///
    /// # Errors
    /// Those of the channel.
    pub async fn next(&mut self) -> Result<Option<ExecOutput>, ChannelError> {
        self.reader.next().await
    }
}

impl ExecInput {
    /// Writes to the standard input. Waits as long as the command does not read; input to a command that has
    /// closed its standard input is dropped by the guest.
    ///
    /// # Errors
    /// Those of the channel.
    pub async fn write(&mut self, data: &[u8]) -> Result<(), ChannelError> {
        Ok(frame::write_data(&mut self.writer, data).await?)
    }

    /// Ends the standard input (on a terminal: sends the end-of-file character).
    ///
    /// # Errors
    /// Those of the channel.
    pub async fn close_stdin(&mut self) -> Result<(), ChannelError> {
        Ok(frame::write_header(&mut self.writer, &ExecControl::CloseStdin).await?)
    }

    /// Changes the size of the terminal; ignored without one.
    ///
    /// # Errors
    /// Those of the channel.
    pub async fn resize(&mut self, rows: u16, columns: u16) -> Result<(), ChannelError> {
        Ok(frame::write_header(&mut self.writer, &ExecControl::Resize { rows, columns }).await?)
    }
}

impl ExecReader {
    /// The next output; `None` after the exit code. A caller that does not ask stops only this command.
    ///
    /// Not cancel safe while output arrives: drop the session, or call it from one task.
    ///
    /// # Errors
    /// Those of the channel; an end without exit code is [`ChannelError::Closed`], or [`ChannelError::Captured`].
    pub async fn next(&mut self) -> Result<Option<ExecOutput>, ChannelError> {
        if self.exited {
            return Ok(None);
        }
        let connection = &self.keep.1;
        let frame = frame::read_frame(&mut self.reader).await;
        match frame.map_err(|error| connection.told(error.into()))? {
            None => Err(connection.told(ChannelError::Closed)),
            Some(Frame::Data(data)) => Ok(Some(ExecOutput::Stdout(data))),
            Some(Frame::ErrorData(data)) => Ok(Some(ExecOutput::Stderr(data))),
            Some(header) => {
                let ExecEvent::Exited { code } = header.header()?;
                self.exited = true;
                Ok(Some(ExecOutput::Exit(code)))
            }
        }
    }
}
