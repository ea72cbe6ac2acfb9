//! Root disks are what they were when they were made: each has a seal in its content.
//!
//! A guest that was captured has parts of its root disk in its memory, and goes on only above the same bytes.

use std::sync::atomic::AtomicBool;

use super::catalog::Catalog;
use crate::EngineError;
use crate::instances::disks::{self, Thoroughness};

impl Catalog {
    /// What the root disk of an image held when it was made, hex; `None` when nobody wrote it down.
    pub(crate) fn recorded_seal(&self, image: &str) -> Option<String> {
        let state = self.state();
        state.contents.get(image).and_then(|content| content.seal.clone())
    }

    /// Refuses a root disk that is not what was made of its image; `false` when nobody wrote down what that was. Reads,
    /// so it blocks.
    pub(crate) fn check_root_disk(
        &self,
        image: &str,
        thoroughness: Thoroughness,
        cancel: &AtomicBool,
    ) -> Result<bool, EngineError> {
        let Some(seal) = self.recorded_seal(image) else {
            return Ok(false);
        };
        match disks::check(&self.layout.root_disk(image), &seal, thoroughness, cancel) {
            Ok(()) => Ok(true),
            Err(EngineError::Damaged(_)) => {
                Err(EngineError::damaged(&format!("the root disk of image {image}")))
            }
            Err(error) => Err(error),
        }
    }
}
