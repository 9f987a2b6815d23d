//! How the launcher shuts itself in before it does anything: two steps, each an exec or a fork.
//!
//! `neap launcher outer ORDERS`, the daemon's child, dies with it (PR_SET_PDEATHSIG), makes a PID
//! namespace and waits. Its child is the namespace's first process: when that dies, by whatever
//! signal, the kernel kills every container with it. It makes a mount namespace whose mounts
//! reach nobody else, puts the binary behind a read-only mount and executes it from there as
//! `neap launcher inner ORDERS`: what a container could reach through /proc/PID/exe
//! (CVE-2019-5736) can't be written.
//!
//! That one changes its root to a tmpfs that holds the binary, a /proc of its own, /dev, the
//! needed cgroup hierarchies, the data directory and its state. A container on its way into its
//! own root sees no more of the host than this, host file systems are not kept busy, paths of
//! ours can be walked by a user namespace's root whatever the modes of the host's directories,
//! and the mount table, which each create copies and reads several times, is short.
//!
//! Descriptor 0 is the control socket until `inner` takes it over.

use super::cgroup::Cgroups;
use super::sys;
use super::wire::Orders;
use nix::mount::{MntFlags, MsFlags};
use nix::sched::CloneFlags;
use nix::unistd::ForkResult;
use rustix::event::{PollFd, PollFlags};
use rustix::process::{PidfdFlags, Signal};
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// State of 4096 instances at some 12 KiB, and neap's own layers.
const ROOT_OPTIONS: &str = "size=128m,mode=755";

/// Where the launcher keeps its state, in its own root.
pub const STATE: &str = "/state";

const NONE: Option<&str> = None;

/// The daemon's child. Returns when the launcher has ended, or was never started.
pub fn outer(orders: &Orders, text: &str) -> Result<ExitCode, String> {
    let step = |doing: &'static str| move |err: io::Error| format!("{doing}: {err}");
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|err| format!("ask to die with the daemon: {err}"))?;
    if std::os::unix::process::parent_id() != orders.daemon {
        return Err("the daemon died".to_owned()); // before the line above took effect
    }
    sys::close_from(3);
    debug_assert_eq!(sys::threads(), 1, "the child of a fork goes on as the launcher");
    let own = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())
        .map_err(|err| format!("open a pidfd: {err}"))?;
    nix::sched::unshare(CloneFlags::CLONE_NEWPID).map_err(|err| format!("make a PID namespace: {err}"))?;
    match sys::fork().map_err(step("fork"))? {
        ForkResult::Parent { child } => {
            // A service manager that stops the whole unit must not end functions before the daemon
            // has drained. (The child, as a pid 1, ignores these anyway.)
            sys::ignore_termination();
            // The end of the control socket must mean the end of the launcher.
            let null = fs::File::open("/dev/null").map_err(step("open /dev/null"))?;
            let _ = nix::unistd::dup2(std::os::fd::AsRawFd::as_raw_fd(&null), 0);
            loop {
                match nix::sys::wait::waitpid(child, None) {
                    Err(nix::errno::Errno::EINTR) => {}
                    Ok(nix::sys::wait::WaitStatus::Exited(_, code)) => return Ok(ExitCode::from(code as u8)),
                    _ => return Ok(ExitCode::FAILURE),
                }
            }
        }
        ForkResult::Child => {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
                .map_err(|err| format!("ask to die with the outer process: {err}"))?;
            // The parent is outside our PID namespace, so getppid is 0 either way: ask its pidfd.
            let mut parent = [PollFd::new(&own, PollFlags::IN)];
            let zero = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
            if rustix::event::poll(&mut parent, Some(&zero)).is_ok_and(|ready| ready > 0) {
                return Err("the outer process died".to_owned());
            }
            drop(own);
            enclose(orders).map_err(|err| format!("make the launcher's mount namespace: {err}"))?;
            Err(enter(orders, text))
        }
    }
}

fn enclose(orders: &Orders) -> io::Result<()> {
    nix::sched::unshare(CloneFlags::CLONE_NEWNS)?;
    // Slave, not private: what the host unmounts must not stay busy here. Nothing of ours
    // reaches the host, and mounts made below are private.
    nix::mount::mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SLAVE, NONE)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    nix::mount::mount(Some("neap"), &orders.state_dir, Some("tmpfs"), flags, Some(ROOT_OPTIONS))?;
    hide_binary(&orders.state_dir)
}

/// Makes the tmpfs the root, with all that the launcher needs. Its libraries, when it has any,
/// are loaded by now.
pub fn change_root(orders: &Orders) -> io::Result<()> {
    let root = &orders.state_dir;
    let place = |path: &Path| -> io::Result<PathBuf> {
        let at = root.join(path.strip_prefix("/").unwrap_or(path));
        fs::create_dir_all(&at)?;
        Ok(at)
    };
    let bind = |path: &Path, at: &Path| -> io::Result<()> {
        Ok(nix::mount::mount(Some(path), &place(at)?, NONE, MsFlags::MS_BIND, NONE)?)
    };
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    nix::mount::mount(Some("proc"), &place(Path::new("/proc"))?, Some("proc"), flags, NONE)?;
    bind(Path::new("/dev"), Path::new("/dev"))?;
    // v1: the other hierarchies are left out because libcontainer would enter every process in
    // each of them, 1 to 20 ms apiece.
    for mount in Cgroups::detect()?.roots() {
        bind(&mount, &mount)?;
    }
    // Layers may be named with or without the symlinks that lead to the data directory.
    let real = fs::canonicalize(&orders.data_dir)?;
    for at in [&real, &orders.data_dir] {
        let at = place(at)?;
        nix::mount::mount(Some(&real), &at, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)?;
        if real == orders.data_dir {
            break;
        }
    }
    place(Path::new(STATE))?;

    std::env::set_current_dir(root)?;
    match nix::unistd::pivot_root(".", ".") {
        Ok(()) => nix::mount::umount2(".", MntFlags::MNT_DETACH)?,
        // The host runs from its initramfs, which can't be pivoted away: cover it.
        Err(nix::errno::Errno::EINVAL) => {
            nix::mount::mount(Some("."), "/", NONE, MsFlags::MS_MOVE, NONE)?;
            nix::unistd::chroot(".")?;
        }
        Err(err) => return Err(err.into()),
    }
    std::env::set_current_dir("/")
}

/// Puts this binary at `state_dir/neap`, read-only.
fn hide_binary(state_dir: &Path) -> io::Result<()> {
    let at = state_dir.join("neap");
    fs::File::create(&at)?;
    let bound = nix::mount::mount(Some("/proc/self/exe"), &at, NONE, MsFlags::MS_BIND, NONE);
    if bound.is_err() {
        // The file was replaced since we were started, by an upgrade: an unlinked file can't be
        // bound, but read.
        fs::remove_file(&at)?;
        fs::copy("/proc/self/exe", &at)?;
        nix::mount::mount(Some(&at), &at, NONE, MsFlags::MS_BIND, NONE)?;
    }
    let flags =
        MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    Ok(nix::mount::mount(NONE, &at, NONE, flags, NONE)?)
}

/// Becomes `neap launcher inner`; returns only when that failed: why.
fn enter(orders: &Orders, text: &str) -> String {
    let mut command = std::process::Command::new(orders.state_dir.join("neap"));
    let err = command.arg0("neap").args(["launcher", "inner", text]).env_clear().exec();
    format!("execute the launcher from its read-only mount: {err}")
}
