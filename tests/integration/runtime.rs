//! Real containers, as root: what a function is shut in, what its limits do, and that nothing is
//! left of a launcher or daemon that was killed.

use neap::config::UserNamespaces;
use neap::model::function::{Limits, UID_BASE_FIRST};
use neap::runtime::{Exit, Parked, Root, Running, Runtime, RuntimeError, Settings};
use smol::future::FutureExt;
use smol::io::AsyncReadExt;
use smol::io::AsyncWriteExt;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

const MIB: u64 = 1024 * 1024;

#[test]
fn command_runs_and_its_output_and_exit_code_come_back() {
    run(async |node| {
        let outcome = node.shell("cat; echo to the log >&2; exit 7").await;

        assert_eq!(outcome.stdout, "");
        assert_eq!(outcome.stderr, "to the log\n");
        assert_eq!(outcome.exit, Exit::Code(7));
    });
}

struct Outcome {
    stdout: String,
    stderr: String,
    exit: Exit,
}

/// A runtime with a data directory and a cgroup of its own, and a busybox image.
struct Node {
    runtime: Runtime,
    dir: tempfile::TempDir,
    cgroup: String,
}

impl Node {
    fn settings(dir: &Path, cgroup: &str) -> Settings {
        Settings {
            exe: PathBuf::from(env!("CARGO_BIN_EXE_neap")),
            run_dir: dir.join("run"),
            data_dir: dir.join("data"),
            cgroup: cgroup.to_owned(),
            user_namespaces: UserNamespaces::Require,
        }
    }

    fn start() -> Self {
        static NODES: AtomicU32 = AtomicU32::new(0);
        let dir = tempfile::tempdir().expect("a temporary directory");
        let number = NODES.fetch_add(1, Ordering::Relaxed);
        let cgroup = format!("neap-test-{}-{number}", std::process::id());
        fs::create_dir_all(dir.path().join("data")).expect("a data directory");
        busybox(&dir.path().join("data/base"));
        let runtime = Runtime::start(Self::settings(dir.path(), &cgroup)).expect("the launcher starts");
        Self { runtime, dir, cgroup }
    }

    fn root(&self, key: &str, command: &[&str]) -> Root {
        Root {
            key: key.to_owned(),
            layers: vec![self.dir.path().join("data/base")],
            uid_base: UID_BASE_FIRST,
            command: command.iter().map(|arg| arg.to_string()).collect(),
            env: vec!["COLOUR=blue".to_owned()],
            user: String::new(),
            working_dir: String::new(),
            limits: Limits {
                memory_bytes: 64 * MIB,
                cpu_millis: 1000,
                pids: 64,
                timeout: Duration::from_secs(30),
                payload_bytes: MIB,
                disk_bytes: 4 * MIB,
            },
        }
    }

    async fn shell(&self, script: &str) -> Outcome {
        self.once(self.root("shell.1", &["sh", "-c", script])).await
    }

    async fn once(&self, root: Root) -> Outcome {
        let key = root.key.clone();
        self.runtime.prepare(root).await.expect("prepared");
        let parked = self.runtime.create(&key).await.expect("created");
        finish(parked.start(vec![]).await.expect("started"), b"").await
    }
}

async fn finish(mut running: Running, input: &[u8]) -> Outcome {
    let mut stdin = running.stdin.take().expect("stdin");
    let mut out = running.stdout.take().expect("stdout");
    let mut err = running.stderr.take().expect("stderr");
    let _ = stdin.write_all(input).await;
    drop(stdin);
    let (mut stdout, mut stderr) = (String::new(), String::new());
    let reading = smol::future::zip(out.read_to_string(&mut stdout), err.read_to_string(&mut stderr));
    let (a, b) = reading.await;
    a.expect("stdout is text");
    b.expect("stderr is text");
    Outcome { stdout, stderr, exit: running.wait().await }
}

/// Runs a test on a node of its own, with the client driven beside it, and takes all down.
fn run(test: impl AsyncFnOnce(&Node)) {
    let node = Node::start();
    let driving = async {
        node.runtime.drive().await;
        panic!("the runtime ended by itself");
    };
    let limited = async {
        smol::Timer::after(Duration::from_secs(60)).await;
        panic!("the test takes longer than a minute");
    };
    smol::block_on(test(&node).or(driving).or(limited));
    smol::block_on(node.runtime.stop());
}

/// An unpacked layer: busybox, its commands, and a few files that programs look for.
fn busybox(root: &Path) {
    for dir in ["bin", "etc", "home/app"] {
        fs::create_dir_all(root.join(dir)).expect("a directory");
    }
    fs::copy("/bin/busybox", root.join("bin/busybox"))
        .expect("the Debian package busybox-static is installed");
    fs::set_permissions(root.join("bin/busybox"), fs::Permissions::from_mode(0o755)).expect("executable");
    for name in ["sh", "cat", "echo", "id", "ls", "sleep", "true", "stat", "hostname", "touch", "head", "env"]
    {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).expect("a symlink");
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n")
        .expect("written");
    fs::write(root.join("etc/group"), "root:x:0:\napp:x:1001:\naudio:x:29:app\n").expect("written");
}
