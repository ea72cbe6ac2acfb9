//! Notes in which order a machine asks for its pages, until it has what it needs to begin.
//!
//! ```text
//!  recording ──► nothing new for a while, or long enough, or the machine graduates ──► kept beside the image
//!      └───────► the VMM ends before that: what it had was not enough to begin with, so nothing is kept
//! ```

use std::collections::HashMap;
use std::time::{Duration, Instant};

use hypeman_snapshots::WorkingSet;

/// When recording ends.
#[derive(Debug, Clone, Copy)]
pub struct Recording {
    /// Nothing new was asked for during this time.
    pub idle: Duration,
    /// So much time has passed since the first question.
    pub limit: Duration,
}

impl Default for Recording {
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(3),
            limit: Duration::from_secs(30),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Recorder {
    rules: Recording,
    order: Vec<u32>,
    pages: HashMap<u32, u64>,
    /// Of the first and the last new question.
    times: Option<(Instant, Instant)>,
}

impl Recorder {
    pub(crate) fn new(rules: Recording) -> Self {
        Self {
            rules,
            order: Vec::new(),
            pages: HashMap::new(),
            times: None,
        }
    }

    /// The machine got these pages of a chunk.
    pub(crate) fn note(&mut self, chunk: u32, pages: u64, now: Instant) {
        let known = self.pages.entry(chunk).or_insert_with(|| {
            self.order.push(chunk);
            0
        });
        if *known | pages != *known {
            *known |= pages;
            let first = self.times.map_or(now, |(first, _)| first);
            self.times = Some((first, now));
        }
    }

    /// When it will have ended, unless something new comes.
    pub(crate) fn end(&self) -> Option<Instant> {
        let (first, last) = self.times?;
        Some((last + self.rules.idle).min(first + self.rules.limit))
    }

    /// What was asked for.
    pub(crate) fn finish(self) -> WorkingSet {
        let chunks = self.order.iter().map(|chunk| (*chunk, self.pages[chunk]));
        WorkingSet {
            chunks: chunks.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_first_questions_is_kept_and_time_ends_it() {
        let rules = Recording {
            idle: Duration::from_secs(3),
            limit: Duration::from_secs(5),
        };
        let mut recorder = Recorder::new(rules);
        assert_eq!(recorder.end(), None);
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        recorder.note(7, 1, at(0));
        recorder.note(2, 2, at(1));
        assert_eq!(recorder.end(), Some(at(4)));
        recorder.note(7, 1, at(2));
        assert_eq!(recorder.end(), Some(at(4)), "nothing new");
        recorder.note(7, 4, at(3));
        assert_eq!(recorder.end(), Some(at(5)), "long enough");
        assert_eq!(recorder.finish().chunks, [(7, 5), (2, 2)]);
    }
}
