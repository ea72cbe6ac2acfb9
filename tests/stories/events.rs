//! What happens is heard in order, also by who comes back after a break.

use hypeman_tests::{EventStream, Server, have, mint, skip_unless};
use serde_json::json;

#[tokio::test]
async fn the_life_of_an_instance_is_heard_in_order_also_after_a_break() {
    skip_unless!(
        have("qemu-system-x86_64") && have("busybox"),
        "needs qemu-system-x86_64 and busybox-static"
    );
    let mut server = Server::start().await;
    let image = server.busybox().await;
    let mut events = EventStream::open(server.client(), None).await;
    let guest = server.create(&image, json!({"name": "heard"})).await;
    let id = guest.id.clone();

    // The listener goes away in the middle of the boot and comes back later.
    let first = events.next().await;
    assert_eq!(
        (&first["kind"], &first["subject"], &first["state"]),
        (&json!("instance"), &json!(id), &json!("Created"))
    );
    let cursor = first["cursor"].as_str().unwrap().to_owned();
    drop(events);
    guest.wait_for("Running").await;
    server
        .client()
        .delete(&format!("/instances/{id}"))
        .await
        .expect(204);

    let mut events = EventStream::open(server.client(), Some(&cursor)).await;
    let mut states = Vec::new();
    while states.last().is_none_or(|state| state != "Deleted") {
        let event = events.next().await;
        assert_eq!(event["subject"], json!(id));
        states.push(event["state"].as_str().unwrap().to_owned());
    }
    assert_eq!(states[..2], ["Initializing", "Running"], "{states:?}");
    assert_eq!(states.iter().filter(|state| *state == "Deleted").count(), 1);

    // News of an earlier run are gone: the client is told so, and not left with a gap.
    server.terminate();
    server.start_again().await;
    server
        .client()
        .get(&format!("/events?cursor={cursor}"))
        .await
        .refused(410, "cursor_gone");
    let stranger = mint(server.secret(), Some(&["image:read"]));
    let stranger = server.client().with_token(Some(&stranger));
    stranger.get("/events").await.refused(403, "Forbidden");
}
