//! The daemon's side of the launcher: requests, answers, exits, and starting another launcher
//! when one died.
//!
//! A `Session` is one launcher's life. Its requests are answered or, when it dies, all fail as
//! lost; its instances end as `Exit::Lost`. Roots belong to the client: a session prepares one
//! when it is first asked to create from it, so that nothing needs replaying after a restart.
//!
//! One create at a time is on its way to a launcher: it serves one at a time anyway, and starts,
//! which take a twentieth, then wait for one create at most.

use super::executor::{COMPLAINT_BYTES_MAX, encode_late};
use super::wire::{self, MESSAGE_BYTES_MAX, Orders, Refusal, Report, Request, RootOrder};
use super::{Exit, Parked, Root, Running, RuntimeError, Settings, cgroup::Cgroups};
use event_listener::Event;
use futures_lite::FutureExt;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, socketpair};
use rustix::process::{PidfdFlags, Signal};
use smol::channel::{Receiver, Sender};
use smol::{Async, Timer};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

/// Starting takes 50 ms; a machine that needs longer than this is not coming back.
const READY_MAX: Duration = Duration::from_secs(20);

/// A launcher that leaves a request unanswered for so long hangs in a system call; it is killed.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// How long a request waits for another launcher before it fails as lost.
const RESTART_MAX: Duration = Duration::from_secs(10);

/// Between launchers that die at once.
const BACKOFF_FIRST: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// A launcher that lived so long died of something new.
const STABLE_AFTER: Duration = Duration::from_secs(60);

/// Processes that were killed need a moment to leave their cgroups; an uninterruptible one more.
const SWEEP_MAX: Duration = Duration::from_secs(5);
const SWEEP_EVERY: Duration = Duration::from_millis(10);

pub struct Client {
    settings: Settings,
    /// The binary as it was at start: an upgrade must not bring a launcher that speaks otherwise.
    exe: File,
    cgroups: Cgroups,
    /// Of all instances.
    cgroup: String,
    /// Makes ids differ from those before a restart of the daemon.
    boot: u32,
    instances_made: AtomicU64,
    requests_made: AtomicU64,
    /// One create at a time.
    creating: smol::lock::Mutex<()>,
    state: Mutex<State>,
    /// `state.phase` changed.
    changed: Event,
}

struct State {
    phase: Phase,
    roots: HashMap<String, RootOrder>,
    warnings: Vec<String>,
}

enum Phase {
    /// Between two launchers.
    Down,
    Up(Arc<Session>),
    Stopped,
}

/// One launcher's life.
pub struct Session {
    socket: Async<OwnedFd>,
    /// Its outer process, our child.
    outer: Async<OwnedFd>,
    outer_pid: u32,
    /// The launcher itself; when it has ended, every container has.
    inner: OwnedFd,
    started: Instant,
    books: Mutex<Books>,
}

#[derive(Default)]
struct Books {
    /// Set when the launcher died: nothing is added afterwards.
    closed: bool,
    prepared: HashSet<String>,
    answers: HashMap<u64, Sender<Answer>>,
    exits: HashMap<String, Sender<Exit>>,
}

enum Answer {
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

impl Drop for Process {
    fn drop(&mut self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}

impl Client {
    pub fn start(settings: Settings) -> Result<Arc<Self>, RuntimeError> {
        let exe = File::open(&settings.exe).map_err(RuntimeError::io("open neap's own binary"))?;
        let cgroups = Cgroups::detect().map_err(RuntimeError::io("find the cgroup file systems"))?;
        let cgroup = cgroups.parent(&settings.cgroup, &settings.data_dir);
        sweep_now(&cgroups, &cgroup);
        cgroups.make(&cgroup).map_err(RuntimeError::io("make the cgroup of all instances"))?;
        std::fs::create_dir_all(state_dir(&settings))
            .map_err(RuntimeError::io("make the launcher's directory"))?;
        let mut client = Self {
            settings,
            exe,
            cgroups,
            cgroup,
            boot: fastrand::u32(..),
            instances_made: AtomicU64::new(0),
            requests_made: AtomicU64::new(0),
            creating: smol::lock::Mutex::new(()),
            state: Mutex::new(State { phase: Phase::Down, roots: HashMap::new(), warnings: Vec::new() }),
            changed: Event::new(),
        };
        let (session, warnings) = client.launch()?.wait_until_ready()?;
        let state = client.state.get_mut().expect("nobody else has it yet");
        state.warnings = warnings;
        state.phase = Phase::Up(Arc::new(session));
        Ok(Arc::new(client))
    }

    /// Executes `neap launcher`. The calling thread is the one that it dies with.
    fn launch(&self) -> Result<Launching, RuntimeError> {
        let orders = Orders {
            daemon: std::process::id(),
            state_dir: state_dir(&self.settings),
            data_dir: self.settings.data_dir.clone(),
            cgroup: self.cgroup.clone(),
            user_namespaces: self.settings.user_namespaces.into(),
        };
        let text = serde_json::to_string(&orders).map_err(|err| RuntimeError::Launcher(err.to_string()))?;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(|err| RuntimeError::io("make the control socket")(err.into()))?;
        let child = Command::new(format!("/proc/self/fd/{}", self.exe.as_raw_fd()))
            .args(["launcher", "outer", &text])
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .map_err(RuntimeError::io("start the launcher"))?;
        let outer_pid = child.id();
        let outer = pidfd(outer_pid).map_err(RuntimeError::io("watch the launcher"))?;
        Ok(Launching { socket: ours, outer, outer_pid })
    }

    /// Reads answers, watches the launcher, starts another when it died. Ends after `stop`.
    pub async fn drive(&self) {
        let mut backoff = BACKOFF_FIRST;
        loop {
            let session = match &self.lock().phase {
                Phase::Up(session) => Some(Arc::clone(session)),
                Phase::Down => None,
                Phase::Stopped => return,
            };
            match session {
                Some(session) => {
                    session.serve().await;
                    if session.started.elapsed() >= STABLE_AFTER {
                        backoff = BACKOFF_FIRST;
                    }
                    let stopped = self.enter(Phase::Down);
                    session.close();
                    session.end().await;
                    self.sweep().await;
                    if stopped {
                        return;
                    }
                    tracing::warn!(
                        backoff_ms = backoff.as_millis() as u64,
                        "launcher died, its instances are lost"
                    );
                }
                None => match self.relaunch().await {
                    Ok(()) => tracing::info!("launcher started"),
                    Err(err) => {
                        let cause = std::error::Error::source(&err).map(ToString::to_string);
                        tracing::error!(error = %err, cause, "launcher can't be started");
                    }
                },
            }
            if matches!(self.lock().phase, Phase::Down) {
                Timer::after(backoff).await;
                backoff = (backoff * 2).min(BACKOFF_MAX);
            }
        }
    }

    async fn relaunch(&self) -> Result<(), RuntimeError> {
        // The outer process of a dead launcher may still be going; its cgroups were swept.
        let launching = self.launch()?;
        let (session, warnings) = launching.ready().await?;
        self.lock().warnings = warnings;
        let session = Arc::new(session);
        if self.enter(Phase::Up(Arc::clone(&session))) {
            session.kill();
            session.end().await;
        }
        Ok(())
    }

    /// Whether it is too late, because the runtime was stopped.
    fn enter(&self, phase: Phase) -> bool {
        let mut state = self.lock();
        let stopped = matches!(state.phase, Phase::Stopped);
        if !stopped {
            state.phase = phase;
        }
        drop(state);
        self.changed.notify(usize::MAX);
        stopped
    }

    pub async fn prepare(self: &Arc<Self>, root: &Root) -> Result<(), RuntimeError> {
        check_key(&root.key)?;
        let order = RootOrder::from(root);
        wire::encode(&Request::Prepare { request: u64::MAX, root: Box::new(order.clone()) })
            .map_err(|err| RuntimeError::Unusable(format!("command and environment are too large: {err}")))?;
        let known = self.lock().roots.insert(root.key.clone(), order.clone());
        let session = self.session().await?;
        if known.is_some_and(|known| known != order) {
            session.books().prepared.remove(&root.key);
        }
        self.prepare_in(&session, order).await
    }

    async fn prepare_in(&self, session: &Session, order: RootOrder) -> Result<(), RuntimeError> {
        let key = order.key.clone();
        let request = self.requests_made.fetch_add(1, Ordering::Relaxed);
        match session.call(request, &Request::Prepare { request, root: Box::new(order) }, &[]).await? {
            Answer::Refused(refusal) => Err(refusal.into()),
            _ => {
                session.books().prepared.insert(key);
                Ok(())
            }
        }
    }

    pub async fn release(&self, key: &str) {
        let session = {
            let mut state = self.lock();
            state.roots.remove(key);
            match &state.phase {
                Phase::Up(session) => Arc::clone(session),
                _ => return,
            }
        };
        session.books().prepared.remove(key);
        if let Ok(bytes) = wire::encode(&Request::Release { key: key.to_owned() }) {
            let _ = session.send(&bytes, &[]).await; // a lost launcher has released everything
        }
    }

    pub async fn create(self: &Arc<Self>, key: &str) -> Result<Parked, RuntimeError> {
        let turn = self.creating.lock().await;
        let session = self.session().await?;
        let order = self.lock().roots.get(key).cloned();
        let Some(order) = order else {
            return Err(RuntimeError::Launcher(format!("revision {key} was not prepared")));
        };
        if !session.books().prepared.contains(key) {
            self.prepare_in(&session, order).await?;
        }
        let number = self.instances_made.fetch_add(1, Ordering::Relaxed);
        let id = format!("{key}.{:08x}.{number}", self.boot);

        let make = RuntimeError::io("make an instance's pipes");
        let (pipes, theirs) = Pipes::make().map_err(make)?;
        let exit = session.expect_exit(&id)?;
        let request = self.requests_made.fetch_add(1, Ordering::Relaxed);
        let descriptors: Vec<BorrowedFd<'_>> = theirs.iter().map(AsFd::as_fd).collect();
        let message = Request::Create { request, key: key.to_owned(), id: id.clone() };
        let answer = session.call(request, &message, &descriptors).await;
        drop(theirs);
        drop(turn);
        match answer? {
            Answer::Created(process) => {
                let instance =
                    Instance { client: Arc::downgrade(self), session, id: id.clone(), process, exit };
                Ok(Parked { id, inside: Box::new(ParkedInside { instance, pipes }) })
            }
            Answer::Refused(refusal) => {
                session.books().exits.remove(&id);
                Err(refusal.into())
            }
            Answer::Done => Err(RuntimeError::Launcher("an answer that was not asked for".to_owned())),
        }
    }

    /// The launcher in being, waiting for one that is being started.
    async fn session(&self) -> Result<Arc<Session>, RuntimeError> {
        let found = async {
            loop {
                let changed = self.changed.listen();
                match &self.lock().phase {
                    Phase::Up(session) => return Ok(Arc::clone(session)),
                    Phase::Stopped => return Err(RuntimeError::Lost),
                    Phase::Down => {}
                }
                changed.await;
            }
        };
        let late = async {
            Timer::after(RESTART_MAX).await;
            Err(RuntimeError::Lost)
        };
        found.or(late).await
    }

    pub async fn stop(&self) {
        let phase = std::mem::replace(&mut self.lock().phase, Phase::Stopped);
        self.changed.notify(usize::MAX);
        if let Phase::Up(session) = phase {
            session.kill();
            session.close();
            session.end().await;
        }
        self.sweep().await;
        self.cgroups.remove(&self.cgroup);
        let _ = std::fs::remove_dir(state_dir(&self.settings));
    }

    /// Removes the cgroups of a launcher that has ended.
    async fn sweep(&self) {
        let start = Instant::now();
        loop {
            let left = self.cgroups.sweep(&self.cgroup);
            if left == 0 {
                return;
            }
            if start.elapsed() > SWEEP_MAX {
                tracing::warn!(left, "cgroups of lost instances are still in use");
                return;
            }
            Timer::after(SWEEP_EVERY).await;
        }
    }

    pub fn warnings(&self) -> Vec<String> {
        self.lock().warnings.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds the state")
    }
}

impl Drop for Client {
    /// Without `stop`: the launcher must not outlive its client.
    fn drop(&mut self) {
        if let Ok(state) = self.state.get_mut()
            && let Phase::Up(session) = &state.phase
        {
            session.kill();
        }
    }
}

/// Before the executor runs: leftovers of a daemon that was killed.
fn sweep_now(cgroups: &Cgroups, cgroup: &str) {
    let start = Instant::now();
    while cgroups.sweep(cgroup) > 0 && start.elapsed() < SWEEP_MAX {
        std::thread::sleep(SWEEP_EVERY);
    }
}

/// Becomes part of an instance's id, which is a cgroup's name and a state directory's.
fn check_key(key: &str) -> Result<(), RuntimeError> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    if (1..=128).contains(&key.len()) && key.chars().all(good) && !key.starts_with('.') {
        return Ok(());
    }
    Err(RuntimeError::Unusable(format!("revision key `{key}` has characters that a name can't have")))
}

fn state_dir(settings: &Settings) -> PathBuf {
    settings.run_dir.join("launcher")
}

fn pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(pid as i32).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

/// A launcher that has yet to say that it is ready.
struct Launching {
    socket: OwnedFd,
    outer: OwnedFd,
    outer_pid: u32,
}

impl Launching {
    fn wait_until_ready(self) -> Result<(Session, Vec<String>), RuntimeError> {
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

    async fn ready(self) -> Result<(Session, Vec<String>), RuntimeError> {
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
            Ok(Some((bytes, descriptors))) => serde_json::from_slice(bytes).ok().zip(Some(descriptors)),
            _ => None,
        };
        let (warnings, inner) = match first {
            Some((Report::Ready { warnings }, mut descriptors)) if descriptors.len() == 1 => {
                (warnings, descriptors.remove(0))
            }
            Some((Report::Unable { why }, _)) => return self.abandoned(why),
            _ => return self.abandoned("it ended before it was ready".to_owned()),
        };
        let watch = RuntimeError::io("watch the launcher");
        let opened = || -> io::Result<Session> {
            Ok(Session {
                socket: Async::new(self.socket)?,
                outer: Async::new(self.outer)?,
                outer_pid: self.outer_pid,
                inner,
                started: Instant::now(),
                books: Mutex::default(),
            })
        };
        Ok((opened().map_err(watch)?, warnings))
    }

    fn abandoned(self, why: String) -> Result<(Session, Vec<String>), RuntimeError> {
        let _ = rustix::process::pidfd_send_signal(&self.outer, Signal::KILL);
        reap(self.outer_pid);
        Err(RuntimeError::Launcher(format!("the launcher can't work: {why}")))
    }
}

/// Waits for a child that was killed.
fn reap(pid: u32) {
    let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid as i32), None);
}

impl Session {
    /// Until the launcher is gone.
    async fn serve(&self) {
        let reading = async {
            let mut buffer = vec![0; MESSAGE_BYTES_MAX];
            // An error or the end: the launcher is no longer one.
            while let Ok(Some((report, descriptors))) = self.receive(&mut buffer).await {
                self.enter(report, descriptors);
            }
        };
        let dying = async {
            let _ = self.outer.readable().await;
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
            Report::Ready { .. } | Report::Unable { .. } => return,
        };
        if let Some(waiter) = books.answers.remove(&request) {
            let _ = waiter.try_send(answer);
        }
    }

    async fn call(
        &self,
        request: u64,
        message: &Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Answer, RuntimeError> {
        let bytes = wire::encode(message).map_err(RuntimeError::io("encode a request"))?;
        let (sender, answer) = smol::channel::bounded(1);
        {
            let mut books = self.books();
            if books.closed {
                return Err(RuntimeError::Lost);
            }
            books.answers.insert(request, sender);
        }
        let _forget = Forget { session: self, request };
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

    async fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        loop {
            match wire::send(self.socket.as_fd(), bytes, descriptors) {
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => self.socket.writable().await?,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                done => return done,
            }
        }
    }

    fn expect_exit(&self, id: &str) -> Result<Receiver<Exit>, RuntimeError> {
        let (sender, exit) = smol::channel::bounded(1);
        let mut books = self.books();
        if books.closed {
            return Err(RuntimeError::Lost);
        }
        books.exits.insert(id.to_owned(), sender);
        Ok(exit)
    }

    /// Fails all that is asked and ends all that runs, as lost.
    fn close(&self) {
        let mut books = self.books();
        books.closed = true;
        books.answers.clear(); // a closed channel reads as lost
        for (_, waiter) in books.exits.drain() {
            let _ = waiter.try_send(Exit::Lost);
        }
    }

    fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.inner, Signal::KILL);
        let _ = rustix::process::pidfd_send_signal(self.outer.get_ref(), Signal::KILL);
    }

    /// Waits until launcher and containers are gone, and reaps our child.
    async fn end(&self) {
        self.kill();
        let gone = async {
            let _ = self.outer.readable().await;
            // A pid 1 is gone when all of its namespace is.
            if let Ok(inner) = Async::new(self.inner.as_fd()) {
                let _ = inner.readable().await;
            }
            reap(self.outer_pid);
        };
        let late = async {
            Timer::after(SWEEP_MAX).await;
            tracing::warn!("a killed launcher has not ended yet");
        };
        gone.or(late).await;
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

/// What `Parked` and `Running` have in common.
struct Instance {
    client: Weak<Client>,
    session: Arc<Session>,
    id: String,
    process: Process,
    exit: Receiver<Exit>,
}

/// The daemon's ends.
struct Pipes {
    stdin: Async<File>,
    stdout: Async<File>,
    stderr: Async<File>,
    late: Async<OwnedFd>,
}

impl Pipes {
    /// Ours, and the container's in the order that `Create` wants.
    fn make() -> io::Result<(Self, [OwnedFd; 4])> {
        let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
        let (stdin_out, stdin_in) = pipe()?;
        let (stdout_out, stdout_in) = pipe()?;
        let (stderr_out, stderr_in) = pipe()?;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let pipes = Self {
            stdin: Async::new(File::from(stdin_in))?,
            stdout: Async::new(File::from(stdout_out))?,
            stderr: Async::new(File::from(stderr_out))?,
            late: Async::new(ours)?,
        };
        Ok((pipes, [stdin_out, stdout_in, stderr_in, theirs]))
    }
}

pub struct ParkedInside {
    instance: Instance,
    pipes: Pipes,
}

impl ParkedInside {
    pub async fn start(self, env: &[(String, String)]) -> Result<Running, RuntimeError> {
        let Self { instance, pipes } = self;
        let packet = encode_late(env).map_err(RuntimeError::Unusable)?;
        let client = instance.client.upgrade().ok_or(RuntimeError::Lost)?;
        let Pipes { stdin, stdout, stderr, late } = pipes;
        let sent = late.write_with(|late| Ok(rustix::net::send(late, &packet, SendFlags::NOSIGNAL)?)).await;
        sent.map_err(|_| instance.gone())?;
        let request = client.requests_made.fetch_add(1, Ordering::Relaxed);
        let message = Request::Start { request, id: instance.id.clone() };
        if let Answer::Refused(refusal) = instance.session.call(request, &message, &[]).await? {
            return Err(refusal.into());
        }
        // The socket ends when the command is being executed, or speaks when it can't be.
        let mut complaint = vec![0; COMPLAINT_BYTES_MAX];
        let read = late.read_with(|late| {
            let (_, length) = rustix::net::recv(late, &mut complaint[..], RecvFlags::empty())?;
            Ok(length)
        });
        if let Ok(length) = read.await
            && length > 0
        {
            let text = String::from_utf8_lossy(&complaint[..length.min(complaint.len())]).into_owned();
            return Err(RuntimeError::Unusable(text));
        }
        Ok(Running {
            stdin: Some(stdin),
            stdout: Some(stdout),
            stderr: Some(stderr),
            inside: RunningInside { instance, ended: None },
        })
    }
}

pub struct RunningInside {
    instance: Instance,
    ended: Option<Exit>,
}

impl RunningInside {
    pub async fn wait(&mut self) -> Exit {
        if let Some(exit) = self.ended {
            return exit;
        }
        let exit = self.instance.exit.recv().await.unwrap_or(Exit::Lost);
        self.ended = Some(exit);
        exit
    }

    pub fn signal(&self, signal: i32) {
        if self.ended.is_none() {
            self.instance.process.signal(signal);
        }
    }
}

impl Instance {
    fn gone(&self) -> RuntimeError {
        match self.exit.try_recv() {
            Ok(Exit::Lost) => RuntimeError::Lost,
            _ => RuntimeError::Launcher(format!("instance {} has ended before it was started", self.id)),
        }
    }
}

impl From<Refusal> for RuntimeError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Unusable(why) => Self::Unusable(why),
            Refusal::Failed(why) => Self::Launcher(why),
        }
    }
}
