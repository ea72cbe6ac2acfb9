//! Runs a command for the host.
//!
//! Three things go on at once and none waits for another: input to the command, output from it, and its time
//! limit. The session is over when the command has ended and its output is told, or when the host gives it up.

use std::{cell::Cell, io, path::Path, rc::Rc, time::Duration};

use hypeman_guest_api::{
    ExecControl, ExecEvent, ExecRequest, Refusal, RefusalCode, Reply, frame, frame::Frame,
};
use rustix::process::{Pid, Signal};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::oneshot,
};

use super::{
    Agent,
    fd_stream::FdStream,
    lookup::{DEFAULT_PATH, Lookup, find_program},
    pty,
    reaper::Ending,
    refuse,
    session::{self, Ends, Session},
    stream::SharedStream,
};

const TIMED_OUT: i32 = 124;

/// Bytes of output that travel together: what one write to the host's port takes.
const OUTPUT_CHUNK: usize = 31 * 1024;

/// Time for a session's processes to end themselves after `SIGHUP`.
const HANGUP_GRACE: Duration = Duration::from_secs(1);

/// How often a command that does not read its input is checked for a host that gave up.
const ABANDONED_CHECK: Duration = Duration::from_millis(200);

/// How long the last words on a terminal may be under way after its command has ended.
const TERMINAL_DRAIN: Duration = Duration::from_millis(200);

/// The end of a command, which may be asked for more than once.
struct Watch {
    receiver: oneshot::Receiver<Ending>,
    known: Option<Option<Ending>>,
}

impl Watch {
    fn new(receiver: oneshot::Receiver<Ending>) -> Self {
        Watch {
            receiver,
            known: None,
        }
    }

    /// Waits for the end; cancel safe. `None` when nobody will ever know.
    async fn ended(&mut self) -> Option<Ending> {
        match self.known {
            Some(known) => known,
            None => *self.known.insert((&mut self.receiver).await.ok()),
        }
    }
}

pub(super) async fn serve(agent: &Rc<Agent>, request: ExecRequest, mut stream: SharedStream) {
    agent.moving().await;
    let started = start(agent, &request);
    let reply = match &started {
        Ok(_) => Reply::Done,
        Err(refusal) => Reply::Refused(refusal.clone()),
    };
    let told = frame::write_header(&mut stream, &reply).await.is_ok();
    let Ok((session, ending)) = started else {
        return hypeman_guest_api::mux::finish(&mut stream).await;
    };
    let leader = session.leader;
    let ending = if told {
        converse(session, ending, &request, &mut stream).await
    } else {
        Some(ending)
    };
    if let Some(ending) = ending {
        hang_up(leader, ending).await;
    }
}

fn start(agent: &Agent, request: &ExecRequest) -> Result<(Session, Watch), Refusal> {
    let shell = vec!["/bin/sh".to_owned()];
    let command = if request.command.is_empty() {
        &shell
    } else {
        &request.command
    };
    let directory = request
        .working_directory
        .as_deref()
        .filter(|path| !path.is_empty())
        .unwrap_or("/");
    let environment = environment(agent, request);
    let path = environment
        .iter()
        .find(|(name, _)| name == "PATH")
        .map_or(DEFAULT_PATH, |(_, value)| value);
    let word = command.first().map_or("", String::as_str);
    if !Path::new(directory).is_dir() {
        return Err(refuse(
            RefusalCode::NotFound,
            format!("working directory not found: {directory}"),
        ));
    }
    let program = match find_program(word, path, Path::new(directory)) {
        Lookup::Found(program) => program,
        Lookup::NotFound => {
            return Err(refuse(
                RefusalCode::CommandNotFound,
                format!("command not found: {word}"),
            ));
        }
        Lookup::NotExecutable => {
            return Err(refuse(
                RefusalCode::CommandNotExecutable,
                format!("permission denied: {word}"),
            ));
        }
    };
    let session = session::start(
        &program,
        command,
        &environment,
        Path::new(directory),
        request.tty,
        agent.machine.session_group(),
    )
    .map_err(|error| cannot_start(word, &error))?;
    let ending = Watch::new(agent.reaper.watch(session.leader));
    Ok((session, ending))
}

fn cannot_start(word: &str, error: &io::Error) -> Refusal {
    match error.raw_os_error() {
        Some(libc::ENOENT) => refuse(RefusalCode::CommandNotFound, format!("command not found: {word}")),
        Some(libc::EACCES | libc::EPERM) => refuse(
            RefusalCode::CommandNotExecutable,
            format!("permission denied: {word}"),
        ),
        Some(libc::ENOEXEC) => refuse(
            RefusalCode::CommandNotExecutable,
            format!("exec format error: {word}"),
        ),
        _ => refuse(RefusalCode::Failed, format!("{word}: {error}")),
    }
}

/// Defaults, the container's environment, then the request's; the last word on a name counts.
fn environment(agent: &Agent, request: &ExecRequest) -> Vec<(String, String)> {
    let mut environment = vec![
        ("PATH".to_owned(), DEFAULT_PATH.to_owned()),
        ("HOME".to_owned(), "/root".to_owned()),
    ];
    if request.tty.is_some() {
        environment.push(("TERM".to_owned(), "xterm".to_owned()));
    }
    for (name, value) in agent.environment.borrow().iter().chain(&request.environment) {
        match environment.iter_mut().find(|(known, _)| known == name) {
            Some((_, known)) => known.clone_from(value),
            None => environment.push((name.clone(), value.clone())),
        }
    }
    environment
}

/// Talks until the end. Gives the ending back when the host gave up before.
async fn converse(
    session: Session,
    mut ending: Watch,
    request: &ExecRequest,
    stream: &mut SharedStream,
) -> Option<Watch> {
    let leader = session.leader;
    let timed_out = Cell::new(false);
    let limit = async {
        if let Some(timeout) = request.timeout {
            tokio::time::sleep(timeout).await;
            timed_out.set(true);
            session::signal_session(leader, Signal::KILL);
        }
        std::future::pending::<()>().await;
    };
    let mut reader = stream.clone();
    let told = match session.ends {
        Ends::Pipes {
            stdin,
            mut stdout,
            mut stderr,
        } => {
            tokio::select! {
                () = feed(&mut reader, Input::Pipe(Some(stdin))) => None,
                () = limit => None,
                ended = tell_pipes(stream, &mut stdout, &mut stderr, &mut ending) => ended,
            }
        }
        Ends::Terminal(terminal) => {
            let Ok(Ok(mut output)) = terminal.descriptor().try_clone_to_owned().map(FdStream::new) else {
                return Some(ending);
            };
            tokio::select! {
                () = feed(&mut reader, Input::Terminal(terminal)) => None,
                () = limit => None,
                ended = tell_terminal(stream, &mut output, &mut ending) => ended,
            }
        }
    };
    let Some(ended) = told else { return Some(ending) };
    let code = if timed_out.get() { TIMED_OUT } else { ended.code() };
    if frame::write_header(stream, &ExecEvent::Exited { code })
        .await
        .is_ok()
    {
        hypeman_guest_api::mux::finish(stream).await;
    }
    None
}

enum Input {
    Pipe(Option<tokio::net::unix::pipe::Sender>),
    Terminal(FdStream),
}

/// Passes input on until the host gives up.
async fn feed(reader: &mut SharedStream, mut input: Input) {
    loop {
        let Ok(Some(frame)) = frame::read_frame(reader).await else {
            return;
        };
        match frame {
            Frame::Data(data) => {
                let accepted = match &mut input {
                    Input::Pipe(None) => Some(true),
                    Input::Pipe(Some(pipe)) => write_unless_abandoned(pipe, &data, reader).await,
                    Input::Terminal(terminal) => write_unless_abandoned(terminal, &data, reader).await,
                };
                match accepted {
                    Some(true) => {}
                    // The command has closed its input, which is its right: the rest is dropped.
                    Some(false) => {
                        if let Input::Pipe(pipe) = &mut input {
                            *pipe = None;
                        }
                    }
                    None => return,
                }
            }
            Frame::ErrorData(_) => {}
            header => match (header.header::<ExecControl>(), &mut input) {
                (Ok(ExecControl::CloseStdin), Input::Pipe(pipe)) => *pipe = None,
                (Ok(ExecControl::CloseStdin), Input::Terminal(terminal)) => {
                    // A terminal that is hung up needs no end of input.
                    let _ = session::end_of_terminal_input(terminal);
                }
                (Ok(ExecControl::Resize { rows, columns }), Input::Terminal(terminal)) => {
                    let _ = pty::resize(terminal.descriptor(), rows, columns);
                }
                _ => {}
            },
        }
    }
}

/// `Some(true)`: written; `Some(false)`: the command does not read any more; `None`: the host gave up.
async fn write_unless_abandoned(
    sink: &mut (impl AsyncWrite + Unpin),
    data: &[u8],
    stream: &SharedStream,
) -> Option<bool> {
    let write = sink.write_all(data);
    tokio::pin!(write);
    loop {
        tokio::select! {
            result = &mut write => return Some(result.is_ok()),
            () = tokio::time::sleep(ABANDONED_CHECK) => {
                if stream.is_abandoned() {
                    return None;
                }
            }
        }
    }
}

async fn tell_pipes(
    stream: &mut SharedStream,
    stdout: &mut tokio::net::unix::pipe::Receiver,
    stderr: &mut tokio::net::unix::pipe::Receiver,
    ending: &mut Watch,
) -> Option<Ending> {
    let mut out_buffer = vec![0; OUTPUT_CHUNK];
    let mut error_buffer = vec![0; OUTPUT_CHUNK];
    let (mut out_open, mut error_open) = (true, true);
    let ended = loop {
        tokio::select! {
            count = stdout.read(&mut out_buffer), if out_open => match count {
                Ok(count) if count > 0 => frame::write_data(stream, &out_buffer[..count]).await.ok()?,
                _ => out_open = false,
            },
            count = stderr.read(&mut error_buffer), if error_open => match count {
                Ok(count) if count > 0 => frame::write_error_data(stream, &error_buffer[..count]).await.ok()?,
                _ => error_open = false,
            },
            ended = ending.ended() => break ended?,
        }
    };
    // All that the command wrote is in the pipes by now. A child that it left behind may hold them open for
    // ever, so only what is there is told.
    // Read past the runtime, which may not have heard of the last bytes yet.
    while out_open
        && let Ok(count) = rustix::io::read(&*stdout, &mut out_buffer)
        && count > 0
    {
        frame::write_data(stream, &out_buffer[..count]).await.ok()?;
    }
    while error_open
        && let Ok(count) = rustix::io::read(&*stderr, &mut error_buffer)
        && count > 0
    {
        frame::write_error_data(stream, &error_buffer[..count])
            .await
            .ok()?;
    }
    Some(ended)
}

async fn tell_terminal(
    stream: &mut SharedStream,
    terminal: &mut (impl AsyncRead + Unpin),
    ending: &mut Watch,
) -> Option<Ending> {
    let mut buffer = vec![0; OUTPUT_CHUNK];
    let ended = loop {
        tokio::select! {
            count = terminal.read(&mut buffer) => match count {
                Ok(count) if count > 0 => frame::write_data(stream, &buffer[..count]).await.ok()?,
                // Hung up: nobody has it open any more.
                _ => return ending.ended().await,
            },
            ended = ending.ended() => break ended?,
        }
    };
    while let Ok(Ok(count)) = tokio::time::timeout(TERMINAL_DRAIN, terminal.read(&mut buffer)).await
        && count > 0
    {
        frame::write_data(stream, &buffer[..count]).await.ok()?;
    }
    Some(ended)
}

async fn hang_up(leader: Pid, mut ending: Watch) {
    session::signal_session(leader, Signal::HUP);
    session::signal_session(leader, Signal::CONT);
    // Ended or not: what is left is killed.
    let _ = tokio::time::timeout(HANGUP_GRACE, ending.ended()).await;
    session::signal_session(leader, Signal::KILL);
}
