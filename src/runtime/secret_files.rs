//! A revision's secrets as its instances see them: one directory in the launcher's memory, which
//! every instance has read-only at each place where its platform looks for them.
//!
//! It is brought up to date before each create and when the daemon says that one changed: by
//! renaming, so that no reader sees half of one. What was parked or runs sees the change too.

use crate::model::permissions::{SECRET_BYTES_MAX, SECRETS_DIR, SecretName};
use rustix::fs::{AtFlags, Mode, OFlags};
use std::cell::RefCell;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// As Docker's: functions are confined by other means than modes, and some give up root by
/// themselves before they read.
const MODE: u32 = 0o444;

/// No secret's name begins with a dot.
const NEW: &str = ".new";

pub struct SecretFiles {
    /// What instances get.
    pub dir: PathBuf,
    /// The node's secrets.
    source: PathBuf,
    names: Vec<SecretName>,
    /// Host id of the function's root.
    owner: u32,
    /// What was copied, in the order of `names`.
    copied: RefCell<Vec<Option<Version>>>,
}

/// Changes with every `set`, which makes a new file.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Version {
    inode: u64,
    bytes: u64,
    changed: (i64, i64),
}

impl SecretFiles {
    pub fn new(dir: PathBuf, data_dir: &Path, names: Vec<SecretName>, owner: u32) -> io::Result<Self> {
        fs::create_dir(&dir)?;
        std::os::unix::fs::chown(&dir, Some(owner), Some(owner))?;
        let copied = RefCell::new(vec![None; names.len()]);
        Ok(Self { dir, source: data_dir.join(SECRETS_DIR), names, owner, copied })
    }

    /// Copies what is new or has changed. An error names the secret, never what is in it.
    pub fn refresh(&self) -> Result<(), String> {
        for (name, copied) in self.names.iter().zip(self.copied.borrow_mut().iter_mut()) {
            let refused = |err: io::Error| match err.kind() {
                io::ErrorKind::NotFound => format!("secret `{name}` is not set on this node"),
                _ => format!("read secret `{name}`: {err}"),
            };
            let version = self.version(name).map_err(refused)?;
            if *copied != Some(version) {
                self.copy(name).map_err(refused)?;
                *copied = Some(version);
            }
        }
        Ok(())
    }

    fn version(&self, name: &SecretName) -> io::Result<Version> {
        let meta = fs::symlink_metadata(self.source.join(name.as_str()))?;
        let changed = (meta.ctime(), meta.ctime_nsec());
        Ok(Version { inode: meta.ino(), bytes: meta.len(), changed })
    }

    fn copy(&self, name: &SecretName) -> io::Result<()> {
        let from = self.source.join(name.as_str());
        // NONBLOCK: whatever else than a file lies there must not stop the launcher.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = fs::File::from(rustix::fs::open(&from, flags, Mode::empty())?);
        let meta = file.metadata()?;
        if !meta.is_file() || meta.mode() & 0o077 != 0 {
            let text = "it may be read by others than its owner, or is no file";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        let mut value = Vec::new();
        file.take(SECRET_BYTES_MAX + 1).read_to_end(&mut value)?;
        if value.len() as u64 > SECRET_BYTES_MAX {
            let text = format!("it is larger than {SECRET_BYTES_MAX} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        let new = self.dir.join(NEW);
        let _ = fs::remove_file(&new);
        let mut file = fs::File::options().write(true).create_new(true).mode(MODE).open(&new)?;
        file.write_all(&value)?;
        rustix::fs::chownat(
            rustix::fs::CWD,
            &new,
            Some(rustix::fs::Uid::from_raw(self.owner)),
            Some(rustix::fs::Gid::from_raw(self.owner)),
            AtFlags::SYMLINK_NOFOLLOW,
        )?;
        fs::rename(&new, self.dir.join(name.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn changes_arrive_and_what_is_missing_is_named() {
        let node = tempfile::tempdir().expect("a directory");
        let source = node.path().join("secrets");
        fs::create_dir(&source).expect("a directory");
        let set = |text: &str| {
            let new = source.join(".new");
            fs::write(&new, text).expect("written");
            fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).expect("its mode");
            fs::rename(new, source.join("key")).expect("renamed");
        };
        let owner = nix::unistd::getuid().as_raw();
        let names = vec![SecretName::parse("key").expect("a good name")];
        let files =
            SecretFiles::new(node.path().join("copy"), node.path(), names, owner).expect("a directory");
        let read = || fs::read_to_string(files.dir.join("key")).expect("readable");

        assert_eq!(files.refresh(), Err("secret `key` is not set on this node".to_owned()));
        set("one");
        files.refresh().expect("copied");
        assert_eq!(read(), "one");
        set("two");
        files.refresh().expect("copied");
        assert_eq!(read(), "two");
        assert_eq!(fs::metadata(files.dir.join("key")).expect("there").mode() & 0o777, 0o444);

        fs::set_permissions(source.join("key"), fs::Permissions::from_mode(0o644)).expect("its mode");
        let told = files.refresh().expect_err("readable by all");
        assert!(told.contains("others than its owner") && !told.contains("two"), "{told}");
    }
}
