//! `hypeman snapshot …`

mod create;
mod list;
mod schedule;
mod travel;
mod tree;
mod verify;

use clap::{Args, Subcommand};
use hypeman_api::instance::Hypervisor;
use hypeman_api::snapshot::{RestoreSnapshotRequest, SnapshotTargetState};
use hypeman_core::id::is_id;
use jiff::Timestamp;
use reqwest::Method;

use super::Context;
use super::lifecycle::{announce, each};
use super::run::hypervisor;
use super::standby::target_state;
use crate::document::Document;
use crate::error::CliError;
use crate::output::{self, Table, age};
use crate::progress::Progress;

/// Commands about snapshots.
#[derive(Debug, Subcommand)]
#[command(after_help = "\
A snapshot is named by its id, or by its name where only one snapshot has it.

Examples:
  hypeman snapshot create web --name before-upgrade
  hypeman snapshot list --source web
  hypeman snapshot restore web before-upgrade
  hypeman snapshot fork before-upgrade web-2
  hypeman snapshot tree")]
pub enum SnapshotCommand {
    /// Take a snapshot of an instance
    Create(create::CreateArgs),
    /// List snapshots, the newest first
    #[command(visible_alias = "ls")]
    List(list::ListArgs),
    /// Show a snapshot
    Get(GetArgs),
    /// Delete snapshots
    #[command(visible_alias = "rm")]
    Delete(DeleteArgs),
    /// Give an instance back what a snapshot of it holds
    Restore(RestoreArgs),
    /// Make instances out of a snapshot
    Fork(create::ForkArgs),
    /// Read and check every byte of snapshots
    Verify(verify::VerifyArgs),
    /// Show what snapshots cost on disk
    Usage(UsageArgs),
    /// Write a snapshot into one file that any server can import
    Export(travel::ExportArgs),
    /// Make a snapshot of a file that an export wrote
    Import(travel::ImportArgs),
    /// Draw which snapshot descends from which
    Tree(tree::TreeArgs),
    /// Take snapshots of an instance again and again
    #[command(subcommand)]
    Schedule(schedule::ScheduleCommand),
}

/// Arguments of `snapshot get`.
#[derive(Debug, Args)]
pub struct GetArgs {
    /// Id or name
    snapshot: String,
}

/// Arguments of `snapshot delete`.
#[derive(Debug, Args)]
pub struct DeleteArgs {
    /// Ids or names
    #[arg(required = true, value_name = "SNAPSHOT")]
    snapshots: Vec<String>,
}

/// Arguments of `snapshot restore`.
#[derive(Debug, Args)]
#[command(after_help = "\
The instance must not be running. What it has on its disk now is lost.

Examples:
  hypeman snapshot restore web before-upgrade
  hypeman snapshot restore web q7z1w7l2af4l8y7q1h7g2m3s --target-state Stopped
  hypeman snapshot restore web cold --target-hypervisor qemu-microvm      snapshots of kind Stopped only")]
pub struct RestoreArgs {
    /// Id, name or unique prefix of the id of the instance
    instance: String,
    /// Id or name of a snapshot of it
    snapshot: String,
    /// State afterwards: Running, Standby or Stopped; what the kind suggests when absent
    #[arg(long, value_parser = target_state, value_name = "STATE")]
    target_state: Option<SnapshotTargetState>,
    /// Another hypervisor, for snapshots of kind Stopped
    #[arg(long, value_parser = hypervisor, value_name = "KIND")]
    target_hypervisor: Option<Hypervisor>,
}

/// Arguments of `snapshot usage`.
#[derive(Debug, Args)]
#[command(after_help = "\
OWN is stored for this snapshot alone, SHARED once for it and others; FREED is what deleting it gives back.

Examples:
  hypeman snapshot usage before-upgrade
  hypeman snapshot usage $(hypeman snapshot list -q)")]
pub struct UsageArgs {
    /// Ids or names
    #[arg(required = true, value_name = "SNAPSHOT")]
    snapshots: Vec<String>,
}

/// Runs a command about snapshots.
pub(crate) async fn run(context: &Context, command: &SnapshotCommand) -> Result<(), CliError> {
    match command {
        SnapshotCommand::Create(arguments) => create::create(context, arguments).await,
        SnapshotCommand::List(arguments) => list::run(context, arguments).await,
        SnapshotCommand::Get(arguments) => {
            let id = find(context, &arguments.snapshot, None).await?;
            let snapshot = context.client.get(&["snapshots", &id], &[]).await?;
            let shown = || describe(&snapshot, Timestamp::now());
            context.output.object(&snapshot, "id", shown)
        }
        SnapshotCommand::Delete(arguments) => {
            each(context, &arguments.snapshots, async |snapshot| {
                let id = find(context, snapshot, None).await?;
                context.client.delete(&["snapshots", &id], &[]).await?;
                if context.output.human() {
                    output::line(&output::clean(snapshot))?;
                }
                Ok(())
            })
            .await
        }
        SnapshotCommand::Restore(arguments) => restore(context, arguments).await,
        SnapshotCommand::Fork(arguments) => create::fork(context, arguments).await,
        SnapshotCommand::Verify(arguments) => verify::run(context, arguments).await,
        SnapshotCommand::Usage(arguments) => usage(context, arguments).await,
        SnapshotCommand::Export(arguments) => travel::export(context, arguments).await,
        SnapshotCommand::Import(arguments) => travel::import(context, arguments).await,
        SnapshotCommand::Tree(arguments) => tree::run(context, arguments).await,
        SnapshotCommand::Schedule(command) => schedule::run(context, command).await,
    }
}

/// The id behind an id or name. Names are looked for among the snapshots of `source`, or among all.
async fn find(context: &Context, text: &str, source: Option<&str>) -> Result<String, CliError> {
    if is_id(text) {
        return Ok(text.to_owned());
    }
    let mut query = vec![("name".to_owned(), text.to_owned())];
    query.extend(source.map(|source| ("source_instance_id".to_owned(), source.to_owned())));
    let list = context.client.get(&["snapshots"], &query).await?;
    match list.items() {
        [] => Err(CliError::failed_with(
            format!("no snapshot has the id or name {text:?}"),
            "`hypeman snapshot list` lists snapshots",
        )),
        [one] => one
            .text("id")
            .map(str::to_owned)
            .ok_or_else(|| CliError::Protocol("a snapshot without id".to_owned())),
        several => {
            let ids: Vec<&str> = several.iter().filter_map(|item| item.text("id")).collect();
            let hint = format!("give one of the ids: {}", ids.join(", "));
            Err(CliError::failed_with(
                format!("several snapshots have the name {text:?}"),
                hint,
            ))
        }
    }
}

/// The id of an instance, which a filter needs; what may be the id of one that is gone stays as it is.
async fn instance_id(context: &Context, text: &str) -> Result<String, CliError> {
    if is_id(text) {
        return Ok(text.to_owned());
    }
    let instance = context.client.get(&["instances", text], &[]).await?;
    instance
        .text("id")
        .map(str::to_owned)
        .ok_or_else(|| CliError::Protocol("an instance without id".to_owned()))
}

async fn restore(context: &Context, arguments: &RestoreArgs) -> Result<(), CliError> {
    let instance = instance_id(context, &arguments.instance).await?;
    let snapshot = find(context, &arguments.snapshot, Some(&instance)).await?;
    let body = RestoreSnapshotRequest {
        target_state: arguments.target_state,
        target_hypervisor: arguments.target_hypervisor,
    };
    let mut progress = Progress::spinner(context.output.quiet());
    progress.say(&format!(
        "restoring {} to {}",
        arguments.instance, arguments.snapshot
    ));
    let path = ["instances", &instance, "snapshots", &snapshot, "restore"];
    let answer = context.client.call(Method::POST, &path, Some(&body)).await;
    progress.finish();
    announce(context, &arguments.instance, answer?)
}

async fn usage(context: &Context, arguments: &UsageArgs) -> Result<(), CliError> {
    let mut table = Table::new(&["SNAPSHOT", "OWN", "SHARED", "FREED BY DELETE"]);
    let mut documents = Vec::new();
    for snapshot in &arguments.snapshots {
        let id = find(context, snapshot, None).await?;
        let mut usage = context.client.get(&["snapshots", &id, "usage"], &[]).await?;
        table.row([
            Some(snapshot.clone()),
            bytes(&usage, "own_bytes"),
            bytes(&usage, "shared_bytes"),
            bytes(&usage, "freed_by_delete_bytes"),
        ]);
        // Several answers are told apart by the snapshot that they are of.
        if let Document::Object(members) = &mut usage {
            members.insert(0, ("snapshot_id".to_owned(), Document::String(id)));
        }
        documents.push(usage);
    }
    context.output.list(&documents, "snapshot_id", || table.render())
}

/// A number of bytes as people read it.
fn bytes(document: &Document, path: &str) -> Option<String> {
    let count = u64::try_from(document.integer(path)?).ok()?;
    Some(output::bytes(count))
}

/// `zstd level 1`, or `off`; nothing when nothing is said.
pub(crate) fn compression_text(config: Option<&Document>) -> Option<String> {
    let config = config?;
    if config.flag("enabled") != Some(true) {
        return Some("off".to_owned());
    }
    let algorithm = config.text("algorithm").unwrap_or("zstd");
    Some(match config.integer("level") {
        Some(level) => format!("{algorithm} level {level}"),
        None => algorithm.to_owned(),
    })
}

/// How many times smaller the memory has become: `3.2x`.
fn ratio(snapshot: &Document) -> Option<String> {
    let (whole, compressed) = (
        snapshot.number("uncompressed_size_bytes")?,
        snapshot.number("compressed_size_bytes")?,
    );
    (compressed > 0.0).then(|| format!("{:.1}x", whole / compressed))
}

/// Everything about a snapshot, one fact a line.
fn describe(snapshot: &Document, now: Timestamp) -> String {
    let mut table = Table::bare(2);
    let mut fact = |name: &str, value: Option<String>| {
        if value.as_ref().is_some_and(|value| !value.is_empty()) {
            table.row([Some(name.to_owned()), value]);
        }
    };
    let text = |path: &str| snapshot.text(path).map(str::to_owned);
    fact("ID", text("id"));
    fact("Name", text("name"));
    fact("Kind", text("kind"));
    fact(
        "Source",
        text("source_instance_name").map(|name| {
            let id = snapshot.text("source_instance_id").unwrap_or("?");
            format!("{name} ({id})")
        }),
    );
    fact("Hypervisor", text("source_hypervisor"));
    fact("Parent", text("parent"));
    fact("Size", bytes(snapshot, "size_bytes"));
    fact("Memory", bytes(snapshot, "uncompressed_size_bytes"));
    fact("Compression", compression_text(snapshot.get("compression")));
    fact("State", text("compression_state"));
    fact("Error", text("compression_error"));
    fact(
        "Compressed",
        bytes(snapshot, "compressed_size_bytes")
            .map(|size| ratio(snapshot).map_or_else(|| size.clone(), |ratio| format!("{size} ({ratio})"))),
    );
    fact(
        "Created",
        snapshot
            .text("created_at")
            .map(|time| format!("{time} ({})", age(time, now))),
    );
    for (key, value) in snapshot.get("tags").map(Document::members).unwrap_or_default() {
        if let Document::String(value) = value {
            fact("Tag", Some(format!("{key}={value}")));
        }
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_described_with_what_it_has() {
        let snapshot = Document::parse(
            br#"{"id":"q7z1w7l2af4l8y7q1h7g2m3s","created_at":"2026-03-06T13:56:11Z","kind":"Standby",
                "size_bytes":104857600,"source_hypervisor":"qemu","source_instance_id":"qilviffnqzck2jrim1x6s2b1",
                "source_instance_name":"nginx1","compressed_size_bytes":20971520,
                "compression":{"enabled":true,"algorithm":"zstd","level":1},"compression_state":"compressed",
                "tags":{"team":"backend"},"uncompressed_size_bytes":83886080}"#,
        )
        .unwrap();
        let text = describe(&snapshot, "2026-03-06T14:56:11Z".parse().unwrap());
        assert_eq!(
            text,
            "ID           q7z1w7l2af4l8y7q1h7g2m3s\n\
             Kind         Standby\n\
             Source       nginx1 (qilviffnqzck2jrim1x6s2b1)\n\
             Hypervisor   qemu\n\
             Size         100.0 MiB\n\
             Memory       80.0 MiB\n\
             Compression  zstd level 1\n\
             State        compressed\n\
             Compressed   20.0 MiB (4.0x)\n\
             Created      2026-03-06T13:56:11Z (60 minutes ago)\n\
             Tag          team=backend\n"
        );
    }
}
