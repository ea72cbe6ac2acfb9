//! `hypeman update`.

use clap::{ArgGroup, Args, Subcommand};
use hypeman_api::UpdateInstanceRequest;
use reqwest::Method;

use super::Context;
use super::inspect::describe;
use crate::error::CliError;
use crate::output;

/// Arguments of `update`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hypeman update expiry web --ttl 2h          delete it two hours from now
  hypeman update expiry web --ttl 0s          keep it
  hypeman update expiry web --expires-at 2030-01-31T12:00:00Z")]
pub struct UpdateArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Change when the instance is deleted
    #[command(visible_alias = "ttl")]
    Expiry(ExpiryArgs),
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hypeman update expiry web --ttl 2h
  hypeman update expiry web --expires-at 2030-01-31T12:00:00Z")]
#[command(group = ArgGroup::new("deadline").required(true))]
struct ExpiryArgs {
    /// Id, name or unique prefix of the id
    instance: String,
    /// Time to live from now, such as 90s, 30m or 2h45m; 0s keeps it
    #[arg(long, value_name = "DURATION", value_parser = go_duration, group = "deadline")]
    ttl: Option<String>,
    /// When it is deleted, in RFC 3339
    #[arg(long, value_name = "TIME", value_parser = time, group = "deadline")]
    expires_at: Option<String>,
}

/// Checks a duration and keeps its text.
pub(crate) fn go_duration(text: &str) -> Result<String, String> {
    super::duration(text).map(|_| text.to_owned())
}

/// Checks a time and keeps its text.
pub(crate) fn time(text: &str) -> Result<String, String> {
    hypeman_core::time::parse(text)
        .map(|_| text.to_owned())
        .map_err(|failure| failure.to_string())
}

/// Changes an instance.
pub(crate) async fn run(context: &Context, arguments: &UpdateArgs) -> Result<(), CliError> {
    let What::Expiry(expiry) = &arguments.what;
    let body = UpdateInstanceRequest {
        ttl: expiry.ttl.clone(),
        expires_at: expiry.expires_at.clone(),
        ..UpdateInstanceRequest::default()
    };
    let mut instance = context
        .client
        .call(Method::PATCH, &["instances", &expiry.instance], Some(&body))
        .await?;
    instance.mask_values("env");
    context
        .output
        .object(&instance, "id", || match instance.text("expires_at") {
            Some(time) => format!(
                "{} expires {}\n",
                expiry.instance,
                output::age(time, jiff::Timestamp::now())
            ),
            None if instance.get("id").is_some() => format!("{} does not expire\n", expiry.instance),
            None => describe(&instance, jiff::Timestamp::now()),
        })
}
