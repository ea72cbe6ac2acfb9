//! Whether hypervisors that cannot do without KVM may use it on this host.

use std::sync::Arc;

use crate::VmmError;
use crate::probe::kvm_opens;
use crate::qemu::QemuHost;

/// The judgement on KVM that all drivers share.
#[derive(Debug, Clone)]
pub(crate) struct KvmGate {
    qemu: Arc<QemuHost>,
    trusted: bool,
}

impl KvmGate {
    pub(crate) fn new(qemu: Arc<QemuHost>, trusted: bool) -> Self {
        Self { qemu, trusted }
    }

    /// # Errors
    /// [`VmmError::Unavailable`] with the reason and the fix.
    pub(crate) async fn check(&self) -> Result<(), VmmError> {
        let refusal = match self.trusted {
            true => kvm_opens().err(),
            false => self.qemu.refusal_of_kvm().await.map(|reason| {
                format!(
                    "it needs KVM, and {reason} (hypervisor.trust_kvm takes it for good without this experiment)"
                )
            }),
        };
        refusal.map_or(Ok(()), |reason| Err(VmmError::Unavailable(reason)))
    }
}
