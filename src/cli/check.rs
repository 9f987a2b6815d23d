//! `neap check` (to be written)

use std::path::{Path, PathBuf};
use std::process::ExitCode;

pub fn run(config: Option<&Path>, manifests: &[PathBuf]) -> ExitCode {
    let _ = (config, manifests);
    todo!()
}
