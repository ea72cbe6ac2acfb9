//! `hypeman pager`: serves page faults, in this process, until nobody needs it.
//!
//! ```text
//! own session ─► limits raised ─► the socket from standard input, or a new one ─► serve
//! ```
//! The server starts it and goes on without it being its child: it ends by itself, with its last machine.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use hypeman_pager::{Recording, ServiceOptions, serve};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::error::CliError;

/// Killing it would stop machines that could be saved by ending something else.
const OOM_SCORE: &str = "-500";

/// Arguments of `pager`.
#[derive(Debug, Args)]
#[command(after_help = "\
It ends by itself: with its last machine when it was told to drain, and when no server and no machine needs it.
Machines that it serves hang when it is killed; the server then stops them.

Examples:
  hypeman pager --socket /run/hypeman/pager.sock")]
pub struct PagerArgs {
    /// Where servers connect
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// The socket listens already, as standard input
    #[arg(long)]
    inherited: bool,
    /// The release that starts it; a server of another one has it drain
    #[arg(long, value_name = "VERSION", default_value = env!("CARGO_PKG_VERSION"))]
    release: String,
    /// Bytes of memory images to keep in RAM
    #[arg(long, value_name = "BYTES", default_value_t = 4 << 30)]
    cache_bytes: u64,
    /// Fill all of a machine's memory and let it go after this time; 0 never does
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = super::duration)]
    graduate_after: Duration,
    /// End after this time without a server and without a machine
    #[arg(long, value_name = "DURATION", default_value = "1m", value_parser = super::duration)]
    lonely: Duration,
}

/// Serves until nobody needs it.
pub(crate) fn run(arguments: &PagerArgs) -> Result<(), CliError> {
    start_log()?;
    // It fails where this process leads a session already, which is what is wanted.
    let _ = rustix::process::setsid();
    raise_limits();
    let failed = |failure| CliError::io("cannot listen", failure);
    let listener = match arguments.inherited {
        true => inherited().map_err(failure_of_standard_input)?,
        false => UnixListener::bind(&arguments.socket).map_err(failed)?,
    };
    tracing::info!(socket = %arguments.socket.display(), release = arguments.release, "the pager listens");
    let options = ServiceOptions {
        socket: arguments.socket.clone(),
        release: arguments.release.clone(),
        cache_bytes: arguments.cache_bytes,
        graduate_after: (!arguments.graduate_after.is_zero()).then_some(arguments.graduate_after),
        recording: Recording::default(),
        lonely: arguments.lonely,
    };
    serve(listener, options).map_err(|failure| CliError::io("cannot serve page faults", failure))?;
    tracing::info!("nobody needs the pager any more");
    Ok(())
}

fn failure_of_standard_input(failure: io::Error) -> CliError {
    CliError::io(
        "standard input is no socket that listens; leave out --inherited",
        failure,
    )
}

fn inherited() -> io::Result<UnixListener> {
    let standard_input = io::stdin();
    let descriptor = standard_input.as_fd();
    if !rustix::net::sockopt::socket_acceptconn(descriptor)? {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(UnixListener::from(descriptor.try_clone_to_owned()?))
}

/// Each machine takes a handful of descriptors, each image one for each of its layers.
fn raise_limits() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "the limit of open files stays low");
    }
    // Only root may; others are as likely to be chosen as anybody.
    let _ = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE);
}

fn start_log() -> Result<(), CliError> {
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(false)
        .with_max_level(tracing_subscriber::filter::LevelFilter::INFO)
        .try_init()
        .map_err(|failure| CliError::failed(format!("cannot start the log: {failure}")))
}
