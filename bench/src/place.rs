//! Where a server of a bench keeps its data: on the file system of `$TMPDIR`, and on an XFS whose files share blocks.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::context::need_program;
use crate::error::{BenchError, Result};

/// Size of the file that the XFS is in; it is sparse.
const BYTES: u64 = 24 << 30;

/// A place for data.
#[derive(Debug)]
pub struct Place {
    /// Ends the names of rows; empty for the usual place.
    pub suffix: &'static str,
    mount: Option<Mount>,
}

#[derive(Debug)]
struct Mount {
    point: PathBuf,
    _folder: tempfile::TempDir,
}

impl Place {
    /// Where temporary files usually are.
    pub fn usual() -> Self {
        Self {
            suffix: "",
            mount: None,
        }
    }

    /// A fresh XFS in a file there, unmounted in the end.
    ///
    /// # Errors
    /// [`BenchError::Missing`] without the tool, the right to mount, or XFS in the kernel.
    pub fn sharing() -> Result<Self> {
        need_program("mkfs.xfs")?;
        let fail = |error| BenchError::io("make an XFS", error);
        let folder = tempfile::Builder::new()
            .prefix("bench-xfs-")
            .tempdir()
            .map_err(fail)?;
        let (image, point) = (folder.path().join("image"), folder.path().join("m"));
        std::fs::create_dir(&point).map_err(fail)?;
        let file = std::fs::File::create(&image).map_err(fail)?;
        file.set_len(BYTES).map_err(fail)?;
        run("mkfs.xfs", &["-q", "-m", "reflink=1"], &[&image])?;
        run("mount", &["-o", "loop"], &[&image, &point])?;
        let place = Self {
            suffix: ", XFS",
            mount: Some(Mount {
                point,
                _folder: folder,
            }),
        };
        place.probe()?;
        Ok(place)
    }

    /// The directory to make others in, when it is not the usual one.
    pub fn directory(&self) -> Option<&Path> {
        self.mount.as_ref().map(|mount| mount.point.as_path())
    }

    /// Refuses when files do not share blocks there: the numbers would be of something else.
    fn probe(&self) -> Result<()> {
        let Some(directory) = self.directory() else {
            return Ok(());
        };
        let names = ["a", "b"].map(|name| directory.join(name));
        std::fs::write(&names[0], [1; 4096]).map_err(|error| BenchError::io("write to the XFS", error))?;
        run("cp", &["--reflink=always"], &[&names[0], &names[1]])?;
        for name in names {
            let _ = std::fs::remove_file(name);
        }
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = run("umount", &["-l"], &[&self.point]);
    }
}

fn run(program: &str, options: &[&str], paths: &[&Path]) -> Result<()> {
    let output = Command::new(program)
        .args(options)
        .args(paths)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| BenchError::io(format!("run {program}"), error))?;
    if output.status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(BenchError::Missing(format!("{program}: {complaint}")))
}
