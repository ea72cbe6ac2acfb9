//! A strict reader of tar streams: ustar, GNU, star and PAX.
//!
//! Where readers in the field disagree about what an archive says, an attacker can show one file to a scanner and
//! another to us. So this reader takes the common reading and refuses the rest: two extended headers for one
//! entry, two different long names for it, structure in global headers, anything after the end.
//!
//! ```text
//!            ┌── L, K, x: name and attributes of the next entry ──┐
//!   header ──┼── g: attributes of all later entries ──────────────┼──► header ...
//!      ▲     └── file, link, directory, ... ──► data, padding ────┘
//!      └───────────────────────────────────────────────┘
//!   zero block, zero block, zeros to the end of the stream
//! ```

mod entry;
mod header;
mod pax;
mod reader;
mod sparse;

pub(crate) use entry::{Entry, Kind, Piece, TarError};
pub(crate) use reader::TarReader;
