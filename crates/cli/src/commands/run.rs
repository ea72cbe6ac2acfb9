//! `hypeman run`: from an image reference to a running instance, in one command.
//!
//! ```text
//! image known and ready? ─no─► pull, with progress ─► create ─► print the id ─► wait for Running ─► done
//!                                                        │            └ stopped: exit reason, last log lines
//!                                                        └ --rm: follow the console to the end, delete, pass the code on
//! ```

use std::time::Duration;

use clap::Args;
use hypeman_api::instance::{CreateInstanceNetwork, Hypervisor, InstanceState};
use hypeman_api::{CreateImageRequest, CreateInstanceRequest};
use rand::Rng as _;
use reqwest::Method;

use super::standby::SnapshotPolicyArgs;
use super::{Context, image, logs, pair, update, variable, wait};
use crate::document::Document;
use crate::error::{CliError, exit};
use crate::output;
use crate::progress::Progress;

/// Lines of the console that are shown when an instance fails.
const LAST_LINES: u32 = 15;

/// How long `--rm` waits for further console output once the instance has stopped.
const DRAIN: Duration = Duration::from_millis(300);

/// Arguments of `run`.
#[derive(Debug, Args)]
#[command(after_help = "\
Prints the id of the instance on standard output; all else goes to standard error.

Examples:
  hypeman run nginx
  hypeman run --name web --memory 512MB --cpus 1 -e MODE=prod -l team=core nginx:1.27
  hypeman run --rm alpine -- echo hello        show the console, delete it at the end, pass its exit code on
  hypeman run --network false --ttl 1h alpine -- sleep infinity
  id=$(hypeman run -d alpine -- sleep 600)     do not wait until it runs")]
pub struct RunArgs {
    /// Image reference; pulled when the server does not have it
    image: String,
    /// Arguments for the image's entrypoint, after -- (the same as --cmd)
    #[arg(last = true, value_name = "COMMAND", conflicts_with = "cmd")]
    command: Vec<String>,
    /// Name of the instance; made from the image's when absent
    #[arg(long)]
    name: Option<String>,
    /// Set an environment variable; KEY alone takes its value from here
    #[arg(short, long = "env", value_parser = variable, value_name = "KEY=VALUE")]
    env: Vec<(String, String)>,
    /// Memory [default: 1GB]
    #[arg(long, visible_alias = "size", value_parser = size, value_name = "SIZE")]
    memory: Option<String>,
    /// Virtual CPUs [default: 2]
    #[arg(long, visible_alias = "vcpus", value_parser = clap::value_parser!(i32).range(1..), value_name = "COUNT")]
    cpus: Option<i32>,
    /// Size of the writable layer [default: 10GB]
    #[arg(long, value_parser = size, value_name = "SIZE")]
    overlay_size: Option<String>,
    /// Memory that can be added while it runs (not every hypervisor can) [default: none]
    #[arg(long, value_parser = size, value_name = "SIZE")]
    hotplug_size: Option<String>,
    /// Connect it to the network [default: true]
    #[arg(long, value_name = "true|false", action = clap::ArgAction::Set)]
    network: Option<bool>,
    /// Hypervisor: cloud-hypervisor (ch), firecracker (fc), qemu, qemu-microvm (microvm), vz; the server's default when absent
    #[arg(long, visible_alias = "hv", value_parser = hypervisor, value_name = "KIND")]
    hypervisor: Option<Hypervisor>,
    /// Limit of its disks, such as 100MB/s
    #[arg(long, value_name = "RATE")]
    disk_io: Option<String>,
    /// Limit of its downloads, such as 1Gbps or 100MB/s
    #[arg(long, value_name = "RATE")]
    bandwidth_down: Option<String>,
    /// Limit of its uploads
    #[arg(long, value_name = "RATE")]
    bandwidth_up: Option<String>,
    /// Replace the image's entrypoint (repeat for each word)
    #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
    entrypoint: Vec<String>,
    /// Replace the image's arguments (repeat for each word)
    #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
    cmd: Vec<String>,
    /// Put a tag on the instance (repeat for more)
    #[arg(short = 'l', long = "tag", visible_alias = "metadata", value_parser = pair, value_name = "KEY=VALUE")]
    tags: Vec<(String, String)>,
    /// Platform of a multi-platform image; the server's own when absent
    #[arg(long, value_name = "OS/ARCH")]
    platform: Option<String>,
    /// Leave the guest agent out: no exec, no cp, Running as soon as the program starts
    #[arg(long)]
    skip_guest_agent: bool,
    /// Leave kernel headers out
    #[arg(long)]
    skip_kernel_headers: bool,
    /// How memory of its snapshots is kept.
    #[command(flatten)]
    snapshots: SnapshotPolicyArgs,
    /// Delete it after this time, such as 90s, 30m or 2h45m
    #[arg(long, value_parser = update::go_duration, value_name = "DURATION", conflicts_with = "expires_at")]
    ttl: Option<String>,
    /// Delete it at this time, in RFC 3339
    #[arg(long, value_parser = update::time, value_name = "TIME")]
    expires_at: Option<String>,
    /// Show the console until the instance stops, then delete it and pass its exit code on
    #[arg(long, conflicts_with = "detach")]
    rm: bool,
    /// Return as soon as it is created
    #[arg(short, long)]
    detach: bool,
    /// How long to wait until it runs
    #[arg(long, value_parser = super::duration, default_value = "5m", value_name = "DURATION")]
    wait_timeout: Duration,
}

fn size(text: &str) -> Result<String, String> {
    hypeman_core::size::parse(text)
        .map(|_| text.to_owned())
        .map_err(|failure| failure.to_string())
}

/// Reads a hypervisor, in its short form too.
pub(crate) fn hypervisor(text: &str) -> Result<Hypervisor, String> {
    match text {
        "ch" => Ok(Hypervisor::CloudHypervisor),
        "fc" => Ok(Hypervisor::Firecracker),
        "microvm" => Ok(Hypervisor::QemuMicrovm),
        other => other.parse().map_err(|failure: String| {
            let names: Vec<_> = Hypervisor::ALL.iter().map(|kind| kind.as_str()).collect();
            format!(
                "{failure}; choose one of {}, or ch, fc, microvm",
                names.join(", ")
            )
        }),
    }
}

impl RunArgs {
    fn request(&self, name: String) -> CreateInstanceRequest {
        let words = |words: &[String]| (!words.is_empty()).then(|| words.to_vec());
        let network = CreateInstanceNetwork {
            enabled: self.network,
            bandwidth_download: self.bandwidth_down.clone(),
            bandwidth_upload: self.bandwidth_up.clone(),
            egress: None,
        };
        CreateInstanceRequest {
            name,
            image: self.image.clone(),
            platform: self.platform.clone(),
            size: self.memory.clone(),
            hotplug_size: self.hotplug_size.clone(),
            overlay_size: self.overlay_size.clone(),
            vcpus: self.cpus,
            disk_io_bps: self.disk_io.clone(),
            env: self.env.iter().cloned().collect(),
            network: (network != CreateInstanceNetwork::default()).then_some(network),
            hypervisor: self.hypervisor,
            ttl: self.ttl.clone(),
            expires_at: self.expires_at.clone(),
            skip_kernel_headers: self.skip_kernel_headers.then_some(true),
            skip_guest_agent: self.skip_guest_agent.then_some(true),
            snapshot_policy: self.snapshots.policy(),
            entrypoint: words(&self.entrypoint),
            cmd: words(&self.cmd).or_else(|| words(&self.command)),
            tags: self.tags.iter().cloned().collect(),
            ..CreateInstanceRequest::default()
        }
    }
}

/// A name made from the image's: `docker.io/library/Nginx:1.27` becomes `nginx-x4k2p9`.
fn invent_name(image: &str) -> String {
    let repository = image.split('@').next().unwrap_or_default();
    let last = repository.rsplit('/').next().unwrap_or_default();
    let base: String = last
        .split(':')
        .next()
        .unwrap_or_default()
        .to_ascii_lowercase()
        .chars()
        .map(|character| {
            if character.is_ascii_alphanumeric() {
                character
            } else {
                '-'
            }
        })
        .take(40)
        .collect();
    let base = base.trim_matches('-');
    let mut random = rand::rng();
    // Random, not the clock: two runs in one moment must not collide.
    let suffix: String = (0..6)
        .map(|_| char::from(b"abcdefghijklmnopqrstuvwxyz0123456789"[random.random_range(0..36)]))
        .collect();
    format!("{}-{suffix}", if base.is_empty() { "instance" } else { base })
}

/// Creates, boots and reports.
pub(crate) async fn run(context: &Context, arguments: RunArgs) -> Result<u8, CliError> {
    let name = arguments
        .name
        .clone()
        .unwrap_or_else(|| invent_name(&arguments.image));
    arguments.snapshots.check()?;
    hypeman_core::name::check(&name)
        .map_err(|failure| CliError::usage(format!("--name {name:?}: {failure}")))?;
    have_image(context, &arguments).await?;

    let body = arguments.request(name.clone());
    let mut progress = Progress::spinner(context.output.quiet());
    progress.say(&format!("creating {name}"));
    let created = context
        .client
        .call(Method::POST, &["instances"], Some(&body))
        .await;
    progress.finish();
    let created = created?;
    let id = created
        .text("id")
        .ok_or_else(|| CliError::Protocol("an instance without id".to_owned()))?
        .to_owned();

    if arguments.rm {
        return attached(context, &id, &name).await;
    }
    let human = context.output.human() || context.output.quiet();
    if human {
        output::line(&output::clean(&id))?;
    }
    let settled = if arguments.detach {
        created
    } else {
        settle(context, &arguments, &id, &name).await?
    };
    if !human {
        let mut document = settled;
        document.mask_values("env");
        context.output.machine(&document)?;
    }
    Ok(exit::SUCCESS)
}

/// Makes sure that the server has the image, pulling it with progress when it has not.
async fn have_image(context: &Context, arguments: &RunArgs) -> Result<(), CliError> {
    let wanted = |platform: Option<&str>| match (&arguments.platform, platform) {
        (Some(wanted), Some(found)) => wanted == found,
        _ => true,
    };
    match context.client.get(&["images", &arguments.image], &[]).await {
        Ok(image) if image.text("status") == Some("ready") && wanted(image.text("platform")) => return Ok(()),
        Ok(image) if wanted(image.text("platform")) && image.text("status") != Some("failed") => {
            let mut progress = Progress::spinner(context.output.quiet());
            return image::wait_ready(context, image, &mut progress).await.map(drop);
        }
        // Absent, failed before, or there for another platform: ask for it (again).
        Ok(_) => {}
        Err(absent) if absent.is_not_found() => {}
        Err(failure) => return Err(failure),
    }
    let request = CreateImageRequest {
        name: arguments.image.clone(),
        platform: arguments.platform.clone(),
        credentials: None,
        tags: std::collections::BTreeMap::new(),
    };
    image::create_and_wait(context, &request).await.map(drop)
}

/// Waits until the instance runs. A program that has already ended well counts too.
async fn settle(context: &Context, arguments: &RunArgs, id: &str, name: &str) -> Result<Document, CliError> {
    let mut progress = Progress::spinner(context.output.quiet());
    progress.say(&format!("booting {name}"));
    let waiting = wait::until(context, id, InstanceState::Running, arguments.wait_timeout);
    let answer = tokio::select! {
        answer = waiting => answer?,
        _ = tokio::signal::ctrl_c() => {
            progress.finish();
            output::note(&format!("{name} goes on booting: `hypeman rm -f {name}` deletes it"));
            return Err(CliError::Interrupted);
        }
    };
    progress.finish();
    let instance = context.client.get(&["instances", id], &[]).await?;
    let state = instance.text("state").unwrap_or_default();
    if state == "Running" || answer.text("state") == Some("Running") {
        return Ok(instance);
    }
    if answer.flag("timed_out") == Some(true) && !matches!(state, "Stopped" | "Shutdown") {
        last_lines(context, id).await;
        return Err(CliError::TimedOut(format!(
            "{name} is still {state} after {}",
            hypeman_core::duration::format(arguments.wait_timeout)
        )));
    }
    if state == "Stopped" && instance.integer("exit_code") == Some(0) {
        if !context.output.quiet() {
            output::note(&format!(
                "{name} has ended with exit code 0: `hypeman logs {name}` shows its output"
            ));
        }
        return Ok(instance);
    }
    last_lines(context, id).await;
    Err(CliError::failed_with(
        failure_text(name, &instance),
        format!("`hypeman logs {name}` shows all of its console; `hypeman rm {name}` deletes it"),
    ))
}

fn failure_text(name: &str, instance: &Document) -> String {
    let state = instance.text("state").unwrap_or("gone");
    let code = instance
        .integer("exit_code")
        .map(|code| format!(" with exit code {code}"))
        .unwrap_or_default();
    let reason = instance
        .text("exit_message")
        .or_else(|| instance.text("state_error"))
        .map(|reason| format!(": {reason}"))
        .unwrap_or_default();
    format!("{name} is {state}{code}{reason}")
}

/// Shows the end of the console. Best effort: the failure itself is reported anyway.
async fn last_lines(context: &Context, id: &str) {
    let mut lines = Vec::new();
    let collected = logs::lines(context, id, LAST_LINES, false, logs::Source::App, |line| {
        lines.push(line.to_owned());
        Ok(())
    });
    if collected.await.is_ok() && !lines.is_empty() {
        output::note("last lines of its console:");
        for line in lines {
            output::note(&format!("  {line}"));
        }
    }
}

/// `--rm`: shows the console until the instance stops, deletes it and answers its exit code.
async fn attached(context: &Context, id: &str, name: &str) -> Result<u8, CliError> {
    if !context.output.quiet() {
        output::note(&format!("{name} ({id})"));
    }
    let outcome = tokio::select! {
        outcome = follow(context, id) => outcome,
        _ = tokio::signal::ctrl_c() => Err(CliError::Interrupted),
    };
    let instance = context.client.get(&["instances", id], &[]).await;
    let at_once = [("graceful_shutdown".to_owned(), "false".to_owned())];
    match context.client.delete(&["instances", id], &at_once).await {
        Err(failure) if !failure.is_not_found() => {
            output::warn(&format!("{name} could not be deleted: {failure}"));
        }
        _ => {}
    }
    outcome?;
    let instance = instance?;
    match instance.integer("exit_code") {
        Some(code) => Ok(u8::try_from(code).unwrap_or(exit::FAILURE)),
        None => Err(CliError::failed(failure_text(name, &instance))),
    }
}

async fn follow(context: &Context, id: &str) -> Result<(), CliError> {
    let (line_seen, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let printing = logs::lines(context, id, 100_000, true, logs::Source::App, |line| {
        let _ = line_seen.send(());
        output::line(line)
    });
    tokio::pin!(printing);
    let stopped = async {
        loop {
            let answer = wait::until(context, id, InstanceState::Stopped, Duration::from_secs(3600)).await?;
            if answer.flag("timed_out") != Some(true) {
                return Ok::<(), CliError>(());
            }
        }
    };
    tokio::pin!(stopped);
    let mut printing_done = false;
    loop {
        tokio::select! {
            outcome = &mut printing, if !printing_done => {
                // The log may not be there yet, or end before the instance does: the instance decides.
                if let Err(failure @ CliError::Io { .. }) = outcome {
                    return Err(failure);
                }
                printing_done = true;
            }
            outcome = &mut stopped => {
                outcome?;
                break;
            }
        }
    }
    // What the console said last may still be on its way.
    while !printing_done {
        while seen.try_recv().is_ok() {}
        tokio::select! {
            outcome = &mut printing => {
                printing_done = true;
                if let Err(failure @ CliError::Io { .. }) = outcome {
                    return Err(failure);
                }
            }
            line = seen.recv() => if line.is_none() { break },
            () = tokio::time::sleep(DRAIN) => break,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};

    fn parse(line: &str) -> RunArgs {
        match Cli::try_parse_from(line.split(' ')).unwrap().command {
            Command::Run(arguments) => *arguments,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_what_was_asked_for_is_sent() {
        let request = parse("hypeman run alpine").request("a".to_owned());
        assert_eq!(
            serde_json::to_string(&request).unwrap(),
            r#"{"name":"a","image":"alpine"}"#
        );
    }

    #[test]
    fn flags_become_fields() {
        let arguments = parse(
            "hypeman run --memory 512MB --cpus 1 -e A=1 -e B=x=y --network false --hypervisor microvm \
             --disk-io 10MB/s -l team=core --ttl 1h --snapshot-compression-algorithm lz4 alpine --skip-guest-agent -- sleep -x 5",
        );
        let request = arguments.request("job".to_owned());
        assert_eq!(request.size.as_deref(), Some("512MB"));
        assert_eq!(request.env["B"], "x=y");
        assert_eq!(request.network.unwrap().enabled, Some(false));
        assert_eq!(request.hypervisor, Some(Hypervisor::QemuMicrovm));
        assert_eq!(request.cmd.unwrap(), ["sleep", "-x", "5"]);
        assert_eq!(request.skip_guest_agent, Some(true));
        assert_eq!(request.hotplug_size, None);
        let compression = request.snapshot_policy.unwrap().compression.unwrap();
        assert!(compression.enabled && compression.level.is_none());
    }

    #[test]
    fn wrong_values_are_refused_before_anything_is_sent() {
        for line in [
            "hypeman run --memory 1.5GB x",
            "hypeman run --cpus 0 x",
            "hypeman run --hypervisor xen x",
            "hypeman run --ttl soon x",
            "hypeman run --ttl 1h --expires-at 2030-01-31T12:00:00Z x",
            "hypeman run --expires-at tomorrow x",
            "hypeman run -l team x",
            "hypeman run",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
    }

    #[test]
    fn invented_names_are_valid_names() {
        for image in [
            "alpine",
            "docker.io/library/Nginx:1.27",
            "h:5000/a_b.c@sha256:00",
            "x/___",
            "",
            "A".repeat(200).as_str(),
        ] {
            let name = invent_name(image);
            assert!(hypeman_core::name::is_valid(&name), "{image} gave {name}");
        }
        assert!(invent_name("docker.io/library/Nginx:1.27").starts_with("nginx-"));
    }
}
