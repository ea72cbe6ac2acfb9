//! Takes back what was made on the way to something that then failed.

/// Does its work when it is dropped before [`Undo::forget`].
#[must_use = "dropped at once, it undoes at once"]
pub(crate) struct Undo<Work: FnOnce()>(Option<Work>);

impl<Work: FnOnce()> Undo<Work> {
    pub(crate) fn by(work: Work) -> Self {
        Self(Some(work))
    }

    /// All went well: what was made stays.
    pub(crate) fn forget(mut self) {
        self.0 = None;
    }
}

impl<Work: FnOnce()> Drop for Undo<Work> {
    fn drop(&mut self) {
        if let Some(work) = self.0.take() {
            work();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn what_failed_is_undone_once_and_what_went_well_is_not() {
        let undone = Cell::new(0);
        let count = || undone.set(undone.get() + 1);
        drop(Undo::by(count));
        assert_eq!(undone.get(), 1);
        Undo::by(count).forget();
        assert_eq!(undone.get(), 1);
    }
}
