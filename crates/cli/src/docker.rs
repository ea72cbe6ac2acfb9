//! Images of the local Docker daemon, asked for over its socket and read like an archive.
//!
//! ```text
//!  GET /images/NAME/get ──► docker save archive ──► unnamed temporary file ──► Archive
//! ```
//!
//! Invariants:
//! - Only a unix socket is spoken to: what leaves this machine goes through the user's own tools.
//! - A name reaches the daemon only when it is an id or an image reference, so it can be nothing else of a URL.
//! - The archive is streamed. Its size has the limit of all archives, silence a deadline, a refusal both.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::StreamExt as _;
use hypeman_images::Reference;
use hypeman_images::archive::{Archive, ArchiveOptions};
use reqwest::{Response, StatusCode};
use tokio::sync::mpsc;

use crate::client::{LARGEST_ERROR, bounded, choose_tls_provider};
use crate::document::Document;
use crate::error::CliError;
use crate::progress::Progress;

/// Where the daemon listens when `DOCKER_HOST` says nothing.
const DEFAULT_SOCKET: &str = "/var/run/docker.sock";

/// How long a connection may take to be established.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the daemon may be silent: older ones write all of an image to their disk before the first byte.
const SILENCE: Duration = Duration::from_secs(600);

/// Pieces of the archive that wait to be written.
const WAITING: usize = 16;

/// Takes an image out of the daemon that `host` (`DOCKER_HOST`) names.
///
/// # Errors
/// When no daemon answers, it has no such image, or what it sends is no archive. Each says what to do next.
pub(crate) async fn save(image: &str, host: Option<&str>, quiet: bool) -> Result<Archive, CliError> {
    let asked = asked(image).ok_or_else(|| {
        CliError::failed_with(
            format!("no image can have the name {image:?}"),
            "give an archive, an OCI layout directory, - for standard input, or an image of the local Docker",
        )
    })?;
    let socket = socket(host).map_err(|reason| CliError::failed_with(reason, save_by_hand(image)))?;
    choose_tls_provider();
    let http = reqwest::Client::builder()
        .user_agent(concat!("hypeman/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(SILENCE)
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        // No TLS on a socket, and reading the system's certificates takes its time.
        .tls_certs_only(Vec::new())
        .unix_socket(socket.clone())
        .build()
        .map_err(|failure| CliError::failed(format!("cannot set up HTTP: {failure}")))?;
    let answer = http.get(format!("http://docker/images/{asked}/get")).send().await;
    let response = answer.map_err(|failure| no_daemon(image, &socket, &failure))?;
    if !response.status().is_success() {
        return Err(refused(image, response).await);
    }
    let mut progress = Progress::of_bytes(quiet, response.content_length());
    progress.say(&format!("{image}: from Docker"));
    let read = receive(response, &progress).await;
    progress.finish();
    read.map_err(|failure| {
        CliError::failed_with(
            format!("Docker's archive of {image} cannot be read: {failure}"),
            save_by_hand(image),
        )
    })
}

/// What the daemon is asked for: of a name without a tag it would send every tag. Nothing when no image has that name.
fn asked(image: &str) -> Option<String> {
    if is_id(image) {
        return Some(image.to_owned());
    }
    Reference::parse(image).ok()?;
    let last = image.rsplit('/').next().unwrap_or_default();
    Some(match last.contains([':', '@']) {
        true => image.to_owned(),
        false => format!("{image}:latest"),
    })
}

/// Whether it is an id, whole or shortened as `docker images` shows it, by which an archive names nothing.
pub(crate) fn is_id(image: &str) -> bool {
    let digits = image.strip_prefix("sha256:").unwrap_or(image);
    let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    (12..=64).contains(&digits.len()) && digits.bytes().all(digit)
}

/// The socket that `DOCKER_HOST` means. The failure is a sentence for people.
fn socket(host: Option<&str>) -> Result<PathBuf, String> {
    match host.filter(|host| !host.is_empty()) {
        None => Ok(PathBuf::from(DEFAULT_SOCKET)),
        Some(host) => match host.strip_prefix("unix://") {
            Some(path) if path.starts_with('/') => Ok(PathBuf::from(path)),
            _ => Err(format!(
                "DOCKER_HOST is {host}, and only a socket such as unix://{DEFAULT_SOCKET} is spoken to"
            )),
        },
    }
}

fn save_by_hand(image: &str) -> String {
    format!(
        "`docker save {image} | hypeman push - {image}` does without: it takes whatever your docker talks to"
    )
}

/// The failure of a connection, with what to do about it.
fn no_daemon(image: &str, socket: &Path, failure: &reqwest::Error) -> CliError {
    let socket = socket.display();
    let mut reason = failure.to_string();
    let mut denied = false;
    let mut cause = std::error::Error::source(failure);
    while let Some(error) = cause {
        reason = error.to_string();
        if let Some(io) = error.downcast_ref::<io::Error>() {
            denied |= io.kind() == io::ErrorKind::PermissionDenied;
        }
        cause = error.source();
    }
    if failure.is_timeout() && !failure.is_connect() {
        return CliError::failed_with(
            format!("the Docker daemon at {socket} did not answer in time"),
            save_by_hand(image),
        );
    }
    let hint = if denied {
        format!("join the group that owns {socket}, or `sudo docker save {image} | hypeman push - {image}`")
    } else {
        format!(
            "start Docker or set DOCKER_HOST; without Docker, push an archive (`skopeo copy SOURCE oci-archive:app.tar`, \
             then `hypeman push app.tar {image}`), or `hypeman pull {image}` from a registry"
        )
    };
    CliError::failed_with(format!("no Docker daemon answers at {socket}: {reason}"), hint)
}

/// The failure that the daemon answered with.
async fn refused(image: &str, response: Response) -> CliError {
    let status = response.status();
    if status == StatusCode::NOT_FOUND {
        return CliError::failed_with(
            format!("Docker has no image {image}"),
            format!(
                "`docker images` lists what it has; `hypeman pull {image}` takes an image straight from its registry"
            ),
        );
    }
    let body = bounded(response, LARGEST_ERROR).await.unwrap_or_default();
    let answer = Document::parse(&body).ok();
    let said = answer.as_ref().and_then(|answer| answer.text("message"));
    CliError::failed_with(
        format!(
            "Docker does not give {image} away: {status}, {}",
            said.unwrap_or("without a reason")
        ),
        save_by_hand(image),
    )
}

/// Reads an archive while it comes.
async fn receive(response: Response, progress: &Progress) -> hypeman_images::error::Result<Archive> {
    let (sender, waiting) = mpsc::channel(WAITING);
    let sending = async move {
        let mut pieces = response.bytes_stream();
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(io::Error::other);
            if let Ok(piece) = &piece {
                progress.advance(piece.len() as u64);
            }
            let last = piece.is_err();
            // A reader that has gone has its own reason, which is told.
            if sender.send(piece).await.is_err() || last {
                break;
            }
        }
        drop(sender);
    };
    let pieces = Pieces { waiting, piece: None };
    let options = ArchiveOptions::default();
    let (archive, ()) = tokio::join!(Archive::read(pieces, &options), sending);
    archive
}

/// What arrives here, for one who reads it on another thread.
struct Pieces<B> {
    waiting: mpsc::Receiver<io::Result<B>>,
    piece: Option<io::Cursor<B>>,
}

impl<B: AsRef<[u8]>> Read for Pieces<B> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(piece) = &mut self.piece {
                let count = piece.read(buffer)?;
                if count > 0 || buffer.is_empty() {
                    return Ok(count);
                }
            }
            match self.waiting.blocking_recv() {
                Some(piece) => self.piece = Some(io::Cursor::new(piece?)),
                None => return Ok(0),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_image_is_asked_for_and_never_a_path() {
        let id = "a".repeat(64);
        let cases = [
            ("app", Some("app:latest")),
            ("app:1", Some("app:1")),
            ("localhost:5000/team/app", Some("localhost:5000/team/app:latest")),
            ("0123456789ab", Some("0123456789ab")),
            (id.as_str(), Some(id.as_str())),
            ("../app", None),
            ("a/../b", None),
            ("a?b", None),
            ("Bad Name", None),
            ("", None),
        ];
        for (image, expected) in cases {
            assert_eq!(asked(image).as_deref(), expected, "{image}");
        }
        assert!(!is_id("app") && !is_id("abcdef"));
    }

    #[test]
    fn docker_is_spoken_to_on_its_socket_only() {
        let default = PathBuf::from(DEFAULT_SOCKET);
        assert_eq!(socket(None).unwrap(), default);
        assert_eq!(socket(Some("")).unwrap(), default);
        assert_eq!(
            socket(Some("unix:///run/user/1000/docker.sock")).unwrap(),
            PathBuf::from("/run/user/1000/docker.sock")
        );
        for other in [
            "tcp://host:2375",
            "ssh://me@host",
            "unix://relative",
            "/run/docker.sock",
        ] {
            assert!(socket(Some(other)).unwrap_err().contains(other), "{other}");
        }
    }

    #[test]
    fn pieces_are_read_in_order_and_a_broken_stream_is_no_end() {
        let (sender, waiting) = mpsc::channel(4);
        let sent: [io::Result<&[u8]>; 4] =
            [Ok(b"abc"), Ok(b""), Ok(b"de"), Err(io::Error::other("broke off"))];
        for piece in sent {
            sender.blocking_send(piece).unwrap();
        }
        drop(sender);
        let mut pieces = Pieces { waiting, piece: None };
        let mut text = [0; 5];
        pieces.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"abcde");
        assert!(
            pieces
                .read(&mut text)
                .unwrap_err()
                .to_string()
                .contains("broke off")
        );
    }
}
