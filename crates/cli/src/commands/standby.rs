//! `hypeman standby`, `restore` and `fork`.

use clap::Args;
use hypeman_api::policy::{CompressionAlgorithm, SnapshotCompressionConfig, SnapshotPolicy};
use hypeman_api::snapshot::{ForkInstanceRequest, SnapshotTargetState, StandbyInstanceRequest};
use hypeman_core::snapshot::{Algorithm, CompressionChoice};
use reqwest::Method;

use super::Context;
use super::lifecycle::{announce, each};
use super::update::go_duration;
use crate::document::Document;
use crate::error::CliError;
use crate::output;
use crate::progress::Progress;

/// How memory is compressed, for one request.
#[derive(Debug, Clone, Args)]
pub struct CompressionArgs {
    /// Compress the memory; the instance's or the server's choice when absent
    #[arg(long, value_name = "true|false", action = clap::ArgAction::Set)]
    compression_enabled: Option<bool>,
    /// zstd or lz4; switches compression on
    #[arg(long, value_name = "NAME")]
    compression_algorithm: Option<Algorithm>,
    /// zstd 1 to 19, lz4 0 to 9; switches compression on
    #[arg(long, value_name = "LEVEL")]
    compression_level: Option<i32>,
}

impl CompressionArgs {
    /// What is sent; nothing when nothing was said.
    ///
    /// # Errors
    /// When the level is not one of the algorithm's.
    pub(crate) fn config(&self) -> Result<Option<SnapshotCompressionConfig>, CliError> {
        let config = config(
            self.compression_enabled,
            self.compression_algorithm,
            self.compression_level,
        );
        check(config.as_ref(), "--compression-level")?;
        Ok(config)
    }
}

/// How memory of all snapshots of an instance is kept.
#[derive(Debug, Clone, Args)]
pub(crate) struct SnapshotPolicyArgs {
    /// Compress the memory of its snapshots; the server's choice when absent
    #[arg(long, value_name = "true|false", action = clap::ArgAction::Set)]
    snapshot_compression_enabled: Option<bool>,
    /// zstd or lz4; switches compression of its snapshots on
    #[arg(long, value_name = "NAME")]
    snapshot_compression_algorithm: Option<Algorithm>,
    /// zstd 1 to 19, lz4 0 to 9; switches compression of its snapshots on
    #[arg(long, value_name = "LEVEL")]
    snapshot_compression_level: Option<i32>,
    /// How long memory stays uncompressed after standby, such as 30s
    #[arg(long, value_parser = go_duration, value_name = "DURATION")]
    snapshot_compression_delay: Option<String>,
}

impl SnapshotPolicyArgs {
    fn compression(&self) -> Option<SnapshotCompressionConfig> {
        config(
            self.snapshot_compression_enabled,
            self.snapshot_compression_algorithm,
            self.snapshot_compression_level,
        )
    }

    /// Checks what [`SnapshotPolicyArgs::policy`] sends.
    ///
    /// # Errors
    /// When the level is not one of the algorithm's.
    pub(crate) fn check(&self) -> Result<(), CliError> {
        check(self.compression().as_ref(), "--snapshot-compression-level")
    }

    /// What is sent; nothing when nothing was said.
    pub(crate) fn policy(&self) -> Option<SnapshotPolicy> {
        let policy = SnapshotPolicy {
            compression: self.compression(),
            standby_compression_delay: self.snapshot_compression_delay.clone(),
        };
        (policy != SnapshotPolicy::default()).then_some(policy)
    }
}

fn config(
    enabled: Option<bool>,
    algorithm: Option<Algorithm>,
    level: Option<i32>,
) -> Option<SnapshotCompressionConfig> {
    if enabled.is_none() && algorithm.is_none() && level.is_none() {
        return None;
    }
    Some(SnapshotCompressionConfig {
        enabled: enabled.unwrap_or(true),
        algorithm: algorithm.map(|algorithm| match algorithm {
            Algorithm::Zstd => CompressionAlgorithm::Zstd,
            Algorithm::Lz4 => CompressionAlgorithm::Lz4,
        }),
        level,
    })
}

fn check(config: Option<&SnapshotCompressionConfig>, flag: &str) -> Result<(), CliError> {
    let Some(config) = config else { return Ok(()) };
    let algorithm = config.algorithm.map(|algorithm| match algorithm {
        CompressionAlgorithm::Zstd => Algorithm::Zstd,
        CompressionAlgorithm::Lz4 => Algorithm::Lz4,
    });
    CompressionChoice::new(config.enabled, algorithm, config.level.map(i64::from))
        .map(drop)
        .map_err(|failure| CliError::usage(format!("{flag}: {failure}")))
}

/// Arguments of `standby`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hypeman standby web                                   memory on disk, nothing runs
  hypeman standby web --compression-algorithm zstd      and compressed in the background
  hypeman standby web --compression-enabled true --compression-delay 10m")]
pub struct StandbyArgs {
    /// Ids, names or unique prefixes of ids
    #[arg(required = true, value_name = "INSTANCE")]
    instances: Vec<String>,
    #[command(flatten)]
    compression: CompressionArgs,
    /// How long the memory stays uncompressed, such as 30s
    #[arg(long, value_parser = go_duration, value_name = "DURATION")]
    compression_delay: Option<String>,
}

/// Arguments of `restore`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hypeman restore web
  hypeman restore $(hypeman ps --state Standby -q)

`hypeman snapshot restore` goes back to a snapshot.")]
pub struct RestoreArgs {
    /// Ids, names or unique prefixes of ids
    #[arg(required = true, value_name = "INSTANCE")]
    instances: Vec<String>,
}

/// Arguments of `fork`.
#[derive(Debug, Args)]
#[command(after_help = "\
Prints the id of each fork on standard output. A running source goes on.

Examples:
  hypeman fork web web-2                                 of an instance in standby or stopped
  hypeman fork web web-2 --from-running                  also while it runs
  hypeman fork web worker --from-running --count 10      worker-1 to worker-10
  hypeman fork web kept --target-state Standby")]
pub struct ForkArgs {
    /// Id, name or unique prefix of the id of the source
    instance: String,
    /// Name of the fork
    name: String,
    /// The source may be running
    #[arg(long)]
    from_running: bool,
    #[command(flatten)]
    target: TargetArgs,
}

/// What forks are made into.
#[derive(Debug, Clone, Copy, Args)]
pub struct TargetArgs {
    /// State afterwards: Running, Standby or Stopped
    #[arg(long, value_parser = target_state, value_name = "STATE")]
    pub(crate) target_state: Option<SnapshotTargetState>,
    /// Make so many, their names numbered from 1
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100), value_name = "COUNT")]
    pub(crate) count: Option<u32>,
}

/// Reads a target state in any case.
pub(crate) fn target_state(text: &str) -> Result<SnapshotTargetState, String> {
    let mut letters = text.chars();
    let first = letters.next().map(|letter| letter.to_ascii_uppercase());
    let rest = letters.as_str().to_ascii_lowercase();
    first.into_iter().chain(rest.chars()).collect::<String>().parse()
}

/// Puts instances to standby.
pub(crate) async fn standby(context: &Context, arguments: &StandbyArgs) -> Result<(), CliError> {
    let body = StandbyInstanceRequest {
        compression: arguments.compression.config()?,
        compression_delay: arguments.compression_delay.clone(),
    };
    each(context, &arguments.instances, async |instance| {
        let mut progress = Progress::spinner(context.output.quiet());
        progress.say(&format!("putting {instance} to standby"));
        let answer = context
            .client
            .call(Method::POST, &["instances", instance, "standby"], Some(&body))
            .await;
        progress.finish();
        announce(context, instance, answer?)
    })
    .await
}

/// Lets instances go on.
pub(crate) async fn restore(context: &Context, arguments: &RestoreArgs) -> Result<(), CliError> {
    each(context, &arguments.instances, async |instance| {
        let mut progress = Progress::spinner(context.output.quiet());
        progress.say(&format!("restoring {instance}"));
        let answer = context
            .client
            .call(Method::POST, &["instances", instance, "restore"], None::<&()>)
            .await;
        progress.finish();
        announce(context, instance, answer?)
    })
    .await
}

/// Forks an instance.
pub(crate) async fn fork(context: &Context, arguments: &ForkArgs) -> Result<(), CliError> {
    let body = ForkInstanceRequest {
        name: arguments.name.clone(),
        from_running: arguments.from_running.then_some(true),
        target_state: arguments.target.target_state,
        count: arguments.target.count,
    };
    let mut progress = Progress::spinner(context.output.quiet());
    progress.say(&format!("forking {}", arguments.instance));
    let answer = context
        .client
        .call(
            Method::POST,
            &["instances", &arguments.instance, "fork"],
            Some(&body),
        )
        .await;
    progress.finish();
    forked(context, answer?)
}

/// Prints what became of forks: ids on standard output, failures on standard error.
///
/// # Errors
/// When any of them failed.
pub(crate) fn forked(context: &Context, mut answer: Document) -> Result<(), CliError> {
    answer.mask_values("env");
    let Some(forks) = answer.get("forks").map(Document::items) else {
        let shown = || format!("{}\n", output::clean(answer.text("id").unwrap_or("?")));
        return context.output.object(&answer, "id", shown);
    };
    if context.output.human() || context.output.quiet() {
        let made = forks.iter().filter_map(|fork| fork.text("instance.id"));
        output::text(
            &made
                .map(|id| format!("{}\n", output::clean(id)))
                .collect::<String>(),
        )?;
    } else {
        context.output.machine(&answer)?;
    }
    let failures: Vec<String> = forks
        .iter()
        .filter_map(|fork| {
            let message = fork.text("error.message").or(fork.text("error.code"))?;
            Some(format!("{}: {message}", fork.text("name").unwrap_or("?")))
        })
        .collect();
    match failures.first() {
        None => Ok(()),
        Some(first) if failures.len() == 1 => Err(CliError::failed(first.clone())),
        Some(_) => {
            failures.iter().for_each(|failure| output::note(failure));
            let message = format!("{} of {} forks failed", failures.len(), forks.len());
            Err(CliError::failed(message))
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};

    fn standby_of(line: &str) -> StandbyArgs {
        match Cli::try_parse_from(line.split(' ')).unwrap().command {
            Command::Standby(arguments) => arguments,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_choice_of_how_is_a_choice_to_do_it() {
        let none = standby_of("hypeman standby web");
        assert_eq!(none.compression.config().unwrap(), None);
        let level = standby_of("hypeman standby web --compression-level 3");
        let config = level.compression.config().unwrap().unwrap();
        assert!(config.enabled && config.level == Some(3) && config.algorithm.is_none());
        let off = standby_of("hypeman standby web --compression-enabled false");
        assert!(!off.compression.config().unwrap().unwrap().enabled);
    }

    #[test]
    fn wrong_values_are_refused_before_anything_is_sent() {
        for line in [
            "hypeman standby",
            "hypeman standby web --compression-algorithm gzip",
            "hypeman standby web --compression-delay soon",
            "hypeman fork web",
            "hypeman fork web copy --count 0",
            "hypeman fork web copy --count 101",
            "hypeman fork web copy --target-state Paused",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
        let wrong = standby_of("hypeman standby web --compression-algorithm lz4 --compression-level 10");
        assert!(wrong.compression.config().is_err());
    }

    #[test]
    fn targets_are_read_in_any_case() {
        assert_eq!(target_state("standby"), Ok(SnapshotTargetState::Standby));
        assert_eq!(target_state("RUNNING"), Ok(SnapshotTargetState::Running));
        assert!(target_state("").is_err());
    }
}
