//! Files in and out of the guest.

use bytes::Bytes;

use super::{Channel, STALL_DEADLINE, unexpected, within};
use crate::{
    ChannelError, CopyEntry, CopyMessage, EntryKind, Reply,
    frame::{self, Frame},
};

/// One file, directory or link on its way into the guest. Dropped before [`CopyToSession::finish`] it never
/// happened.
pub struct CopyToSession {
    channel: Channel,
}

impl CopyToSession {
    pub(super) fn new(channel: Channel) -> Self {
        CopyToSession { channel }
    }

    /// Sends content. When the guest gives up in between (a full disk), [`CopyToSession::finish`] tells why;
    /// further content is then dropped.
    ///
    /// # Errors
    /// [`ChannelError::Deadline`] when the guest takes nothing for a minute, or those of the channel.
    pub async fn send(&mut self, data: &[u8]) -> Result<(), ChannelError> {
        within(STALL_DEADLINE, frame::write_data(&mut self.channel.stream, data))
            .await
            .map_err(|failure| self.channel.connection.told(failure))
    }

    /// Makes it visible and returns the number of bytes written (0 for directories and links).
    ///
    /// # Errors
    /// The guest's reason, or those of the channel.
    pub async fn finish(mut self) -> Result<u64, ChannelError> {
        within(STALL_DEADLINE, async {
            frame::write_header(&mut self.channel.stream, &CopyMessage::End).await?;
            match frame::read_header(&mut self.channel.stream).await? {
                Reply::Written { bytes } => Ok(bytes),
                Reply::Refused(refusal) => Err(ChannelError::Refused(refusal)),
                other => Err(unexpected(&other)),
            }
        })
        .await
        .map_err(|failure| self.channel.connection.told(failure))
    }
}

/// What a copy from the guest is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CopyItem {
    /// An entry begins.
    Entry(CopyEntry),
    /// Content of the last entry, at most 64 KiB; `size` bytes in all, never more.
    Data(Bytes),
    /// An entry could not be read, or not whole. Others may follow.
    Failed {
        /// Which.
        path: String,
        /// Why, for people.
        message: String,
    },
}

/// A file or tree on its way out of the guest.
pub struct CopyFromSession {
    channel: Channel,
    /// Content that the last entry still owes.
    owed: u64,
    ended: bool,
}

impl CopyFromSession {
    pub(super) fn new(channel: Channel) -> Self {
        CopyFromSession {
            channel,
            owed: 0,
            ended: false,
        }
    }

    /// The next item; `None` at the end. Checked here, because guests lie: content is exactly as long as
    /// announced, and paths are relative and without `.`, `..` or empty parts.
    ///
    /// # Errors
    /// [`ChannelError::Protocol`] for a lie, [`ChannelError::Deadline`] when the guest stands still for a
    /// minute, or those of the channel.
    pub async fn next(&mut self) -> Result<Option<CopyItem>, ChannelError> {
        if self.ended {
            return Ok(None);
        }
        let connection = &self.channel.connection;
        let frame = within(STALL_DEADLINE, frame::read_frame(&mut self.channel.stream)).await;
        match frame.map_err(|failure| connection.told(failure))? {
            None => Err(connection.told(ChannelError::Closed)),
            Some(Frame::Data(data)) => {
                let length = data.len() as u64;
                if length > self.owed {
                    return Err(ChannelError::Protocol("more content than announced".into()));
                }
                self.owed -= length;
                Ok(Some(CopyItem::Data(data)))
            }
            Some(Frame::ErrorData(_)) => Err(ChannelError::Protocol("error data in a copy".into())),
            Some(header) => match header.header()? {
                CopyMessage::Failed { path, message } => {
                    self.owed = 0;
                    Ok(Some(CopyItem::Failed { path, message }))
                }
                _ if self.owed > 0 => Err(ChannelError::Protocol("less content than announced".into())),
                CopyMessage::End => {
                    self.ended = true;
                    Ok(None)
                }
                CopyMessage::Entry(entry) => {
                    check_path(&entry.path)?;
                    if entry.kind != EntryKind::File && entry.size > 0 {
                        return Err(ChannelError::Protocol(
                            "content of something that is no file".into(),
                        ));
                    }
                    self.owed = entry.size;
                    Ok(Some(CopyItem::Entry(entry)))
                }
            },
        }
    }
}

fn check_path(path: &str) -> Result<(), ChannelError> {
    let bad = |part: &str| part.is_empty() || part == "." || part == ".." || part.contains('\0');
    if path.split('/').any(bad) {
        return Err(ChannelError::Protocol(format!("path {path:?} leaves the copy")));
    }
    Ok(())
}
