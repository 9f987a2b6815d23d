//! Importing real archives, made by the tools that people use: umoci, skopeo, tar, zstd.

use neap::image::{Image, ImageError, ImageStore};
use neap::model::api::{ImageSummary, Progress};
use neap::model::{Digest, Reference};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Command;
use std::task::{Context, Poll};

const NEAP: &str = env!("CARGO_BIN_EXE_neap");

#[test]
fn shell_image_imports_and_is_found_by_each_of_its_names() {
    let node = Node::new();

    let summary = node.import(&node.shell(), None).expect("imports");

    assert_eq!(summary.references, ["docker.io/library/shell:1"]);
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

#[test]
fn threshold_image_builds_and_alarms_above_its_threshold() {
    let node = Node::new();
    let out = node.path("threshold.tar");
    let mut build = Command::new(root().join("images/threshold/build.sh"));
    // The test's own flags are for neap.
    run(build.arg(&out).env("CARGO_TARGET_DIR", env!("CARGO_TARGET_TMPDIR")).env_remove("RUSTFLAGS"));

    let summary = node.import(&out, None).expect("imports");

    assert_eq!(summary.references, ["docker.io/library/threshold:1"]);
    let image = node.store.find("threshold:1").expect("found");
    assert_eq!(image.config.user, "65534:65534");
    let binary = image.layers[0].join("threshold");
    let hot = node.path("hot.json");
    std::fs::write(&hot, r#"{"celsius": 31.5}"#).expect("written");
    let reading = || std::fs::File::open(&hot).expect("there");
    let alarm = run(Command::new(&binary).env("CE_SUBJECT", "sensors/kiln").stdin(reading()));
    assert_eq!(alarm, "{\"alarm\":true,\"celsius\":31.5,\"threshold\":30,\"sensor\":\"sensors/kiln\"}\n");
    assert_eq!(run(Command::new(&binary).env("THRESHOLD", "40").stdin(reading())), "");
}

#[test]
fn threshold_images_own_tests_pass() {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let manifest = root().join("images/threshold/Cargo.toml");
    let mut test = Command::new(cargo);
    test.args(["test", "--quiet", "--locked", "--offline", "--manifest-path"]).arg(&manifest);
    let said = run(test.env("CARGO_TARGET_DIR", env!("CARGO_TARGET_TMPDIR")).env_remove("RUSTFLAGS"));

    assert!(said.contains("test result: ok") && !said.contains(" 0 passed"), "{said}");
}

#[test]
fn shell_image_is_the_same_bytes_every_time() {
    let node = Node::new();
    let first = std::fs::read(node.shell()).expect("built");

    // Times are whole seconds in a tar: two builds in one second prove nothing.
    let built = std::time::SystemTime::now();
    wait_for("the next second", || built.elapsed().is_ok_and(|e| e.as_millis() > 1100));

    assert!(first == std::fs::read(node.shell()).expect("built"));
}

#[test]
fn every_kind_of_archive_gives_the_same_layers() {
    let node = Node::new();
    let shell = node.shell();
    let diff_ids = |name: &str| -> Vec<String> {
        node.store.show(name).expect("there").layers.into_iter().map(|layer| layer.diff_id).collect()
    };
    node.import(&shell, None).expect("an OCI archive");
    let expected = diff_ids("shell:1");

    let layout = node.unpacked(&shell);
    let skopeo = |arguments: &[&str]| run(Command::new("skopeo").arg("copy").arg("--quiet").args(arguments));
    let oci = format!("oci-archive:{}", shell.display());
    let at = |name: &str| node.path(name).display().to_string();
    skopeo(&[&oci, &format!("docker-archive:{}:example.org/saved:2", at("docker.tar"))]);
    skopeo(&["--dest-compress-format", "zstd", &oci, &format!("oci:{}:zstd:1", at("zstd"))]);
    run(Command::new("tar").args(["-C", &at("zstd"), "-cf", &at("zstd.tar"), "."]));
    run(Command::new("tar").args(["-C", &layout.display().to_string(), "-czf", &at("layout.tar.gz"), "."]));
    run(Command::new("zstd").args(["-q", "-k", &at("shell.tar"), "-o", &at("shell.tar.zst")]));
    run(Command::new("gzip").args(["-k", &at("docker.tar")]));
    let archives = [
        ("docker.tar", "a:1"),
        ("zstd.tar", "b:1"),
        ("layout.tar.gz", "c:1"),
        ("shell.tar.zst", "d:1"),
        ("docker.tar.gz", "e:1"),
    ];
    for (archive, name) in archives {
        let (result, progress) = node.import_with_progress(&node.path(archive), Some(name));

        let summary = result.unwrap_or_else(|error| panic!("{archive}: {error}"));
        assert!(summary.references.contains(&format!("docker.io/library/{name}")), "{archive}");
        assert_eq!(diff_ids(name), expected, "{archive}");
        let unpacked = progress.iter().any(|line| matches!(line, Progress::Unpacking { .. }));
        assert!(!unpacked, "{archive}: the layer was there");
    }

    assert_eq!(node.store.find("a:1").expect("there").digest, node.store.find("e:1").expect("there").digest);
    assert_eq!(
        node.store.find("c:1").expect("there").digest,
        node.store.find("shell:1").expect("there").digest
    );
    assert_eq!(node.entries("layers/sha256"), 1);
    let named = node.import(&node.path("docker.tar"), None).expect("its own name");
    assert!(named.references.contains(&"example.org/saved:2".to_owned()), "{:?}", named.references);
    node.assert_nothing_staged();
}

#[test]
fn archive_that_is_both_oci_and_docker_save_takes_the_manifest_that_registries_have() {
    let node = Node::new();
    let shell = node.shell();
    let expected = node.import(&shell, None).expect("imports").digest;
    let layout = node.unpacked(&shell);
    let manifest = node.blob(&layout, &expected);
    let hex = |value: &serde_json::Value| value["digest"].as_str().expect("a digest")[7..].to_owned();
    let saved = serde_json::json!([{
        "Config": format!("blobs/sha256/{}", hex(&manifest["config"])),
        "RepoTags": ["saved:3"],
        "Layers": [format!("blobs/sha256/{}", hex(&manifest["layers"][0]))],
    }]);
    std::fs::write(layout.join("manifest.json"), saved.to_string()).expect("written");
    // docker puts a bare tag into the index; the whole name is in manifest.json.
    let index = std::fs::read_to_string(layout.join("index.json")).expect("there");
    std::fs::write(layout.join("index.json"), index.replace("shell:1", "3")).expect("written");
    let archive = node.tar(&layout, "saved.tar");

    let summary = node.import(&archive, None).expect("imports");

    assert_eq!(summary.digest, expected);
    assert!(summary.references.contains(&"docker.io/library/saved:3".to_owned()), "{:?}", summary.references);
}

#[test]
fn index_of_several_platforms_gives_this_machines_or_names_those_present() {
    let node = Node::new();
    let shell = node.shell();
    let expected = node.import(&shell, None).expect("imports").digest;
    let layout = node.unpacked(&shell);
    let here = node.store.show("shell:1").expect("there").summary.platform;
    let architecture = here.split('/').nth(1).expect("linux/ARCH").to_owned();
    let size = node.blob_file(&layout, &expected).metadata().expect("there").len();
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let ours = serde_json::json!({"mediaType": media_type, "digest": expected, "size": size,
        "platform": {"os": "linux", "architecture": architecture}});
    let foreign = serde_json::json!({"mediaType": media_type, "digest": format!("sha256:{}", "0".repeat(64)), "size": 7,
        "platform": {"os": "linux", "architecture": "s390x"}});
    let attestation = serde_json::json!({"mediaType": media_type, "digest": format!("sha256:{}", "1".repeat(64)), "size": 7,
        "platform": {"os": "unknown", "architecture": "unknown"}});
    let index = |manifests: &[&serde_json::Value]| {
        let index = serde_json::json!({"schemaVersion": 2, "manifests": manifests}).to_string();
        let digest = node.add_blob(&layout, index.as_bytes());
        let top = serde_json::json!({"schemaVersion": 2, "manifests": [{
            "mediaType": "application/vnd.oci.image.index.v1+json", "digest": digest, "size": index.len(),
            "annotations": {"io.containerd.image.name": "docker.io/library/many:1", "org.opencontainers.image.ref.name": "1"},
        }]});
        std::fs::write(layout.join("index.json"), top.to_string()).expect("written");
        node.tar(&layout, "many.tar")
    };

    let summary = node.import(&index(&[&foreign, &ours, &attestation]), None).expect("imports");
    let missing =
        node.import(&index(&[&foreign, &attestation]), None).expect_err("none for here").to_string();

    assert_eq!(summary.digest, expected);
    assert_eq!(node.store.find("many:1").expect("there").digest.as_str(), expected);
    assert!(missing.contains("linux/s390x") && !missing.contains("unknown"), "{missing}");
    assert!(missing.contains(&format!("docker buildx build --platform linux/{architecture}")), "{missing}");
}

#[test]
fn unnamed_archive_is_refused_with_the_way_out_and_a_given_name_wins() {
    let node = Node::new();
    let layout = node.unpacked(&node.shell());
    let index = std::fs::read_to_string(layout.join("index.json")).expect("there");
    std::fs::write(layout.join("index.json"), index.replace("shell:1", "latest")).expect("written");
    let archive = node.tar(&layout, "unnamed.tar");

    let refused = node.import(&archive, None).expect_err("no name").to_string();
    let named = node.import(&archive, Some("ghcr.io/team/shell:7")).expect("imports");

    assert!(refused.contains("`latest`") && refused.contains("--name"), "{refused}");
    assert_eq!(named.references, ["ghcr.io/team/shell:7"]);
}

#[test]
fn damaged_archives_are_refused_and_leave_nothing() {
    let node = Node::new();
    let good = std::fs::read(node.shell()).expect("built");
    let place = good.len() / 2;
    let flipped = {
        let mut bytes = good.clone();
        bytes[place] ^= 0x10;
        bytes
    };
    let cases: [(&str, Vec<u8>, &str); 6] = [
        ("truncated", good[..place].to_vec(), "truncated"),
        ("flipped", flipped, "is damaged: its bytes are sha256:"),
        ("empty", Vec::new(), "empty, or not a tar"),
        ("text", b"FROM scratch\n".repeat(100), "not a tar archive"),
        ("xz", b"\xfd7zXZ\0rest".to_vec(), "compressed with xz"),
        ("gzip of nothing", vec![0x1f, 0x8b, 8, 0], "truncated"),
    ];
    for (what, bytes, expected) in cases {
        let archive = node.path("bad.tar");
        std::fs::write(&archive, bytes).expect("written");

        let error = node.import(&archive, Some("bad:1")).expect_err(what).to_string();

        assert!(error.contains(expected), "{what}: {error}");
        node.assert_empty();
    }
}

#[test]
fn layer_whose_content_is_not_its_diff_id_is_refused() {
    let node = Node::new();
    let layout = node.unpacked(&node.shell());
    let mut index: serde_json::Value =
        serde_json::from_slice(&std::fs::read(layout.join("index.json")).expect("there")).expect("JSON");
    let mut manifest = node.blob(&layout, index["manifests"][0]["digest"].as_str().expect("a digest"));
    let mut config = node.blob(&layout, manifest["config"]["digest"].as_str().expect("a digest"));
    config["rootfs"]["diff_ids"][0] = format!("sha256:{}", "5".repeat(64)).into();
    let store = |descriptor: &mut serde_json::Value, content: &serde_json::Value| {
        let text = content.to_string();
        descriptor["digest"] = node.add_blob(&layout, text.as_bytes()).into();
        descriptor["size"] = text.len().into();
    };
    store(&mut manifest["config"], &config);
    store(&mut index["manifests"][0], &manifest);
    std::fs::write(layout.join("index.json"), index.to_string()).expect("written");

    let error = node.import(&node.tar(&layout, "lies.tar"), None).expect_err("a lie").to_string();

    assert!(
        error.contains("layer 1 of 1") && error.contains("the configuration says sha256:5555"),
        "{error}"
    );
    node.assert_empty();
}

#[test]
fn layer_bomb_is_refused_by_name_of_the_bound() {
    let node = Node::new();
    let layout = node.path("bomb");
    let umoci = |arguments: &[&str]| run(Command::new("umoci").args(arguments));
    let at = |name: &str| node.path(name).display().to_string();
    let image = format!("{}:1", layout.display());
    umoci(&["init", "--layout", &layout.display().to_string()]);
    umoci(&["new", "--image", &image]);
    std::fs::create_dir(node.path("zeros")).expect("made");
    let zeros = std::fs::File::create(node.path("zeros/zeros")).expect("made");
    zeros.set_len(600 << 20).expect("a hole");
    run(Command::new("tar").args(["-C", &at("zeros"), "-cf", &at("zeros.tar"), "zeros"]));
    umoci(&["raw", "add-layer", "--image", &image, &at("zeros.tar")]);

    let error = node.import(&node.tar(&layout, "bomb.tar"), Some("bomb:1")).expect_err("a bomb").to_string();

    assert!(error.contains("out of all proportion"), "{error}");
    node.assert_empty();
}

/// The layers, mounted as an overlay, against what umoci makes of the same image.
#[test]
fn several_layers_are_one_overlay_that_umoci_agrees_with() {
    let node = Node::new();
    let archive = node.path("layers.tar");
    let script = r#"
        set -eu
        umoci init --layout layout
        umoci new --image layout:1
        umoci unpack --image layout:1 bundle
        cd bundle/rootfs
        mkdir -p etc usr/bin var/cache/deep var/gone keep/sub tmp
        chmod 1777 tmp
        echo one >etc/one; echo two >etc/two; ln etc/one etc/hard; ln -s /etc/one etc/absolute; ln -s ../../up usr/up
        echo tool >usr/bin/tool; chmod 4755 usr/bin/tool
        echo deep >var/cache/deep/file; echo gone >var/gone/file; echo keep >keep/sub/file
        truncate -s 1M etc/sparse; echo x >>etc/sparse
        mkfifo etc/fifo; chown 12:34 etc/two; touch -d @1234567890.123456789 etc/two
        printf 'n' >"etc/new
line"
        printf 'b' >"$(printf 'etc/ÿbytes')"
        setfattr -n user.note -v hello etc/one 2>/dev/null || true
        cd ../..
        umoci repack --refresh-bundle --image layout:1 bundle
        cd bundle/rootfs
        rm etc/two; rm -r var/cache/deep; echo file >var/cache/deep   # a directory becomes a file
        rm -r var/gone; mkdir var/gone; echo new >var/gone/new        # and one a new directory
        rm usr/up; mkdir usr/up; echo in >usr/up/in                   # a symlink becomes a directory
        echo more >keep/sub/more; chmod 700 keep
        cd ../..
        umoci repack --refresh-bundle --image layout:1 bundle
        cd bundle/rootfs
        rm etc/one; echo back >etc/two; chmod 2755 usr/bin/tool
        cd ../..
        umoci repack --refresh-bundle --image layout:1 bundle
        umoci unpack --image layout:1 expected
        tar -C layout -cf layers.tar .
    "#;
    run(Command::new("sh").args(["-c", script]).current_dir(node.directory.path()));

    node.import(&archive, Some("layers:1")).expect("imports");

    let image = node.store.find("layers:1").expect("there");
    assert_eq!(image.layers.len(), 3);
    let expected = listing(&node.path("expected/rootfs"));
    assert_eq!(overlay_listing(&image, &node), expected);
    // find and sort take the name with the newline apart.
    assert!(expected.contains("\nline f 644") && expected.contains("./var/gone/new"), "{expected}");
}

#[test]
fn importing_again_is_cheap_and_moves_only_the_name() {
    let node = Node::new();
    let shell = node.shell();
    let first = node.import(&shell, None).expect("imports");
    let extra = node.path("extra");
    std::fs::create_dir(&extra).expect("made");
    std::fs::write(extra.join("more"), "more").expect("written");
    let other = node.path("other.tar");
    run(Command::new(root().join("images/shell/build.sh")).args([&other, &extra]));

    let again = node.import(&shell, None).expect("imports again");
    let second = node.import(&other, None).expect("another of the same name");

    assert_eq!(first, again);
    assert_ne!(second.digest, first.digest);
    assert_eq!(node.store.find("shell:1").expect("there").digest.as_str(), second.digest);
    let old = node.store.show(&first.digest).expect("pinned by its digest");
    assert!(old.summary.references.is_empty());
    let pinned = HashSet::from([Digest::parse(&first.digest).expect("a digest")]);
    assert!(node.store.collect(&pinned).expect("collects").is_empty());
    assert_eq!(node.store.collect(&HashSet::new()).expect("collects").len(), 1);
    // The last import may still be cleaning up after itself; layers go when it has ended.
    wait_for("the old layer is gone", || node.entries("layers/sha256") == 1);
}

#[test]
fn removed_image_takes_its_layers_unless_another_or_a_function_needs_them() {
    let node = Node::new();
    let shell = node.shell();
    let digest = node.import(&shell, None).expect("imports").digest;
    node.import(&shell, Some("alias:1")).expect("imports");
    let in_use = HashSet::from([Digest::parse(&digest).expect("a digest")]);
    let nobody = HashSet::new();

    node.store.remove("alias:1", &in_use).expect("one of two names");
    let refused = node.store.remove("shell:1", &in_use).expect_err("in use").to_string();
    assert!(refused.contains("in use"), "{refused}");
    assert!(node.store.remove(&digest, &in_use).is_err());
    assert_eq!(node.entries("layers/sha256"), 1);

    node.store.remove("shell:1", &nobody).expect("removed");
    assert!(matches!(node.store.find(&digest), Err(ImageError::NotFound(_))));
    assert!(matches!(node.store.remove("shell:1", &nobody), Err(ImageError::NotFound(_))));
    node.assert_empty();
}

#[test]
fn store_is_the_same_after_it_is_opened_again() {
    let node = Node::new();
    node.import(&node.shell(), None).expect("imports");
    let before = node.store.list().expect("lists");
    let images = node.path("data/images");
    // The import's own directory goes behind its answer.
    node.assert_nothing_staged();
    // What a power cut may leave.
    std::fs::create_dir_all(images.join("staging/import-0/layer-new/root/etc")).expect("made");
    std::fs::create_dir_all(images.join(format!("layers/sha256/{}/root", "a".repeat(64)))).expect("made");
    std::fs::write(images.join(format!("manifests/{}.json", "b".repeat(64))), "{}").expect("written");
    std::fs::write(images.join("refs.tmp"), "half").expect("written");

    let store = ImageStore::open(&node.path("data"), NEAP.into()).expect("opens");

    assert_eq!(store.list().expect("lists"), before);
    assert_eq!(
        (node.entries("layers/sha256"), node.entries("manifests"), node.entries("staging")),
        (1, 1, 0)
    );
}

#[test]
fn killed_worker_is_told_and_leaves_nothing() {
    let node = Node::new();
    let half = Stalling::half_of(&node.shell());
    let (send, _progress) = smol::channel::unbounded();

    let import = node.store.import(half, None, send);
    let error = smol::block_on(smol::future::or(import, async {
        kill(node.worker().await);
        std::future::pending().await
    }));

    let error = error.expect_err("killed").to_string();
    assert!(error.contains("signal: 9"), "{error}");
    node.assert_empty();
}

#[test]
fn dropped_import_kills_its_worker_and_leaves_nothing() {
    let node = Node::new();
    let half = Stalling::half_of(&node.shell());
    let (send, _progress) = smol::channel::unbounded();

    let import = async {
        let result = node.store.import(half, None, send).await;
        unreachable!("half an archive: {result:?}");
    };
    let pid = smol::block_on(smol::future::or(import, node.worker()));

    wait_for("the worker's end", || !Path::new(&format!("/proc/{pid}")).exists());
    node.assert_empty();
    node.import(&node.shell(), None).expect("and the next one works");
}

#[test]
fn concurrent_imports_of_one_layer_agree() {
    let node = Node::new();
    let archive = std::fs::read(node.shell()).expect("built");

    let digests: Vec<String> = std::thread::scope(|scope| {
        let imports: Vec<_> = (0..6)
            .map(|at| {
                let (store, archive) = (node.store.clone(), archive.clone());
                scope.spawn(move || {
                    let name = Reference::parse(&format!("copy:{at}")).expect("a reference");
                    let (send, _progress) = smol::channel::unbounded();
                    let import = store.import(smol::io::Cursor::new(archive), Some(name), send);
                    smol::block_on(import).expect("imports").digest
                })
            })
            .collect();
        imports.into_iter().map(|import| import.join().expect("no panic")).collect()
    });

    assert!(digests.iter().all(|digest| *digest == digests[0]));
    assert_eq!(node.store.list().expect("lists")[0].references.len(), 6);
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

    /// An OCI archive as a layout directory.
    fn unpacked(&self, archive: &Path) -> PathBuf {
        let layout = self.path("layout");
        std::fs::create_dir(&layout).expect("made");
        run(Command::new("tar").arg("-C").arg(&layout).arg("-xf").arg(archive));
        layout
    }

    fn tar(&self, layout: &Path, name: &str) -> PathBuf {
        let archive = self.path(name);
        run(Command::new("tar").arg("-C").arg(layout).arg("-cf").arg(&archive).arg("."));
        archive
    }

    fn blob_file(&self, layout: &Path, digest: &str) -> PathBuf {
        layout.join("blobs/sha256").join(&digest["sha256:".len()..])
    }

    fn blob(&self, layout: &Path, digest: &str) -> serde_json::Value {
        let text = std::fs::read(self.blob_file(layout, digest)).expect("a blob");
        serde_json::from_slice(&text).expect("JSON")
    }

    /// Its digest.
    fn add_blob(&self, layout: &Path, content: &[u8]) -> String {
        let temporary = self.path("blob");
        std::fs::write(&temporary, content).expect("written");
        let sum = run(Command::new("sha256sum").arg(&temporary));
        let digest = format!("sha256:{}", &sum[..64]);
        std::fs::rename(&temporary, self.blob_file(layout, &digest)).expect("moved");
        digest
    }

    fn entries(&self, below_images: &str) -> usize {
        std::fs::read_dir(self.path("data/images").join(below_images)).expect("there").count()
    }

    /// No image, and nothing of one.
    fn assert_empty(&self) {
        self.assert_nothing_staged();
        assert!(self.store.list().expect("lists").is_empty());
        assert_eq!((self.entries("layers/sha256"), self.entries("manifests")), (0, 0));
    }

    /// The process id of the worker that is importing into this node.
    async fn worker(&self) -> i32 {
        let images = self.path("data/images").display().to_string();
        loop {
            for entry in std::fs::read_dir("/proc").expect("Linux").flatten() {
                let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
                let line = String::from_utf8_lossy(&line);
                // The worker has begun when it has its first file.
                if line.contains("image-worker") && line.contains(&images) && self.spooled() {
                    return entry.file_name().to_string_lossy().parse().expect("a process id");
                }
            }
            smol::future::yield_now().await;
        }
    }

    fn spooled(&self) -> bool {
        let imports = std::fs::read_dir(self.path("data/images/staging")).expect("there").flatten();
        imports.flat_map(|import| std::fs::read_dir(import.path().join("archive"))).flatten().next().is_some()
    }

    /// The clean-up has its own thread, so this waits for it.
    fn assert_nothing_staged(&self) {
        let staging = self.path("data/images/staging");
        wait_for("an empty staging directory", || {
            std::fs::read_dir(&staging).expect("there").next().is_none()
        });
    }
}

/// Half an archive, and then nothing more, for ever.
struct Stalling(smol::io::Cursor<Vec<u8>>);

impl Stalling {
    fn half_of(archive: &Path) -> Self {
        let mut bytes = std::fs::read(archive).expect("there");
        bytes.truncate(bytes.len() / 2);
        Self(smol::io::Cursor::new(bytes))
    }
}

impl smol::io::AsyncRead for Stalling {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<std::io::Result<usize>> {
        match Pin::new(&mut self.0).poll_read(cx, buf) {
            Poll::Ready(Ok(0)) => Poll::Pending,
            other => other,
        }
    }
}

fn kill(pid: i32) {
    let pid = nix::unistd::Pid::from_raw(pid);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("it is there to be killed");
}

/// Everything about each file that an image decides.
const LIST: &str = r#"
    find . -mindepth 1 ! -type d -printf '%p %y %m %U:%G %s %T@ %n [%l]\n' | sort
    find . -mindepth 1 -type d -printf '%p %y %m %U:%G\n' | sort
    find . -type f -print0 | sort -z | xargs -0 sha256sum
"#;

fn listing(root: &Path) -> String {
    run(Command::new("sh").args(["-c", LIST]).env("LC_ALL", "C").current_dir(root))
}

/// The same of the image's layers, mounted in a namespace that goes with the command.
fn overlay_listing(image: &Image, node: &Node) -> String {
    let layers: Vec<String> = image.layers.iter().rev().map(|l| l.display().to_string()).collect();
    std::fs::create_dir(node.path("merged")).expect("made");
    let script = format!("mount -t overlay overlay -o \"$LOWER\" . && cd \"$PWD\" && {LIST}");
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-ec", &script]).env("LC_ALL", "C").current_dir(node.path("merged"));
    run(command.env("LOWER", format!("lowerdir={}", layers.join(":"))))
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
