//! One launcher's life, seen from the daemon: executed, ready, asked and answering, gone.
//!
//! Requests are answered or, when the launcher dies, all fail as lost; its instances end as
//! `Exit::Lost`. Nothing is carried over to the next.

use super::wire::{self, MESSAGE_BYTES_MAX, Orders, Refusal, Report, Request};
use super::{Exit, RuntimeError, sys};
use futures_lite::FutureExt;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::Signal;
use smol::channel::{Receiver, Sender};
use smol::{Async, Timer};
use std::collections::{HashMap, HashSet};
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Starting takes 50 ms; a machine that needs longer than this is not coming back.
const READY_MAX: Duration = Duration::from_secs(20);

/// A launcher that leaves a request unanswered for so long hangs in a system call; it is killed.
pub const ANSWER_MAX: Duration = Duration::from_secs(30);

/// A killed process ends at once, but for one that the kernel can't interrupt.
const END_MAX: Duration = Duration::from_secs(5);

/// One launcher's life.
pub struct Session {
    socket: Async<OwnedFd>,
    /// The launcher, our child; when it has ended, every container has.
    process: Async<OwnedFd>,
    pid: i32,
    /// Its number may be another child's by now.
    reaped: AtomicBool,
    pub started: Instant,
    books: Mutex<Books>,
}

#[derive(Default)]
struct Books {
    /// Set when the launcher died: nothing is added afterwards.
    closed: bool,
    prepared: HashSet<String>,
    requests_made: u64,
    answers: HashMap<u64, Sender<Answer>>,
    exits: HashMap<String, Sender<Exit>>,
    /// What the rules of ways out belong to (`Report::Ruled`).
    rules: Option<OwnedFd>,
}

pub enum Answer {
    Done,
    Created(Process),
    Refused(Refusal),
}

/// A container's first process. Dropping it kills it, and with it the whole container.
pub struct Process {
    pidfd: OwnedFd,
}

impl Process {
    pub fn signal(&self, signal: i32) {
        if let Some(signal) = Signal::from_named_raw(signal) {
            let _ = rustix::process::pidfd_send_signal(&self.pidfd, signal); // it may have ended
        }
    }
}

impl Process {
    /// The same process by another descriptor, which doesn't kill it when it goes.
    pub fn watched(&self) -> io::Result<OwnedFd> {
        self.pidfd.try_clone()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}

/// A launcher that has yet to say that it is ready.
pub struct Launching {
    socket: OwnedFd,
    process: OwnedFd,
    pid: i32,
}

impl Launching {
    /// Executes `neap launcher`. The calling thread is the one that it dies with.
    pub fn execute(exe: &File, orders: &Orders) -> Result<Self, RuntimeError> {
        let text = serde_json::to_string(orders).map_err(|err| RuntimeError::Launcher(err.to_string()))?;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(|err| RuntimeError::io("make the control socket")(err.into()))?;
        let wrong = RuntimeError::io("start the launcher");
        let executed = || -> io::Result<(i32, OwnedFd)> {
            let null = File::options().write(true).open("/dev/null")?;
            let arguments = ["neap", "launcher", "enclose", &text]
                .map(CString::new)
                .into_iter()
                .collect::<Result<Vec<_>, _>>()?;
            sys::execute_as_first_process(exe.as_fd(), &arguments, theirs.as_fd(), null.as_fd())
        };
        let (pid, process) = executed().map_err(wrong)?;
        Ok(Self { socket: ours, process, pid })
    }

    pub fn wait_until_ready(self) -> Result<(Session, Vec<String>), RuntimeError> {
        use rustix::event::{PollFd, PollFlags, poll};
        let mut watched = [PollFd::new(&self.socket, PollFlags::IN)];
        let timeout = rustix::time::Timespec { tv_sec: READY_MAX.as_secs() as i64, tv_nsec: 0 };
        let ready = loop {
            match poll(&mut watched, Some(&timeout)) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other,
            }
        };
        match ready {
            Ok(n) if n > 0 => self.opened(),
            _ => self.abandoned("it did not get ready in time".to_owned()),
        }
    }

    pub async fn ready(self) -> Result<(Session, Vec<String>), RuntimeError> {
        let readable = async {
            match Async::new(self.socket.as_fd()) {
                Ok(socket) => socket.readable().await.is_ok(),
                Err(_) => false,
            }
        };
        let late = async {
            Timer::after(READY_MAX).await;
            false
        };
        match readable.or(late).await {
            true => self.opened(),
            false => self.abandoned("it did not get ready in time".to_owned()),
        }
    }

    fn opened(self) -> Result<(Session, Vec<String>), RuntimeError> {
        let mut buffer = vec![0; MESSAGE_BYTES_MAX];
        let first = match wire::receive(&self.socket, &mut buffer) {
            Ok(Some((bytes, _))) => serde_json::from_slice(bytes).ok(),
            _ => None,
        };
        let warnings = match first {
            Some(Report::Ready { warnings }) => warnings,
            Some(Report::Unable { why }) => return self.abandoned(why),
            _ => return self.abandoned("it ended before it was ready".to_owned()),
        };
        let watch = RuntimeError::io("watch the launcher");
        let opened = || -> io::Result<Session> {
            Ok(Session {
                socket: Async::new(self.socket)?,
                process: Async::new(self.process)?,
                pid: self.pid,
                reaped: AtomicBool::new(false),
                started: Instant::now(),
                books: Mutex::default(),
            })
        };
        Ok((opened().map_err(watch)?, warnings))
    }

    fn abandoned(self, why: String) -> Result<(Session, Vec<String>), RuntimeError> {
        let _ = rustix::process::pidfd_send_signal(&self.process, Signal::KILL);
        reap(self.pid);
        Err(RuntimeError::Launcher(format!("the launcher can't work: {why}")))
    }
}

/// Waits for a child that was killed.
fn reap(pid: i32) {
    let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None);
}

impl Session {
    /// Until the launcher is gone.
    pub async fn serve(&self) {
        let reading = async {
            let mut buffer = vec![0; MESSAGE_BYTES_MAX];
            // An error or the end: the launcher is no longer one.
            while let Ok(Some((report, descriptors))) = self.receive(&mut buffer).await {
                self.enter(report, descriptors);
            }
        };
        let dying = async {
            let _ = self.process.readable().await;
        };
        reading.or(dying).await;
    }

    async fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<(Report, Vec<OwnedFd>)>> {
        loop {
            let got = match wire::receive(self.socket.as_fd(), buffer) {
                Ok(None) => return Ok(None),
                Ok(Some((bytes, descriptors))) => Ok((serde_json::from_slice(bytes), descriptors)),
                Err(err) => Err(err),
            };
            match got {
                Ok((report, descriptors)) => return Ok(Some((report?, descriptors))),
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => self.socket.readable().await?,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => return Err(err),
            }
        }
    }

    /// An answer that nobody waits for any more is dropped, and with it the process it brings.
    fn enter(&self, report: Report, mut descriptors: Vec<OwnedFd>) {
        let mut books = self.books();
        let (request, answer) = match report {
            Report::Done { request } => (request, Answer::Done),
            Report::Refused { request, refusal } => (request, Answer::Refused(refusal)),
            Report::Created { request } => match descriptors.pop() {
                Some(pidfd) => (request, Answer::Created(Process { pidfd })),
                None => return,
            },
            Report::Exited { id, exit } => {
                if let Some(waiter) = books.exits.remove(&id) {
                    let _ = waiter.try_send(exit.into());
                }
                return;
            }
            Report::Ruled => {
                books.rules = descriptors.pop();
                return;
            }
            Report::Ready { .. } | Report::Unable { .. } => return,
        };
        if let Some(waiter) = books.answers.remove(&request) {
            let _ = waiter.try_send(answer);
        }
    }

    /// Asks and waits for the answer.
    pub async fn call(
        &self,
        message: impl FnOnce(u64) -> Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Answer, RuntimeError> {
        let (sender, answer) = smol::channel::bounded(1);
        let request = {
            let mut books = self.books();
            if books.closed {
                return Err(RuntimeError::Lost);
            }
            books.requests_made += 1;
            let request = books.requests_made;
            books.answers.insert(request, sender);
            request
        };
        let _forget = Forget { session: self, request };
        let bytes = wire::encode(&message(request)).map_err(RuntimeError::io("encode a request"))?;
        if self.send(&bytes, descriptors).await.is_err() {
            return Err(RuntimeError::Lost);
        }
        let answered = async { answer.recv().await.map_err(|_| RuntimeError::Lost) };
        let hung = async {
            Timer::after(ANSWER_MAX).await;
            tracing::error!("launcher does not answer, it is killed");
            self.kill();
            Err(RuntimeError::Lost)
        };
        answered.or(hung).await
    }

    pub async fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        loop {
            match wire::send(self.socket.as_fd(), bytes, descriptors) {
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => self.socket.writable().await?,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                done => return done,
            }
        }
    }

    /// Fails all that is asked and ends all that runs, as lost.
    pub fn close(&self) {
        let mut books = self.books();
        books.closed = true;
        books.answers.clear(); // a closed channel reads as lost
        for (_, waiter) in books.exits.drain() {
            let _ = waiter.try_send(Exit::Lost);
        }
    }

    pub fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(self.process.get_ref(), Signal::KILL);
    }

    /// Waits until launcher and containers are gone, and reaps our child.
    pub async fn end(&self) {
        self.kill();
        let gone = async {
            // A pid 1 is gone when all of its namespace is.
            let _ = self.process.readable().await;
            self.reap();
        };
        let late = async {
            Timer::after(END_MAX).await;
            tracing::warn!("a killed launcher has not ended yet");
        };
        gone.or(late).await;
    }

    /// The same, for those who can't wait otherwise.
    pub fn end_now(&self) {
        use rustix::event::{PollFd, PollFlags, poll};
        self.kill();
        let timeout = rustix::time::Timespec { tv_sec: END_MAX.as_secs() as i64, tv_nsec: 0 };
        let mut watched = [PollFd::from_borrowed_fd(self.process.as_fd(), PollFlags::IN)];
        if poll(&mut watched, Some(&timeout)).is_ok_and(|n| n > 0) {
            self.reap();
        }
    }

    fn reap(&self) {
        if !self.reaped.swap(true, Ordering::Relaxed) {
            reap(self.pid);
            self.books().rules = None; // nobody is left who needs them
        }
    }

    /// Whether this launcher has prepared a root.
    pub fn knows_root(&self, key: &str) -> bool {
        self.books().prepared.contains(key)
    }

    pub fn remember_root(&self, key: String) {
        self.books().prepared.insert(key);
    }

    pub fn forget_root(&self, key: &str) {
        self.books().prepared.remove(key);
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().expect("nothing panics while it holds the books")
    }
}

/// Takes a request off the books when its caller stops waiting.
struct Forget<'a> {
    session: &'a Session,
    request: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.session.books().answers.remove(&self.request);
    }
}

/// An instance whose exit is wanted, if it comes into being.
pub struct Expected<'a> {
    session: &'a Session,
    id: Option<&'a str>,
}

impl<'a> Expected<'a> {
    /// Before it is asked for, because the exit may come right behind the answer.
    pub fn new(session: &'a Session, id: &'a str) -> Result<(Self, Receiver<Exit>), RuntimeError> {
        let (sender, exit) = smol::channel::bounded(1);
        let mut books = session.books();
        if books.closed {
            return Err(RuntimeError::Lost);
        }
        books.exits.insert(id.to_owned(), sender);
        Ok((Self { session, id: Some(id) }, exit))
    }

    pub fn came(mut self) {
        self.id = None;
    }
}

impl Drop for Expected<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.session.books().exits.remove(id);
        }
    }
}
