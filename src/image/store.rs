//! What is on the disk below `data_dir/images`, and in which order it gets there.
//!
//! ```text
//! refs.json                     which images there are, and their names: the commit
//! refs.spare                    room for the next one
//! manifests/HEX.json            an image: manifest and configuration as they came, its layers
//! layers/sha256/HEX/root        a layer, unpacked, in overlayfs form
//! layers/sha256/HEX/layer.json  what it is; there before the directory gets this name
//! checked.json                  when layers were last read and found good (see `scrub`)
//! blobs/HEX, HEX.part           a pull's, on their way (see `blobs`)
//! staging/import-*              an import on its way
//! staging/trash-*               on its way out
//! ```
//!
//! HEX of a layer is its diff id; for a layer that leans on those below (see `unpack`), its chain
//! id (image-spec config.md, "Layer ChainID"), which is the diff id for the lowest.
//!
//! An import writes the manifest, syncs the file system, renames the layers into place, and last
//! the daemon alone writes refs.json. What refs.json doesn't reach is garbage: `collect` removes
//! it whenever no import is under way, so a kill at any moment leaves nothing that counts.
//!
//! The directory is for root alone: layers hold other people's setuid files.

use super::blobs::Blobs;
use super::limits::{io, os};
use super::trust::Decision;
use super::{Image, ImageError, RawConfig};
use crate::model::{Digest, UnixMs};
use rustix::fs::{CWD, FallocateFlags, RenameFlags, fallocate, renameat_with};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

#[derive(Clone, Debug)]
pub struct Directory(PathBuf);

/// refs.json
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refs {
    version: u32,
    pub images: BTreeMap<String, Entry>,
    /// From the full reference to the digest.
    pub references: BTreeMap<String, Digest>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    pub imported: UnixMs,
    /// When it was last needed, to the day; what nobody needed for longest goes first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used: Option<UnixMs>,
}

/// manifests/HEX.json
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub digest: Digest,
    pub platform: String,
    /// Byte for byte, so that it can be verified again.
    pub manifest: String,
    pub config: String,
    /// Lowest first.
    pub layers: Vec<StoredLayer>,
    /// Why it was taken, for each name that it came in under.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub decisions: Vec<Decision>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredLayer {
    pub diff_id: Digest,
    /// The directory below layers/sha256: diff id or chain id.
    pub stored_as: Digest,
    pub bytes: u64,
}

/// layer.json
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerMark {
    pub diff_id: Digest,
    pub bytes: u64,
    pub leans: bool,
    /// The seal of the unpacked tree (see `check`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sums: Option<Digest>,
    /// The same as an earlier version made it; the one before had none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tree: Option<Digest>,
}

const VERSION: u32 = 1;
/// Far above what thousands of images need; a file beyond it is not ours.
const FILE_BYTES_MAX: u64 = 64 * 1024 * 1024;

impl Directory {
    pub fn new(path: PathBuf) -> Self {
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Makes what is missing; refs.json of nothing when there is none.
    pub fn create(&self) -> Result<(), ImageError> {
        use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
        for directory in
            [self.0.clone(), self.staging(), self.manifests(), self.layers(), self.0.join("blobs")]
        {
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory);
            made.map_err(io(format!("make {}", directory.display())))?;
        }
        fs::set_permissions(&self.0, fs::Permissions::from_mode(0o700))
            .map_err(io("protect the image directory"))?;
        if !self.refs_file().exists() {
            let empty = fs::read_dir(self.manifests()).map_err(io("list the manifests"))?.next().is_none();
            if !empty {
                let text = format!("{} is missing though there are images", self.refs_file().display());
                return Err(ImageError::Refused(format!(
                    "{text}: restore it, or remove {}",
                    self.0.display()
                )));
            }
            self.write_refs(&Refs { version: VERSION, ..Refs::default() })?;
        }
        self.take_room();
        Ok(())
    }

    pub fn staging(&self) -> PathBuf {
        self.0.join("staging")
    }

    pub fn blobs(&self) -> Blobs {
        Blobs::new(self.0.join("blobs"))
    }

    /// Bytes that may still be written to its file system.
    pub fn free(&self) -> Result<u64, ImageError> {
        let stat = rustix::fs::statvfs(&self.0).map_err(os("ask how full the disk is"))?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn manifests(&self) -> PathBuf {
        self.0.join("manifests")
    }

    pub fn layers(&self) -> PathBuf {
        self.0.join("layers/sha256")
    }

    fn refs_file(&self) -> PathBuf {
        self.0.join("refs.json")
    }

    fn spare_file(&self) -> PathBuf {
        self.0.join("refs.spare")
    }

    fn record_file(&self, digest: &Digest) -> PathBuf {
        self.manifests().join(format!("{}.json", digest.hex()))
    }

    pub fn layer(&self, stored_as: &Digest) -> PathBuf {
        self.layers().join(stored_as.hex())
    }

    pub fn read_refs(&self) -> Result<Refs, ImageError> {
        let refs: Refs = read_json(&self.refs_file())?;
        if refs.version != VERSION {
            let (file, found) = (self.refs_file(), refs.version);
            let text = format!("{} has version {found}, this neap reads {VERSION}", file.display());
            return Err(ImageError::Refused(text));
        }
        Ok(refs)
    }

    /// Whole or not at all. Removing images must work when the disk is full to its last block: so
    /// this is written into a file that has its room already, and the two change places. That holds
    /// on file systems that write in place and can exchange names (ext4, XFS without reflinks, tmpfs),
    /// not on those that write each block anew (btrfs, F2FS) or can't exchange (FAT, overlayfs of
    /// old kernels): there a full disk takes a file removed by hand first.
    pub fn write_refs(&self, refs: &Refs) -> Result<(), ImageError> {
        let (file, spare) = (self.refs_file(), self.spare_file());
        let doing = || format!("write {}", file.display());
        let text = serde_json::to_string(refs).map_err(|error| io(doing())(error.into()))?;
        let write = || -> std::io::Result<()> {
            // After a crash between the exchange and its sync below, what is called spare here may
            // still be refs.json on the disk. One that is clean costs nothing.
            fs::File::open(&self.0)?.sync_all()?;
            let mut new = fs::File::options().write(true).create(true).truncate(false).open(&spare)?;
            new.write_all(text.as_bytes())?;
            new.set_len(text.len() as u64)?;
            new.sync_all()?;
            match renameat_with(CWD, &spare, CWD, &file, RenameFlags::EXCHANGE) {
                // The first, or a file system that can't.
                Err(Errno::NOENT | Errno::INVAL | Errno::NOSYS) => fs::rename(&spare, &file)?,
                done => done?,
            }
            fs::File::open(&self.0)?.sync_all()
        };
        write().map_err(io(doing()))?;
        self.take_room();
        Ok(())
    }

    /// For the next refs.json, which says less when images are removed. Where there is none now, or
    /// never is, the next finds that out.
    fn take_room(&self) {
        let Ok(bytes) = fs::metadata(self.refs_file()).map(|meta| meta.len()) else { return };
        let spare = fs::File::options().write(true).create(true).truncate(false).open(self.spare_file());
        if let Ok(spare) = spare {
            let _ = fallocate(&spare, FallocateFlags::KEEP_SIZE, 0, bytes.max(1));
        }
    }

    /// `None`: no such image.
    pub fn read_record(&self, digest: &Digest) -> Result<Option<Record>, ImageError> {
        match read_json(&self.record_file(digest)) {
            Ok(record) => Ok(Some(record)),
            Err(ImageError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub fn write_record(&self, record: &Record) -> Result<(), ImageError> {
        write_json(&self.record_file(&record.digest), record)
    }

    /// Of an image that refs.json does not know yet: durable with the next sync.
    pub fn put_record(&self, record: &Record) -> Result<(), ImageError> {
        put_json(&self.record_file(&record.digest), record)
    }

    /// The layer of that name, if it is there: complete, since it has its name last.
    pub fn read_mark(&self, stored_as: &Digest) -> Result<Option<LayerMark>, ImageError> {
        match read_json(&self.layer(stored_as).join("layer.json")) {
            Ok(mark) => Ok(Some(mark)),
            Err(ImageError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Under which name a layer is there, with its mark: its chain id if it leans on those below.
    pub fn find_layer(
        &self,
        diff_id: &Digest,
        chain_id: &Digest,
    ) -> Result<Option<(Digest, LayerMark)>, ImageError> {
        for (stored_as, leaning_too) in [(chain_id, true), (diff_id, false)] {
            if let Some(mark) = self.read_mark(stored_as)?
                && mark.diff_id == *diff_id
                && (leaning_too || !mark.leans)
            {
                return Ok(Some((stored_as.clone(), mark)));
            }
        }
        Ok(None)
    }

    pub fn image(&self, record: &Record) -> Result<Image, ImageError> {
        let config: RawConfig = serde_json::from_str(&record.config).map_err(|error| {
            io(format!("read the configuration of image {}", record.digest))(error.into())
        })?;
        // overlayfs refuses a directory that it is given twice. The upper one of two equal layers
        // decides alone: whatever the lower one brought, the upper one brings again.
        let mut seen = BTreeSet::new();
        let mut layers: Vec<PathBuf> = Vec::new();
        for layer in record.layers.iter().rev() {
            if seen.insert(&layer.stored_as) {
                layers.push(self.layer(&layer.stored_as).join("root"));
            }
        }
        layers.reverse();
        Ok(Image { digest: record.digest.clone(), layers, config: config.into() })
    }

    /// Removes what refs.json doesn't reach: into the trash, so this is brief. Not while an import
    /// is under way: its layers are not reached yet. An image whose record can't be read may need
    /// any of the layers: until it is gone or has come again, all of them stay.
    pub fn collect(&self, refs: &Refs) -> Result<(), ImageError> {
        let mut layers = BTreeSet::new();
        let mut manifests = BTreeSet::new();
        let mut unknown = false;
        for digest in refs.images.keys().filter_map(|text| Digest::parse(text).ok()) {
            let why = match self.read_record(&digest) {
                Ok(Some(record)) => {
                    layers.extend(record.layers.iter().map(|layer| layer.stored_as.hex().to_owned()));
                    None
                }
                Ok(None) => Some(format!("{} is missing", self.record_file(&digest).display())),
                Err(error) => Some(crate::errors::chain(&error)),
            };
            if let Some(why) = why {
                unknown = true;
                tracing::error!(
                    image = digest.as_str(),
                    why,
                    "an image's record is damaged, and no layer is removed until the image is pulled or imported \
                     again, or removed with `neap image rm`"
                );
            }
            manifests.insert(format!("{}.json", digest.hex()));
        }
        let all = [(self.manifests(), manifests), (self.layers(), layers)];
        for (directory, wanted) in all.into_iter().take(if unknown { 1 } else { 2 }) {
            let listing = io(format!("list {}", directory.display()));
            for entry in fs::read_dir(&directory).map_err(listing)?.flatten() {
                if !entry.file_name().to_str().is_some_and(|name| wanted.contains(name)) {
                    self.discard(&entry.path())?;
                }
            }
        }
        Ok(())
    }

    /// Out of the way at once; `empty_trash` does the work.
    pub fn discard(&self, path: &Path) -> Result<(), ImageError> {
        for _ in 0..16 {
            let to = self.staging().join(format!("trash-{:016x}", fastrand::u64(..)));
            match fs::rename(path, &to) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
                Err(error) if matches!(error.kind(), std::io::ErrorKind::DirectoryNotEmpty) => {}
                Err(error) => return Err(io(format!("remove {}", path.display()))(error)),
            }
        }
        Err(ImageError::Refused(format!("remove {}: the trash is full", path.display())))
    }

    /// Whatever is in staging and starts with one of `prefixes`.
    pub fn sweep_staging(&self, prefixes: &[&str]) -> Result<(), ImageError> {
        for entry in fs::read_dir(self.staging()).map_err(io("list the staging directory"))?.flatten() {
            let name = entry.file_name();
            if !name.to_str().is_some_and(|name| prefixes.iter().any(|p| name.starts_with(p))) {
                continue;
            }
            let path = entry.path();
            let removed = match entry.file_type() {
                Ok(kind) if kind.is_dir() => fs::remove_dir_all(&path),
                _ => fs::remove_file(&path),
            };
            match removed {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(io(format!("remove {}", path.display()))(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, ImageError> {
    use std::io::Read;
    let doing = || format!("read {}", path.display());
    let mut text = String::new();
    let file = fs::File::open(path).map_err(io(doing()))?;
    file.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(io(doing()))?;
    serde_json::from_str(&text).map_err(|error| io(doing())(error.into()))
}

/// Whole or not at all, also after a power cut.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<(), ImageError> {
    replace(path, value, true)
}

/// The same, but that a power cut may leave anything: for what is not looked at afterwards, or is
/// synced with all the rest.
pub fn put_json(path: &Path, value: &impl Serialize) -> Result<(), ImageError> {
    replace(path, value, false)
}

fn replace(path: &Path, value: &impl Serialize, durable: bool) -> Result<(), ImageError> {
    let doing = || format!("write {}", path.display());
    let text = serde_json::to_string(value).map_err(|error| io(doing())(error.into()))?;
    let directory = path.parent().expect("our files have a directory");
    let temporary = path.with_extension("tmp");
    let write = || -> std::io::Result<()> {
        let mut file = fs::File::create(&temporary)?;
        file.write_all(text.as_bytes())?;
        if durable {
            file.sync_all()?;
        }
        fs::rename(&temporary, path)?;
        if durable { fs::File::open(directory)?.sync_all() } else { Ok(()) }
    };
    write().map_err(io(doing()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Goal, ImageStore};
    use std::collections::HashSet;

    fn digest(letter: &str) -> Digest {
        Digest::parse(&format!("sha256:{}", letter.repeat(64))).expect("hex")
    }

    /// An image of one layer, which is called as it is.
    fn put(directory: &Directory, refs: &mut Refs, name: &str, letter: &str) {
        let (diff_id, stored_as) = (digest(letter), digest(letter));
        let layers = vec![StoredLayer { diff_id, stored_as, bytes: 5 }];
        let (manifest, config, platform) = ("{}".into(), "{}".into(), "linux/amd64".into());
        let record = Record { digest: digest(letter), platform, manifest, config, layers, decisions: vec![] };
        directory.write_record(&record).expect("written");
        fs::create_dir_all(directory.layer(&digest(letter)).join("root")).expect("made");
        let entry = Entry { imported: UnixMs(0), used: None };
        refs.images.insert(digest(letter).to_string(), entry);
        refs.references.insert(format!("docker.io/library/{name}"), digest(letter));
    }

    #[test]
    fn image_whose_record_is_damaged_stops_neither_the_start_nor_a_collection() {
        let dir = tempfile::tempdir().expect("a directory");
        let directory = Directory::new(dir.path().join("images"));
        for (what, damage) in [("torn", Some("{\"digest\": \"sha2")), ("missing", None)] {
            directory.create().expect("made");
            let mut refs = Refs { version: VERSION, ..Refs::default() };
            put(&directory, &mut refs, "bad:1", "a");
            put(&directory, &mut refs, "good:1", "b");
            put(&directory, &mut refs, "old:1", "c");
            directory.write_refs(&refs).expect("written");
            match damage {
                Some(text) => fs::write(directory.record_file(&digest("a")), text).expect("written"),
                None => fs::remove_file(directory.record_file(&digest("a"))).expect("there"),
            }

            let store = ImageStore::open(dir.path(), "/bin/false".into()).expect(what);
            assert!(store.find("good:1").is_ok(), "{what}");
            assert!(store.find("bad:1").is_err(), "{what}");
            let listed = store.list().expect(what);
            let bad = listed.iter().find(|image| image.digest == digest("a").as_str()).expect("listed");
            assert_eq!(bad.platform, "damaged", "{what}");
            // Nobody knows which layers it needs.
            let needed = HashSet::from([digest("b")]);
            let gone = store.gc(&needed, Goal::Unneeded, false).expect(what);
            assert_eq!(gone.images.len(), 1, "{what}");
            assert_eq!(gone.bytes, 0, "{what}");
            assert!(["a", "b", "c"].iter().all(|of| directory.layer(&digest(of)).exists()), "{what}");

            // The way out.
            store.remove("bad:1", &needed).expect(what);
            assert!(!directory.layer(&digest("a")).exists() && !directory.layer(&digest("c")).exists());
            assert!(directory.layer(&digest("b")).exists(), "{what}");
            drop(store);
        }
    }
}
