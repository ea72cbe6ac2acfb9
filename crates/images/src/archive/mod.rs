//! Images in files.

/// Placeholder.
#[derive(Debug)]
pub struct Archive;
