//! Whose images are taken: signatures in the registry and in archives, good, wrong and missing.
//!
//! The signatures are made by openssl over cosign's documented payload, and stored as cosign
//! stores them (specs/SIGNATURE_SPEC.md): an image manifest tagged `sha256-HEX.sig`.

use super::*;
use crate::support::have;
use crate::support::registry::run;
use neap::config::images::{Pattern, Rule};
use serde_json::json;
use std::path::Path;
use std::process::Command;

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
        let payload = json!({"critical": {"identity": {"docker-reference": reference},
            "image": {"docker-manifest-digest": digest}, "type": "cosign container image signature"},
            "optional": null})
        .to_string();
        let signature = self.sign(payload.as_bytes(), kind);
        let layout = dir.join(format!("signature-{:08x}", fastrand::u32(..)));
        std::fs::create_dir_all(layout.join("blobs/sha256")).expect("make a directory");
        let blob = |content: &str| {
            let file = layout.join("blob");
            std::fs::write(&file, content).expect("write");
            let sum = run(Command::new("sha256sum").arg(&file))[..64].to_owned();
            std::fs::rename(file, layout.join("blobs/sha256").join(&sum)).expect("rename");
            json!({"digest": format!("sha256:{sum}"), "size": content.len()})
        };
        let with = |mut descriptor: serde_json::Value, media_type: &str| {
            descriptor["mediaType"] = media_type.into();
            descriptor
        };
        let mut layer = with(blob(&payload), "application/vnd.dev.cosign.simplesigning.v1+json");
        layer["annotations"] = json!({"dev.cosignproject.cosign/signature": signature});
        let config = json!({"architecture": "", "os": "", "config": {}, "rootfs": {"type": "layers",
            "diff_ids": [layer["digest"]]}})
        .to_string();
        let config = with(blob(&config), "application/vnd.oci.image.config.v1+json");
        let manifest_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest =
            json!({"schemaVersion": 2, "mediaType": manifest_type, "config": config, "layers": [layer]});
        let mut entry = with(blob(&manifest.to_string()), manifest_type);
        entry["annotations"] = json!({"org.opencontainers.image.ref.name": tag(digest)});
        let index = json!({"schemaVersion": 2, "manifests": [entry]});
        std::fs::write(layout.join("index.json"), index.to_string()).expect("write");
        std::fs::write(layout.join("oci-layout"), "{\"imageLayoutVersion\": \"1.0.0\"}").expect("write");
        layout
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
