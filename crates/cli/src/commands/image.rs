//! `hypeman image …` and `hypeman pull`.

use std::time::Duration;

use clap::{Args, Subcommand};
use hypeman_api::{CreateImageRequest, RegistryCredentials, TagImageRequest};
use jiff::Timestamp;
use reqwest::Method;

use super::{Context, pair, tag_query};
use crate::document::Document;
use crate::error::CliError;
use crate::output::{self, Table, age};
use crate::progress::Progress;

/// How often the status of an image is asked for.
const POLL: Duration = Duration::from_millis(300);

/// How often a record that is not there yet right after it was asked for is looked for again.
const MISSING_ROUNDS: u32 = 10;

/// Commands about images.
#[derive(Debug, Subcommand)]
#[command(after_help = "\
Examples:
  hypeman image create alpine:3.20
  hypeman image list
  hypeman image tag alpine:3.20 base:latest")]
pub enum ImageCommand {
    /// Pull an image into the server (the same as `hypeman pull`)
    Create(PullArgs),
    /// List images
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Show an image
    Get(GetArgs),
    /// Delete images
    #[command(visible_alias = "rm")]
    Delete(DeleteArgs),
    /// Give an image another name
    Tag(TagArgs),
}

/// Arguments of `pull`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hypeman pull alpine
  hypeman pull ghcr.io/owner/app:1.2 --platform linux/amd64
  echo $TOKEN | hypeman pull registry.example.org/app --username me --password-stdin")]
pub struct PullArgs {
    /// Reference: [registry/]repository[:tag|@digest]
    image: String,
    /// Platform of a multi-platform image; the server's own when absent
    #[arg(long, value_name = "OS/ARCH")]
    platform: Option<String>,
    /// Put a tag on the image (repeat for more)
    #[arg(short = 'l', long = "tag", value_parser = pair, value_name = "KEY=VALUE")]
    tags: Vec<(String, String)>,
    /// User at the registry
    #[arg(long)]
    username: Option<String>,
    /// Read the registry password from standard input
    #[arg(long, requires = "username")]
    password_stdin: bool,
    /// Return at once, do not wait until the image is ready
    #[arg(short, long)]
    detach: bool,
}

/// Arguments of `image list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Only images with this tag (repeat for more)
    #[arg(short = 'l', long = "tag", value_parser = pair, value_name = "KEY=VALUE")]
    tags: Vec<(String, String)>,
}

/// Arguments of `image get`.
#[derive(Debug, Args)]
pub struct GetArgs {
    /// Reference
    image: String,
}

/// Arguments of `image delete`.
#[derive(Debug, Args)]
pub struct DeleteArgs {
    /// References
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
}

/// Arguments of `image tag`.
#[derive(Debug, Args)]
pub struct TagArgs {
    /// Reference of an image that is ready
    image: String,
    /// The new reference, with a tag
    target: String,
}

/// Runs a command about images.
pub(crate) async fn run(context: &Context, command: &ImageCommand) -> Result<(), CliError> {
    match command {
        ImageCommand::Create(arguments) => pull(context, arguments).await,
        ImageCommand::List(arguments) => list(context, arguments).await,
        ImageCommand::Get(arguments) => {
            let image = context.client.get(&["images", &arguments.image], &[]).await?;
            context.output.object(&image, "name", || describe(&image))
        }
        ImageCommand::Delete(arguments) => {
            for image in &arguments.images {
                context.client.delete(&["images", image], &[]).await?;
                if context.output.human() {
                    output::line(&output::clean(image))?;
                }
            }
            Ok(())
        }
        ImageCommand::Tag(arguments) => {
            let body = TagImageRequest {
                target: arguments.target.clone(),
            };
            let image = context
                .client
                .call(Method::POST, &["images", &arguments.image, "tag"], Some(&body))
                .await?;
            context.output.object(&image, "name", || {
                format!("{}\n", output::clean(image.text("name").unwrap_or("?")))
            })
        }
    }
}

/// Pulls an image and waits until it is ready.
pub(crate) async fn pull(context: &Context, arguments: &PullArgs) -> Result<(), CliError> {
    let credentials = match &arguments.username {
        Some(username) => Some(RegistryCredentials {
            username: Some(username.clone()),
            password: if arguments.password_stdin {
                Some(password()?)
            } else {
                None
            },
            registry_token: None,
        }),
        None => None,
    };
    let request = CreateImageRequest {
        name: arguments.image.clone(),
        platform: arguments.platform.clone(),
        credentials,
        tags: arguments.tags.iter().cloned().collect(),
    };
    let image = if arguments.detach {
        context
            .client
            .call(Method::POST, &["images"], Some(&request))
            .await?
    } else {
        create_and_wait(context, &request).await?
    };
    context.output.object(&image, "name", || {
        format!("{}\n", output::clean(image.text("name").unwrap_or("?")))
    })
}

fn password() -> Result<String, CliError> {
    let mut line = String::new();
    std::io::stdin()
        .read_line(&mut line)
        .map_err(|failure| CliError::io("cannot read the password from standard input", failure))?;
    let password = line.trim_end_matches(['\n', '\r']);
    if password.is_empty() {
        return Err(CliError::usage("there is no password on standard input"));
    }
    Ok(password.to_owned())
}

/// Asks for an image and waits until it is ready.
///
/// # Errors
/// When the server refuses, or the image fails.
pub(crate) async fn create_and_wait(
    context: &Context,
    request: &CreateImageRequest,
) -> Result<Document, CliError> {
    let mut progress = Progress::spinner(context.output.quiet());
    progress.say(&format!("asking for {}", request.name));
    let image = context
        .client
        .call(Method::POST, &["images"], Some(request))
        .await?;
    wait_ready(context, image, &mut progress).await
}

/// Follows an image until it is ready. `image` is its record as known so far.
///
/// # Errors
/// When the image fails or goes away.
pub(crate) async fn wait_ready(
    context: &Context,
    mut image: Document,
    progress: &mut Progress,
) -> Result<Document, CliError> {
    let name = image
        .text("name")
        .ok_or_else(|| CliError::Protocol("an image without a name".to_owned()))?
        .to_owned();
    let mut missing = 0;
    loop {
        match image.text("status").unwrap_or("pending") {
            "ready" => {
                progress.finish();
                return Ok(image);
            }
            "failed" => {
                progress.finish();
                return Err(CliError::failed_with(
                    format!(
                        "{name}: {}",
                        image.text("error").unwrap_or("the pull failed without a reason")
                    ),
                    format!("after mending the cause, try again with `hypeman pull {name}`"),
                ));
            }
            status => {
                let place = image
                    .integer("queue_position")
                    .map(|place| format!(" (number {place} in the queue)"));
                progress.say(&format!("{name}: {status}{}", place.unwrap_or_default()));
                progress.share(image.number("progress"));
            }
        }
        tokio::time::sleep(POLL).await;
        match context.client.get(&["images", &name], &[]).await {
            Ok(record) => {
                image = record;
                missing = 0;
            }
            Err(gone) if gone.is_not_found() && missing < MISSING_ROUNDS => missing += 1,
            Err(failure) => return Err(failure),
        }
    }
}

async fn list(context: &Context, arguments: &ListArgs) -> Result<(), CliError> {
    let list = context
        .client
        .get(&["images"], &tag_query(&arguments.tags))
        .await?;
    let mut items = list.items().to_vec();
    items.sort_by(|one, other| other.text("created_at").cmp(&one.text("created_at")));
    context
        .output
        .list(&items, "name", || table(&items, Timestamp::now()))
}

fn table(items: &[Document], now: Timestamp) -> String {
    let mut table = Table::new(&["NAME", "DIGEST", "STATUS", "SIZE", "CREATED"]);
    for item in items {
        table.row([
            item.text("name").map(str::to_owned),
            item.text("digest").map(short_digest),
            status(item),
            item.integer("size_bytes")
                .map(|size| output::bytes(u64::try_from(size).unwrap_or(0))),
            item.text("created_at").map(|time| age(time, now)),
        ]);
    }
    table.render()
}

/// How far an image is: `ready`, or `pulling 42%`.
fn status(image: &Document) -> Option<String> {
    let status = image.text("status")?;
    Some(match image.number("progress") {
        Some(share) => format!("{status} {:.0}%", share * 100.0),
        None => status.to_owned(),
    })
}

fn short_digest(digest: &str) -> String {
    digest
        .strip_prefix("sha256:")
        .unwrap_or(digest)
        .chars()
        .take(12)
        .collect()
}

fn describe(image: &Document) -> String {
    let mut table = Table::bare(2);
    let mut fact = |name: &str, value: Option<String>| {
        if value.as_ref().is_some_and(|value| !value.is_empty()) {
            table.row([Some(name.to_owned()), value]);
        }
    };
    let words = |path: &str| {
        image
            .get(path)
            .and_then(|list| serde_json::to_string(list).ok())
            .filter(|text| text != "[]")
    };
    fact("Name", image.text("name").map(str::to_owned));
    fact("Digest", image.text("digest").map(str::to_owned));
    fact("Platform", image.text("platform").map(str::to_owned));
    fact("Status", status(image));
    fact(
        "Queue",
        image.integer("queue_position").map(|place| place.to_string()),
    );
    fact("Error", image.text("error").map(str::to_owned));
    fact(
        "Size",
        image
            .integer("size_bytes")
            .map(|size| output::bytes(u64::try_from(size).unwrap_or(0))),
    );
    fact("Entrypoint", words("entrypoint"));
    fact("Command", words("cmd"));
    fact("Directory", image.text("working_dir").map(str::to_owned));
    fact(
        "Created",
        image
            .text("created_at")
            .map(|time| format!("{time} ({})", age(time, Timestamp::now()))),
    );
    for (name, label) in [("tags", "Tag"), ("env", "Env")] {
        for (key, value) in image.get(name).map(Document::members).unwrap_or_default() {
            if let Document::String(value) = value {
                fact(label, Some(format!("{key}={value}")));
            }
        }
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_tells_the_share_where_it_is_known() {
        for (image, shown) in [
            (r#"{"status":"pulling","progress":0.4242}"#, "pulling 42%"),
            (r#"{"status":"converting","progress":1}"#, "converting 100%"),
            (r#"{"status":"pending"}"#, "pending"),
        ] {
            let image = Document::parse(image.as_bytes()).unwrap();
            assert_eq!(status(&image).as_deref(), Some(shown));
        }
    }
}
