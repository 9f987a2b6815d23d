//! What this kernel offers: asked by trying, not by version.
//!
//! `neap doctor` calls this in a process of its own; what has to be mounted to be tried is
//! mounted in a thread's mount namespace, which ends with it.

use super::cgroup::{Cgroups, Missing};
use super::egress;
use super::layers::{IdMaps, OVERLAY_ADVICE, advice, probe_overlay};
use super::seccomp::Filter;
use super::sys;
use crate::config::{LimitsWanted, UserNamespaces};
use crate::model::api::{Finding, Level};
use crate::model::function::UID_BASE_FIRST;
use crate::model::reach::Net;
use nix::mount::MsFlags;
use nix::sched::CloneFlags;
use std::fs;
use std::io;
use std::path::Path;

/// cgroup mode and controllers, overlayfs, user namespaces and id-mapped mounts on the file
/// system of `data_dir`, seccomp, pidfd, …: a finding each. What `limits` and `user_namespaces`
/// let pass is a warning. Needs root; changes nothing that lasts.
pub fn probe(
    data_dir: &Path,
    limits: LimitsWanted,
    user_namespaces: UserNamespaces,
    egress_range: Net,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !rustix::process::geteuid().is_root() {
        findings.push(failing("root", "not root", "run it as root: containers need it"));
    }
    findings.push(kernel());
    findings.extend(cgroups(limits));
    let [overlay, maps] = mounts(data_dir, user_namespaces);
    findings.extend([overlay, maps, seccomp(), pidfd(), pressure(), volumes(), egress(egress_range)]);
    findings
}

fn ok(name: &str, found: impl Into<String>) -> Finding {
    Finding { name: name.to_owned(), level: Level::Ok, found: found.into(), advice: String::new() }
}

fn warning(name: &str, found: impl Into<String>, advice: impl Into<String>) -> Finding {
    Finding { name: name.to_owned(), level: Level::Warning, found: found.into(), advice: advice.into() }
}

fn failing(name: &str, found: impl Into<String>, advice: impl Into<String>) -> Finding {
    Finding { name: name.to_owned(), level: Level::Failing, found: found.into(), advice: advice.into() }
}

/// What libcontainer makes every mount with.
fn kernel() -> Finding {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    match sys::has_mount_setattr() {
        true => ok("kernel", format!("Linux {release}")),
        false => {
            failing("kernel", format!("Linux {release} has no mount_setattr(2)"), "use Linux 5.12 or newer")
        }
    }
}

/// The mode, then each controller that is missing.
fn cgroups(limits: LimitsWanted) -> Vec<Finding> {
    let name = "cgroup";
    let cgroups = match Cgroups::detect() {
        Ok(cgroups) => cgroups,
        Err(err) => {
            let advice = "mount them: `mount -t cgroup2 cgroup2 /sys/fs/cgroup`; without CONFIG_CGROUPS neap can't run";
            return vec![failing(name, err.to_string(), advice)];
        }
    };
    let missing = cgroups.would_miss();
    let mut found = cgroups.describe();
    if cgroups.kills_one_by_one() {
        found.push_str(", without cgroup.kill (Linux 5.14): what is left over is killed process by process");
    }
    let has_memory = !missing.iter().any(|m| m.controller == "memory");
    let mut findings = vec![match has_memory && has_swap() && !cgroups.counts_swap() {
        true => warning(
            name,
            format!("{found}; swap is not counted: functions can swap beyond limits.memory"),
            "add `swapaccount=1` to the kernel's command line, or build it with CONFIG_SWAP and CONFIG_MEMCG_SWAP",
        ),
        false => ok(name, found),
    }];
    findings.extend(missing.into_iter().map(|missing| lacking(&missing, limits)));
    findings
}

/// What works without a controller, and how to have it.
fn lacking(missing: &Missing, limits: LimitsWanted) -> Finding {
    let Missing { controller, why } = missing;
    let name = format!("cgroup {controller}");
    let advice = why.advice(controller);
    match (controller, missing.is_vital(), limits) {
        (_, true, LimitsWanted::Require) => failing(
            &name,
            format!("not there: limits.{controller} can't be enforced, so neap doesn't start"),
            format!("{advice}; or set `limits = \"prefer\"` in [node] to run without"),
        ),
        (_, true, LimitsWanted::Prefer) => warning(
            &name,
            format!("not there: functions run without limits.{controller} and may take the whole machine"),
            advice,
        ),
        (_, false, _) => {
            warning(&name, format!("not there: functions run without limits.{controller}"), advice)
        }
    }
}

fn has_swap() -> bool {
    fs::read_to_string("/proc/swaps").is_ok_and(|text| text.lines().count() > 1)
}

/// Overlayfs, and id-mapped layers below it.
fn mounts(data_dir: &Path, user_namespaces: UserNamespaces) -> [Finding; 2] {
    let shown = data_dir.display();
    let [overlay, maps] = on_a_thread(|| tried(data_dir)).unwrap_or_else(|| {
        let failed = || Err(io::Error::other("trying it failed"));
        [failed(), failed()]
    });
    let without = "set `user_namespaces = \"prefer\"` in [node] to run without";
    let name = "user namespaces";
    let mapped = match (&overlay, maps, user_namespaces) {
        (_, Ok(()), _) => ok(name, format!("id-mapped mounts work on {shown}")),
        (Err(_), Err(_), _) => warning(name, "not tried: they need overlayfs", ""),
        (Ok(()), Err(err), UserNamespaces::Require) => {
            failing(name, format!("{shown}: {err}"), format!("{}, or {without}", advice(&err)))
        }
        (Ok(()), Err(err), UserNamespaces::Prefer) => {
            let found = format!("{shown}: {err}; a function's root is the node's, without capabilities");
            warning(name, found, advice(&err))
        }
    };
    [
        match overlay {
            Ok(()) => ok("overlayfs", "mounts"),
            Err(err) => failing("overlayfs", format!("{err}: images can't be run"), OVERLAY_ADVICE),
        },
        mapped,
    ]
}

/// Both, one after the other.
fn tried(data_dir: &Path) -> [io::Result<()>; 2] {
    const NONE: Option<&str> = None;
    let private = || -> io::Result<()> {
        nix::sched::unshare(CloneFlags::CLONE_NEWNS)?;
        nix::mount::mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
        // Any directory will do to cover, but not one that is above the data directory.
        Ok(nix::mount::mount(Some("neap"), "/proc/sys", Some("tmpfs"), MsFlags::MS_NODEV, Some("size=1m"))?)
    };
    if let Err(err) = private() {
        let failed = || Err(io::Error::new(err.kind(), format!("make a mount namespace: {err}")));
        return [failed(), failed()];
    }
    let scratch = Path::new("/proc/sys");
    let overlay = probe_overlay(scratch);
    let maps = IdMaps::new().probe(data_dir, &scratch.join("maps"), UID_BASE_FIRST);
    [overlay, maps]
}

/// On a thread of its own, because namespaces are a thread's.
fn on_a_thread<T: Send>(work: impl FnOnce() -> T + Send) -> Option<T> {
    std::thread::scope(|scope| scope.spawn(work).join()).ok()
}

fn seccomp() -> Finding {
    let name = "seccomp";
    let advice = "build a kernel with CONFIG_SECCOMP_FILTER";
    match (sys::has_seccomp_filters(), Filter::compile()) {
        (true, Ok(_)) => ok(name, "filters work"),
        (false, _) => failing(name, "the kernel has no filters: functions can't be confined", advice),
        (_, Err(why)) => failing(name, why, "this binary was linked with a libseccomp that is too old"),
    }
}

fn pidfd() -> Finding {
    let name = "pidfd";
    match rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty()) {
        Ok(_) => ok(name, "works"),
        Err(err) => failing(name, err.to_string(), "use Linux 5.3 or newer"),
    }
}

fn pressure() -> Finding {
    let name = "pressure stall information";
    match super::pressure::memory() {
        Some(_) => ok(name, "there"),
        None => warning(
            name,
            "not there: nothing tells when memory runs short",
            "add `psi=1` to the kernel's command line, or build it with CONFIG_PSI",
        ),
    }
}

/// What functions with `[[volume]]` need.
fn volumes() -> Finding {
    let name = "volumes";
    let without = "functions with volumes can't run, others don't need it";
    // A container may have the control and none of the devices.
    let open = |number| fs::File::options().read(true).write(true).open(format!("/dev/loop{number}"));
    if let Err(err) = sys::free_loop().and_then(open) {
        let advice = "load the module `loop`, or build a kernel with CONFIG_BLK_DEV_LOOP";
        return warning(name, format!("no loop devices ({err}): {without}"), advice);
    }
    if super::volumes::mkfs().is_none() {
        return warning(name, format!("mkfs.ext4 is not there: {without}"), "install e2fsprogs");
    }
    ok(name, "loop devices and mkfs.ext4 are there")
}

/// What functions with a way out need: tried in a network namespace of a thread's own.
fn egress(range: Net) -> Finding {
    let name = "egress";
    let tried = on_a_thread(|| -> Result<Vec<&egress::Part>, String> {
        nix::sched::unshare(CloneFlags::CLONE_NEWNET)
            .map_err(|err| format!("make a network namespace: {err}"))?;
        egress::probe().map_err(|err| err.to_string())
    });
    let without = "functions with network = \"egress\" can't run, others don't need it";
    let lacking = match tried.unwrap_or_else(|| Err("trying it failed".to_owned())) {
        Ok(lacking) => lacking,
        Err(why) => {
            let advice = "load the modules `nf_tables` and `veth`, or build a kernel with CONFIG_NF_TABLES and CONFIG_VETH";
            return warning(name, format!("{why}: {without}"), advice);
        }
    };
    let each = |word: fn(&egress::Part) -> &str, parts: &[&egress::Part]| {
        parts.iter().map(|part| word(part)).collect::<Vec<_>>().join(", ")
    };
    let advice = |parts: &[&egress::Part]| {
        let (modules, options) = (each(|part| part.module, parts), each(|part| part.option, parts));
        format!("load {modules} (modprobe), or build a kernel with {options}")
    };
    let vital: Vec<_> = lacking.iter().copied().filter(|part| part.without.is_none()).collect();
    if !vital.is_empty() {
        let options = each(|part| part.option, &vital);
        return warning(name, format!("this kernel has no {options}: {without}"), advice(&vital));
    }
    if let Err(err) = egress::find_room(range) {
        return warning(
            name,
            format!("{err}: {without}"),
            "set [node] egress_range to one that this machine doesn't use",
        );
    }
    if let Some(egress::Hindrance { chain, advice }) = egress::hindrances().into_iter().next() {
        let found =
            format!("the firewall's chain {chain} drops what functions with network = \"egress\" send");
        return warning(name, found, advice);
    }
    if !lacking.is_empty() {
        let losses = each(|part| part.without.unwrap_or_default(), &lacking);
        return warning(name, format!("addresses of {range}; {losses}"), advice(&lacking));
    }
    let forwards = fs::read_to_string("/proc/sys/net/ipv4/ip_forward").is_ok_and(|text| text.trim() == "1");
    let range = match forwards {
        true => format!("addresses of {range}"),
        false => {
            format!("addresses of {range}; net.ipv4.ip_forward is off: neap forwards for its functions alone")
        }
    };
    ok(name, range)
}
