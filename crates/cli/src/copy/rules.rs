//! Where a copy lands: the rules of `docker cp`, as one pure function.

/// What is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A file or a link.
    File,
    /// A directory.
    Directory,
    /// The content of a directory (its path was written with `/.`).
    Contents,
}

/// What stands at the destination now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destination {
    /// Nothing.
    Absent,
    /// Something that is not a directory.
    File,
    /// A directory.
    Directory,
}

/// Where the source goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Landing {
    /// To the destination's own path: it is created, or the file there is replaced.
    Itself,
    /// Into the destination under the source's name.
    Below,
    /// The entries of the source go into the destination, which exists.
    Merged,
}

/// Why a copy cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A file was to go to `absent/`.
    #[error("the destination directory does not exist")]
    NoSuchDirectory,
    /// A directory was to replace a file.
    #[error("a directory cannot be copied onto a file")]
    DirectoryOntoFile,
    /// The destination was written as a directory and is not one.
    #[error("the destination is not a directory")]
    NotDirectory,
}

/// Decides where `source` lands. `as_directory` tells that the destination was written with a slash at its end.
///
/// # Errors
/// When `docker cp` would refuse too.
pub fn landing(source: Source, destination: Destination, as_directory: bool) -> Result<Landing, Refusal> {
    match (source, destination) {
        (Source::File, Destination::Absent) if as_directory => Err(Refusal::NoSuchDirectory),
        (_, Destination::Absent) => Ok(Landing::Itself),
        (Source::File, Destination::File) if as_directory => Err(Refusal::NotDirectory),
        (Source::File, Destination::File) => Ok(Landing::Itself),
        (Source::Directory | Source::Contents, Destination::File) => Err(Refusal::DirectoryOntoFile),
        (Source::Contents, Destination::Directory) => Ok(Landing::Merged),
        (Source::File | Source::Directory, Destination::Directory) => Ok(Landing::Below),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_docker_cp() {
        use Destination as D;
        use Landing as L;
        use Refusal as R;
        use Source as S;
        let table = [
            (S::File, D::Absent, false, Ok(L::Itself)),
            (S::File, D::Absent, true, Err(R::NoSuchDirectory)),
            (S::File, D::File, false, Ok(L::Itself)),
            (S::File, D::File, true, Err(R::NotDirectory)),
            (S::File, D::Directory, false, Ok(L::Below)),
            (S::File, D::Directory, true, Ok(L::Below)),
            (S::Directory, D::Absent, false, Ok(L::Itself)),
            (S::Directory, D::Absent, true, Ok(L::Itself)),
            (S::Directory, D::File, false, Err(R::DirectoryOntoFile)),
            (S::Directory, D::Directory, false, Ok(L::Below)),
            (S::Contents, D::Absent, false, Ok(L::Itself)),
            (S::Contents, D::File, false, Err(R::DirectoryOntoFile)),
            (S::Contents, D::Directory, true, Ok(L::Merged)),
        ];
        for (source, destination, as_directory, expected) in table {
            assert_eq!(
                landing(source, destination, as_directory),
                expected,
                "{source:?} to {destination:?}"
            );
        }
    }
}
