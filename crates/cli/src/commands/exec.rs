//! `hypeman exec`.

use clap::Args;
use hypeman_api::exec::ExecRequest;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::{Context, variable};
use crate::error::CliError;
use crate::exec::{Input, RawMode, Terminal, session, spawn_stdin};
use crate::{output, websocket};

/// How much input may wait on its way to the guest, in messages.
const INPUT_QUEUE: usize = 16;

/// Arguments of `exec`.
#[derive(Debug, Args)]
#[command(after_help = "\
The exit code is the command's own (128+n when signal n killed it, 124 after --timeout, 127 when it \
does not exist); 130 after Ctrl-C, 254 when a snapshot of the instance ended it (Firecracker only), 255 \
when exec itself failed.

Options stand before the instance; all that follows it is the command. A terminal is used when \
standard input and output are one; -t insists on it, -T does without.

Examples:
  hypeman exec web uname -a
  hypeman exec -it web sh
  hypeman exec --cwd /srv -e DEBUG=1 web ./run --flag
  tar c dir | hypeman exec web tar x -C /srv
  while read name; do hypeman exec -n web touch $name; done < names")]
pub struct ExecArgs {
    /// Stream standard input (always done; accepted for habit)
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal
    #[arg(short, long, conflicts_with = "no_tty")]
    tty: bool,
    /// Give the command no terminal
    #[arg(short = 'T', long)]
    no_tty: bool,
    /// Leave standard input alone
    #[arg(short, long, conflicts_with = "interactive")]
    no_stdin: bool,
    /// Set an environment variable; KEY alone takes its value from here
    #[arg(short, long = "env", value_parser = variable, value_name = "KEY=VALUE")]
    env: Vec<(String, String)>,
    /// Working directory in the guest
    #[arg(short = 'w', long, value_name = "DIRECTORY")]
    cwd: Option<String>,
    /// Kill the command after this many seconds
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u32>,
    /// Wait this many seconds for an instance that is still starting
    #[arg(long, value_name = "SECONDS")]
    wait_for_agent: Option<u32>,
    /// Id, name or unique prefix of the id
    instance: String,
    /// Command and its arguments; a shell when absent
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Runs a command in a guest and answers its exit code.
pub(crate) async fn run(context: &Context, arguments: ExecArgs) -> Result<u8, CliError> {
    execute(context, arguments)
        .await
        .map_err(|failure| CliError::Exec(Box::new(failure)))
}

async fn execute(context: &Context, arguments: ExecArgs) -> Result<u8, CliError> {
    let terminal = Terminal::of_process();
    let tty =
        arguments.tty || (!arguments.no_tty && !arguments.no_stdin && terminal.input && terminal.output);
    let size = if tty { Terminal::size() } else { None };
    let request = ExecRequest {
        command: arguments.command,
        tty,
        env: (!arguments.env.is_empty()).then(|| arguments.env.into_iter().collect()),
        cwd: arguments.cwd,
        timeout: arguments.timeout,
        wait_for_agent: arguments.wait_for_agent,
        rows: size.map(|(rows, _)| rows),
        cols: size.map(|(_, columns)| columns),
    };
    let path = ["instances", &arguments.instance, "exec"];
    let connecting = websocket::connect(&context.client, &path);
    let socket = tokio::select! {
        socket = connecting => socket?,
        _ = tokio::signal::ctrl_c() => return Err(CliError::Interrupted),
    };

    let (sender, input) = mpsc::channel(INPUT_QUEUE);
    if arguments.no_stdin {
        // The channel is new and has room.
        let _ = sender.try_send(Input::End);
    } else {
        spawn_stdin(sender.clone());
    }
    // Only a terminal of our own is switched: with -t and a pipe there is nothing to switch.
    let raw = if tty && terminal.input {
        Some(
            RawMode::enter()
                .map_err(|failure| CliError::io("cannot switch the terminal to raw mode", failure))?,
        )
    } else {
        None
    };
    let outcome = tokio::select! {
        outcome = session(socket, &request, input, write_output) => outcome,
        failure = forward_resizes(tty, sender) => Err(failure),
        interrupted = interruption() => Err(interrupted),
    };
    drop(raw);
    outcome
}

fn write_output(bytes: &[u8]) -> std::io::Result<()> {
    output::bytes_out(bytes).map_err(|failure| match failure {
        CliError::Io { source, .. } => source,
        other => std::io::Error::other(other.to_string()),
    })
}

/// Tells the guest each new size of the terminal. Ends only when signals cannot be had.
async fn forward_resizes(tty: bool, sender: mpsc::Sender<Input>) -> CliError {
    if !tty {
        drop(sender);
        return std::future::pending().await;
    }
    let mut changes = match signal(SignalKind::window_change()) {
        Ok(changes) => changes,
        Err(failure) => return CliError::io("cannot watch the size of the terminal", failure),
    };
    while changes.recv().await.is_some() {
        if let Some((rows, columns)) = Terminal::size() {
            // When the session no longer reads, it is ending.
            let _ = sender.send(Input::Resize { rows, columns }).await;
        }
    }
    std::future::pending().await
}

/// Ctrl-C (in raw mode it is a byte for the guest and does not come here), or the terminal going away.
async fn interruption() -> CliError {
    let (terminate, hang_up) = (signal(SignalKind::terminate()), signal(SignalKind::hangup()));
    let (Ok(mut terminate), Ok(mut hang_up)) = (terminate, hang_up) else {
        let _ = tokio::signal::ctrl_c().await;
        return CliError::Interrupted;
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
        _ = hang_up.recv() => {}
    }
    CliError::Interrupted
}
