//! Writes one entry into the container.
//!
//! A file is written under a temporary name beside its place and renamed at the end, so that nobody ever sees
//! half of it, a running program can be replaced, and a transfer that stops leaves nothing.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use hypeman_guest_api::{CopyMessage, CopyTo, Refusal, RefusalCode, Reply, frame, frame::Frame};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_OMIT, utimensat};
use tokio::sync::{mpsc, oneshot};

use super::{refuse, refuse_io, stream::SharedStream};

/// Chunks between the channel and the disk.
const QUEUE: usize = 4;

enum Word {
    Data(Bytes),
    Finish,
}

pub(super) async fn serve(request: CopyTo, mut stream: SharedStream) {
    let (ready_sender, ready) = oneshot::channel();
    let (words, received) = mpsc::channel(QUEUE);
    let work = tokio::task::spawn_blocking(move || write_entry(&request, ready_sender, received));
    let reply = match ready.await {
        Ok(()) => Reply::Done,
        Err(_) => return answer(&mut stream, work).await,
    };
    if frame::write_header(&mut stream, &reply).await.is_err() {
        return;
    }
    loop {
        let word = match frame::read_frame(&mut stream).await {
            Ok(Some(Frame::Data(data))) => Word::Data(data),
            Ok(Some(frame)) if matches!(frame.header(), Ok(CopyMessage::End)) => Word::Finish,
            // Dropping the words tells the writer to clean up.
            _ => return,
        };
        let last = matches!(word, Word::Finish);
        // A writer that failed hears no more; its reason is told at the end.
        let _ = words.send(word).await;
        if last {
            return answer(&mut stream, work).await;
        }
    }
}

async fn answer(stream: &mut SharedStream, work: tokio::task::JoinHandle<Result<u64, Refusal>>) {
    let reply = match work.await {
        Ok(Ok(bytes)) => Reply::Written { bytes },
        Ok(Err(refusal)) => Reply::Refused(refusal),
        Err(error) => Reply::Refused(refuse(RefusalCode::Failed, error.to_string())),
    };
    if frame::write_header(stream, &reply).await.is_ok() {
        hypeman_guest_api::mux::finish(stream).await;
    }
}

fn write_entry(
    request: &CopyTo,
    ready: oneshot::Sender<()>,
    mut words: mpsc::Receiver<Word>,
) -> Result<u64, Refusal> {
    let path = Path::new(&request.path);
    if !path.is_absolute() || request.path.contains('\0') {
        return Err(refuse(RefusalCode::Invalid, "the path must be absolute"));
    }
    let told = |error: io::Error| refuse_io(&request.path, &error);
    if let Some(parent) = path.parent() {
        make_directories(parent).map_err(told)?;
    }
    let go = || {
        // The host waits for this word before it sends content.
        let _ = ready.send(());
    };
    if request.is_directory {
        let made = make_directory(request, path).map_err(told)?;
        go();
        wait_for_finish(&mut words)?;
        return set_attributes(path, request, Known::directory(made))
            .map(|()| 0)
            .map_err(told);
    }
    if let Some(target) = &request.symlink_target {
        refuse_directory(path).map_err(told)?;
        go();
        wait_for_finish(&mut words)?;
        return make_link(target, path, request).map(|()| 0).map_err(told);
    }
    // An existing link to a file keeps being one: what it points to is replaced.
    let place = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    refuse_directory(&place).map_err(told)?;
    let known = Known::file(&place);
    let (mut file, temporary) = Temporary::beside(&place).map_err(told)?;
    go();
    let mut written = 0;
    loop {
        match words.blocking_recv() {
            Some(Word::Data(data)) => {
                file.write_all(&data).map_err(told)?;
                written += data.len() as u64;
            }
            Some(Word::Finish) => break,
            None => return Err(abandoned()),
        }
    }
    drop(file);
    set_attributes(&temporary.path, request, known).map_err(told)?;
    temporary.become_file(&place).map_err(told)?;
    Ok(written)
}

fn abandoned() -> Refusal {
    refuse(RefusalCode::Failed, "the copy was given up")
}

fn wait_for_finish(words: &mut mpsc::Receiver<Word>) -> Result<(), Refusal> {
    match words.blocking_recv() {
        Some(Word::Finish) => Ok(()),
        Some(Word::Data(_)) => Err(refuse(RefusalCode::Invalid, "only files have content")),
        None => Err(abandoned()),
    }
}

/// Attributes for what the request leaves open.
struct Known {
    mode: u32,
    owner: Option<(u32, u32)>,
}

impl Known {
    fn file(place: &Path) -> Known {
        match fs::metadata(place) {
            Ok(old) => Known {
                mode: old.permissions().mode() & 0o7777,
                owner: Some((old.uid(), old.gid())),
            },
            Err(_) => Known {
                mode: 0o644,
                owner: None,
            },
        }
    }

    fn directory(made: Made) -> Known {
        Known {
            mode: if made == Made::New { 0o755 } else { 0 },
            owner: None,
        }
    }
}

#[derive(PartialEq, Eq, Clone, Copy)]
enum Made {
    New,
    Kept,
}

fn make_directories(path: &Path) -> io::Result<()> {
    if fs::metadata(path).is_ok_and(|about| about.is_dir()) {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o755).create(path)
}

fn make_directory(request: &CopyTo, path: &Path) -> io::Result<Made> {
    match DirBuilder::new()
        .mode(request.mode.unwrap_or(0o755) & 0o7777)
        .create(path)
    {
        Ok(()) => Ok(Made::New),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => match fs::metadata(path)?.is_dir() {
            true => Ok(Made::Kept),
            false => Err(io::ErrorKind::NotADirectory.into()),
        },
        Err(error) => Err(error),
    }
}

fn refuse_directory(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(about) if about.is_dir() => Err(io::ErrorKind::IsADirectory.into()),
        _ => Ok(()),
    }
}

fn make_link(target: &str, path: &Path, request: &CopyTo) -> io::Result<()> {
    let temporary = Temporary {
        path: temporary_name(path),
        kept: false,
    };
    symlink(target, &temporary.path)?;
    if let Some((uid, gid)) = request.owner {
        std::os::unix::fs::lchown(&temporary.path, Some(uid), Some(gid))?;
    }
    set_time(&temporary.path, request)?;
    temporary.become_file(path)
}

fn set_attributes(path: &Path, request: &CopyTo, known: Known) -> io::Result<()> {
    // Owner first: a change of owner takes set-user-id bits away.
    if let Some((uid, gid)) = request.owner.or(known.owner) {
        std::os::unix::fs::lchown(path, Some(uid), Some(gid))?;
    }
    match request.mode {
        Some(mode) => fs::set_permissions(path, fs::Permissions::from_mode(mode & 0o7777))?,
        None if known.mode != 0 => fs::set_permissions(path, fs::Permissions::from_mode(known.mode))?,
        None => {}
    }
    set_time(path, request)
}

fn set_time(path: &Path, request: &CopyTo) -> io::Result<()> {
    let Some(nanos) = request.modification_time_nanos else {
        return Ok(());
    };
    let times = Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: nanos.div_euclid(1_000_000_000),
            tv_nsec: nanos.rem_euclid(1_000_000_000),
        },
    };
    Ok(utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// A name that vanishes unless it becomes the file.
struct Temporary {
    path: PathBuf,
    kept: bool,
}

fn temporary_name(place: &Path) -> PathBuf {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    // Not derived from the name, which may already be as long as names can be.
    place.with_file_name(format!(".hypeman-copy-{}-{number}", std::process::id()))
}

impl Temporary {
    fn beside(place: &Path) -> io::Result<(File, Temporary)> {
        if place.as_os_str().as_bytes().ends_with(b"/") || place.file_name().is_none() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        let path = temporary_name(place);
        let file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        Ok((file, Temporary { path, kept: false }))
    }

    fn become_file(mut self, place: &Path) -> io::Result<()> {
        fs::rename(&self.path, place)?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.kept {
            // Nothing else can be done about it.
            let _ = fs::remove_file(&self.path);
        }
    }
}
