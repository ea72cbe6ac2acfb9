//! `hypeman snapshot export` and `import`: a snapshot as one file, from one server to another.

use std::fs::File;
use std::io::{self, IsTerminal as _, Read};
use std::path::Path;

use clap::Args;
use futures::StreamExt as _;
use tokio::sync::mpsc;

use super::find;
use crate::commands::Context;
use crate::error::CliError;
use crate::output;
use crate::progress::Progress;

/// Bytes that are read of a file together.
const PIECE: usize = 256 << 10;
/// Pieces that wait to be sent.
const WAITING: usize = 4;

/// Arguments of `snapshot export`.
#[derive(Debug, Args)]
#[command(after_help = "\
The file checks itself when it is imported. It holds all of the instance, its environment and memory
included: keep it like a secret.

Examples:
  hypeman snapshot export before-upgrade
  hypeman snapshot export before-upgrade /backup/web.hypeman
  hypeman snapshot export before-upgrade - | ssh other hypeman snapshot import -")]
pub struct ExportArgs {
    /// Id or name
    snapshot: String,
    /// Where it goes; `-` is standard output. SNAPSHOT.hypeman when absent
    #[arg(value_name = "FILE|-")]
    file: Option<String>,
}

/// Arguments of `snapshot import`.
#[derive(Debug, Args)]
#[command(after_help = "\
The image that the instance was made of need not be on the server. Captured memory goes on only where
hypervisor, processor and guest kernel are the same; a Stopped snapshot starts anywhere. Import only what
comes from servers that you trust: the state of the devices is loaded by the hypervisor.

Examples:
  hypeman snapshot import web.hypeman
  hypeman snapshot import web.hypeman --name from-berlin
  hypeman snapshot import - < web.hypeman")]
pub struct ImportArgs {
    /// What an export wrote; `-` is standard input
    #[arg(value_name = "FILE|-")]
    file: String,
    /// Name of the new snapshot; the one in the file when absent
    #[arg(long)]
    name: Option<String>,
}

/// Exports a snapshot.
pub(super) async fn export(context: &Context, arguments: &ExportArgs) -> Result<(), CliError> {
    let to_stdout = arguments.file.as_deref() == Some("-");
    if to_stdout && io::stdout().is_terminal() {
        return Err(CliError::usage(
            "an exported snapshot is not for terminals: name a file, or send the output elsewhere",
        ));
    }
    let id = find(context, &arguments.snapshot, None).await?;
    let response = context.client.open(&["snapshots", &id, "export"], &[]).await?;
    let mut progress = Progress::of_bytes(context.output.quiet(), None);
    progress.say(&format!("exporting {}", arguments.snapshot));
    if to_stdout {
        return copy(response, &progress, &mut io::stdout().lock()).await;
    }
    let name = match &arguments.file {
        Some(file) => file.clone(),
        None => format!("{}.hypeman", arguments.snapshot),
    };
    let path = Path::new(&name);
    let context_of = |source| CliError::io(format!("cannot write {name}"), source);
    if std::fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
        // A device or a pipe is written to, not replaced.
        let mut device = File::options().write(true).open(path).map_err(context_of)?;
        return copy(response, &progress, &mut device).await;
    }
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // Removed unless all of it arrived; readable by its owner alone.
    let mut file = tempfile::NamedTempFile::new_in(directory).map_err(context_of)?;
    copy(response, &progress, file.as_file_mut()).await?;
    file.as_file().sync_all().map_err(context_of)?;
    file.persist(path).map_err(|error| context_of(error.error))?;
    let synced = File::open(directory).and_then(|directory| directory.sync_all());
    synced.map_err(context_of)?;
    progress.finish();
    if context.output.human() {
        output::line(&output::clean(&name))?;
    }
    Ok(())
}

/// Writes an answer as it comes.
async fn copy(
    response: reqwest::Response,
    progress: &Progress,
    target: &mut (impl io::Write + ?Sized),
) -> Result<(), CliError> {
    let mut pieces = response.bytes_stream();
    let failed = |source| CliError::io("cannot write the exported snapshot", source);
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|failure| CliError::failed(format!("the export broke off: {failure}")))?;
        target.write_all(&piece).map_err(failed)?;
        progress.advance(piece.len() as u64);
    }
    target.flush().map_err(failed)
}

/// Imports a snapshot.
pub(super) async fn import(context: &Context, arguments: &ImportArgs) -> Result<(), CliError> {
    if let Some(name) = &arguments.name {
        hypeman_core::name::check(name)
            .map_err(|failure| CliError::usage(format!("--name {name:?}: {failure}")))?;
    }
    let (source, total): (Box<dyn Read + Send>, Option<u64>) = if arguments.file == "-" {
        if io::stdin().is_terminal() {
            return Err(CliError::usage(
                "there is no exported snapshot on standard input: name a file, or send one",
            ));
        }
        (Box::new(io::stdin()), None)
    } else {
        let unreadable = |source| CliError::io(format!("cannot read {}", arguments.file), source);
        let file = File::open(&arguments.file).map_err(unreadable)?;
        let metadata = file.metadata().map_err(unreadable)?;
        if metadata.is_dir() {
            return Err(unreadable(io::ErrorKind::IsADirectory.into()));
        }
        (Box::new(file), metadata.is_file().then_some(metadata.len()))
    };
    let mut progress = Progress::of_bytes(context.output.quiet(), total);
    progress.say(&format!("importing {}", arguments.file));
    let pieces = futures::stream::unfold((read(source), progress), |(mut pieces, progress)| async {
        let piece = pieces.recv().await?;
        if let Ok(piece) = &piece {
            progress.advance(piece.len() as u64);
        }
        Some((piece, (pieces, progress)))
    });
    let query: Vec<_> = arguments
        .name
        .iter()
        .map(|name| ("name".to_owned(), name.clone()))
        .collect();
    let body = reqwest::Body::wrap_stream(pieces);
    let snapshot = context
        .client
        .upload(&["snapshots", "import"], &query, body)
        .await?;
    context.output.object(&snapshot, "id", || {
        format!("{}\n", output::clean(snapshot.text("id").unwrap_or("?")))
    })
}

/// Reads on a thread of its own until the end, or until nobody takes more.
///
/// A blocked read cannot be cancelled, so the thread is never joined: it goes with the process.
fn read(mut source: Box<dyn Read + Send>) -> mpsc::Receiver<io::Result<Vec<u8>>> {
    let (sender, receiver) = mpsc::channel(WAITING);
    std::thread::spawn(move || {
        loop {
            let mut piece = vec![0; PIECE];
            let read = match source.read(&mut piece) {
                Ok(0) => return,
                Ok(length) => {
                    piece.truncate(length);
                    Ok(piece)
                }
                Err(interrupted) if interrupted.kind() == io::ErrorKind::Interrupted => continue,
                Err(failure) => Err(failure),
            };
            let broken = read.is_err();
            if sender.blocking_send(read).is_err() || broken {
                return;
            }
        }
    });
    receiver
}
