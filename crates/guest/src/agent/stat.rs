//! Describes a path.

use std::{fs, io, os::unix::fs::PermissionsExt};

use hypeman_guest_api::{PathInfo, RefusalCode, Reply};

use super::refuse;

pub(super) async fn describe(path: String, follow_links: bool) -> Reply {
    if !path.starts_with('/') {
        return Reply::Refused(refuse(RefusalCode::Invalid, "the path must be absolute"));
    }
    match tokio::task::spawn_blocking(move || look(&path, follow_links)).await {
        Ok(info) => Reply::Path(info),
        Err(error) => Reply::Refused(refuse(RefusalCode::Failed, error.to_string())),
    }
}

fn look(path: &str, follow_links: bool) -> PathInfo {
    let metadata = if follow_links {
        fs::metadata(path)
    } else {
        fs::symlink_metadata(path)
    };
    let metadata = match metadata {
        Ok(metadata) => metadata,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return PathInfo::default();
        }
        Err(error) => {
            return PathInfo {
                error: Some(error.to_string()),
                ..PathInfo::default()
            };
        }
    };
    let link_target = metadata
        .is_symlink()
        .then(|| fs::read_link(path).ok())
        .flatten()
        .map(|t| t.to_string_lossy().into_owned());
    PathInfo {
        exists: true,
        is_directory: metadata.is_dir(),
        is_file: metadata.is_file(),
        is_symlink: metadata.is_symlink(),
        link_target,
        mode: metadata.permissions().mode() & 0o7777,
        size: metadata.len(),
        error: None,
    }
}
