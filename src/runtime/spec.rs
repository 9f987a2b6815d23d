//! The OCI runtime specification of an instance, as libcontainer reads it from `config.json`.
//!
//! Lean: each mount entry costs 0.2 to 0.5 ms a create. There is no /sys, no /dev/pts and no
//! /dev/mqueue; programs that look for them fall back. `seccomp` is absent on purpose
//! (seccomp.rs), and so are devices beyond libcontainer's six harmless ones.

use super::cgroup::Limiting;
use super::executor::DEFAULT_PATH;
use super::rootfs::Mounted;
use crate::model::function::UID_RANGE;
use serde_json::{Value, json};

/// Docker's masked paths, without those below /sys.
const MASKED: [&str; 10] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
];

const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// The kernel's scheduling period. 100 ms is its default and everyone's.
const CPU_PERIOD_US: u64 = 100_000;

/// The kernel takes no smaller quota.
const CPU_QUOTA_US_MIN: u64 = 1_000;

/// libcontainer sets an instance up with two processes in its cgroup.
const PIDS_MIN: u32 = 2;

/// A tmpfs of size 0 is one without a limit.
const DISK_BYTES_MIN: u64 = 4096;

/// Shared memory: semaphores and small rings. What is larger belongs in /tmp.
const SHM_BYTES_MAX: u64 = 1024 * 1024;

/// What programs expect to find; the launcher itself has more.
const OPEN_FILES: u64 = 1024;

/// `config.json` for one instance.
pub fn instance(
    root: &Mounted,
    limiting: Limiting,
    user_namespace: bool,
    open_files_max: u64,
    cgroup: &str,
) -> Value {
    let order = &root.order;
    let user = &root.user;
    let mut namespaces: Vec<Value> =
        ["mount", "pid", "ipc", "uts", "network", "cgroup"].map(|kind| json!({ "type": kind })).to_vec();
    let mut mappings = json!([]);
    if user_namespace {
        namespaces.push(json!({ "type": "user" }));
        mappings = json!([{ "containerID": 0, "hostID": order.uid_base, "size": UID_RANGE }]);
    }
    let none: [&str; 0] = [];
    // libcontainer changes directory before anything can be made in a fresh /tmp: executor.rs does.
    let cwd = if root.working_dir.is_made_in_each { "/" } else { &root.working_dir.path };
    let disk = order.limits.disk_bytes.max(DISK_BYTES_MIN);
    json!({
        "ociVersion": "1.0.2",
        "hostname": root.hostname,
        "root": { "path": "rootfs", "readonly": true },
        "process": {
            "terminal": false,
            "user": { "uid": user.uid, "gid": user.gid, "additionalGids": user.groups, "umask": 0o022 },
            "args": order.command,
            "env": environment(root),
            "cwd": cwd,
            "noNewPrivileges": true,
            // Absent would mean: keep all.
            "capabilities": {
                "bounding": none, "effective": none, "inheritable": none, "permitted": none, "ambient": none,
            },
            "rlimits": [
                { "type": "RLIMIT_NOFILE", "soft": OPEN_FILES.min(open_files_max), "hard": open_files_max },
                { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 },
            ],
        },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
            {
                "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=64k"],
            },
            {
                "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                "options": ["nosuid", "noexec", "nodev", "mode=1777", format!("size={}", disk.min(SHM_BYTES_MAX))],
            },
            {
                "destination": "/tmp", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "nodev", "mode=1777", format!("size={disk}")],
            },
        ],
        "linux": {
            "namespaces": namespaces,
            "uidMappings": mappings,
            "gidMappings": mappings,
            "cgroupsPath": format!("/{cgroup}"),
            "resources": resources(root, limiting),
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
        },
    })
}

/// Only what can be enforced: libcgroups fails for a controller or file that isn't there.
fn resources(root: &Mounted, limiting: Limiting) -> Value {
    let limits = &root.order.limits;
    // v1 starts with every device allowed; libcgroups then adds its harmless ones.
    let mut resources = json!({ "devices": [{ "allow": false, "access": "rwm" }] });
    if limiting.memory {
        resources["memory"] = json!({ "limit": limits.memory_bytes });
        if limiting.swap {
            resources["memory"]["swap"] = json!(limits.memory_bytes); // memory and swap together: no swap
        }
    }
    if limiting.cpu {
        let quota = (u64::from(limits.cpu_millis) * CPU_PERIOD_US / 1000).max(CPU_QUOTA_US_MIN);
        resources["cpu"] = json!({ "quota": quota, "period": CPU_PERIOD_US });
    }
    if limiting.pids {
        resources["pids"] = json!({ "limit": limits.pids.max(PIDS_MIN) });
    }
    resources
}

/// The image's and manifest's variables, and what programs take for granted.
fn environment(root: &Mounted) -> Vec<String> {
    let mut env = root.order.env.clone();
    for (name, value) in [("PATH", DEFAULT_PATH), ("HOSTNAME", &root.hostname), ("HOME", &root.user.home)] {
        let is_set = env.iter().any(|var| var.strip_prefix(name).is_some_and(|rest| rest.starts_with('=')));
        if !is_set {
            env.push(format!("{name}={value}"));
        }
    }
    env
}
