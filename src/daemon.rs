//! `neap daemon`: load, check, open, build, then start; stop is the same list backwards.

use std::path::PathBuf;
use std::process::ExitCode;

/// Runs until SIGTERM or SIGINT. `config`: neap.toml; a file that isn't there is an error only
/// when it was named.
pub fn run(config: Option<PathBuf>) -> ExitCode {
    let _ = config;
    todo!()
}
