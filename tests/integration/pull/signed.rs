//! Whose images are taken: signatures in the registry and in archives, good, wrong and missing.
//!
//! Two makers: the sigstore crate, whose signatures and keys are kept in `tests/images/signed`
//! (with what made them), so that nothing of ours is between cosign's format and neap; and openssl
//! over cosign's documented payload, for names and digests that are new in each run. They are stored
//! as cosign stores them (specs/SIGNATURE_SPEC.md): an image manifest tagged `sha256-HEX.sig`.

use super::*;
use crate::support::registry::run;
use crate::support::{Node, have, privileged, shell_image, wait_for};
use neap::config::images::{Pattern, Rule};
use serde_json::json;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

struct Signer {
    dir: TestDir,
}

impl Signer {
    /// `kind`: `ec` or `ed25519`.
    fn new(kind: &str) -> Self {
        let dir = TestDir::new("signer");
        let algorithm: &[&str] = match kind {
            "ec" => &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"],
            _ => &["-algorithm", "ed25519"],
        };
        run(Command::new("openssl").arg("genpkey").args(algorithm).arg("-out").arg(dir.join("key")));
        run(Command::new("openssl")
            .args(["pkey", "-pubout", "-in"])
            .arg(dir.join("key"))
            .arg("-out")
            .arg(dir.join("pub")));
        Self { dir }
    }

    fn public(&self) -> PathBuf {
        self.dir.join("pub")
    }

    /// Base64.
    fn sign(&self, payload: &[u8], kind: &str) -> String {
        let file = self.dir.write("payload", payload);
        let mut command = Command::new("openssl");
        match kind {
            "ec" => command.args(["dgst", "-sha256", "-sign"]).arg(self.dir.join("key")),
            _ => command.args(["pkeyutl", "-sign", "-rawin", "-inkey"]).arg(self.dir.join("key")).arg("-in"),
        };
        let out = self.dir.join("signature");
        if kind == "ec" {
            command.arg("-out").arg(&out).arg(file);
        } else {
            command.arg(file).arg("-out").arg(&out);
        }
        run(&mut command);
        run(Command::new("openssl").args(["base64", "-A", "-in"]).arg(out)).trim().to_owned()
    }

    /// A layout with the signature of `digest` under `reference`, as cosign stores it.
    fn layout(&self, dir: &Path, reference: &str, digest: &str, kind: &str) -> PathBuf {
        let payload = payload(reference, digest);
        let signature = self.sign(payload.as_bytes(), kind);
        signature_layout(dir, &payload, &signature, digest)
    }
}

/// What cosign signs.
fn payload(reference: &str, digest: &str) -> String {
    json!({"critical": {"identity": {"docker-reference": reference},
        "image": {"docker-manifest-digest": digest}, "type": "cosign container image signature"},
        "optional": null})
    .to_string()
}

/// A layout that begins empty: blobs, and an index of what is named.
struct Layout(PathBuf);

impl Layout {
    fn new(dir: &Path) -> Self {
        let layout = dir.join(format!("layout-{:08x}", fastrand::u32(..)));
        std::fs::create_dir_all(layout.join("blobs/sha256")).expect("make a directory");
        std::fs::write(layout.join("oci-layout"), "{\"imageLayoutVersion\": \"1.0.0\"}").expect("write");
        Self(layout)
    }

    /// A blob's descriptor.
    fn blob(&self, media_type: &str, content: &[u8]) -> serde_json::Value {
        let sum = ring::digest::digest(&ring::digest::SHA256, content);
        let sum: String = sum.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        std::fs::write(self.0.join("blobs/sha256").join(&sum), content).expect("write");
        json!({"mediaType": media_type, "digest": format!("sha256:{sum}"), "size": content.len()})
    }

    fn index(&self, entries: &[(&serde_json::Value, &str)]) {
        let named = entries.iter().map(|(descriptor, name)| {
            let mut entry = (*descriptor).clone();
            entry["annotations"] = json!({"org.opencontainers.image.ref.name": name});
            entry
        });
        let index = json!({"schemaVersion": 2, "manifests": named.collect::<Vec<_>>()});
        std::fs::write(self.0.join("index.json"), index.to_string()).expect("write");
    }

    /// The manifest of a signature, as cosign writes it.
    fn signature(&self, payload: &str, signature: &str) -> serde_json::Value {
        let mut layer = self.blob("application/vnd.dev.cosign.simplesigning.v1+json", payload.as_bytes());
        layer["annotations"] = json!({"dev.cosignproject.cosign/signature": signature});
        let config = json!({"architecture": "", "os": "", "config": {}, "rootfs": {"type": "layers",
            "diff_ids": [layer["digest"]]}})
        .to_string();
        let config = self.blob("application/vnd.oci.image.config.v1+json", config.as_bytes());
        let manifest =
            json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer]});
        self.blob(MANIFEST, manifest.to_string().as_bytes())
    }

    fn archive(&self) -> Vec<u8> {
        let tar = Command::new("tar").arg("-C").arg(&self.0).args(["-cf", "-", "."]).output();
        tar.expect("run tar").stdout
    }
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

fn signature_layout(dir: &Path, payload: &str, signature: &str, digest: &str) -> PathBuf {
    let layout = Layout::new(dir);
    let manifest = layout.signature(payload, signature);
    layout.index(&[(&manifest, &tag(digest))]);
    layout.0
}

/// What the sigstore crate has made.
#[derive(serde::Deserialize)]
struct Sample {
    kind: String,
    public_key: String,
    signatures: Vec<Made>,
}

#[derive(serde::Deserialize)]
struct Made {
    case: String,
    payload: String,
    signature: String,
}

/// Of `plant.example/app`, and of others.
fn samples() -> Vec<Sample> {
    let text = include_str!("../../images/signed/signatures.json");
    serde_json::from_str(text).expect("the samples are JSON")
}

impl Sample {
    fn made(&self, case: &str) -> &Made {
        self.signatures.iter().find(|made| made.case == case).expect("every kind has every case")
    }

    fn key(&self, dir: &TestDir) -> PathBuf {
        dir.write(&format!("{}.pub", self.kind), &self.public_key)
    }
}

/// The image that they are on: an index of three platforms over one layer without a file, so that
/// its digest is the same wherever it is made.
fn signed_image(layout: &Layout) -> serde_json::Value {
    let layer = layout.blob("application/vnd.oci.image.layer.v1.tar", &[0; 1024]);
    let layer = layer["digest"].as_str().expect("a digest");
    let manifests = ["amd64", "arm64", "arm"].map(|architecture| {
        let config = format!(
            "{{\"architecture\":\"{architecture}\",\"os\":\"linux\",\"config\":{{\"Cmd\":[\"/nothing\"]}},\
             \"rootfs\":{{\"type\":\"layers\",\"diff_ids\":[\"{layer}\"]}}}}"
        );
        let config_type = "application/vnd.oci.image.config.v1+json";
        let config = layout.blob(config_type, config.as_bytes());
        let (config, bytes) = (config["digest"].as_str().expect("a digest"), config["size"].clone());
        let manifest = format!(
            "{{\"schemaVersion\":2,\"mediaType\":\"{MANIFEST}\",\"config\":{{\"mediaType\":\"{config_type}\",\
             \"digest\":\"{config}\",\"size\":{bytes}}},\"layers\":[{{\"mediaType\":\
             \"application/vnd.oci.image.layer.v1.tar\",\"digest\":\"{layer}\",\"size\":1024}}]}}"
        );
        let manifest = layout.blob(MANIFEST, manifest.as_bytes());
        let (digest, bytes) = (manifest["digest"].as_str().expect("a digest"), manifest["size"].clone());
        format!(
            "{{\"mediaType\":\"{MANIFEST}\",\"digest\":\"{digest}\",\"size\":{bytes},\
             \"platform\":{{\"architecture\":\"{architecture}\",\"os\":\"linux\"}}}}"
        )
    });
    let index_type = "application/vnd.oci.image.index.v1+json";
    let index = format!(
        "{{\"schemaVersion\":2,\"mediaType\":\"{index_type}\",\"manifests\":[{}]}}",
        manifests.join(",")
    );
    layout.blob(index_type, index.as_bytes())
}

#[test]
fn signatures_of_sigstores_own_making_are_verified_from_a_registry() {
    let test = "signatures_of_sigstores_own_making_are_verified_from_a_registry";
    if !have(test, "docker-registry") {
        return;
    }
    let mut site = Site::new("signed-sigstore");
    // The name is in what was signed; the registry's port is new each time.
    site.images.mirrors = vec![site.proxy.host()];
    let layout = Layout::new(site.dir.path());
    let image = signed_image(&layout);
    let digest = image["digest"].as_str().expect("a digest").to_owned();
    layout.index(&[(&image, "1")]);
    let copy = |source: String, name: &str| {
        let target = format!("docker://{}/{name}", site.registry.host());
        run(Command::new("skopeo")
            .args(["copy", "--all", "--preserve-digests", "--quiet", "--dest-tls-verify=false"])
            .args([source, target]));
    };
    copy(format!("oci:{}:1", layout.0.display()), "app:1");
    let samples = samples();
    let keys: Vec<PathBuf> = samples.iter().map(|sample| sample.key(&site.dir)).collect();
    let pull = |sample: &Sample, case: &str, key: &PathBuf| {
        let Made { payload, signature, .. } = sample.made(case);
        let signed = signature_layout(site.dir.path(), payload, signature, &digest);
        copy(format!("oci:{}:{}", signed.display(), tag(&digest)), &format!("app:{}", tag(&digest)));
        let images = vec![Pattern::parse("plant.example/*").expect("a pattern")];
        let trust = Trust { rules: vec![Rule { images, keys: vec![key.clone()] }], ..defaults::trust() };
        site.store.configure(&site.images, &trust);
        site.pull_from("plant.example", "app:1")
    };

    for (sample, (key, other)) in samples.iter().zip([(&keys[0], &keys[1]), (&keys[1], &keys[0])]) {
        for (case, key, why) in [
            ("good", other, "another key"),
            ("another image", key, "another image"),
            ("another name", key, "another name"),
        ] {
            let refused = pull(sample, case, key).expect_err("refused").to_string();
            let expected = format!("needs a cosign signature by {}", key.display());
            assert!(refused.contains(why) && refused.contains(&expected), "{}: {refused}", sample.kind);
        }
        pull(sample, "good", key).unwrap_or_else(|error| panic!("{}: {error}", sample.kind));
    }
    let shown = site.store.show("plant.example/app:1").expect("there").trust.join("\n");
    assert!(shown.contains("signed by") && shown.contains(&digest), "the decision is recorded: {shown}");
}

#[test]
fn signatures_of_sigstores_own_making_are_verified_from_an_archive_without_a_network() {
    let site = Offline::new("signed-sigstore-archive");
    for sample in &samples() {
        let key = sample.key(&site.dir);
        let archive = |made: Option<&Made>| {
            let layout = Layout::new(site.dir.path());
            let image = signed_image(&layout);
            let signature = made.map(|made| layout.signature(&made.payload, &made.signature));
            let tag = tag(image["digest"].as_str().expect("a digest"));
            let mut entries = vec![(&image, "plant.example/app:1")];
            entries.extend(signature.as_ref().map(|signature| (signature, tag.as_str())));
            layout.index(&entries);
            layout.archive()
        };
        let (unsigned, good) = (archive(None), archive(Some(sample.made("good"))));
        let (image, name) =
            (archive(Some(sample.made("another image"))), archive(Some(sample.made("another name"))));
        site.guard(vec![key]);

        for (archive, why) in [(unsigned, "no signature"), (image, "another image"), (name, "another name")] {
            let refused = site.import(archive).expect_err("refused").to_string();
            assert!(refused.contains(why) && refused.contains("needs a cosign signature"), "{refused}");
        }
        site.import(good).unwrap_or_else(|error| panic!("{}: {error}", sample.kind));
        let shown = site.store.show("plant.example/app:1").expect("there").trust.join("\n");
        assert!(
            shown.contains(&format!("signed by {}", site.dir.join(format!("{}.pub", sample.kind)).display())),
            "{shown}"
        );
    }
}

/// An image store without a registry.
struct Offline {
    dir: TestDir,
    store: ImageStore,
}

impl Offline {
    fn new(name: &str) -> Self {
        let dir = TestDir::new(name);
        let store = ImageStore::open(&dir.join("data"), NEAP.into()).expect("opens");
        Self { dir, store }
    }

    fn guard(&self, keys: Vec<PathBuf>) {
        let images = vec![Pattern::parse("plant.example/*").expect("a pattern")];
        let trust = Trust { rules: vec![Rule { images, keys }], ..defaults::trust() };
        self.store.configure(&defaults::images(), &trust);
    }

    fn import(&self, archive: Vec<u8>) -> Result<ImageSummary, ImageError> {
        let (send, _progress) = smol::channel::unbounded();
        smol::block_on(self.store.import(smol::io::Cursor::new(archive), None, send))
    }
}

fn tag(digest: &str) -> String {
    format!("{}.sig", digest.replace(':', "-"))
}

fn guard(site: &mut Site, pattern: &str, keys: &[&Signer]) {
    let images = vec![Pattern::parse(pattern).expect("a pattern")];
    site.trust.rules = vec![Rule { images, keys: keys.iter().map(|key| key.public()).collect() }];
    site.configure();
}

#[test]
fn only_images_signed_by_the_right_key_for_their_name_and_digest_are_pulled() {
    let test = "only_images_signed_by_the_right_key_for_their_name_and_digest_are_pulled";
    if !have(test, "docker-registry") {
        return;
    }
    for kind in ["ec", "ed25519"] {
        let mut site = Site::new("signed");
        let (right, wrong) = (Signer::new(kind), Signer::new(kind));
        site.push("app", &[100_000]);
        site.push("other", &[100_000]);
        let digest = site.pull("app:1").expect("nobody guards it yet").digest;
        let other = site.pull("other:1").expect("nobody guards it yet").digest;
        let host = site.proxy.host();
        guard(&mut site, &format!("{host}/*"), &[&right]);
        let name = format!("{host}/app");
        let push = |site: &Site, signer: &Signer, reference: &str, signed: &str| {
            let layout = signer.layout(site.dir.path(), reference, signed, kind);
            let tag = tag(&digest);
            site.registry
                .push(&format!("oci:{}:{}", layout.display(), self::tag(signed)), &format!("app:{tag}"));
        };

        let unsigned = site.refused("app:1");
        assert!(
            unsigned.contains("needs a cosign signature by") && unsigned.contains("no signature"),
            "{unsigned}"
        );
        // It is on the node since before: its deploy is refused all the same.
        let early = site.store.find_trusted(&site.name("app:1")).expect_err("refused").to_string();
        assert!(early.contains("came here without one"), "{early}");
        for (signer, reference, signed, why) in [
            (&wrong, name.as_str(), digest.as_str(), "another key"),
            (&right, "elsewhere.example/app", digest.as_str(), "another name"),
            (&right, name.as_str(), other.as_str(), "another image"),
        ] {
            push(&site, signer, reference, signed);
            let refused = site.refused("app:1");
            assert!(refused.contains(why), "{kind}: {refused}");
        }
        push(&site, &right, &name, &digest);
        site.pull("app:1").expect("rightly signed");

        let shown = site.store.show(site.name("app:1").as_str()).expect("there");
        assert!(shown.trust.iter().any(|line| line.contains("signed by")), "{:?}", shown.trust);
        site.store.find_trusted(&site.name("app:1")).expect("may be deployed");
        // Another image under its name, by digest, is not it.
        let smuggled = Reference::parse(&format!("{name}@{other}")).expect("a reference");
        assert!(site.store.find_trusted(&smuggled).is_err());
        // A key that is no more: what it signed is refused again.
        let next = Signer::new(kind);
        guard(&mut site, &format!("{host}/*"), &[&next]);
        assert!(site.store.find_trusted(&site.name("app:1")).is_err());
        // Nobody guards others, unless the default refuses them.
        site.trust.rules.clear();
        site.trust.others = false;
        site.configure();
        assert!(site.refused("other:1").contains("no rule in [trust]"));
    }
}

#[test]
fn archive_that_carries_its_signature_is_imported_without_a_network() {
    let test = "archive_that_carries_its_signature_is_imported_without_a_network";
    if !have(test, "docker-registry") {
        return;
    }
    let mut site = Site::new("signed-archive");
    let key = Signer::new("ec");
    guard(&mut site, "plant.example/*", &[&key]);
    let source = random_image(site.dir.path(), "app", &[50_000]);
    let layout = site.dir.join("app");
    let index = layout.join("index.json");
    let mut entries: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&index).expect("there")).expect("JSON");
    let digest = entries["manifests"][0]["digest"].as_str().expect("a digest").to_owned();
    assert!(source.starts_with("oci:"));
    let import = |site: &Site, name: &str| {
        let archive = site.dir.join("app.tar");
        run(Command::new("tar").arg("-C").arg(&layout).arg("-cf").arg(&archive).arg("."));
        let bytes = std::fs::read(archive).expect("there");
        let (send, _progress) = smol::channel::unbounded();
        let name = Reference::parse(name).expect("a reference");
        smol::block_on(site.store.import(smol::io::Cursor::new(bytes), Some(name), send))
    };

    let unsigned = import(&site, "plant.example/app:1").expect_err("refused").to_string();
    assert!(unsigned.contains("no signature"), "{unsigned}");
    let signature = key.layout(site.dir.path(), "plant.example/app", &digest, "ec");
    run(Command::new("cp").arg("-r").arg(signature.join("blobs")).arg(&layout));
    let signed: serde_json::Value =
        serde_json::from_slice(&std::fs::read(signature.join("index.json")).expect("there")).expect("JSON");
    entries["manifests"].as_array_mut().expect("a list").push(signed["manifests"][0].clone());
    std::fs::write(&index, entries.to_string()).expect("written");
    import(&site, "plant.example/app:1").expect("rightly signed");
    let renamed = import(&site, "plant.example/other:1").expect_err("refused").to_string();
    assert!(renamed.contains("another name"), "{renamed}");
    import(&site, "free.example/app:1").expect("nobody guards this name");
    assert!(site.store.find_trusted(&Reference::parse("plant.example/app:1").expect("good")).is_ok());
}

#[test]
fn only_archives_with_the_right_signature_are_taken_from_a_stick_by_a_node_without_a_network() {
    let test = "only_archives_with_the_right_signature_are_taken_from_a_stick_by_a_node_without_a_network";
    if !privileged(test) {
        return;
    }
    let (right, wrong) = (Signer::new("ed25519"), Signer::new("ed25519"));
    let stick = TestDir::new("signed-stick");
    let key = right.public().display().to_string();
    let config = format!(
        "[images]\nimport_dir = \"{}\"\n[[trust.rule]]\nimages = [\"plant.example/*\"]\nkeys = [\"{key}\"]\n",
        stick.path().display()
    );
    let name = "plant.example/team/shell:1";
    let function =
        format!("name = \"f\"\nimage = \"{name}\"\npull = \"never\"\ncommand = [\"echo\", \"here\"]\n");
    let mut node = Node::builder("signed-stick").config(&config).function("f.toml", &function).start();
    // The shell image under a guarded name, with a signature of it, or without.
    let write = |file: &str, signed: Option<(&Signer, &str)>| {
        let layout = Layout::new(node.dir().path());
        run(Command::new("tar").arg("-C").arg(&layout.0).arg("-xf").arg(shell_image()));
        let index = std::fs::read(layout.0.join("index.json")).expect("a layout");
        let mut index: serde_json::Value = serde_json::from_slice(&index).expect("JSON");
        let image = index["manifests"][0].take();
        let digest = image["digest"].as_str().expect("a digest").to_owned();
        let signature = signed.map(|(signer, repository)| {
            let payload = payload(repository, &digest);
            layout.signature(&payload, &signer.sign(payload.as_bytes(), "ed25519"))
        });
        let tag = tag(&digest);
        let mut entries = vec![(&image, name)];
        entries.extend(signature.as_ref().map(|signature| (signature, tag.as_str())));
        layout.index(&entries);
        // It appears at once, as a file that is moved there does.
        std::fs::rename(stick.write(&format!("{file}.part"), layout.archive()), stick.join(file))
            .expect("moved");
        digest
    };
    let result = |file: &str| -> serde_json::Value {
        let path = stick.join(format!("{file}.result"));
        wait_for(Duration::from_secs(120), "a result file", || {
            std::fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok())
        })
    };

    write("unsigned.tar", None);
    write("wrong-key.tar", Some((&wrong, "plant.example/team/shell")));
    write("wrong-name.tar", Some((&right, "plant.example/team/other")));
    for (file, why) in [
        ("unsigned.tar", "it has no signature"),
        ("wrong-key.tar", "by another key"),
        ("wrong-name.tar", "for another name, `plant.example/team/other`"),
    ] {
        let result = result(file);
        let error = result["error"].as_str().expect("refused");
        assert_eq!(result["ok"], false);
        assert!(error.contains(why) && error.contains(&key) && error.contains(name), "{file}: {error}");
    }
    assert_eq!(node.neap_json(&["image", "ls"]), json!([]), "nothing of them is here");
    assert_eq!(node.neap(&["invoke", "f"]).status.code(), Some(4));

    let digest = write("signed.tar", Some((&right, "plant.example/team/shell")));
    let taken = result("signed.tar");
    assert_eq!((&taken["ok"], &taken["node"]), (&json!(true), &json!("signed-stick")), "{taken}");
    wait_for(Duration::from_secs(120), "the function that waited", || {
        let output = node.neap(&["invoke", "f"]);
        (output.status.success() && output.stdout == b"here\n").then_some(())
    });
    let shown = node.neap_ok(&["image", "show", name]);
    assert!(shown.contains(&format!("signed by {key}, verified on {digest}")), "{shown}");
    node.restart();
    assert_eq!(node.neap_ok(&["invoke", "f"]), "here\n");

    // A key that is withdrawn is withdrawn from what is old, too: what runs goes on, and nothing
    // goes back to it.
    node.dir().write("functions.d/f.toml", function.replace("\"here\"", "\"there\""));
    node.neap_ok(&["reload"]);
    assert_eq!(node.neap_ok(&["invoke", "f"]), "there\n");
    let config = std::fs::read_to_string(node.config_file()).expect("there");
    std::fs::write(node.config_file(), config.replace(&key, &wrong.public().display().to_string()))
        .expect("written");
    let _ = node.neap(&["reload"]); // the file's function is one that may not be deployed any more
    let back = node.neap(&["rollback", "f"]);
    let said = String::from_utf8_lossy(&back.stderr).into_owned();
    assert!(!back.status.success() && said.contains("needs a cosign signature"), "{said}");
    assert_eq!(node.neap_ok(&["invoke", "f"]), "there\n");
}
