//! `hypeman logs`.

use clap::{Args, ValueEnum};
use futures::StreamExt as _;

use super::Context;
use crate::args::Format;
use crate::error::{CliError, exit};
use crate::output;
use crate::sse::Events;

/// Arguments of `logs`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hypeman logs web                       the last 100 lines of the console
  hypeman logs -f web                    and everything that follows, until Ctrl-C
  hypeman logs --tail 1000 -s vmm web    what the hypervisor wrote
  hypeman logs -s hypeman web            what the server did with the instance")]
pub struct LogsArgs {
    /// Id, name or unique prefix of the id
    instance: String,
    /// Go on with new lines until Ctrl-C
    #[arg(short, long)]
    follow: bool,
    /// How many lines from the end
    #[arg(short = 'n', long, default_value_t = 100, value_name = "LINES")]
    tail: u32,
    /// Which log
    #[arg(short, long, value_enum, default_value_t)]
    source: Source,
}

/// Which log.
#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(crate) enum Source {
    /// Console of the guest
    #[default]
    App,
    /// The hypervisor's own output
    Vmm,
    /// What the server did
    Hypeman,
}

impl Source {
    fn name(self) -> &'static str {
        match self {
            Self::App => "app",
            Self::Vmm => "vmm",
            Self::Hypeman => "hypeman",
        }
    }
}

/// Prints a log and answers the exit code.
pub(crate) async fn run(context: &Context, arguments: &LogsArgs) -> Result<u8, CliError> {
    let printing = print(
        context,
        &arguments.instance,
        arguments.tail,
        arguments.follow,
        arguments.source,
    );
    if arguments.follow {
        tokio::select! {
            outcome = printing => outcome?,
            // The usual end of following: told by the code, as everywhere, and not by an error.
            _ = tokio::signal::ctrl_c() => return Ok(exit::INTERRUPTED),
        }
    } else {
        printing.await?;
    }
    Ok(exit::SUCCESS)
}

/// Prints a log to standard output, line by line.
pub(crate) async fn print(
    context: &Context,
    instance: &str,
    tail: u32,
    follow: bool,
    source: Source,
) -> Result<(), CliError> {
    let format = context.global.format;
    lines(context, instance, tail, follow, source, |line| match format {
        // A console is a stream of bytes: on a terminal its colours are wanted, and it is the user's own guest.
        Format::Auto | Format::Table | Format::Raw => output::line(line),
        _ => output::line(&serde_json::to_string(line).unwrap_or_default()),
    })
    .await
}

/// Hands the lines of a log to `each` until the log ends.
pub(crate) async fn lines(
    context: &Context,
    instance: &str,
    tail: u32,
    follow: bool,
    source: Source,
    mut each: impl FnMut(&str) -> Result<(), CliError>,
) -> Result<(), CliError> {
    let query = [
        ("tail".to_owned(), tail.to_string()),
        ("follow".to_owned(), follow.to_string()),
        ("source".to_owned(), source.name().to_owned()),
    ];
    let response = context
        .client
        .open(&["instances", instance, "logs"], &query)
        .await?;
    let mut chunks = response.bytes_stream();
    let mut events = Events::default();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|failure| CliError::failed(format!("the log broke off: {failure}")))?;
        for line in events.feed(&chunk)? {
            each(&line)?;
        }
    }
    Ok(())
}
