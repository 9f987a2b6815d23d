//! Importing real archives, made by the tools that people use: umoci, skopeo, tar, zstd.

use neap::image::{Image, ImageError, ImageStore};
use neap::model::api::{ImageSummary, Progress};
use neap::model::{Digest, Reference};
use std::path::{Path, PathBuf};
use std::process::Command;

const NEAP: &str = env!("CARGO_BIN_EXE_neap");

#[test]
fn shell_image_imports_and_is_found_by_each_of_its_names() {
    let node = Node::new();

    let summary = node.import(&node.shell(), None).expect("imports");

    assert_eq!(summary.references, ["shell:1"]);
    let image = node.store.find("shell:1").expect("found");
    assert_eq!(image.digest.as_str(), summary.digest);
    assert_eq!(image.config.cmd, ["/function.sh"]);
    assert!(image.layers[0].join("bin/busybox").is_file());
    for name in ["docker.io/library/shell:1", &summary.digest, &summary.digest[7..19]] {
        assert_eq!(node.store.find(name).expect(name).digest, image.digest);
    }
    assert!(matches!(node.store.find("shell:2"), Err(ImageError::NotFound(_))));
    node.assert_nothing_staged();
}

/// A data directory with a store.
struct Node {
    directory: tempfile::TempDir,
    store: ImageStore,
}

impl Node {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let store = ImageStore::open(&directory.path().join("data"), NEAP.into()).expect("opens");
        Self { directory, store }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn shell(&self) -> PathBuf {
        let out = self.path("shell.tar");
        run(Command::new(root().join("images/shell/build.sh")).arg(&out));
        out
    }

    fn import(&self, archive: &Path, name: Option<&str>) -> Result<ImageSummary, ImageError> {
        self.import_with_progress(archive, name).0
    }

    fn import_with_progress(
        &self,
        archive: &Path,
        name: Option<&str>,
    ) -> (Result<ImageSummary, ImageError>, Vec<Progress>) {
        let name = name.map(|name| Reference::parse(name).expect("a reference"));
        let archive = std::fs::read(archive).expect("the archive is there");
        let (send, receive) = smol::channel::unbounded();
        let result = smol::block_on(self.store.import(smol::io::Cursor::new(archive), name, send));
        let mut progress = Vec::new();
        while let Ok(line) = receive.try_recv() {
            progress.push(line);
        }
        (result, progress)
    }

    /// The clean-up has its own thread, so this waits for it.
    fn assert_nothing_staged(&self) {
        let staging = self.path("data/images/staging");
        wait_for("an empty staging directory", || {
            std::fs::read_dir(&staging).expect("there").next().is_none()
        });
    }
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !condition() {
        assert!(start.elapsed() < std::time::Duration::from_secs(30), "waited 30 s for {what}");
        std::thread::yield_now();
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}: {stderr}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}
