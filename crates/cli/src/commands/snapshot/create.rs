//! `hypeman snapshot create` and `fork`.

use clap::Args;
use hypeman_api::instance::Hypervisor;
use hypeman_api::snapshot::{CreateSnapshotRequest, ForkSnapshotRequest, SnapshotKind};
use reqwest::Method;

use super::find;
use crate::commands::run::hypervisor;
use crate::commands::standby::{CompressionArgs, TargetArgs, forked};
use crate::commands::{Context, pair};
use crate::error::CliError;
use crate::output;
use crate::progress::Progress;

/// Arguments of `snapshot create`.
#[derive(Debug, Args)]
#[command(after_help = "\
Prints the id of the snapshot on standard output. A running instance goes on.

Examples:
  hypeman snapshot create web
  hypeman snapshot create web --name before-upgrade -l team=core --compression-algorithm zstd
  hypeman snapshot create web --kind Stopped      of a stopped instance: its disk alone")]
pub struct CreateArgs {
    /// Id, name or unique prefix of the id
    instance: String,
    /// Standby (memory and disk) or Stopped (disk of a stopped instance)
    #[arg(long, value_parser = kind, default_value = "Standby", value_name = "KIND")]
    kind: SnapshotKind,
    /// Name, unique among the snapshots of the instance
    #[arg(long)]
    name: Option<String>,
    /// Put a tag on the snapshot (repeat for more)
    #[arg(short = 'l', long = "tag", visible_alias = "metadata", value_parser = pair, value_name = "KEY=VALUE")]
    tags: Vec<(String, String)>,
    #[command(flatten)]
    compression: CompressionArgs,
}

/// Arguments of `snapshot fork`.
#[derive(Debug, Args)]
#[command(after_help = "\
Prints the id of each fork on standard output.

Examples:
  hypeman snapshot fork before-upgrade web-2
  hypeman snapshot fork q7z1w7l2af4l8y7q1h7g2m3s worker --count 20      worker-1 to worker-20
  hypeman snapshot fork cold web-3 --target-state Running --target-hypervisor qemu-microvm")]
pub struct ForkArgs {
    /// Id or name of the snapshot
    snapshot: String,
    /// Name of the fork
    name: String,
    #[command(flatten)]
    target: TargetArgs,
    /// Another hypervisor, for snapshots of kind Stopped
    #[arg(long, value_parser = hypervisor, value_name = "KIND")]
    target_hypervisor: Option<Hypervisor>,
}

/// Reads a kind in any case.
pub(super) fn kind(text: &str) -> Result<SnapshotKind, String> {
    match text.to_ascii_lowercase().as_str() {
        "standby" => Ok(SnapshotKind::Standby),
        "stopped" => Ok(SnapshotKind::Stopped),
        _ => text.parse(),
    }
}

/// Takes a snapshot.
pub(super) async fn create(context: &Context, arguments: &CreateArgs) -> Result<(), CliError> {
    if let Some(name) = &arguments.name {
        hypeman_core::name::check(name)
            .map_err(|failure| CliError::usage(format!("--name {name:?}: {failure}")))?;
    }
    let body = CreateSnapshotRequest {
        kind: arguments.kind,
        name: arguments.name.clone(),
        tags: arguments.tags.iter().cloned().collect(),
        compression: arguments.compression.config()?,
    };
    let mut progress = Progress::spinner(context.output.quiet());
    progress.say(&format!("capturing {}", arguments.instance));
    let path = ["instances", &arguments.instance, "snapshots"];
    let snapshot = context.client.call(Method::POST, &path, Some(&body)).await;
    progress.finish();
    let snapshot = snapshot?;
    context.output.object(&snapshot, "id", || {
        format!("{}\n", output::clean(snapshot.text("id").unwrap_or("?")))
    })
}

/// Forks a snapshot.
pub(super) async fn fork(context: &Context, arguments: &ForkArgs) -> Result<(), CliError> {
    let id = find(context, &arguments.snapshot, None).await?;
    let body = ForkSnapshotRequest {
        name: arguments.name.clone(),
        target_state: arguments.target.target_state,
        target_hypervisor: arguments.target_hypervisor,
        count: arguments.target.count,
    };
    let mut progress = Progress::spinner(context.output.quiet());
    progress.say(&format!("forking {}", arguments.snapshot));
    let path = ["snapshots", &id, "fork"];
    let answer = context.client.call(Method::POST, &path, Some(&body)).await;
    progress.finish();
    forked(context, answer?)
}
