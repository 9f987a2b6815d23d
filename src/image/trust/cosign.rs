//! cosign's signatures: an image manifest beside the image, tagged `sha256-HEX.sig`, whose layers
//! are payloads and whose annotations are the signatures (cosign, specs/SIGNATURE_SPEC.md).
//!
//! The payload is Red Hat's "simple signing" JSON (containers/image,
//! docs/containers-signature.5.md): which repository, which digest.

use super::Key;
use crate::image::ImageError;
use crate::image::layout::Descriptor;
use crate::image::limits::{refuse, show};
use crate::model::{Digest, Reference};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

const PAYLOAD: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
const ANNOTATION: &str = "dev.cosignproject.cosign/signature";
const TYPE: &str = "cosign container image signature";
/// In an archive that `cosign save` wrote.
const KIND: &str = "kind";
const KIND_SIGNATURES: &str = "dev.cosignproject.cosign/sigs";
/// A payload has 300 bytes; optional claims make it a few thousand.
pub const PAYLOAD_BYTES_MAX: u64 = 64 * 1024;
/// More than one for each key is rare; an attacker must not buy time with thousands.
const SIGNATURES_MAX: usize = 64;

/// The tag that signatures of `digest` have.
pub fn tag(digest: &Digest) -> String {
    format!("sha256-{}.sig", digest.hex())
}

/// Whether an archive's index entry is signatures and no image.
pub fn is_signature(descriptor: &Descriptor) -> bool {
    let Some(annotations) = &descriptor.annotations else { return false };
    let named = |label: &String| {
        let tag = label.rsplit([':', '/']).next().unwrap_or(label);
        let hex = tag.strip_prefix("sha256-").and_then(|rest| rest.strip_suffix(".sig"));
        hex.is_some_and(|hex| Digest::parse(&format!("sha256:{hex}")).is_ok())
    };
    annotations.get(KIND).is_some_and(|kind| kind == KIND_SIGNATURES)
        || annotations.get("org.opencontainers.image.ref.name").is_some_and(named)
}

/// A signature that nobody has looked at yet.
#[derive(Debug)]
pub struct Signature {
    payload: Vec<u8>,
    signature: Vec<u8>,
}

/// Those of one signature manifest. `payload`: reads a blob, verified against its descriptor.
pub fn signatures(
    manifest: &[u8],
    mut payload: impl FnMut(&Descriptor) -> Result<Vec<u8>, ImageError>,
) -> Result<Vec<Signature>, ImageError> {
    #[derive(Deserialize)]
    struct Manifest {
        layers: Vec<Descriptor>,
    }
    let manifest: Manifest = serde_json::from_slice(manifest)
        .map_err(|error| refuse(format!("the signatures' manifest is malformed: {error}")))?;
    let mut found = Vec::new();
    for layer in manifest.layers.iter().filter(|layer| layer.media_type == PAYLOAD).take(SIGNATURES_MAX) {
        let annotation = layer.annotations.as_ref().and_then(|a| a.get(ANNOTATION));
        let Some(signature) = annotation.and_then(|text| STANDARD.decode(text.trim()).ok()) else { continue };
        if layer.size <= PAYLOAD_BYTES_MAX {
            found.push(Signature { payload: payload(layer)?, signature });
        }
    }
    Ok(found)
}

#[derive(Deserialize)]
struct Payload {
    critical: Critical,
}

#[derive(Deserialize)]
struct Critical {
    identity: Identity,
    image: Image,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct Identity {
    #[serde(rename = "docker-reference")]
    reference: String,
}

#[derive(Deserialize)]
struct Image {
    #[serde(rename = "docker-manifest-digest")]
    digest: Digest,
}

impl Signature {
    /// The key that made it and the digest that it is on; else why it counts for nothing.
    pub fn verify<'k>(
        &self,
        reference: &Reference,
        digests: &[Digest],
        keys: &'k [Key],
    ) -> Result<(&'k Key, Digest), String> {
        // First the key: what nobody trusted has signed is not even read.
        let key = keys.iter().find(|key| key.verifies(&self.payload, &self.signature));
        let key = key.ok_or("a signature is by another key, or its payload was changed")?;
        let payload: Payload = serde_json::from_slice(&self.payload)
            .map_err(|error| format!("a signature's payload is malformed: {error}"))?;
        let Critical { identity, image, kind } = payload.critical;
        if kind != TYPE {
            return Err(format!("a signature is of the unknown type `{}`", show(kind.as_bytes())));
        }
        if !digests.contains(&image.digest) {
            return Err(format!("a signature is for another image, {}", image.digest));
        }
        // cosign has Docker Hub's old name.
        let name = match identity.reference.strip_prefix("index.docker.io/") {
            Some(rest) => format!("docker.io/{rest}"),
            None => identity.reference,
        };
        let same = Reference::parse(&name).is_ok_and(|r| r.repository() == reference.repository());
        if !same {
            return Err(format!("a signature is for another name, `{}`", show(name.as_bytes())));
        }
        Ok((key, image.digest))
    }
}
