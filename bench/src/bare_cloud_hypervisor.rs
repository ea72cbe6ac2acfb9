//! A VMM by itself: a process that nobody confines or watches, and single calls to its socket, as Cloud Hypervisor and
//! Firecracker take them.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::context::need_program;
use crate::error::{BenchError, Result};
use crate::load::pause;

/// Longer than it takes to start under any load.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longer than it takes to carry out any order.
const ORDER_PATIENCE: Duration = Duration::from_secs(300);
/// Name of its socket in the directory of a machine, also where our driver makes it.
pub const SOCKET: &str = "api.sock";

/// A process; it ends with this.
#[derive(Debug)]
pub struct BareProcess {
    child: Child,
    /// Where it takes calls.
    pub socket: PathBuf,
    log: PathBuf,
}

impl BareProcess {
    /// Starts Cloud Hypervisor with its socket and its log in `folder`, and waits for nothing.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(program: &Path, folder: &Path) -> Result<Self> {
        let socket = format!("path={}", folder.join(SOCKET).display());
        // Its filter for the thread that sends a migration kills it where it was built for the GNU C library.
        Self::spawn(program, &["--api-socket", &socket, "--seccomp", "false"], folder)
    }

    /// Starts a program that makes its socket in `folder` and works there, and waits for nothing.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(program: &Path, words: &[&str], folder: &Path) -> Result<Self> {
        let (socket, log) = (folder.join(SOCKET), folder.join("bare.log"));
        let fail = |error| BenchError::io(format!("start {} by itself", program.display()), error);
        let output = File::create(&log).map_err(fail)?;
        let errors = output.try_clone().map_err(fail)?;
        // In a session of its own, as our VMMs are: schedulers may share time out by session.
        let child = Command::new("setsid")
            .arg(program)
            .args(words)
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .map_err(fail)?;
        Ok(Self { child, socket, log })
    }

    /// Its process.
    pub fn process(&self) -> u32 {
        self.child.id()
    }

    /// Adds what it said to an error.
    pub fn explain(&self, error: &BenchError) -> BenchError {
        let said = std::fs::read(&self.log).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        let lines: Vec<&str> = said.lines().collect();
        let last = lines[lines.len().saturating_sub(5)..].join(" | ");
        BenchError::Answer(format!("{error}; it said: {last}"))
    }
}

impl Drop for BareProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Calls one of the orders of Cloud Hypervisor, as soon as it listens.
///
/// # Errors
/// Nobody listens, or it refuses.
pub fn call(socket: &Path, method: &str, order: &str, body: Option<&Value>) -> Result<Value> {
    request(socket, method, &format!("/api/v1/{order}"), body)
}

/// Asks a VMM for something, as soon as it listens.
///
/// # Errors
/// Nobody listens, or it refuses.
pub fn request(socket: &Path, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
    let fail = |error| BenchError::io(format!("call {path} of a bare VMM"), error);
    let stream = connect(socket, || false).map_err(fail)?;
    let (status, answer) = exchange(stream, method, path, body).map_err(fail)?;
    match (200..300).contains(&status) {
        true if answer.is_empty() => Ok(Value::Null),
        true => Ok(serde_json::from_slice(&answer)?),
        false => Err(BenchError::Answer(format!(
            "{path} answered {status}: {}",
            String::from_utf8_lossy(&answer)
        ))),
    }
}

/// Connects as soon as somebody listens, unless that has become `hopeless`.
///
/// # Errors
/// Nobody does for long.
pub fn connect(socket: &Path, hopeless: impl Fn() -> bool) -> io::Result<UnixStream> {
    let began = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Err(error) if began.elapsed() > PATIENCE || hopeless() => return Err(error),
            Err(_) => pause(Duration::from_micros(200)),
            connected => return connected,
        }
    }
}

fn exchange(
    mut stream: UnixStream,
    method: &str,
    path: &str,
    body: Option<&Value>,
) -> io::Result<(u16, Vec<u8>)> {
    let mut request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n");
    if let Some(body) = body {
        let body = body.to_string();
        let length = body.len();
        request += &format!("Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}");
    } else {
        request += "\r\n";
    }
    stream.set_read_timeout(Some(ORDER_PATIENCE))?;
    stream.write_all(request.as_bytes())?;
    read_answer(&mut BufReader::new(stream))
}

/// Status and body of an answer whose length is told.
fn read_answer(stream: &mut impl BufRead) -> io::Result<(u16, Vec<u8>)> {
    let odd = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let mut line = String::new();
    stream.read_line(&mut line)?;
    let status = line.split_whitespace().nth(1).and_then(|word| word.parse().ok());
    let status = status.ok_or_else(|| odd("an answer without a status"))?;
    let mut length = 0;
    loop {
        line.clear();
        if stream.read_line(&mut line)? == 0 {
            return Err(odd("an answer that ends in its head"));
        }
        let Some((name, value)) = line.split_once(':') else {
            break;
        };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().map_err(|_| odd("a length that is none"))?;
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok((status, body))
}

/// Finds Cloud Hypervisor from `major` on.
///
/// # Errors
/// [`BenchError::Missing`] with what is there instead.
pub fn need_version(major: u32) -> Result<PathBuf> {
    let program = need_program("cloud-hypervisor")?;
    let output = Command::new(&program)
        .arg("--version")
        .stdin(Stdio::null())
        .output();
    let output = output.map_err(|error| BenchError::io("ask Cloud Hypervisor for its version", error))?;
    let banner = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    match major_of(&banner) {
        Some(found) if found >= major => Ok(program),
        _ => Err(BenchError::Missing(format!(
            "{} says {banner:?}, and version {major} is needed",
            program.display()
        ))),
    }
}

fn major_of(banner: &str) -> Option<u32> {
    let version = banner
        .split_whitespace()
        .find_map(|word| word.strip_prefix('v'))?;
    version.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_its_status_and_its_body() {
        let mut answer = &b"HTTP/1.1 200 \r\nServer: x\r\nContent-Length: 2\r\n\r\n{}HTTP"[..];
        assert_eq!(read_answer(&mut answer).unwrap(), (200, b"{}".to_vec()));
        let mut empty = &b"HTTP/1.1 204 No Content\r\n\r\n"[..];
        assert_eq!(read_answer(&mut empty).unwrap(), (204, Vec::new()));
        assert!(read_answer(&mut &b"HTTP/1.1 200 \r\nServer: x\r\n"[..]).is_err());
    }

    #[test]
    fn the_version_is_read_from_builds_of_all_kinds() {
        assert_eq!(major_of("cloud-hypervisor v53.0"), Some(53));
        assert_eq!(major_of("cloud-hypervisor v51.2-dirty"), Some(51));
        assert_eq!(major_of("cloud-hypervisor"), None);
    }
}
