//! Images: from an archive to verified, unpacked layers on disk, and which are there.
//!
//! Bytes from outside are handled in a child process, `neap image-worker`:
//!
//! ```text
//! archive ───────▶ worker: archive ▶ layout ▶ trust ▶ decompress ▶ tarball ▶ unpack ──▶ layers/
//! registry ▶ worker: fetch ▶ trust ▶ space ▶ blobs/ ─▶ worker: layout ▶ decompress ▶ … ──▶ layers/
//!                       then the daemon alone writes refs.json (store)
//! ```
//!
//! The two workers of a pull run at once: layers are unpacked while they come (`feed`).
//!
//! Every byte that is kept has been hashed: blobs against their names while they are spooled,
//! layers against their diff ids while they are unpacked.
//!
//! `pulls` decides when a registry is asked, `gc` what goes when the disk is full, `check` whether
//! what is here still is what came. Not here: HTTP and TLS (`registry::Transport` is given by the
//! wiring), mounting (`runtime`).

mod ahead;
mod archive;
mod behind;
mod blobs;
mod check;
mod confine;
mod decompress;
mod feed;
mod fetch;
mod gc;
mod hashed;
mod import;
mod job;
mod layers;
mod layout;
mod limits;
mod pace;
mod place;
mod platform;
mod pulls;
pub mod registry;
mod scrub;
mod space;
mod store;
mod tarball;
#[cfg(test)]
mod tests;
mod tree;
pub mod trust;
mod unpack;
mod work;
pub mod worker;

use crate::config::defaults;
use crate::config::images::{ImageLimits, Images, Trust};
use crate::model::api::{ImageDetail, ImageSummary, LayerDetail, Progress};
use crate::model::{Digest, Reference};
pub use gc::Goal;
pub use pulls::{Patience, Pull};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use store::{Directory, Record, Refs};
use trust::Trusted;

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("no image `{0}` on this node")]
    NotFound(String),
    /// What the worker found wrong, for people: names the entry and the way out.
    #[error("{0}")]
    Refused(String),
    /// Its worker died of it, more than once. Another try writes as much to flash and ends alike.
    #[error("{0}")]
    Deadly(String),
    /// The network or the registry: another try may end differently.
    #[error("{text}")]
    Later { text: String, after: Option<std::time::Duration> },
    /// Refused before anything was fetched.
    #[error("{text}")]
    NoSpace { text: String, missing_bytes: u64 },
    /// A blob that the manifest names is not there.
    #[error("the archive lacks {what} {digest}")]
    Lacks { what: &'static str, digest: Digest, bytes: u64 },
    #[error("{doing}")]
    Io {
        doing: String,
        #[source]
        source: std::io::Error,
    },
}

/// What the runtime needs of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Of the manifest for this machine's platform.
    pub digest: Digest,
    /// Unpacked layer directories, lowest first.
    pub layers: Vec<PathBuf>,
    pub config: ImageConfig,
}

/// OCI image-spec config.md, the parts that a container needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageConfig {
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    /// `K=V`
    pub env: Vec<String>,
    /// `user`, `uid`, `user:group`, `uid:gid`; empty: root.
    pub user: String,
    /// Empty: `/`.
    pub working_dir: String,
    pub stop_signal: Option<String>,
    pub labels: std::collections::BTreeMap<String, String>,
}

/// The `config` of an image's configuration, as tools write it: any of it may be null.
#[derive(Default, Deserialize)]
struct RawConfig {
    #[serde(default)]
    config: Option<RawInner>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RawInner {
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    user: Option<String>,
    working_dir: Option<String>,
    stop_signal: Option<String>,
    labels: Option<BTreeMap<String, String>>,
}

impl From<RawConfig> for ImageConfig {
    fn from(raw: RawConfig) -> Self {
        let raw = raw.config.unwrap_or_default();
        Self {
            entrypoint: raw.entrypoint.unwrap_or_default(),
            cmd: raw.cmd.unwrap_or_default(),
            env: raw.env.unwrap_or_default(),
            user: raw.user.unwrap_or_default(),
            working_dir: raw.working_dir.unwrap_or_default(),
            stop_signal: raw.stop_signal.filter(|signal| !signal.is_empty()),
            labels: raw.labels.unwrap_or_default(),
        }
    }
}

/// The images below `data_dir/images`; a handle, cheap to clone.
#[derive(Clone)]
pub struct ImageStore {
    inner: Arc<Inner>,
}

struct Inner {
    directory: Directory,
    exe: PathBuf,
    state: Mutex<State>,
    /// Archives received at once; more wait.
    slots: smol::lock::Semaphore,
    settings: Mutex<Arc<Settings>>,
    pulls: pulls::Pulls,
}

/// `[images]` and `[trust]`.
struct Settings {
    images: Images,
    trust: Trust,
}

struct State {
    refs: Refs,
    /// Imports under way: until there are none, nothing is collected.
    importing: usize,
}

impl ImageStore {
    /// Opens or creates; sweeps what a killed import left. `exe`: the neap binary, started as
    /// `neap image-worker`.
    pub fn open(data_dir: &Path, exe: PathBuf) -> Result<Self, ImageError> {
        let directory = Directory::new(data_dir.join("images"));
        directory.create()?;
        let refs = directory.read_refs()?;
        directory.collect(&refs)?;
        directory.sweep_staging(&[""])?;
        directory.blobs().sweep(false, &BTreeSet::new(), false)?;
        let state = Mutex::new(State { refs, importing: 0 });
        let slots = smol::lock::Semaphore::new(import::IMPORTS_MAX);
        let settings = Settings { images: defaults::images(), trust: defaults::trust() };
        let settings = Mutex::new(Arc::new(settings));
        let pulls = pulls::Pulls::default();
        Ok(Self { inner: Arc::new(Inner { directory, exe, state, slots, settings, pulls }) })
    }

    /// Takes `[images]` and `[trust]`; what is under way goes on by the old ones.
    pub fn configure(&self, images: &Images, trust: &Trust) {
        let new = Arc::new(Settings { images: images.clone(), trust: trust.clone() });
        *self.inner.settings.lock().unwrap_or_else(PoisonError::into_inner) = new;
    }

    /// Feeds `archive` (a tar stream: OCI layout, OCI archive or docker-save, plain, gzip or zstd)
    /// to a worker child; progress goes to `progress` as it comes, but for `Done` and `Error`,
    /// which are what this returns. `name` replaces the names that the archive carries. Cancelled
    /// by dropping: the child is killed and leaves nothing.
    pub async fn import(
        &self,
        archive: impl smol::io::AsyncRead + Unpin + Send,
        name: Option<Reference>,
        progress: smol::channel::Sender<Progress>,
    ) -> Result<ImageSummary, ImageError> {
        import::import(&self.inner, archive, name, progress).await
    }

    /// By reference, or by digest (`sha256:…`, also its first 12 or more hex digits).
    pub fn find(&self, name: &str) -> Result<Image, ImageError> {
        let state = self.inner.state();
        let record = self.inner.record(&resolve(&state.refs, name)?)?;
        self.inner.directory.image(&record)
    }

    /// The same for a manifest that names `reference`, if `[trust]` lets it be deployed.
    pub fn find_trusted(&self, reference: &Reference) -> Result<Image, ImageError> {
        let image = self.find(reference.as_str())?;
        self.check_trust(reference, &image.digest)?;
        Ok(image)
    }

    /// Whether `[trust]` lets the image run under this name.
    pub fn check_trust(&self, reference: &Reference, digest: &Digest) -> Result<(), ImageError> {
        let record = self.inner.record(digest)?;
        self.inner.policy().1.recall(reference, &record.decisions)
    }

    /// The same for a run by any of the names that `find` takes: by digest, the image must be
    /// good under one of its own names.
    pub fn check_run(&self, name: &str, digest: &Digest) -> Result<(), ImageError> {
        let state = self.inner.state();
        let named = Reference::parse(name).ok();
        let named =
            named.filter(|name| state.refs.references.contains_key(name.as_str()) || name.digest().is_some());
        let names: Vec<Reference> = match named {
            Some(name) => vec![name],
            None => {
                let own = state.refs.references.iter().filter(|(_, of)| *of == digest);
                own.filter_map(|(name, _)| Reference::parse(name).ok()).collect()
            }
        };
        drop(state);
        let mut last = Err(ImageError::Refused("[trust] refuses images without a name".to_owned()));
        if names.is_empty() && self.inner.settings().trust.others {
            last = Ok(());
        }
        for name in names {
            last = self.check_trust(&name, digest);
            if last.is_ok() {
                break;
            }
        }
        last
    }

    pub fn list(&self) -> Result<Vec<ImageSummary>, ImageError> {
        let state = self.inner.state();
        let digests = state.refs.images.keys().filter_map(|text| Digest::parse(text).ok());
        Ok(digests.map(|digest| self.inner.listed(&state.refs, &digest)).collect())
    }

    /// The same for one image.
    pub fn summary(&self, name: &str) -> Result<ImageSummary, ImageError> {
        let state = self.inner.state();
        Ok(self.inner.listed(&state.refs, &resolve(&state.refs, name)?))
    }

    pub fn show(&self, name: &str) -> Result<ImageDetail, ImageError> {
        let state = self.inner.state();
        let (summary, record) = self.inner.summary(&state.refs, &resolve(&state.refs, name)?)?;
        let config = self.inner.directory.image(&record)?.config;
        let layer =
            |l: store::StoredLayer| LayerDetail { diff_id: l.diff_id.as_str().to_owned(), bytes: l.bytes };
        Ok(ImageDetail {
            summary,
            trust: record.decisions.iter().map(trust::Decision::to_string).collect(),
            layers: record.layers.into_iter().map(layer).collect(),
            entrypoint: config.entrypoint,
            cmd: config.cmd,
            env: config.env,
            user: config.user,
            working_dir: config.working_dir,
            labels: config.labels,
        })
    }

    /// Removes a reference, or an image by digest with all its references; layers that nothing
    /// else needs go too, but never those of an image in `in_use`: taking its last reference, or
    /// the image itself, is refused.
    pub fn remove(&self, name: &str, in_use: &HashSet<Digest>) -> Result<(), ImageError> {
        let mut state = self.inner.state();
        let digest = resolve(&state.refs, name)?;
        let mut refs = state.refs.clone();
        match Reference::parse(name) {
            Ok(reference) if refs.references.remove(reference.as_str()).is_some() => {}
            _ => refs.references.retain(|_, of| *of != digest),
        }
        if !refs.references.values().any(|of| *of == digest) {
            if in_use.contains(&digest) {
                let text = format!("image {name} ({}) is in use by a function", digest.short());
                return Err(ImageError::Refused(text));
            }
            refs.images.remove(digest.as_str());
        }
        self.inner.commit(&mut state, refs)
    }

    /// Removes images without a name that are not in `in_use`: those whose name an import gave to
    /// another. Their digests.
    pub fn collect(&self, in_use: &HashSet<Digest>) -> Result<Vec<Digest>, ImageError> {
        let mut state = self.inner.state();
        let mut refs = state.refs.clone();
        let unnamed = |digest: &Digest| !refs.references.values().any(|of| of == digest);
        let digests = refs.images.keys().filter_map(|text| Digest::parse(text).ok());
        let gone: Vec<Digest> =
            digests.filter(|digest| unnamed(digest) && !in_use.contains(digest)).collect();
        for digest in &gone {
            refs.images.remove(digest.as_str());
        }
        self.inner.commit(&mut state, refs)?;
        Ok(gone)
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        // What it guards is replaced whole, after its commit: a panic elsewhere leaves it right.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settings(&self) -> Arc<Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What a worker is told of `[images]` and `[trust]`; reads the keys.
    fn policy(&self) -> (ImageLimits, Trusted) {
        let settings = self.settings();
        (settings.images.limits.clone(), Trusted::read(&settings.trust))
    }

    fn record(&self, digest: &Digest) -> Result<Record, ImageError> {
        self.directory.read_record(digest)?.ok_or_else(|| ImageError::NotFound(digest.to_string()))
    }

    fn summary(&self, refs: &Refs, digest: &Digest) -> Result<(ImageSummary, Record), ImageError> {
        let record = self.record(digest)?;
        Ok((described(refs, digest, Some(&record)), record))
    }

    /// One whose record can't be read is still there, to be removed or pulled again.
    fn listed(&self, refs: &Refs, digest: &Digest) -> ImageSummary {
        described(refs, digest, self.record(digest).ok().as_ref())
    }

    /// refs.json, then what it says, then what it no longer reaches.
    fn commit(self: &Arc<Self>, state: &mut State, refs: Refs) -> Result<(), ImageError> {
        if refs == state.refs {
            return Ok(());
        }
        self.directory.write_refs(&refs)?;
        state.refs = refs;
        if state.importing == 0 {
            self.directory.collect(&state.refs)?;
            work::empty_trash(self.clone());
        }
        Ok(())
    }
}

/// `None`: its record can't be read.
fn described(refs: &Refs, digest: &Digest, record: Option<&Record>) -> ImageSummary {
    let names = refs.references.iter().filter(|(_, of)| *of == digest);
    let layers = record.iter().flat_map(|record| &record.layers);
    let different: BTreeMap<_, _> = layers.map(|l| (&l.stored_as, l.bytes)).collect();
    ImageSummary {
        references: names.map(|(name, _)| name.clone()).collect(),
        digest: digest.as_str().to_owned(),
        platform: record.map_or_else(|| "damaged".to_owned(), |record| record.platform.clone()),
        bytes: different.values().sum(),
        imported: refs.images.get(digest.as_str()).map_or(crate::model::UnixMs(0), |entry| entry.imported),
        used_by: Vec::new(),
        pull: None,
    }
}

/// The digest of a known image by any of its names.
fn resolve(refs: &Refs, name: &str) -> Result<Digest, ImageError> {
    let missing = || ImageError::NotFound(name.chars().take(200).collect());
    if let Ok(reference) = Reference::parse(name) {
        if let Some(digest) = reference.digest() {
            // Of the image, or of an index that it was pulled through.
            let through = refs.references.get(reference.as_str()).cloned();
            let itself = refs.images.contains_key(digest.as_str()).then_some(digest);
            return itself.or(through).ok_or_else(missing);
        }
        if let Some(digest) = refs.references.get(reference.as_str()) {
            return Ok(digest.clone());
        }
    }
    let hex = name.strip_prefix("sha256:").unwrap_or(name);
    if hex.len() < 12 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(missing());
    }
    let start = format!("sha256:{}", hex.to_ascii_lowercase());
    let mut matching = refs.images.keys().filter(|digest| digest.starts_with(&start));
    match (matching.next().and_then(|digest| Digest::parse(digest).ok()), matching.next()) {
        (Some(digest), None) => Ok(digest),
        (Some(_), Some(_)) => {
            Err(ImageError::Refused(format!("`{name}` is the start of several images' digests")))
        }
        (None, _) => Err(missing()),
    }
}
