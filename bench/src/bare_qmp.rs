//! QEMU's machine protocol at its plainest: one command after the other, events ignored, a file handed over by its
//! descriptor.

use std::fs::File;
use std::io::{self, BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use crate::bare_cloud_hypervisor::connect;
use crate::error::{BenchError, Result};
use crate::load::pause;

/// Longer than any command takes.
const PATIENCE: Duration = Duration::from_secs(300);
/// Bytes a second: more than any disk takes. By default QEMU writes 128 MiB a second.
const UNLIMITED: u64 = 1 << 40;
/// The name of the file that was handed over.
const HANDED: &str = "bench";

/// A connection to a QEMU that nobody else talks to.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects as soon as QEMU takes a connection.
    ///
    /// # Errors
    /// It takes none, or refuses to talk.
    pub fn open(socket: &Path) -> Result<Self> {
        let stream = connect(socket, || false).map_err(spoken)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(spoken)?;
        let mut qmp = Self {
            reader: BufReader::new(stream),
        };
        // Its greeting.
        qmp.line()?;
        qmp.command("qmp_capabilities", &json!({}))?;
        let limits = json!({ "max-bandwidth": UNLIMITED });
        qmp.command("migrate-set-parameters", &limits)?;
        Ok(qmp)
    }

    /// How long the guest stands still while all of it is written into an empty file.
    ///
    /// # Errors
    /// QEMU refuses, or cannot write it all.
    pub fn pause_and_write(&mut self, file: &File) -> Result<Duration> {
        self.hand_over(file)?;
        let began = Instant::now();
        self.command("stop", &json!({}))?;
        let written = self
            .command("migrate", &json!({ "uri": format!("fd:{HANDED}") }))
            .and_then(|_| self.written(began));
        self.command("cont", &json!({}))?;
        let took = began.elapsed();
        written.map(|()| took)
    }

    fn written(&mut self, began: Instant) -> Result<()> {
        loop {
            let now = self.command("query-migrate", &json!({}))?;
            match now["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    return Err(BenchError::Answer(format!("bare QEMU wrote no machine: {now}")));
                }
                _ if began.elapsed() > PATIENCE => {
                    return Err(BenchError::Answer(format!("bare QEMU still writes: {now}")));
                }
                _ => pause(Duration::from_millis(1)),
            }
        }
    }

    fn command(&mut self, name: &str, arguments: &Value) -> Result<Value> {
        let line = words(name, arguments);
        self.reader.get_mut().write_all(line.as_bytes()).map_err(spoken)?;
        self.answer(name)
    }

    /// Gives QEMU a descriptor of its own; it closes that after use.
    fn hand_over(&mut self, file: &File) -> Result<()> {
        let line = words("getfd", &json!({ "fdname": HANDED }));
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors = [file.as_fd()];
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        let bytes = [IoSlice::new(line.as_bytes())];
        // A line as short as this is sent at once.
        sendmsg(self.reader.get_ref(), &bytes, &mut ancillary, SendFlags::NOSIGNAL)
            .map_err(|error| spoken(error.into()))?;
        self.answer("getfd").map(drop)
    }

    fn answer(&mut self, command: &str) -> Result<Value> {
        loop {
            let mut line = self.line()?;
            if let Some(answer) = line.get_mut("return") {
                return Ok(answer.take());
            }
            if let Some(error) = line.get("error") {
                return Err(BenchError::Answer(format!(
                    "bare QEMU refused {command}: {error}"
                )));
            }
        }
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line).map_err(spoken)? == 0 {
            return Err(spoken(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(serde_json::from_str(&line)?)
    }
}

fn words(name: &str, arguments: &Value) -> String {
    format!("{}\n", json!({ "execute": name, "arguments": arguments }))
}

fn spoken(error: io::Error) -> BenchError {
    BenchError::io("talk to bare QEMU", error)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// QEMU's side, played by hand.
    #[test]
    fn a_guest_stands_still_until_its_file_is_complete() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("qmp");
        let listener = UnixListener::bind(&socket).unwrap();
        let qemu = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"{\"QMP\":{}}\n").unwrap();
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let (mut told, mut asked) = (Vec::new(), 0);
            for line in lines.map_while(io::Result::ok) {
                let line: Value = serde_json::from_str(&line).unwrap();
                let name = line["execute"].as_str().unwrap_or_default().to_owned();
                let answer = match name.as_str() {
                    "query-migrate" => {
                        asked += 1;
                        json!({ "status": if asked < 3 { "active" } else { "completed" } })
                    }
                    _ => json!({}),
                };
                let text = format!("{{\"event\":\"X\"}}\n{}\n", json!({ "return": answer }));
                stream.write_all(text.as_bytes()).unwrap();
                told.push(name);
            }
            told
        });
        let mut qmp = Qmp::open(&socket).unwrap();
        qmp.pause_and_write(&tempfile::tempfile().unwrap()).unwrap();
        drop(qmp);
        let told = qemu.join().unwrap();
        let whole = [
            "getfd",
            "stop",
            "migrate",
            "query-migrate",
            "query-migrate",
            "query-migrate",
            "cont",
        ];
        assert_eq!(told[2..], whole);
    }
}
