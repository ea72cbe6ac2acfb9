//! Which blocks of a file others have as well, as the file system tells (FIEMAP).
//!
//! `unsafe` is for the ioctl, which takes a structure by address: a header, and behind it room for as many extents as
//! the header says. It only reads the file's layout.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

/// Extents that are asked for at once.
const ROOM: usize = 64;
const FIEMAP: Opcode = opcode::read_write::<Header>(b'f', 11);
const LAST: u32 = 1;
const SHARED: u32 = 1 << 13;

#[repr(C)]
struct Header {
    start: u64,
    length: u64,
    flags: u32,
    /// How many extents the kernel wrote.
    mapped: u32,
    /// How many it may write.
    room: u32,
    reserved: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved_wide: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

#[repr(C)]
struct Request {
    header: Header,
    extents: [Extent; ROOM],
}

/// Bytes of a file whose blocks another file has as well: its removal would not give them back. None where the file
/// system does not tell.
///
/// # Errors
/// The file cannot be looked at.
pub fn shared_bytes(file: &File) -> io::Result<u64> {
    let nothing = Extent {
        logical: 0,
        physical: 0,
        length: 0,
        reserved_wide: [0; 2],
        flags: 0,
        reserved: [0; 3],
    };
    let (mut start, mut shared) = (0, 0);
    loop {
        let mut request = Request {
            header: Header {
                start,
                length: u64::MAX - start,
                flags: 0,
                mapped: 0,
                room: ROOM as u32,
                reserved: 0,
            },
            extents: [nothing; ROOM],
        };
        // SAFETY: the structure is the one that this ioctl reads and writes, with the room that its header names.
        let told = unsafe { ioctl(file, Updater::<FIEMAP, Request>::new(&mut request)) };
        match told {
            Ok(()) => {}
            Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL) => return Ok(0),
            Err(error) => return Err(error.into()),
        }
        let found = &request.extents[..ROOM.min(request.header.mapped as usize)];
        for extent in found.iter().filter(|extent| extent.flags & SHARED != 0) {
            shared += extent.length;
        }
        match found.last() {
            Some(last) if last.flags & LAST == 0 => start = last.logical + last.length,
            _ => return Ok(shared),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn what_is_written_once_is_shared_with_nobody_and_a_clone_is() {
        let directory = tempfile::tempdir().unwrap();
        let [path, clone] = ["file", "clone"].map(|name| directory.path().join(name));
        let file = File::create_new(&path).unwrap();
        // More extents than are asked for at once.
        for number in 0..3 * ROOM as u64 {
            file.write_all_at(&[7; 4096], number * 16384).unwrap();
        }
        file.sync_all().unwrap();
        assert_eq!(shared_bytes(&file).unwrap(), 0);
        let cloned = Command::new("cp")
            .arg("--reflink=always")
            .args([&path, &clone])
            .output()
            .unwrap();
        if cloned.status.success() {
            assert_eq!(shared_bytes(&file).unwrap(), 3 * ROOM as u64 * 4096);
        }
    }
}
