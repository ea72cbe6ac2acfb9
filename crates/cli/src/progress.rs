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
    /// Whether a share is shown instead of the spinner.
    shares: bool,
}

const SPINNER: &str = "{spinner} {msg} ({elapsed})";
const SHARE: &str = "{msg} [{bar:30}] {percent}% ({elapsed})";
/// Length of a bar that shows a share.
const WHOLE: u64 = 1000;

impl Progress {
    /// A spinner with a message.
    pub(crate) fn spinner(quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = if quiet || !terminal {
            ProgressBar::hidden()
        } else {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            bar.set_style(style(SPINNER));
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        };
        Self {
            bar,
            lines: !quiet && !terminal,
            last: String::new(),
            shares: false,
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
            shares: false,
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

    /// Shows how much is done, 0 to 1, or the spinner where nobody knows.
    pub(crate) fn share(&mut self, share: Option<f64>) {
        if self.shares != share.is_some() {
            self.shares = share.is_some();
            self.bar
                .set_style(style(if self.shares { SHARE } else { SPINNER }));
        }
        if let Some(share) = share {
            self.bar.set_length(WHOLE);
            self.bar.set_position(position(share));
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

/// Where a bar of [`WHOLE`] stands. A share comes from a server, and may be anything.
fn position(share: f64) -> u64 {
    (share.clamp(0.0, 1.0) * WHOLE as f64) as u64
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_stays_between_nothing_and_the_whole() {
        for (share, expected) in [
            (0.0, 0),
            (0.5, 500),
            (1.0, WHOLE),
            (7.0, WHOLE),
            (-1.0, 0),
            (f64::NAN, 0),
        ] {
            assert_eq!(position(share), expected, "{share}");
        }
    }

    #[test]
    fn a_share_takes_the_place_of_the_spinner_and_gives_it_back() {
        let mut progress = Progress::spinner(true);
        for (share, shown, position) in [
            (Some(0.25), true, 250),
            (Some(0.75), true, 750),
            (None, false, 750),
        ] {
            progress.share(share);
            assert_eq!((progress.shares, progress.bar.position()), (shown, position));
        }
    }

    #[test]
    fn the_styles_are_such() {
        for template in [SPINNER, SHARE] {
            assert!(ProgressStyle::with_template(template).is_ok(), "{template}");
        }
    }
}
