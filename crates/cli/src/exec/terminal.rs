//! The user's terminal: raw mode that is always taken back, its size, and standard input as a channel.

use std::io::{self, IsTerminal as _, Read as _};

use rustix::termios::{self, OptionalActions, Termios};
use tokio::sync::mpsc;

use super::Input;
use crate::websocket::CHUNK;

/// What standard input and output are.
#[derive(Debug, Clone, Copy)]
pub struct Terminal {
    /// Standard input is a terminal.
    pub input: bool,
    /// Standard output is a terminal.
    pub output: bool,
}

impl Terminal {
    /// Looks at this process.
    pub fn of_process() -> Self {
        Self {
            input: io::stdin().is_terminal(),
            output: io::stdout().is_terminal(),
        }
    }

    /// Rows and columns of the terminal, when there is one.
    pub fn size() -> Option<(u16, u16)> {
        let size = termios::tcgetwinsize(io::stdout())
            .or_else(|_| termios::tcgetwinsize(io::stdin()))
            .ok()?;
        (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
    }
}

/// Raw mode for as long as this value lives. Dropping it, also by a panic, puts the terminal back.
#[derive(Debug)]
pub struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Switches standard input to raw mode.
    ///
    /// # Errors
    /// When standard input is not a terminal.
    pub fn enter() -> io::Result<Self> {
        let before = termios::tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(io::stdin(), OptionalActions::Flush, &raw)?;
        Ok(Self { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(io::stdin(), OptionalActions::Drain, &self.before);
    }
}

/// Reads standard input on a thread of its own until it ends.
///
/// A blocked read cannot be cancelled, so the thread is never joined: it goes with the process.
pub fn spawn_stdin(sender: mpsc::Sender<Input>) {
    std::thread::spawn(move || {
        let mut input = io::stdin().lock();
        let mut buffer = vec![0; CHUNK];
        loop {
            let item = match input.read(&mut buffer) {
                Ok(0) => Input::End,
                Ok(count) => Input::Bytes(buffer[..count].to_vec()),
                Err(interrupted) if interrupted.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => Input::End,
            };
            let end = item == Input::End;
            if sender.blocking_send(item).is_err() || end {
                return;
            }
        }
    });
}
