//! An image's layers: unpacked where the store lacks them, then all of it made durable at once.

use super::ImageError;
use super::ahead::ahead;
use super::archive::Archive;
use super::check::seal;
use super::decompress;
use super::feed::Feed;
use super::hashed::Hashed;
use super::layout::{Chosen, Layer};
use super::limits::{Budget, io, os, refuse};
use super::store::{LayerMark, Record, StoredLayer, put_json};
use super::tarball::TarReader;
use super::tree::Below;
use super::trust::Decision;
use super::unpack::Unpacked;
use super::worker::{Place, open_directory};
use crate::model::Digest;
use crate::model::api::Progress;
use std::io::{BufRead, Read};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// Decisions kept of one image: names that it came in under. The oldest go.
const DECISIONS_MAX: usize = 64;

/// Where the layers' blobs are.
pub enum Blobs<'a, R> {
    Archive(&'a Archive),
    /// On their way.
    Feed(&'a mut Feed<R>),
}

/// Unpacks what the store doesn't have yet, into the staging directory.
pub fn unpack<R: BufRead + Send>(
    place: &Place,
    mut blobs: Blobs<'_, R>,
    chosen: &Chosen,
    budget: &mut Budget,
    say: &mut dyn FnMut(Progress),
) -> Result<Vec<StoredLayer>, ImageError> {
    let mut below = Below::default();
    let mut layers = Vec::new();
    let of = chosen.layers.len() as u32;
    for (index, (layer, chain_id)) in chosen.chain().into_iter().enumerate() {
        let there = match find(place, layer, &chain_id)? {
            Some(there) => there,
            None => {
                let digest = layer.diff_id.as_str().to_owned();
                say(Progress::Unpacking { layer: index as u32 + 1, of, digest });
                let which = || format!("layer {} of {of}", index + 1);
                let new = New { place, layer, chain_id: &chain_id, below: &below };
                new.take(&mut blobs, budget, say).map_err(|error| match error {
                    ImageError::Refused(text) => refuse(format!("{}: {text}", which())),
                    ImageError::Io { doing, source } => io(format!("{}: {doing}", which()))(source),
                    other => other,
                })?
            }
        };
        below.push(open_directory(&there.root)?);
        layers.push(there.layer);
    }
    Ok(layers)
}

struct There {
    layer: StoredLayer,
    root: PathBuf,
}

/// In the store, or made a moment ago for another place in the same image.
fn find(place: &Place, layer: &Layer, chain_id: &Digest) -> Result<Option<There>, ImageError> {
    for (stored_as, leaning_too) in [(chain_id, true), (&layer.diff_id, false)] {
        for directory in [place.directory.layer(stored_as), staged(place, stored_as)] {
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

fn staged(place: &Place, stored_as: &Digest) -> PathBuf {
    place.staging.join(format!("layer-{}", stored_as.hex()))
}

/// A layer that the store lacks.
struct New<'a> {
    place: &'a Place,
    layer: &'a Layer,
    chain_id: &'a Digest,
    below: &'a Below,
}

impl New<'_> {
    fn take<R: BufRead + Send>(
        &self,
        blobs: &mut Blobs<'_, R>,
        budget: &mut Budget,
        say: &mut dyn FnMut(Progress),
    ) -> Result<There, ImageError> {
        let Layer { digest, bytes, .. } = self.layer;
        let feed = match blobs {
            Blobs::Archive(archive) => {
                let lacks = || ImageError::Lacks { what: "layer", digest: digest.clone(), bytes: *bytes };
                let stored = self.layer.blob.as_ref().ok_or_else(lacks)?;
                return self.unpack(archive.open(stored)?, stored.bytes, budget, say);
            }
            Blobs::Feed(feed) => feed,
        };
        loop {
            let (left, anew) = (budget.left(), feed.anew(digest));
            let Some(following) = feed.follow(digest)? else {
                // It was here when that was looked at, and has been removed since.
                let text = format!("layer {digest} was removed from this node meanwhile");
                return Err(ImageError::Later { text, after: None });
            };
            match self.unpack(following, *bytes, budget, say) {
                Ok(there) => return Ok(there),
                // A full disk is full whatever the blob turns out to be.
                Err(error @ ImageError::NoSpace { .. }) => return Err(error),
                Err(error) => {
                    if !feed.comes_anew(digest, anew)? {
                        return Err(error);
                    }
                    budget.give_back(left);
                }
            }
        }
    }

    fn unpack(
        &self,
        blob: impl Read + Send,
        blob_bytes: u64,
        budget: &mut Budget,
        say: &mut dyn FnMut(Progress),
    ) -> Result<There, ImageError> {
        let new = self.place.staging.join("layer-new");
        let root = new.join("root");
        match std::fs::remove_dir_all(&new) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(io("remove what was unpacked of a damaged layer")(error));
            }
            _ => {}
        }
        std::fs::create_dir_all(&root).map_err(io("make a layer's directory"))?;

        let limits = budget.limits.clone();
        let open = || decompress::decompress(blob).map(|(_, stream)| stream);
        let unpacked = ahead(open, |stream| {
            let mut tar = TarReader::new(Hashed::new(stream, blob_bytes, &limits));
            let unpacked =
                super::unpack::unpack(&mut tar, open_directory(&root)?, self.below, budget, &mut |text| {
                    say(Progress::Warning(text))
                });
            let unpacked = unpacked.map_err(|error| match error {
                ImageError::Io { doing, source } if is_about_the_stream(&source) => {
                    refuse(format!("{doing}: {source}"))
                }
                other => other,
            })?;
            tar.into_inner().finish().map(|found| (unpacked, found)).map_err(reading)
        });
        let (Unpacked { bytes, leans, written }, found) = unpacked.map_err(io("start a thread"))??;
        let diff_id = &self.layer.diff_id;
        if found != *diff_id {
            return Err(refuse(format!("its content is {found}, the configuration says {diff_id}")));
        }

        let sums = Some(seal(&root, &written)?);
        let mark = LayerMark { diff_id: diff_id.clone(), bytes, leans, sums, tree: None };
        put_json(&new.join("layer.json"), &mark)?;
        let stored_as = if leans { self.chain_id.clone() } else { diff_id.clone() };
        let directory = staged(self.place, &stored_as);
        std::fs::rename(&new, &directory).map_err(io("keep an unpacked layer"))?;
        let layer = StoredLayer { diff_id: mark.diff_id, stored_as, bytes };
        Ok(There { layer, root: directory.join("root") })
    }
}

/// Everything to the disk, then the names: a layer that has its name is complete.
pub fn commit(
    place: &Place,
    chosen: &Chosen,
    layers: &[StoredLayer],
    decisions: &[Decision],
    directory: &OwnedFd,
) -> Result<(), ImageError> {
    // What was here when a pull began may have been collected while the rest came.
    for layer in layers {
        let there = place.directory.read_mark(&layer.stored_as)?;
        if there.is_none_or(|mark| mark.diff_id != layer.diff_id) && !staged(place, &layer.stored_as).exists()
        {
            let text = format!("layer {} was removed from this node meanwhile", layer.diff_id);
            return Err(ImageError::Later { text, after: None });
        }
    }
    let known = place.directory.read_record(&chosen.digest).ok().flatten();
    let mut all: Vec<Decision> = known.iter().flat_map(|record| record.decisions.clone()).collect();
    all.retain(|old| decisions.iter().all(|new| new.reference != old.reference));
    all.extend_from_slice(decisions);
    all.drain(..all.len().saturating_sub(DECISIONS_MAX));
    let record = Record {
        digest: chosen.digest.clone(),
        platform: chosen.platform.clone(),
        manifest: chosen.manifest.clone(),
        config: chosen.config.clone(),
        layers: layers.to_vec(),
        decisions: all,
    };
    let new = known.is_none();
    if new {
        place.directory.put_record(&record)?;
    }
    let staged = |layer: &&StoredLayer| staged(place, &layer.stored_as).exists();
    let made: Vec<&StoredLayer> = layers.iter().filter(staged).collect();
    if new || !made.is_empty() {
        // One call for thousands of files: an fsync for each costs minutes on an SD card.
        rustix::fs::syncfs(directory).map_err(os("write the layers to the disk"))?;
    }
    for layer in &made {
        name(place, layer)?;
    }
    if !made.is_empty() {
        rustix::fs::fsync(directory).map_err(os("write the layers' names to the disk"))?;
    }
    if known.is_some_and(|known| known != record) { place.directory.write_record(&record) } else { Ok(()) }
}

fn name(place: &Place, layer: &StoredLayer) -> Result<(), ImageError> {
    let (from, to) = (staged(place, &layer.stored_as), place.directory.layer(&layer.stored_as));
    if !from.exists() {
        return Ok(()); // twice in this image
    }
    if to.exists() {
        let mark = |at: &std::path::Path| -> Option<LayerMark> {
            serde_json::from_slice(&std::fs::read(at.join("layer.json")).ok()?).ok()
        };
        // Somebody else brought it while this one was unpacked. It may be in use.
        if mark(&to).is_some_and(|there| {
            mark(&from).is_some_and(|ours| there.leans == ours.leans && there.diff_id == ours.diff_id)
        }) {
            return Ok(());
        }
        // One that leans differently was there under this name, or one that is damaged.
        place.directory.discard(&to)?;
    }
    std::fs::rename(&from, &to).map_err(io("name a layer"))
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
