//! How a failure is told: in words for people, or as a document for programs, always on standard error.

use std::io::{self, Write as _};

use super::{Transform, clean, painted, render};
use crate::args::{Format, GlobalArgs};
use crate::error::CliError;

/// How this run tells its failures.
#[derive(Debug, Clone, Default)]
pub struct Failures {
    format: Format,
    transform: Option<Transform>,
}

impl Failures {
    /// From the global options.
    pub fn new(global: &GlobalArgs) -> Self {
        Self {
            format: global.format_error.unwrap_or_default(),
            transform: global.transform_error.clone(),
        }
    }

    /// Tells a failure on standard error.
    pub fn report(&self, failure: &CliError) {
        if let CliError::Io { source, .. } = failure
            && source.kind() == io::ErrorKind::BrokenPipe
        {
            // The reader has gone (`| head`): nothing to say, and nobody to hear it.
            return;
        }
        let _ = io::stderr().lock().write_all(self.text(failure).as_bytes());
    }

    /// `error: …`, then `hint: …` when there is one; or what was asked for of the document.
    fn text(&self, failure: &CliError) -> String {
        let human = matches!(self.format, Format::Auto | Format::Table) && self.transform.is_none();
        if !human {
            let document = failure.document();
            let taken = match &self.transform {
                Some(transform) => transform.apply(&document),
                None => document,
            };
            if let Ok(text) = render(self.format, &taken) {
                return text;
            }
        }
        let mut text = format!("{} {}\n", painted("error:", "31;1"), clean(&failure.to_string()));
        if let Some(hint) = failure.hint() {
            text.push_str(&format!("{} {}\n", painted("hint:", "36;1"), clean(&hint)));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(format: Format, transform: Option<&str>, failure: &CliError) -> String {
        Failures {
            format,
            transform: transform.map(|path| Transform::parse(path).unwrap()),
        }
        .text(failure)
    }

    fn refused() -> CliError {
        CliError::Api {
            status: 409,
            code: "invalid_state".to_owned(),
            message: "it runs\u{1b}[2J".to_owned(),
        }
    }

    #[test]
    fn a_failure_is_words_or_a_document() {
        let words = told(Format::Auto, None, &refused());
        assert!(words.contains("it runs\u{fffd}[2J\n"), "{words}");
        let line = told(Format::Jsonl, None, &refused());
        assert!(
            line.starts_with(
                r#"{"code":"invalid_state","message":"it runs\u001b[2J","status":409,"exit_code":1,"hint":""#
            ),
            "{line}"
        );
        assert_eq!(line.lines().count(), 1);
        assert!(told(Format::Yaml, None, &refused()).starts_with("code: invalid_state\n"));
    }

    #[test]
    fn a_part_of_a_failure_is_taken() {
        assert_eq!(
            told(Format::Auto, Some("code"), &refused()),
            "\"invalid_state\"\n"
        );
        let exec = CliError::Exec(Box::new(refused()));
        assert_eq!(told(Format::Raw, Some("exit_code"), &exec), "255\n");
        assert_eq!(told(Format::Raw, Some("status"), &exec), "409\n");
        let usage = told(Format::Jsonl, None, &CliError::usage("wrong"));
        assert_eq!(
            usage,
            "{\"code\":\"usage\",\"message\":\"wrong\",\"exit_code\":2}\n"
        );
    }
}
