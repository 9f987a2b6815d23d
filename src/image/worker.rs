//! `neap image-worker KIND IMAGES STAGING`: the child that touches untrusted bytes.
//!
//! | kind | what it does |
//! |---|---|
//! | `import` | an archive on standard input: received, verified, unpacked |
//! | `fetch` | from a registry to verified blobs |
//! | `unpack` | blobs that were fetched: verified again, unpacked |
//! | `check` | reads the unpacked layers again, at a pace |
//!
//! Standard output: `Line` as NDJSON; the last one is `done`, `fetched` or `failed`, and says what
//! the exit code says too. Standard input of `unpack`: what the fetching worker says of its blobs
//! (see `feed`), which may still be on their way. STAGING is a directory below IMAGES/staging that the daemon made, with
//! the job in it, and removes, whatever becomes of this process.
//!
//! Archives are received side by side, and unpacked by one worker at a time (a lock on
//! layers/sha256), so that two imports of one layer don't do the work twice. A pull, which may take
//! hours, locks only to give its layers their names.

use super::archive::Archive;
use super::check::{self, Checked};
use super::feed::{Came, Feed};
use super::fetch;
use super::job::Job;
use super::layers::{self, Blobs};
use super::layout::{self, Chosen};
use super::limits::{Budget, Limits, io, os, refuse};
use super::platform::Machine;
use super::registry::Transport;
use super::store::{Directory, StoredLayer};
use super::trust::Decision;
use super::{ImageError, confine};
use crate::errors::chain;
use crate::model::api::{ImageSummary, Progress};
use crate::model::{Clock, Digest, SystemClock, UnixMs};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// What a worker says to the daemon.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    Progress(Progress),
    /// For who unpacks.
    Came(Came),
    Fetched,
    Done(ImageSummary),
    Checked(Checked),
    Failed(Failed),
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Failed {
    Refused(String),
    Later {
        text: String,
        after_s: Option<u64>,
    },
    NoSpace {
        text: String,
        missing_bytes: u64,
    },
    /// This machine's trouble, not the image's.
    Io(String),
}

impl From<Failed> for ImageError {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Refused(text) => Self::Refused(text),
            Failed::Later { text, after_s } => Self::Later { text, after: after_s.map(Duration::from_secs) },
            Failed::NoSpace { text, missing_bytes } => Self::NoSpace { text, missing_bytes },
            Failed::Io(doing) => Self::Io { doing, source: std::io::Error::other("in the image worker") },
        }
    }
}

impl From<ImageError> for Failed {
    fn from(error: ImageError) -> Self {
        match error {
            ImageError::Later { text, after } => {
                Self::Later { text, after_s: after.map(|after| after.as_secs()) }
            }
            ImageError::NoSpace { text, missing_bytes } => Self::NoSpace { text, missing_bytes },
            ImageError::Io { .. } => Self::Io(chain(&error)),
            other => Self::Refused(chain(&other)),
        }
    }
}

/// The child's whole life. `connect`: makes the way to registries, which trusts these
/// certificates or the system's.
pub fn main(connect: impl FnOnce(Option<&Path>) -> Result<Box<dyn Transport>, String>) -> ExitCode {
    let line = |line: &Line| {
        let mut line = serde_json::to_vec(line).expect("strings and numbers serialise");
        line.push(b'\n');
        // A daemon that has gone away reads nothing: PDEATHSIG ends this process then.
        let _ = std::io::stdout().lock().write_all(&line);
    };
    match work(connect, &mut |said| line(&said)) {
        Ok(last) => {
            line(&last);
            ExitCode::SUCCESS
        }
        Err(error) => {
            line(&Line::Failed(error.into()));
            ExitCode::FAILURE
        }
    }
}

fn work(
    connect: impl FnOnce(Option<&Path>) -> Result<Box<dyn Transport>, String>,
    line: &mut dyn FnMut(Line),
) -> Result<Line, ImageError> {
    let mut arguments = std::env::args_os().skip(2);
    let (Some(kind), Some(images), Some(staging)) = (arguments.next(), arguments.next(), arguments.next())
    else {
        return Err(refuse("usage: neap image-worker KIND IMAGES STAGING (started by neap daemon)"));
    };
    let images = PathBuf::from(images);
    if kind == "fetch" {
        confine::fetcher()?;
        let place = Place::new(images, &staging);
        let job = Job::read(&place.staging)?;
        let transport = connect(job.source.ca.as_deref()).map_err(refuse)?;
        fetch::fetch(&place.directory, &job, &*transport, line)?;
        return Ok(Line::Fetched);
    }
    let say = &mut |progress| line(Line::Progress(progress));
    let place = Place::new(confine::unpacker(&images)?, &staging);
    match kind.to_str() {
        Some("import") => {
            let job = Job::read(&place.staging)?;
            import(&place, &job, std::io::stdin().lock(), Limits::of(&job.limits), say).map(Line::Done)
        }
        Some("unpack") => {
            let lines = std::io::stdin().as_fd().try_clone_to_owned().map_err(io("read what comes"))?;
            let feed =
                Feed::new(BufReader::new(File::from(lines)), place.directory.blobs().path().to_owned());
            unpack_fetched(&place, &Job::read(&place.staging)?, feed, say).map(Line::Done)
        }
        Some("check") => check::check(&place.directory, &place.staging).map(Line::Checked),
        _ => Err(refuse("usage: neap image-worker import|fetch|unpack|check IMAGES STAGING")),
    }
}

/// Where a worker works, as it sees the world.
pub struct Place {
    pub directory: Directory,
    pub staging: PathBuf,
}

impl Place {
    fn new(images: PathBuf, staging: &std::ffi::OsStr) -> Self {
        let directory = Directory::new(images);
        let staging = directory.staging().join(staging);
        Self { directory, staging }
    }
}

/// Everything but the confinement and the commit in refs.json.
pub fn import(
    place: &Place,
    job: &Job,
    source: impl Read,
    limits: Limits,
    say: &mut dyn FnMut(Progress),
) -> Result<ImageSummary, ImageError> {
    let spool = place.staging.join("archive");
    std::fs::create_dir(&spool).map_err(io("make the staging directory"))?;
    let mut budget = Budget::new(limits.clone(), Some(open_directory(&place.staging)?));
    let archive = Archive::spool(source, open_directory(&spool)?, &mut budget, &mut |bytes| {
        say(Progress::Read(bytes))
    })?;
    let chosen = layout::choose(&archive, &Machine::this(), job.name.as_ref(), &limits)?;
    let decisions = decide(job, &archive, &chosen, &limits)?;
    let lock = lock_layers(place)?;
    let blobs = Blobs::<std::io::Empty>::Archive(&archive);
    let layers = layers::unpack(place, blobs, &chosen, &mut budget, say)?;
    layers::commit(place, &chosen, &layers, &decisions, &lock)?;
    let done = summary(chosen, &layers);
    drop(archive);
    // The daemon would do it too; here it costs its event loop nothing.
    let _ = std::fs::remove_dir_all(&spool);
    Ok(done)
}

/// Whether the image may be taken under each of its names, before it is unpacked.
fn decide(
    job: &Job,
    archive: &Archive,
    chosen: &Chosen,
    limits: &Limits,
) -> Result<Vec<Decision>, ImageError> {
    let asked = chosen.names.iter().any(|name| job.trust.asks(name));
    let signatures = if asked { layout::signatures(archive, limits)? } else { Vec::new() };
    let digests: Vec<Digest> = std::iter::once(&chosen.digest).chain(&chosen.through).cloned().collect();
    let now = SystemClock::new().wall();
    chosen.names.iter().map(|name| job.trust.judge(name, &digests, &signatures, now)).collect()
}

/// The second half of a pull.
pub fn unpack_fetched<R: BufRead + Send>(
    place: &Place,
    job: &Job,
    mut feed: Feed<R>,
    say: &mut dyn FnMut(Progress),
) -> Result<ImageSummary, ImageError> {
    let fetched = feed.chosen()?;
    let name = job.name.as_ref().ok_or_else(|| refuse("a pull without a name"))?;
    let limits = Limits::of(&job.limits);
    let mut archive = Archive::fetched(open_directory(place.directory.blobs().path())?);
    for digest in &fetched.documents {
        archive.add(digest)?;
    }
    let chosen = layout::choose_fetched(&archive, &Machine::this(), &fetched.top, name, &limits)?;
    let mut budget = Budget::new(limits, Some(open_directory(&place.staging)?));
    // Open before the first byte is written: a sync tells of the errors since its descriptor was.
    let directory = open_directory(&place.directory.layers())?;
    let layers = layers::unpack(place, Blobs::Feed(&mut feed), &chosen, &mut budget, say)?;
    feed.finish()?;
    lock(&directory)?;
    layers::commit(place, &chosen, &layers, &[fetched.decision], &directory)?;
    Ok(summary(chosen, &layers))
}

/// Until it is dropped nobody else names layers.
fn lock_layers(place: &Place) -> Result<OwnedFd, ImageError> {
    let directory = open_directory(&place.directory.layers())?;
    lock(&directory)?;
    Ok(directory)
}

fn lock(layers: &OwnedFd) -> Result<(), ImageError> {
    rustix::fs::flock(layers, FlockOperation::LockExclusive).map_err(os("wait for the layers"))
}

fn summary(chosen: Chosen, layers: &[StoredLayer]) -> ImageSummary {
    ImageSummary {
        references: chosen.names.iter().map(|name| name.as_str().to_owned()).collect(),
        digest: chosen.digest.as_str().to_owned(),
        platform: chosen.platform,
        bytes: summed(layers),
        imported: UnixMs(0),
        used_by: Vec::new(),
        pull: None,
    }
}

/// Of different layers.
fn summed(layers: &[StoredLayer]) -> u64 {
    let different: std::collections::BTreeMap<_, _> =
        layers.iter().map(|l| (l.stored_as.clone(), l.bytes)).collect();
    different.values().sum()
}

pub fn open_directory(path: &Path) -> Result<OwnedFd, ImageError> {
    let file = File::open(path).map_err(io(format!("open {}", path.display())))?;
    file.as_fd().try_clone_to_owned().map_err(io(format!("open {}", path.display())))
}
