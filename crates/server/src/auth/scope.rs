//! The scopes that a token can be limited to.

use std::fmt;
use std::str::FromStr;

macro_rules! scopes {
    ($($variant:ident = $name:literal: $doc:literal,)*) => {
        /// A right that a route asks for.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Scope {
            $(#[doc = $doc] $variant,)*
        }

        /// All scopes, in the order in which they are listed to users.
        pub const ALL: &[Scope] = &[$(Scope::$variant,)*];

        impl Scope {
            /// The name in tokens.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// What it allows, for people.
            #[must_use]
            pub fn description(self) -> &'static str {
                match self { $(Self::$variant => $doc,)* }
            }
        }
    };
}

scopes! {
    InstanceRead = "instance:read": "See instances, their logs, files and statistics.",
    InstanceWrite = "instance:write": "Create and change instances, run commands and copy files in them.",
    InstanceDelete = "instance:delete": "Delete instances.",
    ImageRead = "image:read": "See and pull images.",
    ImageWrite = "image:write": "Pull, push and tag images.",
    ImageDelete = "image:delete": "Delete images.",
    VolumeRead = "volume:read": "See volumes.",
    VolumeWrite = "volume:write": "Create, attach and detach volumes.",
    VolumeDelete = "volume:delete": "Delete volumes.",
    SnapshotRead = "snapshot:read": "See snapshots and their schedules.",
    SnapshotWrite = "snapshot:write": "Take, restore, fork, schedule, export and import snapshots.",
    SnapshotDelete = "snapshot:delete": "Delete snapshots and schedules.",
    BuildRead = "build:read": "See builds and builders.",
    BuildWrite = "build:write": "Start builds, create and prune builders.",
    BuildDelete = "build:delete": "Cancel builds, delete builders.",
    DeviceRead = "device:read": "See host devices.",
    DeviceWrite = "device:write": "Register host devices.",
    DeviceDelete = "device:delete": "Forget host devices.",
    IngressRead = "ingress:read": "See ingresses.",
    IngressWrite = "ingress:write": "Create ingresses.",
    IngressDelete = "ingress:delete": "Delete ingresses.",
    ResourceRead = "resource:read": "See health, capabilities and resources of the host.",
    ResourceWrite = "resource:write": "Reclaim memory of instances.",
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A scope that does not exist.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown scope {0:?}; `hypeman token list-scopes` shows all of them")]
pub struct UnknownScope(pub String);

impl FromStr for Scope {
    type Err = UnknownScope;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        ALL.iter()
            .copied()
            .find(|scope| scope.as_str() == text)
            .ok_or_else(|| UnknownScope(text.to_owned()))
    }
}

/// Reads a comma-separated list of scopes as the command line takes it. `*` alone means all: `None`.
///
/// # Errors
/// The first scope that does not exist.
pub fn parse_list(text: &str) -> Result<Option<Vec<Scope>>, UnknownScope> {
    if text.trim() == "*" {
        return Ok(None);
    }
    text.split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .map(str::parse)
        .collect::<Result<_, _>>()
        .map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_23_and_they_read_back() {
        assert_eq!(ALL.len(), 23);
        for scope in ALL {
            assert_eq!(scope.as_str().parse::<Scope>().unwrap(), *scope);
        }
        assert!("instance:*".parse::<Scope>().is_err());
        assert_eq!(parse_list("*").unwrap(), None);
        assert_eq!(
            parse_list("instance:read, image:write").unwrap(),
            Some(vec![Scope::InstanceRead, Scope::ImageWrite])
        );
        assert!(parse_list("instance:read,nope").is_err());
    }
}
