//! Secrets of the node: files in `data_dir/secrets`, for their owner alone, that `neap secret`
//! writes and functions whose manifests name them read (runtime::secret_files).
//!
//! What is set is on the disk when `set` returns, whole or not at all. What is in them is never
//! read back here: not for answers, not for logs. A file that others may read is none.

use crate::model::permissions::{SECRET_BYTES_MAX, SECRETS_DIR, SecretName};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

/// Of one node. More is refused.
const SECRETS_MAX: usize = 1024;

/// No secret's name begins with a dot.
const NEW: &str = ".new";

#[derive(Debug, thiserror::Error)]
pub enum SecretsError {
    #[error("no secret named `{0}`; `neap secret set {0} --data @FILE` makes one")]
    Unknown(SecretName),
    #[error("secret `{0}`: file {1} may be read or changed by others than its owner; `chmod 600 {1}`")]
    Open(SecretName, String),
    #[error("a secret has 1 to {SECRET_BYTES_MAX} bytes, not {0}")]
    Size(u64),
    #[error("this node keeps {SECRETS_MAX} secrets, no more fit; `neap secret rm NAME` makes room")]
    Full,
    #[error("{doing} {}", path.display())]
    Io {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Cheap to clone.
#[derive(Clone, Debug)]
pub struct Secrets {
    dir: PathBuf,
    /// There is one `NEW`.
    writing: Arc<Mutex<()>>,
}

/// What may be told of a secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Secret {
    pub name: SecretName,
    pub bytes: u64,
    pub changed: SystemTime,
}

impl Secrets {
    /// Makes the directory when there is none.
    pub fn open(data_dir: &Path) -> Result<Self, SecretsError> {
        let secrets = Self::below(data_dir);
        let dir = &secrets.dir;
        match fs::DirBuilder::new().mode(0o700).create(dir) {
            Err(err) if err.kind() == io::ErrorKind::AlreadyExists => {}
            done => done.map_err(failed("make the directory", dir))?,
        }
        // Of a daemon that was killed.
        let _ = fs::remove_file(dir.join(NEW));
        Ok(secrets)
    }

    /// To look only; the directory may not be there.
    pub fn below(data_dir: &Path) -> Self {
        Self { dir: data_dir.join(SECRETS_DIR), writing: Arc::default() }
    }

    /// By name.
    pub fn list(&self) -> Result<Vec<Secret>, SecretsError> {
        let mut secrets = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed("read the directory", &self.dir))? {
            let entry = entry.map_err(failed("read the directory", &self.dir))?;
            let name = entry.file_name().to_str().and_then(|name| SecretName::parse(name).ok());
            let (Some(name), Ok(meta)) = (name, entry.metadata()) else { continue };
            if meta.is_file() {
                let changed = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                secrets.push(Secret { name, bytes: meta.len(), changed });
            }
        }
        secrets.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(secrets)
    }

    /// Whether a function can have it; else why not.
    pub fn check(&self, name: &SecretName) -> Result<(), SecretsError> {
        let path = self.dir.join(name.as_str());
        let meta = match fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_file() => meta,
            Ok(_) => return Err(SecretsError::Unknown(name.clone())),
            Err(err) if err.kind() == io::ErrorKind::NotFound => {
                return Err(SecretsError::Unknown(name.clone()));
            }
            Err(err) => return Err(failed("look at", &path)(err)),
        };
        if meta.mode() & 0o077 != 0 {
            return Err(SecretsError::Open(name.clone(), path.display().to_string()));
        }
        match meta.len() {
            1..=SECRET_BYTES_MAX => Ok(()),
            bytes => Err(SecretsError::Size(bytes)),
        }
    }

    /// Makes or replaces it.
    pub fn set(&self, name: &SecretName, value: &[u8]) -> Result<(), SecretsError> {
        let bytes = value.len() as u64;
        if !(1..=SECRET_BYTES_MAX).contains(&bytes) {
            return Err(SecretsError::Size(bytes));
        }
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.dir.join(name.as_str());
        if !path.exists() && self.list()?.len() >= SECRETS_MAX {
            return Err(SecretsError::Full);
        }
        let new = self.dir.join(NEW);
        let _ = fs::remove_file(&new);
        let written = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)
            .and_then(|mut file| file.write_all(value).and_then(|()| file.sync_all()))
            .and_then(|()| fs::rename(&new, &path))
            .and_then(|()| self.sync());
        if written.is_err() {
            let _ = fs::remove_file(&new);
        }
        written.map_err(failed("write", &path))
    }

    pub fn remove(&self, name: &SecretName) -> Result<(), SecretsError> {
        let path = self.dir.join(name.as_str());
        match fs::remove_file(&path) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => Err(SecretsError::Unknown(name.clone())),
            done => done.and_then(|()| self.sync()).map_err(failed("remove", &path)),
        }
    }

    /// A name is on the disk when its directory is.
    fn sync(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SecretsError {
    let path = path.to_owned();
    move |source| SecretsError::Io { doing, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn name(text: &str) -> SecretName {
        SecretName::parse(text).expect("a good name")
    }

    #[test]
    fn a_secret_is_its_owners_alone_and_whole_or_not_there() {
        let data_dir = tempfile::tempdir().expect("a directory");
        let secrets = Secrets::open(data_dir.path()).expect("opened");

        secrets.set(&name("api-key"), b"first").expect("set");
        secrets.set(&name("api-key"), b"second").expect("replaced");

        let path = data_dir.path().join("secrets/api-key");
        let mode = |path: &Path| fs::metadata(path).expect("it is there").mode() & 0o777;
        assert_eq!(fs::read(&path).expect("readable"), b"second");
        assert_eq!((mode(&path), mode(path.parent().expect("a directory"))), (0o600, 0o700));
        let listed = secrets.list().expect("listed");
        assert_eq!(listed.iter().map(|s| (s.name.as_str(), s.bytes)).collect::<Vec<_>>(), [("api-key", 6)]);
        assert_eq!(fs::read_dir(path.parent().expect("a directory")).expect("readable").count(), 1);
    }

    #[test]
    fn what_is_empty_or_too_large_is_no_secret() {
        let data_dir = tempfile::tempdir().expect("a directory");
        let secrets = Secrets::open(data_dir.path()).expect("opened");

        let set = |bytes: usize| secrets.set(&name("x"), &vec![b'x'; bytes]);

        assert!(matches!(set(0), Err(SecretsError::Size(0))));
        set(SECRET_BYTES_MAX as usize).expect("just fits");
        assert!(matches!(set(SECRET_BYTES_MAX as usize + 1), Err(SecretsError::Size(_))));
        assert_eq!(secrets.list().expect("listed")[0].bytes, SECRET_BYTES_MAX, "the old one stays");
    }

    #[test]
    fn missing_and_readable_by_others_are_told_apart_with_the_way_out() {
        let data_dir = tempfile::tempdir().expect("a directory");
        let secrets = Secrets::open(data_dir.path()).expect("opened");
        let told = |secret: &str| secrets.check(&name(secret)).expect_err("refused").to_string();

        assert!(told("none").contains("`neap secret set none --data @FILE` makes one"));
        assert!(matches!(secrets.remove(&name("none")), Err(SecretsError::Unknown(_))));

        secrets.set(&name("open"), b"x").expect("set");
        let path = data_dir.path().join("secrets/open");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("its mode");
        assert!(told("open").contains("chmod 600"), "{}", told("open"));

        // Not followed: it may lead anywhere.
        std::os::unix::fs::symlink("/etc/hostname", data_dir.path().join("secrets/link")).expect("a symlink");
        assert!(told("link").contains("no secret named"));
        secrets.remove(&name("open")).expect("removed");
        assert_eq!(secrets.list().expect("listed"), []);
    }

    #[test]
    fn a_secret_cut_off_by_a_kill_leaves_nothing() {
        let data_dir = tempfile::tempdir().expect("a directory");
        Secrets::open(data_dir.path()).expect("opened");
        fs::write(data_dir.path().join("secrets/.new"), "half").expect("written");

        let secrets = Secrets::open(data_dir.path()).expect("opened again");

        assert_eq!(secrets.list().expect("listed"), []);
        assert!(!data_dir.path().join("secrets/.new").exists());
    }
}
