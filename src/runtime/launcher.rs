//! The launcher process: the only caller of libcontainer, which clones, changes directory and
//! prctls its caller, so that a process with threads must not call it.
//!
//! One thread, for ever. It holds no secret, serves one request at a time, and reports exits as
//! it reaps them. Descriptors of a request live only while it is served: every container's first
//! process inherits all that is open here until it executes its command, and a parked one would
//! keep another's pipes open for as long as it waits.
//!
//! An instance is `Created` (parked on its start signal), then runs, then is reaped, reported and
//! removed, in that order: removing is nobody's wait. Nothing outlives this process: it is pid 1
//! of its own PID namespace (enclosure.rs). What goes wrong with one container is an answer; only
//! a broken control socket ends the launcher.

use super::cgroup::{Cgroups, Limiting, Shortage};
use super::enclosure::STATE;
use super::executor::Command;
use super::layers::IdMaps;
use super::netns::Home;
use super::rootfs::{self, Mounted};
use super::seccomp::Filter;
use super::wire::{self, ExitReport, MESSAGE_BYTES_MAX, Orders, Refusal, Report, Request, RootOrder, Wanted};
use super::{enclosure, spec, sys};
use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use rustix::event::{PollFd, PollFlags};
use std::collections::{HashMap, VecDeque};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;

/// Instances of one launcher, parked and running. A parked one costs 0.3 MB and five of the
/// daemon's descriptors; beyond, creating is refused.
pub const INSTANCES_MAX: usize = 4096;

/// Revisions whose roots are mounted at once: every mount slows every create a little.
const ROOTS_MAX: usize = 1024;

/// Removals that may wait for a quiet moment.
const REMOVALS_MAX: usize = 64;

/// cgroup directories of a reaped process are free at once, but for its threads' last steps.
const RETRY_MS: i64 = 5;
const RETRIES_MAX: u32 = 200;

/// Added to what makes the kernel choose a victim when the whole machine is out of memory: a
/// function before the daemon.
const OOM_SCORE: &str = "300";

/// `neap launcher outer|inner ORDERS`.
pub fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(2).collect();
    let [step, text] = args.as_slice() else {
        eprintln!("neap launcher: started by the daemon, not by people");
        return ExitCode::from(2);
    };
    let orders: Orders = match serde_json::from_str(text) {
        Ok(orders) => orders,
        Err(err) => {
            eprintln!("neap launcher: orders: {err}");
            return ExitCode::from(2);
        }
    };
    // As people see it in `ps`; the daemon executes us by a descriptor's number.
    let _ = rustix::thread::set_name(c"neap-launcher");
    match step.as_str() {
        "inner" => inner(orders),
        _ => enclosure::outer(&orders, text).unwrap_or_else(|why| unable(sys::borrowed(0), why)),
    }
}

/// The last word: to the daemon, else to whoever reads stderr.
fn unable(socket: BorrowedFd<'_>, why: String) -> ExitCode {
    let report = wire::encode(&Report::Unable { why: why.clone() });
    if report.and_then(|bytes| wire::send(socket, &bytes, &[])).is_err() {
        eprintln!("neap launcher: {why}");
    }
    ExitCode::FAILURE
}

fn inner(orders: Orders) -> ExitCode {
    let socket = match take_socket() {
        Ok(socket) => Rc::new(socket),
        Err(err) => return unable(sys::borrowed(0), format!("take the control socket over: {err}")),
    };
    match Launcher::open(orders, Rc::clone(&socket)) {
        Ok(mut launcher) => {
            launcher.run();
            ExitCode::SUCCESS
        }
        Err(why) => unable(socket.as_fd(), why),
    }
}

/// Descriptor 0 becomes /dev/null, so that no container inherits the control socket as its stdin.
fn take_socket() -> io::Result<OwnedFd> {
    let socket = rustix::io::fcntl_dupfd_cloexec(sys::borrowed(0), 3)?;
    let null = fs::File::open("/dev/null")?;
    nix::unistd::dup2(null.as_raw_fd(), 0)?;
    Ok(socket)
}

struct Launcher {
    socket: Rc<OwnedFd>,
    children: SignalFd,
    orders: Orders,
    cgroups: Cgroups,
    limiting: Limiting,
    filter: Rc<Filter>,
    /// `None`: functions run without user namespaces.
    id_maps: Option<IdMaps>,
    home: Home,
    open_files_max: u64,
    roots: HashMap<String, Rc<Mounted>>,
    roots_made: u64,
    instances: HashMap<String, Instance>,
    /// Which instance a child is.
    pids: HashMap<i32, String>,
    removals: VecDeque<Removal>,
}

struct Instance {
    container: Container,
    /// Keeps the root mounted.
    _root: Rc<Mounted>,
}

/// What is left of an instance whose exit was reported.
struct Removal {
    paths: Vec<PathBuf>,
    attempts: u32,
}

impl Launcher {
    fn open(orders: Orders, socket: Rc<OwnedFd>) -> Result<Self, String> {
        let step = |doing: &'static str| move |err: io::Error| format!("{doing}: {err}");
        assert_eq!(sys::threads(), 1, "the launcher has a single thread");

        // A user namespace's root has to walk to its own root.
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
        enclosure::change_root(&orders).map_err(step("make the launcher's own root"))?;

        // Supplementary groups of whoever started the daemon would be the functions' too.
        nix::unistd::setgroups(&[]).map_err(|err| format!("drop supplementary groups: {err}"))?;
        let open_files_max = sys::raise_open_files().map_err(step("raise the limit of open files"))?;

        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        mask.thread_block().map_err(|err| format!("block SIGCHLD: {err}"))?;
        let children = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map_err(|err| format!("watch children: {err}"))?;

        let cgroups = Cgroups::detect().map_err(step("find the cgroup file systems"))?;
        let limiting = cgroups.limiting(&orders.cgroup);
        if !sys::has_mount_setattr() {
            return Err(
                "this kernel has no mount_setattr(2), which containers are made with: use Linux 5.12"
                    .to_owned(),
            );
        }
        if !sys::has_seccomp_filters() {
            let text = "this kernel has no seccomp filters, which confine functions: build one with CONFIG_SECCOMP_FILTER";
            return Err(text.to_owned());
        }
        let filter = Filter::compile().map_err(|why| format!("compile the seccomp filter: {why}"))?;
        let home = Home::open().map_err(step("open the network namespace"))?;
        for dir in ["roots", "containers", "probe"] {
            fs::create_dir_all(Path::new(STATE).join(dir)).map_err(step("make the state's directories"))?;
        }

        let missing = cgroups.missing(&orders.cgroup);
        let mut warnings: Vec<String> = missing.iter().map(ToString::to_string).collect();
        let probe = Path::new(STATE).join("probe");
        super::layers::probe_overlay(&probe.join("overlay")).map_err(|err| {
            format!(
                "overlayfs can't be mounted: {err}; an image's layers are stacked with it: {}",
                super::layers::OVERLAY_ADVICE
            )
        })?;
        let mut maps = IdMaps::new();
        let probed = maps.probe(&orders.data_dir, &probe.join("maps"), probe_base());
        let id_maps = match (probed, orders.user_namespaces) {
            (Ok(()), _) => Some(maps),
            (Err(err), Wanted::Prefer) => {
                warnings.push(format!(
                    "no user namespaces for functions ({err}): their root is the node's, without capabilities"
                ));
                None
            }
            (Err(err), Wanted::Require) => {
                let dir = orders.data_dir.display();
                return Err(format!(
                    "user namespaces with id-mapped mounts can't be had for {dir}: {err}; {}, or set `user_namespaces = \"prefer\"` in [node] to run without",
                    super::layers::advice(&err)
                ));
            }
        };

        let launcher = Self {
            socket,
            children,
            orders,
            cgroups,
            limiting,
            filter: Rc::new(filter),
            id_maps,
            home,
            open_files_max,
            roots: HashMap::new(),
            roots_made: 0,
            instances: HashMap::new(),
            pids: HashMap::new(),
            removals: VecDeque::new(),
        };
        let own = pidfd(rustix::process::getpid().as_raw_nonzero().get()).map_err(step("open a pidfd"))?;
        launcher.report(&Report::Ready { warnings }, Some(&own)).map_err(step("report to the daemon"))?;
        Ok(launcher)
    }

    /// Until the daemon is gone.
    fn run(&mut self) {
        let mut buffer = vec![0; MESSAGE_BYTES_MAX];
        loop {
            let timeout = match self.removals.front() {
                None => -1,
                Some(removal) if removal.attempts == 0 => 0,
                Some(_) => RETRY_MS,
            };
            let (asked, ended) = match self.wait(timeout) {
                Ok(ready) => ready,
                Err(err) => {
                    eprintln!("neap launcher: poll: {err}");
                    return;
                }
            };
            if ended && self.reap().is_err() {
                return;
            }
            if asked && !self.serve_one(&mut buffer) {
                return;
            }
            if !(asked || ended) || self.removals.len() > REMOVALS_MAX {
                self.remove_one();
            }
        }
    }

    /// Whether there is a request, and whether a child ended.
    fn wait(&self, timeout_ms: i64) -> io::Result<(bool, bool)> {
        let mut watched =
            [PollFd::new(&*self.socket, PollFlags::IN), PollFd::new(&self.children, PollFlags::IN)];
        let timeout = rustix::time::Timespec { tv_sec: 0, tv_nsec: timeout_ms.max(0) * 1_000_000 };
        match rustix::event::poll(&mut watched, (timeout_ms >= 0).then_some(&timeout)) {
            Err(rustix::io::Errno::INTR) => return Ok((false, false)),
            done => done?,
        };
        Ok((!watched[0].revents().is_empty(), !watched[1].revents().is_empty()))
    }

    /// Whether the daemon is still there.
    fn serve_one(&mut self, buffer: &mut [u8]) -> bool {
        let (request, descriptors) = match wire::receive(&self.socket, buffer) {
            Ok(Some((bytes, descriptors))) => match serde_json::from_slice::<Request>(bytes) {
                Ok(request) => (request, descriptors),
                Err(err) => {
                    eprintln!("neap launcher: request: {err}");
                    return true;
                }
            },
            Ok(None) => return false,
            Err(err) if err.kind() == io::ErrorKind::InvalidData => {
                eprintln!("neap launcher: {err}");
                return true;
            }
            Err(_) => return false,
        };
        let (number, done) = match request {
            Request::Release { key } => {
                self.roots.remove(&key);
                return true;
            }
            Request::Prepare { request, root } => (request, self.prepare(*root).map(|()| None)),
            Request::Create { request, key, id } => (request, self.create(&key, &id, descriptors).map(Some)),
            Request::Start { request, id } => (request, self.start(&id).map(|()| None)),
        };
        let sent = match done {
            Ok(None) => self.report(&Report::Done { request: number }, None),
            Ok(Some(pidfd)) => self.report(&Report::Created { request: number }, Some(&pidfd)),
            Err(refusal) => self.report(&Report::Refused { request: number, refusal }, None),
        };
        sent.is_ok()
    }

    fn prepare(&mut self, order: RootOrder) -> Result<(), Refusal> {
        if self.roots.get(&order.key).is_some_and(|root| root.order == order) {
            return Ok(());
        }
        self.roots.remove(&order.key);
        if self.roots.len() >= ROOTS_MAX {
            return Err(Refusal::Failed(format!("{ROOTS_MAX} revisions are prepared, no more fit")));
        }
        self.roots_made += 1;
        let dir = Path::new(STATE).join("roots").join(self.roots_made.to_string());
        let key = order.key.clone();
        let root = rootfs::mount(dir, order, self.id_maps.as_mut())?;
        self.roots.insert(key, Rc::new(root));
        Ok(())
    }

    fn create(&mut self, key: &str, id: &str, descriptors: Vec<OwnedFd>) -> Result<OwnedFd, Refusal> {
        let failed = |why: String| Refusal::Failed(format!("create an instance of {key}: {why}"));
        let Ok([stdin, stdout, stderr, late]) = <[OwnedFd; 4]>::try_from(descriptors) else {
            return Err(failed("four descriptors were expected".to_owned()));
        };
        let Some(root) = self.roots.get(key).cloned() else {
            return Err(failed("its root was not prepared".to_owned()));
        };
        if self.instances.len() + self.removals.len() >= INSTANCES_MAX {
            return Err(failed(format!("{INSTANCES_MAX} instances is all a launcher has")));
        }
        let made = self.build(&root, id, [stdin, stdout, stderr], &late);
        // A failed build leaves children that are not ours to know: `reap` passes them over.
        let (container, pidfd) = made.map_err(|why| {
            self.removals.push_back(self.removal(id));
            failed(why)
        })?;
        let pid = container.pid().map_or(0, |pid| pid.as_raw());
        self.pids.insert(pid, id.to_owned());
        self.instances.insert(id.to_owned(), Instance { container, _root: root });
        Ok(pidfd)
    }

    fn build(
        &self,
        root: &Mounted,
        id: &str,
        [stdin, stdout, stderr]: [OwnedFd; 3],
        late: &OwnedFd,
    ) -> Result<(Container, OwnedFd), String> {
        let cgroup = format!("{}/{id}", self.orders.cgroup);
        let spec = spec::instance(root, self.limiting, self.id_maps.is_some(), self.open_files_max, &cgroup)
            .to_string();
        fs::write(root.bundle().join("config.json"), spec)
            .map_err(|err| format!("write its specification: {err}"))?;
        self.cgroups
            .make_leaf(&self.orders.cgroup, id, root.order.limits.memory_bytes)
            .map_err(|err| format!("make its cgroup: {err}"))?;
        let dir = &root.working_dir;
        let command = Command {
            filter: Rc::clone(&self.filter),
            make_and_enter: dir.is_made_in_each.then(|| PathBuf::from(&dir.path)),
            late: late.as_raw_fd(),
        };
        let container = ContainerBuilder::new(id.to_owned(), SyscallType::default())
            .with_root_path(containers())
            .map_err(|err| whole(&err))?
            .with_executor(command)
            .with_stdin(stdin)
            .with_stdout(stdout)
            .with_stderr(stderr)
            .validate_id()
            .map_err(|err| whole(&err))?
            .as_init(root.bundle())
            .with_systemd(false)
            .with_detach(true)
            .build()
            .map_err(|err| whole(&err))?;
        let pid = container.pid().ok_or("it has no process")?.as_raw();
        let finished = self.finish(pid);
        if finished.is_err() {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
        }
        Ok((container, finished?))
    }

    /// What libcontainer leaves to others.
    fn finish(&self, pid: i32) -> Result<OwnedFd, String> {
        self.home.bring_loopback_up(pid).map_err(|err| format!("set its loopback up: {err}"))?;
        let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), OOM_SCORE);
        pidfd(pid).map_err(|err| format!("open a pidfd: {err}"))
    }

    fn start(&mut self, id: &str) -> Result<(), Refusal> {
        let Some(instance) = self.instances.get_mut(id) else {
            return Err(Refusal::Failed(format!("instance {id} has ended before it was started")));
        };
        instance
            .container
            .start()
            .map_err(|err| Refusal::Failed(format!("start instance {id}: {}", whole(&err))))
    }

    /// Collects children that ended. An error: the daemon is gone.
    fn reap(&mut self) -> io::Result<()> {
        while self.children.read_signal().is_ok_and(|signal| signal.is_some()) {}
        loop {
            let (pid, exit) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, ExitReport::Code(code)),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, ExitReport::Signal(signal as i32)),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(()),
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(err) => return Err(err.into()),
            };
            let Some(id) = self.pids.remove(&pid.as_raw()) else { continue };
            let succeeded = exit == ExitReport::Code(0);
            let shortage = match succeeded {
                true => None,
                false => self.cgroups.ran_out_of_memory(&self.orders.cgroup, &id),
            };
            let exit = match shortage {
                Some(Shortage::Own) => ExitReport::OutOfMemory,
                Some(Shortage::Above) => {
                    eprintln!("neap launcher: {id} was killed: not its own memory ran out, but the node's");
                    exit
                }
                None => exit,
            };
            self.report(&Report::Exited { id: id.clone(), exit }, None)?;
            self.instances.remove(&id);
            self.removals.push_back(self.removal(&id));
        }
    }

    fn removal(&self, id: &str) -> Removal {
        let mut paths = self.cgroups.directories(&self.orders.cgroup, id);
        paths.push(containers().join(id));
        Removal { paths, attempts: 0 }
    }

    fn remove_one(&mut self) {
        let Some(mut removal) = self.removals.pop_front() else { return };
        removal.paths.retain(|path| !removed(path));
        removal.attempts += 1;
        if removal.paths.is_empty() {
            return;
        }
        if removal.attempts < RETRIES_MAX {
            self.removals.push_back(removal);
        } else {
            eprintln!("neap launcher: can't remove {}", removal.paths[0].display());
        }
    }

    fn report(&self, report: &Report, descriptor: Option<&OwnedFd>) -> io::Result<()> {
        let bytes = wire::encode(report)?;
        match descriptor {
            Some(descriptor) => wire::send(&self.socket, &bytes, &[descriptor.as_fd()]),
            None => wire::send(&self.socket, &bytes, &[]),
        }
    }
}

/// cgroup directories hold files that nobody may unlink: rmdir removes all. The state's hold
/// ordinary ones.
fn removed(path: &Path) -> bool {
    let is_cgroup = path.starts_with("/sys/fs/cgroup");
    let done = if is_cgroup { fs::remove_dir(path) } else { fs::remove_dir_all(path) };
    done.is_ok() || done.is_err_and(|err| err.kind() == io::ErrorKind::NotFound)
}

/// libcontainer's state.
fn containers() -> PathBuf {
    Path::new(STATE).join("containers")
}

fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?)
}

/// Any range does for trying.
fn probe_base() -> u32 {
    crate::model::function::UID_BASE_FIRST
}

/// An error and its causes, as libcontainer tells them.
fn whole(err: &dyn std::error::Error) -> String {
    let mut text = err.to_string();
    let mut cause = err.source();
    while let Some(err) = cause {
        let more = err.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = err.source();
    }
    text
}
