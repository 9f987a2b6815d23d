//! `make bench`: neap beside crun, runc, podman and youki, interleaved in one run on one machine.
//!
//! Each round takes one sample of every row, so that a neighbour that makes the machine slow makes
//! all rows slow. What is compared is the same work: busybox echoes a word in a fresh container
//! with the same namespaces, limits, mounts and seccomp profile. Rows are ratios to a plain fork
//! and exec, and to `crun run`, of the same run. Nothing here fails by time: the targets are
//! printed with what was measured.
//!
//! ```text
//! bench [--rounds N] [--seconds N] [--json FILE] [--neap FILE]
//! ```
//!
//! A peer that is not installed is left out, loudly. Root; on a machine with hybrid cgroups in a
//! mount namespace without `unified`, which crun refuses (run.sh).

mod containers;
mod node;
mod peers;
mod report;

use report::{Row, Samples, ms};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// What every container says.
pub const WORD: &str = "hello";

struct Options {
    rounds: usize,
    seconds: u64,
    json: Option<PathBuf>,
    neap: PathBuf,
}

impl Options {
    fn parse() -> Result<Self, String> {
        let mut options =
            Self { rounds: 200, seconds: 60, json: None, neap: PathBuf::from(env!("CARGO_BIN_EXE_neap")) };
        let mut arguments = std::env::args().skip(1);
        while let Some(name) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{name} needs a value"));
            let number = |text: String| text.parse().map_err(|_| format!("{text} is not a number"));
            match name.as_str() {
                "--rounds" => options.rounds = number(value()?)? as usize,
                "--seconds" => options.seconds = number(value()?)?,
                "--json" => options.json = Some(PathBuf::from(value()?)),
                "--neap" => options.neap = PathBuf::from(value()?),
                "--bench" => {} // what `cargo bench` adds
                other => return Err(format!("unknown argument {other}")),
            }
        }
        Ok(options)
    }
}

fn main() -> ExitCode {
    let options = match Options::parse() {
        Ok(options) => options,
        Err(why) => {
            eprintln!("bench: {why}");
            return ExitCode::from(2);
        }
    };
    let dir = tempfile::tempdir().expect("a temporary directory");
    let begun = Instant::now();
    let mut report = report::Report::begin(&options.neap);

    println!("bench: idle memory");
    report.idle = Some(node::idle_memory(&options.neap, &dir.path().join("idle")));

    let peers = peers::Peers::find(&dir.path().join("peers"), &mut report.left_out);
    let node = node::Node::start(&options.neap, &dir.path().join("node"), &mut report.left_out);
    let mut containers = containers::Containers::start(&options.neap, &dir.path().join("containers"));

    println!("bench: {} rounds", options.rounds);
    let mut rows: Vec<Row> = Vec::new();
    for round in 0..options.rounds + report::WARM_UP {
        let mut sample = |name: &str, took: Duration| {
            if round >= report::WARM_UP {
                Row::of(&mut rows, name).push(took);
            }
        };
        sample(report::FORK_EXEC, fork_exec());
        sample(report::FORK_FIRST, fork_first_byte());
        peers.round(round, &mut sample);
        containers.round(&mut sample);
        node.round(&mut sample);
    }
    report.rows = rows;
    peers.tell(&mut report);
    node.found_ready(&mut report);

    println!("bench: create beside 200 parked, memory of parked instances");
    containers.crowd(&mut report);
    drop(containers);

    println!("bench: callers at once, {} s sustained", options.seconds);
    node.callers(options.seconds, &peers, &mut report);
    node.parked_memory(&mut report);
    drop(node);

    report.took = begun.elapsed();
    report.print();
    if let Some(file) = options.json {
        if let Some(dir) = file.parent() {
            std::fs::create_dir_all(dir).expect("a directory for the JSON");
        }
        std::fs::write(&file, report.json()).expect("the JSON is written");
        println!("as JSON: {}", file.display());
    }
    ExitCode::SUCCESS
}

/// The floor: a process without a container.
fn fork_exec() -> Duration {
    let begun = Instant::now();
    let status = Command::new("/bin/busybox").args(["echo", WORD]).stdout(Stdio::null()).status();
    let took = begun.elapsed();
    assert!(status.expect("busybox-static is installed").success());
    took
}

/// The floor of a parked start: until the first byte, not the exit.
fn fork_first_byte() -> Duration {
    use std::io::Read;
    let begun = Instant::now();
    let mut child = Command::new("/bin/busybox")
        .args(["echo", WORD])
        .stdout(Stdio::piped())
        .spawn()
        .expect("busybox-static is installed");
    let mut byte = [0];
    child.stdout.as_mut().expect("piped").read_exact(&mut byte).expect("it says something");
    let took = begun.elapsed();
    let _ = child.wait();
    took
}

/// Medians of two rows, for a ratio.
pub fn ratio(a: &Samples, b: &Samples) -> f64 {
    ms(a.median()) / ms(b.median())
}
