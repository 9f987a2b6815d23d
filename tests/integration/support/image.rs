//! Example images as archives, built once for each run of this binary.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// `images/shell`: busybox and the example's script, an OCI archive named `shell:1`. A test
/// brings its own command: `command = ["/bin/sh", "-c", "…"]`.
pub fn shell_image() -> &'static Path {
    static ARCHIVE: OnceLock<PathBuf> = OnceLock::new();
    ARCHIVE.get_or_init(|| build("shell"))
}

fn build(name: &str) -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("images").join(name).join("build.sh");
    shared(name, |archive| build_with(Command::new(script).arg(archive)))
}

/// An archive of this run's own making.
pub fn shared(name: &str, build: impl FnOnce(&Path)) -> PathBuf {
    let tmp = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let archive = tmp.join(format!("{name}-{}.tar", std::process::id()));
    build(&archive);
    // One name for all runs, so that they don't pile up; one that runs now keeps reading its own.
    let shared = tmp.join(format!("{name}.tar"));
    std::fs::rename(&archive, &shared).expect("name the archive");
    shared
}

/// Runs the script that builds an image; what it said is told when it fails.
pub fn build_with(command: &mut Command) {
    let script = Path::new(command.get_program()).display().to_string();
    let output = command.output().unwrap_or_else(|error| panic!("run {script}: {error}"));
    assert!(
        output.status.success(),
        "{script}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
