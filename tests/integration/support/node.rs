//! A real `neap daemon`, with a data directory, sockets and a cgroup of its own, so that nodes
//! run side by side and none sweeps another's.
//!
//! When its owner drops it, it is stopped by SIGTERM and must leave nothing: no process, no
//! mount, no cgroup. A node that was killed and not started again is swept here instead.

use super::http::{self, Response};
use super::{TestDir, free_port, holds_within, signal, tail, terminate, tied, wait_until};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

/// Set for the daemon and inherited by some of its children; its launchers have an empty
/// environment, but the node's directory is among their arguments.
const MARK: &str = "NEAP_TEST_NODE";

/// A loaded test machine compiles beside this.
const START: Duration = Duration::from_secs(60);
const STOP: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub struct Node {
    dir: TestDir,
    name: String,
    cgroup: String,
    port: u16,
    child: Option<Child>,
    env: Vec<(String, String)>,
}

#[derive(Debug, Default)]
pub struct Builder {
    name: String,
    node: String,
    http: String,
    mqtt: String,
    uplink: String,
    rest: String,
    functions: Vec<(String, String)>,
}

impl Builder {
    /// A line more in `[node]`; the others alike.
    pub fn node_line(mut self, line: &str) -> Self {
        let _ = writeln!(self.node, "{line}");
        self
    }

    pub fn http_line(mut self, line: &str) -> Self {
        let _ = writeln!(self.http, "{line}");
        self
    }

    /// The broker on site.
    pub fn mqtt(self, url: &str) -> Self {
        self.mqtt_line(&format!("url = \"{url}\""))
    }

    pub fn mqtt_line(mut self, line: &str) -> Self {
        let _ = writeln!(self.mqtt, "{line}");
        self
    }

    pub fn uplink(self, url: &str) -> Self {
        self.uplink_line(&format!("url = \"{url}\""))
    }

    pub fn uplink_line(mut self, line: &str) -> Self {
        let _ = writeln!(self.uplink, "{line}");
        self
    }

    /// Tables more: `[buffer]`, `[[forward]]`.
    pub fn config(mut self, text: &str) -> Self {
        self.rest.push_str(text);
        self.rest.push('\n');
        self
    }

    /// A manifest in functions_dir.
    pub fn function(mut self, file: &str, manifest: &str) -> Self {
        self.functions.push((file.to_owned(), manifest.to_owned()));
        self
    }

    /// Its files, nothing started.
    pub fn stopped(self) -> Node {
        let dir = TestDir::new(&self.name);
        let cgroup = format!("neap-test-{}-{:08x}", self.name, fastrand::u32(..));
        let port = free_port();
        let path = |name: &str| dir.join(name).display().to_string();
        let mut text = format!(
            "[node]\nid = \"{}\"\ndata_dir = \"{}\"\nrun_dir = \"{}\"\nfunctions_dir = \"{}\"\n\
             cgroup = \"{cgroup}\"\n{}\n[http]\nlisten = \"127.0.0.1:{port}\"\n{}\n",
            self.name,
            path("data"),
            path("run"),
            path("functions.d"),
            self.node,
            self.http,
        );
        for (table, lines) in [("mqtt", &self.mqtt), ("uplink", &self.uplink)] {
            if !lines.is_empty() {
                let _ = writeln!(text, "[{table}]\n{lines}");
            }
        }
        text.push_str(&self.rest);
        dir.write("neap.toml", text);
        std::fs::create_dir_all(dir.join("functions.d")).expect("make functions.d");
        for (file, manifest) in &self.functions {
            dir.write(&format!("functions.d/{file}"), manifest);
        }
        Node { dir, name: self.name, cgroup, port, child: None, env: Vec::new() }
    }

    /// Returns when the node is ready.
    pub fn start(self) -> Node {
        let mut node = self.stopped();
        node.start();
        node
    }
}

impl Node {
    /// `name`: the node's id, and part of its directory's name.
    pub fn builder(name: &str) -> Builder {
        Builder { name: name.to_owned(), ..Builder::default() }
    }

    pub fn dir(&self) -> &TestDir {
        &self.dir
    }

    pub fn config_file(&self) -> PathBuf {
        self.dir.join("neap.toml")
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.join("run/neap.sock")
    }

    /// Of the HTTP listener.
    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn cgroup(&self) -> &str {
        &self.cgroup
    }

    /// Of the daemon, from its next start on.
    pub fn env(&mut self, name: &str, value: &str) {
        self.env.push((name.to_owned(), value.to_owned()));
    }

    /// Starts the daemon without waiting for it.
    pub fn spawn(&mut self) {
        assert!(self.child.is_none(), "node `{}` runs already", self.name);
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.stderr_file())
            .expect("open the daemon's stderr");
        let child = tied(env!("CARGO_BIN_EXE_neap"))
            .arg("daemon")
            .arg("--config")
            .arg(self.config_file())
            .env(MARK, &self.cgroup)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("clone a descriptor"))
            .stderr(log)
            .spawn()
            .expect("start the daemon");
        self.child = Some(child);
    }

    /// Starts the daemon; returns when `/readyz` says so and the socket is there.
    pub fn start(&mut self) {
        self.spawn();
        let (port, socket, log) = (self.port, self.socket(), self.stderr_file());
        let child = self.child.as_mut().expect("just started");
        wait_until(START, &format!("node `{}` is ready", self.name), || {
            if let Some(status) = child.try_wait().expect("wait for the daemon") {
                panic!("the daemon ended: {status}\n{}", tail(&log, 50));
            }
            socket.exists() && http::get(port, "/readyz").is_ok_and(|answer| answer.status == 200)
        });
    }

    pub fn running(&mut self) -> bool {
        match &mut self.child {
            Some(child) => child.try_wait().expect("wait for the daemon").is_none(),
            None => false,
        }
    }

    /// SIGKILL to the daemon alone; the launcher must follow by itself.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("kill the daemon");
            child.wait().expect("wait for the daemon");
        }
    }

    /// SIGTERM; its exit status.
    pub fn stop(&mut self) -> ExitStatus {
        let mut child = self.child.take().expect("the node runs");
        terminate(&mut child, STOP).unwrap_or_else(|| {
            panic!("the daemon did not stop in {STOP:?}\n{}", tail(&self.stderr_file(), 50))
        })
    }

    /// Waits for the daemon to end by itself.
    pub fn wait(&mut self, deadline: Duration) -> ExitStatus {
        let mut child = self.child.take().expect("the node runs");
        super::wait_for(deadline, "the daemon ends", || child.try_wait().expect("wait for the daemon"))
    }

    pub fn restart(&mut self) {
        self.stop();
        self.start();
    }

    pub fn signal(&self, which: Signal) {
        signal(self.child.as_ref().expect("the node runs"), which);
    }

    pub fn daemon_pid(&self) -> u32 {
        self.child.as_ref().expect("the node runs").id()
    }

    /// The daemon's own memory (VmRSS).
    pub fn daemon_memory_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.daemon_pid())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a process has memory");
        line.trim().trim_end_matches(" kB").trim().parse().expect("a number")
    }

    /// Processes started as `neap launcher` by this node's daemon, innermost last.
    pub fn launcher_pids(&self) -> Vec<i32> {
        // A parked instance is the launcher's fork, with its arguments.
        let instances = self.instance_pids();
        let mut pids: Vec<i32> = self
            .processes()
            .into_iter()
            .filter(|pid| !instances.contains(pid))
            .filter(|pid| {
                let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                command.split(|&byte| byte == 0).nth(1) == Some(b"launcher")
            })
            .collect();
        pids.sort_unstable();
        pids
    }

    /// SIGKILL to one of the launcher's processes (`choice` modulo their number); whether there
    /// was one.
    pub fn kill_launcher(&self, choice: usize) -> bool {
        let pids = self.launcher_pids();
        let Some(&pid) = pids.get(choice % pids.len().max(1)) else { return false };
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL).is_ok()
    }

    /// The command line, against this node.
    pub fn neap(&self, arguments: &[&str]) -> Output {
        self.neap_command(arguments).output().expect("run neap")
    }

    pub fn neap_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_neap"));
        command.args(arguments).env("NEAP_SOCKET", self.socket()).stdin(Stdio::null());
        command
    }

    /// The same; panics unless it succeeds. Its stdout.
    #[track_caller]
    pub fn neap_ok(&self, arguments: &[&str]) -> String {
        let output = self.neap(arguments);
        assert!(
            output.status.success(),
            "neap {}: {}\nstdout: {}\nstderr: {}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).expect("neap writes UTF-8")
    }

    /// With `--output json`.
    #[track_caller]
    pub fn neap_json(&self, arguments: &[&str]) -> Value {
        let mut all = arguments.to_vec();
        all.extend(["--output", "json"]);
        let text = self.neap_ok(&all);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in: {text}"))
    }

    #[track_caller]
    pub fn import(&self, archive: &Path) {
        self.neap_ok(&["image", "import", archive.to_str().expect("the path is UTF-8")]);
    }

    /// Deploys a manifest given as text.
    #[track_caller]
    pub fn deploy(&self, manifest: &str) {
        let file = self.dir.write(&format!("deploy-{:08x}.toml", fastrand::u32(..)), manifest);
        self.neap_ok(&["deploy", file.to_str().expect("the path is UTF-8")]);
    }

    #[track_caller]
    pub fn status(&self) -> Value {
        self.neap_json(&["status"])
    }

    /// `up`, `connecting`, `waiting` or `off`; `link`: `mqtt` or `uplink`.
    pub fn link_state(&self, link: &str) -> String {
        let status = self.status();
        let links = status["links"].as_array().cloned().unwrap_or_default();
        links
            .iter()
            .find(|known| known["name"] == link)
            .and_then(|known| known["state"].as_str())
            .unwrap_or("missing")
            .to_owned()
    }

    #[track_caller]
    pub fn wait_link(&self, link: &str, state: &str) {
        wait_until(Duration::from_secs(60), &format!("link `{link}` is {state}"), || {
            self.link_state(link) == state
        });
    }

    pub fn get(&self, path: &str) -> Response {
        http::get(self.port, path).unwrap_or_else(|error| panic!("GET {path}: {error}"))
    }

    pub fn post(&self, path: &str, body: impl AsRef<[u8]>) -> Response {
        http::post(self.port, path, body).unwrap_or_else(|error| panic!("POST {path}: {error}"))
    }

    pub fn stderr_file(&self) -> PathBuf {
        self.dir.join("stderr")
    }

    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.stderr_file()).unwrap_or_default()).into_owned()
    }

    /// Processes, mounts and cgroups of this node that exist now, a line each. The daemon's own
    /// process is one.
    pub fn leftovers(&self) -> Vec<String> {
        let mut found = Vec::new();
        for pid in self.processes() {
            let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            found.push(format!("process {pid}: {command}"));
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let dir = self.dir.path().display().to_string();
        found.extend(mounts.lines().filter(|line| line.contains(&dir)).map(|line| format!("mount {line}")));
        for parent in self.cgroup_parents() {
            found.extend(children(&parent).into_iter().map(|dir| format!("cgroup {}", dir.display())));
        }
        found
    }

    /// Processes with this node's mark or directory, and those in its cgroups (a container has
    /// neither).
    fn processes(&self) -> Vec<i32> {
        let mark = format!("{MARK}={}", self.cgroup);
        let dir = self.dir.path().display().to_string();
        let mut pids: Vec<i32> = std::fs::read_dir("/proc")
            .expect("list /proc")
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| {
                let read = |name: &str| std::fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
                read("environ").split(|&byte| byte == 0).any(|variable| variable == mark.as_bytes())
                    || String::from_utf8_lossy(&read("cmdline")).contains(&dir)
            })
            .collect();
        pids.extend(self.instance_pids());
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    /// Processes in this node's cgroups: those of instances, parked and running.
    pub fn instance_pids(&self) -> BTreeSet<i32> {
        self.instance_processes().into_iter().map(|(_, pid)| pid).collect()
    }

    /// The same, each with its instance's cgroup: making one instance takes several processes.
    pub fn instance_processes(&self) -> BTreeSet<(PathBuf, i32)> {
        let mut pids = BTreeSet::new();
        let mut parents = self.cgroup_parents();
        while let Some(dir) = parents.pop() {
            // On v2 the daemon may stand in a leaf beside them.
            if dir.ends_with("daemon") {
                continue;
            }
            let text = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            pids.extend(text.lines().filter_map(|line| Some((dir.clone(), line.parse().ok()?))));
            parents.extend(children(&dir));
        }
        pids
    }

    /// Directories in this node's cgroups, at any depth.
    pub fn cgroup_count(&self) -> usize {
        let mut found = self.cgroup_parents();
        let mut count = 0;
        while let Some(dir) = found.pop() {
            count += 1;
            found.extend(children(&dir));
        }
        count
    }

    /// What `neap show` says of a function.
    #[track_caller]
    pub fn function(&self, name: &str) -> Value {
        self.neap_json(&["show", name])
    }

    /// Waits until so many instances of a function are parked.
    #[track_caller]
    pub fn wait_parked(&self, name: &str, count: u64) {
        let mut last = Value::Null;
        let holds = holds_within(Duration::from_secs(60), || {
            last = self.function(name)["parked"].clone();
            last == count
        });
        assert!(holds, "{count} instances of {name} are parked: {last}");
    }

    /// The directories of the node's cgroup: one on v2, one for each hierarchy on v1.
    fn cgroup_parents(&self) -> Vec<PathBuf> {
        let root = Path::new("/sys/fs/cgroup");
        let mut roots = children(root);
        roots.push(root.to_owned());
        roots.into_iter().map(|dir| dir.join(&self.cgroup)).filter(|dir| dir.is_dir()).collect()
    }

    /// A file in the cgroups of all instances, by its name on v1 or on v2.
    pub fn instance_files(&self, v1: &str, v2: &str) -> Vec<PathBuf> {
        let marks = self.cgroup_parents().into_iter().flat_map(|parent| children(&parent));
        let instances = marks.flat_map(|mark| children(&mark));
        let files = instances.flat_map(|dir| [dir.join(v1), dir.join(v2)]);
        files.filter(|file| file.is_file()).collect()
    }

    fn sweep(&self) {
        holds_within(Duration::from_secs(10), || {
            // v1: the frozen don't die.
            for file in self.instance_files("freezer.state", "") {
                let _ = std::fs::write(file, "THAWED");
            }
            for pid in self.processes() {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
            }
            self.cgroup_parents().iter().for_each(|dir| remove_tree(dir));
            self.cgroup_parents().is_empty() && self.processes().is_empty()
        });
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        let mut complaint = None;
        if let Some(mut child) = self.child.take() {
            if terminate(&mut child, STOP).is_none() {
                complaint = Some(format!("the daemon did not stop in {STOP:?}"));
            } else if !holds_within(Duration::from_secs(10), || self.leftovers().is_empty()) {
                complaint = Some(format!("the daemon left behind: {:#?}", self.leftovers()));
            }
        }
        if failed || complaint.is_some() {
            eprintln!("node `{}` wrote:\n{}", self.name, tail(&self.stderr_file(), 60));
        }
        self.sweep();
        if let Some(complaint) = complaint {
            // A second panic would abort the whole run and hide the first.
            if failed {
                eprintln!("{complaint}");
            } else {
                panic!("node `{}`: {complaint}", self.name);
            }
        }
    }
}

fn children(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir() && !path.is_symlink()).collect()
}

fn remove_tree(dir: &Path) {
    children(dir).iter().for_each(|child| remove_tree(child));
    let _ = std::fs::remove_dir(dir);
}
