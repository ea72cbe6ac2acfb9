//! The commands, one file a family. Each holds its arguments and its code.

pub mod completion;
pub mod cp;
pub mod doctor;
pub mod exec;
pub mod image;
pub mod inspect;
pub mod lifecycle;
pub mod logs;
pub mod pager;
pub mod pagers;
pub mod ps;
pub mod push;
pub mod run;
pub mod serve;
pub mod service;
pub mod snapshot;
pub mod standby;
pub mod stats;
pub mod token;
pub mod update;
pub mod wait;

use std::future::Future;

use crate::args::{Cli, Command, GlobalArgs};
use crate::client::Client;
use crate::error::{CliError, exit};
use crate::output::{Failures, Output};
use crate::settings::Settings;

/// What a command that talks to the server works with.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) output: Output,
    pub(crate) global: GlobalArgs,
}

impl Context {
    /// Tells a failure that does not end the command.
    pub(crate) fn report(&self, failure: &CliError) {
        Failures::new(&self.global).report(failure);
    }
}

/// Runs a command and answers its exit code.
///
/// # Errors
/// Whatever the command fails with.
pub fn dispatch(cli: Cli) -> Result<u8, CliError> {
    let Cli { global, command } = cli;
    match command {
        // These work alone: no server, no settings, no runtime.
        Command::Version(arguments) => done(service::version(&arguments, &global)),
        Command::Completion(arguments) => done(completion::run(&arguments)),
        Command::Token(command) => done(token::run(&command, &global)),
        Command::Doctor(arguments) => doctor::run(&arguments, &global),
        Command::Pager(arguments) => done(pager::run(&arguments)),
        Command::Serve(arguments) => done(serve::run(&arguments, &global)),
        // These talk to a server.
        Command::Run(arguments) => online(global, async |context| run::run(context, *arguments).await),
        Command::Ps(arguments) => online(global, async |context| done(ps::run(context, &arguments).await)),
        Command::Inspect(arguments) => online(global, async |context| {
            done(inspect::run(context, &arguments).await)
        }),
        Command::Logs(arguments) => online(global, async |context| logs::run(context, &arguments).await),
        Command::Exec(arguments) => online(global, async |context| exec::run(context, arguments).await),
        Command::Cp(arguments) => online(global, async |context| done(cp::run(context, &arguments).await)),
        Command::Stop(arguments) => online(global, async |context| {
            done(lifecycle::stop(context, &arguments).await)
        }),
        Command::Start(arguments) => online(global, async |context| {
            done(lifecycle::start(context, &arguments).await)
        }),
        Command::Rm(arguments) => online(global, async |context| {
            done(lifecycle::rm(context, &arguments).await)
        }),
        Command::Standby(arguments) => online(global, async |context| {
            done(standby::standby(context, &arguments).await)
        }),
        Command::Restore(arguments) => online(global, async |context| {
            done(standby::restore(context, &arguments).await)
        }),
        Command::Fork(arguments) => online(global, async |context| {
            done(standby::fork(context, &arguments).await)
        }),
        Command::Snapshot(command) => online(global, async |context| {
            done(snapshot::run(context, &command).await)
        }),
        Command::Wait(arguments) => {
            online(global, async |context| done(wait::run(context, &arguments).await))
        }
        Command::Stats(arguments) => online(global, async |context| {
            done(stats::run(context, &arguments).await)
        }),
        Command::Update(arguments) => online(global, async |context| {
            done(update::run(context, &arguments).await)
        }),
        Command::Pull(arguments) => online(global, async |context| {
            done(image::pull(context, &arguments).await)
        }),
        Command::Push(arguments) => {
            online(global, async |context| done(push::run(context, &arguments).await))
        }
        Command::Image(command) => online(global, async |context| done(image::run(context, &command).await)),
        Command::Health(_) => online(global, async |context| done(service::health(context).await)),
        Command::Capabilities(_) => {
            online(global, async |context| done(service::capabilities(context).await))
        }
        Command::Resources(_) => online(global, async |context| done(service::resources(context).await)),
        Command::Pagers(_) => online(global, async |context| done(pagers::run(context).await)),
    }
}

fn done(outcome: Result<(), CliError>) -> Result<u8, CliError> {
    outcome.map(|()| exit::SUCCESS)
}

/// Sets up settings, client and a small runtime, and runs `command` on it.
fn online<F>(global: GlobalArgs, command: F) -> Result<u8, CliError>
where
    F: AsyncFnOnce(&Context) -> Result<u8, CliError>,
{
    let settings = Settings::load(&global)?;
    let client = Client::new(settings, global.debug);
    let context = Context {
        client,
        output: Output::new(&global),
        global,
    };
    block_on(command(&context))
}

/// Runs a future on a runtime of one thread, which is left behind at once when the future is done.
pub(crate) fn block_on<T>(future: impl Future<Output = Result<T, CliError>>) -> Result<T, CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|failure| CliError::io("cannot start", failure))?;
    let outcome = runtime.block_on(future);
    // A blocked read of standard input must not hold up the exit.
    runtime.shutdown_background();
    outcome
}

/// Reads `KEY=VALUE`.
pub(crate) fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is not KEY=VALUE")),
    }
}

/// Reads `KEY=VALUE`, or `KEY` alone, whose value is taken from the environment of this process.
pub(crate) fn variable(text: &str) -> Result<(String, String), String> {
    if text.contains('=') {
        return pair(text);
    }
    match std::env::var(text) {
        Ok(value) if !text.is_empty() => Ok((text.to_owned(), value)),
        _ => Err(format!("{text:?} has no = and is not in the environment")),
    }
}

/// The query parameters of a tag filter: `tags[key]=value`.
pub(crate) fn tag_query(tags: &[(String, String)]) -> Vec<(String, String)> {
    tags.iter()
        .map(|(key, value)| (format!("tags[{key}]"), value.clone()))
        .collect()
}

/// A duration in Go's syntax, as argument.
pub(crate) fn duration(text: &str) -> Result<std::time::Duration, String> {
    hypeman_core::duration::parse_non_negative(text).map_err(|failure| failure.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_need_a_key() {
        assert_eq!(pair("a=b=c").unwrap(), ("a".to_owned(), "b=c".to_owned()));
        assert_eq!(pair("a=").unwrap(), ("a".to_owned(), String::new()));
        assert!(pair("=b").is_err());
        assert!(pair("a").is_err());
        assert!(variable("HYPEMAN_TEST_SURELY_UNSET").is_err());
        assert_eq!(
            tag_query(&[("team".to_owned(), "a b".to_owned())])[0].0,
            "tags[team]"
        );
    }
}
