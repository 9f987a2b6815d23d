//! Debian's mosquitto as `mosquitto -c FILE` on a free loopback port.
//!
//! The queue limits are off (`max_queued_messages 0`, `max_queued_bytes 0`): with the defaults
//! it drops beyond 1,000 queued messages while neap is down. Killed by SIGKILL it loses what it
//! acknowledged since its last save; `stop` lets it save first.

use super::tls::Certificates;
use super::{TestDir, accepts, free_port, tail, terminate, tied, wait_until};
use std::fmt::Write;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

#[derive(Debug)]
pub struct Mosquitto {
    dir: TestDir,
    port: u16,
    tls: bool,
    child: Option<Child>,
    /// Where its log stood when it was started last.
    log_began: usize,
}

/// What differs from an open broker without persistence.
#[derive(Debug, Default)]
pub struct Builder {
    persistence: bool,
    users: Vec<(String, String)>,
    tls: Option<TlsOptions>,
    lines: Vec<String>,
}

#[derive(Debug)]
struct TlsOptions {
    ca: PathBuf,
    cert: PathBuf,
    key: PathBuf,
    require_certificate: bool,
}

impl Builder {
    /// Sessions and queues survive `stop` and `start`.
    pub fn persistent(mut self) -> Self {
        self.persistence = true;
        self
    }

    /// Only these users may connect.
    pub fn user(mut self, name: &str, password: &str) -> Self {
        self.users.push((name.to_owned(), password.to_owned()));
        self
    }

    /// TLS on the listener; `require_certificate`: of the clients too, signed by the same CA.
    pub fn tls(mut self, certificates: &Certificates, require_certificate: bool) -> Self {
        self.tls = Some(TlsOptions {
            ca: certificates.ca.clone(),
            cert: certificates.server_cert.clone(),
            key: certificates.server_key.clone(),
            require_certificate,
        });
        self
    }

    /// A line more in the configuration; after the listener's own, so it may belong to it.
    pub fn line(mut self, line: &str) -> Self {
        self.lines.push(line.to_owned());
        self
    }

    /// The broker, not started yet: nothing listens on its port.
    pub fn stopped(self) -> Mosquitto {
        let dir = TestDir::new("mosquitto");
        let port = free_port();
        let mut text = String::from(
            "user root\nmax_queued_messages 0\nmax_queued_bytes 0\nmax_inflight_messages 200\n\
             log_type all\nconnection_messages true\nset_tcp_nodelay true\n",
        );
        if self.persistence {
            // A save on every change would make it slow; `stop` saves.
            let _ = writeln!(text, "persistence true\npersistence_location {}/", dir.path().display());
        }
        let _ = writeln!(text, "listener {port} 127.0.0.1");
        if self.users.is_empty() {
            text.push_str("allow_anonymous true\n");
        } else {
            let file = dir.join("passwords");
            for (index, (name, password)) in self.users.iter().enumerate() {
                let mut command = std::process::Command::new("mosquitto_passwd");
                if index == 0 {
                    command.arg("-c");
                }
                let output = command.arg("-b").arg(&file).args([name, password]).output();
                assert!(output.expect("run mosquitto_passwd").status.success(), "mosquitto_passwd failed");
            }
            let _ = writeln!(text, "allow_anonymous false\npassword_file {}", file.display());
        }
        if let Some(tls) = &self.tls {
            let _ = writeln!(
                text,
                "cafile {}\ncertfile {}\nkeyfile {}\nrequire_certificate {}",
                tls.ca.display(),
                tls.cert.display(),
                tls.key.display(),
                tls.require_certificate
            );
        }
        for line in &self.lines {
            let _ = writeln!(text, "{line}");
        }
        dir.write("mosquitto.conf", text);
        Mosquitto { dir, port, tls: self.tls.is_some(), child: None, log_began: 0 }
    }

    pub fn start(self) -> Mosquitto {
        let mut broker = self.stopped();
        broker.start();
        broker
    }
}

impl Mosquitto {
    /// An open broker without persistence.
    pub fn start_plain() -> Self {
        Self::builder().start()
    }

    pub fn builder() -> Builder {
        Builder::default()
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// `mqtt://127.0.0.1:PORT`, or `mqtts://localhost:PORT` (the name on the certificate).
    pub fn url(&self) -> String {
        match self.tls {
            true => format!("mqtts://localhost:{}", self.port),
            false => format!("mqtt://127.0.0.1:{}", self.port),
        }
    }

    /// Starts it on the same port, with what it saved; returns when it accepts connections.
    pub fn start(&mut self) {
        assert!(self.child.is_none(), "the broker on port {} runs already", self.port);
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.join("log"))
            .expect("open the broker's log");
        self.log_began = log.metadata().map_or(0, |meta| meta.len() as usize);
        let child = tied("mosquitto")
            .arg("-c")
            .arg(self.dir.join("mosquitto.conf"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("clone a descriptor"))
            .stderr(log)
            .spawn()
            .expect("start mosquitto");
        self.child = Some(child);
        let (port, log) = (self.port, self.dir.join("log"));
        let child = self.child.as_mut().expect("just set");
        wait_until(Duration::from_secs(20), &format!("mosquitto on port {port}"), || {
            if let Some(status) = child.try_wait().expect("wait for mosquitto") {
                panic!("mosquitto ended: {status}\n{}", tail(&log, 20));
            }
            accepts(port)
        });
    }

    /// SIGTERM: it saves its sessions and queues first.
    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            assert!(terminate(&mut child, Duration::from_secs(20)).is_some(), "mosquitto did not stop");
        }
    }

    /// SIGKILL: what it acknowledged since its last save is gone.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("kill mosquitto");
            child.wait().expect("wait for mosquitto");
        }
    }

    pub fn restart(&mut self) {
        self.stop();
        self.start();
    }

    /// Waits until a client whose id begins with `client` has subscribed to `filter` at QoS 1,
    /// since the broker was started last.
    /// A deploy is answered before that, and what is published in between is nobody's.
    #[track_caller]
    pub fn wait_subscribed(&self, client: &str, filter: &str) {
        let what = format!("`{client}…` is subscribed to `{filter}`");
        // The log of a subscription: time, client, QoS, filter.
        let (start, end) = (format!(": {client}"), format!(" 1 {filter}"));
        wait_until(Duration::from_secs(60), &what, || {
            let log = std::fs::read(self.dir.join("log")).unwrap_or_default();
            let log = String::from_utf8_lossy(log.get(self.log_began..).unwrap_or_default());
            log.lines().any(|line| line.contains(&start) && line.ends_with(&end))
        });
    }

    /// What it logged: every packet, `log_type all`.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.dir.join("log")).unwrap_or_default()).into_owned()
    }
}

impl Drop for Mosquitto {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("mosquitto on port {}:\n{}", self.port, tail(&self.dir.join("log"), 30));
        }
        if let Some(child) = &mut self.child {
            terminate(child, Duration::from_secs(5));
        }
    }
}
