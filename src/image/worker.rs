//! `neap image-worker IMAGES STAGING [NAME]`: the child that touches untrusted bytes.
//!
//! Standard input: the archive. Standard output: `Progress` as NDJSON; the last line is `done` or
//! `error`, and says what the exit code says too. STAGING is a directory below IMAGES/staging that
//! the daemon made, and removes, whatever becomes of this process.
//!
//! What it gives up before the first byte: every descriptor but the three standard ones, the view
//! of the file system outside IMAGES (chroot), all capabilities but those that unpacking takes,
//! memory beyond 512 MiB. It dies with the daemon.
//!
//! Layers are unpacked by one worker at a time (a lock on layers/sha256), so two imports of one
//! layer don't do the work twice; archives are received side by side.

use super::archive::Archive;
use super::layout::{self, Chosen, Layer};
use super::limits::{Budget, Limits, MIB, io, os, refuse};
use super::platform::Machine;
use super::store::{Directory, LayerMark, Record, StoredLayer, write_json};
use super::tarball::TarReader;
use super::tree::Below;
use super::unpack::{Unpacked, unpack};
use super::{ImageError, decompress};
use crate::model::api::{ImageSummary, Progress};
use crate::model::{Digest, Reference, UnixMs};
use rustix::fs::FlockOperation;
use rustix::process::{Resource, Rlimit};
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// zstd windows take up to 128 MiB, twice that while the buffer grows; the rest is small.
const ADDRESS_SPACE_BYTES: u64 = 512 * MIB;

/// The child's whole life.
pub fn main() -> ExitCode {
    let say = |progress: &Progress| {
        let mut line = serde_json::to_vec(progress).expect("strings and numbers serialise");
        line.push(b'\n');
        // A daemon that has gone away reads nothing: PDEATHSIG ends this process then.
        let _ = std::io::stdout().lock().write_all(&line);
    };
    let done = confine(std::env::args_os().skip(2).collect())
        .and_then(|job| import(&job, std::io::stdin().lock(), Limits::default(), &mut |p| say(&p)));
    match done {
        Ok(summary) => {
            say(&Progress::Done(summary));
            ExitCode::SUCCESS
        }
        Err(error) => {
            say(&Progress::Error(chain(&error)));
            ExitCode::FAILURE
        }
    }
}

/// One import, as the worker sees the world.
pub struct Job {
    pub directory: Directory,
    pub staging: PathBuf,
    pub name: Option<Reference>,
}

/// Reads the arguments and gives up what isn't needed.
fn confine(arguments: Vec<OsString>) -> Result<Job, ImageError> {
    let mut arguments = arguments.into_iter();
    let (Some(images), Some(staging)) = (arguments.next(), arguments.next()) else {
        return Err(refuse("usage: neap image-worker IMAGES STAGING [NAME] (started by neap daemon)"));
    };
    let name = match arguments.next() {
        None => None,
        Some(name) => {
            Some(Reference::parse(&name.to_string_lossy()).map_err(|error| refuse(error.to_string()))?)
        }
    };

    // When the daemon died before this call, standard input ends early and the import fails.
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)
        .map_err(|e| io("bind to the daemon")(e.into()))?;
    close_inherited();
    let limit = Rlimit { current: Some(ADDRESS_SPACE_BYTES), maximum: Some(ADDRESS_SPACE_BYTES) };
    rustix::process::setrlimit(Resource::As, limit).map_err(os("limit the memory"))?;
    let no_core = Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(Resource::Core, no_core).map_err(os("forbid core files"))?;
    rustix::process::umask(rustix::fs::Mode::empty());

    std::env::set_current_dir(&images).map_err(io("enter the image directory"))?;
    let directory = match rustix::process::chroot(".") {
        Ok(()) => PathBuf::from("/"),
        // In a container that may not: the paths are the same ones by another name.
        Err(rustix::io::Errno::PERM) => PathBuf::from(images),
        Err(errno) => return Err(os("enter the image directory")(errno)),
    };
    drop_capabilities()?;
    let directory = Directory::new(directory);
    let staging = directory.staging().join(staging);
    Ok(Job { directory, staging, name })
}

/// Rust opens everything close-on-exec; this is for what the daemon's parent left open.
fn close_inherited() {
    let Ok(listing) = std::fs::read_dir("/proc/self/fd") else { return };
    let open: Vec<i32> = listing.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    for fd in open.into_iter().filter(|fd| *fd > 2) {
        let _ = nix::unistd::close(fd); // one of them was the listing's own
    }
}

fn drop_capabilities() -> Result<(), ImageError> {
    use rustix::thread::{CapabilitySet as Set, CapabilitySets, set_capabilities, set_no_new_privs};
    // SYS_ADMIN is what trusted.overlay.opaque takes.
    let needed = Set::CHOWN
        | Set::DAC_OVERRIDE
        | Set::FOWNER
        | Set::FSETID
        | Set::MKNOD
        | Set::SETFCAP
        | Set::SYS_ADMIN;
    let had = rustix::thread::capabilities(None).map_err(os("read the capabilities"))?;
    let kept = had.permitted & needed;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: Set::empty() };
    set_capabilities(None, sets).map_err(os("drop capabilities"))?;
    set_no_new_privs(true).map_err(os("forbid new privileges"))
}

/// Everything but the confinement and the commit in refs.json.
pub fn import(
    job: &Job,
    source: impl Read,
    limits: Limits,
    say: &mut dyn FnMut(Progress),
) -> Result<ImageSummary, ImageError> {
    let spool = job.staging.join("archive");
    std::fs::create_dir(&spool).map_err(io("make the staging directory"))?;
    let mut budget = Budget::new(limits.clone(), Some(open_directory(&job.staging)?));
    let archive = Archive::spool(source, open_directory(&spool)?, &mut budget, &mut |bytes| {
        say(Progress::Read(bytes))
    })?;
    let chosen = layout::choose(&archive, &Machine::this(), job.name.as_ref(), &limits)?;

    let layers_directory = open_directory(&job.directory.layers())?;
    rustix::fs::flock(&layers_directory, FlockOperation::LockExclusive).map_err(os("wait for the layers"))?;
    let layers = unpack_layers(job, &archive, &chosen, &mut budget, say)?;
    commit(job, &chosen, &layers, &layers_directory)?;
    let bytes = summed(&layers);
    drop(archive);
    // The daemon would do it too; here it costs its event loop nothing.
    let _ = std::fs::remove_dir_all(&spool);
    Ok(ImageSummary {
        references: chosen.names.iter().map(|name| name.as_str().to_owned()).collect(),
        digest: chosen.digest.as_str().to_owned(),
        platform: chosen.platform,
        bytes,
        imported: UnixMs(0),
        used_by: Vec::new(),
    })
}

/// Of different layers.
fn summed(layers: &[StoredLayer]) -> u64 {
    let different: std::collections::BTreeMap<_, _> =
        layers.iter().map(|l| (l.stored_as.clone(), l.bytes)).collect();
    different.values().sum()
}

/// Unpacks what the store doesn't have yet, into the staging directory.
fn unpack_layers(
    job: &Job,
    archive: &Archive,
    chosen: &Chosen,
    budget: &mut Budget,
    say: &mut dyn FnMut(Progress),
) -> Result<Vec<StoredLayer>, ImageError> {
    let mut below = Below::default();
    let mut chain: Option<Digest> = None;
    let mut layers = Vec::new();
    let of = chosen.layers.len() as u32;
    for (index, layer) in chosen.layers.iter().enumerate() {
        // image-spec config.md, "Layer ChainID".
        let chain_id = match &chain {
            None => layer.diff_id.clone(),
            Some(chain) => layout::digest_of(format!("{chain} {}", layer.diff_id).as_bytes()),
        };
        let there = match find(job, layer, &chain_id)? {
            Some(there) => there,
            None => {
                let digest = layer.diff_id.as_str().to_owned();
                say(Progress::Unpacking { layer: index as u32 + 1, of, digest });
                let place = || format!("layer {} of {of}", index + 1);
                unpack_layer(job, archive, layer, &chain_id, &below, budget, say).map_err(
                    |error| match error {
                        ImageError::Refused(text) => refuse(format!("{}: {text}", place())),
                        ImageError::Io { doing, source } => io(format!("{}: {doing}", place()))(source),
                        other => other,
                    },
                )?
            }
        };
        below.push(open_directory(&there.root)?);
        layers.push(there.layer);
        chain = Some(chain_id);
    }
    Ok(layers)
}

struct There {
    layer: StoredLayer,
    root: PathBuf,
}

/// In the store, or made a moment ago for another place in the same image.
fn find(job: &Job, layer: &Layer, chain_id: &Digest) -> Result<Option<There>, ImageError> {
    for (stored_as, leaning_too) in [(chain_id, true), (&layer.diff_id, false)] {
        for directory in [job.directory.layer(stored_as), staged(job, stored_as)] {
            let mark: LayerMark = match std::fs::read(directory.join("layer.json")) {
                Ok(text) => serde_json::from_slice(&text).map_err(|e| io("read a layer's mark")(e.into()))?,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(io("read a layer's mark")(error)),
            };
            if mark.diff_id == layer.diff_id && (leaning_too || !mark.leans) {
                let (diff_id, bytes) = (mark.diff_id, mark.bytes);
                let layer = StoredLayer { diff_id, stored_as: stored_as.clone(), bytes };
                return Ok(Some(There { layer, root: directory.join("root") }));
            }
        }
    }
    Ok(None)
}

fn staged(job: &Job, stored_as: &Digest) -> PathBuf {
    job.staging.join(format!("layer-{}", stored_as.hex()))
}

fn unpack_layer(
    job: &Job,
    archive: &Archive,
    layer: &Layer,
    chain_id: &Digest,
    below: &Below,
    budget: &mut Budget,
    say: &mut dyn FnMut(Progress),
) -> Result<There, ImageError> {
    let new = job.staging.join("layer-new");
    let root = new.join("root");
    std::fs::create_dir_all(&root).map_err(io("make a layer's directory"))?;

    let blob = archive.open(&layer.blob)?;
    let (_, stream) = decompress::decompress(blob).map_err(reading)?;
    let hashed = Hashed::new(stream, layer.blob.bytes, &budget.limits);
    let mut tar = TarReader::new(hashed);
    let unpacked =
        unpack(&mut tar, open_directory(&root)?, below, budget, &mut |text| say(Progress::Warning(text)));
    let Unpacked { bytes, leans } = unpacked.map_err(|error| match error {
        ImageError::Io { doing, source } if is_about_the_stream(&source) => {
            refuse(format!("{doing}: {source}"))
        }
        other => other,
    })?;
    let found = tar.into_inner().finish().map_err(reading)?;
    if found != layer.diff_id {
        return Err(refuse(format!("its content is {found}, the configuration says {}", layer.diff_id)));
    }

    let mark = LayerMark { diff_id: layer.diff_id.clone(), bytes, leans };
    write_json(&new.join("layer.json"), &mark)?;
    let stored_as = if leans { chain_id.clone() } else { layer.diff_id.clone() };
    let directory = staged(job, &stored_as);
    std::fs::rename(&new, &directory).map_err(io("keep an unpacked layer"))?;
    let layer = StoredLayer { diff_id: mark.diff_id, stored_as, bytes };
    Ok(There { layer, root: directory.join("root") })
}

/// Everything to the disk, then the names: a layer that has its name is complete.
fn commit(job: &Job, chosen: &Chosen, layers: &[StoredLayer], directory: &OwnedFd) -> Result<(), ImageError> {
    let mut any = false;
    for layer in layers {
        let (from, to) = (staged(job, &layer.stored_as), job.directory.layer(&layer.stored_as));
        if !from.exists() {
            continue;
        }
        if !any {
            // One call for thousands of files: an fsync for each costs minutes on an SD card.
            rustix::fs::syncfs(directory).map_err(os("write the layers to the disk"))?;
            any = true;
        }
        if to.exists() {
            // One that leans differently was there under this name; its mark said so.
            job.directory.discard(&to)?;
        }
        std::fs::rename(&from, &to).map_err(io("name a layer"))?;
    }
    if any {
        rustix::fs::fsync(directory).map_err(os("write the layers' names to the disk"))?;
    }
    if job
        .directory
        .read_record(&chosen.digest)
        .is_ok_and(|record| record.is_some_and(|r| r.layers == layers))
    {
        return Ok(());
    }
    job.directory.write_record(&Record {
        digest: chosen.digest.clone(),
        platform: chosen.platform.clone(),
        manifest: chosen.manifest.clone(),
        config: chosen.config.clone(),
        layers: layers.to_vec(),
    })
}

/// Hashes what is read, and stops a layer that grows out of proportion.
struct Hashed<R> {
    inner: R,
    hash: ring::digest::Context,
    bytes: u64,
    max: u64,
    max_text: &'static str,
}

impl<R: Read> Hashed<R> {
    fn new(inner: R, compressed: u64, limits: &Limits) -> Self {
        let in_proportion = limits.ratio_from.max(compressed.saturating_mul(limits.ratio));
        // Beyond the files' own bytes: headers, and padding behind the end.
        let whole = limits.unpacked_bytes.saturating_add(limits.unpacked_bytes / 8).saturating_add(MIB);
        let (max, max_text) = if in_proportion < whole {
            (in_proportion, "the layer grows out of all proportion to its compressed size")
        } else {
            (whole, "the layer is too large when decompressed")
        };
        Self { inner, hash: ring::digest::Context::new(&ring::digest::SHA256), bytes: 0, max, max_text }
    }

    /// Reads the rest; the digest of all.
    fn finish(mut self) -> std::io::Result<Digest> {
        std::io::copy(&mut self, &mut std::io::sink())?;
        Ok(Digest::from_sha256(self.hash.finish().as_ref()))
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let got = self.inner.read(buffer)?;
        self.hash.update(&buffer[..got]);
        self.bytes += got as u64;
        if self.bytes > self.max {
            let text = format!("{} ({} MiB so far)", self.max_text, self.bytes / MIB);
            return Err(std::io::Error::new(std::io::ErrorKind::FileTooLarge, text));
        }
        Ok(got)
    }
}

fn is_about_the_stream(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{FileTooLarge, InvalidData, InvalidInput, UnexpectedEof, Unsupported};
    // An error number is the system's (a file too large for the file system, say).
    error.raw_os_error().is_none()
        && matches!(error.kind(), FileTooLarge | Unsupported | InvalidData | InvalidInput | UnexpectedEof)
}

fn reading(source: std::io::Error) -> ImageError {
    if is_about_the_stream(&source) { refuse(source.to_string()) } else { io("read the layer")(source) }
}

fn open_directory(path: &Path) -> Result<OwnedFd, ImageError> {
    let file = File::open(path).map_err(io(format!("open {}", path.display())))?;
    file.as_fd().try_clone_to_owned().map_err(io(format!("open {}", path.display())))
}

/// The error and its causes on one line: it leaves this process as text.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text.push_str(": ");
        text.push_str(&next.to_string());
        cause = next.source();
    }
    text
}
