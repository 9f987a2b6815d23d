//! A broker that can be killed at any moment without losing what it acknowledged: it appends
//! each message to a file and calls fdatasync before its PUBACK. The receiving end of the kill
//! test, which a real mosquitto can't be (killed, it loses what it acknowledged).
//!
//! It is a process of its own: this test binary once more, asked by an environment variable.
//! It serves MQTT 3.1.1 and 5, takes PUBLISH of QoS 0 and 1 and hands nothing on.

use super::packet::{self, Connect, Packet, Publish};
use super::{TestDir, accepts, free_port, tail, tied, wait_until};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const ASKED: &str = "NEAP_TEST_RECORDING_BROKER";

/// How it differs from a broker that takes everything.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Options {
    /// MQTT 5: what its CONNACK announces; it does not enforce it.
    pub receive_max: Option<u16>,
    /// MQTT 5: PUBACK with this reason code for topics that begin so; nothing is recorded.
    /// On 3.1.1, which has no such code, the connection is closed.
    pub refuse: Vec<(String, u8)>,
    /// The connection is closed when a message for a topic that begins so arrives.
    pub disconnect: Vec<String>,
    /// CONNACK's code, when it is not 0 (accepted).
    pub connect_code: u8,
    /// MQTT 5 is refused as "unsupported protocol version"; 3.1.1 is served.
    pub v311_only: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub topic: String,
    pub qos: u8,
    pub retain: bool,
    /// As `mosquitto_sub -F %j` names them; empty on 3.1.1.
    pub properties: serde_json::Value,
    payload_base64: String,
}

impl Record {
    pub fn payload(&self) -> Vec<u8> {
        STANDARD.decode(&self.payload_base64).expect("the broker wrote base64")
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.payload()).into_owned()
    }

    pub fn user_property(&self, name: &str) -> Option<&str> {
        self.properties.get("user-properties")?.get(name)?.as_str()
    }
}

#[derive(Debug)]
pub struct RecordingBroker {
    dir: TestDir,
    port: u16,
    options: Options,
    child: Option<Child>,
    counted: Mutex<Counted>,
}

/// How far `count` has read; the whole file each time would cost more than the broker itself.
#[derive(Debug, Default)]
struct Counted {
    bytes: u64,
    records: usize,
}

impl RecordingBroker {
    pub fn start(options: Options) -> Self {
        let mut broker = Self::stopped(options);
        broker.restart();
        broker
    }

    /// Nothing listens on its port until `restart`.
    pub fn stopped(options: Options) -> Self {
        Self {
            dir: TestDir::new("recording"),
            port: free_port(),
            options,
            child: None,
            counted: Mutex::default(),
        }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.port)
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("kill the recording broker");
            child.wait().expect("wait for the recording broker");
        }
    }

    /// The same with other options from now on.
    pub fn restart_with(&mut self, options: Options) {
        self.options = options;
        self.restart();
    }

    /// Kills it if it runs, starts it on the same port and file; returns when it accepts.
    pub fn restart(&mut self) {
        self.kill();
        let asked = Asked { port: self.port, file: self.file(), options: self.options.clone() };
        let log = File::options().create(true).append(true).open(self.dir.join("log")).expect("open a log");
        let child = tied(std::env::current_exe().expect("know this binary"))
            .args(["--exact", "support::recording::recorded_before_acknowledged", "--nocapture"])
            .env(ASKED, serde_json::to_string(&asked).expect("write the broker's options"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("clone a descriptor"))
            .stderr(log)
            .spawn()
            .expect("start the recording broker");
        self.child = Some(child);
        let (port, log) = (self.port, self.dir.join("log"));
        let child = self.child.as_mut().expect("just set");
        wait_until(Duration::from_secs(20), &format!("the recording broker on port {port}"), || {
            if let Some(status) = child.try_wait().expect("wait for the recording broker") {
                panic!("the recording broker ended: {status}\n{}", tail(&log, 20));
            }
            accepts(port)
        });
    }

    /// Everything it acknowledged so far (and perhaps a little more), in order of arrival.
    pub fn records(&self) -> Vec<Record> {
        let Ok(file) = File::open(self.file()) else { return Vec::new() };
        let mut records = Vec::new();
        for line in BufReader::new(file).split(b'\n') {
            // The last line may be half written at this moment.
            let Ok(record) = serde_json::from_slice(&line.expect("read the records")) else { break };
            records.push(record);
        }
        records
    }

    /// How many records there are, without reading them again.
    pub fn count(&self) -> usize {
        let mut counted = self.counted.lock().expect("no holder panics");
        let Ok(mut file) = File::open(self.file()) else { return 0 };
        file.seek(SeekFrom::Start(counted.bytes)).expect("go to where it was");
        let mut text = Vec::new();
        file.read_to_end(&mut text).expect("read the records");
        // A torn line at the end may be cut off later: only whole ones count.
        if let Some(last) = text.iter().rposition(|&byte| byte == b'\n') {
            counted.bytes += last as u64 + 1;
            counted.records += text[..=last].iter().filter(|&&byte| byte == b'\n').count();
        }
        counted.records
    }

    fn file(&self) -> PathBuf {
        self.dir.join("records")
    }
}

impl Drop for RecordingBroker {
    fn drop(&mut self) {
        self.kill();
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Asked {
    port: u16,
    file: PathBuf,
    options: Options,
}

fn serve(asked: Asked) -> ! {
    let records = Arc::new(Mutex::new(open(&asked.file)));
    let listener = TcpListener::bind(("127.0.0.1", asked.port)).expect("listen");
    let options = Arc::new(asked.options);
    loop {
        let (stream, _) = listener.accept().expect("accept");
        let (records, options) = (records.clone(), options.clone());
        std::thread::spawn(move || {
            if let Err(error) = connection(&stream, &records, &options) {
                eprintln!("connection: {error}");
            }
            let _ = stream.shutdown(std::net::Shutdown::Both);
        });
    }
}

/// Opens the file to append, cutting off a line that a kill left half written.
fn open(path: &Path) -> File {
    let mut file = File::options()
        .create(true)
        .read(true)
        .write(true)
        .truncate(false)
        .open(path)
        .expect("open the records");
    let mut text = Vec::new();
    file.read_to_end(&mut text).expect("read the records");
    let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |last| last + 1);
    file.set_len(whole as u64).expect("cut the torn line");
    file.seek(SeekFrom::End(0)).expect("go to the end");
    file
}

fn connection(stream: &TcpStream, records: &Mutex<File>, options: &Options) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut writer = stream;
    let mut reader = BufReader::with_capacity(64 * 1024, stream);
    let Some(first) = Packet::read(&mut reader)? else { return Ok(()) };
    if first.kind != packet::CONNECT {
        return Ok(());
    }
    let connect = Connect::parse(&first.body)?;
    let version_refused = connect.level == 5 && options.v311_only;
    let code = if version_refused { 0x84 } else { options.connect_code };
    let mut body = vec![0, code];
    if connect.level == 5 {
        let mut properties = Vec::new();
        if let Some(max) = options.receive_max {
            properties.push(0x21);
            properties.extend_from_slice(&max.to_be_bytes());
        }
        body.push(u8::try_from(properties.len()).expect("a few bytes"));
        body.extend_from_slice(&properties);
    }
    writer.write_all(&Packet::new(packet::CONNACK, 0, body).to_bytes())?;
    if code != 0 {
        return Ok(());
    }

    // One fdatasync for all that arrived together.
    let (mut lines, mut answers) = (Vec::new(), Vec::new());
    loop {
        let Some(packet) = Packet::read(&mut reader)? else { return Ok(()) };
        match packet.kind {
            packet::PUBLISH => {
                let publish = Publish::parse(&packet, connect.level)?;
                if options.disconnect.iter().any(|prefix| publish.topic.starts_with(prefix)) {
                    return Ok(());
                }
                let refused = options.refuse.iter().find(|(prefix, _)| publish.topic.starts_with(prefix));
                let code = match refused {
                    Some(_) if connect.level != 5 => return Ok(()),
                    Some((_, code)) => *code,
                    None => {
                        let record = Record {
                            topic: publish.topic,
                            qos: packet.qos(),
                            retain: packet.flags & 1 == 1,
                            properties: publish.properties,
                            payload_base64: STANDARD.encode(&publish.payload),
                        };
                        serde_json::to_writer(&mut lines, &record)?;
                        lines.push(b'\n');
                        0
                    }
                };
                if let Some(packet_id) = publish.packet_id {
                    answers.extend(packet::puback(packet_id, code).to_bytes());
                }
            }
            packet::SUBSCRIBE | packet::UNSUBSCRIBE => {
                let (packet_id, filters) = packet::filters(&packet, connect.level)?;
                let mut body = packet_id.to_be_bytes().to_vec();
                if connect.level == 5 {
                    body.push(0);
                }
                let subscribe = packet.kind == packet::SUBSCRIBE;
                if subscribe || connect.level == 5 {
                    body.extend(filters.iter().map(|_| u8::from(subscribe)));
                }
                let kind = if subscribe { packet::SUBACK } else { packet::UNSUBACK };
                answers.extend(Packet::new(kind, 0, body).to_bytes());
            }
            packet::PINGREQ => answers.extend(Packet::new(packet::PINGRESP, 0, Vec::new()).to_bytes()),
            packet::DISCONNECT => return Ok(()),
            _ => {}
        }
        if reader.buffer().is_empty() {
            if !lines.is_empty() {
                let mut file = records.lock().expect("no holder panics");
                file.write_all(&lines)?;
                file.sync_data()?;
                lines.clear();
            }
            writer.write_all(&answers)?;
            answers.clear();
        }
    }
}

/// Serves when it is the broker's process; else checks the broker.
#[test]
fn recorded_before_acknowledged() {
    if let Ok(asked) = std::env::var(ASKED) {
        serve(serde_json::from_str(&asked).expect("read the broker's options"));
    }
    let mut broker = RecordingBroker::start(Options {
        receive_max: Some(7),
        refuse: vec![("no/".to_owned(), 0x87)],
        ..Options::default()
    });

    super::publish_with(broker.port(), "a/b", "first", &["-D", "publish", "user-property", "id", "1"]);
    super::publish_with(broker.port(), "a/c", [0xff, 0x00], &["-V", "311"]);
    broker.kill();
    File::options()
        .append(true)
        .open(broker.file())
        .and_then(|mut file| file.write_all(b"{\"topic\": \"to"))
        .expect("tear the last line");
    broker.restart();
    super::publish_lines(broker.port(), "many", (0..500).map(|n| n.to_string()));

    let records = broker.records();
    assert_eq!((records.len(), broker.count()), (502, 502));
    assert_eq!((records[0].topic.as_str(), records[0].text().as_str()), ("a/b", "first"));
    assert_eq!(records[0].user_property("id"), Some("1"));
    assert_eq!(records[1].payload(), [0xff, 0x00]);
    assert!(records[2..].iter().enumerate().all(|(n, record)| record.text() == n.to_string()));
}
