//! Snapshots by the clock: of what they are, how many there are, which of them go, and what a client hears of them.

use std::path::Path;

use hypeman_tests::{EventStream, Guest, Server, eventually, have, skip_unless};
use serde_json::{Value, json};

/// An hour, and the longest that a schedule of an hour may be late by itself.
const STRIKE: u64 = 4_000;

/// Sets the clock of schedules ahead. The server never reads half a number.
pub(crate) fn turn(clock: &Path, seconds: u64) {
    let next = clock.with_extension("next");
    std::fs::write(&next, seconds.to_string()).unwrap();
    std::fs::rename(&next, clock).unwrap();
}

/// A server whose schedules go by a clock that the story turns, and the schedule of one of its instances.
struct Tower {
    server: Server,
    clock: tempfile::NamedTempFile,
    ahead: u64,
    path: String,
}

impl Tower {
    async fn build() -> Self {
        let clock = tempfile::NamedTempFile::new().unwrap();
        let mut server = Server::start().await;
        server.kill();
        let turned = ("HYPEMAN_CLOCK".to_owned(), clock.path().display().to_string());
        server.start_again_with(vec![turned]).await;
        Self {
            server,
            clock,
            ahead: 0,
            path: String::new(),
        }
    }

    async fn run(&mut self) -> Guest {
        let image = self.server.busybox().await;
        let guest = self.server.run(&image, json!({"name": "origin"})).await;
        self.path = format!("/instances/{}/snapshot-schedule", guest.id);
        guest
    }

    async fn set(&self, body: Value) {
        let client = self.server.client();
        let request = client.request(reqwest::Method::PUT, &self.path).json(&body);
        client.send(request).await.expect(200);
    }

    async fn schedule(&self) -> Value {
        self.server.client().get(&self.path).await.expect(200).json()
    }

    /// Turns the clock on until the schedule is due, and waits for the end of its run.
    async fn strike(&mut self) -> Value {
        self.after(STRIKE).await
    }

    async fn after(&mut self, seconds: u64) -> Value {
        let before = self.schedule().await["last_run_at"].clone();
        self.ahead += seconds;
        turn(self.clock.path(), self.ahead);
        eventually("the clock strikes", || async {
            self.schedule().await["last_run_at"] != before
        })
        .await;
        self.schedule().await
    }

    /// Ids of the snapshots with a tag, newest first.
    async fn snapshots(&self, by: &str) -> Vec<String> {
        let path = format!("/snapshots?tags%5Bby%5D={by}");
        let listed = self.server.client().get(&path).await.expect(200).json();
        let ids = listed.as_array().unwrap().iter();
        ids.map(|snapshot| snapshot["id"].as_str().unwrap().to_owned())
            .collect()
    }

    async fn kind_of_last(&self) -> Value {
        let schedule = self.schedule().await;
        assert!(schedule["last_error"].is_null(), "{schedule}");
        let path = format!("/snapshots/{}", schedule["last_snapshot_id"].as_str().unwrap());
        self.server.client().get(&path).await.expect(200).json()["kind"].clone()
    }
}

fn hourly(by: &str, retention: Value) -> Value {
    json!({"interval": "1h", "retention": retention, "metadata": {"by": by}})
}

#[tokio::test]
async fn a_schedule_goes_by_the_state_of_its_instance_and_tells_what_failed() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let mut tower = Tower::build().await;
    let guest = tower.run().await;
    let client = tower.server.client().clone();
    let mut events = EventStream::open(&client, None).await;
    tower.set(hourly("clock", json!({"max_count": 9}))).await;
    let path = format!("/instances/{}", guest.id);

    tower.strike().await;
    assert_eq!(tower.kind_of_last().await, "Standby");
    assert_eq!(guest.inspect().await["state"], "Running");
    client.post_empty(&format!("{path}/standby")).await.expect(200);
    tower.strike().await;
    assert_eq!(tower.kind_of_last().await, "Standby");
    assert_eq!(
        guest.inspect().await["state"],
        "Standby",
        "nobody woke it for that"
    );
    client.post_empty(&format!("{path}/restore")).await.expect(200);
    guest.stop().await;
    tower.strike().await;
    assert_eq!(tower.kind_of_last().await, "Stopped");
    let made = tower.snapshots("clock").await;
    assert_eq!(made.len(), 3);

    // It outlives its instance, and then there is nothing to capture.
    guest.delete().await;
    let failed = tower.strike().await;
    assert!(
        failed["last_error"].as_str().unwrap().contains("not found"),
        "{failed}"
    );
    assert_eq!(failed["last_snapshot_id"], made[0], "{failed}");
    for snapshot in &made {
        client.delete(&format!("/snapshots/{snapshot}")).await.expect(204);
    }
    client.get(&tower.path).await.refused(404, "not_found");

    // All of it was to be heard, in order.
    let mut heard = Vec::new();
    while heard.len() < 6 {
        let event = events.next().await;
        if event["kind"] == "snapshot" {
            heard.push((event["subject"].clone(), event["state"].clone()));
        }
    }
    let of = |state: &str| {
        let said = heard.iter().filter(|(_, said)| said == state);
        said.map(|(subject, _)| subject.as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(of("Created"), made.iter().rev().cloned().collect::<Vec<_>>());
    assert_eq!(of("Deleted"), made);
}

#[tokio::test]
async fn a_schedule_retires_the_old_and_makes_up_for_what_was_missed_by_one_run() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let mut tower = Tower::build().await;
    let guest = tower.run().await;
    guest.stop().await;
    tower.set(hourly("age", json!({"max_age": "90m"}))).await;
    tower.strike().await;
    let first = tower.snapshots("age").await;
    tower.strike().await;
    let both = tower.snapshots("age").await;
    assert_eq!((both.len(), &both[1]), (2, &first[0]), "the first is an hour old");
    tower.strike().await;
    let kept = tower.snapshots("age").await;
    assert_eq!(
        (kept.len(), &kept[1]),
        (2, &both[0]),
        "the first was two hours old"
    );

    // Two days in one step: one run, and the next is an hour ahead.
    tower.set(hourly("age", json!({"max_count": 99}))).await;
    let made = tower.after(48 * 3_600).await;
    let time = |field: &str| made[field].as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
    let ahead = time("next_run_at").as_second() - time("last_run_at").as_second();
    assert!((3_600..4_000).contains(&ahead), "{made}");
    let all = tower.snapshots("age").await;
    assert_eq!((all.len(), &all[1..]), (3, &kept[..]));

    // A schedule that is set anew leaves alone what its predecessor has made.
    let client = tower.server.client().clone();
    client.delete(&tower.path).await.expect(204);
    tower.set(hourly("anew", json!({"max_count": 1}))).await;
    for _ in 0..2 {
        tower.strike().await;
        assert_eq!(tower.snapshots("anew").await.len(), 1);
        assert_eq!(tower.snapshots("age").await, all);
    }

    // The clock was wrong all the time: nothing waits for days.
    turn(tower.clock.path(), 0);
    let soon = jiff::Timestamp::now() + std::time::Duration::from_secs(24 * 3_600);
    eventually("the next run is near", || async {
        let next = tower.schedule().await["next_run_at"].clone();
        next.as_str().unwrap().parse::<jiff::Timestamp>().unwrap() < soon
    })
    .await;
}
