//! Taking an instance from nothing to a booting machine, and back again when a step fails.
//!
//! ```text
//!   journal ─► disks ─► network ─► VMM ─► record + journal entry removed ─► link to the agent
//!      │         └──────────┴────────┴── failure: undo in reverse, then remove the entry
//!      └── crash: recovery undoes the same way
//! ```

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hypeman_core::instance::{Observation, UnknownCause};
use hypeman_guest_api::{AgentKey, GuestConfig, InitMode, NetworkConfig, Program, is_init_command};
use hypeman_network::Attachment;
use hypeman_store::journal;
use hypeman_vmm::{Disk, IoLimit, Machine, MachineSpec, MemoryBacking, Nic, VmmError};
use jiff::Timestamp;

use super::added_memory::Added;
use super::disks::{create_overlay, sync_overlay};
use super::driver::{Driver, Run};
use super::link::{Link, Welcome};
use super::model::{InstanceRecord, RunRecord};
use super::request::Operation;
use crate::durable;
use crate::images::RuntimeConfig;
use crate::layout::make_private;
use crate::shared::Shared;
use crate::{EngineError, faults};

/// How long a killed process may take to go: only one stuck in the kernel takes longer.
const KILL_DEADLINE: Duration = Duration::from_secs(30);
/// A burst may be this many times the sustained rate.
const IO_BURST: u64 = 4;

impl Driver {
    /// Boots the machine. For [`Operation::Create`] the intent is in the journal already and a failure removes
    /// the instance.
    pub(super) async fn boot(&mut self, operation: Operation) -> Result<(), EngineError> {
        let first = operation == Operation::Create;
        if !first {
            self.begin(operation).await?;
            faults::point("start.recorded");
        }
        match self.launch(operation).await {
            Ok(()) => Ok(()),
            Err(error) => {
                self.log.line(&format!("boot failed: {error}"));
                if let Err(alive) = self.undo_launch().await {
                    // Its files and its journal entry must outlive it: the next start kills it.
                    tracing::error!(instance = %self.record.id, %alive, "left for recovery");
                    self.observe(&Observation::Launched { without_agent: true });
                    self.observe(&Observation::Unresponsive {
                        cause: UnknownCause::Leftover,
                        reason: format!("its start failed and could not be undone: {alive}"),
                    });
                } else if first {
                    if let Err(cleanup) = self.forget().await {
                        tracing::error!(instance = %self.record.id, %cleanup, "left for recovery");
                    }
                } else {
                    self.clear_journal().await;
                    self.publish();
                }
                Err(error)
            }
        }
    }

    async fn launch(&mut self, operation: Operation) -> Result<(), EngineError> {
        let first = operation == Operation::Create;
        let at = |create, start| faults::point(if first { create } else { start });
        let shared = Arc::clone(&self.shared);
        let image = shared.images.bootable(&self.record.image_digest)?;
        let artifacts = shared.boot_artifacts(&self.record.boot_artifacts).await?;
        let fresh = self.prepare_files().await?;
        // Beside the start of the VMM, and durable before the commit.
        let overlay = shared
            .layout
            .overlay(&self.record.id, self.record.disk_generation);
        let stored = fresh.then(|| tokio::task::spawn_blocking(move || sync_overlay(&overlay)));
        self.log.line(if first {
            "create: booting"
        } else {
            "start: booting"
        });
        if first {
            faults::point("create.disks");
        }
        self.attach().await?;
        at("create.network", "start.network");
        let spec = machine_spec(&shared, &self.record, artifacts.kernel, artifacts.initramfs);
        let vmm = shared.vmm(self.record.hypervisor)?;
        let turn = shared
            .launches
            .acquire()
            .await
            .map_err(|_| EngineError::ShuttingDown)?;
        let machine: Arc<dyn Machine> = Arc::from(vmm.launch(&spec).await?);
        drop(turn);
        self.slot.live.set_machine(Some(Arc::clone(&machine)));
        at("create.launched", "start.launched");

        let key = AgentKey(crate::random::bytes().map_err(|error| EngineError::io("random key", error))?);
        let mut started = self.record.clone();
        started.run = Some(RunRecord {
            process: machine.process().clone(),
            agent_key: crate::random::to_hex(&key.0),
            base: None,
            former_key: None,
            identity: machine.state_identity().cloned(),
            jail: machine.jail().cloned(),
            served: None,
        });
        started.started_at = Some(Timestamp::now());
        started.stopped_at = None;
        started.exit = None;
        let config = guest_config(&shared, &started, &image, key.clone());
        // The guest needs its configuration only after the kernel is up: the commit runs beside the boot.
        let link = Link::start(&machine, key, config, Welcome::Nothing);
        let document = started.clone();
        if let Some(stored) = stored {
            let stored = stored.await;
            stored.map_err(|error| EngineError::io("store the writable layer", error.into()))??;
        }
        shared
            .store
            .write(move |connection| {
                hypeman_store::instances::update(connection, &document.id, &document)?;
                journal::clear(connection, &document.id)
            })
            .await?;
        at("create.committed", "start.committed");
        self.record = started;
        self.run = Some(Run {
            machine,
            link,
            program_exit: None,
            failure: None,
            added: Added::Withheld,
        });
        self.observe(&Observation::Launched {
            without_agent: self.record.skip_guest_agent,
        });
        Ok(())
    }

    /// `true` when the writable layer was made.
    async fn prepare_files(&self) -> Result<bool, EngineError> {
        let layout = self.shared.layout.clone();
        let id = self.record.id.clone();
        let (bytes, generation) = (self.record.overlay_bytes, self.record.disk_generation);
        let work = move || {
            make_private(&layout.instance(&id))?;
            make_private(&layout.logs(&id))?;
            make_private(&layout.instance_runtime(&id))?;
            let overlay = layout.overlay(&id, generation);
            let fresh = !overlay.exists();
            if fresh {
                create_overlay(&layout.overlay_templates(), bytes, &overlay)?;
            }
            Ok(fresh)
        };
        tokio::task::spawn_blocking(work)
            .await
            .map_err(|error| EngineError::io("prepare files", error.into()))?
    }

    /// Removes what a launch may have left: process, TAP, sockets.
    ///
    /// # Errors
    /// The process could not be ended: nothing of it may be removed.
    pub(super) async fn undo_launch(&mut self) -> Result<(), EngineError> {
        if let Some(machine) = self.slot.live.machine() {
            kill(&machine).await?;
        }
        self.run = None;
        self.slot.live.set_machine(None);
        self.slot.live.set_client(None);
        self.detach().await;
        Ok(())
    }

    /// Connects what will be its machine to the network.
    pub(super) async fn attach(&self) -> Result<(), EngineError> {
        let Some(network) = &self.record.network else {
            return Ok(());
        };
        let attachment = Attachment {
            instance_id: self.record.id.clone(),
            tap: network.tap.clone(),
            ip: network.ip,
            mac: network.mac.clone(),
        };
        Ok(self.shared.network().await?.attach(attachment).await?)
    }

    /// Takes the machine off the network and removes its sockets. What fails is found again at the next start.
    pub(super) async fn detach(&mut self) {
        if let Some(network) = &self.record.network
            && let Ok(bridge) = self.shared.network().await
            && let Err(error) = bridge.detach(&network.tap).await
        {
            tracing::warn!(instance = %self.record.id, %error, "TAP not removed");
        }
        if let Err(error) = durable::remove_tree(&self.shared.layout.instance_runtime(&self.record.id)) {
            tracing::warn!(instance = %self.record.id, %error, "runtime directory not removed");
        }
    }
}

/// Ends the VMM process.
///
/// # Errors
/// It does not end, as a process does whose disk never answers.
pub(super) async fn kill(machine: &Arc<dyn Machine>) -> Result<(), EngineError> {
    match tokio::time::timeout(KILL_DEADLINE, machine.kill()).await {
        Ok(killed) => Ok(killed?),
        Err(_) => Err(EngineError::Vmm(VmmError::Unresponsive {
            command: "kill".into(),
            after: KILL_DEADLINE,
        })),
    }
}

/// Translates a record to what a VMM needs.
pub(super) fn machine_spec(
    shared: &Shared,
    record: &InstanceRecord,
    kernel: PathBuf,
    initramfs: PathBuf,
) -> MachineSpec {
    let layout = &shared.layout;
    let limit = record.disk_io_bytes_per_second.map(|rate| IoLimit {
        bytes_per_second: rate,
        burst_bytes_per_second: rate.saturating_mul(IO_BURST),
    });
    MachineSpec {
        id: record.id.clone(),
        runtime_directory: layout.instance_runtime(&record.id),
        cpus: record.vcpus,
        memory_bytes: record.memory_bytes,
        memory: MemoryBacking::Anonymous,
        hotplug_bytes: record.hotplug_bytes,
        kernel,
        initramfs,
        kernel_arguments: Vec::new(),
        disks: vec![
            Disk {
                path: layout.root_disk(&record.image_digest),
                read_only: true,
                limit,
            },
            Disk {
                path: layout.overlay(&record.id, record.disk_generation),
                read_only: false,
                limit,
            },
        ],
        host_devices: Vec::new(),
        nic: record.network.as_ref().map(|network| Nic {
            tap: network.tap.clone(),
            mac: network.mac.clone(),
            download: network.bandwidth_download,
            upload: network.bandwidth_upload,
        }),
        workload_log: layout.logs(&record.id).join("app.log"),
        vmm_log: layout.logs(&record.id).join("vmm.log"),
    }
}

/// What the guest is told. Time and entropy are added when it is sent.
pub(super) fn guest_config(
    shared: &Shared,
    record: &InstanceRecord,
    image: &RuntimeConfig,
    key: AgentKey,
) -> GuestConfig {
    let argv = command_line(image, record.entrypoint.as_deref(), record.command.as_deref());
    let init_mode = if is_init_command(&argv) {
        InitMode::Systemd
    } else {
        InitMode::Exec
    };
    let mut environment: Vec<(String, String)> = image
        .env
        .iter()
        .map(|entry| entry.split_once('=').unwrap_or((entry, "")))
        .filter(|(name, _)| !record.environment.contains_key(*name))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    environment.extend(record.environment.clone());
    let network = record.network.as_ref().map(|network| NetworkConfig {
        address: network.ip,
        prefix_length: shared.options.network.subnet_cidr.prefix_len(),
        gateway: shared.options.network.gateway_address(),
        dns: shared.options.network.dns.clone(),
        mac: Some(network.mac.clone()),
    });
    GuestConfig {
        key,
        instance_id: record.id.clone(),
        hostname: record.name.clone(),
        time_unix_nanos: 0,
        entropy: Vec::new(),
        init_mode,
        program: Program {
            argv,
            environment,
            working_directory: image.working_dir.clone(),
            user: image.user.clone(),
        },
        network,
        volumes: Vec::new(),
        skip_agent: record.skip_guest_agent,
    }
}

/// Entrypoint and command as container engines join them: a new entrypoint makes the image's command void.
fn command_line(
    image: &RuntimeConfig,
    entrypoint: Option<&[String]>,
    command: Option<&[String]>,
) -> Vec<String> {
    let image_command = if entrypoint.is_some() { &[][..] } else { &image.cmd };
    let mut argv = entrypoint.unwrap_or(&image.entrypoint).to_vec();
    argv.extend_from_slice(command.unwrap_or(image_command));
    if argv.is_empty() {
        argv.push("/bin/sh".to_owned());
    }
    argv
}

/// The spec of a machine that was started before: its VMM has read the boot files already.
pub(super) fn adoption_spec(shared: &Shared, record: &InstanceRecord) -> MachineSpec {
    let artifacts = shared.known_artifacts(&record.boot_artifacts);
    let (kernel, initramfs) = artifacts
        .map(|artifacts| (artifacts.kernel, artifacts.initramfs))
        .unwrap_or_default();
    machine_spec(shared, record, kernel, initramfs)
}

/// Ends whatever runs for this instance, recorded or merely found.
pub(super) async fn kill_leftovers(shared: &Shared, record: &InstanceRecord) -> Result<(), EngineError> {
    let vmm = shared.vmm(record.hypervisor)?;
    let mut processes = vmm.find_orphans(&shared.layout.instance_runtime(&record.id))?;
    processes.extend(record.run.as_ref().map(|run| run.process.clone()));
    let spec = adoption_spec(shared, record);
    for process in processes {
        match vmm.adopt(&spec, &process, None).await {
            Ok(machine) => kill(&Arc::from(machine)).await?,
            Err(VmmError::Gone) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn entrypoint_and_command_are_joined_as_container_engines_do() {
        let image = RuntimeConfig {
            entrypoint: words("/entry -x"),
            cmd: words("serve"),
            ..RuntimeConfig::default()
        };
        let join = |entrypoint: Option<&str>, command: Option<&str>| {
            command_line(
                &image,
                entrypoint.map(words).as_deref(),
                command.map(words).as_deref(),
            )
            .join(" ")
        };
        assert_eq!(join(None, None), "/entry -x serve");
        assert_eq!(join(None, Some("help")), "/entry -x help");
        assert_eq!(join(Some("/other"), None), "/other");
        assert_eq!(join(Some("/other"), Some("now")), "/other now");
        assert_eq!(join(Some(""), Some("")), "/bin/sh");
    }
}
