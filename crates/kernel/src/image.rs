//! From a kernel as distributions ship it to one that a VMM starts directly.

use std::path::Path;

use crate::KernelError;
use crate::decompress::decompress;
use crate::elf::Elf;

/// No kernel is larger when expanded.
const LIMIT: usize = 512 * 1024 * 1024;
const BANNER: &[u8] = b"Linux version ";
const RELEASE_LIMIT: usize = 128;

/// The uncompressed ELF image in `bytes`, which are a vmlinux, packed or not, or an x86 bzImage.
pub(crate) fn bootable(path: &Path, bytes: &[u8]) -> Result<Vec<u8>, KernelError> {
    let packed = payload(bytes).unwrap_or(bytes);
    let image = decompress(packed, LIMIT).map_err(|error| KernelError::unusable(path, error.to_string()))?;
    let elf =
        Elf::parse(&image).ok_or_else(|| KernelError::unusable(path, "it holds no 64-bit x86 kernel"))?;
    if !elf.has_pvh_entry() {
        return Err(KernelError::unusable(
            path,
            "it has no PVH entry (CONFIG_PVH=y is needed)",
        ));
    }
    Ok(image)
}

/// The release that the kernel calls itself, as `6.1.0-56-cloud-amd64`.
pub(crate) fn release(image: &[u8]) -> Option<String> {
    let mut rest = image;
    while let Some(at) = find(rest, BANNER) {
        rest = &rest[at + BANNER.len()..];
        let word: Vec<u8> = rest
            .iter()
            .take(RELEASE_LIMIT)
            .take_while(|byte| byte.is_ascii_graphic())
            .copied()
            .collect();
        // The banner also occurs as a format, without numbers.
        if word.first().is_some_and(u8::is_ascii_digit) {
            return String::from_utf8(word).ok();
        }
    }
    None
}

/// The first driver that every guest needs and that this image does not carry itself. Drivers name themselves in
/// messages, so one whose name is nowhere in the image is not built in.
pub(crate) fn lacks(image: &[u8]) -> Option<&'static str> {
    crate::modules::REQUIRED
        .into_iter()
        .find(|name| find(image, name.as_bytes()).is_none())
}

/// The packed kernel inside a bzImage (boot protocol 2.08 or later).
fn payload(bytes: &[u8]) -> Option<&[u8]> {
    if bytes.get(0x202..0x206)? != b"HdrS" || half(bytes, 0x206)? < 0x0208 {
        return None;
    }
    let setup_sectors = match *bytes.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (setup_sectors + 1) * 512 + word(bytes, 0x248)?;
    bytes.get(start..start.checked_add(word(bytes, 0x24c)?)?)
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn word(bytes: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?)).ok()
}

fn find(text: &[u8], wanted: &[u8]) -> Option<usize> {
    let first = *wanted.first()?;
    let mut from = 0;
    loop {
        let at = from + text.get(from..)?.iter().position(|byte| *byte == first)?;
        if text[at..].starts_with(wanted) {
            return Some(at);
        }
        from = at + 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_release_is_read_past_a_banner_without_numbers() {
        let image = b"..Linux version %s (%s)\0....Linux version 6.1.0-56-cloud-amd64 (debian) #1";
        assert_eq!(release(image).as_deref(), Some("6.1.0-56-cloud-amd64"));
        assert_eq!(release(b"Linux version "), None);
    }

    #[test]
    fn what_is_no_kernel_is_refused_with_its_path() {
        let mut cut = vec![0; 0x300];
        cut[0x202..0x206].copy_from_slice(b"HdrS");
        cut[0x206] = 0x0f;
        cut[0x207] = 2;
        cut[0x24f] = 0xff;
        for bytes in [&b""[..], b"#!/bin/sh\n", b"\x7fELF\x01\x01", &cut] {
            let error = bootable(Path::new("/boot/thing"), bytes).unwrap_err().to_string();
            assert!(error.contains("/boot/thing"), "{error}");
        }
    }
}
