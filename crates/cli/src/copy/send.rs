//! Sending entries to a guest: one connection an entry, as the contract has it.
//!
//! ```text
//! client: text CopyRequest, binary content, text {"type":"end"}      server: text {"type":"result",…}
//! ```

use std::fs::{self, Metadata};
use std::io::Read;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use futures::{Sink, SinkExt as _, Stream, StreamExt as _};
use hypeman_api::copy::{CopyClientFrame, CopyDirection, CopyRequest, CopyServerFrame};
use tokio_tungstenite::tungstenite::{self, Message};

use super::EntryKind;
use super::receive::{frame, incomplete};
use crate::error::CliError;
use crate::websocket::{CHUNK, broken, is_end};

/// One entry on its way to a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outgoing {
    /// Absolute path in the guest.
    pub guest_path: String,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits.
    pub mode: u32,
    /// Modification time, seconds since 1970.
    pub mtime: i64,
    /// User and group, when they are kept.
    pub owner: Option<(u32, u32)>,
}

/// Sends one entry and waits until the guest has it.
///
/// # Errors
/// When the content ends early or grows meanwhile, the guest refuses, or the connection ends.
pub async fn send<S, R>(
    mut socket: S,
    entry: &Outgoing,
    content: &mut R,
    mut progress: impl FnMut(u64),
) -> Result<(), CliError>
where
    S: Stream<Item = Result<Message, tungstenite::Error>> + Sink<Message, Error = tungstenite::Error> + Unpin,
    R: Read,
{
    let (link_target, size) = match &entry.kind {
        EntryKind::Link { target } => (Some(target.clone()), 0),
        EntryKind::File { size } => (None, *size),
        EntryKind::Directory => (None, 0),
    };
    let request = CopyRequest {
        direction: CopyDirection::To,
        guest_path: entry.guest_path.clone(),
        is_dir: entry.kind == EntryKind::Directory,
        mode: Some(entry.mode),
        follow_links: false,
        src_basename: None,
        uid: entry.owner.map(|(uid, _)| uid),
        gid: entry.owner.map(|(_, gid)| gid),
        link_target,
        mtime: Some(entry.mtime),
    };
    let failed = |failure: serde_json::Error| CliError::failed(failure.to_string());
    let text = serde_json::to_string(&request).map_err(failed)?;
    socket
        .send(Message::text(text))
        .await
        .map_err(|failure| broken(&failure))?;

    let mut left = size;
    let mut buffer = vec![0; CHUNK];
    while left > 0 {
        let most = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        let count = content.read(&mut buffer[..most]).map_err(|failure| {
            CliError::io(
                format!("cannot read the content of {}", entry.guest_path),
                failure,
            )
        })?;
        if count == 0 {
            return Err(CliError::failed(format!(
                "{} became shorter while it was copied",
                entry.guest_path
            )));
        }
        left -= count as u64;
        if socket
            .send(Message::binary(buffer[..count].to_vec()))
            .await
            .is_err()
        {
            // The guest refuses in the middle (no space, say): its reason waits to be read.
            return Err(match answer(&mut socket).await {
                Ok(result) => refused(entry, result.1),
                Err(failure) => failure,
            });
        }
        progress(count as u64);
    }
    let end = serde_json::to_string(&CopyClientFrame::End).map_err(failed)?;
    let ended = socket.send(Message::text(end)).await;
    let (written, error) = answer(&mut socket).await?;
    if error.is_none() {
        ended.map_err(|failure| broken(&failure))?;
    }
    match written {
        Some(bytes) if bytes == size => {
            let _ = socket.close().await;
            Ok(())
        }
        Some(bytes) => Err(CliError::Protocol(format!(
            "{}: {size} bytes were sent, the guest says it wrote {bytes}",
            entry.guest_path
        ))),
        None => Err(refused(entry, error)),
    }
}

fn refused(entry: &Outgoing, error: Option<String>) -> CliError {
    let reason = error.unwrap_or_else(|| "the guest refused it without a reason".to_owned());
    if reason.contains(&entry.guest_path) {
        CliError::failed(reason)
    } else {
        CliError::failed(format!("{}: {reason}", entry.guest_path))
    }
}

/// The server's verdict: bytes written, or the reason why not.
async fn answer<S>(socket: &mut S) -> Result<(Option<u64>, Option<String>), CliError>
where
    S: Stream<Item = Result<Message, tungstenite::Error>> + Unpin,
{
    loop {
        match socket.next().await {
            Some(Ok(Message::Text(text))) => {
                return match frame(text.as_str())? {
                    CopyServerFrame::Result(result) if result.success => {
                        Ok((Some(result.bytes_written), None))
                    }
                    CopyServerFrame::Result(result) => Ok((None, result.error)),
                    CopyServerFrame::Error { message, .. } => Ok((None, Some(message))),
                    CopyServerFrame::Header(_) | CopyServerFrame::End { .. } => Err(CliError::Protocol(
                        "an entry of the guest in a copy to it".to_owned(),
                    )),
                };
            }
            Some(Ok(Message::Close(_))) | None => return Err(incomplete()),
            Some(Ok(_)) => {}
            Some(Err(failure)) if is_end(&failure) => {
                return Err(incomplete());
            }
            Some(Err(failure)) => return Err(broken(&failure)),
        }
    }
}

/// One entry of a local tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalEntry {
    /// Where it is on this machine.
    pub path: PathBuf,
    /// Its path below the top, empty for the top itself.
    pub below: String,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits.
    pub mode: u32,
    /// Modification time, seconds since 1970.
    pub mtime: i64,
    /// Owner.
    pub owner: (u32, u32),
}

/// What a walk over a local tree found.
#[derive(Debug, Default)]
pub struct Walk {
    /// Entries, parents first, each directory's in order of name.
    pub entries: Vec<LocalEntry>,
    /// What cannot be copied, and why.
    pub skipped: Vec<String>,
}

impl Walk {
    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.entries
            .iter()
            .map(|entry| {
                if let EntryKind::File { size } = entry.kind {
                    size
                } else {
                    0
                }
            })
            .sum()
    }
}

/// Lists a local tree. `follow` takes what links point to, instead of the links.
///
/// # Errors
/// When something cannot be read, or following links runs in a circle.
pub fn walk(top: &Path, follow: bool) -> Result<Walk, CliError> {
    let mut found = Walk::default();
    visit(top, String::new(), follow, &mut Vec::new(), &mut found)?;
    Ok(found)
}

fn visit(
    path: &Path,
    below: String,
    follow: bool,
    above: &mut Vec<(u64, u64)>,
    found: &mut Walk,
) -> Result<(), CliError> {
    let unreadable = |failure| CliError::io(format!("cannot read {}", path.display()), failure);
    let metadata = look(path, follow).map_err(unreadable)?;
    let kind = if metadata.is_dir() {
        EntryKind::Directory
    } else if metadata.is_file() {
        EntryKind::File { size: metadata.len() }
    } else if metadata.is_symlink() {
        let target = fs::read_link(path).map_err(unreadable)?;
        let Some(target) = target.to_str() else {
            found
                .skipped
                .push(format!("{}: the link target is not text", path.display()));
            return Ok(());
        };
        EntryKind::Link {
            target: target.to_owned(),
        }
    } else {
        found
            .skipped
            .push(format!("{}: not a file, directory or link", path.display()));
        return Ok(());
    };
    let directory = kind == EntryKind::Directory;
    found.entries.push(LocalEntry {
        path: path.to_owned(),
        below: below.clone(),
        kind,
        mode: metadata.mode() & 0o7777,
        mtime: metadata.mtime(),
        owner: (metadata.uid(), metadata.gid()),
    });
    if !directory {
        return Ok(());
    }
    let identity = (metadata.dev(), metadata.ino());
    if above.contains(&identity) {
        return Err(CliError::failed(format!(
            "{}: links run in a circle",
            path.display()
        )));
    }
    above.push(identity);
    let mut names: Vec<_> = fs::read_dir(path)
        .and_then(|entries| {
            entries
                .map(|entry| entry.map(|entry| entry.file_name()))
                .collect()
        })
        .map_err(unreadable)?;
    names.sort();
    for name in names {
        let Some(text) = name.to_str() else {
            found
                .skipped
                .push(format!("{}: the name is not UTF-8", path.join(&name).display()));
            continue;
        };
        let below = if below.is_empty() {
            text.to_owned()
        } else {
            format!("{below}/{text}")
        };
        visit(&path.join(text), below, follow, above, found)?;
    }
    above.pop();
    Ok(())
}

fn look(path: &Path, follow: bool) -> std::io::Result<Metadata> {
    if follow {
        fs::metadata(path)
    } else {
        fs::symlink_metadata(path)
    }
}
