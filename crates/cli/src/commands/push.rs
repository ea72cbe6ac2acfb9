//! `hypeman push`: a local image into the server, through its registry.
//!
//! The image is a `docker save` archive, an OCI archive (both also compressed, or on standard input), an OCI layout
//! directory, or else an image of the local Docker daemon. Layers that the server has already are not sent.

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
use crate::docker;
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
IMAGE is a docker save archive, an OCI archive, an OCI layout directory, - for an archive on standard \
input, or else an image of the local Docker, which is asked at DOCKER_HOST (a unix socket) or \
/var/run/docker.sock; `push local IMAGE` takes it from there even where a file has that name. TARGET is \
repository[:tag] on the server; the image's own name when absent. The image is then known as \
HOST:PORT/repository:tag, which is printed.

Examples:
  hypeman push app:1                           an image that Docker has built
  docker save app:1 | hypeman push - app:1
  hypeman push app.tar app:1
  hypeman push ./oci-layout team/app:2
  hypeman run $(hypeman push -q app.tar app:1)")]
pub struct PushArgs {
    /// Archive, OCI layout directory, -, or an image of the local Docker
    image: String,
    /// repository[:tag] on the server
    target: Option<String>,
    /// The target after the words `local IMAGE`
    #[arg(hide = true)]
    last: Option<String>,
    /// Which image of an archive that has several
    #[arg(long, value_name = "NAME")]
    select: Option<String>,
    /// Return as soon as it is sent, do not wait until it can be run
    #[arg(short, long)]
    detach: bool,
}

/// Where an image comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source<'a> {
    /// An archive, a layout or standard input.
    Archive(&'a str),
    /// The Docker daemon, because nothing else has that name.
    Found(&'a str),
    /// The Docker daemon, because the user said so.
    Docker(&'a str),
}

impl<'a> Source<'a> {
    fn image(self) -> &'a str {
        let (Self::Archive(image) | Self::Found(image) | Self::Docker(image)) = self;
        image
    }
}

impl PushArgs {
    /// Where the image comes from, and what it is to be called. `exists` says whether a file has a name.
    fn source(&self, exists: impl Fn(&str) -> bool) -> Result<(Source<'_>, Option<&str>), CliError> {
        match (self.image.as_str(), self.target.as_deref(), self.last.as_deref()) {
            ("local", Some(image), target) => Ok((Source::Docker(image), target)),
            (_, _, Some(last)) => Err(CliError::usage_with(
                format!("there is nothing to do with {last:?}"),
                "write `hypeman push IMAGE [TARGET]` or `hypeman push local IMAGE [TARGET]`",
            )),
            (image, target, None) if image == "-" || is_path(image) || exists(image) => {
                Ok((Source::Archive(image), target))
            }
            (image, target, None) => Ok((Source::Found(image), target)),
        }
    }
}

/// Whether only a file can be meant.
fn is_path(image: &str) -> bool {
    ["/", "./", "../"].iter().any(|start| image.starts_with(start))
}

/// Pushes an image.
pub(crate) async fn run(context: &Context, arguments: &PushArgs) -> Result<(), CliError> {
    let (source, name) = arguments.source(|image| Path::new(image).exists())?;
    let archive = open(context, source).await?;
    let image = source.image();
    let wanted = arguments.select.as_deref();
    let chosen = archive.image(wanted).map_err(|failure| {
        CliError::failed_with(format!("{image}: {failure}"), "choose one with --select NAME")
    })?;
    let chosen = chosen.clone();
    let target = target(context, source, name, &chosen)?;
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

async fn open(context: &Context, source: Source<'_>) -> Result<Archive, CliError> {
    let options = ArchiveOptions::default();
    let opened = match source {
        Source::Archive("-") => Archive::read(std::io::stdin(), &options).await,
        Source::Archive(image) => Archive::open(image, &options).await,
        Source::Docker(image) => return from_docker(context, image).await,
        Source::Found(image) => {
            return from_docker(context, image)
                .await
                .map_err(|failure| match failure {
                    CliError::Failed { message, hint } => CliError::Failed {
                        message: format!("there is no archive or directory {image}, and {message}"),
                        hint,
                    },
                    other => other,
                });
        }
    };
    let image = source.image();
    opened.map_err(|failure| {
        CliError::failed_with(
            format!("{image}: {failure}"),
            "an image is a docker save archive, an OCI archive, an OCI layout directory, or one of the local Docker",
        )
    })
}

async fn from_docker(context: &Context, image: &str) -> Result<Archive, CliError> {
    let host = std::env::var("DOCKER_HOST").ok();
    docker::save(image, host.as_deref(), context.output.quiet()).await
}

/// The name on the server: its host and port, then what the user, Docker or the archive calls the image.
fn target(
    context: &Context,
    source: Source<'_>,
    name: Option<&str>,
    chosen: &ArchivedImage,
) -> Result<Reference, CliError> {
    let url = context.client.url(&[])?;
    let host = url.host_str().unwrap_or_default();
    let host = match url.port_or_known_default() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    };
    let image = source.image();
    // A digest is of what the registry had, which an archive need not be.
    let own = match source {
        Source::Archive(_) => None,
        _ if docker::is_id(image) => None,
        _ => image.split('@').next(),
    };
    let named = name.or(own).or(chosen.names.first().map(String::as_str));
    let named = named.ok_or_else(|| {
        CliError::usage_with(
            "the archive does not name its image",
            format!("name it: `hypeman push {image} app:1`"),
        )
    })?;
    on_server(&host, named)
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
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};

    fn parsed(words: &[&str]) -> PushArgs {
        let words = [&["hypeman", "push"][..], words].concat();
        match Cli::try_parse_from(words).unwrap().command {
            Command::Push(arguments) => arguments,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_no_file_is_an_image_of_docker() {
        let exists = |name: &str| matches!(name, "app.tar" | "app:1" | "local");
        let cases: [(&[&str], Source<'_>, Option<&str>); 9] = [
            (&["app.tar"], Source::Archive("app.tar"), None),
            (&["app.tar", "x:1"], Source::Archive("app.tar"), Some("x:1")),
            (&["-", "x:1"], Source::Archive("-"), Some("x:1")),
            (&["./absent.tar"], Source::Archive("./absent.tar"), None),
            (&["app:2", "x:1"], Source::Found("app:2"), Some("x:1")),
            (&["app:1"], Source::Archive("app:1"), None),
            (&["local", "app:1"], Source::Docker("app:1"), None),
            (&["local", "app:1", "x:1"], Source::Docker("app:1"), Some("x:1")),
            (&["local"], Source::Archive("local"), None),
        ];
        for (words, source, target) in cases {
            let arguments = parsed(words);
            assert_eq!(arguments.source(exists).unwrap(), (source, target), "{words:?}");
        }
        assert!(parsed(&["app.tar", "x:1", "y:1"]).source(exists).is_err());
    }

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
