//! `mosquitto_pub` and `mosquitto_sub`: an MQTT client that shares no code with neap.

use super::{terminate, tied, wait_until};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Publishes at QoS 1 over MQTT 5; returns when the broker has acknowledged it.
#[track_caller]
pub fn publish(port: u16, topic: &str, payload: impl AsRef<[u8]>) {
    publish_with(port, topic, payload, &[]);
}

/// The same with more of `mosquitto_pub`'s options; a later `-q` or `-V` wins.
#[track_caller]
pub fn publish_with(port: u16, topic: &str, payload: impl AsRef<[u8]>, options: &[&str]) {
    let mut child = Command::new("mosquitto_pub")
        .args(["-h", "127.0.0.1", "-p", &port.to_string(), "-V", "5", "-q", "1", "-t", topic, "-s"])
        .args(options)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start mosquitto_pub");
    child.stdin.take().expect("stdin is piped").write_all(payload.as_ref()).expect("write a payload");
    let output = child.wait_with_output().expect("wait for mosquitto_pub");
    assert!(
        output.status.success(),
        "publish to `{topic}`: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
}

/// One message for each line, over one connection, QoS 1; returns when all are acknowledged.
#[track_caller]
pub fn publish_lines<L: AsRef<str>>(port: u16, topic: &str, lines: impl IntoIterator<Item = L>) {
    let mut child = Command::new("mosquitto_pub")
        .args(["-h", "127.0.0.1", "-p", &port.to_string(), "-V", "5", "-q", "1", "-t", topic, "-l"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start mosquitto_pub");
    let mut stdin = std::io::BufWriter::new(child.stdin.take().expect("stdin is piped"));
    for line in lines {
        writeln!(stdin, "{}", line.as_ref()).expect("write a line");
    }
    drop(stdin);
    let output = child.wait_with_output().expect("wait for mosquitto_pub");
    assert!(
        output.status.success(),
        "publish to `{topic}`: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
}

/// What a subscriber got. `properties` is empty on 3.1.1; repeated user properties are one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub topic: String,
    pub payload: Vec<u8>,
    pub qos: u8,
    pub retain: bool,
    pub properties: serde_json::Value,
}

impl Message {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.payload).into_owned()
    }

    /// A user property, as CloudEvents' binary mode sends its attributes.
    pub fn user_property(&self, name: &str) -> Option<&str> {
        self.properties.get("user-properties")?.get(name)?.as_str()
    }

    pub fn property(&self, name: &str) -> Option<&str> {
        self.properties.get(name)?.as_str()
    }
}

/// `mosquitto_sub` with a persistent session: what is published while it is stopped arrives
/// when one with the same id is started again.
#[derive(Debug)]
pub struct Subscriber {
    child: Child,
    messages: Arc<Mutex<Vec<Message>>>,
    reader: Option<std::thread::JoinHandle<()>>,
}

impl Subscriber {
    /// MQTT 5, QoS 1. Returns when the broker has the subscription: what is published from now
    /// on arrives.
    pub fn start(port: u16, client_id: &str, filters: &[&str]) -> Self {
        Self::start_with(port, client_id, filters, &["-V", "5", "-x", "86400"])
    }

    /// MQTT 3.1.1: no properties.
    pub fn start_v311(port: u16, client_id: &str, filters: &[&str]) -> Self {
        Self::start_with(port, client_id, filters, &["-V", "311"])
    }

    pub fn start_with(port: u16, client_id: &str, filters: &[&str], options: &[&str]) -> Self {
        // -d tells of the SUBACK; stdout then holds lines of both kinds, told apart by the `=`.
        // They are flushed at different times, unless stdout is line buffered.
        let mut command = tied("stdbuf");
        command.args(["-oL", "mosquitto_sub"]);
        command.args(["-h", "127.0.0.1", "-p", &port.to_string(), "-i", client_id, "-q", "1", "-c", "-d"]);
        command.args(["-F", "=%x %j"]).args(options);
        for filter in filters {
            command.args(["-t", filter]);
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("start mosquitto_sub");

        let messages = Arc::new(Mutex::new(Vec::new()));
        let subscribed = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stdout = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let (sink, seen) = (messages.clone(), subscribed.clone());
        let reader = std::thread::spawn(move || {
            for line in stdout.split(b'\n') {
                let Ok(line) = line else { break };
                if let Some(message) = parse(&line) {
                    sink.lock().expect("no holder panics").push(message);
                } else if line.windows(12).any(|part| part == b"Subscribed (") {
                    seen.store(true, std::sync::atomic::Ordering::Release);
                }
            }
        });
        wait_until(Duration::from_secs(20), &format!("mosquitto_sub `{client_id}` is subscribed"), || {
            if let Some(status) = child.try_wait().expect("wait for mosquitto_sub") {
                panic!("mosquitto_sub `{client_id}` ended: {status}");
            }
            subscribed.load(std::sync::atomic::Ordering::Acquire)
        });
        Self { child, messages, reader: Some(reader) }
    }

    pub fn messages(&self) -> Vec<Message> {
        self.messages.lock().expect("no holder panics").clone()
    }

    pub fn count(&self) -> usize {
        self.messages.lock().expect("no holder panics").len()
    }

    /// Waits until at least `count` messages came.
    #[track_caller]
    pub fn wait_for(&self, count: usize, deadline: Duration) -> Vec<Message> {
        if !super::holds_within(deadline, || self.count() >= count) {
            let messages = self.messages();
            let last: Vec<_> = messages.iter().rev().take(5).collect();
            panic!("waited {deadline:?} for {count} messages, got {}; the last: {last:?}", messages.len());
        }
        self.messages()
    }

    /// Leaves; the broker keeps the session. What came so far.
    pub fn stop(mut self) -> Vec<Message> {
        terminate(&mut self.child, Duration::from_secs(5));
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        self.messages()
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        terminate(&mut self.child, Duration::from_secs(5));
    }
}

fn parse(line: &[u8]) -> Option<Message> {
    let line = String::from_utf8_lossy(line);
    let (hex, json) = line.strip_prefix('=')?.split_once(' ')?;
    let json: serde_json::Value = serde_json::from_str(json).ok()?;
    let payload = (0..hex.len() / 2)
        .map(|index| u8::from_str_radix(&hex[2 * index..2 * index + 2], 16).expect("%x prints hex"))
        .collect();
    Some(Message {
        topic: json["topic"].as_str()?.to_owned(),
        payload,
        qos: u8::try_from(json["qos"].as_u64()?).ok()?,
        retain: json["retain"].as_u64()? == 1,
        properties: json.get("properties").cloned().unwrap_or_default(),
    })
}

/// What the other tests lean on: sessions that outlive their client and their broker, TLS.
#[test]
fn a_persistent_session_keeps_what_came_while_it_was_away() {
    let certificates = super::tls::Certificates::new();
    let mut broker = super::Mosquitto::builder().persistent().start();
    let tls = super::Mosquitto::builder().tls(&certificates, true).start();

    let subscriber = Subscriber::start(broker.port(), "keeper", &["kept/#"]);
    publish_with(broker.port(), "kept/a", "one", &["-D", "publish", "user-property", "id", "7"]);
    subscriber.wait_for(1, Duration::from_secs(10));
    let first = subscriber.stop();
    publish_with(broker.port(), "kept/b", [0xff, 0x00], &["-V", "311"]);
    broker.restart();
    let second = Subscriber::start(broker.port(), "keeper", &["kept/#"]).wait_for(1, Duration::from_secs(10));

    assert_eq!((first[0].text().as_str(), first[0].user_property("id")), ("one", Some("7")));
    assert_eq!((second[0].topic.as_str(), second[0].payload.as_slice()), ("kept/b", &[0xff, 0x00][..]));
    let files = [&certificates.ca, &certificates.client_cert, &certificates.client_key]
        .map(|path| path.to_str().expect("the path is UTF-8"));
    publish_with(
        tls.port(),
        "over/tls",
        "x",
        &["-h", "localhost", "--cafile", files[0], "--cert", files[1], "--key", files[2]],
    );
}
