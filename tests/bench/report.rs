//! What was measured: percentiles, the table, the JSON, and which targets hold.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Rounds that are not counted: caches fill, roots are mounted.
pub const WARM_UP: usize = 5;

pub const FORK_EXEC: &str = "fork+exec";
pub const FORK_FIRST: &str = "fork+exec → first byte";
pub const CRUN: &str = "crun run";
pub const CYCLE: &str = "neap container: create → exit seen";
pub const CREATE: &str = "neap container: create";
pub const PARKED_FIRST: &str = "neap container: parked start → first byte";
pub const HTTP_COLD: &str = "neap HTTP call, cold";
pub const HTTP_PARKED: &str = "neap HTTP call, parked";
pub const MQTT: &str = "neap MQTT publish → outcome committed, output back";

#[derive(Default)]
pub struct Samples {
    /// Sorted when asked.
    all: Vec<Duration>,
}

/// What, the limit, and what was found and whether it holds.
type Target = (&'static str, String, Option<(String, bool)>);

impl Samples {
    pub fn push(&mut self, took: Duration) {
        self.all.push(took);
    }

    pub fn extend(&mut self, more: Self) {
        self.all.extend(more.all);
    }

    pub fn count(&self) -> usize {
        self.all.len()
    }

    pub fn median(&self) -> Duration {
        self.at(0.5)
    }

    pub fn at(&self, share: f64) -> Duration {
        let mut sorted = self.all.clone();
        sorted.sort_unstable();
        match sorted.len() {
            0 => Duration::ZERO,
            n => sorted[((n as f64 * share).ceil() as usize).clamp(1, n) - 1],
        }
    }
}

pub struct Row {
    pub name: String,
    pub samples: Samples,
}

impl Row {
    /// The row of that name, made when there is none yet.
    pub fn of<'a>(rows: &'a mut Vec<Self>, name: &str) -> &'a mut Samples {
        let at = rows.iter().position(|row| row.name == name).unwrap_or_else(|| {
            rows.push(Self { name: name.to_owned(), samples: Samples::default() });
            rows.len() - 1
        });
        &mut rows[at].samples
    }
}

/// How a peer's runs ended.
#[derive(Default)]
pub struct Runs {
    pub peer: String,
    pub runs: usize,
    pub hung: usize,
    pub failed: usize,
    /// The last failure's own words.
    pub why: String,
}

/// What a node had before and after many calls, by kind.
pub struct Leftovers {
    pub calls: usize,
    pub before: BTreeMap<String, usize>,
    pub after: BTreeMap<String, usize>,
}

pub struct Memory {
    pub daemon: u64,
    pub launcher: u64,
}

pub struct Callers {
    pub callers: usize,
    pub per_second: f64,
    pub samples: Samples,
    pub seconds: u64,
    pub failed: usize,
}

pub struct Report {
    binary: PathBuf,
    binary_bytes: u64,
    load_before: String,
    pub took: Duration,
    pub rows: Vec<Row>,
    pub idle: Option<Memory>,
    pub with_parked: Option<(usize, Memory)>,
    /// With none and with 200 parked.
    pub create_crowded: Option<(Samples, Samples)>,
    /// Bytes for each parked instance: of cgroup memory, of PSS.
    pub parked_bytes: Option<(u64, u64)>,
    pub callers: Vec<Callers>,
    /// Runs per second of a sequential loop of `crun run`, beside the sustained callers.
    pub crun_loop: Option<f64>,
    pub peers: Vec<Runs>,
    /// Of the paced calls of the parked function: how many found one ready, of how many.
    pub found_ready: Option<(u64, u64)>,
    pub leftovers: Option<Leftovers>,
    pub left_out: Vec<String>,
}

impl Report {
    pub fn begin(binary: &Path) -> Self {
        Self {
            binary: binary.to_owned(),
            binary_bytes: std::fs::metadata(binary).map_or(0, |meta| meta.len()),
            load_before: load(),
            took: Duration::ZERO,
            rows: Vec::new(),
            idle: None,
            with_parked: None,
            create_crowded: None,
            parked_bytes: None,
            callers: Vec::new(),
            crun_loop: None,
            peers: Vec::new(),
            found_ready: None,
            leftovers: None,
            left_out: Vec::new(),
        }
    }

    fn row(&self, name: &str) -> Option<&Samples> {
        self.rows.iter().find(|row| row.name == name).map(|row| &row.samples).filter(|s| s.count() > 0)
    }

    pub fn print(&self) {
        let mut text = String::new();
        let line = &mut text;
        let _ = writeln!(line, "\n{}", machine().join("\n"));
        let _ = writeln!(
            line,
            "load before {}, after {}; took {} s",
            self.load_before,
            load(),
            self.took.as_secs()
        );
        let _ = writeln!(
            line,
            "\n{:<52} {:>8} {:>8} {:>8} {:>5} {:>7} {:>7}",
            "ms", "median", "p90", "p99", "n", "/fork", "/crun"
        );
        let (fork, crun) = (self.row(FORK_EXEC), self.row(CRUN));
        for Row { name, samples } in &self.rows {
            let to = |base: Option<&Samples>| {
                base.map_or("-".to_owned(), |b| format!("{:.2}", crate::ratio(samples, b)))
            };
            let [median, p90, p99] = [0.5, 0.9, 0.99].map(|share| ms(samples.at(share)));
            let n = samples.count();
            let _ = writeln!(
                line,
                "{name:<52} {median:>8.2} {p90:>8.2} {p99:>8.2} {n:>5} {:>7} {:>7}",
                to(fork),
                to(crun)
            );
        }
        for c in &self.callers {
            let _ = writeln!(
                line,
                "{:<52} {:>6.1}/s, median {:.1} ms, p99 {:.1} ms, {} failed",
                format!("{} callers for {} s, a fresh container each", c.callers, c.seconds),
                c.per_second,
                ms(c.samples.median()),
                ms(c.samples.at(0.99)),
                c.failed
            );
        }
        if let Some(rate) = self.crun_loop {
            let _ = writeln!(line, "{:<52} {rate:>6.1}/s", "crun run, one after the other");
        }
        for Runs { peer, runs, hung, failed, why } in &self.peers {
            let _ = write!(line, "{peer}: {runs} runs, {hung} hung, {failed} failed");
            let _ = writeln!(line, "{}{why}", if why.is_empty() { "" } else { ": " });
        }
        if let Some((ready, calls)) = self.found_ready {
            let _ = writeln!(line, "{ready} of {calls} paced calls found a parked instance");
        }
        if let Some(Leftovers { calls, before, after }) = &self.leftovers {
            let kinds = before.iter().map(|(kind, n)| format!("{kind} {n} → {}", after[kind]));
            let _ = writeln!(line, "after {calls} calls: {}", kinds.collect::<Vec<_>>().join(", "));
        }
        if let Some((n, m)) = &self.with_parked {
            let _ =
                writeln!(line, "with {n} parked: daemon {} + launcher {} PSS", mb(m.daemon), mb(m.launcher));
        }
        let _ = writeln!(line, "\ntargets");
        for (name, limit, found) in self.targets() {
            let verdict = match &found {
                Some((_, true)) => "holds",
                Some((_, false)) => "DOES NOT HOLD",
                None => "not measured",
            };
            let found = found.map_or(String::new(), |(text, _)| text);
            let _ = writeln!(line, "  {name:<58} {limit:<28} {found:<24} {verdict}");
        }
        for what in &self.left_out {
            let _ = writeln!(line, "LEFT OUT: {what}");
        }
        print!("{text}");
    }

    fn targets(&self) -> Vec<Target> {
        let crun = self.row(CRUN);
        let pair = |name: &str| Some((self.row(name)?, crun?));
        let parked = self.row(PARKED_FIRST).zip(self.row(FORK_FIRST)).map(|(parked, fork)| {
            let over = ms(parked.median()) - ms(fork.median());
            (format!("+ {over:.2} ms"), over <= 0.5)
        });
        let http_parked = pair(HTTP_PARKED).map(|(call, crun)| {
            let ratio = crate::ratio(call, crun);
            (format!("{ratio:.2} ×"), ratio <= 0.2)
        });
        let tail = pair(HTTP_PARKED).map(|(call, crun)| {
            (
                format!("{:.1} / {:.1} ms", ms(call.at(0.99)), ms(crun.median())),
                call.at(0.99) <= crun.median(),
            )
        });
        let cold = pair(CYCLE).map(|(cycle, crun)| {
            let ratio = crate::ratio(cycle, crun);
            (format!("{ratio:.2} ×"), ratio <= 0.6)
        });
        let sustained = self.callers.iter().find(|c| c.callers == 8).zip(self.crun_loop).map(|(c, crun)| {
            let ratio = c.per_second / crun;
            (format!("{ratio:.2} × over {} s", c.seconds), ratio >= 2.0)
        });
        let idle = self.idle.as_ref().map(|m| {
            let sum = m.daemon + m.launcher;
            (format!("{} ({} + {})", mb(sum), mb(m.daemon), mb(m.launcher)), sum <= 8_000_000)
        });
        let each = self
            .parked_bytes
            .map(|(cgroup, pss)| (format!("{}, {} PSS", mb(cgroup), mb(pss)), cgroup <= 400_000));
        let size = Some((mb(self.binary_bytes), self.binary_bytes <= 8_000_000));
        let crowded = self.create_crowded.as_ref().map(|(alone, crowd)| {
            let ratio = crate::ratio(crowd, alone);
            (format!("{ratio:.2} ×"), ratio <= 1.1)
        });
        let left = self.leftovers.as_ref().filter(|found| found.calls >= 2000).map(|found| {
            let more = found.before.iter().filter(|(kind, n)| found.after[*kind] > **n);
            let more: Vec<_> = more.map(|(kind, _)| kind.as_str()).collect();
            match more.is_empty() {
                true => (format!("nothing after {}", found.calls), true),
                false => (more.join(", "), false),
            }
        });
        vec![
            ("parked start → first byte", "fork+exec + 0.5 ms".to_owned(), parked),
            ("HTTP call, parked, paced", "0.2 × crun run".to_owned(), http_parked),
            ("  its p99", "crun run's median".to_owned(), tail),
            ("cold request → exit", "0.6 × crun run".to_owned(), cold),
            ("fresh containers per second, 8 callers", "2 × a crun loop".to_owned(), sustained),
            ("idle PSS, daemon + launcher, TLS and MQTT up", "8 MB".to_owned(), idle),
            ("per parked instance", "0.4 MB of cgroup memory".to_owned(), each),
            ("binary", "8 MB".to_owned(), size),
            ("create with 200 parked", "1.1 × with none".to_owned(), crowded),
            ("2,000 calls and more", "nothing is left".to_owned(), left),
        ]
    }

    pub fn json(&self) -> String {
        let samples = |s: &Samples| json!({ "median_ms": ms(s.median()), "p90_ms": ms(s.at(0.9)), "p99_ms": ms(s.at(0.99)), "n": s.count() });
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|row| {
                let mut value = samples(&row.samples);
                value["name"] = json!(row.name);
                let to = |name: &str| self.row(name).map(|base| crate::ratio(&row.samples, base));
                value["to_fork_exec"] = json!(to(FORK_EXEC));
                value["to_crun"] = json!(to(CRUN));
                value
            })
            .collect();
        let callers: Vec<Value> = self
            .callers
            .iter()
            .map(|c| {
                let mut value = samples(&c.samples);
                value["callers"] = json!(c.callers);
                value["per_second"] = json!(c.per_second);
                value["seconds"] = json!(c.seconds);
                value["failed"] = json!(c.failed);
                value
            })
            .collect();
        let memory = |m: &Memory| json!({ "daemon_pss_bytes": m.daemon, "launcher_pss_bytes": m.launcher });
        let targets: Vec<Value> = self
            .targets()
            .into_iter()
            .map(|(name, limit, found)| {
                let (text, holds) = found.map_or((None, None), |(text, holds)| (Some(text), Some(holds)));
                json!({ "target": name.trim(), "limit": limit, "found": text, "holds": holds })
            })
            .collect();
        let peers: Vec<Value> = self
            .peers
            .iter()
            .map(|p| json!({ "peer": p.peer, "runs": p.runs, "hung": p.hung, "failed": p.failed, "why": p.why }))
            .collect();
        let whole = json!({
            "machine": machine(),
            "load_before": self.load_before,
            "load_after": load(),
            "took_s": self.took.as_secs(),
            "binary": { "path": self.binary, "bytes": self.binary_bytes },
            "rows": rows,
            "callers": callers,
            "crun_loop_per_second": self.crun_loop,
            "idle": self.idle.as_ref().map(memory),
            "with_parked": self.with_parked.as_ref().map(|(n, m)| json!({ "parked": n, "memory": memory(m) })),
            "parked_cgroup_bytes": self.parked_bytes.map(|(cgroup, _)| cgroup),
            "parked_pss_bytes": self.parked_bytes.map(|(_, pss)| pss),
            "create_crowded": self.create_crowded.as_ref().map(|(a, b)| json!({ "none": samples(a), "parked_200": samples(b) })),
            "peers": peers,
            "found_ready": self.found_ready.map(|(ready, calls)| json!({ "ready": ready, "calls": calls })),
            "leftovers": self.leftovers.as_ref().map(|l| json!({ "calls": l.calls, "before": l.before, "after": l.after })),
            "targets": targets,
            "left_out": self.left_out,
        });
        format!("{whole:#}\n")
    }
}

pub fn ms(took: Duration) -> f64 {
    took.as_secs_f64() * 1000.0
}

fn mb(bytes: u64) -> String {
    format!("{:.2} MB", bytes as f64 / 1e6)
}

fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).collect::<Vec<_>>().join(" ")
}

/// What the figures depend on.
fn machine() -> Vec<String> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        line.split_once(':').map_or(String::new(), |(_, value)| value.trim().to_owned())
    };
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let cgroups = match (Path::new("/sys/fs/cgroup/cgroup.controllers").exists(), read("/proc/filesystems")) {
        (true, _) => "v2",
        (false, text) if text.contains("cgroup2") && read("/proc/1/mountinfo").contains(" - cgroup2 ") => {
            "hybrid (v1 controllers)"
        }
        _ => "v1",
    };
    vec![
        format!(
            "machine: {cpus} × {}, {}",
            field(&cpuinfo, "model name"),
            field(&read("/proc/meminfo"), "MemTotal")
        ),
        format!("kernel: {}; cgroups: {cgroups}", read("/proc/sys/kernel/osrelease").trim()),
    ]
}
