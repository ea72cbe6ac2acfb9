//! One writer thread with group commit, one reader connection.

use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rusqlite::Connection;
use tokio::sync::oneshot;

use crate::StoreError;
use crate::migrations::migrate;

/// More writes than this never share one commit, so that none waits long.
const MAX_GROUP: usize = 256;

/// Runs inside a savepoint and returns what to do once the commit is known.
type Job = Box<dyn FnOnce(&Connection) -> Finish + Send>;
type Finish = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

/// The metadata database. Clones share it.
#[derive(Clone)]
pub struct Store {
    writer: Sender<Job>,
    reader: Arc<Mutex<Connection>>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

impl Store {
    /// Opens or makes the database at `path` and brings its schema up to date.
    ///
    /// # Errors
    /// The file can't be opened, or a newer server wrote it.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let mut connection = connect(path)?;
        migrate(&mut connection)?;
        let reader = connect(path)?;
        let (writer, jobs) = channel();
        std::thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || write_loop(&mut connection, &jobs))
            .map_err(|_| StoreError::Closed)?;
        Ok(Self {
            writer,
            reader: Arc::new(Mutex::new(reader)),
        })
    }

    /// Runs `work` in a transaction; returns after it is durable.
    ///
    /// # Errors
    /// What `work` returns, or a failed commit. Nothing of it remains then.
    pub async fn write<T, E, W>(&self, work: W) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StoreError> + Send + 'static,
        W: FnOnce(&Connection) -> Result<T, E> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            let outcome = in_savepoint(connection, work);
            Box::new(move |commit| {
                let outcome = match commit {
                    Ok(()) => outcome,
                    Err(error) => outcome.and(Err(error.into())),
                };
                // A caller that went away loses the answer, not the write.
                let _ = answer.send(outcome);
            })
        });
        self.writer.send(job).map_err(|_| StoreError::Closed)?;
        answered.await.map_err(|_| StoreError::Closed)?
    }

    /// Reads committed state. Short: rows by key or small scans.
    ///
    /// # Errors
    /// What `work` returns.
    pub fn read<T, E>(&self, work: impl FnOnce(&Connection) -> Result<T, E>) -> Result<T, E> {
        work(&self.reader.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn connect(path: &Path) -> Result<Connection, StoreError> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(Duration::from_secs(10))?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

fn in_savepoint<T, E: From<StoreError>>(
    connection: &Connection,
    work: impl FnOnce(&Connection) -> Result<T, E>,
) -> Result<T, E> {
    let database = |result: rusqlite::Result<()>| result.map_err(|error| E::from(StoreError::from(error)));
    if connection.is_autocommit() {
        return Err(StoreError::NotCommitted.into());
    }
    database(connection.execute_batch("SAVEPOINT job"))?;
    match work(connection) {
        Ok(value) => {
            database(connection.execute_batch("RELEASE job"))?;
            Ok(value)
        }
        Err(error) => {
            // A full disk makes SQLite roll the whole transaction back by itself; the cause is what counts.
            if !connection.is_autocommit() {
                database(connection.execute_batch("ROLLBACK TO job; RELEASE job"))?;
            }
            Err(error)
        }
    }
}

fn write_loop(connection: &mut Connection, jobs: &Receiver<Job>) {
    while let Ok(first) = jobs.recv() {
        let begun = connection.execute_batch("BEGIN IMMEDIATE");
        let mut finishes = Vec::new();
        let mut next = Some(first);
        while let Some(job) = next {
            finishes.push(job(connection));
            // After SQLite gave the transaction up, a further job would run outside of it.
            let broken = connection.is_autocommit();
            next = if broken || finishes.len() == MAX_GROUP {
                None
            } else {
                jobs.try_recv().ok()
            };
        }
        // What SQLite gave up has told its cause to the job that met it; a commit would only say that none is open.
        let given_up = begun.is_ok() && connection.is_autocommit();
        let committed = match begun {
            Ok(()) if given_up => Err(StoreError::NotCommitted),
            Ok(()) => connection.execute_batch("COMMIT").map_err(StoreError::from),
            Err(error) => Err(error.into()),
        };
        if committed.is_err() && !connection.is_autocommit() {
            // The failed commit left the transaction open; the next group needs a clean start.
            if let Err(error) = connection.execute_batch("ROLLBACK") {
                tracing::error!(%error, "metadata transaction could not be rolled back");
            }
        }
        let succeeded = committed.is_ok();
        let no_space = matches!(committed, Err(StoreError::NoSpace));
        let mut cause = committed.err();
        for finish in finishes {
            // The cause goes to the first that waits; the others failed along with it. Lack of space concerns all.
            finish(match cause.take() {
                None if succeeded => Ok(()),
                None if no_space => Err(StoreError::NoSpace),
                None => Err(StoreError::NotCommitted),
                Some(cause) => Err(cause),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal;

    fn store() -> (tempfile::TempDir, Store) {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("metadata.db")).unwrap();
        (directory, store)
    }

    #[tokio::test]
    async fn a_failed_write_leaves_nothing_and_spoils_no_other() {
        let (_directory, store) = store();
        let failing = store.write(|connection| {
            journal::begin(connection, "a", "{}")?;
            Err::<(), _>(StoreError::Conflict("on purpose".into()))
        });
        let succeeding = store.write(|connection| journal::begin(connection, "b", "{}"));
        let (failed, succeeded) = tokio::join!(failing, succeeding);
        assert!(matches!(failed, Err(StoreError::Conflict(_))));
        succeeded.unwrap();
        let subjects: Vec<String> = store
            .read(journal::all)
            .unwrap()
            .into_iter()
            .map(|entry| entry.subject)
            .collect();
        assert_eq!(subjects, ["b"]);
    }

    #[tokio::test]
    async fn a_repeated_intent_replaces_the_earlier() {
        let (_directory, store) = store();
        for operation in ["stop", "delete", "delete"] {
            store
                .write(move |connection| journal::begin(connection, "a", operation))
                .await
                .unwrap();
        }
        let entries = store.read(journal::all).unwrap();
        assert_eq!(entries.len(), 1);
        assert_eq!(entries[0].operation, "delete");
    }

    #[tokio::test]
    async fn all_that_wait_learn_that_the_disk_is_full() {
        let (_directory, store) = store();
        store
            .write(|connection| {
                let pages: u32 = connection.pragma_query_value(None, "page_count", |row| row.get(0))?;
                Ok::<_, StoreError>(connection.pragma_update(None, "max_page_count", pages)?)
            })
            .await
            .unwrap();
        let large = "x".repeat(1 << 20);
        let writes = (0..4).map(|number| {
            let (store, large) = (store.clone(), large.clone());
            async move {
                store
                    .write(move |connection| journal::begin(connection, &number.to_string(), &large))
                    .await
            }
        });
        let mut waiting = tokio::task::JoinSet::new();
        for write in writes {
            waiting.spawn(write);
        }
        for outcome in waiting.join_all().await {
            assert!(
                matches!(outcome, Err(StoreError::NoSpace | StoreError::NotCommitted)),
                "{outcome:?}"
            );
        }
        assert!(store.read(journal::all).unwrap().is_empty());
    }

    #[tokio::test]
    async fn what_was_answered_is_there_after_reopening() {
        let (directory, store) = store();
        for number in 0..20 {
            store
                .write(move |connection| journal::begin(connection, &number.to_string(), "{}"))
                .await
                .unwrap();
        }
        drop(store);
        let again = Store::open(&directory.path().join("metadata.db")).unwrap();
        assert_eq!(again.read(journal::all).unwrap().len(), 20);
    }

    #[test]
    fn a_database_of_a_newer_server_is_refused() {
        let (directory, store) = store();
        drop(store);
        let path = directory.path().join("metadata.db");
        Connection::open(&path)
            .unwrap()
            .pragma_update(None, "user_version", 999)
            .unwrap();
        assert!(matches!(
            Store::open(&path),
            Err(StoreError::TooNew { found: 999, .. })
        ));
    }
}
