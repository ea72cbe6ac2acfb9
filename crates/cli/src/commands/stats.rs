//! `hypeman stats`.

use clap::Args;

use super::Context;
use crate::document::Document;
use crate::error::CliError;
use crate::output::{self, Table};

/// Arguments of `stats`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hypeman stats                all running instances
  hypeman stats web db
  hypeman stats web --format json | jq .memory_rss_bytes")]
pub struct StatsArgs {
    /// Ids, names or unique prefixes of ids; all running instances when absent
    #[arg(value_name = "INSTANCE")]
    instances: Vec<String>,
}

/// Shows usage.
pub(crate) async fn run(context: &Context, arguments: &StatsArgs) -> Result<(), CliError> {
    let mut instances = arguments.instances.clone();
    let all = instances.is_empty();
    if all {
        let running = context
            .client
            .get(&["instances"], &[("state".to_owned(), "Running".to_owned())])
            .await?;
        instances = running
            .items()
            .iter()
            .filter_map(|item| item.text("id").map(str::to_owned))
            .collect();
    }
    let mut list = Vec::with_capacity(instances.len());
    for instance in &instances {
        match context.client.get(&["instances", instance, "stats"], &[]).await {
            Ok(stats) => list.push(stats),
            // Of all instances, one may have gone since the list was made.
            Err(gone) if all && gone.is_not_found() => {}
            Err(failure) => return Err(failure),
        }
    }
    if let ([single], false) = (list.as_slice(), all) {
        return context.output.object(single, "instance_id", || table(&list));
    }
    context.output.list(&list, "instance_id", || table(&list))
}

fn table(list: &[Document]) -> String {
    let mut table = Table::new(&[
        "INSTANCE ID",
        "NAME",
        "CPUS",
        "CPU TIME",
        "MEMORY",
        "OF",
        "NET IN",
        "NET OUT",
    ]);
    for stats in list {
        let size = |path: &str| {
            stats
                .integer(path)
                .map(|count| output::bytes(u64::try_from(count).unwrap_or(0)))
        };
        table.row([
            stats.text("instance_id").map(str::to_owned),
            stats.text("instance_name").map(str::to_owned),
            stats.integer("allocated_vcpus").map(|count| count.to_string()),
            stats
                .number("cpu_seconds")
                .map(|seconds| format!("{seconds:.1}s")),
            size("memory_rss_bytes"),
            size("allocated_memory_bytes"),
            size("network_rx_bytes"),
            size("network_tx_bytes"),
        ]);
    }
    table.render()
}
