//! Lambda's external extensions: what an image has in `/opt/extensions` runs beside its command
//! (docs.aws.amazon.com/lambda, "Using the Lambda Extensions API"; the order is that of AWS's
//! runtime interface emulator, internal/lambda/rapid/handlers.go).
//!
//! ```text
//! daemon      environment ──────────────── serves the API ─ all registered ─ "go on" ─── executed
//! executor        └─ spawn each ─ names, pidfds ┘               wait ─────────────┴─ execve ─┘
//! extension              └─ registers, asks for its next event …
//! ```
//!
//! The container's first process starts them as it is about to execute the command: as the
//! function's user, inside the finished root, under its filter and within its limits. They can do
//! what the image's command can, so that where in its layers they are needs no trust. They write
//! to the function's log. The daemon gets a pidfd of each: their end is seen when it comes, though
//! the command, their parent from then on, may never reap them; with the command they all end.
//!
//! As on AWS each file in there is one, and one that can't be executed is an error with its name.
//! `extensions = false` in the manifest leaves them alone.

use super::executor::COMPLAINT_BYTES_MAX;
use super::session::ANSWER_MAX;
use super::{RuntimeError, wire};
use futures_lite::{FutureExt, future};
use rustix::net::{RecvFlags, SendFlags};
use smol::{Async, Timer};
use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const DIR: &str = "/opt/extensions";

/// AWS's own.
pub const EXTENSIONS_MAX: usize = 10;

/// What the names come with; a sentence begins with a letter.
const NAMES: u8 = b'+';

/// In AWS's words.
const LAUNCH_ERROR: &str = "Extension.LaunchError";

/// Starts all of them, if there are any, and returns when the command may be executed. An error: it
/// may not.
pub fn start_all(env: &[CString], daemon: BorrowedFd<'_>) -> Result<(), String> {
    let found = find(Path::new(DIR)).map_err(|err| format!("{LAUNCH_ERROR}: read {DIR}: {err}"))?;
    if found.is_empty() {
        return Ok(());
    }
    if found.len() > EXTENSIONS_MAX {
        return Err(format!("{LAUNCH_ERROR}: {DIR} has more than {EXTENSIONS_MAX} files, which is the most"));
    }
    // Theirs is the image's code, and this process still has the launcher's memory.
    nix::sys::prctl::set_dumpable(false).map_err(|err| format!("hide from extensions: {err}"))?;
    let mut told = vec![NAMES];
    let mut processes = Vec::with_capacity(found.len());
    for path in &found {
        let name = path.file_name().unwrap_or_default();
        processes.push(spawn(path, env).map_err(|err| {
            format!("{LAUNCH_ERROR}: extension `{}` can't be started: {err}", name.to_string_lossy())
        })?);
        told.extend_from_slice(name.as_bytes());
        told.push(0);
    }
    let processes: Vec<BorrowedFd<'_>> = processes.iter().map(AsFd::as_fd).collect();
    wire::send(daemon, &told, &processes).map_err(|err| format!("tell of extensions: {err}"))?;
    match rustix::net::recv(daemon, &mut [0_u8; 1][..], RecvFlags::empty()) {
        Ok((_, 1..)) => Ok(()),
        Ok(_) => Err("nobody waits for it any more".to_owned()),
        Err(err) => Err(format!("wait for extensions: {err}")),
    }
}

/// Each that is no directory, by name.
fn find(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Err(err) if [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory].contains(&err.kind()) => {
            return Ok(Vec::new());
        }
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if !path.is_dir() {
            found.push(path);
        }
        // One more tells that there are too many.
        if found.len() > EXTENSIONS_MAX {
            break;
        }
    }
    found.sort();
    Ok(found)
}

/// Its pidfd; it is not reaped here, so that its number stays its own.
fn spawn(path: &Path, env: &[CString]) -> io::Result<OwnedFd> {
    // The runtime's own variables (`_HANDLER`, …) are not for extensions.
    let variables = env.iter().map(|variable| variable.as_bytes()).filter(|bytes| !bytes.starts_with(b"_"));
    let pairs = variables.filter_map(|bytes| {
        let at = bytes.iter().position(|byte| *byte == b'=')?;
        Some((OsStr::from_bytes(&bytes[..at]), OsStr::from_bytes(&bytes[at + 1..])))
    });
    let child = Command::new(path).env_clear().envs(pairs).spawn()?;
    let pid = rustix::process::Pid::from_child(&child);
    Ok(rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?)
}

/// Extensions of one instance, seen from the daemon. Dropping it doesn't end them.
pub struct Extensions {
    pub names: Vec<String>,
    processes: Vec<Async<OwnedFd>>,
    late: Async<OwnedFd>,
}

/// What the first process says before, or instead of, executing its command.
pub enum Word {
    Complaint(String),
    Started(Vec<String>, Vec<Async<OwnedFd>>),
}

/// The next one; `None`: the command is being executed.
pub async fn hear(late: &Async<OwnedFd>) -> io::Result<Option<Word>> {
    let mut buffer = vec![0; COMPLAINT_BYTES_MAX];
    let told = late.read_with(|late| {
        let told = wire::receive(late, &mut buffer)?;
        Ok(told.map(|(bytes, descriptors)| (bytes.len(), descriptors)))
    });
    let silent = async {
        Timer::after(ANSWER_MAX).await;
        Err(io::ErrorKind::TimedOut.into())
    };
    let Some((length, descriptors)) = told.or(silent).await? else { return Ok(None) };
    Ok(Some(match &buffer[..length] {
        [NAMES, names @ ..] => {
            let names = names.split(|byte| *byte == 0).filter(|name| !name.is_empty());
            let names = names.map(|name| String::from_utf8_lossy(name).into_owned()).collect();
            let processes = descriptors.into_iter().map(Async::new).collect::<io::Result<_>>()?;
            Word::Started(names, processes)
        }
        text => Word::Complaint(String::from_utf8_lossy(text).into_owned()),
    }))
}

impl Extensions {
    pub fn new(names: Vec<String>, processes: Vec<Async<OwnedFd>>, late: Async<OwnedFd>) -> Self {
        Self { names, processes, late }
    }

    /// Has the command executed; returns when it is.
    pub async fn go_on(&self) -> Result<(), RuntimeError> {
        let said = async {
            self.late.write_with(|late| Ok(rustix::net::send(late, &[NAMES], SendFlags::NOSIGNAL)?)).await?;
            hear(&self.late).await
        };
        match said.await {
            Ok(Some(Word::Complaint(why))) => Err(RuntimeError::Unusable(why)),
            Err(err) if err.kind() == io::ErrorKind::TimedOut => {
                Err(RuntimeError::Launcher("an instance does not get to its command".to_owned()))
            }
            _ => Ok(()), // or it died on its way: its end tells how
        }
    }

    /// Until one has ended; its name.
    pub async fn one_ended(&self) -> &str {
        let ended = self.names.iter().zip(&self.processes).map(|(name, process)| async move {
            has_ended(process).await;
            name.as_str()
        });
        // Each is looked at whenever one moves: they are ten.
        let mut ended: Vec<_> = ended.map(Box::pin).collect();
        future::poll_fn(|context| {
            let over = ended.iter_mut().find_map(|one| match one.as_mut().poll(context) {
                std::task::Poll::Ready(name) => Some(name),
                std::task::Poll::Pending => None,
            });
            over.map_or(std::task::Poll::Pending, std::task::Poll::Ready)
        })
        .await
    }

    pub async fn all_ended(&self) {
        for process in &self.processes {
            has_ended(process).await;
        }
    }
}

/// A pidfd is readable from the end of its process on, reaped or not.
async fn has_ended(process: &Async<OwnedFd>) {
    if process.readable().await.is_err() {
        future::pending().await // it is not known
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn each_file_is_one_in_the_order_of_names_and_directories_are_not() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(find(&dir.path().join("none")).expect("none").is_empty());
        for name in ["b", "a"] {
            fs::write(dir.path().join(name), "").expect("written");
        }
        fs::create_dir(dir.path().join("lib")).expect("made");
        std::os::unix::fs::symlink("nowhere", dir.path().join("broken")).expect("made");

        let found = find(dir.path()).expect("they are read");

        assert_eq!(found, ["a", "b", "broken"].map(|name| dir.path().join(name)));
        assert!(find(&dir.path().join("a")).expect("a file is no directory").is_empty());
    }

    #[test]
    fn more_than_ten_are_told_from_ten() {
        let dir = tempfile::tempdir().expect("a directory");
        for n in 0..15 {
            fs::write(dir.path().join(n.to_string()), "").expect("written");
        }
        assert_eq!(find(dir.path()).expect("they are read").len(), EXTENSIONS_MAX + 1);
    }
}
