//! The daemon's side of an import: starts the worker, feeds it, reads its lines, commits.
//!
//! Nothing here blocks the event loop for longer than one small file's fsync: the pipes are
//! non-blocking, the child's end is a pidfd, and what is left over is removed by a thread that
//! lives as long as that takes.

use super::limits::{io, refuse};
use super::store::Entry;
use super::{ImageError, Inner};
use crate::model::api::{ImageSummary, Progress};
use crate::model::{Clock, Digest, Reference, SystemClock};
use smol::future::FutureExt;
use smol::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader};
use smol::{Async, Timer};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Archives received at once. Each is a process of a few MiB until its layers are unpacked, which
/// one does at a time.
pub const IMPORTS_MAX: usize = 4;
/// A sender that is silent for this long is given up, so that it doesn't hold one of the four
/// for ever. `docker save` takes its time before the first byte of a large image.
const SILENCE_MAX: Duration = Duration::from_secs(300);
/// How long a line of progress waits for its receiver.
const TAKEN_WITHIN: Duration = Duration::from_secs(10);
/// A line of the worker's: the longest is a done with its names, a refusal has a few hundred bytes.
const LINE_BYTES_MAX: u64 = 1024 * 1024;

pub async fn import(
    inner: &Arc<Inner>,
    archive: impl AsyncRead + Unpin + Send,
    name: Option<Reference>,
    progress: smol::channel::Sender<Progress>,
) -> Result<ImageSummary, ImageError> {
    let _slot = inner.slots.acquire().await;
    let mut import = Import::start(inner.clone(), name.as_ref())?;
    let (stdin, stdout) = import.pipes()?;
    // Whichever ends the import comes first: the worker's last line, or an archive that can't be read.
    let said = listen(stdout, &progress).or(async {
        match feed(archive, stdin).await {
            Ok(()) => std::future::pending().await,
            Err(error) => Err(error),
        }
    });
    match said.await? {
        Some(Progress::Done(summary)) => {
            let status = import.ended().await?;
            if !status.success() {
                return Err(refuse(format!("the image worker ended with {status} after its work")));
            }
            import.commit(summary)
        }
        Some(Progress::Error(text)) => Err(ImageError::Refused(text)),
        _ => {
            let status = import.ended().await?;
            let text = "the image worker ended without a word";
            Err(refuse(format!("{text} ({status}): the archive needs too much memory, or is hostile")))
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
    stdout: Async<ChildStdout>,
    progress: &smol::channel::Sender<Progress>,
) -> Result<Option<Progress>, ImageError> {
    let mut lines = BufReader::new(stdout);
    let mut line = Vec::new();
    loop {
        line.clear();
        let mut one = (&mut lines).take(LINE_BYTES_MAX);
        let got = one.read_until(b'\n', &mut line).await.map_err(io("read from the image worker"))?;
        if got == 0 {
            return Ok(None);
        }
        let said = serde_json::from_slice(&line);
        match said.map_err(|error| io("understand the image worker")(error.into()))? {
            last @ (Progress::Done(_) | Progress::Error(_)) => return Ok(Some(last)),
            // How far it is may be left out when nobody keeps up; what it is about is waited for,
            // but not for ever: one that stopped listening must not keep the import.
            Progress::Read(bytes) => drop(progress.try_send(Progress::Read(bytes))),
            other => {
                let given_up = async {
                    Timer::after(TAKEN_WITHIN).await;
                };
                async { drop(progress.send(other).await) }.or(given_up).await;
            }
        }
    }
}

/// One import under way: a child and its staging directory. Dropping it, at whatever point, kills
/// the one and removes the other.
struct Import {
    inner: Arc<Inner>,
    staging: std::path::PathBuf,
    child: Option<Child>,
}

impl Import {
    fn start(inner: Arc<Inner>, name: Option<&Reference>) -> Result<Self, ImageError> {
        let staging_name = format!("import-{:016x}", fastrand::u64(..));
        let staging = inner.directory.staging().join(&staging_name);
        std::fs::create_dir(&staging).map_err(io("make a staging directory"))?;
        inner.state().importing += 1;
        let mut import = Self { inner, staging, child: None };
        let mut command = Command::new(&import.inner.exe);
        command.arg("image-worker").arg(import.inner.directory.path()).arg(&staging_name);
        command.args(name.map(Reference::as_str)).env_clear().current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        import.child = Some(command.spawn().map_err(io("start the image worker"))?);
        Ok(import)
    }

    fn pipes(&mut self) -> Result<(Async<ChildStdin>, Async<ChildStdout>), ImageError> {
        let child = self.child.as_mut().expect("started with a child");
        let stdin = child.stdin.take().expect("its standard input is a pipe");
        let stdout = child.stdout.take().expect("its standard output is a pipe");
        let non_blocking = "make a pipe to the image worker";
        Ok((Async::new(stdin).map_err(io(non_blocking))?, Async::new(stdout).map_err(io(non_blocking))?))
    }

    async fn ended(&mut self) -> Result<ExitStatus, ImageError> {
        let child = self.child.as_mut().expect("started with a child");
        let doing = "wait for the image worker";
        if let Some(status) = child.try_wait().map_err(io(doing))? {
            return Ok(status);
        }
        let pid = rustix::process::Pid::from_child(child);
        // Kernels before 5.3 have no pidfds. The worker is on its way out: this is a moment.
        if let Ok(pidfd) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) {
            Async::new(pidfd).map_err(io(doing))?.readable().await.map_err(io(doing))?;
        }
        child.wait().map_err(io(doing))
    }

    /// The image is on the disk; now it is known.
    fn commit(&self, summary: ImageSummary) -> Result<ImageSummary, ImageError> {
        let bad = || refuse("the image worker named no image");
        let digest = Digest::parse(&summary.digest).map_err(|_| bad())?;
        let mut state = self.inner.state();
        let mut refs = state.refs.clone();
        for name in &summary.references {
            let reference = Reference::parse(name).map_err(|_| bad())?;
            refs.references.insert(reference.as_str().to_owned(), digest.clone());
        }
        refs.images.entry(summary.digest).or_insert(Entry { imported: SystemClock::new().wall() });
        self.inner.record(&digest)?;
        self.inner.commit(&mut state, refs)?;
        self.inner.summary(&state.refs, &digest).map(|(summary, _)| summary)
    }
}

impl Drop for Import {
    fn drop(&mut self) {
        let mut child = self.child.take();
        if let Some(child) = &mut child {
            let _ = child.kill();
        }
        let (inner, staging) = (self.inner.clone(), self.staging.clone());
        let clean = move || {
            // First the child's end: until then it may still be writing.
            if let Some(mut child) = child {
                let _ = child.wait();
            }
            let mut state = inner.state();
            state.importing -= 1;
            let mut tidied = inner.directory.discard(&staging);
            if state.importing == 0 {
                tidied = tidied.and_then(|()| inner.directory.collect(&state.refs));
            }
            drop(state);
            if let Err(error) = tidied.and_then(|()| inner.directory.sweep_staging(&["trash-"])) {
                tracing::warn!(error = %error, cause = ?std::error::Error::source(&error), "leftovers of an import stay until the next start");
            }
        };
        in_thread(clean);
    }
}

/// Removes what was discarded.
pub fn empty_trash(inner: Arc<Inner>) {
    in_thread(move || {
        if let Err(error) = inner.directory.sweep_staging(&["trash-"]) {
            tracing::warn!(error = %error, cause = ?std::error::Error::source(&error), "removed layers stay on the disk until the next start");
        }
    });
}

/// Deleting a tree of thousands of files takes a second on flash. A thread of its own, and not a
/// pool: it is gone when it is done. There is one for each import or removal.
fn in_thread(work: impl FnOnce() + Send + 'static) {
    // Kept outside the closure, so that a machine out of threads still gets it done.
    let work = Arc::new(Mutex::new(Some(work)));
    let taken = work.clone();
    let builder = std::thread::Builder::new().name("neap-image-rm".into()).stack_size(1024 * 1024);
    if builder.spawn(move || run_once(&taken)).is_err() {
        run_once(&work);
    }
}

fn run_once(work: &Mutex<Option<impl FnOnce()>>) {
    let work = work.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(work) = work {
        work();
    }
}
