//! `hypeman ps`.

use clap::Args;
use hypeman_api::instance::InstanceState;
use jiff::Timestamp;

use super::{Context, pair, tag_query};
use crate::document::Document;
use crate::error::CliError;
use crate::output::{Table, age};

/// Arguments of `ps`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hypeman ps                          what runs
  hypeman ps -a                       all instances, in every state
  hypeman ps --state Stopped -q       ids of the stopped ones
  hypeman ps --tag team=core --format json

Values of the environment are shown as stars; `hypeman inspect --show-env` shows them.")]
pub struct PsArgs {
    /// All states, not only Running
    #[arg(short, long, conflicts_with = "state")]
    all: bool,
    /// Only instances in this state
    #[arg(long, value_parser = state, value_name = "STATE")]
    state: Option<InstanceState>,
    /// Only instances with this tag (repeat for more)
    #[arg(short = 'l', long = "tag", value_parser = pair, value_name = "KEY=VALUE")]
    tags: Vec<(String, String)>,
}

/// Reads a state in any case.
pub(crate) fn state(text: &str) -> Result<InstanceState, String> {
    let found = InstanceState::ALL
        .into_iter()
        .find(|state| state.as_str().eq_ignore_ascii_case(text));
    found.ok_or_else(|| {
        let names: Vec<_> = InstanceState::ALL.iter().map(|state| state.as_str()).collect();
        format!("{text:?} is no state; the states are {}", names.join(", "))
    })
}

/// Lists instances.
pub(crate) async fn run(context: &Context, arguments: &PsArgs) -> Result<(), CliError> {
    let mut query = tag_query(&arguments.tags);
    let state = arguments
        .state
        .or((!arguments.all).then_some(InstanceState::Running));
    if let Some(state) = state {
        query.push(("state".to_owned(), state.to_string()));
    }
    let mut list = context.client.get(&["instances"], &query).await?;
    list.mask_values("env");
    let mut items = list.items().to_vec();
    // Newest first: what was just made is what one looks for.
    items.sort_by(|one, other| other.text("created_at").cmp(&one.text("created_at")));
    context
        .output
        .list(&items, "id", || table(&items, Timestamp::now()))
}

fn table(items: &[Document], now: Timestamp) -> String {
    let mut table = Table::new(&["INSTANCE ID", "NAME", "IMAGE", "STATE", "GPU", "HV", "CREATED"]);
    for item in items {
        table.row([
            item.text("id").map(str::to_owned),
            item.text("name").map(str::to_owned),
            item.text("image").map(str::to_owned),
            Some(state_text(item)),
            item.text("gpu.profile").map(str::to_owned),
            item.text("hypervisor").map(str::to_owned),
            item.text("created_at").map(|time| age(time, now)),
        ]);
    }
    table.render()
}

/// The state with what belongs to it: the exit code of a stopped instance, health of a running one, or that it waits
/// for something, of which `inspect` tells more.
pub(crate) fn state_text(instance: &Document) -> String {
    let state = instance.text("state").unwrap_or("?");
    let detail = match state {
        "Stopped" => instance.integer("exit_code").map(|code| format!("exit {code}")),
        "Running" if instance.text("state_error").is_some() => Some("stands still".to_owned()),
        "Running" => instance
            .text("health_status.status")
            .filter(|status| !matches!(*status, "disabled" | "unknown"))
            .map(str::to_owned),
        _ => None,
    };
    match detail {
        Some(detail) => format!("{state} ({detail})"),
        None => state.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_shows_what_matters() {
        let list = Document::parse(
            br#"[{"id":"abc","name":"web","image":"docker.io/library/nginx:latest","state":"Running",
                 "hypervisor":"qemu","created_at":"2026-09-01T11:57:00Z"},
                {"id":"def","name":"job","image":"alpine","state":"Stopped","exit_code":3,
                 "created_at":"2026-08-30T12:00:00Z"}]"#,
        )
        .unwrap();
        let text = table(list.items(), "2026-09-01T12:00:00Z".parse().unwrap());
        assert_eq!(
            text,
            "INSTANCE ID  NAME  IMAGE                           STATE             GPU  HV    CREATED\n\
             abc          web   docker.io/library/nginx:latest  Running           -    qemu  3 minutes ago\n\
             def          job   alpine                          Stopped (exit 3)  -    -     2 days ago\n"
        );
    }

    #[test]
    fn what_runs_and_does_not_get_on_is_told() {
        let instance = |more: &str| {
            let text = format!(r#"{{"state":"Running"{more}}}"#);
            state_text(&Document::parse(text.as_bytes()).unwrap())
        };
        assert_eq!(instance(""), "Running");
        assert_eq!(
            instance(r#","health_status":{"status":"healthy"}"#),
            "Running (healthy)"
        );
        assert_eq!(instance(r#","state_error":"no space""#), "Running (stands still)");
    }

    #[test]
    fn states_are_read_in_any_case() {
        assert_eq!(state("running").unwrap(), InstanceState::Running);
        assert!(state("runing").unwrap_err().contains("Initializing"));
    }
}
