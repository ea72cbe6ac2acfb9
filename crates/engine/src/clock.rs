//! The wall clock that schedules go by. Tests can turn it; the product can't.

use jiff::Timestamp;

/// Now.
pub(crate) fn now() -> Timestamp {
    #[cfg(feature = "fault-points")]
    if let Some(ahead) = turned::ahead() {
        return Timestamp::now().checked_add(ahead).unwrap_or(Timestamp::MAX);
    }
    Timestamp::now()
}

/// How often somebody who waits for an instant should look again.
pub(crate) fn look_again() -> std::time::Duration {
    if cfg!(feature = "fault-points") {
        std::time::Duration::from_millis(100)
    } else {
        std::time::Duration::from_secs(20)
    }
}

#[cfg(feature = "fault-points")]
mod turned {
    use std::time::Duration;

    /// Seconds by which the file that `HYPEMAN_CLOCK` names sets the clock ahead.
    pub(super) fn ahead() -> Option<Duration> {
        let file = std::env::var_os("HYPEMAN_CLOCK")?;
        let seconds = std::fs::read_to_string(file).ok()?.trim().parse().ok()?;
        Some(Duration::from_secs(seconds))
    }
}
