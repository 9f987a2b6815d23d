//! The documents of an image as they are written: OCI's (image-spec manifest.md, image-index.md,
//! config.md), docker's of the same shape, and docker-save's own list.

use crate::image::ImageError;
use crate::image::limits::refuse;
use crate::image::platform::Platform;
use crate::model::{Digest, Reference};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

pub(super) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(super) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(super) const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub(super) const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
pub(super) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub(super) const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub(super) const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
pub(super) const LAYERS: [&str; 4] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
];

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    #[serde(default, skip_serializing)]
    pub(super) platform: Option<Platform>,
    #[serde(default, skip_serializing)]
    pub annotations: Option<BTreeMap<String, String>>,
}

impl Descriptor {
    pub fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        Self { media_type: media_type.to_owned(), digest, size, platform: None, annotations: None }
    }
}

/// What a registry is asked for.
pub fn manifest_types() -> String {
    [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST].join(", ")
}

#[derive(Deserialize)]
pub(super) struct Index {
    pub(super) manifests: Vec<Descriptor>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Manifest {
    pub(super) schema_version: u32,
    #[serde(default)]
    pub(super) media_type: String,
    pub(super) config: Descriptor,
    pub(super) layers: Vec<Descriptor>,
}

/// What an index points to: told apart by its keys, since old writers leave the media type out.
#[derive(Deserialize)]
pub(super) struct Shape {
    #[serde(default)]
    pub(super) manifests: Option<serde::de::IgnoredAny>,
    #[serde(default)]
    pub(super) config: Option<serde::de::IgnoredAny>,
    #[serde(default)]
    pub(super) layers: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
pub(super) struct Config {
    #[serde(flatten)]
    pub(super) platform: Platform,
    pub(super) rootfs: RootFs,
}

#[derive(Deserialize)]
pub(super) struct RootFs {
    #[serde(default)]
    pub(super) diff_ids: Option<Vec<Digest>>,
}

/// docker-save's manifest.json (moby, image/spec/v1.2.md, "Combined Image JSON + Filesystem Changeset Format").
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Saved {
    pub(super) config: String,
    #[serde(default)]
    pub(super) repo_tags: Option<Vec<String>>,
    #[serde(default)]
    pub(super) layers: Option<Vec<String>>,
}

pub const CONFIG: &str = "the image's configuration";

pub(super) fn parse<T: serde::de::DeserializeOwned>(text: &str, what: &str) -> Result<T, ImageError> {
    serde_json::from_str(text).map_err(|error| refuse(format!("{what} is malformed: {error}")))
}

pub(super) fn repo_tags(saved: &Saved) -> impl Iterator<Item = Reference> {
    saved.repo_tags.iter().flatten().filter_map(|tag| Reference::parse(tag).ok())
}

/// A bare tag (`1`, `latest`) is no name.
pub(super) fn whole_reference(label: &str) -> Option<Reference> {
    if label.contains(['/', ':']) { Reference::parse(label).ok() } else { None }
}

pub fn digest_of(bytes: &[u8]) -> Digest {
    Digest::from_sha256(ring::digest::digest(&ring::digest::SHA256, bytes).as_ref())
}
