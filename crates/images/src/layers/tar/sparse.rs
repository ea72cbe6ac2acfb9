//! Sparse files: where in the file the stored bytes belong.

use super::super::error::EntryProblem;

/// A range of the file that is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// Checks that parts are in order, apart, within the file, and together as long as the stored data.
pub(super) fn check(parts: &[Part], real_size: u64, stored: u64) -> Result<(), EntryProblem> {
    let mut end = 0;
    let mut total = 0u64;
    for part in parts {
        if part.offset < end {
            return Err(EntryProblem::SparseMap("its parts overlap or are not in order"));
        }
        end = part
            .offset
            .checked_add(part.length)
            .filter(|end| *end <= real_size)
            .ok_or(EntryProblem::SparseMap(
                "a part reaches beyond the end of the file",
            ))?;
        total += part.length;
    }
    if total != stored {
        return Err(EntryProblem::SparseMap(
            "its parts are not as long as the stored data",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_that_lie_are_refused() {
        let part = |offset, length| Part { offset, length };
        assert_eq!(check(&[part(0, 5), part(10, 5)], 20, 10), Ok(()));
        assert_eq!(check(&[part(0, 5), part(5, 5), part(20, 0)], 20, 10), Ok(()));
        for (parts, stored) in [
            (vec![part(0, 6), part(5, 5)], 11),
            (vec![part(10, 5), part(0, 5)], 10),
            (vec![part(18, 5)], 5),
            (vec![part(u64::MAX, 5)], 5),
            (vec![part(0, 5)], 4),
        ] {
            assert!(check(&parts, 20, stored).is_err(), "{parts:?}");
        }
    }
}
