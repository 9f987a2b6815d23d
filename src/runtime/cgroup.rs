//! Where instances stand in the cgroup tree, on v2 and on v1 or hybrid.
//!
//! Every instance is `<[node] cgroup>/<mark>/<id>`. The mark is a hash of the data directory, so
//! that several daemons may share the parent and each sweeps what it made itself. This module makes
//! the parents, reads what happened, and removes directories; an instance's own are limits.rs.
//!
//! What v2 asks for beyond that (who may hold processes, who passes controllers on) is in
//! unified.rs.

use super::inside::Freezer;
use super::unified::{self, Why};
use libcgroups::common::{CgroupSetup, get_cgroup_setup};
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The v1 hierarchies that instances are entered in. Without `devices` nothing would keep a
/// function that runs without a user namespace from the node's disks.
const V1_CONTROLLERS: [&str; 6] = ["memory", "cpu", "cpuacct", "pids", "freezer", "devices"];

/// The cgroup file systems of this machine, as far as instances need them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cgroups {
    V2 { mount: PathBuf },
    V1(Vec<Hierarchy>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    pub mount: PathBuf,
    pub controllers: Vec<String>,
}

/// Which limits can be enforced below a parent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limiting {
    pub memory: bool,
    /// Swap can be limited as well; without, there is none or it isn't counted.
    pub swap: bool,
    pub cpu: bool,
    pub pids: bool,
}

/// What a function's instances use together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub memory_bytes: u64,
    /// CPU time of those that are there.
    pub cpu: Duration,
}

/// A controller that can't limit instances, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    pub controller: &'static str,
    pub why: Why,
}

/// Whose memory was short when a process was killed for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shortage {
    /// The instance reached its limit.
    Own,
    /// The machine's, or that of a cgroup around neap: the instance was the kernel's choice.
    Above,
}

impl Missing {
    /// A function without it could take the whole machine down, not only slow it.
    pub fn is_vital(&self) -> bool {
        self.controller != "cpu"
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { controller, why } = self;
        write!(
            f,
            "no cgroup {controller} controller: limits.{controller} can't be enforced; {}",
            why.advice(controller)
        )
    }
}

impl Cgroups {
    pub fn detect() -> io::Result<Self> {
        if matches!(get_cgroup_setup(), Ok(CgroupSetup::Unified)) {
            return Ok(Self::V2 { mount: PathBuf::from(unified::ROOT) });
        }
        let hierarchies = v1_hierarchies(&fs::read_to_string("/proc/self/mountinfo")?);
        if !hierarchies.iter().any(|h| h.controllers.iter().any(|c| c == "devices")) {
            let text =
                format!("no cgroup v2 on {}, and no v1 hierarchy with the devices controller", unified::ROOT);
            return Err(io::Error::new(io::ErrorKind::NotFound, text));
        }
        Ok(Self::V1(hierarchies))
    }

    /// The same, mounted elsewhere: `dir`/0, `dir`/1 and so on. Where from and where to.
    pub fn moved(&self, dir: &Path) -> (Self, Vec<(PathBuf, PathBuf)>) {
        let place = |n: usize| dir.join(n.to_string());
        let moved = match self {
            Self::V2 { .. } => Self::V2 { mount: place(0) },
            Self::V1(hierarchies) => {
                let moved = |(n, h): (usize, &Hierarchy)| Hierarchy { mount: place(n), ..h.clone() };
                Self::V1(hierarchies.iter().enumerate().map(moved).collect())
            }
        };
        let pairs = self.roots().into_iter().zip(moved.roots()).collect();
        (moved, pairs)
    }

    /// The parent of a daemon's instances, from the cgroup root, without a leading slash.
    pub fn parent(&self, setting: &str, data_dir: &Path) -> String {
        let parent = format!("{}/{}", setting.trim_matches('/'), mark(data_dir));
        match self {
            Self::V2 { .. } => match unified::delegated() {
                Some(base) => format!("{base}/{parent}"),
                None => parent,
            },
            Self::V1(_) => parent,
        }
    }

    /// Makes `parent`, with the controllers that limits need as far as they can be had; on v2 the
    /// daemon may have to move to a leaf for it.
    pub fn make(&self, parent: &str) -> io::Result<()> {
        match self {
            Self::V2 { .. } => unified::divide(&unified::delegated().unwrap_or_default(), parent),
            Self::V1(_) => {
                self.roots().into_iter().try_for_each(|root| fs::create_dir_all(root.join(parent)))
            }
        }
    }

    /// What can't be limited below `parent`, which exists.
    pub fn missing(&self, parent: &str) -> Vec<Missing> {
        let base = unified::delegated().unwrap_or_default();
        self.lacking(parent, |controller| unified::lacks(controller, &base, parent))
    }

    /// The same before any parent was made, seen from outside the daemon.
    pub fn would_miss(&self) -> Vec<Missing> {
        let base = unified::delegated_to_the_service().unwrap_or_default();
        self.lacking("", |controller| unified::would_lack(controller, &base))
    }

    fn lacking(&self, parent: &str, v2: impl Fn(&'static str) -> Option<Why>) -> Vec<Missing> {
        let lacks = |controller| match (self, self.hierarchy(controller)) {
            (Self::V2 { .. }, _) => v2(controller),
            (Self::V1(_), None) => Some(unified::lacks_on_v1(controller)),
            // A kernel without CONFIG_CFS_BANDWIDTH has `cpu` for its weights alone.
            (Self::V1(_), Some(h)) if controller == "cpu" => {
                let has_quota = h.mount.join(parent).join("cpu.cfs_quota_us").exists();
                (!has_quota).then_some(Why::NotBuilt)
            }
            (Self::V1(_), Some(_)) => None,
        };
        let needed = unified::NEEDED.iter();
        needed
            .filter_map(|(controller, _)| lacks(controller).map(|why| Missing { controller, why }))
            .collect()
    }

    /// What can be enforced below `parent`, which exists.
    pub fn limiting(&self, parent: &str) -> Limiting {
        let missing = self.missing(parent);
        let has = |controller| !missing.iter().any(|m| m.controller == controller);
        // v2: the leaf's own file is there or not.
        let memsw = |h: &Hierarchy| h.mount.join(parent).join("memory.memsw.limit_in_bytes").exists();
        let swap = self.hierarchy("memory").is_some_and(memsw);
        Limiting { memory: has("memory"), swap, cpu: has("cpu"), pids: has("pids") }
    }

    /// Whether what functions swap out is held against their limit. v2 says so only below the root.
    pub fn counts_swap(&self) -> bool {
        match self {
            Self::V2 { .. } => fs::read_dir(unified::ROOT).is_ok_and(|mut children| {
                children.any(|c| c.is_ok_and(|c| c.path().join("memory.swap.max").exists()))
            }),
            Self::V1(_) => self.limiting("").swap,
        }
    }

    /// v2 before 5.14. Only cgroups below the root have the file.
    pub fn kills_one_by_one(&self) -> bool {
        let lacks = |dir: PathBuf| dir.is_dir() && !dir.join("cgroup.kill").exists();
        matches!(self, Self::V2 { .. })
            && fs::read_dir(unified::ROOT)
                .is_ok_and(|mut children| children.any(|c| c.is_ok_and(|c| lacks(c.path()))))
    }

    /// The directories of one instance, one for each hierarchy.
    pub fn directories(&self, parent: &str, id: &str) -> Vec<PathBuf> {
        self.roots().into_iter().map(|root| root.join(parent).join(id)).collect()
    }

    /// How an instance is frozen; `None` where the kernel has no freezer.
    pub fn freezer(&self, parent: &str, id: &str) -> Option<Freezer> {
        match self {
            Self::V2 { mount } => Some(Freezer::v2(mount.join(parent).join(id).join("cgroup.freeze"))),
            Self::V1(_) => {
                let mount = &self.hierarchy("freezer")?.mount;
                Some(Freezer::v1(mount.join(parent).join(id).join("freezer.state")))
            }
        }
    }

    /// Where the kernel says how much memory an instance has had at most.
    pub fn memory_peak(&self, parent: &str, id: &str) -> Option<PathBuf> {
        match self {
            Self::V2 { mount } => Some(mount.join(parent).join(id).join("memory.peak")),
            Self::V1(_) => {
                let mount = &self.hierarchy("memory")?.mount;
                Some(mount.join(parent).join(id).join("memory.max_usage_in_bytes"))
            }
        }
    }

    /// What the instances below `parent` use, by their function: ids begin with its name and a dot,
    /// which no name has.
    pub fn usage(&self, parent: &str) -> BTreeMap<String, Usage> {
        let number = |root: &Path, id: &str, file: &str| {
            let text = fs::read_to_string(root.join(parent).join(id).join(file)).ok()?;
            // `usage_usec` is the first line of cpu.stat (cgroup-v2, CPU Interface Files).
            text.lines().next()?.rsplit(' ').next()?.parse::<u64>().ok()
        };
        let mut usage: BTreeMap<String, Usage> = BTreeMap::new();
        let (memory, memory_file, cpu, cpu_file, unit) = match self {
            Self::V2 { mount } => (Some(mount), "memory.current", Some(mount), "cpu.stat", 1_000),
            Self::V1(_) => {
                let of = |controller| self.hierarchy(controller).map(|h| &h.mount);
                (of("memory"), "memory.usage_in_bytes", of("cpuacct"), "cpuacct.usage", 1)
            }
        };
        let Some(children) = memory.and_then(|root| fs::read_dir(root.join(parent)).ok()) else {
            return usage;
        };
        for child in children.flatten().filter(|child| child.file_type().is_ok_and(|kind| kind.is_dir())) {
            let name = child.file_name();
            let Some(id) = name.to_str() else { continue };
            let Some((function, _)) = id.split_once('.') else { continue };
            let of = usage.entry(function.to_owned()).or_default();
            of.memory_bytes += memory.and_then(|root| number(root, id, memory_file)).unwrap_or(0);
            let cpu = cpu.and_then(|root| number(root, id, cpu_file)).unwrap_or(0);
            of.cpu += Duration::from_nanos(cpu.saturating_mul(unit));
        }
        usage
    }

    /// v1: the frozen don't die, so that a launcher which is killed would wait for them.
    pub fn thaw_all(&self, parent: &str) {
        let Some(freezer) = self.hierarchy("freezer") else { return };
        let Ok(children) = fs::read_dir(freezer.mount.join(parent)) else { return };
        for child in children.flatten() {
            let _ = fs::write(child.path().join("freezer.state"), "THAWED"); // a file, or gone by now
        }
    }

    /// Whether the kernel killed a process of the instance for want of memory, and whose.
    pub fn ran_out_of_memory(&self, parent: &str, id: &str) -> Option<Shortage> {
        let file = match self {
            Self::V2 { mount } => mount.join(parent).join(id).join("memory.events"),
            Self::V1(_) => match self.hierarchy("memory") {
                Some(memory) => memory.mount.join(parent).join(id).join("memory.oom_control"),
                None => return None,
            },
        };
        fs::read_to_string(file).ok().and_then(|text| shortage(&text))
    }

    /// Kills and removes everything below `parent`; how many directories are still there,
    /// because their processes have yet to die.
    pub fn sweep(&self, parent: &str) -> usize {
        let mut left = 0;
        for root in self.roots() {
            let Ok(children) = fs::read_dir(root.join(parent)) else { continue };
            for child in children.flatten().filter(|child| child.file_type().is_ok_and(|kind| kind.is_dir()))
            {
                kill(&child.path());
                if fs::remove_dir(child.path()).is_err_and(|err| err.kind() != io::ErrorKind::NotFound) {
                    left += 1;
                }
            }
        }
        left
    }

    /// Removes `parent` and those above it that `make` made and nobody else uses.
    pub fn remove(&self, parent: &str) {
        for root in self.roots() {
            for path in Path::new(parent).ancestors().take(2).filter(|path| !path.as_os_str().is_empty()) {
                let _ = fs::remove_dir(root.join(path)); // another daemon's are not empty
            }
        }
    }

    /// For people: `v2`, `v1 (memory, cpu, …)`.
    pub fn describe(&self) -> String {
        match self {
            Self::V2 { .. } => "v2".to_owned(),
            Self::V1(hierarchies) => {
                let names: Vec<_> = hierarchies.iter().flat_map(|h| h.controllers.iter().cloned()).collect();
                format!("v1 ({})", names.join(", "))
            }
        }
    }

    /// Mount points.
    pub fn roots(&self) -> Vec<PathBuf> {
        match self {
            Self::V2 { mount } => vec![mount.clone()],
            Self::V1(hierarchies) => hierarchies.iter().map(|h| h.mount.clone()).collect(),
        }
    }

    pub fn hierarchy(&self, controller: &str) -> Option<&Hierarchy> {
        match self {
            Self::V2 { .. } => None,
            Self::V1(hierarchies) => {
                hierarchies.iter().find(|h| h.controllers.iter().any(|c| c == controller))
            }
        }
    }
}

/// The v1 mounts that instances need, from `/proc/self/mountinfo` (proc(5)).
fn v1_hierarchies(mountinfo: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for (mount, options) in cgroup_mounts(mountinfo) {
        let controllers: Vec<String> =
            options.split(',').filter(|o| V1_CONTROLLERS.contains(o)).map(str::to_owned).collect();
        if !controllers.is_empty() && !found.iter().any(|h| h.controllers == controllers) {
            found.push(Hierarchy { mount, controllers });
        }
    }
    found
}

/// Mount points and options of all v1 hierarchies.
fn cgroup_mounts(mountinfo: &str) -> impl Iterator<Item = (PathBuf, &str)> {
    mountinfo.lines().filter_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut after = after.split(' ');
        let is_v1 = after.next() == Some("cgroup");
        let options = after.nth(1)?;
        is_v1.then_some((PathBuf::from(before.split(' ').nth(4)?), options))
    })
}

/// Twelve hex digits that stand for a data directory, which exists when a daemon starts.
///
/// Its path alone would not do: daemons in containers that share the host's cgroup tree may all
/// have theirs on the same path. Device and inode tell them apart, and on a disk stay the same
/// from one start to the next, for as long as cgroups live. Where they don't (a container's own
/// overlay), a killed daemon's cgroups stay behind, but empty: its instances died with it.
fn mark(data_dir: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::MetadataExt;
    let path = fs::canonicalize(data_dir).unwrap_or_else(|_| data_dir.to_owned());
    let (device, inode) = fs::metadata(&path).map_or((0, 0), |meta| (meta.dev(), meta.ino()));
    let mut hash = ring::digest::Context::new(&ring::digest::SHA256);
    hash.update(path.as_os_str().as_bytes());
    hash.update(&device.to_le_bytes());
    hash.update(&inode.to_le_bytes());
    hash.finish().as_ref()[..6].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `oom_kill 3` in v1's memory.oom_control and v2's memory.events. v2 also counts, as `oom`, how
/// often the cgroup's own limit was the one that nothing more fitted in.
fn shortage(text: &str) -> Option<Shortage> {
    let count = |name: &str| -> Option<u64> {
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
    };
    count("oom_kill").filter(|kills| *kills > 0)?;
    Some(if count("oom") == Some(0) { Shortage::Above } else { Shortage::Own })
}

pub fn kill(cgroup: &Path) {
    if fs::write(cgroup.join("cgroup.kill"), "1").is_ok() {
        return; // v2 since 5.14; the kernel does not create the file elsewhere
    }
    let _ = fs::write(cgroup.join("freezer.state"), "THAWED"); // v1: the frozen don't die
    let processes = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    // A process that this PID namespace can't see reads as 0.
    for pid in
        processes.lines().filter_map(|line| line.parse().ok()).filter_map(rustix::process::Pid::from_raw)
    {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
24 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 24 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/devices rw - cgroup cgroup rw,devices
34 30 0:30 / /sys/fs/cgroup/blkio rw - cgroup cgroup rw,blkio
35 30 0:31 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
36 30 0:32 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
37 24 0:28 / /somewhere/else rw - cgroup cgroup rw,memory
";

    #[test]
    fn hierarchies_that_limit_are_found_once_each() {
        let found = v1_hierarchies(HYBRID);

        let mounts: Vec<_> = found.iter().map(|h| h.mount.to_string_lossy().into_owned()).collect();
        assert_eq!(
            mounts,
            ["/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/memory", "/sys/fs/cgroup/devices"]
                .map(str::to_owned)
        );
        assert_eq!(found[0].controllers, ["cpu", "cpuacct"]);
    }

    #[test]
    fn moved_hierarchies_have_names_that_say_nothing() {
        let (moved, pairs) = Cgroups::V1(v1_hierarchies(HYBRID)).moved(Path::new("/cgroups"));

        // libcgroups takes a cgroup mount for a controller's by the end of its path.
        let expected = ["/cgroups/0", "/cgroups/1", "/cgroups/2"].map(PathBuf::from);
        assert_eq!(moved.roots(), expected);
        assert_eq!(moved.hierarchy("memory").map(|h| h.mount.clone()), Some(expected[1].clone()));
        assert_eq!(pairs[1], (PathBuf::from("/sys/fs/cgroup/memory"), expected[1].clone()));
    }

    #[test]
    fn missing_controller_is_named_with_its_limit_and_the_way_out() {
        let text = Missing { controller: "memory", why: Why::SwitchedOff }.to_string();

        assert!(text.starts_with("no cgroup memory controller: limits.memory can't be enforced; "), "{text}");
        assert!(text.contains("cgroup_enable=memory"), "{text}");
    }

    #[test]
    fn out_of_memory_kills_are_read_from_both_kinds_of_file() {
        assert_eq!(shortage("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"), Some(Shortage::Own));
        let v2 = "low 0\nhigh 0\nmax 9\noom 1\noom_kill 1\noom_group_kill 1\n";
        assert_eq!(shortage(v2), Some(Shortage::Own));
        assert_eq!(shortage(&v2.replace("oom 1", "oom 0")), Some(Shortage::Above));
        assert_eq!(shortage(&v2.replace("kill 1", "kill 0")), None);
        assert_eq!(shortage(""), None);
    }

    #[test]
    fn data_directories_have_marks_of_their_own() {
        assert_eq!(mark(Path::new("/no/such/a")), mark(Path::new("/no/such/a")));
        assert_ne!(mark(Path::new("/no/such/a")), mark(Path::new("/no/such/b")));
        assert_eq!(mark(Path::new("/no/such/a")).len(), 12);
    }

    #[test]
    fn same_path_in_another_container_has_another_mark() {
        let parent = tempfile::tempdir().expect("a temporary directory");
        let data = parent.path().join("data");
        fs::create_dir(&data).expect("a directory");
        let ours = mark(&data);
        assert_eq!(mark(&data), ours, "the next start");

        fs::rename(&data, parent.path().join("elsewhere")).expect("renamed");
        fs::create_dir(&data).expect("another directory");

        assert_ne!(mark(&data), ours);
    }
}
