//! Which layers are read again, when, and what becomes of one that is damaged.
//!
//! checked.json holds when each layer was last found good. A damaged layer loses its mark
//! (layer.json becomes layer.damaged): a pull then takes it for missing and puts a new one in its
//! place. Until that comes it is used as it is: a function that runs is not stopped for a byte
//! that it may never read, and nobody may be near who could bring another.

use super::check::{Checked, Order};
use super::limits::{io, refuse};
use super::store::{read_json, write_json};
use super::work::{Kind, Work};
use super::worker::Line;
use super::{ImageError, ImageStore};
use crate::model::{Digest, UnixMs};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

const FILE: &str = "checked.json";
/// Layers read by one worker, so that what it found is noted now and then.
const LAYERS_MAX: usize = 16;

impl ImageStore {
    /// Reads what is due by `[images] check_every`, at its pace. The layers that are damaged.
    pub async fn check_due(&self, now: UnixMs) -> Result<Vec<(Digest, String)>, ImageError> {
        let settings = self.inner.settings();
        if settings.images.check_every.is_zero() {
            return Ok(Vec::new());
        }
        let every = i64::try_from(settings.images.check_every.as_millis()).unwrap_or(i64::MAX);
        let mut times = self.times();
        let layers = self.layers()?;
        times.retain(|layer, _| layers.iter().any(|known| known.as_str() == layer));
        // A clock that jumped back must not put checks off for years.
        let due = |layer: &&Digest| {
            times.get(layer.as_str()).is_none_or(|at| !(0..every).contains(&now.0.saturating_sub(at.0)))
        };
        let due: Vec<Digest> = layers.iter().filter(due).take(LAYERS_MAX).cloned().collect();
        if due.is_empty() {
            return Ok(Vec::new());
        }
        let checked = self.check(due, Some(settings.images.check_rate)).await?;
        for layer in checked.good.iter().chain(&checked.unsealed).chain(checked.damaged.iter().map(|d| &d.0))
        {
            times.insert(layer.as_str().to_owned(), now);
        }
        // First what counts: on a full disk the times can't be written, and a name can be changed.
        for (layer, _) in &checked.damaged {
            self.mark_damaged(layer)?;
        }
        match write_json(&self.inner.directory.path().join(FILE), &times) {
            Err(error) if checked.damaged.is_empty() => Err(error),
            Err(error) => {
                tracing::warn!(error = crate::errors::chain(&error), "these layers are read again soon");
                Ok(checked.damaged)
            }
            Ok(()) => Ok(checked.damaged),
        }
    }

    /// Layers that wait for repair.
    pub fn damaged(&self) -> Result<BTreeSet<Digest>, ImageError> {
        let layers = self.layers()?;
        let damaged = |layer: &Digest| self.inner.directory.layer(layer).join("layer.damaged").exists();
        Ok(layers.into_iter().filter(damaged).collect())
    }

    /// Whether one of the image's layers waits for repair.
    pub fn is_damaged(&self, digest: &Digest, damaged: &BTreeSet<Digest>) -> bool {
        !damaged.is_empty()
            && self
                .inner
                .record(digest)
                .is_ok_and(|r| r.layers.iter().any(|l| damaged.contains(&l.stored_as)))
    }

    async fn check(&self, layers: Vec<Digest>, rate: Option<u64>) -> Result<Checked, ImageError> {
        let mut work = Work::new(self.inner.clone())?;
        write_json(&work.staging().join(Order::FILE), &Order { layers, rate })?;
        let (_stdin, mut lines) = work.start(Kind::Check)?;
        match lines.next().await? {
            Some(Line::Checked(checked)) => {
                work.succeeded(Kind::Check).await?;
                Ok(checked)
            }
            Some(Line::Failed(failed)) => Err(failed.into()),
            _ => {
                let status = work.ended(Kind::Check).await?;
                Err(refuse(format!("the image worker ended without a word ({status})")))
            }
        }
    }

    fn mark_damaged(&self, layer: &Digest) -> Result<(), ImageError> {
        let directory = self.inner.directory.layer(layer);
        match std::fs::rename(directory.join("layer.json"), directory.join("layer.damaged")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(io(format!("mark layer {layer} as damaged"))(error))
            }
            _ => Ok(()),
        }
    }

    fn times(&self) -> BTreeMap<String, UnixMs> {
        // Lost or damaged, it says that nothing was checked.
        read_json(&self.inner.directory.path().join(FILE)).unwrap_or_default()
    }

    /// All that are there.
    fn layers(&self) -> Result<Vec<Digest>, ImageError> {
        let listing = std::fs::read_dir(self.inner.directory.layers()).map_err(io("list the layers"))?;
        let digest =
            |entry: std::fs::DirEntry| Digest::parse(&format!("sha256:{}", entry.file_name().to_str()?)).ok();
        let mut layers: Vec<Digest> = listing.flatten().filter_map(digest).collect();
        layers.sort();
        Ok(layers)
    }

    /// How often to look whether something is due.
    pub fn check_period(&self) -> Duration {
        let every = self.inner.settings().images.check_every;
        if every.is_zero() {
            Duration::from_secs(600)
        } else {
            (every / 4).clamp(Duration::from_millis(200), Duration::from_secs(600))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_is_marked_and_told_though_nothing_can_be_written() {
        let dir = tempfile::tempdir().expect("a directory");
        let layer = Digest::parse(&format!("sha256:{}", "a".repeat(64))).expect("hex");
        let said = Checked { damaged: vec![(layer.clone(), "changed".into())], ..Checked::default() };
        let said = serde_json::to_string(&Line::Checked(said)).expect("serialises");
        let script =
            format!("printf '#!/bin/sh\\necho '\\\''%s'\\\'' \\n' '{said}' > \"$1\" && chmod 755 \"$1\"");
        let worker = dir.path().join("worker");
        // By a process of its own, as this one's threads may fork while the file is open (ETXTBSY).
        let wrote = std::process::Command::new("sh").args(["-c", &script, "-"]).arg(&worker).status();
        assert!(wrote.expect("runs").success());
        let store = ImageStore::open(dir.path(), worker).expect("opens");
        let at = store.inner.directory.layer(&layer);
        std::fs::create_dir_all(&at).expect("made");
        std::fs::write(at.join("layer.json"), "{}").expect("written");
        // As on a full disk: the file's successor can't be made.
        std::fs::create_dir(dir.path().join("images/checked.tmp")).expect("made");

        let damaged = smol::block_on(store.check_due(UnixMs(0))).expect("checks");

        assert_eq!(damaged, [(layer.clone(), "changed".to_owned())]);
        assert_eq!(store.damaged().expect("known"), BTreeSet::from([layer]));
    }
}
