//! Which mount a path is on, and whether what is written there survives a power cut. Pure: the
//! text of /proc/self/mountinfo is an argument.

use crate::model::api::Level;
use std::path::Path;

/// A line of mountinfo (proc(5)), the parts that matter here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    pub point: String,
    pub kind: String,
    /// The mount's own and the file system's.
    pub options: Vec<String>,
}

impl Mount {
    /// The mount that `path` (absolute, symlinks resolved) is on. Later lines lie over earlier
    /// ones on the same point.
    pub fn of(path: &Path, mountinfo: &str) -> Option<Self> {
        let mounts = mountinfo.lines().filter_map(Self::parse);
        let over = mounts.filter(|mount| path.starts_with(&mount.point));
        over.max_by_key(|mount| mount.point.len())
    }

    fn parse(line: &str) -> Option<Self> {
        let (before, after) = line.split_once(" - ")?;
        let before: Vec<&str> = before.split(' ').collect();
        let after: Vec<&str> = after.split(' ').collect();
        let mut options: Vec<String> = before.get(5)?.split(',').map(str::to_owned).collect();
        for option in after.get(2).into_iter().flat_map(|list| list.split(',')) {
            if !options.iter().any(|known| known == option) {
                options.push(option.to_owned());
            }
        }
        Some(Self { point: unescape(before.get(4)?), kind: (*after.first()?).to_owned(), options })
    }

    pub fn in_memory(&self) -> bool {
        matches!(self.kind.as_str(), "tmpfs" | "ramfs")
    }

    /// Whether a database and images may live here, and what to do when not.
    pub fn durable(&self) -> (Level, &'static str) {
        let has = |option: &str| self.options.iter().any(|known| known == option);
        if has("ro") {
            return (Level::Failing, "mounted read-only; mount it writable, or move data_dir");
        }
        match self.kind.as_str() {
            "tmpfs" | "ramfs" => (
                Level::Warning,
                "memory: events and images are gone after a power cut; good for trials, else move data_dir to a disk",
            ),
            // SQLite's log needs shared memory between processes, which these don't have
            // (sqlite.org/wal.html).
            "nfs" | "nfs4" | "cifs" | "smb3" | "9p" | "ceph" => {
                (Level::Failing, "a network file system; move data_dir to a local disk")
            }
            "vfat" | "exfat" | "msdos" | "ntfs" | "ntfs3" => (
                Level::Failing,
                "holds no Unix owners and links, which images need; use ext4, xfs, btrfs or f2fs",
            ),
            // After a power cut, files hold old blocks where new ones were promised.
            "ext3" | "ext4" if has("data=writeback") => (
                Level::Failing,
                "data=writeback loses what was promised in a power cut; mount with data=ordered",
            ),
            "ext3" | "ext4" | "btrfs" | "xfs" if has("nobarrier") || has("barrier=0") => (
                Level::Failing,
                "without barriers a power cut loses acknowledged events; mount with barriers",
            ),
            "f2fs" if has("fsync_mode=nobarrier") => (
                Level::Failing,
                "fsync_mode=nobarrier loses acknowledged events; mount with fsync_mode=posix or strict",
            ),
            "overlay" => {
                (Level::Warning, "a container's own layer goes with the container; put data_dir on a volume")
            }
            _ => (Level::Ok, ""),
        }
    }

    /// For people: `ext4 on / (rw,relatime)`.
    pub fn shown(&self) -> String {
        format!("{} on {} ({})", self.kind, self.point, self.options.join(","))
    }
}

/// Spaces and the like are written as `\040` (proc(5)).
fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.as_bytes();
    while let [first, rest @ ..] = bytes {
        let octal = match rest {
            [a, b, c, ..] if *first == b'\\' => {
                std::str::from_utf8(&[*a, *b, *c]).ok().and_then(|o| u8::from_str_radix(o, 8).ok())
            }
            _ => None,
        };
        out.push(octal.unwrap_or(*first));
        bytes = if octal.is_some() { &rest[3..] } else { rest };
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &str = r"22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/mmcblk0p2 rw,errors=remount-ro
23 22 0:21 / /run rw,nosuid shared:2 master:1 - tmpfs tmpfs rw,size=100k
24 22 254:1 / /var/lib\040x rw,noatime - ext4 /dev/mmcblk0p3 rw,data=writeback
25 22 254:2 / /var rw - xfs /dev/sda1 rw
26 22 254:3 / /var rw - btrfs /dev/sdb1 rw,nobarrier
garbage
27 22";

    fn on(path: &str) -> Mount {
        Mount::of(Path::new(path), MOUNTINFO).expect("it is on a mount")
    }

    #[test]
    fn a_path_is_on_its_deepest_and_latest_mount() {
        assert_eq!(on("/etc/neap").point, "/");
        assert_eq!(on("/run/neap").kind, "tmpfs");
        assert_eq!(on("/runner").point, "/");
        assert_eq!(on("/var/lib x/neap").options, ["rw", "noatime", "data=writeback"]);
        assert_eq!(on("/var/lib").kind, "btrfs");
        assert_eq!(on("/etc").options, ["rw", "relatime", "errors=remount-ro"]);
    }

    #[test]
    fn what_breaks_the_promise_of_durability_is_named() {
        assert_eq!(on("/etc").durable(), (Level::Ok, ""));
        assert_eq!(on("/run").durable().0, Level::Warning);
        assert!(on("/var/lib x").durable().1.contains("data=ordered"));
        assert_eq!(on("/var").durable().0, Level::Failing);
        let mount = |kind: &str, options: &[&str]| Mount {
            point: "/".to_owned(),
            kind: kind.to_owned(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
        };
        for kind in ["nfs4", "vfat"] {
            assert_eq!(mount(kind, &["rw"]).durable().0, Level::Failing);
        }
        assert_eq!(mount("ext4", &["ro"]).durable().0, Level::Failing);
        assert_eq!(mount("f2fs", &["rw", "fsync_mode=nobarrier"]).durable().0, Level::Failing);
        assert_eq!(mount("ext4", &["rw", "barrier=0"]).durable().0, Level::Failing);
    }
}
