//! cgroup v2: which part of the tree is neap's to divide, and what can be divided there.
//!
//! ```text
//!  /sys/fs/cgroup                       the base, when nothing was delegated to us
//!   └ system.slice/neap.service         the base, under systemd (Delegate=yes)
//!      ├ daemon                         the daemon, its launcher and image workers
//!      └ neap/<mark>                    enabled from the base down: memory, cpu, pids
//!         └ <id>                        an instance
//! ```
//!
//! Processes live in leaves only, so a daemon that was started in an ancestor of its instances
//! moves to a leaf. Nothing above the base is touched: controllers are switched on from the base
//! down, all that a level lacks in one write, because the kernel takes a write whole or not at
//! all, and half of the controllers would leave a threaded subtree that no process can enter.
//!
//! Reference: <https://docs.kernel.org/admin-guide/cgroup-v2.html>

use std::fs;
use std::io;
use std::path::Path;

/// Where everyone mounts it.
pub const ROOT: &str = "/sys/fs/cgroup";

/// What instances need, and the file without which a controller is of no use to them: a kernel
/// may have `cpu` for its weights alone (no CONFIG_CFS_BANDWIDTH).
pub const NEEDED: [(&str, &str); 3] = [("memory", "memory.max"), ("cpu", "cpu.max"), ("pids", "pids.max")];

/// Where systemd runs neap, for those who ask from elsewhere.
const UNIT: &str = "system.slice/neap.service";

/// Why a controller can't limit instances.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// This kernel has none.
    NotBuilt,
    /// `cgroup_disable=` on the kernel's command line, or a device tree's default.
    SwitchedOff,
    /// It stands in a v1 hierarchy.
    OnV1,
    /// v1: its hierarchy isn't mounted.
    NotMounted,
    /// This cgroup, above ours, does not pass it on.
    NotDelegated(String),
    /// This cgroup of ours holds processes of others, so nothing can be passed on below it.
    Occupied(String),
    /// This cgroup of ours refused it.
    Refused(String),
}

/// One cgroup on the way from the root to the instances.
struct Level {
    path: String,
    offered: Vec<String>,
    enabled: Vec<String>,
    has_processes: bool,
}

/// The cgroup that was delegated to this process, without a leading slash: what systemd marks
/// so (`Delegate=yes`). `None`: all of the tree that is visible.
pub fn delegated() -> Option<String> {
    let own = own_cgroup().filter(|own| !own.is_empty())?;
    // With DelegateSubgroup=, or once the daemon moved to its leaf, we are one below it.
    let above = own.rsplit_once('/').map(|(above, _)| above.to_owned());
    [Some(own), above].into_iter().flatten().find(|path| is_delegated(path))
}

/// The same for a process that isn't the daemon: where the service would be, when there is one.
pub fn delegated_to_the_service() -> Option<String> {
    delegated().or_else(|| is_delegated(UNIT).then(|| UNIT.to_owned()))
}

fn is_delegated(path: &str) -> bool {
    let at = Path::new(ROOT).join(path);
    ["user.delegate", "trusted.delegate"].iter().any(|name| {
        let mut value = [0_u8; 8];
        rustix::fs::getxattr(&at, *name, &mut value[..]).is_ok_and(|n| value.get(..n) == Some(b"1"))
    })
}

/// Own cgroup without a leading slash; empty in the root, or in the root of a cgroup namespace.
fn own_cgroup() -> Option<String> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    text.lines().find_map(|line| line.strip_prefix("0::/")).map(str::to_owned)
}

/// Makes `parent` fit to hold instances, as far as that can be had; `missing` says what can't.
pub fn divide(base: &str, parent: &str) -> io::Result<()> {
    fs::create_dir_all(Path::new(ROOT).join(parent))?;
    // The machine's own root may hold processes beside cgroups; a namespace's may not.
    let is_machine_root = !Path::new(ROOT).join("cgroup.type").exists();
    if let Some(leaf) = own_cgroup().and_then(|own| leaf(&own, parent, is_machine_root)) {
        let leaf = Path::new(ROOT).join(leaf);
        fs::create_dir_all(&leaf)?;
        fs::write(leaf.join("cgroup.procs"), std::process::id().to_string())?;
    }
    for path in way(base, parent) {
        let at = Path::new(ROOT).join(path);
        let enabled = words(&at, "cgroup.subtree_control");
        let offered = words(&at, "cgroup.controllers");
        let new = NEEDED.iter().filter(|(name, _)| has(&offered, name) && !has(&enabled, name));
        let order: Vec<String> = new.map(|(name, _)| format!("+{name}")).collect();
        if !order.is_empty() && fs::write(at.join("cgroup.subtree_control"), order.join(" ")).is_err() {
            break; // `missing` finds out why
        }
    }
    Ok(())
}

/// Where a daemon in `own` must go so that instances below `parent` can have controllers.
fn leaf(own: &str, parent: &str, is_machine_root: bool) -> Option<String> {
    if own.is_empty() {
        return (!is_machine_root).then(|| "daemon".to_owned());
    }
    let is_above = parent.strip_prefix(own).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    is_above.then(|| format!("{own}/daemon"))
}

/// `base` and all below it down to `parent`.
fn way<'a>(base: &'a str, parent: &'a str) -> impl Iterator<Item = &'a str> {
    let below = parent.strip_prefix(base).map(|rest| rest.trim_start_matches('/')).unwrap_or_default();
    let start = parent.len() - below.len();
    let ends = below.match_indices('/').map(move |(at, _)| start + at).chain([parent.len()]);
    std::iter::once(base).chain(ends.filter(move |_| !below.is_empty()).map(move |end| &parent[..end]))
}

/// Whether instances in `parent`, which exists, can be limited by `controller`; if not, why.
pub fn lacks(controller: &str, base: &str, parent: &str) -> Option<Why> {
    let levels: Vec<Level> = std::iter::once("").chain(way_from_root(parent)).map(Level::read).collect();
    let kernel = Kernel::read();
    let why = why(controller, base, &levels, &kernel);
    let file = NEEDED.iter().find(|(name, _)| *name == controller).map(|(_, file)| file)?;
    // The parent has the file itself, since the level above passed the controller on.
    why.or_else(|| (!Path::new(ROOT).join(parent).join(file).exists()).then_some(Why::NotBuilt))
}

/// The same before anything was made: whether `base` could pass `controller` on.
pub fn would_lack(controller: &str, base: &str) -> Option<Why> {
    let kernel = Kernel::read();
    let root = Level::read("");
    if !has(&root.offered, controller) {
        return Some(not_offered(controller, &kernel));
    }
    if let Some(missing) = way_from_root(base).find(|path| !has(&Level::read(path).offered, controller)) {
        return Some(Why::NotDelegated(above(missing)));
    }
    let file = NEEDED.iter().find(|(name, _)| *name == controller).map(|(_, file)| file)?;
    let below = has(&root.enabled, controller) && none_has(Path::new(ROOT), file);
    below.then_some(Why::NotBuilt)
}

/// Whether there are cgroups right below `at`, and none has `file`. (One alone may be threaded.)
/// The root itself has no controller's files, so where it passes nothing on, nothing is told.
fn none_has(at: &Path, file: &str) -> bool {
    let Ok(entries) = fs::read_dir(at) else { return false };
    let children: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    let has_file = children.iter().any(|child| child.join(file).exists());
    !has_file && children.iter().any(|child| child.join("cgroup.procs").exists())
}

fn way_from_root(path: &str) -> impl Iterator<Item = &str> {
    way("", path).skip(1)
}

/// `levels` begin with the root and end with the instances' parent.
fn why(controller: &str, base: &str, levels: &[Level], kernel: &Kernel) -> Option<Why> {
    let (root, rest) = levels.split_first()?;
    if !has(&root.offered, controller) {
        return Some(not_offered(controller, kernel));
    }
    if let Some(without) = rest.iter().find(|level| !has(&level.offered, controller)) {
        let by = above(&without.path);
        let is_ours = by == base || base.is_empty() || by.starts_with(&format!("{base}/"));
        let holder = levels.iter().find(|level| level.path == by);
        return Some(match holder {
            Some(level) if is_ours && level.has_processes && !level.path.is_empty() => Why::Occupied(by),
            _ if is_ours => Why::Refused(by),
            _ => Why::NotDelegated(by),
        });
    }
    let last = levels.last().filter(|last| !has(&last.enabled, controller))?;
    Some(if last.has_processes { Why::Occupied(last.path.clone()) } else { Why::Refused(last.path.clone()) })
}

/// What the kernel says of its controllers.
struct Kernel {
    /// /proc/cgroups (cgroups(7)). From Linux 6.15 it leaves out those that v1 can't have.
    controllers: String,
    command_line: String,
}

impl Kernel {
    fn read() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        Self { controllers: read("/proc/cgroups"), command_line: read("/proc/cmdline") }
    }

    fn fields(&self, controller: &str) -> Option<Vec<&str>> {
        let mut lines =
            self.controllers.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
        lines.find(|fields| fields.first() == Some(&controller))
    }

    /// The last word counts: a board's firmware says `cgroup_disable=memory` before its owner's own.
    fn is_switched_off(&self, controller: &str) -> bool {
        let words = self.command_line.split_ascii_whitespace().filter_map(|word| word.split_once('='));
        let names = |list: &str| list.split(',').any(|name| name == controller);
        let mut said =
            words.filter(|(key, list)| ["cgroup_disable", "cgroup_enable"].contains(key) && names(list));
        said.next_back().is_some_and(|(key, _)| key == "cgroup_disable")
    }
}

/// Why the root has no such controller.
fn not_offered(controller: &str, kernel: &Kernel) -> Why {
    v1_state(controller, kernel).unwrap_or(Why::NotBuilt)
}

/// `None`: the kernel doesn't know it, or has it free for v2.
fn v1_state(controller: &str, kernel: &Kernel) -> Option<Why> {
    let Some(fields) = kernel.fields(controller) else {
        return kernel.is_switched_off(controller).then_some(Why::SwitchedOff);
    };
    match (fields.get(1).copied(), fields.get(3).copied()) {
        (_, Some("0")) => Some(Why::SwitchedOff),
        (Some(hierarchy), _) if hierarchy != "0" => Some(Why::OnV1),
        _ => None,
    }
}

/// Why a v1 or hybrid machine has no hierarchy with `controller`.
pub fn lacks_on_v1(controller: &str) -> Why {
    let kernel = Kernel::read();
    match v1_state(controller, &kernel) {
        Some(Why::SwitchedOff) => Why::SwitchedOff,
        _ if kernel.fields(controller).is_some() => Why::NotMounted,
        _ => Why::NotBuilt,
    }
}

impl Level {
    fn read(path: &str) -> Self {
        let at = Path::new(ROOT).join(path);
        Self {
            path: path.to_owned(),
            offered: words(&at, "cgroup.controllers"),
            enabled: words(&at, "cgroup.subtree_control"),
            has_processes: fs::read_to_string(at.join("cgroup.procs")).is_ok_and(|text| !text.is_empty()),
        }
    }
}

impl Why {
    /// What is so, and what to do.
    pub fn advice(&self, controller: &str) -> String {
        let shown = |path: &str| format!("/{path}");
        match self {
            Self::NotBuilt => format!("the kernel was built without it ({})", option(controller)),
            Self::SwitchedOff => format!(
                "it is switched off: remove `cgroup_disable={controller}` from the kernel's command line, or where that is not yours to change (Raspberry Pi) add `cgroup_enable={controller}`"
            ),
            Self::OnV1 => {
                format!("it stands in a v1 hierarchy: unmount that, or boot with `cgroup_no_v1={controller}`")
            }
            Self::NotMounted => format!(
                "its hierarchy is not mounted: `mkdir /sys/fs/cgroup/{controller} && mount -t cgroup -o {controller} {controller} /sys/fs/cgroup/{controller}`"
            ),
            Self::NotDelegated(by) => format!(
                "cgroup {} does not pass it on: under systemd set `Delegate=yes` in neap's unit, else write `+{controller}` to its cgroup.subtree_control",
                shown(by)
            ),
            Self::Occupied(cgroup) => format!(
                "cgroup {} holds processes that are not neap's: move them to a cgroup below it",
                shown(cgroup)
            ),
            Self::Refused(cgroup) => format!(
                "cgroup {} refuses it: write `+{controller}` to its cgroup.subtree_control to see why",
                shown(cgroup)
            ),
        }
    }
}

/// What a kernel must be built with.
fn option(controller: &str) -> &'static str {
    match controller {
        "memory" => "CONFIG_MEMCG",
        "cpu" => "CONFIG_CGROUP_SCHED and CONFIG_CFS_BANDWIDTH",
        "pids" => "CONFIG_CGROUP_PIDS",
        _ => "CONFIG_CGROUPS",
    }
}

fn above(path: &str) -> String {
    path.rsplit_once('/').map(|(above, _)| above.to_owned()).unwrap_or_default()
}

fn words(cgroup: &Path, file: &str) -> Vec<String> {
    let text = fs::read_to_string(cgroup.join(file)).unwrap_or_default();
    text.split_ascii_whitespace().map(str::to_owned).collect()
}

fn has(words: &[String], word: &str) -> bool {
    words.iter().any(|w| w == word)
}

/// What goes with an instance's memory limit, in its cgroup.
pub fn refine_memory(leaf: &Path, memory_bytes: u64) -> io::Result<()> {
    // Files of controllers and kernels that aren't there.
    let write = |file: &str, value: &str| {
        let file = leaf.join(file);
        if file.exists() { fs::write(file, value) } else { Ok(()) }
    };
    // One process of an instance without memory is no instance.
    write("memory.oom.group", "1")?;
    write("memory.swap.max", "0")?;
    write("memory.high", &soft_limit(memory_bytes).to_string())
}

/// Where an instance is slowed and its caches are reclaimed, ahead of being killed at its limit.
///
/// Close to the limit, because the kernel slows by the square of the excess: a runaway should be
/// killed for what it is, not slowed into its timeout. Measured on 6.1 with a process that only
/// allocates: at 31/32 its end comes no later than without (0.5 s for 32 MiB, 6.5 s for 512 MiB,
/// emulated), after hundreds of pauses; at 15/16 2 to 3 times as late, and at 9/10 it needs 60 s
/// for 512 MiB and was never killed.
fn soft_limit(memory_bytes: u64) -> u64 {
    memory_bytes - memory_bytes / 32
}

#[cfg(test)]
mod tests {
    use super::*;

    const KERNEL: &str = "\
#subsys_name\thierarchy\tnum_cgroups\tenabled
cpu\t0\t7\t1
memory\t0\t25\t0
pids\t3\t7\t1
";
    const ALL: &str = "cpu memory pids";

    /// `path: offered > enabled`, `!` for one that holds processes.
    fn levels(rows: &[(&str, &str, &str, bool)]) -> Vec<Level> {
        let split = |text: &str| text.split(' ').filter(|w| !w.is_empty()).map(str::to_owned).collect();
        let level = |(path, offered, enabled, has_processes): &(&str, &str, &str, bool)| Level {
            path: (*path).to_owned(),
            offered: split(offered),
            enabled: split(enabled),
            has_processes: *has_processes,
        };
        rows.iter().map(level).collect()
    }

    #[test]
    fn controllers_that_are_on_all_the_way_lack_nothing() {
        let tree = levels(&[("", ALL, ALL, true), ("neap", ALL, ALL, false), ("neap/0a", ALL, ALL, false)]);

        assert_eq!(why("memory", "", &tree, &kernel("")), None);
    }

    fn kernel(controllers: &str) -> Kernel {
        Kernel { controllers: controllers.to_owned(), command_line: String::new() }
    }

    #[test]
    fn controller_that_is_not_listed_may_still_have_been_switched_off() {
        for (command_line, off) in [
            ("quiet cgroup_disable=io,memory", true),
            ("cgroup_disable=memory console=tty0 cgroup_enable=memory", false),
            ("cgroup_enable=memory cgroup_disable=memory", true),
            ("cgroup_disable=memory_recursiveprot cgroup_no_v1=memory", false),
        ] {
            let kernel = Kernel { command_line: command_line.to_owned(), ..kernel("") };
            let expected = if off { Why::SwitchedOff } else { Why::NotBuilt };
            assert_eq!(not_offered("memory", &kernel), expected, "{command_line}");
        }
    }

    #[test]
    fn what_the_kernel_lacks_is_told_from_what_it_has_elsewhere() {
        let tree = levels(&[("", "io", "", true), ("neap", "", "", false)]);

        assert_eq!(why("memory", "", &tree, &kernel(KERNEL)), Some(Why::SwitchedOff));
        assert_eq!(why("pids", "", &tree, &kernel(KERNEL)), Some(Why::OnV1));
        assert_eq!(why("cpu", "", &tree, &kernel(KERNEL)), Some(Why::NotBuilt));
        assert_eq!(why("memory", "", &tree, &kernel("")), Some(Why::NotBuilt));
    }

    #[test]
    fn controller_without_its_file_in_any_cgroup_is_not_built() {
        let dir = tempfile::tempdir().expect("a directory");
        let add = |name: &str, file: &str| {
            fs::create_dir_all(dir.path().join(name)).expect("a directory");
            fs::write(dir.path().join(name).join(file), "").expect("a file");
        };

        fs::write(dir.path().join("cgroup.procs"), "").expect("a file");
        assert!(!none_has(dir.path(), "cpu.max"), "nothing stands below to tell it");
        add("init", "cgroup.procs");
        assert!(none_has(dir.path(), "cpu.max"));
        add("user", "cpu.max");
        assert!(!none_has(dir.path(), "cpu.max"));
    }

    #[test]
    fn who_does_not_pass_a_controller_on_is_named() {
        let by = |path: &str| path.to_owned();
        let above = levels(&[
            ("", ALL, "memory", true),
            ("s", "memory", "memory", false),
            ("s/u", "memory", "memory", false),
            ("s/u/neap", "memory", "memory", false),
        ]);
        assert_eq!(why("cpu", "s/u", &above, &kernel("")), Some(Why::NotDelegated(by(""))));
        assert_eq!(why("memory", "s/u", &above, &kernel("")), None);

        let ours = levels(&[
            ("", ALL, ALL, true),
            ("s", ALL, ALL, false),
            ("s/u", ALL, "", true),
            ("s/u/neap", "", "", false),
        ]);
        assert_eq!(why("cpu", "s/u", &ours, &kernel("")), Some(Why::Occupied(by("s/u"))));
        assert_eq!(why("cpu", "s", &ours, &kernel("")), Some(Why::Occupied(by("s/u"))));

        let last = levels(&[("", ALL, ALL, true), ("neap", ALL, "cpu", false)]);
        assert_eq!(why("memory", "", &last, &kernel("")), Some(Why::Refused(by("neap"))));
    }

    #[test]
    fn daemon_moves_only_out_of_the_way_of_its_own_instances() {
        assert_eq!(leaf("neap", "neap/0a1b", true).as_deref(), Some("neap/daemon"));
        assert_eq!(leaf("system.slice/neap.service", "neap/0a1b", true), None);
        assert_eq!(leaf("nea", "neap/0a1b", true), None);
        let unit = "system.slice/neap.service";
        let expected = format!("{unit}/daemon");
        assert_eq!(leaf(unit, &format!("{unit}/neap/0a1b"), true), Some(expected));
    }

    #[test]
    fn only_the_machines_own_root_may_hold_the_daemon() {
        assert_eq!(leaf("", "neap/0a1b", true), None);
        assert_eq!(leaf("", "neap/0a1b", false).as_deref(), Some("daemon"));
    }

    #[test]
    fn nothing_above_the_base_is_on_the_way() {
        let way = |base, parent| way(base, parent).collect::<Vec<_>>();
        assert_eq!(way("", "neap/0a1b"), ["", "neap", "neap/0a1b"]);
        assert_eq!(way("s/u", "s/u/neap/0a"), ["s/u", "s/u/neap", "s/u/neap/0a"]);
        assert_eq!(way("s/u", "s/u"), ["s/u"]);
        assert_eq!(way("", ""), [""]);
    }

    #[test]
    fn soft_limit_is_a_little_below_the_limit() {
        assert_eq!(soft_limit(64 << 20), 62 << 20);
        assert_eq!(soft_limit(0), 0);
    }
}
