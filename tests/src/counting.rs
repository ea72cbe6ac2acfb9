//! A guest that counts in its memory for ever: the number of a process that goes on exactly where it was, which can
//! be had from no disk. Each question is one command: on some hosts each takes seconds.

use serde_json::Value;

use crate::{Guest, Server};

/// What counts, once: a shell that died may be asked again, and says so of a counter that died at once.
const COUNT: &str = "test -s /dev/shm/count || \
                     sh -c 'n=0; while :; do n=$((n+1)); echo $n > /dev/shm/count; sleep 0.05; done' \
                     >/dev/null 2>&1 </dev/null &";

/// Says how far it has come. The shell empties the file before it writes to it, and says of a `cat` that died that it did.
const TELL: &str = "exec 2>/dev/null; until n=$(cat /dev/shm/count) && [ -n \"$n\" ]; do :; done; echo $n";

/// Waits in the guest until it has counted further, and says how far. The shell reads a byte at a time, so a number that
/// changes meanwhile is none: it counts when it was read twice.
pub const COUNTS_ON: &str = "look() { until { read n < /dev/shm/count && read m < /dev/shm/count && [ \"$n\" = \"$m\" ]; } \
                             2>/dev/null; do :; done; }; \
                             look; first=$n; while look; [ \"$n\" = \"$first\" ]; do :; done; echo $n";

impl Server {
    /// Runs a guest that counts, and has `before` in `/root/note` on its disk.
    pub async fn counting(&self, image: &str, overrides: Value) -> Guest {
        let guest = self.run(image, overrides).await;
        let note = "echo before > /root/note && sync; \
                    until test -s /dev/shm/count; do kill -0 $! || exit 139; sleep 0.05; done";
        guest.output(&format!("{COUNT} {note}")).await;
        guest
    }
}

impl Guest {
    /// How far it has counted.
    pub async fn count(&self) -> u64 {
        number(&self.output(TELL).await)
    }

    /// Fails the story unless it counts further than it had; how far it has come.
    pub async fn goes_on(&self, after: u64) -> u64 {
        let now = number(&self.output(COUNTS_ON).await);
        assert!(now > after, "{now} after {after}");
        now
    }
}

fn number(text: &str) -> u64 {
    text.parse()
        .unwrap_or_else(|_| panic!("a number instead of {text:?}"))
}
