//! Guests whose memory is captured: how they are made, filled, kept and looked at.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::context::Context;
use crate::error::{BenchError, Result};
use crate::http::Connection;
use crate::process;
use crate::remote;
use crate::server::{Server, call, create_running, delete, small_instance};

/// Bytes of a mebibyte.
pub const MEBIBYTE: u64 = 1 << 20;
/// Places with programs and texts of this host.
const CONTENT: [&str; 5] = [
    "/usr/bin",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib",
    "/usr/share/perl5",
    "/usr/include",
];

/// A guest to be captured.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Its name in tables.
    pub name: &'static str,
    /// Its memory in MiB.
    pub memory: u64,
    /// Of these, filled with content.
    pub filled: u64,
}

/// The guests that the goals speak of. A small one has no room for 200 MB beside its kernel.
pub const SHAPES: [Shape; 4] = [
    Shape {
        name: "256 MiB idle",
        memory: 256,
        filled: 0,
    },
    Shape {
        name: "256 MiB, 140 filled",
        memory: 256,
        filled: 140,
    },
    Shape {
        name: "1 GiB idle",
        memory: 1024,
        filled: 0,
    },
    Shape {
        name: "1 GiB, 200 filled",
        memory: 1024,
        filled: 200,
    },
];

/// The guests that this run is about.
///
/// # Errors
/// [`BenchError::Missing`] when none is.
pub fn chosen(context: &Context) -> Result<Vec<Shape>> {
    let (words, mut shapes) = (&context.guests, SHAPES.to_vec());
    shapes.retain(|shape| words.is_empty() || words.iter().any(|word| shape.name.contains(word.as_str())));
    match shapes.is_empty() {
        false => Ok(shapes),
        true => Err(BenchError::Missing(format!(
            "no guest is named {}; there are: {}",
            words.join(", "),
            SHAPES.map(|shape| shape.name).join("; ")
        ))),
    }
}

/// The most that fills any of these guests, in MiB.
pub fn most_filled(shapes: &[Shape]) -> u64 {
    shapes.iter().map(|shape| shape.filled).max().unwrap_or(0)
}

/// Removes what a bench that failed has left, or it would be in the way of the next.
///
/// # Errors
/// The server refuses.
pub fn remove_all(server: &Server) -> Result<()> {
    // The connection of the failed one may have half an answer in it.
    let mut api = server.connect()?;
    let left = call(&mut api, "GET", "/instances", None, 200)?;
    let ids = left.as_array().into_iter().flatten();
    for id in ids.filter_map(|instance| instance["id"].as_str()) {
        delete(&mut api, id)?;
    }
    Ok(())
}

/// Content of programs and texts, the same at each call.
#[derive(Debug)]
pub struct Content(Vec<u8>);

impl Content {
    /// Reads `mebibytes` of it from this host.
    ///
    /// # Errors
    /// There is not as much here.
    pub fn read(mebibytes: u64) -> Result<Self> {
        let wanted = (mebibytes * MEBIBYTE) as usize;
        let mut bytes = Vec::with_capacity(wanted + (4 << 20));
        for folder in CONTENT {
            let mut files: Vec<_> = fs::read_dir(folder)
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| entry.path())
                .filter(|path| path.is_file() && !path.is_symlink())
                .collect();
            files.sort();
            for file in files {
                let content = fs::read(file).unwrap_or_default();
                bytes.extend_from_slice(&content[..content.len().min(4 << 20)]);
                if bytes.len() >= wanted {
                    bytes.truncate(wanted);
                    return Ok(Self(bytes));
                }
            }
        }
        Err(BenchError::Missing(format!(
            "this host has only {} MiB of programs to fill guests with",
            bytes.len() >> 20
        )))
    }

    /// A part of it.
    pub fn part(&self, from: u64, length: u64) -> &[u8] {
        let at = |bytes: u64| (bytes as usize).min(self.0.len());
        &self.0[at(from)..at(from + length)]
    }
}

/// Boots a guest and fills its memory; returns its id.
///
/// # Errors
/// It is refused, or has no room for the content.
pub fn boot(
    server: &Server,
    api: &mut Connection,
    image: &str,
    name: &str,
    shape: Shape,
    content: &Content,
) -> Result<String> {
    let mut body = small_instance(name, image, server.hypervisor());
    body["size"] = json!(format!("{}MB", shape.memory));
    let id = create_running(api, &body)?;
    remote::run(server, &id, &["/bin/busybox", "true"], &[])?;
    if shape.filled > 0 {
        let script = "/bin/busybox mount -t tmpfs -o size=95% tmpfs /tmp && cat >/tmp/content";
        remote::run(
            server,
            &id,
            &["/bin/sh", "-c", script],
            content.part(0, shape.filled * MEBIBYTE),
        )?;
    }
    Ok(id)
}

/// Changes `bytes` of what fills a guest's memory, from the `at`th on.
///
/// # Errors
/// The guest has no such content.
pub fn change(server: &Server, id: &str, at: u64, bytes: &[u8]) -> Result<()> {
    let script = format!(
        "/bin/busybox dd of=/tmp/content bs=4096 seek={} conv=notrunc 2>/dev/null",
        at / 4096
    );
    remote::run(server, id, &["/bin/sh", "-c", &script], bytes).map(drop)
}

/// Takes a Standby snapshot of an instance; returns its id.
///
/// # Errors
/// It is refused.
pub fn snapshot(api: &mut Connection, id: &str, compression: Option<Value>) -> Result<String> {
    let mut request = json!({ "kind": "Standby" });
    if let Some(compression) = compression {
        request["compression"] = compression;
    }
    let path = format!("/instances/{id}/snapshots");
    let made = call(api, "POST", &path, Some(&request), 201)?;
    Ok(made["id"].as_str().unwrap_or_default().to_owned())
}

/// Puts an instance to standby.
///
/// # Errors
/// It is refused.
pub fn standby(api: &mut Connection, id: &str) -> Result<()> {
    call(
        api,
        "POST",
        &format!("/instances/{id}/standby"),
        Some(&json!({})),
        200,
    )
    .map(drop)
}

/// The VMM of an instance.
///
/// # Errors
/// There is none.
pub fn vmm(server: &Server, id: &str) -> Result<u32> {
    process::started_for(id)
        .into_iter()
        .map(|(process, _)| process)
        .find(|process| *process != server.process())
        .ok_or_else(|| BenchError::Missing(format!("the VMM of {id} was not found")))
}

/// Memory of a VMM's process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Bytes that no other process shares.
    pub private: u64,
    /// Bytes that no file backs, those of the VMM itself included.
    pub anonymous: u64,
    /// Bytes of guest memory that no file backs: of a restored guest, what it changed.
    pub anonymous_guest: u64,
}

/// Looks at the memory of a VMM whose guest has `memory` MiB.
///
/// # Errors
/// It is gone, or no mapping of it is large enough for a guest.
pub fn footprint(process: u32, memory: u64) -> Result<Footprint> {
    let read = |name: &str| {
        fs::read_to_string(format!("/proc/{process}/{name}"))
            .map_err(|error| BenchError::io("read the memory of a process", error))
    };
    let all = read("smaps_rollup")?;
    let guest = anonymous_of(&read("smaps")?, memory * 1024);
    Ok(Footprint {
        private: sum(&all, "Private_"),
        anonymous: sum(&all, "Anonymous:"),
        anonymous_guest: guest
            .ok_or_else(|| BenchError::Answer(format!("process {process} has no memory of a guest")))?,
    })
}

/// Sums the lines that begin with `field`, in bytes.
fn sum(text: &str, field: &str) -> u64 {
    text.lines()
        .filter(|line| line.starts_with(field))
        .map(bytes)
        .sum()
}

fn bytes(line: &str) -> u64 {
    let number = line.split_whitespace().nth(1);
    number.and_then(|number| number.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// `Anonymous` of the mapping with this size, or of the next larger one: the kernel joins neighbours.
fn anonymous_of(smaps: &str, kibibytes: u64) -> Option<u64> {
    let mut size = 0;
    let mut found: Option<(u64, u64)> = None;
    for line in smaps.lines() {
        if line.starts_with("Size:") {
            size = bytes(line);
        } else if line.starts_with("Anonymous:")
            && size >= kibibytes * 1024
            && found.is_none_or(|(smallest, _)| size < smallest)
        {
            found = Some((size, bytes(line)));
        }
    }
    found.map(|(_, anonymous)| anonymous)
}

/// Bytes that the files below a directory take on disk.
pub fn disk_usage(directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(about) if about.is_dir() => disk_usage(&entry.path()),
            Ok(about) => about.blocks() * 512,
            Err(_) => 0,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mapping_of_the_guest_is_found_by_its_size() {
        let smaps = "a-b rw-p\nSize:   4 kB\nAnonymous:  4 kB\nc-d rw-p\nSize: 262144 kB\nRss: 9 kB\nAnonymous: 8 kB\n\
                     e-f ---p\nSize: 1048576 kB\nAnonymous: 0 kB\n";
        assert_eq!(anonymous_of(smaps, 262_144), Some(8192));
        assert_eq!(anonymous_of(smaps, 262_000), Some(8192));
        assert_eq!(anonymous_of(smaps, 2 << 20), None);
        assert_eq!(
            sum(
                "Private_Clean: 4 kB\nPrivate_Dirty: 8 kB\nShared_Clean: 1 kB\n",
                "Private_"
            ),
            12 << 10
        );
    }
}
