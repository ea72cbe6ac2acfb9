//! What a module waits for.

use std::collections::BTreeSet;

/// Buses whose devices say by an alias which driver they need.
const BUSES: [&str; 4] = ["virtio:", "pci:", "acpi", "platform:"];

/// When a guest loads a module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Need {
    /// Nothing that a guest uses builds on it.
    Never,
    /// Whatever devices there are; `late`: once the program runs.
    Always { late: bool },
    /// If there is a device that one of these patterns matches.
    Device { late: bool, aliases: BTreeSet<String> },
}

impl Need {
    /// The need of what both build on.
    pub(crate) fn or(self, other: Need) -> Need {
        match (self, other) {
            (Need::Never, need) | (need, Need::Never) => need,
            (
                Need::Device {
                    late: first,
                    mut aliases,
                },
                Need::Device {
                    late: second,
                    aliases: more,
                },
            ) => {
                aliases.extend(more);
                Need::Device {
                    late: first && second,
                    aliases,
                }
            }
            (first, second) => Need::Always {
                late: first.is_late() && second.is_late(),
            },
        }
    }

    fn is_late(&self) -> bool {
        match self {
            Need::Never => true,
            Need::Always { late } | Need::Device { late, .. } => *late,
        }
    }

    /// The line of the guest's list for the module at `path`: `now` or `late`, the path, and the patterns.
    pub(crate) fn line(&self, path: &str) -> String {
        let mut line = format!("{} {path}", if self.is_late() { "late" } else { "now" });
        if let Need::Device { aliases, .. } = self {
            for alias in aliases {
                line.push(' ');
                line.push_str(alias);
            }
        }
        line.push('\n');
        line
    }
}

/// Whether an alias names devices, and can stand in the list.
pub(crate) fn is_of_a_device(alias: &str) -> bool {
    BUSES.iter().any(|bus| alias.starts_with(bus)) && !alias.contains(|letter: char| letter.is_whitespace())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(late: bool, alias: &str) -> Need {
        Need::Device {
            late,
            aliases: BTreeSet::from([alias.to_owned()]),
        }
    }

    #[test]
    fn what_two_build_on_is_loaded_for_either_and_as_early_as_the_earlier() {
        let both = device(true, "virtio:d5v*").or(device(false, "virtio:d1v*"));
        assert_eq!(
            both.line("/m/virtio.ko"),
            "now /m/virtio.ko virtio:d1v* virtio:d5v*\n"
        );
        assert_eq!(
            device(false, "pci:*")
                .or(Need::Always { late: true })
                .line("/m/a.ko"),
            "now /m/a.ko\n"
        );
        assert_eq!(
            Need::Never.or(device(true, "pci:*")).line("/m/a.ko"),
            "late /m/a.ko pci:*\n"
        );
    }
}
