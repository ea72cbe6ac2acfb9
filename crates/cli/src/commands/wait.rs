//! `hypeman wait`, and the waiting that other commands share.

use std::time::{Duration, Instant};

use clap::Args;
use hypeman_api::instance::InstanceState;

use super::Context;
use super::ps::state;
use crate::document::Document;
use crate::error::CliError;
use crate::output;

/// How long one request waits on the server (its own limit is five minutes).
const ROUND: Duration = Duration::from_secs(60);

/// How much longer than the server the client waits for the answer.
const GRACE: Duration = Duration::from_secs(30);

/// Arguments of `wait`.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit codes: 0 the state was reached, 1 another final state was, 124 the time ran out.

Examples:
  hypeman wait web --state Running
  hypeman wait job --state Stopped --timeout 30m && hypeman logs job")]
pub struct WaitArgs {
    /// Id, name or unique prefix of the id
    instance: String,
    /// State to wait for
    #[arg(long, value_parser = state, value_name = "STATE")]
    state: InstanceState,
    /// How long to wait at most
    #[arg(long, value_parser = super::duration, default_value = "60s", value_name = "DURATION")]
    timeout: Duration,
}

/// Waits.
pub(crate) async fn run(context: &Context, arguments: &WaitArgs) -> Result<(), CliError> {
    if arguments.state == InstanceState::Unknown {
        return Err(CliError::usage("Unknown is not a state to wait for"));
    }
    let answer = until(context, &arguments.instance, arguments.state, arguments.timeout).await?;
    let reached = answer.text("state").unwrap_or_default();
    if reached != arguments.state.as_str() {
        if answer.flag("timed_out") == Some(true) {
            return Err(CliError::TimedOut(format!(
                "{} is {reached} and not {} after {}",
                arguments.instance,
                arguments.state,
                hypeman_core::duration::format(arguments.timeout)
            )));
        }
        let reason = answer
            .text("state_error")
            .map(|error| format!(" ({error})"))
            .unwrap_or_default();
        return Err(CliError::failed_with(
            format!(
                "{} is {reached}{reason}, not {}",
                arguments.instance, arguments.state
            ),
            format!(
                "`hypeman inspect {0}` and `hypeman logs {0}` say why",
                arguments.instance
            ),
        ));
    }
    context.output.object(&answer, "none", || {
        if context.output.quiet() {
            String::new()
        } else {
            format!("{} is {reached}\n", arguments.instance)
        }
    })
}

/// Waits for a state, or another final one, or the end of `limit`; answers the server's last word.
///
/// # Errors
/// When the server refuses or is gone.
pub(crate) async fn until(
    context: &Context,
    instance: &str,
    target: InstanceState,
    limit: Duration,
) -> Result<Document, CliError> {
    let started = Instant::now();
    loop {
        let left = limit.saturating_sub(started.elapsed());
        let round = left.min(ROUND);
        let query = [
            ("state".to_owned(), target.to_string()),
            // Zero would mean the server's default.
            ("timeout".to_owned(), format!("{}ms", round.as_millis().max(1))),
        ];
        let answer = context
            .client
            .get_within(&["instances", instance, "wait"], &query, round + GRACE)
            .await?;
        if answer.text("state").is_none() {
            return Err(CliError::Protocol("the answer to wait has no state".to_owned()));
        }
        if answer.flag("timed_out") != Some(true) || left <= round {
            return Ok(answer);
        }
        if context.global.debug {
            output::note(&format!("still {}", answer.text("state").unwrap_or("?")));
        }
    }
}
