//! The daemon's side of a worker: its process, its staging directory, its lines.
//!
//! Nothing here blocks the event loop for longer than one small file's fsync: the pipes are
//! non-blocking, the child's end is a pidfd, and what is left over is removed by a thread that
//! lives as long as that takes.

use super::job::Job;
use super::limits::{io, refuse};
use super::store::Entry;
use super::worker::Line;
use super::{ImageError, Inner};
use crate::model::api::ImageSummary;
use crate::model::{Clock, Digest, Reference, SystemClock};
use smol::Async;
use smol::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A line of the worker's: the longest is a done with its names, a refusal has a few hundred bytes.
const LINE_BYTES_MAX: u64 = 1024 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Import,
    Fetch,
    Unpack,
    Check,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Import => "import",
            Self::Fetch => "fetch",
            Self::Unpack => "unpack",
            Self::Check => "check",
        }
    }
}

/// A staging directory and the children at work in it. Dropping it, at whatever point, kills them
/// and removes it.
pub struct Work {
    inner: Arc<Inner>,
    staging_name: String,
    staging: std::path::PathBuf,
    children: Vec<(Kind, Child)>,
    holds_layers: AtomicBool,
}

impl Work {
    pub fn new(inner: Arc<Inner>) -> Result<Self, ImageError> {
        let staging_name = format!("import-{:016x}", fastrand::u64(..));
        let staging = inner.directory.staging().join(&staging_name);
        std::fs::create_dir(&staging).map_err(io("make a staging directory"))?;
        let (children, holds_layers) = (Vec::new(), AtomicBool::new(false));
        Ok(Self { inner, staging_name, staging, children, holds_layers })
    }

    pub fn staging(&self) -> &std::path::Path {
        &self.staging
    }

    /// With the job for it in its place.
    pub fn with_job(inner: Arc<Inner>, job: &Job) -> Result<Self, ImageError> {
        let work = Self::new(inner)?;
        job.write(&work.staging)?;
        Ok(work)
    }

    /// Before layers get their names, which nothing refers to yet: from now on nothing is
    /// collected.
    pub fn hold_layers(&self) {
        if !self.holds_layers.swap(true, Ordering::AcqRel) {
            self.inner.state().importing += 1;
        }
    }

    pub fn start(&mut self, kind: Kind) -> Result<(ChildStdin, Lines), ImageError> {
        if kind == Kind::Import {
            self.hold_layers();
        }
        let mut command = Command::new(&self.inner.exe);
        command.arg("image-worker").arg(kind.name()).arg(self.inner.directory.path()).arg(&self.staging_name);
        command.env_clear().current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().map_err(io("start the image worker"))?;
        let stdin = child.stdin.take().expect("its standard input is a pipe");
        let stdout = child.stdout.take().expect("its standard output is a pipe");
        self.children.push((kind, child));
        let stdout = Async::new(stdout).map_err(io("make a pipe to the image worker"))?;
        Ok((stdin, Lines { reader: BufReader::new(stdout), line: Vec::new() }))
    }

    pub async fn ended(&mut self, kind: Kind) -> Result<ExitStatus, ImageError> {
        let of_kind = self.children.iter_mut().rev().find(|(of, _)| *of == kind);
        let (_, child) = of_kind.expect("asked of one that was started");
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

    /// After its last line, which said that all went well.
    pub async fn succeeded(&mut self, kind: Kind) -> Result<(), ImageError> {
        let status = self.ended(kind).await?;
        match status.success() {
            true => Ok(()),
            false => Err(refuse(format!("the image worker ended with {status} after its work"))),
        }
    }

    /// The image is on the disk; now it is known.
    pub fn commit(&self, summary: ImageSummary) -> Result<ImageSummary, ImageError> {
        let bad = || refuse("the image worker named no image");
        let digest = Digest::parse(&summary.digest).map_err(|_| bad())?;
        let now = SystemClock::new().wall();
        let mut state = self.inner.state();
        let mut refs = state.refs.clone();
        for name in &summary.references {
            let reference = Reference::parse(name).map_err(|_| bad())?;
            refs.references.insert(reference.as_str().to_owned(), digest.clone());
        }
        let entry = refs.images.entry(summary.digest).or_insert(Entry { imported: now, used: None });
        entry.used = Some(now);
        self.inner.record(&digest)?;
        self.inner.commit(&mut state, refs)?;
        self.inner.summary(&state.refs, &digest).map(|(summary, _)| summary)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let mut children = std::mem::take(&mut self.children);
        for (_, child) in &mut children {
            let _ = child.kill();
        }
        let (inner, staging) = (self.inner.clone(), self.staging.clone());
        let held = self.holds_layers.load(Ordering::Acquire);
        let clean = move || {
            // First the children's end: until then they may still be writing.
            for (_, mut child) in children {
                let _ = child.wait();
            }
            let mut state = inner.state();
            let mut tidied = inner.directory.discard(&staging);
            if held {
                state.importing -= 1;
                if state.importing == 0 {
                    tidied = tidied.and_then(|()| inner.directory.collect(&state.refs));
                }
            }
            drop(state);
            if let Err(error) = tidied.and_then(|()| inner.directory.sweep_staging(&["trash-"])) {
                tracing::warn!(error = %error, cause = ?std::error::Error::source(&error), "leftovers of an import stay until the next start");
            }
        };
        in_thread(clean);
    }
}

/// What a worker says.
pub struct Lines {
    reader: BufReader<Async<ChildStdout>>,
    line: Vec<u8>,
}

impl Lines {
    /// `None`: it ended without a last word.
    pub async fn next(&mut self) -> Result<Option<Line>, ImageError> {
        self.line.clear();
        let mut one = (&mut self.reader).take(LINE_BYTES_MAX);
        let got = one.read_until(b'\n', &mut self.line).await.map_err(io("read from the image worker"))?;
        if got == 0 {
            return Ok(None);
        }
        serde_json::from_slice(&self.line).map(Some).map_err(|_| refuse("the image worker talks nonsense"))
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
