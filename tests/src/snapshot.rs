//! A snapshot as the stories use it.

use serde_json::Value;

use crate::{Client, Guest, Reply, eventually};

/// A snapshot.
#[derive(Debug, Clone)]
pub struct Snapshot {
    client: Client,
    /// Id.
    pub id: String,
}

impl Snapshot {
    pub(crate) fn new(client: Client, id: &str) -> Self {
        Self {
            client,
            id: id.to_owned(),
        }
    }

    /// Its path in the API, and what comes after it, such as `/verify`.
    #[must_use]
    pub fn path(&self, rest: &str) -> String {
        format!("/snapshots/{}{rest}", self.id)
    }

    /// The snapshot as the API shows it.
    pub async fn inspect(&self) -> Value {
        self.client.get(&self.path("")).await.expect(200).json()
    }

    /// Waits until its memory is compressed; what it shows then.
    pub async fn compressed(&self) -> Value {
        eventually("it is compressed", || async {
            self.inspect().await["compression_state"] == "compressed"
        })
        .await;
        self.inspect().await
    }

    /// What reading all of it finds.
    pub async fn verify(&self) -> Value {
        let verified = self.client.post_empty(&self.path("/verify")).await;
        verified.expect(200).json()
    }

    /// Fails the story unless all of it is as it was taken; what reading it told.
    pub async fn is_intact(&self) -> Value {
        let verified = self.verify().await;
        assert_eq!(verified["state"], "intact", "{verified}");
        verified
    }

    /// What it costs.
    pub async fn usage(&self) -> Value {
        self.client.get(&self.path("/usage")).await.expect(200).json()
    }

    /// Asks for a fork, or for several; what came of it.
    pub async fn try_fork(&self, body: &Value) -> Reply {
        self.client.post(&self.path("/fork"), body).await
    }

    /// Makes an instance of it.
    pub async fn fork(&self, body: Value) -> Guest {
        let made = self.try_fork(&body).await.expect(201).json();
        Guest::shown(&self.client, &made)
    }

    /// Makes several instances of it, all of which must come about; each with its name.
    pub async fn forks(&self, body: Value) -> Vec<(String, Guest)> {
        let made = self.try_fork(&body).await.expect(201).json();
        Guest::all_forked(&self.client, &made)
    }

    /// Deletes it.
    pub async fn delete(&self) {
        self.client.delete(&self.path("")).await.expect(204);
    }
}
