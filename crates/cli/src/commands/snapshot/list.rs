//! `hypeman snapshot list`.

use clap::Args;
use hypeman_api::snapshot::SnapshotKind;
use jiff::Timestamp;

use super::create::kind;
use super::{bytes, instance_id, ratio};
use crate::commands::{Context, pair, tag_query};
use crate::document::Document;
use crate::error::CliError;
use crate::output::{Table, age};

/// Arguments of `snapshot list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Only snapshots of this instance: id, name, or the id of one that is gone
    #[arg(long, visible_alias = "source-instance-id", value_name = "INSTANCE")]
    source: Option<String>,
    /// Only snapshots of this kind: Standby or Stopped
    #[arg(long, value_parser = kind, value_name = "KIND")]
    kind: Option<SnapshotKind>,
    /// Only snapshots with this name
    #[arg(long)]
    name: Option<String>,
    /// Only snapshots with this tag (repeat for more)
    #[arg(short = 'l', long = "tag", value_parser = pair, value_name = "KEY=VALUE")]
    tags: Vec<(String, String)>,
    /// At most so many, the newest
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..), value_name = "COUNT")]
    limit: Option<u32>,
    /// Only snapshots older than this one, for the next page
    #[arg(long, value_name = "SNAPSHOT ID")]
    cursor: Option<String>,
}

/// Lists snapshots.
pub(super) async fn run(context: &Context, arguments: &ListArgs) -> Result<(), CliError> {
    let mut query = tag_query(&arguments.tags);
    let mut filter = |name: &str, value: Option<String>| {
        query.extend(value.map(|value| (name.to_owned(), value)));
    };
    filter("kind", arguments.kind.map(|kind| kind.to_string()));
    filter("name", arguments.name.clone());
    filter("limit", arguments.limit.map(|limit| limit.to_string()));
    filter("cursor", arguments.cursor.clone());
    if let Some(source) = &arguments.source {
        filter("source_instance_id", Some(instance_id(context, source).await?));
    }
    // The server's order is the newest first already.
    let list = context.client.get(&["snapshots"], &query).await?;
    let items = list.items();
    context
        .output
        .list(items, "id", || table(items, Timestamp::now()))
}

fn table(items: &[Document], now: Timestamp) -> String {
    let mut table = Table::new(&[
        "SNAPSHOT ID",
        "NAME",
        "KIND",
        "SOURCE",
        "SIZE",
        "COMPRESSED",
        "RATIO",
        "STATE",
        "AGE",
    ]);
    for item in items {
        let text = |path: &str| item.text(path).map(str::to_owned);
        table.row([
            text("id"),
            text("name"),
            text("kind"),
            text("source_instance_name"),
            bytes(item, "size_bytes"),
            bytes(item, "compressed_size_bytes"),
            ratio(item),
            text("compression_state"),
            item.text("created_at").map(|time| age(time, now)),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_shows_whole_ids_and_what_compression_saved() {
        let list = Document::parse(
            br#"[{"id":"q7z1w7l2af4l8y7q1h7g2m3s","name":"baseline","kind":"Standby","source_instance_name":"web",
                 "size_bytes":104857600,"compressed_size_bytes":20971520,"uncompressed_size_bytes":83886080,
                 "compression_state":"compressed","created_at":"2026-09-01T11:57:00Z"},
                {"id":"a7z1w7l2af4l8y7q1h7g2m3s","kind":"Stopped","source_instance_name":"db","size_bytes":1536,
                 "created_at":"2026-08-30T12:00:00Z"}]"#,
        )
        .unwrap();
        let text = table(list.items(), "2026-09-01T12:00:00Z".parse().unwrap());
        assert_eq!(
            text,
            "SNAPSHOT ID               NAME      KIND     SOURCE  SIZE       COMPRESSED  RATIO  STATE       AGE\n\
             q7z1w7l2af4l8y7q1h7g2m3s  baseline  Standby  web     100.0 MiB  20.0 MiB    4.0x   compressed  3 minutes ago\n\
             a7z1w7l2af4l8y7q1h7g2m3s  -         Stopped  db      1.5 KiB    -           -      -           2 days ago\n"
        );
    }
}
