//! An import: an archive is fed to a worker, its progress passed on, the image made known.

use super::job::{Job, Source};
use super::limits::io;
use super::work::{Kind, Lines, Work};
use super::worker::Line;
use super::{ImageError, Inner};
use crate::model::Reference;
use crate::model::api::{ImageSummary, Progress};
use smol::future::FutureExt;
use smol::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use smol::{Async, Timer};
use std::process::ChildStdin;
use std::sync::Arc;
use std::time::Duration;

/// Archives received at once. Each is a process of a few MiB until its layers are unpacked, which
/// one does at a time.
pub const IMPORTS_MAX: usize = 4;
/// A sender that is silent for this long is given up, so that it doesn't hold one of the four
/// for ever. `docker save` takes its time before the first byte of a large image.
const SILENCE_MAX: Duration = Duration::from_secs(300);
/// How long a line of progress waits for its receiver.
const TAKEN_WITHIN: Duration = Duration::from_secs(10);

pub async fn import(
    inner: &Arc<Inner>,
    archive: impl AsyncRead + Unpin + Send,
    name: Option<Reference>,
    progress: smol::channel::Sender<Progress>,
) -> Result<ImageSummary, ImageError> {
    let _slot = inner.slots.acquire().await;
    let (limits, trust) = inner.policy();
    let job = Job { name, trust, limits, source: Source::default(), ahead: false };
    let mut work = Work::with_job(inner.clone(), &job)?;
    let (stdin, lines) = work.start(Kind::Import)?;
    let stdin = Async::new(stdin).map_err(io("make a pipe to the image worker"))?;
    // Whichever ends the import comes first: the worker's last line, or an archive that can't be read.
    let said = listen(lines, &progress).or(async {
        match feed(archive, stdin).await {
            Ok(()) => std::future::pending().await,
            Err(error) => Err(error),
        }
    });
    match said.await? {
        Some(Line::Done(summary)) => {
            work.succeeded(Kind::Import).await?;
            work.commit(summary)
        }
        Some(Line::Failed(failed)) => Err(failed.into()),
        _ => {
            let status = work.ended(Kind::Import).await?;
            let text = "the image worker ended without a word";
            let why = format!("{text} ({status}): the archive needs too much memory, or is hostile");
            Err(ImageError::Deadly(why))
        }
    }
}

/// `Ok`: all of it was sent, or the worker wants no more and says why on its own line.
async fn feed(mut archive: impl AsyncRead + Unpin, mut stdin: Async<ChildStdin>) -> Result<(), ImageError> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let read = archive.read(&mut buffer).or(async {
            Timer::after(SILENCE_MAX).await;
            Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "the sender has been silent for 5 minutes"))
        });
        let got = read.await.map_err(io("receive the archive"))?;
        // Dropping the pipe is how the worker sees the end.
        if got == 0 || stdin.write_all(&buffer[..got]).await.is_err() {
            return Ok(());
        }
    }
}

/// Passes progress on; returns the last line, `None` when there is none that says how it ended.
async fn listen(
    mut lines: Lines,
    progress: &smol::channel::Sender<Progress>,
) -> Result<Option<Line>, ImageError> {
    loop {
        match lines.next().await? {
            // How far it is may be left out when nobody keeps up; what it is about is waited for,
            // but not for ever: one that stopped listening must not keep the import.
            Some(Line::Progress(Progress::Read(bytes))) => drop(progress.try_send(Progress::Read(bytes))),
            Some(Line::Progress(other)) => {
                let given_up = async {
                    Timer::after(TAKEN_WITHIN).await;
                };
                async { drop(progress.send(other).await) }.or(given_up).await;
            }
            last => return Ok(last),
        }
    }
}
