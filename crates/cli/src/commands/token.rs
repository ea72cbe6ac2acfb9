//! `hypeman token`: makes access tokens offline, with the server's secret.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use hypeman_server::auth;

use crate::args::GlobalArgs;
use crate::config::{self, Overrides, SECRET_FILE};
use crate::document::Document;
use crate::error::CliError;
use crate::output::{self, Output, Table};
use crate::settings;

/// Commands about tokens.
#[derive(Debug, Subcommand)]
#[command(after_help = "\
Examples:
  hypeman token create --user-id me --save
  hypeman token list-scopes")]
pub enum TokenCommand {
    /// Make a token
    Create(CreateArgs),
    /// List the scopes that a token can be limited to
    ListScopes,
}

/// Arguments of `token create`.
#[derive(Debug, Args)]
#[command(after_help = "\
The secret is jwt_secret of the server's configuration (or the variable JWT_SECRET), else the file \
jwt_secret in its data directory. There is no list of tokens: to revoke them all, change the secret \
and restart the server.

Examples:
  hypeman token create --user-id me --save                     remember it in ~/.config/hypeman/cli.yaml
  export HYPEMAN_API_KEY=$(hypeman token create --user-id ci --duration 24h)
  hypeman token create --user-id viewer --scopes instance:read,image:read
  sudo hypeman token create --user-id me                       for a server that runs as root")]
pub struct CreateArgs {
    /// Who the token is for; shows in the server's log
    #[arg(long, visible_alias = "user", value_name = "NAME")]
    user_id: String,
    /// How long it is valid
    #[arg(long, value_parser = super::duration, default_value = "8760h", value_name = "DURATION")]
    duration: std::time::Duration,
    /// Limit it to these scopes, separated by commas; everything when absent
    #[arg(long, value_name = "SCOPES")]
    scopes: Option<String>,
    /// Keep it as api_key in ~/.config/hypeman/cli.yaml (with --base-url, that too)
    #[arg(long)]
    save: bool,
    /// Data directory of the server
    #[arg(long, value_name = "DIRECTORY")]
    data_dir: Option<PathBuf>,
    /// Configuration file of the server
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Runs a command about tokens.
pub(crate) fn run(command: &TokenCommand, global: &GlobalArgs) -> Result<(), CliError> {
    match command {
        TokenCommand::Create(arguments) => create(arguments, global),
        TokenCommand::ListScopes => list_scopes(global),
    }
}

fn create(arguments: &CreateArgs, global: &GlobalArgs) -> Result<(), CliError> {
    let data_dir = arguments
        .data_dir
        .as_ref()
        .map(|path| ("data_dir", path.display().to_string()));
    let overrides = Overrides {
        file: arguments.config.clone(),
        values: data_dir.into_iter().collect(),
    };
    let values = config::load(&overrides)?;
    let secret = config::find_secret(&values).map_err(|failure| match failure {
        CliError::Io { context, source } if source.kind() == std::io::ErrorKind::PermissionDenied => {
            CliError::failed_with(
                format!("{context}: {source}"),
                "run this as the user that runs the server, for example with sudo",
            )
        }
        failure => failure,
    })?;
    let Some(secret) = secret else {
        let place = config::data_directory(&values)?.join(SECRET_FILE);
        return Err(CliError::failed_with(
            format!("there is no secret at {}", place.display()),
            "start the server once (`hypeman serve` makes it), or name its --data-dir or --config",
        ));
    };
    let scopes = match &arguments.scopes {
        Some(text) => auth::parse_list(text).map_err(|failure| {
            CliError::usage_with(failure.to_string(), "`hypeman token list-scopes` lists them")
        })?,
        None => None,
    };
    if scopes.as_ref().is_some_and(Vec::is_empty) {
        return Err(CliError::usage(
            "--scopes names no scope; leave it out for a token that may do everything",
        ));
    }
    let token = auth::mint(&secret, &arguments.user_id, arguments.duration, scopes.as_deref())
        .map_err(|failure| CliError::usage(failure.to_string()))?;
    if arguments.save {
        let path = settings::settings_path()
            .ok_or_else(|| CliError::failed("there is no home directory to save the token in"))?;
        let mut file = settings::read_file(&path)?;
        file.api_key = Some(token.clone());
        if let Some(base_url) = &global.base_url {
            file.base_url = Some(base_url.clone());
        }
        settings::write_file(&path, &file)?;
        output::note(&format!("saved in {}", path.display()));
        if global.quiet {
            return Ok(());
        }
    }
    let document = Document::Object(vec![("token".to_owned(), Document::String(token.clone()))]);
    Output::new(global).object(&document, "token", || format!("{token}\n"))
}

fn list_scopes(global: &GlobalArgs) -> Result<(), CliError> {
    let text = |text: &str| Document::String(text.to_owned());
    let list: Vec<Document> = auth::ALL
        .iter()
        .map(|scope| {
            Document::Object(vec![
                ("scope".to_owned(), text(scope.as_str())),
                ("description".to_owned(), text(scope.description())),
            ])
        })
        .collect();
    Output::new(global).list(&list, "scope", || {
        let mut table = Table::new(&["SCOPE", "ALLOWS"]);
        for item in &list {
            table.row([
                item.text("scope").map(str::to_owned),
                item.text("description").map(str::to_owned),
            ]);
        }
        table.render()
    })
}
