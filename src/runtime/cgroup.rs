//! Where instances stand in the cgroup tree, on v2 and on v1 or hybrid.
//!
//! Every instance is `<[node] cgroup>/<mark>/<id>`. The mark is a hash of the data directory, so
//! that several daemons may share the parent and each sweeps what it made itself. Limits are
//! applied by libcgroups when libcontainer creates the container; this module makes the parents,
//! reads what happened, and removes directories, without libcgroups' sleeps.
//!
//! v2 allows processes in leaves only. A daemon that was started in an ancestor of its instances
//! moves itself to a leaf `daemon` beside them, and controllers are enabled here, from the top:
//! libcgroups would enable all there are everywhere and hide what failed.

use super::inside::Freezer;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// libcgroups knows no other place for v2.
pub(super) const UNIFIED: &str = "/sys/fs/cgroup";

/// The v1 hierarchies that instances are entered in. libcgroups insists on `devices`.
const V1_CONTROLLERS: [&str; 6] = ["memory", "cpu", "cpuacct", "pids", "freezer", "devices"];

/// What limits need, and which of them goes unenforced without.
const LIMITING: [(&str, &str); 3] =
    [("memory", "limits.memory"), ("cpu", "limits.cpu"), ("pids", "limits.pids")];

/// The cgroup file systems of this machine, as far as instances need them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cgroups {
    V2,
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

impl Cgroups {
    pub fn detect() -> io::Result<Self> {
        let is_v2 = rustix::fs::statfs(UNIFIED)?.f_type as u64 == libc::CGROUP2_SUPER_MAGIC as u64;
        if is_v2 {
            return Ok(Self::V2);
        }
        let hierarchies = v1_hierarchies(&fs::read_to_string("/proc/self/mountinfo")?);
        if !hierarchies.iter().any(|h| h.controllers.iter().any(|c| c == "devices")) {
            let text = format!("no cgroup v2 on {UNIFIED}, and no v1 hierarchy with the devices controller");
            return Err(io::Error::new(io::ErrorKind::NotFound, text));
        }
        Ok(Self::V1(hierarchies))
    }

    /// The parent of a daemon's instances, from the cgroup root, without a leading slash.
    pub fn parent(&self, setting: &str, data_dir: &Path) -> String {
        let parent = format!("{}/{}", setting.trim_matches('/'), mark(data_dir));
        match self {
            Self::V2 => match delegated() {
                Some(base) => format!("{base}/{parent}"),
                None => parent,
            },
            Self::V1(_) => parent,
        }
    }

    /// Makes `parent`, with the controllers that limits need.
    pub fn make(&self, parent: &str) -> io::Result<()> {
        for root in self.roots() {
            fs::create_dir_all(root.join(parent))?;
        }
        if *self == Self::V2 {
            leave_for_a_leaf(parent)?;
            let mut at = PathBuf::from(UNIFIED);
            enable_controllers(&at);
            for part in parent.split('/') {
                at.push(part);
                enable_controllers(&at);
            }
        }
        Ok(())
    }

    /// What can be enforced below `parent`, which exists.
    pub fn limiting(&self, parent: &str) -> Limiting {
        match self {
            Self::V2 => {
                let at = Path::new(UNIFIED).join(parent);
                let enabled = fs::read_to_string(at.join("cgroup.subtree_control")).unwrap_or_default();
                let has = |name: &str| enabled.split_whitespace().any(|controller| controller == name);
                // The parent's own file says whether the kernel counts swap at all.
                let swap = has("memory") && at.join("memory.swap.max").exists();
                Limiting { memory: has("memory"), swap, cpu: has("cpu"), pids: has("pids") }
            }
            Self::V1(_) => {
                let has = |name: &str| self.hierarchy(name).is_some();
                let memsw = |h: &Hierarchy| h.mount.join(parent).join("memory.memsw.limit_in_bytes").exists();
                let swap = self.hierarchy("memory").is_some_and(memsw);
                Limiting { memory: has("memory"), swap, cpu: has("cpu"), pids: has("pids") }
            }
        }
    }

    /// What the machine offers, before any parent was made.
    pub fn offered(&self) -> Limiting {
        match self {
            Self::V2 => {
                let offered = fs::read_to_string(format!("{UNIFIED}/cgroup.controllers")).unwrap_or_default();
                let has = |name: &str| offered.split_whitespace().any(|controller| controller == name);
                // Only cgroups below the root have the file.
                let swap = fs::read_dir(UNIFIED).is_ok_and(|mut children| {
                    children.any(|c| c.is_ok_and(|c| c.path().join("memory.swap.max").exists()))
                });
                Limiting { memory: has("memory"), swap, cpu: has("cpu"), pids: has("pids") }
            }
            Self::V1(_) => self.limiting(""),
        }
    }

    /// The directories of one instance, one for each hierarchy.
    pub fn directories(&self, parent: &str, id: &str) -> Vec<PathBuf> {
        self.roots().into_iter().map(|root| root.join(parent).join(id)).collect()
    }

    /// v2: makes the leaf beforehand, so that libcgroups leaves the parents alone and the kernel
    /// kills the whole instance when one of its processes is out of memory.
    pub fn make_leaf(&self, parent: &str, id: &str) -> io::Result<()> {
        if *self == Self::V2 {
            let leaf = Path::new(UNIFIED).join(parent).join(id);
            fs::create_dir(&leaf)?;
            let group = leaf.join("memory.oom.group");
            if group.exists() {
                fs::write(group, "1")?;
            }
        }
        Ok(())
    }

    /// How an instance is frozen; `None` where the kernel has no freezer.
    pub fn freezer(&self, parent: &str, id: &str) -> Option<Freezer> {
        match self {
            Self::V2 => Some(Freezer::v2(Path::new(UNIFIED).join(parent).join(id).join("cgroup.freeze"))),
            Self::V1(_) => {
                let mount = &self.hierarchy("freezer")?.mount;
                Some(Freezer::v1(mount.join(parent).join(id).join("freezer.state")))
            }
        }
    }

    /// v1: the frozen don't die, so that a launcher which is killed would wait for them.
    pub fn thaw_all(&self, parent: &str) {
        let Some(freezer) = self.hierarchy("freezer") else { return };
        let Ok(children) = fs::read_dir(freezer.mount.join(parent)) else { return };
        for child in children.flatten() {
            let _ = fs::write(child.path().join("freezer.state"), "THAWED"); // a file, or gone by now
        }
    }

    /// Whether the kernel killed a process of the instance at its memory limit.
    pub fn ran_out_of_memory(&self, parent: &str, id: &str) -> bool {
        let file = match self {
            Self::V2 => Path::new(UNIFIED).join(parent).join(id).join("memory.events"),
            Self::V1(_) => match self.hierarchy("memory") {
                Some(memory) => memory.mount.join(parent).join(id).join("memory.oom_control"),
                None => return false,
            },
        };
        fs::read_to_string(file).is_ok_and(|text| oom_kills(&text) > 0)
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

    /// One line for each limit that can't be enforced.
    pub fn warnings(&self, limiting: Limiting) -> Vec<String> {
        let mut lines = Vec::new();
        for (controller, limit) in LIMITING {
            let there = match controller {
                "memory" => limiting.memory,
                "cpu" => limiting.cpu,
                _ => limiting.pids,
            };
            if !there {
                lines.push(format!("no cgroup {controller} controller: {limit} is not enforced"));
            }
        }
        lines
    }

    /// For people: `v2`, `v1 (memory, cpu, …)`.
    pub fn describe(&self) -> String {
        match self {
            Self::V2 => "v2".to_owned(),
            Self::V1(hierarchies) => {
                let names: Vec<_> = hierarchies.iter().flat_map(|h| h.controllers.iter().cloned()).collect();
                format!("v1 ({})", names.join(", "))
            }
        }
    }

    /// Mount points.
    pub fn roots(&self) -> Vec<PathBuf> {
        match self {
            Self::V2 => vec![PathBuf::from(UNIFIED)],
            Self::V1(hierarchies) => hierarchies.iter().map(|h| h.mount.clone()).collect(),
        }
    }

    fn hierarchy(&self, controller: &str) -> Option<&Hierarchy> {
        match self {
            Self::V2 => None,
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

/// `oom_kill 3` in v1's memory.oom_control and v2's memory.events.
fn oom_kills(text: &str) -> u64 {
    let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    count.and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}

fn kill(cgroup: &Path) {
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

/// Own cgroup on v2, without a leading slash; `None` in the root.
fn own_cgroup() -> Option<String> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    (!path.is_empty()).then(|| path.to_owned())
}

/// The cgroup that systemd gave us to divide (`Delegate=yes`), without a leading slash.
pub(super) fn delegated() -> Option<String> {
    let own = own_cgroup()?;
    // With DelegateSubgroup= we are one below it.
    [Some(own.as_str()), own.rsplit_once('/').map(|(above, _)| above)].into_iter().flatten().find_map(
        |path| {
            let at = Path::new(UNIFIED).join(path);
            let is_delegated = ["user.delegate", "trusted.delegate"].iter().any(|name| {
                let mut value = [0_u8; 8];
                rustix::fs::getxattr(&at, *name, &mut value[..]).is_ok_and(|n| value.get(..n) == Some(b"1"))
            });
            is_delegated.then(|| path.to_owned())
        },
    )
}

fn leave_for_a_leaf(parent: &str) -> io::Result<()> {
    let Some(leaf) = own_cgroup().and_then(|own| daemon_leaf(&own, parent)) else { return Ok(()) };
    let leaf = Path::new(UNIFIED).join(leaf);
    fs::create_dir_all(&leaf)?;
    fs::write(leaf.join("cgroup.procs"), std::process::id().to_string())
}

/// Where a daemon in `own` must go so that instances below `parent` can have controllers.
fn daemon_leaf(own: &str, parent: &str) -> Option<String> {
    let is_above = parent.strip_prefix(own).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    is_above.then(|| format!("{own}/daemon"))
}

/// What fails is seen by `limiting`.
fn enable_controllers(cgroup: &Path) {
    for (controller, _) in LIMITING {
        let _ = fs::write(cgroup.join("cgroup.subtree_control"), format!("+{controller}"));
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
    fn missing_controller_is_named_with_its_limit() {
        let limiting = Limiting { memory: true, swap: true, cpu: true, pids: false };
        let lines = Cgroups::V2.warnings(limiting);
        assert_eq!(lines, ["no cgroup pids controller: limits.pids is not enforced"]);
    }

    #[test]
    fn daemon_moves_only_out_of_the_way_of_its_own_instances() {
        assert_eq!(daemon_leaf("neap", "neap/0a1b").as_deref(), Some("neap/daemon"));
        assert_eq!(daemon_leaf("system.slice/neap.service", "neap/0a1b"), None);
        assert_eq!(daemon_leaf("nea", "neap/0a1b"), None);
        let unit = "system.slice/neap.service";
        let expected = format!("{unit}/daemon");
        assert_eq!(daemon_leaf(unit, &format!("{unit}/neap/0a1b")), Some(expected));
    }

    #[test]
    fn out_of_memory_kills_are_read_from_both_kinds_of_file() {
        assert_eq!(oom_kills("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"), 2);
        assert_eq!(oom_kills("low 0\nhigh 0\nmax 9\noom 1\noom_kill 1\noom_group_kill 1\n"), 1);
        assert_eq!(oom_kills(""), 0);
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
