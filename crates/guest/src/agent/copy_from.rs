//! Reads a file or a tree for the host, parents before their children, one entry at a time.

use std::{
    fs::{self, File, Metadata, ReadDir},
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use hypeman_guest_api::{CopyEntry, CopyFrom, CopyMessage, EntryKind, Refusal, RefusalCode, Reply, frame};
use tokio::sync::{mpsc, oneshot};

use super::{refuse, refuse_io, stream::SharedStream};

/// Chunks between the disk and the channel.
const QUEUE: usize = 4;

const CHUNK: usize = 63 * 1024;

enum Word {
    Message(CopyMessage),
    Data(Vec<u8>),
}

/// The host is gone.
struct Gone;

pub(super) async fn serve(request: CopyFrom, mut stream: SharedStream) {
    let (begun_sender, begun) = oneshot::channel();
    let (sender, mut words) = mpsc::channel(QUEUE);
    tokio::task::spawn_blocking(move || {
        match begin(&request) {
            Ok((root, metadata)) => {
                // Whoever asked may be gone; the first word will tell.
                let _ = begun_sender.send(Ok(()));
                let mut walk = Walk {
                    words: sender,
                    follow_links: request.follow_links,
                    ancestors: Vec::new(),
                };
                let _ = walk.run(root, metadata);
            }
            Err(refusal) => {
                let _ = begun_sender.send(Err(refusal));
            }
        }
    });
    let reply = match begun.await {
        Ok(Ok(())) => Reply::Done,
        Ok(Err(refusal)) => Reply::Refused(refusal),
        Err(_) => Reply::Refused(refuse(RefusalCode::Failed, "the copy could not be started")),
    };
    if frame::write_header(&mut stream, &reply).await.is_err() {
        return;
    }
    while let Some(word) = words.recv().await {
        let sent = match word {
            Word::Message(message) => frame::write_header(&mut stream, &message).await,
            Word::Data(data) => frame::write_data(&mut stream, &data).await,
        };
        if sent.is_err() {
            return;
        }
    }
    hypeman_guest_api::mux::finish(&mut stream).await;
}

fn begin(request: &CopyFrom) -> Result<(PathBuf, Metadata), Refusal> {
    let path = Path::new(&request.path);
    if !path.is_absolute() {
        return Err(refuse(RefusalCode::Invalid, "the path must be absolute"));
    }
    let metadata = look(path, request.follow_links).map_err(|error| refuse_io(&request.path, &error))?;
    Ok((path.to_owned(), metadata))
}

fn look(path: &Path, follow_links: bool) -> io::Result<Metadata> {
    if follow_links {
        fs::metadata(path)
    } else {
        fs::symlink_metadata(path)
    }
}

fn modification_time(metadata: &Metadata) -> i64 {
    metadata
        .mtime()
        .saturating_mul(1_000_000_000)
        .saturating_add(metadata.mtime_nsec())
}

struct Walk {
    words: mpsc::Sender<Word>,
    follow_links: bool,
    /// Device and inode of the directories on the way down, against loops of followed links.
    ancestors: Vec<(u64, u64)>,
}

/// A directory whose entries are being sent.
struct Level {
    entries: ReadDir,
    path: PathBuf,
    name: String,
}

impl Walk {
    fn run(&mut self, root: PathBuf, metadata: Metadata) -> Result<(), Gone> {
        let base = match fs::canonicalize(&root) {
            // `/tmp/..` and such have no name of their own.
            Ok(real) if root.file_name().is_none() => real,
            _ => root.clone(),
        };
        let name = base
            .file_name()
            .map_or_else(|| "root".to_owned(), |name| name.to_string_lossy().into_owned());
        let mut levels = Vec::new();
        levels.extend(self.entry(root, name, &metadata)?);
        while let Some(level) = levels.last_mut() {
            let Some(next) = level.entries.next() else {
                levels.pop();
                self.ancestors.pop();
                continue;
            };
            let entry = match next {
                Ok(entry) => entry,
                Err(error) => {
                    let path = level.name.clone();
                    self.send(Word::Message(CopyMessage::Failed {
                        path,
                        message: error.to_string(),
                    }))?;
                    continue;
                }
            };
            let path = level.path.join(entry.file_name());
            let name = format!("{}/{}", level.name, entry.file_name().to_string_lossy());
            match look(&path, self.follow_links) {
                Ok(metadata) => levels.extend(self.entry(path, name, &metadata)?),
                Err(error) => {
                    self.send(Word::Message(CopyMessage::Failed {
                        path: name,
                        message: error.to_string(),
                    }))?;
                }
            }
        }
        self.send(Word::Message(CopyMessage::End))
    }

    /// Sends one entry; a directory gives the level to go on with.
    fn entry(&mut self, path: PathBuf, name: String, metadata: &Metadata) -> Result<Option<Level>, Gone> {
        let kind = match metadata.file_type() {
            kind if kind.is_dir() => EntryKind::Directory,
            kind if kind.is_file() => EntryKind::File,
            kind if kind.is_symlink() => EntryKind::Symlink,
            _ => EntryKind::Special,
        };
        let mut header = CopyEntry {
            path: name.clone(),
            kind,
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
            size: 0,
            modification_time_nanos: modification_time(metadata),
            link_target: None,
        };
        match kind {
            EntryKind::File => return self.file(&path, header).map(|()| None),
            EntryKind::Symlink => match fs::read_link(&path) {
                Ok(target) => header.link_target = Some(target.to_string_lossy().into_owned()),
                Err(error) => return self.failed(name, &error),
            },
            EntryKind::Special => {}
            EntryKind::Directory => {
                let identity = (metadata.dev(), metadata.ino());
                if self.ancestors.contains(&identity) {
                    return self.failed(
                        name,
                        &io::Error::other("the link leads back to a parent directory"),
                    );
                }
                let entries = match fs::read_dir(&path) {
                    Ok(entries) => entries,
                    Err(error) => return self.failed(name, &error),
                };
                self.ancestors.push(identity);
                self.send(Word::Message(CopyMessage::Entry(header)))?;
                return Ok(Some(Level { entries, path, name }));
            }
        }
        self.send(Word::Message(CopyMessage::Entry(header)))?;
        Ok(None)
    }

    fn failed(&self, path: String, error: &io::Error) -> Result<Option<Level>, Gone> {
        self.send(Word::Message(CopyMessage::Failed {
            path,
            message: error.to_string(),
        }))
        .map(|()| None)
    }

    fn file(&self, path: &Path, mut header: CopyEntry) -> Result<(), Gone> {
        // Non-blocking, should a FIFO have taken the file's place meanwhile.
        let opened = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path);
        // The size of what is open, not of what was there a moment ago.
        let file = opened.and_then(|file| file.metadata().map(|about| (file, about)));
        let (mut file, about) = match file {
            Ok((file, about)) if about.is_file() => (file, about),
            Ok(_) => {
                return self
                    .failed(header.path, &io::Error::other("no longer a file"))
                    .map(drop);
            }
            Err(error) => return self.failed(header.path, &error).map(drop),
        };
        header.size = about.len();
        let name = header.path.clone();
        let mut remaining = header.size;
        self.send(Word::Message(CopyMessage::Entry(header)))?;
        while remaining > 0 {
            // Exactly the announced size: what a growing file gained is left out.
            let mut chunk = vec![0; CHUNK.min(usize::try_from(remaining).unwrap_or(CHUNK))];
            match file.read(&mut chunk) {
                Ok(0) => {
                    return self
                        .failed(name, &io::Error::other("the file shrank while it was read"))
                        .map(drop);
                }
                Ok(count) => {
                    chunk.truncate(count);
                    remaining -= count as u64;
                    self.send(Word::Data(chunk))?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return self.failed(name, &error).map(drop),
            }
        }
        Ok(())
    }

    fn send(&self, word: Word) -> Result<(), Gone> {
        self.words.blocking_send(word).map_err(|_| Gone)
    }
}
