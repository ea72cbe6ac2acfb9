//! Everything that reaches the user: results on standard output, notes and failures on standard error.
//!
//! The only module that may print. Text that came from a server or guest goes through [`clean`] before a person
//! sees it, so that a name or message cannot move the cursor or retitle the terminal. Machine formats escape such
//! characters themselves.

#![allow(clippy::print_stdout, clippy::print_stderr)]

mod age;
mod failure;
mod table;
mod transform;

use std::borrow::Cow;
use std::io::{self, IsTerminal as _, Write as _};

pub use age::{age, span};
pub use failure::Failures;
pub use table::{Table, bytes};
pub use transform::Transform;

use crate::args::{Format, GlobalArgs};
use crate::document::Document;
use crate::error::CliError;

/// How this run prints its results.
#[derive(Debug, Clone)]
pub struct Output {
    format: Format,
    quiet: bool,
    transform: Option<Transform>,
}

impl Output {
    /// From the global options.
    pub fn new(global: &GlobalArgs) -> Self {
        Self {
            format: global.format,
            quiet: global.quiet,
            transform: global.transform.clone(),
        }
    }

    /// Whether only identifiers are wanted.
    pub fn quiet(&self) -> bool {
        self.quiet
    }

    /// Whether a person reads the result (as opposed to a program).
    pub fn human(&self) -> bool {
        matches!(self.format, Format::Auto | Format::Table) && self.transform.is_none()
    }

    /// Prints one object: identifiers only when quiet, the human form from `human`, or a machine format.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub fn object(
        &self,
        object: &Document,
        key: &str,
        human: impl FnOnce() -> String,
    ) -> Result<(), CliError> {
        if self.quiet && object.get(key).is_some() {
            return line(&clean(object.text(key).unwrap_or_default()));
        }
        if self.human() {
            text(&human())
        } else {
            self.machine(object)
        }
    }

    /// Prints a list: identifiers only when quiet, the human form from `human`, or a machine format.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub fn list(&self, list: &[Document], key: &str, human: impl FnOnce() -> String) -> Result<(), CliError> {
        if self.quiet {
            let identifiers = list.iter().filter_map(|item| item.text(key));
            return text(
                &identifiers
                    .map(|id| format!("{}\n", clean(id)))
                    .collect::<String>(),
            );
        }
        if self.human() {
            text(&human())
        } else {
            self.machine(&Document::Array(list.to_vec()))
        }
    }

    /// Prints a document, or what was asked for of it, in the machine format that was asked for.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub fn machine(&self, document: &Document) -> Result<(), CliError> {
        match &self.transform {
            Some(transform) => text(&render(self.format, &transform.apply(document))?),
            None => text(&render(self.format, document)?),
        }
    }
}

/// A document in a machine format. The human formats fall back to indented JSON.
///
/// # Errors
/// Never for documents that were parsed from JSON.
pub fn render(format: Format, document: &Document) -> Result<String, CliError> {
    let refuse =
        |failure: &dyn std::fmt::Display| CliError::failed(format!("cannot print the result: {failure}"));
    let compact = |item: &Document| serde_json::to_string(item).map_err(|failure| refuse(&failure));
    Ok(match format {
        Format::Auto | Format::Table | Format::Json => {
            serde_json::to_string_pretty(document).map_err(|failure| refuse(&failure))? + "\n"
        }
        Format::Raw => compact(document)? + "\n",
        Format::Yaml => serde_norway::to_string(document).map_err(|failure| refuse(&failure))?,
        Format::Jsonl => match document {
            Document::Array(items) => {
                let mut lines = String::new();
                for item in items {
                    lines.push_str(&compact(item)?);
                    lines.push('\n');
                }
                lines
            }
            single => compact(single)? + "\n",
        },
    })
}

/// Prints text that is complete, line ends included.
///
/// # Errors
/// When standard output cannot be written.
pub fn text(text: &str) -> Result<(), CliError> {
    bytes_out(text.as_bytes())
}

/// Prints one line.
///
/// # Errors
/// When standard output cannot be written.
pub fn line(line: &str) -> Result<(), CliError> {
    bytes_out(format!("{line}\n").as_bytes())
}

/// Writes bytes as they are (output of a guest's program, archives) and flushes.
///
/// # Errors
/// When standard output cannot be written.
pub fn bytes_out(bytes: &[u8]) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)
        .and_then(|()| out.flush())
        .map_err(|failure| CliError::io("cannot write to standard output", failure))
}

/// One line of information on standard error.
pub fn note(message: &str) {
    let _ = writeln!(io::stderr().lock(), "{}", clean(message));
}

/// A warning on standard error.
pub fn warn(message: &str) {
    let _ = writeln!(
        io::stderr().lock(),
        "{} {}",
        painted("warning:", "33;1"),
        clean(message)
    );
}

fn painted(word: &str, code: &str) -> String {
    if io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        format!("\u{1b}[{code}m{word}\u{1b}[0m")
    } else {
        word.to_owned()
    }
}

/// Text without control characters (line ends and tabs excepted) and without the marks that reorder text.
pub fn clean(text: &str) -> Cow<'_, str> {
    let unwanted = |character: char| {
        (character.is_control() && !matches!(character, '\n' | '\t'))
            || matches!(character, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if text.contains(unwanted) {
        Cow::Owned(text.replace(unwanted, "\u{fffd}"))
    } else {
        Cow::Borrowed(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Document {
        Document::parse(
            br#"[{"id":"b","name":"x y","tags":{"team":"core"}},{"id":"a","name":null,"tags":{}}]"#,
        )
        .unwrap()
    }

    #[test]
    fn each_machine_format_has_its_shape() {
        let json = render(Format::Json, &sample()).unwrap();
        assert!(json.starts_with("[\n  {\n    \"id\": \"b\","), "{json}");
        let lines = render(Format::Jsonl, &sample()).unwrap();
        assert_eq!(
            lines,
            "{\"id\":\"b\",\"name\":\"x y\",\"tags\":{\"team\":\"core\"}}\n{\"id\":\"a\",\"name\":null,\"tags\":{}}\n"
        );
        let yaml = render(Format::Yaml, &sample()).unwrap();
        assert_eq!(
            yaml,
            "- id: b\n  name: x y\n  tags:\n    team: core\n- id: a\n  name: null\n  tags: {}\n"
        );
        let raw = render(Format::Raw, &sample()).unwrap();
        assert_eq!(raw.lines().count(), 1);
        assert_eq!(Document::parse(raw.as_bytes()).unwrap(), sample());
    }

    #[test]
    fn a_hostile_name_cannot_drive_the_terminal() {
        assert_eq!(
            clean("a\u{1b}]0;title\u{7}b\r\u{9b}2J\u{202e}c"),
            "a\u{fffd}]0;title\u{fffd}b\u{fffd}\u{fffd}2J\u{fffd}c"
        );
        assert_eq!(clean("plain\ttext\nélan"), "plain\ttext\nélan");
    }
}
