//! `hypeman snapshot tree`: which snapshot descends from which.
//!
//! ```text
//! q7z1w7l2af4l8y7q1h7g2m3s base (web, Standby, 2 days ago)
//! ├─ a7z1w7l2af4l8y7q1h7g2m3s next (web, Standby, 3 hours ago)
//! │  └─ b7z1w7l2af4l8y7q1h7g2m3s (worker-1, Stopped, 2 hours ago)
//! └─ …
//! ```
//!
//! A snapshot whose parent is not in the list is a root: the parent was deleted, or belongs to another source.

use std::collections::{HashMap, HashSet};

use clap::Args;
use jiff::Timestamp;

use super::instance_id;
use crate::commands::Context;
use crate::document::Document;
use crate::error::CliError;
use crate::output::{self, age};

/// Arguments of `snapshot tree`.
#[derive(Debug, Args)]
#[command(after_help = "\
A snapshot hangs below the one that its instance had been restored or forked from.

Examples:
  hypeman snapshot tree
  hypeman snapshot tree --source web")]
pub struct TreeArgs {
    /// Only snapshots of this instance: id, name, or the id of one that is gone
    #[arg(long, value_name = "INSTANCE")]
    source: Option<String>,
}

/// Draws the tree.
pub(super) async fn run(context: &Context, arguments: &TreeArgs) -> Result<(), CliError> {
    let mut query = Vec::new();
    if let Some(source) = &arguments.source {
        query.push((
            "source_instance_id".to_owned(),
            instance_id(context, source).await?,
        ));
    }
    let list = context.client.get(&["snapshots"], &query).await?;
    let items = list.items();
    context.output.list(items, "id", || draw(items, Timestamp::now()))
}

/// A snapshot that is still to be drawn.
struct Pending<'a> {
    snapshot: &'a Document,
    /// What stands before its branch.
    before: String,
    /// Whether it is drawn with a branch, and as the last of its parent.
    branch: Option<bool>,
}

fn draw(items: &[Document], now: Timestamp) -> String {
    let known: HashSet<&str> = items.iter().filter_map(|item| item.text("id")).collect();
    let mut children: HashMap<&str, Vec<&Document>> = HashMap::new();
    let mut roots = Vec::new();
    for item in items {
        match item.text("parent").filter(|parent| known.contains(parent)) {
            Some(parent) => children.entry(parent).or_default().push(item),
            None => roots.push(item),
        }
    }
    let mut text = String::new();
    // A list of its own instead of recursion: lineages may be as long as the list. The server lists the newest
    // first and the last is drawn first, so each generation reads from the oldest on.
    let mut pending: Vec<Pending<'_>> = roots
        .into_iter()
        .map(|snapshot| Pending {
            snapshot,
            before: String::new(),
            branch: None,
        })
        .collect();
    while let Some(Pending {
        snapshot,
        before,
        branch,
    }) = pending.pop()
    {
        let (branch, below) = match branch {
            None => ("", ""),
            Some(false) => ("├─ ", "│  "),
            Some(true) => ("└─ ", "   "),
        };
        text += &format!("{before}{branch}{}\n", label(snapshot, now));
        let mine = snapshot
            .text("id")
            .and_then(|id| children.remove(id))
            .unwrap_or_default();
        pending.extend(mine.into_iter().enumerate().map(|(number, child)| Pending {
            snapshot: child,
            before: format!("{before}{below}"),
            branch: Some(number == 0),
        }));
    }
    text
}

fn label(snapshot: &Document, now: Timestamp) -> String {
    let id = snapshot.text("id").unwrap_or("?");
    let name = snapshot
        .text("name")
        .map(|name| format!(" {name}"))
        .unwrap_or_default();
    let source = snapshot.text("source_instance_name").unwrap_or("?");
    let kind = snapshot.text("kind").unwrap_or("?");
    let age = snapshot
        .text("created_at")
        .map(|time| format!(", {}", age(time, now)))
        .unwrap_or_default();
    output::clean(&format!("{id}{name} ({source}, {kind}{age})")).replace(['\n', '\t'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(rows: &[(&str, Option<&str>)]) -> Vec<Document> {
        let items: Vec<String> = rows
            .iter()
            .map(|(id, parent)| {
                let parent = parent.map_or("null".to_owned(), |parent| format!("\"{parent}\""));
                format!(r#"{{"id":"{id}","parent":{parent},"kind":"Standby","source_instance_name":"web"}}"#)
            })
            .collect();
        Document::parse(format!("[{}]", items.join(",")).as_bytes())
            .unwrap()
            .items()
            .to_vec()
    }

    fn drawn(rows: &[(&str, Option<&str>)]) -> String {
        draw(&list(rows), Timestamp::UNIX_EPOCH).replace(" (web, Standby)", "")
    }

    #[test]
    fn descendants_hang_below_their_parent_oldest_first() {
        let text = drawn(&[
            ("f", None),
            ("e", Some("b")),
            ("d", Some("a")),
            ("c", Some("b")),
            ("b", Some("a")),
            ("a", None),
        ]);
        assert_eq!(
            text,
            "a\n\
             ├─ b\n\
             │  ├─ c\n\
             │  └─ e\n\
             └─ d\n\
             f\n"
        );
    }

    #[test]
    fn a_snapshot_whose_parent_is_gone_is_a_root() {
        assert_eq!(drawn(&[("b", Some("gone")), ("a", None)]), "a\nb\n");
    }

    #[test]
    fn a_long_lineage_is_drawn_whole() {
        let ids: Vec<String> = (0..5000).map(|number| number.to_string()).collect();
        let rows: Vec<(&str, Option<&str>)> = (0..ids.len())
            .map(|number| {
                (
                    ids[number].as_str(),
                    (number > 0).then(|| ids[number - 1].as_str()),
                )
            })
            .collect();
        assert_eq!(drawn(&rows).lines().count(), rows.len());
    }

    #[test]
    fn a_name_cannot_break_its_line() {
        let hostile = Document::parse(
            br#"{"id":"a","name":"x\n\u001b[2J","kind":"Standby","source_instance_name":"w"}"#,
        )
        .unwrap();
        assert_eq!(
            label(&hostile, Timestamp::UNIX_EPOCH),
            "a x \u{fffd}[2J (w, Standby)"
        );
    }
}
