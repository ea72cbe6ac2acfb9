//! Turns an image of an OCI layout into an EROFS image, to measure it:
//! `convert LAYOUT OUTPUT [none|lz4] [THREADS]`.
//!
//! The first manifest of the layout's index is taken.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use hypeman_images::layers::{Compression, ConvertObserver, ConvertOptions, LayerSource, convert};

struct Silent;

impl ConvertObserver for Silent {
    fn progress(&self, _bytes_read: u64, _total: u64) {}

    fn cancelled(&self) -> bool {
        false
    }
}

fn blob(layout: &Path, descriptor: &serde_json::Value) -> Result<PathBuf, Box<dyn Error>> {
    let digest = descriptor["digest"]
        .as_str()
        .ok_or("a descriptor has no digest")?;
    Ok(layout.join("blobs").join(digest.replace(':', "/")))
}

fn read(path: &Path) -> Result<serde_json::Value, Box<dyn Error>> {
    Ok(serde_json::from_reader(File::open(path)?)?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [layout, output, rest @ ..] = &arguments[..] else {
        return Err("usage: convert LAYOUT OUTPUT [none|lz4] [THREADS]".into());
    };
    let layout = Path::new(layout);
    let compression = match rest.first().map(String::as_str) {
        None | Some("none") => Compression::None,
        Some("lz4") => Compression::Lz4,
        Some(other) => return Err(format!("no compression {other}").into()),
    };
    let threads = rest.get(1).map_or(Ok(0), |threads| threads.parse())?;
    let manifest = read(&blob(layout, &read(&layout.join("index.json"))?["manifests"][0])?)?;
    let config = read(&blob(layout, &manifest["config"])?)?;
    let layers: Vec<LayerSource> = manifest["layers"]
        .as_array()
        .ok_or("the manifest has no layers")?
        .iter()
        .enumerate()
        .map(|(index, descriptor)| {
            let path = blob(layout, descriptor)?;
            let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
            Ok(LayerSource {
                media_type: text(&descriptor["mediaType"]).unwrap_or_default(),
                digest: text(&descriptor["digest"]),
                size: descriptor["size"].as_u64().unwrap_or(0),
                diff_id: text(&config["rootfs"]["diff_ids"][index]),
                open: Box::new(move || Ok(Box::new(File::open(&path)?))),
            })
        })
        .collect::<Result<_, Box<dyn Error>>>()?;
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(output)?;
    let options = ConvertOptions {
        compression,
        threads,
        ..ConvertOptions::default()
    };
    let start = Instant::now();
    let converted = convert(&layers, &file, &options, &Silent)?;
    println!("{converted:?} in {:?}", start.elapsed());
    Ok(())
}
