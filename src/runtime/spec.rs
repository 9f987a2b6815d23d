//! The OCI runtime specification of an instance, as libcontainer reads it from `config.json`.
//!
//! Lean: each mount entry costs 0.2 to 0.5 ms a create, so that only /proc is left to libcontainer
//! (mounts.rs). `resources` are absent because neap writes them itself (limits.rs), `seccomp`
//! because it is loaded by the executor (seccomp.rs), devices because libcontainer's six harmless
//! ones are there anyhow and the manifest's are made before (devices.rs).

use super::executor::DEFAULT_PATH;
use super::rootfs::Mounted;
use crate::model::function::UID_RANGE;
use crate::model::permissions::Network;
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

/// What programs expect to find; the launcher itself has more.
const OPEN_FILES: u64 = 1024;

/// `config.json` for one instance.
pub fn instance(root: &Mounted, user_namespace: bool, open_files_max: u64) -> Value {
    let order = &root.order;
    let user = &root.user;
    let allow = &order.permissions.allow;
    let mut namespaces: Vec<Value> =
        ["mount", "pid", "ipc", "uts", "cgroup"].map(|kind| json!({ "type": kind })).to_vec();
    if allow.network != Network::Host {
        namespaces.push(json!({ "type": "network" }));
    }
    let mut mappings = json!([]);
    if user_namespace {
        namespaces.push(json!({ "type": "user" }));
        mappings = json!([{ "containerID": 0, "hostID": order.uid_base, "size": UID_RANGE }]);
    }
    // In all five sets: whoever the function's user is has them after execve.
    let capabilities: Vec<String> =
        allow.capabilities.iter().map(|c| format!("CAP_{}", c.as_str())).collect();
    // libcontainer changes directory before anything can be made in a fresh /tmp: executor.rs does.
    let cwd = if root.working_dir.is_made_in_each { "/" } else { &root.working_dir.path };
    json!({
        "ociVersion": "1.0.2",
        "hostname": root.hostname,
        "root": { "path": root.path(), "readonly": !allow.writable },
        "process": {
            "terminal": false,
            "user": { "uid": user.uid, "gid": user.gid, "additionalGids": user.groups, "umask": 0o022 },
            "args": order.command,
            "env": environment(root),
            "cwd": cwd,
            "noNewPrivileges": true,
            // Absent would mean: keep all.
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "inheritable": capabilities,
                "permitted": capabilities, "ambient": capabilities,
            },
            "rlimits": [
                { "type": "RLIMIT_NOFILE", "soft": OPEN_FILES.min(open_files_max), "hard": open_files_max },
                { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 },
            ],
        },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
        ],
        "linux": {
            "namespaces": namespaces,
            "uidMappings": mappings,
            "gidMappings": mappings,
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
        },
    })
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
