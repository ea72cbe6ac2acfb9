//! A guest and a place for its log, both as real as sockets and files are.

mod connections;
mod files;

use std::fs;

use hypeman_guest_api::workload_log::Outbox;
use tempfile::TempDir;

use super::*;
use crate::files::beside;

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
        let first = self.printed.len() / 8;
        for number in first..first + most.min(self.outbox.room()) / 8 {
            self.print(format!("{number:07}\n").as_bytes());
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
