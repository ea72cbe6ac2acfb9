//! Takes back what was made on the way to something that then failed.
//!
//! What that is, whoever made it says: nothing here knows files, processes or machines.

/// Does its work when it is dropped before [`Undo::forget`].
#[must_use = "dropped at once, it undoes at once"]
pub struct Undo<Work: FnOnce()>(Option<Work>);

impl<Work: FnOnce()> Undo<Work> {
    /// To be undone by `work`, which runs where this is dropped and must not panic: an error may be on its way.
    pub fn by(work: Work) -> Self {
        Self(Some(work))
    }

    /// All went well: what was made stays.
    pub fn forget(mut self) {
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
    use std::cell::{Cell, RefCell};

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

    #[test]
    fn an_early_return_undoes_what_came_before_it_the_last_first() {
        let undone = RefCell::new(Vec::new());
        let make = |fails: bool| -> Result<(), &'static str> {
            let first = Undo::by(|| undone.borrow_mut().push("first"));
            let second = Undo::by(|| undone.borrow_mut().push("second"));
            if fails {
                return Err("no third");
            }
            first.forget();
            second.forget();
            Ok(())
        };
        assert!(make(true).is_err());
        assert_eq!(*undone.borrow(), ["second", "first"]);
        assert!(make(false).is_ok());
        assert_eq!(*undone.borrow(), ["second", "first"]);
    }
}
