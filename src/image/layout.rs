//! Which image an archive holds: from its index to one manifest, its configuration and its layers.
//!
//! OCI layouts (image-spec image-layout.md) and docker-save archives, old and new; the new ones are
//! both at once, and then the OCI index counts, because it has the manifest that a registry has.
//! An old docker-save archive has no manifest: one is made, always the same for the same archive.
//!
//! Names: `io.containerd.image.name`, docker's RepoTags, and `org.opencontainers.image.ref.name`
//! when it is a whole reference. umoci and buildx put a bare tag there (`1`, `latest`), which names
//! nothing; podman would call it `localhost/latest`, neap asks for `--name`.

mod documents;

pub use documents::{CONFIG, Descriptor, digest_of, manifest_types};

use super::ImageError;
use super::archive::{Archive, Stored};
use super::limits::{Limits, refuse, show};
use super::platform::{Machine, Platform, mismatch};
use super::trust::{self, Signature};
use crate::model::{Digest, Reference};
use documents::{
    Config, DOCKER_CONFIG, DOCKER_LIST, DOCKER_MANIFEST, Index, LAYERS, Manifest, OCI_CONFIG, OCI_INDEX,
    OCI_LAYER, OCI_MANIFEST, Saved, Shape, parse, repo_tags, whole_reference,
};
use std::collections::{BTreeMap, BTreeSet};

/// Indexes in indexes: buildx nests one deep.
const NESTING_MAX: usize = 4;
/// Descriptors looked at in one archive.
const DESCRIPTORS_MAX: usize = 1000;
/// Signatures looked at in one archive; each has a payload of up to 64 KiB in memory.
const SIGNATURES_MAX: usize = 128;
/// Docker's bound; overlayfs takes 500 lower directories.
pub const LAYERS_MAX: usize = 127;

/// One image of an archive, everything about it checked but the layers' content.
#[derive(Debug)]
pub struct Chosen {
    pub digest: Digest,
    /// Of the indexes that led to it, outermost first: a signature may be on any of them.
    pub through: Vec<Digest>,
    pub manifest: String,
    pub config: String,
    pub platform: String,
    pub layers: Vec<Layer>,
    /// Normalised; empty: the archive names it not at all, or by a bare tag.
    pub names: BTreeSet<Reference>,
}

impl Chosen {
    /// Each layer with its chain id (image-spec config.md, "Layer ChainID").
    pub fn chain(&self) -> Vec<(&Layer, Digest)> {
        let mut chain: Option<Digest> = None;
        let mut all = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            let id = match &chain {
                None => layer.diff_id.clone(),
                Some(below) => digest_of(format!("{below} {}", layer.diff_id).as_bytes()),
            };
            chain = Some(id.clone());
            all.push((layer, id));
        }
        all
    }
}

#[derive(Debug)]
pub struct Layer {
    /// `None`: not fetched, since the store has the layer, or not yet.
    pub blob: Option<Stored>,
    pub digest: Digest,
    pub bytes: u64,
    /// As its media type says, which is an estimate's business only.
    pub compressed: bool,
    pub diff_id: Digest,
}

/// A layer as its manifest has it.
struct Blob {
    blob: Option<Stored>,
    digest: Digest,
    bytes: u64,
    compressed: bool,
}

/// `wanted`: the name that the operator gave; it also chooses among several images.
pub fn choose(
    archive: &Archive,
    machine: &Machine,
    wanted: Option<&Reference>,
    limits: &Limits,
) -> Result<Chosen, ImageError> {
    let reader = Reader { archive, machine, limits, fetched: false };
    let images = match (archive.find(b"index.json"), archive.find(b"manifest.json")) {
        (Some(index), saved) => reader.oci(index, saved)?,
        (None, Some(saved)) => reader.docker(saved)?,
        (None, None) => {
            let text =
                "the archive holds no image: neither index.json (OCI layout) nor manifest.json (docker save)";
            return Err(refuse(text));
        }
    };
    reader.pick(images, wanted)
}

/// The signatures that an archive carries.
pub fn signatures(archive: &Archive, limits: &Limits) -> Result<Vec<Signature>, ImageError> {
    let Some(stored) = archive.find(b"index.json") else { return Ok(Vec::new()) };
    let reader = Reader { archive, machine: &Machine::this(), limits, fetched: false };
    let index: Index = reader.json(stored, "index.json")?;
    reader.bound(index.manifests.len())?;
    let mut found = Vec::new();
    for descriptor in index.manifests.iter().filter(|descriptor| trust::is_signature(descriptor)) {
        if found.len() >= SIGNATURES_MAX {
            break; // what is behind them counts as missing
        }
        let manifest = reader.blob_text(descriptor, "the signatures' manifest")?;
        found.extend(trust::signatures(manifest.as_bytes(), |payload| {
            reader.blob_text(payload, "a signature's payload").map(String::into_bytes)
        })?);
    }
    Ok(found)
}

/// The image that `top`, a manifest or an index, leads to, out of what was fetched. Layers may be
/// missing; for a document that is, the error says which (`Lacks`).
pub fn choose_fetched(
    archive: &Archive,
    machine: &Machine,
    top: &Descriptor,
    name: &Reference,
    limits: &Limits,
) -> Result<Chosen, ImageError> {
    let reader = Reader { archive, machine, limits, fetched: true };
    reader.resolve_oci(std::slice::from_ref(top), BTreeSet::from([name.clone()]))
}

/// One of the images that an archive offers.
struct Offer {
    names: BTreeSet<Reference>,
    /// As the archive has them, for messages.
    labels: BTreeSet<String>,
    source: Source,
}

enum Source {
    /// The same image for several platforms, perhaps.
    Oci(Vec<Descriptor>),
    Docker(Saved),
}

/// A manifest below an index.
struct Found {
    platform: Platform,
    descriptor: Descriptor,
    through: Vec<Digest>,
}

struct Reader<'a> {
    archive: &'a Archive,
    machine: &'a Machine,
    limits: &'a Limits,
    /// From a registry: layers may be missing.
    fetched: bool,
}

impl Reader<'_> {
    fn pick(&self, mut offers: Vec<Offer>, wanted: Option<&Reference>) -> Result<Chosen, ImageError> {
        if offers.len() > 1
            && let Some(at) = offers.iter().position(|o| wanted.is_some_and(|w| o.names.contains(w)))
        {
            offers = vec![offers.swap_remove(at)];
        }
        let labels: BTreeSet<String> = offers.iter().flat_map(|o| o.labels.iter().cloned()).collect();
        let mut chosen: Option<Chosen> = None;
        for offer in offers {
            let next = self.resolve(offer)?;
            match &mut chosen {
                None => chosen = Some(next),
                // The same image under several names.
                Some(first) if first.digest == next.digest => first.names.extend(next.names),
                Some(_) => {
                    let labels =
                        labels.iter().take(20).map(|l| show(l.as_bytes())).collect::<Vec<_>>().join(", ");
                    let text = "the archive holds several images";
                    return Err(refuse(format!(
                        "{text} ({labels}): save one of them, or choose with --name"
                    )));
                }
            }
        }
        let mut chosen = chosen.ok_or_else(|| refuse("the archive holds no image"))?;
        if let Some(wanted) = wanted {
            if wanted.digest().is_some_and(|d| d != chosen.digest && !chosen.through.contains(&d)) {
                return Err(refuse(format!("`{wanted}` names another image: this one is {}", chosen.digest)));
            }
            chosen.names = BTreeSet::from([wanted.clone()]);
        }
        if chosen.names.is_empty() {
            let label = labels.first().map(|l| format!(" but `{}`", show(l.as_bytes()))).unwrap_or_default();
            return Err(refuse(format!(
                "the archive names its image nothing{label}: give it one with --name NAME:TAG"
            )));
        }
        Ok(chosen)
    }

    fn oci(&self, index: &Stored, saved: Option<&Stored>) -> Result<Vec<Offer>, ImageError> {
        let mut index: Index = self.json(index, "index.json")?;
        self.bound(index.manifests.len())?;
        index.manifests.retain(|descriptor| !trust::is_signature(descriptor));
        let mut groups: BTreeMap<BTreeSet<String>, Vec<Descriptor>> = BTreeMap::new();
        for descriptor in index.manifests {
            let annotation = |key: &str| descriptor.annotations.as_ref().and_then(|a| a.get(key)).cloned();
            let full = annotation("io.containerd.image.name");
            // The tag alone stands beside it.
            let label = full.or_else(|| annotation("org.opencontainers.image.ref.name"));
            groups.entry(label.into_iter().collect()).or_default().push(descriptor);
        }
        let mut offers: Vec<Offer> = groups
            .into_iter()
            .map(|(labels, descriptors)| Offer {
                names: labels.iter().filter_map(|label| whole_reference(label)).collect(),
                labels,
                source: Source::Oci(descriptors),
            })
            .collect();
        // docker save before its 25th release with the OCI layout beside it named nothing there.
        if let (Some(saved), [offer]) = (saved, &mut offers[..])
            && offer.names.is_empty()
        {
            let saved: Vec<Saved> = self.json(saved, "manifest.json")?;
            offer.names.extend(saved.iter().flat_map(repo_tags));
        }
        Ok(offers)
    }

    fn docker(&self, saved: &Stored) -> Result<Vec<Offer>, ImageError> {
        let images: Vec<Saved> = self.json(saved, "manifest.json")?;
        self.bound(images.len())?;
        let offer = |saved: Saved| Offer {
            names: repo_tags(&saved).collect(),
            labels: saved.repo_tags.iter().flatten().cloned().collect(),
            source: Source::Docker(saved),
        };
        Ok(images.into_iter().map(offer).collect())
    }

    fn resolve(&self, offer: Offer) -> Result<Chosen, ImageError> {
        match offer.source {
            Source::Oci(descriptors) => self.resolve_oci(&descriptors, offer.names),
            Source::Docker(saved) => self.resolve_docker(&saved, offer.names),
        }
    }

    fn resolve_oci(
        &self,
        descriptors: &[Descriptor],
        names: BTreeSet<Reference>,
    ) -> Result<Chosen, ImageError> {
        let mut manifests = Vec::new();
        self.flatten(descriptors, &[], &mut manifests)?;
        let mut present = Vec::new();
        let mut best: Option<(usize, Found)> = None;
        for found in manifests {
            let platform = found.platform.clone();
            // Attestations that buildx stores beside the images.
            if platform.os == "unknown" {
                continue;
            }
            if let Some(rank) = self.machine.rank(&platform)
                && best.as_ref().is_none_or(|(r, _)| rank < *r)
            {
                best = Some((rank, found));
            }
            present.push(platform);
        }
        let (_, found) = best.ok_or_else(|| refuse(mismatch(self.machine, &present)))?;
        let Found { descriptor, through, .. } = found;
        let text = self.blob_text(&descriptor, "the manifest")?;
        let manifest: Manifest = parse(&text, "the manifest")?;
        if ![OCI_CONFIG, DOCKER_CONFIG, ""].contains(&manifest.config.media_type.as_str()) {
            let kind = show(manifest.config.media_type.as_bytes());
            return Err(refuse(format!("`{}` is no container image, but `{kind}`", descriptor.digest)));
        }
        let config = self.blob_text(&manifest.config, CONFIG)?;
        let mut blobs = Vec::new();
        for layer in &manifest.layers {
            let kind = layer.media_type.as_str();
            let base =
                kind.strip_suffix("+gzip").or(kind.strip_suffix("+zstd")).or(kind.strip_suffix(".gzip"));
            let base = base.or(kind.strip_suffix(".zstd")).unwrap_or(kind);
            if !LAYERS.contains(&base) {
                return Err(refuse(format!(
                    "layer {} is of the unknown type `{}`",
                    layer.digest,
                    show(kind.as_bytes())
                )));
            }
            let blob = match self.blob(layer, "layer") {
                Ok(stored) => Some(stored.clone()),
                Err(ImageError::Lacks { .. }) if self.fetched => None,
                Err(error) => return Err(error),
            };
            blobs.push(Blob {
                blob,
                digest: layer.digest.clone(),
                bytes: layer.size,
                compressed: base != kind,
            });
        }
        let mut chosen = self.check(descriptor.digest, text, config, blobs, names)?;
        chosen.through = through;
        Ok(chosen)
    }

    /// The manifests below `descriptors`, each with its platform.
    fn flatten(
        &self,
        descriptors: &[Descriptor],
        through: &[Digest],
        manifests: &mut Vec<Found>,
    ) -> Result<(), ImageError> {
        if through.len() > NESTING_MAX {
            return Err(refuse(format!("the index is nested more than {NESTING_MAX} deep")));
        }
        for descriptor in descriptors {
            self.bound(manifests.len() + 1)?;
            let found =
                |platform| Found { platform, descriptor: descriptor.clone(), through: through.to_vec() };
            let present = self.archive.blob(&descriptor.digest).is_some();
            match (&descriptor.platform, present) {
                // Archives of several platforms may carry some of them only.
                (Some(platform), false) => {
                    let chosen = self.machine.rank(platform).is_some();
                    if chosen {
                        self.blob(descriptor, "the manifest")?;
                    }
                    manifests.push(found(platform.clone()));
                    continue;
                }
                (None, false) => {
                    self.blob(descriptor, "the manifest")?;
                }
                (_, true) => {}
            }
            match descriptor.media_type.as_str() {
                OCI_MANIFEST | OCI_INDEX | DOCKER_MANIFEST | DOCKER_LIST | "" => {}
                other => {
                    let other = show(other.as_bytes());
                    return Err(refuse(format!("`{}` is of the unknown type `{other}`", descriptor.digest)));
                }
            }
            let text = self.blob_text(descriptor, "the manifest")?;
            let shape: Shape = parse(&text, "the manifest")?;
            match (shape.manifests.is_some(), shape.config.is_some() && shape.layers.is_some()) {
                (true, false) => {
                    let index: Index = parse(&text, "the index")?;
                    self.bound(index.manifests.len() + manifests.len())?;
                    let through = [through, std::slice::from_ref(&descriptor.digest)].concat();
                    self.flatten(&index.manifests, &through, manifests)?;
                }
                (false, true) => {
                    let platform = match &descriptor.platform {
                        Some(platform) => platform.clone(),
                        None => self.platform_of(&text)?,
                    };
                    manifests.push(found(platform));
                }
                // Both at once is how one parser is made to see another image than the next.
                _ => {
                    return Err(refuse(format!(
                        "`{}` is neither a manifest nor an index",
                        descriptor.digest
                    )));
                }
            }
        }
        Ok(())
    }

    fn platform_of(&self, manifest: &str) -> Result<Platform, ImageError> {
        let manifest: Manifest = parse(manifest, "the manifest")?;
        let config: Config = parse(&self.blob_text(&manifest.config, CONFIG)?, CONFIG)?;
        Ok(config.platform)
    }

    fn resolve_docker(&self, saved: &Saved, names: BTreeSet<Reference>) -> Result<Chosen, ImageError> {
        let find = |name: &str, what: &str| {
            let found = self.archive.find(name.trim_start_matches("./").as_bytes());
            found.ok_or_else(|| refuse(format!("the archive lacks {what} `{}`", show(name.as_bytes()))))
        };
        let stored = find(&saved.config, "the image's configuration")?;
        // Its name is its digest, which is what docker calls the image id.
        if let Some(hex) = saved.config.strip_suffix(".json")
            && hex.len() == 64
            && hex != stored.digest.hex()
        {
            return Err(refuse(format!(
                "`{}` is damaged: its bytes are {}",
                show(saved.config.as_bytes()),
                stored.digest
            )));
        }
        let config = self.archive.text(stored, CONFIG, self.limits.json_bytes)?;
        let mut blobs = Vec::new();
        for name in saved.layers.iter().flatten() {
            let stored = find(name, "the layer")?.clone();
            let (digest, bytes) = (stored.digest.clone(), stored.bytes);
            blobs.push(Blob { blob: Some(stored), digest, bytes, compressed: false });
        }
        let manifest = Manifest {
            schema_version: 2,
            media_type: OCI_MANIFEST.to_owned(),
            config: Descriptor::new(OCI_CONFIG, stored.digest.clone(), stored.bytes),
            layers: blobs
                .iter()
                .map(|blob| Descriptor::new(OCI_LAYER, blob.digest.clone(), blob.bytes))
                .collect(),
        };
        let manifest = serde_json::to_string(&manifest).expect("strings and numbers serialise");
        let digest = digest_of(manifest.as_bytes());
        self.check(digest, manifest, config, blobs, names)
    }

    /// What both kinds have in common: the configuration fits the machine and the layers.
    fn check(
        &self,
        digest: Digest,
        manifest: String,
        config: String,
        blobs: Vec<Blob>,
        names: BTreeSet<Reference>,
    ) -> Result<Chosen, ImageError> {
        let parsed: Config = parse(&config, CONFIG)?;
        if self.machine.rank(&parsed.platform).is_none() {
            return Err(refuse(mismatch(self.machine, &[parsed.platform])));
        }
        let _: super::RawConfig = parse(&config, CONFIG)?;
        let diff_ids = parsed.rootfs.diff_ids.unwrap_or_default();
        if diff_ids.len() != blobs.len() {
            let (listed, there) = (diff_ids.len(), blobs.len());
            return Err(refuse(format!("the configuration lists {listed} layers, the manifest {there}")));
        }
        if blobs.is_empty() || blobs.len() > LAYERS_MAX {
            return Err(refuse(format!("the image has {} layers; 1 to {LAYERS_MAX} are taken", blobs.len())));
        }
        let layer = |(blob, diff_id): (Blob, Digest)| {
            let Blob { blob, digest, bytes, compressed } = blob;
            Layer { blob, digest, bytes, compressed, diff_id }
        };
        let layers = blobs.into_iter().zip(diff_ids).map(layer).collect();
        let platform = parsed.platform.to_string();
        Ok(Chosen { digest, through: Vec::new(), manifest, config, platform, layers, names })
    }

    fn blob(&self, descriptor: &Descriptor, what: &'static str) -> Result<&Stored, ImageError> {
        let digest = &descriptor.digest;
        let stored = self.archive.blob(digest).ok_or_else(|| ImageError::Lacks {
            what,
            digest: digest.clone(),
            bytes: descriptor.size,
        })?;
        if stored.bytes != descriptor.size {
            let (is, said) = (stored.bytes, descriptor.size);
            return Err(refuse(format!("{what} {digest} has {is} bytes, its descriptor says {said}")));
        }
        Ok(stored)
    }

    fn blob_text(&self, descriptor: &Descriptor, what: &'static str) -> Result<String, ImageError> {
        self.archive.text(self.blob(descriptor, what)?, what, self.limits.json_bytes)
    }

    fn json<T: serde::de::DeserializeOwned>(&self, stored: &Stored, what: &str) -> Result<T, ImageError> {
        parse(&self.archive.text(stored, what, self.limits.json_bytes)?, what)
    }

    fn bound(&self, descriptors: usize) -> Result<(), ImageError> {
        if descriptors > DESCRIPTORS_MAX {
            return Err(refuse(format!("the archive lists more than {DESCRIPTORS_MAX} manifests")));
        }
        Ok(())
    }
}
