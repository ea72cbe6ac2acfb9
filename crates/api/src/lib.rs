//! The wire contract: every request, response, enum and stream frame of the HTTP API.
//!
//! Types here say what travels and nothing else: no I/O, no rules that need state. They serialise exactly as
//! the contract asks and carry the constraints that the OpenAPI document is made from, so that document and
//! behaviour cannot drift apart. The server, the CLI and the tests share them.

pub mod copy;
pub mod error;
pub mod event;
pub mod exec;
pub mod image;
pub mod instance;
pub mod pager;
pub mod policy;
pub mod query;
pub mod registry;
pub mod resources;
pub mod service;
pub mod snapshot;
pub mod tags;

pub use error::{ErrorBody, ErrorDetail};
pub use image::{CreateImageRequest, Image, ImageStatus, RegistryCredentials, TagImageRequest};
pub use instance::{
    CreateInstanceRequest, Instance, InstanceState, InstanceStats, PathInfo, StartInstanceRequest,
    UpdateInstanceRequest, WaitResponse,
};
pub use service::{Capabilities, Health};
pub use snapshot::{Snapshot, SnapshotKind, SnapshotSchedule};

/// Version of the contract: `info.version` of the OpenAPI document and `server.api_version` of `/capabilities`.
pub const API_VERSION: &str = "0.3.0";
