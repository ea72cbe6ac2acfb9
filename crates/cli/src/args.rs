//! The command line: global options and the list of commands.
//!
//! The arguments of each command stand beside its code in [`crate::commands`].

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::commands;
use crate::output::Transform;

const EXIT_CODES: &str = "\
Exit codes:
  0    success
  1    the server refused, the instance failed, or something local went wrong
  2    wrong command line or configuration
  124  `wait` or `run` ran out of time
  130  interrupted by Ctrl-C
  254  a snapshot of the instance ended `exec` (Firecracker only)
  255  `exec` itself failed (every other code of `exec` is the command's own)

Environment:
  HYPEMAN_BASE_URL  address of the server (default http://localhost:8080)
  HYPEMAN_API_KEY   bearer token (make one with `hypeman token create`)
  DOCKER_HOST       where `push` finds the local Docker (default unix:///var/run/docker.sock)
  NO_COLOR          no colours on a terminal

Files:
  ~/.config/hypeman/cli.yaml  base_url and api_key for when neither flag nor environment names them

Examples:
  hypeman serve                                    start a server with defaults
  hypeman token create --user-id me --save         make a token and remember it
  hypeman run --name web nginx                     pull if needed, boot, wait until it runs
  hypeman exec web uname -a                        run a command inside
  hypeman ps --format json | jq '.[].name'         for scripts
  hypeman stop web --format-error json             a failure as code, message, exit_code and hint";

/// Runs OCI images as virtual machines.
///
/// `hypeman serve` is the server; every other command is a client of it, except `token`, `doctor`, `pager`,
/// `completion` and `version`, which work alone.
#[derive(Debug, Parser)]
#[command(name = "hypeman", version, about, long_about, after_long_help = EXIT_CODES, max_term_width = 110)]
#[command(propagate_version = false, disable_help_subcommand = false)]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: GlobalArgs,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Default, Args)]
pub struct GlobalArgs {
    /// Address of the server [env: HYPEMAN_BASE_URL] [default: http://localhost:8080]
    #[arg(long, global = true, value_name = "URL", help_heading = "Global options")]
    pub base_url: Option<String>,
    /// How results are printed
    #[arg(
        long,
        global = true,
        value_enum,
        default_value_t,
        value_name = "FORMAT",
        hide_possible_values = true,
        help_heading = "Global options",
        long_help = "How results are printed: auto (a table for people), table, json (indented), jsonl (one \
                       object a line), yaml, raw (the server's own bytes)"
    )]
    pub format: Format,
    /// Print only what this path leads to, as JSON
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        value_parser = Transform::parse,
        help_heading = "Global options",
        long_help = "Print only what this path leads to, as JSON or in the format that is asked for: names, numbers \
                       and # of GJSON joined by dots, such as network.ip, 0.id, # (how many) or #.name (of each)"
    )]
    pub transform: Option<Transform>,
    /// How a failure is told on standard error, one of the formats of --format
    #[arg(
        long,
        global = true,
        value_enum,
        value_name = "FORMAT",
        hide_possible_values = true,
        help_heading = "Global options"
    )]
    pub format_error: Option<Format>,
    /// Tell only what this path leads to in a failure, such as code, message or hint
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        value_parser = Transform::parse,
        help_heading = "Global options"
    )]
    pub transform_error: Option<Transform>,
    /// Show each request and answer on standard error (never the token)
    #[arg(long, global = true, help_heading = "Global options")]
    pub debug: bool,
    /// Print identifiers only, and no progress
    #[arg(short, long, global = true, help_heading = "Global options")]
    pub quiet: bool,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A table for people.
    #[default]
    Auto,
    /// A table for people.
    Table,
    /// Indented JSON.
    #[value(alias = "pretty")]
    Json,
    /// One JSON object a line.
    Jsonl,
    /// YAML.
    Yaml,
    /// The server's own bytes.
    Raw,
}

/// All commands, in the order in which help lists them.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the server
    Serve(commands::serve::ServeArgs),
    /// Create an instance from an image and boot it
    Run(Box<commands::run::RunArgs>),
    /// List instances
    #[command(visible_alias = "list")]
    Ps(commands::ps::PsArgs),
    /// Show all that is known about an instance
    Inspect(commands::inspect::InspectArgs),
    /// Show the console, hypervisor or server log of an instance
    Logs(commands::logs::LogsArgs),
    /// Run a command inside an instance
    Exec(commands::exec::ExecArgs),
    /// Copy files between an instance and this machine
    Cp(commands::cp::CpArgs),
    /// Stop instances
    Stop(commands::lifecycle::StopArgs),
    /// Start stopped instances
    Start(commands::lifecycle::StartArgs),
    /// Delete instances
    Rm(commands::lifecycle::RmArgs),
    /// Put running instances to standby: memory on disk, nothing runs
    Standby(commands::standby::StandbyArgs),
    /// Let instances go on from standby
    Restore(commands::standby::RestoreArgs),
    /// Make copies of an instance, memory included
    Fork(commands::standby::ForkArgs),
    /// Work with snapshots of instances
    #[command(subcommand, visible_alias = "snapshots")]
    Snapshot(commands::snapshot::SnapshotCommand),
    /// Wait until an instance reaches a state
    Wait(commands::wait::WaitArgs),
    /// Show what instances use
    Stats(commands::stats::StatsArgs),
    /// Change an instance that exists
    Update(commands::update::UpdateArgs),
    /// Pull an image into the server
    Pull(commands::image::PullArgs),
    /// Push a local image or archive into the server
    Push(commands::push::PushArgs),
    /// Work with images
    #[command(subcommand, visible_alias = "images")]
    Image(commands::image::ImageCommand),
    /// Ask whether the server answers
    Health(commands::service::HealthArgs),
    /// Show what the server and its host can do
    Capabilities(commands::service::CapabilitiesArgs),
    /// Show what the host has and what instances take
    Resources(commands::service::ResourcesArgs),
    /// Show who serves memory of machines page by page, and how fast
    Pagers(commands::pagers::PagersArgs),
    /// Make access tokens (offline, with the server's secret)
    #[command(subcommand)]
    Token(commands::token::TokenCommand),
    /// Check this machine and say how to fix what is missing
    Doctor(commands::doctor::DoctorArgs),
    /// Serve page faults of machines (the server starts this when it needs it)
    Pager(commands::pager::PagerArgs),
    /// Print a completion script for a shell
    Completion(commands::completion::CompletionArgs),
    /// Print the version
    Version(commands::service::VersionArgs),
}
