//! Progress on a terminal. Drawn on standard error, never when it is not a terminal or the user wants quiet.

use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output;

/// One line that says what is going on.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
    /// Without a terminal each new message is printed once, as a line, so that logs of scripts say what happened.
    lines: bool,
    last: String,
}

impl Progress {
    /// A spinner with a message.
    pub(crate) fn spinner(quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = if quiet || !terminal {
            ProgressBar::hidden()
        } else {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            bar.set_style(style("{spinner} {msg} ({elapsed})"));
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        };
        Self {
            bar,
            lines: !quiet && !terminal,
            last: String::new(),
        }
    }

    /// A bar that counts bytes. `total` may be unknown.
    pub(crate) fn of_bytes(quiet: bool, total: Option<u64>) -> Self {
        let bar = if quiet || !std::io::stderr().is_terminal() {
            ProgressBar::hidden()
        } else {
            let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr());
            bar.set_style(style(match total {
                Some(_) => "{msg} {bytes}/{total_bytes} [{bar:30}] {bytes_per_sec} {eta}",
                None => "{spinner} {msg} {bytes} {bytes_per_sec}",
            }));
            bar
        };
        Self {
            bar,
            lines: false,
            last: String::new(),
        }
    }

    /// Says what is going on now.
    pub(crate) fn say(&mut self, message: &str) {
        if message == self.last {
            return;
        }
        message.clone_into(&mut self.last);
        if self.lines {
            output::note(message);
        } else {
            self.bar.set_message(output::clean(message).into_owned());
        }
    }

    /// Counts bytes.
    pub(crate) fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    /// Takes the line away.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
