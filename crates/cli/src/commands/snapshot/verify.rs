//! `hypeman snapshot verify`: reads snapshots back, with progress.

use clap::Args;
use futures::StreamExt as _;

use super::find;
use crate::commands::Context;
use crate::commands::lifecycle::each;
use crate::document::Document;
use crate::error::CliError;
use crate::output;
use crate::progress::Progress;
use crate::sse::Events;

/// Arguments of `snapshot verify`.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit codes: 0 every byte is what was stored, 1 a part is damaged.

Examples:
  hypeman snapshot verify before-upgrade
  hypeman snapshot verify $(hypeman snapshot list -q)")]
pub struct VerifyArgs {
    /// Ids or names
    #[arg(required = true, value_name = "SNAPSHOT")]
    snapshots: Vec<String>,
}

/// Verifies snapshots; goes on after a damaged one.
pub(super) async fn run(context: &Context, arguments: &VerifyArgs) -> Result<(), CliError> {
    each(context, &arguments.snapshots, async |snapshot| {
        let id = find(context, snapshot, None).await?;
        let result = follow(context, snapshot, &id).await?;
        if result.text("state") != Some("intact") {
            if !context.output.human() {
                context.output.machine(&result)?;
            }
            if result.text("state") != Some("damaged") {
                let reason = result.text("error").unwrap_or("it was ended early");
                return Err(CliError::failed_with(
                    format!("{snapshot} was not read to its end: {reason}"),
                    "nothing is known of it: look at the server's log and the disk that holds it, and try again",
                ));
            }
            let damage = result.text("damage").unwrap_or("a part is not what was stored");
            return Err(CliError::failed_with(
                format!("{snapshot} is damaged: {damage}"),
                "it is never started; fork or restore another snapshot, and look at the disk that holds it",
            ));
        }
        context.output.object(&result, "none", || {
            if context.output.quiet() {
                return String::new();
            }
            let read = super::bytes(&result, "verified_bytes").unwrap_or_default();
            let unchecked = result.text("unchecked").map(output::clean);
            let unchecked = unchecked.map(|part| format!("not checked: {part}\n")).unwrap_or_default();
            format!("{} is intact: {read} read\n{unchecked}", output::clean(snapshot))
        })
    })
    .await
}

/// Follows a verification to its result.
async fn follow(context: &Context, snapshot: &str, id: &str) -> Result<Document, CliError> {
    let response = context.client.follow(&["snapshots", id, "verify"]).await?;
    let mut chunks = response.bytes_stream();
    let mut events = Events::default();
    let mut progress: Option<Progress> = None;
    let mut counted = 0;
    while let Some(chunk) = chunks.next().await {
        let chunk =
            chunk.map_err(|failure| CliError::failed(format!("the verification broke off: {failure}")))?;
        for event in events.feed(&chunk)? {
            let state = Document::parse(event.as_bytes())
                .map_err(|failure| CliError::Protocol(format!("progress that is not JSON ({failure})")))?;
            if state.text("state") != Some("running") {
                return Ok(state);
            }
            let total = state
                .integer("total_bytes")
                .and_then(|total| u64::try_from(total).ok());
            let bar = progress.get_or_insert_with(|| {
                let mut bar = Progress::of_bytes(context.output.quiet(), total);
                bar.say(&format!("reading {snapshot}"));
                bar
            });
            let verified = state
                .integer("verified_bytes")
                .and_then(|verified| u64::try_from(verified).ok())
                .unwrap_or(0);
            bar.advance(verified.saturating_sub(counted));
            counted = counted.max(verified);
        }
    }
    Err(CliError::failed_with(
        "the verification ended without a result",
        "the server may be shutting down: try again",
    ))
}
