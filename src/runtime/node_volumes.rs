//! Directories of the node that instances have read-only, on the daemon's side: the launcher sees
//! nothing of the node's but its data directory.
//!
//! ```text
//! node.mounts ─ openat2, beneath ─ open_tree: a detached mount ──▶ launcher: ids mapped ──▶ attached in the instance
//! ```
//!
//! Looked up for each instance, so that one sees what has the name when it is made. Whoever may
//! change what is in there, or deploy, gets nothing that is not below a directory of `node.mounts`:
//! a symlink on the way that leads out of it is refused, and those within lead to places of the
//! instance. Nor what the node's own directories are in or that is in them, where they really are:
//! a link may lead from `data_dir` to what `node.mounts` names. What is mounted further below does
//! not come along. Set user ids and devices are without effect; programs run.
//!
//! A directory may be on a file system that does not answer. One opening at a time, on a thread of
//! its own, and with a limit: that costs one thread, and no other function its start.

use super::session::ANSWER_MAX;
use super::{RuntimeError, sys};
use crate::model::permissions::NodeVolume;
use futures_lite::FutureExt;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use smol::Timer;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub struct NodeVolumes {
    /// The node's alone.
    own: Vec<PathBuf>,
    /// Held by who opens.
    opening: Arc<smol::lock::Mutex<()>>,
}

impl NodeVolumes {
    pub fn new(own: [&Path; 2]) -> Self {
        Self { own: own.map(Path::to_owned).to_vec(), opening: Arc::default() }
    }

    /// A detached mount of each.
    pub async fn open(&self, volumes: &[NodeVolume]) -> Result<Vec<OwnedFd>, RuntimeError> {
        if volumes.is_empty() {
            return Ok(Vec::new());
        }
        let (opening, wanted, own) = (Arc::clone(&self.opening), volumes.to_owned(), self.own.clone());
        let opened = async move {
            let held = opening.lock_arc().await;
            smol::unblock(move || {
                let _held = held; // also by one that nobody waits for any more
                wanted.iter().map(|volume| open(volume, &own)).collect::<Result<Vec<_>, _>>()
            })
            .await
        };
        let late = async {
            Timer::after(ANSWER_MAX).await;
            let from: Vec<_> = volumes.iter().map(|volume| volume.from().display().to_string()).collect();
            let what = "its file system, or one that was asked before it, does not answer";
            Err(format!("volume.from: {} can't be opened: {what}", from.join(", ")))
        };
        opened.or(late).await.map_err(RuntimeError::Unusable)
    }
}

fn open(volume: &NodeVolume, own: &[PathBuf]) -> Result<OwnedFd, String> {
    let told = |why: String| format!("volume.from `{}`: {why}", volume.from().display());
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    // Its own name is the operator's, wherever it leads.
    let within = rustix::fs::open(&volume.within, flags, Mode::empty()).map_err(|err| {
        told(format!("open `{}`, which node.mounts names: {}", volume.within.display(), said(err)))
    })?;
    let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let below = if volume.below.as_os_str().is_empty() { Path::new(".") } else { &volume.below };
    let dir =
        rustix::fs::openat2(&within, below, flags, Mode::empty(), beneath).map_err(|err| match err {
            Errno::XDEV => told(format!("a symlink leads out of `{}`", volume.within.display())),
            err => told(said(err)),
        })?;
    let look = || fs::read_link(format!("/proc/self/fd/{}", dir.as_raw_fd()));
    let real = look().map_err(|err| told(format!("look where it leads: {err}")))?;
    // One that is not there holds nothing.
    for own in own.iter().filter_map(|own| fs::canonicalize(own).ok()) {
        if real.starts_with(&own) || own.starts_with(&real) {
            let (real, own) = (real.display(), own.display());
            return Err(told(format!(
                "it leads to `{real}`, and `{own}` is the node's alone; keep them apart"
            )));
        }
    }
    sys::detached_directory(dir).map_err(|err| told(format!("mount it: {err}")))
}

fn said(err: Errno) -> String {
    match err {
        Errno::NOENT => "there is no such directory on this node".to_owned(),
        Errno::NOTDIR => "it is no directory".to_owned(),
        err => err.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn look(within: &Path, below: &str) -> Result<(), String> {
        look_beside(within, below, &[])
    }

    fn look_beside(within: &Path, below: &str, own: &[PathBuf]) -> Result<(), String> {
        let volume = NodeVolume { within: within.into(), below: below.into(), path: "/code".into() };
        match open(&volume, own) {
            // Who is not root has found it all the same.
            Err(why) if why.contains("mount it: ") => Ok(()),
            done => done.map(drop),
        }
    }

    #[test]
    fn nothing_leads_out_of_what_may_be_mounted() {
        let dir = tempfile::tempdir().expect("a directory");
        let code = dir.path().join("code");
        fs::create_dir_all(code.join("hello/v1")).expect("made");
        fs::create_dir(dir.path().join("secret")).expect("made");
        fs::write(code.join("file"), "").expect("written");
        symlink("hello/v1", code.join("current")).expect("made");
        symlink("../secret", code.join("out")).expect("made");
        symlink("/", code.join("hello/root")).expect("made");

        for good in ["", "hello", "hello/v1", "current"] {
            assert_eq!(look(&code, good), Ok(()), "{good}");
        }
        for bad in ["out", "hello/root", "hello/root/etc", "../secret"] {
            let why = look(&code, bad).expect_err(bad);
            assert!(why.contains("a symlink leads out of"), "{bad}: {why}");
        }
        assert!(look(&code, "none").expect_err("none").contains("no such directory on this node"));
        assert!(look(&code, "file").expect_err("a file").contains("it is no directory"));
        let gone = look(&dir.path().join("gone"), "x").expect_err("gone");
        assert!(gone.contains("which node.mounts names: there is no such directory"), "{gone}");
    }

    #[test]
    fn nodes_own_directories_are_nobodys_wherever_links_have_them() {
        let dir = tempfile::tempdir().expect("a directory");
        let disk = dir.path().join("disk");
        fs::create_dir_all(disk.join("neap/volumes")).expect("made");
        fs::create_dir(disk.join("code")).expect("made");
        let data_dir = dir.path().join("data");
        symlink(disk.join("neap"), &data_dir).expect("made");
        let own = [data_dir, dir.path().join("none")];

        for bad in ["", "neap", "neap/volumes"] {
            let why = look_beside(&disk, bad, &own).expect_err(bad);
            assert!(why.contains("is the node's alone; keep them apart"), "{bad}: {why}");
        }
        assert_eq!(look_beside(&disk, "code", &own), Ok(()));
    }
}
