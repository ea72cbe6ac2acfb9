//! What the operator says about jails.

use std::path::PathBuf;
use std::str::FromStr;

/// Whether VMMs are confined.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// As far as the host allows.
    #[default]
    Auto,
    /// Not at all.
    Off,
    /// Completely, or nothing starts.
    Required,
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            "required" => Ok(Self::Required),
            other => Err(format!("{other:?} is none of auto, off and required")),
        }
    }
}

/// Everything configurable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JailOptions {
    /// Whether VMMs are confined.
    pub mode: Mode,
    /// The first id is that of the group of all jails, each other one is the user of one machine.
    pub first_id: u32,
    /// How many ids there are.
    pub ids: u32,
    /// What a VMM may use beyond its guest's memory.
    pub memory_overhead: u64,
    /// Processes and threads of a VMM.
    pub processes: u64,
    /// Open descriptors of a VMM.
    pub descriptors: u64,
    /// Where locks of user ids lie: one directory a host, whatever servers it has.
    pub state: PathBuf,
}

impl Default for JailOptions {
    fn default() -> Self {
        Self {
            mode: Mode::default(),
            first_id: 200_000,
            ids: 65_536,
            memory_overhead: 2 << 30,
            processes: 1024,
            descriptors: 4096,
            state: PathBuf::from("/run/hypeman-jail"),
        }
    }
}

/// `FIRST-LAST`, as the configuration names a range.
///
/// # Errors
/// It is none, holds fewer than two ids, or the superuser's.
pub(crate) fn parse_ids(text: &str) -> Result<(u32, u32), String> {
    let wrong = || format!("{text:?} is no range of ids: write FIRST-LAST, such as 200000-265535");
    let (first, last) = text.split_once('-').ok_or_else(wrong)?;
    let number = |text: &str| text.trim().parse::<u32>().map_err(|_| wrong());
    let (first, last) = (number(first)?, number(last)?);
    // The last number stands for "no id" in system calls.
    if first == 0 || last <= first || last == u32::MAX {
        return Err(wrong());
    }
    Ok((first, last - first + 1))
}

impl JailOptions {
    /// Takes a range of ids, `FIRST-LAST`.
    ///
    /// # Errors
    /// It is none.
    pub fn set_ids(&mut self, text: &str) -> Result<(), String> {
        (self.first_id, self.ids) = parse_ids(text)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_modes_are_read() {
        assert_eq!(parse_ids("200000-265535"), Ok((200_000, 65_536)));
        for wrong in ["", "5", "0-10", "10-10", "10-9", "a-b", "1-4294967295"] {
            assert!(parse_ids(wrong).is_err(), "{wrong}");
        }
        assert_eq!("required".parse(), Ok(Mode::Required));
        assert!("on".parse::<Mode>().is_err());
    }
}
