//! Copies of disks, all of one instant, made by QEMU while the guest goes on writing.
//!
//! ```text
//!  guest ──► disk0-raw ◄── a filter that saves a cluster before the guest overwrites it ──┐
//!                                                                                         ▼
//!                                         copyN-map (qcow2, in memory) ── copyN-data: the target, a raw file
//! ```
//!
//! QEMU writes zeros where the source has a hole, and to a raw file that means space taken. So it copies into a
//! qcow2 image whose data lies in a file of its own, at the guest's addresses: zeros are then only noted in the map,
//! which nobody needs afterwards, and the hole stays one.
//!
//! Invariants:
//! - All copies begin in one transaction of a paused machine, so they are of one instant and of that of its memory.
//! - A machine has one set of copies at a time; what a server left behind that died is cleared before the next.

use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use rustix::fs::MemfdFlags;
use serde::Deserialize;
use serde_json::{Value, json};

use super::arguments::raw_node;
use super::control::{COMMAND_DEADLINE, Control};
use crate::blocking::blocking;
use crate::files::io_error;
use crate::{Disk, DiskCopies, DiskCopy, VmmError};

/// What names of our jobs and nodes begin with.
const PREFIX: &str = "copy";
/// The transaction waits for what the disks have under way, and that is nothing in a pause.
const BEGIN_DEADLINE: Duration = Duration::from_secs(60);
/// Changes of jobs are events; this is for those that a broken connection swallowed.
const LOST_EVENT: Duration = Duration::from_secs(1);

/// Copies that are prepared or under way.
#[derive(Debug)]
pub(super) struct QemuDiskCopies {
    control: Arc<Control>,
    copies: Vec<Copy>,
    /// Held as long as QEMU knows of these copies.
    turn: Option<tokio::sync::OwnedMutexGuard<()>>,
}

#[derive(Debug)]
struct Copy {
    name: String,
    source: String,
    file: File,
    path: PathBuf,
}

#[derive(Debug, Deserialize)]
struct Job {
    id: String,
    status: String,
    error: Option<String>,
}

/// Opens the targets. Also writes back what the host has cached of the disks: stopping a machine waits for that,
/// and it should be little then.
pub(super) async fn prepare(
    control: &Arc<Control>,
    disks: &[Disk],
    copies: &[DiskCopy],
) -> Result<QemuDiskCopies, VmmError> {
    for (at, copy) in copies.iter().enumerate() {
        if disks.get(copy.disk).is_none_or(|disk| disk.read_only) {
            return Err(VmmError::InvalidSpec(format!(
                "disk {} cannot be copied: it is not writable",
                copy.disk
            )));
        }
        if copies[..at].iter().any(|other| other.disk == copy.disk) {
            return Err(VmmError::InvalidSpec(format!(
                "disk {} cannot be copied twice",
                copy.disk
            )));
        }
    }
    let turn = control.copying().try_lock_owned().map_err(|_| {
        VmmError::refused(
            "blockdev-backup",
            "the disks of this machine are being copied already",
        )
    })?;
    clear(control).await?;
    write_back(disks).await?;
    let mut prepared = QemuDiskCopies {
        control: Arc::clone(control),
        copies: Vec::with_capacity(copies.len()),
        turn: Some(turn),
    };
    for copy in copies {
        if let Err(error) = prepared.add(&disks[copy.disk], copy).await {
            let made = std::mem::take(&mut prepared.copies);
            prepared.clear().await;
            for copy in made {
                let _ = fs::remove_file(copy.path);
            }
            return Err(error);
        }
    }
    Ok(prepared)
}

async fn write_back(disks: &[Disk]) -> Result<(), VmmError> {
    let paths: Vec<PathBuf> = disks
        .iter()
        .filter(|disk| !disk.read_only)
        .map(|disk| disk.path.clone())
        .collect();
    blocking(move || {
        paths.iter().try_for_each(|path| {
            File::open(path)
                .and_then(|file| file.sync_data())
                .map_err(io_error("cannot write back", path))
        })
    })
    .await
}

impl QemuDiskCopies {
    async fn add(&mut self, disk: &Disk, copy: &DiskCopy) -> Result<(), VmmError> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let name = format!("{PREFIX}{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let size = fs::metadata(&disk.path)
            .map_err(io_error("cannot look at", &disk.path))?
            .len();
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&copy.target)
            .map_err(io_error("cannot make", &copy.target))?;
        self.copies.push(Copy {
            name: name.clone(),
            source: raw_node(copy.disk),
            file,
            path: copy.target.clone(),
        });
        let Some(Copy { file, .. }) = self.copies.last() else {
            return Ok(());
        };
        file.set_len(size)
            .map_err(io_error("cannot size", &copy.target))?;

        let (map, data) = (format!("{name}-map"), format!("{name}-data"));
        let memory = rustix::fs::memfd_create("disk-copy-map", MemfdFlags::CLOEXEC)
            .map_err(std::io::Error::from)
            .map_err(VmmError::io("cannot make a map of a copy"))?;
        let target = file
            .try_clone()
            .map_err(io_error("cannot hand over", &copy.target))?;
        self.add_file(&map, File::from(memory)).await?;
        self.add_file(&data, target).await?;
        let create = json!({
            "job-id": name,
            "options": { "driver": "qcow2", "file": map, "data-file": data, "size": size },
        });
        self.job("blockdev-create", create, &name).await?;
        let node = json!({ "driver": "qcow2", "node-name": name, "file": map, "data-file": data });
        self.control
            .command("blockdev-add", node, COMMAND_DEADLINE)
            .await
            .map(drop)
    }

    async fn add_file(&self, name: &str, file: File) -> Result<(), VmmError> {
        let lent = self.control.lend(file).await?;
        let node = json!({
            "driver": "file",
            "node-name": name,
            "filename": lent.path(),
            "locking": "off",
            "aio": "threads",
            // We bring it to stable storage ourselves, in the end.
            "cache": { "direct": false, "no-flush": true },
        });
        let added = self.control.command("blockdev-add", node, COMMAND_DEADLINE).await;
        self.control.take_back(lent).await?;
        added.map(drop)
    }

    /// Starts a job and waits for its end.
    async fn job(&self, command: &str, arguments: Value, id: &str) -> Result<(), VmmError> {
        self.control.command(command, arguments, COMMAND_DEADLINE).await?;
        let job = ended(&self.control, id).await?;
        self.control
            .command("job-dismiss", json!({ "id": id }), COMMAND_DEADLINE)
            .await?;
        job.outcome(command)
    }

    /// Makes QEMU forget all of it, whatever it was doing.
    async fn clear(&mut self) {
        if self.turn.is_none() {
            return;
        }
        match clear(&self.control).await {
            Ok(()) | Err(VmmError::Gone) => {}
            Err(error) => {
                tracing::warn!(machine = self.control.id(), %error, "a copy of a disk is not let go of");
            }
        }
        self.turn = None;
    }
}

#[async_trait]
impl DiskCopies for QemuDiskCopies {
    async fn begin(&mut self) -> Result<(), VmmError> {
        let actions: Vec<Value> = self
            .copies
            .iter()
            .map(|copy| {
                json!({
                    "type": "blockdev-backup",
                    "data": {
                        "job-id": copy.name,
                        "device": copy.source,
                        "target": copy.name,
                        "sync": "full",
                        "auto-dismiss": false,
                    },
                })
            })
            .collect();
        self.control
            .command("transaction", json!({ "actions": actions }), BEGIN_DEADLINE)
            .await
            .map(drop)
    }

    async fn finish(mut self: Box<Self>) -> Result<(), VmmError> {
        for copy in &self.copies {
            ended(&self.control, &copy.name)
                .await?
                .outcome("blockdev-backup")?;
        }
        let copies = std::mem::take(&mut self.copies);
        self.clear().await;
        blocking(move || {
            copies.iter().try_for_each(|copy| {
                copy.file
                    .sync_all()
                    .map_err(io_error("cannot write back", &copy.path))
            })
        })
        .await
    }

    async fn cancel(mut self: Box<Self>) {
        self.clear().await;
    }
}

impl Drop for QemuDiskCopies {
    fn drop(&mut self) {
        let Some(turn) = self.turn.take() else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        let mut left = Self {
            control: Arc::clone(&self.control),
            copies: Vec::new(),
            turn: Some(turn),
        };
        runtime.spawn(async move { left.clear().await });
    }
}

/// Ends all jobs of ours that this QEMU has, and takes their nodes away.
pub(super) async fn clear(control: &Control) -> Result<(), VmmError> {
    for job in jobs(control)
        .await?
        .iter()
        .filter(|job| job.id.starts_with(PREFIX))
    {
        if job.status != CONCLUDED {
            // It may conclude by itself at this moment.
            let arguments = json!({ "device": job.id, "force": true });
            match control
                .command("block-job-cancel", arguments, COMMAND_DEADLINE)
                .await
            {
                Ok(_) | Err(VmmError::Refused { .. }) => {}
                Err(error) => return Err(error),
            }
            ended(control, &job.id).await?;
        }
        control
            .command("job-dismiss", json!({ "id": job.id }), COMMAND_DEADLINE)
            .await?;
    }
    let nodes = control
        .command(
            "query-named-block-nodes",
            json!({ "flat": true }),
            COMMAND_DEADLINE,
        )
        .await?;
    let mut names: Vec<&str> = nodes
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|node| node["node-name"].as_str())
        .filter(|name| name.starts_with(PREFIX))
        .collect();
    // The image before the files that it is made of, whose names are longer.
    names.sort_unstable_by_key(|name| name.len());
    names.sort_by_key(|name| name.contains('-'));
    for name in names {
        control
            .command("blockdev-del", json!({ "node-name": name }), COMMAND_DEADLINE)
            .await?;
    }
    Ok(())
}

const CONCLUDED: &str = "concluded";

impl Job {
    fn outcome(self, command: &str) -> Result<(), VmmError> {
        match self.error {
            None => Ok(()),
            Some(message) => Err(VmmError::refused(command, message)),
        }
    }
}

async fn jobs(control: &Control) -> Result<Vec<Job>, VmmError> {
    let answer = control
        .command("query-jobs", Value::Null, COMMAND_DEADLINE)
        .await?;
    serde_json::from_value(answer).map_err(|error| VmmError::refused("query-jobs", error.to_string()))
}

/// Waits until a job has concluded.
async fn ended(control: &Control, id: &str) -> Result<Job, VmmError> {
    let mut changes = control.jobs();
    loop {
        changes.mark_unchanged();
        match jobs(control).await?.into_iter().find(|job| job.id == id) {
            Some(job) if job.status == CONCLUDED => return Ok(job),
            Some(_) => {}
            None => return Err(VmmError::refused("query-jobs", format!("there is no job {id}"))),
        }
        let _ = tokio::time::timeout(LOST_EVENT, changes.changed()).await;
    }
}
