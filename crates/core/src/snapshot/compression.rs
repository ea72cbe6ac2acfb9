//! Whether memory is compressed, with what, how hard, and when.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::SnapshotKind;
use crate::InvalidValue;

const CODE: &str = "invalid_snapshot_compression";

/// How memory is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    /// Zstandard, level 1 to 19.
    Zstd,
    /// LZ4, level 0 to 9; from 3 on with the high compression search.
    Lz4,
}

impl Algorithm {
    /// The name used by the contract.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
        }
    }

    /// Levels that it has.
    #[must_use]
    pub fn levels(self) -> std::ops::RangeInclusive<u8> {
        match self {
            Self::Zstd => 1..=19,
            Self::Lz4 => 0..=9,
        }
    }

    /// Level when none is asked for: the fastest.
    #[must_use]
    pub fn default_level(self) -> u8 {
        *self.levels().start()
    }
}

impl std::fmt::Display for Algorithm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for Algorithm {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        [Self::Zstd, Self::Lz4]
            .into_iter()
            .find(|algorithm| algorithm.as_str() == text)
            .ok_or_else(|| {
                InvalidValue::new(
                    CODE,
                    format!("memory is compressed with zstd or lz4, not {text:?}"),
                )
                .in_field("compression.algorithm")
            })
    }
}

/// A decision about compression, checked: the level fits the algorithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum CompressionChoice {
    /// Stay raw.
    Off,
    /// Compress in the background.
    On {
        /// With what.
        algorithm: Algorithm,
        /// How hard.
        level: u8,
    },
}

impl CompressionChoice {
    /// Checks a choice. Without `enabled` the rest is ignored, as the contract says.
    ///
    /// # Errors
    /// `invalid_snapshot_compression` when the level is not one of the algorithm's.
    pub fn new(
        enabled: bool,
        algorithm: Option<Algorithm>,
        level: Option<i64>,
    ) -> Result<Self, InvalidValue> {
        if !enabled {
            return Ok(Self::Off);
        }
        let algorithm = algorithm.unwrap_or(Algorithm::Zstd);
        let levels = algorithm.levels();
        let level = match level {
            None => algorithm.default_level(),
            Some(level) => u8::try_from(level)
                .ok()
                .filter(|level| levels.contains(level))
                .ok_or_else(|| {
                    let (first, last) = (levels.start(), levels.end());
                    InvalidValue::new(
                        CODE,
                        format!("{algorithm} has the levels {first} to {last}, not {level}"),
                    )
                    .in_field("compression.level")
                })?,
        };
        Ok(Self::On { algorithm, level })
    }

    /// Whether anything is compressed.
    #[must_use]
    pub fn is_on(self) -> bool {
        self != Self::Off
    }
}

/// Decides for one snapshot: the request over the instance's policy over the server's default. Without memory
/// there is nothing to compress.
///
/// # Errors
/// `invalid_snapshot_compression` when the request itself wants compression where there is no memory.
pub fn choose_compression(
    kind: SnapshotKind,
    request: Option<CompressionChoice>,
    instance: Option<CompressionChoice>,
    server: CompressionChoice,
) -> Result<CompressionChoice, InvalidValue> {
    if kind.has_memory() {
        return Ok(choose_memory_compression(request, instance, server));
    }
    if request.is_some_and(CompressionChoice::is_on) {
        return Err(InvalidValue::new(
            CODE,
            "a snapshot of kind Stopped holds no memory to compress; leave compression out",
        )
        .in_field("compression"));
    }
    Ok(CompressionChoice::Off)
}

/// The same for memory that is captured in any case.
#[must_use]
pub fn choose_memory_compression(
    request: Option<CompressionChoice>,
    instance: Option<CompressionChoice>,
    server: CompressionChoice,
) -> CompressionChoice {
    request.or(instance).unwrap_or(server)
}

/// How long after a standby compression begins: the request over the instance's policy, else at once.
#[must_use]
pub fn choose_delay(request: Option<Duration>, instance: Option<Duration>) -> Duration {
    request.or(instance).unwrap_or(Duration::ZERO)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn on(algorithm: Algorithm, level: u8) -> CompressionChoice {
        CompressionChoice::On { algorithm, level }
    }

    #[test]
    fn defaults_are_the_contracts() {
        assert_eq!(
            CompressionChoice::new(true, None, None).unwrap(),
            on(Algorithm::Zstd, 1)
        );
        assert_eq!(
            CompressionChoice::new(true, Some(Algorithm::Lz4), None).unwrap(),
            on(Algorithm::Lz4, 0)
        );
        assert_eq!(
            CompressionChoice::new(false, Some(Algorithm::Lz4), Some(99)).unwrap(),
            CompressionChoice::Off
        );
    }

    #[test]
    fn algorithms_are_read_as_they_are_written() {
        for algorithm in [Algorithm::Zstd, Algorithm::Lz4] {
            assert_eq!(algorithm.to_string().parse(), Ok(algorithm));
        }
        assert!("gzip".parse::<Algorithm>().is_err());
    }

    #[test]
    fn levels_belong_to_their_algorithm() {
        for (algorithm, level, valid) in [
            (Algorithm::Zstd, 0, false),
            (Algorithm::Zstd, 1, true),
            (Algorithm::Zstd, 19, true),
            (Algorithm::Zstd, 20, false),
            (Algorithm::Zstd, 257, false),
            (Algorithm::Lz4, -1, false),
            (Algorithm::Lz4, 0, true),
            (Algorithm::Lz4, 9, true),
            (Algorithm::Lz4, 10, false),
        ] {
            let choice = CompressionChoice::new(true, Some(algorithm), Some(level));
            assert_eq!(choice.is_ok(), valid, "{algorithm} {level}");
            if let Err(error) = choice {
                assert_eq!(error.code, "invalid_snapshot_compression");
            }
        }
    }

    #[test]
    fn the_nearest_opinion_counts() {
        let kind = SnapshotKind::Standby;
        let (a, b, c) = (
            on(Algorithm::Zstd, 3),
            CompressionChoice::Off,
            on(Algorithm::Lz4, 0),
        );
        assert_eq!(choose_compression(kind, Some(a), Some(b), c).unwrap(), a);
        assert_eq!(choose_compression(kind, Some(b), Some(a), c).unwrap(), b);
        assert_eq!(choose_compression(kind, None, Some(b), c).unwrap(), b);
        assert_eq!(choose_compression(kind, None, None, c).unwrap(), c);
    }

    #[test]
    fn without_memory_policies_are_ignored_and_requests_refused() {
        let zstd = on(Algorithm::Zstd, 1);
        let stopped = |request| choose_compression(SnapshotKind::Stopped, request, Some(zstd), zstd);
        assert_eq!(stopped(None).unwrap(), CompressionChoice::Off);
        assert_eq!(
            stopped(Some(CompressionChoice::Off)).unwrap(),
            CompressionChoice::Off
        );
        assert_eq!(
            stopped(Some(zstd)).unwrap_err().code,
            "invalid_snapshot_compression"
        );
    }

    #[test]
    fn delays_have_the_same_order() {
        let (short, long) = (Duration::from_secs(1), Duration::from_secs(60));
        assert_eq!(choose_delay(Some(Duration::ZERO), Some(long)), Duration::ZERO);
        assert_eq!(choose_delay(Some(short), None), short);
        assert_eq!(choose_delay(None, Some(long)), long);
        assert_eq!(choose_delay(None, None), Duration::ZERO);
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_is_in_range(
            algorithm in prop::option::of(prop::sample::select(vec![Algorithm::Zstd, Algorithm::Lz4])),
            level in prop::option::of(prop_oneof![any::<i64>(), -3i64..25]),
        ) {
            if let Ok(CompressionChoice::On { algorithm, level }) = CompressionChoice::new(true, algorithm, level) {
                prop_assert!(algorithm.levels().contains(&level));
            }
        }
    }
}
