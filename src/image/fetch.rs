//! The first half of a pull: from a registry to verified blobs on disk, and whether the image may
//! be taken at all, before its layers are.
//!
//! ```text
//! manifest ▶ (index ▶ manifest) ▶ configuration ▶ signatures ▶ space ▶ layers that are not here
//! ```
//!
//! Layers come one after the other, in the order in which they are unpacked, over one connection:
//! each is of use as soon as it is here, and a link that is cut has one layer half done, not six.
//!
//! Mirrors are asked in order, then the image's own registry. A blob that breaks off goes on
//! where it stopped, at once while bytes come, with growing waits when none do; after some waits
//! without a byte this process ends and the daemon decides when to go on.

mod layer;

use super::ImageError;
use super::archive::Archive;
use super::blobs::{Blobs, Part};
use super::feed::Came;
use super::job::Job;
use super::layout::{self, Chosen, Descriptor, digest_of};
use super::limits::{Limits, refuse};
use super::pace::Pace;
use super::platform::Machine;
use super::registry::{self, DockerConfig, Registry, Transport, Trouble};
use super::space::{Need, Wanted};
use super::store::Directory;
use super::trust::{self, Decision};
use super::worker::{Line, open_directory};
use crate::model::api::Progress;
use crate::model::{Clock, Digest, Reference, SystemClock};
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::time::{Duration, Instant};

/// Waits without a byte before this attempt is given up: 1, 2, 4, 8 seconds.
const TRIES_MAX: u32 = 4;
/// A server that wants a longer wait gets it without a process that waits with it.
const WAIT_MAX: Duration = Duration::from_secs(30);
const PROGRESS_EVERY: Duration = Duration::from_millis(250);
/// Who unpacks hears of this much at once.
const CAME_BYTES: u64 = 512 * 1024;

/// What the second half needs to know, before layers come.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Fetched {
    pub top: Descriptor,
    /// Manifests and configuration.
    pub documents: Vec<Digest>,
    pub layers: Vec<Digest>,
    pub decision: Decision,
}

impl Fetched {
    pub fn blobs(&self) -> impl Iterator<Item = &Digest> {
        self.documents.iter().chain(&self.layers)
    }
}

pub fn fetch(
    directory: &Directory,
    job: &Job,
    transport: &dyn Transport,
    say: &mut dyn FnMut(Line),
) -> Result<(), ImageError> {
    let name = job.name.as_ref().ok_or_else(|| refuse("a pull without a name"))?;
    let limits = Limits::of(&job.limits);
    let blobs = directory.blobs();
    let mut fetch = Fetch {
        blobs: &blobs,
        sources: sources(job, name, transport)?,
        limits: &limits,
        at: 0,
        tries: Tries::default(),
        pace: Pace::new(job.source.bandwidth),
        progress: Shown { say, bytes: 0, of: 0, last: None, told: 0 },
        verified: Vec::new(),
        kept_at: Instant::now(),
    };
    let (top, archive, documents) = fetch.documents(name)?;
    let chosen = layout::choose_fetched(&archive, &Machine::this(), &top, name, &limits)?;
    let decision = fetch.decide(job, name, &chosen)?;
    let layers = missing_layers(directory, &chosen)?;
    let digests = layers.iter().map(|layer| layer.digest.clone()).collect();
    // Told first: room for the rest is not made by removing what is here of it.
    fetch.progress.came(Came::Chosen(Box::new(Fetched { top, documents, layers: digests, decision })));
    fetch.check_space(directory, &layers)?;
    let fetched = fetch.layers(directory, &layers);
    // Unpacked at once, they are removed soon: a power cut in between may cost them.
    if fetched.is_err() || !job.ahead {
        fetch.keep()?;
    }
    fetched
}

/// Mirrors, then the registry itself.
fn sources<'a>(
    job: &'a Job,
    name: &Reference,
    transport: &'a dyn Transport,
) -> Result<Vec<Registry<'a>>, ImageError> {
    let docker = match &job.source.docker_config {
        Some(path) => DockerConfig::read(path)?,
        None => DockerConfig::default(),
    };
    let own = name.registry();
    let mut hosts: Vec<&str> = job.source.mirrors.iter().map(String::as_str).collect();
    hosts.retain(|host| *host != own);
    hosts.push(own);
    let open = |host: &str| {
        let credential = docker.credential(host)?;
        Registry::new(transport, &job.source.insecure, host, own, name.path(), credential)
            .map_err(|trouble| refuse(trouble.to_string()))
    };
    hosts.into_iter().map(open).collect()
}

#[derive(Clone, Debug)]
struct Layer {
    digest: Digest,
    bytes: u64,
    compressed: bool,
}

/// Each once: an image may have a layer twice.
fn missing_layers(directory: &Directory, chosen: &Chosen) -> Result<Vec<Layer>, ImageError> {
    let mut missing: Vec<Layer> = Vec::new();
    for (layer, chain_id) in chosen.chain() {
        let there = directory.find_layer(&layer.diff_id, &chain_id)?.is_some();
        if !there && missing.iter().all(|known| known.digest != layer.digest) {
            let digest = layer.digest.clone();
            missing.push(Layer { digest, bytes: layer.bytes, compressed: layer.compressed });
        }
    }
    Ok(missing)
}

struct Fetch<'a> {
    blobs: &'a Blobs,
    sources: Vec<Registry<'a>>,
    limits: &'a Limits,
    /// The source that answered last: it is asked first.
    at: usize,
    tries: Tries,
    pace: Pace,
    progress: Shown<'a>,
    /// Whole, but for a power cut.
    verified: Vec<Part>,
    kept_at: Instant,
}

impl Fetch<'_> {
    /// Manifest, index and configuration: as few as it takes to choose this machine's image.
    fn documents(&mut self, name: &Reference) -> Result<(Descriptor, Archive, Vec<Digest>), ImageError> {
        let pinned = name.digest();
        let wanted = match (&pinned, name.tag()) {
            (Some(digest), _) => digest.to_string(),
            (None, tag) => tag.unwrap_or("latest").to_owned(),
        };
        let text = match pinned.as_ref().and_then(|digest| self.read_whole(digest)) {
            Some(text) => text,
            None => self.document("manifests", &wanted, pinned.as_ref(), "the manifest")?,
        };
        let digest = digest_of(&text);
        self.blobs.keep(&digest, &text)?;
        let top = Descriptor::new("", digest.clone(), text.len() as u64);
        let mut archive = Archive::fetched(open_directory(self.blobs.path())?);
        archive.add(&digest)?;
        let mut documents = vec![digest];
        loop {
            match layout::choose_fetched(&archive, &Machine::this(), &top, name, self.limits) {
                Ok(_) => return Ok((top, archive, documents)),
                Err(ImageError::Lacks { what, digest, bytes }) if !documents.contains(&digest) => {
                    if bytes > self.limits.json_bytes {
                        return Err(refuse(format!("{what} has {bytes} bytes, too many for one")));
                    }
                    if self.read_whole(&digest).is_none() {
                        let kind = if what == layout::CONFIG { "blobs" } else { "manifests" };
                        let text = self.document(kind, digest.as_str(), Some(&digest), what)?;
                        self.blobs.keep(&digest, &text)?;
                    }
                    archive.add(&digest)?;
                    documents.push(digest);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// A document that an earlier attempt left here, if it still is what its name says: documents
    /// are not synced.
    fn read_whole(&self, digest: &Digest) -> Option<Vec<u8>> {
        let file = std::fs::File::open(self.blobs.path().join(digest.hex())).ok()?;
        let mut text = Vec::new();
        file.take(self.limits.json_bytes).read_to_end(&mut text).ok()?;
        (digest_of(&text) == *digest).then_some(text)
    }

    /// One small document, from whoever has it.
    fn document(
        &mut self,
        kind: &str,
        reference: &str,
        digest: Option<&Digest>,
        what: &str,
    ) -> Result<Vec<u8>, ImageError> {
        let accept = [("accept", layout::manifest_types())];
        let headers: &[_] = if kind == "manifests" { &accept } else { &[] };
        let max = self.limits.json_bytes as usize;
        self.asking(|source| {
            let mut answer = source.get(kind, reference, headers)?;
            let text = registry::read(&mut *answer, max).map_err(|error| source.passing(&error))?;
            // Of a tag the registry says the digest itself: a body that was cut or swapped shows.
            let said = answer.header("docker-content-digest").and_then(|text| Digest::parse(text).ok());
            let found = digest_of(&text);
            match digest.or(said.as_ref()) {
                Some(wanted) if *wanted != found => Err(Trouble::Passing {
                    text: format!("{what} from {} is {found}, and should be {wanted}", source.name()),
                    after: None,
                }),
                _ => Ok(text),
            }
        })
    }

    /// Asks the sources in turn until one answers, waits when none does.
    fn asking<T>(
        &mut self,
        mut ask: impl FnMut(&Registry<'_>) -> Result<T, Trouble>,
    ) -> Result<T, ImageError> {
        loop {
            let (mut passing, mut texts) = (None, Vec::new());
            for turn in 0..self.sources.len() {
                let at = (self.at + turn) % self.sources.len();
                match ask(&self.sources[at]) {
                    Ok(answer) => {
                        self.at = at;
                        self.tries = Tries::default();
                        return Ok(answer);
                    }
                    Err(trouble) => {
                        texts.push(trouble.to_string());
                        if let Trouble::Passing { after, .. } = trouble {
                            passing = Some(after);
                        }
                    }
                }
            }
            let text = texts.join("; ");
            match passing {
                Some(after) => self.tries.wait(text, after)?,
                None => return Err(refuse(text)),
            }
        }
    }

    /// Before layers are fetched: whether they may be.
    fn decide(&mut self, job: &Job, name: &Reference, chosen: &Chosen) -> Result<Decision, ImageError> {
        let digests: Vec<Digest> = std::iter::once(&chosen.digest).chain(&chosen.through).cloned().collect();
        let mut signatures = Vec::new();
        if job.trust.asks(name) {
            for digest in &digests {
                let tag = trust::tag(digest);
                let Some(manifest) = self.optional(&tag)? else { continue };
                signatures.extend(trust::signatures(&manifest, |payload| {
                    let digest = &payload.digest;
                    self.document("blobs", digest.as_str(), Some(digest), "a signature's payload")
                })?);
            }
        }
        job.trust.judge(name, &digests, &signatures, SystemClock::new().wall())
    }

    /// A manifest that need not be there.
    fn optional(&mut self, tag: &str) -> Result<Option<Vec<u8>>, ImageError> {
        let headers = [("accept", layout::manifest_types())];
        let max = self.limits.json_bytes as usize;
        self.asking(|source| match source.get("manifests", tag, &headers) {
            Ok(mut answer) => {
                registry::read(&mut *answer, max).map(Some).map_err(|error| source.passing(&error))
            }
            Err(Trouble::Missing(_)) => Ok(None),
            Err(trouble) => Err(trouble),
        })
    }

    fn check_space(&self, directory: &Directory, layers: &[Layer]) -> Result<(), ImageError> {
        let wanted: Vec<Wanted> = layers
            .iter()
            .map(|layer| {
                let here = self.blobs.here(&layer.digest).min(layer.bytes);
                Wanted { bytes: layer.bytes, here, compressed: layer.compressed }
            })
            .collect();
        let unpacked: u64 = wanted.iter().map(|layer| layer.bytes).fold(0, u64::saturating_add);
        if unpacked > self.limits.archive_bytes {
            let max = self.limits.archive_bytes / super::limits::MIB;
            return Err(refuse(format!("the image is larger than {max} MiB ([images] max_bytes)")));
        }
        Need::of(&wanted).check(directory.free()?, self.limits.disk_reserve)
    }
}

/// Waits between requests that brought nothing.
#[derive(Default)]
struct Tries {
    failed: u32,
}

impl Tries {
    fn wait(&mut self, text: String, after: Option<Duration>) -> Result<(), ImageError> {
        let wait = after.unwrap_or(Duration::from_secs(1 << self.failed.min(8)));
        if self.failed >= TRIES_MAX || wait > WAIT_MAX {
            return Err(ImageError::Later { text, after });
        }
        self.failed += 1;
        // Half of it at random: a site's gateways lost the link together.
        let half = wait / 2;
        std::thread::sleep(half + half.mul_f64(fastrand::f64()));
        Ok(())
    }
}

struct Shown<'a> {
    say: &'a mut dyn FnMut(Line),
    bytes: u64,
    of: u64,
    last: Option<Instant>,
    /// Bytes of the current layer that who unpacks has heard of.
    told: u64,
}

impl Shown<'_> {
    fn show(&mut self, now: bool) {
        if now || self.last.is_none_or(|last| last.elapsed() >= PROGRESS_EVERY) {
            self.last = Some(Instant::now());
            (self.say)(Line::Progress(Progress::Fetching { bytes: self.bytes, of: self.of }));
        }
    }

    fn came(&mut self, came: Came) {
        (self.say)(Line::Came(came));
    }

    fn came_to(&mut self, layer: &Digest, bytes: u64) {
        if bytes >= self.told.saturating_add(CAME_BYTES) || self.told == 0 && bytes > 0 {
            self.told = bytes;
            self.came(Came::Bytes { layer: layer.clone(), bytes });
        }
    }
}
