//! A receiver of batches over HTTPS (`receiver.py`), and the CloudEvents SDK that it is made with.

use super::tls::Certificates;
use super::{TestDir, free_port, tail, tied, wait_until};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Where `tests/deps.sh` puts Python packages.
pub fn python_path() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("it lies in the target directory");
    target.join("python")
}

/// Whether the SDK is there; in CI its absence fails the test.
#[track_caller]
pub fn have_sdk(test: &str) -> bool {
    super::have(test, "python3")
        && (python_path().join("cloudevents").is_dir() || super::skip(test, "tests/deps.sh was not run"))
}

pub fn script(name: &str) -> Command {
    let mut command = tied("/usr/bin/python3");
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/integration/support").join(name));
    command.env("PYTHONPATH", python_path());
    command
}

#[derive(Debug)]
pub struct Receiver {
    dir: TestDir,
    port: u16,
    pub certificates: Certificates,
    child: Option<Child>,
}

impl Receiver {
    pub fn start(rules: Value) -> Self {
        let mut receiver = Self {
            dir: TestDir::new("receiver"),
            port: free_port(),
            certificates: Certificates::new(),
            child: None,
        };
        receiver.rules(rules);
        receiver.restart();
        receiver
    }

    pub fn url(&self) -> String {
        format!("https://localhost:{}/in/events?site=7", self.port)
    }

    /// For the next requests.
    pub fn rules(&self, rules: Value) {
        let new = self.dir.write("rules.new", rules.to_string());
        std::fs::rename(new, self.dir.join("rules.json")).expect("rename the rules");
    }

    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("kill the receiver");
            child.wait().expect("wait for the receiver");
        }
    }

    pub fn restart(&mut self) {
        let errors = std::fs::File::options().create(true).append(true).open(self.dir.join("errors"));
        let child = script("receiver.py")
            .arg(self.port.to_string())
            .args([&self.certificates.server_cert, &self.certificates.server_key])
            .args([self.dir.join("log"), self.dir.join("rules.json")])
            .stdin(Stdio::null())
            .stderr(errors.expect("open the receiver's errors"))
            .spawn()
            .expect("start the receiver");
        self.child = Some(child);
        let errors = self.dir.join("errors");
        wait_until(Duration::from_secs(30), &format!("the receiver listens: {}", tail(&errors, 5)), || {
            super::accepts(self.port)
        });
    }

    /// Requests that were answered.
    pub fn requests(&self) -> usize {
        let log = std::fs::read_to_string(self.dir.join("errors")).unwrap_or_default();
        log.lines().filter(|line| line.contains("POST /")).count()
    }

    /// What was acknowledged, in order.
    pub fn events(&self) -> Vec<Value> {
        self.records().into_iter().map(|record| record["event"].clone()).collect()
    }

    pub fn records(&self) -> Vec<Value> {
        let log = std::fs::read_to_string(self.dir.join("log")).unwrap_or_default();
        let whole = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole.lines().map(|line| serde_json::from_str(line).expect("a record")).collect()
    }

    /// The data of each, as text.
    pub fn data(&self) -> Vec<String> {
        let text = |data: &Value| data.as_str().map_or_else(|| data.to_string(), str::to_owned);
        self.events().iter().map(|event| text(&event["data"])).collect()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("the receiver's end: {}", tail(&self.dir.join("errors"), 20));
        }
    }
}
