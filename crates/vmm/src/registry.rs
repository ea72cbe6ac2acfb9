//! All five kinds of the contract, and what each can do here.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use crate::cloud_hypervisor::CloudHypervisor;
use crate::firecracker::Firecracker;
use crate::gate::KvmGate;
use crate::qemu::{Board, Qemu, QemuHost};
use crate::{Accelerator, Capabilities, Jail, JailOptions, Vmm, VmmKind};

/// Where to look and what to prefer. [`Default`] looks in `$PATH` and lets an experiment choose.
#[derive(Debug, Clone, Default)]
pub struct VmmOptions {
    /// The QEMU binary, instead of a search.
    pub qemu_binary: Option<PathBuf>,
    /// The Cloud Hypervisor binary for new machines, instead of a search.
    pub cloud_hypervisor_binary: Option<PathBuf>,
    /// The Firecracker binary for new machines, instead of a search.
    pub firecracker_binary: Option<PathBuf>,
    /// Holds further versions, as `PROGRAM/VERSION/PROGRAM`, for memory that they have captured.
    pub versions_directory: Option<PathBuf>,
    /// Take KVM for good without the experiment. For hosts whose KVM runs only kernels that were made for it.
    pub trust_kvm: bool,
    /// The accelerator, instead of the experiment's choice.
    pub accelerator: Option<Accelerator>,
    /// Directories to search for binaries; empty: those of `$PATH` and the system's own.
    pub search_path: Vec<PathBuf>,
    /// Directory that keeps the result of slow experiments over restarts.
    pub cache_directory: Option<PathBuf>,
    /// How VMMs are confined.
    pub jail: JailOptions,
}

/// The VMMs of this host.
#[derive(Debug, Clone)]
pub struct Vmms {
    drivers: BTreeMap<VmmKind, Arc<dyn Vmm>>,
    qemu: Arc<QemuHost>,
    jail: Arc<Jail>,
}

impl Vmms {
    /// Sets up the drivers. Does not start anything: probing happens when first asked.
    pub fn detect(options: VmmOptions) -> Self {
        let mut search_path = options.search_path.clone();
        if search_path.is_empty() {
            search_path = std::env::var_os("PATH")
                .iter()
                .flat_map(std::env::split_paths)
                .collect();
            search_path.extend(["/usr/local/bin", "/usr/bin", "/usr/libexec"].map(PathBuf::from));
        }
        let host = Arc::new(QemuHost::new(
            options.qemu_binary.clone(),
            search_path.clone(),
            options.accelerator,
            options.cache_directory.clone(),
        ));
        let jail = Arc::new(Jail::new(options.jail.clone()));
        let kvm = KvmGate::new(Arc::clone(&host), options.trust_kvm);
        let drivers: [Arc<dyn Vmm>; 4] = [
            Arc::new(CloudHypervisor::new(
                &options,
                search_path.clone(),
                kvm.clone(),
                Arc::clone(&jail),
            )),
            Arc::new(Firecracker::new(&options, search_path, kvm, Arc::clone(&jail))),
            Arc::new(Qemu::new(Board::Q35, Arc::clone(&host), Arc::clone(&jail))),
            Arc::new(Qemu::new(Board::Microvm, Arc::clone(&host), Arc::clone(&jail))),
        ];
        let drivers = drivers
            .into_iter()
            .map(|driver| (driver.kind(), driver))
            .collect();
        Self {
            drivers,
            qemu: host,
            jail,
        }
    }

    /// What confines VMMs here.
    pub fn jail(&self) -> &Arc<Jail> {
        &self.jail
    }

    /// The driver of a kind, also when its VMM is not available at the moment. `None`: there is no driver.
    pub fn get(&self, kind: VmmKind) -> Option<Arc<dyn Vmm>> {
        self.drivers.get(&kind).map(Arc::clone)
    }

    /// All kinds with what they can do now, in the order of the contract.
    pub async fn list(&self) -> Vec<(VmmKind, Capabilities)> {
        let mut list = Vec::with_capacity(VmmKind::ALL.len());
        for kind in VmmKind::ALL {
            let capabilities = match self.drivers.get(&kind) {
                Some(driver) => driver.capabilities().await,
                None => Capabilities::Unavailable {
                    reason: Self::reason(kind),
                },
            };
            list.push((kind, capabilities));
        }
        list
    }

    /// Why QEMU runs without KVM here, in words for an operator. `None`: KVM is used, or the accelerator was
    /// chosen by the configuration, or there is no QEMU (see [`Vmms::list`]).
    pub async fn reason_against_kvm(&self) -> Option<String> {
        self.qemu.facts(Board::Q35).await.ok()?.without_kvm.clone()
    }

    /// Why there is no driver.
    fn reason(kind: VmmKind) -> String {
        match kind {
            VmmKind::Vz if cfg!(target_os = "macos") => {
                "Apple's Virtualization framework is not driven by this version yet".to_owned()
            }
            VmmKind::Vz => "Apple's Virtualization framework exists on macOS only".to_owned(),
            _ => "there is no driver for it".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_kinds_are_listed_with_a_reason_where_they_cannot_run() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("firecracker"), "").unwrap();
        let search_path = vec![directory.path().to_owned()];
        let vmms = Vmms::detect(VmmOptions {
            search_path,
            ..VmmOptions::default()
        });
        let list = vmms.list().await;
        assert_eq!(
            list.iter().map(|(kind, _)| *kind).collect::<Vec<_>>(),
            VmmKind::ALL
        );
        let reason = |wanted| {
            list.iter()
                .find_map(|(kind, capabilities)| match capabilities {
                    Capabilities::Unavailable { reason } if *kind == wanted => Some(reason.as_str()),
                    _ => None,
                })
                .unwrap()
        };
        assert!(reason(VmmKind::Qemu).contains("install the package"));
        assert!(reason(VmmKind::QemuMicrovm).contains("install the package"));
        assert!(reason(VmmKind::Firecracker).contains("cannot be used"));
        assert!(reason(VmmKind::CloudHypervisor).contains("not installed"));
        assert!(reason(VmmKind::Vz).contains("macOS"));
        assert!(vmms.get(VmmKind::Qemu).is_some() && vmms.get(VmmKind::Vz).is_none());
    }
}
