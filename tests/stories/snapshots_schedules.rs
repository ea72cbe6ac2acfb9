//! Snapshots by the clock: of what they are, how many there are, which of them go, and what a client hears of them.

use hypeman_tests::{Clock, EventStream, Guest, Reply, Server, eventually, have, skip_unless};
use serde_json::{Value, json};

/// An hour, and the longest that a schedule of an hour may be late by itself.
const STRIKE: u64 = 4_000;

/// A server whose schedules go by a clock that the story turns, and the schedule of one of its instances.
struct Tower {
    server: Server,
    clock: Clock,
    ahead: u64,
    path: String,
}

impl Tower {
    async fn build() -> Self {
        let clock = Clock::new();
        Self {
            server: Server::start_by(&clock).await,
            clock,
            ahead: 0,
            path: String::new(),
        }
    }

    async fn run(&mut self) -> Guest {
        let image = self.server.busybox().await;
        let guest = self.server.run(&image, json!({"name": "origin"})).await;
        self.path = guest.path("/snapshot-schedule");
        guest
    }

    async fn set(&self, body: Value) -> Value {
        self.try_set(body).await.expect(200).json()
    }

    async fn try_set(&self, body: Value) -> Reply {
        let client = self.server.client();
        let request = client.request(reqwest::Method::PUT, &self.path).json(&body);
        client.send(request).await
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
        self.clock.turn(self.ahead);
        eventually("the clock strikes", || async {
            self.schedule().await["last_run_at"] != before
        })
        .await;
        self.schedule().await
    }

    /// Ids of the snapshots with a tag, newest first.
    async fn snapshots(&self, by: &str) -> Vec<String> {
        self.server.listed(&format!("/snapshots?tags%5Bby%5D={by}")).await
    }

    async fn kind_of_last(&self) -> Value {
        let schedule = self.schedule().await;
        assert!(schedule["last_error"].is_null(), "{schedule}");
        let last = schedule["last_snapshot_id"].as_str().unwrap();
        self.server.snapshot(last).inspect().await["kind"].clone()
    }
}

fn hourly(by: &str, retention: Value) -> Value {
    json!({"interval": "1h", "retention": retention, "metadata": {"by": by}})
}

#[tokio::test]
async fn a_schedule_makes_and_retires_snapshots() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let mut tower = Tower::build().await;
    let guest = tower.run().await;
    let client = tower.server.client().clone();
    client.get(&tower.path).await.refused(404, "not_found");
    for wrong in [
        json!({"interval": "30s", "retention": {"max_count": 1}}),
        json!({"interval": "1m", "retention": {}}),
    ] {
        tower.try_set(wrong).await.refused(400, "invalid_request");
    }
    let body = json!({"interval": "1h", "retention": {"max_count": 2}, "name_prefix": "hourly", "metadata": {"by": "clock"}});
    let set = tower.set(body).await;
    assert_eq!(set["interval"], "1h0m0s", "{set}");
    let mut last = Value::Null;
    for _ in 0..3 {
        let struck = tower.strike().await;
        assert!(struck["last_snapshot_id"].is_string(), "{struck}");
        assert_ne!(struck["last_snapshot_id"], last);
        last = struck["last_snapshot_id"].clone();
    }
    eventually("two are kept", || async {
        tower.snapshots("clock").await.len() == 2
    })
    .await;
    let kept = tower.server.snapshots().await;
    assert_eq!(last, kept[0].id.as_str(), "newest first");
    let newest = kept[0].inspect().await;
    assert!(
        newest["name"].as_str().unwrap().starts_with("hourly-"),
        "{newest}"
    );
    guest.delete().await;
    client.get(&tower.path).await.expect(200);
    for snapshot in &kept {
        snapshot.delete().await;
    }
    client.get(&tower.path).await.refused(404, "not_found");
}

#[tokio::test]
async fn a_schedule_goes_by_the_state_of_its_instance_and_tells_what_failed() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let mut tower = Tower::build().await;
    let guest = tower.run().await;
    let client = tower.server.client().clone();
    let mut events = EventStream::open(&client, None).await;
    tower.set(hourly("clock", json!({"max_count": 9}))).await;

    tower.strike().await;
    assert_eq!(tower.kind_of_last().await, "Standby");
    assert_eq!(guest.inspect().await["state"], "Running");
    guest.standby().await;
    tower.strike().await;
    assert_eq!(tower.kind_of_last().await, "Standby");
    assert_eq!(
        guest.inspect().await["state"],
        "Standby",
        "nobody woke it for that"
    );
    guest.restore().await;
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
        tower.server.snapshot(snapshot).delete().await;
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
    tower.clock.turn(0);
    let soon = jiff::Timestamp::now() + std::time::Duration::from_secs(24 * 3_600);
    eventually("the next run is near", || async {
        let next = tower.schedule().await["next_run_at"].clone();
        next.as_str().unwrap().parse::<jiff::Timestamp>().unwrap() < soon
    })
    .await;
}
