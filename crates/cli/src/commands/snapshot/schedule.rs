//! `hypeman snapshot schedule …`

use clap::{ArgGroup, Args, Subcommand};
use hypeman_api::snapshot::{SetSnapshotScheduleRequest, SnapshotScheduleRetention};
use jiff::Timestamp;
use reqwest::Method;

use crate::commands::update::go_duration;
use crate::commands::{Context, pair};
use crate::document::Document;
use crate::error::CliError;
use crate::output::{self, Table, age};

/// Commands about schedules.
#[derive(Debug, Subcommand)]
#[command(after_help = "\
Examples:
  hypeman snapshot schedule set web --interval 1h --max-count 24
  hypeman snapshot schedule get web
  hypeman snapshot schedule delete web")]
pub enum ScheduleCommand {
    /// Set or change the schedule of an instance
    Set(SetArgs),
    /// Show the schedule of an instance
    Get(InstanceArgs),
    /// End the schedule of an instance; its snapshots stay
    Delete(InstanceArgs),
}

/// Arguments of `snapshot schedule set`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("retention").required(true).multiple(true))]
#[command(after_help = "\
Old snapshots of the schedule are deleted after each good run; snapshots made by hand are not touched. Only another
interval changes when it runs next.

Examples:
  hypeman snapshot schedule set web --interval 1h --max-count 24
  hypeman snapshot schedule set web --interval 24h --max-age 720h --name-prefix daily -l made-by=schedule")]
pub struct SetArgs {
    /// Id, name or unique prefix of the id
    instance: String,
    /// Time between two snapshots, such as 30m or 24h; at least 1m
    #[arg(long, value_parser = go_duration, value_name = "DURATION")]
    interval: String,
    /// Keep the newest so many
    #[arg(long, group = "retention", value_name = "COUNT")]
    max_count: Option<u32>,
    /// Keep none older than this, such as 168h
    #[arg(long, group = "retention", value_parser = go_duration, value_name = "DURATION")]
    max_age: Option<String>,
    /// Begins the names of the snapshots; a time follows
    #[arg(long, value_name = "PREFIX")]
    name_prefix: Option<String>,
    /// Put a tag on the snapshots (repeat for more)
    #[arg(short = 'l', long = "tag", visible_alias = "metadata", value_parser = pair, value_name = "KEY=VALUE")]
    tags: Vec<(String, String)>,
}

/// Arguments of `snapshot schedule get` and `delete`.
#[derive(Debug, Args)]
pub struct InstanceArgs {
    /// Id, name or unique prefix of the id; the id of an instance that is gone
    instance: String,
}

/// Runs a command about schedules.
pub(super) async fn run(context: &Context, command: &ScheduleCommand) -> Result<(), CliError> {
    match command {
        ScheduleCommand::Set(arguments) => {
            let body = SetSnapshotScheduleRequest {
                interval: arguments.interval.clone(),
                retention: SnapshotScheduleRetention {
                    max_count: arguments.max_count,
                    max_age: arguments.max_age.clone(),
                },
                name_prefix: arguments.name_prefix.clone(),
                metadata: arguments.tags.iter().cloned().collect(),
            };
            let path = ["instances", &arguments.instance, "snapshot-schedule"];
            let schedule = context.client.call(Method::PUT, &path, Some(&body)).await?;
            show(context, &schedule)
        }
        ScheduleCommand::Get(arguments) => {
            let path = ["instances", &arguments.instance, "snapshot-schedule"];
            show(context, &context.client.get(&path, &[]).await?)
        }
        ScheduleCommand::Delete(arguments) => {
            let path = ["instances", &arguments.instance, "snapshot-schedule"];
            context.client.delete(&path, &[]).await?;
            if context.output.human() {
                output::line(&output::clean(&arguments.instance))?;
            }
            Ok(())
        }
    }
}

fn show(context: &Context, schedule: &Document) -> Result<(), CliError> {
    context
        .output
        .object(schedule, "instance_id", || describe(schedule, Timestamp::now()))
}

fn describe(schedule: &Document, now: Timestamp) -> String {
    let mut table = Table::bare(2);
    let mut fact = |name: &str, value: Option<String>| {
        if value.as_ref().is_some_and(|value| !value.is_empty()) {
            table.row([Some(name.to_owned()), value]);
        }
    };
    let text = |path: &str| schedule.text(path).map(str::to_owned);
    let time = |path: &str| {
        schedule
            .text(path)
            .map(|time| format!("{time} ({})", age(time, now)))
    };
    fact("Instance", text("instance_id"));
    fact("Interval", text("interval"));
    let count = schedule
        .integer("retention.max_count")
        .filter(|count| *count > 0)
        .map(|count| format!("the newest {count}"));
    let age = text("retention.max_age").map(|age| format!("none older than {age}"));
    let keeps: Vec<String> = count.into_iter().chain(age).collect();
    fact("Keeps", Some(keeps.join(", ")));
    fact("Name prefix", text("name_prefix"));
    fact("Next run", time("next_run_at"));
    fact("Last run", time("last_run_at"));
    fact("Last snapshot", text("last_snapshot_id"));
    fact("Last error", text("last_error"));
    for (key, value) in schedule
        .get("metadata")
        .map(Document::members)
        .unwrap_or_default()
    {
        if let Document::String(value) = value {
            fact("Tag", Some(format!("{key}={value}")));
        }
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::Cli;

    #[test]
    fn a_schedule_without_an_end_is_refused() {
        let parse = |rest: &str| {
            let line = format!("hypeman snapshot schedule set web {rest}");
            Cli::try_parse_from(line.split(' ').filter(|word| !word.is_empty()))
        };
        assert!(parse("--interval 1h").is_err());
        assert!(parse("--max-count 3").is_err());
        assert!(parse("--interval often --max-count 3").is_err());
        assert!(parse("--interval 1h --max-count 3").is_ok());
        assert!(parse("--interval 1h --max-count 3 --max-age 168h").is_ok());
    }

    #[test]
    fn a_schedule_says_when_it_runs_and_what_it_keeps() {
        let schedule = Document::parse(
            br#"{"instance_id":"i","interval":"1h0m0s","retention":{"max_count":24,"max_age":"168h0m0s"},
                "next_run_at":"2026-09-01T13:00:00Z","last_error":"no space","metadata":{"by":"schedule"}}"#,
        )
        .unwrap();
        assert_eq!(
            describe(&schedule, "2026-09-01T12:30:00Z".parse().unwrap()),
            "Instance    i\n\
             Interval    1h0m0s\n\
             Keeps       the newest 24, none older than 168h0m0s\n\
             Next run    2026-09-01T13:00:00Z (in 30 minutes)\n\
             Last error  no space\n\
             Tag         by=schedule\n"
        );
    }
}
