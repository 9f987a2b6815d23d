//! Both ends of `make bench-http`, in one static program without dependencies: a server that is
//! the function, and the client that calls it directly and through neap.
//!
//! ```text
//! probe serve                       answers on $PORT, a thread for each kept-alive connection, but
//!                                   never on a path that ends with `/never`
//! probe calls PORT PATH N PAUSE_MS  N calls on one connection, PAUSE_MS before each; prints
//!                                   each one's nanoseconds, a line each
//! probe load PORT PATH CALLERS SECONDS   prints the answers a second
//! probe until PORT PATH             tries until there is an answer; prints the nanoseconds
//! ```

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nhello";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| arguments[at].parse::<u64>().expect("a number");
    match arguments.first().map(String::as_str) {
        Some("serve") => serve(std::env::var("PORT").expect("PORT").parse().expect("a port")),
        Some("calls") => calls(number(1) as u16, &arguments[2], number(3), number(4)),
        Some("load") => load(number(1) as u16, &arguments[2], number(3), number(4)),
        Some("until") => until(number(1) as u16, &arguments[2]),
        _ => panic!("serve, calls, load or until"),
    }
}

unsafe extern "C" {
    fn signal(number: i32, handler: extern "C" fn(i32)) -> usize;
    fn _exit(code: i32) -> !;
}

/// The first process of a container ignores what it has no handler for, and would be killed only
/// after neap's ten seconds of grace.
extern "C" fn end(_: i32) {
    // SAFETY: async-signal-safe (signal-safety(7)).
    unsafe { _exit(0) }
}

fn serve(port: u16) {
    const SIGTERM: i32 = 15;
    // SAFETY: the C library that std itself links; the handler does nothing else than end.
    unsafe { signal(SIGTERM, end) };
    let listener = TcpListener::bind(("0.0.0.0", port)).expect("bind the port");
    for connection in listener.incoming() {
        let mut connection = connection.expect("accept");
        std::thread::spawn(move || {
            let _ = connection.set_nodelay(true);
            let mut read = Vec::new();
            while let Some(end) = head(&mut connection, &mut read) {
                let never = read[..end]
                    .split(|byte| *byte == b' ')
                    .nth(1)
                    .is_some_and(|path| path.ends_with(b"/never"));
                read.drain(..end);
                if never {
                    continue;
                }
                if connection.write_all(ANSWER).is_err() {
                    return;
                }
            }
        });
    }
}

/// Reads to the end of a head; where that is.
fn head(connection: &mut TcpStream, read: &mut Vec<u8>) -> Option<usize> {
    let mut piece = [0; 4096];
    loop {
        if let Some(at) = read.windows(4).position(|four| four == b"\r\n\r\n") {
            return Some(at + 4);
        }
        match connection.read(&mut piece) {
            Ok(0) | Err(_) => return None,
            Ok(amount) => read.extend_from_slice(&piece[..amount]),
        }
    }
}

struct Client {
    connection: TcpStream,
    request: Vec<u8>,
    read: Vec<u8>,
}

impl Client {
    fn open(port: u16, path: &str) -> std::io::Result<Self> {
        let connection = TcpStream::connect(("127.0.0.1", port))?;
        connection.set_nodelay(true)?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").into_bytes();
        Ok(Self { connection, request, read: Vec::new() })
    }

    /// Whether the answer was good; `None` when there was none.
    fn call(&mut self) -> Option<bool> {
        self.connection.write_all(&self.request).ok()?;
        let end = head(&mut self.connection, &mut self.read)?;
        let text = String::from_utf8_lossy(&self.read[..end]).to_ascii_lowercase();
        let good = text.starts_with("http/1.1 200");
        let chunked = text.contains("transfer-encoding: chunked");
        let length =
            text.split("content-length: ").nth(1).and_then(|rest| rest.split("\r\n").next()?.parse().ok());
        self.read.drain(..end);
        let mut piece = [0; 4096];
        loop {
            let done = match length {
                Some(length) if self.read.len() >= length => Some(length),
                None if chunked && self.read.ends_with(b"0\r\n\r\n") => Some(self.read.len()),
                _ => None,
            };
            if let Some(done) = done {
                self.read.drain(..done);
                return Some(good);
            }
            match self.connection.read(&mut piece) {
                Ok(0) | Err(_) => return None,
                Ok(amount) => self.read.extend_from_slice(&piece[..amount]),
            }
        }
    }
}

fn calls(port: u16, path: &str, count: u64, pause_ms: u64) {
    let mut client = Client::open(port, path).expect("connect");
    let mut took = Vec::new();
    for _ in 0..count {
        if pause_ms > 0 {
            std::thread::sleep(Duration::from_millis(pause_ms));
        }
        let start = Instant::now();
        assert_eq!(client.call(), Some(true), "a call failed");
        took.push(start.elapsed().as_nanos());
    }
    took.iter().for_each(|nanos| println!("{nanos}"));
}

fn load(port: u16, path: &str, callers: u64, seconds: u64) {
    let (answers, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let failed = Arc::new(AtomicU64::new(0));
    let threads: Vec<_> = (0..callers)
        .map(|_| {
            let (answers, over, failed, path) =
                (answers.clone(), over.clone(), failed.clone(), path.to_owned());
            std::thread::spawn(move || {
                let mut client = Client::open(port, &path).expect("connect");
                while !over.load(Ordering::Relaxed) {
                    match client.call() {
                        Some(true) => drop(answers.fetch_add(1, Ordering::Relaxed)),
                        Some(false) => drop(failed.fetch_add(1, Ordering::Relaxed)),
                        None => client = Client::open(port, &path).expect("connect"),
                    }
                }
            })
        })
        .collect();
    let start = Instant::now();
    std::thread::sleep(Duration::from_secs(seconds));
    let (count, failed) = (answers.load(Ordering::Relaxed), failed.load(Ordering::Relaxed));
    println!("{:.0} {failed}", count as f64 / start.elapsed().as_secs_f64());
    over.store(true, Ordering::Relaxed);
    threads.into_iter().for_each(|thread| drop(thread.join()));
}

fn until(port: u16, path: &str) {
    let start = Instant::now();
    loop {
        if let Ok(mut client) = Client::open(port, path)
            && client.call() == Some(true)
        {
            println!("{}", start.elapsed().as_nanos());
            return;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "no answer");
        std::thread::sleep(Duration::from_micros(500));
    }
}
