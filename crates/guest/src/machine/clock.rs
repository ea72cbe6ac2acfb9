//! Wall clock and entropy, both from the host.
#![allow(unsafe_code)]

use std::{fs::File, io, os::fd::AsRawFd};

use rustix::time::{ClockId, Timespec, clock_settime};

/// Sets the wall clock.
pub(super) fn set(time_unix_nanos: i128) -> io::Result<()> {
    let seconds = i64::try_from(time_unix_nanos.div_euclid(1_000_000_000))
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let nanos = time_unix_nanos.rem_euclid(1_000_000_000) as i64;
    Ok(clock_settime(
        ClockId::Realtime,
        Timespec {
            tv_sec: seconds,
            tv_nsec: nanos,
        },
    )?)
}

/// `_IOW('R', 3, int[2])` and `_IO('R', 7)` of the kernel.
const ADD_ENTROPY: u32 = 0x4008_5203;
const RESEED: u32 = 0x5207;

#[repr(C)]
struct PoolInfo {
    entropy_bits: i32,
    buffer_bytes: i32,
    buffer: [u8; 512],
}

/// Gives bytes to the kernel's pool and credits them.
pub(super) fn credit_entropy(bytes: &[u8]) -> io::Result<()> {
    let device = File::options().write(true).open("/dev/urandom")?;
    for chunk in bytes.chunks(512) {
        let mut info = PoolInfo {
            entropy_bits: chunk.len() as i32 * 8,
            buffer_bytes: chunk.len() as i32,
            buffer: [0; 512],
        };
        info.buffer[..chunk.len()].copy_from_slice(chunk);
        // SAFETY: the kernel reads the two integers and as many bytes as the second one says, which the
        // structure holds.
        if unsafe { libc::ioctl(device.as_raw_fd(), ADD_ENTROPY as _, &raw const info) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Has the kernel's generator take new keys from the pool at once, on all processors. Refused by kernels that have
/// not seeded yet; those do so when they are given the first bytes.
pub(super) fn reseed() -> io::Result<()> {
    let device = File::options().write(true).open("/dev/urandom")?;
    // SAFETY: takes no argument.
    match unsafe { libc::ioctl(device.as_raw_fd(), RESEED as _) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
