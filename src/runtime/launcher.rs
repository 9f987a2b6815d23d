//! The launcher process: the parent of all containers and, through its makers, the only caller of
//! libcontainer, which clones, changes directory and prctls its caller, so that a process with
//! threads must not call it.
//!
//! One thread, for ever. It holds no secret, never waits for a container, and reports exits as
//! it reaps them. Each create is a child's work (maker.rs), so that they overlap and none delays
//! another's exit. Descriptors of a request live only until its maker has them: every container's
//! first process inherits all that is open here until it executes its command, and a parked one
//! would keep another's pipes open for as long as it waits.
//!
//! An instance is being made, then there (parked, then running, which is the same from here), then
//! is reaped, reported and removed, in that order: removing is nobody's wait. Nothing outlives
//! this process: it is pid 1 of its own PID namespace (enclosure.rs). What goes wrong with one
//! container is an answer; only a broken control socket ends the launcher.

use super::cgroup::{self, Cgroups, Shortage};
use super::egress::{self, EgressError, Found, Lease, Owner, Policy, Router};
use super::enclosure::STATE;
use super::layers::IdMaps;
use super::maker::{Maker, Order};
use super::mounted_volumes::Volumes;
use super::rootfs::{self, Mounted};
use super::seccomp::Filter;
use super::wire::{
    self, ExitReport, MESSAGE_BYTES_MAX, Made, Orders, Refusal, Report, Request, RootOrder, Wanted,
};
use super::{devices, enclosure, sys};
use crate::model::permissions::{Allow, Network};
use crate::model::reach::Net;
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use rustix::event::{PollFd, PollFlags};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, socketpair};
use std::collections::{HashMap, VecDeque};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::{Rc, Weak};

/// Instances of one launcher, parked and running. A parked one costs 0.3 MB and five of the
/// daemon's descriptors; beyond, creating is refused.
pub const INSTANCES_MAX: usize = 4096;

/// Revisions whose roots are mounted at once: every mount slows every create a little.
const ROOTS_MAX: usize = 1024;

/// Removals that may wait for a quiet moment.
const REMOVALS_MAX: usize = 64;

/// What a maker tells: an instance's id, and a sentence of libcontainer's at most.
const MADE_BYTES_MAX: usize = 16 * 1024;

/// The daemon has died (PR_SET_PDEATHSIG). Nobody sends it otherwise; those who stop a whole
/// unit send SIGTERM, which must not end functions.
const ORPHANED: Signal = Signal::SIGUSR2;

/// cgroup directories of a reaped process are free at once, but for its threads' last steps.
const RETRY_MS: i64 = 5;
/// After so long without anything to do it gives its code back: a megabyte, on a node that may have
/// nothing to do for hours. The next request faults in what it needs, 64 KiB at a time.
const QUIET_MS: i64 = 10_000;
const RETRIES_MAX: u32 = 200;

/// `neap launcher enclose|serve ORDERS`.
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
        "serve" => serve(orders),
        _ => unable(sys::borrowed(0), enclosure::enclose(&orders, text)),
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

fn serve(orders: Orders) -> ExitCode {
    let socket = match take_socket() {
        Ok(socket) => Rc::new(socket),
        Err(err) => return unable(sys::borrowed(0), format!("take the control socket over: {err}")),
    };
    match Launcher::open(orders, Rc::clone(&socket)) {
        Ok(mut launcher) => {
            launcher.run();
            launcher.give_all_up();
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
    /// What makers tell.
    made: OwnedFd,
    maker: Maker,
    /// `None`: functions run without user namespaces.
    id_maps: Option<IdMaps>,
    data_dir: PathBuf,
    volumes: Volumes,
    owner: Owner,
    egress_range: Net,
    /// There while a revision with a way out is.
    router: Weak<Router>,
    roots: HashMap<String, Rc<Mounted>>,
    roots_made: u64,
    /// By the number of the process that makes it.
    making: HashMap<i32, Making>,
    /// By the number of its first process.
    instances: HashMap<i32, Instance>,
    removals: VecDeque<Removal>,
}

struct Making {
    request: u64,
    id: String,
    /// Keeps the root mounted; the instance's, once it is made.
    root: Option<Rc<Mounted>>,
    lease: Option<Lease>,
}

struct Instance {
    id: String,
    root: Rc<Mounted>,
    /// Its address, until it is reaped.
    _lease: Option<Lease>,
}

/// What is left of an instance whose exit was reported.
struct Removal {
    cgroups: Vec<PathBuf>,
    state: Option<PathBuf>,
    attempts: u32,
}

impl Launcher {
    fn open(orders: Orders, socket: Rc<OwnedFd>) -> Result<Self, String> {
        let step = |doing: &'static str| move |err: io::Error| format!("{doing}: {err}");
        assert_eq!(sys::threads(), 1, "the launcher has a single thread");

        // A user namespace's root has to walk to its own root.
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
        let cgroups = Cgroups::detect().map_err(step("find the cgroup file systems"))?;
        let limiting = cgroups.limiting(&orders.cgroup);
        let missing = cgroups.missing(&orders.cgroup);
        let cgroups =
            enclosure::change_root(&orders, &cgroups).map_err(step("make the launcher's own root"))?;

        // Supplementary groups of whoever started the daemon would be the functions' too.
        nix::unistd::setgroups(&[]).map_err(|err| format!("drop supplementary groups: {err}"))?;
        let open_files_max = sys::raise_open_files().map_err(step("raise the limit of open files"))?;

        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        mask.add(ORPHANED);
        mask.thread_block().map_err(|err| format!("block signals: {err}"))?;
        let children = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map_err(|err| format!("watch children: {err}"))?;
        // From now on the daemon's death is told, instead of being this process's own at once.
        nix::sys::prctl::set_pdeathsig(ORPHANED).map_err(|err| format!("follow the daemon: {err}"))?;

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
        let filter =
            Filter::compiled_by_a_child().map_err(|why| format!("compile the seccomp filter: {why}"))?;
        for dir in ["roots", "containers", "probe"] {
            fs::create_dir_all(Path::new(STATE).join(dir)).map_err(step("make the state's directories"))?;
        }

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

        let (made, tell) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|err| format!("make the makers' socket: {err}"))?;
        let owner = Owner::new(&orders.cgroup);
        let maker = Maker {
            cgroups,
            cgroup: orders.cgroup,
            limiting,
            filter: Rc::new(filter),
            user_namespaces: id_maps.is_some(),
            open_files_max,
            state: containers(),
            daemon: Rc::clone(&socket),
            launcher: tell,
        };
        let launcher = Self {
            socket,
            children,
            made,
            maker,
            id_maps,
            data_dir: orders.data_dir,
            volumes: Volumes::new(Path::new(STATE).join("volumes")),
            owner,
            egress_range: orders.egress_range,
            router: Weak::new(),
            roots: HashMap::new(),
            roots_made: 0,
            making: HashMap::new(),
            instances: HashMap::new(),
            removals: VecDeque::new(),
        };
        launcher.report(&Report::Ready { warnings }).map_err(step("report to the daemon"))?;
        Ok(launcher)
    }

    /// Until the daemon is gone.
    fn run(&mut self) {
        let mut buffer = vec![0; MESSAGE_BYTES_MAX];
        let mut quiet = false;
        loop {
            let timeout = match self.removals.front() {
                None if quiet => -1,
                None => QUIET_MS,
                Some(removal) if removal.attempts == 0 => 0,
                Some(_) => RETRY_MS,
            };
            let Ready { asked, made, ended, rewired } = match self.wait(timeout) {
                Ok(ready) => ready,
                Err(err) => {
                    eprintln!("neap launcher: poll: {err}");
                    return;
                }
            };
            if rewired
                && let Some(router) = self.router.upgrade()
                && let Err(err) = router.follow()
            {
                eprintln!("neap launcher: follow the node's interfaces: {err}");
            }
            if made {
                self.take_note();
            }
            if ended && self.reap().is_err() {
                return;
            }
            if asked && !self.serve_one(&mut buffer) {
                return;
            }
            let nothing = !(asked || made || ended || rewired);
            let was_quiet = std::mem::replace(&mut quiet, nothing && self.removals.is_empty());
            if quiet && !was_quiet {
                sys::forget_code();
            }
            if nothing || self.removals.len() > REMOVALS_MAX {
                self.remove_one();
            }
        }
    }

    /// The daemon is gone. Everything of this namespace ends with this process, but for what is
    /// frozen on cgroup v1, which would keep it waiting: killed first, the thawed do nothing more.
    fn give_all_up(&self) {
        let everybody = nix::unistd::Pid::from_raw(-1);
        let _ = nix::sys::signal::kill(everybody, Signal::SIGKILL); // there may be nobody
        self.maker.cgroups.thaw_all(&self.maker.cgroup);
        if let Some(router) = self.router.upgrade() {
            router.abandon();
        }
        egress::sweep(&self.owner); // the daemon may not come back
    }

    fn wait(&self, timeout_ms: i64) -> io::Result<Ready> {
        let router = self.router.upgrade();
        let mut watched = vec![
            PollFd::new(&*self.socket, PollFlags::IN),
            PollFd::new(&self.made, PollFlags::IN),
            PollFd::new(&self.children, PollFlags::IN),
        ];
        let changes = router.iter().flat_map(|router| router.changes());
        watched.extend(changes.map(|changes| PollFd::from_borrowed_fd(changes, PollFlags::IN)));
        let (seconds, ms) = (timeout_ms.max(0) / 1000, timeout_ms.max(0) % 1000);
        let timeout = rustix::time::Timespec { tv_sec: seconds, tv_nsec: ms * 1_000_000 };
        match rustix::event::poll(&mut watched, (timeout_ms >= 0).then_some(&timeout)) {
            Err(rustix::io::Errno::INTR) => return Ok(Ready::default()),
            done => done?,
        };
        let is_ready = |n: usize| watched.get(n).is_some_and(|watched| !watched.revents().is_empty());
        Ok(Ready {
            asked: is_ready(0),
            made: is_ready(1),
            ended: is_ready(2),
            rewired: is_ready(3) || is_ready(4),
        })
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
            Request::RefreshSecrets => {
                for root in self.roots.values() {
                    // What is gone stays as it was for those that have it; creates tell.
                    let _ = root.refresh_secrets();
                }
                return true;
            }
            Request::Prepare { request, root } => (request, self.prepare(*root)),
            Request::Admit { request, key, found } => (request, self.admit(&key, &found)),
            Request::Create { request, key, id } => match self.create(request, &key, id, descriptors) {
                Ok(()) => return true, // its maker answers
                Err(refusal) => (request, Err(refusal)),
            },
        };
        let report = match done {
            Ok(()) => Report::Done { request: number },
            Err(refusal) => Report::Refused { request: number, refusal },
        };
        self.report(&report).is_ok()
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
        let policy = self.policy(&order.permissions.allow)?;
        let mut root = rootfs::mount(dir, order, self.id_maps.as_mut(), &mut self.volumes, &self.data_dir)?;
        root.policy = policy;
        self.roots.insert(key, Rc::new(root));
        Ok(())
    }

    /// The way out that a revision may have, and the node's side of it when this is the first.
    fn policy(&mut self, allow: &Allow) -> Result<Option<Rc<Policy>>, Refusal> {
        if allow.network != Network::Egress {
            return Ok(None);
        }
        let refused = |err: EgressError| {
            Refusal::NoWayOut(format!("allow.network = \"egress\": {err}; see `neap doctor`"))
        };
        let router = match self.router.upgrade() {
            Some(router) => router,
            None => {
                let router = Router::open(self.owner.clone(), self.egress_range).map_err(refused)?;
                let told = wire::encode(&Report::Ruled);
                told.and_then(|bytes| wire::send(&self.socket, &bytes, &[router.rules()]))
                    .map_err(|err| Refusal::Failed(format!("hand the rules' socket on: {err}")))?;
                self.router = Rc::downgrade(&router);
                router
            }
        };
        Ok(Some(Rc::new(Policy::new(router, &allow.to).map_err(refused)?)))
    }

    fn admit(&self, key: &str, found: &[Found]) -> Result<(), Refusal> {
        let running = self.instances.values().map(|instance| &instance.root);
        let root = self.roots.get(key).or_else(|| running.into_iter().find(|root| root.order.key == key));
        let policy = root.and_then(|root| root.policy.as_ref());
        policy.map_or(Ok(()), |policy| policy.admit(found)).map_err(|err| Refusal::Failed(err.to_string()))
    }

    /// Begins.
    fn create(
        &mut self,
        request: u64,
        key: &str,
        id: String,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), Refusal> {
        let failed = |why: String| Refusal::Failed(format!("create an instance of {key}: {why}"));
        let Some(root) = self.roots.get(key).cloned() else {
            return Err(failed("its root was not prepared".to_owned()));
        };
        let mut descriptors = descriptors;
        let of_the_node = descriptors.split_off(descriptors.len().min(4));
        let Ok([stdin, stdout, stderr, late]) = <[OwnedFd; 4]>::try_from(descriptors) else {
            return Err(failed("four descriptors were expected".to_owned()));
        };
        if of_the_node.len() != root.node_places().len() {
            return Err(failed("a mount of each directory of the node was expected".to_owned()));
        }
        if let Some(maps) = &mut self.id_maps {
            for (mount, volume) in of_the_node.iter().zip(&root.order.permissions.node_volumes) {
                let mapped =
                    maps.range(root.order.uid_base).and_then(|range| sys::map_ids(mount, range.as_fd()));
                mapped.map_err(|err| failed(format!("map the ids of {}: {err}", volume.from().display())))?;
            }
        }
        // What the function lacks is told as its own trouble, not as the launcher's.
        root.refresh_secrets().map_err(Refusal::Unusable)?;
        let devices = devices::find(&root.order.permissions.allow.devices).map_err(Refusal::Unusable)?;
        if self.making.len() + self.instances.len() + self.removals.len() >= INSTANCES_MAX {
            return Err(failed(format!("{INSTANCES_MAX} instances is all a launcher has")));
        }
        let lease = root.policy.as_ref().map(Policy::lease).transpose();
        let lease = lease.map_err(|err| failed(err.to_string()))?;
        let line = lease.as_ref().map(Lease::line);
        let order = Order {
            request,
            id: &id,
            root: &root,
            devices,
            of_the_node,
            stdio: [stdin, stdout, stderr],
            late,
            line,
        };
        match self.maker.fork(order) {
            Ok(pid) => {
                self.making.insert(pid, Making { request, id, root: Some(root), lease });
                Ok(())
            }
            Err(why) => {
                self.removals.push_back(self.removal(&id));
                Err(failed(why))
            }
        }
    }

    /// Reads all that makers have told.
    fn take_note(&mut self) {
        let mut buffer = [0; MADE_BYTES_MAX];
        loop {
            let told = rustix::net::recv(&self.made, &mut buffer[..], RecvFlags::DONTWAIT);
            let made = match told {
                Ok((got, _)) => serde_json::from_slice(&buffer[..got]),
                Err(_) => return, // nothing more
            };
            match made {
                Ok(Made::Built { id, pid }) => {
                    let making = self.making.values_mut().find(|making| making.id == id);
                    let made = making.and_then(|making| Some((making.root.take()?, making.lease.take())));
                    if let Some((root, lease)) = made {
                        self.instances.insert(pid, Instance { id, root, _lease: lease });
                    }
                }
                Ok(Made::Failed { id, why }) => {
                    let at = self.making.iter().find(|(_, making)| making.id == id).map(|(pid, _)| *pid);
                    if let Some(making) = at.and_then(|pid| self.making.remove(&pid)) {
                        self.give_up(making, why);
                    }
                }
                Err(err) => eprintln!("neap launcher: a maker's message: {err}"),
            }
        }
    }

    /// An instance that could not be made.
    fn give_up(&mut self, making: Making, why: String) {
        let removal = self.removal(&making.id);
        // Should libcontainer's processes have outlived their maker; they are not ours to know.
        removal.cgroups.iter().for_each(|dir| cgroup::kill(dir));
        self.removals.push_back(removal);
        let key = making.root.as_ref().map_or("", |root| &root.order.key);
        let refusal = Refusal::Failed(format!("create an instance of {key}: {why}"));
        // A daemon that is gone is seen by the next poll.
        let _ = self.report(&Report::Refused { request: making.request, refusal });
    }

    /// Collects children that ended. An error: the daemon is gone.
    fn reap(&mut self) -> io::Result<()> {
        while let Ok(Some(signal)) = self.children.read_signal() {
            if signal.ssi_signo == ORPHANED as u32 {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
        }
        loop {
            let (pid, exit) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, ExitReport::Code(code)),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, ExitReport::Signal(signal as i32)),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(()),
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(err) => return Err(err.into()),
            };
            // What a maker told before it ended, and before its container became our child.
            self.take_note();
            if let Some(making) = self.making.remove(&pid.as_raw()) {
                if making.root.is_some() || exit != ExitReport::Code(0) {
                    self.give_up(making, format!("the process that made it ended early ({exit:?})"));
                }
                continue;
            }
            let Some(Instance { id, root, _lease }) = self.instances.remove(&pid.as_raw()) else { continue };
            let succeeded = exit == ExitReport::Code(0);
            let shortage = match succeeded {
                true => None,
                false => self.maker.cgroups.ran_out_of_memory(&self.maker.cgroup, &id),
            };
            let exit = match shortage {
                Some(Shortage::Own) => ExitReport::OutOfMemory,
                Some(Shortage::Above) => {
                    eprintln!("neap launcher: {id} was killed: not its own memory ran out, but the node's");
                    exit
                }
                None => exit,
            };
            let removal = self.removal(&id);
            self.report(&Report::Exited { id, exit })?;
            drop(root);
            self.removals.push_back(removal);
        }
    }

    fn removal(&self, id: &str) -> Removal {
        let cgroups = self.maker.cgroups.directories(&self.maker.cgroup, id);
        Removal { cgroups, state: Some(containers().join(id)), attempts: 0 }
    }

    fn remove_one(&mut self) {
        let Some(mut removal) = self.removals.pop_front() else { return };
        // cgroup directories hold files that nobody may unlink: rmdir removes all.
        removal.cgroups.retain(|dir| !is_gone(fs::remove_dir(dir)));
        removal.state = removal.state.filter(|dir| !is_gone(fs::remove_dir_all(dir)));
        removal.attempts += 1;
        let Some(left) = removal.cgroups.first().or(removal.state.as_ref()) else { return };
        if removal.attempts < RETRIES_MAX {
            self.removals.push_back(removal);
        } else {
            eprintln!("neap launcher: can't remove {}", left.display());
        }
    }

    fn report(&self, report: &Report) -> io::Result<()> {
        wire::send(&self.socket, &wire::encode(report)?, &[])
    }
}

#[derive(Default)]
struct Ready {
    /// There is a request.
    asked: bool,
    /// A maker has told something.
    made: bool,
    /// A child ended.
    ended: bool,
    /// The node's interfaces or rules changed.
    rewired: bool,
}

fn is_gone(removed: io::Result<()>) -> bool {
    removed.is_ok() || removed.is_err_and(|err| err.kind() == io::ErrorKind::NotFound)
}

/// libcontainer's state, while an instance is being made.
fn containers() -> PathBuf {
    Path::new(STATE).join("containers")
}

/// Any range does for trying.
fn probe_base() -> u32 {
    crate::model::function::UID_BASE_FIRST
}
