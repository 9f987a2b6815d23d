//! Between a broker and a client: counts what the broker delivers, so that a test can act in the
//! middle of it, and passes everything on.
//!
//! `EarlyAcknowledgement` is the fault that the kill test exists to find: deliveries are
//! acknowledged at once and the client's own acknowledgements swallowed, so that what the client
//! has not committed when it is killed is lost. `EarlyTaking` is the same the other way: what the
//! client publishes is acknowledged before the broker has it, as if it were deleted when it is sent.

use super::free_port;
use super::packet::{self, Packet, Publish};
use std::io::{BufReader, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Faithful,
    EarlyAcknowledgement,
    EarlyTaking,
}

/// What `EarlyTaking` lets a packet wait, with those behind it.
const TAKING: Duration = Duration::from_micros(200);

/// Its threads end with their connections; the listener lives as long as the process.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    delivered: Arc<AtomicUsize>,
    acknowledged: Arc<AtomicUsize>,
}

impl Proxy {
    pub fn start(broker_port: u16, mode: Mode) -> Self {
        let port = free_port();
        let delivered = Arc::new(AtomicUsize::new(0));
        let acknowledged = Arc::new(AtomicUsize::new(0));
        let counts = (delivered.clone(), acknowledged.clone());
        let listener = TcpListener::bind(("127.0.0.1", port)).expect("listen");
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(broker) = TcpStream::connect(("127.0.0.1", broker_port)) else { continue };
                let (delivered, acknowledged) = counts.clone();
                std::thread::spawn(move || connection(client, broker, mode, &delivered, acknowledged));
            }
        });
        Self { port, delivered, acknowledged }
    }

    /// PUBLISH packets handed to the client so far, those delivered again too.
    pub fn delivered(&self) -> usize {
        self.delivered.load(Ordering::Acquire)
    }

    /// PUBACK packets of the client so far.
    pub fn acknowledged(&self) -> usize {
        self.acknowledged.load(Ordering::Acquire)
    }

    /// Returns within a fraction of a millisecond of the moment that `count` were handed over.
    pub fn wait_delivered(&self, count: usize, deadline: Duration) {
        let end = Instant::now() + deadline;
        while self.delivered() < count && Instant::now() < end {
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.port)
    }
}

fn connection(
    client: TcpStream,
    broker: TcpStream,
    mode: Mode,
    delivered: &AtomicUsize,
    acknowledged: Arc<AtomicUsize>,
) {
    for stream in [&client, &broker] {
        let _ = stream.set_nodelay(true);
    }
    let to_broker = Arc::new(Mutex::new(broker.try_clone().expect("clone a socket")));
    let (client_read, broker_read) =
        (client.try_clone().expect("clone a socket"), broker.try_clone().expect("clone a socket"));
    let to_client = Arc::new(Mutex::new(client));
    let (upwards, downwards) = (to_broker.clone(), to_client.clone());
    let up = std::thread::spawn(move || {
        let late = (mode == Mode::EarlyTaking).then(|| late(upwards.clone()));
        let mut reader = BufReader::new(&client_read);
        while let Ok(Some(packet)) = Packet::read(&mut reader) {
            let puback = packet.kind == packet::PUBACK;
            let swallowed = mode == Mode::EarlyAcknowledgement && puback;
            if late.is_some()
                && packet.kind == packet::PUBLISH
                && let Ok(Publish { packet_id: Some(packet_id), .. }) = Publish::parse(&packet, 4)
                && send(&downwards, &packet::puback(packet_id, 0)).is_err()
            {
                break;
            }
            let sent = match &late {
                _ if swallowed => true,
                Some(late) => late.send(packet).is_ok(),
                None => send(&upwards, &packet).is_ok(),
            };
            if !sent {
                break;
            }
            acknowledged.fetch_add(usize::from(puback), Ordering::Release);
        }
        let _ = client_read.shutdown(Shutdown::Both);
        let _ = broker.shutdown(Shutdown::Both);
    });

    let mut reader = BufReader::new(&broker_read);
    while let Ok(Some(packet)) = Packet::read(&mut reader) {
        if mode == Mode::EarlyTaking && packet.kind == packet::PUBACK {
            continue;
        }
        // The packet id stands behind the topic in both versions; level 4 leaves the rest alone.
        let publish = packet.kind == packet::PUBLISH;
        if publish
            && mode == Mode::EarlyAcknowledgement
            && let Ok(Publish { packet_id: Some(packet_id), .. }) = Publish::parse(&packet, 4)
            && send(&to_broker, &packet::puback(packet_id, 0)).is_err()
        {
            break;
        }
        if send(&to_client, &packet).is_err() {
            break;
        }
        if publish {
            delivered.fetch_add(1, Ordering::Release);
        }
    }
    let _ = to_client.lock().expect("no holder panics").shutdown(Shutdown::Both);
    let _ = broker_read.shutdown(Shutdown::Both);
    let _ = up.join();
}

/// Where packets wait for the broker; they are lost with the connection.
fn late(to_broker: Arc<Mutex<TcpStream>>) -> std::sync::mpsc::Sender<Packet> {
    let (late, waiting) = std::sync::mpsc::channel::<Packet>();
    std::thread::spawn(move || {
        for packet in waiting {
            std::thread::sleep(TAKING);
            if send(&to_broker, &packet).is_err() {
                return;
            }
        }
    });
    late
}

fn send(stream: &Mutex<TcpStream>, packet: &Packet) -> std::io::Result<()> {
    stream.lock().expect("no holder panics").write_all(&packet.to_bytes())
}
