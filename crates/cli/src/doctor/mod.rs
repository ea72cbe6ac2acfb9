//! Checks of this machine: one line each, with a verdict and the way to mend what is not well.
//!
//! A check looks at what really happens, not at what a file claims: KVM counts when a guest ran, the kernel when it
//! could be unpacked, a file system feature when it was used. Nothing stays behind.

mod host;
mod pagers;
mod storage;

use std::path::PathBuf;

use crate::config::{self, Overrides, Values};
use crate::document::Document;
use crate::error::CliError;

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Verdict {
    /// All is well.
    Ok,
    /// It works, but not as well as it could.
    Warn,
    /// A server will not work, or not run anything.
    Fail,
}

impl Verdict {
    /// As it is shown.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Check {
    /// What was looked at.
    pub(crate) name: &'static str,
    /// How it is.
    pub(crate) verdict: Verdict,
    /// What was found.
    pub(crate) found: String,
    /// What to do, when there is something to do.
    pub(crate) fix: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            verdict: Verdict::Ok,
            found: found.into(),
            fix: None,
        }
    }

    fn warn(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            name,
            verdict: Verdict::Warn,
            found: found.into(),
            fix: Some(fix.into()),
        }
    }

    fn fail(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            name,
            verdict: Verdict::Fail,
            found: found.into(),
            fix: Some(fix.into()),
        }
    }

    /// The check as the machine formats show it.
    pub(crate) fn document(&self) -> Document {
        let text = |text: &str| Document::String(text.to_owned());
        let mut members = vec![
            ("check".to_owned(), text(self.name)),
            ("status".to_owned(), text(self.verdict.word())),
            ("found".to_owned(), text(&self.found)),
        ];
        if let Some(fix) = &self.fix {
            members.push(("fix".to_owned(), text(fix)));
        }
        Document::Object(members)
    }
}

/// What is checked.
#[derive(Debug, Default)]
pub(crate) struct Subject {
    /// Configuration file instead of the usual ones.
    pub(crate) file: Option<PathBuf>,
    /// Data directory instead of the configured one.
    pub(crate) data_dir: Option<PathBuf>,
}

/// Checks everything, in the order in which a server would meet it.
///
/// # Errors
/// When no runtime can be started. What is wrong with the machine is a check, not an error.
pub(crate) async fn examine(subject: &Subject) -> Result<Vec<Check>, CliError> {
    let data_dir = subject
        .data_dir
        .as_ref()
        .map(|path| ("data_dir", path.display().to_string()));
    let overrides = Overrides {
        file: subject.file.clone(),
        values: data_dir.into_iter().collect(),
    };
    let (values, configuration) = match config::load(&overrides) {
        Ok(values) => (values, Check::ok("configuration", "readable")),
        Err(failure) => {
            let fix = failure.hint().unwrap_or_else(|| "mend the file".to_owned());
            // The rest is looked at with defaults: they may be what is wanted anyway.
            (
                Values::default(),
                Check::fail("configuration", failure.to_string(), fix),
            )
        }
    };
    let data = config::data_directory(&values)?;
    let mut checks = vec![configuration, host::platform(), host::guest_program(&values)];
    checks.extend(host::hypervisors(&values, &data).await);
    checks.push(host::kernel(&values, &data).await);
    checks.push(host::network(&values).await);
    checks.push(host::privileges());
    checks.push(host::jail(&values, &data).await);
    checks.push(host::cgroups());
    checks.push(host::open_files());
    checks.extend(storage::examine(&values, &data));
    checks.push(pagers::examine(&data).await);
    checks.push(host::port(&values));
    checks.push(host::secret(&values));
    Ok(checks)
}
