//! Who may do what: bearer tokens signed with HS256, and the scopes in them.
//!
//! ```text
//!  Authorization header ─► format ─► signature, algorithm, expiry ─► kind of token ─► scope of the route
//!        401 required      401          401 "invalid token"            401 type          403
//! ```
//!
//! Invariants:
//! - The algorithm is pinned: a token cannot choose how it is verified.
//! - Without a secret every token is invalid; nothing is ever open by accident.
//! - Registry tokens never open the API; user tokens open the registry within their image scopes.

mod grant;
mod hs256;
mod mint;
mod scope;
mod token;

pub use grant::{Identity, Permissions, RegistryAccess, RegistryGrant};
pub use mint::{MintError, mint};
pub use scope::{ALL, Scope, UnknownScope, parse_list};
pub use token::{TokenError, Verifier};
