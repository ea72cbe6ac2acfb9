//! `hypeman health`, `capabilities`, `resources` and `version`.

use clap::Args;

use super::Context;
use crate::args::GlobalArgs;
use crate::document::Document;
use crate::error::CliError;
use crate::output::{self, Output, Table};

/// Arguments of `health`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hypeman health && echo the server is up")]
pub struct HealthArgs {}

/// Arguments of `capabilities`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hypeman capabilities
  hypeman capabilities --format json | jq -r '.runtimes[] | select(.available).name'")]
pub struct CapabilitiesArgs {}

/// Arguments of `resources`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hypeman resources
  hypeman resources --format json | jq .memory.available")]
pub struct ResourcesArgs {}

/// Arguments of `version`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hypeman version --format json")]
pub struct VersionArgs {}

/// The version of this program and of the contract it speaks.
pub(crate) fn version(_: &VersionArgs, global: &GlobalArgs) -> Result<(), CliError> {
    let version = env!("CARGO_PKG_VERSION");
    if global.quiet {
        return output::line(version);
    }
    let members = [
        ("version", version),
        ("api_version", hypeman_api::API_VERSION),
        ("os", std::env::consts::OS),
        ("arch", std::env::consts::ARCH),
    ];
    let document = Document::Object(
        members
            .iter()
            .map(|(key, value)| ((*key).to_owned(), Document::String((*value).to_owned())))
            .collect(),
    );
    Output::new(global).object(&document, "version", || {
        format!(
            "hypeman {version} (API {}, {}/{})\n",
            hypeman_api::API_VERSION,
            std::env::consts::OS,
            std::env::consts::ARCH
        )
    })
}

/// Asks the server whether it answers.
pub(crate) async fn health(context: &Context) -> Result<(), CliError> {
    let answer = context.client.get(&["health"], &[]).await?;
    context.output.object(&answer, "status", || {
        format!(
            "{} {}\n",
            context.client.settings().base_url,
            answer.text("status").unwrap_or("?")
        )
    })
}

/// Shows what the server can do.
pub(crate) async fn capabilities(context: &Context) -> Result<(), CliError> {
    let answer = context.client.get(&["capabilities"], &[]).await?;
    context.output.object(&answer, "server.version", || {
        let text = |path: &str| answer.text(path).map(str::to_owned);
        let mut facts = Table::bare(2);
        let mut fact = |name: &str, value: Option<String>| facts.row([Some(name.to_owned()), value]);
        fact("Server", text("server.version"));
        fact("API", text("server.api_version"));
        fact(
            "Host",
            Some(format!(
                "{}/{}",
                text("host.os").unwrap_or_default(),
                text("host.arch").unwrap_or_default()
            )),
        );
        fact("Network", text("network.model"));
        fact("Subnet", text("network.subnet"));
        fact("Platforms", joined(answer.get("images.platforms")));
        fact("Features", joined(answer.get("features")));
        fact("Default", text("default_runtime.name"));

        let mut runtimes = Table::new(&["RUNTIME", "AVAILABLE", "VERSION", "RUNS ON", "FEATURES"]);
        for runtime in answer.get("runtimes").map(Document::items).unwrap_or_default() {
            let available = runtime.flag("available").unwrap_or(false);
            let features = if available {
                joined(runtime.get("features"))
            } else {
                runtime.text("unavailable_reason").map(str::to_owned)
            };
            runtimes.row([
                runtime.text("name").map(str::to_owned),
                Some(if available { "yes" } else { "no" }.to_owned()),
                runtime.text("version").map(str::to_owned),
                runtime.text("accelerator").map(str::to_owned),
                features,
            ]);
        }
        format!("{}\n{}", facts.render(), runtimes.render())
    })
}

fn joined(list: Option<&Document>) -> Option<String> {
    let words: Vec<String> = list?
        .items()
        .iter()
        .filter_map(|item| {
            if let Document::String(text) = item {
                Some(text.clone())
            } else {
                None
            }
        })
        .collect();
    Some(words.join(", "))
}

/// Shows what the host has and what instances take.
pub(crate) async fn resources(context: &Context) -> Result<(), CliError> {
    let answer = context.client.get(&["resources"], &[]).await?;
    context.output.object(&answer, "none", || {
        let mut totals = Table::new(&[
            "RESOURCE",
            "CAPACITY",
            "LIMIT",
            "ALLOCATED",
            "AVAILABLE",
            "SOURCE",
        ]);
        for name in ["cpu", "memory", "disk", "network", "disk_io"] {
            let Some(resource) = answer.get(name) else {
                continue;
            };
            let amount = |path: &str| resource.integer(path).map(|count| quantity(name, count));
            totals.row([
                Some(name.to_owned()),
                amount("capacity"),
                amount("effective_limit"),
                amount("allocated"),
                amount("available"),
                resource.text("source").map(str::to_owned),
            ]);
        }
        let mut text = totals.render();
        let allocations = answer.get("allocations").map(Document::items).unwrap_or_default();
        if !allocations.is_empty() {
            let mut table = Table::new(&["INSTANCE", "NAME", "CPU", "MEMORY", "DISK"]);
            for allocation in allocations {
                let amount =
                    |name: &str, path: &str| allocation.integer(path).map(|count| quantity(name, count));
                table.row([
                    allocation.text("instance_id").map(str::to_owned),
                    allocation.text("instance_name").map(str::to_owned),
                    amount("cpu", "cpu"),
                    amount("memory", "memory_bytes"),
                    amount("disk", "disk_bytes"),
                ]);
            }
            text.push('\n');
            text.push_str(&table.render());
        }
        text
    })
}

fn quantity(resource: &str, count: i64) -> String {
    let size = || output::bytes(count.max(0).unsigned_abs());
    match resource {
        "cpu" => count.to_string(),
        "network" | "disk_io" => format!("{}/s", size()),
        _ => size(),
    }
}
