//! HTTP/1.1 over one kept connection, as cheap as it gets, so that the client costs little beside what it measures.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::error::{BenchError, Result};

/// Longer than the server itself waits for anything: its own words say more than the end of a connection.
const PATIENCE: Duration = Duration::from_secs(16 * 60);
/// The largest head that is taken.
const LONGEST_HEAD: usize = 64 << 10;

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// The `Location` header.
    pub location: Option<String>,
    /// The body; empty when it was only counted.
    pub body: Vec<u8>,
    /// Length of the body in bytes.
    pub length: usize,
}

/// A connection to the server.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    address: SocketAddr,
    token: String,
    buffer: Vec<u8>,
    /// What is read and not yet taken is `start..filled`.
    start: usize,
    filled: usize,
}

impl Connection {
    /// Connects.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn open(address: SocketAddr, token: &str) -> Result<Self> {
        let stream =
            connect(address).map_err(|error| BenchError::io(format!("connect to {address}"), error))?;
        Ok(Self {
            stream,
            address,
            token: token.to_owned(),
            buffer: vec![0; 256 << 10],
            start: 0,
            filled: 0,
        })
    }

    /// A server closes a connection that is idle for long. That is no failure of the next call.
    fn renew(&mut self) -> io::Result<()> {
        self.stream.set_nonblocking(true)?;
        let closed = match self.stream.peek(&mut [0]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
            // Between two calls there is nothing to be read, but the end.
            Ok(_) | Err(_) => true,
        };
        if closed {
            self.stream = connect(self.address)?;
            (self.start, self.filled) = (0, 0);
        } else {
            self.stream.set_nonblocking(false)?;
        }
        Ok(())
    }

    /// Sends a request and reads the answer whole.
    ///
    /// # Errors
    /// The connection breaks or the answer is no HTTP.
    pub fn call(&mut self, method: &str, path: &str, kind: &str, body: &[u8]) -> Result<Answer> {
        self.exchange(method, path, kind, body, true)
            .map_err(|error| BenchError::io(format!("{method} {path}"), error))
    }

    /// Sends a GET and counts the bytes of the answer.
    ///
    /// # Errors
    /// As [`Connection::call`].
    pub fn count(&mut self, path: &str) -> Result<Answer> {
        self.exchange("GET", path, "", &[], false)
            .map_err(|error| BenchError::io(format!("GET {path}"), error))
    }

    fn exchange(
        &mut self,
        method: &str,
        path: &str,
        kind: &str,
        body: &[u8],
        keep: bool,
    ) -> io::Result<Answer> {
        let mut request = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer {}\r\naccept: */*\r\n",
            self.address, self.token
        );
        if !body.is_empty() || method != "GET" {
            request += &format!("content-type: {kind}\r\ncontent-length: {}\r\n", body.len());
        }
        request += "\r\n";
        self.renew()?;
        self.stream.write_all(request.as_bytes())?;
        self.stream.write_all(body)?;

        let head_length = self.read_head()?;
        let head = String::from_utf8_lossy(&self.unread()[..head_length]).into_owned();
        self.consume(head_length);
        let invalid = || io::Error::new(io::ErrorKind::InvalidData, format!("no HTTP answer: {head:.200}"));
        let mut lines = head.split("\r\n");
        let status = lines
            .next()
            .and_then(|line| line.split(' ').nth(1))
            .and_then(|code| code.parse().ok());
        let mut answer = Answer {
            status: status.ok_or_else(invalid)?,
            location: None,
            body: Vec::new(),
            length: 0,
        };
        let (mut length, mut chunked) = (0, false);
        for line in lines {
            let Some((name, value)) = line.split_once(':') else {
                continue;
            };
            let value = value.trim();
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.parse().map_err(|_| invalid())?,
                "transfer-encoding" => chunked = value.eq_ignore_ascii_case("chunked"),
                "location" => answer.location = Some(value.to_owned()),
                _ => {}
            }
        }
        if !chunked {
            self.read_body(length, keep, &mut answer)?;
            return Ok(answer);
        }
        loop {
            let line = self.read_line()?;
            let size = usize::from_str_radix(line.split(';').next().unwrap_or("").trim(), 16)
                .map_err(|_| invalid())?;
            self.read_body(size, keep, &mut answer)?;
            self.read_line()?;
            if size == 0 {
                return Ok(answer);
            }
        }
    }

    fn read_head(&mut self) -> io::Result<usize> {
        loop {
            let unread = self.unread();
            if let Some(end) = unread.windows(4).position(|four| four == b"\r\n\r\n") {
                return Ok(end + 4);
            }
            if unread.len() > LONGEST_HEAD {
                return Err(io::ErrorKind::InvalidData.into());
            }
            self.fill()?;
        }
    }

    fn read_line(&mut self) -> io::Result<String> {
        loop {
            let unread = self.unread();
            if let Some(end) = unread.windows(2).position(|two| two == b"\r\n") {
                let line = String::from_utf8_lossy(&unread[..end]).into_owned();
                self.consume(end + 2);
                return Ok(line);
            }
            if unread.len() > LONGEST_HEAD {
                return Err(io::ErrorKind::InvalidData.into());
            }
            self.fill()?;
        }
    }

    fn read_body(&mut self, mut left: usize, keep: bool, answer: &mut Answer) -> io::Result<()> {
        answer.length += left;
        loop {
            let here = left.min(self.filled - self.start);
            if keep {
                answer.body.extend_from_slice(&self.unread()[..here]);
            }
            self.consume(here);
            left -= here;
            if left == 0 {
                return Ok(());
            }
            self.fill()?;
        }
    }

    fn unread(&self) -> &[u8] {
        &self.buffer[self.start..self.filled]
    }

    fn fill(&mut self) -> io::Result<()> {
        if self.filled == self.buffer.len() {
            self.buffer.copy_within(self.start.., 0);
            (self.start, self.filled) = (0, self.filled - self.start);
        }
        match self.stream.read(&mut self.buffer[self.filled..])? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            more => {
                self.filled += more;
                Ok(())
            }
        }
    }

    fn consume(&mut self, count: usize) {
        self.start += count;
        if self.start == self.filled {
            (self.start, self.filled) = (0, 0);
        }
    }
}

fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_connection_that_the_server_closed_is_opened_anew() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut connection = Connection::open(listener.local_addr().unwrap(), "t").unwrap();
        drop(listener.accept().unwrap());
        // The end has arrived before the call: nothing else can be read.
        assert_eq!(connection.stream.peek(&mut [0]).unwrap(), 0);
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            assert!(stream.read(&mut [0; 4096]).unwrap() > 0);
            stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap();
        });
        assert_eq!(connection.count("/").unwrap().status, 204);
        server.join().unwrap();
    }

    fn serve(answers: Vec<&'static [u8]>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            for answer in answers {
                let mut request = [0; 4096];
                assert!(stream.read(&mut request).unwrap() > 0);
                for byte in answer.chunks(7) {
                    stream.write_all(byte).unwrap();
                }
            }
        });
        address
    }

    #[test]
    fn lengths_and_chunks_are_read_on_one_connection() {
        let address = serve(vec![
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
            b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\nLocation: /x\r\n\r\n3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\n\r\n",
            b"HTTP/1.1 204 No Content\r\n\r\n",
        ]);
        let mut connection = Connection::open(address, "t").unwrap();
        assert_eq!(connection.call("GET", "/", "", &[]).unwrap().body, b"hello");
        let chunked = connection.call("GET", "/", "", &[]).unwrap();
        assert_eq!((chunked.status, chunked.location.as_deref()), (201, Some("/x")));
        assert_eq!(chunked.body, b"abc0123456789");
        assert_eq!(connection.count("/").unwrap().status, 204);
        assert!(connection.call("GET", "/", "", &[]).is_err());
    }
}
