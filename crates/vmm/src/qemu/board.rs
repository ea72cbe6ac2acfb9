//! The two boards: where each device sits, and how many fit.
//!
//! ```text
//! q35      pcie.0   02 serial  03 rng  04 balloon  05 nic  06… disks (ascending: first is /dev/vda)
//! microvm  mmio     1  serial  2  rng  3  balloon  4  nic  23… disks (descending: the kernel meets the
//!                                                          highest transport first, so first is /dev/vda).
//!                   0 stays empty: its interrupt never arrives in the guest
//! ```
//!
//! Invariant: addresses never depend on which optional devices a machine has. A captured machine can only be
//! restored behind the same addresses.

use serde_json::{Value, json};

use crate::VmmKind;

/// A board of QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Board {
    /// A PC with PCI Express.
    Q35,
    /// No PCI: devices are memory mapped and described by ACPI.
    Microvm,
}

/// What sits at a place of its own on each board.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Slot {
    Serial,
    Random,
    Balloon,
    Nic,
    Disk(usize),
}

const Q35_FIRST_DISK: usize = 6;
/// Slot 31 belongs to the board itself.
const Q35_LAST_DISK: usize = 30;
const MICROVM_LAST_TRANSPORT: usize = 23;
const MICROVM_FIRST_DISK: usize = 5;

impl Board {
    pub(crate) fn kind(self) -> VmmKind {
        match self {
            Self::Q35 => VmmKind::Qemu,
            Self::Microvm => VmmKind::QemuMicrovm,
        }
    }

    pub(crate) fn max_disks(self) -> usize {
        match self {
            Self::Q35 => Q35_LAST_DISK + 1 - Q35_FIRST_DISK,
            Self::Microvm => MICROVM_LAST_TRANSPORT + 1 - MICROVM_FIRST_DISK,
        }
    }

    /// The value of `-machine` without its memory. `q35_name` is the versioned name, so that a machine
    /// stays the same machine when QEMU is upgraded.
    pub(crate) fn machine(self, q35_name: &str) -> String {
        match self {
            Self::Q35 => format!(
                "{q35_name},sata=off,smbus=off,i8042=off,vmport=off,usb=off,graphics=off,dump-guest-core=off"
            ),
            // The clock and the serial port look dispensable and are not: without them a boot takes two
            // seconds longer. ACPI is what describes the devices to a distribution's kernel and ends the
            // machine on power-off.
            Self::Microvm => {
                "microvm,acpi=on,ioapic2=on,pcie=off,rtc=on,isa-serial=on,usb=off,graphics=off,dump-guest-core=off"
                    .to_owned()
            }
        }
    }

    /// A virtio device of this board in its place.
    pub(crate) fn device(self, family: &str, id: &str, slot: Slot) -> Value {
        match self {
            Self::Q35 => json!({
                "driver": format!("virtio-{family}-pci"),
                "id": id,
                "bus": "pcie.0",
                "addr": format!("{:02x}.0", self.place(slot)),
                "disable-legacy": "on",
            }),
            Self::Microvm => json!({
                "driver": format!("virtio-{family}-device"),
                "id": id,
                "bus": format!("virtio-mmio-bus.{}", self.place(slot)),
            }),
        }
    }

    fn place(self, slot: Slot) -> usize {
        match (self, slot) {
            (Self::Q35, Slot::Serial) => 2,
            (Self::Q35, Slot::Random) => 3,
            (Self::Q35, Slot::Balloon) => 4,
            (Self::Q35, Slot::Nic) => 5,
            (Self::Q35, Slot::Disk(index)) => Q35_FIRST_DISK + index,
            (Self::Microvm, Slot::Serial) => 1,
            (Self::Microvm, Slot::Random) => 2,
            (Self::Microvm, Slot::Balloon) => 3,
            (Self::Microvm, Slot::Nic) => 4,
            (Self::Microvm, Slot::Disk(index)) => MICROVM_LAST_TRANSPORT.saturating_sub(index),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_device_has_a_place_of_its_own() {
        for board in [Board::Q35, Board::Microvm] {
            let fixed = [Slot::Serial, Slot::Random, Slot::Balloon, Slot::Nic];
            let disks = (0..board.max_disks()).map(Slot::Disk);
            let mut places: Vec<usize> = fixed
                .into_iter()
                .chain(disks)
                .map(|slot| board.place(slot))
                .collect();
            let count = places.len();
            places.sort_unstable();
            places.dedup();
            assert_eq!(places.len(), count, "{board:?}");
        }
    }
}
