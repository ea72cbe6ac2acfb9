//! What of a jail is in force, and why the rest is not.

use serde::{Deserialize, Serialize};

/// One thing that a jail does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Item {
    /// Each process has a user id of its own.
    User,
    /// It is nobody outside a user namespace of its own.
    UserNamespace,
    /// It sees only the files and devices that it needs.
    MountNamespace,
    /// It sees no process but itself.
    PidNamespace,
    /// It sees no network but what it is handed.
    NetworkNamespace,
    /// It shares no memory or queue by name.
    IpcNamespace,
    /// It sees no host name.
    UtsNamespace,
    /// It has no capability, and gains none.
    Capabilities,
    /// No program gives it rights.
    NoNewPrivileges,
    /// It cannot ask the kernel for namespaces, mounts, modules, tracing and the like.
    SystemCalls,
    /// It filters its own system calls as well, in the threads that matter. Known only once it runs; noted by who
    /// started it.
    Seccomp,
    /// Files that it writes have a largest length.
    FileSize,
    /// So has the number of its descriptors.
    Descriptors,
    /// So has the number of its threads.
    Processes,
    /// So has its processor time.
    Cpu,
    /// So has its memory.
    Memory,
    /// So has its disk traffic.
    Io,
}

impl Item {
    /// All of them.
    pub const ALL: [Self; 17] = [
        Self::User,
        Self::UserNamespace,
        Self::MountNamespace,
        Self::PidNamespace,
        Self::NetworkNamespace,
        Self::IpcNamespace,
        Self::UtsNamespace,
        Self::Capabilities,
        Self::NoNewPrivileges,
        Self::SystemCalls,
        Self::Seccomp,
        Self::FileSize,
        Self::Descriptors,
        Self::Processes,
        Self::Cpu,
        Self::Memory,
        Self::Io,
    ];

    /// As people and clients read it.
    pub fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::UserNamespace => "user-namespace",
            Self::MountNamespace => "mount-namespace",
            Self::PidNamespace => "pid-namespace",
            Self::NetworkNamespace => "network-namespace",
            Self::IpcNamespace => "ipc-namespace",
            Self::UtsNamespace => "uts-namespace",
            Self::Capabilities => "capabilities",
            Self::NoNewPrivileges => "no-new-privileges",
            Self::SystemCalls => "system-calls",
            Self::Seccomp => "seccomp",
            Self::FileSize => "file-size",
            Self::Descriptors => "descriptors",
            Self::Processes => "processes",
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Io => "io",
        }
    }
}

/// Which items are in force. What is not listed was not asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The user of the process, where it has its own.
    pub user: Option<u32>,
    /// In force.
    pub active: Vec<Item>,
    /// Not in force, and why.
    pub missing: Vec<(Item, String)>,
}

impl Report {
    /// Notes an item: `None` where it is in force, else the reason.
    pub fn note(&mut self, item: Item, missing: Option<String>) {
        match missing {
            None => self.active.push(item),
            Some(reason) => self.missing.push((item, reason)),
        }
    }

    /// Whether nothing is missing.
    pub fn is_complete(&self) -> bool {
        self.missing.is_empty()
    }

    /// What is missing, each reason once: `cpu, memory (no control groups)`.
    pub fn missing_text(&self) -> String {
        let mut reasons: Vec<(&str, Vec<&str>)> = Vec::new();
        for (item, reason) in &self.missing {
            match reasons.iter_mut().find(|(known, _)| known == reason) {
                Some((_, names)) => names.push(item.name()),
                None => reasons.push((reason, vec![item.name()])),
            }
        }
        let texts = reasons
            .iter()
            .map(|(reason, names)| format!("{}: {reason}", names.join(", ")));
        texts.collect::<Vec<_>>().join("; ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_reasons_are_told_once() {
        let mut report = Report::default();
        report.note(Item::User, None);
        assert!(report.is_complete());
        for item in [Item::Cpu, Item::Memory] {
            report.note(item, Some("version 1".to_owned()));
        }
        report.note(Item::UserNamespace, Some("forbidden".to_owned()));
        assert_eq!(
            report.missing_text(),
            "cpu, memory: version 1; user-namespace: forbidden"
        );
    }

    #[test]
    fn names_are_those_of_the_wire() {
        for item in Item::ALL {
            assert_eq!(
                serde_json::to_string(&item).unwrap(),
                format!("\"{}\"", item.name())
            );
        }
    }
}
