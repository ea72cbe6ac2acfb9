//! One server that is connected: its questions in their order, and everything that happens.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};

use hypeman_snapshots::PAGE_BYTES;

use crate::background;
use crate::machine::{Halt, Machine, Parts};
use crate::protocol::{
    Call, Line, MAX_LINE, MAX_OVERLAY_PAGES, MachineState, PROTOCOL, Refused, RefusedCode, Registration,
    Reply, Request,
};
use crate::service::Service;

/// Longest path of a socket address, with its terminating zero.
const MAX_SOCKET_PATH: usize = 108;

/// How long a server may take to hear one line.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);

fn refuse(code: RefusedCode, message: impl Into<String>) -> Refused {
    Refused {
        code,
        message: message.into(),
    }
}

/// Serves one server until it hangs up.
pub(crate) fn run(service: &Arc<Service>, stream: &UnixStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    let peer = rustix::net::sockopt::socket_peercred(stream)?.uid;
    if peer != rustix::process::geteuid() {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("user {} is not the pager's own", peer.as_raw()),
        ));
    }
    let (queue, lines) = service.audience.line();
    let output = stream.try_clone()?;
    output.set_write_timeout(Some(PATIENCE))?;
    let writer = std::thread::Builder::new()
        .name("answers".into())
        .spawn(move || write_lines(output, &lines))?;
    let outcome = read_calls(service, stream, &queue);
    drop(queue);
    if service.is_ending() {
        // The last events matter: they say that machines ended well.
        let _ = writer.join();
    }
    // Otherwise the audience may still hold the queue's other end; the writer ends with the stream.
    let _ = stream.shutdown(std::net::Shutdown::Both);
    outcome
}

fn write_lines(mut output: UnixStream, lines: &Receiver<String>) {
    while let Ok(line) = lines.recv() {
        if writeln!(output, "{line}").is_err() {
            break;
        }
    }
    // Whoever was cut off must see it.
    let _ = output.shutdown(std::net::Shutdown::Both);
}

fn read_calls(service: &Arc<Service>, stream: &UnixStream, queue: &SyncSender<String>) -> io::Result<()> {
    let mut input = BufReader::new(stream);
    let mut known = false;
    loop {
        let mut line = String::new();
        let length = (&mut input).take(MAX_LINE as u64).read_line(&mut line)?;
        if length == 0 {
            return Ok(());
        }
        if !line.ends_with('\n') {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a line is too long or cut short",
            ));
        }
        let call: Call = serde_json::from_str(&line)?;
        let outcome = match call.request {
            Request::Hello { protocol, .. } if protocol == PROTOCOL => {
                if !std::mem::replace(&mut known, true) {
                    service.audience.join(queue.clone());
                }
                Ok(Reply::Hello(service.hello()))
            }
            Request::Hello { protocol, release } => Err(refuse(
                RefusedCode::Protocol,
                format!(
                    "this pager was started by release {} and speaks protocol {PROTOCOL}, release {release} speaks \
                     {protocol}: it can only be told to drain",
                    service.options.release
                ),
            )),
            Request::Drain => {
                service.drain();
                Ok(Reply::Done)
            }
            _ if !known => Err(refuse(RefusedCode::Protocol, "say hello first")),
            request => answer(service, request),
        };
        let line = match outcome {
            Ok(ok) => Line::Ok { id: call.id, ok },
            Err(refused) => Line::Refused { id: call.id, refused },
        };
        if queue.send(serde_json::to_string(&line)?).is_err() {
            return Ok(());
        }
    }
}

fn answer(service: &Arc<Service>, request: Request) -> Result<Reply, Refused> {
    match request {
        Request::Register(registration) => register(service, *registration).map(|()| Reply::Done),
        Request::Forget { machine } => {
            forget(service, &machine)?;
            Ok(Reply::Done)
        }
        Request::Settle { machine } => {
            let machine = find(service, &machine)?;
            if machine.is_serving() {
                background::settle(&machine).or_else(|halt| match halt {
                    Halt::Failed { reason, .. } => Err(refuse(RefusedCode::Host, reason)),
                    // Nobody will read the memory of a process that is gone.
                    Halt::Changing | Halt::Ended => Ok(()),
                })?;
            }
            Ok(Reply::Done)
        }
        Request::Graduate { machine } => {
            service.graduate(&find(service, &machine)?.id);
            Ok(Reply::Done)
        }
        Request::Stats => Ok(Reply::Stats(Box::new(service.stats()))),
        Request::Health => Ok(Reply::Health(service.health())),
        Request::Drain | Request::Hello { .. } => Ok(Reply::Done),
    }
}

fn find(service: &Service, machine: &str) -> Result<Arc<Machine>, Refused> {
    let known = service.machines().get(machine).map(Arc::clone);
    known.ok_or_else(|| {
        refuse(
            RefusedCode::NotFound,
            format!("no machine {machine} is served here"),
        )
    })
}

fn forget(service: &Service, machine: &str) -> Result<(), Refused> {
    let machine = find(service, machine)?;
    machine.stop();
    // Its thread has ended before: nobody else takes it from the list.
    if machine.state() == MachineState::Graduated {
        service.forget(&machine);
    }
    Ok(())
}

/// What makes sense in a name: it is shown, and becomes the name of a thread.
fn is_name(text: &str) -> bool {
    let fine = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=64).contains(&text.len()) && text.bytes().all(fine)
}

fn check(registration: &Registration) -> Result<(), String> {
    let page = PAGE_BYTES as u64;
    if !is_name(&registration.machine) {
        return Err("a machine's name has 1 to 64 lower-case letters, digits and dashes".into());
    }
    let path = registration.socket.as_os_str().len();
    if !registration.socket.is_absolute() || !registration.store.is_absolute() || path >= MAX_SOCKET_PATH {
        return Err(format!(
            "paths must be absolute, and that of a socket shorter than {MAX_SOCKET_PATH} bytes"
        ));
    }
    if registration.overlay.len() > MAX_OVERLAY_PAGES {
        return Err(format!("a machine may have {MAX_OVERLAY_PAGES} pages for itself"));
    }
    let mut offsets = std::collections::HashSet::new();
    for own in &registration.overlay {
        let whole = own.bytes.len() == PAGE_BYTES && own.offset.is_multiple_of(page);
        if !whole || own.offset >= registration.memory_bytes || !offsets.insert(own.offset) {
            return Err("a machine's own pages are whole, within its memory, and named once".into());
        }
    }
    Ok(())
}

fn register(service: &Arc<Service>, registration: Registration) -> Result<(), Refused> {
    check(&registration).map_err(|message| refuse(RefusedCode::Invalid, message))?;
    let image = service
        .images
        .open(&registration.store, registration.image)
        .map_err(|error| {
            let code = match error.is_damage() {
                true => RefusedCode::Damaged,
                false => RefusedCode::Image,
            };
            refuse(code, error.to_string())
        })?;
    if image.reader().memory_bytes() != registration.memory_bytes {
        let found = image.reader().memory_bytes();
        let message = format!(
            "the image has {found} bytes of guest memory, not {}",
            registration.memory_bytes
        );
        return Err(refuse(RefusedCode::Invalid, message));
    }
    let set = registration.working_set.then(|| image.reader().working_set());
    let recording = matches!(set, Some(None)).then_some(service.options.recording);
    let host = |error: io::Error| refuse(RefusedCode::Host, format!("cannot listen for the VMM: {error}"));
    let overlay = registration
        .overlay
        .into_iter()
        .map(|own| (own.offset, own.bytes));
    let parts = Parts {
        id: registration.machine,
        image,
        socket: registration.socket,
        overlay: overlay.collect(),
        recording,
    };
    let machine =
        Machine::new(parts, Arc::clone(&service.cache), Arc::clone(&service.audience)).map_err(host)?;
    let machine = Arc::new(machine);
    let mut machines = service.machines();
    if service.is_draining() {
        return Err(refuse(RefusedCode::Draining, "this pager takes no more machines"));
    }
    if machines.contains_key(&machine.id) {
        let message = format!("machine {} is served already", machine.id);
        return Err(refuse(RefusedCode::Exists, message));
    }
    let listener = listen(&machine.socket).map_err(host)?;
    service.start(&machine, listener, set.flatten()).map_err(host)?;
    machines.insert(machine.id.clone(), machine);
    Ok(())
}

/// Listens where only our user can connect, and whom the socket is given to. Refuses a path that exists: it may be somebody else's.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    let prepare = || {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)
    };
    prepare().inspect_err(|_| {
        let _ = std::fs::remove_file(path);
    })?;
    Ok(listener)
}
