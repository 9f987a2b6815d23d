//! One attempt at a pull: the two workers, and what passes between them.

use super::{Job, Phase, View};
use crate::image::feed::Came;
use crate::image::job::{Job as Order, Source};
use crate::image::limits::io;
use crate::image::work::{Kind, Lines, Work};
use crate::image::worker::Line;
use crate::image::{ImageError, Inner};
use crate::model::api::ImageSummary;
use smol::Async;
use smol::io::AsyncWriteExt;
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
        Err(Stop::Said(kind, last)) => Err(unexpected(&mut work, kind, last).await),
    };
    // What was refused would be refused again. What a full disk stopped is not fetched twice.
    if matches!(done, Ok(_) | Err(ImageError::Refused(_))) {
        forget(inner, &come);
    }
    done
}

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
    let blobs = inner.directory.blobs();
    for came in come {
        if let Came::Chosen(fetched) = came {
            fetched.blobs().for_each(|digest| blobs.remove(digest));
        }
    }
}

async fn unexpected(work: &mut Work, kind: Kind, last: Option<Line>) -> ImageError {
    match last {
        Some(Line::Failed(failed)) => failed.into(),
        _ => match work.ended(kind).await {
            // Killed: by the kernel for its memory, or by somebody. What came is kept.
            Ok(status) => {
                let text = format!("the image worker ended without a word ({status})");
                ImageError::Later { text, after: None }
            }
            Err(error) => error,
        },
    }
}
