//! One attempt at a pull: the two workers, and what passes between them.

use super::{Job, Phase, View};
use crate::image::feed::Came;
use crate::image::job::{Job as Order, Source};
use crate::image::limits::io;
use crate::image::work::{Kind, Lines, Work};
use crate::image::worker::Line;
use crate::image::{ImageError, Inner};
use crate::model::Digest;
use crate::model::api::ImageSummary;
use smol::Async;
use smol::io::AsyncWriteExt;
use std::collections::BTreeSet;
use std::process::ChildStdin;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Layers are unpacked while they come, in a pull's first attempt. One that was cut off goes on
/// without that until all is here: else a bad link would have the same bytes unpacked, and written
/// to flash, again and again.
pub(super) async fn attempt(inner: &Arc<Inner>, job: &Arc<Job>) -> Result<ImageSummary, ImageError> {
    let settings = inner.settings();
    let (limits, trust) = inner.policy();
    let source = Source::of(&settings.images);
    let first = !job.tried.swap(true, Ordering::AcqRel);
    let slot = first.then(|| inner.slots.try_acquire()).flatten();
    let order = Order { name: Some(job.reference.clone()), trust, limits, source, ahead: slot.is_some() };
    let mut work = Work::with_job(inner.clone(), &order)?;
    job.change(|view| (view.phase, view.unpacking) = (Phase::Fetching, None));
    let mut come = Vec::new();
    let done = match slot {
        Some(_slot) => at_once(job, &mut work, &mut come).await,
        None => one_by_one(inner, job, &mut work, &mut come).await,
    };
    let done = match done {
        Ok(summary) => work.commit(summary),
        Err(Stop::Failed(error)) => Err(error),
        Err(Stop::Said(kind, last)) => Err(unexpected(job, &mut work, kind, last).await),
    };
    // What was refused would be refused again. What a full disk stopped is not fetched twice.
    let kept = if matches!(done, Ok(_) | Err(ImageError::Refused(_))) {
        forget(inner, &come);
        BTreeSet::new()
    } else {
        blobs(&come).cloned().collect()
    };
    inner.pulls.note_parts(&job.reference, kept);
    done
}

/// Of the worker that unpacks, in one pull; the first may have been somebody's doing.
const DEATHS_MAX: u32 = 2;

enum Stop {
    /// Its last line, or none, which was not the one that was hoped for.
    Said(Kind, Option<Line>),
    Failed(ImageError),
}

impl From<ImageError> for Stop {
    fn from(error: ImageError) -> Self {
        Self::Failed(error)
    }
}

async fn at_once(job: &Job, work: &mut Work, come: &mut Vec<Came>) -> Result<ImageSummary, Stop> {
    let (stdin, unpacking) = work.start(Kind::Unpack)?;
    let mut stdin = Async::new(stdin).map_err(io("make a pipe to the image worker"))?;
    let (_stdin, mut fetching) = work.start(Kind::Fetch)?;
    let work_now = &*work;
    let fetch = async {
        while let Some(came) = next(job, &mut fetching).await? {
            pass(&mut stdin, &came).await;
            note(come, came);
        }
        work_now.hold_layers();
        pass(&mut stdin, &Came::All).await;
        job.change(View::only_unpacks);
        Ok(())
    };
    let ((), summary) = smol::future::try_zip(fetch, unpack(job, unpacking)).await?;
    work.succeeded(Kind::Fetch).await?;
    work.succeeded(Kind::Unpack).await?;
    Ok(summary)
}

async fn one_by_one(
    inner: &Inner,
    job: &Job,
    work: &mut Work,
    come: &mut Vec<Came>,
) -> Result<ImageSummary, Stop> {
    let (_stdin, mut fetching) = work.start(Kind::Fetch)?;
    while let Some(came) = next(job, &mut fetching).await? {
        note(come, came);
    }
    work.succeeded(Kind::Fetch).await?;
    let _slot = inner.slots.acquire().await;
    let (stdin, unpacking) = work.start(Kind::Unpack)?;
    let mut stdin = Async::new(stdin).map_err(io("make a pipe to the image worker"))?;
    work.hold_layers();
    job.change(View::only_unpacks);
    let told = async {
        for came in come.iter().chain([&Came::All]) {
            pass(&mut stdin, came).await;
        }
        Ok(())
    };
    let ((), summary) = smol::future::try_zip(told, unpack(job, unpacking)).await?;
    work.succeeded(Kind::Unpack).await?;
    Ok(summary)
}

/// What else came of the fetching; `None`: all of it.
async fn next(job: &Job, fetching: &mut Lines) -> Result<Option<Came>, Stop> {
    loop {
        match fetching.next().await? {
            Some(Line::Progress(progress)) => job.change(|view| view.show(progress)),
            Some(Line::Came(came)) => return Ok(Some(came)),
            Some(Line::Fetched) => return Ok(None),
            last => return Err(Stop::Said(Kind::Fetch, last)),
        }
    }
}

async fn unpack(job: &Job, mut unpacking: Lines) -> Result<ImageSummary, Stop> {
    loop {
        match unpacking.next().await? {
            Some(Line::Progress(progress)) => job.change(|view| view.show(progress)),
            Some(Line::Done(summary)) => return Ok(summary),
            last => return Err(Stop::Said(Kind::Unpack, last)),
        }
    }
}

/// To who unpacks. One that has gone says why on its own line, or by its absence.
async fn pass(stdin: &mut Async<ChildStdin>, came: &Came) {
    let mut line = serde_json::to_vec(came).expect("strings and numbers serialise");
    line.push(b'\n');
    if stdin.write_all(&line).await.is_err() {
        std::future::pending().await
    }
}

/// What is told again to who unpacks afterwards, and forgotten at the end.
fn note(come: &mut Vec<Came>, came: Came) {
    if matches!(came, Came::Chosen(_) | Came::Whole { .. }) {
        come.push(came);
    }
}

fn forget(inner: &Inner, come: &[Came]) {
    let here = inner.directory.blobs();
    blobs(come).for_each(|digest| here.remove(digest));
}

fn blobs(come: &[Came]) -> impl Iterator<Item = &Digest> {
    let chosen = come.iter().filter_map(|came| match came {
        Came::Chosen(fetched) => Some(fetched),
        _ => None,
    });
    chosen.flat_map(|fetched| fetched.blobs())
}

async fn unexpected(job: &Job, work: &mut Work, kind: Kind, last: Option<Line>) -> ImageError {
    if let Some(Line::Failed(failed)) = last {
        return failed.into();
    }
    // Killed: by the kernel for its memory, or by somebody. What came is kept.
    let status = match work.ended(kind).await {
        Ok(status) => status,
        Err(error) => return error,
    };
    let text = format!("the image worker ended without a word ({status})");
    let deaths = if kind == Kind::Unpack { job.deaths.fetch_add(1, Ordering::AcqRel) + 1 } else { 0 };
    if deaths < DEATHS_MAX {
        return ImageError::Later { text, after: None };
    }
    let image = &job.reference;
    ImageError::Deadly(format!(
        "{text}, {deaths} times while it unpacked: image `{image}` needs too much memory, or is hostile; make \
         the image's layers smaller, or memory free on this node, and pull it again: what came is kept"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::fetch::Fetched;
    use crate::image::layout::Descriptor;
    use crate::image::pulls::Patience;
    use crate::image::trust::Decision;
    use crate::image::worker::Failed;
    use crate::image::{Goal, ImageStore};
    use crate::model::Reference;

    /// A store whose worker is this shell script; `$2` is its kind.
    fn store(dir: &std::path::Path, script: &str) -> ImageStore {
        let worker = dir.join("worker");
        // By a process of its own: a file that this one has open to write, a thread that forks
        // meanwhile has too, and then it can't be run (ETXTBSY).
        let mut write = std::process::Command::new("sh");
        write.args(["-c", "printf '#!/bin/sh\\n%s\\n' \"$1\" > \"$2\" && chmod 755 \"$2\"", "-", script]);
        assert!(write.arg(&worker).status().expect("runs").success());
        ImageStore::open(dir, worker).expect("opens")
    }

    fn job(store: &ImageStore, name: &str) -> (crate::image::Pull, Arc<Job>) {
        let name = Reference::parse(name).expect("a reference");
        let pull = store.pull(&name, Patience::Endless).expect("is taken");
        let job = pull.job.clone();
        (pull, job)
    }

    #[test]
    fn unpacking_that_kills_its_worker_twice_is_refused_with_the_way_out() {
        let dir = tempfile::tempdir().expect("a directory");
        let script = "case $2 in fetch) echo '\"fetched\"';; *) kill -9 $$;; esac";
        let store = store(dir.path(), script);
        let (_pull, job) = job(&store, "app:1");

        let first = smol::block_on(attempt(&store.inner, &job)).expect_err("it died");
        let second = smol::block_on(attempt(&store.inner, &job)).expect_err("it died again");

        assert!(matches!(first, ImageError::Later { .. }), "{first}");
        let ImageError::Deadly(text) = second else { panic!("{second}") };
        for part in ["signal: 9", "`app:1`", "too much memory, or is hostile", "pull it again"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn fetching_that_is_killed_is_tried_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = store(dir.path(), "case $2 in fetch) kill -9 $$;; *) cat;; esac");
        let (_pull, job) = job(&store, "app:1");

        for _ in 0..4 {
            let error = smol::block_on(attempt(&store.inner, &job)).expect_err("it died");

            assert!(matches!(error, ImageError::Later { .. }), "{error}");
        }
    }

    #[test]
    fn room_for_a_pull_is_not_made_of_what_came_of_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let digest = |letter: &str| Digest::parse(&format!("sha256:{}", letter.repeat(64))).expect("hex");
        let name = Reference::parse("app:1").expect("a reference");
        let decision = Decision { reference: name.clone(), at: crate::model::UnixMs(0), signed: None };
        let top = Descriptor::new("", digest("a"), 1);
        let fetched = Fetched { top, documents: vec![digest("a")], layers: vec![digest("b")], decision };
        let lacks = Failed::NoSpace { text: "too small".into(), missing_bytes: 10 };
        let said = [Line::Came(Came::Chosen(Box::new(fetched))), Line::Failed(lacks)]
            .map(|line| serde_json::to_string(&line).expect("serialises"));
        let script = format!("case $2 in fetch) printf '%s\\n' '{}' '{}';; *) cat;; esac", said[0], said[1]);
        let store = store(dir.path(), &script);
        let blobs = store.inner.directory.blobs().path().to_owned();
        let file = |letter: &str, end: &str| blobs.join(format!("{}{end}", letter.repeat(64)));
        let (ours, theirs) = (file("b", ".part"), file("c", ".part"));
        for path in [&ours, &theirs] {
            std::fs::write(path, [7; 100]).expect("written");
        }
        let (pull, job) = job(&store, "app:1");
        let error = smol::block_on(attempt(&store.inner, &job)).expect_err("there is no room");
        assert!(matches!(error, ImageError::NoSpace { .. }), "{error}");
        drop(pull);

        let needed = std::collections::HashSet::new();
        let (some, more) = (store.gc_for(&needed, 10, &name), store.gc_for(&needed, 10, &name));
        assert!(some.expect("collects"), "what belongs to nobody makes room");
        assert!(!more.expect("looks"), "and then there is none to make");
        assert!(ours.exists() && !theirs.exists());

        // Nor by anybody else while a function waits for it.
        store.keep_parts_of(&BTreeSet::from([name]));
        store.gc(&needed, Goal::Unneeded, false).expect("collects");
        assert!(ours.exists());
        store.keep_parts_of(&BTreeSet::new());
        store.gc(&needed, Goal::Unneeded, false).expect("collects");
        assert!(!ours.exists());
    }
}
