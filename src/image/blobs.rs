//! Blobs on their way from a registry: `blobs/HEX` is whole and verified, `blobs/HEX.part` is as
//! far as it came.
//!
//! What was fetched once is not fetched again, also after SIGKILL or a power cut. After a kill
//! the page cache has all of a part, so its length counts. After a power cut a file system may
//! show a length whose bytes it never wrote: then only what was synced counts, which `HEX.sync`
//! says together with the boot that it is true of. Whatever is here, the digest decides in the
//! end.

use super::ImageError;
use super::behind::Behind;
use super::limits::{io, os};
use crate::model::Digest;
use ring::digest::{Context, SHA256};
use rustix::fs::FlockOperation;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// Synced when so much came, and not more often than this: what a power cut may cost, and few
/// enough writes for flash.
const SYNC_BYTES: u64 = 4 * 1024 * 1024;
pub const SYNC_EVERY: Duration = Duration::from_secs(2);
/// What nobody came back for is let go. A pull over LTE takes days, not weeks.
const KEPT: Duration = Duration::from_secs(14 * 86_400);

#[derive(Clone, Debug)]
pub struct Blobs(PathBuf);

impl Blobs {
    pub fn new(directory: PathBuf) -> Self {
        Self(directory)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    fn whole(&self, digest: &Digest) -> PathBuf {
        self.0.join(digest.hex())
    }

    fn part_file(&self, digest: &Digest) -> PathBuf {
        self.0.join(format!("{}.part", digest.hex()))
    }

    fn sync_file(&self, digest: &Digest) -> PathBuf {
        self.0.join(format!("{}.sync", digest.hex()))
    }

    pub fn is_whole(&self, digest: &Digest) -> bool {
        self.whole(digest).is_file()
    }

    /// Bytes of it that are on the disk.
    pub fn here(&self, digest: &Digest) -> u64 {
        let length = |path: PathBuf| fs::metadata(path).map(|meta| meta.len()).ok();
        length(self.whole(digest)).or_else(|| length(self.part_file(digest))).unwrap_or(0)
    }

    /// A document that was read into memory and has this digest. Not synced: whoever reads it
    /// hashes it again.
    pub fn keep(&self, digest: &Digest, bytes: &[u8]) -> Result<(), ImageError> {
        let path = self.whole(digest);
        let write = || -> std::io::Result<()> {
            let temporary = path.with_extension("new");
            File::create(&temporary)?.write_all(bytes)?;
            fs::rename(&temporary, &path)
        };
        write().map_err(io(format!("keep {digest}")))
    }

    pub fn remove(&self, digest: &Digest) {
        for path in [self.whole(digest), self.part_file(digest), self.sync_file(digest)] {
            let _ = fs::remove_file(path); // swept by age otherwise
        }
    }

    /// What is there of a blob, to go on from. Waits for another worker that is at the same one.
    pub fn part(&self, digest: &Digest, size: u64) -> Result<Part, ImageError> {
        let doing = || format!("open the part of {digest} that is here");
        let options = || {
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(false);
            options
        };
        let file = options().open(self.part_file(digest)).map_err(io(doing()))?;
        rustix::fs::flock(&file, FlockOperation::LockExclusive).map_err(os(doing()))?;
        let sync = options().open(self.sync_file(digest)).map_err(io(doing()))?;
        let boot = boot_id();
        let mut length = file.metadata().map_err(io(doing()))?.len();
        let noted = read_note(&sync);
        match &noted {
            Some((of, _)) if *of == boot && !boot.is_empty() => {}
            Some((_, synced)) => length = length.min(*synced),
            None => length = 0,
        }
        if length > size {
            length = 0;
        }
        let mut part = Part {
            whole: self.whole(digest),
            sync_path: self.sync_file(digest),
            path: self.part_file(digest),
            digest: digest.clone(),
            file,
            sync,
            boot,
            length,
            synced: noted.map_or(0, |(_, synced)| synced).min(length),
            synced_at: Instant::now(),
            behind: Behind::from_offset(length),
            hash: Context::new(&SHA256),
        };
        part.file.set_len(length).map_err(io(doing()))?;
        part.rehash().map_err(io(doing()))?;
        part.note().map_err(io(doing()))?;
        Ok(part)
    }

    /// Removes what nobody needs: everything but what is of `spared`, or what is older than two
    /// weeks. Bytes that went.
    pub fn sweep(&self, all: bool, spared: &BTreeSet<Digest>, dry: bool) -> Result<u64, ImageError> {
        let spared: BTreeSet<&str> = spared.iter().map(Digest::hex).collect();
        let mut gone = 0;
        for entry in fs::read_dir(&self.0).map_err(io("list fetched blobs"))?.flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            let age = meta.modified().ok().and_then(|at| SystemTime::now().duration_since(at).ok());
            let name = entry.file_name();
            let hex = name.to_str().and_then(|name| name.split('.').next()).unwrap_or_default();
            if all && !spared.contains(hex) || age.is_some_and(|age| age > KEPT) {
                gone += meta.len();
                if !dry {
                    let _ = fs::remove_file(entry.path());
                }
            }
        }
        Ok(gone)
    }
}

/// A blob on its way. Locked against other workers while it is held.
pub struct Part {
    digest: Digest,
    path: PathBuf,
    sync_path: PathBuf,
    whole: PathBuf,
    file: File,
    sync: File,
    boot: String,
    length: u64,
    synced: u64,
    synced_at: Instant,
    behind: Behind,
    hash: Context,
}

impl Part {
    pub fn length(&self) -> u64 {
        self.length
    }

    pub fn append(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        let mut write = || -> std::io::Result<()> {
            self.file.write_all_at(bytes, self.length)?;
            self.hash.update(bytes);
            self.length += bytes.len() as u64;
            Ok(())
        };
        write().map_err(io(format!("write to {}", self.path.display())))?;
        self.behind.grown(&self.file, self.length);
        if self.length - self.synced >= SYNC_BYTES && self.synced_at.elapsed() >= SYNC_EVERY {
            self.sync()?;
        }
        Ok(())
    }

    /// What is here, a power cut does not take any more.
    fn sync(&mut self) -> Result<(), ImageError> {
        let sync = self.file.sync_data().and_then(|()| {
            self.synced = self.length;
            self.note()
        });
        self.synced_at = Instant::now();
        sync.map_err(io(format!("write to {}", self.path.display())))
    }

    /// From the beginning: its bytes were not what the digest says.
    pub fn restart(&mut self) -> Result<(), ImageError> {
        self.length = 0;
        self.synced = 0;
        self.behind = Behind::from_offset(0);
        self.hash = Context::new(&SHA256);
        let done = self.file.set_len(0).and_then(|()| self.note());
        done.map_err(io(format!("empty {}", self.path.display())))
    }

    /// All bytes are here. `false`: they are not what the digest says; it starts anew.
    pub fn verify(&mut self) -> Result<bool, ImageError> {
        let found = Digest::from_sha256(self.hash.clone().finish().as_ref());
        if found != self.digest {
            self.restart()?;
            return Ok(false);
        }
        Ok(true)
    }

    /// It was verified: it gets its name, and a power cut does not take it any more.
    pub fn keep(self) -> Result<(), ImageError> {
        let named = self.file.sync_data().and_then(|()| fs::rename(&self.path, &self.whole));
        named.map_err(io(format!("name the blob {}", self.digest)))?;
        let _ = fs::remove_file(&self.sync_path);
        Ok(())
    }

    fn rehash(&mut self) -> std::io::Result<()> {
        let mut buffer = vec![0; 128 * 1024];
        self.file.seek(SeekFrom::Start(0))?;
        let mut left = self.length;
        while left > 0 {
            let want = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let got = self.file.read(&mut buffer[..want])?;
            if got == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            self.hash.update(&buffer[..got]);
            left -= got as u64;
        }
        Ok(())
    }

    /// One sector, so it is there whole or as it was.
    fn note(&mut self) -> std::io::Result<()> {
        let line = format!("{} {:020}\n", self.boot, self.synced);
        self.sync.write_all_at(line.as_bytes(), 0)?;
        if self.synced > 0 { self.sync.sync_data() } else { Ok(()) }
    }
}

fn read_note(file: &File) -> Option<(String, u64)> {
    let mut line = [0; 64];
    let got = file.read_at(&mut line, 0).ok()?;
    let line = std::str::from_utf8(&line[..got]).ok()?;
    let (boot, synced) = line.strip_suffix('\n')?.split_once(' ')?;
    Some((boot.to_owned(), synced.parse().ok()?))
}

/// Of this boot of the machine; empty where there is none to be had: then nothing unsynced counts.
fn boot_id() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().chars().filter(|c| c.is_ascii_hexdigit()).take(32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(bytes: &[u8]) -> Digest {
        Digest::from_sha256(ring::digest::digest(&SHA256, bytes).as_ref())
    }

    #[test]
    fn part_goes_on_where_it_stopped_and_is_whole_when_its_digest_says_so() {
        let dir = tempfile::tempdir().expect("a directory");
        let blobs = Blobs::new(dir.path().to_owned());
        let name = digest(b"half and half");

        let mut part = blobs.part(&name, 13).expect("new");
        part.append(b"half and").expect("written");
        drop(part); // killed
        let mut part = blobs.part(&name, 13).expect("again");
        assert_eq!(part.length(), 8);
        part.append(b" half").expect("written");

        assert!(part.verify().expect("read"));
        part.keep().expect("named");
        assert!(blobs.is_whole(&name));
        assert_eq!(fs::read_dir(dir.path()).expect("there").count(), 1);
    }

    #[test]
    fn only_synced_bytes_count_after_another_boot() {
        let dir = tempfile::tempdir().expect("a directory");
        let blobs = Blobs::new(dir.path().to_owned());
        let bytes = vec![7; SYNC_BYTES as usize + 100];
        let name = digest(&bytes);
        let mut part = blobs.part(&name, bytes.len() as u64).expect("new");
        part.append(&bytes[..SYNC_BYTES as usize]).expect("written");
        part.sync().expect("as it does after a while");
        part.append(&[0; 50]).expect("the torn tail");
        drop(part);
        let note = dir.path().join(format!("{}.sync", name.hex()));
        let text = fs::read_to_string(&note).expect("there");
        let (_, synced) = text.split_once(' ').expect("two words");
        fs::write(&note, format!("{} {synced}", "0".repeat(32))).expect("another boot");

        let mut part = blobs.part(&name, bytes.len() as u64).expect("again");

        assert_eq!(part.length(), SYNC_BYTES);
        part.append(&bytes[SYNC_BYTES as usize..]).expect("written");
        assert!(part.verify().expect("finished"));
    }

    #[test]
    fn damaged_part_starts_anew() {
        let dir = tempfile::tempdir().expect("a directory");
        let blobs = Blobs::new(dir.path().to_owned());
        let name = digest(b"good");
        let mut part = blobs.part(&name, 4).expect("new");
        part.append(b"baad").expect("written");

        assert!(!part.verify().expect("finished"));
        assert_eq!(part.length(), 0);
        part.append(b"good").expect("written");
        assert!(part.verify().expect("finished"));
    }

    #[test]
    fn note_that_makes_no_sense_means_nothing_is_here() {
        let dir = tempfile::tempdir().expect("a directory");
        let blobs = Blobs::new(dir.path().to_owned());
        let name = digest(b"good");
        fs::write(dir.path().join(format!("{}.part", name.hex())), "go").expect("written");
        for note in ["", "nonsense", "a b c\n", "0 -1\n", "\u{e9}"] {
            fs::write(dir.path().join(format!("{}.sync", name.hex())), note).expect("written");

            assert_eq!(blobs.part(&name, 4).expect("opens").length(), 0, "{note}");
        }
    }
}
