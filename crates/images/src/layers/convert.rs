//! The conversion itself.
//!
//! ```text
//!  top layer first:   stream ─► entries ─► contents not hidden by upper layers ─► image
//!                                   └────► records
//!  bottom layer first: records ─► merged tree ─► contents still missing? read their layers again
//!  at the end:         merged tree ─► image
//! ```
//!
//! Going down from the top, nearly everything that lower layers bring and upper ones hide is known in time not to
//! be written. What that guess gets wrong (links among parents, hard links to hidden files) the merge puts right.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::sync::atomic::Ordering;
use std::thread;

use hypeman_erofs::{Builder, NodeId};

use super::error::{ConvertError, EntryProblem, LayerProblem};
use super::merge::{MergeError, Merged};
use super::path::Name;
use super::record::{FileContent, Item, Record, shorten};
use super::shadow::Shadows;
use super::stream::{self, LayerStream, Totals};
use super::tar::{Entry, Kind, Piece, TarError, TarReader};
use super::{ConvertObserver, ConvertOptions, Converted, LayerSource};

/// Most layers that are decompressed ahead of the one being written.
const MOST_AHEAD: usize = 8;

/// Puts layers on one another and writes the result as an EROFS image.
///
/// `layers` go from the bottom up. `output` is emptied first and is not synced. Nothing else on the host is read or
/// written, whatever the layers say. The same layers and options give the same image, byte for byte.
///
/// # Errors
/// See [`ConvertError`]; the content of `output` is then of no use.
pub fn convert(
    layers: &[LayerSource],
    output: &File,
    options: &ConvertOptions,
    observer: &dyn ConvertObserver,
) -> Result<Converted, ConvertError> {
    for (layer, source) in layers.iter().enumerate() {
        check_source(source).map_err(|problem| ConvertError::Layer { layer, problem })?;
    }
    let erofs = hypeman_erofs::Options {
        compression: options.compression,
        ..Default::default()
    };
    let mut conversion = Conversion {
        layers,
        options,
        observer,
        total: layers.iter().map(|layer| layer.size).sum(),
        builder: Builder::new(output, erofs)?,
        entries: 0,
        metadata: 0,
    };
    let totals = Totals::default();
    let records = conversion.read_all(&totals)?;
    let mut merged = conversion.merge(records)?;
    conversion.fetch_missing(&mut merged)?;
    let summary = conversion.builder.finish(&merged)?;
    Ok(Converted {
        size_bytes: summary.size_bytes,
        inodes: summary.inodes,
        uncompressed_bytes: totals.uncompressed.load(Ordering::Relaxed),
    })
}

fn check_source(source: &LayerSource) -> Result<(), LayerProblem> {
    let media_type = &source.media_type;
    if !media_type.is_empty() && (!media_type.contains("tar") || media_type.contains("encrypted")) {
        return Err(LayerProblem::MediaType(media_type.chars().take(128).collect()));
    }
    for digest in [&source.digest, &source.diff_id].into_iter().flatten() {
        stream::check_digest_form(digest)?;
    }
    Ok(())
}

struct Conversion<'a> {
    layers: &'a [LayerSource],
    options: &'a ConvertOptions,
    observer: &'a dyn ConvertObserver,
    /// Compressed bytes of all layers.
    total: u64,
    builder: Builder<'a>,
    entries: u64,
    metadata: u64,
}

type Reader<'s> = TarReader<'s, LayerStream<'s>>;

impl<'a> Conversion<'a> {
    /// Reads all layers once, from the top down. Returns the records by layer.
    fn read_all(&mut self, totals: &Totals) -> Result<Vec<Vec<Record>>, ConvertError> {
        let (layers, options, observer, total) = (self.layers, self.options, self.observer, self.total);
        let ahead = match options.threads {
            0 => thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        }
        .min(MOST_AHEAD);
        let mut records: Vec<Vec<Record>> = layers.iter().map(|_| Vec::new()).collect();
        let mut shadows = Shadows::default();
        thread::scope(|scope| {
            let mut to_open = (0..layers.len()).rev();
            let mut opened = VecDeque::new();
            for layer in (0..layers.len()).rev() {
                while opened.len() < ahead
                    && let Some(next) = to_open.next()
                {
                    let (decoder, stream) =
                        stream::open(next, &layers[next], &options.limits, totals, total, observer);
                    scope.spawn(move || decoder.run());
                    opened.push_back(stream);
                }
                // Layers are opened in the order in which they are read.
                let Some(stream) = opened.pop_front() else { break };
                records[layer] = self.read_layer(layer, stream, &shadows)?;
                if layer > 0 {
                    for record in &records[layer] {
                        shadows.add(&record.name, record.item == Item::Directory);
                    }
                }
            }
            Ok(records)
        })
    }

    fn read_layer(
        &mut self,
        layer: usize,
        stream: LayerStream<'_>,
        shadows: &Shadows,
    ) -> Result<Vec<Record>, ConvertError> {
        let limits = &self.options.limits;
        let mut reader = TarReader::new(stream, limits);
        let mut records = Vec::new();
        let mut ordinal = 0;
        while let Some(entry) = next_entry(&mut reader, layer)? {
            self.entries += 1;
            if self.entries > limits.entries {
                let problem = LayerProblem::TooManyEntries {
                    limit: limits.entries,
                };
                return Err(ConvertError::Layer { layer, problem });
            }
            let (size, sparse, is_file) = (entry.size, entry.sparse, entry.kind == Kind::File);
            let skipped = FileContent::Skipped {
                layer: layer as u32,
                ordinal,
            };
            ordinal += 1;
            let name = entry.name.clone();
            let mut record = Record::new(entry, skipped, limits).map_err(|problem| ConvertError::Entry {
                layer,
                entry: shorten(&name),
                problem,
            })?;
            self.metadata += record.memory();
            if self.metadata > limits.metadata_bytes {
                let problem = LayerProblem::TooMuchMetadata {
                    limit: limits.metadata_bytes,
                };
                return Err(ConvertError::Layer { layer, problem });
            }
            if is_file && matches!(&record.name, Name::Entry(path) if !shadows.hide(path)) {
                record.item = Item::File(write_content(
                    &mut self.builder,
                    &mut reader,
                    layer,
                    &record,
                    size,
                    sparse,
                )?);
            }
            if record.name != Name::Ignored {
                records.push(record);
            }
        }
        records.shrink_to_fit();
        reader
            .into_input()
            .finish(self.layers[layer].diff_id.as_deref())?;
        Ok(records)
    }

    fn merge(&self, records: Vec<Vec<Record>>) -> Result<Merged<'a>, ConvertError> {
        let limits = &self.options.limits;
        let mut merged = Merged::new(limits);
        for (layer, records) in records.into_iter().enumerate() {
            merged.begin_layer(layer as u32);
            for record in records {
                let name = record.name.clone();
                merged.apply(record).map_err(|error| match error {
                    MergeError::Entry(problem) => {
                        let (Name::Entry(path) | Name::Whiteout(path) | Name::Opaque(path)) = &name else {
                            return ConvertError::Entry {
                                layer,
                                entry: String::new(),
                                problem,
                            };
                        };
                        ConvertError::Entry {
                            layer,
                            entry: shorten(path),
                            problem,
                        }
                    }
                    MergeError::TooManyNodes => {
                        let problem = LayerProblem::TooManyEntries {
                            limit: limits.entries,
                        };
                        ConvertError::Layer { layer, problem }
                    }
                })?;
            }
            if self.observer.cancelled() {
                return Err(ConvertError::Cancelled);
            }
        }
        Ok(merged)
    }

    /// Reads layers a second time for the contents that were skipped by mistake.
    fn fetch_missing(&mut self, merged: &mut Merged<'_>) -> Result<(), ConvertError> {
        let mut by_layer: BTreeMap<usize, BTreeMap<u32, Vec<NodeId>>> = BTreeMap::new();
        for (layer, ordinal, node) in merged.missing_contents() {
            by_layer
                .entry(layer as usize)
                .or_default()
                .entry(ordinal)
                .or_default()
                .push(node);
        }
        for (layer, mut wanted) in by_layer.into_iter().rev() {
            // Bytes of a second reading were counted and reported the first time.
            let totals = Totals::default();
            let quiet = Quiet(self.observer);
            let (decoder, stream) = stream::open(
                layer,
                &self.layers[layer],
                &self.options.limits,
                &totals,
                self.total,
                &quiet,
            );
            thread::scope(|scope| {
                scope.spawn(move || decoder.run());
                self.fetch_from(layer, stream, &mut wanted, merged)
            })?;
            if !wanted.is_empty() {
                return Err(ConvertError::Layer {
                    layer,
                    problem: LayerProblem::Changed,
                });
            }
        }
        Ok(())
    }

    fn fetch_from(
        &mut self,
        layer: usize,
        stream: LayerStream<'_>,
        wanted: &mut BTreeMap<u32, Vec<NodeId>>,
        merged: &mut Merged<'_>,
    ) -> Result<(), ConvertError> {
        let limits = &self.options.limits;
        let mut reader = TarReader::new(stream, limits);
        let mut ordinal = 0;
        while let Some(entry) = next_entry(&mut reader, layer)? {
            if let Some(nodes) = wanted.remove(&ordinal) {
                if entry.kind != Kind::File {
                    return Err(ConvertError::Layer {
                        layer,
                        problem: LayerProblem::Changed,
                    });
                }
                let (size, sparse, name) = (entry.size, entry.sparse, entry.name.clone());
                let content = FileContent::Skipped {
                    layer: layer as u32,
                    ordinal,
                };
                let record = Record::new(entry, content, limits).map_err(|problem| ConvertError::Entry {
                    layer,
                    entry: shorten(&name),
                    problem,
                })?;
                let content = write_content(&mut self.builder, &mut reader, layer, &record, size, sparse)?;
                if let FileContent::Written(handle) = content {
                    nodes
                        .into_iter()
                        .for_each(|node| merged.set_content(node, handle));
                }
            }
            ordinal += 1;
        }
        reader.into_input().finish(self.layers[layer].diff_id.as_deref())
    }
}

/// Passes on the wish to stop, but no progress.
struct Quiet<'a>(&'a dyn ConvertObserver);

impl ConvertObserver for Quiet<'_> {
    fn progress(&self, _bytes_read: u64, _total: u64) {}

    fn cancelled(&self) -> bool {
        self.0.cancelled()
    }
}

fn next_entry(reader: &mut Reader<'_>, layer: usize) -> Result<Option<Entry>, ConvertError> {
    reader.next().map_err(|error| explain(reader, layer, error))
}

fn write_content(
    builder: &mut Builder<'_>,
    reader: &mut Reader<'_>,
    layer: usize,
    record: &Record,
    size: u64,
    sparse: bool,
) -> Result<FileContent, ConvertError> {
    let mut file = builder.begin_file(&record.attributes, size, sparse)?;
    loop {
        match reader.piece() {
            Ok(Some(Piece::Data(bytes))) => file.write(bytes)?,
            Ok(Some(Piece::Hole(length))) => file.hole(length)?,
            Ok(None) => return Ok(FileContent::Written(file.finish()?)),
            Err(error) => return Err(explain(reader, layer, error)),
        }
    }
}

fn explain(reader: &mut Reader<'_>, layer: usize, error: TarError) -> ConvertError {
    match error {
        TarError::Stream(error) => reader
            .input_mut()
            .take_failure()
            .unwrap_or_else(|| ConvertError::Layer {
                layer,
                problem: LayerProblem::Corrupt(error.to_string()),
            }),
        TarError::Truncated => ConvertError::Layer {
            layer,
            problem: LayerProblem::Truncated,
        },
        TarError::TrailingData => ConvertError::Layer {
            layer,
            problem: LayerProblem::TrailingData,
        },
        TarError::Entry { name, problem } => ConvertError::Entry {
            layer,
            entry: shorten(&name),
            problem: EntryProblem::clone(&problem),
        },
    }
}
