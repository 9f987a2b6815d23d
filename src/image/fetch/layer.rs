//! The layers of a pull, one after the other: each goes on where it stopped, from whichever source
//! brings it, until it is whole and its digest is right.

use super::{Fetch, Layer, Shown, Tries};
use crate::image::ImageError;
use crate::image::blobs::{Part, SYNC_EVERY};
use crate::image::feed::Came;
use crate::image::limits::{Budget, refuse};
use crate::image::pace::Pace;
use crate::image::registry::{self, Body, Registry, Trouble};
use crate::image::store::Directory;
use crate::image::worker::{Line, open_directory};
use crate::model::api::Progress;
use std::time::{Duration, Instant};

/// As much must have come for a broken connection to be taken up again at once.
const PROGRESS_BYTES: u64 = 16 * 1024;
/// An answer that contradicts itself this often is no accident of some proxy's.
const LIES_MAX: u32 = 3;
/// A source that brings less than that in so long is left, like one that is silent: pulls wait
/// for each other, and a drip would stop them all.
const DRIP_MAX: Duration = Duration::from_secs(300);

impl Fetch<'_> {
    pub(super) fn layers(&mut self, directory: &Directory, layers: &[Layer]) -> Result<(), ImageError> {
        let here = |layer: &Layer| self.blobs.here(&layer.digest).min(layer.bytes);
        self.progress.of = layers.iter().map(|layer| layer.bytes).sum();
        self.progress.bytes = layers.iter().map(here).sum();
        self.progress.show(true);
        let disk = open_directory(directory.path())?;
        let mut budget = Budget::new(self.limits.clone(), Some(disk));
        for layer in layers {
            if !self.blobs.is_whole(&layer.digest)
                && let Some(part) = self.layer(layer, &mut budget)?
            {
                self.verified.push(part);
                if self.kept_at.elapsed() >= SYNC_EVERY {
                    self.keep()?;
                }
            }
            self.progress.came(Came::Whole { layer: layer.digest.clone(), bytes: layer.bytes });
        }
        self.progress.show(true);
        Ok(())
    }

    /// What is whole, a power cut does not take any more.
    pub(super) fn keep(&mut self) -> Result<(), ImageError> {
        self.kept_at = Instant::now();
        self.verified.drain(..).try_for_each(Part::keep)
    }

    /// `None`: it has its name already.
    fn layer(&mut self, layer: &Layer, budget: &mut Budget) -> Result<Option<Part>, ImageError> {
        let mut part = self.blobs.part(&layer.digest, layer.bytes)?;
        // Another worker was at it while we waited for the lock.
        if self.blobs.is_whole(&layer.digest) {
            return Ok(None);
        }
        self.progress.told = 0;
        self.progress.came_to(&layer.digest, part.length());
        let mut refused: Vec<Option<String>> = vec![None; self.sources.len()];
        let (mut lies, mut damaged) = (0, 0);
        let mut at = self.at;
        loop {
            if part.length() == layer.bytes {
                if part.verify()? {
                    self.at = at;
                    return Ok(Some(part));
                }
                self.progress.told = 0;
                self.progress.came(Came::Anew { layer: layer.digest.clone() });
                self.progress.bytes = self.progress.bytes.saturating_sub(layer.bytes);
                damaged += 1;
                let from = self.sources[at].name();
                if damaged > 1 {
                    let text = format!("layer {} came damaged twice, at last from {from}", layer.digest);
                    return Err(refuse(format!("{text}: something on the way changes what it carries")));
                }
                let text = format!("layer {} came damaged from {from}, it is fetched anew", layer.digest);
                (self.progress.say)(Line::Progress(Progress::Warning(text)));
                at = (at + 1) % self.sources.len();
            }
            let before = part.length();
            let got =
                get_layer(&self.sources[at], &mut part, layer, budget, &mut self.pace, &mut self.progress);
            let trouble = match got {
                Ok(()) => continue,
                Err(Stop::Here(error)) => return Err(error),
                Err(Stop::There(trouble)) => trouble,
                Err(Stop::Lie(text)) => {
                    lies += 1;
                    let text = format!("{}: {text}", self.sources[at].name());
                    match lies < LIES_MAX {
                        true => Trouble::Passing { text, after: None },
                        false => Trouble::Refused(text),
                    }
                }
            };
            // While nothing comes, what is shown is all that came.
            self.progress.show(true);
            if part.length().saturating_sub(before) >= PROGRESS_BYTES {
                self.tries = Tries::default();
                continue;
            }
            match trouble {
                Trouble::Passing { text, after } => {
                    // Another source may do better; one that is alone is waited for.
                    let next = (at + 1..at + self.sources.len()).map(|n| n % self.sources.len());
                    let next = next.into_iter().find(|n| refused[*n].is_none());
                    self.tries.wait(text, after)?;
                    at = next.unwrap_or(at);
                }
                Trouble::Missing(text) | Trouble::Refused(text) => {
                    refused[at] = Some(text);
                    lies = 0;
                    let Some(next) = refused.iter().position(Option::is_none) else {
                        return Err(refuse(refused.into_iter().flatten().collect::<Vec<_>>().join("; ")));
                    };
                    at = next;
                }
            }
        }
    }
}

enum Stop {
    /// The disk's, not the network's.
    Here(ImageError),
    There(Trouble),
    Lie(&'static str),
}

/// One request for what is missing of a layer, and its answer as far as it comes.
fn get_layer(
    source: &Registry<'_>,
    part: &mut Part,
    layer: &Layer,
    budget: &mut Budget,
    pace: &mut Pace,
    progress: &mut Shown<'_>,
) -> Result<(), Stop> {
    let have = part.length();
    let range = ("range", format!("bytes={have}-"));
    let headers: &[_] = if have > 0 { &[range] } else { &[] };
    let mut answer = source.get("blobs", layer.digest.as_str(), headers).map_err(Stop::There)?;
    let length = answer.header("content-length").and_then(|text| text.parse().ok());
    let content_range = answer.header("content-range");
    let mut skip = match registry::judge(answer.status(), content_range, length, have, layer.bytes) {
        Body::Take { skip } => skip,
        Body::Refuse(text) => return Err(Stop::Lie(text)),
    };
    let (mut since, mut from) = (Instant::now(), have);
    while part.length() < layer.bytes {
        if since.elapsed() >= DRIP_MAX {
            let came = part.length() - from;
            if came < PROGRESS_BYTES {
                let text = format!("{}: {came} bytes in {} s", source.name(), DRIP_MAX.as_secs());
                return Err(Stop::There(Trouble::Passing { text, after: None }));
            }
            (since, from) = (Instant::now(), part.length());
        }
        let piece = answer.piece().map_err(|error| Stop::There(source.passing(&error)))?;
        let Some(mut piece) = piece else {
            let text = format!("{}: the answer ended early", source.name());
            return Err(Stop::There(Trouble::Passing { text, after: None }));
        };
        pace.spend(piece.len() as u64);
        let skipped = usize::try_from(skip).unwrap_or(usize::MAX).min(piece.len());
        skip -= skipped as u64;
        let _ = piece.split_to(skipped);
        let left = layer.bytes - part.length();
        piece.truncate(usize::try_from(left).unwrap_or(usize::MAX));
        budget.take_disk(piece.len() as u64).map_err(Stop::Here)?;
        part.append(&piece).map_err(Stop::Here)?;
        progress.bytes += piece.len() as u64;
        progress.came_to(&layer.digest, part.length());
        progress.show(false);
    }
    Ok(())
}
