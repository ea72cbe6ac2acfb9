//! Server-sent events, as far as the API uses them: one `data:` line for each event.

use crate::document::Document;
use crate::error::CliError;

/// A line longer than this is cut off by the server; more than twice of it is not a line.
const LONGEST_EVENT: usize = 64 * 1024 * 1024;

/// Splits a server-sent event stream into the data of its events.
#[derive(Debug, Default)]
pub(crate) struct Events {
    rest: Vec<u8>,
}

impl Events {
    /// Takes the next bytes and answers the data that is now complete: strings unquoted, all else as it came.
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> Result<Vec<String>, CliError> {
        self.rest.extend_from_slice(bytes);
        let mut lines = Vec::new();
        let mut start = 0;
        while let Some(length) = self
            .rest
            .get(start..)
            .and_then(|rest| rest.iter().position(|byte| *byte == b'\n'))
        {
            let line = &self.rest[start..start + length];
            start += length + 1;
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            let Some(data) = line.strip_prefix(b"data:") else {
                continue;
            };
            let data = data.strip_prefix(b" ").unwrap_or(data);
            lines.push(match Document::parse(data) {
                Ok(Document::String(text)) => text,
                // Not the contract's JSON string: shown as it came rather than lost.
                _ => String::from_utf8_lossy(data).into_owned(),
            });
        }
        self.rest.drain(..start);
        if self.rest.len() > LONGEST_EVENT {
            return Err(CliError::Protocol("a log line without end".to_owned()));
        }
        Ok(lines)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn comments_and_blank_lines_are_no_log_lines() {
        let mut events = Events::default();
        let lines = events
            .feed(b": hello\n\ndata: \"a\\tb\"\r\n\nevent: x\ndata: raw\n\ndata: \"cut")
            .unwrap();
        assert_eq!(lines, ["a\tb", "raw"]);
        assert_eq!(events.feed(b" off\"\n").unwrap(), ["cut off"]);
    }

    proptest! {
        #[test]
        fn lines_survive_any_split(lines in prop::collection::vec(".{0,40}", 0..8), size in 1usize..20) {
            let stream: String =
                lines.iter().map(|line| format!("data: {}\n\n", serde_json::to_string(line).unwrap())).collect();
            let mut events = Events::default();
            let mut seen = Vec::new();
            for chunk in stream.as_bytes().chunks(size) {
                seen.extend(events.feed(chunk).unwrap());
            }
            prop_assert_eq!(seen, lines);
        }
    }
}
