//! Files into and out of a guest over a WebSocket, one transfer a connection.
//!
//! What the guest says about a tree is turned into frames that every official client accepts: clients abort
//! the whole copy at links that point outside of the tree, so those are left out; an entry's end is held back
//! until it is known whether another entry follows, because the last one must say so.

use std::time::Duration;

use axum::extract::rejection::PathRejection;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, State};
use axum::response::Response;
use bytes::Bytes;
use futures::StreamExt as _;
use hypeman_api::copy as api;
use hypeman_engine::EngineError;
use hypeman_guest_api::host::{CopyItem, CopyToSession, GuestClient};
use hypeman_guest_api::{ChannelError, CopyEntry, CopyFrom, CopyTo, EntryKind};

use super::{path_text, resolve, socket};
use crate::error::ApiResult;
use crate::state::{AppState, Stage};
use crate::strict;

/// How long a client may stand still during an upload.
const CLIENT_STALL: Duration = Duration::from_secs(120);

/// `GET /instances/{id}/cp`
pub async fn copy(
    State(state): State<AppState>,
    id: Result<Path<String>, PathRejection>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> ApiResult<Response> {
    let id = resolve(&state.engine, &path_text(id)?)?;
    let guest = state.engine.guest(&id)?;
    let upgrade = socket::accept(upgrade)?;
    let sessions = state.sessions.clone();
    Ok(upgrade.on_upgrade(move |socket| {
        sessions.track_future(async move {
            tokio::select! {
                () = transfer(guest, socket) => {}
                () = state.reached(Stage::Cutting) => {}
            }
        })
    }))
}

/// One transfer.
pub(crate) async fn transfer(guest: GuestClient, mut socket: WebSocket) {
    let request = match socket::first_text(&mut socket)
        .await
        .map(|text| strict::from_slice::<api::CopyRequest>(text.as_bytes()))
    {
        Some(Ok(request)) => request,
        Some(Err(error)) => return refuse(socket, format!("invalid request: {error}")).await,
        None => return refuse(socket, "the first frame must be a JSON text frame".to_owned()).await,
    };
    if request.guest_path.is_empty() || request.guest_path.contains('\0') {
        return refuse(
            socket,
            "guest_path is required and must not hold a null byte".to_owned(),
        )
        .await;
    }
    match request.direction {
        api::CopyDirection::To => upload(&guest, request, socket).await,
        api::CopyDirection::From => download(&guest, request, socket).await,
    }
}

async fn refuse(mut socket: WebSocket, message: String) {
    socket::send_json(&mut socket, &api::CopyServerFrame::Error { message, path: None }).await;
    socket::close(socket).await;
}

async fn upload(guest: &GuestClient, request: api::CopyRequest, mut socket: WebSocket) {
    let outcome = match target(guest, &request).await {
        Ok(target) => match guest.copy_to(target).await {
            Ok(session) => receive(session, &mut socket).await,
            Err(error) => drain(&mut socket).await.map(|()| Err(error.to_string())),
        },
        Err(message) => drain(&mut socket).await.map(|()| Err(message)),
    };
    // Without an outcome the client left before it had sent everything: nothing was made.
    let Some(outcome) = outcome else { return };
    let result = match outcome {
        Ok(bytes_written) => api::CopyResult {
            success: true,
            error: None,
            bytes_written,
        },
        Err(message) => api::CopyResult {
            success: false,
            error: Some(message),
            bytes_written: 0,
        },
    };
    socket::send_json(&mut socket, &api::CopyServerFrame::Result(result)).await;
    socket::close(socket).await;
}

/// Where and how the entry is written.
async fn target(guest: &GuestClient, request: &api::CopyRequest) -> Result<CopyTo, String> {
    let mut path = absolute(&request.guest_path);
    if let Some(name) = request
        .src_basename
        .as_deref()
        .filter(|name| !name.is_empty() && !request.is_dir)
    {
        if matches!(name, "." | "..") || name.contains(['/', '\0']) {
            return Err("src_basename must be a plain file name".to_owned());
        }
        let info = guest.stat(&path, true).await.map_err(|error| error.to_string())?;
        if info.is_directory {
            path = format!("{}/{name}", path.trim_end_matches('/'));
        }
    }
    if request.mode.is_some_and(|mode| mode > 0o7777) {
        return Err("mode must be at most 07777".to_owned());
    }
    let owner = match (request.uid, request.gid) {
        (None, None) => None,
        (uid, gid) => Some((uid.unwrap_or(0), gid.unwrap_or(0))),
    };
    Ok(CopyTo {
        path,
        is_directory: request.is_dir,
        mode: Some(request.mode.unwrap_or(if request.is_dir { 0o755 } else { 0o644 })),
        owner,
        symlink_target: request.link_target.clone(),
        modification_time_nanos: request.mtime.map(|seconds| seconds.saturating_mul(1_000_000_000)),
    })
}

fn absolute(path: &str) -> String {
    if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("/{path}")
    }
}

/// One frame of the client that means something to an upload.
enum Incoming {
    Data(Bytes),
    End,
    Unexpected,
    Gone,
}

async fn incoming(socket: &mut WebSocket) -> Incoming {
    loop {
        let message = match tokio::time::timeout(CLIENT_STALL, socket.next()).await {
            Ok(Some(Ok(message))) => message,
            _ => return Incoming::Gone,
        };
        return match message {
            Message::Binary(data) => Incoming::Data(data),
            Message::Text(text) => match serde_json::from_str(text.as_str()) {
                Ok(api::CopyClientFrame::End) => Incoming::End,
                Err(_) => Incoming::Unexpected,
            },
            Message::Close(_) => Incoming::Gone,
            Message::Ping(_) | Message::Pong(_) => continue,
        };
    }
}

/// Passes content on until the client ends it. `None` when the client left before; the guest then forgets it.
async fn receive(mut session: CopyToSession, socket: &mut WebSocket) -> Option<Result<u64, String>> {
    loop {
        match incoming(socket).await {
            Incoming::Data(data) => {
                for chunk in data.chunks(api::MAX_CHUNK) {
                    if let Err(error) = session.send(chunk).await {
                        return drain(socket).await.map(|()| Err(error.to_string()));
                    }
                }
            }
            Incoming::End => return Some(session.finish().await.map_err(|error| error.to_string())),
            Incoming::Unexpected => {
                return Some(Err(
                    "unexpected text frame: only {\"type\":\"end\"} may follow the request".to_owned(),
                ));
            }
            Incoming::Gone => {
                tracing::info!("client disconnected before completing transfer");
                return None;
            }
        }
    }
}

/// Reads and drops content after a failure: clients look for the result only when they have sent everything.
async fn drain(socket: &mut WebSocket) -> Option<()> {
    loop {
        match incoming(socket).await {
            Incoming::Data(_) => {}
            Incoming::End | Incoming::Unexpected => return Some(()),
            Incoming::Gone => return None,
        }
    }
}

async fn download(guest: &GuestClient, request: api::CopyRequest, mut socket: WebSocket) {
    let source = CopyFrom {
        path: absolute(&request.guest_path),
        follow_links: request.follow_links,
    };
    match send_tree(guest, source, &mut socket).await {
        // The TypeScript SDK still writes its last file when it has the final marker.
        Ok(()) => socket::close_after_client(socket).await,
        Err(Failure::ClientGone) => {}
        Err(Failure::Told { message, path }) => {
            if socket::send_json(&mut socket, &api::CopyServerFrame::Error { message, path }).await {
                socket::close(socket).await;
            }
        }
    }
}

/// Why a download ended early.
enum Failure {
    /// The client does not take what is sent.
    ClientGone,
    /// For the client.
    Told { message: String, path: Option<String> },
}

impl From<ChannelError> for Failure {
    fn from(error: ChannelError) -> Self {
        Self::Told {
            message: EngineError::from(error).to_string(),
            path: None,
        }
    }
}

async fn send_tree(guest: &GuestClient, source: CopyFrom, socket: &mut WebSocket) -> Result<(), Failure> {
    let path = source.path.clone();
    let mut session = guest.copy_from(source).await?;
    let mut open = false;
    let mut left_out = false;
    loop {
        match session.next().await? {
            Some(CopyItem::Entry(entry)) => {
                let Some(header) = header(&entry) else {
                    tracing::debug!(
                        path = entry.path,
                        "left out of a copy: not a file, directory or safe link"
                    );
                    left_out = true;
                    continue;
                };
                if open {
                    put(socket, &api::CopyServerFrame::End { last: false }).await?;
                }
                put(socket, &api::CopyServerFrame::Header(header)).await?;
                open = true;
            }
            Some(CopyItem::Data(mut data)) => {
                while !data.is_empty() {
                    let chunk = data.split_to(data.len().min(api::MAX_CHUNK));
                    if !socket::send(socket, Message::Binary(chunk)).await {
                        return Err(Failure::ClientGone);
                    }
                }
            }
            Some(CopyItem::Failed { path, message }) => {
                return Err(Failure::Told {
                    message,
                    path: Some(path),
                });
            }
            None if open => return put(socket, &api::CopyServerFrame::End { last: true }).await,
            None => {
                let message = if left_out {
                    "only a device, a socket or a link that points outside is there; try with links followed"
                } else {
                    "nothing is there"
                };
                return Err(Failure::Told {
                    message: message.to_owned(),
                    path: Some(path),
                });
            }
        }
    }
}

async fn put(socket: &mut WebSocket, frame: &api::CopyServerFrame) -> Result<(), Failure> {
    if socket::send_json(socket, frame).await {
        Ok(())
    } else {
        Err(Failure::ClientGone)
    }
}

/// The header of an entry, or `None` for what clients would refuse.
fn header(entry: &CopyEntry) -> Option<api::CopyHeader> {
    let is_symlink = entry.kind == EntryKind::Symlink;
    if entry.kind == EntryKind::Special || !is_safe_path(&entry.path) {
        return None;
    }
    let link_target = entry.link_target.clone().unwrap_or_default();
    if is_symlink && !stays_inside(&entry.path, &link_target) {
        return None;
    }
    Some(api::CopyHeader {
        path: entry.path.clone(),
        mode: entry.mode & 0o777,
        is_dir: entry.kind == EntryKind::Directory,
        is_symlink,
        link_target: if is_symlink { link_target } else { String::new() },
        size: entry.size,
        mtime: (entry.modification_time_nanos / 1_000_000_000).max(0),
        uid: entry.uid,
        gid: entry.gid,
    })
}

fn is_safe_path(path: &str) -> bool {
    !path.contains('\\') && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

/// Whether a link at `path` with this target ends below the directory that the copy goes to.
fn stays_inside(path: &str, target: &str) -> bool {
    if target.is_empty() || target.starts_with('/') || target.contains('\\') {
        return false;
    }
    let mut depth = path.split('/').count() - 1;
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => match depth.checked_sub(1) {
                Some(up) => depth = up,
                None => return false,
            },
            _ => depth += 1,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, kind: EntryKind, link: Option<&str>) -> CopyEntry {
        CopyEntry {
            path: path.to_owned(),
            kind,
            mode: 0o104_755,
            uid: 0,
            gid: 0,
            size: 0,
            modification_time_nanos: -1,
            link_target: link.map(str::to_owned),
        }
    }

    #[test]
    fn links_stay_inside_or_are_left_out() {
        for (path, target, inside) in [
            ("tree/a", "b", true),
            ("tree/a", "./b", true),
            ("tree/a", "../other", true),
            ("tree/a", "../../etc", false),
            ("tree/sub/a", "../../x", true),
            ("tree/a", "/etc/passwd", false),
            ("tree/a", "", false),
            ("tree/a", "b\\c", false),
            ("a", "..", false),
            ("a", "b/../c", true),
        ] {
            assert_eq!(
                header(&entry(path, EntryKind::Symlink, Some(target))).is_some(),
                inside,
                "{path} -> {target}"
            );
        }
    }

    #[test]
    fn headers_hold_what_clients_check() {
        let header = header(&entry("tree/run", EntryKind::File, None)).unwrap();
        assert_eq!(
            (header.mode, header.mtime, header.is_dir, header.is_symlink),
            (0o755, 0, false, false)
        );
        assert!(super::header(&entry("tree/fifo", EntryKind::Special, None)).is_none());
        assert!(super::header(&entry("tree/a\\b", EntryKind::File, None)).is_none());
    }
}
