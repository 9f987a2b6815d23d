//! What this kernel offers: asked by trying, not by version.
//!
//! `neap doctor` calls this in a process of its own; what has to be mounted to be tried is
//! mounted in a thread's mount namespace, which ends with it.

use super::cgroup::{Cgroups, Limiting};
use super::layers::{IdMaps, probe_overlay};
use super::seccomp::Filter;
use crate::model::api::{Finding, Level};
use crate::model::function::UID_BASE_FIRST;
use nix::mount::MsFlags;
use nix::sched::CloneFlags;
use std::fs;
use std::io;
use std::path::Path;

/// cgroup mode and controllers, overlayfs, user namespaces and id-mapped mounts on the file
/// system of `data_dir`, seccomp, pidfd: a finding each. Needs root; changes nothing that lasts.
pub fn probe(data_dir: &Path) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !rustix::process::geteuid().is_root() {
        findings.push(failing("root", "not root", "run it as root: containers need it"));
    }
    findings.push(cgroups());
    let [overlay, maps] = mounts(data_dir);
    findings.extend([overlay, maps, seccomp(), pidfd(), pressure()]);
    findings
}

fn ok(name: &str, found: impl Into<String>) -> Finding {
    Finding { name: name.to_owned(), level: Level::Ok, found: found.into(), advice: String::new() }
}

fn warning(name: &str, found: impl Into<String>, advice: &str) -> Finding {
    Finding { name: name.to_owned(), level: Level::Warning, found: found.into(), advice: advice.to_owned() }
}

fn failing(name: &str, found: impl Into<String>, advice: &str) -> Finding {
    Finding { name: name.to_owned(), level: Level::Failing, found: found.into(), advice: advice.to_owned() }
}

fn cgroups() -> Finding {
    let name = "cgroup";
    match Cgroups::detect() {
        Ok(cgroups) => {
            let offered = cgroups.offered();
            let missing = cgroups.warnings(offered);
            let found = cgroups.describe();
            match (offered, missing.is_empty()) {
                (_, false) => warning(
                    name,
                    format!("{found}; {}", missing.join("; ")),
                    "enable the controllers: `cgroup_enable=memory` on the kernel's command line, or CONFIG_MEMCG, CONFIG_CFS_BANDWIDTH, CONFIG_CGROUP_PIDS",
                ),
                (Limiting { swap: false, .. }, true) if has_swap() => warning(
                    name,
                    format!("{found}; swap is not counted"),
                    "add `swapaccount=1` to the kernel's command line: functions can swap beyond limits.memory",
                ),
                _ => ok(name, found),
            }
        }
        Err(err) => failing(name, err.to_string(), "mount the cgroup file systems on /sys/fs/cgroup"),
    }
}

fn has_swap() -> bool {
    fs::read_to_string("/proc/swaps").is_ok_and(|text| text.lines().count() > 1)
}

/// Overlayfs, and id-mapped layers below it.
fn mounts(data_dir: &Path) -> [Finding; 2] {
    let overlay_advice = "load the module `overlay`, or build a kernel with CONFIG_OVERLAY_FS";
    let maps_advice = "use ext4, xfs, btrfs or f2fs and Linux 5.19, or set `user_namespaces = \"prefer\"` in [node] to run without";
    let text = on_a_thread(|| tried(data_dir));
    let (overlay, maps) = text.split_once('\n').unwrap_or((&text, &text));
    [
        match overlay.is_empty() {
            true => ok("overlayfs", "mounts"),
            false => failing("overlayfs", overlay, overlay_advice),
        },
        match maps.is_empty() {
            true => ok("user namespaces", format!("id-mapped mounts work on {}", data_dir.display())),
            false => failing("user namespaces", format!("{}: {maps}", data_dir.display()), maps_advice),
        },
    ]
}

/// What went wrong with either, a line each; empty lines when nothing did.
fn tried(data_dir: &Path) -> String {
    const NONE: Option<&str> = None;
    let private = || -> io::Result<()> {
        nix::sched::unshare(CloneFlags::CLONE_NEWNS)?;
        nix::mount::mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
        // Any directory will do to cover, but not one that is above the data directory.
        Ok(nix::mount::mount(Some("neap"), "/proc/sys", Some("tmpfs"), MsFlags::MS_NODEV, Some("size=1m"))?)
    };
    if let Err(err) = private() {
        return format!("make a mount namespace: {err}\nmake a mount namespace: {err}");
    }
    let scratch = Path::new("/proc/sys");
    let text = |done: io::Result<()>| done.err().map(|err| err.to_string()).unwrap_or_default();
    let overlay = text(probe_overlay(scratch));
    let maps = text(IdMaps::new().probe(data_dir, &scratch.join("maps"), UID_BASE_FIRST));
    format!("{overlay}\n{maps}")
}

/// On a thread of its own, because namespaces are a thread's.
fn on_a_thread(work: impl FnOnce() -> String + Send) -> String {
    std::thread::scope(|scope| scope.spawn(work).join()).unwrap_or_else(|_| "trying it failed".to_owned())
}

fn seccomp() -> Finding {
    let name = "seccomp";
    let advice = "build a kernel with CONFIG_SECCOMP_FILTER";
    let allowed = fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail");
    match (allowed, Filter::compile()) {
        (Ok(actions), Ok(_)) if actions.contains("errno") => ok(name, "filters work"),
        (Ok(_) | Err(_), Ok(_)) => failing(name, "the kernel has no filters", advice),
        (_, Err(why)) => failing(name, why, "this binary was linked with a libseccomp that is too old"),
    }
}

fn pidfd() -> Finding {
    let name = "pidfd";
    match rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty()) {
        Ok(_) => ok(name, "works"),
        Err(err) => failing(name, err.to_string(), "use Linux 5.4 or newer"),
    }
}

fn pressure() -> Finding {
    let name = "pressure stall information";
    match fs::read_to_string("/proc/pressure/memory") {
        Ok(_) => ok(name, "there"),
        Err(_) => {
            warning(name, "not there", "add `psi=1` to the kernel's command line to see memory pressure")
        }
    }
}
