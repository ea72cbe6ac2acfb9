//! What a token allows its bearer: the API by scopes, the registry by scopes or by repositories.

use std::collections::BTreeSet;

use super::Scope;

/// What a token allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Permissions {
    /// Everything.
    Full,
    /// These scopes.
    Limited(BTreeSet<String>),
}

impl Permissions {
    /// Whether `scope` is allowed.
    #[must_use]
    pub fn allow(&self, scope: Scope) -> bool {
        match self {
            Self::Full => true,
            Self::Limited(scopes) => scopes.contains(scope.as_str()),
        }
    }
}

/// The user of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Who.
    pub subject: String,
    /// What is allowed.
    pub permissions: Permissions,
}

/// Who uses the registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegistryGrant {
    /// A user, within the image scopes.
    User(Identity),
    /// A build VM, within its repositories.
    Builder {
        /// Repositories that it may use.
        repositories: BTreeSet<String>,
        /// Whether it may push.
        push: bool,
    },
}

/// What a registry request wants to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RegistryAccess {
    /// Read blobs and manifests.
    Pull,
    /// Write them.
    Push,
    /// Delete them.
    Delete,
}

impl RegistryGrant {
    /// Whether `access` to `repository` is allowed. `None` stands for the base route, which every token may see.
    #[must_use]
    pub fn allows(&self, repository: Option<&str>, access: RegistryAccess) -> bool {
        let Some(repository) = repository else { return true };
        match self {
            Self::User(identity) => identity.permissions.allow(match access {
                RegistryAccess::Pull => Scope::ImageRead,
                RegistryAccess::Push => Scope::ImageWrite,
                RegistryAccess::Delete => Scope::ImageDelete,
            }),
            Self::Builder { repositories, push } => {
                repositories.contains(repository) && (access == RegistryAccess::Pull || *push)
            }
        }
    }
}
