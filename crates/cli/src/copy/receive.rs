//! The receiving side of a copy out of a guest.
//!
//! ```text
//! ┌─ between ◄──────────── end ─────────────┐
//! │     └── header (checked) ──► inside ────┘      end(final) ──► done
//! │                               └ binary: at most `size` bytes in all
//! ```
//!
//! Anything out of order, too long, too short or badly named ends the copy with an error before it reaches the
//! [`EntrySink`]. A link that leads out of the tree is left out: ordinary trees have such links.

use futures::{Sink, SinkExt as _, Stream, StreamExt as _};
use hypeman_api::copy::{CopyDirection, CopyHeader, CopyRequest, CopyServerFrame};
use tokio_tungstenite::tungstenite::{self, Message};

use super::path::{RelativePath, check_link};
use super::{Entry, EntryKind, EntrySink};
use crate::error::CliError;
use crate::websocket::{broken, is_end};

/// What links in the received tree may say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// They must stay inside the tree: it becomes part of this machine.
    Inside,
    /// Anything: they are passed on in an archive and followed by nobody here.
    Any,
}

/// What to fetch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetch {
    /// Absolute path in the guest.
    pub guest_path: String,
    /// Send what links point to.
    pub follow_links: bool,
    /// What links may say.
    pub links: Links,
}

/// Asks for a tree and hands its entries to `sink` in order. `progress` is told of each chunk. Answers the links
/// that were left out because of what they say; when nothing else came, that is a failure.
///
/// # Errors
/// When the guest or server fails or misbehaves, or the sink cannot write.
pub async fn receive<S, E>(
    mut socket: S,
    fetch: &Fetch,
    sink: &mut E,
    mut progress: impl FnMut(&str, u64),
) -> Result<Vec<String>, CliError>
where
    S: Stream<Item = Result<Message, tungstenite::Error>> + Sink<Message, Error = tungstenite::Error> + Unpin,
    E: EntrySink,
{
    let request = CopyRequest {
        direction: CopyDirection::From,
        guest_path: fetch.guest_path.clone(),
        is_dir: false,
        mode: None,
        follow_links: fetch.follow_links,
        src_basename: None,
        uid: None,
        gid: None,
        link_target: None,
        mtime: None,
    };
    let text = serde_json::to_string(&request).map_err(|failure| CliError::failed(failure.to_string()))?;
    socket
        .send(Message::text(text))
        .await
        .map_err(|failure| broken(&failure))?;

    let mut top: Option<String> = None;
    let mut open: Option<Open> = None;
    let mut left_out = Vec::new();
    let mut taken = false;
    loop {
        match socket.next().await {
            Some(Ok(Message::Text(text))) => match frame(text.as_str())? {
                CopyServerFrame::Header(header) => {
                    if open.is_some() {
                        return Err(out_of_order("an entry began inside another"));
                    }
                    let entry = believe(&header)?;
                    if *top.get_or_insert_with(|| entry.path.top().to_owned()) != entry.path.top() {
                        return Err(out_of_order("entries of two trees in one copy"));
                    }
                    let refused = match &entry.kind {
                        EntryKind::Link { target } if fetch.links == Links::Inside => {
                            check_link(&entry.path, target).err()
                        }
                        _ => None,
                    };
                    let left = if let EntryKind::File { size } = entry.kind {
                        size
                    } else {
                        0
                    };
                    if let Some(reason) = &refused {
                        left_out.push(reason.to_string());
                    } else {
                        progress(&entry.path.to_string(), 0);
                        sink.begin(&entry)?;
                        taken = true;
                    }
                    open = Some(Open {
                        path: entry.path,
                        left,
                        taken: refused.is_none(),
                    });
                }
                CopyServerFrame::End { last } => {
                    let Some(entry) = open.take() else {
                        // An empty copy ends without an entry; anything else is out of order.
                        if last && top.is_none() {
                            return Err(CliError::failed(format!(
                                "nothing to copy at {}",
                                fetch.guest_path
                            )));
                        }
                        return Err(out_of_order("an end without an entry"));
                    };
                    if entry.left > 0 {
                        return Err(CliError::Protocol(format!(
                            "{} is {} bytes shorter than announced",
                            entry.path, entry.left
                        )));
                    }
                    if entry.taken {
                        sink.end()?;
                    }
                    if last {
                        let _ = socket.close().await;
                        if let (false, Some(reason)) = (taken, left_out.first()) {
                            return Err(CliError::failed_with(
                                reason.clone(),
                                "-L copies what links point to; a copy to - passes links on in a tar archive",
                            ));
                        }
                        sink.finish()?;
                        return Ok(left_out);
                    }
                }
                CopyServerFrame::Error { message, path } => {
                    let place = path.filter(|path| !message.contains(path.as_str()));
                    return Err(CliError::failed(match place {
                        Some(path) => format!("{path}: {message}"),
                        None => message,
                    }));
                }
                CopyServerFrame::Result(_) => {
                    return Err(out_of_order("a result in a copy out of the guest"));
                }
            },
            Some(Ok(Message::Binary(bytes))) => {
                let Some(entry) = open.as_mut() else {
                    return Err(out_of_order("content without an entry"));
                };
                let count = bytes.len() as u64;
                entry.left = entry
                    .left
                    .checked_sub(count)
                    .ok_or_else(|| CliError::Protocol(format!("{} is longer than announced", entry.path)))?;
                sink.data(&bytes)?;
                progress("", count);
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

struct Open {
    path: RelativePath,
    left: u64,
    /// The sink knows of it.
    taken: bool,
}

pub(super) fn frame(text: &str) -> Result<CopyServerFrame, CliError> {
    serde_json::from_str(text).map_err(|failure| {
        let shown: String = text.chars().take(200).collect();
        CliError::Protocol(format!("not a copy message: {shown:?} ({failure})"))
    })
}

fn out_of_order(what: &str) -> CliError {
    CliError::Protocol(format!("the copy is out of order: {what}"))
}

pub(super) fn incomplete() -> CliError {
    CliError::failed_with(
        "the connection closed before the copy was complete",
        "the instance may have stopped: see `hypeman ps -a`",
    )
}

fn believe(header: &CopyHeader) -> Result<Entry, CliError> {
    let refuse =
        |failure: super::path::UnsafePath| CliError::Protocol(format!("the guest sent an {failure}"));
    let path = RelativePath::parse(&header.path).map_err(refuse)?;
    let kind = match (header.is_dir, header.is_symlink) {
        (true, true) => return Err(out_of_order("an entry that is a directory and a link")),
        (true, false) => EntryKind::Directory,
        (false, true) => EntryKind::Link {
            target: header.link_target.clone(),
        },
        (false, false) => EntryKind::File { size: header.size },
    };
    Ok(Entry {
        path,
        kind,
        mode: header.mode & 0o7777,
        mtime: header.mtime,
        uid: header.uid,
        gid: header.gid,
    })
}
