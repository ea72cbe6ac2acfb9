//! `hypeman cp`.

use std::fs;
use std::io::{self, BufWriter, IsTerminal as _};
use std::path::{Path, PathBuf};

use clap::Args;

use super::Context;
use crate::copy::archive::{Archive, ArchiveEntry, read_entry};
use crate::copy::endpoint::{Endpoint, Written};
use crate::copy::local::LocalTree;
use crate::copy::receive::{Fetch, Links, receive};
use crate::copy::rules::{self, Destination, Landing, Refusal};
use crate::copy::send::{LocalEntry, Outgoing, send, walk};
use crate::copy::{EntryKind, EntrySink};
use crate::document::Document;
use crate::error::CliError;
use crate::progress::Progress;
use crate::{output, websocket};

/// Arguments of `cp`.
#[derive(Debug, Args)]
#[command(after_help = "\
SOURCE and DESTINATION are local paths, INSTANCE:PATH, or - for a tar archive on standard input or \
output; one of them is in an instance. The rules are those of docker cp: a file copied to a \
directory goes into it, a directory copied to an existing directory too, unless SOURCE ends in /. \
(then its content does).

Examples:
  hypeman cp notes.txt web:/srv/
  hypeman cp web:/var/log ./logs
  hypeman cp site/. web:/srv/www
  hypeman cp web:/etc - | tar t
  tar c dir | hypeman cp - web:/srv")]
pub struct CpArgs {
    /// Keep user and group
    #[arg(short, long)]
    archive: bool,
    /// Copy what links in SOURCE point to, not the links
    #[arg(short = 'L', long)]
    follow_link: bool,
    /// What to copy
    #[arg(value_name = "SOURCE", allow_hyphen_values = true)]
    source: Endpoint,
    /// Where to
    #[arg(value_name = "DESTINATION", allow_hyphen_values = true)]
    destination: Endpoint,
}

/// Copies.
pub(crate) async fn run(context: &Context, arguments: &CpArgs) -> Result<(), CliError> {
    let copying = async {
        match (&arguments.source, &arguments.destination) {
            (Endpoint::Guest { instance, path }, Endpoint::Local(to)) => {
                Copy::new(context, arguments, instance).out(path, to).await
            }
            (Endpoint::Guest { instance, path }, Endpoint::Stream) => {
                Copy::new(context, arguments, instance).out_to_archive(path).await
            }
            (Endpoint::Local(from), Endpoint::Guest { instance, path }) => {
                Copy::new(context, arguments, instance)
                    .into_guest(from, path)
                    .await
            }
            (Endpoint::Stream, Endpoint::Guest { instance, path }) => {
                Copy::new(context, arguments, instance)
                    .into_guest_from_archive(path)
                    .await
            }
            (Endpoint::Guest { .. }, Endpoint::Guest { .. }) => Err(CliError::usage_with(
                "both sides are in instances",
                "go through a pipe: `hypeman cp one:/path - | hypeman cp - two:/path`",
            )),
            _ => Err(CliError::usage_with(
                "neither side is in an instance",
                "write INSTANCE:PATH, for example `hypeman cp file web:/tmp/`",
            )),
        }
    };
    tokio::select! {
        outcome = copying => outcome,
        // Dropping the copy removes the file that was being written.
        _ = tokio::signal::ctrl_c() => Err(CliError::Interrupted),
    }
}

/// One copy from or to one instance.
struct Copy<'a> {
    context: &'a Context,
    instance: &'a str,
    owners: bool,
    follow: bool,
    progress: Progress,
    /// The server was seen to keep links.
    links_work: bool,
    entries: u64,
    bytes: u64,
}

impl<'a> Copy<'a> {
    fn new(context: &'a Context, arguments: &CpArgs, instance: &'a str) -> Self {
        Self {
            context,
            instance,
            owners: arguments.archive,
            follow: arguments.follow_link,
            progress: Progress::of_bytes(context.output.quiet(), None),
            links_work: false,
            entries: 0,
            bytes: 0,
        }
    }

    async fn stat(&self, path: &str, follow: bool) -> Result<Document, CliError> {
        let query = [
            ("path".to_owned(), path.to_owned()),
            ("follow_links".to_owned(), follow.to_string()),
        ];
        let info = self
            .context
            .client
            .get(&["instances", self.instance, "stat"], &query)
            .await?;
        if let Some(error) = info.text("error") {
            return Err(CliError::failed(format!("{}:{path}: {error}", self.instance)));
        }
        Ok(info)
    }

    /// The source in the guest, which must exist.
    async fn guest_source(&self, path: &str) -> Result<(Written, rules::Source), CliError> {
        let written = Written::of(path);
        // A slash at the end looks through a link, as everywhere on Unix.
        let info = self.stat(&written.path, self.follow || written.directory).await?;
        if info.flag("exists") != Some(true) {
            return Err(CliError::failed(format!(
                "{}:{path} does not exist",
                self.instance
            )));
        }
        let directory = info.flag("is_dir") == Some(true);
        if written.directory && !directory {
            return Err(CliError::failed(format!(
                "{}:{path} is not a directory",
                self.instance
            )));
        }
        let source = match (directory, written.contents) {
            (true, true) => rules::Source::Contents,
            (true, false) => rules::Source::Directory,
            (false, _) => rules::Source::File,
        };
        Ok((written, source))
    }

    fn fetch(&self, written: &Written, links: Links) -> Fetch {
        Fetch {
            guest_path: written.path.clone(),
            follow_links: self.follow || written.directory,
            links,
        }
    }

    async fn receive_into<E: EntrySink>(&mut self, fetch: &Fetch, sink: &mut E) -> Result<(), CliError> {
        let socket = websocket::connect(&self.context.client, &["instances", self.instance, "cp"]).await?;
        let (progress, entries, total) = (&mut self.progress, &mut self.entries, &mut self.bytes);
        let outcome = receive(socket, fetch, sink, |path, bytes| {
            if bytes == 0 {
                *entries += 1;
                progress.say(path);
            } else {
                *total += bytes;
                progress.advance(bytes);
            }
        });
        for link in outcome.await? {
            output::warn(&format!("left out: {link}"));
        }
        Ok(())
    }

    async fn out(mut self, path: &str, to: &Path) -> Result<(), CliError> {
        let (written, source) = self.guest_source(path).await?;
        let text = to
            .to_str()
            .ok_or_else(|| CliError::usage("the destination is not UTF-8"))?;
        let target = Written::of(text);
        let existing = match fs::metadata(to) {
            Ok(metadata) if metadata.is_dir() => Destination::Directory,
            Ok(_) => Destination::File,
            Err(absent) if absent.kind() == io::ErrorKind::NotFound => Destination::Absent,
            Err(failure) => return Err(CliError::io(format!("cannot read {text}"), failure)),
        };
        let place =
            rules::landing(source, existing, target.directory).map_err(|refusal| refused(refusal, text))?;
        let mut tree = match place {
            Landing::Merged => LocalTree::merged(to, self.owners)?,
            Landing::Below => {
                let name = written
                    .name()
                    .ok_or_else(|| CliError::usage(format!("{path} has no name")))?;
                LocalTree::named(to, name, self.owners)?
            }
            Landing::Itself => {
                let path = PathBuf::from(&target.path);
                let name = target
                    .name()
                    .ok_or_else(|| CliError::usage(format!("{text} has no name to give to the copy")))?;
                LocalTree::named(path.parent().unwrap_or(Path::new(".")), name, self.owners)?
            }
        };
        let fetch = self.fetch(&written, Links::Inside);
        self.receive_into(&fetch, &mut tree).await?;
        self.summary(&format!("{}:{path}", self.instance), text);
        Ok(())
    }

    async fn out_to_archive(mut self, path: &str) -> Result<(), CliError> {
        if io::stdout().is_terminal() {
            return Err(CliError::usage_with(
                "a tar archive does not belong on a terminal",
                format!("send it on: `hypeman cp {}:{path} - | tar x`", self.instance),
            ));
        }
        let (written, _) = self.guest_source(path).await?;
        let fetch = self.fetch(&written, Links::Any);
        let mut archive = Archive::new(BufWriter::with_capacity(256 * 1024, io::stdout().lock()));
        self.receive_into(&fetch, &mut archive).await
    }

    /// Where the destination in the guest is, given what goes there.
    async fn guest_target(
        &self,
        path: &str,
        source: rules::Source,
        name: Option<&str>,
    ) -> Result<String, CliError> {
        let written = Written::of(path);
        let info = self.stat(&written.path, true).await?;
        let existing = match (info.flag("exists"), info.flag("is_dir")) {
            (Some(true), Some(true)) => Destination::Directory,
            (Some(true), _) => Destination::File,
            _ => Destination::Absent,
        };
        let shown = format!("{}:{path}", self.instance);
        match rules::landing(source, existing, written.directory)
            .map_err(|refusal| refused(refusal, &shown))?
        {
            Landing::Itself | Landing::Merged => Ok(written.path),
            Landing::Below => {
                let name = name.ok_or_else(|| CliError::usage("the source has no name"))?;
                Ok(joined(&written.path, name))
            }
        }
    }

    async fn into_guest(mut self, from: &Path, path: &str) -> Result<(), CliError> {
        let text = from
            .to_str()
            .ok_or_else(|| CliError::usage("the source is not UTF-8"))?;
        let written = Written::of(text);
        let top = Path::new(&written.path);
        let follow_top = self.follow || written.directory;
        let looked = if follow_top {
            fs::metadata(top)
        } else {
            fs::symlink_metadata(top)
        };
        let metadata = looked.map_err(|failure| CliError::io(format!("cannot read {text}"), failure))?;
        if written.directory && !metadata.is_dir() {
            return Err(CliError::failed(format!("{text} is not a directory")));
        }
        let source = match (metadata.is_dir(), written.contents) {
            (true, true) => rules::Source::Contents,
            (true, false) => rules::Source::Directory,
            (false, _) => rules::Source::File,
        };
        let resolved;
        let name = match written.name() {
            Some(name) => Some(name),
            // `..` has a name all the same, that of the directory it means.
            None => {
                resolved = fs::canonicalize(top)
                    .map_err(|failure| CliError::io(format!("cannot read {text}"), failure))?;
                resolved.file_name().and_then(|name| name.to_str())
            }
        };
        let target = self.guest_target(path, source, name).await?;
        // A link that is looked through at the top must not make all others be looked through.
        let walked = if follow_top && !self.follow {
            walk(
                &fs::canonicalize(top)
                    .map_err(|failure| CliError::io(format!("cannot read {text}"), failure))?,
                false,
            )?
        } else {
            walk(top, self.follow)?
        };
        for skipped in &walked.skipped {
            output::warn(&format!("skipped {skipped}"));
        }
        self.progress = Progress::of_bytes(self.context.output.quiet(), Some(walked.bytes()));
        for entry in &walked.entries {
            let outgoing = self.outgoing(entry, &target);
            match entry.kind {
                EntryKind::File { .. } => {
                    let mut file = fs::File::open(&entry.path).map_err(|failure| {
                        CliError::io(format!("cannot read {}", entry.path.display()), failure)
                    })?;
                    self.send_entry(&outgoing, &mut file).await?;
                }
                EntryKind::Directory | EntryKind::Link { .. } => {
                    self.send_entry(&outgoing, &mut io::empty()).await?
                }
            }
        }
        // Filling a directory changed its time: say it again, deepest first.
        for entry in walked
            .entries
            .iter()
            .rev()
            .filter(|entry| entry.kind == EntryKind::Directory)
        {
            let outgoing = self.outgoing(entry, &target);
            self.entries -= 1;
            self.send_entry(&outgoing, &mut io::empty()).await?;
        }
        self.summary(text, &format!("{}:{path}", self.instance));
        Ok(())
    }

    fn outgoing(&self, entry: &LocalEntry, target: &str) -> Outgoing {
        Outgoing {
            guest_path: if entry.below.is_empty() {
                target.to_owned()
            } else {
                joined(target, &entry.below)
            },
            kind: entry.kind.clone(),
            mode: entry.mode,
            mtime: entry.mtime,
            owner: self.owners.then_some(entry.owner),
        }
    }

    async fn into_guest_from_archive(mut self, path: &str) -> Result<(), CliError> {
        if io::stdin().is_terminal() {
            return Err(CliError::usage_with(
                "there is no tar archive on standard input",
                format!("send one: `tar c dir | hypeman cp - {}:{path}`", self.instance),
            ));
        }
        let written = Written::of(path);
        let info = self.stat(&written.path, true).await?;
        if info.flag("is_dir") != Some(true) {
            return Err(CliError::failed_with(
                format!("{}:{path} is not a directory", self.instance),
                "an archive is unpacked into a directory that exists",
            ));
        }
        let damaged = |failure| CliError::io("cannot read the archive on standard input", failure);
        let mut archive = tar::Archive::new(io::stdin().lock());
        for entry in archive.entries().map_err(damaged)? {
            let mut entry = entry.map_err(damaged)?;
            match read_entry(&entry)? {
                ArchiveEntry::Top => {}
                ArchiveEntry::Skip(reason) => output::warn(&format!("skipped {reason}")),
                ArchiveEntry::Send(found) => {
                    let outgoing = Outgoing {
                        guest_path: joined(&written.path, &found.path.to_string()),
                        kind: found.kind,
                        mode: found.mode,
                        mtime: found.mtime,
                        owner: self.owners.then_some((found.uid, found.gid)),
                    };
                    self.send_entry(&outgoing, &mut entry).await?;
                }
            }
        }
        self.summary("-", &format!("{}:{path}", self.instance));
        Ok(())
    }

    async fn send_entry<R: io::Read>(&mut self, entry: &Outgoing, content: &mut R) -> Result<(), CliError> {
        self.progress.say(&entry.guest_path);
        let socket = websocket::connect(&self.context.client, &["instances", self.instance, "cp"]).await?;
        let (progress, total) = (&self.progress, &mut self.bytes);
        send(socket, entry, content, |bytes| {
            *total += bytes;
            progress.advance(bytes);
        })
        .await?;
        self.entries += 1;
        if matches!(entry.kind, EntryKind::Link { .. }) && !self.links_work {
            let info = self.stat(&entry.guest_path, false).await?;
            if info.flag("is_symlink") != Some(true) {
                return Err(CliError::failed_with(
                    format!("this server cannot make the link {}", entry.guest_path),
                    "-L copies what links point to",
                ));
            }
            self.links_work = true;
        }
        Ok(())
    }

    fn summary(&self, from: &str, to: &str) {
        self.progress.finish();
        if !self.context.output.quiet() && io::stderr().is_terminal() {
            let entries = if self.entries == 1 {
                "1 entry".to_owned()
            } else {
                format!("{} entries", self.entries)
            };
            output::note(&format!(
                "copied {from} to {to}: {entries}, {}",
                output::bytes(self.bytes)
            ));
        }
    }
}

fn refused(refusal: Refusal, place: &str) -> CliError {
    let hint = match refusal {
        Refusal::NoSuchDirectory => "create it first, or leave the slash at the end away",
        Refusal::DirectoryOntoFile => "name a directory, or something that does not exist yet",
        Refusal::NotDirectory => "leave the slash at the end away to replace the file",
    };
    CliError::failed_with(format!("{place}: {refusal}"), hint)
}

fn joined(directory: &str, name: &str) -> String {
    format!("{}/{name}", directory.trim_end_matches('/'))
}
