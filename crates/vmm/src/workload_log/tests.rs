use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};

use hypeman_guest_api::workload_log::{HELD, OFFSET, Outbox, START, TOKEN};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use tempfile::TempDir;

use super::record::beside;
use super::*;

/// Names the directory in which this process is a server to be killed.
const SERVER: &str = "HYPEMAN_TEST_LOG_SERVER";

struct Place(TempDir);

impl Place {
    fn new() -> Place {
        Place(tempfile::tempdir().unwrap())
    }

    fn socket(&self) -> PathBuf {
        self.0.path().join("vsock_2223")
    }

    fn log(&self) -> PathBuf {
        self.0.path().join("logs/app.log")
    }

    fn listen(&self) -> WorkloadLog {
        WorkloadLog::listen(&self.socket(), &self.log()).unwrap()
    }

    fn guest(&self) -> Guest {
        Guest {
            outbox: Outbox::new(),
            printed: Vec::new(),
            socket: self.socket(),
            stream: None,
        }
    }

    /// What is in all files of the log, oldest first.
    fn content(&self) -> Vec<u8> {
        let mut all = Vec::new();
        let old = (0..).map(|number| beside(&self.log(), &format!(".{number}")));
        for path in old.take_while(|path| path.exists()) {
            all.extend(fs::read(path).unwrap());
        }
        all.extend(fs::read(self.log()).unwrap());
        all
    }
}

/// Gives the log's file another name, as the engine does; its writer hears of it later.
fn rename(log: &Path) {
    let free = (0..)
        .map(|number| beside(log, &format!(".{number}")))
        .find(|path| !path.exists());
    match fs::rename(log, free.unwrap()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => panic!("{error}"),
        _ => {}
    }
}

/// The sending side, as in a guest.
struct Guest {
    outbox: Outbox,
    printed: Vec<u8>,
    socket: PathBuf,
    stream: Option<UnixStream>,
}

impl Guest {
    /// A machine's memory, captured.
    fn captured(&self) -> Guest {
        Guest {
            outbox: self.outbox.clone(),
            printed: self.printed.clone(),
            socket: self.socket.clone(),
            stream: None,
        }
    }

    fn print(&mut self, text: &[u8]) {
        assert_eq!(self.outbox.push(text), text.len());
        self.printed.extend(text);
    }

    /// Numbered words, so that each is somewhere else than in any other place right.
    fn fill(&mut self, most: usize) {
        let mut number = self.printed.len() / 8;
        for _ in 0..most.min(self.outbox.room()) / 8 {
            self.print(format!("{number:07}\n").as_bytes());
            number += 1;
        }
    }

    async fn connect(&mut self) {
        self.stream = None;
        loop {
            if let Ok(mut stream) = UnixStream::connect(&self.socket).await
                && stream.write_all(&self.outbox.greet()).await.is_ok()
            {
                self.stream = Some(stream);
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// One exchange in either direction, on a connection that may break.
    async fn step(&mut self) {
        if self.stream.is_none() {
            self.connect().await;
        }
        let stream = self.stream.as_mut().unwrap();
        let piece = self.outbox.unsent();
        let interest = match piece.is_empty() {
            true => tokio::io::Interest::READABLE,
            false => tokio::io::Interest::READABLE | tokio::io::Interest::WRITABLE,
        };
        let ready = stream.ready(interest).await.unwrap();
        if ready.is_writable() && !piece.is_empty() {
            match stream.try_write(piece) {
                Ok(count) => self.outbox.left(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return self.stream = None,
            }
        }
        if ready.is_readable() {
            let mut said = [0; 4096];
            match stream.try_read(&mut said) {
                Ok(0) => self.stream = None,
                Ok(count) => {
                    self.outbox.hear(&said[..count]).unwrap();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => self.stream = None,
            }
        }
    }

    async fn some_steps(&mut self, most: usize) {
        for _ in 0..most {
            if !self.outbox.is_empty() {
                self.step().await;
            }
        }
    }

    async fn deliver(&mut self) {
        while !self.outbox.is_empty() {
            self.step().await;
        }
    }
}

async fn end_of(stream: &mut UnixStream) {
    let mut rest = Vec::new();
    // Reset or closed.
    let _ = stream.read_to_end(&mut rest).await;
}

#[tokio::test]
async fn what_is_printed_is_in_a_private_file_when_it_is_acknowledged() {
    let place = Place::new();
    let log = place.listen();
    let mut guest = place.guest();
    guest.print(b"one\xff\0");
    guest.deliver().await;
    assert_eq!(fs::read(place.log()).unwrap(), b"one\xff\0");
    for path in [place.log(), beside(&place.log(), ".position")] {
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
    }
    guest.print(b"two");
    guest.deliver().await;
    assert_eq!(fs::read(place.log()).unwrap(), b"one\xff\0two");
    drop(log);
    assert!(!place.socket().exists());
}

#[tokio::test]
async fn a_guest_that_goes_away_with_words_under_way_has_them_written() {
    let place = Place::new();
    let log = place.listen();
    let mut guest = place.guest();
    guest.fill(HELD);
    while guest.outbox.room() == 0 {
        guest.step().await;
    }
    let sent = loop {
        let piece = guest.outbox.unsent();
        match guest.stream.as_mut().unwrap().try_write(piece) {
            Ok(count) => guest.outbox.left(count),
            Err(_) => break guest.printed.len() - guest.outbox.unsent().len(),
        }
        if guest.outbox.unsent().is_empty() {
            break guest.printed.len();
        }
    };
    drop(guest.stream.take());
    log.settled().await;
    let written = place.content();
    assert!(written.len() <= sent && guest.printed.starts_with(&written));
    guest.deliver().await;
    assert!(place.content() == guest.printed);
}

#[tokio::test]
async fn listening_again_goes_on_where_it_stopped() {
    let place = Place::new();
    let mut guest = place.guest();
    for round in 0..20 {
        let log = place.listen();
        guest.fill(200_000);
        guest.some_steps(round).await;
        drop(log);
    }
    let _log = place.listen();
    guest.deliver().await;
    assert!(place.content() == guest.printed);
}

#[tokio::test]
async fn a_restored_guest_neither_loses_nor_repeats_what_was_under_way() {
    let place = Place::new();
    let mut log = place.listen();
    let mut guest = place.guest();
    for round in 0..20 {
        guest.fill(200_000);
        guest.some_steps(round).await;
        // Standby: what the VMM still had is written or not; the memory knows nothing of it.
        let captured = guest.captured();
        drop(guest);
        if round % 2 == 0 {
            log.settled().await;
        }
        drop(log);
        guest = captured;
        log = place.listen();
    }
    guest.deliver().await;
    assert!(place.content() == guest.printed);
}

#[tokio::test]
async fn a_guest_taken_back_to_an_older_instant_goes_on_from_there() {
    let place = Place::new();
    let _log = place.listen();
    let mut guest = place.guest();
    guest.print(b"first ");
    guest.deliver().await;
    let mut older = guest.captured();
    guest.print(b"forgotten ");
    guest.deliver().await;
    older.print(b"second ");
    older.deliver().await;
    assert_eq!(place.content(), b"first forgotten second ");
    // What was under way is written once where it surely came, and again where nobody can know.
    older.print(b"third ");
    let mut oldest = older.captured();
    older.connect().await;
    older.deliver().await;
    oldest.print(b"fourth");
    oldest.deliver().await;
    assert_eq!(place.content(), b"first forgotten second third third fourth");
}

#[tokio::test]
async fn a_fork_begins_with_what_its_source_had_under_way() {
    let place = Place::new();
    let _log = place.listen();
    let mut source = place.guest();
    source.print(b"old ");
    source.deliver().await;
    source.print(b"under way ");
    let mut fork = source.captured();
    source.deliver().await;
    let other = Place::new();
    let _other_log = other.listen();
    fork.socket = other.socket();
    fork.print(b"own");
    fork.deliver().await;
    assert_eq!(other.content(), b"under way own");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_changes_files_under_a_flood_without_losing_or_doubling_a_byte() {
    let place = Place::new();
    let log = place.listen();
    let mut guest = place.guest();
    let flood = async {
        for _ in 0..400 {
            guest.fill(50_000);
            guest.step().await;
        }
        guest.deliver().await;
    };
    let rotate = async {
        for _ in 0..40 {
            rename(&place.log());
            tokio::task::yield_now().await;
            log.reopen().await.unwrap();
            assert!(place.log().exists());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::join!(flood, rotate);
    assert!(place.content() == guest.printed);
}

#[tokio::test]
async fn a_rotation_that_was_cut_anywhere_is_finished_by_the_next_server() {
    let place = Place::new();
    let mut guest = place.guest();
    let fresh = beside(&place.log(), ".new");
    for round in 0..3 {
        let log = place.listen();
        guest.print(format!("{round}: before ").as_bytes());
        guest.deliver().await;
        rename(&place.log());
        if round > 0 {
            log.reopen().await.unwrap();
        }
        if round > 1 {
            // As it is a moment before the new file gets its name, when something has come already.
            guest.print(b"in the new file ");
            guest.deliver().await;
            fs::rename(place.log(), &fresh).unwrap();
        }
        drop(log);
        guest.stream = None;
        let log = place.listen();
        assert!(place.log().exists() && !fresh.exists());
        guest.print(b"after ");
        guest.deliver().await;
        drop(log);
    }
    assert_eq!(place.content(), guest.printed);
}

#[tokio::test]
async fn a_file_that_was_removed_takes_nothing_with_it_but_itself() {
    let place = Place::new();
    let log = place.listen();
    let mut guest = place.guest();
    guest.print(b"removed");
    guest.deliver().await;
    fs::remove_file(place.log()).unwrap();
    guest.stream = None;
    drop(log);
    let log = place.listen();
    guest.print(b"kept ");
    guest.deliver().await;
    // Somebody empties it while it is written.
    fs::File::options()
        .write(true)
        .open(place.log())
        .unwrap()
        .set_len(0)
        .unwrap();
    guest.print(b"and this ");
    guest.deliver().await;
    guest.stream = None;
    drop(log);
    let _log = place.listen();
    guest.print(b"and that");
    guest.deliver().await;
    assert_eq!(place.content(), b"and this and that");
}

#[tokio::test]
async fn a_full_disk_loses_nothing() {
    let place = Place::new();
    fs::create_dir_all(place.log().parent().unwrap()).unwrap();
    std::os::unix::fs::symlink("/dev/full", place.log()).unwrap();
    let log = place.listen();
    let mut guest = place.guest();
    guest.print(b"waits");
    guest.connect().await;
    let told = tokio::time::timeout(RETRY / 2, guest.deliver()).await;
    assert!(told.is_err());
    // Room again, in another file.
    log.reopen().await.unwrap();
    guest.deliver().await;
    assert_eq!(fs::read(place.log()).unwrap(), b"waits");
}

#[tokio::test]
async fn a_newer_connection_replaces_an_older_one() {
    let place = Place::new();
    let log = place.listen();
    let mut guest = place.guest();
    guest.print(b"one ");
    guest.deliver().await;
    let mut older = guest.stream.take().unwrap();
    // One that says nothing, and one that says what nobody understands, change nothing.
    let silent = UnixStream::connect(place.socket()).await.unwrap();
    let mut garbage = UnixStream::connect(place.socket()).await.unwrap();
    garbage.write_all(&[b'x'; 10 * HELLO]).await.unwrap();
    end_of(&mut garbage).await;
    assert!(
        older
            .try_read(&mut [0])
            .is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    );
    guest.print(b"two ");
    guest.deliver().await;
    end_of(&mut older).await;
    drop(silent);
    assert_eq!(place.content(), b"one two ");
    drop(guest);
    log.settled().await;
}

#[tokio::test]
async fn a_lying_guest_spoils_nothing_but_its_own_log() {
    let place = Place::new();
    let _log = place.listen();
    let hello = |first, sent| Hello {
        token: [9; TOKEN],
        first,
        sent,
    };
    // At the end of all offsets.
    let mut liar = UnixStream::connect(place.socket()).await.unwrap();
    liar.write_all(&hello(u64::MAX - 3, u64::MAX).encode())
        .await
        .unwrap();
    let mut answer = [0; START];
    liar.read_exact(&mut answer).await.unwrap();
    let _ = liar.write_all(b"more than fits").await;
    end_of(&mut liar).await;
    // Backwards.
    let mut liar = UnixStream::connect(place.socket()).await.unwrap();
    liar.write_all(&hello(7, 3).encode()).await.unwrap();
    end_of(&mut liar).await;
    // One that never listens: it may send until all buffers are full, and is replaced like any other.
    let mut liar = UnixStream::connect(place.socket()).await.unwrap();
    liar.write_all(&hello(0, 0).encode()).await.unwrap();
    for _ in 0..100_000 / OFFSET {
        if liar.try_write(b"x").is_err() {
            tokio::task::yield_now().await;
        }
    }
    let mut guest = place.guest();
    guest.print(b"honest");
    guest.deliver().await;
    end_of(&mut liar).await;
    let content = place.content();
    let (lies, truth) = content.split_at(content.len() - b"honest".len());
    assert!(lies.iter().all(|byte| *byte == b'x'));
    assert_eq!(truth, b"honest");
}

/// What the child of the test below does until it is killed.
fn be_a_server(directory: &str) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let directory = Path::new(directory);
        let path = directory.join("logs/app.log");
        let log = WorkloadLog::listen(&directory.join("vsock_2223"), &path).unwrap();
        loop {
            tokio::time::sleep(Duration::from_millis(3)).await;
            rename(&path);
            log.reopen().await.unwrap();
        }
    });
}

struct Server(Child);

impl Server {
    fn start(place: &Place) -> Server {
        let (_crate, module) = module_path!().split_once("::").unwrap();
        let name = format!("{module}::a_server_that_is_killed_at_any_instant_loses_and_doubles_nothing");
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", &name])
            .env(SERVER, place.0.path())
            .stdout(Stdio::null());
        Server(command.spawn().unwrap())
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn a_server_that_is_killed_at_any_instant_loses_and_doubles_nothing() {
    if let Ok(directory) = std::env::var(SERVER) {
        return be_a_server(&directory);
    }
    let place = Place::new();
    let mut guest = place.guest();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let mut random = TestRunner::deterministic();
    let mut any = |most: u64| (0..=most).new_tree(&mut random).unwrap().current();
    for _ in 0..30 {
        let server = Server::start(&place);
        runtime.block_on(async {
            guest.connect().await;
            let until = tokio::time::Instant::now() + Duration::from_micros(any(30_000));
            while tokio::time::Instant::now() < until {
                guest.fill(usize::try_from(any(20_000)).unwrap());
                let _ = tokio::time::timeout_at(until, guest.step()).await;
            }
        });
        server.kill();
    }
    let server = Server::start(&place);
    runtime.block_on(guest.deliver());
    server.kill();
    // The last one may have been killed in the middle of a rotation.
    let _guard = runtime.enter();
    drop(place.listen());
    let content = place.content();
    println!(
        "{} bytes in {} files",
        content.len(),
        fs::read_dir(place.0.path().join("logs")).unwrap().count()
    );
    assert!(
        content == guest.printed,
        "{} bytes instead of {}",
        content.len(),
        guest.printed.len()
    );
}
