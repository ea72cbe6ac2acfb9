use std::{
    fs::File,
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::mpsc,
    thread::JoinHandle,
};

use hypeman_guest_api::workload_log::{self, HELD, HELLO, Hello};
use hypeman_vmm::WorkloadLog;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

use super::*;

/// A guest whose program is the test.
struct Guest {
    place: TempDir,
    runtime: Runtime,
    program: Option<File>,
    courier: Option<JoinHandle<()>>,
    /// Told of each attempt to reach the host.
    dialled: mpsc::Receiver<()>,
}

impl Guest {
    fn start(when_full: WhenFull) -> Guest {
        let place = tempfile::tempdir().unwrap();
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        fcntl_setpipe_size(&writer, 64 * 1024).unwrap();
        let (tell, dialled) = mpsc::channel();
        let socket = place.path().join("vsock_2223");
        let dial = move || {
            let _ = tell.send(());
            let stream = UnixStream::connect(&socket)?;
            stream.set_nonblocking(true)?;
            Ok(stream.into())
        };
        Guest {
            place,
            runtime: Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
                .unwrap(),
            program: Some(writer.into()),
            courier: Some(std::thread::spawn(move || carry(&reader, when_full, dial))),
            dialled,
        }
    }

    fn socket(&self) -> PathBuf {
        self.place.path().join("vsock_2223")
    }

    fn log(&self) -> PathBuf {
        self.place.path().join("app.log")
    }

    fn host(&self) -> WorkloadLog {
        let _inside = self.runtime.enter();
        WorkloadLog::listen(&self.socket(), &self.log()).unwrap()
    }

    fn print(&mut self, text: &[u8]) {
        self.program.as_mut().unwrap().write_all(text).unwrap();
    }

    /// The program ends; what it printed is with the host when this returns.
    fn end(&mut self) -> Vec<u8> {
        drop(self.program.take());
        self.courier.take().unwrap().join().unwrap();
        std::fs::read(self.log()).unwrap()
    }
}

fn numbered(lines: std::ops::Range<usize>) -> Vec<u8> {
    lines
        .flat_map(|number| format!("line {number}\n").into_bytes())
        .collect()
}

#[test]
fn what_a_program_prints_last_is_with_the_host_when_it_is_said_to_be() {
    let mut guest = Guest::start(WhenFull::Wait);
    let _host = guest.host();
    guest.print(b"last words");
    assert_eq!(guest.end(), b"last words");
}

#[test]
fn nobody_is_called_before_there_is_something_to_say() {
    let mut guest = Guest::start(WhenFull::Wait);
    drop(guest.program.take());
    guest.courier.take().unwrap().join().unwrap();
    assert!(guest.dialled.try_recv().is_err());
}

#[test]
fn a_host_that_comes_and_goes_gets_every_byte_once() {
    let mut guest = Guest::start(WhenFull::Wait);
    const LINES: usize = 4_000;
    for round in 0..30 {
        let host = guest.host();
        guest.print(&numbered(round * LINES..(round + 1) * LINES));
        drop(host);
    }
    let _host = guest.host();
    assert!(guest.end() == numbered(0..30 * LINES));
}

#[test]
fn a_program_waits_for_a_host_that_is_away() {
    let mut guest = Guest::start(WhenFull::Wait);
    let whole = numbered(0..300_000);
    assert!(whole.len() > 2 * HELD);
    let (tell, printed) = mpsc::channel();
    let mut program = guest.program.take().unwrap();
    let text = whole.clone();
    let printing = std::thread::spawn(move || {
        let mut total = 0;
        for piece in text.chunks(4096) {
            program.write_all(piece).unwrap();
            total += piece.len();
            tell.send(total).unwrap();
        }
    });
    // As much as fits into memory and pipe, and no more until somebody comes.
    let mut total = 0;
    while total < HELD {
        total = printed.recv().unwrap();
    }
    while let Ok(more) = printed.recv_timeout(Duration::from_millis(300)) {
        total = more;
    }
    assert!(total <= HELD + 64 * 1024);
    let _host = guest.host();
    printing.join().unwrap();
    assert!(guest.end() == whole);
}

#[test]
fn an_init_does_not_wait_for_a_host_that_is_away() {
    let mut guest = Guest::start(WhenFull::Lose);
    let whole = numbered(0..300_000);
    guest.print(&whole);
    let _host = guest.host();
    let log = guest.end();
    assert!(log.len() >= HELD && log.len() < whole.len());
    assert!(whole.starts_with(&log[..HELD]));
}

#[test]
fn a_host_that_says_nothing_or_nonsense_is_left_for_another() {
    let mut guest = Guest::start(WhenFull::Wait);
    let listener = UnixListener::bind(guest.socket()).unwrap();
    guest.print(b"what nobody ");
    let greeted = || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut hello = [0; HELLO];
        stream.read_exact(&mut hello).unwrap();
        (stream, Hello::decode(&hello).unwrap())
    };
    // Silent from the start, as where a restored machine's connection leads nowhere.
    let (_silent, hello) = greeted();
    assert_eq!((hello.first, hello.sent), (0, 0));
    // Begins beyond what there is.
    let (mut liar, _) = greeted();
    liar.write_all(&workload_log::start([1; 16], 1)).unwrap();
    // Takes everything, and never says so.
    let (mut mute, _) = greeted();
    mute.write_all(&workload_log::start([2; 16], 0)).unwrap();
    let mut said = [0; b"what nobody ".len()];
    mute.read_exact(&mut said).unwrap();
    let (mut liar, hello) = greeted();
    assert_eq!((hello.token, hello.first, hello.sent), ([2; 16], 0, 12));
    liar.write_all(&workload_log::start([3; 16], 12)).unwrap();
    liar.write_all(&workload_log::acknowledgement(13)).unwrap();
    guest.print(b"else took");
    let (_gone, hello) = greeted();
    assert_eq!((hello.token, hello.first), ([3; 16], 12));
    drop((listener, _gone));
    let _host = guest.host();
    assert_eq!(guest.end(), b"else took");
}
