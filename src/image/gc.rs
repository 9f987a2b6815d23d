//! Which images go. Nobody's images are removed for a small disk's sake unless the disk says so
//! (`gc_high`), age says so (`keep_age`), or a person does; and never one that a function needs.

use super::limits::io;
use super::{ImageError, ImageStore, work};
use crate::config::images::Images;
use crate::model::api::Collected;
use crate::model::{Clock, Digest, Reference, SystemClock, UnixMs};
use std::collections::{BTreeMap, HashSet};

/// refs.json is written for a use at most once a day: it spares flash.
const USED_MS: i64 = 86_400_000;

/// How much is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Everything that is not needed.
    Unneeded,
    /// What nobody needed since, and then until so many bytes are free; nothing that came or was
    /// needed after `spare_after`: somebody may be about to deploy it.
    Since { used_before: Option<UnixMs>, bytes: u64, spare_after: UnixMs },
}

/// An image that is not needed.
#[derive(Clone, Debug)]
struct Candidate {
    digest: Digest,
    named: bool,
    used: UnixMs,
}

/// The digests to remove, and the bytes that come free. `layers`: of every image that is there.
fn choose(
    mut candidates: Vec<Candidate>,
    layers: &BTreeMap<Digest, Vec<(Digest, u64)>>,
    goal: Goal,
) -> (Vec<Digest>, u64) {
    // Names that an import gave to another image are gone for good: those images first.
    candidates.sort_by(|a, b| (a.named, a.used, &a.digest).cmp(&(b.named, b.used, &b.digest)));
    let mut users: BTreeMap<&Digest, usize> = BTreeMap::new();
    for (layer, _) in layers.values().flat_map(|of| once_each(of)) {
        *users.entry(layer).or_default() += 1;
    }
    let (mut gone, mut freed) = (Vec::new(), 0);
    for candidate in candidates {
        let wanted = match goal {
            Goal::Unneeded => true,
            Goal::Since { used_before, bytes, spare_after } => {
                candidate.used < spare_after
                    && (freed < bytes || used_before.is_some_and(|before| candidate.used < before))
            }
        };
        if !wanted {
            continue;
        }
        for (layer, bytes) in layers.get(&candidate.digest).into_iter().flat_map(|of| once_each(of)) {
            if let Some(count) = users.get_mut(layer) {
                *count -= 1;
                freed += if *count == 0 { bytes } else { 0 };
            }
        }
        gone.push(candidate.digest);
    }
    (gone, freed)
}

fn once_each(layers: &[(Digest, u64)]) -> impl Iterator<Item = (&Digest, u64)> {
    layers.iter().map(|(layer, bytes)| (layer, *bytes)).collect::<BTreeMap<_, _>>().into_iter()
}

/// What the disk and the age of images ask for now; `None`: nothing.
pub fn goal(images: &Images, free: u64, total: u64, now: UnixMs) -> Option<Goal> {
    let used = total.saturating_sub(free);
    let share = |percent: u8| (u128::from(total) * u128::from(percent) / 100) as u64;
    let bytes = if used > share(images.gc_high) { used - share(images.gc_low) } else { 0 };
    let keep_ms = i64::try_from(images.keep_age.as_millis()).unwrap_or(i64::MAX);
    let used_before = (keep_ms > 0).then(|| UnixMs(now.0.saturating_sub(keep_ms)));
    let spare_after = UnixMs(now.0.saturating_sub(USED_MS));
    (bytes > 0 || used_before.is_some()).then_some(Goal::Since { used_before, bytes, spare_after })
}

impl ImageStore {
    /// Removes what is not in `needed`, as far as the goal asks; a dry run only tells.
    pub fn gc(&self, needed: &HashSet<Digest>, goal: Goal, dry: bool) -> Result<Collected, ImageError> {
        self.gc_but(needed, goal, dry, None)
    }

    /// `pull`: what is on the disk of it stays, as of those that functions wait for.
    fn gc_but(
        &self,
        needed: &HashSet<Digest>,
        mut goal: Goal,
        dry: bool,
        pull: Option<&Reference>,
    ) -> Result<Collected, ImageError> {
        let wanted = bytes_wanted(goal);
        let mut state = self.inner.state();
        let mut layers = BTreeMap::new();
        let mut candidates = Vec::new();
        let mut unknown = false;
        for (text, entry) in &state.refs.images {
            let Ok(digest) = Digest::parse(text) else { continue };
            let Ok(record) = self.inner.record(&digest) else {
                unknown = true; // told by `collect`; it stays until a person has looked
                continue;
            };
            let of = record.layers.iter().map(|l| (l.stored_as.clone(), l.bytes)).collect();
            layers.insert(digest.clone(), of);
            if !needed.contains(&digest) {
                let named = state.refs.references.values().any(|of| *of == digest);
                candidates.push(Candidate { digest, named, used: entry.used.unwrap_or(entry.imported) });
            }
        }
        // Then no layer goes (see `collect`), and no image has to for the room that it would make.
        if let (true, Goal::Since { bytes, .. }) = (unknown, &mut goal) {
            *bytes = 0;
        }
        let (gone, freed) = choose(candidates, &layers, goal);
        let mut bytes = if unknown { 0 } else { freed };
        let mut images = Vec::new();
        let mut refs = state.refs.clone();
        for digest in &gone {
            images.push(self.inner.summary(&state.refs, digest)?.0);
            refs.references.retain(|_, of| of != digest);
            refs.images.remove(digest.as_str());
        }
        // Blobs belong to pulls that come back for them, until a disk is full or a person asks.
        let all = self.pulling().is_empty() && wanted > bytes;
        let spared = self.inner.pulls.spared_parts(pull);
        bytes += self.inner.directory.blobs().sweep(all, &spared, dry)?;
        if !dry {
            self.inner.commit(&mut state, refs)?;
        }
        Ok(Collected { dry_run: dry, images, bytes })
    }

    /// What `[images]` asks for by the disk's fill and by age; `None`: nothing was asked.
    pub fn gc_by_watermark(
        &self,
        needed: &HashSet<Digest>,
        now: UnixMs,
    ) -> Result<Option<Collected>, ImageError> {
        // On a disk that is full this may have no room, and then room is what has to be made.
        let noted = self.note_use(needed, now);
        let path = self.inner.directory.path();
        let stat = rustix::fs::statvfs(path).map_err(|errno| io("ask how full the disk is")(errno.into()))?;
        let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
        let Some(goal) = goal(&self.inner.settings().images, bytes(stat.f_bavail), bytes(stat.f_blocks), now)
        else {
            return noted.map(|()| None);
        };
        self.gc(needed, goal, false).map(Some)
    }

    /// Makes room for a pull that lacked some: what was used longest ago goes, and nothing that
    /// came of the pull itself. Whether any was made.
    pub fn gc_for(&self, needed: &HashSet<Digest>, bytes: u64, pull: &Reference) -> Result<bool, ImageError> {
        let spare_after = UnixMs(SystemClock::new().wall().0.saturating_sub(USED_MS));
        let goal = Goal::Since { used_before: None, bytes, spare_after };
        let would = self.gc_but(needed, goal, true, Some(pull))?;
        if would.bytes < bytes {
            return Ok(false); // removing it all would not help
        }
        self.gc_but(needed, goal, false, Some(pull)).map(|_| true)
    }

    fn note_use(&self, needed: &HashSet<Digest>, now: UnixMs) -> Result<(), ImageError> {
        let mut state = self.inner.state();
        let mut refs = state.refs.clone();
        for (digest, entry) in &mut refs.images {
            let used = Digest::parse(digest).is_ok_and(|digest| needed.contains(&digest));
            if used && entry.used.is_none_or(|at| now.0.saturating_sub(at.0) >= USED_MS) {
                entry.used = Some(now);
            }
        }
        self.inner.commit(&mut state, refs)
    }

    /// Removes trash now; a removal that was interrupted left some.
    pub fn empty_trash(&self) {
        work::empty_trash(self.inner.clone());
    }
}

fn bytes_wanted(goal: Goal) -> u64 {
    match goal {
        Goal::Unneeded => u64::MAX,
        Goal::Since { bytes, .. } => bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::defaults;
    use std::time::Duration;

    fn digest(letter: char) -> Digest {
        Digest::parse(&format!("sha256:{}", letter.to_string().repeat(64))).expect("hex")
    }

    fn candidate(letter: char, named: bool, used: i64) -> Candidate {
        Candidate { digest: digest(letter), named, used: UnixMs(used) }
    }

    /// Image `a` and `b` share a layer; `c` is needed and has one of its own.
    fn layers() -> BTreeMap<Digest, Vec<(Digest, u64)>> {
        BTreeMap::from([
            (digest('a'), vec![(digest('0'), 100), (digest('1'), 10), (digest('1'), 10)]),
            (digest('b'), vec![(digest('0'), 100)]),
            (digest('c'), vec![(digest('2'), 1000)]),
        ])
    }

    #[test]
    fn least_recently_used_goes_first_until_the_goal_is_reached() {
        let candidates = vec![candidate('a', true, 2), candidate('b', true, 1)];
        let spare_after = UnixMs(3);
        let goal = |bytes| Goal::Since { used_before: None, bytes, spare_after };

        // b alone frees nothing: a has its layer too.
        assert_eq!(choose(candidates.clone(), &layers(), goal(1)), (vec![digest('b'), digest('a')], 110));
        assert_eq!(choose(candidates.clone(), &layers(), goal(0)), (vec![], 0));
        assert_eq!(choose(candidates.clone(), &layers(), Goal::Unneeded).0.len(), 2);
        let old = Goal::Since { used_before: Some(UnixMs(2)), bytes: 0, spare_after };
        assert_eq!(choose(candidates.clone(), &layers(), old), (vec![digest('b')], 0));
        let new = Goal::Since { used_before: None, bytes: 1, spare_after: UnixMs(1) };
        assert_eq!(choose(candidates, &layers(), new), (vec![], 0));
    }

    #[test]
    fn unnamed_images_go_before_named_ones() {
        let candidates = vec![candidate('b', true, 1), candidate('a', false, 9)];

        let goal = Goal::Since { used_before: None, bytes: 5, spare_after: UnixMs(10) };
        let (gone, freed) = choose(candidates, &layers(), goal);

        assert_eq!((gone, freed), (vec![digest('a')], 10));
    }

    #[test]
    fn nothing_is_asked_below_the_watermark() {
        let mut images = defaults::images();

        let (now, spare_after) = (UnixMs(USED_MS + 5000), UnixMs(5000));
        assert_eq!(goal(&images, 16, 100, now), None);
        let half = Goal::Since { used_before: None, bytes: 10, spare_after };
        assert_eq!(goal(&images, 10, 100, now), Some(half));
        images.keep_age = Duration::from_secs(1);
        let used_before = Some(UnixMs(now.0 - 1000));
        let old = Some(Goal::Since { used_before, bytes: 0, spare_after });
        assert_eq!(goal(&images, 50, 100, now), old);
    }
}
