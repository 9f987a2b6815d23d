//! What users would pick instead: crun, runc and youki on the same bundle, podman on the same root.

use crate::WORD;
use crate::report::{CRUN, Report, Runs, Samples};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{PidfdFlags, pidfd_open};
use serde_json::{Value, json};
use std::cell::{Cell, RefCell};
use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// youki loses a SIGCHLD in about one of 70 runs and then waits for ever.
const HANGS_AFTER: Duration = Duration::from_secs(10);

/// The profile that neap compiles its filter from.
const PROFILE: &str = include_str!("../../src/runtime/seccomp.json");

pub struct Peers {
    dir: PathBuf,
    /// Name and every how many rounds: the slow ones less often.
    found: Vec<(&'static str, usize)>,
    runs: Cell<usize>,
    counts: RefCell<Vec<Runs>>,
}

enum Trouble {
    Hung,
    Failed(String),
}

impl Peers {
    pub fn find(dir: &Path, left_out: &mut Vec<String>) -> Self {
        let peers =
            Self { dir: dir.to_owned(), found: Vec::new(), runs: Cell::new(0), counts: RefCell::default() };
        peers.bundle();
        let mut found = Vec::new();
        for (name, every) in [("crun", 1), ("runc", 2), ("youki", 1), ("podman", 10)] {
            let is_there =
                Command::new(name).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
            if !is_there.is_ok_and(|status| status.success()) {
                left_out.push(format!("{name} is not installed (make bench PEERS=1)"));
                continue;
            }
            // One hang is no reason to leave it out: youki's are counted.
            let tried = (0..3).map(|_| peers.run(name)).find(|tried| !matches!(tried, Err(Trouble::Hung)));
            match tried {
                Some(Ok(_)) => found.push((name, every)),
                Some(Err(Trouble::Failed(why))) => left_out.push(format!("{name} does not work here: {why}")),
                Some(Err(Trouble::Hung)) | None => left_out.push(format!("{name} hung three times")),
            }
        }
        Self { found, counts: RefCell::default(), ..peers }
    }

    pub fn round(&self, round: usize, sample: &mut impl FnMut(&str, Duration)) {
        for (name, every) in &self.found {
            if round.is_multiple_of(*every) {
                let done = self.run(name);
                let mut counts = self.counts.borrow_mut();
                let at = counts.iter().position(|count| count.peer == *name).unwrap_or_else(|| {
                    counts.push(Runs { peer: (*name).to_owned(), ..Runs::default() });
                    counts.len() - 1
                });
                counts[at].runs += 1;
                match done {
                    Ok(took) => sample(&format!("{name} run"), took),
                    Err(Trouble::Hung) => counts[at].hung += 1,
                    Err(Trouble::Failed(why)) => {
                        counts[at].failed += 1;
                        counts[at].why = why;
                    }
                }
            }
        }
    }

    /// How often each ran, hung and failed.
    pub fn tell(&self, report: &mut Report) {
        report.peers = self.counts.take();
    }

    /// Runs per second of `crun run`, one after the other.
    pub fn crun_loop(&self, lasts: Duration) -> Option<Samples> {
        self.found.iter().find(|(name, _)| format!("{name} run") == CRUN)?;
        let mut samples = Samples::default();
        let begun = Instant::now();
        while begun.elapsed() < lasts {
            if let Ok(took) = self.run("crun") {
                samples.push(took);
            }
        }
        Some(samples)
    }

    /// One whole container, from the fork of the command to its exit.
    fn run(&self, name: &str) -> Result<Duration, Trouble> {
        let n = self.runs.replace(self.runs.get() + 1);
        let id = format!("neap-bench-{}-{n}", std::process::id());
        let mut command = Command::new(name);
        match name {
            "podman" => command
                .args(["--cgroup-manager=cgroupfs", "run", "--rm", "--network=none", "--read-only"])
                // Its defaults are more than a root without CAP_SYS_RESOURCE may give.
                .args(["--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024"])
                .args(["--memory=64m", "--pids-limit=64", "--name", &id])
                .arg("--rootfs")
                .arg(self.dir.join("rootfs"))
                .args(["/bin/echo", WORD]),
            _ => command.args(["run", "--bundle"]).arg(&self.dir).arg(&id),
        };
        let failed = |err: std::io::Error| Trouble::Failed(err.to_string());
        let begun = Instant::now();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let pid = rustix::process::Pid::from_child(&child);
        let ended = pidfd_open(pid, PidfdFlags::empty()).map_err(|err| failed(err.into()))?;
        let limit = rustix::time::Timespec { tv_sec: HANGS_AFTER.as_secs() as i64, tv_nsec: 0 };
        let in_time = poll(&mut [PollFd::new(&ended, PollFlags::IN)], Some(&limit)).is_ok_and(|n| n > 0);
        let took = begun.elapsed();
        if !in_time {
            let _ = child.kill();
        }
        let status = child.wait().map_err(failed)?;
        let said = child.stdout.as_ref().map(what_is_there).unwrap_or_default();
        if in_time && status.success() && said == format!("{WORD}\n").as_bytes() {
            return Ok(took);
        }
        let why = child.stderr.as_ref().map(what_is_there).unwrap_or_default();
        let remove = if name == "podman" { ["rm", "--force"] } else { ["delete", "--force"] };
        let null = Stdio::null;
        let _ = Command::new(name).args(remove).arg(&id).stdout(null()).stderr(null()).status();
        if !in_time {
            return Err(Trouble::Hung);
        }
        Err(Trouble::Failed(format!("{status}: {}", String::from_utf8_lossy(&why).trim())))
    }

    /// What neap gives a function, as config.json: its namespaces but the user's, which neap's
    /// has on top, its limits, its mounts, its masked paths, its seccomp profile.
    fn bundle(&self) {
        let root = self.dir.join("rootfs");
        for dir in ["bin", "proc", "dev", "tmp", "sys", "etc", "run", "var"] {
            fs::create_dir_all(root.join(dir)).expect("a directory");
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static is installed");
        for name in ["sh", "echo", "cat"] {
            let _ = std::os::unix::fs::symlink("busybox", root.join("bin").join(name));
        }
        let none: [&str; 0] = [];
        let namespaces =
            ["mount", "pid", "ipc", "uts", "network", "cgroup"].map(|kind| json!({ "type": kind }));
        let tmpfs = |at: &str, options: &[&str]| json!({ "destination": at, "type": "tmpfs", "source": "tmpfs", "options": options });
        let spec = json!({
            "ociVersion": "1.0.2",
            "hostname": "bench",
            "root": { "path": "rootfs", "readonly": true },
            "process": {
                "terminal": false, "user": { "uid": 0, "gid": 0 }, "args": ["/bin/echo", WORD], "env": ["PATH=/bin"],
                "cwd": "/", "noNewPrivileges": true,
                "capabilities": { "bounding": none, "effective": none, "inheritable": none, "permitted": none, "ambient": none },
                "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": 1024, "hard": 1024 }],
            },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
                tmpfs("/dev", &["nosuid", "strictatime", "mode=755", "size=64k"]),
                tmpfs("/dev/shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=1m"]),
                tmpfs("/tmp", &["nosuid", "nodev", "mode=1777", "size=16m"]),
            ],
            "linux": {
                "namespaces": namespaces,
                "resources": {
                    "devices": [{ "allow": false, "access": "rwm" }],
                    "memory": { "limit": 64 << 20 },
                    "cpu": { "quota": 50_000, "period": 100_000 },
                    "pids": { "limit": 64 },
                },
                "maskedPaths": ["/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys",
                    "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
                "seccomp": seccomp(),
            },
        });
        fs::write(self.dir.join("config.json"), spec.to_string()).expect("written");
    }
}

/// What has been written to a pipe so far. Not until its end: what outlives a peer that hung, or
/// that leaves a monitor behind, keeps it open.
fn what_is_there(pipe: &impl AsFd) -> Vec<u8> {
    let mut text = vec![0; 64 << 10];
    let flags = rustix::fs::fcntl_getfl(pipe).expect("an open pipe");
    rustix::fs::fcntl_setfl(pipe, flags | rustix::fs::OFlags::NONBLOCK).expect("an open pipe");
    let mut length = 0;
    while length < text.len() {
        match rustix::io::read(pipe, &mut text[length..]) {
            Ok(more) if more > 0 => length += more,
            _ => break,
        }
    }
    text.truncate(length);
    text
}

/// Docker's profile as an engine would hand it over: conditions resolved for this machine.
fn seccomp() -> Value {
    let profile: Value = serde_json::from_str(PROFILE).expect("neap's tests parse it");
    let (arch, token) = match std::env::consts::ARCH {
        "x86_64" => ("amd64", "SCMP_ARCH_X86_64"),
        "aarch64" => ("arm64", "SCMP_ARCH_AARCH64"),
        other => panic!("which architectures {other} has is not known here"),
    };
    let names = |value: &Value| -> Vec<String> {
        value.as_array().into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect()
    };
    let applies = |entry: &&Value| {
        let (with, without) = (&entry["includes"], &entry["excludes"]);
        names(&with["caps"]).is_empty()
            && (names(&with["arches"]).is_empty() || names(&with["arches"]).contains(&arch.to_owned()))
            && !names(&without["arches"]).contains(&arch.to_owned())
    };
    let calls: Vec<Value> = profile["syscalls"]
        .as_array()
        .expect("a list")
        .iter()
        .filter(applies)
        .map(|entry| {
            let mut call = json!({ "names": entry["names"], "action": entry["action"] });
            for key in ["args", "errnoRet"] {
                if !entry[key].is_null() {
                    call[key] = entry[key].clone();
                }
            }
            call
        })
        .collect();
    let mut architectures = vec![token.to_owned()];
    architectures.extend(names(&profile["archMap"][token]));
    json!({ "defaultAction": "SCMP_ACT_ERRNO", "architectures": architectures, "syscalls": calls })
}
