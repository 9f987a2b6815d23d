//! Brokers that misbehave, a few lines of script each.

use super::gateway::{Ahead, Gateway, SOON, Setup, broker, function};
use crate::support::packet::{self, Connect, Packet, Publish};
use crate::support::{TestDir, wait_until};
use neap::model::Target;
use std::io::{BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What a scripted broker saw, and how often it was connected to.
#[derive(Default)]
pub struct Seen {
    connections: usize,
    levels: Vec<u8>,
    pub published: Vec<Publish>,
    /// A PUBLISH that waits for `Scripted::release`.
    pub held: Option<u16>,
    pubacks: Vec<u16>,
    in_flight: usize,
    in_flight_max: usize,
}

pub struct Scripted {
    pub port: u16,
    seen: Arc<Mutex<Seen>>,
    /// Of the connection that came last.
    writer: Arc<Mutex<Option<TcpStream>>>,
}

/// What to answer to a packet; `None` hangs up.
pub type Script = fn(&Packet, u8, &mut Seen) -> Option<Vec<u8>>;

impl Scripted {
    pub fn start(script: Script) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
        let port = listener.local_addr().expect("an address").port();
        let seen = Arc::new(Mutex::new(Seen::default()));
        let writer = Arc::new(Mutex::new(None));
        let (shared, last) = (seen.clone(), writer.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                *last.lock().expect("no holder panics") = stream.try_clone().ok();
                shared.lock().expect("no holder panics").connections += 1;
                let shared = shared.clone();
                std::thread::spawn(move || serve(stream, script, &shared));
            }
        });
        Self { port, seen, writer }
    }

    /// Acknowledges the one that was held.
    pub fn release(&self) {
        let pkid = {
            let mut seen = self.seen.lock().expect("no holder panics");
            seen.in_flight -= 1;
            seen.held.take().expect("one is held")
        };
        let writer = self.writer.lock().expect("no holder panics");
        let mut writer = writer.as_ref().expect("there is a connection");
        writer.write_all(&packet::puback(pkid, 0).to_bytes()).expect("write to neap");
    }

    pub fn look<T>(&self, at: impl Fn(&Seen) -> T) -> T {
        at(&self.seen.lock().expect("no holder panics"))
    }
}

fn serve(stream: TcpStream, script: Script, seen: &Mutex<Seen>) {
    let mut writer = stream.try_clone().expect("clone a socket");
    let mut reader = BufReader::new(stream);
    let mut level = 0;
    while let Ok(Some(packet)) = Packet::read(&mut reader) {
        let answer = {
            let mut seen = seen.lock().expect("no holder panics");
            match packet.kind {
                packet::CONNECT => {
                    level = Connect::parse(&packet.body).expect("a good CONNECT").level;
                    seen.levels.push(level);
                }
                packet::PUBLISH => {
                    let publish = Publish::parse(&packet, level).expect("a good PUBLISH");
                    seen.published.push(publish);
                    seen.in_flight += 1;
                    seen.in_flight_max = seen.in_flight_max.max(seen.in_flight);
                }
                packet::PUBACK => seen.pubacks.push(u16::from_be_bytes([packet.body[0], packet.body[1]])),
                _ => {}
            }
            script(&packet, level, &mut seen)
        };
        let Some(answer) = answer else {
            // `Scripted` has another handle of the socket.
            let _ = writer.shutdown(std::net::Shutdown::Both);
            return;
        };
        if writer.write_all(&answer).is_err() {
            return;
        }
    }
}

fn connack(level: u8) -> Vec<u8> {
    if level == 5 { vec![0x20, 3, 0, 0, 0] } else { vec![0x20, 2, 0, 0] }
}

fn suback(packet: &Packet, level: u8) -> Vec<u8> {
    let (pkid, filters) = packet::filters(packet, level).expect("a good SUBSCRIBE");
    let mut body = pkid.to_be_bytes().to_vec();
    if level == 5 {
        body.push(0);
    }
    body.extend(filters.iter().map(|_| 1));
    Packet::new(packet::SUBACK, 0, body).to_bytes()
}

fn publish(pkid: u16, topic: &str, level: u8, payload: &[u8]) -> Vec<u8> {
    let mut body = (topic.len() as u16).to_be_bytes().to_vec();
    body.extend_from_slice(topic.as_bytes());
    body.extend_from_slice(&pkid.to_be_bytes());
    if level == 5 {
        body.push(0);
    }
    body.extend_from_slice(payload);
    Packet::new(packet::PUBLISH, 2, body).to_bytes()
}

/// What every script answers unless it has something of its own.
pub fn ordinary(packet: &Packet, level: u8, seen: &mut Seen) -> Option<Vec<u8>> {
    match packet.kind {
        packet::CONNECT => Some(connack(level)),
        packet::SUBSCRIBE => Some(suback(packet, level)),
        packet::PINGREQ => Some(vec![0xD0, 0]),
        packet::PUBLISH => {
            seen.in_flight -= 1;
            let pkid = seen.published.last().and_then(|p| p.packet_id)?;
            Some(packet::puback(pkid, 0).to_bytes())
        }
        packet::DISCONNECT => None,
        _ => Some(Vec::new()),
    }
}

fn listening(port: u16) -> Setup {
    Setup { local: Some(broker(port, "neap-gw")), functions: vec![function("f", "s/#")], ..Setup::default() }
}

fn uplink(port: u16) -> Setup {
    Setup { uplink: Some(broker(port, "neap-gw")), ..Setup::default() }
}

#[test]
fn acknowledgements_go_out_in_the_order_in_which_messages_came() {
    let scripted = Scripted::start(|packet, level, seen| {
        let mut answer = ordinary(packet, level, seen)?;
        if packet.kind == packet::SUBSCRIBE {
            for pkid in 1..=200 {
                // Sizes vary, so that commits could finish out of order.
                answer.extend(publish(pkid, "s/1", level, &vec![b'x'; usize::from(pkid % 7) * 5000]));
            }
        }
        Some(answer)
    });
    let dir = TestDir::new("mqtt");
    let gateway = Gateway::start(&dir, listening(scripted.port));

    wait_until(SOON, "200 acknowledgements", || scripted.look(|seen| seen.pubacks.len()) == 200);

    assert_eq!(scripted.look(|seen| seen.pubacks.clone()), (1..=200).collect::<Vec<u16>>());
    assert_eq!(gateway.arrived(), 200);
}

#[test]
fn malformed_packets_end_the_connection_and_nothing_else() {
    let scripted = Scripted::start(|packet, level, seen| {
        let answer = ordinary(packet, level, seen)?;
        if packet.kind != packet::SUBSCRIBE {
            return Some(answer);
        }
        let bad: [&[u8]; 5] = [
            &[0x32, 6, 0, 1, 0xFF, 0, 9, 0],    // a topic that is not UTF-8
            &[0x34, 6, 0, 1, b'a', 0, 9, 0],    // QoS 2
            &[0x32, 6, 0, 9, b'a', 0, 9, 0],    // a topic longer than the packet
            &[0xF0, 0],                         // AUTH
            &[0x32, 0xFF, 0xFF, 0xFF, 0xFF, 1], // an endless length
        ];
        match bad.get(seen.connections - 1) {
            Some(bad) => Some([&answer[..], bad].concat()),
            None => Some([answer, publish(7, "s/1", level, b"well")].concat()),
        }
    });
    let dir = TestDir::new("mqtt");
    let gateway = Gateway::start(&dir, listening(scripted.port));

    let events = gateway.wait_events(1);

    assert_eq!(events[0].event.data, b"well");
    assert_eq!(scripted.look(|seen| seen.connections), 6);
}

#[test]
fn window_is_never_larger_than_the_broker_allows() {
    let scripted = Scripted::start(|packet, level, seen| match packet.kind {
        packet::CONNECT => Some(vec![0x20, 6, 0, 0, 3, 0x21, 0, 1]), // receive maximum 1
        _ => {
            // Long enough for a second PUBLISH to come, if one is under way.
            std::thread::sleep(Duration::from_millis(2));
            ordinary(packet, level, seen)
        }
    });
    let dir = TestDir::new("mqtt");
    let gateway = Gateway::start(&dir, uplink(scripted.port));
    for n in 0..50u8 {
        gateway.owe(Target::Uplink, "a", &[n], None);
    }
    gateway.wait_drained(Target::Uplink);

    let numbers = scripted.look(|seen| seen.published.iter().map(|p| p.payload[0]).collect::<Vec<_>>());
    assert_eq!(numbers, (0..50).collect::<Vec<_>>());
    assert_eq!(scripted.look(|seen| seen.in_flight_max), 1);
}

#[test]
fn broker_that_hangs_up_on_mqtt_5_is_asked_in_3_1_1() {
    let scripted = Scripted::start(|packet, level, seen| {
        if packet.kind == packet::CONNECT && level == 5 { None } else { ordinary(packet, level, seen) }
    });
    let dir = TestDir::new("mqtt");
    let gateway = Gateway::start(&dir, uplink(scripted.port));

    gateway.wait_up(Target::Uplink);

    assert_eq!(scripted.look(|seen| seen.levels.clone()), [5, 4]);
}

#[test]
fn exceeded_quota_is_no_refusal() {
    let scripted = Scripted::start(|packet, level, seen| {
        if packet.kind == packet::PUBLISH && seen.published.len() == 3 {
            seen.in_flight -= 1;
            let pkid = seen.published[2].packet_id?;
            return Some(packet::puback(pkid, 0x97).to_bytes());
        }
        ordinary(packet, level, seen)
    });
    let dir = TestDir::new("mqtt");
    let gateway = Gateway::start(&dir, uplink(scripted.port));
    for n in 0..6u8 {
        gateway.owe(Target::Uplink, "a", &[n], None);
    }
    gateway.wait_drained(Target::Uplink);

    let numbers = scripted.look(|seen| seen.published.iter().map(|p| p.payload[0]).collect::<Vec<_>>());
    assert_eq!(numbers.iter().filter(|n| **n == 2).count(), 2, "{numbers:?}");
    let counts = smol::block_on(gateway.store.counts()).expect("count");
    assert_eq!(counts.dead_deliveries, 0);
    assert_eq!(scripted.look(|seen| seen.connections), 1);
}

/// A broker that takes everything, acknowledges nothing, and answers no ping.
fn deaf(packet: &Packet, level: u8, seen: &mut Seen) -> Option<Vec<u8>> {
    match packet.kind {
        packet::CONNECT => Some(vec![0x20, 6, 0, 0, 3, 0x13, 0, 1]), // server keep-alive 1 s
        packet::PUBLISH if seen.connections > 1 => ordinary(packet, level, seen),
        packet::PUBLISH | packet::PINGREQ => Some(Vec::new()),
        _ => ordinary(packet, level, seen),
    }
}

#[test]
fn queue_that_does_not_move_is_sent_again_over_a_new_connection() {
    let scripted = Scripted::start(|packet, level, seen| match packet.kind {
        packet::PINGREQ => Some(vec![0xD0, 0]),
        _ => deaf(packet, level, seen),
    });
    let dir = TestDir::new("mqtt");
    let ahead = Ahead::default();
    let gateway = Gateway::start(&dir, Setup { ahead: ahead.clone(), ..uplink(scripted.port) });
    gateway.owe(Target::Uplink, "a", b"1", None);
    wait_until(SOON, "it is sent", || scripted.look(|seen| seen.published.len()) == 1);

    ahead.advance(Duration::from_secs(31));

    gateway.wait_drained(Target::Uplink);
    assert_eq!(scripted.look(|seen| (seen.connections, seen.published.len())), (2, 2));
    let counts = smol::block_on(gateway.store.counts()).expect("count");
    assert_eq!(counts.dead_deliveries, 0);
}

#[test]
fn broker_that_answers_no_ping_is_left() {
    let scripted = Scripted::start(deaf);
    let dir = TestDir::new("mqtt");
    let ahead = Ahead::default();
    let gateway = Gateway::start(&dir, Setup { ahead: ahead.clone(), ..uplink(scripted.port) });
    gateway.wait_up(Target::Uplink);

    wait_until(SOON, "a second connection", || {
        ahead.advance(Duration::from_millis(500));
        scripted.look(|seen| seen.connections) > 1
    });

    wait_until(SOON, "it is told", || {
        gateway.uplink.get().last_error.as_deref().is_none_or(|e| e.contains("ping"))
    });
}

#[test]
fn anything_but_a_broker_is_told_apart() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = listener.local_addr().expect("an address").port();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        }
    });
    let dir = TestDir::new("mqtt");
    let gateway = Gateway::start(&dir, uplink(port));

    wait_until(SOON, "the error", || {
        gateway.uplink.get().last_error.as_deref().is_some_and(|e| e.contains("is this an MQTT broker?"))
    });
}
