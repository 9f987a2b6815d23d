//! An instance's cgroup: made and limited before anything is in it, then entered by the process
//! that becomes the container.
//!
//! neap does this itself and keeps the cgroup file systems out of libcontainer's sight, because
//! libcgroups moves a container by writing its number to `cgroup.procs`. The kernel lets that
//! writer wait for an RCU grace period (cgroup_attach_lock, a percpu semaphore): 7 to 20 ms on two
//! cores, for every create. Two ways in need no such lock: a single thread that moves itself, by
//! writing 0 to v1's `tasks` (Linux 5.5; 0.06 ms), and a child that is cloned into its cgroup on
//! v2 (CLONE_INTO_CGROUP, Linux 5.7).

use super::cgroup::{Cgroups, Limiting};
use super::devices::Device;
use super::unified;
use super::wire::LimitsOrder;
use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// The kernel's scheduling period. 100 ms is its default and everyone's.
const CPU_PERIOD_US: u64 = 100_000;

/// The kernel takes no smaller quota.
const CPU_QUOTA_US_MIN: u64 = 1_000;

/// An instance is made by up to three processes in its cgroup: maker, libcontainer's intermediate
/// one and the container's first. Only the last stays.
const PIDS_WHILE_MADE: u32 = 3;

/// The devices that libcontainer puts into /dev: null, zero, full, tty, random, urandom. Without a
/// user namespace it makes them, with one it binds the node's own.
const DEVICES: [&str; 6] = ["1:3", "1:5", "1:7", "5:0", "1:8", "1:9"];

impl Cgroups {
    /// Makes the directories of an instance and writes its limits, but the one on processes.
    pub fn make_instance(
        &self,
        parent: &str,
        id: &str,
        limits: &LimitsOrder,
        devices: &[Device],
        limiting: Limiting,
    ) -> io::Result<()> {
        for dir in self.directories(parent, id) {
            fs::create_dir(&dir).map_err(|err| at(&dir, err))?;
        }
        let quota_us = (u64::from(limits.cpu_millis) * CPU_PERIOD_US / 1000).max(CPU_QUOTA_US_MIN);
        let memory = limits.memory_bytes.to_string();
        let (memory_dir, cpu_dir) = (self.directory("memory", parent, id), self.directory("cpu", parent, id));
        match self {
            Self::V2 { .. } => {
                if let Some(dir) = memory_dir.filter(|_| limiting.memory) {
                    write(&dir.join("memory.max"), &memory)?;
                    unified::refine_memory(&dir, limits.memory_bytes).map_err(|err| at(&dir, err))?;
                }
                if let Some(dir) = cpu_dir.filter(|_| limiting.cpu) {
                    write(&dir.join("cpu.max"), &format!("{quota_us} {CPU_PERIOD_US}"))?;
                }
            }
            Self::V1(_) => {
                if let Some(dir) = memory_dir.filter(|_| limiting.memory) {
                    write(&dir.join("memory.limit_in_bytes"), &memory)?;
                    if limiting.swap {
                        write(&dir.join("memory.memsw.limit_in_bytes"), &memory)?; // together: no swap
                    }
                }
                if let Some(dir) = cpu_dir.filter(|_| limiting.cpu) {
                    write(&dir.join("cpu.cfs_period_us"), &CPU_PERIOD_US.to_string())?;
                    write(&dir.join("cpu.cfs_quota_us"), &quota_us.to_string())?;
                }
                if let Some(dir) = self.directory("devices", parent, id) {
                    write(&dir.join("devices.deny"), "a")?;
                    let allow = dir.join("devices.allow");
                    let mut file = fs::OpenOptions::new().write(true).open(&allow)?;
                    let common = DEVICES.iter().map(|device| format!("c {device} rwm"));
                    for rule in common.chain(devices.iter().map(Device::rule)) {
                        // One system call each: the kernel takes one rule a write.
                        file.write_all(rule.as_bytes()).map_err(|err| at(&allow, err))?;
                    }
                }
            }
        }
        self.limit_processes(parent, id, limits.pids.max(PIDS_WHILE_MADE), limiting)
    }

    /// The limit on processes, exact, once those that made the instance are on their way out.
    pub fn limit_processes(&self, parent: &str, id: &str, pids: u32, limiting: Limiting) -> io::Result<()> {
        match self.directory("pids", parent, id).filter(|_| limiting.pids) {
            Some(dir) => write(&dir.join("pids.max"), &pids.to_string()),
            None => Ok(()),
        }
    }

    /// v2: what a child is cloned into.
    pub fn entrance(&self, parent: &str, id: &str) -> io::Result<Option<OwnedFd>> {
        match self {
            Self::V2 { mount } => Ok(Some(fs::File::open(mount.join(parent).join(id))?.into())),
            Self::V1(_) => Ok(None),
        }
    }

    /// Moves the calling process, which has a single thread, into an instance's cgroup.
    pub fn enter(&self, parent: &str, id: &str) -> io::Result<()> {
        let file = match self {
            Self::V2 { .. } => "cgroup.procs",
            Self::V1(_) => "tasks",
        };
        self.directories(parent, id).iter().try_for_each(|dir| write(&dir.join(file), "0"))
    }

    /// v1: takes the calling process off the count of an instance's processes. On v2 leaving would
    /// cost a grace period; there the caller counts until it ends.
    pub fn leave(&self, parent: &str) -> io::Result<()> {
        match self {
            Self::V2 { .. } => Ok(()),
            Self::V1(_) => match self.directory("pids", parent, "") {
                Some(dir) => write(&dir.join("tasks"), "0"),
                None => Ok(()),
            },
        }
    }

    /// Where a controller's files of an instance are; on v2 all are in one place.
    fn directory(&self, controller: &str, parent: &str, id: &str) -> Option<PathBuf> {
        let mount = match self {
            Self::V2 { mount } => mount,
            Self::V1(_) => &self.hierarchy(controller)?.mount,
        };
        Some(mount.join(parent).join(id))
    }
}

/// One write(2), which creates nothing: a file that isn't there is a controller that isn't.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let written = fs::OpenOptions::new().write(true).open(path).and_then(|mut file| {
        file.write_all(text.as_bytes()) // short enough for one system call
    });
    written.map_err(|err| at(path, err))
}

fn at(path: &Path, err: io::Error) -> io::Error {
    io::Error::new(err.kind(), format!("{}: {err}", path.display()))
}
