//! A registry on loopback (Debian's docker-registry), and between it and whoever pulls a proxy
//! that can do what links, caches and attackers do: cut, stall, refuse, lie, swap bytes, ask for
//! tokens. It writes down what was asked, and how many bytes of blobs it handed out.

use super::tls::Certificates;
use super::{TestDir, free_port, tail, terminate, tied, wait_until};
use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub struct Registry {
    port: u16,
    dir: TestDir,
    child: Child,
    creds: Option<&'static str>,
}

impl Registry {
    /// Over plain HTTP, for everybody.
    pub fn start() -> Self {
        Self::begin("", None)
    }

    pub fn over_tls(certificates: &Certificates) -> Self {
        let (cert, key) = (certificates.server_cert.display(), certificates.server_key.display());
        Self::begin(&format!("  tls:\n    certificate: {cert}\n    key: {key}\n"), None)
    }

    /// For `gw` with the password `secret`.
    pub fn with_password() -> Self {
        Self::begin("auth:\n  htpasswd:\n    realm: test\n    path: HTPASSWD\n", Some("gw:secret"))
    }

    /// `more`: what follows the address in its configuration.
    fn begin(more: &str, creds: Option<&'static str>) -> Self {
        let dir = TestDir::new("registry");
        let port = free_port();
        // bcrypt of `secret`.
        let htpasswd = "gw:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";
        let htpasswd = dir.write("htpasswd", htpasswd);
        let more = more.replace("HTPASSWD", &htpasswd.display().to_string());
        let config = format!(
            "version: 0.1\nlog:\n  level: warn\nstorage:\n  filesystem:\n    rootdirectory: {}\n  delete:\n    enabled: true\n\
             http:\n  addr: 127.0.0.1:{port}\n{more}",
            dir.join("data").display()
        );
        let file = dir.write("config.yml", config);
        let log = std::fs::File::create(dir.join("log")).expect("make a log");
        let child = tied("docker-registry")
            .arg("serve")
            .arg(file)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("clone a descriptor"))
            .stderr(log)
            .spawn()
            .expect("start docker-registry");
        let registry = Self { port, dir, child, creds };
        wait_until(Duration::from_secs(60), "the registry listens", || super::accepts(port));
        registry
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// `127.0.0.1:PORT`
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// `source`: as skopeo names it; `name`: `team/app:1`.
    pub fn push(&self, source: &str, name: &str) {
        let target = format!("docker://{}/{name}", self.host());
        let creds = self.creds.map(|creds| format!("--dest-creds={creds}"));
        let mut skopeo = Command::new("skopeo");
        skopeo.args(["copy", "--quiet", "--dest-tls-verify=false"]).args(creds);
        run(skopeo.args([source, &target]));
    }

    /// A manifest or an index as it is: skopeo knows no index in an index.
    pub fn put_manifest(&self, name: &str, reference: &str, media_type: &str, body: &str) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).expect("connect to the registry");
        write!(
            stream,
            "PUT /v2/{name}/manifests/{reference} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\
             content-type: {media_type}\r\ncontent-length: {}\r\n\r\n{body}",
            self.host(),
            body.len()
        )
        .expect("send a manifest");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("docker-registry:\n{}", tail(&self.dir.join("log"), 20));
        }
        terminate(&mut self.child, Duration::from_secs(5));
    }
}

/// Passes connections on as they are, and counts them.
pub struct Passage {
    port: u16,
    accepted: Arc<AtomicU64>,
}

impl Passage {
    pub fn to(port: u16) -> Self {
        let own = free_port();
        let listener = TcpListener::bind(("127.0.0.1", own)).expect("listen");
        let accepted = Arc::new(AtomicU64::new(0));
        let count = accepted.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                count.fetch_add(1, Ordering::AcqRel);
                let Ok(server) = TcpStream::connect(("127.0.0.1", port)) else { continue };
                for (mut from, mut to) in [
                    (client.try_clone().expect("clone"), server.try_clone().expect("clone")),
                    (server, client),
                ] {
                    std::thread::spawn(move || {
                        let _ = std::io::copy(&mut from, &mut to); // until one of them hangs up
                        let _ = to.shutdown(std::net::Shutdown::Write);
                    });
                }
            }
        });
        Self { port: own, accepted }
    }

    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Acquire)
    }
}

/// What the proxy does to one request for a layer; what is not in line passes as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// So many bytes of the body, then the end of the connection.
    Cut(u64),
    /// So many bytes, then nothing more, for as long as the client waits.
    Stall(u64),
    Status(u16, Option<u64>),
    /// The whole blob, whatever part was asked for.
    Whole,
    /// Content-Range begins elsewhere than the body.
    LieRange,
    /// One byte of the body is another.
    Swap(u64),
    /// The blob is elsewhere: 307.
    Redirect(String),
}

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Asked {
    pub path: String,
    pub headers: BTreeMap<String, String>,
}

#[derive(Default)]
struct State {
    faults: Mutex<VecDeque<Fault>>,
    /// After each request for a layer that has no fault of its own.
    always: Mutex<Option<Fault>>,
    asked: Mutex<Vec<Asked>>,
    /// User and password that the token service wants.
    tokens: Mutex<Option<(String, String)>>,
    /// A refresh token that it takes, too.
    identity: Mutex<Option<String>>,
    blob_bytes: AtomicU64,
    port: u16,
}

pub struct Proxy {
    port: u16,
    state: Arc<State>,
}

/// Blobs below this are configurations: their answers are left alone.
const LAYER_BYTES: u64 = 16 * 1024;

impl Proxy {
    pub fn start(registry: u16) -> Self {
        let port = free_port();
        let listener = TcpListener::bind(("127.0.0.1", port)).expect("listen");
        let state = Arc::new(State { port, ..State::default() });
        let shared = state.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let state = shared.clone();
                std::thread::spawn(move || {
                    let _ = serve(&state, client, registry); // the client hung up
                });
            }
        });
        Self { port, state }
    }

    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn faults(&self, faults: impl IntoIterator<Item = Fault>) {
        self.state.faults.lock().expect("no holder panics").extend(faults);
    }

    pub fn always(&self, fault: Option<Fault>) {
        *self.state.always.lock().expect("no holder panics") = fault;
    }

    pub fn want_tokens(&self, user: &str, password: &str) {
        *self.state.tokens.lock().expect("no holder panics") = Some((user.into(), password.into()));
    }

    /// The refresh token that the token service takes beside the password.
    pub fn know_identity(&self, token: &str) {
        *self.state.identity.lock().expect("no holder panics") = Some(token.into());
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.state.asked.lock().expect("no holder panics").clone()
    }

    /// Requests for layers and configurations so far.
    pub fn blobs_asked(&self) -> usize {
        self.asked().iter().filter(|asked| asked.path.contains("/blobs/")).count()
    }

    /// Bytes of blobs' bodies that were handed out.
    pub fn blob_bytes(&self) -> u64 {
        self.state.blob_bytes.load(Ordering::Acquire)
    }
}

fn serve(state: &State, client: TcpStream, registry: u16) -> std::io::Result<()> {
    let mut reader = BufReader::new(client.try_clone()?);
    let mut client = client;
    let (line, mut headers) = head(&mut reader)?;
    let path = line.split(' ').nth(1).unwrap_or("").to_owned();
    state
        .asked
        .lock()
        .expect("no holder panics")
        .push(Asked { path: path.clone(), headers: headers.clone() });
    if let Some((user, password)) = state.tokens.lock().expect("no holder panics").clone() {
        let given = headers.get("authorization").cloned().unwrap_or_default();
        if line.starts_with("POST /token ") {
            let length = headers.get("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
            let mut form = vec![0; length];
            reader.read_exact(&mut form)?;
            let form = String::from_utf8_lossy(&form).into_owned();
            let known = state.identity.lock().expect("no holder panics").clone();
            let good = known.is_some_and(|token| form.contains(&format!("refresh_token={token}")))
                && form.contains("grant_type=refresh_token");
            let (status, body) =
                if good { ("200 OK", "{\"access_token\":\"let-me-in\"}") } else { ("401 No", "{}") };
            return write!(client, "HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        }
        if path.starts_with("/token?") {
            let basic = format!("Basic {}", base64(&format!("{user}:{password}")));
            let (status, body) =
                if given == basic { ("200 OK", "{\"token\":\"let-me-in\"}") } else { ("401 No", "{}") };
            return write!(client, "HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        }
        if given != "Bearer let-me-in" {
            let realm = format!("http://127.0.0.1:{}/token", state.port);
            let challenge = format!("Bearer realm=\"{realm}\",service=\"test\",scope=\"repository:x:pull\"");
            return write!(
                client,
                "HTTP/1.1 401 No\r\nwww-authenticate: {challenge}\r\ncontent-length: 0\r\n\r\n"
            );
        }
        headers.remove("authorization");
    }
    let mut fault = None;
    if path.contains("/blobs/") && size_of(registry, &path)? >= LAYER_BYTES {
        fault = state.faults.lock().expect("no holder panics").pop_front();
        fault = fault.or_else(|| state.always.lock().expect("no holder panics").clone());
    }
    match &fault {
        Some(Fault::Status(status, after)) => {
            let after = after.map(|after| format!("retry-after: {after}\r\n")).unwrap_or_default();
            return write!(client, "HTTP/1.1 {status} No\r\n{after}content-length: 0\r\n\r\n");
        }
        Some(Fault::Redirect(to)) => {
            return write!(client, "HTTP/1.1 307 There\r\nlocation: {to}{path}\r\ncontent-length: 0\r\n\r\n");
        }
        Some(Fault::Whole) => drop(headers.remove("range")),
        _ => {}
    }
    let mut upstream = TcpStream::connect(("127.0.0.1", registry))?;
    write!(upstream, "GET {path} HTTP/1.1\r\nhost: 127.0.0.1:{registry}\r\nconnection: close\r\n")?;
    for (name, value) in headers.iter().filter(|(name, _)| ["accept", "range"].contains(&name.as_str())) {
        write!(upstream, "{name}: {value}\r\n")?;
    }
    upstream.write_all(b"\r\n")?;
    let mut answer = BufReader::new(upstream);
    let (status, mut told) = head(&mut answer)?;
    if fault == Some(Fault::LieRange)
        && let Some(range) = told.get_mut("content-range")
    {
        *range = range.replacen("bytes ", "bytes 1", 1);
    }
    write!(client, "{status}\r\n")?;
    for (name, value) in told.iter().filter(|(name, _)| *name != "connection") {
        write!(client, "{name}: {value}\r\n")?;
    }
    client.write_all(b"connection: close\r\n\r\n")?;
    let mut sent = 0;
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let max = match fault {
            Some(Fault::Cut(bytes) | Fault::Stall(bytes)) => {
                usize::try_from(bytes - sent).unwrap_or(usize::MAX)
            }
            _ => usize::MAX,
        };
        if max == 0 {
            break;
        }
        let room = buffer.len().min(max);
        let got = answer.read(&mut buffer[..room])?;
        if got == 0 {
            break;
        }
        if let Some(Fault::Swap(at)) = fault
            && (sent..sent + got as u64).contains(&at)
        {
            buffer[(at - sent) as usize] ^= 1;
        }
        client.write_all(&buffer[..got])?;
        sent += got as u64;
        if path.contains("/blobs/") {
            state.blob_bytes.fetch_add(got as u64, Ordering::AcqRel);
        }
    }
    if matches!(fault, Some(Fault::Stall(_))) {
        let _ = reader.read(&mut buffer); // until it hangs up
    }
    Ok(())
}

fn head(reader: &mut impl BufRead) -> std::io::Result<(String, BTreeMap<String, String>)> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let line = line.trim_end().to_owned();
        if line.is_empty() {
            break;
        }
        lines.push(line);
    }
    let first = lines.first().cloned().unwrap_or_default();
    let headers = lines.iter().skip(1).filter_map(|line| {
        let (name, value) = line.split_once(':')?;
        Some((name.to_ascii_lowercase(), value.trim().to_owned()))
    });
    Ok((first, headers.collect()))
}

fn size_of(registry: u16, path: &str) -> std::io::Result<u64> {
    let mut stream = TcpStream::connect(("127.0.0.1", registry))?;
    write!(stream, "HEAD {path} HTTP/1.1\r\nhost: 127.0.0.1:{registry}\r\nconnection: close\r\n\r\n")?;
    let (_, headers) = head(&mut BufReader::new(stream))?;
    Ok(headers.get("content-length").and_then(|text| text.parse().ok()).unwrap_or(0))
}

fn base64(text: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::new();
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for three in text.as_bytes().chunks(3) {
        let bits =
            three.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - three.len()));
        for place in 0..4 {
            let letter = LETTERS[(bits >> (18 - 6 * place) & 63) as usize] as char;
            let _ = write!(out, "{}", if place <= three.len() { letter } else { '=' });
        }
    }
    out
}

/// An image of `layers`, each a file of random bytes of that size, as an OCI layout that skopeo
/// can push: `oci:DIR:1`.
pub fn random_image(dir: &Path, name: &str, layers: &[usize]) -> String {
    let layout = dir.join(name);
    let image = format!("{}:1", layout.display());
    let umoci = |arguments: &[&str]| run(Command::new("umoci").args(arguments));
    umoci(&["init", "--layout", &layout.display().to_string()]);
    umoci(&["new", "--image", &image]);
    for (at, bytes) in layers.iter().enumerate() {
        let root: PathBuf = dir.join(format!("{name}-{at}"));
        std::fs::create_dir_all(&root).expect("make a directory");
        let mut content = vec![0; *bytes];
        fastrand::fill(&mut content);
        std::fs::write(root.join(format!("file-{at}")), content).expect("write a file");
        let tar = dir.join(format!("{name}-{at}.tar"));
        run(Command::new("tar").arg("-C").arg(&root).arg("-cf").arg(&tar).arg("."));
        umoci(&["raw", "add-layer", "--image", &image, &tar.display().to_string()]);
        std::fs::remove_file(tar).expect("there");
        std::fs::remove_dir_all(root).expect("there");
    }
    format!("oci:{image}")
}

pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}: {stderr}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}
