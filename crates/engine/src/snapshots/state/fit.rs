//! Whether a captured machine fits the one that is to go on, and what to do where it does not.

use hypeman_vmm::{StateIdentity, VmmKind};
use serde::Serialize;

use super::Facts;

/// The machine that is to go on.
pub(crate) struct Present<'a> {
    pub(crate) hypervisor: VmmKind,
    pub(crate) identities: &'a [StateIdentity],
    pub(crate) boot_artifacts: &'a str,
    pub(crate) memory_bytes: u64,
    pub(crate) vcpus: u32,
    pub(crate) networked: bool,
}

/// Says which part of the captured machine the present one does not have, and what to do. `None` when all fits.
pub(crate) fn mismatch(captured: &Facts, present: &Present<'_>) -> Option<String> {
    if captured.hypervisor != present.hypervisor {
        return Some(format!(
            "it was captured on {}, and memory cannot go on with {}; leave the hypervisor as it is, or use a Stopped \
             snapshot",
            named(&captured.hypervisor),
            named(&present.hypervisor)
        ));
    }
    if let Some(reason) = unlike(&captured.identity, present.identities) {
        return Some(reason);
    }
    if captured.boot_artifacts != present.boot_artifacts {
        return Some(format!(
            "it was captured with the guest kernel {}, the instance has {}; fork it instead, or use a Stopped snapshot",
            short(&captured.boot_artifacts),
            short(present.boot_artifacts)
        ));
    }
    // A VMM may take the state of another shape without a word, and its guest would be lost.
    let shape = |what: &str, former: String, now: String| {
        (former != now).then(|| {
            format!(
                "it was captured with {former}{what}, and would go on with {now}{what}; fork it instead, or use a \
                 Stopped snapshot"
            )
        })
    };
    shape(
        " bytes of memory",
        captured.memory_bytes.to_string(),
        present.memory_bytes.to_string(),
    )
    .or_else(|| shape(" vCPUs", captured.vcpus.to_string(), present.vcpus.to_string()))
    .or_else(|| shape("", network(captured.networked), network(present.networked)))
}

fn network(present: bool) -> String {
    let text = if present { "a network" } else { "no network" };
    text.to_owned()
}

/// Says that a VMM which this host can't start would be needed.
pub(crate) fn without_vmm(needed: VmmKind, reason: &str) -> String {
    format!(
        "it was captured on {}, which this host cannot start: {reason}; or use a Stopped snapshot",
        named(&needed)
    )
}

/// A part of an identity, for people.
struct Trait {
    of: fn(&StateIdentity) -> String,
    /// What it is, before its value.
    what: &'static str,
    /// What to do when it differs, by the hypervisor that captured it.
    advice: fn(VmmKind) -> &'static str,
}

/// What decides whether a device state can be loaded, the most telling first: what differs further down often does so
/// because of what stands above.
const TRAITS: [Trait; 5] = [
    Trait {
        of: |identity| named(&identity.vmm),
        what: "the hypervisor",
        advice: |_| "install that one",
    },
    Trait {
        of: |identity| identity.version.clone(),
        what: "the hypervisor's version",
        advice: version_advice,
    },
    Trait {
        of: |identity| identity.machine.clone(),
        what: "the machine type",
        advice: |_| "install a build of the hypervisor that has it",
    },
    Trait {
        of: |identity| named(&identity.accelerator),
        what: "the accelerator",
        advice: |_| "restore it on a host that runs guests with that one",
    },
    Trait {
        of: |identity| identity.cpu.clone(),
        what: "the processor",
        advice: |_| "restore it on a host with that one",
    },
];

/// How a host comes to another version: of QEMU it has one at a time, of the others as many as are in place.
fn version_advice(vmm: VmmKind) -> &'static str {
    match vmm {
        VmmKind::Qemu | VmmKind::QemuMicrovm => {
            "start the server with a QEMU of that version as hypervisor.qemu_binary_path, because it uses one at a time"
        }
        VmmKind::CloudHypervisor | VmmKind::Firecracker | VmmKind::Vz => {
            "install that version again, beside the one that is there"
        }
    }
}

/// The first part in which a captured identity is unlike all that this host has.
pub(super) fn unlike(captured: &StateIdentity, here: &[StateIdentity]) -> Option<String> {
    let mut alike: Vec<&StateIdentity> = here.iter().collect();
    for Trait { of, what, advice } in TRAITS {
        let wanted = of(captured);
        let mut found: Vec<String> = alike.iter().map(|identity| of(identity)).collect();
        alike.retain(|identity| of(identity) == wanted);
        if alike.is_empty() {
            found.dedup();
            let found = match found.as_slice() {
                [] => "none".to_owned(),
                found => found.join(" and "),
            };
            let advice = advice(captured.vmm);
            return Some(format!(
                "it was captured with {what} {wanted}, this host has {found}; {advice}, or use a Stopped snapshot"
            ));
        }
    }
    None
}

/// A value as the API names it.
fn named(value: &impl Serialize) -> String {
    let text = serde_json::to_value(value).ok();
    text.as_ref()
        .and_then(serde_json::Value::as_str)
        .unwrap_or("?")
        .to_owned()
}

/// The beginning of a digest: enough to tell two apart.
fn short(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}
