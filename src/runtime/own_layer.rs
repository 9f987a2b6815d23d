//! neap's own layer of a root: every mount point, /etc/hosts and /etc/hostname (with a way
//! out /etc/resolv.conf too), and a working directory that the image names but lacks.
//!
//! libcontainer would create mount points, which a read-only root refuses; and a directory here
//! hides an image's symlink of the same name. Directories that the image has too look in the
//! overlay as they look here, so they are made alike.

use super::image_root::ImageRoot;
use super::wire::Refusal;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// What every instance mounts for itself, over whatever the image has there (spec.rs).
const MOUNT_POINTS: [&str; 3] = ["proc", "dev", "tmp"];

/// The longest name that the kernel takes, in bytes.
const NAME_BYTES_MAX: usize = 255;

/// Where a command starts.
#[derive(Default)]
pub struct WorkingDir {
    /// Absolute, as the container sees it.
    pub path: String,
    /// Below /tmp, which every instance has for itself: made in each, by its user and the user's.
    pub is_made_in_each: bool,
}

/// On the launcher's tmpfs. It is not id-mapped (tmpfs can't be before 6.3): what
/// is in it belongs to the ids as they are outside.
pub struct OwnLayer {
    pub dir: PathBuf,
    /// The host id of the function's root.
    pub uid_base: u32,
}

impl OwnLayer {
    /// All but the working directory. `topmost` is the image's topmost layer.
    /// `resolver`: who answers for names.
    pub fn fill(
        &self,
        image: &ImageRoot,
        topmost: &Path,
        hostname: &str,
        resolver: Option<Ipv4Addr>,
    ) -> io::Result<()> {
        // The merged root shows the attributes of the topmost layer's root: ours.
        self.like(&fs::metadata(topmost)?, &self.dir)?;
        for point in MOUNT_POINTS {
            self.directory(Path::new(point))?;
        }
        let is_odd = fs::symlink_metadata(image.prefix.join("etc")).is_ok_and(|meta| !meta.is_dir());
        if !is_odd {
            self.ancestors(image, Path::new("etc"))?;
            let hosts = format!("127.0.0.1\tlocalhost {hostname}\n::1\tlocalhost {hostname}\n");
            self.file("etc/hosts", &hosts)?;
            self.file("etc/hostname", &format!("{hostname}\n"))?;
            if let Some(resolver) = resolver {
                self.file("etc/resolv.conf", &format!("nameserver {resolver}\n"))?;
            }
        }
        Ok(())
    }

    /// Finds the working directory, or makes it as docker does.
    pub fn working_dir(&self, image: &ImageRoot, wanted: &str) -> Result<WorkingDir, Refusal> {
        let wanted = if wanted.is_empty() { "/" } else { wanted };
        let unusable = |why: &str| Refusal::Unusable(format!("working directory `{wanted}` {why}"));
        if !wanted.starts_with('/') || wanted.contains('\0') || wanted.len() > 4096 {
            return Err(unusable("is not an absolute path"));
        }
        let found = match image.real(wanted) {
            Ok((real, meta)) if meta.is_dir() => Some(real),
            Ok(_) => return Err(unusable("is not a directory of the image")),
            Err(err) if err.kind() == io::ErrorKind::NotFound => None,
            Err(err) => return Err(unusable(&format!("can't be used: {err}"))),
        };
        let parts: Vec<_> = wanted.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
        let plain: PathBuf = Path::new("/").join(parts.join("/"));
        let (there, missing) = match &found {
            // Mount points are neap's directories, even where the image has symlinks.
            _ if !parts.contains(&"..") && hidden_by(&plain).is_some() => (plain, [].as_slice()),
            Some(real) => (real.clone(), [].as_slice()),
            None => longest_there(image, &parts).map_err(unusable)?,
        };
        let mut leads = there.clone();
        leads.extend(missing);
        if let Some(point) = hidden_by(&leads) {
            if point != "tmp" {
                return Err(unusable(&format!(
                    "is below /{point}, where functions have nothing of the image"
                )));
            }
            let is_empty = |dir: &PathBuf| image.is_empty(dir).unwrap_or(false);
            if !found.as_ref().is_none_or(is_empty) {
                return Err(unusable("has files in the image, but /tmp is empty for every event"));
            }
            if leads.iter().any(|name| name.len() > NAME_BYTES_MAX) {
                return Err(unusable(&format!("has a name of more than {NAME_BYTES_MAX} bytes")));
            }
            return Ok(WorkingDir { path: leads.to_string_lossy().into_owned(), is_made_in_each: true });
        }
        if found.is_none() {
            self.make(image, &there, missing).map_err(|err| unusable(&format!("can't be made: {err}")))?;
        }
        Ok(WorkingDir { path: wanted.to_owned(), is_made_in_each: false })
    }

    /// Finds or makes a directory that something is mounted on. Returns where it really is, as a
    /// path without symlinks; an error says what is wrong with the one that was asked for.
    pub fn mount_point(&self, image: &ImageRoot, wanted: &str) -> Result<PathBuf, String> {
        let parts: Vec<_> = wanted.split('/').filter(|part| !part.is_empty()).collect();
        let (there, missing) = match image.real(wanted) {
            Ok((real, meta)) if meta.is_dir() => (real, [].as_slice()),
            Ok(_) => return Err("is not a directory in the image".to_owned()),
            Err(err) if err.kind() == io::ErrorKind::NotFound => longest_there(image, &parts)?,
            Err(err) => return Err(format!("can't be used: {err}")),
        };
        let mut leads = there.clone();
        leads.extend(missing);
        match leads.components().nth(1) {
            None => return Err("is the root".to_owned()),
            Some(first) => {
                if let Some(own) = MOUNT_POINTS.iter().find(|point| first.as_os_str() == **point) {
                    return Err(format!("leads to /{own}, which every instance has for itself"));
                }
            }
        }
        self.make(image, &there, missing).map_err(|err| format!("can't be made: {err}"))?;
        Ok(leads)
    }

    fn make(&self, image: &ImageRoot, there: &Path, missing: &[&str]) -> io::Result<()> {
        let mut at = there.strip_prefix("/").unwrap_or(there).to_owned();
        self.ancestors(image, &at)?;
        for part in missing {
            at.push(part);
            self.directory(&at)?;
        }
        Ok(())
    }

    /// Directories that the image has too look in the overlay as they look here: alike.
    fn ancestors(&self, image: &ImageRoot, path: &Path) -> io::Result<()> {
        let mut at = PathBuf::new();
        for part in path.components() {
            at.push(part);
            let ours = self.dir.join(&at);
            if ours.exists() {
                continue;
            }
            self.directory(&at)?;
            if let Ok(theirs) = fs::symlink_metadata(image.prefix.join(&at)) {
                self.like(&theirs, &ours)?;
            }
        }
        Ok(())
    }

    fn directory(&self, path: &Path) -> io::Result<()> {
        let at = self.dir.join(path);
        match fs::create_dir(&at) {
            Err(err) if err.kind() == io::ErrorKind::AlreadyExists && at.is_dir() => return Ok(()),
            done => done?,
        }
        fs::set_permissions(&at, fs::Permissions::from_mode(0o755))?;
        std::os::unix::fs::chown(&at, Some(self.uid_base), Some(self.uid_base))
    }

    fn file(&self, path: &str, text: &str) -> io::Result<()> {
        let at = self.dir.join(path);
        fs::write(&at, text)?;
        fs::set_permissions(&at, fs::Permissions::from_mode(0o644))?;
        std::os::unix::fs::chown(&at, Some(self.uid_base), Some(self.uid_base))
    }

    fn like(&self, theirs: &fs::Metadata, ours: &Path) -> io::Result<()> {
        std::os::unix::fs::chown(ours, Some(theirs.uid()), Some(theirs.gid()))?;
        fs::set_permissions(ours, fs::Permissions::from_mode(theirs.mode() & 0o7777))
    }
}

/// The longest part of a path that the image has, and the plain names after it.
fn longest_there<'a>(
    image: &ImageRoot,
    parts: &'a [&'a str],
) -> Result<(PathBuf, &'a [&'a str]), &'static str> {
    if parts.contains(&"..") {
        return Err("is not in the image and contains `..`");
    }
    let mut there = PathBuf::from("/");
    let mut missing = parts;
    for n in 1..=parts.len() {
        match image.real(&parts[..n].join("/")) {
            Ok((real, meta)) if meta.is_dir() => (there, missing) = (real, &parts[n..]),
            Ok(_) => return Err("leads through a file of the image"),
            Err(_) => break,
        }
    }
    let first = there.join(missing.first().copied().unwrap_or_default());
    if fs::symlink_metadata(image.prefix.join(first.strip_prefix("/").unwrap_or(&first))).is_ok() {
        return Err("leads through a symlink of the image that leads nowhere");
    }
    Ok((there, missing))
}

/// The mount point that hides what an image has at `path`; none for a mount point itself.
fn hidden_by(path: &Path) -> Option<&'static str> {
    if path == Path::new("/dev/shm") {
        return None; // a mount point below another
    }
    let below = path.strip_prefix("/").ok()?;
    let hides = |point: &&str| below.strip_prefix(point).is_ok_and(|rest| !rest.as_os_str().is_empty());
    MOUNT_POINTS.into_iter().find(hides)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_hide_what_is_below_them_but_not_themselves() {
        let hidden = |path: &str| hidden_by(Path::new(path));
        assert_eq!(hidden("/tmp/app"), Some("tmp"));
        assert_eq!(hidden("/dev/foo/bar"), Some("dev"));
        assert_eq!(hidden("/dev/shm/x"), Some("dev"));
        assert_eq!(hidden("/proc/1"), Some("proc"));
        for open in ["/", "/tmp", "/tmp/", "/dev", "/dev/shm", "/proc", "/tmpfiles/x", "/srv/tmp/x"] {
            assert_eq!(hidden(open), None, "{open}");
        }
    }
}
