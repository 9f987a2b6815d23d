//! What this kernel offers: asked by trying, not by version.
//!
//! `neap doctor` calls this in a process of its own; what has to be mounted to be tried is
//! mounted in a thread's mount namespace, which ends with it.

use super::cgroup::{Cgroups, Missing};
use super::layers::{IdMaps, OVERLAY_ADVICE, advice, probe_overlay};
use super::seccomp::Filter;
use super::sys;
use crate::config::{LimitsWanted, UserNamespaces};
use crate::model::api::{Finding, Level};
use crate::model::function::UID_BASE_FIRST;
use nix::mount::MsFlags;
use nix::sched::CloneFlags;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// cgroup mode and controllers, overlayfs, user namespaces and id-mapped mounts on the file
/// system of `data_dir`, seccomp, pidfd, …: a finding each. What `limits` and `user_namespaces`
/// let pass is a warning. Needs root; changes nothing that lasts.
pub fn probe(data_dir: &Path, limits: LimitsWanted, user_namespaces: UserNamespaces) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !rustix::process::geteuid().is_root() {
        findings.push(failing("root", "not root", "run it as root: containers need it"));
    }
    findings.push(kernel());
    findings.extend(cgroups(limits));
    let [overlay, maps] = mounts(data_dir, user_namespaces);
    findings.extend([overlay, maps, seccomp(), pidfd(), pressure(), volumes(), nftables()]);
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

/// Whether the kernel answers for nf_tables, whose module it may have to load.
fn nftables() -> Finding {
    let name = "nftables";
    match nf_tables_answers() {
        Ok(()) => ok(name, "there"),
        Err(err) => warning(
            name,
            format!("{err}; functions with a network of their own would need it, others don't"),
            "load the module `nf_tables`, or build a kernel with CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET, CONFIG_NFT_NAT and CONFIG_NFT_MASQ",
        ),
    }
}

/// Asks for the ruleset's generation, which every nf_tables has
/// (linux/netfilter/nf_tables.h, NFT_MSG_GETGEN).
fn nf_tables_answers() -> io::Result<()> {
    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
    const NFNL_SUBSYS_NFTABLES: u16 = 10;
    const NFT_MSG_GETGEN: u16 = 16;
    const NLM_F_REQUEST: u16 = 1;
    const NLMSG_ERROR: u16 = 2;
    const HEADER_BYTES: usize = 16;
    let netfilter = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )?;
    // nlmsghdr, nfgenmsg (netlink(7)); all in the machine's own order, but for an id of 0.
    let mut message = Vec::with_capacity(HEADER_BYTES + 4);
    message.extend_from_slice(&(HEADER_BYTES as u32 + 4).to_ne_bytes());
    message.extend_from_slice(&(NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETGEN).to_ne_bytes());
    message.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    message.extend_from_slice(&[0; 8]); // sequence, port
    message.extend_from_slice(&[0; 4]);
    send(netfilter.as_raw_fd(), &message, MsgFlags::empty())?;
    let mut answer = [0_u8; 256];
    // netlink answers before send returns.
    let length = recv(netfilter.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)?;
    let kind = answer.get(4..6).map(|bytes| u16::from_ne_bytes([bytes[0], bytes[1]]));
    let code = answer.get(HEADER_BYTES..HEADER_BYTES + 4);
    match (kind, code) {
        (Some(NLMSG_ERROR), Some(code)) if length >= HEADER_BYTES + 4 => {
            let code = i32::from_ne_bytes([code[0], code[1], code[2], code[3]]);
            Err(io::Error::from_raw_os_error(code.saturating_neg()))
        }
        _ => Ok(()),
    }
}
