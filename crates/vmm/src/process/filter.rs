//! A system call filter that keeps a program from making holes in files.
//!
//! An older QEMU opens the file behind a private mapping for writing, and punches holes into that file when the
//! guest's balloon gives memory back. A guest could so destroy the memory image that others are made of. With the
//! filter such a call fails as it does on file systems that know no holes; QEMU bears that, for disks too.
#![allow(unsafe_code)]

use std::io;

const PUNCH_HOLE: u32 = libc::FALLOC_FL_PUNCH_HOLE as u32;
/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
/// The low half of the second argument, the mode.
const MODE: u32 = if cfg!(target_endian = "little") { 24 } else { 28 };

#[cfg(target_arch = "x86_64")]
const NATIVE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const NATIVE: u32 = 0xc000_00b7;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const IF_ANY_BIT: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

const fn instruction(code: u16, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

static PROGRAM: [libc::sock_filter; 8] = [
    instruction(LOAD, ARCHITECTURE, 0, 0),
    instruction(IF_EQUAL, NATIVE, 0, 4),
    instruction(LOAD, NUMBER, 0, 0),
    instruction(IF_EQUAL, libc::SYS_fallocate as u32, 0, 2),
    instruction(LOAD, MODE, 0, 0),
    instruction(IF_ANY_BIT, PUNCH_HOLE, 1, 0),
    instruction(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0),
    instruction(RETURN, libc::SECCOMP_RET_ERRNO | libc::EOPNOTSUPP as u32, 0, 0),
];

/// Forbids holes to this process and all that come of it. Safe to call between fork and exec: system calls only.
pub(super) fn forbid_holes() -> io::Result<()> {
    let program = libc::sock_fprog {
        len: PROGRAM.len() as u16,
        filter: PROGRAM.as_ptr().cast_mut(),
    };
    // SAFETY: plain flags. Without the bit, only root may set a filter.
    let flagged = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    if flagged != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `program` describes a static array of that length, which the kernel only reads.
    let set = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    };
    match set {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
