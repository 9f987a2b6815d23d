//! `neap doctor` (to be written)

use std::path::Path;
use std::process::ExitCode;

pub fn run(config: Option<&Path>, json: bool) -> ExitCode {
    let _ = (config, json);
    todo!()
}
