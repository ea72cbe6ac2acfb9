//! A guest that counts in its memory for ever: the number of a process that goes on exactly where it was, which can
//! be had from no disk.

use serde_json::Value;

use crate::{Guest, Server, eventually};

/// What counts.
const COUNT: &str = "sh -c 'n=0; while :; do n=$((n+1)); echo $n > /dev/shm/count; sleep 0.05; done' \
                     >/dev/null 2>&1 </dev/null &";

/// Says how far it has come. The shell empties the file before it writes to it.
const TELL: &str = "until n=$(cat /dev/shm/count) && [ -n \"$n\" ]; do :; done; echo $n";

impl Server {
    /// Runs a guest that counts, and has `before` in `/root/note` on its disk.
    pub async fn counting(&self, image: &str, overrides: Value) -> Guest {
        let guest = self.run(image, overrides).await;
        guest.output(COUNT).await;
        guest.output("echo before > /root/note && sync").await;
        eventually("it counts", || async {
            guest.shell("test -s /dev/shm/count").await.exit_code == 0
        })
        .await;
        guest
    }
}

impl Guest {
    /// How far it has counted.
    pub async fn count(&self) -> u64 {
        let text = self.output(TELL).await;
        text.parse()
            .unwrap_or_else(|_| panic!("a number instead of {text:?}"))
    }

    /// Fails the story unless it has come as far as `at_least` and goes on from there.
    pub async fn goes_on(&self, at_least: u64) {
        let first = self.count().await;
        assert!(first >= at_least, "{first} after {at_least}");
        eventually("it goes on counting", || async { self.count().await > first }).await;
    }
}
