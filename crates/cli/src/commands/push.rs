//! `hypeman push`: a local image into the server, through its registry.
//!
//! The image is a `docker save` archive, an OCI archive (both also compressed, or on standard input) or an OCI
//! layout directory. Layers that the server has already are not sent.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use clap::Args;
use hypeman_images::archive::{Archive, ArchiveOptions, ArchivedImage};
use hypeman_images::registry::PushOptions;
use hypeman_images::{
    ClientOptions, Credentials, ImageError, Reference, RegistryClient, TransferEvent, TransferObserver,
};

use super::{Context, image};
use crate::client::choose_tls_provider;
use crate::document::Document;
use crate::error::CliError;
use crate::output;
use crate::progress::Progress;

/// How often the image that the server makes from a push is looked for before it appears.
const APPEARS_ROUNDS: u32 = 50;

/// How long between two looks.
const APPEARS_PAUSE: std::time::Duration = std::time::Duration::from_millis(200);

/// Arguments of `push`.
#[derive(Debug, Args)]
#[command(after_help = "\
IMAGE is a docker save archive, an OCI archive, an OCI layout directory, or - for an archive on \
standard input. TARGET is repository[:tag] on the server; the archive's own name when absent. The \
image is then known as HOST:PORT/repository:tag, which is printed.

Examples:
  docker save app:1 | hypeman push - app:1
  hypeman push app.tar app:1
  hypeman push ./oci-layout team/app:2
  hypeman run $(hypeman push -q app.tar app:1)")]
pub struct PushArgs {
    /// Archive, OCI layout directory, or -
    image: String,
    /// repository[:tag] on the server
    target: Option<String>,
    /// Which image of an archive that has several
    #[arg(long, value_name = "NAME")]
    select: Option<String>,
    /// Return as soon as it is sent, do not wait until it can be run
    #[arg(short, long)]
    detach: bool,
}

/// Pushes an image.
pub(crate) async fn run(context: &Context, arguments: &PushArgs) -> Result<(), CliError> {
    let archive = open(&arguments.image).await?;
    let wanted = arguments.select.as_deref();
    let chosen = archive.image(wanted).map_err(|failure| {
        CliError::failed_with(
            format!("{}: {failure}", arguments.image),
            "choose one with --select NAME",
        )
    })?;
    let chosen = chosen.clone();
    let target = target(context, arguments, &chosen)?;
    let credentials = context
        .client
        .settings()
        .api_key
        .as_deref()
        .map(Credentials::registry_token);
    choose_tls_provider();
    let plain = context.client.settings().base_url.starts_with("http:");
    let client = RegistryClient::new(ClientOptions {
        insecure: if plain {
            vec![target.registry().to_owned()]
        } else {
            Vec::new()
        },
        ..ClientOptions::default()
    })
    .map_err(|failure| explain(&failure))?;

    let observer = Observer::new(context.output.quiet(), &target);
    let pushing = Arc::new(archive);
    let pushed = client
        .push(
            &pushing,
            &chosen.root,
            &target,
            credentials.as_ref(),
            &PushOptions::default(),
            &observer,
        )
        .await
        .map_err(|failure| explain(&failure))?;
    observer.finish();
    if context.global.debug {
        output::note(&format!(
            "sent {} of {} layers' blobs",
            output::bytes(pushed.bytes),
            pushed.layers
        ));
    }
    let name = target.to_string();
    let record = if arguments.detach {
        Document::Object(vec![
            ("name".to_owned(), Document::String(name.clone())),
            ("digest".to_owned(), Document::String(pushed.digest.to_string())),
        ])
    } else {
        appear(context, &name).await?
    };
    context.output.object(&record, "name", || {
        format!("{}\n", output::clean(record.text("name").unwrap_or(&name)))
    })
}

async fn open(image: &str) -> Result<Archive, CliError> {
    let options = ArchiveOptions::default();
    let opened = if image == "-" {
        Archive::read(std::io::stdin(), &options).await
    } else {
        if !Path::new(image).exists() {
            return Err(CliError::failed_with(
                format!("{image}: there is no such archive or directory"),
                format!("for an image of the local Docker: `docker save {image} | hypeman push - {image}`"),
            ));
        }
        Archive::open(image, &options).await
    };
    opened.map_err(|failure| {
        CliError::failed_with(
            format!("{image}: {failure}"),
            "an image is a docker save archive, an OCI archive or an OCI layout directory",
        )
    })
}

/// The name on the server: its host and port, then what the user or the archive calls the image.
fn target(context: &Context, arguments: &PushArgs, chosen: &ArchivedImage) -> Result<Reference, CliError> {
    let url = context.client.url(&[])?;
    let host = url.host_str().unwrap_or_default();
    let host = match url.port_or_known_default() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    };
    let named = match (&arguments.target, chosen.names.first()) {
        (Some(target), _) => target.clone(),
        (None, Some(name)) => name.clone(),
        (None, None) => {
            return Err(CliError::usage_with(
                "the archive does not name its image",
                format!("name it: `hypeman push {} app:1`", arguments.image),
            ));
        }
    };
    on_server(&host, &named)
}

/// Puts a name on the server `host`. A name that carries a registry loses it, unless it is this server.
fn on_server(host: &str, named: &str) -> Result<Reference, CliError> {
    let refuse = |failure: ImageError| CliError::usage(format!("{named}: {failure}"));
    if let Some(rest) = named.strip_prefix(&format!("{host}/")) {
        return Reference::parse(&format!("{host}/{rest}")).map_err(refuse);
    }
    let repository = match named.split_once('/') {
        Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => rest,
        _ => named,
    };
    Reference::parse(&format!("{host}/{repository}")).map_err(refuse)
}

/// Waits until the server has made an image of what was pushed.
async fn appear(context: &Context, name: &str) -> Result<Document, CliError> {
    let mut progress = Progress::spinner(context.output.quiet());
    progress.say(&format!("{name}: sent"));
    let mut rounds = 0;
    loop {
        match context.client.get(&["images", name], &[]).await {
            Ok(image) => return image::wait_ready(context, image, &mut progress).await,
            Err(absent) if absent.is_not_found() && rounds < APPEARS_ROUNDS => {
                rounds += 1;
                tokio::time::sleep(APPEARS_PAUSE).await;
            }
            Err(failure) => return Err(failure),
        }
    }
}

fn explain(failure: &ImageError) -> CliError {
    let message = failure.to_string();
    match failure {
        ImageError::Unauthorized { .. } => CliError::failed_with(
            message,
            "mint a token that may write images: `hypeman token create --user-id you --scopes image:read,image:write --save`",
        ),
        ImageError::Network { .. } => CliError::failed_with(
            message,
            "is the server up? `hypeman health` tells; `hypeman serve` starts one",
        ),
        _ => CliError::failed(message),
    }
}

/// Draws the progress of a push.
struct Observer {
    quiet: bool,
    name: String,
    drawn: Mutex<(Option<Progress>, u64)>,
}

impl Observer {
    fn new(quiet: bool, target: &Reference) -> Self {
        Self {
            quiet,
            name: target.to_string(),
            drawn: Mutex::new((None, 0)),
        }
    }

    fn finish(&self) {
        self.drawn.lock().unwrap_or_else(PoisonError::into_inner).0 = None;
    }
}

impl TransferObserver for Observer {
    fn event(&self, event: &TransferEvent) {
        let mut drawn = self.drawn.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            TransferEvent::Planned { total, .. } => {
                let mut progress = Progress::of_bytes(self.quiet, Some(*total));
                progress.say(&self.name);
                *drawn = (Some(progress), 0);
            }
            TransferEvent::Progress { total_done, .. } => {
                let (progress, before) = &mut *drawn;
                if let Some(progress) = progress {
                    progress.advance(total_done.saturating_sub(*before));
                    *before = (*before).max(*total_done);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_move_to_the_server() {
        let cases = [
            ("app:1", "localhost:8080/app:1"),
            ("app", "localhost:8080/app:latest"),
            ("team/app:2", "localhost:8080/team/app:2"),
            ("docker.io/library/alpine:3", "localhost:8080/library/alpine:3"),
            ("localhost:8080/app:1", "localhost:8080/app:1"),
            ("localhost:5000/app:1", "localhost:8080/app:1"),
        ];
        for (named, expected) in cases {
            assert_eq!(
                on_server("localhost:8080", named).unwrap().to_string(),
                expected,
                "{named}"
            );
        }
        assert!(on_server("localhost:8080", "Bad Name").is_err());
    }
}
