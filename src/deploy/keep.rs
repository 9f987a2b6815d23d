//! What goes on by itself around images: archives that appear in `[images] import_dir`, and the
//! layers' health. Each a loop of its own, so that neither waits for a deploy.

use super::pull::Later;
use super::{Deployer, failed};
use crate::errors::chain;
use crate::model::api::ImageSummary;
use crate::model::{Digest, Reference};
use smol::Timer;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How often the directory is looked at; an archive is taken when it was the same twice.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Archives in the directory; more than fit on a stick are not looked at.
const ARCHIVES_MAX: usize = 256;

const ARCHIVE_BUFFER_BYTES: usize = 128 * 1024;

/// What an archive looks like from outside; another size or time is another archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Looks {
    bytes: u64,
    modified_ms: u64,
}

/// FILE.tar.result
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Outcome {
    archive: Looks,
    ok: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    image: Option<ImageSummary>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl Deployer {
    /// Imports what appears in `[images] import_dir`, for ever.
    pub async fn watch_imports(self: Arc<Self>) {
        let mut seen: HashMap<PathBuf, Looks> = HashMap::new();
        let mut done: HashMap<PathBuf, Looks> = HashMap::new();
        loop {
            Timer::after(LOOK_EVERY).await;
            let Some(dir) = self.config.get().images.import_dir.clone() else {
                (seen, done) = Default::default();
                continue;
            };
            // A stick may be slow or on its way out: not on the thread that all else runs on.
            let now = smol::unblock(move || archives(&dir)).await;
            done.retain(|path, looks| now.get(path) == Some(looks));
            for (path, looks) in &now {
                if seen.get(path) == Some(looks) && done.get(path) != Some(looks) {
                    self.import_file(path, *looks).await;
                    done.insert(path.clone(), *looks);
                }
            }
            seen = now;
        }
    }

    async fn import_file(&self, path: &Path, looks: Looks) {
        let result = PathBuf::from(format!("{}.result", path.display()));
        let known = read_outcome(&result);
        if known.is_some_and(|known| known.archive == looks) {
            return; // from before a restart
        }
        let shown = path.display();
        let imported = async {
            let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
            let opened = File::options().read(true).custom_flags(flags.bits() as i32).open(path);
            let file = opened.map_err(|error| format!("open it: {error}"))?;
            let (progress, _ignored) = smol::channel::bounded(1);
            // Its own default is a buffer of 8 MiB.
            let file = smol::Unblock::with_capacity(ARCHIVE_BUFFER_BYTES, file);
            let import = self.images.import(file, None, progress);
            import.await.map_err(|error| chain(&error))
        };
        let outcome = match imported.await {
            Ok(image) => {
                tracing::info!(archive = %shown, digest = image.digest, "image imported");
                // Whoever lacks it looks again.
                if let Some(Ok(name)) = image.references.first().map(|name| Reference::parse(name)) {
                    let _ = self.waiting.later.0.send(Later::Look(name)).await;
                }
                Outcome { archive: looks, ok: true, image: Some(image), error: None }
            }
            Err(error) => {
                tracing::warn!(archive = %shown, error, "image not imported");
                Outcome { archive: looks, ok: false, image: None, error: Some(error) }
            }
        };
        if let Err(error) = write_outcome(&result, &outcome) {
            // A stick that is write-protected: it is not imported again before it changes.
            tracing::warn!(file = %result.display(), %error, "the result could not be written");
        }
    }

    /// Reads layers again when they are due, for ever; what is damaged is pulled again where a
    /// manifest allows.
    pub async fn watch_layers(self: Arc<Self>) {
        loop {
            Timer::after(self.images.check_period()).await;
            match self.images.check_due(self.clock.wall()).await {
                Ok(damaged) => {
                    for (layer, how) in &damaged {
                        tracing::error!(layer = layer.as_str(), how, "a layer on the disk is damaged");
                    }
                    if !damaged.is_empty() {
                        let _ = self.waiting.later.0.send(Later::Damaged).await;
                    }
                }
                Err(error) => tracing::warn!(error = chain(&error), "check layers"),
            }
        }
    }

    /// After a layer was put in another's place: roots made of the old one are made again.
    pub(super) async fn remake_roots(&self, image: &Digest) {
        let routes = self.routes.get();
        for deployment in routes.functions.values().filter(|d| d.revision.image == *image) {
            self.runtime.release(&deployment.revision.key()).await;
            let config = self.config.get();
            if let Err(why) = self.make_usable(&config, &deployment.revision).await {
                tracing::error!(function = deployment.revision.name().as_str(), why, "its repaired image");
            }
        }
    }

    /// What `neap status` says of layers that wait for repair.
    pub(super) fn damage(&self) -> Vec<String> {
        let damaged = self.images.damaged().map_err(failed);
        let line = |layer: &Digest| {
            format!("layer {} was changed on the disk; pull or import its image again", layer.short())
        };
        damaged.map(|layers| layers.iter().map(line).collect()).unwrap_or_default()
    }
}

/// Regular files called *.tar, with what they look like.
fn archives(dir: &Path) -> HashMap<PathBuf, Looks> {
    let Ok(listing) = fs::read_dir(dir) else { return HashMap::new() }; // not mounted
    let looks = |entry: fs::DirEntry| {
        let path = entry.path();
        let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
        let meta = entry.metadata().ok().filter(|meta| meta.is_file() && !hidden)?;
        let modified = meta.modified().ok()?.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let looks = Looks { bytes: meta.len(), modified_ms: modified.as_millis() as u64 };
        path.extension().is_some_and(|end| end == "tar").then_some((path, looks))
    };
    listing.flatten().filter_map(looks).take(ARCHIVES_MAX).collect()
}

fn read_outcome(path: &Path) -> Option<Outcome> {
    use std::io::Read;
    let mut text = Vec::new();
    File::open(path).ok()?.take(1 << 20).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

fn write_outcome(path: &Path, outcome: &Outcome) -> std::io::Result<()> {
    let mut text = serde_json::to_vec_pretty(outcome)?;
    text.push(b'\n');
    let temporary = path.with_extension("result-new");
    // Never through a link that somebody laid there.
    let _ = fs::remove_file(&temporary);
    let mut file = File::options().write(true).create_new(true).open(&temporary)?;
    file.write_all(&text)?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}
