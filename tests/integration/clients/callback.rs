//! Callbacks of asynchronous calls, to receivers that answer, fail, are slow or are away.

use super::{SOON, alone, function, possible};
use crate::support::{Node, free_port, http, wait_until};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

/// Takes requests and answers each with `status`; none at all when that is 0.
struct Receiver {
    port: u16,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Receiver {
    fn start(port: u16, status: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).expect("a free port");
        let requests: Arc<Mutex<Vec<String>>> = Arc::default();
        let received = requests.clone();
        // Ends with the test's process.
        std::thread::spawn(move || {
            let mut silent = Vec::new();
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { continue };
                let text = read(&mut stream);
                received.lock().expect("no receiver panics").push(text);
                if status == 0 {
                    silent.push(stream);
                } else {
                    let _ = write!(
                        stream,
                        "HTTP/1.1 {status} X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                    );
                }
            }
        });
        Self { port, requests }
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}/in?site=7", self.port)
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().expect("no receiver panics").clone()
    }
}

/// A whole request: names of its headers in lower case.
fn read(stream: &mut std::net::TcpStream) -> String {
    let (mut all, mut piece) = (Vec::new(), [0; 4096]);
    loop {
        let text = String::from_utf8_lossy(&all).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.to_ascii_lowercase();
            let length = length.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
            if body.len() >= length.unwrap_or(0) {
                return text;
            }
        }
        match stream.read(&mut piece) {
            Ok(amount @ 1..) => all.extend_from_slice(&piece[..amount]),
            _ => return text,
        }
    }
}

fn call(node: &Node, function: &str, callback: &str, data: &str) -> http::Response {
    let path = format!("/async-function/{function}");
    let headers = [("X-Callback-Url", callback), ("X-Call-Id", data)];
    http::request(node.port(), "POST", &path, &headers, data.as_bytes()).expect("an answer")
}

#[test]
fn results_are_sent_to_whom_the_caller_says() {
    if !possible() {
        return;
    }
    let node = alone(Node::builder("callback"));
    node.deploy(&function("echo", "cat; echo \" degrees\"", ""));
    node.deploy(&function("fail", "echo half; exit 3", "[retry]\nattempts = 1\n"));
    let receiver = Receiver::start(free_port(), 200);

    assert_eq!(call(&node, "echo", &receiver.url(), "21").status, 202);
    wait_until(SOON, "the result is there", || receiver.requests().len() == 1);
    assert_eq!(call(&node, "fail", &receiver.url(), "22").status, 202);
    wait_until(SOON, "the failure is there", || receiver.requests().len() == 2);

    let good = receiver.requests().remove(0);
    assert!(good.starts_with("POST /in?site=7 HTTP/1.1\r\n"), "{good}");
    assert!(good.ends_with("\r\n\r\n21 degrees\n"), "{good}");
    for line in [
        "x-call-id: 21",
        "x-function-name: echo",
        "x-function-status: 200",
        "x-duration-seconds: ",
        "content-type: text/plain",
    ] {
        assert!(good.contains(line), "{line} in {good}");
    }
    let failed = receiver.requests().remove(1);
    assert!(failed.contains("x-function-status: 500") && failed.ends_with("\r\n\r\nhalf\n"), "{failed}");
    wait_until(SOON, "nothing is owed any more", || node.status()["outbox"]["depth"] == 0);
    assert_eq!(node.status()["dead_deliveries"], 0);
    for bad in ["nowhere", "ftp://h/", "http://user:word@h/", "http://h:0/", "http://h/<a>"] {
        assert_eq!(call(&node, "echo", bad, "23").status, 400, "{bad}");
    }
    assert_eq!(call(&node, "nobody", &receiver.url(), "24").status, 404);
}

#[test]
fn receivers_wait_for_no_other_and_one_that_is_away_gets_its_own_when_it_is_back() {
    if !possible() {
        return;
    }
    let mut node = alone(Node::builder("callback-slow"));
    node.deploy(&function(
        "echo",
        "cat",
        "[retry]\nattempts = 1000\nbackoff = \"100ms\"\nbackoff_max = \"200ms\"\n",
    ));
    let slow = Receiver::start(free_port(), 0);
    let away = free_port();
    for n in 0..8 {
        assert_eq!(call(&node, "echo", &slow.url(), &format!("slow-{n}")).status, 202);
    }
    assert_eq!(call(&node, "echo", &format!("http://127.0.0.1:{away}/"), "away").status, 202);
    wait_until(SOON, "the slow one has two", || slow.requests().len() >= 2);
    wait_until(SOON, "all have run", || node.status()["inbox"]["depth"] == 0);

    let quick = Receiver::start(free_port(), 204);
    assert_eq!(call(&node, "echo", &quick.url(), "quick").status, 202);
    wait_until(SOON, "the quick one has its own", || quick.requests().len() == 1);
    // Answered is not yet settled: a kill in between would have it sent once more.
    wait_until(SOON, "its delivery is settled", || node.status()["outbox"]["depth"] == 9);
    node.kill();
    let back = Receiver::start(away, 200);
    node.start();

    wait_until(SOON, "the one that was away has its own", || back.requests().len() == 1);
    assert!(back.requests()[0].ends_with("away"), "{:?}", back.requests());
    assert_eq!(quick.requests().len(), 1);
}

#[test]
fn callback_waits_for_as_long_as_the_node_is_offline() {
    if !possible() {
        return;
    }
    // Nobody is behind either: no uplink, and no way to the receiver (a unique local address).
    let uplink = format!("mqtt://127.0.0.1:{}", free_port());
    let node = alone(Node::builder("callback-offline").uplink(&uplink));
    node.deploy(&function("echo", "cat", "[retry]\nattempts = 1\nbackoff = \"50ms\"\n"));
    let here = Receiver::start(free_port(), 500);

    assert_eq!(call(&node, "echo", "http://[fd00:6e65:6170::1]/", "one").status, 202);
    assert_eq!(call(&node, "echo", &here.url(), "two").status, 202);
    // Where the address is routed somewhere, an attempt takes ten seconds.
    wait_until(SOON * 4, "it was tried again", || {
        node.stderr().matches("a callback waits, the node is offline").count() > 1
    });
    wait_until(SOON, "one that was answered is set aside", || node.status()["dead_deliveries"] == 1);

    let owed = node.neap_json(&["deliveries"]);
    assert_eq!(owed.as_array().map(Vec::len), Some(1), "{owed}");
}

#[test]
fn callback_that_nobody_takes_is_set_aside_and_can_be_redriven() {
    if !possible() {
        return;
    }
    let node = alone(Node::builder("callback-dead"));
    node.deploy(&function("echo", "cat", "[retry]\nattempts = 2\nbackoff = \"50ms\"\n"));
    let broken = Receiver::start(free_port(), 500);
    let refusing = Receiver::start(free_port(), 410);

    assert_eq!(call(&node, "echo", &broken.url(), "one").status, 202);
    assert_eq!(call(&node, "echo", &refusing.url(), "two").status, 202);
    wait_until(SOON, "both are set aside", || node.status()["dead_deliveries"] == 2);

    assert_eq!((broken.requests().len(), refusing.requests().len()), (2, 1), "only the first is tried again");
    let dead = node.neap_json(&["deliveries", "--dead"]);
    let dead = dead.as_array().expect("a list");
    assert!(dead.iter().all(|one| one["target"] == "callback"), "{dead:?}");
    assert!(dead.iter().any(|one| one["topic"] == broken.url().as_str()
        && one["dead"].as_str().is_some_and(|why| why.contains("500"))));
    node.neap_ok(&["deliveries", "redrive", "--all"]);
    wait_until(SOON, "they were sent again", || {
        (broken.requests().len(), refusing.requests().len()) == (4, 2)
    });
}
