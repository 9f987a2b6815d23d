//! The real thing: a release daemon with functions deployed, called over HTTP on kept-alive
//! connections, and over MQTT through Debian's mosquitto.

use crate::WORD;
use crate::containers::{pss, pss_below};
use crate::peers::Peers;
use crate::report::{Callers, HTTP_COLD, HTTP_PARKED, Leftovers, MQTT, Memory, Report, Samples};
use rustix::fs::{Advice, fadvise};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Beside other work on the machine.
const READY: Duration = Duration::from_secs(60);

/// Instances kept ready by the parked function.
const PARKED: usize = 8;

/// For memory with many parked.
const MANY_PARKED: usize = 100;

/// Between rounds the pool must fill again: what is measured then is a parked call.
const REFILL: Duration = Duration::from_millis(60);

/// Idle means that starting is over: the daemon lets go of that code after 5 s.
const SETTLE: Duration = Duration::from_secs(10);

pub struct Node {
    dir: PathBuf,
    neap: PathBuf,
    port: u16,
    cgroup: String,
    has_parked: bool,
    daemon: Child,
    broker: Child,
    http: std::cell::RefCell<Http>,
    mqtt: std::cell::RefCell<Mqtt>,
}

impl Node {
    pub fn start(neap: &Path, dir: &Path, left_out: &mut Vec<String>) -> Self {
        fs::create_dir_all(dir.join("functions.d")).expect("a directory");
        let (broker, broker_port) = broker(dir);
        let port = free_port();
        let config = config(dir, port, broker_port, "");
        let daemon = daemon(neap, &config, dir);
        let image = dir.join("shell.tar");
        let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("images/shell/build.sh");
        let built = Command::new(build).arg(&image).output().expect("the image's build.sh runs");
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let node = |arguments: &[&str]| cli(neap, dir, arguments);
        node(&["image", "import", &image.display().to_string()]).expect("the image is imported");
        let echo = format!("command = [\"/bin/echo\", \"{WORD}\"]");
        let manifest = |name: &str, rest: &str| {
            let path = dir.join(format!("{name}.toml"));
            let text = format!("name = \"{name}\"\nimage = \"shell:1\"\n{echo}\n{rest}");
            fs::write(&path, text).expect("written");
            path.display().to_string()
        };
        let cold = manifest("cold", "[scale]\nmax = 64\n[[trigger]]\nhttp = \"/cold\"\n");
        let relay = manifest(
            "relay",
            "[[trigger]]\nmqtt = \"bench/in\"\n[[output]]\nto = \"local\"\ntopic = \"bench/out\"\n",
        );
        let parked = manifest(
            "parked",
            &format!("[scale]\nmin = {PARKED}\nmax = 64\n[[trigger]]\nhttp = \"/parked\"\n"),
        );
        for file in [&cold, &relay] {
            node(&["deploy", file]).expect("deployed");
        }
        let has_parked = match node(&["deploy", &parked]) {
            Ok(()) => true,
            Err(why) => {
                left_out.push(format!("HTTP call, parked: scale.min is refused: {}", why.trim()));
                false
            }
        };
        let http = Http::connect(port);
        let mqtt = Mqtt::connect(broker_port);
        Self {
            dir: dir.to_owned(),
            neap: neap.to_owned(),
            port,
            cgroup: cgroup_name(port),
            has_parked,
            daemon,
            broker,
            http: http.into(),
            mqtt: mqtt.into(),
        }
    }

    pub fn round(&self, sample: &mut impl FnMut(&str, Duration)) {
        sample(HTTP_COLD, self.http.borrow_mut().call("cold").expect("the cold function answers"));
        sample(MQTT, self.mqtt.borrow_mut().there_and_back());
        if self.has_parked {
            std::thread::sleep(REFILL);
            sample(HTTP_PARKED, self.http.borrow_mut().call("parked").expect("the parked function answers"));
        }
    }

    /// How many of the rounds' calls found their instance parked.
    pub fn found_ready(&self, report: &mut Report) {
        if !self.has_parked {
            return;
        }
        let page = self.http.borrow_mut().get("/metrics").expect("metrics are answered");
        let count = |instance: &str| {
            let series = format!("neap_starts_total{{function=\"parked\",instance=\"{instance}\"}} ");
            page.lines().find_map(|line| line.strip_prefix(&series)?.trim().parse::<u64>().ok()).unwrap_or(0)
        };
        let (parked, created) = (count("parked"), count("created"));
        report.found_ready = Some((parked, parked + created));
    }

    /// 1 and 32 callers for a while, 8 sustained, and loops of crun before and after.
    pub fn callers(&self, seconds: u64, peers: &Peers, report: &mut Report) {
        let short = (seconds / 6).clamp(1, 10);
        let before = self.belongings();
        let crun_before = peers.crun_loop(Duration::from_secs(short));
        for (callers, seconds) in [(1, short), (8, seconds), (32, short)] {
            report.callers.push(self.call_for(callers, seconds));
        }
        let crun_after = peers.crun_loop(Duration::from_secs(short));
        let runs = crun_before.zip(crun_after).map(|(before, after)| before.count() + after.count());
        report.crun_loop = runs.map(|runs| runs as f64 / (2 * short) as f64);
        let calls = report.callers.iter().map(|c| c.samples.count() + c.failed).sum();
        report.leftovers = Some(Leftovers { calls, before, after: self.belongings() });
    }

    /// What could leak, counted twice until it stays the same.
    fn belongings(&self) -> BTreeMap<String, usize> {
        let begun = Instant::now();
        let mut last = BTreeMap::new();
        loop {
            let now = self.count();
            if last == now || begun.elapsed() > READY {
                return now;
            }
            last = now;
            std::thread::sleep(REFILL * 5);
        }
    }

    fn count(&self) -> BTreeMap<String, usize> {
        let entries = |path: String| fs::read_dir(path).map_or(0, Iterator::count);
        let daemon = self.daemon.id();
        let (mut processes, mut launcher) = (0, Vec::new());
        for process in fs::read_dir("/proc").expect("processes").flatten() {
            // As v1, v2 and hybrid write it: the cgroup's path ends the line.
            let cgroup = fs::read_to_string(process.path().join("cgroup")).unwrap_or_default();
            processes += usize::from(cgroup.lines().any(|line| line.contains(&self.cgroup)));
            let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&line).contains(&self.dir.join("run/launcher").display().to_string()) {
                launcher.push(process.path().display().to_string());
            }
        }
        let mounts = |path: &String| {
            fs::read_to_string(format!("{path}/mountinfo")).unwrap_or_default().lines().count()
        };
        let controllers = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
        let roots = controllers.map(|entry| entry.path()).chain([PathBuf::from("/sys/fs/cgroup")]);
        BTreeMap::from([
            ("processes of instances".to_owned(), processes),
            ("descriptors of the daemon".to_owned(), entries(format!("/proc/{daemon}/fd"))),
            ("threads of the daemon".to_owned(), entries(format!("/proc/{daemon}/task"))),
            ("processes of the launcher".to_owned(), launcher.len()),
            (
                "descriptors of the launcher".to_owned(),
                launcher.iter().map(|p| entries(format!("{p}/fd"))).sum(),
            ),
            ("mounts of the launcher".to_owned(), launcher.iter().map(mounts).sum()),
            ("cgroups".to_owned(), roots.map(|root| directories(&root.join(&self.cgroup))).sum()),
        ])
    }

    fn call_for(&self, callers: usize, seconds: u64) -> Callers {
        let (port, stop) = (self.port, &AtomicBool::new(false));
        let begun = Instant::now();
        let all: Vec<(Samples, usize)> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..callers)
                .map(|_| {
                    scope.spawn(move || {
                        let (mut http, mut samples, mut failed) =
                            (Http::connect(port), Samples::default(), 0);
                        while !stop.load(Ordering::Relaxed) {
                            match http.call("cold") {
                                Ok(took) => samples.push(took),
                                Err(_) => failed += 1,
                            }
                        }
                        (samples, failed)
                    })
                })
                .collect();
            std::thread::sleep(Duration::from_secs(seconds));
            stop.store(true, Ordering::Relaxed);
            threads.into_iter().map(|thread| thread.join().expect("a caller")).collect()
        });
        let took = begun.elapsed();
        let mut samples = Samples::default();
        let mut failed = 0;
        for (more, failures) in all {
            samples.extend(more);
            failed += failures;
        }
        let per_second = samples.count() as f64 / took.as_secs_f64();
        Callers { callers, per_second, samples, seconds, failed }
    }

    pub fn parked_memory(&self, report: &mut Report) {
        if !self.has_parked {
            report.left_out.push(format!("PSS with {MANY_PARKED} parked: scale.min is refused"));
            return;
        }
        let path = self.dir.join("many.toml");
        let text = format!(
            "name = \"many\"\nimage = \"shell:1\"\n[scale]\nmin = {MANY_PARKED}\nmax = {MANY_PARKED}\n[[trigger]]\nhttp = \"/many\"\n"
        );
        fs::write(&path, text).expect("written");
        if let Err(why) = cli(&self.neap, &self.dir, &["deploy", &path.display().to_string()]) {
            report.left_out.push(format!("PSS with {MANY_PARKED} parked: {}", why.trim()));
            return;
        }
        std::thread::sleep(SETTLE * 2);
        report.with_parked = Some((MANY_PARKED + PARKED, memory(&self.daemon, &self.dir)));
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        stop(&mut self.daemon);
        stop(&mut self.broker);
    }
}

/// PSS of a daemon that has HTTPS and MQTT up and nothing to do, as after a boot: its file comes from
/// the disk. What somebody has just written lies in the page cache in larger pieces, of which each fault
/// maps a whole one: half a megabyte more.
pub fn idle_memory(neap: &Path, dir: &Path) -> Memory {
    fs::create_dir_all(dir.join("functions.d")).expect("a directory");
    let own = dir.join("neap");
    fs::copy(neap, &own).expect("a copy");
    let file = fs::File::open(&own).expect("it is there");
    file.sync_all().expect("on the disk");
    fadvise(&file, 0, None, Advice::DontNeed).expect("out of the page cache");
    drop(file);
    let neap = &own;
    let (mut broker, broker_port) = broker(dir);
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"])
        .args([
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-keyout",
            "key.pem",
            "-out",
            "cert.pem",
        ])
        .current_dir(dir)
        .output()
        .expect("openssl is installed");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let tls = format!(
        "tls = {{ cert = \"{}\", key = \"{}\" }}\n",
        dir.join("cert.pem").display(),
        dir.join("key.pem").display()
    );
    let port = free_port();
    let mut daemon = daemon(neap, &config(dir, port, broker_port, &tls), dir);
    // One handshake and one request, as a health check makes.
    let request = format!("GET /healthz HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n\r\n");
    let mut client = Command::new("openssl")
        .args(["s_client", "-quiet", "-connect", &format!("127.0.0.1:{port}")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("openssl runs");
    client.stdin.as_mut().expect("piped").write_all(request.as_bytes()).expect("asked");
    let answer = client.wait_with_output().expect("answered").stdout;
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    std::thread::sleep(SETTLE);
    let memory = memory(&daemon, dir);
    stop(&mut daemon);
    stop(&mut broker);
    memory
}

/// Below a directory, at any depth.
fn directories(dir: &Path) -> usize {
    let below = fs::read_dir(dir).into_iter().flatten().flatten();
    below.filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())).map(|e| 1 + directories(&e.path())).sum()
}

fn memory(daemon: &Child, dir: &Path) -> Memory {
    let state = dir.join("run/launcher").display().to_string();
    Memory { daemon: pss(Path::new(&format!("/proc/{}", daemon.id()))), launcher: pss_below(&state) }
}

fn cgroup_name(port: u16) -> String {
    format!("neap-bench-node-{}-{port}", std::process::id())
}

fn config(dir: &Path, port: u16, broker_port: u16, http: &str) -> PathBuf {
    let path = dir.join("neap.toml");
    let cgroup = cgroup_name(port);
    let shown = dir.display();
    let text = format!(
        "[node]\nid = \"bench\"\ndata_dir = \"{shown}/data\"\nrun_dir = \"{shown}/run\"\n\
         functions_dir = \"{shown}/functions.d\"\ncgroup = \"{cgroup}\"\n\
         [http]\nlisten = \"127.0.0.1:{port}\"\n{http}\
         [mqtt]\nurl = \"mqtt://127.0.0.1:{broker_port}\"\n"
    );
    fs::write(&path, text).expect("written");
    path
}

fn daemon(neap: &Path, config: &Path, dir: &Path) -> Child {
    let log = fs::File::create(dir.join("log")).expect("a log");
    let child = Command::new(neap)
        .args(["daemon", "--config"])
        .arg(config)
        .stderr(log)
        .stdout(Stdio::null())
        .spawn()
        .expect("the daemon starts");
    let begun = Instant::now();
    while cli(neap, dir, &["status"]).is_err() {
        let log = || fs::read_to_string(dir.join("log")).unwrap_or_default();
        assert!(begun.elapsed() < READY, "the daemon does not get ready: {}", log());
        std::thread::sleep(Duration::from_millis(50));
    }
    child
}

fn cli(neap: &Path, dir: &Path, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(neap)
        .args(arguments)
        .env("NEAP_SOCKET", dir.join("run/neap.sock"))
        .output()
        .map_err(|err| err.to_string())?;
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

fn broker(dir: &Path) -> (Child, u16) {
    let port = free_port();
    let path = dir.join("mosquitto.conf");
    let text = format!("user root\nlistener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\n");
    fs::write(&path, text).expect("written");
    let child = Command::new("mosquitto")
        .arg("-c")
        .arg(&path)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("mosquitto is installed");
    let begun = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(begun.elapsed() < READY, "mosquitto does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    (child, port)
}

fn stop(child: &mut Child) {
    if let Some(pid) = rustix::process::Pid::from_raw(child.id() as i32) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    let _ = child.wait();
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("its address").port()
}

/// One kept-alive connection.
struct Http {
    stream: BufReader<TcpStream>,
    port: u16,
}

impl Http {
    fn connect(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("the daemon listens");
        stream.set_nodelay(true).expect("an option of TCP");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("an option of sockets");
        Self { stream: BufReader::new(stream), port }
    }

    /// A synchronous call; an error when it was not answered with the word.
    fn call(&mut self, function: &str) -> Result<Duration, String> {
        let request = format!(
            "POST /function/{function} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: text/plain\r\nContent-Length: 4\r\n\r\n21.5"
        );
        let begun = Instant::now();
        let answer = self.stream.get_mut().write_all(request.as_bytes()).and_then(|()| self.answer());
        let took = begun.elapsed();
        match answer {
            Ok((200, body)) if body == format!("{WORD}\n").as_bytes() => Ok(took),
            Ok((status, body)) => Err(format!("{status}: {}", String::from_utf8_lossy(&body))),
            Err(err) => {
                *self = Self::connect(self.port);
                Err(err.to_string())
            }
        }
    }

    fn get(&mut self, path: &str) -> Result<String, String> {
        let request = format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n");
        let answer = self.stream.get_mut().write_all(request.as_bytes()).and_then(|()| self.answer());
        match answer {
            Ok((200, body)) => Ok(String::from_utf8_lossy(&body).into_owned()),
            Ok((status, _)) => Err(status.to_string()),
            Err(err) => Err(err.to_string()),
        }
    }

    fn answer(&mut self) -> std::io::Result<(u16, Vec<u8>)> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        let status = line.split(' ').nth(1).and_then(|text| text.parse().ok()).unwrap_or(0);
        let mut length = None;
        loop {
            line.clear();
            if self.stream.read_line(&mut line)? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            let field = line.trim_end().to_ascii_lowercase();
            if field.is_empty() {
                break;
            }
            if let Some(value) = field.strip_prefix("content-length:") {
                length = value.trim().parse::<usize>().ok();
            }
        }
        let mut body = Vec::new();
        match length {
            Some(length) => {
                body.resize(length, 0);
                self.stream.read_exact(&mut body)?;
            }
            None => loop {
                line.clear();
                self.stream.read_line(&mut line)?;
                let size = usize::from_str_radix(line.trim(), 16).unwrap_or(0);
                let mut chunk = vec![0; size + 2];
                self.stream.read_exact(&mut chunk)?;
                if size == 0 {
                    break;
                }
                body.extend_from_slice(&chunk[..size]);
            },
        }
        Ok((status, body))
    }
}

/// As much of MQTT 3.1.1 as it takes to publish at QoS 1 and to see what comes back.
struct Mqtt {
    stream: TcpStream,
}

impl Mqtt {
    fn connect(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("mosquitto listens");
        stream.set_nodelay(true).expect("an option of TCP");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("an option of sockets");
        let mut mqtt = Self { stream };
        mqtt.send(0x10, b"\x00\x04MQTT\x04\x02\x00\x00\x00\x05bench");
        assert_eq!(mqtt.receive().0 >> 4, 2, "CONNACK");
        mqtt.send(0x82, b"\x00\x01\x00\x09bench/out\x00");
        assert_eq!(mqtt.receive().0 >> 4, 9, "SUBACK");
        mqtt
    }

    /// Publishes an event and waits for its function's output, which neap publishes after the
    /// outcome's commit.
    fn there_and_back(&mut self) -> Duration {
        let begun = Instant::now();
        self.send(0x32, b"\x00\x08bench/in\x00\x0221.5");
        loop {
            let (first, _) = self.receive();
            if first >> 4 == 3 {
                return begun.elapsed();
            }
        }
    }

    fn send(&mut self, first: u8, body: &[u8]) {
        let length = u8::try_from(body.len()).expect("short");
        assert!(length < 128, "one byte of length");
        let packet = [&[first, length][..], body].concat();
        self.stream.write_all(&packet).expect("the broker takes it");
    }

    fn receive(&mut self) -> (u8, Vec<u8>) {
        let mut head = [0; 2];
        self.stream.read_exact(&mut head).expect("the broker answers");
        let mut length = usize::from(head[1] & 0x7f);
        if head[1] & 0x80 != 0 {
            let mut more = [0];
            self.stream.read_exact(&mut more).expect("the length's second byte");
            length |= usize::from(more[0]) << 7;
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).expect("the packet's body");
        (head[0], body)
    }
}
