//! `hypeman serve`: the server, in this process.
//!
//! ```text
//! configuration ─► log ─► secret ─► guest program ─► engine (adopts what runs) ─► listen ─► announce ─► answer
//!                                                                      SIGTERM, Ctrl-C: drain ─► close, VMs stay
//! ```

use std::path::PathBuf;

use clap::Args;
use hypeman_engine::Engine;
use hypeman_server::{ServerConfig, bind};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::args::GlobalArgs;
use crate::client::choose_tls_provider;
use crate::config::{self, Overrides, Values, options};
use crate::error::CliError;
use crate::{guest_program, output};

/// Arguments of `serve`.
#[derive(Debug, Args)]
#[command(after_help = "\
Nothing has to be configured. The configuration is the first of --config, $CONFIG_PATH, \
/etc/hypeman/config.yaml and ~/.config/hypeman/config.yaml that exists; the environment overrides \
it, with two underscores for each level (LIMITS__MAX_OVERLAY_SIZE=50GB); flags override both. \
`hypeman serve --list-keys` lists all keys.

Machines outlive the server: a server that starts again takes them back.

Examples:
  hypeman serve
  hypeman serve --port 4973 --listen 0.0.0.0 --data-dir /srv/hypeman
  LOGGING__LEVELS__ENGINE=debug hypeman serve")]
pub struct ServeArgs {
    /// Configuration file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// TCP port of the API; 0 takes a free one [default: 8080]
    #[arg(long)]
    port: Option<u16>,
    /// Address that the API listens on [default: 127.0.0.1]
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<std::net::IpAddr>,
    /// Where everything lives [default: /var/lib/hypeman for root, else $XDG_DATA_HOME/hypeman]
    #[arg(long, value_name = "DIRECTORY")]
    data_dir: Option<PathBuf>,
    /// List the keys of the configuration with their defaults, and exit
    #[arg(long)]
    list_keys: bool,
}

impl ServeArgs {
    fn overrides(&self) -> Overrides {
        let values = [
            self.port.map(|port| ("port", port.to_string())),
            self.listen.map(|address| ("listen_address", address.to_string())),
            self.data_dir
                .as_ref()
                .map(|path| ("data_dir", path.display().to_string())),
        ];
        Overrides {
            file: self.config.clone(),
            values: values.into_iter().flatten().collect(),
        }
    }

    /// How to make a token for this server, as a command.
    fn token_command(&self) -> String {
        let mut command = "hypeman token create --user-id me --save".to_owned();
        if let Some(file) = &self.config {
            command.push_str(&format!(" --config {}", file.display()));
        }
        if let Some(directory) = &self.data_dir {
            command.push_str(&format!(" --data-dir {}", directory.display()));
        }
        command
    }
}

/// Runs the server until it is told to stop.
pub(crate) fn run(arguments: &ServeArgs, global: &GlobalArgs) -> Result<(), CliError> {
    if arguments.list_keys {
        return list_keys();
    }
    let values = config::load(&arguments.overrides())?;
    start_log(&values, global)?;
    let listen = options::listen_address(&values)?;
    let guest = guest_program::find(&values)?;
    let engine_options = options::engine(&values, guest)?;
    let (secret, new_secret) = config::make_secret(&values)?;
    choose_tls_provider();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|failure| CliError::io("cannot start", failure))?;
    runtime.block_on(async {
        let stop = stop_signal()?;
        let engine = Engine::open(engine_options).await.map_err(|failure| {
            CliError::failed_with(failure.to_string(), "`hypeman doctor` checks what a server needs")
        })?;
        let server_config = ServerConfig::new(listen, secret, env!("CARGO_PKG_VERSION"));
        let server = match bind(server_config, std::sync::Arc::clone(&engine)).await {
            Ok(server) => server,
            Err(failure) => {
                engine.close().await;
                return Err(CliError::failed_with(
                    failure.to_string(),
                    "--port 0 takes a free one",
                ));
            }
        };
        announce(arguments, server.address(), new_secret, global.quiet)?;
        server.run(stop).await;
        engine.close().await;
        Ok(())
    })
}

/// Says where the server listens, on a line of its own: programs that start a server wait for it.
fn announce(
    arguments: &ServeArgs,
    address: std::net::SocketAddr,
    new_secret: bool,
    quiet: bool,
) -> Result<(), CliError> {
    let shown = if address.ip().is_unspecified() {
        format!("http://127.0.0.1:{} (all addresses)", address.port())
    } else {
        format!("http://{address}")
    };
    output::line(&format!(
        "hypeman {} listens on {shown}",
        env!("CARGO_PKG_VERSION")
    ))?;
    if !quiet {
        let first = if new_secret { "made a new secret; " } else { "" };
        output::line(&format!(
            "{first}make a token with: {}",
            arguments.token_command()
        ))?;
    }
    Ok(())
}

/// Completes when the process is told to stop.
fn stop_signal() -> Result<impl Future<Output = ()>, CliError> {
    let watch = |kind| signal(kind).map_err(|failure| CliError::io("cannot watch for signals", failure));
    let (mut interrupt, mut terminate) = (watch(SignalKind::interrupt())?, watch(SignalKind::terminate())?);
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}

/// Starts the log on standard error, with the configured levels.
fn start_log(values: &Values, global: &GlobalArgs) -> Result<(), CliError> {
    const LEVELS: [&str; 5] = ["error", "warn", "info", "debug", "trace"];
    let checked = |key: &str, level: String| {
        let level = level.to_ascii_lowercase();
        if LEVELS.contains(&level.as_str()) {
            Ok(level)
        } else {
            Err(CliError::usage(format!(
                "{key} cannot be {level:?}: choose {}",
                LEVELS.join(", ")
            )))
        }
    };
    let base = if global.debug {
        "debug".to_owned()
    } else {
        values.text("logging.level").unwrap_or_default()
    };
    let mut directives = checked("logging.level", base)?;
    for (subsystem, level) in values.subsystem_levels() {
        let level = checked(&format!("logging.levels.{subsystem}"), level)?;
        directives.push_str(&format!(",hypeman_{subsystem}={level}"));
    }
    let filter = EnvFilter::try_new(&directives)
        .map_err(|failure| CliError::usage(format!("logging.levels: {failure}")))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(
            std::io::IsTerminal::is_terminal(&std::io::stderr()) && std::env::var_os("NO_COLOR").is_none(),
        )
        .try_init()
        .map_err(|failure| CliError::failed(format!("cannot start the log: {failure}")))
}

fn list_keys() -> Result<(), CliError> {
    let mut table = output::Table::new(&["KEY", "DEFAULT", "MEANING"]);
    for key in config::KEYS {
        let default = (!key.default.is_empty()).then(|| key.default.to_owned());
        table.row([Some(key.name.to_owned()), default, Some(key.help.to_owned())]);
    }
    output::text(&table.render())
}
