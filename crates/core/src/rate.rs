//! Byte rates of disks: a size with an optional `/s` or `ps` behind it, such as `100MB/s` or `500MBps`.

use crate::{InvalidValue, size};

/// Reads a rate in bytes a second.
///
/// # Errors
/// `invalid_disk_io_bps` when it is not a size with an optional `/s` or `ps`.
pub fn parse(text: &str) -> Result<u64, InvalidValue> {
    let trimmed = text.trim_matches(' ');
    let bare = trimmed.strip_suffix("/s").unwrap_or(trimmed);
    let bare = bare.strip_suffix("ps").unwrap_or(bare);
    size::parse(bare).map_err(|error| {
        InvalidValue::new(
            "invalid_disk_io_bps",
            format!("not a rate such as 100MB/s or 500MBps: {}", error.message),
        )
    })
}

/// Writes a rate the way the API echoes it; `None` for 0, which means unlimited and is left out.
#[must_use]
pub fn format(bytes_per_second: u64) -> Option<String> {
    (bytes_per_second != 0).then(|| format!("{}/s", size::format(bytes_per_second)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table() {
        for (text, rate) in [
            ("100MB/s", 100 << 20),
            ("500MBps", 500 << 20),
            ("1GB", 1 << 30),
            ("0", 0),
            ("1024/s", 1024),
            ("1ps/s", 1),
        ] {
            assert_eq!(parse(text), Ok(rate), "{text}");
        }
        for text in [
            "", "/s", "fast", "100Mb/s", "100Mbps", "-1MB/s", "1MB/s/s", "1.5GB/s", "1MB/m",
        ] {
            assert_eq!(parse(text).unwrap_err().code, "invalid_disk_io_bps", "{text}");
        }
        assert_eq!(format(0), None);
        assert_eq!(format(100 << 20).as_deref(), Some("100.0 MB/s"));
    }
}
