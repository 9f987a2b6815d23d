//! Devices that a manifest names: looked up in the node's /dev when an instance is made, because
//! numbers change when something is plugged in again, and made in the instance's own /dev.
//!
//! Judged by number, never by name: a link in /dev leads anywhere. What would give the function
//! the node (its disks, its memory, its consoles, its hypervisor) is refused whatever it is called.
//! The node in there belongs to the function's user; the node's own is not touched. On cgroup v1
//! the devices controller lets the instance use it; on v2 nothing has to: a function can't make
//! device nodes (no MKNOD, every other mount is nodev), so that those in its /dev are all it has.

use rustix::fs::{CWD, FileType, Mode};
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// What was found under a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Below /dev.
    name: PathBuf,
    major: u32,
    minor: u32,
}

impl Device {
    /// As a rule of the devices controller: read and write, not mknod.
    pub fn rule(&self) -> String {
        format!("c {}:{} rw", self.major, self.minor)
    }
}

/// Looks all of them up; an error is a sentence.
pub fn find(paths: &[String]) -> Result<Vec<Device>, String> {
    if paths.is_empty() {
        return Ok(Vec::new());
    }
    let drivers = fs::read_to_string("/proc/devices").unwrap_or_default();
    let misc = fs::read_to_string("/proc/misc").unwrap_or_default();
    paths.iter().map(|path| look_up(path, &drivers, &misc)).collect()
}

fn look_up(path: &str, drivers: &str, misc: &str) -> Result<Device, String> {
    let meta = fs::metadata(path).map_err(|err| match err.kind() {
        io::ErrorKind::NotFound => format!("device {path} is not there; is it plugged in?"),
        _ => format!("device {path}: {err}"),
    })?;
    let kind = meta.file_type();
    let (major, minor) = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
    if kind.is_block_device() {
        return Err(format!("device {path} is a disk ({major}:{minor}), which no function gets"));
    }
    if !kind.is_char_device() {
        return Err(format!("{path} is no device"));
    }
    let driver = if major == MISC { numbered(misc.lines(), minor) } else { driver(drivers, major) };
    if let Some(what) = forbidden(major, minor, driver) {
        return Err(format!("device {path} ({major}:{minor}) is {what}, which no function gets"));
    }
    let name = Path::new(path).strip_prefix("/dev").unwrap_or(Path::new(path)).to_owned();
    Ok(Device { name, major, minor })
}

/// The major number of many drivers, which have a minor each; some of those differ among machines.
const MISC: u32 = 10;

/// Character devices with which a function would have the node (Documentation/admin-guide/
/// devices.txt). Some drivers have a number that differs among machines: told by their name.
fn forbidden(major: u32, minor: u32, driver: &str) -> Option<&'static str> {
    Some(match (major, minor) {
        (1, _) => "the node's memory or log",
        (4, 0..=63) | (5, _) => "a console of the node",
        (7, _) => "a screen of the node",
        (10, 144) => "the node's NVRAM",
        (10, 183) => return None, // hwrng
        (10, 196) => "other devices' direct access",
        (10, 203 | 223 | 239) => "a maker of devices",
        (10, 231) => "the node's hibernation",
        (10, 232 | 238 | 241) => "the node's hypervisor",
        (10, 234..=237) => "a control of the node's disks and mounts",
        (21, _) | (162, _) => "raw access to disks",
        _ => match driver {
            "bsg" | "nvme" | "nvme-generic" | "nvme-fabrics" | "ndctl" | "dimmctl" | "dax" | "mtd"
            | "megaraid_sas_ioctl" | "mpt2ctl" | "mpt3ctl" => "raw access to disks",
            // One major for each that is attached: ubi0, ubi1, …; and ubi_ctrl, which attaches.
            _ if driver.starts_with("ubi") => "raw access to disks",
            "vfio" | "iommu" | "uio" => "other devices' direct access",
            "vhost-vdpa" | "mshv" => "the node's hypervisor",
            _ if driver.starts_with("xen/") => "the node's hypervisor",
            "mei" | "ipmidev" | "cpu/msr" | "cpu/cpuid" => "the node's own management",
            _ => return None,
        },
    })
}

/// The driver that has a major number: `Character devices:` of /proc/devices.
fn driver(drivers: &str, major: u32) -> &str {
    let lines = drivers.lines().skip_while(|line| !line.starts_with("Character")).skip(1);
    numbered(lines.take_while(|line| !line.is_empty()), major)
}

/// The name beside a number, as /proc/devices and /proc/misc have them.
fn numbered<'a>(lines: impl Iterator<Item = &'a str>, wanted: u32) -> &'a str {
    lines
        .filter_map(|line| line.trim().split_once(' '))
        .find(|(number, _)| number.parse() == Ok(wanted))
        .map_or("", |(_, name)| name.trim())
}

/// Makes them in an instance's /dev, for its user: `owner` and `group` are host ids. `dir_owner`:
/// the host id of the function's root.
pub fn make(devices: &[Device], dev: &Path, owner: u32, group: u32, dir_owner: u32) -> io::Result<()> {
    for device in devices {
        let mut dir = dev.to_owned();
        for part in device.name.parent().unwrap_or(Path::new("")).components() {
            dir.push(part);
            match fs::create_dir(&dir) {
                Err(err) if err.kind() == io::ErrorKind::AlreadyExists => continue,
                made => made?,
            }
            fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?;
            std::os::unix::fs::chown(&dir, Some(dir_owner), Some(dir_owner))?;
        }
        let at = dev.join(&device.name);
        let number = rustix::fs::makedev(device.major, device.minor);
        rustix::fs::mknodat(CWD, &at, FileType::CharacterDevice, Mode::from_raw_mode(0o600), number)?;
        std::os::unix::fs::chown(&at, Some(owner), Some(group))?;
        fs::set_permissions(&at, fs::Permissions::from_mode(0o660))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_give_the_node_away_is_refused_by_number() {
        for (major, minor, driver) in [
            (1, 1, "mem"),
            (1, 11, "mem"),
            (4, 1, "tty"),
            (5, 1, "/dev/console"),
            (10, 232, "misc"),
            (10, 237, "misc"),
            (21, 0, "sg"),
            (247, 0, "nvme"),
            (240, 3, "vfio"),
            (90, 0, "mtd"),
            (249, 0, "ubi1"),
            (252, 0, "dax"),
            (10, 122, "ubi_ctrl"),
            (10, 124, "iommu"),
            (10, 125, "nvme-fabrics"),
            (10, 62, "xen/privcmd"),
        ] {
            assert!(forbidden(major, minor, driver).is_some(), "{major}:{minor} {driver}");
        }
        for (major, minor, driver) in [
            (4, 64, "ttyS"),
            (188, 0, "ttyUSB"),
            (166, 0, "ttyACM"),
            (204, 64, "ttyAMA"),
            (89, 1, "i2c"),
            (153, 0, "spi"),
            (254, 0, "gpiochip"),
            (10, 130, "misc"),
            (10, 200, "misc"),
            (81, 0, "video4linux"),
            (226, 128, "drm"),
        ] {
            assert_eq!(forbidden(major, minor, driver), None, "{major}:{minor} {driver}");
        }
    }

    #[test]
    fn drivers_are_those_of_character_devices() {
        let text =
            "Character devices:\n  1 mem\n  4 /dev/vc/0\n247 nvme\n\nBlock devices:\n  8 sd\n259 blkext\n";

        assert_eq!(driver(text, 247), "nvme");
        assert_eq!(driver(text, 1), "mem");
        assert_eq!(driver(text, 8), "");
        assert_eq!(driver("", 1), "");
    }

    #[test]
    fn names_lead_to_numbers_and_what_is_none_is_told() {
        let refused = |path: &str| look_up(path, "", "").expect_err("refused");

        assert!(refused("/dev/null").contains("(1:3) is the node's memory"), "{}", refused("/dev/null"));
        assert_eq!(refused("/dev/nowhere"), "device /dev/nowhere is not there; is it plugged in?");
        assert_eq!(refused("/dev/fd"), "/dev/fd is no device");
    }
}
