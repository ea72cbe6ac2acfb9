//! `hypeman inspect`.

use clap::Args;
use jiff::Timestamp;

use super::ps::state_text;
use super::{Context, snapshot};
use crate::document::Document;
use crate::error::CliError;
use crate::output::{Table, age, span};

/// Arguments of `inspect`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hypeman inspect web
  hypeman inspect web --format json | jq -r .network.ip
  hypeman inspect web --show-env --format yaml")]
pub struct InspectArgs {
    /// Id, name or unique prefix of the id
    #[arg(required = true, value_name = "INSTANCE")]
    instances: Vec<String>,
    /// Show the values of environment variables instead of stars
    #[arg(long)]
    show_env: bool,
}

/// Shows instances.
pub(crate) async fn run(context: &Context, arguments: &InspectArgs) -> Result<(), CliError> {
    for (position, instance) in arguments.instances.iter().enumerate() {
        let mut document = context.client.get(&["instances", instance], &[]).await?;
        if !arguments.show_env {
            document.mask_values("env");
        }
        let gap = if position > 0 { "\n" } else { "" };
        context.output.object(&document, "id", || {
            format!("{gap}{}", describe(&document, Timestamp::now()))
        })?;
    }
    Ok(())
}

/// What the instance says of the compression of its snapshots: `zstd level 1, 30s after standby`.
fn compression(instance: &Document) -> Option<String> {
    let choice = snapshot::compression_text(instance.get("snapshot_policy.compression"));
    let delay = instance
        .text("snapshot_policy.standby_compression_delay")
        .map(|delay| format!("{delay} after standby"));
    let parts: Vec<String> = choice.into_iter().chain(delay).collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// What confines the hypervisor's process: `user 200001; missing: cpu, memory (no control groups)`.
fn jail(instance: &Document) -> Option<String> {
    let jail = instance.get("jail")?;
    if jail.flag("enabled") == Some(false) {
        return Some("none".to_owned());
    }
    let user = jail.integer("user").map(|user| format!("user {user}"));
    let mut reasons: Vec<(&str, Vec<&str>)> = Vec::new();
    for missing in jail.get("missing").map(Document::items).unwrap_or_default() {
        let (item, reason) = (missing.text("item")?, missing.text("reason")?);
        match reasons.iter_mut().find(|(known, _)| *known == reason) {
            Some((_, items)) => items.push(item),
            None => reasons.push((reason, vec![item])),
        }
    }
    let missing = reasons
        .iter()
        .map(|(reason, items)| format!("without {} ({reason})", items.join(", ")));
    let parts: Vec<String> = user.into_iter().chain(missing).collect();
    Some(parts.join("; "))
}

/// Everything about an instance, one fact a line.
pub(crate) fn describe(instance: &Document, now: Timestamp) -> String {
    let mut table = Table::bare(2);
    let mut fact = |name: &str, value: Option<String>| {
        if value.as_ref().is_some_and(|value| !value.is_empty()) {
            table.row([Some(name.to_owned()), value]);
        }
    };
    let text = |path: &str| instance.text(path).map(str::to_owned);
    let time = |path: &str| {
        instance
            .text(path)
            .map(|time| format!("{time} ({})", age(time, now)))
    };
    fact("ID", text("id"));
    fact("Name", text("name"));
    fact("Image", text("image"));
    fact("Platform", text("platform"));
    fact("State", Some(state_text(instance)));
    fact("State error", text("state_error"));
    fact("Exit", text("exit_message"));
    fact("Hypervisor", text("hypervisor"));
    fact("CPUs", instance.integer("vcpus").map(|count| count.to_string()));
    fact("Memory", text("size"));
    fact("Hotplug", text("hotplug_size"));
    fact("Overlay", text("overlay_size"));
    fact("Disk I/O", text("disk_io_bps"));
    fact(
        "Network",
        match instance.flag("network.enabled") {
            Some(true) => text("network.name").or(Some("yes".to_owned())),
            Some(false) => Some("none".to_owned()),
            None => None,
        },
    );
    fact("Address", text("network.ip"));
    fact("MAC", text("network.mac"));
    fact(
        "Snapshot",
        instance
            .flag("has_snapshot")
            .filter(|has| *has)
            .map(|_| "yes".to_owned()),
    );
    fact("Jail", jail(instance));
    fact("Compression", compression(instance));
    fact("Health", text("health_status.status"));
    fact("Restarts", text("restart_policy.policy"));
    fact("Created", time("created_at"));
    fact("Started", time("started_at"));
    fact("Stopped", time("stopped_at"));
    fact("Expires", time("expires_at"));
    let phases: Vec<String> = instance
        .get("phase_durations_ms")
        .map(Document::members)
        .unwrap_or_default()
        .iter()
        .filter_map(|(phase, value)| match value {
            Document::Number(number) => number
                .as_u64()
                .map(|milliseconds| format!("{phase} {}", length(milliseconds))),
            _ => None,
        })
        .collect();
    fact("Phases", Some(phases.join(", ")));
    for volume in instance.get("volumes").map(Document::items).unwrap_or_default() {
        let mode = if volume.flag("readonly") == Some(true) {
            " (read-only)"
        } else {
            ""
        };
        fact(
            "Volume",
            Some(format!(
                "{} at {}{mode}",
                volume.text("volume_id").unwrap_or("?"),
                volume.text("mount_path").unwrap_or("?")
            )),
        );
    }
    for (name, label) in [("tags", "Tag"), ("env", "Env")] {
        for (key, value) in instance.get(name).map(Document::members).unwrap_or_default() {
            if let Document::String(value) = value {
                fact(label, Some(format!("{key}={value}")));
            }
        }
    }
    table.render()
}

fn length(milliseconds: u64) -> String {
    if milliseconds < 10_000 {
        format!("{milliseconds} ms")
    } else {
        span(milliseconds / 1000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jail_is_told_in_a_line() {
        let told = |json: &str| jail(&Document::parse(json.as_bytes()).unwrap());
        assert_eq!(told("{}"), None);
        let off = r#"{"jail":{"enabled":false,"active":[],"missing":[]}}"#;
        assert_eq!(told(off).as_deref(), Some("none"));
        let partly = r#"{"jail":{"enabled":true,"user":200001,"active":["user"],"missing":[
            {"item":"cpu","reason":"version 1"},{"item":"memory","reason":"version 1"}]}}"#;
        let text = "user 200001; without cpu, memory (version 1)";
        assert_eq!(told(partly).as_deref(), Some(text));
    }

    #[test]
    fn facts_that_are_absent_take_no_line() {
        let instance = Document::parse(
            br#"{"id":"abc","name":"web","state":"Running","network":{"enabled":false,"ip":null,"mac":null},
                "env":{"A":"1"},"vcpus":2,"phase_durations_ms":{"initializing":812,"running":65000},"expires_at":null}"#,
        )
        .unwrap();
        let text = describe(&instance, "2026-09-01T12:00:00Z".parse().unwrap());
        assert_eq!(
            text,
            "ID       abc\nName     web\nState    Running\nCPUs     2\nNetwork  none\n\
             Phases   initializing 812 ms, running 65 seconds\nEnv      A=1\n"
        );
    }
}
