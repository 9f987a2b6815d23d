//! A function and an extension in Rust, compiled once for each run of this binary; what they are made
//! of is kept below target/ between runs.

use super::image::build_with;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// `rustlambda:1`: AWS's `lambda_runtime` and `rust/lambda/src/main.rs`, one static binary.
pub fn rust_lambda_image() -> &'static Path {
    static ARCHIVE: OnceLock<PathBuf> = OnceLock::new();
    ARCHIVE.get_or_init(|| {
        let archive = Path::new(env!("CARGO_TARGET_TMPDIR")).join("images/rustlambda.tar");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/images/rust/build.sh");
        build_with(Command::new(script).arg(&archive));
        archive
    })
}

/// AWS's Lambda Web Adapter, one static binary.
pub fn web_adapter() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("images/web-adapter");
        let binary = dir.join("bin/lambda-adapter");
        if !binary.exists() {
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/images/rust/adapter.sh");
            build_with(Command::new(script).arg(&dir));
        }
        binary
    })
}
