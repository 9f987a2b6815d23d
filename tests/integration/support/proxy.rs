//! Between a broker and a client: acknowledges what the broker delivers at once, and swallows
//! the client's own acknowledgements. With it in between, what the client has not committed
//! when it is killed is lost: the fault that the kill test exists to find.

use super::free_port;
use super::packet::{self, Packet, Publish};
use std::io::{BufReader, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// Its threads end with their connections; the listener lives as long as the process.
#[derive(Debug)]
pub struct EarlyAckProxy {
    port: u16,
}

impl EarlyAckProxy {
    pub fn start(broker_port: u16) -> Self {
        let port = free_port();
        let listener = TcpListener::bind(("127.0.0.1", port)).expect("listen");
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(broker) = TcpStream::connect(("127.0.0.1", broker_port)) else { continue };
                std::thread::spawn(move || connection(client, broker));
            }
        });
        Self { port }
    }

    pub fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.port)
    }
}

fn connection(client: TcpStream, broker: TcpStream) {
    let to_broker = Arc::new(Mutex::new(broker.try_clone().expect("clone a socket")));
    let (client_read, broker_read) =
        (client.try_clone().expect("clone a socket"), broker.try_clone().expect("clone a socket"));
    let upwards = to_broker.clone();
    let up = std::thread::spawn(move || {
        let mut reader = BufReader::new(&client_read);
        while let Ok(Some(packet)) = Packet::read(&mut reader) {
            if packet.kind != packet::PUBACK && send(&upwards, &packet).is_err() {
                break;
            }
        }
        let _ = client_read.shutdown(Shutdown::Both);
        let _ = broker.shutdown(Shutdown::Both);
    });

    let to_client = Mutex::new(client);
    let mut reader = BufReader::new(&broker_read);
    while let Ok(Some(packet)) = Packet::read(&mut reader) {
        // The packet id stands behind the topic in both versions; level 4 leaves the rest alone.
        if packet.kind == packet::PUBLISH
            && let Ok(Publish { packet_id: Some(packet_id), .. }) = Publish::parse(&packet, 4)
            && send(&to_broker, &packet::puback(packet_id, 0)).is_err()
        {
            break;
        }
        if send(&to_client, &packet).is_err() {
            break;
        }
    }
    let _ = to_client.into_inner().expect("no holder panics").shutdown(Shutdown::Both);
    let _ = broker_read.shutdown(Shutdown::Both);
    let _ = up.join();
}

fn send(stream: &Mutex<TcpStream>, packet: &Packet) -> std::io::Result<()> {
    stream.lock().expect("no holder panics").write_all(&packet.to_bytes())
}
