//! An image's layers: unpacked where the store lacks them, then all of it made durable at once.

use super::ImageError;
use super::archive::Archive;
use super::check::seal;
use super::decompress;
use super::hashed::Hashed;
use super::layout::{Chosen, Layer};
use super::limits::{Budget, io, os, refuse};
use super::store::{LayerMark, Record, StoredLayer, write_json};
use super::tarball::TarReader;
use super::tree::Below;
use super::trust::Decision;
use super::unpack::Unpacked;
use super::worker::{Place, open_directory};
use crate::model::Digest;
use crate::model::api::Progress;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// Decisions kept of one image: names that it came in under. The oldest go.
const DECISIONS_MAX: usize = 64;

/// Unpacks what the store doesn't have yet, into the staging directory.
pub fn unpack(
    place: &Place,
    archive: &Archive,
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
                unpack_layer(place, archive, layer, &chain_id, &below, budget, say).map_err(|error| {
                    match error {
                        ImageError::Refused(text) => refuse(format!("{}: {text}", which())),
                        ImageError::Io { doing, source } => io(format!("{}: {doing}", which()))(source),
                        other => other,
                    }
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

fn unpack_layer(
    place: &Place,
    archive: &Archive,
    layer: &Layer,
    chain_id: &Digest,
    below: &Below,
    budget: &mut Budget,
    say: &mut dyn FnMut(Progress),
) -> Result<There, ImageError> {
    let new = place.staging.join("layer-new");
    let root = new.join("root");
    std::fs::create_dir_all(&root).map_err(io("make a layer's directory"))?;

    let stored = layer.blob.as_ref().ok_or_else(|| ImageError::Lacks {
        what: "layer",
        digest: layer.digest.clone(),
        bytes: layer.bytes,
    })?;
    let blob = archive.open(stored)?;
    let (_, stream) = decompress::decompress(blob).map_err(reading)?;
    let hashed = Hashed::new(stream, stored.bytes, &budget.limits);
    let mut tar = TarReader::new(hashed);
    let unpacked = super::unpack::unpack(&mut tar, open_directory(&root)?, below, budget, &mut |text| {
        say(Progress::Warning(text))
    });
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

    let mark = LayerMark { diff_id: layer.diff_id.clone(), bytes, leans, tree: Some(seal(&root)?) };
    write_json(&new.join("layer.json"), &mark)?;
    let stored_as = if leans { chain_id.clone() } else { layer.diff_id.clone() };
    let directory = staged(place, &stored_as);
    std::fs::rename(&new, &directory).map_err(io("keep an unpacked layer"))?;
    let layer = StoredLayer { diff_id: mark.diff_id, stored_as, bytes };
    Ok(There { layer, root: directory.join("root") })
}

/// Everything to the disk, then the names: a layer that has its name is complete.
pub fn commit(
    place: &Place,
    chosen: &Chosen,
    layers: &[StoredLayer],
    decisions: &[Decision],
    directory: &OwnedFd,
) -> Result<(), ImageError> {
    let mut any = false;
    for layer in layers {
        let (from, to) = (staged(place, &layer.stored_as), place.directory.layer(&layer.stored_as));
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
            place.directory.discard(&to)?;
        }
        std::fs::rename(&from, &to).map_err(io("name a layer"))?;
    }
    if any {
        rustix::fs::fsync(directory).map_err(os("write the layers' names to the disk"))?;
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
    if known.as_ref() == Some(&record) { Ok(()) } else { place.directory.write_record(&record) }
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
