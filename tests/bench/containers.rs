//! neap's container runtime without the daemon around it: the library's `Runtime` on the main
//! thread, the launcher a release binary.

use crate::WORD;
use crate::report::{CREATE, CYCLE, PARKED_FIRST, Report, Samples};
use neap::config::{LimitsWanted, UserNamespaces};
use neap::model::function::{Limits, UID_BASE_FIRST};
use neap::runtime::{Exit, Parked, Root, Running, Runtime, Settings};
use smol::io::AsyncReadExt;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

const KEY: &str = "bench.1";

/// Creates on each side of the crowded comparison.
const CREATES: usize = 60;

/// How many are parked then.
const CROWD: usize = 200;

pub struct Containers {
    runtime: Runtime,
    executor: smol::LocalExecutor<'static>,
    cgroup: String,
    state: String,
}

impl Containers {
    pub fn start(neap: &Path, dir: &Path) -> Self {
        let layer = dir.join("data/layer");
        for sub in ["run", "data/layer/bin", "data/layer/etc"] {
            fs::create_dir_all(dir.join(sub)).expect("a directory");
        }
        fs::copy("/bin/busybox", layer.join("bin/busybox")).expect("busybox-static is installed");
        std::os::unix::fs::symlink("busybox", layer.join("bin/echo")).expect("a symlink");
        let cgroup = format!("neap-bench-{}", std::process::id());
        let runtime = Runtime::start(Settings {
            exe: neap.to_owned(),
            run_dir: dir.join("run"),
            data_dir: dir.join("data"),
            cgroup: cgroup.clone(),
            user_namespaces: UserNamespaces::Prefer,
            limits: LimitsWanted::Prefer,
            egress_range: neap::config::defaults::EGRESS_RANGE,
        })
        .expect("the launcher starts");
        let executor = smol::LocalExecutor::new();
        let driven = runtime.clone();
        executor.spawn(async move { driven.drive().await }).detach();
        let root = Root {
            key: KEY.to_owned(),
            layers: vec![layer],
            uid_base: UID_BASE_FIRST,
            command: vec!["/bin/echo".to_owned(), WORD.to_owned()],
            env: Vec::new(),
            user: String::new(),
            working_dir: String::new(),
            limits: Limits {
                memory_bytes: 64 << 20,
                cpu_millis: 500,
                pids: 64,
                timeout: Duration::from_secs(30),
                payload_bytes: 1 << 20,
                disk_bytes: 16 << 20,
            },
            permissions: Default::default(),
            secret_dirs: Vec::new(),
        };
        smol::block_on(executor.run(runtime.prepare(root))).expect("the root is prepared");
        Self { runtime, executor, cgroup, state: dir.join("run/launcher").display().to_string() }
    }

    fn run<T>(&self, work: impl Future<Output = T>) -> T {
        smol::block_on(self.executor.run(work))
    }

    async fn create(&self) -> Parked {
        self.runtime.create(KEY).await.expect("created")
    }

    pub fn round(&mut self, sample: &mut impl FnMut(&str, Duration)) {
        self.run(async {
            let begun = Instant::now();
            let parked = self.create().await;
            let created = Instant::now();
            let mut running = parked.start(Vec::new()).await.expect("started");
            let exit = running.wait().await;
            sample(CYCLE, begun.elapsed());
            sample(CREATE, created - begun);
            assert_eq!(exit, Exit::Code(0));

            let parked = self.create().await;
            let begun = Instant::now();
            let mut running = parked.start(Vec::new()).await.expect("started");
            first_byte(&mut running).await;
            sample(PARKED_FIRST, begun.elapsed());
            running.wait().await;
        });
    }

    /// Creating beside many parked ones, and what each of those costs.
    pub fn crowd(&mut self, report: &mut Report) {
        let creates = || {
            self.run(async {
                let mut samples = Samples::default();
                for _ in 0..CREATES {
                    let begun = Instant::now();
                    let parked = self.create().await;
                    samples.push(begun.elapsed());
                    let mut running = parked.start(Vec::new()).await.expect("started");
                    running.wait().await;
                }
                samples
            })
        };
        let mut alone = creates();
        let launcher_alone = pss_below(&self.state);
        let parked: Vec<Parked> = self.run(async {
            let mut parked = Vec::new();
            for _ in 0..CROWD {
                parked.push(self.create().await);
            }
            parked
        });
        let crowded = creates();
        let pss = pss_below(&self.state).saturating_sub(launcher_alone);
        let memory: Vec<u64> = parked.iter().filter_map(|parked| self.cgroup_memory(&parked.id)).collect();
        drop(parked);
        // Before and after: a machine that gets slower meanwhile must not look like a crowd.
        alone.extend(creates());
        report.create_crowded = Some((alone, crowded));
        let mean = |sum: u64, n: usize| sum / (n as u64).max(1);
        if !memory.is_empty() {
            let each = mean(memory.iter().sum(), memory.len());
            report.parked_bytes = Some((each, mean(pss, CROWD)));
        }
    }

    fn cgroup_memory(&self, id: &str) -> Option<u64> {
        let files = [("memory/", "memory.usage_in_bytes"), ("", "memory.current")];
        files.iter().find_map(|(controller, file)| {
            let parents = fs::read_dir(format!("/sys/fs/cgroup/{controller}{}", self.cgroup)).ok()?;
            parents.flatten().find_map(|mark| {
                fs::read_to_string(mark.path().join(id).join(file)).ok()?.trim().parse().ok()
            })
        })
    }
}

impl Drop for Containers {
    fn drop(&mut self) {
        self.run(self.runtime.stop());
    }
}

async fn first_byte(running: &mut Running) {
    let stdout = running.stdout.as_mut().expect("stdout");
    stdout.read_exact(&mut [0]).await.expect("it says something");
}

/// PSS of a launcher and all that it has made, by its arguments, which its children share.
pub fn pss_below(state: &str) -> u64 {
    let mut sum = 0;
    for process in fs::read_dir("/proc").expect("processes").flatten() {
        let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.starts_with("neap launcher ") && line.contains(state) {
            sum += pss(&process.path());
        }
    }
    sum
}

/// Of one process, in bytes.
pub fn pss(process: &Path) -> u64 {
    let text = fs::read_to_string(process.join("smaps_rollup")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kib: u64 = line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse().ok()).unwrap_or(0);
    kib * 1024
}
