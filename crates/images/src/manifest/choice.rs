//! Which entry of an index is for a platform.

use super::{Descriptor, Index, media_type};
use crate::error::{ImageError, Result};
use crate::platform::Platform;

/// Most platforms listed in an error message.
const MAX_LISTED: usize = 32;

/// The entry for `wanted`. The best rank wins, the first of equals; attestations and other entries without a real
/// platform are passed over. Entries that are indexes themselves and name no platform may be looked into by the caller.
///
/// # Errors
/// [`ImageError::PlatformNotAvailable`] listing what the index has.
pub fn choose<'a>(index: &'a Index, wanted: &Platform) -> Result<&'a Descriptor> {
    let candidates = index.manifests.iter().filter(|entry| is_image(entry));
    let ranked = candidates.clone().enumerate().filter_map(|(position, entry)| {
        let rank = match &entry.platform {
            Some(platform) => wanted.rank(platform)?,
            None => return None,
        };
        Some((rank, position, entry))
    });
    if let Some((_, _, entry)) = ranked.min_by_key(|(rank, position, _)| (*rank, *position)) {
        return Ok(entry);
    }
    // An index around a single image often leaves the platform to the image's config.
    let unnamed: Vec<_> = candidates
        .clone()
        .filter(|entry| entry.platform.is_none())
        .collect();
    if let [only] = unnamed[..] {
        return Ok(only);
    }
    let mut available = Vec::new();
    for platform in candidates.filter_map(|entry| entry.platform.as_ref()) {
        let text: String = platform.to_string().chars().take(64).collect();
        if !available.contains(&text) && available.len() < MAX_LISTED {
            available.push(text);
        }
    }
    Err(ImageError::PlatformNotAvailable {
        wanted: wanted.to_string(),
        available,
    })
}

fn is_image(entry: &Descriptor) -> bool {
    let kind = entry.media_type.as_str();
    let is_attestation = entry.annotations.contains_key("vnd.docker.reference.type");
    let is_unknown = entry
        .platform
        .as_ref()
        .is_some_and(|platform| platform.os == "unknown");
    (media_type::is_manifest(kind) || media_type::is_index(kind)) && !is_attestation && !is_unknown
}
