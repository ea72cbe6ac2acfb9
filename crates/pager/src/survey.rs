//! Looks at the pagers of a directory from outside: nothing is taken over, told to drain or cleared away.

use std::io;
use std::path::Path;
use std::time::Duration;

use crate::client::PagerClient;
use crate::error::PagerError;
use crate::host::{release_of, sockets};
use crate::protocol::{Health, Hello, RefusedCode};

/// A pager's socket, and what was found there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sighting {
    /// The release that made the socket, as its name says.
    pub release: String,
    /// What was found.
    pub found: Found,
}

/// What was found at a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// It answers.
    Well {
        /// Who it is.
        hello: Hello,
        /// How it feels.
        health: Health,
    },
    /// It answers in another protocol: a server can only tell it to drain.
    Foreign,
    /// It takes connections and does not answer in time: its machines may stand still.
    Silent,
    /// Nobody listens: it has ended without clearing its socket away.
    Gone,
    /// It could not be looked at.
    Unknown {
        /// Why.
        reason: String,
    },
}

/// What is found at each pager's socket in `directory`, asked on behalf of `release`, with `patience` for each.
///
/// # Errors
/// When the directory is there and cannot be read.
pub async fn survey(directory: &Path, release: &str, patience: Duration) -> io::Result<Vec<Sighting>> {
    let mut sightings = Vec::new();
    for socket in sockets(directory)? {
        let asked = tokio::time::timeout(patience, ask(&socket, release)).await;
        sightings.push(Sighting {
            release: release_of(&socket).unwrap_or_default().to_owned(),
            found: asked.map_or(Found::Silent, |answer| answer.unwrap_or_else(found_instead)),
        });
    }
    Ok(sightings)
}

async fn ask(socket: &Path, release: &str) -> Result<Found, PagerError> {
    let client = PagerClient::connect(socket, release).await?;
    Ok(Found::Well {
        health: client.health().await?,
        hello: client.hello().clone(),
    })
}

fn found_instead(error: PagerError) -> Found {
    match error {
        PagerError::Refused(refused) if refused.code == RefusedCode::Protocol => Found::Foreign,
        PagerError::Gone(_) => Found::Gone,
        PagerError::Connect { source, .. }
            if matches!(
                source.kind(),
                io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
            ) =>
        {
            Found::Gone
        }
        other => Found::Unknown {
            reason: other.to_string(),
        },
    }
}
