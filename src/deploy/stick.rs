//! Archives that appear in `[images] import_dir`: imported once, each with a result file beside it.
//!
//! The directory is on a stick that anybody may have written, and that goes from node to node: the
//! result file says what became of the archive on this node, and what others said before. Nothing
//! on it is followed: neither links nor what a name means the second time it is asked for.

use super::Deployer;
use super::pull::Later;
use crate::errors::chain;
use crate::image::ImageError;
use crate::model::Reference;
use crate::model::api::ImageSummary;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use serde::{Deserialize, Serialize};
use smol::Timer;
use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// How often the directory is looked at; an archive is taken when it was the same twice.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Archives in the directory; more than fit on a stick are not looked at.
const ARCHIVES_MAX: usize = 256;
const ARCHIVE_BUFFER_BYTES: usize = 128 * 1024;
/// A larger result file is none of ours, and is replaced.
const RESULT_BYTES_MAX: u64 = 1 << 20;
/// Other nodes whose word is kept; the oldest goes.
const OTHERS_MAX: usize = 64;

/// What an archive looks like from outside; another size or time is another archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Looks {
    bytes: u64,
    modified_ms: u64,
}

/// What became of an archive on one node.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Outcome {
    #[serde(default)]
    node: String,
    archive: Looks,
    ok: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    image: Option<ImageSummary>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// The node's trouble and not the archive's: it is tried again when it is seen anew.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    passing: bool,
}

/// FILE.tar.result
#[derive(Debug, Serialize, Deserialize)]
struct Outcomes {
    /// The last node's.
    #[serde(flatten)]
    last: Outcome,
    /// Of nodes that it came from, the last one first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    others: Vec<Outcome>,
}

impl Outcomes {
    fn of(self, node: &str) -> Option<Outcome> {
        std::iter::once(self.last).chain(self.others).find(|outcome| outcome.node == node)
    }

    /// `known`: what the file said so far.
    fn new(last: Outcome, known: Option<Self>) -> Self {
        let known = known.into_iter().flat_map(|known| std::iter::once(known.last).chain(known.others));
        let others = known.filter(|outcome| outcome.node != last.node && !outcome.node.is_empty());
        let others = others.take(OTHERS_MAX).collect();
        Self { last, others }
    }
}

impl Deployer {
    /// Imports what appears in `[images] import_dir`, for ever.
    pub async fn watch_imports(self: Arc<Self>) {
        let mut seen: HashMap<OsString, Looks> = HashMap::new();
        let mut done: HashMap<OsString, Looks> = HashMap::new();
        let mut told = String::new();
        loop {
            Timer::after(LOOK_EVERY).await;
            let Some(dir) = self.config.get().images.import_dir.clone() else {
                (seen, done) = Default::default();
                continue;
            };
            // A stick may be slow or on its way out: not on the thread that all else runs on.
            let path = dir.clone();
            let now = match smol::unblock(move || open(&path)?.map(Stick::archives).transpose()).await {
                Ok(now) => now.unwrap_or_default(),
                Err(error) => {
                    let error = error.to_string();
                    if told != error {
                        tracing::warn!(import_dir = %dir.display(), error, "it can't be looked at");
                        told = error;
                    }
                    continue;
                }
            };
            told.clear();
            done.retain(|name, looks| now.get(name) == Some(looks));
            for (name, looks) in &now {
                if seen.get(name) == Some(looks) && done.get(name) != Some(looks) {
                    self.import_archive(&dir, name, *looks).await;
                    done.insert(name.clone(), *looks);
                }
            }
            seen = now;
        }
    }

    async fn import_archive(&self, dir: &Path, name: &OsString, looks: Looks) {
        let node = self.config.get().node.id.clone();
        let shown = dir.join(name);
        let (path, archive, asked) = (dir.to_owned(), name.clone(), node.clone());
        let images = self.images.clone();
        // What was removed since, or is damaged, comes again.
        let whole = move |digest: &str| {
            images.find(digest).is_ok_and(|image| {
                images.damaged().is_ok_and(|damaged| !images.is_damaged(&image.digest, &damaged))
            })
        };
        let opened = smol::unblock(move || -> io::Result<_> {
            let Some(stick) = open(&path)? else { return Ok(None) };
            let known = stick.outcomes(&archive).and_then(|known| known.of(&asked));
            if let Some(known) = known.filter(|known| known.archive == looks && !known.passing)
                && (!known.ok || known.image.is_some_and(|image| whole(&image.digest)))
            {
                tracing::info!(archive = ?archive, ok = known.ok, "skipped: it was taken before, see its result file");
                return Ok(None); // from before a restart, or it was here before
            }
            Ok(Some((stick.read(&archive), stick)))
        });
        let (file, stick) = match opened.await {
            Ok(Some(opened)) => opened,
            Ok(None) => return,
            Err(error) => return tracing::warn!(archive = %shown.display(), %error, "it is gone again"),
        };
        let imported = async {
            let file = file.map_err(|error| (format!("open it: {error}"), true))?;
            let (progress, _ignored) = smol::channel::bounded(1);
            // Its own default is a buffer of 8 MiB.
            let file = smol::Unblock::with_capacity(ARCHIVE_BUFFER_BYTES, file);
            let imported = self.images.import(file, None, progress).await;
            imported.map_err(|error| (chain(&error), !matches!(error, ImageError::Refused(_))))
        };
        let (image, error, passing) = match imported.await {
            Ok(image) => {
                tracing::info!(archive = %shown.display(), digest = image.digest, "image imported");
                // Whoever lacks it looks again.
                if let Some(Ok(name)) = image.references.first().map(|name| Reference::parse(name)) {
                    let _ = self.waiting.later.0.send(Later::Look(name)).await;
                }
                (Some(image), None, false)
            }
            Err((error, passing)) => {
                tracing::warn!(archive = %shown.display(), error, "image not imported");
                (None, Some(error), passing)
            }
        };
        let outcome = Outcome { node, archive: looks, ok: image.is_some(), image, error, passing };
        let archive = name.clone();
        if let Err(error) = smol::unblock(move || stick.note(&archive, outcome)).await {
            // A stick that is write-protected: it is not imported again before it changes.
            tracing::warn!(archive = %shown.display(), %error, "the result could not be written");
        }
    }
}

/// The directory, held: whatever its name leads to by now.
struct Stick(OwnedFd);

/// `None`: it is not there, or not mounted.
fn open(dir: &Path) -> io::Result<Option<Stick>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::open(dir, flags, Mode::empty()) {
        Ok(stick) => Ok(Some(Stick(stick))),
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(rustix::io::Errno::LOOP | rustix::io::Errno::NOTDIR) => {
            Err(io::Error::other("it is no directory; a link is not followed, name what it leads to"))
        }
        Err(errno) => Err(errno.into()),
    }
}

impl Stick {
    /// Regular files called *.tar, with what they look like.
    fn archives(self) -> io::Result<HashMap<OsString, Looks>> {
        let mut found = HashMap::new();
        for entry in Dir::read_from(&self.0)? {
            let name = entry?.file_name().to_bytes().to_vec();
            if !name.ends_with(b".tar") || name.starts_with(b".") {
                continue;
            }
            let Ok(stat) = rustix::fs::statat(&self.0, &name[..], AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && found.len() < ARCHIVES_MAX {
                found.insert(OsString::from_vec(name), looks(&stat));
            }
        }
        Ok(found)
    }

    fn open(&self, name: &OsString, flags: OFlags) -> io::Result<File> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.0, name, flags, Mode::from_raw_mode(0o644))?.into())
    }

    /// A regular file, which is looked at before it is opened: opening a device is an act (a watchdog
    /// begins to count), and on a stick its name may be anything.
    fn read(&self, name: &OsString) -> io::Result<File> {
        let found = self.open(name, OFlags::PATH)?;
        let stat = rustix::fs::fstat(&found)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(io::Error::other("it is no regular file"));
        }
        File::open(format!("/proc/self/fd/{}", found.as_raw_fd()))
    }

    fn outcomes(&self, archive: &OsString) -> Option<Outcomes> {
        let file = self.read(&result(archive)).ok()?;
        let mut text = Vec::new();
        file.take(RESULT_BYTES_MAX).read_to_end(&mut text).ok()?;
        serde_json::from_slice(&text).ok()
    }

    fn note(&self, archive: &OsString, outcome: Outcome) -> io::Result<()> {
        let text = |outcomes: &Outcomes| -> io::Result<Vec<u8>> {
            let mut text = serde_json::to_vec_pretty(outcomes)?;
            text.push(b'\n');
            Ok(text)
        };
        let mut said = text(&Outcomes::new(outcome.clone(), self.outcomes(archive)))?;
        if said.len() as u64 >= RESULT_BYTES_MAX {
            said = text(&Outcomes::new(outcome, None))?;
        }
        let (name, mut temporary) = (result(archive), result(archive));
        temporary.push("-new");
        // Never through a link that somebody laid there.
        let _ = rustix::fs::unlinkat(&self.0, &temporary, AtFlags::empty());
        let mut file = self.open(&temporary, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL)?;
        file.write_all(&said)?;
        file.sync_all()?;
        Ok(rustix::fs::renameat(&self.0, &temporary, &self.0, &name)?)
    }
}

fn result(archive: &OsString) -> OsString {
    let mut name = archive.clone();
    name.push(".result");
    name
}

#[allow(clippy::useless_conversion, clippy::unnecessary_cast)] // the widths differ between architectures
fn looks(stat: &rustix::fs::Stat) -> Looks {
    let ms = stat.st_mtime as i64 * 1000 + stat.st_mtime_nsec as i64 / 1_000_000;
    Looks { bytes: stat.st_size as u64, modified_ms: ms.max(0) as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(node: &str) -> Outcome {
        let archive = Looks { bytes: 1, modified_ms: 2 };
        Outcome {
            node: node.into(),
            archive,
            ok: false,
            image: None,
            error: Some("no".into()),
            passing: false,
        }
    }

    #[test]
    fn result_file_keeps_the_word_of_each_node_that_the_stick_has_been_to() {
        let dir = tempfile::tempdir().expect("a directory");
        let name = OsString::from("app.tar");
        let stick = || open(dir.path()).expect("opens").expect("is there");
        let of = |node: &str| stick().outcomes(&name).and_then(|known| known.of(node));

        // As the version before wrote it.
        let old = "{\"archive\": {\"bytes\": 1, \"modified_ms\": 2}, \"ok\": true}";
        std::fs::write(dir.path().join("app.tar.result"), old).expect("written");
        assert!(of("gw-1").is_none());
        for node in ["gw-1", "gw-2", "gw-1", "gw-3"] {
            stick().note(&name, outcome(node)).expect("written");
        }

        let known = stick().outcomes(&name).expect("there");
        assert_eq!(known.last.node, "gw-3");
        assert_eq!(known.others.iter().map(|o| &o.node[..]).collect::<Vec<_>>(), ["gw-1", "gw-2"]);
        assert_eq!(of("gw-2").expect("kept").archive, Looks { bytes: 1, modified_ms: 2 });
        assert!(of("gw-4").is_none());
        for number in 0..OTHERS_MAX * 2 {
            stick().note(&name, outcome(&format!("more-{number}"))).expect("written");
        }
        assert_eq!(stick().outcomes(&name).expect("there").others.len(), OTHERS_MAX);
    }

    #[test]
    fn device_on_a_stick_is_not_opened() {
        let dir = tempfile::tempdir().expect("a directory");
        let name = OsString::from("app.tar");
        let device = dir.path().join("app.tar.result");
        // 5:2 is /dev/ptmx: to open it makes a terminal, which shows.
        let mode = Mode::from_raw_mode(0o666);
        let made = rustix::fs::mknodat(
            rustix::fs::CWD,
            &device,
            FileType::CharacterDevice,
            mode,
            rustix::fs::makedev(5, 2),
        );
        if made.is_err() {
            return eprintln!("skipped: devices can't be made here");
        }
        let stick = open(dir.path()).expect("opens").expect("is there");

        let refused = stick.read(&result(&name)).expect_err("no regular file");

        assert!(refused.to_string().contains("regular"), "{refused}");
        assert!(stick.outcomes(&name).is_none());
        std::fs::write(dir.path().join("app.tar"), "x").expect("written");
        let mut text = String::new();
        stick.read(&name).and_then(|mut file| file.read_to_string(&mut text)).expect("reads");
        assert_eq!(text, "x");
    }

    #[test]
    fn nothing_on_a_stick_is_followed() {
        let (dir, other) = (tempfile::tempdir().expect("one"), tempfile::tempdir().expect("another"));
        let victim = other.path().join("victim");
        std::fs::write(&victim, "mine").expect("written");
        let link = |name: &str| std::os::unix::fs::symlink(&victim, dir.path().join(name)).expect("a link");
        std::fs::write(dir.path().join("good.tar"), "x").expect("written");
        std::fs::write(dir.path().join(".hidden.tar"), "x").expect("written");
        std::fs::create_dir(dir.path().join("dir.tar")).expect("made");
        for name in ["link.tar", "good.tar.result", "good.tar.result-new"] {
            link(name);
        }

        let stick = open(dir.path()).expect("opens").expect("is there");
        let name = OsString::from("good.tar");
        assert!(stick.outcomes(&name).is_none());
        stick.note(&name, outcome("gw")).expect("written");

        assert_eq!(stick.archives().expect("lists").into_keys().collect::<Vec<_>>(), ["good.tar"]);
        assert_eq!(std::fs::read(&victim).expect("there"), b"mine");
        assert!(dir.path().join("good.tar.result").symlink_metadata().expect("there").is_file());
        // The directory itself.
        std::os::unix::fs::symlink(dir.path(), other.path().join("images")).expect("a link");
        assert!(open(&other.path().join("images")).is_err());
        assert!(open(&other.path().join("nothing")).expect("no error").is_none());
    }
}
