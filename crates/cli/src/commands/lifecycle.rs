//! `hypeman stop`, `start` and `rm`.

use clap::Args;
use hypeman_api::StartInstanceRequest;
use reqwest::Method;

use super::Context;
use crate::document::Document;
use crate::error::CliError;
use crate::output;

/// Arguments of `stop`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hypeman stop web
  hypeman stop $(hypeman ps -q --tag team=core)")]
pub struct StopArgs {
    /// Ids, names or unique prefixes of ids
    #[arg(required = true, value_name = "INSTANCE")]
    instances: Vec<String>,
}

/// Arguments of `start`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hypeman start web
  hypeman start web --cmd nginx --cmd -g --cmd 'daemon off;'    with other arguments from now on")]
pub struct StartArgs {
    /// Ids, names or unique prefixes of ids
    #[arg(required = true, value_name = "INSTANCE")]
    instances: Vec<String>,
    /// Replace the entrypoint from now on (repeat for each word)
    #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
    entrypoint: Vec<String>,
    /// Replace the arguments from now on (repeat for each word)
    #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
    cmd: Vec<String>,
}

/// Arguments of `rm`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hypeman rm web
  hypeman rm -f web            also when it runs
  hypeman rm --all             all that do not run
  hypeman rm -f --all          everything")]
pub struct RmArgs {
    /// Ids, names or unique prefixes of ids
    #[arg(
        value_name = "INSTANCE",
        required_unless_present = "all",
        conflicts_with = "all"
    )]
    instances: Vec<String>,
    /// Delete also what runs, without asking its programs to end first
    #[arg(short, long)]
    force: bool,
    /// Delete all instances
    #[arg(long)]
    all: bool,
}

/// Does something to each instance; goes on after a failure and reports the last one.
pub(crate) async fn each(
    context: &Context,
    instances: &[String],
    mut action: impl AsyncFnMut(&str) -> Result<(), CliError>,
) -> Result<(), CliError> {
    let mut failed: Option<CliError> = None;
    for instance in instances {
        if let Err(failure) = action(instance).await {
            // A server that is gone will not come back for the next one.
            let hopeless = matches!(failure, CliError::Unreachable { .. });
            if let Some(earlier) = failed.replace(failure) {
                context.report(&earlier);
            }
            if hopeless {
                break;
            }
        }
    }
    failed.map_or(Ok(()), Err)
}

/// Says that something was done to an instance.
pub(crate) fn announce(context: &Context, instance: &str, mut answer: Document) -> Result<(), CliError> {
    answer.mask_values("env");
    context.output.object(&answer, "id", || format!("{instance}\n"))
}

/// Stops instances.
pub(crate) async fn stop(context: &Context, arguments: &StopArgs) -> Result<(), CliError> {
    each(context, &arguments.instances, async |instance| {
        let answer = context
            .client
            .call(Method::POST, &["instances", instance, "stop"], None::<&()>)
            .await?;
        announce(context, instance, answer)
    })
    .await
}

/// Starts instances.
pub(crate) async fn start(context: &Context, arguments: &StartArgs) -> Result<(), CliError> {
    let given = |words: &[String]| (!words.is_empty()).then(|| words.to_vec());
    let body = StartInstanceRequest {
        entrypoint: given(&arguments.entrypoint),
        cmd: given(&arguments.cmd),
    };
    each(context, &arguments.instances, async |instance| {
        let answer = context
            .client
            .call(Method::POST, &["instances", instance, "start"], Some(&body))
            .await?;
        announce(context, instance, answer)
    })
    .await
}

/// Deletes instances.
pub(crate) async fn rm(context: &Context, arguments: &RmArgs) -> Result<(), CliError> {
    let mut instances = arguments.instances.clone();
    if arguments.all {
        let list = context.client.get(&["instances"], &[]).await?;
        let chosen = list.items().iter().filter(|item| arguments.force || !is_up(item));
        instances = chosen
            .filter_map(|item| item.text("id").map(str::to_owned))
            .collect();
        if instances.is_empty() && !context.output.quiet() {
            output::note("nothing to delete");
        }
    }
    each(context, &instances, async |instance| {
        let mut target = instance.to_owned();
        if !arguments.force && !arguments.all {
            let found = context.client.get(&["instances", instance], &[]).await?;
            if is_up(&found) {
                return Err(CliError::failed_with(
                    format!("{instance} is {}", found.text("state").unwrap_or("running")),
                    format!(
                        "stop it first with `hypeman stop {instance}`, or use `hypeman rm -f {instance}`"
                    ),
                ));
            }
            // What was looked at is what is deleted, also when the name moves on meanwhile.
            found.text("id").unwrap_or(instance).clone_into(&mut target);
        }
        let query = [("graceful_shutdown".to_owned(), (!arguments.force).to_string())];
        context.client.delete(&["instances", &target], &query).await?;
        if context.output.human() {
            output::line(&output::clean(instance))
        } else {
            Ok(())
        }
    })
    .await
}

/// Whether deleting it would take something away that runs.
fn is_up(instance: &Document) -> bool {
    matches!(
        instance.text("state"),
        Some("Running" | "Initializing" | "Paused" | "Created")
    )
}
