//! What is stored of an instance: its record, and the intent of an operation beside it.
//!
//! Invariant: an outcome and the end of its intent are one commit.

use hypeman_store::{StoreError, journal};

use super::driver::Driver;
use super::model::InstanceRecord;
use super::request::Operation;
use crate::EngineError;

impl Driver {
    /// Stores `changed` and publishes it; on failure nothing has changed.
    pub(super) async fn commit(&mut self, changed: InstanceRecord) -> Result<(), EngineError> {
        let document = changed.clone();
        self.shared
            .store
            .write(move |connection| hypeman_store::instances::update(connection, &document.id, &document))
            .await?;
        self.record = changed;
        self.publish();
        Ok(())
    }

    /// Records an intent before its first effect.
    pub(super) async fn begin(&self, operation: Operation) -> Result<i64, StoreError> {
        let id = self.record.id.clone();
        self.shared
            .store
            .write(move |connection| journal::begin(connection, &id, &operation.encode()))
            .await
    }

    /// Stores the record; what can't be stored now is stored later.
    pub(super) async fn save(&mut self) {
        let document = self.record.clone();
        let saved = self
            .shared
            .store
            .write(move |connection| hypeman_store::instances::update(connection, &document.id, &document))
            .await;
        self.note_saved(saved);
    }

    /// Stores the record as the outcome of what was intended.
    pub(super) async fn settle(&mut self) {
        let saved = self.store_outcome().await;
        self.note_saved(saved);
    }

    /// Stores record and outcome in one commit.
    pub(super) async fn store_outcome(&self) -> Result<(), StoreError> {
        let document = self.record.clone();
        self.shared
            .store
            .write(move |connection| {
                hypeman_store::instances::update(connection, &document.id, &document)?;
                journal::clear(connection, &document.id)
            })
            .await
    }

    /// Removes the intent of an operation that has left no trace.
    pub(super) async fn clear_journal(&mut self) {
        let id = self.record.id.clone();
        let cleared = self
            .shared
            .store
            .write(move |connection| journal::clear(connection, &id))
            .await;
        self.note_saved(cleared);
    }

    pub(super) fn note_saved(&mut self, saved: Result<(), StoreError>) {
        self.unsaved = saved.is_err();
        if let Err(error) = saved {
            tracing::warn!(instance = %self.record.id, %error, "record not saved yet");
        }
    }
}
