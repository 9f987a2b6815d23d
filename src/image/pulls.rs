//! Pulls: one at a time, in the order they were asked for, until each is done or given up.
//!
//! ```text
//!            asked for               window opens
//!              │        ┌─────────── Window ◀──────────┐ closes
//!              ▼        ▼                               │
//!            Queued ──────▶ Fetching ──────▶ Unpacking ─┴─▶ Done
//!              ▲               │ network
//!              └── Resting ◀───┘ (twice as long each time that not a byte came)
//! ```
//!
//! While layers come they are unpacked already, which nobody is told: what is waited for is the
//! link. Unpacking is what is left of it afterwards.
//!
//! One at a time, since the link is what is scarce: two images that share a layer fetch it once,
//! and the first is done sooner. Who asks for an image that is being pulled joins. When the last
//! who asked has gone, the pull stops; its blobs stay, so that the next goes on from there.

mod attempt;

use super::limits::refuse;
use super::{ImageError, ImageStore, Inner};
use crate::model::api::{ImageSummary, Progress, PullStatus};
use crate::model::{Clock, Digest, Reference, SystemClock, UnixMs};
use crate::watch::{Wake, Watch};
use smol::Timer;
use smol::future::FutureExt;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Different images asked for at once; a bound against a client in a loop.
const PULLS_MAX: usize = 64;
/// Rests in a row without a byte; then who waits at a terminal is told. With the waits below that
/// is an hour and a quarter.
const FRUITLESS_MAX: u32 = 10;
const REST: Duration = Duration::from_secs(5);
const REST_MAX: Duration = Duration::from_secs(15 * 60);
/// What a server asks for (Retry-After) is believed up to this.
const AFTER_MAX: Duration = Duration::from_secs(3600);

/// Who asks, and so how long it is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// Somebody waits: after ten rests without a byte it is given up.
    Bounded,
    /// A function needs it: for as long as it does.
    Endless,
}

#[derive(Clone, Debug)]
enum Phase {
    Queued,
    Window { opens: Instant },
    Fetching,
    Unpacking { layer: u32, of: u32, digest: String },
    Resting { until: Instant },
    Done(Result<ImageSummary, Arc<ImageError>>),
}

#[derive(Clone, Debug)]
struct View {
    phase: Phase,
    /// Which layer, while others still come.
    unpacking: Option<(u32, u32, String)>,
    bytes: u64,
    of: u64,
    fruitless: u32,
    last_error: Option<String>,
    warnings: u64,
    warning: String,
}

struct Job {
    reference: Reference,
    number: u64,
    asked: UnixMs,
    waiters: AtomicUsize,
    endless: AtomicBool,
    /// There was an attempt.
    tried: AtomicBool,
    /// How often the worker that unpacks died without a word.
    deaths: AtomicU32,
    view: Watch<View>,
}

impl View {
    fn show(&mut self, progress: Progress) {
        match progress {
            Progress::Fetching { bytes, of } => (self.bytes, self.of) = (bytes, of),
            Progress::Unpacking { layer, of, digest } => {
                self.unpacking = Some((layer, of, digest));
                if matches!(self.phase, Phase::Unpacking { .. }) {
                    self.only_unpacks();
                }
            }
            Progress::Warning(text) => {
                self.warnings += 1;
                self.warning = text;
            }
            _ => {}
        }
    }

    /// Nothing more comes.
    fn only_unpacks(&mut self) {
        let (layer, of, digest) = self.unpacking.clone().unwrap_or_default();
        self.phase = Phase::Unpacking { layer, of, digest };
    }
}

#[derive(Default)]
pub struct Pulls {
    jobs: Mutex<Jobs>,
    parts: Mutex<Parts>,
    wake: Wake,
}

/// Which blobs are on the disk for pulls that have not got through.
#[derive(Default)]
struct Parts {
    /// Of so many names at most; of those beyond, nothing is known.
    of: BTreeMap<Reference, BTreeSet<Digest>>,
    /// Names that functions wait for.
    wanted: BTreeSet<Reference>,
}

#[derive(Default)]
struct Jobs {
    next: u64,
    by_name: BTreeMap<Reference, Arc<Job>>,
}

/// A pull that somebody waits for; dropping it is giving up.
pub struct Pull {
    inner: Arc<Inner>,
    job: Arc<Job>,
    seen: Option<u64>,
    warnings: u64,
}

impl ImageStore {
    /// Asks for an image, or joins who has asked already. Nothing happens unless `drive` runs.
    pub fn pull(&self, reference: &Reference, patience: Patience) -> Result<Pull, ImageError> {
        let mut jobs = self.inner.pulls.jobs();
        if jobs.by_name.len() >= PULLS_MAX && !jobs.by_name.contains_key(reference) {
            return Err(refuse(format!("{PULLS_MAX} images are being pulled; try again when some are here")));
        }
        jobs.next += 1;
        let number = jobs.next;
        let job =
            jobs.by_name.entry(reference.clone()).or_insert_with(|| Arc::new(Job::new(reference, number)));
        job.waiters.fetch_add(1, Ordering::AcqRel);
        job.endless.fetch_or(patience == Patience::Endless, Ordering::AcqRel);
        let job = job.clone();
        drop(jobs);
        self.inner.pulls.wake.wake();
        Ok(Pull { inner: self.inner.clone(), job, seen: None, warnings: 0 })
    }

    /// Does what was asked for, for ever.
    pub async fn drive(&self) {
        loop {
            let woken = self.inner.pulls.wake.listen();
            match self.inner.pulls.next() {
                Ok(job) => run(&self.inner, &job).await,
                Err(Some(wait)) => {
                    let timer = async {
                        Timer::after(wait).await;
                    };
                    woken.or(timer).await;
                }
                Err(None) => woken.await,
            }
        }
    }

    /// Names that functions wait for: what is here of them is not removed to make room.
    pub fn keep_parts_of(&self, wanted: &BTreeSet<Reference>) {
        self.inner.pulls.parts().wanted.clone_from(wanted);
    }

    /// What is being pulled, as images that are not there yet.
    pub fn pulling(&self) -> Vec<ImageSummary> {
        let jobs = self.inner.pulls.jobs();
        let mut all: Vec<&Arc<Job>> = jobs.by_name.values().collect();
        all.sort_by_key(|job| job.number);
        all.into_iter().filter_map(|job| job.summary()).collect()
    }
}

impl Pull {
    /// What changed, the last of it `Done` or `Error`.
    pub async fn next(&mut self) -> Progress {
        let view = match self.seen {
            None => self.job.view.versioned(),
            Some(seen) => self.job.view.changed(seen).await,
        };
        self.seen = Some(view.0);
        let view = view.1;
        if view.warnings > self.warnings {
            self.warnings = view.warnings;
            self.seen = None; // and then what else is new
            return Progress::Warning(view.warning.clone());
        }
        let ms = |until: Instant| until.saturating_duration_since(Instant::now()).as_millis() as u64;
        match &view.phase {
            Phase::Queued => Progress::Waiting { why: "waits for its turn".to_owned(), ms: 0 },
            Phase::Window { opens } => {
                Progress::Waiting { why: "waits for [images] window".to_owned(), ms: ms(*opens) }
            }
            Phase::Resting { until } => {
                let why = view.last_error.clone().unwrap_or_default();
                Progress::Waiting { why, ms: ms(*until) }
            }
            Phase::Fetching => Progress::Fetching { bytes: view.bytes, of: view.of },
            Phase::Unpacking { layer, of, digest } => {
                Progress::Unpacking { layer: *layer, of: *of, digest: digest.clone() }
            }
            Phase::Done(Ok(summary)) => Progress::Done(summary.clone()),
            Phase::Done(Err(error)) => Progress::Error(crate::errors::chain(&**error)),
        }
    }

    /// Waits for its end.
    pub async fn done(&mut self) -> Result<ImageSummary, Arc<ImageError>> {
        let (mut seen, mut view) = self.job.view.versioned();
        loop {
            if let Phase::Done(result) = &view.phase {
                return result.clone();
            }
            (seen, view) = self.job.view.changed(seen).await;
        }
    }
}

impl Drop for Pull {
    fn drop(&mut self) {
        let mut jobs = self.inner.pulls.jobs();
        if self.job.waiters.fetch_sub(1, Ordering::AcqRel) == 1 {
            let same = jobs.by_name.get(&self.job.reference).is_some_and(|job| Arc::ptr_eq(job, &self.job));
            if same {
                jobs.by_name.remove(&self.job.reference);
            }
            // Wakes whoever runs it.
            self.job.change(|_| {});
        }
        drop(jobs);
        self.inner.pulls.wake.wake();
    }
}

impl Pulls {
    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        // Maps and counters: a panic elsewhere leaves them right.
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn parts(&self) -> MutexGuard<'_, Parts> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// After an attempt: what is on the disk of it for the next; nothing, when there is none.
    fn note_parts(&self, name: &Reference, blobs: BTreeSet<Digest>) {
        let Parts { of, wanted } = &mut *self.parts();
        of.remove(name);
        if blobs.is_empty() {
            return;
        }
        // Of a pull that nobody waits for, or who asked has gone.
        while of.len() >= PULLS_MAX {
            let unwanted = of.keys().find(|name| !wanted.contains(*name)).or(of.keys().next()).cloned();
            let Some(unwanted) = unwanted else { break };
            of.remove(&unwanted);
        }
        of.insert(name.clone(), blobs);
    }

    /// Blobs that belong to a pull that functions wait for, or to this one.
    pub(super) fn spared_parts(&self, of: Option<&Reference>) -> BTreeSet<Digest> {
        let parts = self.parts();
        let spared = parts.of.iter().filter(|(name, _)| Some(*name) == of || parts.wanted.contains(*name));
        spared.flat_map(|(_, blobs)| blobs.clone()).collect()
    }

    /// The one that is due, the longest asked for first; else how long until there is one.
    fn next(&self) -> Result<Arc<Job>, Option<Duration>> {
        let now = Instant::now();
        let jobs = self.jobs();
        let due = |job: &Job| match job.view.get().phase {
            Phase::Window { opens } => opens,
            Phase::Resting { until } => until,
            _ => now,
        };
        let first = jobs.by_name.values().filter(|job| due(job) <= now).min_by_key(|job| job.number);
        match first {
            Some(job) => Ok(job.clone()),
            None => Err(jobs.by_name.values().map(|job| due(job).saturating_duration_since(now)).min()),
        }
    }

    /// Nobody joins it from here on: who asks again starts anew.
    fn finish(&self, job: &Arc<Job>, result: Result<ImageSummary, ImageError>) {
        let mut jobs = self.jobs();
        if jobs.by_name.get(&job.reference).is_some_and(|known| Arc::ptr_eq(known, job)) {
            jobs.by_name.remove(&job.reference);
        }
        drop(jobs);
        job.change(|view| view.phase = Phase::Done(result.map_err(Arc::new)));
    }
}

impl Job {
    fn new(reference: &Reference, number: u64) -> Self {
        let view = View {
            phase: Phase::Queued,
            unpacking: None,
            bytes: 0,
            of: 0,
            fruitless: 0,
            last_error: None,
            warnings: 0,
            warning: String::new(),
        };
        Self {
            reference: reference.clone(),
            number,
            asked: SystemClock::new().wall(),
            waiters: AtomicUsize::new(0),
            endless: AtomicBool::new(false),
            tried: AtomicBool::new(false),
            deaths: AtomicU32::new(0),
            view: Watch::new(view),
        }
    }

    fn change(&self, change: impl FnOnce(&mut View)) {
        let mut view = (*self.view.get()).clone();
        change(&mut view);
        self.view.set(view);
    }

    fn summary(&self) -> Option<ImageSummary> {
        let view = self.view.get();
        let (state, until) = match &view.phase {
            Phase::Queued => ("waiting", None),
            Phase::Window { opens } => ("window", Some(*opens)),
            Phase::Fetching => ("fetching", None),
            Phase::Unpacking { .. } => ("unpacking", None),
            Phase::Resting { until } => ("resting", Some(*until)),
            Phase::Done(_) => return None,
        };
        let ms = |until: Instant| until.saturating_duration_since(Instant::now()).as_millis() as u64;
        let pull = PullStatus {
            state: state.to_owned(),
            bytes: view.bytes,
            of: view.of,
            last_error: view.last_error.clone(),
            retry_in_ms: until.map(ms),
        };
        Some(ImageSummary {
            references: vec![self.reference.as_str().to_owned()],
            digest: String::new(),
            platform: String::new(),
            bytes: 0,
            imported: self.asked,
            used_by: Vec::new(),
            pull: Some(pull),
        })
    }

    async fn abandoned(&self) {
        let (mut seen, _) = self.view.versioned();
        while self.waiters.load(Ordering::Acquire) > 0 {
            (seen, _) = self.view.changed(seen).await;
        }
    }
}

/// One attempt, and what follows from it.
async fn run(inner: &Arc<Inner>, job: &Arc<Job>) {
    enum End {
        Ended(Result<ImageSummary, ImageError>),
        Abandoned,
        Closed,
    }
    let window = inner.settings().images.window;
    let clock = || SystemClock::new().wall().0.max(0) as u64 / 1000;
    if let Some(window) = window {
        let wait = window.opens_in(clock());
        if !wait.is_zero() {
            return job.change(|view| view.phase = Phase::Window { opens: Instant::now() + wait });
        }
    }
    let before = job.view.get().bytes;
    let ended = async { End::Ended(attempt::attempt(inner, job).await) };
    let abandoned = async {
        job.abandoned().await;
        End::Abandoned
    };
    let closed = async {
        match window {
            Some(window) => Timer::after(window.closes_in(clock())).await,
            None => std::future::pending().await,
        };
        // When only the unpacking is left, that costs no link.
        if matches!(job.view.get().phase, Phase::Unpacking { .. }) {
            std::future::pending::<()>().await;
        }
        End::Closed
    };
    let error = match ended.or(abandoned).or(closed).await {
        End::Abandoned => return,
        End::Closed => return job.change(|view| view.phase = Phase::Queued),
        End::Ended(Ok(summary)) => return inner.pulls.finish(job, Ok(summary)),
        End::Ended(Err(error)) => error,
    };
    let ImageError::Later { text, after } = error else {
        return inner.pulls.finish(job, Err(error));
    };
    let view = job.view.get();
    let fruitless = if view.bytes > before { 0 } else { view.fruitless + 1 };
    if fruitless > FRUITLESS_MAX && !job.endless.load(Ordering::Acquire) {
        let kept = "what came is kept, pulling again goes on from there";
        let text = format!("given up after {fruitless} attempts without a byte: {text}; {kept}");
        return inner.pulls.finish(job, Err(refuse(text)));
    }
    let rest = (REST * (1 << fruitless.min(10))).min(REST_MAX);
    let rest = after.map_or(rest, |after| after.min(AFTER_MAX).max(REST));
    let rest = rest.mul_f64(0.75 + 0.5 * fastrand::f64());
    tracing::info!(image = %job.reference, error = text, rest_s = rest.as_secs(), "pull rests");
    job.change(|view| {
        view.fruitless = fruitless;
        view.last_error = Some(text);
        view.phase = Phase::Resting { until: Instant::now() + rest };
    });
}
