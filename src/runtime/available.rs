//! How much memory is left of what neap may use: the cgroup that was delegated to it when that
//! has a limit, else the machine. What the kernel can take back at once counts as left.

use super::unified;
use std::fs;
use std::path::Path;

/// `None`: not to be found out.
pub fn percent() -> Option<f32> {
    let delegated = unified::delegated().map(|base| Path::new(unified::ROOT).join(base));
    delegated.as_deref().and_then(of_cgroup).or_else(|| {
        let text = fs::read_to_string("/proc/meminfo").ok()?;
        of_machine(&text)
    })
}

fn of_cgroup(dir: &Path) -> Option<f32> {
    let read = |name: &str| fs::read_to_string(dir.join(name)).ok();
    // `max`: no limit, which is no number.
    let limit = number(&read("memory.max")?)?;
    let used = number(&read("memory.current")?)?;
    let stat = read("memory.stat")?;
    let reclaimable =
        stat.lines().find_map(|line| number(line.strip_prefix("inactive_file ")?)).unwrap_or(0.0);
    share(limit - used + reclaimable, limit)
}

fn of_machine(text: &str) -> Option<f32> {
    let field =
        |name: &str| text.lines().find_map(|line| number(line.strip_prefix(name)?.strip_suffix("kB")?));
    share(field("MemAvailable:")?, field("MemTotal:")?)
}

fn share(part: f32, whole: f32) -> Option<f32> {
    (whole > 0.0).then(|| (part / whole * 100.0).clamp(0.0, 100.0))
}

fn number(text: &str) -> Option<f32> {
    text.trim().parse::<u64>().ok().map(|value| value as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_read_as_the_kernel_writes_it() {
        let text = "MemTotal:       1000 kB\nMemFree:  10 kB\nMemAvailable:    250 kB\n";

        assert_eq!(of_machine(text), Some(25.0));
        assert_eq!(of_machine("MemTotal: 0 kB\nMemAvailable: 0 kB\n"), None);
        assert_eq!(of_machine(""), None);
        assert!(percent().is_some_and(|percent| (0.0..=100.0).contains(&percent)));
    }

    #[test]
    fn a_limited_cgroup_counts_what_can_be_taken_back_as_left() {
        let dir = tempfile::tempdir().expect("a directory");
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).expect("a file");
        write("memory.current", "900\n");
        write("memory.stat", "anon 700\ninactive_file 100\n");

        write("memory.max", "1000\n");
        assert_eq!(of_cgroup(dir.path()), Some(20.0));
        write("memory.max", "max\n");
        assert_eq!(of_cgroup(dir.path()), None);
    }
}
