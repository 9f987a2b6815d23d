//! What the tests of this binary share: real brokers, a real daemon, a broker that writes down
//! what it acknowledged, and ways to wait for a state instead of for a time.
//!
//! Everything lives below a `TestDir` of its own and ends with its owner's drop, so that tests
//! run side by side. A child that is started here dies with the thread that started it
//! (`setpriv --pdeathsig`): a test run that is killed leaves nothing behind.

// Each test file uses its own part of this.
#![allow(dead_code)]

pub mod client;
pub mod http;
pub mod image;
pub mod mosquitto;
pub mod node;
pub mod packet;
pub mod proxy;
pub mod python;
pub mod receiver;
pub mod recording;
pub mod registry;
pub mod rust;
pub mod tls;

#[allow(unused_imports)]
pub use client::{Message, Subscriber, publish, publish_lines, publish_with};
#[allow(unused_imports)]
pub use image::shell_image;
#[allow(unused_imports)]
pub use mosquitto::Mosquitto;
#[allow(unused_imports)]
pub use node::Node;
#[allow(unused_imports)]
pub use recording::RecordingBroker;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

/// Polls until `condition` holds; panics with `what` when it doesn't within `deadline`.
#[track_caller]
pub fn wait_until(deadline: Duration, what: &str, condition: impl FnMut() -> bool) {
    assert!(holds_within(deadline, condition), "waited {deadline:?} for: {what}");
}

/// Like `wait_until`, for a value.
#[track_caller]
pub fn wait_for<T>(deadline: Duration, what: &str, mut value: impl FnMut() -> Option<T>) -> T {
    let mut found = None;
    wait_until(deadline, what, || {
        found = value();
        found.is_some()
    });
    found.expect("wait_until returned, so there is a value")
}

/// Whether `condition` came to hold within `deadline`.
pub fn holds_within(deadline: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + deadline;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A loopback port that nothing listens on. Below the kernel's ephemeral range, so that no
/// outgoing connection takes it between here and its use, and never given twice by one process.
pub fn free_port() -> u16 {
    const FIRST: u16 = 10_000;
    const COUNT: u16 = 20_000;
    static NEXT: OnceLock<AtomicU16> = OnceLock::new();
    let next = NEXT.get_or_init(|| AtomicU16::new(fastrand::u16(..COUNT)));

    for _ in 0..COUNT {
        let port = FIRST + next.fetch_add(1, Ordering::Relaxed) % COUNT;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no free loopback port from {FIRST} on");
}

pub fn accepts(port: u16) -> bool {
    std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
}

/// Whether this process may run containers. A test that gets `false` returns; in CI it fails
/// instead, so that nothing is skipped unseen.
#[track_caller]
pub fn privileged(test: &str) -> bool {
    if nix::unistd::geteuid().is_root() {
        return true;
    }
    skip(test, "containers need root")
}

/// Whether a program that a test needs is there; in CI its absence fails the test.
#[track_caller]
pub fn have(test: &str, program: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let sbin = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    if std::env::split_paths(&paths).chain(sbin).any(|dir| dir.join(program).is_file()) {
        return true;
    }
    skip(test, &format!("`{program}` is not installed"))
}

#[track_caller]
pub fn skip(test: &str, why: &str) -> bool {
    assert!(std::env::var_os("CI").is_none(), "{test}: {why}, and in CI no test is skipped");
    eprintln!("{test}: skipped: {why}");
    false
}

/// A directory below cargo's target directory: on a real file system (id-mapped mounts need
/// one), removed with its owner unless the test failed.
#[derive(Debug)]
pub struct TestDir {
    path: PathBuf,
}

impl TestDir {
    pub fn new(name: &str) -> Self {
        // A Unix socket's path has 108 bytes; a deep checkout leaves too few of them.
        let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let base = if target.as_os_str().len() <= 50 { target.to_owned() } else { std::env::temp_dir() };
        let path = base.join(format!("{name}-{:08x}", fastrand::u32(..)));
        std::fs::create_dir_all(&path).expect("make the test's directory");
        Self { path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.join(name);
        std::fs::create_dir_all(path.parent().expect("a file has a parent")).expect("make a directory");
        std::fs::write(&path, content).expect("write a test's file");
        path
    }
}

impl Drop for TestDir {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("kept for a look: {}", self.path.display());
        } else {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// A command whose process dies with the thread that starts it.
pub fn tied(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// Sends `signal`; a process that is gone is no error.
pub fn signal(child: &Child, signal: nix::sys::signal::Signal) {
    let _ = nix::sys::signal::kill(pid(child), signal);
}

pub fn pid(child: &Child) -> nix::unistd::Pid {
    nix::unistd::Pid::from_raw(i32::try_from(child.id()).expect("a pid is an i32"))
}

/// SIGTERM, then SIGKILL when `grace` is over. `None`: it had to be killed.
pub fn terminate(child: &mut Child, grace: Duration) -> Option<ExitStatus> {
    signal(child, nix::sys::signal::Signal::SIGTERM);
    let mut status = None;
    if !holds_within(grace, || {
        status = child.try_wait().expect("wait for a child");
        status.is_some()
    }) {
        let _ = child.kill();
        let _ = child.wait();
    }
    status
}

/// The end of a file, for a failed test's output.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
