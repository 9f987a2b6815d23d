//! The making of one instance, in a process of its own that ends with it.
//!
//! libcontainer's create is synchronous, 4 to 6 ms of a thousand system calls. The launcher forks
//! for each, so that creates overlap with one another and with everything else it does, and so
//! that what libcontainer leaves in memory goes with the child. A container's first process is
//! the maker's child, and the launcher's as soon as the maker has ended: an orphan's next
//! parent is the first process of its PID namespace, which is the launcher.
//!
//! ```text
//! launcher    make cgroup · fork ─────────────────── take note ····· reap the maker
//! maker         └─ enter · mount · libcontainer ── made ─ answer ─ start ─ end
//! container                             └─ set up ──────────────── wait for the event's environment
//! ```
//!
//! The maker tells the launcher first and the daemon second, itself, and then gives libcontainer's start
//! signal. What a parked instance waits for is its environment (executor.rs), which the
//! daemon sends it directly: a start takes no turn of the launcher. libcontainer's files are of
//! no use from then on and are removed at once.

use super::cgroup::{Cgroups, Limiting};
use super::devices::{self, Device};
use super::egress::Line;
use super::executor::Command;
use super::netns;
use super::rootfs::Mounted;
use super::seccomp::Filter;
use super::wire::{self, Made, Report};
use super::{mounts, spec, sys};
use crate::model::permissions::Network;
use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use nix::sys::signal::Signal;
use std::cell::RefCell;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Added to what makes the kernel choose a victim when the whole machine is out of memory: a
/// function before the daemon.
const OOM_SCORE: &str = "300";

/// libcontainer's name for the only container that a state directory ever has.
const CONTAINER: &str = "c";

/// What every instance is made with.
pub struct Maker {
    pub cgroups: Cgroups,
    /// The parent of all instances.
    pub cgroup: String,
    pub limiting: Limiting,
    pub filter: Rc<Filter>,
    pub user_namespaces: bool,
    pub open_files_max: u64,
    /// One directory for each instance that is being made.
    pub state: PathBuf,
    /// To the daemon.
    pub daemon: Rc<OwnedFd>,
    /// To the launcher.
    pub launcher: OwnedFd,
}

/// An instance to be made.
pub struct Order<'a> {
    pub request: u64,
    pub id: &'a str,
    pub root: &'a Mounted,
    pub devices: Vec<Device>,
    /// Detached mounts, one for each of the root's places for them.
    pub of_the_node: Vec<OwnedFd>,
    /// stdin, stdout, stderr.
    pub stdio: [OwnedFd; 3],
    pub late: OwnedFd,
    /// Its way out.
    pub line: Option<Line>,
}

impl Maker {
    /// The process that makes it. An error: nothing was begun.
    pub fn fork(&self, order: Order<'_>) -> Result<i32, String> {
        let limits = &order.root.order.limits;
        self.cgroups
            .make_instance(&self.cgroup, order.id, limits, &order.devices, self.limiting)
            .map_err(|err| format!("make its cgroup: {err}"))?;
        let entrance = self.cgroups.entrance(&self.cgroup, order.id);
        let entrance = entrance.map_err(|err| format!("open its cgroup: {err}"))?;
        let forked = sys::fork_into(entrance.as_ref().map(AsFd::as_fd));
        match forked.map_err(|err| format!("fork: {err}"))? {
            sys::Forked::Parent { child } => Ok(child),
            sys::Forked::Child { is_inside } => {
                // Nothing of the launcher's may be dropped here: roots would be unmounted.
                let code = catch_unwind(AssertUnwindSafe(|| self.work(order, is_inside)));
                sys::exit_now(code.unwrap_or(1))
            }
        }
    }

    /// In the child; its exit code.
    fn work(&self, order: Order<'_>, is_inside: bool) -> i32 {
        let (id, request) = (order.id.to_owned(), order.request);
        let dir = self.state.join(&id);
        let pids = order.root.order.limits.pids;
        let own_network = order.root.order.permissions.allow.network != Network::Host;
        let line = order.line.clone();
        let built = self.build(order, &dir, is_inside).and_then(|(container, pid)| {
            let finished = self.finish(&id, pid, pids, line.as_ref(), own_network);
            if finished.is_err() {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
            }
            Ok((container, pid, finished?))
        });
        let (container, pid, pidfd) = match built {
            Ok(built) => built,
            Err(why) => {
                let _ = self.tell_launcher(&Made::Failed { id, why });
                return 0;
            }
        };
        // In this order: an exit that is told before its instance is known would be nobody's.
        let answered = self
            .tell_launcher(&Made::Built { id, pid })
            .and_then(|()| wire::encode(&Report::Created { request }))
            .and_then(|bytes| wire::send(&self.daemon, &bytes, &[pidfd.as_fd()]));
        if answered.is_err() {
            return 1; // the daemon or the launcher is gone, and everything with it
        }
        if let Err(err) = started(&container) {
            eprintln!("neap launcher: give the start signal: {err}");
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = fs::remove_dir_all(&dir);
        0
    }

    fn build(&self, order: Order<'_>, dir: &Path, is_inside: bool) -> Result<(Container, i32), String> {
        let Order { id, root, devices, of_the_node, stdio: [stdin, stdout, stderr], late, .. } = order;
        let step = |doing: &'static str| move |err: io::Error| format!("{doing}: {err}");
        // Inherited by the container; its /proc is out of reach later.
        fs::write("/proc/self/oom_score_adj", OOM_SCORE).map_err(step("set its OOM score"))?;
        let uid = self.uid(root);
        let disk_bytes = root.order.limits.disk_bytes;
        let scratch = root.order.permissions.allow.writable.then(|| root.scratch());
        mounts::mount(&root.path(), scratch.as_deref(), uid, disk_bytes)
            .map_err(step("mount its root, /dev and /tmp"))?;
        devices::make(&devices, &root.path().join("dev"), uid + root.user.uid, uid + root.user.gid, uid)
            .map_err(step("make its devices"))?;
        for (dir, at) in root.volume_mounts() {
            mounts::volume(dir, &root.path(), at).map_err(step("mount its volumes"))?;
        }
        for (mount, at) in of_the_node.into_iter().zip(root.node_places()) {
            sys::attach_below(mount, &root.path(), at).map_err(step("attach directories of the node"))?;
        }
        for (dir, at) in root.secret_mounts() {
            mounts::read_only(dir, &root.path(), at).map_err(step("mount its secrets"))?;
        }
        let spec = spec::instance(root, self.user_namespaces, self.open_files_max).to_string();
        fs::create_dir(dir)
            .and_then(|()| fs::write(dir.join("config.json"), spec))
            .map_err(step("write its specification"))?;
        if !is_inside {
            self.cgroups.enter(&self.cgroup, id).map_err(step("enter its cgroup"))?;
        }
        let working_dir = &root.working_dir;
        let command = Command {
            filter: Rc::clone(&self.filter),
            make_and_enter: working_dir.is_made_in_each.then(|| PathBuf::from(&working_dir.path)),
            not_entered: RefCell::default(),
            late: late.as_raw_fd(),
        };
        let container = ContainerBuilder::new(CONTAINER.to_owned(), SyscallType::default())
            .with_root_path(dir)
            .map_err(|err| whole(&err))?
            .with_executor(command)
            .with_stdin(stdin)
            .with_stdout(stdout)
            .with_stderr(stderr)
            .validate_id()
            .map_err(|err| whole(&err))?
            .as_init(dir)
            .with_systemd(false)
            .with_detach(true)
            .build()
            .map_err(|err| whole(&err))?;
        let pid = container.pid().ok_or("it has no process")?.as_raw();
        Ok((container, pid))
    }

    /// What libcontainer leaves to others.
    fn finish(
        &self,
        id: &str,
        pid: i32,
        pids: u32,
        line: Option<&Line>,
        own_network: bool,
    ) -> Result<OwnedFd, String> {
        if let Some(line) = line {
            line.attach(pid).map_err(|err| format!("give it a way out: {err}"))?;
        }
        if own_network {
            netns::bring_loopback_up(pid).map_err(|err| format!("set its loopback up: {err}"))?;
        }
        self.cgroups
            .leave(&self.cgroup)
            .and_then(|()| self.cgroups.limit_processes(&self.cgroup, id, pids, self.limiting))
            .map_err(|err| format!("limit its processes: {err}"))?;
        let pid = rustix::process::Pid::from_raw(pid).ok_or("it has no process")?;
        rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())
            .map_err(|err| format!("open a pidfd: {err}"))
    }

    /// The host id of a function's root.
    fn uid(&self, root: &Mounted) -> u32 {
        if self.user_namespaces { root.order.uid_base } else { 0 }
    }

    fn tell_launcher(&self, made: &Made) -> io::Result<()> {
        wire::encode(made).and_then(|bytes| wire::send(&self.launcher, &bytes, &[]))
    }
}

/// libcontainer's start signal, without the bookkeeping of `Container::start`.
fn started(container: &Container) -> io::Result<()> {
    // By a relative name: a socket's path has 107 bytes at most.
    std::env::set_current_dir(&container.root)?;
    UnixStream::connect("notify.sock")?.write_all(b"start container")
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
