//! Which memory images are to be compressed, when, and how: decided here, carried out by `compression`.
//!
//! ```text
//!   wishes of snapshots and instances ──► one job an image ──► due ──► done
//!            └─ withdrawn: without one the job is gone         ▲  └──► failed: due again later
//!                                                              └──────────┘
//! ```
//!
//! Invariants:
//! - The earliest wish says when and how, of equally early ones the first that came: nobody who shares an image can
//!   put off what another wants of it.
//! - A job has a wish.

use std::collections::BTreeMap;

use hypeman_snapshots::Codec;
use jiff::Timestamp;

use super::super::model::CompressionState;

/// Who wants an image compressed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wisher {
    /// A snapshot. It is told what came of it.
    Snapshot(String),
    /// An instance, while it is in standby.
    Standby,
}

#[derive(Debug)]
struct Wish {
    by: Wisher,
    codec: Codec,
    not_before: Option<Timestamp>,
}

#[derive(Debug, Default)]
struct Job {
    wishes: Vec<Wish>,
    failure: Option<String>,
    retry: Option<Timestamp>,
}

impl Job {
    /// The wish that counts.
    fn first(&self) -> Option<&Wish> {
        self.wishes.iter().min_by_key(|wish| wish.not_before)
    }

    /// `None` is at once.
    fn start(&self) -> Option<Timestamp> {
        self.first().and_then(|wish| wish.not_before).max(self.retry)
    }

    fn is_due(&self, now: Timestamp) -> bool {
        self.start().is_none_or(|start| start <= now)
    }

    fn snapshots(&self) -> Vec<String> {
        let of = |wish: &Wish| match &wish.by {
            Wisher::Snapshot(id) => Some(id.clone()),
            Wisher::Standby => None,
        };
        self.wishes.iter().filter_map(of).collect()
    }
}

/// What may begin now.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Due {
    pub(super) image: String,
    pub(super) codec: Codec,
    /// It is wanted for an instance in standby, which may have woken up since.
    pub(super) for_standby: bool,
}

/// The jobs of all images.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    by_image: BTreeMap<String, Job>,
}

impl Jobs {
    pub(super) fn wish(&mut self, image: &str, by: Wisher, codec: Codec, not_before: Option<Timestamp>) {
        self.by_image
            .entry(image.to_owned())
            .or_default()
            .wishes
            .push(Wish {
                by,
                codec,
                not_before,
            });
    }

    /// Takes wishes back. Whether nobody is left who wants the image compressed.
    pub(super) fn withdraw(&mut self, image: &str, by: &Wisher) -> bool {
        let Some(job) = self.by_image.get_mut(image) else {
            return true;
        };
        job.wishes.retain(|wish| wish.by != *by);
        if job.wishes.is_empty() {
            self.by_image.remove(image);
            return true;
        }
        false
    }

    pub(super) fn contains(&self, image: &str) -> bool {
        self.by_image.contains_key(image)
    }

    pub(super) fn remove(&mut self, image: &str) {
        self.by_image.remove(image);
    }

    /// A job that may begin.
    pub(super) fn due(&self, now: Timestamp) -> Option<Due> {
        let (image, job) = self.by_image.iter().find(|(_, job)| job.is_due(now))?;
        let wish = job.first()?;
        Some(Due {
            image: image.clone(),
            codec: wish.codec,
            for_standby: wish.by == Wisher::Standby,
        })
    }

    /// When the next of those that wait may begin.
    pub(super) fn soonest(&self) -> Option<Timestamp> {
        self.by_image.values().filter_map(Job::start).min()
    }

    /// Ends a job; returns the snapshots to speak of.
    pub(super) fn done(&mut self, image: &str) -> Vec<String> {
        let job = self.by_image.remove(image);
        job.map(|job| job.snapshots()).unwrap_or_default()
    }

    /// Notes that a job failed; returns the snapshots to speak of.
    pub(super) fn failed(&mut self, image: &str, reason: String, retry: Option<Timestamp>) -> Vec<String> {
        let Some(job) = self.by_image.get_mut(image) else {
            return Vec::new();
        };
        job.failure = Some(reason);
        job.retry = retry;
        job.snapshots()
    }

    /// Where the compression of an image without frames is.
    pub(super) fn state(&self, image: &str, now: Timestamp) -> CompressionState {
        let Some(job) = self.by_image.get(image) else {
            return CompressionState::None;
        };
        match &job.failure {
            Some(reason) => CompressionState::Error {
                reason: reason.clone(),
            },
            None if job.is_due(now) => CompressionState::Compressing,
            None => CompressionState::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ZSTD: Codec = Codec::Zstd(1);
    const LZ4: Codec = Codec::Lz4(0);

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn snapshot(id: &str) -> Wisher {
        Wisher::Snapshot(id.into())
    }

    fn due(jobs: &Jobs, second: i64) -> Option<(Codec, bool)> {
        jobs.due(at(second)).map(|due| (due.codec, due.for_standby))
    }

    #[test]
    fn the_earliest_wish_says_when_and_how_in_whatever_order_they_come() {
        let wishes = [(Wisher::Standby, ZSTD, Some(at(100))), (snapshot("a"), LZ4, None)];
        for order in [[0, 1], [1, 0]] {
            let mut jobs = Jobs::default();
            for number in order {
                let (by, codec, not_before) = wishes[number].clone();
                jobs.wish("image", by, codec, not_before);
            }
            assert_eq!(due(&jobs, 1), Some((LZ4, false)));
            // With the snapshot goes its hurry.
            assert!(!jobs.withdraw("image", &snapshot("a")));
            assert_eq!((due(&jobs, 1), jobs.soonest()), (None, Some(at(100))));
            assert_eq!(jobs.state("image", at(1)), CompressionState::None);
            assert_eq!(due(&jobs, 100), Some((ZSTD, true)));
            assert_eq!(jobs.state("image", at(100)), CompressionState::Compressing);
        }
    }

    #[test]
    fn of_equal_wishes_the_first_counts_and_all_are_told() {
        let mut jobs = Jobs::default();
        jobs.wish("image", snapshot("a"), ZSTD, None);
        jobs.wish("image", snapshot("b"), LZ4, None);
        assert_eq!(due(&jobs, 1), Some((ZSTD, false)));
        assert_eq!(jobs.done("image"), ["a", "b"]);
        assert!(!jobs.contains("image"));
    }

    #[test]
    fn what_nobody_wants_any_more_is_no_job() {
        let mut jobs = Jobs::default();
        jobs.wish("image", snapshot("a"), ZSTD, None);
        jobs.wish("image", snapshot("b"), ZSTD, None);
        assert!(!jobs.withdraw("image", &snapshot("a")));
        assert!(jobs.withdraw("image", &snapshot("b")));
        assert!(jobs.withdraw("image", &snapshot("b")), "nor is it one later");
        assert_eq!((jobs.due(at(1)), jobs.soonest()), (None, None));
    }

    #[test]
    fn a_failure_is_told_and_tried_again_later() {
        let mut jobs = Jobs::default();
        jobs.wish("image", snapshot("a"), ZSTD, None);
        assert_eq!(jobs.failed("image", "no room".into(), Some(at(20))), ["a"]);
        let reason = "no room".to_owned();
        assert_eq!(jobs.state("image", at(1)), CompressionState::Error { reason });
        assert_eq!((due(&jobs, 19), jobs.soonest()), (None, Some(at(20))));
        assert!(due(&jobs, 20).is_some());
    }
}
