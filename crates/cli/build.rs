//! Embeds the guest program when there is one.
//!
//! Nothing is built here: the program comes from `HYPEMAN_GUEST_BINARY`, or from where a build for the musl target
//! with the profile `guest` puts it. Without one the server looks for it at its start.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-env-changed=HYPEMAN_GUEST_BINARY");
    println!("cargo::rerun-if-env-changed=CARGO_TARGET_DIR");
    println!("cargo::rerun-if-changed=build.rs");
    let found = match env::var_os("HYPEMAN_GUEST_BINARY").filter(|path| !path.is_empty()) {
        Some(named) => {
            let path = PathBuf::from(named);
            if !path.is_file() {
                return Err(format!("HYPEMAN_GUEST_BINARY: {} is no file", path.display()).into());
            }
            Some(path)
        }
        None => built_beside()?,
    };
    let mut code = String::from("/// The guest program, when the build had one.\n");
    match found {
        Some(path) => {
            let path = fs::canonicalize(path)?;
            println!("cargo::rerun-if-changed={}", path.display());
            writeln!(
                code,
                "pub const EMBEDDED: Option<&[u8]> = Some(include_bytes!({:?}));",
                path.display().to_string()
            )?;
        }
        None => code.push_str("pub const EMBEDDED: Option<&[u8]> = None;\n"),
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("no OUT_DIR")?);
    fs::write(out.join("guest.rs"), code)?;
    Ok(())
}

fn built_beside() -> Result<Option<PathBuf>, Box<dyn std::error::Error>> {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or("no CARGO_MANIFEST_DIR")?);
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| manifest.join("../../target"), PathBuf::from);
    let architecture = env::var("CARGO_CFG_TARGET_ARCH")?;
    let path = target.join(format!("{architecture}-unknown-linux-musl/guest/hypeman-guest"));
    // A path that does not exist yet is watched too: the next build sees it appear.
    println!("cargo::rerun-if-changed={}", path.display());
    Ok(path.is_file().then_some(path))
}
