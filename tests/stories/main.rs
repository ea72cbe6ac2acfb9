//! What users, operators and attackers do, and what must come of it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    clippy::print_stdout
)]

mod access;
mod bad_days;
mod command_line;
mod command_line_snapshots;
mod contract;
mod copy;
mod crash;
mod crash_network;
mod crash_snapshots;
mod crowd;
mod crowd_snapshots;
mod events;
mod exec;
mod exits;
mod full_disk;
mod full_disk_snapshots;
mod hotplug;
mod images;
mod jail;
mod lifecycle;
mod logs;
mod lookup;
mod matrix;
mod network;
mod paging;
mod papers;
mod registry;
mod service;
mod snapshots;
mod snapshots_compression;
mod snapshots_damage;
mod snapshots_identity;
mod snapshots_in_place;
mod snapshots_many;
mod snapshots_schedules;
mod snapshots_sharing;
mod snapshots_travel;
mod versions;
