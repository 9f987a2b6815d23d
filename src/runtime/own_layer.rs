//! neap's own layer of a root: every mount point, /etc/hosts and /etc/hostname, and a working
//! directory that the image names but lacks.
//!
//! libcontainer would create mount points, which a read-only root refuses; and a directory here
//! hides an image's symlink of the same name. Directories that the image has too look in the
//! overlay as they look here, so they are made alike.

use super::image_root::ImageRoot;
use super::wire::Refusal;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// On the launcher's tmpfs. It is not id-mapped (tmpfs can't be before 6.3): what
/// is in it belongs to the ids as they are outside.
pub struct OwnLayer {
    pub dir: PathBuf,
    /// The host id of the function's root.
    pub uid_base: u32,
}

impl OwnLayer {
    /// All but the working directory. `topmost` is the image's topmost layer.
    pub fn fill(&self, image: &ImageRoot, topmost: &Path, hostname: &str) -> io::Result<()> {
        // The merged root shows the attributes of the topmost layer's root: ours.
        self.like(&fs::metadata(topmost)?, &self.dir)?;
        for point in ["proc", "dev", "tmp"] {
            self.directory(Path::new(point))?;
        }
        let is_odd = fs::symlink_metadata(image.prefix.join("etc")).is_ok_and(|meta| !meta.is_dir());
        if !is_odd {
            self.ancestors(image, Path::new("etc"))?;
            let hosts = format!("127.0.0.1\tlocalhost {hostname}\n::1\tlocalhost {hostname}\n");
            self.file("etc/hosts", &hosts)?;
            self.file("etc/hostname", &format!("{hostname}\n"))?;
        }
        Ok(())
    }

    /// Finds the working directory, or makes it as docker does.
    pub fn working_dir(&self, image: &ImageRoot, wanted: &str) -> Result<String, Refusal> {
        let wanted = if wanted.is_empty() { "/" } else { wanted };
        let unusable = |why: &str| Refusal::Unusable(format!("working directory `{wanted}` {why}"));
        if !wanted.starts_with('/') || wanted.contains('\0') || wanted.len() > 4096 {
            return Err(unusable("is not an absolute path"));
        }
        match image.real(wanted) {
            Ok((_, meta)) if meta.is_dir() => return Ok(wanted.to_owned()),
            Ok(_) => return Err(unusable("is not a directory of the image")),
            Err(err) if err.kind() == io::ErrorKind::NotFound => {}
            Err(err) => return Err(unusable(&format!("can't be used: {err}"))),
        }
        // The longest part that is there, then plain names.
        let parts: Vec<_> = wanted.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
        if parts.contains(&"..") {
            return Err(unusable("is not in the image and contains `..`"));
        }
        let mut there = PathBuf::from("/");
        let mut missing = parts.as_slice();
        for n in 1..=parts.len() {
            match image.real(&parts[..n].join("/")) {
                Ok((real, meta)) if meta.is_dir() => (there, missing) = (real, &parts[n..]),
                Ok(_) => return Err(unusable("leads through a file of the image")),
                Err(_) => break,
            }
        }
        let first = there.join(missing.first().copied().unwrap_or_default());
        if fs::symlink_metadata(image.prefix.join(first.strip_prefix("/").unwrap_or(&first))).is_ok() {
            return Err(unusable("leads through a symlink of the image that leads nowhere"));
        }
        let inside = there.strip_prefix("/").unwrap_or(&there).to_owned();
        let made = self.ancestors(image, &inside).and_then(|()| {
            let mut at = inside;
            for part in missing {
                at.push(part);
                self.directory(&at)?;
            }
            Ok(())
        });
        made.map_err(|err| unusable(&format!("can't be made: {err}")))?;
        Ok(wanted.to_owned())
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
            Err(err) if err.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
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
