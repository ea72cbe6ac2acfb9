//! A thousand stored instances without booting a thousand VMs: one real instance is made and stopped by the API, and
//! its record is multiplied in the store while the server is away.

use std::path::Path;

use hypeman_store::{Store, StoreError, instances};
use serde_json::{Value, json};

use super::kept::wait_until_compressed;
use crate::error::{BenchError, Result};
use crate::guests;
use crate::http::Connection;
use crate::registry::push_busybox;
use crate::server::{Server, call, create_running, small_instance};

/// Instances in the store afterwards.
pub(super) const STORED: usize = 1000;

/// Stops an instance and waits until it is.
fn stop(api: &mut Connection, id: &str) -> Result<()> {
    call(api, "POST", &format!("/instances/{id}/stop"), None, 200)?;
    let path = format!("/instances/{id}/wait?state=Stopped&timeout=60s");
    call(api, "GET", &path, None, 200).map(drop)
}

/// Boots an instance and stops it: its id and its image.
pub(super) fn stopped_instance(server: &Server) -> Result<(String, String)> {
    let image = push_busybox(server)?;
    let mut api = server.connect()?;
    let id = create_running(&mut api, &small_instance("bench-seed", &image, "qemu"))?;
    stop(&mut api, &id)?;
    Ok((id, image))
}

/// Boots an instance, takes a compressed Standby snapshot of it, stops it, and takes a Stopped one.
pub(super) fn captured_instance(server: &Server) -> Result<()> {
    let image = push_busybox(server)?;
    let mut api = server.connect()?;
    let id = create_running(&mut api, &small_instance("bench-seed", &image, "qemu"))?;
    let snapshot = guests::snapshot(&mut api, &id, Some(json!({ "enabled": true })))?;
    wait_until_compressed(&mut api, &snapshot)?;
    stop(&mut api, &id)?;
    let request = json!({ "kind": "Stopped", "name": "seed" });
    let path = format!("/instances/{id}/snapshots");
    call(&mut api, "POST", &path, Some(&request), 201).map(drop)
}

/// Returns the server with [`STORED`] stopped instances, and the image that they have.
pub(super) fn server_with_instances(server: Server) -> Result<(Server, String)> {
    let (_, image) = stopped_instance(&server)?;
    let server = server.restart(multiply)?;
    let mut api = server.connect()?;
    let list = call(&mut api, "GET", "/instances", None, 200)?;
    match list.as_array().map(Vec::len) {
        Some(STORED) => Ok((server, image)),
        other => Err(BenchError::Answer(format!(
            "{other:?} instances instead of {STORED} after seeding"
        ))),
    }
}

fn multiply(database: &Path) -> Result<()> {
    let fail = |error: StoreError| BenchError::Answer(format!("the store refused the seeds: {error}"));
    let store = Store::open(database).map_err(fail)?;
    let records: Vec<Value> = store.read(instances::all).map_err(fail)?;
    let Some(model) = records.first().cloned() else {
        return Err(BenchError::Answer("there is no instance to multiply".into()));
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .map_err(|error| BenchError::io("start a runtime", error))?;
    let inserted = runtime.block_on(store.write(move |connection| {
        for number in 1..STORED {
            let mut record = model.clone();
            let (id, name) = (format!("b{number:023}"), format!("bench-seed-{number:04}"));
            record["id"] = Value::from(id.as_str());
            record["name"] = Value::from(name.as_str());
            instances::insert(connection, &id, &name, &record)?;
        }
        Ok::<(), StoreError>(())
    }));
    inserted.map_err(fail)
}
